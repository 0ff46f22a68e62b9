"""Charts of what a setting is worth: recall, errors, frontiers and times. Tables in, Vega-Lite out."""

from __future__ import annotations

import altair as alt
import pandas as pd

from inspector.charts import RED, legend, methods_scale, quiet, ramp
from inspector.frames import SAMPLED, UNSAMPLED
from inspector.recall import LOW


def _method_color(frame: pd.DataFrame, field: str, dark: bool) -> alt.Color:
    names = list(dict.fromkeys(frame[field]))
    return alt.Color(f"{field}:N", scale=methods_scale(names, dark), legend=legend())


def _shape(frame: pd.DataFrame, field: str) -> alt.Shape:
    names = list(dict.fromkeys(frame[field]))
    shapes = ["circle", "square", "triangle-up", "diamond", "cross"][: len(names)]
    return alt.Shape(f"{field}:N", scale=alt.Scale(domain=names, range=shapes), legend=legend())


def recall_chart(frame: pd.DataFrame, *, dark: bool) -> alt.LayerChart:
    """Recall of every observed query of one head, the table's and QUOKA's."""
    long = frame.melt(["query", "QUOKA sampled it", "text"], ["table", "QUOKA"], "method", "recall")
    long["method"] = long["method"].replace({"table": "block table"})
    floor = max(0.0, min(0.88, float(long["recall"].min()) - 0.02))
    y = alt.Y(
        "recall:Q",
        title="share of its exact mass",
        scale=alt.Scale(domain=[floor, 1.0], nice=False, zero=False),
        axis=alt.Axis(format=".3~%"),
    )
    points = (
        alt.Chart(long)
        .mark_point(filled=True, size=22, opacity=0.75)
        .encode(
            x=alt.X("query:Q", title="position of the query", scale=alt.Scale(zero=False, nice=False)),
            y=y,
            color=_method_color(long, "method", dark),
            shape=_shape(long, "method"),
            tooltip=[
                "method:N",
                alt.Tooltip("query:Q", format=",d"),
                alt.Tooltip("recall:Q", format=".2%"),
                "QUOKA sampled it:N",
                "text:N",
            ],
        )
    )
    line = alt.Chart(pd.DataFrame({"recall": [LOW]})).mark_rule(strokeDash=[5, 4], color="#8a94a0").encode(y=y)
    return (line + points).properties(height=360)


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
        .properties(height=165)
    )


def recall_heat_chart(frame: pd.DataFrame, method: str, *, dark: bool) -> alt.Chart:
    """Mean recall of each head along the chunk under one method; the colours are the same for both methods."""
    low = min(0.9, float(frame["recall"].min()))
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
        .properties(height=110 + 20 * frame["head"].nunique())
    )


def error_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Output error per head, both methods side by side."""
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X("head:O", title="query head", axis=alt.Axis(labelAngle=0)),
            xOffset="method:N",
            y=alt.Y("error:Q", title="‖out - dense‖ / ‖dense‖", axis=alt.Axis(format="~g")),
            color=_method_color(frame, "method", dark),
            tooltip=[
                "method:N",
                "head:O",
                alt.Tooltip("error:Q", format=".4f"),
                alt.Tooltip("density:Q", format=".2%"),
                alt.Tooltip("mean recall:Q", format=".2%"),
                alt.Tooltip("worst recall:Q", format=".2%"),
            ],
        )
        .properties(height=340)
    )


def scatter_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Density against error: one point per head and selector."""
    return (
        alt.Chart(frame)
        .mark_point(filled=True, size=70, opacity=0.85)
        .encode(
            x=alt.X("density:Q", title="past given to the head", axis=alt.Axis(format=".2~%")),
            y=alt.Y("error:Q", title="‖out - dense‖ / ‖dense‖", axis=alt.Axis(format="~g")),
            color=_method_color(frame, "selector", dark),
            shape=_shape(frame, "selector"),
            tooltip=[
                "selector:N",
                "head:O",
                alt.Tooltip("density:Q", format=".2%"),
                alt.Tooltip("error:Q", format=".4f"),
                alt.Tooltip("mean recall:Q", format=".2%"),
            ],
        )
        .properties(height=300)
    )


