"""The correctness gate: nothing is timed whose result was not checked on the very tensors that are timed.

Outputs are compared with float64 attention at 64 or more rows of every head of every request, first and last rows of
query blocks among them, under the library's error budget (SPEC 3.3): per request and head,
max|o - o64| <= 2 · max|plain - o64| + eps(dtype) · max|o64|, `plain` being plain PyTorch in the same dtype.
Tables, masks and unions are compared whole and exactly, scores within a bound on their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import table_mask
from compactattn import BlockTable, FlashPrefill, KeyBounds, KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.quality import QuokaSelection

ROWS = 64
EDGES = (0, 1, 126, 127, 128, 129)

#: Which keys the chosen rows of one KV head's query heads see besides causality: (request, KV head) -> bool [G, n, L].
VisibleTokens = Callable[[int, int], Tensor]

#: More keys and values of one KV head, each of so many tokens: (request, KV head) -> ([n, D], [n, D], hidden from the
#: chosen rows, broadcastable to [G, n rows, n], tokens).
Means = Callable[[int, int], tuple[Tensor, Tensor, Tensor, int]]


@dataclass(frozen=True)
class Verdict:
    """`worst`: the largest error ÷ its budget, or the count of wrong entries; `rows`: rows per head compared."""

    passed: bool
    worst: float
    rows: int
    what: str

    def as_json(self) -> dict[str, object]:
        worst = self.worst if math.isfinite(self.worst) else None
        return {"passed": self.passed, "worst": worst, "rows": self.rows, "what": self.what}


@dataclass(frozen=True, eq=False)
class Model:
    """What a model adds to attention, as `attend` takes it."""

    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None

    @property
    def arguments(self) -> dict[str, object]:
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Reference:
    """Float64 outputs of some rows, and how far a result may be from them.

    Attributes:
        rows: int64 [B, n], rows of q, the same number for each request.
        exact: float64 [B, n, Hq, D].
        allowed: float64 [B, Hq].
    """

    rows: Tensor
    exact: Tensor
    allowed: Tensor

    def check(self, out: Tensor, slack: float = 1.0) -> Verdict:
        """Compare an output [T, Hq, D] with `slack` times the budget; NaN never passes."""
        error = (out[self.rows].double() - self.exact).abs().amax((1, 3)).nan_to_num(math.inf, math.inf)
        ratio = float((error / self.allowed).amax())
        what = "output against float64 rows" + ("" if slack == 1.0 else f", {slack:g} x the budget allowed")
        return Verdict(ratio <= slack, ratio, self.rows.shape[1], what)


def sample_rows(batch: PrefillBatch, count: int = ROWS, seed: int = 0) -> Tensor:
    """Rows of q to compare, ascending, int64 [B, n]: edges of query blocks and random others; n = min(count, q_len)."""
    q_lens, starts = batch.q_lens.tolist(), batch.cu_seqlens_q.tolist()
    count = min(count, min(q_lens))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for q_len, start in zip(q_lens, starts, strict=False):
        edges = [row for row in (*EDGES, q_len - 129, q_len - 128, q_len - 2, q_len - 1) if 0 <= row < q_len]
        picked = list(dict.fromkeys(edges))[:count]
        others = torch.randperm(q_len, generator=generator).tolist()
        picked += [row for row in others if row not in picked][: count - len(picked)]
        chosen.append([start + row for row in sorted(picked)])
    return torch.tensor(chosen, device=batch.seq_lens.device)


def reference_rows(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    rows: Tensor,
    visible: VisibleTokens | None = None,
    scale: float | None = None,
    means: Means | None = None,
    model: Model | None = None,
) -> Reference:
    """Float64 attention of the chosen rows over every causal token, or those of them that `visible` allows.

    `means`: of blocks that stand in for their tokens, in addition. `model`: the features of the model's attention.
    """
    model = Model() if model is None else model
    heads, dim = q.shape[1:]
    kv_heads, group = kv.num_kv_heads, heads // kv.num_kv_heads
    scale = dim**-0.5 if scale is None else scale
    exact = torch.empty(batch.size, rows.shape[1], heads, dim, dtype=torch.float64, device=q.device)
    allowed = torch.empty(batch.size, heads, dtype=torch.float64, device=q.device)
    starts, seq_lens, past_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist(), batch.past_lens.tolist()
    for b, seq_len in enumerate(seq_lens):
        position = rows[b] - starts[b] + past_lens[b]
        key = torch.arange(seq_len, device=q.device)
        hidden = key > position[:, None]
        if model.window is not None:
            hidden |= key <= position[:, None] - model.window
        pages = kv.page_table[b, : -(-seq_len // kv.page_size)].long()
        for h in range(kv_heads):
            k, v = (cache[pages, :, h].flatten(0, 1)[:seq_len] for cache in (kv.k, kv.v))
            mine = slice(h * group, (h + 1) * group)
            unseen = hidden
            if visible is not None:  # keys that no chosen row sees have no part in the result
                seen = visible(b, h)
                columns = seen.flatten(0, -2).any(0).nonzero().squeeze(1)
                k, v, unseen = k[columns], v[columns], (hidden[:, columns] | ~seen[..., columns])
            weight = None
            if means is not None:
                mean_k, mean_v, without, tokens = means(b, h)
                weight = torch.zeros(len(k) + len(mean_k), dtype=torch.float64, device=q.device)
                weight[len(k) :] = math.log(tokens)
                without = without.expand(*torch.broadcast_shapes(unseen.shape[:-1], without.shape[:-1]), -1)
                unseen = torch.cat((unseen.expand(*without.shape[:-1], -1), without), -1)
                k, v = torch.cat((k, mean_k)), torch.cat((v, mean_v))
            queries = q[rows[b], mine].transpose(0, 1)
            sinks = None if model.sinks is None else model.sinks[mine]
            how = (scale, weight, model.softcap, sinks)
            truth = _softmax_attention(queries, k, v, unseen, torch.float64, *how)
            plain = _softmax_attention(queries, k, v, unseen, q.dtype, *how).double()
            budget = 2 * (plain - truth).abs().amax((1, 2)) + torch.finfo(q.dtype).eps * truth.abs().amax((1, 2))
            exact[b, :, mine], allowed[b, mine] = truth.transpose(0, 1), budget
    return Reference(rows, exact, allowed)


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unseen: Tensor,
    dtype: torch.dtype,
    scale: float,
    weight: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Plain attention in `dtype`: q [G, n, D], k and v [L, D], unseen broadcastable to [G, n, L], log weights [L], one
    more logit for each of G heads."""
    scores = (q.to(dtype) @ k.to(dtype).T).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if weight is not None:
        scores += weight.to(dtype)
    scores.masked_fill_(unseen, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ v.to(dtype)
    own = sinks.to(dtype)[:, None, None].expand(*scores.shape[:2], 1)
    return torch.cat((scores, own), -1).softmax(-1)[..., :-1] @ v.to(dtype)


def table_tokens(table: BlockTable, q: Tensor, kv: PagedKV, batch: PrefillBatch, rows: Tensor) -> VisibleTokens:
    """What a block table gives to the chosen rows."""
    keep, group = table_mask(table), q.shape[1] // kv.num_kv_heads
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()

    def visible(b: int, h: int) -> Tensor:
        i = (rows[b] - starts[b]) // table.query_block
        row = table.rows[b, h * group : (h + 1) * group].long()[:, i]
        return keep[row].repeat_interleave(table.block_size, -1)[..., : seq_lens[b]]

    return visible


def left_out_means(table: BlockTable, q: Tensor, kv: PagedKV, batch: PrefillBatch, rows: Tensor) -> Means:
    """The means, rounded to q's dtype, of the past blocks that a block table does not give to the chosen rows."""
    keep, group, size = table_mask(table), q.shape[1] // kv.num_kv_heads, table.block_size
    starts, past_lens = batch.cu_seqlens_q.tolist(), batch.past_lens.tolist()

    def means(b: int, h: int) -> tuple[Tensor, Tensor, Tensor, int]:
        blocks = past_lens[b] // size
        pages = kv.page_table[b, : -(-blocks * size // kv.page_size)].long()
        k, v = (
            cache[pages, :, h].flatten(0, 1)[: blocks * size].unflatten(0, (blocks, size)).double().mean(1).to(q.dtype)
            for cache in (kv.k, kv.v)
        )
        i = (rows[b] - starts[b]) // table.query_block
        return k, v, keep[table.rows[b, h * group : (h + 1) * group].long()[:, i], :blocks], size

    return means


def quoka_tokens(selection: QuokaSelection, batch: PrefillBatch) -> VisibleTokens:
    """What QUOKA gives to every row of a KV head: the kept past tokens and the current chunk."""
    seq_lens, past_lens = batch.seq_lens.tolist(), batch.past_lens.tolist()

    def visible(b: int, h: int) -> Tensor:
        tokens = torch.zeros(seq_lens[b], dtype=torch.bool, device=selection.tokens.device)
        tokens[selection.tokens[b, h, : int(selection.counts[b, h])].long()] = True
        tokens[past_lens[b] :] = True
        return tokens[None, None]

    return visible


def check_selection(
    selection: SelectionMask,
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: FlashPrefill | KeyBounds,
    forced: Tensor,
) -> Verdict:
    """A mask against float64 scores of equal-length requests, whole; open within rounding alone.

    `forced`: bool [B, Qb, Kb], blocks that are kept without a score. A score moves by the rounding of the block means
    (or bounds) to q's dtype and by float32 sums: both are under eps(dtype) · scale · max|q| · max|k̄|, twice for the
    threshold.
    """
    block_size, (_, heads, dim) = selector.block_size, q.shape
    group, wrong = heads // kv.num_kv_heads, 0
    starts, seq_lens, past_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist(), batch.past_lens.tolist()
    for b, seq_len in enumerate(seq_lens):
        complete = seq_len // block_size
        pages = kv.page_table[b, : -(-seq_len // kv.page_size)].long()
        position = torch.arange(past_lens[b], seq_len, device=q.device)
        late = position[:, None] < torch.arange(1, complete + 1, device=q.device) * block_size - 1
        for h in range(kv.num_kv_heads):
            keys = kv.k[pages, :, h].flatten(0, 1)[: complete * block_size].view(complete, block_size, dim)
            rows = q[starts[b] : starts[b + 1], h * group : (h + 1) * group].double()
            score = _gap_to_peak if isinstance(selector, FlashPrefill) else _gap_to_threshold
            gap, longest = score(rows, keys, late, selector)
            bound = 2 * torch.finfo(q.dtype).eps * dim**-0.5 * float(rows.norm(dim=-1).amax() * longest)
            keep = (gap >= 0) & (gap > -math.inf) | forced[b, :, :complete]
            mask = selection.mask[b, h * group : (h + 1) * group, :, :complete]
            wrong += int(((mask != keep) & ~(gap.abs() <= bound)).sum())
        wrong += int((selection.mask[b, :, :, complete:] != forced[b, :, complete:]).sum())
    return Verdict(wrong == 0, float(wrong), batch.max_q_len, "mask against float64 scores")


def _gap_to_peak(rows: Tensor, keys: Tensor, late: Tensor, selector: FlashPrefill) -> tuple[Tensor, Tensor]:
    """(log-sum-exp scores over a query block less the least that is kept [G, Qb, n], the longest mean), float64.

    rows: float64 [q_len, G, D]; keys: [n, block, D]; late: bool [q_len, n], blocks that a row does not score.
    """
    means = keys.float().mean(1).to(keys.dtype).double()
    scores = torch.einsum("rgd,jd->grj", rows, means).mul_(rows.shape[-1] ** -0.5).masked_fill_(late, -math.inf)
    log_s = torch.stack([part.logsumexp(1) for part in scores.split(selector.query_block, 1)], 1)
    return log_s - (log_s.amax(-1, keepdim=True) + math.log(selector.alpha)), means.norm(dim=-1).amax()


def _gap_to_threshold(rows: Tensor, keys: Tensor, late: Tensor, selector: KeyBounds) -> tuple[Tensor, Tensor]:
    """(logarithms of the largest share over a query block less the threshold's, the longest bound), as above."""
    high, low = keys.amax(1).double(), keys.amin(1).double()
    scores = torch.einsum("rgd,jd->grj", rows.clamp(min=0), high) + torch.einsum("rgd,jd->grj", rows.clamp(max=0), low)
    scores.mul_(rows.shape[-1] ** -0.5).masked_fill_(late, -math.inf)
    log_p = scores.log_softmax(-1).masked_fill_(late, -math.inf)  # NaN in rows that score nothing
    largest = torch.stack([part.amax(1) for part in log_p.split(selector.query_block, 1)], 1)
    longest = torch.maximum(high.abs(), low.abs()).norm(dim=-1).amax()
    return largest - math.log(selector.threshold), longest


def united(selection: SelectionMask, batch: PrefillBatch, heads: int, span: int | None) -> Tensor:
    """The union by plain PyTorch: bool [R, Kb], rows in the fixed order."""
    keep = wanted(selection, batch)
    span = keep.shape[2] if span is None else span
    keep = torch.nn.functional.pad(keep, (0, 0, 0, -keep.shape[2] % span))
    return keep.unflatten(1, (-1, heads)).unflatten(3, (-1, span)).any(4).any(2).flatten(0, 2)


def united_rows(selection: SelectionMask, batch: PrefillBatch, rows: Tensor, count: int) -> Tensor:
    """The same for any assignment of (request, head, query block) to `count` rows, such as a table's own."""
    keep = wanted(selection, batch)
    total = torch.zeros(count, keep.shape[-1], dtype=torch.int32, device=keep.device)
    return total.index_add_(0, rows.flatten().long(), keep.flatten(0, 2).int()) > 0


def wanted(selection: SelectionMask, batch: PrefillBatch) -> Tensor:
    """What each (head, query block) asks its row for: its past by the mask, its current region whole: [B, Hq, Qb, Kb].

    Query blocks without a query ask for nothing.
    """
    mask, block_size, query_block = selection.mask, selection.block_size, selection.query_block
    past = (batch.past_lens // block_size)[:, None, None]
    j = torch.arange(mask.shape[3], device=mask.device)
    first_row = torch.arange(mask.shape[2], device=mask.device) * query_block
    last_row = torch.minimum(first_row + query_block, batch.q_lens[:, None]) - 1
    last = (batch.past_lens[:, None] + last_row) // block_size
    own = torch.where((j < past)[:, None], mask, ((j >= past) & (j <= last[..., None]))[:, None])
    return own & (first_row < batch.q_lens[:, None])[:, None, :, None]


def check_same(name: str, got: Tensor, expected: Tensor) -> Verdict:
    """Exact equality of two boolean or integer tensors."""
    if got.shape != expected.shape:
        return Verdict(False, math.inf, 0, f"{name}: shape {tuple(got.shape)} is not {tuple(expected.shape)}")
    wrong = int((got != expected).sum())
    return Verdict(wrong == 0, float(wrong), len(got), f"{name}, every entry")


def product_check(a: Tensor, b: Tensor) -> Callable[[Tensor], Verdict]:
    """Of a product a @ b in a's dtype, accumulated in float32 in any order and rounded once.

    Each of n products and sums rounds by at most 2^-23 of what was summed in absolute value so far.
    """
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = (a.shape[-1] + 1) * 2.0**-23 * size + torch.finfo(a.dtype).eps * exact.abs()

    def check(result: Tensor) -> Verdict:
        worst = float(((result.double() - exact).abs() / bound).amax().nan_to_num(math.inf, math.inf))
        return Verdict(worst <= 1, worst, a.shape[-2], "product against float64 rows")

    return check


def check_table(table: BlockTable, keep: Tensor) -> Verdict:
    """A table against the blocks [R, Kb] that its rows must list: the same ones, each once, in ascending order."""
    verdict = check_same("table", table_mask(table), keep)
    if not verdict.passed:
        return verdict
    before, after = table.indices[:, :-1], table.indices[:, 1:]
    listed = torch.arange(1, table.indices.shape[1], device=keep.device) < table.counts[:, None]
    wrong = int((listed & (after <= before)).sum()) + int((table.counts != keep.sum(-1)).sum())
    return Verdict(wrong == 0, float(wrong), len(keep), verdict.what)


def check_summary(summary: KVSummary, kv: PagedKV, batch: PrefillBatch) -> Verdict:
    """Means of complete units against float64 means: (unit + 1) rounding steps of float32 on the mean magnitude.

    Where there are bounds, they are exact.
    """
    wrong = 0
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        units = seq_len // summary.unit
        pages = kv.page_table[b, : -(-seq_len // kv.page_size)].long()
        keys = kv.k[pages].flatten(0, 1)[: units * summary.unit].unflatten(0, (units, summary.unit))
        got = summary.k_mean[pages].flatten(0, 1)[:units].double()
        exact, size = torch.empty_like(got), torch.empty_like(got)
        for part in range(0, units, 128):
            piece = keys[part : part + 128].double()
            exact[part : part + 128], size[part : part + 128] = piece.mean(1), piece.abs().mean(1)
        if summary.k_bounds is not None:
            bounds = torch.cat((keys.amax(1), keys.amin(1)), -1).float()
            wrong += int((summary.k_bounds[pages].flatten(0, 1)[:units] != bounds).sum())
        wrong += int((~((got - exact).abs() <= (summary.unit + 1) * 2.0**-23 * size)).sum())
    what = "means" if summary.k_bounds is None else "means and bounds"
    return Verdict(wrong == 0, float(wrong), batch.max_seq_len, f"{what} against float64")
