"""Charts of what a setting is worth: recall, errors, frontiers and times. Tables in, Vega-Lite out."""

from __future__ import annotations

import altair as alt
import pandas as pd

from inspector.quality_frames import SAMPLED, UNSAMPLED
from inspector.recall import LOW
from inspector.style import GREY, ORANGE, PADDING, RED, blue, ink, legend, method_color, method_shape, quiet, ramp

_ERROR = "‖out - dense‖ / ‖dense‖"


def _recall_axis(low: float) -> alt.Y:
    floor = max(0.0, min(0.88, low - 0.02))
    scale = alt.Scale(domain=[floor, 1.0], nice=False, zero=False)
    return alt.Y("recall:Q", title="share of its exact mass", scale=scale, axis=alt.Axis(format=".3~%"))


def _low_rule(y: alt.Y) -> alt.Chart:
    return alt.Chart(pd.DataFrame({"recall": [LOW]})).mark_rule(strokeDash=[5, 4], color=GREY).encode(y=y)


def recall_chart(frame: pd.DataFrame, *, dark: bool) -> alt.LayerChart:
    """Recall of every observed query of one head along the chunk, the table's and QUOKA's."""
    long = frame.melt(["query", "QUOKA sampled it", "text"], ["table", "QUOKA"], "method", "recall")
    long["method"] = long["method"].replace({"table": "block table"})
    y = _recall_axis(float(long["recall"].min()))
    axis = alt.Axis(format=",d", tickCount=10)
    points = (
        alt.Chart(long)
        .mark_point(filled=True, size=22, opacity=0.75)
        .encode(
            x=alt.X("query:Q", title="position of the query", scale=alt.Scale(zero=False, nice=False), axis=axis),
            y=y,
            color=method_color(long["method"], "method", dark),
            shape=method_shape(long["method"], "method"),
            tooltip=[
                "method:N",
                alt.Tooltip("query:Q", format=",d"),
                alt.Tooltip("recall:Q", format=".2%"),
                "QUOKA sampled it:N",
                "text:N",
            ],
        )
    )
    return (_low_rule(y) + points).properties(padding=PADDING, height=320)


def recall_curve_chart(frame: pd.DataFrame, *, dark: bool) -> alt.LayerChart:
    """The same queries from the worst to the best under each method: how many of them fare how badly."""
    y = _recall_axis(float(frame["recall"].min()))
    axis = alt.Axis(format="%", tickCount=10)
    line = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.5, interpolate="step-after")
        .encode(
            x=alt.X("share:Q", title="share of the queries, the worst first", axis=axis),
            y=y,
            color=method_color(frame["method"], "method", dark),
            strokeDash=alt.StrokeDash("method:N", legend=None),
            tooltip=[
                "method:N",
                alt.Tooltip("share:Q", format=".1%", title="share of the queries up to here"),
                alt.Tooltip("recall:Q", format=".2%"),
            ],
        )
    )
    return (_low_rule(y) + line).properties(padding=PADDING, height=320)


def sampled_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """The chunk's tokens as a strip: had the token's query a voice in QUOKA?"""
    scale = alt.Scale(domain=[SAMPLED, UNSAMPLED], range=[quiet(dark), RED])
    begin, end = int(frame["query"].min()), int(frame["end"].max())
    return (
        alt.Chart(frame)
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X(
                "query:Q", title="token", scale=alt.Scale(domain=[begin, end], nice=False), axis=alt.Axis(format=",d")
            ),
            x2="end:Q",
            y=alt.Y("sampled:N", sort=[SAMPLED, UNSAMPLED], title=None, axis=alt.Axis(labelLimit=170)),
            color=alt.Color("sampled:N", scale=scale, legend=None),
            tooltip=[
                alt.Tooltip("query:Q", format=",d"),
                alt.Tooltip("sampled_by:N", title="asked by heads"),
                "text:N",
            ],
        )
        .properties(padding=PADDING, height=130)
    )


