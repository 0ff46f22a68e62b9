"""The settings that every page shares, each of them in the address: what to look at, and how blocks are selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from benchmarks.workloads import WORKLOADS
from compactattn import Dense, FlashPrefill, Oracle, Selector, XAttention
from compactattn.validation import BLOCK_SIZES, QUERY_BLOCKS
from inspector import cached, model, sources
from inspector.model import Setting
from inspector.sources import About, Place, Recorded, Source, Synthetic

SAMPLE, FILE, WORKLOAD = "Sample", "File", "Synthetic"
SELECTORS = ("FlashPrefill", "XAttention", "Oracle", "Dense")
#: Each selector's own parameter: its label, its default, and the values that a sweep goes through.
PARAMETERS = {
    "FlashPrefill": ("alpha", 0.1, (0.005, 0.01, 0.02, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 0.9)),
    "XAttention": ("threshold", 0.9, (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)),
    "Oracle": ("mass", 0.95, (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)),
}
CHUNKS = (128, 256, 512, 1024, 2048)
WHOLE = "chunk"
BOUND = {"bind": "query-params"}
#: What suits a recorded prompt of a few thousand tokens, and the paper's setting for a long one.
DEFAULTS: dict[str, dict[str, Any]] = {
    SAMPLE: {
        "chunk": 512,
        "block": 64,
        "qblock": 64,
        "sink": 1,
        "window": 2,
        "alpha": 0.1,
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
    """What the reader looks at."""

    source: Source
    about: About
    place: Place
    page_size: int
    head: int
    setting: Setting
    dark: bool

    @property
    def at(self) -> tuple[Source, Place, int]:
        """The first arguments of everything in `cached`."""
        return self.source, self.place, self.page_size

    @property
    def kv_head(self) -> int:
        return self.head // self.about.group


class UndecidedError(Exception):
    """There is nothing to show before the reader has decided; what to decide is on the page already."""


def ask() -> View:
    """Draw the sidebar.

    Raises:
        FileNotFoundError, ValueError: a file that is no capture.
        UndecidedError: no file chosen yet.
    """
    with st.sidebar:
        st.subheader("Data")
        source = _ask_source()
        about = cached.about(source)
        place = _ask_place(about)
        st.subheader("Selector")
        selector = ask_selector(_kind())
        if isinstance(selector, Oracle) and place.stop > 16384:
            st.caption("Oracle computes the exact attention of every query first: seconds at this length.")
        st.subheader("Sharing")
        setting = ask_sharing(selector, about.group, place, _kind())
        with st.expander("Cache layout"):
            page_size = _choose("Tokens per page", "page_size", sources.PAGE_SIZES, DEFAULTS[_kind()]["page_size"])
    return View(source, about, place, page_size, st.session_state["head"], setting, st.context.theme.type == "dark")


def _kind() -> str:
    return st.session_state.get("data") or SAMPLE


def _choose(label: str, key: str, options: Sequence[Any], default: Any, **more: Any) -> Any:
    """A select box that is bound to the address and falls back to its default when its options change."""
    options = list(options)
    if key in st.session_state and st.session_state[key] not in options:
        del st.session_state[key]
    index = options.index(default) if default in options else 0
    return st.selectbox(label, options, index, key=key, **BOUND, **more)


def _reset() -> None:
    """Another kind of data has other sensible settings."""
    for key, value in DEFAULTS[_kind()].items():
        st.session_state[key] = value
    for key in ("start", "layer", "head", "span"):
        st.session_state.pop(key, None)


def _ask_source() -> Source:
    kind = st.segmented_control(
        "Where from",
        [SAMPLE, FILE, WORKLOAD],
        default=SAMPLE,
        key="data",
        required=True,
        on_change=_reset,
        label_visibility="collapsed",
        width="stretch",
        **BOUND,
    )
    if kind == FILE:
        return _ask_file()
    if kind == WORKLOAD:
        return _ask_workload()
    return Recorded.from_path("")


def _open_typed() -> None:
    st.session_state["opened"] = st.session_state["file"]


def _ask_file() -> Recorded:
    path = st.text_input(
        "Path of a capture",
        key="file",
        placeholder="/path/to/capture.safetensors",
        on_change=_open_typed,
        help="A safetensors file that `compactattn.capture.save_capture` wrote. It stays on this machine.",
        **BOUND,
    ).strip()
    upload = st.file_uploader("or upload one", type="safetensors", key="upload", max_upload_size=512)
    if upload is not None:
        data = upload.getvalue()
        st.session_state[cached.UPLOAD] = data
        return Recorded.from_upload(upload.name, data)
    if not path:
        st.info("Name a capture or upload one. Nothing else is read.", icon=":material/folder_open:")
        raise UndecidedError
    if st.session_state.get("opened", "").strip() != path:
        st.warning("This link names a file on this machine. It is not read before you say so.")
        st.code(path, language=None, wrap_lines=True)
        if not st.button("Open this file", icon=":material/lock_open:"):
            raise UndecidedError
        st.session_state["opened"] = path
    return Recorded.from_path(path)


def _ask_workload() -> Synthetic:
    workload = _choose("Workload", "workload", list(WORKLOADS), "vertical-slash")
    context = _choose("Prompt, tokens", "context", sources.CONTEXTS, sources.CONTEXTS[-1])
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
        kv_heads = _choose("KV heads", "kv", (1, 2, 4), 2)
    with middle:
        group = _choose("G", "group", (1, 2, 4, 8), 4, help="Query heads per KV head.")
    with right:
        seed = st.number_input("Seed", 0, 9999, 0, key="seed", **BOUND)
    return Synthetic(workload, context, correlation, kv_heads, group, int(seed))


def _move(starts: list[int], by: int) -> None:
    """Walk to a neighbouring chunk; from the last one on to the first."""
    here = starts.index(st.session_state["start"])
    st.session_state["start"] = starts[(here + by) % len(starts)]


def _ask_place(about: About) -> Place:
    left, right = st.columns(2)
    with left:
        layer = _choose("Layer", "layer", about.layers, about.layers[-1])
    with right:
        chunk = _choose("Chunk, queries", "chunk", CHUNKS, DEFAULTS[_kind()]["chunk"])
    starts = sources.chunk_starts(about.tokens, chunk)
    if len(starts) > 1:
        if st.session_state.get("start", starts[-1]) not in starts:
            del st.session_state["start"]
        if st.session_state.pop("advance", False) and "start" in st.session_state:
            _move(starts, 1)
        start = st.select_slider("First token of the chunk", starts, starts[-1], key="start", **BOUND)
        _walk(starts)
    else:
        start = 0
    heads = list(range(about.heads))
    _choose("Query head", "head", heads, 0, help=f"{about.group} query heads share a KV head.")
    return Place(about.layers.index(layer), start, min(start + chunk, about.tokens))


def _walk(starts: list[int]) -> None:
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


def ask_selector(kind: str, prefix: str = "") -> Selector:
    """The selector and its own settings; `prefix` tells the second one of a comparison from the first."""
    defaults = DEFAULTS[kind]
    name = _choose("Selector", f"{prefix}selector", SELECTORS, SELECTORS[0])
    if name != "Dense":
        label, default, _ = PARAMETERS[name]
        value = st.slider(
            label, 0.0, 1.0, defaults.get(label, default), 0.005, key=prefix + label, format="%.3f", **BOUND
        )
        left, right = st.columns(2)
        sink = left.number_input("Sink blocks", 0, 64, defaults["sink"], key=f"{prefix}sink", **BOUND)
        window = right.number_input("Window blocks", 0, 64, defaults["window"], key=f"{prefix}window", **BOUND)
    if not prefix:
        left, right = st.columns(2)
        with left:
            _choose("KV block", "block", BLOCK_SIZES, defaults["block"])
        with right:
            _choose("Query block", "qblock", QUERY_BLOCKS, defaults["qblock"])
    sizes = {"block_size": st.session_state["block"], "query_block": st.session_state["qblock"]}
    if name == "Dense":
        return Dense(**sizes)
    return make_selector(name, value, sink_blocks=int(sink), window_blocks=int(window), **sizes)


def make_selector(name: str, value: float, **fields: int) -> Selector:
    """A selector by its name and the value of its own parameter."""
    kinds = {"FlashPrefill": FlashPrefill, "XAttention": XAttention, "Oracle": Oracle}
    return kinds[name](**{PARAMETERS[name][0]: value}, **fields)


def with_selector(setting: Setting, name: str, value: float) -> Setting:
    """The same blocks, sink, window and grouping under another selector, or another value of its parameter."""
    sizes = ("sink_blocks", "window_blocks", "block_size", "query_block")
    kept = {field: getattr(setting.selector, field) for field in sizes}
    return replace(setting, selector=make_selector(name, value, **kept))


def parameter(name: str) -> float:
    """The value of a selector's own parameter: what the reader last set, or its default."""
    label, default, _ = PARAMETERS[name]
    return st.session_state.get(label, DEFAULTS[_kind()].get(label, default))


def ask_sharing(selector: Selector, group: int, place: Place, kind: str, prefix: str = "") -> Setting:
    """How many heads and query blocks share a table row; the second setting of a comparison starts without sharing."""
    sizes = model.divisors(group)
    wanted, whole = (1, "1") if prefix else (DEFAULTS[kind]["share"], WHOLE)
    left, right = st.columns(2)
    with left:
        heads = _choose("Heads per group", f"{prefix}share", sizes, wanted if wanted in sizes else sizes[-1])
    query_blocks = -(-(place.stop - place.start) // selector.query_block)
    spans = [WHOLE, *(str(n) for n in model.span_choices(query_blocks) if n < query_blocks)]
    with right:
        span = _choose("Blocks per span", f"{prefix}span", spans, whole)
    return Setting(selector, heads, None if span == WHOLE else int(span))
