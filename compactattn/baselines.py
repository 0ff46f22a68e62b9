"""What to compare with: PyTorch's dense attention, and QUOKA (arXiv 2602.08722), which keeps tokens, not blocks.

Plain PyTorch on any device, in bounded memory; reads lengths and counts on the host, once per call. Requests of equal
lengths are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from compactattn.data import PagedKV, PrefillBatch
from compactattn.requests import Requests, equal_requests, with_queries
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

_SCORES_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}  # entries of the largest temporary: 64 or 512 MiB in float32
_COPIED_AT_ONCE = 1 << 28  # entries of K that QUOKA's attention copies at a time, of one request at least


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
    given = None if ranking is None else dict(zip(with_queries(batch), ranking, strict=True))
    tokens = torch.zeros((batch.size, kv_heads, max(map(max, kept))), dtype=torch.int32, device=q.device)
    for requests in equal_requests(batch):
        order = _ranked(q, kv, requests, query_ratio) if given is None else _stacked(given, requests)
        counts = {count for number in requests.numbers for count in kept[number]}
        if len(counts) == 1:
            count = counts.pop()
            tokens[requests.index(q.device), :, :count] = order[..., :count].sort(dim=-1).values.int()
            continue
        for number, its in zip(requests.numbers, order, strict=True):
            for h, count in enumerate(kept[number]):
                tokens[number, h, :count] = its[h, :count].sort().values
    return QuokaSelection(tokens, torch.tensor(kept, dtype=torch.int32, device=q.device))


def _stacked(ranking: dict[int, Tensor], requests: Requests) -> Tensor:
    """A caller's ranking of some requests: int64 [R, Hkv, past_len]."""
    for number in requests.numbers:
        if ranking[number].shape[-1] != requests.past_len:
            wanted = f"the {requests.past_len} past tokens of each request"
            raise fail("ranking", wanted, tuple(ranking[number].shape))
    return torch.stack([ranking[number] for number in requests.numbers])


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
    ranking: dict[int, Tensor] = {}
    for requests in equal_requests(batch):
        ranking.update(zip(requests.numbers, _ranked(q, kv, requests, query_ratio), strict=True))
    return [ranking[number] for number in with_queries(batch)]


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
    return _least_ordinary(q[None], query_ratio)[0]


