"""Merge attention over two sets of keys by their log-sum-exps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.launch import launch

ELEMENTS = 2048  # of the outputs that a program merges


@triton.jit
def _seen(lse):
    """+inf is how FlashAttention-2 says that a row has no key."""
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    out_a,
    out_a_stride_token,
    out_a_stride_head,
    lse_a,
    lse_a_stride_token,
    lse_a_stride_head,
    out_b,
    out_b_stride_token,
    out_b_stride_head,
    lse_b,
    lse_b_stride_token,
    lse_b_stride_head,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per ROWS (token, head) pairs; lse is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    token = row // HEADS
    head = row % HEADS
    dim = tl.arange(0, DIM_PADDED)
    inside = valid[:, None] & (dim < DIM)[None, :]
    a = _seen(tl.load(lse_a + token * lse_a_stride_token + head * lse_a_stride_head, mask=valid, other=0.0))
    b = _seen(tl.load(lse_b + token * lse_b_stride_token + head * lse_b_stride_head, mask=valid, other=0.0))
    top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(a - base)
    weight_b = tl.exp(b - base)
    total = weight_a + weight_b
    total = tl.where(total == 0.0, 1.0, total)
    offset_a = token * out_a_stride_token + head * out_a_stride_head
    offset_b = token * out_b_stride_token + head * out_b_stride_head
    seen_a = inside & (a != float("-inf"))[:, None]
    seen_b = inside & (b != float("-inf"))[:, None]
    part_a = tl.load(out_a + offset_a[:, None] + dim[None, :], mask=seen_a, other=0.0).to(tl.float32)
    part_b = tl.load(out_b + offset_b[:, None] + dim[None, :], mask=seen_b, other=0.0).to(tl.float32)
    result = tl.div_rn(part_a * weight_a[:, None] + part_b * weight_b[:, None], total[:, None])
    target = out + (token * out_stride_token + head * out_stride_head)[:, None] + dim[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, top + tl.log(total), mask=valid)


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write the merged out [T, Hq, D] (which may be out_a or out_b) and contiguous lse float32 [T, Hq]."""
    tokens, heads, dim = out.shape
    if out.numel() == 0:
        return
    padded = next_power_of_2(dim)
    rows = max(1, ELEMENTS // padded)
    with on_device(out):
        launch(
            _merge_kernel,
            (-(-tokens * heads // rows),),
            out_a,
            *out_a.stride()[:2],
            lse_a,
            *lse_a.stride(),
            out_b,
            *out_b.stride()[:2],
            lse_b,
            *lse_b.stride(),
            out,
            *out.stride()[:2],
            lse,
            tokens * heads,
            constants={"HEADS": heads, "DIM": dim, "DIM_PADDED": padded, "ROWS": rows},
            device=out.device,
            num_warps=4,
        )
