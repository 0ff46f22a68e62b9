"""Selectors: frozen settings that say which KV blocks each query block wants. `compactattn.select` runs them.

Fields common to all selectors:
    sink_blocks: the first blocks of the request, kept wherever visible.
    window_blocks: blocks j with 0 <= w - j < window_blocks, where w is the KV block of the query block's last
        row, kept wherever visible.
    dense_queries: a request with at most so many queries in the step keeps every visible block (decode rows).
    dense_keys: a request with at most so many keys keeps every visible block.
    dense_last_blocks: with `PrefillBatch.prompt_lens`, query blocks that reach into the last
        `dense_last_blocks * query_block` positions of the prompt keep every visible block.
    block_size, query_block: tokens per KV block (64, 128, 256), queries per query block (64, 128).

A block is visible to a query block if some of its rows sees at least one of the block's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from compactattn.validation import (
    BLOCK_SIZES,
    DTYPES,
    QUERY_BLOCKS,
    check_choice,
    check_fraction,
    check_int,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)


@dataclass(frozen=True)
class FlashPrefill:
    """Mean-key scores under one threshold per query block (FlashPrefill, arXiv 2603.06199).

    S(i, j) = sum over the rows of query block i that stand at or after the last token of the complete block j of
    exp(scale * q . kmean_j); block j is kept iff S(i, j) >= alpha * max_j' S(i, j'). Published alphas:
    Llama-3.1-8B 0.18, Qwen3-30B-A3B 0.12, Qwen2 0.08.
    """

    alpha: float = 0.18
    sink_blocks: int = 2
    window_blocks: int = 4
    block_size: int = 128
    query_block: int = 128
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)
        _check_common(self)


@dataclass(frozen=True)
class KeyBounds:
    """Blocks where a row may find a key that it attends to, by bounds on the keys (those of Quest, arXiv 2406.10774).

    u(r, j) = sum over d of max(scale * q_rd * kmin_jd, scale * q_rd * kmax_jd), where kmin and kmax are the smallest
    and the largest of each dimension over the keys of the complete block j, rounded to q's dtype: no key of the block
    has a larger score, but by the rounding where keys are of another dtype (FP8 with scales).
    p(r, .) = softmax of u(r, .) over the blocks that row r scores, those whose last token it stands at or after.
    Block j is kept iff p(r, j) >= threshold for some row r of the query block.

    A mean hides one key among a hundred, and a sum over rows hides one row that needs it: a bound and the largest row
    hide neither. It costs twice two products where `FlashPrefill` takes one.
    """

    threshold: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    block_size: int = 128
    query_block: int = 128
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)
        _check_common(self)


@dataclass(frozen=True)
class XAttention:
    """Antidiagonal strided scores, smallest set of blocks that reaches a mass (XAttention, arXiv 2503.16428).

    Query m' and key n' of the strided attention are the `stride` rows of one group laid side by side, the query's
    in reverse order, so that their product sums an antidiagonal of each stride x stride tile. Softmax over strided
    keys of scores / (stride * sqrt(D)), summed per block; kept: the smallest set of blocks whose share of the mass
    reaches `threshold`, forced blocks (sink, window) counted first, ties to the lower id.
    """

    threshold: float = 0.9
    stride: int = 16
    block_size: int = 128
    query_block: int = 128
    sink_blocks: int = 1
    window_blocks: int = 1
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        check_fraction("threshold", self.threshold)
        check_choice("stride", self.stride, (1, 2, 4, 8, 16, 32, 64))
        _check_common(self)


@dataclass(frozen=True)
class Oracle:
    """Exact attention mass per block (mean over the rows of the query block): slow, for judging the others.

    Give either `mass` (the smallest set of blocks whose mass reaches it) or `top_k` (the k heaviest blocks);
    forced blocks (sink, window) are counted first, ties go to the lower id. `top_k=0` keeps the forced blocks alone
    and computes no mass.
    """

    mass: float | None = None
    top_k: int | None = None
    sink_blocks: int = 0
    window_blocks: int = 0
    block_size: int = 128
    query_block: int = 128
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        if (self.mass is None) == (self.top_k is None):
            raise fail("Oracle", "exactly one of mass and top_k", f"mass={self.mass}, top_k={self.top_k}")
        if self.mass is not None:
            check_fraction("mass", self.mass)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 0)
        _check_common(self)


@dataclass(frozen=True)
class Dense:
    """Every visible block: exact dense causal attention through the same code path."""

    block_size: int = 128
    query_block: int = 128
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True, eq=False)
class SeerGate:
    """A trained gate over pooled queries and keys (SeerAttention's AttnGate, `Qavg_Kmaxminavg`, arXiv 2410.13276).

    RoPE is undone by position, in float32. Queries are averaged over the query block, keys are pooled over the KV
    block to [max | min | mean], and each query head's linear layer maps those 3 D numbers to D. Both get RoPE at the
    block's first position; p = softmax over the visible KV blocks of their products · D^-0.5, and block j is kept iff
    p(i, j) > threshold. The attention's own `scale` plays no part.

    Attributes:
        weights: [Hq, 3 * D, D], float16, bfloat16 or float32, of one layer; see `load_seer_gates`.
        inv_freq: [D / 2] floating point, as in transformers' `rotary_emb.inv_freq`; dimensions d and d + D / 2 turn
            together. Positions count from the request's first token.
        rope_scale: transformers' `rotary_emb.attention_scaling`.
        threshold: from 0 to 1.
    """

    weights: Tensor
    inv_freq: Tensor
    rope_scale: float = 1.0
    threshold: float = 5e-4
    block_size: int = 64
    query_block: int = 64
    sink_blocks: int = 0
    window_blocks: int = 0
    dense_queries: int = 1
    dense_keys: int = 0
    dense_last_blocks: int = 0

    def __post_init__(self) -> None:
        check_tensor("weights", self.weights, ndim=3)
        if self.weights.dtype not in DTYPES:
            raise fail("weights", "dtype float16, bfloat16 or float32", self.weights.dtype)
        heads, _, dim = self.weights.shape
        check_shape("weights", self.weights, (heads, 3 * dim, dim), "Hq, 3 D, D")
        check_tensor("inv_freq", self.inv_freq, ndim=1)
        if not self.inv_freq.dtype.is_floating_point:
            raise fail("inv_freq", "a floating-point dtype", self.inv_freq.dtype)
        check_shape("inv_freq", self.inv_freq, (dim // 2,), "half the head dimension of weights")
        check_same_device("inv_freq", self.inv_freq, self.weights.device)
        if isinstance(self.rope_scale, bool) or not isinstance(self.rope_scale, (int, float)):
            raise fail("rope_scale", "a finite number above 0", repr(self.rope_scale))
        if not 0 < self.rope_scale < math.inf:
            raise fail("rope_scale", "a finite number above 0", repr(self.rope_scale))
        check_fraction("threshold", self.threshold)
        _check_common(self)

    def check_heads(self, q: Tensor) -> None:
        """Refuse queries [T, Hq, D] of other heads, another head dimension or another device than the gate's."""
        check_shape("selector.weights", self.weights, (q.shape[1], 3 * q.shape[2], q.shape[2]), "Hq, 3 D, D of q")
        check_same_device("selector.weights", self.weights, q.device)


Selector = FlashPrefill | KeyBounds | XAttention | Oracle | Dense | SeerGate
#: selectors whose blocks follow from one score each and a threshold: tables are made of the scores, without a mask
Scored = FlashPrefill | KeyBounds


def threshold_of(selector: Scored) -> float:
    """The share of a row's peak that a block's score has to reach: `FlashPrefill`'s alpha, `KeyBounds`' threshold."""
    return selector.alpha if isinstance(selector, FlashPrefill) else selector.threshold


def _check_common(selector: Selector) -> None:
    for name in ("sink_blocks", "window_blocks", "dense_queries", "dense_keys", "dense_last_blocks"):
        check_int(name, getattr(selector, name), 0)
    check_choice("block_size", selector.block_size, BLOCK_SIZES)
    check_choice("query_block", selector.query_block, QUERY_BLOCKS)


def check_selector(selector: object) -> None:
    if not isinstance(selector, Selector):
        raise fail("selector", "FlashPrefill, KeyBounds, XAttention, Oracle, SeerGate or Dense", repr(selector))
