"""What to compare with: PyTorch's dense attention, and QUOKA (arXiv 2602.08722), which keeps tokens, not blocks.

Plain PyTorch on any device, in bounded memory; reads lengths and counts on the host, once per call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from compactattn.data import PagedKV, PrefillBatch
from compactattn.validation import (
    check_batch,
    check_cache,
    check_fraction,
    check_int,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
    resolve_scale,
)

_SCORES_AT_ONCE = 1 << 24  # entries of the largest temporary: 64 MiB in float32


@dataclass(frozen=True, eq=False)
class QuokaSelection:
    """The past tokens that each KV head keeps; its queries see those and the whole current chunk.

    Attributes:
        tokens: int32 [B, Hkv, N]; strictly ascending positions below `past_len`, the first `counts[b, h]` valid.
        counts: int32 [B, Hkv].
    """

    tokens: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        check_tensor("tokens", self.tokens, ndim=3, dtype=torch.int32)
        check_tensor("counts", self.counts, ndim=2, dtype=torch.int32)
        check_shape("counts", self.counts, tuple(self.tokens.shape[:2]), "B, Hkv of tokens")
        check_same_device("counts", self.counts, self.tokens.device)


def quoka_select(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    query_ratio: float = 0.25,
    kv_ratio: float = 0.25,
    budget: int | Tensor | None = None,
    scale: float | None = None,
    ranking: list[Tensor] | None = None,
) -> QuokaSelection:
    """QUOKA (arXiv 2602.08722): keep the past tokens that the least ordinary queries of the chunk point at.

    Per query head, the queries with the lowest cosine similarity to the head's mean query, in ascending order of it
    (ties: the lower position); normalised, then averaged over the heads of the KV group slot by slot. Not normalised
    again, as in the paper: a past token's product with a slot is the mean of its cosine similarities to the slot's
    queries, and its score is the largest of these. Kept: the best tokens per KV head (ties: the lower position).

    Args:
        q: [T, Hq, D], packed queries after RoPE.
        kv: the paged cache, this step's keys included.
        batch: the lengths of the step.
        query_ratio: share of the chunk's queries that speak, rounded up, at least one.
        kv_ratio: share of the past that each KV head keeps, rounded up, at least one token.
        budget: past tokens to keep instead: one int, or int [B, Hkv]; never more than there are.
        scale: not used, cosine similarities have none; here so that baselines are called alike.
        ranking: what `quoka_ranking` gave for these queries, where several budgets are compared.

    Returns:
        QuokaSelection; nothing kept for a request without past or without queries.

    Raises:
        ValueError: wrong shapes or devices, a ratio outside 0 to 1, a negative budget.
    """
    _check_inputs(q, kv, batch)
    check_fraction("query_ratio", query_ratio)
    check_fraction("kv_ratio", kv_ratio)
    kv_heads = kv.num_kv_heads
    kept = _kept_tokens(batch, kv_heads, kv_ratio, budget)
    if ranking is None:
        ranking = quoka_ranking(q, kv, batch, query_ratio=query_ratio)
    tokens = torch.zeros((batch.size, kv_heads, max(map(max, kept))), dtype=torch.int32, device=q.device)
    for request, order in zip(_requests(batch), ranking, strict=True):
        for h, count in enumerate(kept[request.index]):
            if count > order.shape[1]:
                raise fail("ranking", f"the {request.past_len} past tokens of each request", tuple(order.shape))
            tokens[request.index, h, :count] = order[h, :count].sort().values
    return QuokaSelection(tokens, torch.tensor(kept, dtype=torch.int32, device=q.device))


def quoka_ranking(q: Tensor, kv: PagedKV, batch: PrefillBatch, *, query_ratio: float = 0.25) -> list[Tensor]:
    """The past tokens of each request in the order in which QUOKA keeps them: int64 [Hkv, past_len] each, best first.

    Args:
        q, kv, batch, query_ratio: as for `quoka_select`.

    Returns:
        One tensor per request; without columns for a request without queries.

    Raises:
        ValueError: wrong shapes or devices, or a ratio outside 0 to 1.
    """
    _check_inputs(q, kv, batch)
    check_fraction("query_ratio", query_ratio)
    ranking = []
    for request in _requests(batch):
        queries = q[request.rows].to(torch.promote_types(q.dtype, torch.float32))
        if request.past_len == 0 or len(queries) == 0:
            ranking.append(torch.zeros((kv.num_kv_heads, 0), dtype=torch.int64, device=q.device))
            continue
        slots = _representatives(queries, kv.num_kv_heads, sampled_queries(queries, query_ratio=query_ratio))
        ranking.append(_token_scores(kv, request, slots).argsort(dim=-1, descending=True, stable=True))
    return ranking


def sampled_queries(q: Tensor, *, query_ratio: float = 0.25) -> Tensor:
    """The queries that QUOKA lets speak for one request: those least like their head's mean query.

    Args:
        q: [n, Hq, D] with n >= 1, the request's queries after RoPE, float32 or float64.
        query_ratio: share of them that speak, rounded up, at least one.

    Returns:
        int64 [ceil(query_ratio * n), Hq], indices into the n queries of each head, by ascending cosine similarity
        (ties: the lower position).

    Raises:
        ValueError: a ratio outside 0 to 1.
    """
    check_tensor("q", q, ndim=3)
    check_fraction("query_ratio", query_ratio)
    similarity = (normalize(q, dim=-1) * normalize(q.mean(0), dim=-1)).sum(-1)
    return similarity.argsort(dim=0, stable=True)[: _share(query_ratio, len(q))]


def quoka_attention(
    q: Tensor, kv: PagedKV, batch: PrefillBatch, selection: QuokaSelection, *, scale: float | None = None
) -> Tensor:
    """Dense causal attention on a gathered copy: each KV head's kept past tokens, then the current chunk.

    Args:
        q: [T, Hq, D], packed queries after RoPE.
        selection: what `quoka_select` kept for this step.
        scale: softmax scale, default D^-0.5.

    Returns:
        out [T, Hq, D]; rows at or beyond `cu_seqlens_q[B]` are 0.

    Raises:
        ValueError: wrong shapes or devices.
    """
    _check_inputs(q, kv, batch)
    _check_selection(selection, kv, batch)
    group, out = q.shape[1] // kv.num_kv_heads, torch.zeros_like(q)
    for request in _requests(batch):
        counts = selection.counts[request.index].tolist()
        equal = len(set(counts)) == 1
        for first in range(0, kv.num_kv_heads, kv.num_kv_heads if equal else 1):
            heads = torch.arange(first, kv.num_kv_heads if equal else first + 1, device=q.device)
            positions = _given_tokens(selection, request, heads, counts[first])
            k, v = (_gather(cache, kv, request, positions, heads[:, None]) for cache in (kv.k, kv.v))
            columns = slice(first * group, (first + len(heads)) * group)
            out[request.rows, columns] = causal_attention(q[request.rows, columns], k, v, scale=scale)
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """PyTorch's own attention (SDPA) of a chunk over its keys: the dense baseline, for errors and for times.

    Args:
        q: [n, Hq, D], the last n positions.
        k, v: [Hkv, m, D], m >= n; query i sees the first m - n + i + 1 keys (bottom-right causal).
        scale: softmax scale, default D^-0.5.

    Returns:
        [n, Hq, D] in q's dtype.

    Raises:
        ValueError: wrong shapes.
    """
    from torch.nn.attention.bias import causal_lower_right  # imports the compiler of PyTorch, which takes seconds

    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, ndim=3)
    if k.shape[0] < 1 or q.shape[1] % k.shape[0]:
        raise fail("k", f"KV heads that divide the {q.shape[1]} query heads", f"{k.shape[0]} KV heads")
    if k.shape[1] < q.shape[0]:
        raise fail("k", f"at least the {q.shape[0]} keys of the queries themselves", f"{k.shape[1]} keys")
    check_shape("k", k, (*k.shape[:2], q.shape[2]), "Hkv, m, D of q")
    check_shape("v", v, tuple(k.shape), "that of k")
    scale = resolve_scale(scale, q.shape[-1])
    mask = causal_lower_right(q.shape[0], k.shape[1])
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[0]
    )
    return out[0].transpose(0, 1)


def exact_lse(
    q: Tensor, kv: PagedKV, batch: PrefillBatch, selection: QuokaSelection | None = None, *, scale: float | None = None
) -> Tensor:
    """Log-sum-exp of each query's scaled scores over the tokens it sees, computed a few rows at a time.

    Args:
        q: [T, Hq, D], packed queries after RoPE.
        selection: the past tokens that are seen; None is all of them (dense attention).
        scale: softmax scale, default D^-0.5.

    Returns:
        Natural log, float32 [T, Hq]; -inf at or beyond `cu_seqlens_q[B]`.

    Raises:
        ValueError: wrong shapes or devices.
    """
    _check_inputs(q, kv, batch)
    if selection is not None:
        _check_selection(selection, kv, batch)
    scale = resolve_scale(scale, q.shape[-1])
    group, dtype = q.shape[1] // kv.num_kv_heads, torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    for request in _requests(batch):
        for h in range(kv.num_kv_heads):
            columns = slice(h * group, (h + 1) * group)
            head = torch.tensor([h], device=q.device)
            if selection is None:
                positions = torch.arange(request.past_len + request.q_len, device=q.device)[None]
            else:
                positions = _given_tokens(selection, request, head, int(selection.counts[request.index, h]))
            keys = _gather(kv.k, kv, request, positions, head[:, None])[0].to(dtype)
            step = max(1, _SCORES_AT_ONCE // (group * len(keys)))
            chunk = torch.arange(request.q_len, device=q.device)
            for rows in chunk.split(step):
                scores = q[request.rows.start + rows, columns].to(dtype) @ keys.T * scale
                hidden = chunk > rows[:, None]  # only the chunk, at the end of the keys, has tokens to hide
                scores[..., -request.q_len :].masked_fill_(hidden[:, None], -math.inf)
                lse[request.rows.start + rows, columns] = scores.logsumexp(-1)
    return lse


@dataclass(frozen=True)
class _Request:
    """Request `index` on the host: its query rows in `q`, and its lengths."""

    index: int
    rows: slice
    q_len: int
    past_len: int


def _requests(batch: PrefillBatch) -> Iterator[_Request]:
    """The requests that have queries in this step."""
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    for b, seq_len in enumerate(seq_lens):
        q_len = starts[b + 1] - starts[b]
        if q_len:
            yield _Request(b, slice(starts[b], starts[b + 1]), q_len, seq_len - q_len)


def check_kind(name: str, value: object, *kinds: type) -> None:
    """A value of one of the library's own types."""
    if not isinstance(value, kinds):
        raise fail(name, "a " + " or a ".join(kind.__name__ for kind in kinds), type(value).__name__)


