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

from dataclasses import dataclass

from compactattn.validation import BLOCK_SIZES, QUERY_BLOCKS, check_choice, check_fraction, check_int, fail


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
    forced blocks (sink, window) are counted first, ties go to the lower id.
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


Selector = FlashPrefill | XAttention | Oracle | Dense


def _check_common(selector: Selector) -> None:
    for name in ("sink_blocks", "window_blocks", "dense_queries", "dense_keys", "dense_last_blocks"):
        check_int(name, getattr(selector, name), 0)
    check_choice("block_size", selector.block_size, BLOCK_SIZES)
    check_choice("query_block", selector.query_block, QUERY_BLOCKS)


def check_selector(selector: object) -> None:
    if not isinstance(selector, Selector):
        raise fail("selector", "FlashPrefill, XAttention, Oracle or Dense", repr(selector))
