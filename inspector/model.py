"""Settings in, results out: what one chunk reads, who asked for it, and which queries need it. No streamlit here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from compactattn import BlockTable, KVSummary, SeerGate, SelectionMask, Selector, build_table, select, summarize, unite
from compactattn._numba.threads import run_each
from compactattn.quality import DensityCascade, density_cascade
from compactattn.selection import block_rules
from compactattn.selectors import FlashPrefill, KeyBounds
from compactattn.union import span_blocks
from inspector.sources import Step

#: What a cell of a mask is, by its number in `Reading.kinds`; 0 is a block that no row of the query block sees.
KINDS = ("not visible", "left out", "selected by score", "sink", "window", "current region")
NOT_VISIBLE, LEFT_OUT, SELECTED, SINK, WINDOW, CURRENT = range(len(KINDS))
_SCORES_AT_ONCE = 1 << 26  # (query, key) scores that one view computes at most; beyond, it samples queries


@dataclass(frozen=True)
class Setting:
    """How blocks are selected, and which (head, query block) pairs share a table row."""

    selector: Selector
    heads_per_group: int
    query_blocks_per_span: int | None = None

    @property
    def grouping(self) -> dict[str, int | None]:
        """The arguments of `unite`."""
        return {"heads_per_group": self.heads_per_group, "query_blocks_per_span": self.query_blocks_per_span}

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this setting from others: plain values, and digests of a gate's weights."""
        values = (getattr(self.selector, field.name) for field in fields(self.selector))
        plain = (digest(value) if isinstance(value, Tensor) else value for value in values)
        return (type(self.selector).__name__, *plain, self.heads_per_group, self.query_blocks_per_span)


_digests = WeakTensorKeyDictionary()


def digest(tensor: Tensor) -> str:
    """Of a tensor's bytes; computed once for each tensor."""
    if tensor not in _digests:
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        _digests[tensor] = hashlib.blake2b(data, digest_size=16).hexdigest()
    return _digests[tensor]


@dataclass(frozen=True, eq=False)
class Reading:
    """What one setting reads in one chunk: Hq heads, Qb query blocks, Kb KV blocks, R table rows.

    Attributes:
        selection, table: as the library made them, on the step's device.
        mask: bool [Hq, Qb, Kb]; what each head's selector keeps.
        visible: bool [Qb, Kb]; blocks of which some row sees a token.
        keep: bool [R, Kb]; the block table's rows.
        rows: int [Hq, Qb]; the row that each pair walks.
        past_blocks: KV blocks before the current region, which every row lists whole.
        start, stop, group: the chunk's positions; query heads per KV head.
        cascade: past blocks read at each step of the cascade, all heads.
    """

    setting: Setting
    selection: SelectionMask
    table: BlockTable
    mask: np.ndarray
    visible: np.ndarray
    keep: np.ndarray
    rows: np.ndarray
    past_blocks: int
    start: int
    stop: int
    group: int
    cascade: DensityCascade

    @property
    def heads(self) -> int:
        return self.mask.shape[0]

    @property
    def query_blocks(self) -> int:
        return self.mask.shape[1]

    @property
    def blocks(self) -> int:
        return self.mask.shape[2]

    @property
    def span(self) -> int:
        """Query blocks that share a row."""
        return span_blocks(self.query_blocks, self.setting.query_blocks_per_span)

    @property
    def past(self) -> np.ndarray:
        """bool [Kb]."""
        return np.arange(self.blocks) < self.past_blocks

    def listed(self, head: int) -> np.ndarray:
        """bool [Qb, Kb]: visible blocks in the rows that a head walks."""
        return self.keep[self.rows[head]] & self.visible

    def density(self) -> np.ndarray:
        """float [Hq]: past blocks in a head's rows ÷ past blocks, mean over its query blocks; NaN without a past."""
        if not self.past_blocks:
            return np.full(self.heads, np.nan)
        return self.keep[self.rows][..., : self.past_blocks].mean((1, 2))

    def kinds(self, head: int) -> np.ndarray:
        """int [Qb, Kb], numbers of `KINDS`: the current region first, then sink, window, and what was scored."""
        selector, j = self.setting.selector, np.arange(self.blocks)
        last = self.visible.sum(1)[:, None] - 1
        selected = self.mask[head]
        return np.select(
            [
                ~self.visible,
                np.broadcast_to(~self.past, self.visible.shape),
                selected & (j < selector.sink_blocks),
                selected & (j > last - selector.window_blocks),
                selected,
            ],
            [NOT_VISIBLE, CURRENT, SINK, WINDOW, SELECTED],
            default=LEFT_OUT,
        )


def make_summary(step: Step, selector: Selector) -> KVSummary | None:
    """What an engine keeps beside the cache for a selector, key means, bounds or pooled keys; None for the others."""
    if not isinstance(selector, (FlashPrefill, KeyBounds, SeerGate)):
        return None
    gate, bounds = selector if isinstance(selector, SeerGate) else None, isinstance(selector, KeyBounds)
    return summarize(step.kv, step.batch, block_size=selector.block_size, gate=gate, bounds=bounds)


