"""Look into one chunk of a recorded prompt: `streamlit run inspector`.

Widgets and layout only; `model.py` computes, `charts.py` draws.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import streamlit as st

# Streamlit puts this folder on the path, not the checkout that it lies in; the script runs again at every click.
if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compactattn import Dense, FlashPrefill, Oracle, Selector, XAttention
from compactattn.capture import Capture
from compactattn.validation import BLOCK_SIZES, QUERY_BLOCKS
from inspector import charts, model

SELECTORS = ("FlashPrefill", "XAttention", "Oracle", "Dense")
CHUNKS = (128, 256, 512, 1024, 2048)


@st.cache_resource(max_entries=2, show_spinner="Loading the capture")
def load(stamp: tuple[str, int]) -> Capture:
    """One capture per file and time of change."""
    return model.load(stamp[0])


@st.cache_data(max_entries=64, show_spinner="Selecting blocks")
def inspect(stamp: tuple[str, int], settings: model.Settings) -> model.Inspection:
    """One result per capture and settings."""
    return model.inspect(load(stamp), settings)


def main() -> None:
    st.set_page_config(page_title="compactattn inspector", layout="wide")
    st.title("compactattn inspector")
    try:
        show()
    except (OSError, ValueError) as error:
        st.error(str(error))
    except Exception as error:
        logging.getLogger(__name__).exception("the inspector failed")
        st.error(f"{type(error).__name__}: {error}")


def show() -> None:
    """The whole page; whatever it raises becomes a message."""
    stamp = model.stamp(st.sidebar.text_input("Capture file", placeholder="the sample in the package").strip())
    capture = load(stamp)
    settings = ask_settings(capture)
    inspection = inspect(stamp, settings)
    st.caption(f"{capture.model}. {capture.source}")
    show_head(inspection)
    show_table(inspection)


def ask_settings(capture: Capture) -> model.Settings:
    """The sidebar."""
    side = st.sidebar
    first = capture.layers[0]
    heads, group = first.q.shape[1], first.q.shape[1] // first.k.shape[1]
    numbers = [layer.layer for layer in capture.layers]
    layer = side.selectbox("Layer", range(len(numbers)), format_func=lambda i: str(numbers[i]))
    chunk = side.selectbox("Chunk, queries", CHUNKS, index=CHUNKS.index(512))
    starts = model.chunk_starts(capture.tokens, chunk)
    start = side.selectbox("Chunk starts at token", starts, index=len(starts) - 1)
    head = side.selectbox("Query head", range(heads))
    selector = ask_selector()
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    heads_per_group = side.selectbox("Heads per group", divisors, index=min(1, len(divisors) - 1))
    stop = min(start + chunk, capture.tokens)
    spans = [None, *range(1, -(-(stop - start) // selector.query_block))]
    span = side.selectbox("Query blocks per span", spans, format_func=lambda n: "whole chunk" if n is None else str(n))
    return model.Settings(layer, start, stop, head, selector, heads_per_group, span)


def ask_selector() -> Selector:
    """The selector and its settings."""
    side = st.sidebar
    name = side.selectbox("Selector", SELECTORS)
    block_size = side.selectbox("Block size, tokens", BLOCK_SIZES)
    query_block = side.selectbox("Query block, queries", QUERY_BLOCKS)
    if name == "Dense":
        return Dense(block_size=block_size, query_block=query_block)
    label, default = {
        "FlashPrefill": ("alpha", 0.1),
        "XAttention": ("threshold", 0.9),
        "Oracle": ("mass", 0.95),
    }[name]
    value = side.slider(label, 0.0, 1.0, default, 0.01)
    sink, window = side.columns(2)
    sizes = {
        "sink_blocks": sink.number_input("Sink blocks", 0, 64, 1),
        "window_blocks": window.number_input("Window blocks", 0, 64, 2),
        "block_size": block_size,
        "query_block": query_block,
    }
    if name == "FlashPrefill":
        return FlashPrefill(alpha=value, **sizes)
    if name == "XAttention":
        return XAttention(threshold=value, **sizes)
    return Oracle(mass=value, **sizes)


def show_head(inspection: model.Inspection) -> None:
    """One head's exact attention beside its mask."""
    settings = inspection.settings
    st.subheader(f"Head {settings.head}, tokens {settings.start} to {settings.stop - 1}")
    st.pyplot(charts.mask_figure(inspection))
    mask, table = st.columns(2)
    mask.metric("Mass on the head's mask", f"{inspection.mass_covered_by_mask():.1%}")
    table.metric("Mass on its table row", f"{inspection.mass_covered_by_table():.1%}")


def show_table(inspection: model.Inspection) -> None:
    """The union of the group, its table, and what each union costs."""
    st.subheader("Union and block table of the group")
    st.pyplot(charts.table_figure(inspection))
    cascade = inspection.cascade
    if cascade.visible == 0:
        st.info("The first chunk has no past: every block is in the current region.")
        return
    steps = {
        "mask": "Mask",
        "query_block_union": "After query-block union",
        "sub_group_union": "After sub-group union",
        "group_union": "After full-group union",
    }
    st.markdown("Past blocks read by this chunk, all heads, as a share of the visible ones:")
    densities = cascade.densities()
    for column, (name, label) in zip(st.columns(len(steps)), steps.items(), strict=True):
        column.metric(label, f"{densities[name]:.1%}")


if __name__ == "__main__":
    main()
