"""Stage 1: each (query head, query block) says which KV blocks it wants."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compactattn import operators
from compactattn.data import KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.dispatch import Backend, check_cache_dtype, resolve_backend
from compactattn.selectors import (
    Dense,
    KeyBounds,
    Oracle,
    Scored,
    SeerGate,
    Selector,
    XAttention,
    check_selector,
    threshold_of,
)
from compactattn.validation import check_blocks, check_queries, check_summary, resolve_scale


def select(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    *,
    scale: float | None = None,
    summary: KVSummary | None = None,
    backend: str | None = None,
) -> SelectionMask:
    """Apply a selector's rules to every visible block.

    Args:
        q: [T, Hq, D], packed queries after RoPE, the cache's dtype; rows beyond `cu_seqlens_q[B]` are not read.
        kv: the paged cache, this step's keys included.
        batch: the lengths of the step.
        selector: `FlashPrefill`, `KeyBounds`, `XAttention`, `SeerGate`, `Oracle` or `Dense`.
        scale: softmax scale, default D^-0.5.
        summary: what to trust instead of the keys: its means for `FlashPrefill`, its bounds for `KeyBounds`, its gate
            keys for `SeerGate`; without one, or one that lacks them, what is needed is pooled on the spot.
        backend: None (by device), "triton" or "numba".

    Returns:
        SelectionMask, bool [B, Hq, Qb, Kb]; invisible and padded bits are False.

    Raises:
        ValueError: wrong shape, dtype, device or stride, or a backend that cannot run, before anything runs.
    """
    if torch.compiler.is_compiling():
        how = {"scale": scale, "summary": summary, "backend": backend}
        return operators.call("select", q=q, kv=kv, batch=batch, selector=selector, **how)
    check_selector(selector)
    check_queries(q, kv, batch)
    check_blocks(kv, selector.block_size)
    if isinstance(selector, SeerGate):
        selector.check_heads(q)
    if summary is not None:
        check_summary(summary, kv, selector.block_size)
    chosen = resolve_backend(backend, q.device, q.dtype)
    check_cache_dtype(kv, chosen)
    scale = resolve_scale(scale, q.shape[-1])
    q_blocks, kv_blocks = batch.query_blocks(selector.query_block), batch.kv_blocks(selector.block_size)
    if q_blocks == 0:
        mask = torch.zeros((batch.size, q.shape[1], 0, kv_blocks), dtype=torch.bool, device=q.device)
    else:
        rules = block_rules(batch, selector)
        kept = _wanted(q, kv, batch, selector, scale, summary, rules, chosen) | rules.forced[:, None]
        mask = (kept & rules.visible[:, None]).expand(-1, q.shape[1], -1, -1).contiguous()
    return SelectionMask(mask, selector.block_size, selector.query_block, selector.dense_last_blocks, kv.num_kv_heads)


class BlockScores(NamedTuple):
    """One score per block of one step; a block is kept whose score is at least the row's peak plus `log_threshold`.

    log_s: float32 [B, Hq, Qb, Kb], natural log, -inf where no row of the query block scores the block; its rows may
        lie apart.
    part_max: float32 [B, Hq, Qb, parts], of which the largest is the row's peak: of `FlashPrefill` the largest score of
        each part of a row, of `KeyBounds` 0, since its scores are probabilities.
    """

    log_s: Tensor
    part_max: Tensor


class BlockRules(NamedTuple):
    """What lengths alone decide, bool [B, Qb, Kb]: blocks that are visible, and blocks kept without any score."""

    visible: Tensor
    forced: Tensor


def block_rules(batch: PrefillBatch, selector: Selector) -> BlockRules:
    """The rules common to all selectors, computed on the batch's device without a synchronisation."""
    device = batch.seq_lens.device
    i = torch.arange(batch.query_blocks(selector.query_block), device=device)
    j = torch.arange(batch.kv_blocks(selector.block_size), device=device)
    q_lens, past_lens = batch.q_lens[:, None], batch.past_lens[:, None]
    last_row = past_lens + torch.minimum((i + 1) * selector.query_block, q_lens) - 1
    last = last_row.div(selector.block_size, rounding_mode="floor")[..., None]
    visible = (i * selector.query_block < q_lens)[..., None] & (j <= last)
    dense = ((q_lens <= selector.dense_queries) | (batch.seq_lens[:, None] <= selector.dense_keys)).expand(-1, len(i))
    if selector.dense_last_blocks and batch.prompt_lens is not None:
        tail = selector.dense_last_blocks * selector.query_block
        dense = dense | (last_row >= batch.prompt_lens[:, None] - tail)
    if isinstance(selector, Dense):
        dense = torch.ones_like(dense)
    forced = dense[..., None] | (j < selector.sink_blocks) | (j > last - selector.window_blocks)
    return BlockRules(visible, forced & visible)


