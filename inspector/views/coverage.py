"""Coverage against QUOKA: what each query is given of its exact attention, at the same budget."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from inspector import cached, frames, page, quality_charts
from inspector.recall import Observed, Quoka
from inspector.sidebar import BOUND, PARAMETERS, View, parameter, with_selector

EQUAL, PAPER = "same budget", "QUOKA's 25 %"


def show(view: View) -> None:
    if not page.need_past(view):
        return
    budget = st.segmented_control(
        "Budget of QUOKA",
        [EQUAL, PAPER],
        default=EQUAL,
        key="budget",
        required=True,
        **BOUND,
        help="The same: as many past tokens per KV head as the block table gives to a query on average.",
    )
    observed, ours = cached.observed(*view.at), cached.judged(*view.at, view.setting)
    quoka = cached.quoka(*view.at, view.setting) if budget == EQUAL else cached.quoka_by_ratio(*view.at, 0.25)
    head = view.head
    cards = st.columns(4)
    for column, (label, judged) in zip(cards[::2], (("Block table", ours), ("QUOKA", quoka.judged)), strict=True):
        column.metric(
            f"{label}: mean recall",
            f"{judged.recall.mean():.2%}",
            f"{judged.low():,} of {judged.recall.size:,} under 90 %",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
    for column, (label, judged) in zip(cards[1::2], (("Block table", ours), ("QUOKA", quoka.judged)), strict=True):
        tokens = judged.tokens.mean()
        column.metric(
            f"{label}: mean output error",
            f"{judged.error.mean():.4f}",
            f"{tokens:,.0f} past tokens given",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
    if not observed.whole:
        st.caption(
            f"Judged at {len(observed.position):,} of {len(observed.step.q):,} queries, "
            f"in {len(observed.runs)} runs; at this length all of them take too long."
        )

    st.subheader(f"Head {head}, query by query")
    recall = frames.recall_frame(observed, ours, quoka, head, view.about.text)
    errors = frames.error_frame(ours, quoka)
    page.chart(quality_charts.recall_chart(recall, dark=view.dark))
    page.downloads(f"recall-head-{head}", page.drawn("recall_figure", recall, errors, head), lambda: recall)
    for tab, column in zip(
        st.tabs(["Worst queries of the block table", "Worst of QUOKA"]), ("table", "QUOKA"), strict=True
    ):
        with tab:
            _worst(recall.sort_values(column))

    _show_unsampled(view, observed, quoka)
    st.subheader("Every head along the chunk")
    heat = frames.recall_heat_frame(observed, ours, quoka)
    for column, method in zip(st.columns(2, gap="large"), dict.fromkeys(heat["method"]), strict=True):
        column.markdown(f"**{method}**")
        with column:
            page.chart(quality_charts.recall_heat_chart(heat, method, dark=view.dark))
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Output error per head")
        page.chart(quality_charts.error_chart(errors, dark=view.dark))
        page.downloads("errors", page.drawn("recall_figure", recall, errors, head), lambda: errors)
    with right:
        st.subheader("Density against error")
        _show_scatter(view, quoka)
    page.python(view, "recall")


def _worst(recall: pd.DataFrame) -> None:
    percent = st.column_config.NumberColumn(format="percent")
    columns = ["query", "table", "QUOKA", "QUOKA sampled it", "text"]
    st.dataframe(
        recall[columns if recall["text"].any() else columns[:-1]].head(8),
        hide_index=True,
        column_config={"table": percent, "QUOKA": percent},
    )


def _show_unsampled(view: View, observed: Observed, quoka: Quoka) -> None:
    """The queries that had no voice in QUOKA, and how they fare."""
    st.subheader("Whom QUOKA never asked")
    group = slice(view.kv_head * view.about.group, (view.kv_head + 1) * view.about.group)
    silent = ~quoka.sampled[:, group].any(1)
    of_head = quoka.sampled[observed.position, view.head]
    recall = quoka.judged.recall[:, view.head]
    text = (
        f"QUOKA asked {quoka.sampled[:, view.head].mean():.0%} of this chunk's queries of head {view.head}. For "
        f"**{silent.sum():,} of {len(silent):,}** tokens no head of KV head {view.kv_head} had a query in the sample: "
        "what they look for is kept only if others look for it too."
    )
    if of_head.any() and not of_head.all():
        text += (
            f" Mean recall of the queries that were asked: {recall[of_head].mean():.2%}, of the others: "
            f"{recall[~of_head].mean():.2%}."
        )
    st.markdown(text)
    frame = frames.sampled_frame(quoka, observed.step.start, group, view.about.text)
    page.chart(quality_charts.sampled_chart(frame, dark=view.dark))
    page.downloads("quoka-sampled", page.drawn("sampled_figure", frame), lambda: frame)


def _show_scatter(view: View, quoka: Quoka) -> None:
    """The other selectors with their own settings from the address, in the same grouping."""
    current = type(view.setting.selector).__name__
    short = view.place.stop <= 16384
    names = st.multiselect(
        "Selectors",
        list(PARAMETERS),
        [name for name in PARAMETERS if short or name != "Oracle"],
        key="among",
        **BOUND,
        help="Oracle computes the exact attention first: slow on long prompts.",
    )
    judged = {}
    for name in names:
        other = view.setting if name == current else with_selector(view.setting, name, parameter(name))
        judged[name] = cached.judged(*view.at, other)
    judged["QUOKA"] = quoka.judged
    frame = frames.scatter_frame(judged)
    page.chart(quality_charts.scatter_chart(frame, dark=view.dark))
    st.caption("One point per head. Each selector with its own parameter, sink and window as in the sidebar.")
    page.downloads("scatter", page.drawn("scatter_figure", frame), lambda: frame)


page.render(show)
