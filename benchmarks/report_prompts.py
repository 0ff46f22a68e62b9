"""The whole-prompt part of a report: sums over measured chunks, the slowest chunk, and the paper's figures beside."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.published import PAPER_SHAPE, PAPER_SOURCE, PAPER_SPEEDUPS
from benchmarks.records import DENSE, Record, milliseconds, of_kind, shape_name, table, tokens

SHORT = 4 * 1024  # up to here a chunk may be no faster than dense


@dataclass(frozen=True)
class Prompt:
    """Chunks that make up prompts of several lengths.

    Attributes:
        name: model (if it is one that was measured), shape, workload and correlation, for a reader.
        shape: of one step, as in the result.
        chunk: tokens per chunk.
        chunks: measured chunks, ascending by context.
        ends: lengths of prompts that they cover.
    """

    name: str
    shape: Record
    chunk: int
    chunks: list[Record]
    ends: list[int]

    @property
    def is_paper_shape(self) -> bool:
        return all(self.shape[name] == value for name, value in PAPER_SHAPE.items())

    def within(self, end: int) -> list[Record]:
        return [chunk for chunk in self.chunks if chunk["context"] <= end]


def prompts(result: Record) -> list[Prompt]:
    """Prompts whose every chunk was measured or stands for measured neighbours."""
    series: dict[tuple, list[Record]] = {}
    for record in of_kind(result, "prompt"):
        case = record["case"]
        part = record.get("model", {}).get("part", "")
        key = (part, shape_name(record), case["chunk"], case["workload"], case["correlation"], case["page_size"])
        series.setdefault(key, []).append(record)
    found = []
    for (part, shape, chunk, workload, correlation, _), records in series.items():
        chunks = sorted((one for record in records for one in record["chunks"]), key=lambda one: one["context"])
        name = ", ".join(word for word in (part, shape, f"{workload} c={correlation:g}") if word)
        whole = Prompt(name, records[0]["case"]["shape"], chunk, chunks, [])
        ends = sorted({record["case"]["context"] for record in records})
        covered = [end for end in ends if _covers(whole.within(end), end, chunk)]
        found.append(Prompt(whole.name, whole.shape, chunk, chunks, covered))
    return found


def _covers(chunks: list[Record], end: int, chunk: int) -> bool:
    return math.isclose(sum(one["stands_for"] for one in chunks), end / chunk)


def row_names(chunks: list[Record]) -> list[str]:
    return list(dict.fromkeys(row["name"] for chunk in chunks for row in chunk["rows"]))


def time_of(chunk: Record, name: str, at: str = "p50_ms", mode: str | None = None) -> float:
    """Milliseconds of one row of a chunk; NaN where it is missing, red or untimed. `mode`: see `milliseconds`."""
    for row in chunk["rows"]:
        if row["name"] == name and row["gate"]["passed"] and row.get("times"):
            return milliseconds(row, mode, at)
    return math.nan


def total(chunks: list[Record], name: str, at: str = "p50_ms", mode: str | None = None) -> float:
    """Milliseconds of a prompt: every measured chunk as often as it stands for others. One red gate makes it NaN."""
    return sum(time_of(chunk, name, at, mode) * chunk["stands_for"] for chunk in chunks)


def dense_name(chunks: list[Record]) -> str:
    return next((name for name in DENSE if name in row_names(chunks)), DENSE[0])


def mask_density(chunks: list[Record]) -> float:
    """Selected ÷ visible blocks over the prompt, the current chunks included, as published for FlashPrefill."""
    return _weighted(chunks, "selected") / _weighted(chunks, "visible")


def _weighted(chunks: list[Record], count: str) -> float:
    values = [next(iter(chunk["density"].values()), {}) for chunk in chunks if chunk.get("density")]
    return sum(one.get(count, 0) * chunk["stands_for"] for one, chunk in zip(values, chunks, strict=False)) or math.nan


def union_growth(chunks: list[Record], grouping: str) -> float:
    """Past blocks that the tables list ÷ those that the masks alone name, over the prompt."""
    cascades = [(one["density"][grouping]["cascade"], one["stands_for"]) for one in chunks if _has(one, grouping)]
    named = sum(cascade["mask"] * weight for cascade, weight in cascades)
    return sum(cascade["sub_group_union"] * weight for cascade, weight in cascades) / named if named else math.nan


def _has(chunk: Record, grouping: str) -> bool:
    return grouping in chunk.get("density", {})


def slowest(chunks: list[Record], name: str) -> tuple[float, int]:
    """The smallest speedup over dense among the chunks beyond `SHORT`, and its context."""
    dense = dense_name(chunks)
    found = [
        (time_of(chunk, dense) / time_of(chunk, name), chunk["context"])
        for chunk in chunks
        if chunk["context"] >= SHORT
    ]
    return min(found, default=(math.nan, 0))


def section(result: Record) -> list[str]:
    """Tables of all prompts, and the paper's configuration beside the published figures."""
    lines = []
    for prompt in prompts(result):
        lines += [f"**{prompt.name}, chunks of {prompt.chunk}**", "", *_table_of(prompt), ""]
        if prompt.is_paper_shape:
            lines += _paper_table(prompt)
    return lines


