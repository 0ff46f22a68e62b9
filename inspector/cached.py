"""The model's functions behind Streamlit's caches: one result per source, place and setting.

Results are shared between sessions and never written to. Settings are told apart by `Setting.key`.
"""

from __future__ import annotations

import streamlit as st
import torch

from compactattn import KVSummary, SeerGate, Selector
from compactattn.capture import Capture
from inspector import cost, gates, model, recall, sources
from inspector.files import ChosenFile, GateWeights, Recorded
from inspector.model import Mass, Reading, Setting
from inspector.recall import Judged, Observed, Outcome, Quoka
from inspector.sources import About, Place, Source, Step, Synthetic

UPLOADS = "uploads"  # where a session keeps the bytes of its uploads, by their digests

_keys = {"hash_funcs": {Setting: lambda setting: setting.key}}
_few = {"max_entries": 3}
_many = {"max_entries": 256, "show_spinner": False, **_keys}


@st.cache_resource(max_entries=2, show_spinner="Reading the capture")
def _capture(source: Recorded, _data: bytes | None) -> Capture:
    return sources.load(source, _data)


def capture(source: Recorded) -> Capture:
    return _capture(source, _uploaded(source))


def _uploaded(file: ChosenFile) -> bytes | None:
    return st.session_state.get(UPLOADS, {}).get(file.upload)


@st.cache_resource(max_entries=4, show_spinner="Reading the gate")
def _gates(weights: GateWeights, source: Recorded, _data: bytes | None) -> dict[int, SeerGate]:
    return gates.load(weights, about(source), _data)


def gate(weights: GateWeights, source: Recorded, layer: int) -> SeerGate:
    """The gate of one layer of a capture, in the selector's default setting."""
    return gates.of_layer(_gates(weights, source, _uploaded(weights)), layer, weights)


@st.cache_resource(**_many)
def about(source: Source) -> About:
    return sources.describe(source, None if isinstance(source, Synthetic) else capture(source))


@st.cache_resource(show_spinner="Filling the cache up to this chunk", **_few)
def step(source: Source, place: Place, page_size: int) -> Step:
    if isinstance(source, Synthetic):
        return sources.make_synthetic_step(source, place, page_size)
    return sources.make_recorded_step(capture(source), place, page_size)


@st.cache_resource(max_entries=8, show_spinner=False)
def _summary(
    source: Source, place: Place, page_size: int, kind: str, block_size: int, _selector: Selector
) -> KVSummary | None:
    """Of one kind of selector: neither its threshold nor a gate's weights decide what is pooled."""
    return model.make_summary(step(source, place, page_size), _selector)


@st.cache_resource(max_entries=256, show_spinner="Selecting blocks", **_keys)
def reading(source: Source, place: Place, page_size: int, setting: Setting) -> Reading:
    selector = setting.selector
    summary = _summary(source, place, page_size, type(selector).__name__, selector.block_size, selector)
    return model.read(step(source, place, page_size), setting, summary)


@st.cache_resource(max_entries=16, show_spinner="Computing the exact attention mass")
def mass(source: Source, place: Place, page_size: int, block_size: int, query_block: int) -> Mass:
    return model.block_mass(step(source, place, page_size), block_size, query_block)


@st.cache_resource(**_many)
def sharing_costs(source: Source, place: Place, page_size: int, setting: Setting) -> list[model.SharingCost]:
    found = reading(source, place, page_size, setting)
    return model.sharing_costs(step(source, place, page_size), found)


@st.cache_resource(show_spinner="Attending densely, to compare with", **_few)
def observed(source: Source, place: Place, page_size: int) -> Observed:
    return recall.observe(step(source, place, page_size))


@st.cache_resource(max_entries=256, show_spinner="Measuring recall and error", **_keys)
def judged(source: Source, place: Place, page_size: int, setting: Setting) -> Judged:
    return recall.judge(observed(source, place, page_size), reading(source, place, page_size, setting))


@st.cache_resource(show_spinner="Ranking the past as QUOKA does", **_few)
def quoka_ranking(source: Source, place: Place, page_size: int) -> list[torch.Tensor]:
    return recall.rank_quoka(observed(source, place, page_size))


@st.cache_resource(max_entries=64, show_spinner="Running QUOKA", **_keys)
def quoka(source: Source, place: Place, page_size: int, setting: Setting) -> Quoka:
    """QUOKA at the budget of a setting's table."""
    budget = judged(source, place, page_size, setting).tokens
    ranking = quoka_ranking(source, place, page_size)
    return recall.judge_quoka(observed(source, place, page_size), budget=budget, ranking=ranking)


@st.cache_resource(max_entries=64, show_spinner="Running QUOKA", **_keys)
def quoka_by_ratio(source: Source, place: Place, page_size: int, kv_ratio: float) -> Quoka:
    """QUOKA with a share of the past."""
    ranking = quoka_ranking(source, place, page_size)
    return recall.judge_quoka(observed(source, place, page_size), kv_ratio=kv_ratio, ranking=ranking)


@st.cache_resource(max_entries=512, show_spinner=False, **_keys)
def outcome(source: Source, place: Place, page_size: int, setting: Setting, value: float) -> Outcome:
    """One point of a frontier."""
    found = reading(source, place, page_size, setting)
    name, density = type(setting.selector).__name__, found.cascade.densities()["mask"]
    return recall.outcome(name, value, judged(source, place, page_size, setting), density)


@st.cache_resource(**_many)
def quoka_outcome(source: Source, place: Place, page_size: int, kv_ratio: float) -> Outcome:
    return recall.outcome("QUOKA", kv_ratio, quoka_by_ratio(source, place, page_size, kv_ratio).judged)


@st.cache_resource(**_many)
def measured() -> cost.Measured:
    return cost.load_measured()
