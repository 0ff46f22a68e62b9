"""Results as tables: what the charts draw, what hovering shows, and what is downloaded as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise

import numpy as np
import pandas as pd

from inspector.cost import PAGE_KINDS, Measured, PageGrid
from inspector.model import KINDS, Difference, GroupUnion, HeadProfile, Mass, Reading, SharingCost, name_heads
from inspector.recall import Judged, Observed, Outcome, Quoka, excerpt

ONE_HEAD, SEVERAL_HEADS, CURRENT_REGION = "one head alone", "several heads", "current region"
SAMPLED, UNSAMPLED = "asked by some head", "never asked"
BOTH, ONLY_A, ONLY_B = "in both tables", "only in A", "only in B"


CELLS = 4096  # of a heatmap: 8 query blocks of 512 cells, about as many as a line has pixels


def bin_width(rows: int, columns: int, cells: int | None = CELLS) -> int:
    """Adjacent KV blocks to draw as one, a power of two, so that at most `cells` are drawn; None draws all."""
    width = 1
    while cells is not None and rows * -(-columns // width) > cells:
        width *= 2
    return width


def _binned(values: np.ndarray, width: int, how: str) -> np.ndarray:
    """[..., n] to [..., ceil(n / width)] by sum or max; the last bin may be short."""
    starts = np.arange(0, values.shape[-1], width)
    return (np.add if how == "sum" else np.maximum).reduceat(values, starts, axis=-1)


def _ranges(first: np.ndarray, width: int, size: int, stop: int) -> list[str]:
    """Token ranges of bins of blocks: "4,096 to 4,159"."""
    return [f"{a:,} to {b - 1:,}" for a, b in zip(first * size, np.minimum((first + width) * size, stop), strict=True)]


def _block_names(first: np.ndarray, width: int, blocks: int) -> list[str]:
    return [str(j) if width == 1 else f"{j} to {min(j + width, blocks) - 1}" for j in first]


def mask_frame(
    reading: Reading, mass: Mass, head: int, *, blocks: tuple[int, int] | None = None, cells: int | None = CELLS
) -> pd.DataFrame:
    """One row per (query block, KV block or bin) that is visible: mass, kind, and which heads of the KV group chose it.

    `blocks`: first and end block to show. The kind of a bin is its rarest: current, then window, sink, selected.
    """
    begin, end = blocks or (0, reading.blocks)
    width = bin_width(reading.query_blocks, end - begin, cells)
    part = slice(begin, end)
    first = np.arange(begin, end, width)
    kv_head = head // reading.group
    heads = range(kv_head * reading.group, (kv_head + 1) * reading.group)
    chosen = np.maximum.reduceat(reading.mask[heads.start : heads.stop, :, part], first - begin, axis=-1)
    kinds = _binned(reading.kinds(head)[:, part], width, "max")
    setting = reading.setting.selector
    query_blocks, columns = kinds.shape
    starts = reading.start + np.arange(query_blocks) * setting.query_block
    ends = np.minimum(starts + setting.query_block, reading.stop) - 1
    frame = pd.DataFrame(
        {
            "query_block": np.repeat(np.arange(query_blocks), columns),
            "queries": np.repeat([f"{a:,} to {b:,}" for a, b in zip(starts, ends, strict=True)], columns),
            "first": np.tile(first, query_blocks),
            "end": np.tile(np.minimum(first + width, end), query_blocks),
            "kv_block": np.tile(_block_names(first, width, end), query_blocks),
            "tokens": np.tile(_ranges(first, width, setting.block_size, reading.stop), query_blocks),
            "mass": _binned(mass.share[head][:, part], width, "sum").ravel(),
            "kind": np.array(KINDS, dtype=object)[kinds].ravel(),
            "in_table": np.where(_binned(reading.listed(head)[:, part], width, "max"), "yes", "no").ravel(),
            "selected_by": name_heads(chosen, heads).ravel(),
        }
    )
    return frame[kinds.ravel() > 0]


def heads_frame(reading: Reading, mass: Mass, *, by_mass: bool = False, bins: int = 128) -> pd.DataFrame:
    """All heads, each a strip of query blocks: one row per (head, query block, stretch of KV blocks).

    A stretch is a bin of blocks; by kind, adjacent bins of one kind are a single stretch.
    """
    width = bin_width(1, reading.blocks, bins)
    first = np.arange(0, reading.blocks, width)
    kinds = np.stack([_binned(reading.kinds(head), width, "max") for head in range(reading.heads)])
    begins = np.ones(kinds.shape, dtype=bool)
    if not by_mass:
        begins[..., 1:] = kinds[..., 1:] != kinds[..., :-1]
    where = np.flatnonzero(begins)
    head, query_block, column = np.unravel_index(where, kinds.shape)
    ends = np.append(where[1:], kinds.size)  # a line's first bin begins a stretch, so none reaches into the next line
    frame = pd.DataFrame(
        {
            "head": head,
            "query_block": query_block,
            "first": first[column],
            "end": np.minimum(first[column] + (ends - where) * width, reading.blocks),
            "kind": np.array(KINDS, dtype=object)[kinds.ravel()[where]],
            "mass": np.add.reduceat(_binned(mass.share, width, "sum").ravel(), where),
            "kept": np.add.reduceat(_binned(reading.mask.astype(int), width, "sum").ravel(), where),
        }
    )
    return frame[kinds.ravel()[where] > 0]


def heads_summary(reading: Reading, mass: Mass) -> pd.DataFrame:
    """Per head: past density of its mask and of its rows, and the mass that they cover."""
    past = reading.past_blocks
    shares = mass.share
    rows = []
    for head in range(reading.heads):
        rows.append(
            {
                "head": head,
                "KV head": head // reading.group,
                "mask density": reading.mask[head, :, :past].mean() if past else np.nan,
                "table density": reading.density()[head],
                "mass on the mask": (shares[head] * (reading.mask[head] | ~reading.past)).sum(-1).mean(),
                "mass on the table": (shares[head] * reading.listed(head)).sum(-1).mean(),
            }
        )
    return pd.DataFrame(rows)


def profile_frame(profiles: Sequence[HeadProfile]) -> pd.DataFrame:
    """Long form: one row per head and region of the context."""
    names = {"sink": "sink", "far": "far past", "window": "window", "current": "current region"}
    return pd.DataFrame(
        [
            {"head": p.head, "region": label, "share": getattr(p, name), "blocks for 90 %": p.blocks_90, "order": order}
            for p in profiles
            for order, (name, label) in enumerate(names.items())
        ]
    )


def members_frame(union: GroupUnion, reading: Reading) -> pd.DataFrame:
    """The bits of each member's mask, then of each head's union over the query blocks, then of the group's union."""
    rows = []
    visible, past = reading.visible, reading.past
    for n, head in enumerate(union.heads):
        for m, i in enumerate(union.query_blocks):
            bits = union.members[n, m] & past
            rows.append(_bits(union, reading, bits, f"head {head}, query block {i}", "members", [head]))
            current = visible[i] & ~past
            rows.append(_bits(union, reading, current, f"head {head}, query block {i}", "members", [], current=True))
    for n, head in enumerate(union.heads):
        rows.append(_bits(union, reading, union.by_head[n] & past, f"head {head}", "heads", [head]))
        rows.append(_bits(union, reading, union.listed & ~past, f"head {head}", "heads", [], current=True))
    heads = list(union.heads)
    rows.append(_bits(union, reading, union.listed & past, "the row", "group", heads))
    rows.append(_bits(union, reading, union.listed & ~past, "the row", "group", [], current=True))
    return pd.concat(rows, ignore_index=True)


