"""The roofline of `attend`, and where the time of one chunk goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish
from benchmarks.records import DENSE, Record, find, green_rows, of_kind, shape_name, terabytes, teraflops, tokens
from benchmarks.report_steps import breakdown

STAGES = ("select_table", "attend")
CEILINGS = ("matmul", "copy")


def holds(result: Record) -> bool:
    """Whether tables were measured beside a ceiling."""
    return any(find(record, *CEILINGS) for record in of_kind(result, "tables"))


def draw(result: Record, path: Path) -> None:
    """A panel per shape with useful TFLOP/s by density under the ceilings of the same loop, and stacked stages."""
    figure, panels = canvas(3)
    shapes = of_kind(result, "tables")[:2]
    for panel, record in zip(panels, shapes, strict=False):
        _roofline(panel, record)
    for panel in panels[:2]:
        panel.set(xlabel="density of the past", ylabel="useful TFLOP/s", xscale="log")
    _stages(panels[2], result)
    finish(figure, panels, result, path)


def _roofline(panel: Any, record: Record) -> None:
    """Measured rates; the matmul ceiling; and the copy ceiling times each row's FLOPs per byte."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    copy = terabytes(find(record, "copy"))
    for row in green_rows(record):
        if row["name"].startswith("attend") and ", equal " in row["name"]:
            density = float(row["name"].rpartition(" ")[2])
            bound = copy * row["flops"] / row["bytes"]
            lines.setdefault(row["grouping"], []).append((density, teraflops(row), bound))
    top = 0.0
    for grouping, points in lines.items():
        densities, rates, bounds = zip(*sorted(points), strict=True)
        (drawn,) = panel.plot(densities, rates, marker="o", markersize=3, label=f"attend {grouping}")
        if not any(math.isnan(bound) for bound in bounds):
            panel.plot(densities, bounds, ":", color=drawn.get_color(), label=f"copy ceiling, bytes of {grouping}")
        top = max(top, *rates)
    for name, style in (("matmul", "k--"), *((name, "k-") for name in DENSE)):
        rate = teraflops(find(record, name))
        if not math.isnan(rate):
            panel.plot([0.02, 1.0], [rate, rate], style, linewidth=1, label=name)
            top = max(top, rate)
    uneven = [row for row in green_rows(record) if row["name"].startswith("attend") and ", equal " not in row["name"]]
    for row, marker in zip(uneven, "xx++**", strict=False):
        panel.plot([0.1], [teraflops(row)], marker, markersize=7, label=row["name"])
    if top:
        panel.set_ylim(0, 1.15 * top)
    panel.set_title(f"attend, {shape_name(record)}, context {tokens(record['case']['context'])}")


def _stages(panel: Any, result: Record) -> None:
    """`select_table` and `attend` stacked, for steps of the chunk size that was swept over contexts."""
    panel.set(title="one chunk: where the time goes", ylabel="share of select_table + attend")
    steps = [one for one in of_kind(result, "step") if one["case"]["correlation"] == 0.9 and one["density"]]
    chunks = [one["case"]["chunk"] for one in steps]
    chunk = max(chunks, key=chunks.count, default=0)
    steps = [one for one in steps if one["case"]["chunk"] == chunk and one["case"]["workload"] == "vertical-slash"]
    steps.sort(key=lambda one: (one["case"]["shape"]["batch"], one["case"]["context"]))
    bars = {}
    for record in steps:
        for grouping in record["density"]:
            parts = [breakdown(record, grouping)[stage] for stage in STAGES]
            if not any(math.isnan(part) for part in parts):
                label = f"{tokens(record['case']['context'])} B={record['case']['shape']['batch']} {grouping}"
                bars[label] = [part / sum(parts) for part in parts]
    if not bars:
        return
    before = [0.0] * len(bars)
    for n, stage in enumerate(STAGES):
        own = [parts[n] for parts in bars.values()]
        panel.bar(range(len(bars)), own, bottom=before, label=stage)
        before = [a + b for a, b in zip(before, own, strict=True)]
    panel.set_xticks(range(len(bars)), list(bars), rotation=90, fontsize=6)
