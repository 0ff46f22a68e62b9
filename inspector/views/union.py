"""Union: what sharing one row costs, step by step, and who is responsible for each block."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, model, page
from inspector.sidebar import WHOLE, View
from inspector.spans import ask_span


def show(view: View) -> None:
    if not page.need_past(view):
        return
    reading = cached.reading(*view.at, view.setting)
    steps = reading.cascade.densities()
    names = {
        "mask": "Masks",
        "query_block_union": "+ query-block union",
        "sub_group_union": f"+ union of {view.setting.heads_per_group} heads",
        "group_union": f"full KV group, {reading.group} heads",
    }
    for column, (name, label) in zip(st.columns(4), names.items(), strict=True):
        growth = steps[name] / steps["mask"] if steps["mask"] else float("nan")
        delta = None if name == "mask" else f"{growth:.2f} times the masks"
        column.metric(
            label, f"{steps[name]:.1%}", delta, delta_color="off", delta_arrow="off", border=True, height="stretch"
        )
    st.caption("Share of the past that a (head, query block) pair reads, all heads of the layer.")

    st.subheader("From masks to one row")
    union = model.row_union(reading, view.head, ask_span(reading))
    alone = int(union.alone().sum())
    past = int((union.listed & reading.past).sum())
    st.markdown(
        f"The row of heads {union.heads.start} to {union.heads.stop - 1} lists {past} past blocks; "
        f"**{alone}** of them only one head asked for. That is the price of sharing the row."
        if len(union.heads) > 1
        else f"Head {view.head} has the row to itself and lists {past} past blocks."
    )
    members = frames.members_frame(union, reading)
    for stage, title in charts.STAGES.items():
        st.markdown(f"**{title}**")
        page.chart(charts.cascade_chart(members, stage, reading.blocks, reading.past_blocks, dark=view.dark))

    figure = page.drawn("cascade_figure", union, reading)
    page.downloads(f"union-row-{union.row}", figure, lambda: members)

    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Who is responsible?")
        responsible = frames.responsibility_frame(union)
        page.chart(charts.responsibility_chart(responsible, dark=view.dark))
        st.dataframe(responsible, hide_index=True)
    with right:
        st.subheader("What would another grouping cost?")
        costs = cached.sharing_costs(*view.at, view.setting)
        sharing = frames.sharing_frame(costs, reading.query_blocks)
        span = WHOLE if reading.span == reading.query_blocks else str(reading.span)
        page.chart(charts.sharing_chart(sharing, view.setting.heads_per_group, span, dark=view.dark))
        st.caption("Past density of the table for the same masks; the outlined cell is the current grouping.")

        sharing_figure = page.drawn("sharing_figure", costs)
        page.downloads("sharing", sharing_figure, lambda: sharing)
    page.python(view, "density")


page.render(show)
