"""The figure of whole prompts: time per chunk, speedup per chunk, and the paper's configuration beside its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish
from benchmarks.published import PAPER_SOURCE, PAPER_SPEEDUPS
from benchmarks.records import Record, of_kind, tokens
from benchmarks.report_prompts import Prompt, dense_name, paper_bars, prompts, row_names, time_of


def holds(result: Record) -> bool:
    """Whether whole prompts were measured."""
    return bool(of_kind(result, "prompt"))


def draw(result: Record, path: Path) -> None:
    """Three panels: milliseconds and speedup by chunk, and bars for the paper's shape."""
    figure, panels = canvas(3)
    found = prompts(result)
    for prompt in found:
        _per_chunk(panels[0], panels[1], prompt)
    if panels[0].lines:
        panels[0].set_yscale("log")
    panels[0].set(title="each chunk of a prompt", xlabel="context at the end of the chunk", ylabel="ms")
    panels[1].set(title="each chunk: speedup over dense", xlabel="context at the end of the chunk", ylabel="x")
    if found:
        panels[1].axhline(1.0, color="black", linewidth=0.8)
    _paper(panels[2], next((prompt for prompt in found if prompt.is_paper_shape), None))
    finish(figure, panels, result, path)


def _per_chunk(times: Any, speedups: Any, prompt: Prompt) -> None:
    dense = dense_name(prompt.chunks)
    contexts = [chunk["context"] for chunk in prompt.chunks]
    shape = f"B={prompt.shape['batch']}"
    for name in row_names(prompt.chunks):
        own = [time_of(chunk, name) for chunk in prompt.chunks]
        if all(math.isnan(time) for time in own):
            continue
        times.plot(contexts, own, label=f"{name}, {shape}", linewidth=1)
        if name.startswith("prefill"):
            base = [time_of(chunk, dense) for chunk in prompt.chunks]
            ratios = [a / b for a, b in zip(base, own, strict=True)]
            speedups.plot(contexts, ratios, label=f"{name}, {shape}", linewidth=1)
    ends = prompt.ends or contexts[-1:]
    for panel in (times, speedups):
        panel.set_xticks(ends, [tokens(end) for end in ends])


def _paper(panel: Any, prompt: Prompt | None) -> None:
    """Bars of this run, then the published ones, hatched and pale, for each prompt length."""
    panel.set(title="TP2 rank, batch 8, chunk 1024: whole prompt, x dense")
    ours = paper_bars(prompt) if prompt is not None else {}
    if not any(ours.values()):
        return
    ends = sorted(PAPER_SPEEDUPS["CompactAttention-FP"])
    series = [(f"{name}, this run (selection + attention)", values, {}) for name, values in ours.items()]
    pale = {"hatch": "//", "alpha": 0.45, "edgecolor": "black", "linewidth": 0.4}
    series += [(f"{name}, published", values, pale) for name, values in PAPER_SPEEDUPS.items()]
    width = 0.85 / len(series)
    for n, (label, values, style) in enumerate(series):
        places = [place + (n - len(series) / 2 + 0.5) * width for place in range(len(ends))]
        panel.bar(places, [values.get(end, 0.0) for end in ends], width, label=label, **style)
    panel.set_xticks(range(len(ends)), [tokens(end) for end in ends])
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_ylabel("x")
    panel.set_xlabel(PAPER_SOURCE.replace(", projections", ",\nprojections"), fontsize=7)