def _wanted(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    scale: float,
    summary: KVSummary | None,
    rules: BlockRules,
    backend: Backend,
) -> Tensor:
    """Blocks that the selector's own rule keeps, bool, broadcastable to [B, Hq, Qb, Kb]."""
    if isinstance(selector, Dense):
        return rules.visible[:, None]
    if isinstance(selector, Oracle) and selector.top_k == 0:
        return rules.forced[:, None]  # whatever the blocks weigh
    if backend == "triton":
        from compactattn._triton.block_mass import block_mass
    else:
        from compactattn._numba.block_mass import block_mass
    if isinstance(selector, Scored):
        scores = block_scores(q, kv, batch, selector, scale, summary, backend)
        threshold = scores.part_max.amax(-1, keepdim=True) + log_threshold(selector)
        return (scores.log_s >= threshold) & (scores.log_s > -math.inf)
    if isinstance(selector, XAttention):
        mass = block_mass(q, kv, batch, selector, stride=selector.stride, scale=scale)
        return smallest_set(mass, rules, mass=selector.threshold)
    if isinstance(selector, SeerGate):
        from compactattn.seer_gate import probabilities

        return probabilities(q, kv, batch, selector, summary, rules.visible, backend) > selector.threshold
    mass = block_mass(q, kv, batch, selector, stride=1, scale=scale)
    return smallest_set(mass, rules, mass=selector.mass, top_k=selector.top_k)


def block_scores(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Scored,
    scale: float,
    summary: KVSummary | None,
    backend: Backend,
) -> BlockScores:
    if backend == "triton":
        from compactattn._triton.bound_scores import key_bounds_scores
        from compactattn._triton.scores import flash_prefill_scores
    else:
        from compactattn._numba.bounds import key_bounds_scores
        from compactattn._numba.scores import flash_prefill_scores
    if isinstance(selector, KeyBounds):
        return key_bounds_scores(q, kv, batch, selector, scale=scale, summary=summary)
    return flash_prefill_scores(q, kv, batch, selector, scale=scale, summary=summary)


def log_threshold(selector: Scored) -> float:
    """Log of the share of a row's peak that a block's score has to reach."""
    share = threshold_of(selector)
    return math.log(share) if share > 0 else -math.inf


def smallest_set(
    block_mass: Tensor, rules: BlockRules, *, mass: float | None = None, top_k: int | None = None
) -> Tensor:
    """The smallest set of blocks that holds the share `mass` of the visible mass, or the `top_k` heaviest.

    Forced blocks count first, then the heaviest, ties to the lower id. block_mass: float [B, Hq, Qb, Kb], any
    positive scale. Returns bool of the same shape.
    """
    visible, forced = rules.visible[:, None], rules.forced[:, None]
    weight = torch.where(visible, block_mass.double(), 0.0)
    key = torch.where(forced, math.inf, torch.where(visible, weight, -1.0))
    order = key.argsort(dim=-1, descending=True, stable=True)
    if mass is None:
        wanted = (torch.arange(order.shape[-1], device=order.device) < (top_k or 0)).expand_as(order)
    else:
        in_order = weight.gather(-1, order)
        before = in_order.cumsum(-1) - in_order
        wanted = before < mass * weight.sum(-1, keepdim=True)
    return torch.zeros_like(visible.expand_as(weight)).scatter(-1, order, wanted)
