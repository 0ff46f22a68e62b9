"""Results in, matplotlib figures out. Pure functions over `Figure` objects: no pyplot, no global state."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from inspector.model import Inspection

_INVISIBLE, _LEFT_OUT, _SELECTED, _CURRENT = "#ffffff", "#e4e7eb", "#1f6feb", "#9cc2f5"
_SMALLEST_MASS = 1e-4


def mask_figure(inspection: Inspection) -> Figure:
    """One head: where its attention mass lies, beside what its selector keeps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    mass = np.where(inspection.visible, np.maximum(inspection.mass, _SMALLEST_MASS), np.nan)
    image = left.imshow(mass, norm=LogNorm(_SMALLEST_MASS, 1.0), cmap="magma", aspect="auto", interpolation="none")
    figure.colorbar(image, ax=left, label="share of the query block's mass")
    left.set_title(f"exact attention of head {inspection.settings.head}")
    past = np.arange(inspection.visible.shape[1]) < inspection.past_blocks
    kinds = np.select(
        [~inspection.visible, inspection.selected & past, inspection.visible & ~past],
        [0, 2, 3],
        default=1,
    )
    _draw_kinds(right, kinds)
    right.set_title("selected by the head; the current region is always read")
    _label(left, inspection, "query block of the chunk")
    _label(right, inspection, None)
    _legend(figure)
    return figure


def table_figure(inspection: Inspection) -> Figure:
    """The group: how many of its members selected each block, above the row of the block table that they share."""
    spans = len(inspection.listed)
    figure = Figure(figsize=(12, 2.6 + 0.3 * spans), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    votes = inspection.votes / inspection.members[:, None]
    image = top.imshow(votes, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="none")
    figure.colorbar(image, ax=top, label="share of members")
    heads = ", ".join(map(str, inspection.heads))
    top.set_title(f"members (heads {heads} x query blocks of the row) that selected the block")
    past = np.arange(inspection.listed.shape[1]) < inspection.past_blocks
    kinds = [inspection.listed & past, inspection.listed, inspection.seen_by_row]
    _draw_kinds(bottom, np.select(kinds, [2, 3, 1], default=0))
    bottom.set_title("block table")
    for axes in (top, bottom):
        _label(axes, inspection, "table row")
        axes.set_yticks(range(spans))
    top.set_xlabel("")
    _legend(figure)
    return figure


def _draw_kinds(axes: Axes, kinds: np.ndarray) -> None:
    colors = ListedColormap([_INVISIBLE, _LEFT_OUT, _SELECTED, _CURRENT])
    axes.imshow(kinds, vmin=0, vmax=3, cmap=colors, aspect="auto", interpolation="none")


def _label(axes: Axes, inspection: Inspection, rows: str | None) -> None:
    axes.set_xlabel(f"KV block ({inspection.settings.selector.block_size} tokens)")
    if rows is not None:
        axes.set_ylabel(rows)
    if inspection.past_blocks:
        axes.axvline(inspection.past_blocks - 0.5, color="#d1242f", linewidth=1)


def _legend(figure: Figure) -> None:
    entries = {"past, kept": _SELECTED, "current region": _CURRENT, "left out": _LEFT_OUT, "not visible": _INVISIBLE}
    handles = [Patch(facecolor=color, edgecolor="#6e7781", label=name) for name, color in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
