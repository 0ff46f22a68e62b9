"""Tables of what is read in, interactive Vega-Lite charts out. Pure functions; `dark` says which theme is shown."""

from __future__ import annotations

import altair as alt
import pandas as pd

from inspector.cost import PAGE_KINDS
from inspector.frames import PROMPT_PARTS
from inspector.style import (
    GREEN,
    GREY,
    ORANGE,
    PADDING,
    PURPLE,
    RED,
    blue,
    difference_scale,
    ink,
    kind_scale,
    kv_axis,
    legend,
    mass_color,
    paper,
    quiet,
    ramp,
    share_scale,
    sky,
)

_AROUND = 100  # of a chart's height, for its legend and its axis: Streamlit fits everything into the height given
_TOKENS = alt.Tooltip("tokens:N", title="tokens")
_QUERY_BLOCK = alt.Tooltip("query_block:O", title="query block")


def prompt_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """The prompt as a strip of chunks: what is past, what is being prefilled, what is still to come."""
    tokens = int(frame["end"].max())
    scale = alt.Scale(domain=list(PROMPT_PARTS), range=[GREY, GREEN, quiet(dark)])
    axis = alt.Axis(format=",d", tickCount=8, grid=False)
    return (
        alt.Chart(frame.assign(lane="prompt"))
        .mark_rect(stroke=paper(dark), strokeWidth=1)
        .encode(
            x=alt.X("first:Q", title="token", scale=alt.Scale(domain=[0, tokens], nice=False), axis=axis),
            x2="end:Q",
            y=alt.Y("lane:N", axis=None),
            color=alt.Color("state:N", scale=scale, legend=legend()),
            tooltip=[alt.Tooltip("first:Q", format=",d"), alt.Tooltip("end:Q", format=",d"), "state:N"],
        )
        .properties(padding=PADDING, height=_AROUND + 56)
    )


def profile_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Stacked bars: in which part of the context each head's mass lies."""
    order = ["sink", "far past", "window", "current region"]
    scale = alt.Scale(domain=order, range=[ORANGE, blue(dark), sky(dark), GREEN])
    axis = alt.Axis(format="%", tickCount=10)
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            y=alt.Y("head:O", title="query head"),
            x=alt.X("share:Q", title="share of the exact attention mass", axis=axis, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("region:N", scale=scale, legend=legend()),
            order="order:Q",
            tooltip=[
                "head:O",
                "region:N",
                alt.Tooltip("share:Q", format=".2%"),
                alt.Tooltip("blocks for 90 %:Q", format=".1f", title="blocks that hold 90 %"),
            ],
        )
        .properties(padding=PADDING, height=_AROUND + 24 * frame["head"].nunique())
    )


def _boundary(at: int, dark: bool) -> alt.Chart:
    """A rule where the current region begins."""
    rule = alt.Chart(pd.DataFrame({"at": [at]})).mark_rule(color="#dfe6ee" if dark else "#30363d", strokeDash=[4, 3])
    return rule.encode(x="at:Q")


