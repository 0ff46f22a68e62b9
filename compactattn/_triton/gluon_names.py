"""Names that Gluon changed, the newer first; the only place that knows of Triton versions.

`barrier` came in Triton 3.7, `async_load` and `reinterpret` after it. A name with neither form fails here, at import.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

_smem = gl.shared_memory_descriptor

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
reinterpret = _smem.reinterpret if hasattr(_smem, "reinterpret") else _smem._reinterpret
