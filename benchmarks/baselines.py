"""What the library is compared with. Each function prepares a step and gives a call that returns out [T, Hq, D]
(FlexAttention: [B, Hq, chunk, D], so that no copy is timed).

All dense baselines compute bottom-right causal attention. cuDNN has no such mask for fewer queries than keys through
PyTorch, so the past runs without a mask, the current chunk runs causal, and the two are merged by log-sum-exp.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import table_mask
from benchmarks.workloads import Step
from compactattn import BlockTable
from compactattn.quality import QuokaSelection, quoka_attention, quoka_select

LOG = logging.getLogger("benchmarks")

Attention = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


class CannotRunError(RuntimeError):
    """A baseline that cannot run here; the message says why."""


def dense_cudnn(step: Step) -> Callable[[], Tensor]:
    """cuDNN's fused attention, past and current chunk apart, merged by log-sum-exp."""
    if step.q.device.type != "cuda":
        raise CannotRunError("cuDNN needs a CUDA device")
    return _split(step, fused_cudnn)


def dense_cpu(step: Step) -> Callable[[], Tensor]:
    """PyTorch's fused CPU attention (what scaled_dot_product_attention runs), split and merged in the same way."""
    if step.q.device.type != "cpu":
        raise CannotRunError("the CPU baseline needs CPU tensors")
    return _split(step, fused_cpu)


def dense_flash(step: Step) -> Callable[[], Tensor]:
    """FlashAttention-2 as shipped with PyTorch; causal is bottom-right in it when there are fewer queries than keys."""
    if step.q.device.type != "cuda":
        raise CannotRunError("PyTorch's FlashAttention-2 needs a CUDA device")
    q, k, v = _by_head(step, 0, step.context)

    return lambda: flash_attention(q, k, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bottom-right causal attention of q [B, Hq, n, D] over k and v [B, Hkv, L, D] in one call; gives [B·n, Hq, D]."""
    return packed(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[0])


def fused_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention and its log-sum-exp: q [B, Hq, n, D], k and v [B, Hkv, L, D], any strides."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)[:2]
    return out, lse.reshape(q.shape[:3])


def fused_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU attention and its log-sum-exp: q [B, Hq, n, D], k and v [B, Hkv, L, D].

    The query heads of a KV head are handed over as heads that share expanded, never copied, keys and values.
    """
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    shared = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    grouped = q.unflatten(1, (-1, group)).flatten(0, 1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, *shared, 0.0, causal)[:2]
    return out.unflatten(0, (batch, -1)).flatten(1, 2), lse.reshape(batch, heads, -1)


def _by_head(step: Step, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, chunk, D] and tokens `first` to `last` of k and v, [B, Hkv, n, D], all views."""
    if step.k is None or step.v is None:
        raise CannotRunError("the step was made without dense copies of K and V")
    q = step.q.view(step.shape.batch, step.chunk, step.shape.q_heads, step.shape.head_dim).transpose(1, 2)
    return q, step.k[:, :, first:last], step.v[:, :, first:last]


def _split(step: Step, attention: Attention) -> Callable[[], Tensor]:
    q, k, v = _by_head(step, 0, step.context)
    return lambda: split_attention(q, k, v, attention)


def split_attention(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
    """Bottom-right causal attention of q [B, Hq, n, D] over k and v [B, Hkv, L, D]; gives [B·n, Hq, D].

    Past without a mask, current chunk causal, merged.
    """
    past = k.shape[2] - q.shape[2]
    current, current_lse = attention(q, k[:, :, past:], v[:, :, past:], True)
    if past == 0:
        return packed(current)
    before, before_lse = attention(q, k[:, :, :past], v[:, :, :past], False)
    if q.device.type == "cuda":
        from benchmarks.merge import merge_triton as merge
    else:
        merge = merge_plain
    return merge(before, before_lse, current, current_lse)


def merge_plain(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Outputs [B, H, Q, D] over disjoint keys, with lse [B, H, Q] in natural log; gives [B·Q, H, D]."""
    share = torch.sigmoid(first_lse.float() - second_lse.float())[..., None]
    merged = torch.lerp(second.float(), first.float(), share).to(first.dtype)
    return packed(merged)


def flex(step: Step, table: BlockTable) -> Callable[[], Tensor]:
    """FlexAttention with the table's blocks: past blocks whole, the current region's masked causally."""
    if step.q.device.type != "cuda":
        raise CannotRunError("compiled FlexAttention is timed on CUDA only")
    return flex_call(step, table, _compiled_flex())


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """One compilation serves every step of the same capacity and chunk: lengths are tensors or index lists."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex_call(step: Step, table: BlockTable, attention: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Compiled `flex_attention` over the whole dense copies; out is [B, Hq, chunk, D].

    The block mask names only valid tokens. (Uncompiled, flex_attention heeds the causal mask alone.)
    """
    q, k, v = _by_head(step, 0, 0 if step.k is None else step.k.shape[2])
    block_mask = flex_block_mask(step, table, k.shape[2])

    def run() -> Tensor:
        return attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    return run


def packed(out: Tensor) -> Tensor:
    """[B, Hq, chunk, D] to [T, Hq, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def flex_block_mask(step: Step, table: BlockTable, capacity: int) -> object:
    """The table as a BlockMask over `capacity` keys: past blocks "full", those of the current region "partial"."""
    from torch.nn.attention.flex_attention import BlockMask

    columns = -(-capacity // table.block_size)
    keep = table_mask(table)[table.rows.long()]
    keep = torch.nn.functional.pad(keep, (0, columns - keep.shape[-1]))
    past = torch.arange(columns, device=keep.device) < step.past // table.block_size
    past_len = torch.tensor(step.past, device=keep.device)

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx + past_len

    lists = [_counts_and_indices(part) for part in (keep & ~past, keep & past)]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=(table.query_block, table.block_size),
        mask_mod=causal,
        seq_lengths=(step.chunk, capacity),
    )


def _counts_and_indices(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept columns of a bool [B, H, Qb, columns]: how many, and which (ascending, then the rest), both int32."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    return keep.sum(-1).int(), order.int()


def quoka(step: Step, ratio: float = 0.25) -> tuple[Callable[[], Tensor], Callable[[], QuokaSelection]]:
    """QUOKA whole (selection, gathered copy, dense attention), and its selection alone."""

    def choose() -> QuokaSelection:
        return quoka_select(step.q, step.kv, step.batch, query_ratio=ratio, kv_ratio=ratio)

    def run() -> Tensor:
        return quoka_attention(step.q, step.kv, step.batch, choose())

    return run, choose


def quoka_flops(step: Step, selection: QuokaSelection) -> float:
    """4 · rows · keys · D over the kept past tokens and half of the chunk's own square."""
    shape = step.shape
    kept = float(selection.counts.double().sum()) * shape.group * step.chunk
    return 4.0 * shape.head_dim * (kept + shape.batch * shape.q_heads * step.chunk**2 / 2)


def reason(error: BaseException) -> str:
    """Why something did not run, in one line; the traceback goes to the log (`--tracebacks` shows it)."""
    if not isinstance(error, CannotRunError):
        LOG.debug("did not run", exc_info=error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, CannotRunError) else f"{type(error).__name__}: {text[:300]}"