def _check_inputs(q: Tensor, kv: PagedKV, batch: PrefillBatch) -> None:
    """Like `check_queries`, but float64 is welcome."""
    check_kind("kv", kv, PagedKV)
    check_kind("batch", batch, PrefillBatch)
    check_batch(q, batch)
    check_cache(kv, batch, q.device)
    if kv.k_scale is not None:
        raise fail("kv.k", "a cache of 16 bits or more (baselines and measures read no FP8)", kv.k.dtype)
    if q.shape[-1] != kv.head_dim or q.dtype != kv.k.dtype:
        raise fail("q", f"{kv.k.dtype} of head dimension {kv.head_dim}", f"{q.dtype} of {q.shape[-1]}")
    if q.shape[1] % kv.num_kv_heads:
        raise fail("q", f"a multiple of the cache's {kv.num_kv_heads} KV heads", f"{q.shape[1]} heads")


def _check_selection(selection: QuokaSelection, kv: PagedKV, batch: PrefillBatch) -> None:
    check_kind("selection", selection, QuokaSelection)
    check_shape("selection.counts", selection.counts, (batch.size, kv.num_kv_heads), "B, Hkv")
    check_same_device("selection.counts", selection.counts, kv.k.device)


def _share(ratio: float, total: int) -> int:
    """ceil(ratio * total), at least 1; 0.1 * 30 is 3, whatever floating point makes of it."""
    return min(total, max(1, math.ceil(ratio * total - 1e-9)))