def _bits(
    union: GroupUnion,
    reading: Reading,
    bits: np.ndarray,
    label: str,
    stage: str,
    heads: list[int],
    current: bool = False,
) -> pd.DataFrame:
    """One line of the cascade: the blocks whose bit is set."""
    [blocks] = bits.nonzero()
    alone = union.askers[blocks] == 1
    askers = name_heads(union.by_head[:, blocks], union.heads)
    return pd.DataFrame(
        {
            "stage": stage,
            "line": label,
            "first": blocks,
            "end": blocks + 1,
            "tokens": _ranges(blocks, 1, reading.setting.selector.block_size, reading.stop),
            "share": CURRENT_REGION if current else np.where(alone, ONE_HEAD, SEVERAL_HEADS),
            "asked_by": CURRENT_REGION if current else askers,
        }
    )


def responsibility_frame(union: GroupUnion) -> pd.DataFrame:
    """Per head of the row: past blocks it asked for, shared with others, and asked for by nobody else."""
    past = np.arange(union.by_head.shape[1]) < union.past_blocks
    asked, alone = (union.by_head & past).sum(1), union.alone().sum(1)
    listed = int((union.listed & past).sum())
    return pd.DataFrame(
        {
            "head": list(union.heads),
            "asked for": asked,
            "shared": asked - alone,
            "alone": alone,
            "given, not asked for": listed - asked,
        }
    )


