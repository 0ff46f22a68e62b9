"""The same views for print: results in, matplotlib figures out. Pure functions over `Figure`: no pyplot, no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from inspector.cost import PAGE_KINDS, PageGrid
from inspector.frames import ALONE, BOTH, CURRENT_REGION, ONLY_A, ONLY_B, PROMPT_PARTS, SHARED
from inspector.model import KINDS, Difference, GroupUnion, HeadProfile, Mass, Reading, SharingCost
from inspector.style import BLUE, GREEN, GREY, ORANGE, QUIET, RED, SKY, SMALLEST_MASS

_NONE = "#ffffff"
_KINDS = dict(zip(KINDS, (_NONE, QUIET, BLUE, ORANGE, SKY, GREEN), strict=True))


def prompt_figure(tokens: int, chunk: int, start: int) -> Figure:
    """The prompt: what is past, what is being prefilled, what is still to come."""
    figure = Figure(figsize=(10, 1.3), layout="constrained")
    axes, stop = figure.subplots(), min(start + chunk, tokens)
    parts = ((0, start, GREY), (start, stop, GREEN), (stop, tokens, QUIET))
    for name, (begin, end, color) in zip(PROMPT_PARTS, parts, strict=True):
        axes.barh([0], [end - begin], left=begin, color=color, label=name)
    axes.set(xlim=(0, tokens), yticks=[], xlabel="token")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def mask_figure(reading: Reading, mass: Mass, head: int) -> Figure:
    """One head: where its attention mass lies, above what its selector keeps."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, sharey=True)
    figure.colorbar(_draw_mass(top, reading, mass, head), ax=top, label="share of mass")
    top.set_title(f"head {head}, tokens {reading.start:,} to {reading.stop - 1:,}: exact attention")
    _draw_kinds(bottom, reading.kinds(head), _KINDS)
    bottom.set_title(f"selected by {type(reading.setting.selector).__name__}")
    for axes in (top, bottom):
        axes.set_ylabel("query block")
    bottom.set_xlabel(f"KV block ({reading.setting.selector.block_size} tokens)")
    _legend(figure, {name: color for name, color in _KINDS.items() if name != KINDS[0]})
    return figure


