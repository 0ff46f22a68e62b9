"""What a setting is worth as tables: recall, errors, frontiers and times, for charts and for CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise

import numpy as np
import pandas as pd

from inspector.cost import Measured, MeasuredRow
from inspector.model import Reading, name_heads
from inspector.recall import Judged, Observed, Outcome, Quoka, excerpt

SAMPLED, UNSAMPLED = "asked by some head", "never asked"
METHODS = ("block table", "QUOKA")


def recall_frame(observed: Observed, ours: Judged, quoka: Quoka, head: int, text: bytes | None) -> pd.DataFrame:
    """One row per observed query of a head."""
    position = observed.position
    return pd.DataFrame(
        {
            "query": observed.step.start + position,
            "table": ours.recall[:, head],
            "QUOKA": quoka.judged.recall[:, head],
            "QUOKA sampled it": np.where(quoka.sampled[position, head], "yes", "no"),
            "text": [excerpt(text, observed.step.start + int(p)) for p in position],
        }
    )


def recall_curve_frame(ours: Judged, quoka: Quoka, head: int) -> pd.DataFrame:
    """The recalls of one head under both methods, ascending, and the share of the queries up to each."""
    parts = []
    for method, judged in zip(METHODS, (ours, quoka.judged), strict=True):
        recall = np.sort(judged.recall[:, head])
        share = np.arange(1, len(recall) + 1) / len(recall)
        parts.append(pd.DataFrame({"method": method, "share": share, "recall": recall}))
    return pd.concat(parts, ignore_index=True)


def sampled_frame(quoka: Quoka, start: int, heads: slice, text: bytes | None) -> pd.DataFrame:
    """One row per token of the chunk: which heads of a KV group let its query speak in QUOKA."""
    sampled = quoka.sampled[:, heads]
    position = start + np.arange(len(sampled))
    return pd.DataFrame(
        {
            "query": position,
            "end": position + 1,
            "heads": sampled.sum(1),
            "sampled": np.where(sampled.any(1), SAMPLED, UNSAMPLED),
            "sampled_by": name_heads(sampled.T, range(heads.start, heads.stop)),
            "text": [excerpt(text, int(p)) for p in position],
        }
    )


def recall_heat_frame(observed: Observed, ours: Judged, quoka: Quoka, *, parts: int = 64) -> pd.DataFrame:
    """Mean recall per head and stretch of queries, for both methods; a run is a stretch."""
    position = observed.position
    if observed.whole:
        edges = np.unique(np.linspace(0, len(position), min(parts, len(position)) + 1).astype(int))
        stretches = list(pairwise(edges))
    else:
        ends = np.cumsum([end - first for first, end in observed.runs])
        stretches = list(zip([0, *ends[:-1]], ends, strict=True))
    rows = []
    for method, judged in zip(METHODS, (ours, quoka.judged), strict=True):
        for n, (a, b) in enumerate(stretches):
            first, last = observed.step.start + position[a], observed.step.start + position[b - 1]
            for head, value in enumerate(judged.recall[a:b].mean(0)):
                rows.append(
                    (method, head, n, f"{first:,} to {last:,}", float(value), float(judged.recall[a:b, head].min()))
                )
    return pd.DataFrame(rows, columns=["method", "head", "stretch", "queries", "recall", "worst"])


def error_frame(ours: Judged, quoka: Quoka) -> pd.DataFrame:
    parts = zip(METHODS, (ours, quoka.judged), strict=True)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "method": name,
                    "head": np.arange(len(judged.error)),
                    "error": judged.error,
                    "density": judged.density,
                    "mean recall": judged.recall.mean(0),
                    "worst recall": judged.recall.min(0),
                    "queries under 0.9": (judged.recall < 0.9).sum(0),
                }
            )
            for name, judged in parts
        ],
        ignore_index=True,
    )


def scatter_frame(judged: dict[str, Judged]) -> pd.DataFrame:
    """Density against error, one point per head and selector."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "selector": name,
                    "head": np.arange(len(found.error)),
                    "density": found.density,
                    "error": found.error,
                    "mean recall": found.recall.mean(0),
                }
            )
            for name, found in judged.items()
        ],
        ignore_index=True,
    )


def outcome_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(point) for point in outcomes], columns=[field.name for field in fields(Outcome)])
    frame["lost"] = 1.0 - frame["recall"]
    frame["lost_worst"] = 1.0 - frame["worst"]
    return frame


def measured_frame(measured: Measured) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(row) for row in measured.rows], columns=[field.name for field in fields(MeasuredRow)])
    frame["method"] = frame["family"].map({"attend": "block table", "dense": "Dense"})
    frame["ratio"] = [row.ratio for row in measured.rows]
    frame["context"] = [f"{c // 1024}K" for c in frame["context"]]
    return frame


def compare_frame(a: Reading, b: Reading, judged_a: Judged, judged_b: Judged) -> pd.DataFrame:
    """Per head, what two settings read and miss."""
    columns = {"head": np.arange(a.heads)}
    for name, reading, judged in (("A", a, judged_a), ("B", b, judged_b)):
        columns[f"past read, {name}"] = reading.density()
        columns[f"mean recall, {name}"] = judged.recall.mean(0)
        columns[f"worst recall, {name}"] = judged.recall.min(0)
        columns[f"error, {name}"] = judged.error
    return pd.DataFrame(columns)


def moves_frame(heads: pd.DataFrame) -> pd.DataFrame:
    """`compare_frame` in long form: one row per head and setting."""
    names = {"past read": "density", "mean recall": "recall", "worst recall": "worst", "error": "error"}
    parts = [
        heads[["head"]].assign(setting=setting, **{short: heads[f"{name}, {setting}"] for name, short in names.items()})
        for setting in ("A", "B")
    ]
    return pd.concat(parts, ignore_index=True)
