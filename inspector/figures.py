"""The same views for print: results in, matplotlib figures out. Pure functions over `Figure`: no pyplot, no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from inspector.charts import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from inspector.cost import PAGE_KINDS, PageGrid
from inspector.model import KINDS, Difference, GroupUnion, HeadProfile, Mass, Reading, SharingCost
from inspector.quality_charts import MEASURES

_QUIET, _NONE, _GREY = "#e3e7ec", "#ffffff", "#8a94a0"
_SMALLEST_MASS = 1e-4
_METHODS = {"block table": BLUE, "FlashPrefill": BLUE, "XAttention": GREEN, "Oracle": PURPLE, "QUOKA": RED}
_MARKERS = {"block table": "o", "FlashPrefill": "o", "XAttention": "s", "Oracle": "^", "QUOKA": "D"}


def mask_figure(reading: Reading, mass: Mass, head: int) -> Figure:
    """One head: where its attention mass lies, above what its selector keeps."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    shares = np.where(reading.visible, np.maximum(mass.share[head], _SMALLEST_MASS), np.nan)
    image = top.imshow(shares, norm=LogNorm(_SMALLEST_MASS, 1.0), cmap="magma_r", aspect="auto", interpolation="none")
    figure.colorbar(image, ax=top, label="share of mass")
    top.set_title(f"head {head}, tokens {reading.start:,} to {reading.stop - 1:,}: exact attention")
    kinds = dict(zip(KINDS, (_NONE, _QUIET, BLUE, ORANGE, SKY, GREEN), strict=True))
    _draw_kinds(bottom, reading.kinds(head), kinds)
    bottom.set_title(f"selected by {type(reading.setting.selector).__name__}")
    for axes in (top, bottom):
        axes.set_ylabel("query block")
    bottom.set_xlabel(f"KV block ({reading.setting.selector.block_size} tokens)")
    _legend(figure, {name: color for name, color in kinds.items() if name != KINDS[0]})
    return figure


