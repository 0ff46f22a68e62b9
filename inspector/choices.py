"""How blocks are selected and who shares a list of them: half of the sidebar, and setting B of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from compactattn import Dense, FlashPrefill, KeyBounds, Oracle, SeerGate, Selector, XAttention
from compactattn.validation import BLOCK_SIZES, QUERY_BLOCKS
from inspector import cached, model
from inspector.files import GateWeights, Recorded
from inspector.model import Setting
from inspector.sources import About, Place, Source
from inspector.widgets import BOUND, UndecidedError, ask_file, choose

WHOLE = "chunk"
_SELECTED = {"FlashPrefill": FlashPrefill, "KeyBounds": KeyBounds, "XAttention": XAttention, "Oracle": Oracle}


@dataclass(frozen=True)
class Parameter:
    """A selector's own parameter.

    Attributes:
        field: of the selector.
        key: of its widget, and so of the address.
        default: what the reader starts with.
        sweep: the values that a frontier goes through.
        scale: the values that the slider offers; None is every multiple of 0.005 from 0 to 1.
    """

    field: str
    key: str
    default: float
    sweep: tuple[float, ...]
    scale: tuple[float, ...] | None = None


_THRESHOLDS = tuple(float(f"{digit}e-{power}") for power in (5, 4, 3, 2, 1) for digit in (1, 2, 5))
PARAMETERS = {
    "FlashPrefill": Parameter(
        "alpha", "alpha", 0.1, (0.005, 0.01, 0.02, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 0.9)
    ),
    "KeyBounds": Parameter(
        "threshold", "bounds_threshold", 0.1, (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)
    ),
    "XAttention": Parameter("threshold", "threshold", 0.9, (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)),
    "Oracle": Parameter("mass", "mass", 0.95, (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)),
    "SeerGate": Parameter("threshold", "gate_threshold", 0.01, _THRESHOLDS[1:-1], (0.0, *_THRESHOLDS, 1.0)),
}


@dataclass(frozen=True)
class Subject:
    """What settings are asked for: the data, the place in it, and what suits such data to begin with."""

    source: Source
    about: About
    place: Place
    defaults: dict[str, Any]

    def selectors(self) -> list[str]:
        """Names to choose from: a gate is trained for a model, and a synthetic prompt has none."""
        names = [*_SELECTED, "SeerGate", "Dense"]
        return names if isinstance(self.source, Recorded) else [name for name in names if name != "SeerGate"]

    @property
    def has_gate(self) -> bool:
        """Whether a gate ships for these data: for the sample."""
        return self.source == Recorded.from_path("") and GateWeights.SHIPPED.exists()

    @property
    def layer(self) -> int:
        """The model's number of the layer."""
        return self.about.layers[self.place.layer]


def ask_selector(subject: Subject, prefix: str = "") -> tuple[Selector, GateWeights | None]:
    """The selector and its own settings, and the file of a gate's weights.

    `prefix` tells the second selector of a comparison from the first, whose block sizes it shares.

    Raises:
        FileNotFoundError, ValueError, UndecidedError: of a gate's weights, see `ask_weights`.
    """
    name = choose("Selector", f"{prefix}selector", subject.selectors(), "FlashPrefill")
    weights = ask_weights(subject, prefix) if name == "SeerGate" else None
    if name != "Dense":
        value = ask_parameter(name, subject, prefix)
        left, right = st.columns(2)
        sink = left.number_input("Sink blocks", 0, 64, subject.defaults["sink"], key=f"{prefix}sink", **BOUND)
        window = right.number_input("Window blocks", 0, 64, subject.defaults["window"], key=f"{prefix}window", **BOUND)
    if not prefix:
        left, right = st.columns(2)
        with left:
            choose("KV block", "block", BLOCK_SIZES, subject.defaults["block"])
        with right:
            choose("Query block", "qblock", QUERY_BLOCKS, subject.defaults["qblock"])
    sizes = {"block_size": st.session_state["block"], "query_block": st.session_state["qblock"]}
    if name == "Dense":
        return Dense(**sizes), None
    rules = {"sink_blocks": int(sink), "window_blocks": int(window), **sizes}
    return make_selector(name, value, _gate(subject, weights), **rules), weights


def ask_parameter(name: str, subject: Subject, prefix: str = "", label: str | None = None) -> float:
    """The value of a selector's own parameter."""
    parameter = PARAMETERS[name]
    key, label = prefix + parameter.key, label or parameter.field
    default = subject.defaults.get(parameter.key, parameter.default)
    if parameter.scale is None:
        return st.slider(label, 0.0, 1.0, default, 0.005, key=key, format="%.3f", **BOUND)
    if key in st.session_state and st.session_state[key] not in parameter.scale:
        del st.session_state[key]
    return st.select_slider(label, parameter.scale, default, format_func=lambda value: f"{value:g}", key=key, **BOUND)


def ask_weights(subject: Subject, prefix: str = "") -> GateWeights:
    """A gate's weights: the reader's own, or for the sample those that ship.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that is too large.
        UndecidedError: none was chosen yet.
    """
    chosen = ask_file(
        GateWeights,
        f"{prefix}gate",
        "Path of gate weights",
        ("safetensors", "pth"),
        placeholder="/path/to/attn_gate_weights.pth",
        help="Weights as SeerAttention publishes them, for the model that this capture is of.",
    )
    if chosen is not None:
        return chosen
    if subject.has_gate:
        return GateWeights.from_path("")
    st.info("Name the weights of a gate for this model or upload them. Nothing else is read.", icon=":material/key:")
    raise UndecidedError


def _gate(subject: Subject, weights: GateWeights | None) -> SeerGate | None:
    return None if weights is None else cached.gate(weights, subject.source, subject.layer)


def ask_gate(subject: Subject, weights: GateWeights | None) -> SeerGate:
    """A gate to compare others with: the one of the sidebar, or one that is asked for here.

    Raises:
        FileNotFoundError, ValueError, UndecidedError: see `ask_weights`.
    """
    gate = _gate(subject, weights or ask_weights(subject))
    assert gate is not None
    return gate


def make_selector(name: str, value: float, gate: SeerGate | None = None, **rules: int) -> Selector:
    """A selector by its name and the value of its own parameter; `gate`: whose weights a SeerGate has."""
    values = {PARAMETERS[name].field: value, **rules}
    if name == "SeerGate":
        assert gate is not None
        return replace(gate, **values)
    return _SELECTED[name](**values)


def with_selector(setting: Setting, name: str, value: float, gate: SeerGate | None = None) -> Setting:
    """The same blocks, sink, window and grouping under another selector, or another value of its parameter."""
    sizes = ("sink_blocks", "window_blocks", "block_size", "query_block")
    kept = {field: getattr(setting.selector, field) for field in sizes}
    return replace(setting, selector=make_selector(name, value, gate, **kept))


def ask_sharing(selector: Selector, subject: Subject, prefix: str = "") -> Setting:
    """How many heads and query blocks share a table row; the second setting of a comparison starts without sharing."""
    sizes, place = model.divisors(subject.about.group), subject.place
    wanted, whole = (1, "1") if prefix else (subject.defaults["share"], WHOLE)
    left, right = st.columns(2)
    with left:
        heads = choose("Heads per group", f"{prefix}share", sizes, wanted if wanted in sizes else sizes[-1])
    query_blocks = -(-(place.stop - place.start) // selector.query_block)
    spans = [WHOLE, *(str(n) for n in model.span_choices(query_blocks) if n < query_blocks)]
    with right:
        span = choose("Blocks per span", f"{prefix}span", spans, whole)
    return Setting(selector, heads, None if span == WHOLE else int(span))