def _table_of(prompt: Prompt) -> list[str]:
    rows = []
    for end in prompt.ends:
        chunks = prompt.within(end)
        dense = dense_name(chunks)
        for name in row_names(chunks):
            if name.startswith("select_table"):
                continue
            grouping = name.removeprefix("prefill ")
            worst, where = slowest(chunks, name) if name != dense else (math.nan, 0)
            rows.append(
                (
                    f"{tokens(end)}, {len(chunks)} of {end // prompt.chunk} chunks",
                    name,
                    total(chunks, name),
                    f"{total(chunks, name, 'p20_ms'):.1f}-{total(chunks, name, 'p80_ms'):.1f}",
                    total(chunks, dense) / total(chunks, name),
                    f"{worst:.2f} at {tokens(where)}" if where else "-",
                    total(chunks, f"select_table {grouping}") / total(chunks, name),
                    "-" if math.isnan(mask_density(chunks)) else f"{mask_density(chunks):.1%}",
                    union_growth(chunks, grouping),
                )
            )
    head = ("prompt", "", "ms, all chunks", "sum of p20-p80", "x dense", "slowest chunk from 4K on, x dense")
    return table((*head, "of it selection", "mask density, prompt average", "union growth"), rows)


def paper_bars(prompt: Prompt) -> dict[str, dict[int, float]]:
    """Our speedups over dense by prompt length, for every row that the paper's figures may stand beside."""
    chunks = prompt.chunks
    names = [name for name in row_names(chunks) if name.startswith("prefill")]
    ends = [end for end in prompt.ends if end in PAPER_SPEEDUPS["CompactAttention-FP"]]
    return {
        name: {end: total(prompt.within(end), dense_name(chunks)) / total(prompt.within(end), name) for end in ends}
        for name in names
    }


def _paper_table(prompt: Prompt) -> list[str]:
    ours = paper_bars(prompt)
    ends = sorted(PAPER_SPEEDUPS["CompactAttention-FP"])
    if not any(ours.values()):
        return []
    rows: list[tuple[object, ...]] = [
        (f"{name} (this run: selection and attention)", *(by_end.get(end, math.nan) for end in ends))
        for name, by_end in ours.items()
    ]
    rows += [(f"{name} ({PAPER_SOURCE})", *(by_end[end] for end in ends)) for name, by_end in PAPER_SPEEDUPS.items()]
    return [
        "The paper's configuration (one rank of TP2, batch 8, chunk 1024): speedup over dense, whole prompt. The two "
        "kinds of rows do not count the same: the published ones hold the projections too, which sparsity cannot speed "
        "up, and a dense baseline of their own.",
        "",
        *table(("", *map(tokens, ends)), rows),
        "",
    ]