def heads_figure(reading: Reading) -> Figure:
    """All heads as small multiples."""
    columns = min(4, reading.heads)
    lines = -(-reading.heads // columns)
    figure = Figure(figsize=(3.2 * columns, 0.6 + 1.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    kinds = dict(zip(KINDS, (_NONE, _QUIET, BLUE, ORANGE, SKY, GREEN), strict=True))
    for head, axes in enumerate(grid.flat):
        axes.set_visible(head < reading.heads)
        if head < reading.heads:
            _draw_kinds(axes, reading.kinds(head), kinds)
            axes.set_title(f"head {head}", fontsize=9)
    figure.supxlabel("KV block")
    figure.supylabel("query block")
    _legend(figure, {name: color for name, color in kinds.items() if name != KINDS[0]})
    return figure


def profile_figure(profiles: Sequence[HeadProfile]) -> Figure:
    """Where in the context each head's mass lies."""
    figure = Figure(figsize=(8, 0.9 + 0.3 * len(profiles)), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(profiles))
    regions = {
        "sink": ("sink", ORANGE),
        "far": ("far past", BLUE),
        "window": ("window", SKY),
        "current": ("current", GREEN),
    }
    for name, (label, color) in regions.items():
        values = np.array([getattr(profile, name) for profile in profiles])
        axes.barh([p.head for p in profiles], values, left=left, color=color, label=label)
        left += values
    axes.invert_yaxis()
    axes.set(xlabel="share of the exact attention mass", ylabel="query head", yticks=[p.head for p in profiles])
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def cascade_figure(union: GroupUnion, reading: Reading) -> Figure:
    """Member masks, above their union over query blocks, above the row of the block table."""
    members = union.members.reshape(-1, reading.blocks) & reading.past
    current = reading.visible[list(union.query_blocks)] & ~reading.past
    members = _shares(members, union, np.tile(current, (len(union.heads), 1)))
    of_row = union.listed & ~reading.past
    heads = _shares(union.by_head & reading.past, union, np.tile(of_row, (len(union.heads), 1)))
    row = _shares((union.listed & reading.past)[None], union, of_row[None])
    heights = [max(2.0, 0.16 * len(members)), max(0.6, 0.24 * len(heads)), 0.35]
    figure = Figure(figsize=(11, 1.8 + sum(heights)), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    kinds = {"left out": _QUIET, "asked for by several heads": BLUE, "by one head alone": RED, "current region": GREEN}
    titles = (
        "1  masks of the members",
        "2  united over the query blocks",
        "3  united over the heads: the row of the table",
    )
    for axes, cells, title in zip(panels, (members, heads, row), titles, strict=True):
        _draw_kinds(axes, cells, kinds)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks([])
    panels[0].set_ylabel(f"heads {union.heads.start} to {union.heads.stop - 1}, query blocks")
    panels[2].set_xlabel(f"KV block ({reading.setting.selector.block_size} tokens)")
    _legend(figure, kinds)
    return figure


def _shares(bits: np.ndarray, union: GroupUnion, current: np.ndarray) -> np.ndarray:
    """0 left out, 1 asked for by several heads, 2 by one alone, 3 in the current region."""
    alone = union.askers == 1
    return np.where(current, 3, np.where(bits, np.where(alone, 2, 1), 0))


def sharing_figure(costs: Sequence[SharingCost]) -> Figure:
    """Past density for every group size and span."""
    heads = sorted({cost.heads_per_group for cost in costs})
    spans = sorted({cost.query_blocks_per_span for cost in costs})
    values = np.array([cost.density for cost in costs]).reshape(len(heads), len(spans))
    figure = Figure(figsize=(1.6 + 1.1 * len(spans), 1.2 + 0.7 * len(heads)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="OrRd", vmin=0.0, vmax=1.3 * max(values.max(), 0.01), aspect="auto")
    for i, j in np.ndindex(*values.shape):
        axes.text(j, i, f"{values[i, j]:.1%}", ha="center", va="center")
    axes.set_xticks(range(len(spans)), spans)
    axes.set_yticks(range(len(heads)), heads)
    axes.set(xlabel="query blocks per span", ylabel="heads per group", title="past density of the table")
    return figure


def pages_figure(grid: PageGrid, columns: int) -> Figure:
    """The physical cache, a cell per page."""
    padded = np.zeros(-(-len(grid.kinds) // columns) * columns, dtype=int)
    padded[: len(grid.kinds)] = grid.kinds
    cells = padded.reshape(-1, columns)
    figure = Figure(figsize=(10, 1.2 + 0.16 * len(cells)), layout="constrained")
    axes = figure.subplots()
    kinds = dict(zip(PAGE_KINDS, (_NONE, _QUIET, BLUE, GREEN), strict=True))
    _draw_kinds(axes, cells, kinds)
    axes.set(xlabel=f"physical page modulo {columns} ({grid.page_size} tokens each)", ylabel="line of pages")
    _legend(figure, {name: color for name, color in kinds.items() if name != PAGE_KINDS[0]})
    return figure


def recall_figure(recall: pd.DataFrame, errors: pd.DataFrame, head: int) -> Figure:
    """Recall of each query of one head, and the output error of every head."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    for column, name in (("table", "block table"), ("QUOKA", "QUOKA")):
        left.plot(recall["query"], recall[column], _MARKERS[name], markersize=3, color=_METHODS[name], label=name)
    left.axhline(0.9, color=_GREY, linestyle="--", linewidth=1)
    left.set(xlabel="position of the query", ylabel="share of its exact mass", title=f"head {head}")
    left.legend(frameon=False)
    for n, (name, part) in enumerate(errors.groupby("method", sort=False)):
        right.bar(part["head"] + 0.4 * n - 0.2, part["error"], width=0.4, color=_METHODS[str(name)], label=name)
    right.set(xlabel="query head", ylabel="‖out - dense‖ / ‖dense‖", title="output error")
    right.legend(frameon=False)
    return figure


def sampled_figure(frame: pd.DataFrame) -> Figure:
    """How many heads of a KV group let each token's query speak in QUOKA."""
    figure = Figure(figsize=(10, 2), layout="constrained")
    axes = figure.subplots()
    silent = frame["heads"] == 0
    axes.bar(frame["query"], frame["heads"], width=1.0, color=BLUE)
    axes.plot(frame["query"][silent], np.zeros(int(silent.sum())), "|", color=RED, label="never asked")
    axes.set(xlabel="token", ylabel="heads that asked")
    axes.legend(frameon=False, loc="upper right")
    return figure


def scatter_figure(frame: pd.DataFrame) -> Figure:
    """Density against error, a point per head and selector."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, part in frame.groupby("selector", sort=False):
        axes.plot(part["density"], part["error"], _MARKERS[str(name)], color=_METHODS[str(name)], label=name)
    axes.set(xlabel="past given to the head", ylabel="‖out - dense‖ / ‖dense‖")
    axes.legend(frameon=False)
    return figure


def frontier_figure(frame: pd.DataFrame, current: pd.DataFrame, measure: str) -> Figure:
    """What each budget buys: a curve per method, the current setting as a ring."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    column, title = MEASURES[measure]
    for name, part in frame.groupby("name", sort=False):
        ordered = part.sort_values("density")
        axes.plot(ordered["density"], ordered[column], f"{_MARKERS[str(name)]}-", color=_METHODS[str(name)], label=name)
    axes.plot(current["density"], current[column], "o", markersize=14, fillstyle="none", color="black", label="current")
    axes.set(xlabel="share of the past that is read", ylabel=title)
    axes.legend(frameon=False)
    return figure


def difference_figure(found: Difference, past_blocks: int, head: int) -> Figure:
    """What the rows of one head list under A, under B, or under both."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    kinds = {"in neither": _QUIET, "in both tables": _GREY, "only in A": BLUE, "only in B": ORANGE}
    cells = found.both * 1 + found.only_a * 2 + found.only_b * 3
    _draw_kinds(axes, cells[:, :past_blocks], kinds)
    axes.set(xlabel=f"KV block of the past ({found.block_size} tokens)", ylabel="query block", title=f"head {head}")
    _legend(figure, kinds)
    return figure


def _draw_kinds(axes: Axes, cells: np.ndarray, colors: dict[str, str]) -> None:
    palette = ListedColormap(list(colors.values()))
    axes.imshow(cells, vmin=0, vmax=len(colors) - 1, cmap=palette, aspect="auto", interpolation="none")


def _legend(figure: Figure, colors: dict[str, str]) -> None:
    handles = [Patch(facecolor=color, edgecolor="#6e7781", label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
