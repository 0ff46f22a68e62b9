"""Tables of results in, interactive Vega-Lite charts out. Pure functions; colours are told apart by colour-blind eyes.

Hues are those of Okabe and Ito; ramps of one hue differ in lightness alone. `dark` says which theme is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from inspector.cost import PAGE_KINDS
from inspector.frames import BOTH, CURRENT_REGION, ONE_HEAD, ONLY_A, ONLY_B, SEVERAL_HEADS
from inspector.model import KINDS

BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
_SMALLEST_MASS = 1e-4
_AROUND = 110  # of a chart's height, for its legend and its axis: Streamlit fits everything into the height given
_TOKENS = alt.Tooltip("tokens:N", title="tokens")


def quiet(dark: bool) -> str:
    """What is there and not read."""
    return "#2c3540" if dark else "#e3e7ec"


def _blue(dark: bool) -> str:
    return "#2f8be6" if dark else BLUE


def _sky(dark: bool) -> str:
    return "#b9e3fb" if dark else SKY


def ramp(dark: bool) -> list[str]:
    """From next to the background to the strongest contrast with it."""
    if dark:
        return ["#1d242d", "#4b2b3f", "#93344a", "#d9593b", "#f7a55a", "#fff3c4"]
    return ["#f5f1ec", "#fbd9ae", "#f6a15b", "#d9532c", "#932340", "#3b0f3f"]


def kind_scale(dark: bool) -> alt.Scale:
    colors = [quiet(dark), _blue(dark), ORANGE, _sky(dark), GREEN]
    return alt.Scale(domain=list(KINDS[1:]), range=colors)


def share_scale(dark: bool) -> alt.Scale:
    return alt.Scale(domain=[SEVERAL_HEADS, ONE_HEAD, CURRENT_REGION], range=[_blue(dark), RED, GREEN])


def legend(title: str | None = None, **more: object) -> alt.Legend:
    return alt.Legend(title=title, orient="top", direction="horizontal", labelLimit=260, symbolOpacity=1.0, **more)


def _kv_axis(begin: int, end: int, title: str = "KV block") -> dict[str, object]:
    return {
        "scale": alt.Scale(domain=[begin, end], nice=False, zero=False),
        "axis": alt.Axis(title=title, format=",d", tickMinStep=1, grid=False),
    }


def _mass_color(dark: bool) -> alt.Color:
    scale = alt.Scale(type="log", domain=[_SMALLEST_MASS, 1], range=ramp(dark), clamp=True)
    key = legend("share of the exact mass", format=".2~%", values=[1e-4, 1e-3, 1e-2, 1e-1, 1], gradientLength=240)
    return alt.Color("mass:Q", scale=scale, legend=key)


def _boundary(at: int, dark: bool) -> alt.Chart:
    """A rule where the current region begins."""
    rule = alt.Chart(pd.DataFrame({"at": [at]})).mark_rule(color="#dfe6ee" if dark else "#30363d", strokeDash=[4, 3])
    return rule.encode(x="at:Q")


def mass_chart(
    frame: pd.DataFrame, begin: int, end: int, past_blocks: int, block_size: int, *, dark: bool
) -> alt.LayerChart:
    """One head: which blocks hold its exact mass, query block by query block."""
    return _head_panel(frame, _mass_color(dark), (begin, end), past_blocks, block_size, dark, more=24)


def kinds_chart(
    frame: pd.DataFrame, begin: int, end: int, past_blocks: int, block_size: int, *, dark: bool
) -> alt.LayerChart:
    """One head: what its selector keeps, and by which rule, on the same axes as `mass_chart`."""
    kinds = alt.Color("kind:N", scale=kind_scale(dark), legend=legend())
    return _head_panel(frame, kinds, (begin, end), past_blocks, block_size, dark)


def _head_panel(
    frame: pd.DataFrame,
    color: alt.Color,
    shown: tuple[int, int],
    past_blocks: int,
    block_size: int,
    dark: bool,
    more: int = 0,
) -> alt.LayerChart:
    begin, end = shown
    rows = int(frame["query_block"].max()) + 1
    cells = (
        alt.Chart(frame)
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("first:Q", **_kv_axis(begin, end, f"KV block of {block_size} tokens")),
            x2="end:Q",
            y=alt.Y("query_block:O", title="query block", axis=alt.Axis(labelOverlap=True, minExtent=24)),
            color=color,
            tooltip=[
                alt.Tooltip("query_block:O", title="query block"),
                alt.Tooltip("queries:N", title="queries"),
                alt.Tooltip("kv_block:N", title="KV block"),
                _TOKENS,
                alt.Tooltip("mass:Q", title="share of mass", format=".3%"),
                alt.Tooltip("kind:N", title="kind"),
                alt.Tooltip("in_table:N", title="in the table's row"),
                alt.Tooltip("selected_by:N", title="heads that selected it"),
            ],
        )
    )
    layers = [cells, _boundary(past_blocks, dark)] if begin < past_blocks < end else [cells]
    return alt.layer(*layers).properties(height=_AROUND + more + max(130, min(280, 22 * rows)))


def heads_chart(frame: pd.DataFrame, chosen: int, blocks: int, *, by_mass: bool, dark: bool) -> alt.Chart:
    """Every head as a strip of its query blocks; a click chooses one (selection "pick", field head)."""
    rows = int(frame["query_block"].max()) + 1
    heads = int(frame["head"].max()) + 1
    gap = max(1, rows // 4)
    placed = frame.assign(
        top=frame["head"] * (rows + gap) + frame["query_block"],
        bottom=frame["head"] * (rows + gap) + frame["query_block"] + 1,
    )
    middles = [h * (rows + gap) + rows / 2 for h in range(heads)]
    label = f"'head ' + format(floor(datum.value / {rows + gap}), 'd')"
    axis = alt.Axis(values=middles, labelExpr=label, title=None, grid=False, ticks=False, domain=False)
    pick = alt.selection_point(name="pick", fields=["head"], on="click", empty=False, value=[{"head": chosen}])
    color = _mass_color(dark) if by_mass else alt.Color("kind:N", scale=kind_scale(dark), legend=legend())
    return (
        alt.Chart(placed)
        .mark_rect(strokeWidth=0, cursor="pointer")
        .encode(
            x=alt.X("first:Q", **_kv_axis(0, blocks)),
            x2="end:Q",
            y=alt.Y("top:Q", scale=alt.Scale(reverse=True, nice=False, domain=[0, heads * (rows + gap)]), axis=axis),
            y2="bottom:Q",
            color=color,
            opacity=alt.condition(pick, alt.value(1.0), alt.value(0.72)),
            tooltip=[
                alt.Tooltip("head:O"),
                alt.Tooltip("query_block:O", title="query block"),
                alt.Tooltip("first:Q", title="first KV block"),
                alt.Tooltip("end:Q", title="up to block"),
                alt.Tooltip("kept:Q", title="blocks selected"),
                alt.Tooltip("mass:Q", title="share of mass", format=".3%"),
                alt.Tooltip("kind:N"),
            ],
        )
        .add_params(pick)
        .properties(height=_AROUND + max(160, min(760, heads * 44)))
    )


def profile_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Stacked bars: in which part of the context each head's mass lies."""
    order = ["sink", "far past", "window", "current region"]
    scale = alt.Scale(domain=order, range=[ORANGE, _blue(dark), _sky(dark), GREEN])
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            y=alt.Y("head:O", title="query head"),
            x=alt.X(
                "share:Q",
                title="share of the exact attention mass",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1]),
            ),
            color=alt.Color("region:N", scale=scale, legend=legend()),
            order="order:Q",
            tooltip=[
                "head:O",
                "region:N",
                alt.Tooltip("share:Q", format=".2%"),
                alt.Tooltip("blocks for 90 %:Q", format=".1f", title="blocks that hold 90 %"),
            ],
        )
        .properties(height=_AROUND + 24 * frame["head"].nunique())
    )


