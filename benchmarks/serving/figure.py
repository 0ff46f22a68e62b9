"""The figure of a `serving` result: seconds to the first token by prompt, and what was answered by what was read."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish, lines
from benchmarks.records import Record, of_kind, tokens
from benchmarks.serving.findings import mean_score, middle, prompt_name, share_read, tokens_are_right


def draw(result: Record, path: Path) -> None:
    """Two panels, from the result alone; times only behind green gates."""
    figure, panels = canvas(2)
    panels[0].set(title="time to the first token", xlabel="prompt", ylabel="s")
    if tokens_are_right(result):
        _times(panels[0], result)
    _answers(panels[1], result)
    finish(figure, panels, result, path)


def _short(name: str) -> str:
    """Of an engine, without what its panel says: "ttft-dense-q1024-eager" is "dense-q1024-eager"."""
    return name.partition("-")[2]


def _times(panel: Any, result: Record) -> None:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in of_kind(result, "ttft"):
        for prompt in record["prompts"]:
            points[_short(prompt_name(record, prompt))].append((prompt["length"], middle(prompt)))
    lines(panel, points)
    if points:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({length for line in points.values() for length, _ in line})
        panel.set_xticks(lengths, [tokens(length) for length in lengths])
        low, high = panel.get_ylim()
        seconds = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
        shown = [one for one in seconds if low <= one <= high]
        panel.set_yticks(shown, [f"{one:g}" for one in shown])
        panel.set_yticks([], minor=True)


def _answers(panel: Any, result: Record) -> None:
    """A point per engine; those that select nothing read all of the past."""
    panel.set(title="answers", xlabel="past blocks read", ylabel="words of the answers that are right")
    for n, record in enumerate(of_kind(result, "answers")):
        read, score = share_read(record["read"]), mean_score(record)
        if not math.isnan(score):
            panel.plot([1.0 if math.isnan(read) else read], [score], "oxs^v*Dd+P"[n % 10], label=_short(record["name"]))
            panel.set(xlim=(0, 1.05), ylim=(0, 1.05))
