"""Compare: two settings on the same chunk, and the difference of their tables."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, cost, frames, model, page, quality_charts, quality_frames
from inspector.choices import ask_selector, ask_sharing
from inspector.model import Reading, Setting
from inspector.page import Card
from inspector.sidebar import View


def show(view: View) -> None:
    a = view.setting
    with st.container(border=True):
        st.markdown("**Setting B.** Setting A is the one in the sidebar; block sizes are the same for both.")
        left, right = st.columns(2, gap="large")
        with left:
            selector, weights = ask_selector(view.subject, "b_")
        with right:
            b = ask_sharing(selector, view.subject, "b_")
    readings = cached.reading(*view.at, a), cached.reading(*view.at, b)
    here, there = _numbers(view, a), _numbers(view, b)
    page.cards(*(Card(f"{name}, B", there[name], f"A: {here[name]}") for name in here))
    _show_difference(view, *readings)

    st.subheader("Every head")
    heads = quality_frames.compare_frame(*readings, *(cached.judged(*view.at, setting) for setting in (a, b)))
    moves = quality_frames.moves_frame(heads)
    if view.place.start:
        chart = quality_charts.moves_chart(moves, dark=view.dark)
        page.picture("compare-heads", chart, page.drawn("quality_figures.moves_figure", moves), heads)
    st.dataframe(
        heads,
        hide_index=True,
        column_config={name: page.PERCENT for name in heads.columns if "error" not in name and name != "head"},
        height=min(400, 38 + 35 * len(heads)),
    )
    page.python(view, "difference", head=view.head, other=b, other_weights=weights)


def _numbers(view: View, setting: Setting) -> dict[str, str]:
    """What the page compares, over all heads."""
    judged = cached.judged(*view.at, setting)
    work = cost.work(cached.step(*view.at), cached.reading(*view.at, setting))
    return {
        "Past density": f"{judged.density.mean():.2%}",
        "Bytes of dense": f"{work.table_bytes / work.dense_bytes:.2%}",
        "Mean recall": f"{judged.recall.mean():.2%}",
        "Worst recall": f"{judged.recall.min():.2%}",
        "Output error": f"{judged.error.mean():.4f}",
    }


def _show_difference(view: View, a: Reading, b: Reading) -> None:
    """What the rows of one head list under A, under B, or under both."""
    st.subheader(f"Head {view.head}: what its rows list of the past")
    if not page.need_past(view):
        return
    found = model.difference(a, b, view.head)
    both, only_a, only_b = (int(bits.sum()) for bits in (found.both, found.only_a, found.only_b))
    if only_a or only_b:
        st.markdown(
            f"Over its query blocks, **{both:,}** entries are in both tables, **{only_a:,}** only in A "
            f"and **{only_b:,}** only in B."
        )
    else:
        st.success(f"The tables are the same for head {view.head}: {both:,} entries over its query blocks.")
    frame = frames.difference_frame(found, view.place.start, view.place.stop)
    chart = charts.difference_chart(frame, a.past_blocks, a.query_blocks, dark=view.dark)
    figure = page.drawn("figures.difference_figure", found, a.past_blocks, view.head)
    page.picture("difference", chart, figure, frame)


page.render(show)
