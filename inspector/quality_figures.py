"""What a setting is worth, for print: recall, errors, frontiers and times as matplotlib figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from inspector.quality_charts import MEASURES
from inspector.quality_frames import METHODS
from inspector.recall import LOW
from inspector.style import BLUE, GREY, METHOD_COLORS, ORANGE, RED

_MARKERS = {
    "block table": "o",
    "FlashPrefill": "o",
    "KeyBounds": ">",
    "XAttention": "s",
    "Oracle": "^",
    "SeerGate": "v",
    "QUOKA": "D",
    "Dense": "x",
}
_ERROR = "‖out - dense‖ / ‖dense‖"


def recall_figure(frame: pd.DataFrame, head: int) -> Figure:
    """Recall of each query of one head."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for column, name in (("table", "block table"), ("QUOKA", "QUOKA")):
        axes.plot(frame["query"], frame[column], _MARKERS[name], markersize=3, color=METHOD_COLORS[name], label=name)
    axes.axhline(LOW, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="position of the query", ylabel="share of its exact mass", title=f"head {head}")
    axes.legend(frameon=False)
    return figure


def recall_curve_figure(frame: pd.DataFrame, head: int) -> Figure:
    """The queries of one head from the worst to the best under each method."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, part), line in zip(frame.groupby("method", sort=False), ("-", "--"), strict=True):
        axes.step(part["share"], part["recall"], line, where="pre", color=METHOD_COLORS[str(name)], label=name)
    axes.axhline(LOW, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="share of the queries, the worst first", ylabel="share of its exact mass", title=f"head {head}")
    axes.legend(frameon=False)
    return figure


def recall_heat_figure(frame: pd.DataFrame) -> Figure:
    """Mean recall of each head along the chunk, both methods with the same colours."""
    figure = Figure(figsize=(11, 1.6 + 0.22 * frame["head"].nunique()), layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    low = min(LOW, float(frame["recall"].min()))
    for axes, method in zip(panels, METHODS, strict=True):
        cells = frame[frame["method"] == method].pivot(index="head", columns="stretch", values="recall")
        image = axes.imshow(cells, vmin=low, vmax=1.0, cmap="magma", aspect="auto", interpolation="none")
        axes.set(title=method, xlabel="along the chunk", xticks=[])
    panels[0].set_ylabel("query head")
    figure.colorbar(image, ax=panels, label="mean recall")
    return figure


def error_figure(frame: pd.DataFrame) -> Figure:
    """Output error per head, both methods side by side."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for n, (name, part) in enumerate(frame.groupby("method", sort=False)):
        axes.bar(part["head"] + 0.4 * n - 0.2, part["error"], width=0.4, color=METHOD_COLORS[str(name)], label=name)
    axes.set(xlabel="query head", ylabel=_ERROR)
    axes.legend(frameon=False)
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
        axes.plot(part["density"], part["error"], _MARKERS[str(name)], color=METHOD_COLORS[str(name)], label=name)
    axes.set(xlabel="past given to the head", ylabel=_ERROR)
    axes.legend(frameon=False)
    return figure


def frontier_figure(frame: pd.DataFrame, current: pd.DataFrame, measure: str) -> Figure:
    """What each budget buys: a curve per method, the current setting as a ring."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    column, title = MEASURES[measure]
    for name, part in frame.groupby("name", sort=False):
        ordered = part.sort_values("density")
        axes.plot(
            ordered["density"], ordered[column], f"{_MARKERS[str(name)]}-", color=METHOD_COLORS[str(name)], label=name
        )
    axes.plot(current["density"], current[column], "o", markersize=14, fillstyle="none", color="black", label="current")
    axes.set(xlabel="share of the past that is read", ylabel=title)
    axes.legend(frameon=False)
    return figure


def measured_figure(frame: pd.DataFrame, estimates: dict[str, float]) -> Figure:
    """Measured times of attention against the bound that is used as the estimate; `estimates` in ms are marked."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, part in frame.groupby("method", sort=False):
        marker, color = _MARKERS[str(name)], METHOD_COLORS[str(name)]
        axes.loglog(part["roofline_ms"], part["p50_ms"], marker, markersize=4, color=color, label=name)
    ends = [min([*frame["roofline_ms"], *estimates.values()]), max([*frame["p50_ms"], *estimates.values()])]
    axes.loglog(ends, ends, "--", color=GREY, label="bound")
    for name, at in estimates.items():
        axes.axvline(at, color="black", linewidth=1)
        axes.annotate(name, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points")
    axes.set(xlabel="bound, ms", ylabel="measured, ms (median)")
    axes.legend(frameon=False, loc="lower right")
    return figure


def moves_figure(frame: pd.DataFrame) -> Figure:
    """Every head from setting A to setting B: what it is given of the past, against its output error."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for head, part in frame.groupby("head"):
        axes.plot(part["density"], part["error"], "-", color=GREY, linewidth=1)
        axes.annotate(str(head), tuple(part[["density", "error"]].iloc[-1]), xytext=(5, 3), textcoords="offset points")
    for (setting, part), marker, color in zip(frame.groupby("setting"), "os", (BLUE, ORANGE), strict=True):
        axes.plot(part["density"], part["error"], marker, color=color, label=f"setting {setting}")
    axes.set(xlabel="past given to the head", ylabel=_ERROR)
    axes.legend(frameon=False)
    return figure
