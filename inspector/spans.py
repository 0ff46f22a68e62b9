"""Controls that two pages share: which row of the table is shown, and who of those that share it is told apart."""

from __future__ import annotations

import streamlit as st

from inspector import model
from inspector.model import HEADS, GroupUnion, Reading
from inspector.widgets import BOUND, either


def ask_row(reading: Reading, head: int) -> tuple[GroupUnion, str, int]:
    """The row that a head walks, who of its members is told apart (`model.HEADS` or `model.QUERY_BLOCKS`), its span."""
    span = _ask_span(reading)
    union = model.row_union(reading, head, span)
    by = union.sharers[0] if union.sharers else HEADS
    if len(union.sharers) > 1:
        by = either("Tell apart the row's", "members", union.sharers, by)
    return union, by, span


def _ask_span(reading: Reading) -> int:
    """The span of query blocks; 0 where the whole chunk shares one row."""
    count = -(-reading.query_blocks // reading.span)
    if st.session_state.get("row_span", 0) not in range(count):
        del st.session_state["row_span"]
    if count == 1:
        return 0
    queries = reading.span * reading.setting.selector.query_block
    return st.selectbox(f"Span of {queries} queries", range(count), key="row_span", **BOUND)
