"""What if: sweep the selector's parameter, see what each budget buys, and estimate what it costs on an H200."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from inspector import cached, cost, frames, page, quality_charts
from inspector.recall import Outcome
from inspector.sidebar import BOUND, PARAMETERS, View, with_selector

QUOKA_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6)
SWEEPING = "sweeping"


def show(view: View) -> None:
    if page.need_past(view):
        _show_frontier(view)
    _show_time(view)
    page.python(view, "recall")


def _show_frontier(view: View) -> None:
    st.subheader("What does each budget buy?")
    short = view.place.stop <= 16384
    left, right = st.columns([2, 1], vertical_alignment="bottom")
    methods = left.multiselect(
        "Methods",
        [*PARAMETERS, "QUOKA"],
        ["FlashPrefill", "XAttention", "QUOKA"] if short else ["FlashPrefill"],
        key="methods",
        **BOUND,
    )
    measure = right.selectbox("Measure", list(quality_charts.MEASURES), key="measure", **BOUND)
    current = _current(view)
    points = [(name, value) for name in methods for value in _values(name)]
    row = st.container(horizontal=True, vertical_alignment="center")
    row.button(
        f"Sweep {len(points)} points",
        on_click=_start,
        icon=":material/play_arrow:",
        type="primary",
        disabled=not points or bool(st.session_state.get(SWEEPING)),
    )
    row.button("Cancel", on_click=_stop, icon=":material/stop:", disabled=not st.session_state.get(SWEEPING))
    progress = row.empty()
    known = _known(view)
    plot = st.empty()
    done = [known[point] for point in points if point in known]
    _draw(view, plot, done, current, measure)
    if st.session_state.get(SWEEPING):
        for n, (name, value) in enumerate(points):
            progress.progress((n + 1) / len(points), f"{name} at {value:g}")
            if (name, value) not in known:
                known[name, value] = _point(view, name, value)
        _stop()
        st.rerun()
    if not done:
        st.caption("Only the current setting is shown. Sweep to see what other budgets buy; every point is kept.")
    else:
        st.caption(
            f"{len(done)} of {len(points)} points. All heads of the layer, this chunk. Down and to the left is better. "
            "QUOKA is swept over its share of the past, the selectors over their own parameter."
        )

    figure = page.drawn(
        "frontier_figure", frames.outcome_frame(done or [current]), frames.outcome_frame([current]), measure
    )
    page.downloads("frontier", figure, lambda: frames.outcome_frame([current, *done]))


def _draw(view: View, plot: DeltaGenerator, done: list[Outcome], current: Outcome, measure: str) -> None:
    chart = quality_charts.frontier_chart(
        frames.outcome_frame(done or [current]), frames.outcome_frame([current]), measure, dark=view.dark
    )
    plot.altair_chart(chart, width="stretch")


def _start() -> None:
    st.session_state[SWEEPING] = True


def _stop() -> None:
    st.session_state[SWEEPING] = False


def _values(name: str) -> tuple[float, ...]:
    return QUOKA_RATIOS if name == "QUOKA" else PARAMETERS[name][2]


def _known(view: View) -> dict[tuple[str, float], Outcome]:
    """The points that this session has computed for these data and this grouping."""
    selector = view.setting.selector
    rules = selector.sink_blocks, selector.window_blocks, selector.block_size, selector.query_block
    key = repr((view.at, view.setting.grouping, rules))
    return st.session_state.setdefault("frontiers", {}).setdefault(key, {})


def _point(view: View, name: str, value: float) -> Outcome:
    if name == "QUOKA":
        return cached.quoka_outcome(*view.at, value)
    return cached.outcome(*view.at, with_selector(view.setting, name, value), value)


def _current(view: View) -> Outcome:
    name = type(view.setting.selector).__name__
    value = getattr(view.setting.selector, PARAMETERS[name][0]) if name in PARAMETERS else 1.0
    return cached.outcome(*view.at, view.setting, value)


def _show_time(view: View) -> None:
    st.subheader("How long would attention take on an H200?")
    measured = cached.measured()
    found = cost.work(cached.step(*view.at), cached.reading(*view.at, view.setting))
    ceilings = measured.ceilings
    sparse = ceilings.time_ms(found.table_flops, found.table_bytes)
    dense = ceilings.time_ms(found.dense_flops, found.dense_bytes)
    ratios = measured.typical_ratio("attend"), measured.typical_ratio("dense")
    cards = st.columns(4)
    cards[0].metric("Estimate, this table", f"{sparse * 1e3:,.1f} µs", border=True, height="stretch")
    cards[1].metric("Estimate, dense", f"{dense * 1e3:,.1f} µs", border=True, height="stretch")
    cards[2].metric("Estimated speedup, at most", f"{dense / sparse:.1f} times", border=True, height="stretch")
    cards[3].metric(
        "Measured ÷ estimate, median",
        f"{ratios[0]:.2f} / {ratios[1]:.2f}",
        border=True,
        height="stretch",
        help="Of `attend` and of dense attention, over all measured cases below.",
    )
    st.markdown(
        f"**An estimate**, not a measurement: max(FLOPs ÷ {ceilings.tflops:,.0f} TFLOP/s, bytes ÷ {ceilings.tbps:.2f} "
        f"TB/s), with {found.table_flops / 1e9:,.2f} GFLOP and {found.table_bytes / 1e6:,.1f} MB for this table, "
        f"{found.dense_flops / 1e9:,.2f} GFLOP and {found.dense_bytes / 1e6:,.1f} MB for dense attention. FLOPs are "
        "4 · rows · keys · D over the tokens of the table; bytes are 16-bit queries and outputs, and each K and V "
        "block once per KV head that reads it. Both rates were measured on that GPU. Launches, selection and rows of "
        "uneven length are not in it; a step of a few microseconds is bound by them."
    )
    frame = frames.measured_frame(measured)
    page.chart(quality_charts.measured_chart(frame, {"this table": sparse, "dense": dense}, dark=view.dark))
    st.caption(
        f"Measured results of this repository: {measured.gpu}, {measured.versions}, CUDA-graph replays, correctness "
        "gates passed. On the dashed line, a kernel reaches the bound."
    )
    with st.expander("The measured rows", icon=":material/table:"):
        st.dataframe(frame, hide_index=True, height=320)


page.render(show)
