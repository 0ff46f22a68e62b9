"""The figure of scaling: selection against its own floors, attention at a fixed number of kept blocks, and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish, lines
from benchmarks.records import Record, green_rows, of_kind, tokens
from benchmarks.report_scaling import relative_time, scaling_rows
from benchmarks.scaling import KEPT


def holds(result: Record) -> bool:
    """Whether scaling was measured; layouts alone are a table in the text."""
    return bool(of_kind(result, "scaling"))


def draw(result: Record, path: Path) -> None:
    """Three panels: milliseconds by context, selection ÷ floor, and time per useful FLOP by layout."""
    figure, panels = canvas(3)
    _times(panels[0], panels[1], scaling_rows(result))
    _layouts(panels[2], result)
    finish(figure, panels, result, path)


def _times(times: Any, floors: Any, rows: list[tuple]) -> None:
    """Lines over the context, from `scaling_rows`."""
    milliseconds: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for _, context, grouping, floor, product, select, over_floor, over_product, attend, _ in rows:
        for label, value in (
            (f"select_table {grouping}", select),
            (f"attend {grouping}, {KEPT} past blocks", attend),
            ("floor: FLOPs of the scores at the matmul rate", floor),
            ("the scores as one product in cuBLAS", product),
        ):
            milliseconds.setdefault(label, []).append((context, value))
        ratios.setdefault(f"{grouping}: ÷ FLOPs at the matmul rate", []).append((context, over_floor))
        ratios.setdefault(f"{grouping}: ÷ the product in cuBLAS", []).append((context, over_product))
    contexts = sorted({row[1] for row in rows})
    for panel, points in ((times, milliseconds), (floors, ratios)):
        lines(panel, points)
        if panel.lines:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(contexts, [tokens(context) for context in contexts])
    times.set(title="one chunk as the context grows", xlabel="context", ylabel="ms")
    floors.set(title="select_table ÷ its own matmul floor", xlabel="context", ylabel="x")


def _layouts(panel: Any, result: Record) -> None:
    """Time of `attend` per useful FLOP, relative to the aligned case on the case's own pages."""
    panel.set(title="attend, density 0.10: time per useful FLOP", ylabel="÷ aligned")
    records = of_kind(result, "layouts")
    names: list[str] = []
    series: dict[str, dict[str, float]] = {}
    for record in records:
        for row in green_rows(record):
            kind, _, what = row["name"].partition(f" {row['grouping']}, ")
            if kind == "attend":
                label = f"{row['grouping']}, B={record['case']['shape']['batch']}"
                series.setdefault(label, {})[what] = relative_time(record, row)
                if what not in names:
                    names.append(what)
    width = 0.8 / max(1, len(series))
    for n, (label, values) in enumerate(series.items()):
        places = [place + (n - len(series) / 2 + 0.5) * width for place in range(len(names))]
        panel.bar(places, [values.get(name, 0.0) for name in names], width, label=label)
    if names:
        panel.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.axhline(1.1, color="black", linewidth=0.5, linestyle=":")
