"""Which backend runs: Triton for CUDA tensors, numba for CPU tensors, or the one that was asked for."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Literal

import torch

from compactattn.data import PagedKV
from compactattn.validation import fail

Backend = Literal["triton", "numba"]
BACKENDS: tuple[Backend, ...] = ("triton", "numba")


def resolve_backend(backend: str | None, device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """The backend for tensors on `device`, of `dtype` where products are computed; never a silent fallback.

    Raises:
        ValueError: an unknown name, a device that no backend serves, or a backend that cannot run here; the
            message names the valid ones.
    """
    if backend is not None and backend not in BACKENDS:
        raise fail("backend", "None, 'triton' or 'numba'", repr(backend))
    if device.type not in ("cuda", "cpu"):
        raise fail("backend", "tensors on a CUDA device ('triton') or on the CPU ('numba')", f"{device} tensors")
    chosen: Backend = "triton" if device.type == "cuda" else "numba"
    if backend is not None and backend != chosen:
        reason = unavailable(backend, device)
        if reason is not None:
            raise fail("backend", f"{chosen!r} (or None) for {device.type} tensors", f"{backend!r}: {reason}")
        chosen = "triton"
        if dtype == torch.bfloat16 and device.type == "cpu":  # its bfloat16 products are wrong
            raise fail("backend", "float16 or float32 tensors under Triton's interpreter", f"{backend!r} and {dtype}")
    elif chosen == "triton" and not has_triton():
        raise fail("backend", "an installed triton for CUDA tensors", "none")
    return chosen


def check_cache_dtype(kv: PagedKV, backend: Backend) -> None:
    """Refuse an FP8 cache where the GPU has no instruction that reads its numbers.

    Raises:
        ValueError: a float8_e4m3fn cache on a GPU of compute capability below 8.9.
    """
    if kv.k_scale is not None and backend == "triton" and kv.k.is_cuda:
        major, minor = torch.cuda.get_device_capability(kv.k.device)
        if (major, minor) < (8, 9):
            wanted = "a cache of float16, bfloat16 or float32 on a GPU of compute capability below 8.9"
            raise fail("kv.k", wanted, f"{kv.k.dtype} on {major}.{minor}")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; looked up once."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def replays() -> ModuleType:
    """The module that repeats launches. It needs Triton; an import in every call would cost the host a microsecond."""
    from compactattn._triton import replay

    return replay


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run tensors on `device`, or None if it can."""
    if backend == "numba":
        return None if device.type == "cpu" else "the numba backend runs CPU tensors only"
    if not has_triton():
        return "triton is not installed"
    if device.type == "cuda":
        return None
    from compactattn._triton import INTERPRETED

    if INTERPRETED:
        return None
    return "on CPU tensors Triton runs only under its interpreter (TRITON_INTERPRET=1, set before triton is imported)"
