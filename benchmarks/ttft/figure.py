"""The figure of a `ttft` result: end-to-end speedups beside the paper's, time by chunk, attention's share by chunk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish, lines
from benchmarks.published import PAPER_END_TO_END, PAPER_END_TO_END_SOURCE
from benchmarks.records import Record, tokens
from benchmarks.report_prompts import Prompt, prompts, row_names, time_of
from benchmarks.ttft import findings


def draw(result: Record, path: Path) -> None:
    """Three panels, from the result alone; a prompt is drawn in the first mode that all of its rows have."""
    figure, panels = canvas(3)
    found = [(prompt, modes[0]) for prompt in prompts(result) if (modes := findings.modes_of(prompt))]
    _bars(panels[0], found)
    if found:
        _times(panels[1], *next((pair for pair in found if pair[0].is_paper_shape), found[0]))
    for n, (prompt, mode) in enumerate(found):
        _shares(panels[2], prompt, mode, f"C{n}")
    panels[2].set(title="attention's share of a chunk's time", ylabel="share", ylim=(0, 1))
    contexts = sorted({end for prompt, _ in found for end in prompt.ends})
    for panel in panels[1:]:
        panel.set_xticks(contexts, [tokens(end) for end in contexts])
        panel.set_xlabel("context at the end of the chunk")
    finish(figure, panels, result, path)


def _bars(panel: Any, found: list[tuple[Prompt, str]]) -> None:
    """Bars of this run by prompt length, then the published ones, hatched and pale, where the lengths are theirs."""
    panel.set(title="whole prompt, end to end: x the fastest dense attention", ylabel="x")
    series: list[tuple[str, dict[int, float], dict[str, Any]]] = []
    for prompt, mode in found:
        for name, values in findings.end_to_end(prompt, mode).items():
            series.append((f"{name}, {_short(prompt)}", values, {}))
    ends = sorted({end for _, values, _ in series for end in values})
    if not ends:
        return
    if set(ends) & set(PAPER_END_TO_END["CompactAttention-FP"]):
        pale = {"hatch": "//", "alpha": 0.45, "edgecolor": "black", "linewidth": 0.4}
        series += [(f"{name}, TP2 rank, batch 8, published", values, pale) for name, values in PAPER_END_TO_END.items()]
        panel.set_xlabel(PAPER_END_TO_END_SOURCE, fontsize=7)
    width = 0.85 / len(series)
    for n, (label, values, style) in enumerate(series):
        places = [place + (n - len(series) / 2 + 0.5) * width for place in range(len(ends))]
        heights = [0.0 if math.isnan(values.get(end, math.nan)) else values[end] for end in ends]
        panel.bar(places, heights, width, label=label, **style)
    panel.set_xticks(range(len(ends)), [tokens(end) for end in ends])
    panel.axhline(1.0, color="black", linewidth=0.8)


def _short(prompt: Prompt) -> str:
    """Model, part and batch."""
    return prompt.name.partition(", Hq")[0]


def _times(panel: Any, prompt: Prompt, mode: str) -> None:
    """Every row of one prompt."""
    for n, name in enumerate(row_names(prompt.chunks)):
        points = [(chunk["context"], time_of(chunk, name, mode=mode)) for chunk in prompt.chunks]
        lines(panel, {name: points}, f"C{n}o-")
    panel.set(title=f"a chunk through the model: {_short(prompt)}", ylabel="ms")
    panel.set_ylim(bottom=0)


def _shares(panel: Any, prompt: Prompt, mode: str, colour: str) -> None:
    """The fastest dense attention's, dashed, and the fastest grouping's."""
    chunks = prompt.chunks
    pairs = ((findings.best_dense(chunks, mode), "--"), (findings.best_sparse(chunks, mode), "-"))
    for name, dash in pairs:
        if name is not None:
            points = [(chunk["context"], findings.attention_share([chunk], name, mode)) for chunk in chunks]
            lines(panel, {f"{name}, {_short(prompt)}": points}, f"{colour}o{dash}")
