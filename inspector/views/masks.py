"""Masks: which blocks each head's selector keeps, beside where the exact attention lies."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, page
from inspector.model import Mass, Reading
from inspector.page import Card
from inspector.sidebar import View
from inspector.widgets import BOUND, either


def show(view: View) -> None:
    selector, head = view.setting.selector, view.head
    reading = cached.reading(*view.at, view.setting)
    mass = cached.mass(*view.at, selector.block_size, selector.query_block)
    shares = mass.share[head]
    past = reading.past_blocks
    on_mask = (shares * (reading.mask[head] | ~reading.past)).sum(-1).mean()
    page.cards(
        Card("Mask density, past", f"{reading.mask[head, :, :past].mean():.1%}" if past else "no past"),
        Card("Table density, past", f"{reading.density()[head]:.1%}" if past else "no past"),
        Card("Mass on the mask", f"{on_mask:.1%}", help="The current region is always read."),
        Card("Mass on the table's rows", f"{(shares * reading.listed(head)).sum(-1).mean():.1%}"),
    )

    st.subheader(f"Head {head}")
    begin, end = _ask_blocks(reading.blocks)
    frame = frames.mask_frame(reading, mass, head, blocks=(begin, end))
    where = begin, end, past, selector.block_size
    st.markdown("**Where the exact attention lies**")
    st.altair_chart(charts.mass_chart(frame, *where, dark=view.dark), width="stretch")
    st.markdown("**What is selected, and why**")
    st.altair_chart(charts.kinds_chart(frame, *where, dark=view.dark), width="stretch")
    width = frames.bin_width(reading.query_blocks, end - begin)
    notes = ["The dashed line is where the current region begins: from there on every visible block is read."]
    if width > 1:
        notes.append(f"Each cell stands for {width} blocks; narrow the range to see single ones.")
    if mass.every > 1:
        notes.append(f"Mass from every {mass.every}th query of a block.")
    st.caption(" ".join(notes))

    figure = page.drawn("figures.mask_figure", reading, mass, head)
    page.picture(f"mask-head-{head}", None, figure, lambda: frames.mask_frame(reading, mass, head, cells=None))
    _show_all(view, reading, mass)
    page.python(view, "mass", "mask", head=head)


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
    st.markdown(
        "Each strip is one head, its lines are the query blocks; heads of one KV group stand below each other. "
        "Click a strip to enlarge its head above."
    )
    colours = ["mask", "mass"]
    by_mass = either("Colour by", "colour", colours, "mask", label_visibility="collapsed") == "mass"
    size = reading.blocks, reading.setting.selector.block_size, reading.stop
    grid = charts.heads_chart(
        frames.heads_frame(reading, mass, by_mass=by_mass),
        view.head,
        size,
        group=reading.group,
        by_mass=by_mass,
        dark=view.dark,
    )
    st.altair_chart(grid, width="stretch", key="heads", on_select=_pick, selection_mode="pick")
    summary = frames.heads_summary(reading, mass)
    st.dataframe(
        summary,
        hide_index=True,
        column_config=dict.fromkeys(summary.columns[2:], page.PERCENT),
        height=min(360, 38 + 35 * len(summary)),
    )
    page.picture("all-heads", None, page.drawn("figures.heads_figure", reading, mass, by_mass), summary)


page.render(show)
