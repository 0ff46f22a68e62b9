"""The settings that every page shares, each of them in the address: what to look at, and how blocks are selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from benchmarks.workloads import WORKLOADS
from compactattn import Oracle
from inspector import cached, sources
from inspector.choices import Subject, ask_selector, ask_sharing
from inspector.files import GateWeights, Recorded
from inspector.model import Setting
from inspector.sources import About, Place, Source, Synthetic
from inspector.widgets import BOUND, UndecidedError, ask_file, choose, either

SAMPLE, FILE, WORKLOAD = "Sample", "File", "Synthetic"
CHUNKS = (128, 256, 512, 1024, 2048)
#: Tokens from which on exact attention takes seconds on a CPU: what needs it waits to be asked for.
LONG = 16384
#: What suits a recorded prompt of a few thousand tokens, and the paper's setting for a long one.
DEFAULTS: dict[str, dict[str, Any]] = {
    SAMPLE: {
        "chunk": 512,
        "block": 64,
        "qblock": 64,
        "sink": 1,
        "window": 2,
        "alpha": 0.1,
        "gate_threshold": 0.01,
        "share": 2,
        "page_size": 16,
    },
    WORKLOAD: {
        "chunk": 1024,
        "block": 128,
        "qblock": 128,
        "sink": 2,
        "window": 4,
        "alpha": 0.18,
        "share": 4,
        "page_size": 128,
    },
}
DEFAULTS[FILE] = DEFAULTS[SAMPLE]


@dataclass(frozen=True)
class View:
    """What the reader looks at.

    Attributes:
        subject: the data and the place in it.
        page_size: tokens per page of the cache.
        head: query head.
        setting: how blocks are selected and shared.
        weights: the file of the gate's weights, where the selector is a gate.
        dark: whether the page is.
    """

    subject: Subject
    page_size: int
    head: int
    setting: Setting
    weights: GateWeights | None
    dark: bool

    @property
    def source(self) -> Source:
        return self.subject.source

    @property
    def about(self) -> About:
        return self.subject.about

    @property
    def place(self) -> Place:
        return self.subject.place

    @property
    def at(self) -> tuple[Source, Place, int]:
        """The first arguments of everything in `cached`."""
        return self.source, self.place, self.page_size

    @property
    def kv_head(self) -> int:
        return self.head // self.about.group

    @property
    def long(self) -> bool:
        """Whether exact attention takes seconds here."""
        return self.place.stop > LONG


def ask() -> View:
    """Draw the sidebar.

    Raises:
        FileNotFoundError, ValueError: a file that is no capture, or no gate for it.
        UndecidedError: no file chosen yet.
    """
    with st.sidebar:
        st.subheader("Data")
        source = _ask_source()
        about, defaults = cached.about(source), DEFAULTS[_kind()]
        place = _ask_place(about)
        subject = Subject(source, about, place, defaults)
        st.subheader("Selector")
        selector, weights = ask_selector(subject)
        if isinstance(selector, Oracle) and place.stop > LONG:
            st.caption("Oracle computes the exact attention of every query first: seconds at this length.")
        st.subheader("Sharing")
        setting = ask_sharing(selector, subject)
        with st.expander("Cache layout"):
            page_size = choose("Tokens per page", "page_size", sources.PAGE_SIZES, defaults["page_size"])
    return View(subject, page_size, st.session_state["head"], setting, weights, st.context.theme.type == "dark")


def _kind() -> str:
    return st.session_state.get("data") or SAMPLE


def _reset() -> None:
    """Another kind of data has other sensible settings."""
    for key, value in DEFAULTS[_kind()].items():
        st.session_state[key] = value
    for key in ("start", "layer", "head", "span"):
        st.session_state.pop(key, None)


def _ask_source() -> Source:
    kinds = [SAMPLE, FILE, WORKLOAD]
    kind = either("Where from", "data", kinds, SAMPLE, on_change=_reset, label_visibility="collapsed", width="stretch")
    if kind == FILE:
        return _ask_capture()
    return _ask_workload() if kind == WORKLOAD else Recorded.from_path("")


def _ask_capture() -> Recorded:
    chosen = ask_file(
        Recorded,
        "file",
        "Path of a capture",
        ("safetensors",),
        placeholder="/path/to/capture.safetensors",
        help="A safetensors file that `compactattn.capture.save_capture` wrote. It stays on this machine.",
    )
    if chosen is None:
        st.info("Name a capture or upload one. Nothing else is read.", icon=":material/folder_open:")
        raise UndecidedError
    return chosen


def _ask_workload() -> Synthetic:
    workload = choose("Workload", "workload", list(WORKLOADS), "vertical-slash")
    contexts = sources.CONTEXTS
    if st.session_state.get("context", contexts[-1]) not in contexts:
        del st.session_state["context"]
    context = st.select_slider("Prompt, tokens", contexts, contexts[-1], key="context", **BOUND)
    correlation = st.slider(
        "Correlation of the heads",
        0.0,
        1.0,
        0.9,
        0.05,
        key="correlation",
        help="Share of a head's blocks that it has in common with its KV group. It decides what a union costs.",
        **BOUND,
    )
    left, middle, right = st.columns(3)
    with left:
        kv_heads = choose("KV heads", "kv", (1, 2, 4), 2)
    with middle:
        group = choose("G", "group", (1, 2, 4, 8), 4, help="Query heads per KV head.")
    with right:
        seed = st.number_input("Seed", 0, 9999, 0, key="seed", **BOUND)
    return Synthetic(workload, context, correlation, kv_heads, group, int(seed))


def _move(starts: range, by: int) -> None:
    """Walk to a neighbouring chunk; from the last one on to the first."""
    here = st.session_state["start"] // starts.step
    st.session_state["start"] = starts[(here + by) % len(starts)]


def _ask_place(about: About) -> Place:
    left, right = st.columns(2)
    with left:
        layer = choose("Layer", "layer", about.layers, about.layers[-1])
    with right:
        chunk = choose("Chunk, queries", "chunk", CHUNKS, DEFAULTS[_kind()]["chunk"])
    starts = sources.chunk_starts(about.tokens, chunk)
    start = 0
    if len(starts) > 1:
        held = st.session_state.get("start", starts[-1])
        if held not in starts:  # of chunks of another size, or of another prompt
            st.session_state["start"] = min(max(held, 0) // chunk * chunk, starts[-1])
        if st.session_state.pop("advance", False) and "start" in st.session_state:
            _move(starts, 1)
        start = st.slider("First token of the chunk", 0, starts[-1], starts[-1], chunk, key="start", **BOUND)
        start = start // chunk * chunk
        _walk(starts)
    choose("Query head", "head", range(about.heads), 0, help=f"{about.group} query heads share a KV head.")
    return Place(about.layers.index(layer), start, min(start + chunk, about.tokens))


def _walk(starts: range) -> None:
    """One chunk back, one forward, and a switch that walks by itself."""
    row = st.container(horizontal=True, vertical_alignment="center")
    row.button("", key="back", icon=":material/skip_previous:", help="Chunk before", on_click=_move, args=(starts, -1))
    row.button("", key="forward", icon=":material/skip_next:", help="Next chunk", on_click=_move, args=(starts, 1))
    playing = row.toggle("Play", key="playing", help="Walk through the chunks, one every 1.5 seconds.")
    if playing:
        st.session_state["ticked"] = False
        _tick()


@st.fragment(run_every=1.5)
def _tick() -> None:
    """Ask for the next chunk; the first run is the one that drew the page."""
    if st.session_state.get("ticked"):
        st.session_state["ticked"] = False
        st.session_state["advance"] = True
        st.rerun()
    st.session_state["ticked"] = True
