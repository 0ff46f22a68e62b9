"""The figures of a fidelity result: accuracy against density, and bits per byte against density, by context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.findings import Point, Record, bits_ratio, families, on_common_items, points, settings_of
from benchmarks.fidelity.plans import CONTROL, DENSE, LAST, NEEDLE_TASKS, TEXT
from benchmarks.figure import canvas, finish, lines
from benchmarks.records import tokens

COLOURS, MARKERS = 10, "os^v"  # of matplotlib's cycle; the next marker where the colours begin again
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def draw_accuracy(result: Record, path: Path) -> None:
    """A panel per context at the chunk that was swept most: greedy accuracy over the needle tasks.

    All rows of a panel stand on the same items, whose number its title says.
    """
    figure, panels, settings = _panels(result, NEEDLE_TASKS)
    for panel, (context, chunk) in zip(panels, settings, strict=False):
        found = on_common_items(points(result, context, chunk))
        _sweeps(panel, result, found, NEEDLE_TASKS, lambda point: point.mean(NEEDLE_TASKS))
        if DENSE in found:
            panel.axhline(found[DENSE].mean(NEEDLE_TASKS), color="black", linewidth=0.8, label="dense")
        items = min(len(shares) for point in found.values() for shares in point.scores["greedy"].values())
        title = f"{tokens(context)}, chunk {chunk}: needle tasks, greedy\n{items} items of each"
        panel.set(title=title, xlabel="density on their prompts", ylabel="share of right words", ylim=(-0.03, 1.03))
    finish(figure, panels, result, path, one_legend=True)


def draw_bits(result: Record, path: Path) -> None:
    """The same panels: bits per byte on held-out text over dense."""
    figure, panels, settings = _panels(result, (TEXT,))
    for panel, (context, chunk) in zip(panels, settings, strict=False):
        found = points(result, context, chunk)
        dense = found.get(DENSE)

        def over_dense(point: Point, dense: Point | None = dense) -> float:
            ratio = None if dense is None else bits_ratio(point, dense)
            return float("nan") if ratio is None else ratio[0]

        _sweeps(panel, result, found, (TEXT,), over_dense)
        title = f"{tokens(context)}, chunk {chunk}: held-out text"
        panel.set(title=title, xlabel="density on that text", ylabel="bits per byte ÷ dense")
    finish(figure, panels, result, path, one_legend=True)


def _panels(result: Record, kinds: Sequence[str]) -> tuple[Any, Any, list[tuple[int, int]]]:
    """(figure, panels, settings): at most four contexts, at the chunk that most of them have.

    A context with no family of two points, by density on some kinds of prompt, has no line to draw; it gets a panel
    only if that is true of all.
    """
    settings = settings_of(result)
    sweeps = {pair: families(points(result, *pair), kinds).values() for pair in settings}
    settings = [pair for pair in settings if any(len(sweep) > 1 for sweep in sweeps[pair])] or settings
    chunks = [chunk for _, chunk in settings]
    chunk = max(chunks, key=chunks.count)
    settings = [pair for pair in settings if pair[1] == chunk][:4]
    figure, panels = canvas(max(2, len(settings)))
    return figure, panels, settings


def _sweeps(panel: Any, result: Record, found: dict[str, Point], kinds: Sequence[str], value: Any) -> None:
    """A line per family over its density on some kinds of prompt, of one look in every panel; the control is a cross.

    A family whose prompts end dense is dashed, in the colour and with the marker of the one that it is without that.
    Those with other changes (dense layers, mean correction) have tables of their own.
    """
    swept = (row["family"].removesuffix(LAST) for row in result["rows"].values() if row["parameter"])
    names = [name for name in dict.fromkeys(swept) if " + " not in name]
    for family, sweep in families(found, kinds).items():
        own = family.removesuffix(LAST)
        if own in names and sweep[0].row["parameter"]:
            points_of = [(point.density(kinds), value(point)) for point in sweep]
            again, colour = divmod(names.index(own), COLOURS)
            lines(panel, {family: points_of}, f"C{colour}{MARKERS[again]}" + ("-" if own == family else "--"))
    if CONTROL in found and not math.isnan(found[CONTROL].density(kinds)):
        lines(panel, {CONTROL: [(found[CONTROL].density(kinds), value(found[CONTROL]))]}, "kx")
    panel.set_xscale("log")
    panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    panel.set_xticks([], minor=True)


FIGURES = {"": draw_accuracy, "-bits": draw_bits}
"""Figures by what is added to the result's name."""
