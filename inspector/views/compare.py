"""Compare: two settings on the same chunk, and the difference of their tables."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from inspector import cached, charts, cost, frames, model, page, snippets
from inspector.model import Setting
from inspector.sidebar import FILE, SAMPLE, WORKLOAD, View, ask_selector, ask_sharing
from inspector.sources import Synthetic


def show(view: View) -> None:
    a = view.setting
    with st.container(border=True):
        st.markdown("**Setting B.** Setting A is the one in the sidebar; block sizes are the same for both.")
        left, right = st.columns(2, gap="large")
        kind = WORKLOAD if isinstance(view.source, Synthetic) else FILE if view.source.path else SAMPLE
        with left:
            selector = ask_selector(kind, "b_")
        with right:
            b = ask_sharing(selector, view.about.group, view.place, kind, "b_")
    readings = [cached.reading(*view.at, setting) for setting in (a, b)]
    numbers = pd.DataFrame([_numbers(view, setting) for setting in (a, b)], index=["A", "B"])
    for column, name in zip(st.columns(len(numbers.columns)), numbers.columns, strict=True):
        here, there = numbers[name]
        text = "{:.2%}" if name.endswith("%") else "{:,.4g}"
        column.metric(
            f"{name.removesuffix(', %')}, B",
            text.format(there),
            f"A: {text.format(here)}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )

    st.subheader(f"Head {view.head}: what its rows list of the past")
    found = model.difference(*readings, view.head)
    past = readings[0].past_blocks
    both, only_a, only_b = (int(bits.sum()) for bits in (found.both, found.only_a, found.only_b))
    if not past:
        page.need_past(view)
    elif not (only_a or only_b):
        st.success(f"The tables are the same for head {view.head}: {both:,} entries over its query blocks.")
    else:
        st.markdown(
            f"Over its query blocks, **{both:,}** entries are in both tables, **{only_a:,}** only in A "
            f"and **{only_b:,}** only in B."
        )
    if past:
        frame = frames.difference_frame(found, view.place.start, view.place.stop)
        page.chart(charts.difference_chart(frame, past, readings[0].query_blocks, dark=view.dark))

        figure = page.drawn("difference_figure", found, past, view.head)
        page.downloads("difference", figure, lambda: frame)

    st.subheader("Every head")
    heads = frames.compare_frame(*readings, *(cached.judged(*view.at, setting) for setting in (a, b)))
    percent = st.column_config.NumberColumn(format="percent")
    st.dataframe(
        heads,
        hide_index=True,
        column_config={name: percent for name in heads.columns if "error" not in name and name != "head"},
        height=min(400, 38 + 35 * len(heads)),
    )
    with st.expander("Python that gives these tables", icon=":material/code:"):
        for name, setting in (("A", a), ("B", b)):
            st.markdown(f"**{name}**")
            st.code(snippets.python_call(*view.at, setting, "table"), language="python")


def _numbers(view: View, setting: Setting) -> dict[str, float]:
    """What the page compares, over all heads."""
    reading = cached.reading(*view.at, setting)
    judged = cached.judged(*view.at, setting)
    work = cost.work(cached.step(*view.at), reading)
    return {
        "Past density, %": float(judged.density.mean()),
        "Bytes of dense, %": work.table_bytes / work.dense_bytes,
        "Mean recall, %": float(judged.recall.mean()),
        "Worst recall, %": float(judged.recall.min()),
        "Output error": float(judged.error.mean()),
    }


page.render(show)
