"""One control that two pages share: which row of the table, where a chunk has several."""

from __future__ import annotations

import streamlit as st

from inspector.model import Reading
from inspector.sidebar import BOUND


def ask_span(reading: Reading) -> int:
    """The span of query blocks whose row is shown; 0 where the whole chunk shares one."""
    count = -(-reading.query_blocks // reading.span)
    if st.session_state.get("row_span", 0) not in range(count):
        del st.session_state["row_span"]
    if count == 1:
        return 0
    queries = reading.span * reading.setting.selector.query_block
    return st.selectbox(f"Span of {queries} queries", range(count), key="row_span", **BOUND)
