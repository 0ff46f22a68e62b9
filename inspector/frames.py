"""What is read as tables: what the charts draw, what hovering shows, and what is downloaded as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from inspector.cost import PAGE_KINDS, PageGrid
from inspector.model import (
    HEADS,
    KINDS,
    QUERY_BLOCKS,
    Difference,
    GroupUnion,
    HeadProfile,
    Mass,
    Reading,
    SharingCost,
    name_heads,
)
from inspector.recall import Observed, excerpt

PROMPT_PARTS = ("past, in the cache", "this chunk", "still to come")
CURRENT_REGION = "current region"
#: How a row's past entries are told apart: asked for by several of its heads (or query blocks), or by one alone.
SHARED = {HEADS: "several heads", QUERY_BLOCKS: "several query blocks"}
ALONE = {HEADS: "one head alone", QUERY_BLOCKS: "one query block alone"}
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


def prompt_frame(tokens: int, chunk: int, start: int, *, most: int = 256) -> pd.DataFrame:
    """One row per chunk of a prompt: its tokens, and whether they are past, prefilled now, or still to come.

    Past and future are one row each where there would be more than `most` chunks.
    """
    stop = min(start + chunk, tokens)
    parts = zip(PROMPT_PARTS, ((0, start), (start, stop), (stop, tokens)), strict=True)
    step = chunk if -(-tokens // chunk) <= most else tokens
    rows = [
        (first, min(first + step, end), state) for state, (begin, end) in parts for first in range(begin, end, step)
    ]
    return pd.DataFrame(rows, columns=["first", "end", "state"])


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

    A stretch is a bin of blocks; by kind, adjacent bins of one kind are a single stretch. `selected_by` names the heads
    of the KV group that selected some block of the stretch for the query block.
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
            "selected_by": _selectors(reading, width, where, head // reading.group),
        }
    )
    return frame[kinds.ravel()[where] > 0]


def _selectors(reading: Reading, width: int, where: np.ndarray, kv_head: np.ndarray) -> np.ndarray:
    """Names of the heads of each stretch's KV group that selected a block of it; stretches begin at `where`."""
    group = reading.group
    bits = _binned(reading.mask, width, "max")
    names = np.empty(len(where), dtype=object)
    of_member = [np.repeat(bits[member::group], group, axis=0).ravel() for member in range(group)]
    chosen = np.stack([np.maximum.reduceat(bits_of, where) for bits_of in of_member])
    for number in range(reading.heads // group):
        part = kv_head == number
        names[part] = name_heads(chosen[:, part], range(number * group, (number + 1) * group))
    return names


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


def members_frame(union: GroupUnion, reading: Reading, by: str) -> pd.DataFrame:
    """The cascade of one row: the bits of each member's mask, of each head's union over the query blocks, of the
    group's union with the current region, and the row's entries as the table packs them.

    `by`: whether heads (`HEADS`) or query blocks (`QUERY_BLOCKS`) are told apart by who asked alone.
    """
    visible, past, rows = reading.visible, union.past, []
    for n, head in enumerate(union.heads):
        for m, i in enumerate(union.query_blocks):
            bits = union.members[n, m] & past | visible[i] & ~past
            rows.append(_bits(union, reading, bits, by, f"head {head}, query block {i}", "members"))
    for n, head in enumerate(union.heads):
        bits = union.by_head[n] & past | union.listed & ~past
        rows.append(_bits(union, reading, bits, by, f"head {head}", "heads"))
    rows.append(_bits(union, reading, union.listed, by, "the row", "group"))
    packed = _bits(union, reading, union.listed, by, "the table", "table")
    packed["first"] = np.arange(len(packed))
    packed["end"] = packed["first"] + 1
    return pd.concat([*rows, packed], ignore_index=True)


def _bits(union: GroupUnion, reading: Reading, bits: np.ndarray, by: str, label: str, stage: str) -> pd.DataFrame:
    """One line of the cascade: the blocks whose bit is set."""
    [blocks] = bits.nonzero()
    return pd.DataFrame(
        {
            "stage": stage,
            "line": label,
            "first": blocks,
            "end": blocks + 1,
            "block": blocks,
            "tokens": _ranges(blocks, 1, reading.setting.selector.block_size, reading.stop),
            **_askers(union, blocks, by),
        }
    )


def _askers(union: GroupUnion, blocks: np.ndarray, by: str) -> dict[str, np.ndarray]:
    """Who asked for each of a row's blocks, and whether one of them did so alone."""
    past, alone = blocks < union.past_blocks, union.alone(by)[:, blocks].any(0)
    return {
        "share": np.where(past, np.where(alone, ALONE[by], SHARED[by]), CURRENT_REGION),
        "heads": np.where(past, name_heads(union.asked(HEADS)[:, blocks], union.heads), CURRENT_REGION),
        "query_blocks": np.where(
            past, name_heads(union.asked(QUERY_BLOCKS)[:, blocks], union.query_blocks), CURRENT_REGION
        ),
    }


def responsibility_frame(union: GroupUnion, by: str) -> pd.DataFrame:
    """Per head (or query block) of the row: past blocks that it asked for, with others or alone, and was given."""
    asked, alone = (union.asked(by) & union.past).sum(1), union.alone(by).sum(1)
    listed = int((union.listed & union.past).sum())
    return pd.DataFrame(
        {
            by.removesuffix("s"): list(union.parts(by)),
            "asked for": asked,
            "shared": asked - alone,
            "alone": alone,
            "given, not asked for": listed - asked,
        }
    )


def table_frame(union: GroupUnion, reading: Reading, by: str) -> pd.DataFrame:
    """One line per entry of a row: its block, and the (head, query block) pairs that need it.

    A past block is needed by the pairs that selected it, a block of the current region by those that see it.
    """
    [blocks] = union.listed.nonzero()
    seen = reading.visible[list(union.query_blocks)][:, blocks].sum(0) * len(union.heads)
    return pd.DataFrame(
        {
            "entry": np.arange(len(blocks)),
            "block": blocks,
            "tokens": _ranges(blocks, 1, reading.setting.selector.block_size, reading.stop),
            "needed_by_pairs": np.where(blocks < union.past_blocks, union.members[:, :, blocks].sum((0, 1)), seen),
            **_askers(union, blocks, by),
        }
    )


def rows_frame(reading: Reading) -> pd.DataFrame:
    """One line per row of the table that somebody walks: its members, and how many blocks it lists."""
    lines, size = [], reading.setting.heads_per_group
    for head in range(0, reading.heads, size):
        for first in range(0, reading.query_blocks, reading.span):
            row = reading.rows[head, first]
            last = min(first + reading.span, reading.query_blocks) - 1
            past, listed = int(reading.keep[row, : reading.past_blocks].sum()), int(reading.keep[row].sum())
            lines.append(
                {
                    "row": row,
                    "KV head": head // reading.group,
                    "heads": f"{head} to {head + size - 1}" if size > 1 else f"{head}",
                    "query blocks": f"{first} to {last}" if last > first else f"{first}",
                    "entries": listed,
                    "past": past,
                    "current region": listed - past,
                    "share of the past": past / reading.past_blocks if reading.past_blocks else np.nan,
                }
            )
    return pd.DataFrame(lines)


def needed_frame(
    union: GroupUnion,
    mass: Mass,
    block: int,
    observed: Observed,
    shares: np.ndarray,
    query_block: int,
    text: bytes | None,
) -> pd.DataFrame:
    """Whom taking away an entry would hurt, the heaviest first: the pairs, and the query of each that needs it most.

    `shares`: float [m, Hq], the share of each observed query's exact mass on the block (`recall.block_shares`).
    """
    lines = []
    for head, i in union.needed_by(block):
        [inside] = np.nonzero(observed.position // query_block == i)
        line = {"head": head, "query block": i, "mass on the block": float(mass.share[head, i, block])}
        if len(inside):
            best = inside[shares[inside, head].argmax()]
            query = observed.step.start + int(observed.position[best])
            line |= {"neediest query": query, "its mass there": float(shares[best, head]), "text": excerpt(text, query)}
        lines.append(line)
    columns = ["head", "query block", "mass on the block", "neediest query", "its mass there", "text"]
    frame = pd.DataFrame(lines, columns=columns)
    return frame.sort_values("mass on the block", ascending=False, ignore_index=True)


def sharing_frame(costs: Sequence[SharingCost], query_blocks: int) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(cost) for cost in costs])
    frame["heads"] = frame["heads_per_group"].astype(str)
    whole = frame["query_blocks_per_span"] == query_blocks
    frame["span"] = np.where(whole, "chunk", frame["query_blocks_per_span"].astype(str))
    return frame


def pages_frame(grid: PageGrid, columns: int, chosen: tuple[int, int] = (0, 0)) -> pd.DataFrame:
    """One row per physical page, laid out in lines of `columns`; `chosen`: the tokens [first, end) of an entry."""
    pages = np.arange(len(grid.kinds))
    first = grid.logical * grid.page_size
    last = np.minimum(first + grid.page_size, grid.stop) - 1
    read = np.isin(grid.kinds, (PAGE_KINDS.index("past, read"), PAGE_KINDS.index("current region, read")))
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
            "bytes_read": np.where(read, grid.page_bytes, 0),
            "chosen": (grid.logical >= 0) & (first < chosen[1]) & (last >= chosen[0]),
        }
    )


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