STAGES = {
    "members": "1  Masks of the members",
    "heads": "2  United over the query blocks, each head for itself",
    "group": "3  United over the heads, with the current region: the row of the block table",
}


def cascade_chart(frame: pd.DataFrame, stage: str, blocks: int, past_blocks: int, *, dark: bool) -> alt.LayerChart:
    """One stage of the cascade (a name of `STAGES`): a line per member, per head, or for the row that all share."""
    part = frame[frame["stage"] == stage]
    lines = list(dict.fromkeys(part["line"]))
    step = {"members": 11 if len(lines) > 16 else 15, "heads": 22, "group": 30}[stage]
    shown = stage == "members"  # one legend, above all three
    rows = pd.DataFrame({"line": lines, "first": 0, "end": blocks})
    axis = alt.Axis(labelLimit=150, labelOverlap=True, minExtent=130, ticks=False, domain=False)
    y = alt.Y("line:N", sort=lines, title=None, axis=axis)
    x = alt.X("first:Q", **_kv_axis(0, blocks, "KV block" if stage == "group" else None))
    back = alt.Chart(rows).mark_rect(color=quiet(dark), height={"band": 0.88}).encode(x=x, x2="end:Q", y=y)
    bits = (
        alt.Chart(part)
        .mark_rect(strokeWidth=0, height={"band": 0.88})
        .encode(
            x=x,
            x2="end:Q",
            y=y,
            color=alt.Color("share:N", scale=share_scale(dark), legend=legend("asked for by") if shown else None),
            tooltip=[
                alt.Tooltip("line:N", title="line"),
                alt.Tooltip("first:Q", title="KV block"),
                _TOKENS,
                alt.Tooltip("asked_by:N", title="heads that asked for it"),
            ],
        )
    )
    layers = [back, bits, _boundary(past_blocks, dark)] if past_blocks else [back, bits]
    around = {"members": 95, "heads": 40, "group": 60}[stage]
    return alt.layer(*layers).properties(height=around + step * len(lines))