def visible_blocks(step: Step, selector: Selector) -> np.ndarray:
    """bool [Qb, Kb]: blocks of which some row of the query block sees a token."""
    return block_rules(step.batch, selector).visible[0].cpu().numpy()


def read(step: Step, setting: Setting, summary: KVSummary | None = None) -> Reading:
    """Run the first three stages on one chunk; `summary` is what `make_summary` gave for such a selector.

    Raises:
        ValueError: settings that the library refuses.
    """
    selector = setting.selector
    selection = select(step.q, step.kv, step.batch, selector, scale=step.scale, summary=summary)
    groups = unite(selection, step.batch, **setting.grouping)
    return Reading(
        setting=setting,
        selection=selection,
        table=build_table(groups),
        mask=selection.mask[0].cpu().numpy(),
        visible=visible_blocks(step, selector),
        keep=groups.keep.cpu().numpy(),
        rows=groups.rows[0].cpu().numpy(),
        past_blocks=step.start // selector.block_size,
        start=step.start,
        stop=step.stop,
        group=step.group,
        cascade=density_cascade(selection, step.batch, kv_heads=step.kv_heads, **setting.grouping),
    )


@dataclass(frozen=True, eq=False)
class Mass:
    """Where the exact softmax mass lies.

    Attributes:
        share: float32 [Hq, Qb, Kb]; mean over the scored rows of a query block, a row sums to 1.
        every: every n-th row of a query block was scored; 1 is all of them.
    """

    share: np.ndarray
    every: int


