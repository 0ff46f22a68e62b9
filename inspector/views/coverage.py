"""Coverage against QUOKA: what each query is given of its exact attention, at the same budget."""

from __future__ import annotations

import streamlit as st

from inspector import cached, page, quality_charts, quality_frames
from inspector.choices import PARAMETERS, ask_gate, ask_parameter, with_selector
from inspector.page import Card
from inspector.recall import Judged, Observed, Quoka
from inspector.sidebar import View
from inspector.widgets import BOUND, either

EQUAL, PAPER = "same budget", "QUOKA's 25 %"
ALONG, SORTED = "along the chunk", "worst first"


def show(view: View) -> None:
    if not page.need_past(view):
        return
    note = "The same: as many past tokens per KV head as the block table gives to a query on average."
    budget = either("Budget of QUOKA", "budget", [EQUAL, PAPER], EQUAL, help=note)
    observed, ours = cached.observed(*view.at), cached.judged(*view.at, view.setting)
    quoka = cached.quoka(*view.at, view.setting) if budget == EQUAL else cached.quoka_by_ratio(*view.at, 0.25)
    named = (("Block table", ours), ("QUOKA", quoka.judged))
    page.cards(*(card for name, judged in named for card in _cards(name, judged)))
    if not observed.whole:
        st.caption(
            f"Judged at {len(observed.position):,} of {len(observed.step.q):,} queries, "
            f"in {len(observed.runs)} runs; at this length all of them take too long."
        )
    _show_queries(view, observed, ours, quoka)
    _show_unsampled(view, observed, quoka)
    _show_heat(view, observed, ours, quoka)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Output error per head")
        errors = quality_frames.error_frame(ours, quoka)
        chart = quality_charts.error_chart(errors, dark=view.dark)
        page.picture("errors", chart, page.drawn("quality_figures.error_figure", errors), errors)
    with right:
        st.subheader("Density against error")
        page.guarded(lambda: _show_scatter(view, ours, quoka))
    page.python(view, "recall")


def _cards(name: str, judged: Judged) -> tuple[Card, Card]:
    low = f"{judged.low():,} of {judged.recall.size:,} under 90 %"
    return (
        Card(f"{name}: mean recall", f"{judged.recall.mean():.2%}", low),
        Card(
            f"{name}: mean output error", f"{judged.error.mean():.4f}", f"{judged.tokens.mean():,.0f} past tokens given"
        ),
    )


def _show_queries(view: View, observed: Observed, ours: Judged, quoka: Quoka) -> None:
    """One head: the recall of each query, as it lies in the chunk or sorted, and the worst ones."""
    head = view.head
    st.subheader(f"Head {head}, query by query")
    order = either("Order of the queries", "order", [ALONG, SORTED], ALONG, label_visibility="collapsed")
    recall = quality_frames.recall_frame(observed, ours, quoka, head, view.about.text)
    if order == ALONG:
        chart = quality_charts.recall_chart(recall, dark=view.dark)
        page.picture(f"recall-head-{head}", chart, page.drawn("quality_figures.recall_figure", recall, head), recall)
    else:
        curve = quality_frames.recall_curve_frame(ours, quoka, head)
        figure = page.drawn("quality_figures.recall_curve_figure", curve, head)
        page.picture(
            f"recall-curve-head-{head}", quality_charts.recall_curve_chart(curve, dark=view.dark), figure, curve
        )
    names = {"Worst queries of the block table": "table", "Worst of QUOKA": "QUOKA"}
    worst = either("Worst queries", "worst", list(names), next(iter(names)), label_visibility="collapsed")
    columns = ["query", "table", "QUOKA", "QUOKA sampled it", *(["text"] if recall["text"].any() else [])]
    st.dataframe(
        recall.sort_values(names[worst])[columns].head(8),
        hide_index=True,
        column_config={"table": page.PERCENT, "QUOKA": page.PERCENT},
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
    frame = quality_frames.sampled_frame(quoka, observed.step.start, group, view.about.text)
    chart = quality_charts.sampled_chart(frame, dark=view.dark)
    page.picture("quoka-sampled", chart, page.drawn("quality_figures.sampled_figure", frame), frame)


def _show_heat(view: View, observed: Observed, ours: Judged, quoka: Quoka) -> None:
    st.subheader("Every head along the chunk")
    heat = quality_frames.recall_heat_frame(observed, ours, quoka)
    for column, method in zip(st.columns(2, gap="large"), quality_frames.METHODS, strict=True):
        column.markdown(f"**{method}**")
        column.altair_chart(quality_charts.recall_heat_chart(heat, method, dark=view.dark), width="stretch")
    page.picture("recall-heads", None, page.drawn("quality_figures.recall_heat_figure", heat), heat)


def _show_scatter(view: View, ours: Judged, quoka: Quoka) -> None:
    """The other selectors with settings of their own, in the same grouping."""
    current = type(view.setting.selector).__name__
    names = [name for name in PARAMETERS if name in view.subject.selectors()]
    slow = {"Oracle"} if view.long else set()
    named = set() if view.subject.has_gate else {"SeerGate"} - {current}  # of whose weights the reader has the path
    among = st.multiselect(
        "Selectors",
        names,
        [name for name in names if name not in slow | named],
        key="among",
        **BOUND,
        help="Oracle computes the exact attention first: slow on long prompts.",
    )
    others = [name for name in among if name != current]
    judged = {current: ours} if current in among else {}
    with st.expander("Settings of the others", icon=":material/tune:"):
        values = {name: ask_parameter(name, view.subject, label=f"{name}: {PARAMETERS[name].field}") for name in others}
        gate = ask_gate(view.subject, None) if "SeerGate" in others else None
    for name in others:
        judged[name] = cached.judged(*view.at, with_selector(view.setting, name, values[name], gate))
    frame = quality_frames.scatter_frame({**judged, "QUOKA": quoka.judged})
    chart = quality_charts.scatter_chart(frame, dark=view.dark)
    page.picture("scatter", chart, page.drawn("quality_figures.scatter_figure", frame), frame)
    st.caption("One point per head. Sink, window, block sizes and grouping are those of the sidebar for all.")


page.render(show)
