"""Union: what sharing one row costs, step by step, and who is responsible for each block."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, page
from inspector.choices import WHOLE
from inspector.model import GroupUnion
from inspector.page import Card
from inspector.sidebar import View
from inspector.spans import ask_row


def show(view: View) -> None:
    if not page.need_past(view):
        return
    reading = cached.reading(*view.at, view.setting)
    steps = reading.cascade.densities()
    names = {
        "mask": "Masks",
        "query_block_union": "+ query-block union",
        "sub_group_union": f"+ union of {page.count(view.setting.heads_per_group, 'head')}",
        "group_union": f"full KV group, {page.count(reading.group, 'head')}",
    }
    page.cards(
        *(
            Card(
                label,
                f"{steps[name]:.1%}",
                f"{steps[name] / steps['mask']:.2f} times the masks" if name != "mask" and steps["mask"] else None,
            )
            for name, label in names.items()
        )
    )
    st.caption("Share of the past that a (head, query block) pair reads, all heads of the layer.")

    st.subheader("From masks to the table")
    union, by, span = ask_row(reading, view.head)
    st.markdown(_price(union, by))
    members = frames.members_frame(union, reading, by)
    for stage, title in charts.STAGES.items():
        st.markdown(f"**{title}**")
        chart = charts.cascade_chart(members, stage, reading.blocks, reading.past_blocks, by, dark=view.dark)
        st.altair_chart(chart, width="stretch")
    page.picture(f"union-row-{union.row}", None, page.drawn("figures.cascade_figure", union, reading, by), members)

    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Who is responsible?")
        responsible = frames.responsibility_frame(union, by)
        chart = charts.responsibility_chart(responsible, dark=view.dark)
        figure = page.drawn("figures.responsibility_figure", responsible)
        page.picture("responsible", chart, figure, responsible)
        st.dataframe(responsible, hide_index=True)
    with right:
        st.subheader("What would another grouping cost?")
        costs = cached.sharing_costs(*view.at, view.setting)
        sharing = frames.sharing_frame(costs, reading.query_blocks)
        whole = WHOLE if reading.span == reading.query_blocks else str(reading.span)
        chart = charts.sharing_chart(sharing, view.setting.heads_per_group, whole, dark=view.dark)
        page.picture("sharing", chart, page.drawn("figures.sharing_figure", costs), sharing)
        st.caption(
            "Past density of the table for the same masks; the outlined cell is the current grouping. The first cell "
            "is the masks themselves; to the right query blocks are united, downwards heads."
        )
    page.python(view, "density", "row", head=view.head, row_span=span, by=by)


def _price(union: GroupUnion, by: str) -> str:
    """What the row's members pay for sharing it."""
    past = int((union.listed & union.past).sum())
    heads = f"heads {union.heads.start} to {union.heads.stop - 1}" if len(union.heads) > 1 else f"head {union.heads[0]}"
    blocks = page.count(len(union.query_blocks), "query block")
    if not union.sharers:
        return f"Query block {union.query_blocks[0]} of {heads} has the row to itself: it lists {past} past blocks."
    alone = int(union.alone(by).sum())
    return (
        f"The row of {heads} over {blocks} lists {past} past blocks; **{alone}** of them only one "
        f"{by.removesuffix('s')} asked for. That is the price of sharing the row."
    )


page.render(show)