def _kept_tokens(batch: PrefillBatch, kv_heads: int, kv_ratio: float, budget: int | Tensor | None) -> list[list[int]]:
    """Past tokens to keep per request and KV head."""
    if isinstance(budget, Tensor):
        if budget.dtype.is_floating_point or budget.dtype == torch.bool:
            raise fail("budget", "an int, or an integer tensor [B, Hkv]", budget.dtype)
        check_shape("budget", budget, (batch.size, kv_heads), "B, Hkv")
        wanted = budget.tolist()
        if budget.numel() and min(map(min, wanted)) < 0:
            raise fail("budget", "at least 0 tokens", min(map(min, wanted)))
    elif budget is not None:
        check_int("budget", budget, 0)
        wanted = [[budget] * kv_heads] * batch.size
    kept = [[0] * kv_heads for _ in range(batch.size)]
    for request in _requests(batch):
        b, past_len = request.index, request.past_len
        if past_len:
            ratio = _share(kv_ratio, past_len)
            kept[b] = [ratio] * kv_heads if budget is None else [min(past_len, tokens) for tokens in wanted[b]]
    return kept


def _representatives(q: Tensor, kv_heads: int, chosen: Tensor) -> Tensor:
    """QUOKA's averaged queries [Hkv, count, D], from the queries [n, Hq, D] of one request and the chosen ones."""
    slots = normalize(q, dim=-1).gather(0, chosen[..., None].expand(-1, -1, q.shape[-1]))
    return slots.view(len(chosen), kv_heads, -1, q.shape[-1]).mean(2).transpose(0, 1)