def _least_ordinary(q: Tensor, query_ratio: float) -> Tensor:
    """`sampled_queries` of several requests: [R, n, Hq, D] to int64 [R, count, Hq]."""
    similarity = (normalize(q, dim=-1) * normalize(q.mean(1, keepdim=True), dim=-1)).sum(-1)
    return similarity.argsort(dim=1, stable=True)[:, : _share(query_ratio, q.shape[1])]


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
    counts = selection.counts.tolist()
    for requests in equal_requests(batch):
        for part, heads, count in _equal_counts(requests, counts, kv.head_dim):
            positions = _given_tokens(selection, part, torch.tensor(heads, device=q.device), count)
            k, v = (_gather(cache, kv, part, positions, heads) for cache in (kv.k, kv.v))
            columns = slice(heads[0] * group, (heads[-1] + 1) * group)
            rows = part.rows(q.device)
            out[rows, columns] = _sdpa(q[rows, columns].transpose(1, 2), k, v, scale).transpose(1, 2)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Bottom-right causal attention: q [R, Hq, n, D], k and v [R, Hkv, m, D]."""
    from torch.nn.attention.bias import causal_lower_right  # imports the compiler of PyTorch, which takes seconds

    mask = causal_lower_right(q.shape[2], k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    scale = resolve_scale(scale, q.shape[-1])
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


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
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, ndim=3)
    if k.shape[0] < 1 or q.shape[1] % k.shape[0]:
        raise fail("k", f"KV heads that divide the {q.shape[1]} query heads", f"{k.shape[0]} KV heads")
    if k.shape[1] < q.shape[0]:
        raise fail("k", f"at least the {q.shape[0]} keys of the queries themselves", f"{k.shape[1]} keys")
    check_shape("k", k, (*k.shape[:2], q.shape[2]), "Hkv, m, D of q")
    check_shape("v", v, tuple(k.shape), "that of k")
    return _sdpa(q.transpose(0, 1)[None], k[None], v[None], scale)[0].transpose(0, 1)


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
    for request in (one for requests in equal_requests(batch) for one in requests.each()):
        start, past_len, q_len = request.starts[0], request.past_len, request.q_len
        for h in range(kv.num_kv_heads):
            columns = slice(h * group, (h + 1) * group)
            head = torch.tensor([h], device=q.device)
            if selection is None:
                positions = torch.arange(past_len + q_len, device=q.device)[None, None]
            else:
                count = int(selection.counts[request.numbers[0], h])
                positions = _given_tokens(selection, request, head, count)
            keys = _gather(kv.k, kv, request, positions, [h])[0, 0].to(dtype)
            step = max(1, _scores_at_once(q) // (group * len(keys)))
            chunk = torch.arange(q_len, device=q.device)
            for rows in chunk.split(step):
                scores = q[start + rows, columns].to(dtype) @ keys.T * scale
                hidden = chunk > rows[:, None]  # only the chunk, at the end of the keys, has tokens to hide
                scores[..., -q_len:].masked_fill_(hidden[:, None], -math.inf)
                lse[start + rows, columns] = scores.logsumexp(-1)
    return lse


def _equal_counts(
    requests: Requests, counts: list[list[int]], head_dim: int
) -> Iterator[tuple[Requests, list[int], int]]:
    """Requests and KV heads that keep equally many tokens, as many at a time as may be copied: (part, heads, count)."""
    together: dict[int, list[int]] = {}
    kv_heads = len(counts[0])
    for number in requests.numbers:
        if len(set(counts[number])) == 1:
            together.setdefault(counts[number][0], []).append(number)
        else:
            for h, count in enumerate(counts[number]):
                yield requests.only([number]), [h], count
    for count, numbers in together.items():
        size = max(1, _COPIED_AT_ONCE // (kv_heads * (count + requests.q_len) * head_dim))
        for first in range(0, len(numbers), size):
            yield requests.only(numbers[first : first + size]), list(range(kv_heads)), count


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
    for requests in equal_requests(batch):
        past_len = requests.past_len
        for b in requests.numbers if past_len else ():
            ratio = _share(kv_ratio, past_len)
            kept[b] = [ratio] * kv_heads if budget is None else [min(past_len, tokens) for tokens in wanted[b]]
    return kept


def _ranked(q: Tensor, kv: PagedKV, requests: Requests, query_ratio: float) -> Tensor:
    """The past tokens of each request, best first: int64 [R, Hkv, past_len]."""
    if requests.past_len == 0:
        return torch.zeros((len(requests.numbers), kv.num_kv_heads, 0), dtype=torch.int64, device=q.device)
    queries = q[requests.rows(q.device)].to(torch.promote_types(q.dtype, torch.float32))
    slots = _representatives(queries, kv.num_kv_heads, _least_ordinary(queries, query_ratio))
    return _token_scores(kv, requests, slots).argsort(dim=-1, descending=True, stable=True)


def _representatives(q: Tensor, kv_heads: int, chosen: Tensor) -> Tensor:
    """QUOKA's averaged queries [R, Hkv, count, D], from queries [R, n, Hq, D] and the chosen ones [R, count, Hq]."""
    slots = normalize(q, dim=-1).gather(1, chosen[..., None].expand(-1, -1, -1, q.shape[-1]))
    return slots.unflatten(2, (kv_heads, -1)).mean(3).transpose(1, 2)


def _scores_at_once(tensor: Tensor) -> int:
    return _SCORES_AT_ONCE["cuda" if tensor.is_cuda else "cpu"]


def _token_scores(kv: PagedKV, requests: Requests, slots: Tensor) -> Tensor:
    """Each past token's largest mean cosine similarity to a slot, [R, Hkv, past_len]."""
    step = max(1, _scores_at_once(slots) // slots[..., 0].numel())
    parts = []
    for positions in torch.arange(requests.past_len, device=slots.device).split(step):
        gathered = _gather(kv.k, kv, requests, positions[None, None], list(range(slots.shape[1])))
        keys = normalize(gathered.to(slots.dtype), dim=-1)
        parts.append((slots @ keys.transpose(-1, -2)).amax(-2))
    return torch.cat(parts, dim=-1)


def _gather(cache: Tensor, kv: PagedKV, requests: Requests, positions: Tensor, heads: list[int]) -> Tensor:
    """Copy tokens of `kv.k` or `kv.v`: positions [R or 1, H or 1, n] of KV heads, to [R, H, n, D]."""
    device = positions.device
    request = requests.index(device)[:, None, None]
    pages = kv.page_table[request, positions // kv.page_size].long()
    return cache[pages, positions % kv.page_size, torch.tensor(heads, device=device)[:, None]]


def _given_tokens(selection: QuokaSelection, requests: Requests, heads: Tensor, count: int) -> Tensor:
    """Positions that heads of equal counts see: the kept past, then the chunk; [R, len(heads), count + q_len]."""
    past = selection.tokens[requests.index(heads.device)[:, None], heads, :count].long()
    chunk = torch.arange(requests.past_len, requests.past_len + requests.q_len, device=past.device)
    return torch.cat((past, chunk.expand(*past.shape[:2], -1)), dim=-1)
