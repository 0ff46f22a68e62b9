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


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's CUDA device current for a launch; free when it already is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the CPU, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlapped_launch(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls `gdc_wait`: on Hopper and later it starts while its predecessor ends.

    Such a kernel takes OVERLAP, waits for its predecessor before it reads what a kernel of this library wrote or
    writes anything, and only then lets its successor start. So whatever was there before the first of a chain of
    kernels (lengths, page table, queries) may be read without waiting by all but the first.
    """
    overlap = capability(device)[0] >= 9
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}
