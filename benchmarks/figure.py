"""The figure of a latency result: speedup by context, rate by density, union growth by correlation."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Record


def draw(result: Record, path: Path) -> None:
    """Three panels, drawn from the result alone; a panel without data says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(16, 4.6), constrained_layout=True)
    _speedup(panels[0], result)
    _rate(panels[1], result)
    _growth(panels[2], result)
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=7)
        else:
            panel.text(0.5, 0.5, "no such cases in this result", ha="center", transform=panel.transAxes)
    where = result["environment"]
    figure.suptitle(f"{where['gpu'] or 'CPU'}, torch {where['torch']}, compactattn {where['compactattn']}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(panel: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    for label, line in points.items():
        finite = sorted(point for point in line if not math.isnan(point[1]))
        if finite:
            panel.plot(*zip(*finite, strict=True), marker="o", markersize=3, label=label)


def _speedup(panel: Any, result: Record) -> None:
    """`prefill` and peers against the dense baseline of the same case, at the chunk size that was swept most."""
    steps = [record for record in report.of_kind(result, "step") if record["case"]["correlation"] == 0.9]
    steps = [record for record in steps if record["case"]["workload"] == "vertical-slash"]
    chunks = [record["case"]["chunk"] for record in steps]
    chunk = max(chunks, key=chunks.count, default=0)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in steps:
        if record["case"]["chunk"] == chunk and record["case"]["page_size"] == 128:
            dense = report.find(record, *report.DENSE)
            for row in report.green_rows(record):
                if row["family"] in ("library", "peer") and not row["name"].startswith("select_table"):
                    label = f"{row['name']}, {report.shape_name(record)}"
                    points[label].append((record["case"]["context"], report.ratio(dense, row)))
    _lines(panel, points)
    if points:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        contexts = sorted({record["case"]["context"] for record in steps})
        panel.set_xticks(contexts, [report.tokens(context) for context in contexts])
        panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set(title=f"one chunk of {chunk}: speedup over dense", xlabel="context", ylabel="x")


def _rate(panel: Any, result: Record) -> None:
    """`attend` alone on equal-length tables, and the dense baseline of the same run."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in report.of_kind(result, "tables"):
        for row in report.green_rows(record):
            if ", equal " in row["name"]:
                density = float(row["name"].rpartition(" ")[2])
                label = f"attend {row['grouping']}, {report.shape_name(record)}"
                points[label].append((density, report.teraflops(row)))
        dense = report.find(record, *report.DENSE)
        if dense is not None:
            ends = [(density, report.teraflops(dense)) for density in (0.02, 1.0)]
            points[f"{dense['name']}, {report.shape_name(record)}"] = ends
    _lines(panel, points)
    if points:
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
    panel.set(title="attend alone: useful TFLOP/s", xlabel="density of the past", ylabel="TFLOP/s")


def _growth(panel: Any, result: Record) -> None:
    """How many times longer tables get by each union."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for shape, workload, correlation, grouping, density in report.growth_rows(result):
        if workload == "vertical-slash" and grouping != "1x1":
            growth = density["growth"]
            points[f"query blocks, {shape}"].append((correlation, growth["query_block_union"] or math.nan))
            points[f"{grouping}, {shape}"].append((correlation, growth["sub_group_union"] or math.nan))
    _lines(panel, points)
    panel.set(title="union growth, one chunk", xlabel="correlation of the heads of a KV group", ylabel="x")