def recall_heat_chart(frame: pd.DataFrame, method: str, *, dark: bool) -> alt.Chart:
    """Mean recall of each head along the chunk under one method; the colours are the same for both methods."""
    low = min(LOW, float(frame["recall"].min()))
    scale = alt.Scale(domain=[1.0, low], range=ramp(dark), clamp=True)
    key = legend("mean recall", format=".0%", gradientLength=200)
    return (
        alt.Chart(frame[frame["method"] == method])
        .mark_rect()
        .encode(
            x=alt.X("stretch:O", title="along the chunk", axis=alt.Axis(labels=False, ticks=False)),
            y=alt.Y("head:O", title="query head"),
            color=alt.Color("recall:Q", scale=scale, legend=key),
            tooltip=[
                "method:N",
                "head:O",
                "queries:N",
                alt.Tooltip("recall:Q", format=".2%"),
                alt.Tooltip("worst:Q", format=".2%"),
            ],
        )
        .properties(padding=PADDING, height=110 + 20 * frame["head"].nunique())
    )


def error_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Output error per head, both methods side by side."""
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X("head:O", title="query head", axis=alt.Axis(labelAngle=0)),
            xOffset="method:N",
            y=alt.Y("error:Q", title=_ERROR, axis=alt.Axis(format="~g")),
            color=method_color(frame["method"], "method", dark),
            tooltip=[
                "method:N",
                "head:O",
                alt.Tooltip("error:Q", format=".4f"),
                alt.Tooltip("density:Q", format=".2%"),
                alt.Tooltip("mean recall:Q", format=".2%"),
                alt.Tooltip("worst recall:Q", format=".2%"),
            ],
        )
        .properties(padding=PADDING, height=320)
    )


def scatter_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Density against error: one point per head and selector."""
    return (
        alt.Chart(frame)
        .mark_point(filled=True, size=70, opacity=0.85)
        .encode(
            x=alt.X("density:Q", title="past given to the head", axis=alt.Axis(format=".2~%")),
            y=alt.Y("error:Q", title=_ERROR, axis=alt.Axis(format="~g")),
            color=method_color(frame["selector"], "selector", dark, columns=3),
            shape=method_shape(frame["selector"], "selector", columns=3),
            tooltip=[
                "selector:N",
                "head:O",
                alt.Tooltip("density:Q", format=".2%"),
                alt.Tooltip("error:Q", format=".4f"),
                alt.Tooltip("mean recall:Q", format=".2%"),
            ],
        )
        .properties(padding=PADDING, height=340)
    )


#: What a frontier can show against the budget: its name, its column, the title of its axis.
MEASURES = {
    "missed mass, mean": ("lost", "mean share of the mass that is missed"),
    "missed mass, worst query": ("lost_worst", "share of the mass that the worst query misses"),
    "output error": ("error", f"mean {_ERROR}"),
    "queries under 90 %": ("low", "share of queries under 90 % recall"),
}


def frontier_chart(frame: pd.DataFrame, current: pd.DataFrame, measure: str, *, dark: bool) -> alt.LayerChart:
    """What each budget buys: a curve per method, and the current setting as a ring."""
    x = alt.X(
        "density:Q",
        title="share of the past that is read (mean over the heads)",
        axis=alt.Axis(format=".2~%", tickCount=10),
        scale=alt.Scale(domainMin=0),
    )
    column, title = MEASURES[measure]
    y = alt.Y(f"{column}:Q", title=title, axis=alt.Axis(format=".2~%" if column != "error" else "~g"))
    hover = [
        alt.Tooltip("name:N", title="method"),
        alt.Tooltip("value:Q", format=".4g", title="parameter"),
        alt.Tooltip("density:Q", format=".2%", title="past read"),
        alt.Tooltip("recall:Q", format=".2%", title="mean recall"),
        alt.Tooltip("worst:Q", format=".2%", title="worst recall"),
        alt.Tooltip("error:Q", format=".4f", title="mean error"),
    ]
    color = method_color(frame["name"], "name", dark)
    base = alt.Chart(frame).encode(x=x, y=y, color=color, tooltip=hover)
    lines = base.mark_line(strokeWidth=2, opacity=0.6).encode(order="density:Q")
    points = base.mark_point(filled=True, size=55, opacity=1).encode(shape=method_shape(frame["name"], "name"))
    ring = ink(dark)
    here = alt.Chart(current).mark_point(size=320, strokeWidth=2.5, color=ring).encode(x=x, y=y, tooltip=hover)
    right = float(current["density"].iloc[0]) > 0.7 * float(frame["density"].max())
    side = {"align": "right", "dx": -14} if right else {"align": "left", "dx": 14}
    label = alt.Chart(current).mark_text(**side, dy=-10, color=ring, fontSize=12, text="current setting")
    return (lines + points + here + label.encode(x=x, y=y)).properties(padding=PADDING, height=420)


