"""What if: sweep the selector's parameter, see what each budget buys, and estimate what it costs on an H200."""

from __future__ import annotations

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from compactattn import SeerGate
from inspector import cached, cost, model, page, quality_charts, quality_frames
from inspector.choices import PARAMETERS, ask_gate, with_selector
from inspector.page import Card
from inspector.recall import Outcome
from inspector.sidebar import View
from inspector.widgets import BOUND, choose

QUOKA_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6)
SWEEPING = "sweeping"
Point = tuple[str, float, str]  # method, value of its parameter, digest of the gate's weights where it is a gate


def show(view: View) -> None:
    if page.need_past(view):
        page.guarded(lambda: _show_frontier(view))
    _show_time(view)
    name = type(view.setting.selector).__name__
    if name in PARAMETERS:
        parameter = PARAMETERS[name]
        page.python(view, "recall", "frontier", "time", field=parameter.field, values=parameter.sweep)
    else:
        page.python(view, "recall", "time")


def _show_frontier(view: View) -> None:
    st.subheader("What does each budget buy?")
    left, right = st.columns([2, 1], vertical_alignment="bottom")
    offered = [*(name for name in PARAMETERS if name in view.subject.selectors()), "QUOKA"]
    chosen = ["FlashPrefill"] if view.long else ["FlashPrefill", "XAttention", "QUOKA"]
    methods = left.multiselect("Methods", offered, chosen, key="methods", **BOUND)
    with right:
        measure = choose("Measure", "measure", list(quality_charts.MEASURES), next(iter(quality_charts.MEASURES)))
    gate = ask_gate(view.subject, view.weights) if "SeerGate" in methods else None
    current = _current(view)
    points = [(name, value, _digest(name, gate)) for name in methods for value in _values(name)]
    row = st.container(horizontal=True, vertical_alignment="center")
    sweeping = bool(st.session_state.get(SWEEPING))
    row.button(
        f"Sweep {len(points)} points",
        on_click=_start,
        icon=":material/play_arrow:",
        type="primary",
        disabled=not points or sweeping,
    )
    row.button("Cancel", on_click=_stop, icon=":material/stop:", disabled=not sweeping)
    progress, plot = row.empty(), st.empty()
    known = _known(view)
    done = [known[point] for point in points if point in known]
    _draw(view, plot, done, current, measure)
    if sweeping:
        _sweep(view, points, known, gate, progress)
    if done:
        st.caption(
            f"{len(done)} of {len(points)} points. All heads of the layer, this chunk. Down and to the left is better. "
            "QUOKA is swept over its share of the past, the selectors over their own parameter."
        )
    else:
        st.caption("Only the current setting is shown. Sweep to see what other budgets buy; every point is kept.")
    frames = quality_frames.outcome_frame(done or [current]), quality_frames.outcome_frame([current])
    figure = page.drawn("quality_figures.frontier_figure", *frames, measure)
    page.picture("frontier", None, figure, lambda: quality_frames.outcome_frame([current, *done]))


def _draw(view: View, plot: DeltaGenerator, done: list[Outcome], current: Outcome, measure: str) -> None:
    frames = quality_frames.outcome_frame(done or [current]), quality_frames.outcome_frame([current])
    plot.altair_chart(quality_charts.frontier_chart(*frames, measure, dark=view.dark), width="stretch")


def _sweep(
    view: View, points: list[Point], known: dict[Point, Outcome], gate: SeerGate | None, progress: DeltaGenerator
) -> None:
    """Compute what is missing, point by point; Cancel, like any other click, ends this run of the script."""
    for n, point in enumerate(points):
        name, value, _ = point
        progress.progress((n + 1) / len(points), f"{name} at {value:g}")
        if point not in known:
            known[point] = _point(view, name, value, gate)
    _stop()
    st.rerun()


def _start() -> None:
    st.session_state[SWEEPING] = True


def _stop() -> None:
    st.session_state[SWEEPING] = False


def _values(name: str) -> tuple[float, ...]:
    return QUOKA_RATIOS if name == "QUOKA" else PARAMETERS[name].sweep


def _digest(name: str, gate: SeerGate | None) -> str:
    return model.digest(gate.weights) if name == "SeerGate" and gate is not None else ""


def _known(view: View) -> dict[Point, Outcome]:
    """The points that this session has computed for these data and this grouping."""
    selector = view.setting.selector
    rules = selector.sink_blocks, selector.window_blocks, selector.block_size, selector.query_block
    key = repr((view.at, view.setting.grouping, rules))
    return st.session_state.setdefault("frontiers", {}).setdefault(key, {})


def _point(view: View, name: str, value: float, gate: SeerGate | None) -> Outcome:
    if name == "QUOKA":
        return cached.quoka_outcome(*view.at, value)
    return cached.outcome(*view.at, with_selector(view.setting, name, value, gate), value)


def _current(view: View) -> Outcome:
    name = type(view.setting.selector).__name__
    value = getattr(view.setting.selector, PARAMETERS[name].field) if name in PARAMETERS else 1.0
    return cached.outcome(*view.at, view.setting, value)


def _show_time(view: View) -> None:
    st.subheader("How long would attention take on an H200?")
    measured = cached.measured()
    found = cost.work(cached.step(*view.at), cached.reading(*view.at, view.setting))
    ceilings = measured.ceilings
    sparse = ceilings.time_ms(found.table_flops, found.table_bytes)
    dense = ceilings.time_ms(found.dense_flops, found.dense_bytes)
    ratios = measured.typical_ratio("attend"), measured.typical_ratio("dense")
    page.cards(
        Card("Estimate, this table", f"{sparse * 1e3:,.1f} µs"),
        Card("Estimate, dense", f"{dense * 1e3:,.1f} µs"),
        Card("Estimated speedup, at most", f"{dense / sparse:.1f} times"),
        Card(
            "Measured ÷ estimate, median",
            f"{ratios[0]:.2f} / {ratios[1]:.2f}",
            help="Of `attend` and of dense attention, over all measured cases below.",
        ),
    )
    st.markdown(
        f"**An estimate**, not a measurement: max(FLOPs ÷ {ceilings.tflops:,.0f} TFLOP/s, bytes ÷ {ceilings.tbps:.2f} "
        f"TB/s), with {found.table_flops / 1e9:,.2f} GFLOP and {found.table_bytes / 1e6:,.1f} MB for this table, "
        f"{found.dense_flops / 1e9:,.2f} GFLOP and {found.dense_bytes / 1e6:,.1f} MB for dense attention. FLOPs are "
        "4 · rows · keys · D over the tokens of the table; bytes are 16-bit queries and outputs, and each K and V "
        "block once per KV head that reads it. Both rates were measured on that GPU. Launches, selection and rows of "
        "uneven length are not in it; a step of a few microseconds is bound by them."
    )
    frame, estimates = quality_frames.measured_frame(measured), {"this table": sparse, "dense": dense}
    chart = quality_charts.measured_chart(frame, estimates, dark=view.dark)
    page.picture("measured", chart, page.drawn("quality_figures.measured_figure", frame, estimates), frame)
    st.caption(
        f"Measured results of this repository: {measured.gpu}, {measured.versions}, CUDA-graph replays, correctness "
        "gates passed. On the dashed line, a kernel reaches the bound."
    )
    with st.expander("The measured rows", icon=":material/table:"):
        st.dataframe(frame, hide_index=True, height=320)


page.render(show)