def heads_figure(reading: Reading, mass: Mass, by_mass: bool) -> Figure:
    """All heads as small multiples: what their selectors keep, or where their exact mass lies."""
    columns = min(4, reading.heads)
    lines = -(-reading.heads // columns)
    figure = Figure(figsize=(3.2 * columns, 0.6 + 1.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for head, axes in enumerate(grid.flat):
        axes.set_visible(head < reading.heads)
        if head < reading.heads:
            image = _draw_mass(axes, reading, mass, head) if by_mass else _draw_kinds(axes, reading.kinds(head), _KINDS)
            axes.set_title(f"head {head}", fontsize=9)
    figure.supxlabel("KV block")
    figure.supylabel("query block")
    if by_mass:
        figure.colorbar(image, ax=grid, label="share of mass")
    else:
        _legend(figure, {name: color for name, color in _KINDS.items() if name != KINDS[0]})
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


def cascade_figure(union: GroupUnion, reading: Reading, by: str) -> Figure:
    """Member masks, above their union over query blocks, above the row, above the row's packed entries."""
    members = union.members.reshape(-1, reading.blocks) & union.past
    current = reading.visible[list(union.query_blocks)] & ~union.past
    of_row = union.listed & ~union.past
    row = _shares((union.listed & union.past)[None], union, of_row[None], by)
    packed = np.zeros_like(row)
    packed[0, : union.listed.sum()] = row[0, union.listed]
    lines = (
        _shares(members, union, np.tile(current, (len(union.heads), 1)), by),
        _shares(union.by_head & union.past, union, np.tile(of_row, (len(union.heads), 1)), by),
        row,
        packed,
    )
    heights = [max(2.0, 0.16 * len(lines[0])), max(0.6, 0.24 * len(lines[1])), 0.35, 0.35]
    figure = Figure(figsize=(11, 2.4 + sum(heights)), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    kinds = {"left out": QUIET, SHARED[by]: BLUE, ALONE[by]: RED, CURRENT_REGION: GREEN}
    titles = (
        "1  masks of the members",
        "2  united over the query blocks",
        "3  united over the heads: the row",
        "4  the block table: its entries, packed",
    )
    for axes, cells, title in zip(panels, lines, titles, strict=True):
        _draw_kinds(axes, cells, kinds)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks([])
    panels[0].set_ylabel(f"heads {union.heads.start} to {union.heads.stop - 1}, query blocks")
    panels[3].set_xlabel(f"KV block ({reading.setting.selector.block_size} tokens), entry")
    _legend(figure, kinds)
    return figure


def _shares(bits: np.ndarray, union: GroupUnion, current: np.ndarray, by: str) -> np.ndarray:
    """0 left out, 1 asked for by several, 2 by one alone, 3 in the current region."""
    return np.where(current, 3, np.where(bits, np.where(union.alone(by).any(0), 2, 1), 0))


def responsibility_figure(frame: pd.DataFrame) -> Figure:
    """Per head (or query block) of a row: blocks shared, asked for alone, given unasked."""
    part = frame.columns[0]
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(frame)), layout="constrained")
    axes, left = figure.subplots(), np.zeros(len(frame))
    for name, color in {"shared": BLUE, "alone": RED, "given, not asked for": QUIET}.items():
        axes.barh(frame[part], frame[name], left=left, color=color, label=name)
        left += frame[name].to_numpy()
    axes.invert_yaxis()
    axes.set(xlabel="past blocks of the row", ylabel=part, yticks=frame[part])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def row_figure(frame: pd.DataFrame, row: int, by: str) -> Figure:
    """A row of the table as it is walked: for each entry, how many pairs need it."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots()
    for name, color in {SHARED[by]: BLUE, ALONE[by]: RED, CURRENT_REGION: GREEN}.items():
        part = frame[frame["share"] == name]
        axes.bar(part["entry"] + 0.5, part["needed_by_pairs"], width=1.0, color=color, label=name)
    axes.set(xlabel="entry", ylabel="(head, query block) pairs", title=f"row {row}", xlim=(0, len(frame)))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


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
    kinds = dict(zip(PAGE_KINDS, (_NONE, QUIET, BLUE, GREEN), strict=True))
    _draw_kinds(axes, cells, kinds)
    axes.set(xlabel=f"physical page modulo {columns} ({grid.page_size} tokens each)", ylabel="line of pages")
    _legend(figure, {name: color for name, color in kinds.items() if name != PAGE_KINDS[0]})
    return figure


def difference_figure(found: Difference, past_blocks: int, head: int) -> Figure:
    """What the rows of one head list under A, under B, or under both."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    kinds = {"in neither": QUIET, BOTH: GREY, ONLY_A: BLUE, ONLY_B: ORANGE}
    cells = found.both * 1 + found.only_a * 2 + found.only_b * 3
    _draw_kinds(axes, cells[:, :past_blocks], kinds)
    axes.set(xlabel=f"KV block of the past ({found.block_size} tokens)", ylabel="query block", title=f"head {head}")
    _legend(figure, kinds)
    return figure


def _draw_mass(axes: Axes, reading: Reading, mass: Mass, head: int) -> AxesImage:
    shares = np.where(reading.visible, np.maximum(mass.share[head], SMALLEST_MASS), np.nan)
    norm = LogNorm(SMALLEST_MASS, 1.0)
    return axes.imshow(shares, norm=norm, cmap="magma_r", aspect="auto", interpolation="none")


def _draw_kinds(axes: Axes, cells: np.ndarray, colors: dict[str, str]) -> AxesImage:
    palette = ListedColormap(list(colors.values()))
    return axes.imshow(cells, vmin=0, vmax=len(colors) - 1, cmap=palette, aspect="auto", interpolation="none")


def _legend(figure: Figure, colors: dict[str, str]) -> None:
    handles = [Patch(facecolor=color, edgecolor="#6e7781", label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