def table_frame(union: GroupUnion, reading: Reading) -> pd.DataFrame:
    """One line per entry of a row: its block, and the queries that need it."""
    [blocks] = union.listed.nonzero()
    past = blocks < union.past_blocks
    askers = name_heads(union.by_head[:, blocks], union.heads)
    needed = union.members[:, :, blocks].sum((0, 1))
    return pd.DataFrame(
        {
            "entry": np.arange(len(blocks)),
            "block": blocks,
            "tokens": _ranges(blocks, 1, reading.setting.selector.block_size, reading.stop),
            "share": np.where(~past, CURRENT_REGION, np.where(union.askers[blocks] == 1, ONE_HEAD, SEVERAL_HEADS)),
            "needed_by_pairs": np.where(past, needed, 0),
            "asked_by": np.where(past, askers, CURRENT_REGION),
        }
    )


def needed_frame(union: GroupUnion, mass: Mass, block: int) -> pd.DataFrame:
    """Whom taking away an entry would hurt, the heaviest first."""
    pairs = union.needed_by(block)
    lost = [float(mass.share[head, i, block]) for head, i in pairs]
    frame = pd.DataFrame(pairs, columns=["head", "query block"])
    frame["mass on the block"] = lost
    return frame.sort_values("mass on the block", ascending=False, ignore_index=True)


def sharing_frame(costs: Sequence[SharingCost], query_blocks: int) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(cost) for cost in costs])
    frame["heads"] = frame["heads_per_group"].astype(str)
    whole = frame["query_blocks_per_span"] == query_blocks
    frame["span"] = np.where(whole, "chunk", frame["query_blocks_per_span"].astype(str))
    return frame


def pages_frame(grid: PageGrid, columns: int) -> pd.DataFrame:
    """One row per physical page, laid out in lines of `columns`."""
    pages = np.arange(len(grid.kinds))
    first = grid.logical * grid.page_size
    last = np.minimum(first + grid.page_size, grid.stop) - 1
    tokens = [f"{a:,} to {b:,}" if a >= 0 else "none" for a, b in zip(first, last, strict=True)]
    return pd.DataFrame(
        {
            "page": pages,
            "column": pages % columns,
            "line": pages // columns,
            "kind": np.array(PAGE_KINDS, dtype=object)[grid.kinds],
            "page_of_request": grid.logical,
            "tokens": tokens,
            "readers": grid.readers,
        }
    )


def recall_frame(observed: Observed, ours: Judged, quoka: Quoka, head: int, text: bytes | None) -> pd.DataFrame:
    """One row per observed query of a head."""
    position = observed.position
    return pd.DataFrame(
        {
            "query": observed.step.start + position,
            "table": ours.recall[:, head],
            "QUOKA": quoka.judged.recall[:, head],
            "QUOKA sampled it": np.where(quoka.sampled[position, head], "yes", "no"),
            "text": [excerpt(text, observed.step.start + int(p)) for p in position],
        }
    )


def sampled_frame(quoka: Quoka, start: int, heads: slice, text: bytes | None) -> pd.DataFrame:
    """One row per token of the chunk: which heads of a KV group let its query speak in QUOKA."""
    sampled = quoka.sampled[:, heads]
    position = start + np.arange(len(sampled))
    return pd.DataFrame(
        {
            "query": position,
            "end": position + 1,
            "heads": sampled.sum(1),
            "sampled": np.where(sampled.any(1), SAMPLED, UNSAMPLED),
            "sampled_by": name_heads(sampled.T, range(heads.start, heads.stop)),
            "text": [excerpt(text, int(p)) for p in position],
        }
    )


