"""Targets and whether a result meets them, each computed from the JSON; what was not measured is not listed.

Rates are relative to dense cuDNN in the same loop. Shapes are told apart by their batch: 1, or 8 for a rank of TP2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.records import (
    DENSE,
    Record,
    environment_of,
    find,
    green_rows,
    milliseconds,
    of_kind,
    ratio,
    shape_name,
    table,
    teraflops,
    tokens,
)
from benchmarks.report_prompts import SHORT, dense_name, prompts, row_names, slowest, total, union_growth
from benchmarks.report_scaling import relative_time, scaling_rows
from benchmarks.report_steps import equal_length

CONTEXT, CHUNK, DENSITY = 128 * 1024, 1024, 0.10
CLOSE_MS = 0.010


@dataclass(frozen=True)
class Target:
    """`measured` must be at least (or, with `most`, at most) `bound`."""

    what: str
    bound: float
    measured: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.most else self.measured >= self.bound


def targets(result: Record) -> list[Target]:
    """All that this result can say."""
    found = [*_attend(result), *_select(result), *_prefill(result), *_auto(result), *_prompts(result)]
    found += [*_layouts(result), *_decode(result), *_host(result), *_scaling(result)]
    return [target for target in found if not math.isnan(target.measured)]


def section(result: Record) -> list[str]:
    """Met or not, in numbers; the targets are a GPU's."""
    if environment_of(result)["gpu"] is None:
        return []
    rows = [
        (one.what, f"{'≤' if one.most else '≥'} {one.bound:g}", one.measured, "yes" if one.met else "**no**")
        for one in targets(result)
    ]
    return table(("", "target", "measured", "met"), rows)


def _attend(result: Record) -> Iterator[Target]:
    for record in of_kind(result, "tables"):
        dense = find(record, *DENSE)
        for row in green_rows(record):
            if not row["name"].startswith("attend"):
                continue
            equal, what = equal_length(record, row), f"{row['name']}, {shape_name(record)}"
            if equal is not None:
                yield Target(f"{what}: rate ÷ equal lengths", 0.9, teraflops(row) / teraflops(equal))
            elif ", equal " in row["name"]:
                density = float(row["name"].rpartition(" ")[2])
                bound = 1.0 if density >= DENSITY else 0.93
                yield Target(f"{what}: rate ÷ dense", bound, teraflops(row) / teraflops(dense))
                corrected = find(record, f"corrected attend {row['grouping']}, {density:g} of the past")
                extra = milliseconds(corrected) / milliseconds(row) - 1
                bound = 1.25 * (1 - density) / (128 * density)
                yield Target(f"{what}: extra time of the mean correction ÷ attend", round(bound, 3), extra, most=True)


def _steps(result: Record) -> list[Record]:
    sizes = {"context": CONTEXT, "chunk": CHUNK, "page_size": 128}
    return [one for one in of_kind(result, "step") if all(one["case"][name] == size for name, size in sizes.items())]


def _select(result: Record) -> Iterator[Target]:
    for record in _steps(result):
        if record["case"]["correlation"] == 0.9 and record["case"]["workload"] == "vertical-slash":
            bound = 0.05 if record["case"]["shape"]["batch"] == 1 else 0.10
            for grouping in record["density"]:
                time = milliseconds(find(record, f"select_table {grouping}"))
                yield Target(f"select_table {grouping}, 128K, {shape_name(record)}: ms", bound, time, most=True)


def _prefill(result: Record) -> Iterator[Target]:
    """At density 0.10 after the union over 4 heads and the chunk: the step of each shape that comes nearest."""
    near: dict[str, list[tuple[float, Record]]] = {}
    for record in _steps(result):
        united = record["density"].get("4xchunk", {}).get("past_density", {}).get("sub_group_union")
        if united is not None and abs(united - DENSITY) <= 0.01:
            near.setdefault(shape_name(record), []).append((united, record))
    for shape, steps in near.items():
        united, record = min(steps, key=lambda one: abs(one[0] - DENSITY))
        speedup = ratio(find(record, *DENSE), find(record, "prefill 4xchunk"))
        yield Target(f"prefill 4xchunk, 128K, density {united:.3f} after the union, {shape}: x dense", 8.0, speedup)


