"""Join two attentions over disjoint keys by their log-sum-exp, in one small Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit(do_not_specialize=["queries"])
def _merge_kernel(
    first,
    first_lse,
    second,
    second_lse,
    merged,
    queries,
    first_stride_b,
    first_stride_h,
    first_stride_q,
    second_stride_b,
    second_stride_h,
    second_stride_q,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per `ROWS` queries of one head and request; log-sum-exps are contiguous, [B, H, Q]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, DIM)
    inside = row < queries
    lse_at = (b * HEADS + h) * queries + row
    one = tl.load(first_lse + lse_at, mask=inside, other=0.0)
    two = tl.load(second_lse + lse_at, mask=inside, other=0.0)
    share = 1.0 / (1.0 + tl.exp(two - one))
    mask = inside[:, None] & (dim < DIM)[None, :]
    first_at = b * first_stride_b + h * first_stride_h + row[:, None] * first_stride_q + dim[None, :]
    second_at = b * second_stride_b + h * second_stride_h + row[:, None] * second_stride_q + dim[None, :]
    a = tl.load(first + first_at, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(second + second_at, mask=mask, other=0.0).to(tl.float32)
    out = c + share[:, None] * (a - c)
    out_at = ((b * queries + row[:, None]) * HEADS + h) * DIM + dim[None, :]
    tl.store(merged + out_at, out.to(merged.dtype.element_ty), mask=mask)


def merge_triton(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Outputs [B, H, Q, D] of any strides (last dimension contiguous), lse float32 [B, H, Q]; gives [B·Q, H, D]."""
    batch, heads, queries, dim = first.shape
    merged = torch.empty(batch * queries, heads, dim, dtype=first.dtype, device=first.device)
    grid = (triton.cdiv(queries, ROWS), heads, batch)
    _merge_kernel[grid](
        first,
        first_lse.contiguous(),
        second,
        second_lse.contiguous(),
        merged,
        queries,
        *first.stride()[:3],
        *second.stride()[:3],
        HEADS=heads,
        DIM=dim,
        ROWS=ROWS,
    )
    return merged
