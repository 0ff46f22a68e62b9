"""vLLM on the CPU without its native code: the few native operators that its engine calls there, in PyTorch."""

from __future__ import annotations

import os
from itertools import pairwise

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, at most; the tests give the number of blocks
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

_operators = torch.library.Library("_C", "FRAGMENT")


def _define(signature: str, run: object) -> None:
    name = signature.split("(")[0]
    if not hasattr(torch.ops._C, name):  # a build for the CPU has its own
        _operators.define(signature)
        _operators.impl(name, run, "CompositeExplicitAutograd")


def _slots(query_start_loc: Tensor, positions: Tensor, block_table: Tensor, slots: Tensor, block_size: int) -> None:
    """Where each token goes: its block's id times the block size, and its place there; -1 for padding."""
    starts = query_start_loc.tolist()
    slots[starts[-1] :] = -1
    for request, (start, stop) in enumerate(pairwise(starts)):
        position = positions[start:stop]
        slots[start:stop] = block_table[request, position // block_size].long() * block_size + position % block_size


def use_cpu() -> None:
    """Give this process's vLLM what it needs on the CPU; skips the module where its platform is another."""
    _define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    _define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
        "Tensor(a!) slots, int block_size) -> ()",
        _slots,
    )
    _define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1))
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM does not run on the CPU; tests/vllm/run brings one that does", allow_module_level=True)
