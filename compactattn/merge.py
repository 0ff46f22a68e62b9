"""Merge attention over two sets of keys by their log-sum-exps: shared prefixes, context parallelism, split caches."""

from __future__ import annotations

import torch
from torch import Tensor

from compactattn import operators
from compactattn.dispatch import resolve_backend
from compactattn.validation import (
    DTYPES,
    check_no_gradients,
    check_out,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)


def merge_attn_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    lse = log(exp(lse_a) + exp(lse_b)) and out = exp(lse_a - lse) · out_a + exp(lse_b - lse) · out_b, in float32. Where
    one side has seen nothing (lse -inf, or +inf as FlashAttention-2 says it) its output is not read, and the other
    side's comes through bit for bit; where neither has, out is 0 and lse -inf. Sink logits belong to one side alone.

    Args:
        out_a, out_b: [T, Hq, D], float16, bfloat16 or float32, one dtype; any D, last dimension contiguous.
        lse_a, lse_b: float32 [T, Hq], natural log, any strides: what `attend(..., return_lse=True)` gives.
        out: where to write the result, [T, Hq, D]; may be out_a or out_b itself, but not overlap them otherwise.
        backend: None (by device), "triton" or "numba".

    Returns:
        (out [T, Hq, D], lse float32 [T, Hq]).

    Raises:
        ValueError: wrong shape, dtype, device or stride, tensors that require gradients, or a backend that cannot
            run, before anything runs.
    """
    if torch.compiler.is_compiling():
        states = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
        return operators.call("merge_attn_states", **states, out=out, backend=backend)
    check_tensor("out_a", out_a, ndim=3)
    if out_a.dtype not in DTYPES:
        raise fail("out_a", "dtype float16, bfloat16 or float32", out_a.dtype)
    check_tensor("out_b", out_b, ndim=3, dtype=out_a.dtype)
    check_shape("out_b", out_b, tuple(out_a.shape), "that of out_a")
    check_same_device("out_b", out_b, out_a.device)
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, value, ndim=2, dtype=torch.float32)
        check_shape(name, value, tuple(out_a.shape[:2]), "T, Hq of out_a")
        check_same_device(name, value, out_a.device)
    for name, value in (("out_a", out_a), ("out_b", out_b)):
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            raise fail(name, "a contiguous last dimension (stride 1)", f"strides {value.stride()}")
        if out is not value:
            check_out(out, value, name)
    check_no_gradients("out_a, lse_a, out_b, lse_b", out_a, lse_a, out_b, lse_b)
    check_no_gradients("out", out)
    chosen = resolve_backend(backend, out_a.device, out_a.dtype)
    if out is None:
        out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=lse_a.device)
    if chosen == "triton":
        from compactattn._triton.merge import merge_attn_states as run
    else:
        from compactattn._numba.merge import merge_attn_states as run
    run(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse
