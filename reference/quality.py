"""What a selection is worth, and the QUOKA baseline, counted token by token."""

from __future__ import annotations

import math

import torch

from compactattn.data import BlockTable, PagedKV, PrefillBatch, SelectionMask
from compactattn.quality import DensityCascade, QuokaSelection
from reference.requests import Request, requests, tokens


def density_cascade(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    kv_heads: int,
    heads_per_group: int,
    query_blocks_per_span: int | None = None,
) -> DensityCascade:
    """Past blocks on the list that each (query head, query block) walks: its own mask, then after each union.

    A query block that the selector kept dense at the end of the prompt is united with its likes in all heads, and with
    nothing else.
    """
    heads = selection.mask.shape[1]
    entries = [0, 0, 0, 0]
    visible = 0
    for request in requests(batch):
        blocks = request.query_blocks(selection.query_block)
        past = request.past_blocks(selection.block_size)
        span = query_blocks_per_span or max(1, len(blocks))
        dense_end = [request.ends_prompt(b, selection.dense_last_blocks * selection.query_block) for b in blocks]
        members = [(h, i) for h in range(heads) for i in range(len(blocks))]
        picked = {(h, i): {j for j in range(past) if selection.mask[request.index, h, i, j]} for h, i in members}
        for h, i in members:
            visible += past
            entries[0] += len(picked[h, i])
            for step, group in enumerate((1, heads_per_group, heads // kv_heads), start=1):
                union: set[int] = set()
                for h2, i2 in members:
                    if dense_end[i] or dense_end[i2]:
                        together = dense_end[i] and dense_end[i2]
                    else:
                        together = h2 // group == h // group and i2 // span == i // span
                    if together:
                        union |= picked[h2, i2]
                entries[step] += len(union)
    return DensityCascade(*entries, visible)


def past_tokens(table: BlockTable, batch: PrefillBatch, *, kv_heads: int) -> torch.Tensor:
    """Past tokens that a table gives to a query, averaged over the queries of each KV head: float64 [B, Hkv]."""
    heads = table.rows.shape[1]
    mean = torch.zeros((len(batch.seq_lens), kv_heads), dtype=torch.float64)
    for request in requests(batch):
        for h in range(heads):
            for i, queries in enumerate(request.query_blocks(table.query_block)):
                given = [j for j in _table_tokens(table, request, h, i) if j < request.past_len]
                share = len(queries) / (request.q_len * (heads // kv_heads))
                mean[request.index, h // (heads // kv_heads)] += len(given) * share
    return mean


def quoka_select(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    query_ratio: float = 0.25,
    kv_ratio: float = 0.25,
    budget: int | torch.Tensor | None = None,
    scale: float | None = None,
) -> QuokaSelection:
    """Per KV head the past tokens that the least ordinary queries point at; ties go to the lower position."""
    kv_heads, group = kv.k.shape[2], q.shape[1] // kv.k.shape[2]
    kept: dict[tuple[int, int], list[int]] = {}
    for request in requests(batch):
        past = request.past_len if request.q_len else 0
        keys = tokens("k", kv, request)[:past].double()
        for h in range(kv_heads):
            if budget is None:
                count = min(past, max(1, math.ceil(kv_ratio * past - 1e-9)))
            else:
                count = min(past, budget if isinstance(budget, int) else int(budget[request.index, h]))
            kept[request.index, h] = []
            if count == 0:
                continue
            slots = []
            for head in range(h * group, (h + 1) * group):
                queries = q[request.start : request.start + request.q_len, head].double()
                mean = queries.mean(0)
                similarity = [float(_unit(row) @ _unit(mean)) for row in queries]
                order = sorted(range(request.q_len), key=lambda i: (similarity[i], i))
                number = max(1, math.ceil(query_ratio * request.q_len - 1e-9))
                slots.append([_unit(queries[i]) for i in order[:number]])
            averaged = [sum(heads) / group for heads in zip(*slots, strict=True)]
            score = [max(float(slot @ _unit(key)) for slot in averaged) for key in keys[:, h]]
            best = sorted(range(past), key=lambda t: (-score[t], t))[:count]
            kept[request.index, h] = sorted(best)
    size = len(batch.seq_lens)
    counts = torch.tensor([[len(kept[b, h]) for h in range(kv_heads)] for b in range(size)], dtype=torch.int32)
    chosen = torch.zeros((size, kv_heads, int(counts.max())), dtype=torch.int32)
    for (b, h), positions in kept.items():
        chosen[b, h, : len(positions)] = torch.tensor(positions, dtype=torch.int32)
    return QuokaSelection(chosen.to(q.device), counts.to(q.device))


def quoka_attention(
    q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, selection: QuokaSelection, *, scale: float | None = None
) -> torch.Tensor:
    """Softmax attention of each query over its KV head's kept tokens and the visible part of the chunk."""
    out, group = torch.zeros_like(q), q.shape[1] // kv.k.shape[2]
    for request in requests(batch):
        values = tokens("v", kv, request).double()
        for h in range(q.shape[1]):
            scores = _scores(q, kv, request, h, scale)
            for i in range(request.q_len):
                given = _quoka_tokens(selection, request, h // group, i)
                out[request.start + i, h] = (scores[i, given].softmax(0) @ values[given, h // group]).to(q.dtype)
    return out


def coverage(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    given: BlockTable | QuokaSelection,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The share of each query's softmax mass on the tokens it is given, [T, Hq]; NaN for padding rows."""
    share, group = torch.full(q.shape[:2], math.nan, dtype=torch.float64), q.shape[1] // kv.k.shape[2]
    for request in requests(batch):
        for h in range(q.shape[1]):
            mass = _scores(q, kv, request, h, scale).softmax(-1)
            for i in range(request.q_len):
                if isinstance(given, BlockTable):
                    picked = _table_tokens(given, request, h, i // given.query_block)
                else:
                    picked = _quoka_tokens(given, request, h // group, i)
                share[request.start + i, h] = mass[i, [j for j in picked if j < request.seq_len]].sum()
    return share


def output_error(out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """‖out - dense‖ / ‖dense‖ per query head, float64 [Hq]; 0 for equal outputs."""
    errors = []
    for h in range(out.shape[1]):
        difference, norm = (out[:, h].double() - dense[:, h].double()).norm(), dense[:, h].double().norm()
        errors.append(0.0 if difference == 0 else float(difference / norm))
    return torch.tensor(errors, dtype=torch.float64)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector at length 1; a zero vector stays zero, and is similar to nothing."""
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def _scores(q: torch.Tensor, kv: PagedKV, request: Request, head: int, scale: float | None) -> torch.Tensor:
    """Scaled scores of one head's queries in float64, [q_len, seq_len]; -inf for keys after the query."""
    keys = tokens("k", kv, request)[:, head // (q.shape[1] // kv.k.shape[2])].double()
    scores = q[request.start : request.start + request.q_len, head].double() @ keys.T
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(request.past_len + 1)
    return scores.masked_fill(hidden, -math.inf)


def _table_tokens(table: BlockTable, request: Request, head: int, block: int) -> list[int]:
    """Positions in the blocks of a (query head, query block)'s row."""
    r = int(table.rows[request.index, head, block])
    blocks = table.indices[r, : int(table.counts[r])].tolist()
    return [j * table.block_size + t for j in blocks for t in range(table.block_size)]


def _quoka_tokens(selection: QuokaSelection, request: Request, kv_head: int, query: int) -> list[int]:
    """Positions that one query sees: the kept past, then the chunk up to itself."""
    count = int(selection.counts[request.index, kv_head])
    past = selection.tokens[request.index, kv_head, :count].tolist()
    return past + list(range(request.past_len, request.past_len + query + 1))
