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


def _slots_of_0_32(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    block_table_stride: int,
    slot_mapping: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int = 1,
    TOTAL_CP_RANK: int = 0,
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,
    PAD_ID: int = -1,
    BLOCK_SIZE: int = 1024,
) -> None:
    """vLLM 0.32.0's own for the CPU still has the arguments of 0.31, which nobody passes any more."""
    torch.ops._C.compute_slot_mapping_kernel_impl(
        query_start_loc, positions, block_table, slot_mapping, KV_CACHE_BLOCK_SIZE
    )


def use_cpu() -> None:
    """Give this process's vLLM what it needs on the CPU; skips the module where its platform is another."""
    _define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    _define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
        "Tensor(a!) slots, int block_size) -> ()",
        _slots,
    )
    _define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1))
    import vllm

    if vllm.__version__.startswith("0.32."):
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._compute_slot_mapping_kernel_impl = _slots_of_0_32
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM does not run on the CPU; tests/vllm/run brings one that does", allow_module_level=True)
