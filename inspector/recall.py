"""How much of the exact attention a setting keeps, query by query and head by head, and QUOKA at the same budget.

Outputs and masses are compared at every query of the chunk, or, where that is more work than a view may cost, at runs
of adjacent queries. A run is a request of its own over the same pages, so the library's functions serve both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compactattn import BlockTable, Dense, GroupMask, PagedKV, PrefillBatch, attend, build_table, select, unite
from compactattn._numba.threads import run_each
from compactattn.baselines import sampled_queries
from compactattn.quality import (
    QuokaSelection,
    coverage,
    output_error,
    past_tokens,
    quoka_attention,
    quoka_ranking,
    quoka_select,
)
from inspector.model import Reading
from inspector.sources import Step

_SCORES_AT_ONCE = 1 << 26
_UNIT = 256  # one run ends at each multiple of this many queries, inside one query block of either size
_LONGEST_RUN = 64
LOW = 0.9  # SPEC: the recall under which a query is counted


@dataclass(frozen=True, eq=False)
class Observed:
    """The queries at which a chunk is judged, m of n, and what dense attention gives them.

    Attributes:
        step: the chunk.
        q, kv, batch: the queries [m, Hq, D] as one request, or as one request per run.
        position: int [m], offsets into the chunk.
        runs: (first offset, end offset) of each request.
        out, lse: dense attention, [m, Hq, D] and float32 [m, Hq].
    """

    step: Step
    q: Tensor
    kv: PagedKV
    batch: PrefillBatch
    position: np.ndarray
    runs: tuple[tuple[int, int], ...]
    out: Tensor
    lse: Tensor

    @property
    def whole(self) -> bool:
        """Whether every query of the chunk is here."""
        return len(self.position) == len(self.step.q)


def observe(step: Step, *, limit: int = _SCORES_AT_ONCE) -> Observed:
    """Choose the queries and attend densely: all, or runs with about `limit` scores, of at least one row each."""
    n = len(step.q)
    if n * step.heads * step.stop <= limit:
        runs: list[tuple[int, int]] = [(0, n)]
    else:
        ends = [*range(_UNIT, n, _UNIT), n]
        length = min(_LONGEST_RUN, max(1, limit // (len(ends) * step.heads * step.stop)))
        runs = [(max(0, end - length), end) for end in ends]
        runs = [(max(first, (end - 1) // _LONGEST_RUN * _LONGEST_RUN), end) for first, end in runs]
    position = np.concatenate([np.arange(*run) for run in runs])
    q = step.q[torch.from_numpy(position).to(step.q.device)]
    kv = PagedKV(step.kv.k, step.kv.v, step.kv.page_table.expand(len(runs), -1).contiguous())
    batch = PrefillBatch.from_lens(
        [end - first for first, end in runs], [step.start + end for _, end in runs], step.q.device
    )
    everything = select(q, kv, batch, Dense(), scale=step.scale)
    table = build_table(unite(everything, batch, heads_per_group=step.group))
    out, lse = attend(q, kv, batch, table, scale=step.scale, return_lse=True)
    return Observed(step, q, kv, batch, position, tuple(runs), out, lse)


def _observed_table(observed: Observed, reading: Reading) -> BlockTable:
    """The rows that the observed queries walk: the reading's own table, or its rows cut to what each run sees."""
    if observed.whole:
        return reading.table
    selector, device = reading.setting.selector, observed.q.device
    blocks, rows = observed.batch.kv_blocks(selector.block_size), len(reading.keep)
    keep = np.zeros((len(observed.runs), rows, blocks), dtype=bool)
    walked = np.zeros((len(observed.runs), reading.heads, 1), dtype=np.int32)
    for n, (first, end) in enumerate(observed.runs):
        used = reading.rows[:, first // selector.query_block]
        seen = np.arange(blocks) * selector.block_size < reading.start + end
        keep[n, used] = reading.keep[used, :blocks] & seen
        walked[n, :, 0] = n * rows + used
    groups = GroupMask(
        torch.from_numpy(keep.reshape(-1, blocks)).to(device),
        torch.from_numpy(walked).to(device),
        selector.block_size,
        selector.query_block,
    )
    return build_table(groups)


@dataclass(frozen=True, eq=False)
class Judged:
    """What a table, or QUOKA, gives the observed queries.

    Attributes:
        recall: float32 [m, Hq]; share of each query's exact softmax mass on the tokens that it is given.
        error: float64 [Hq]; ‖out - dense‖ / ‖dense‖ over the observed queries.
        tokens: float [Hkv]; past tokens given to a query, mean.
        density: float [Hq]; share of the past that is given; NaN without a past.
    """

    recall: np.ndarray
    error: np.ndarray
    tokens: np.ndarray
    density: np.ndarray

    def low(self) -> int:
        """(query, head) pairs under `LOW`."""
        return int((self.recall < LOW).sum())


def judge(observed: Observed, reading: Reading) -> Judged:
    """Recall and output error of a reading's table."""
    step, table = observed.step, _observed_table(observed, reading)
    call = {"scale": step.scale}
    out = attend(observed.q, observed.kv, observed.batch, table, **call)
    shares = coverage(observed.q, observed.kv, observed.batch, table, dense_lse=observed.lse, **call)
    tokens = past_tokens(reading.table, step.batch, kv_heads=step.kv_heads)[0]
    return Judged(
        shares.cpu().numpy(), output_error(out, observed.out).cpu().numpy(), tokens.cpu().numpy(), reading.density()
    )


def block_shares(observed: Observed, reading: Reading, block: int) -> np.ndarray:
    """float32 [m, Hq]: the share of each observed query's exact mass that lies in one block of the past."""
    selector, device, runs = reading.setting.selector, observed.q.device, len(observed.runs)
    keep = torch.zeros((runs, observed.batch.kv_blocks(selector.block_size)), dtype=torch.bool, device=device)
    keep[:, block] = True
    query_blocks = -(-observed.batch.max_q_len // selector.query_block)
    rows = torch.arange(runs, dtype=torch.int32, device=device)[:, None, None]
    rows = rows.expand(runs, reading.heads, query_blocks).contiguous()
    table = build_table(GroupMask(keep, rows, selector.block_size, selector.query_block))
    shares = coverage(observed.q, observed.kv, observed.batch, table, scale=observed.step.scale, dense_lse=observed.lse)
    return shares.cpu().numpy()


@dataclass(frozen=True, eq=False)
class Quoka:
    """QUOKA on the same chunk.

    Attributes:
        judged: as for a table; density is the same for the heads of a KV group.
        tokens: per KV head, int positions of the past tokens kept.
        sampled: bool [n, Hq]; queries of the chunk that spoke for their head.
    """

    judged: Judged
    tokens: tuple[np.ndarray, ...]
    sampled: np.ndarray


def rank_quoka(observed: Observed, *, query_ratio: float = 0.25) -> list[torch.Tensor]:
    """Per KV head the past tokens in the order in which QUOKA keeps them: the same for every budget."""
    found: dict[int, torch.Tensor] = {}

    def of_kv_head(h: int) -> None:
        step = _one_kv_head(observed, h).step
        found[h] = quoka_ranking(step.q, step.kv, step.batch, query_ratio=query_ratio)[0]

    run_each([partial(of_kv_head, h) for h in range(observed.step.kv_heads)])  # KV heads have nothing in common
    return [found[h] for h in range(observed.step.kv_heads)]


def judge_quoka(
    observed: Observed,
    *,
    budget: np.ndarray | None = None,
    query_ratio: float = 0.25,
    kv_ratio: float = 0.25,
    ranking: list[torch.Tensor] | None = None,
) -> Quoka:
    """QUOKA with `budget` past tokens per KV head (rounded), or with a share `kv_ratio` of the past.

    `ranking` is what `rank_quoka` gave for the same `query_ratio`, where several budgets are tried.
    """
    step, found = observed.step, {}
    ranking = rank_quoka(observed, query_ratio=query_ratio) if ranking is None else ranking

    def of_kv_head(h: int) -> None:
        part = _one_kv_head(observed, h)
        wanted = None if budget is None else round(float(budget[h]))
        found[h] = _judge_kv_head(part, ranking[h], query_ratio=query_ratio, kv_ratio=kv_ratio, budget=wanted)

    run_each([partial(of_kv_head, h) for h in range(step.kv_heads)])
    parts = [found[h] for h in range(step.kv_heads)]
    judged = [part.judged for part in parts]
    return Quoka(
        Judged(
            np.concatenate([part.recall for part in judged], axis=1),
            *(np.concatenate([getattr(part, name) for part in judged]) for name in ("error", "tokens", "density")),
        ),
        tuple(part.tokens[0] for part in parts),
        np.concatenate([part.sampled for part in parts], axis=1),
    )


def _one_kv_head(observed: Observed, h: int) -> Observed:
    """One KV head and its query heads, as views."""
    step = observed.step
    heads = slice(h * step.group, (h + 1) * step.group)
    kv = PagedKV(step.kv.k[:, :, h : h + 1], step.kv.v[:, :, h : h + 1], step.kv.page_table)
    return replace(
        observed,
        step=Step(step.q[:, heads], kv, step.batch, step.scale),
        q=observed.q[:, heads],
        kv=PagedKV(kv.k, kv.v, observed.kv.page_table),
        out=observed.out[:, heads],
        lse=observed.lse[:, heads],
    )


def _judge_kv_head(
    observed: Observed, ranking: torch.Tensor, *, query_ratio: float, kv_ratio: float, budget: int | None
) -> Quoka:
    """QUOKA on a step with a single KV head."""
    step, kv, batch = observed.step, observed.kv, observed.batch
    kept = quoka_select(step.q, step.kv, step.batch, kv_ratio=kv_ratio, budget=budget, ranking=[ranking])
    given = kept if observed.whole else _observed_tokens(observed, kept)
    out = quoka_attention(observed.q, kv, batch, given, scale=step.scale)
    shares = coverage(observed.q, kv, batch, given, scale=step.scale, dense_lse=observed.lse)
    count = int(kept.counts[0, 0])
    chosen = sampled_queries(step.q.float(), query_ratio=query_ratio)
    sampled = torch.zeros(step.q.shape[:2], dtype=torch.bool, device=step.q.device).scatter(0, chosen, True)
    judged = Judged(
        shares.cpu().numpy(),
        output_error(out, observed.out).cpu().numpy(),
        np.array([float(count)]),
        np.full(step.group, count / step.start if step.start else np.nan),
    )
    return Quoka(judged, (kept.tokens[0, 0, :count].cpu().numpy(),), sampled.cpu().numpy())


def _observed_tokens(observed: Observed, kept: QuokaSelection) -> QuokaSelection:
    """What a run sees before itself: the kept past tokens, then the chunk up to its first query."""
    start, runs = observed.step.start, observed.runs
    counts, width = kept.counts[0], kept.tokens.shape[2] + max(first for first, _ in runs)
    tokens = torch.zeros((len(runs), len(counts), width), dtype=torch.int32, device=kept.tokens.device)
    for n, (first, _) in enumerate(runs):
        chunk = torch.arange(start, start + first, dtype=torch.int32, device=tokens.device)
        for h, count in enumerate(counts.tolist()):
            tokens[n, h, : count + first] = torch.cat((kept.tokens[0, h, :count], chunk))
    extra = torch.tensor([first for first, _ in runs], dtype=torch.int32, device=tokens.device)
    return QuokaSelection(tokens, counts[None] + extra[:, None])


@dataclass(frozen=True)
class Outcome:
    """One point of a frontier, over all heads of the chunk.

    Attributes:
        name: the selector, or QUOKA.
        value: of the parameter that is swept.
        density: past tokens given ÷ past tokens, mean over the heads.
        mask_density: past blocks of the masks alone ÷ past blocks; NaN for QUOKA.
        recall, worst: mean and smallest recall of a query.
        low: share of (query, head) pairs with a recall under 0.9.
        error: mean over the heads of ‖out - dense‖ / ‖dense‖.
    """

    name: str
    value: float
    density: float
    mask_density: float
    recall: float
    worst: float
    low: float
    error: float


def outcome(name: str, value: float, judged: Judged, mask_density: float = float("nan")) -> Outcome:
    """Reduce a judgement to one point."""
    recall = judged.recall
    return Outcome(
        name=name,
        value=value,
        density=float(np.mean(judged.density)),
        mask_density=mask_density,
        recall=float(recall.mean()),
        worst=float(recall.min()),
        low=judged.low() / recall.size,
        error=float(judged.error.mean()),
    )


def excerpt(text: bytes | None, position: int, around: int = 28) -> str:
    """The text before and after token `position` of a byte-level prompt, the token in brackets; "" without a text."""
    if text is None or not 0 <= position < len(text):
        return ""
    parts = text[max(0, position - around) : position], text[position : position + 1], text[position + 1 :][:around]
    before, here, after = (part.decode("utf-8", "replace").replace("\n", "⏎").replace("\t", "⇥") for part in parts)
    return f"{before}[{here}]{after}"