def responsibility_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Per head of a row, how many of its blocks it shares, asked for alone, and was given unasked."""
    names = {"shared": _blue(dark), "alone": RED, "given, not asked for": quiet(dark)}
    long = frame.melt("head", list(names), "what", "blocks")
    long["order"] = long["what"].map({name: n for n, name in enumerate(names)})
    return (
        alt.Chart(long)
        .mark_bar()
        .encode(
            y=alt.Y("head:O", title="query head"),
            x=alt.X("blocks:Q", title="past blocks of the row", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("what:N", scale=alt.Scale(domain=list(names), range=list(names.values())), legend=legend()),
            order="order:Q",
            tooltip=["head:O", "what:N", "blocks:Q"],
        )
        .properties(height=_AROUND + 20 + 34 * len(frame))
    )


def sharing_chart(frame: pd.DataFrame, heads: int, span: str, *, dark: bool) -> alt.LayerChart:
    """Past density for every group size and span; the current choice is outlined."""
    spans = list(dict.fromkeys(frame["span"]))
    x = alt.X("span:N", sort=spans, title="query blocks per span", axis=alt.Axis(labelAngle=0))
    y = alt.Y("heads:N", sort=list(dict.fromkeys(frame["heads"])), title="heads per group")
    top = max(0.05, float(frame["density"].max()))
    scale = alt.Scale(domain=[0, top], range=ramp(dark)[:5])
    cells = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color("density:Q", scale=scale, legend=None),
            tooltip=[
                alt.Tooltip("heads:N", title="heads per group"),
                alt.Tooltip("span:N", title="query blocks per span"),
                alt.Tooltip("density:Q", format=".2%", title="past density"),
                alt.Tooltip("growth:Q", format=".2f", title="times the masks' own"),
            ],
        )
    )
    dark_text, light_text = ("#12161c", "#f2f5f8") if dark else ("#ffffff", "#1c2530")
    text = (
        alt.Chart(frame)
        .mark_text(fontSize=13)
        .encode(
            x=x,
            y=y,
            text=alt.Text("density:Q", format=".1%"),
            color=alt.condition(f"datum.density > {top * 0.55}", alt.value(dark_text), alt.value(light_text)),
        )
    )
    here = frame[(frame["heads_per_group"] == heads) & (frame["span"] == span)]
    frame_mark = alt.Chart(here).mark_rect(fill=None, stroke=_blue(dark), strokeWidth=3).encode(x=x, y=y)
    return (cells + text + frame_mark).properties(height=70 + 46 * frame["heads"].nunique())


def table_chart(frame: pd.DataFrame, chosen: int | None, *, dark: bool) -> alt.LayerChart:
    """A row of the block table as it is walked; a click chooses an entry (selection "entry", field block)."""
    pick = alt.selection_point(name="entry", fields=["block"], on="click", empty=False)
    frame = frame.assign(end=frame["entry"] + 1)
    x = alt.X("entry:Q", **_kv_axis(0, len(frame), "entry of the row, in the order in which it is walked"))
    bars = (
        alt.Chart(frame.assign(shown=frame["needed_by_pairs"].clip(lower=0.15)))
        .mark_rect(cursor="pointer")
        .encode(
            x=x,
            x2="end:Q",
            y=alt.Y("shown:Q", title="(head, query block) pairs", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("share:N", scale=share_scale(dark), legend=legend("asked for by")),
            stroke=alt.condition(pick, alt.value("#ffffff" if dark else "#000000"), alt.value(None)),
            tooltip=[
                alt.Tooltip("entry:Q"),
                alt.Tooltip("block:Q", title="KV block"),
                _TOKENS,
                alt.Tooltip("needed_by_pairs:Q", title="pairs that selected it"),
                alt.Tooltip("asked_by:N", title="heads"),
            ],
        )
        .add_params(pick)
    )
    layers = [bars]
    if chosen is not None:
        here = frame[frame["block"] == chosen]
        marker = alt.Chart(here).mark_rule(color=PURPLE, strokeWidth=2).encode(x="middle:Q")
        layers.append(marker.transform_calculate(middle="datum.entry + 0.5"))
    return alt.layer(*layers).properties(height=_AROUND + 150)


def pages_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """The physical cache, a cell per page."""
    lines = int(frame["line"].max()) + 1
    scale = alt.Scale(domain=list(PAGE_KINDS[1:]), range=[quiet(dark), _blue(dark), GREEN])
    return (
        alt.Chart(frame[frame["kind"] != PAGE_KINDS[0]])
        .mark_rect(strokeWidth=1, stroke="#12161c" if dark else "#ffffff")
        .encode(
            x=alt.X("column:O", axis=None),
            y=alt.Y("line:O", axis=None),
            color=alt.Color("kind:N", scale=scale, legend=legend()),
            tooltip=[
                alt.Tooltip("page:Q", title="physical page"),
                alt.Tooltip("page_of_request:Q", title="page of the request"),
                _TOKENS,
                alt.Tooltip("readers:Q", title="(head, query block) pairs that read it"),
            ],
        )
        .properties(height=50 + max(40, min(420, 16 * lines)))
    )


def difference_chart(frame: pd.DataFrame, past_blocks: int, query_blocks: int, *, dark: bool) -> alt.Chart:
    """What the rows of one head list under A, under B, or under both."""
    scale = alt.Scale(domain=[BOTH, ONLY_A, ONLY_B], range=["#8a94a0", _blue(dark), ORANGE])
    rows = list(range(query_blocks))
    return (
        alt.Chart(frame)
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("first:Q", **_kv_axis(0, max(1, past_blocks), "KV block of the past")),
            x2="end:Q",
            y=alt.Y(
                "query_block:O", title="query block", scale=alt.Scale(domain=rows), axis=alt.Axis(labelOverlap=True)
            ),
            color=alt.Color("where:N", scale=scale, legend=legend()),
            tooltip=["where:N", "query_block:O", "queries:N", alt.Tooltip("first:Q", title="KV block"), _TOKENS],
        )
        .properties(height=_AROUND + max(110, min(280, 22 * query_blocks)))
    )


def methods_scale(names: Sequence[str], dark: bool) -> alt.Scale:
    """One colour and one shape per method or selector, the same on every page."""
    known = {
        "block table": _blue(dark),
        "FlashPrefill": _blue(dark),
        "XAttention": GREEN,
        "Oracle": PURPLE,
        "QUOKA": RED,
        "Dense": "#8a94a0",
    }
    return alt.Scale(domain=list(names), range=[known[name] for name in names])
