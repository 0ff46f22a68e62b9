"""FlashInfer's paged attention, where it is installed: the dense peer that reads the same pages as this library."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.baselines import CannotRunError
from benchmarks.workloads import Step

WORKSPACE_BYTES = 512 << 20


def flashinfer() -> ModuleType:
    """The package.

    Raises:
        CannotRunError: it is not installed.
    """
    if importlib.util.find_spec("flashinfer") is None:
        raise CannotRunError("the package flashinfer is not installed")
    return importlib.import_module("flashinfer")


def dense_paged(step: Step) -> Callable[[], Tensor]:
    """Bottom-right causal attention over every page; the plan is made here, the call runs the kernel alone.

    Raises:
        CannotRunError: no CUDA device, or no flashinfer.
    """
    if step.q.device.type != "cuda":
        raise CannotRunError("FlashInfer needs a CUDA device")
    return planned(flashinfer(), step)


def planned(package: ModuleType, step: Step) -> Callable[[], Tensor]:
    """Plan a step with FlashInfer's wrapper for ragged queries over a paged cache in token-major layout."""
    kv, batch, shape = step.kv, step.batch, step.shape
    lens = batch.seq_lens.tolist()
    used = [-(-length // kv.page_size) for length in lens]
    pages = torch.cat([kv.page_table[b, :count] for b, count in enumerate(used)])
    offsets = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    filled = torch.tensor([(length - 1) % kv.page_size + 1 for length in lens], dtype=torch.int32)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=step.q.device)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    device = step.q.device
    wrapper.plan(
        batch.cu_seqlens_q,
        offsets.to(device),
        pages,
        filled.to(device),
        shape.q_heads,
        shape.kv_heads,
        shape.head_dim,
        kv.page_size,
        causal=True,
        q_data_type=step.q.dtype,
        kv_data_type=kv.k.dtype,
    )
    return lambda: wrapper.run(step.q, (kv.k, kv.v))
