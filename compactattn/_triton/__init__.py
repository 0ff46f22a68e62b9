"""The Triton backend: one file per stage, each with its kernel, its launcher and its tuning."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton


@triton.jit
def _probe() -> None:
    pass


#: True when Triton was imported with TRITON_INTERPRET=1: kernels then run in Python, on CPU tensors too.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


_CURRENT = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's CUDA device current for a launch; free when it already is."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _CURRENT


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n >= 1; Triton's own costs the host microseconds."""
    return 1 << (n - 1).bit_length()


def scale_and_stride(scale: torch.Tensor | None) -> tuple[torch.Tensor | None, int | None]:
    """Arguments of a kernel for the scales of an FP8 cache; what is None is compiled away."""
    return (None, None) if scale is None else (scale, scale.stride(0))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the CPU and under the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not INTERPRETED else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