#: What a frontier can show against the budget: its name, its column, the title of its axis.
MEASURES = {
    "missed mass, mean": ("lost", "mean share of the mass that is missed"),
    "missed mass, worst query": ("lost_worst", "share of the mass that the worst query misses"),
    "output error": ("error", "mean ‖out - dense‖ / ‖dense‖"),
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
    color = _method_color(frame, "name", dark)
    base = alt.Chart(frame).encode(x=x, y=y, color=color, tooltip=hover)
    lines = base.mark_line(strokeWidth=2, opacity=0.6).encode(order="density:Q")
    points = base.mark_point(filled=True, size=55, opacity=1).encode(shape=_shape(frame, "name"))
    ring = "#ffffff" if dark else "#000000"
    here = alt.Chart(current).mark_point(size=320, strokeWidth=2.5, color=ring).encode(x=x, y=y, tooltip=hover)
    label = alt.Chart(current).mark_text(align="left", dx=14, dy=-10, color=ring, fontSize=12, text="current setting")
    return (lines + points + here + label.encode(x=x, y=y)).properties(height=420)


def measured_chart(frame: pd.DataFrame, estimates: dict[str, float], *, dark: bool) -> alt.LayerChart:
    """Measured times of attention against the bound that is used as the estimate; `estimates` in ms are marked."""
    low = min(float(frame["roofline_ms"].min()), *estimates.values()) * 0.8
    high = max(float(frame[["roofline_ms", "p50_ms"]].max().max()), *estimates.values()) * 1.25
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    names = {"attend": "block table", "dense": "Dense"}
    placed = frame.assign(method=frame["family"].map(names))
    points = (
        alt.Chart(placed)
        .mark_point(filled=True, size=40, opacity=0.75)
        .encode(
            x=alt.X("roofline_ms:Q", title="bound, ms", scale=scale),
            y=alt.Y("p50_ms:Q", title="measured, ms (median)", scale=scale),
            color=_method_color(placed, "method", dark),
            shape=_shape(placed, "method"),
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
    diagonal = alt.Chart(pd.DataFrame({"t": [low, high]})).mark_line(strokeDash=[5, 4], color="#8a94a0")
    diagonal = diagonal.encode(x=alt.X("t:Q", scale=scale), y=alt.Y("t:Q", scale=scale))
    here = pd.DataFrame({"what": list(estimates), "t": list(estimates.values())})
    ink = "#e3e9f0" if dark else "#1c2530"
    at = alt.X("t:Q", scale=scale)
    rules = alt.Chart(here).mark_rule(color=ink, strokeWidth=1.5).encode(x=at)
    names_at = alt.Chart(here).mark_text(align="left", dx=5, baseline="top", color=ink, y=4).encode(x=at, text="what:N")
    return (diagonal + points + rules + names_at).properties(height=380)


def prompt_chart(tokens: int, chunk: int, start: int, *, dark: bool) -> alt.Chart:
    """The prompt as a strip of chunks: what is past, what is being prefilled, what is still to come."""
    rows = []
    for first in range(0, tokens, chunk):
        state = "past, in the cache" if first < start else "this chunk" if first == start else "still to come"
        rows.append({"lane": "prompt", "first": first, "end": min(first + chunk, tokens), "state": state})
    frame = pd.DataFrame(rows)
    names = ["past, in the cache", "this chunk", "still to come"]
    scale = alt.Scale(domain=names, range=["#8a94a0", "#009E73", quiet(dark)])
    return (
        alt.Chart(frame)
        .mark_rect(stroke="#12161c" if dark else "#ffffff", strokeWidth=1)
        .encode(
            x=alt.X(
                "first:Q", title="token", scale=alt.Scale(domain=[0, tokens], nice=False), axis=alt.Axis(format=",d")
            ),
            x2="end:Q",
            y=alt.Y("lane:N", axis=None),
            color=alt.Color("state:N", scale=scale, legend=legend()),
            tooltip=[alt.Tooltip("first:Q", format=",d"), alt.Tooltip("end:Q", format=",d"), "state:N"],
        )
        .properties(height=165)
    )