def block_mass(step: Step, block_size: int, query_block: int, *, limit: int = _SCORES_AT_ONCE) -> Mass:
    """Exact softmax mass per KV block, of all heads; of every n-th row where there are more scores than `limit`."""
    every = 1
    while every < query_block and len(step.q) * step.heads * step.stop > limit * every:
        every *= 2
    blocks = -(-step.stop // block_size)
    share = torch.empty(step.heads, -(-len(step.q) // query_block), blocks, device=step.q.device)

    def of_kv_head(kv_head: int) -> None:
        keys = step.keys(kv_head).float()
        for head in range(kv_head * step.group, (kv_head + 1) * step.group):
            for i, queries in enumerate(step.q[:, head].float().split(query_block)):
                # Counted from the last row, which sees every block that the query block sees.
                rows = torch.arange(len(queries) - 1, -1, -every, device=queries.device)
                position = step.start + i * query_block + rows
                mass = _mean_softmax(queries[rows], keys, position, step.scale)
                share[head, i] = pad(mass, (0, blocks * block_size - step.stop)).view(blocks, -1).sum(-1)

    run_each([partial(of_kv_head, kv_head) for kv_head in range(step.kv_heads)])
    return Mass(share.cpu().numpy(), every)


def _mean_softmax(queries: Tensor, keys: Tensor, position: Tensor, scale: float | None) -> Tensor:
    """Mean over queries [m, D] at `position` of their causal softmax over keys [n, D]: [n]."""
    scores = torch.matmul(queries * (queries.shape[-1] ** -0.5 if scale is None else scale), keys.T)
    first = int(position.min()) + 1
    later = torch.arange(first, len(keys), device=keys.device)
    scores[:, first:].masked_fill_(later > position[:, None], -torch.inf)
    return scores.softmax(-1).mean(0)


@dataclass(frozen=True)
class HeadProfile:
    """What the mass of one head says before anything is selected; shares are means over the query blocks.

    Attributes:
        sink, far, window, current: shares of the mass on the first blocks, on the rest of the past, on the past
            blocks of the window, and on the current region.
        blocks_90: blocks that hold 90 % of the mass, the heaviest first.
    """

    head: int
    sink: float
    far: float
    window: float
    current: float
    blocks_90: float


def profile(step: Step, mass: Mass, selector: Selector) -> list[HeadProfile]:
    """One profile per head; `mass` over the selector's blocks, sink and window as long as the selector's."""
    visible = visible_blocks(step, selector)
    j, last = np.arange(visible.shape[1]), visible.sum(1)[:, None] - 1
    current = np.broadcast_to(j >= step.start // selector.block_size, visible.shape)
    sink = ~current & (j < selector.sink_blocks)
    window = ~current & ~sink & (j > last - selector.window_blocks)
    far = ~(current | sink | window)
    ordered = np.sort(mass.share, axis=-1)[..., ::-1].cumsum(-1)
    needed = (ordered < 0.9).sum(-1) + 1
    regions = [(mass.share * region).sum(-1).mean(-1) for region in (sink, far, window, current)]
    return [HeadProfile(h, *(float(r[h]) for r in regions), float(needed[h].mean())) for h in range(len(mass.share))]


SHARERS = HEADS, QUERY_BLOCKS = "heads", "query blocks"  # who may share a row


@dataclass(frozen=True, eq=False)
class GroupUnion:
    """One row of the table, from its members' masks to its list.

    Attributes:
        row: its number in the table.
        heads, query_blocks: its members are the pairs of these.
        members: bool [H, I, Kb]; visible bits of the members' masks.
        by_head: bool [H, Kb]; after the union over the query blocks.
        listed: bool [Kb]; the row.
        past_blocks: blocks before the current region.
    """

    row: int
    heads: range
    query_blocks: range
    members: np.ndarray
    by_head: np.ndarray
    listed: np.ndarray
    past_blocks: int

    @property
    def past(self) -> np.ndarray:
        """bool [Kb]."""
        return np.arange(len(self.listed)) < self.past_blocks

    @property
    def sharers(self) -> list[str]:
        """Who shares the row: `HEADS`, `QUERY_BLOCKS`, both or neither."""
        return [name for name in SHARERS if len(self.parts(name)) > 1]

    def parts(self, by: str) -> range:
        """The row's heads, or its query blocks."""
        return self.heads if by == HEADS else self.query_blocks

    def asked(self, by: str) -> np.ndarray:
        """bool [parts, Kb]: what each head asked for in any query block, or each query block in any head."""
        return self.members.any(1 if by == HEADS else 0)

    def alone(self, by: str) -> np.ndarray:
        """bool [parts, Kb]: past blocks that only this head (or query block) asked for, the price of sharing the row.

        A part that has the row to itself pays no price.
        """
        asked = self.asked(by)
        return asked & (asked.sum(0) == 1) & self.past & (len(asked) > 1)

    def needed_by(self, block: int) -> list[tuple[int, int]]:
        """The (head, query block) pairs that selected a block: whom taking it away would hurt."""
        found = zip(*self.members[:, :, block].nonzero(), strict=True)
        return [(self.heads[h], self.query_blocks[i]) for h, i in found]


def row_union(reading: Reading, head: int, span: int) -> GroupUnion:
    """The row that `head` walks in its `span`-th span of query blocks."""
    size = reading.setting.heads_per_group
    heads = range(head // size * size, head // size * size + size)
    blocks = range(span * reading.span, min((span + 1) * reading.span, reading.query_blocks))
    row = int(reading.rows[head, blocks.start])
    members = reading.mask[heads.start : heads.stop, blocks.start : blocks.stop]
    return GroupUnion(row, heads, blocks, members, members.any(1), reading.keep[row], reading.past_blocks)


@dataclass(frozen=True)
class SharingCost:
    """Past density of the table for one grouping, and how often its rows list what one of their heads asked for."""

    heads_per_group: int
    query_blocks_per_span: int
    density: float
    growth: float


def divisors(group: int) -> list[int]:
    """Group sizes that fit G heads per KV head."""
    return [n for n in range(1, group + 1) if group % n == 0]


def span_choices(query_blocks: int) -> list[int]:
    """1, 2, 4, … and the whole chunk."""
    return sorted({query_blocks, *(1 << n for n in range(query_blocks.bit_length()) if 1 << n <= query_blocks)})


def sharing_costs(step: Step, reading: Reading) -> list[SharingCost]:
    """Every group size with every span, for the masks that were selected."""
    choices = [(heads, span) for heads in divisors(reading.group) for span in span_choices(reading.query_blocks)]
    found: dict[tuple[int, int], SharingCost] = {}

    def of_choice(heads: int, span: int) -> None:
        cascade = density_cascade(
            reading.selection, step.batch, kv_heads=step.kv_heads, heads_per_group=heads, query_blocks_per_span=span
        )
        growth = cascade.sub_group_union / cascade.mask if cascade.mask else float("nan")
        found[heads, span] = SharingCost(heads, span, cascade.densities()["sub_group_union"], growth)

    run_each([partial(of_choice, *choice) for choice in choices])
    return [found[choice] for choice in choices]


def name_heads(mask: np.ndarray, heads: Iterable[int]) -> np.ndarray:
    """bool [H, ...] to strings [...]: the heads whose bit is set, "0, 2", or "nobody"."""
    heads = list(heads)
    weights = (1 << np.arange(len(heads), dtype=np.int64)).reshape(-1, *(1,) * (mask.ndim - 1))
    codes, where = np.unique((mask * weights).sum(0), return_inverse=True)
    names = [", ".join(str(h) for n, h in enumerate(heads) if code >> n & 1) or "nobody" for code in codes]
    return np.array(names, dtype=object)[where].reshape(mask.shape[1:])


@dataclass(frozen=True, eq=False)
class Difference:
    """Two tables of the same chunk, for one head: bool [Qb, Kb] past blocks listed by both, or by one of them only."""

    both: np.ndarray
    only_a: np.ndarray
    only_b: np.ndarray
    block_size: int
    query_block: int


def difference(a: Reading, b: Reading, head: int) -> Difference:
    """Compare what a head's rows list; needs equal block sizes.

    Raises:
        ValueError: settings with other block sizes, whose tables cannot be laid over each other.
    """
    sizes = [(r.setting.selector.block_size, r.setting.selector.query_block) for r in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"block sizes: expected the same for both settings, got {sizes[0]} and {sizes[1]}")
    mine, theirs = a.listed(head) & a.past, b.listed(head) & b.past
    return Difference(mine & theirs, mine & ~theirs, theirs & ~mine, *sizes[0])