def mass_chart(
    frame: pd.DataFrame, begin: int, end: int, past_blocks: int, block_size: int, *, dark: bool
) -> alt.LayerChart:
    """One head: which blocks hold its exact mass, query block by query block."""
    return _head_panel(frame, mass_color(dark), (begin, end), past_blocks, block_size, dark, more=24)


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
            x=alt.X("first:Q", **kv_axis(begin, end, f"KV block of {block_size} tokens")),
            x2="end:Q",
            y=alt.Y("query_block:O", title="query block", axis=alt.Axis(labelOverlap=True, minExtent=24)),
            color=color,
            tooltip=[
                _QUERY_BLOCK,
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
    return alt.layer(*layers).properties(padding=PADDING, height=_AROUND + more + max(130, min(280, 22 * rows)))


def heads_chart(
    frame: pd.DataFrame, chosen: int, reading_size: tuple[int, int, int], *, group: int, by_mass: bool, dark: bool
) -> alt.LayerChart:
    """Every head as a strip of its query blocks, in a grid; a click chooses one (selection "pick", field head).

    A column of the grid holds whole KV groups, so that the blocks which a group's heads share stand above each other.

    Args:
        frame: of `frames.heads_frame`.
        reading_size: KV blocks, tokens per block, and tokens of the request.
        group: G, query heads per KV head.
    """
    blocks, block_size, stop = reading_size
    heads, rows = int(frame["head"].max()) + 1, int(frame["query_block"].max()) + 1
    groups = heads // group
    columns = min(2, groups)
    lines = -(-groups // columns) * group
    high, wide = rows + max(2.0, 0.6 * rows), blocks * 1.06  # of a cell of the grid, in query blocks and KV blocks
    strips = pd.DataFrame({"head": range(heads)})
    strips["left"] = strips["head"] // lines * wide
    strips["top"] = strips["head"] % lines * high + (high - rows)
    strips["right"], strips["bottom"] = strips["left"] + blocks, strips["top"] + rows
    strips["name"] = [f"head {h}" for h in strips["head"]]
    placed = frame.merge(strips[["head", "left", "top"]], on="head")
    placed["x"], placed["x2"] = placed["left"] + placed["first"], placed["left"] + placed["end"]
    placed["y"] = placed["top"] + placed["query_block"]
    placed["y2"] = placed["y"] + 1
    x = alt.X("x:Q", scale=alt.Scale(domain=[0, columns * wide - 0.06 * blocks], nice=False), axis=None)
    y = alt.Y("y:Q", scale=alt.Scale(reverse=True, nice=False, domain=[0, lines * high]), axis=None)
    pick = alt.selection_point(name="pick", fields=["head"], on="click", empty=False, value=[{"head": chosen}])
    color = mass_color(dark) if by_mass else alt.Color("kind:N", scale=kind_scale(dark), legend=legend())
    cells = (
        alt.Chart(placed.drop(columns=["left", "top"]))
        .transform_calculate(
            tokens=f"format(datum.first * {block_size}, ',') + ' to ' "
            f"+ format(min(datum.end * {block_size}, {stop}) - 1, ',')",
            blocks="datum.end - datum.first > 1 ? datum.first + ' to ' + (datum.end - 1) : datum.first",
        )
        .mark_rect(strokeWidth=0, cursor="pointer")
        .encode(
            x=x,
            x2="x2:Q",
            y=y,
            y2="y2:Q",
            color=color,
            tooltip=[
                alt.Tooltip("head:O"),
                _QUERY_BLOCK,
                alt.Tooltip("blocks:N", title="KV blocks"),
                _TOKENS,
                alt.Tooltip("mass:Q", title="share of mass", format=".3%"),
                alt.Tooltip("kind:N", title="kind"),
                alt.Tooltip("kept:Q", title="blocks that it selected"),
                alt.Tooltip("selected_by:N", title="heads that selected some"),
            ],
        )
        .add_params(pick)
    )
    names = (
        alt.Chart(strips)
        .mark_text(align="left", baseline="bottom", dy=-2, fontSize=11, color="#9aa5b1" if dark else "#5a6673")
        .encode(x="left:Q", y="top:Q", text="name:N")
    )
    frame_mark = (
        alt.Chart(strips[strips["head"] == chosen])
        .mark_rect(fill=None, stroke=ink(dark), strokeWidth=2)
        .encode(x="left:Q", x2="right:Q", y="top:Q", y2="bottom:Q")
    )
    return (cells + names + frame_mark).properties(
        padding=PADDING, height=60 + max(150, min(1600, lines * (20 + min(56, 7 * rows))))
    )


STAGES = {
    "members": "1  Masks of the members",
    "heads": "2  United over the query blocks, each head for itself",
    "group": "3  United over the heads, with the current region: the row",
    "table": "4  The block table: the row's ids, ascending and packed",
}


def cascade_chart(
    frame: pd.DataFrame, stage: str, blocks: int, past_blocks: int, by: str, *, dark: bool
) -> alt.LayerChart:
    """One stage of the cascade (a name of `STAGES`): a line per member, per head, for the row, or for its entries."""
    part = frame[frame["stage"] == stage]
    lines = list(dict.fromkeys(part["line"]))
    step = {"members": 11 if len(lines) > 16 else 15, "heads": 22}.get(stage, 28)
    shown = stage == "members"  # one legend, above all four
    rows = pd.DataFrame({"line": lines, "first": 0, "end": blocks})
    axis = alt.Axis(labelLimit=150, labelOverlap=True, minExtent=130, ticks=False, domain=False)
    y = alt.Y("line:N", sort=lines, title=None, axis=axis)
    title = {"group": "KV block", "table": "entry of the table"}.get(stage)
    x = alt.X("first:Q", **kv_axis(0, blocks, title))
    back = alt.Chart(rows).mark_rect(color=quiet(dark), height={"band": 0.88}).encode(x=x, x2="end:Q", y=y)
    key = legend("asked for by") if shown else None
    bits = (
        alt.Chart(part)
        .mark_rect(strokeWidth=0, height={"band": 0.88})
        .encode(
            x=x,
            x2="end:Q",
            y=y,
            color=alt.Color("share:N", scale=share_scale(by, dark), legend=key),
            tooltip=[
                alt.Tooltip("line:N", title="line"),
                *([alt.Tooltip("first:Q", title="entry")] if stage == "table" else []),
                alt.Tooltip("block:Q", title="KV block"),
                _TOKENS,
                alt.Tooltip("heads:N", title="heads that asked for it"),
                alt.Tooltip("query_blocks:N", title="query blocks that asked for it"),
            ],
        )
    )
    layers = [back, bits, _boundary(past_blocks, dark)] if past_blocks and stage != "table" else [back, bits]
    around = {"members": 95, "heads": 40}.get(stage, 58)
    return alt.layer(*layers).properties(padding=PADDING, height=around + step * len(lines))


def responsibility_chart(frame: pd.DataFrame, *, dark: bool) -> alt.Chart:
    """Per head (or query block) of a row, how many of its blocks it shares, asked for alone, and was given unasked."""
    names = {"shared": blue(dark), "alone": RED, "given, not asked for": quiet(dark)}
    part = frame.columns[0]
    long = frame.melt(part, list(names), "what", "blocks")
    long["order"] = long["what"].map({name: n for n, name in enumerate(names)})
    return (
        alt.Chart(long)
        .mark_bar()
        .encode(
            y=alt.Y(f"{part}:O", title="query head" if part == "head" else part),
            x=alt.X("blocks:Q", title="past blocks of the row", axis=alt.Axis(tickMinStep=1, tickCount=8)),
            color=alt.Color("what:N", scale=alt.Scale(domain=list(names), range=list(names.values())), legend=legend()),
            order="order:Q",
            tooltip=[f"{part}:O", "what:N", "blocks:Q"],
        )
        .properties(padding=PADDING, height=_AROUND + max(70, 26 * len(frame)))
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
    frame_mark = alt.Chart(here).mark_rect(fill=None, stroke=blue(dark), strokeWidth=3).encode(x=x, y=y)
    return (cells + text + frame_mark).properties(padding=PADDING, height=60 + 46 * frame["heads"].nunique())


def table_chart(frame: pd.DataFrame, chosen: int, by: str, *, dark: bool) -> alt.LayerChart:
    """A row of the block table as it is walked; a click chooses an entry (selection "entry", field block)."""
    pick = alt.selection_point(name="entry", fields=["block"], on="click", empty=False)
    frame = frame.assign(end=frame["entry"] + 1)
    x = alt.X("entry:Q", **kv_axis(0, len(frame), "entry of the row, in the order in which it is walked"))
    y = alt.Y("needed_by_pairs:Q", title="(head, query block) pairs", axis=alt.Axis(tickMinStep=1, tickCount=5))
    bars = (
        alt.Chart(frame)
        .mark_rect(cursor="pointer", stroke=paper(dark), strokeWidth=0.5)
        .encode(
            x=x,
            x2="end:Q",
            y=y,
            y2=alt.datum(0),
            color=alt.Color("share:N", scale=share_scale(by, dark), legend=legend("asked for by")),
            tooltip=[
                alt.Tooltip("entry:Q"),
                alt.Tooltip("block:Q", title="KV block"),
                _TOKENS,
                alt.Tooltip("needed_by_pairs:Q", title="pairs that need it"),
                alt.Tooltip("heads:N", title="heads"),
                alt.Tooltip("query_blocks:N", title="query blocks"),
            ],
        )
        .add_params(pick)
    )
    here = alt.Chart(frame[frame["block"] == chosen])
    outline = here.mark_rect(fill=None, stroke=ink(dark), strokeWidth=2.5).encode(x=x, x2="end:Q", y=y, y2=alt.datum(0))
    return (bars + outline).properties(padding=PADDING, height=_AROUND + 150)


def pages_chart(frame: pd.DataFrame, *, dark: bool) -> alt.LayerChart:
    """The physical cache, a cell per page; the pages of the chosen entry are outlined."""
    lines = int(frame["line"].max()) + 1
    scale = alt.Scale(domain=list(PAGE_KINDS[1:]), range=[quiet(dark), blue(dark), GREEN])
    x, y = alt.X("column:O", axis=None), alt.Y("line:O", axis=None)
    cells = (
        alt.Chart(frame[frame["kind"] != PAGE_KINDS[0]])
        .mark_rect(strokeWidth=1, stroke=paper(dark))
        .encode(
            x=x,
            y=y,
            color=alt.Color("kind:N", scale=scale, legend=legend()),
            tooltip=[
                alt.Tooltip("page:Q", title="physical page"),
                alt.Tooltip("page_of_request:Q", title="page of the request"),
                _TOKENS,
                alt.Tooltip("readers:Q", title="(head, query block) pairs that read it"),
            ],
        )
    )
    chosen = alt.Chart(frame[frame["chosen"]]).mark_rect(fill=None, stroke=PURPLE, strokeWidth=2.5).encode(x=x, y=y)
    return (cells + chosen).properties(padding=PADDING, height=50 + max(40, min(480, 18 * lines)))


def difference_chart(frame: pd.DataFrame, past_blocks: int, query_blocks: int, *, dark: bool) -> alt.Chart:
    """What the rows of one head list under A, under B, or under both."""
    rows = list(range(query_blocks))
    y = alt.Y("query_block:O", title="query block", scale=alt.Scale(domain=rows), axis=alt.Axis(labelOverlap=True))
    return (
        alt.Chart(frame)
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("first:Q", **kv_axis(0, max(1, past_blocks), "KV block of the past")),
            x2="end:Q",
            y=y,
            color=alt.Color("where:N", scale=difference_scale(dark), legend=legend()),
            tooltip=["where:N", _QUERY_BLOCK, "queries:N", alt.Tooltip("first:Q", title="KV block"), _TOKENS],
        )
        .properties(padding=PADDING, height=_AROUND + max(110, min(280, 22 * query_blocks)))
    )
