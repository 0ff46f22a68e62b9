"""Tables: the block table, the physical pages that it reads, and why no entry can be spared."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, cost, frames, model, page
from inspector.model import GroupUnion, Reading
from inspector.sidebar import BOUND, View
from inspector.spans import ask_span


def show(view: View) -> None:
    reading = cached.reading(*view.at, view.setting)
    step = cached.step(*view.at)
    found = cost.work(step, reading)
    counts = reading.table.counts
    used = int((counts > 0).sum())
    cards = st.columns(4)
    cards[0].metric("Rows of the table", f"{used}", border=True, height="stretch")
    cards[1].metric(
        "Entries, longest / shortest row",
        f"{int(counts.max())} / {int(counts[counts > 0].min())}",
        border=True,
        height="stretch",
    )
    share = found.table_bytes / found.dense_bytes
    cards[2].metric(
        "Bytes read",
        f"{found.table_bytes / 1e6:,.1f} MB",
        f"{share:.1%} of dense",
        delta_color="off",
        delta_arrow="off",
        border=True,
        height="stretch",
        help="16-bit queries, outputs, keys and values.",
    )
    cards[3].metric(
        "Products",
        f"{found.table_flops / 1e9:,.1f} GFLOP",
        f"{found.table_flops / found.dense_flops:.1%} of dense",
        delta_color="off",
        delta_arrow="off",
        border=True,
        height="stretch",
    )

    st.subheader("The row, as the kernel walks it")
    union = model.row_union(reading, view.head, ask_span(reading))
    frame = frames.table_frame(union, reading)
    blocks = [int(block) for block in frame["block"]]
    if st.session_state.get("entry", blocks[0]) not in blocks:
        del st.session_state["entry"]
    entry = st.session_state.get("entry", blocks[0])
    page.chart(charts.table_chart(frame, entry, dark=view.dark), key="row", on_select=_pick, selection_mode="entry")
    st.caption("Height: how many (head, query block) pairs selected the block. Click an entry to see whom it serves.")
    left, right = st.columns([1, 2], gap="large")
    with left:
        entry = st.selectbox("Entry: KV block", blocks, key="entry", **BOUND)
        _explain(reading, union, entry)
    with right:
        mass = cached.mass(*view.at, reading.setting.selector.block_size, reading.setting.selector.query_block)
        needed = frames.needed_frame(union, mass, entry) if entry < reading.past_blocks else None
        if needed is not None:
            percent = st.column_config.NumberColumn(format="percent")
            st.dataframe(needed, hide_index=True, column_config={"mass on the block": percent}, height=220)
    page.downloads(f"row-{union.row}", page.drawn("cascade_figure", union, reading), lambda: frame)

    st.subheader(f"Where in the cache: pages that KV head {view.kv_head} reads")
    grid = cost.page_grid(step, reading, view.kv_head)
    columns = 128 if len(grid.kinds) > 512 else 64
    pages = frames.pages_frame(grid, columns)
    page.chart(charts.pages_chart(pages, dark=view.dark))
    read = grid.count("past, read") + grid.count("current region, read")
    st.caption(
        f"{read:,} of {read + grid.count('skipped'):,} pages of {grid.page_size} tokens are read by some query of the "
        "KV head. Pages lie in the order of the physical cache, neighbours in the prompt far apart."
    )
    page.downloads("pages", page.drawn("pages_figure", grid, columns), lambda: pages)
    page.python(view, "table")


def _pick() -> None:
    picked = st.session_state["row"].selection.get("entry") or []
    if picked and picked[0].get("block") is not None:
        st.session_state["entry"] = int(picked[0]["block"])


def _explain(reading: Reading, union: GroupUnion, block: int) -> None:
    """Why this entry cannot be spared."""
    size = reading.setting.selector.block_size
    tokens = f"tokens {block * size:,} to {min((block + 1) * size, reading.stop) - 1:,}"
    if block >= reading.past_blocks:
        st.markdown(f"Block {block} ({tokens}) lies in the **current region**: every row lists what its queries see.")
        return
    pairs = union.needed_by(block)
    heads = sorted({head for head, _ in pairs})
    st.markdown(
        f"Block {block} ({tokens}) was selected by **{len(pairs)}** (head, query block) "
        f"pair{'s' if len(pairs) != 1 else ''} of heads {', '.join(map(str, heads))}. "
        "Without it, they lose what they chose."
    )


page.render(show)