def _auto(result: Record) -> Iterator[Target]:
    """Groups that choose themselves against the best fixed grouping of each step; under `CLOSE_MS` more is as good."""
    worst: dict[str, list[float]] = {}
    for record in of_kind(result, "step"):
        chosen, *fixed = (milliseconds(find(record, f"prefill {name}")) for name in ("auto", "1x1", "4xchunk"))
        if not math.isnan(chosen + sum(fixed)):
            over = chosen / min(fixed) if chosen - min(fixed) > CLOSE_MS else min(1.0, chosen / min(fixed))
            worst.setdefault(shape_name(record), []).append(over)
    for shape, ratios in worst.items():
        what = f"prefill auto, worst of {len(ratios)} steps, {shape}: ÷ best fixed grouping, where over 10 µs apart"
        yield Target(what, 1.05, max(ratios), most=True)


def _prompts(result: Record) -> Iterator[Target]:
    for prompt in prompts(result):
        if CONTEXT not in prompt.ends:
            continue
        chunks = prompt.within(CONTEXT)
        dense = dense_name(chunks)
        for name in (name for name in row_names(chunks) if name.startswith("prefill")):
            grouping, speedup = name.removeprefix("prefill "), total(chunks, dense) / total(chunks, name)
            if grouping != "4xchunk":
                bound = 12.0 if prompt.shape["batch"] == 1 else 14.0
                yield Target(f"{name}, prompt of 128K, {prompt.name}: x dense", bound, speedup)
            elif union_growth(chunks, grouping) <= 3:
                yield Target(f"{name}, prompt of 128K, {prompt.name}: x dense", 6.0, speedup)
            worst, where = slowest(prompt.chunks, name)
            what = f"{name}, slowest chunk from {tokens(SHORT)} on (at {tokens(where)}), {prompt.name}: x dense"
            yield Target(what, 1.0, worst)


def _layouts(result: Record) -> Iterator[Target]:
    for record in of_kind(result, "layouts"):
        aligned = f"page {record['case']['page_size']}"
        for row in green_rows(record):
            if row["name"].startswith("attend") and not row["name"].endswith(f", {aligned}"):
                what = f"{row['name']}, {shape_name(record)}: time per useful FLOP ÷ aligned"
                yield Target(what, 1.1, relative_time(record, row), most=True)


def _decode(result: Record) -> Iterator[Target]:
    for record in of_kind(result, "decode"):
        dense = max((teraflops(row) for row in green_rows(record) if row["family"] == "dense"), default=math.nan)
        for row in green_rows(record):
            if row["name"].startswith("attend"):
                what = f"{row['name']}, {record['case']['chunk']} new tokens each, {shape_name(record)}"
                yield Target(f"{what}: rate ÷ fastest dense", 1.0, teraflops(row) / dense)


def _host(result: Record) -> Iterator[Target]:
    for record in of_kind(result, "host"):
        for row in green_rows(record):
            if row["name"].startswith("prefill"):
                what = f"{row['name']}, {tokens(record['case']['context'])}, {shape_name(record)}"
                yield Target(f"{what}: µs on the host", 100.0, row["times"]["steady host"]["p50_ms"] * 1e3, most=True)
                growth = float(row["memory"].get("reserved_growth", math.nan))
                yield Target(f"{what}: bytes more held after {row['memory']['calls']} calls", 0.0, growth, most=True)


def _scaling(result: Record) -> Iterator[Target]:
    for shape, context, grouping, _, _, _, over_floor, *_ in scaling_rows(result):
        if context == 1024 * 1024:
            yield Target(f"select_table {grouping}, 1M, {shape}: ÷ matmul floor", 2.5, over_floor, most=True)
