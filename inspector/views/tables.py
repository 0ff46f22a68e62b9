"""Tables: the block table, the physical pages that it reads, and why no entry can be spared."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from inspector import cached, charts, cost, frames, page, recall
from inspector.model import GroupUnion, Reading
from inspector.page import Card
from inspector.sidebar import View
from inspector.sources import Step
from inspector.spans import ask_row
from inspector.widgets import choose


def show(view: View) -> None:
    reading, step = cached.reading(*view.at, view.setting), cached.step(*view.at)
    found, counts = cost.work(step, reading), reading.table.counts
    bytes_share, flops_share = found.table_bytes / found.dense_bytes, found.table_flops / found.dense_flops
    page.cards(
        Card("Rows of the table", f"{int((counts > 0).sum())}"),
        Card("Entries, longest / shortest row", f"{int(counts.max())} / {int(counts[counts > 0].min())}"),
        Card(
            "Bytes read",
            f"{found.table_bytes / 1e6:,.1f} MB",
            f"{bytes_share:.1%} of dense",
            "All KV heads: 16-bit queries, outputs, keys and values, each block once per KV head that reads it.",
        ),
        Card("Products", f"{found.table_flops / 1e9:,.1f} GFLOP", f"{flops_share:.1%} of dense"),
    )
    with st.expander("Every row of the table", icon=":material/table_rows:"):
        rows = frames.rows_frame(reading)
        height = min(320, 38 + 35 * len(rows))
        st.dataframe(rows, hide_index=True, height=height, column_config={"share of the past": page.PERCENT})

    st.subheader("The row, as the kernel walks it")
    union, by, _ = ask_row(reading, view.head)
    frame = frames.table_frame(union, reading, by)
    above = st.container()  # the chart outlines the entry that is chosen below it
    entry = _show_entry(view, reading, union, [int(block) for block in frame["block"]])
    with above:
        chart = charts.table_chart(frame, entry, by, dark=view.dark)
        figure = page.drawn("figures.row_figure", frame, union.row, by)
        page.picture(f"row-{union.row}", chart, figure, frame, key="row", on_select=_pick, selection_mode="entry")
        st.caption(
            "Height: how many (head, query block) pairs selected the block, or in the current region see it. "
            "Click an entry to see whom it serves, and where its pages lie below."
        )
    _show_pages(view, reading, step, entry)
    page.python(view, "table", "pages", kv_head=view.kv_head)


def _pick() -> None:
    picked = st.session_state["row"].selection.get("entry") or []
    if picked and picked[0].get("block") is not None:
        st.session_state["entry"] = int(picked[0]["block"])


def _show_entry(view: View, reading: Reading, union: GroupUnion, blocks: list[int]) -> int:
    """Choose an entry, and see why it cannot be spared: which queries need it."""
    size = reading.setting.selector.block_size
    left, right = st.columns([1, 2], gap="large")
    with left:
        entry = choose("Entry: KV block", "entry", blocks, blocks[0])
        block = f"Block {entry} (tokens {entry * size:,} to {min((entry + 1) * size, reading.stop) - 1:,})"
        if entry >= reading.past_blocks:
            st.markdown(f"{block} lies in the **current region**: every row lists what its queries see.")
            return entry
        pairs = union.needed_by(entry)
        heads = ", ".join(map(str, sorted({head for head, _ in pairs})))
        st.markdown(
            f"{block} was selected by **{len(pairs)}** (head, query block) pair{'s' if len(pairs) != 1 else ''} of "
            f"heads {heads}. Without it, they lose what they chose."
        )
    with right:
        needed = _needed(view, reading, union, entry)
        percent = dict.fromkeys(("mass on the block", "its mass there"), page.PERCENT)
        st.dataframe(needed, hide_index=True, column_config=percent, height=220)
    return entry


def _needed(view: View, reading: Reading, union: GroupUnion, entry: int) -> pd.DataFrame:
    """The pairs that need an entry, and the query of each that needs it most."""
    selector, observed = reading.setting.selector, cached.observed(*view.at)
    mass = cached.mass(*view.at, selector.block_size, selector.query_block)
    shares = recall.block_shares(observed, reading, entry)
    frame = frames.needed_frame(union, mass, entry, observed, shares, selector.query_block, view.about.text)
    return frame if view.about.text is not None else frame.drop(columns="text")


def _show_pages(view: View, reading: Reading, step: Step, entry: int) -> None:
    st.subheader(f"Where in the cache: pages that KV head {view.kv_head} reads")
    grid = cost.page_grid(step, reading, view.kv_head)
    read = grid.count("past, read") + grid.count("current region, read")
    skipped = grid.count("skipped")
    page.cards(
        Card("Pages read", f"{read:,}", f"{read * grid.page_bytes / 1e6:,.2f} MB"),
        Card("Pages skipped", f"{skipped:,}", f"{skipped * grid.page_bytes / 1e6:,.2f} MB"),
        Card("Pages of the request", f"{read + skipped:,}", f"{(read + skipped) * grid.page_bytes / 1e6:,.2f} MB"),
        Card("A page", f"{grid.page_size} tokens", f"{grid.page_bytes / 1e3:,.1f} KB of 16-bit keys and values"),
    )
    columns, size = 128 if len(grid.kinds) > 512 else 64, reading.setting.selector.block_size
    pages = frames.pages_frame(grid, columns, (entry * size, (entry + 1) * size))
    figure = page.drawn("figures.pages_figure", grid, columns)
    page.picture("pages", charts.pages_chart(pages, dark=view.dark), figure, pages)
    st.caption(
        "In the order of the physical cache, where neighbours in the prompt lie far apart. Read: some query of the KV "
        "head walks a block in the page. The chosen entry's pages are outlined."
    )


page.render(show)
