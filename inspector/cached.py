"""The model's functions behind Streamlit's caches: one result per source, place and setting.

Results are shared between sessions and never written to.
"""

from __future__ import annotations

import streamlit as st
import torch

from compactattn import KVSummary
from compactattn.capture import Capture
from inspector import cost, model, recall, sources
from inspector.model import Mass, Reading, Setting
from inspector.recall import Judged, Observed, Outcome, Quoka
from inspector.sources import About, Place, Recorded, Source, Step, Synthetic

UPLOAD = "uploaded bytes"  # where a session keeps the bytes of its upload

_few = {"max_entries": 3}
_many = {"max_entries": 256, "show_spinner": False}


@st.cache_resource(max_entries=2, show_spinner="Reading the capture")
def _capture(source: Recorded, _data: bytes | None) -> Capture:
    return sources.load(source, _data)


def capture(source: Recorded) -> Capture:
    return _capture(source, st.session_state.get(UPLOAD) if source.upload else None)


@st.cache_resource(**_many)
def about(source: Source) -> About:
    return sources.describe(source, None if isinstance(source, Synthetic) else capture(source))


@st.cache_resource(show_spinner="Filling the cache up to this chunk", **_few)
def step(source: Source, place: Place, page_size: int) -> Step:
    if isinstance(source, Synthetic):
        return sources.make_synthetic_step(source, place, page_size)
    return sources.make_recorded_step(capture(source), place, page_size)


@st.cache_resource(max_entries=8, show_spinner=False)
def _summary(source: Source, place: Place, page_size: int, block_size: int) -> KVSummary:
    return model.make_summary(step(source, place, page_size), block_size)


@st.cache_resource(max_entries=256, show_spinner="Selecting blocks")
def reading(source: Source, place: Place, page_size: int, setting: Setting) -> Reading:
    summary = _summary(source, place, page_size, setting.selector.block_size)
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


@st.cache_resource(max_entries=256, show_spinner="Measuring recall and error")
def judged(source: Source, place: Place, page_size: int, setting: Setting) -> Judged:
    return recall.judge(observed(source, place, page_size), reading(source, place, page_size, setting))


@st.cache_resource(show_spinner="Ranking the past as QUOKA does", **_few)
def quoka_ranking(source: Source, place: Place, page_size: int) -> list[torch.Tensor]:
    return recall.rank_quoka(observed(source, place, page_size))


@st.cache_resource(max_entries=64, show_spinner="Running QUOKA")
def quoka(source: Source, place: Place, page_size: int, setting: Setting) -> Quoka:
    """QUOKA at the budget of a setting's table."""
    budget = judged(source, place, page_size, setting).tokens
    ranking = quoka_ranking(source, place, page_size)
    return recall.judge_quoka(observed(source, place, page_size), budget=budget, ranking=ranking)


@st.cache_resource(max_entries=64, show_spinner="Running QUOKA")
def quoka_by_ratio(source: Source, place: Place, page_size: int, kv_ratio: float) -> Quoka:
    """QUOKA with a share of the past."""
    ranking = quoka_ranking(source, place, page_size)
    return recall.judge_quoka(observed(source, place, page_size), kv_ratio=kv_ratio, ranking=ranking)


@st.cache_resource(max_entries=512, show_spinner=False)
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
