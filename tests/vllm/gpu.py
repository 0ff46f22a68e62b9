"""vLLM 0.33 on a GPU without its compiled modules: what a Llama asks of them, in PyTorch, and what has to be left out.

For a machine that cannot have vLLM's wheel (330 MB, and a PyTorch of its own): `tests/vllm/pack` packs the rest of
it, and `python -m benchmarks serving --stand-ins` runs with this. Attention, cache writes and the model runner's
bookkeeping are Triton kernels in vLLM's Python files, and so the same as ever; norms, rotary positions and activations
run in the PyTorch forms that vLLM has of them, which `benchmarks.serving.cases.engine_arguments` asks for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPILED = (
    "_C_stable_libtorch", "_moe_C_stable_libtorch", "_deepselect_C", "_flashkda_C", "_flashmla_C",
    "_flashmla_extension_C", "_qutlass_C", "cumem_allocator", "fs_io_C", "spinloop", "vllm_flash_attn._vllm_fa2_C",
    "vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip
"""Modules of the wheel of 0.33.0 that are not Python."""

_operators = torch.library.Library("_C", "FRAGMENT")


class _PinnedMemory:
    """The bytes of a pinned tensor as CUDA's array interface shows memory; holds the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _cuda_view(tensor: Tensor) -> Tensor:
    """The same memory as a CUDA tensor; a device of unified addressing reads it where it lies."""
    if not tensor.is_pinned() or not tensor.is_contiguous():
        raise ValueError("get_cuda_view_from_cpu_tensor: expected contiguous pinned memory, got other")
    if not tensor.numel():
        return tensor.new_empty(tensor.shape, device="cuda")
    view = torch.as_tensor(_PinnedMemory(tensor), device="cuda")
    if view.data_ptr() != tensor.data_ptr():
        raise ValueError("get_cuda_view_from_cpu_tensor: expected a view, got a copy")
    return view.view(tensor.dtype).view(tensor.shape)


def _silu_and_mul(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _unsupported(capability: int) -> bool:
    return False


OPERATORS: dict[str, Callable[..., Any]] = {
    # the model runner's request states lie in pinned memory that kernels read
    "get_cuda_view_from_cpu_tensor(Tensor t) -> Tensor": _cuda_view,
    # outputs of captured graphs; a strong reference keeps what the graphs' own pool keeps anyway
    "weak_ref_tensor(Tensor(a) t) -> Tensor(a)": lambda tensor: tensor.view(tensor.shape),
    # an activation looks it up when it is made, and then takes its PyTorch form
    "silu_and_mul(Tensor(a!) out, Tensor x) -> ()": _silu_and_mul,
    # modules of quantised layers ask for them while they are imported
    "cutlass_scaled_mm_supports_fp8(int capability) -> bool": _unsupported,
    "cutlass_scaled_mm_supports_block_fp8(int capability) -> bool": _unsupported,
}
EMPTY = (
    "vllm._C_stable_libtorch",  # the platform of CUDA imports it
    "vllm.vllm_flash_attn._vllm_fa2_C",  # every attention layer imports FlashAttention's interface
)


def missing() -> list[str]:
    """Which of `COMPILED` are not beside vLLM's Python files."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return list(COMPILED)
    root = Path(found.submodule_search_locations[0])
    return [name for name in COMPILED if not list(root.glob(name.replace(".", "/") + ".*so"))]


def install() -> None:
    """Before anything of vLLM is imported, in each process.

    Raises:
        RuntimeError: vLLM has its compiled modules, which nothing should stand in for.
    """
    if set(missing()) < set(COMPILED):
        present = ", ".join(sorted(set(COMPILED) - set(missing())))
        raise RuntimeError(f"stand-ins: expected a vLLM without compiled modules, got one with {present}")
    for name in EMPTY:
        sys.modules[name] = types.ModuleType(name)
    for signature, run in OPERATORS.items():
        _operators.define(signature)
        _operators.impl(signature.split("(")[0], run, "CompositeExplicitAutograd")
    _leave_out()


def _leave_out() -> None:
    """What vLLM would do beside running the model."""
    import vllm.v1.worker.gpu_worker as worker
    from vllm.model_executor.models import registry
    from vllm.v1.sample.ops import topk_topp_sampler

    # A process that looks at the model's class would need the stand-ins too.
    registry._run_in_subprocess = lambda run: run()
    # Of kernels that are not here, and of other models' kernels. Triton compiles this model's when they first run.
    worker.kernel_warmup = lambda *arguments, **named: None
    # Only the profiling run asks for it, and its kernel is written for a newer Triton than 3.6.
    in_pytorch = topk_topp_sampler.apply_top_k_top_p_pytorch
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **named: in_pytorch(logits, k, p)
    # It profiles memory more exactly, through functions of a newer PyTorch than 2.11.
    if not hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        worker.Worker._scoped_allocator_max_split = lambda self, max_split_size_mb: contextlib.nullcontext()