def measured_chart(frame: pd.DataFrame, estimates: dict[str, float], *, dark: bool) -> alt.LayerChart:
    """Measured times of attention against the bound that is used as the estimate; `estimates` in ms are marked."""
    low = min([*frame["roofline_ms"], *estimates.values()]) * 0.8
    high = max([*frame["roofline_ms"], *frame["p50_ms"], *estimates.values()]) * 1.25
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(format="~g", values=[10.0**n for n in range(-6, 6)])
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=40, opacity=0.75)
        .encode(
            x=alt.X("roofline_ms:Q", title="bound, ms", scale=scale, axis=axis),
            y=alt.Y("p50_ms:Q", title="measured, ms (median)", scale=scale, axis=axis),
            color=method_color(frame["method"], "method", dark),
            shape=method_shape(frame["method"], "method"),
            tooltip=[
                alt.Tooltip("case:N"),
                alt.Tooltip("name:N"),
                alt.Tooltip("density:Q", format=".2%", title="past density"),
                alt.Tooltip("p50_ms:Q", format=".3f", title="measured, ms"),
                alt.Tooltip("roofline_ms:Q", format=".3f", title="bound, ms"),
                alt.Tooltip("ratio:Q", format=".2f", title="measured ÷ bound"),
            ],
        )
    )
    diagonal = alt.Chart(pd.DataFrame({"t": [low, high]})).mark_line(strokeDash=[5, 4], color=GREY)
    diagonal = diagonal.encode(x=alt.X("t:Q", scale=scale), y=alt.Y("t:Q", scale=scale))
    here = pd.DataFrame({"what": list(estimates), "t": list(estimates.values())})
    at = alt.X("t:Q", scale=scale)
    rules = alt.Chart(here).mark_rule(color=ink(dark), strokeWidth=1.5).encode(x=at)
    mark = alt.Chart(here).mark_text(align="left", dx=5, baseline="top", color=ink(dark), y=4)
    return (diagonal + points + rules + mark.encode(x=at, text="what:N")).properties(padding=PADDING, height=380)


def moves_chart(frame: pd.DataFrame, *, dark: bool) -> alt.LayerChart:
    """Every head from setting A to setting B: what it is given of the past, against its output error."""
    names = ["setting A", "setting B"]
    scale = alt.Scale(domain=names, range=[blue(dark), ORANGE])
    shape = alt.Scale(domain=names, range=["circle", "square"])
    frame = frame.assign(setting="setting " + frame["setting"])
    base = alt.Chart(frame).encode(
        x=alt.X("density:Q", title="past given to the head", axis=alt.Axis(format=".2~%", tickCount=10)),
        y=alt.Y("error:Q", title=_ERROR, axis=alt.Axis(format="~g", tickCount=6)),
    )
    lines = base.mark_line(color=GREY, opacity=0.6, strokeWidth=1.5).encode(detail="head:N", order="setting:N")
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        color=alt.Color("setting:N", scale=scale, legend=legend()),
        shape=alt.Shape("setting:N", scale=shape, legend=legend()),
        tooltip=[
            "setting:N",
            "head:O",
            alt.Tooltip("density:Q", format=".2%", title="past given"),
            alt.Tooltip("error:Q", format=".4f"),
            alt.Tooltip("recall:Q", format=".2%", title="mean recall"),
            alt.Tooltip("worst:Q", format=".2%", title="worst recall"),
        ],
    )
    marks = base.transform_filter("datum.setting == 'setting B'").mark_text(
        align="left", dx=8, fontSize=11, color=ink(dark)
    )
    return (lines + points + marks.encode(text="head:N")).properties(padding=PADDING, height=320)