def recall_heat_frame(observed: Observed, ours: Judged, quoka: Quoka, *, parts: int = 64) -> pd.DataFrame:
    """Mean recall per head and stretch of queries, for both methods; a run is a stretch."""
    position = observed.position
    if observed.whole:
        edges = np.unique(np.linspace(0, len(position), min(parts, len(position)) + 1).astype(int))
        stretches = list(pairwise(edges))
    else:
        ends = np.cumsum([end - first for first, end in observed.runs])
        stretches = list(zip([0, *ends[:-1]], ends, strict=True))
    rows = []
    for method, judged in (("block table", ours), ("QUOKA", quoka.judged)):
        for n, (a, b) in enumerate(stretches):
            first, last = observed.step.start + position[a], observed.step.start + position[b - 1]
            for head, value in enumerate(judged.recall[a:b].mean(0)):
                rows.append(
                    (method, head, n, f"{first:,} to {last:,}", float(value), float(judged.recall[a:b, head].min()))
                )
    return pd.DataFrame(rows, columns=["method", "head", "stretch", "queries", "recall", "worst"])


def error_frame(ours: Judged, quoka: Quoka) -> pd.DataFrame:
    parts = (("block table", ours), ("QUOKA", quoka.judged))
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "method": name,
                    "head": np.arange(len(judged.error)),
                    "error": judged.error,
                    "density": judged.density,
                    "mean recall": judged.recall.mean(0),
                    "worst recall": judged.recall.min(0),
                    "queries under 0.9": (judged.recall < 0.9).sum(0),
                }
            )
            for name, judged in parts
        ],
        ignore_index=True,
    )


def scatter_frame(judged: dict[str, Judged]) -> pd.DataFrame:
    """Density against error, one point per head and selector."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "selector": name,
                    "head": np.arange(len(found.error)),
                    "density": found.density,
                    "error": found.error,
                    "mean recall": found.recall.mean(0),
                }
            )
            for name, found in judged.items()
        ],
        ignore_index=True,
    )


def outcome_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(point) for point in outcomes], columns=[field.name for field in fields(Outcome)])
    frame["lost"] = 1.0 - frame["recall"]
    frame["lost_worst"] = 1.0 - frame["worst"]
    return frame


def measured_frame(measured: Measured) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(row) for row in measured.rows])
    frame["ratio"] = [row.ratio for row in measured.rows]
    frame["context"] = [f"{c // 1024}K" for c in frame["context"]]
    return frame


def compare_frame(a: Reading, b: Reading, judged_a: Judged, judged_b: Judged) -> pd.DataFrame:
    """Per head, what two settings read and miss."""
    columns = {"head": np.arange(a.heads)}
    for name, reading, judged in (("A", a, judged_a), ("B", b, judged_b)):
        columns[f"past read, {name}"] = reading.density()
        columns[f"mean recall, {name}"] = judged.recall.mean(0)
        columns[f"worst recall, {name}"] = judged.recall.min(0)
        columns[f"error, {name}"] = judged.error
    return pd.DataFrame(columns)


def difference_frame(found: Difference, start: int, stop: int, *, cells: int | None = CELLS) -> pd.DataFrame:
    """One row per (query block, past block or bin) and table: listed by both, by A only, by B only."""
    query_blocks, blocks = found.both.shape
    width = bin_width(query_blocks, blocks, cells) if blocks else 1
    first = np.arange(0, blocks, width)
    parts = []
    for label, bits in ((BOTH, found.both), (ONLY_A, found.only_a), (ONLY_B, found.only_b)):
        i, j = _binned(bits, width, "max").nonzero() if blocks else (np.zeros(0, int), np.zeros(0, int))
        parts.append(
            pd.DataFrame(
                {
                    "query_block": i,
                    "first": first[j],
                    "end": np.minimum(first[j] + width, blocks),
                    "where": label,
                    "tokens": _ranges(first[j], width, found.block_size, stop),
                }
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    frame["queries"] = [
        f"{start + i * found.query_block:,} to {min(start + (i + 1) * found.query_block, stop) - 1:,}"
        for i in frame["query_block"]
    ]
    return frame
