"""The figure of a latency result: speedup by context, rate by density, union growth by correlation."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Record
from benchmarks.report_steps import growth_rows
from compactattn.files import replacing

LEGEND_ROW = 0.17  # inches


def holds(result: Record) -> bool:
    """Whether there are chunks or tables to draw."""
    return any(records.of_kind(result, kind) for kind in ("step", "tables"))


def draw(result: Record, path: Path) -> None:
    """Three panels, drawn from the result alone; a panel without data says so."""
    figure, panels = canvas(3)
    _speedup(panels[0], result)
    _rate(panels[1], result)
    _growth(panels[2], result)
    finish(figure, panels, result, path)


def canvas(panels: int) -> tuple[Any, Any]:
    """A figure with `panels` panels in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(16, 4.6), constrained_layout=True)


def finish(figure: Any, panels: Any, result: Record, path: Path, *, one_legend: bool = False) -> None:
    """Grids, legends (one below all panels, or one in each) and a title, then the file."""
    from matplotlib import pyplot

    entries: dict[str, Any] = {}
    for panel in panels:
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
        if labels and not one_legend:
            panel.legend(fontsize=6)
        elif not labels:
            panel.text(0.5, 0.5, "no such cases in this result", ha="center", transform=panel.transAxes)
    if one_legend and entries:
        _legend_below(figure, entries)
    where = records.environment_of(result)
    figure.suptitle(f"{where['gpu'] or 'CPU'}, torch {where['torch']}, compactattn {where['compactattn']}", fontsize=9)
    with replacing(path) as file:  # the name of the software would be the version of matplotlib
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _legend_below(figure: Any, entries: dict[str, Any]) -> None:
    """A legend below all panels, in as many columns as the figure is wide enough for, which grows by its rows."""
    most = min(6, len(entries))
    for columns in range(most, 0, -1):
        legend = figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=8)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    rows, usual = -(-len(entries) // columns), -(-len(entries) // most)
    figure.set_figheight(figure.get_figheight() + (rows - usual) * LEGEND_ROW)


def lines(panel: Any, points: dict[str, list[tuple[float, float]]], style: str = "o-") -> None:
    """A line per label through its finite points."""
    for label, line in points.items():
        finite = sorted(point for point in line if not math.isnan(point[1]))
        if finite:
            panel.plot(*zip(*finite, strict=True), style, markersize=3, linewidth=1.2, label=label)


def _speedup(panel: Any, result: Record) -> None:
    """`prefill` and peers against the dense baseline of the same case, at the chunk size that was swept most."""
    steps = [record for record in records.of_kind(result, "step") if record["case"]["correlation"] == 0.9]
    steps = [record for record in steps if record["case"]["workload"] == "vertical-slash"]
    chunks = [record["case"]["chunk"] for record in steps]
    chunk = max(chunks, key=chunks.count, default=0)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in steps:
        if record["case"]["chunk"] == chunk and record["case"]["page_size"] == 128:
            dense = records.find(record, *records.DENSE)
            for row in records.green_rows(record):
                if row["family"] in ("library", "peer") and not row["name"].startswith("select_table"):
                    label = f"{row['name']}, {records.shape_name(record)}"
                    points[label].append((record["case"]["context"], records.ratio(dense, row)))
    lines(panel, points)
    if points:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        contexts = sorted({record["case"]["context"] for record in steps})
        panel.set_xticks(contexts, [records.tokens(context) for context in contexts])
        panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set(title=f"one chunk of {chunk}: speedup over dense", xlabel="context", ylabel="x")


def _rate(panel: Any, result: Record) -> None:
    """`attend` alone on equal-length tables, and the dense baseline of the same run."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records.of_kind(result, "tables"):
        for row in records.green_rows(record):
            if ", equal " in row["name"]:
                density = float(row["name"].rpartition(" ")[2])
                label = f"attend {row['grouping']}, {records.shape_name(record)}"
                points[label].append((density, records.teraflops(row)))
        dense = records.find(record, *records.DENSE)
        if dense is not None:
            ends = [(density, records.teraflops(dense)) for density in (0.02, 1.0)]
            points[f"{dense['name']}, {records.shape_name(record)}"] = ends
    lines(panel, points)
    if points:
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
    panel.set(title="attend alone: useful TFLOP/s", xlabel="density of the past", ylabel="TFLOP/s")


def _growth(panel: Any, result: Record) -> None:
    """How many times longer tables get by each union."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for shape, workload, correlation, grouping, density in growth_rows(result):
        if workload == "vertical-slash" and grouping != "1x1":
            growth = density["growth"]
            points[f"query blocks, {shape}"].append((correlation, growth["query_block_union"] or math.nan))
            points[f"{grouping}, {shape}"].append((correlation, growth["sub_group_union"] or math.nan))
    lines(panel, points)
    panel.set(title="union growth, one chunk", xlabel="correlation of the heads of a KV group", ylabel="x")
