"""The attentions that run in a stack: dense baselines, this library, and none at all.

Each makes, for one chunk, the call (layer, queries) -> output that `Stack.forward` takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import FINEST, Grouping
from benchmarks.ttft.stack import Attention, Chunk, Stack
from benchmarks.workloads import SELECTOR
from compactattn import BlockTable, Dense, KVSummary, PagedKV, attend, build_table, select, select_table, unite


def split_dense(stack: Stack, chunk: Chunk, attention: baselines.Attention) -> Attention:
    """Past without a mask, chunk causal, merged by log-sum-exp: cuDNN, or the CPU's fused attention."""

    def run(layer: int, query: Tensor) -> Tensor:
        keys, values = _seen(stack, chunk, layer)
        return by_request(baselines.split_attention(query, keys, values, attention), query)

    return run


def flash(stack: Stack, chunk: Chunk) -> Attention:
    """PyTorch's FlashAttention-2 in one call."""
    return lambda layer, query: by_request(baselines.flash_attention(query, *_seen(stack, chunk, layer)), query)


def complete(stack: Stack, chunk: Chunk) -> Attention:
    """This library with `Dense()`: `attend` over its table, made once, as it is the same in every layer."""
    paged, dense = stack.paged(chunk.context), Dense(SELECTOR.block_size, SELECTOR.query_block)
    some = paged[0].k.new_zeros(chunk.tokens.numel(), stack.heads.q_heads, stack.heads.head_dim)
    selection = select(some, paged[0], chunk.batch, dense)
    table = build_table(unite(selection, chunk.batch, **FINEST.arguments))
    return lambda layer, query: by_request(attend(packed_queries(query), paged[layer], chunk.batch, table), query)


def selected(
    chunk: Chunk,
    paged: list[PagedKV],
    summaries: list[KVSummary],
    table: BlockTable,
    grouping: Grouping,
    seen: dict[int, BlockTable],
) -> Attention:
    """What `prefill` does, over another table: `select_table` (key means brought up to date first) and `attend`.

    Args:
        chunk: the step.
        paged, summaries: each layer's cache and its block means.
        table: what is attended over.
        grouping: of the selection, and of the table.
        seen: gets the table that was selected in layer 0, under 0.
    """

    def run(layer: int, query: Tensor) -> Tensor:
        q, how = packed_queries(query), {"selector": SELECTOR, "summary": summaries[layer], **grouping.arguments}
        own = select_table(q, paged[layer], chunk.batch, **how)
        if layer == 0:
            seen[0] = own
        return by_request(attend(q, paged[layer], chunk.batch, table), query)

    return run


def nothing(stack: Stack, chunk: Chunk) -> Attention:
    """No attention: the same random output in every layer, so that all the rest of the model runs and nothing else."""
    size = (*chunk.tokens.shape, stack.heads.q_heads, stack.heads.head_dim)
    out = torch.randn(size, device=stack.device, dtype=stack.dtype) / math.sqrt(chunk.context)
    return lambda layer, query: out


def packed_queries(query: Tensor) -> Tensor:
    """[B, Hq, n, D] to [T, Hq, D]: a view where the model keeps the heads of a token together, as it does."""
    return query.transpose(1, 2).flatten(0, 1)


def by_request(out: Tensor, query: Tensor) -> Tensor:
    """[T, Hq, D] to [B, n, Hq, D]."""
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _seen(stack: Stack, chunk: Chunk, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer up to the chunk's end, [B, Hkv, context, D], views."""
    return stack.cache.keys[layer][:, :, : chunk.context], stack.cache.values[layer][:, :, : chunk.context]