def _token_scores(kv: PagedKV, request: _Request, slots: Tensor) -> Tensor:
    """Each past token's largest mean cosine similarity to a slot, [Hkv, past_len]."""
    heads = torch.arange(len(slots), device=slots.device)
    step = max(1, _SCORES_AT_ONCE // slots[..., 0].numel())
    parts = []
    for positions in torch.arange(request.past_len, device=slots.device).split(step):
        keys = normalize(_gather(kv.k, kv, request, positions[None], heads[:, None]).to(slots.dtype), dim=-1)
        parts.append((slots @ keys.transpose(1, 2)).amax(1))
    return torch.cat(parts, dim=1)


def _gather(cache: Tensor, kv: PagedKV, request: _Request, positions: Tensor, heads: Tensor) -> Tensor:
    """Copy tokens of `kv.k` or `kv.v`: positions [., n] and KV heads [H, 1] broadcast, to [H, n, D]."""
    pages = kv.page_table[request.index].long()[positions // kv.page_size]
    return cache[pages, positions % kv.page_size, heads]


def _given_tokens(selection: QuokaSelection, request: _Request, heads: Tensor, count: int) -> Tensor:
    """Positions that heads with equal counts see: the kept past, then the chunk; [len(heads), count + q_len]."""
    past = selection.tokens[request.index, heads, :count].long()
    chunk = torch.arange(request.past_len, request.past_len + request.q_len, device=past.device)
    return torch.cat((past, chunk.expand(len(heads), -1)), dim=1)
