"""Masks: which blocks each head's selector keeps, beside where the exact attention lies."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, page
from inspector.model import Mass, Reading
from inspector.sidebar import BOUND, View


def show(view: View) -> None:
    selector, head = view.setting.selector, view.head
    reading = cached.reading(*view.at, view.setting)
    mass = cached.mass(*view.at, selector.block_size, selector.query_block)
    shares = mass.share[head]
    past = reading.past_blocks
    cards = st.columns(4)
    cards[0].metric(
        "Mask density, past",
        f"{reading.mask[head, :, :past].mean():.1%}" if past else "no past",
        border=True,
        height="stretch",
    )
    cards[1].metric(
        "Table density, past", f"{reading.density()[head]:.1%}" if past else "no past", border=True, height="stretch"
    )
    on_mask = (shares * (reading.mask[head] | ~reading.past)).sum(-1).mean()
    cards[2].metric(
        "Mass on the mask", f"{on_mask:.1%}", border=True, height="stretch", help="The current region is always read."
    )
    cards[3].metric(
        "Mass on the table's rows",
        f"{(shares * reading.listed(head)).sum(-1).mean():.1%}",
        border=True,
        height="stretch",
    )

    st.subheader(f"Head {head}")
    begin, end = _ask_blocks(reading.blocks)
    frame = frames.mask_frame(reading, mass, head, blocks=(begin, end))
    where = begin, end, past, selector.block_size
    st.markdown("**Where the exact attention lies**")
    page.chart(charts.mass_chart(frame, *where, dark=view.dark))
    st.markdown("**What is selected, and why**")
    page.chart(charts.kinds_chart(frame, *where, dark=view.dark))
    width = frames.bin_width(reading.query_blocks, end - begin)
    notes = ["The dashed line is where the current region begins: from there on every visible block is read."]
    if width > 1:
        notes.append(f"Each cell stands for {width} blocks; narrow the range to see single ones.")
    if mass.every > 1:
        notes.append(f"Mass from every {mass.every}th query of a block.")
    st.caption(" ".join(notes))

    figure = page.drawn("mask_figure", reading, mass, head)
    page.downloads(f"mask-head-{head}", figure, lambda: frames.mask_frame(reading, mass, head, cells=None))
    _show_all(view, reading, mass)
    page.python(view)


def _ask_blocks(blocks: int) -> tuple[int, int]:
    """The range of KV blocks to enlarge."""
    shown = st.session_state.get("blocks")
    if shown is not None and not 0 <= shown[0] < shown[1] <= blocks:
        del st.session_state["blocks"]
    if blocks < 2:
        return 0, blocks
    begin, end = st.slider("KV blocks shown", 0, blocks, (0, blocks), key="blocks", **BOUND)
    return (begin, end) if begin < end else (0, blocks)


def _pick() -> None:
    """A click on a strip chooses its head, on every page."""
    picked = st.session_state["heads"].selection.get("pick") or []
    if picked and picked[0].get("head") is not None:
        st.session_state["head"] = int(picked[0]["head"])


def _show_all(view: View, reading: Reading, mass: Mass) -> None:
    st.subheader("All heads of the layer")
    st.markdown("Each strip is one head, its lines are the query blocks. Click a strip to enlarge its head above.")
    by_mass = (
        st.segmented_control(
            "Colour by",
            ["mask", "mass"],
            default="mask",
            key="colour",
            required=True,
            label_visibility="collapsed",
            **BOUND,
        )
        == "mass"
    )
    grid = frames.heads_frame(reading, mass, by_mass=by_mass)
    page.chart(
        charts.heads_chart(grid, view.head, reading.blocks, by_mass=by_mass, dark=view.dark),
        key="heads",
        on_select=_pick,
        selection_mode="pick",
    )
    summary = frames.heads_summary(reading, mass)
    percent = st.column_config.NumberColumn(format="percent")
    st.dataframe(
        summary,
        hide_index=True,
        column_config=dict.fromkeys(summary.columns[2:], percent),
        height=min(360, 38 + 35 * len(summary)),
    )

    figure = page.drawn("heads_figure", reading)
    page.downloads("all-heads", figure, lambda: summary)


page.render(show)
