"""The figure of a `serving` result: seconds to the first token by prompt, and what was answered by what was read.

A colour is a contestant. The longest chunks have whole lines and filled marks, shorter ones broken lines, hollow marks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.figure import canvas, finish
from benchmarks.records import Record, tokens
from benchmarks.serving.findings import in_order, mean_score, middle, share_read, tokens_are_right


def draw(result: Record, path: Path) -> None:
    """Two panels, from the result alone; times only behind green gates."""
    figure, panels = canvas(2)
    panels[0].set(title="time to the first token, eager", xlabel="prompt", ylabel="s")
    looks = Looks(result)
    if tokens_are_right(result):
        _times(panels[0], result, looks)
    _answers(panels[1], result, looks)
    finish(figure, panels, result, path)


class Looks:
    """How an engine is drawn, the same in every panel."""

    def __init__(self, result: Record) -> None:
        cases = [record["case"] for record in in_order(result) if record["status"] == "ok"]
        self.contestants = list(dict.fromkeys(case["contestant"] for case in cases))
        self.longest = max((case["chunk"] for case in cases), default=0)

    def of(self, record: Record) -> dict[str, Any]:
        """Of all engines of a contestant with the same chunks, with graphs or without."""
        case = record["case"]
        colour, long = f"C{self.contestants.index(case['contestant']) % 10}", case["chunk"] == self.longest
        return {
            "color": colour,
            "markerfacecolor": colour if long else "white",
            "linestyle": "-" if long else "--",
            "label": f"{case['contestant']}, chunks of {case['chunk']:,}",
        }


def times_shown(result: Record) -> list[tuple[Record, list[tuple[int, float]]]]:
    """Prompts' lengths and seconds by engine without graphs; of scaled models alone where one was needed to select."""
    shown = []
    for record in in_order(result, "ttft"):
        scaled = any(prompt["factor"] != 1 for prompt in record["prompts"])
        line = [(p["length"], middle(p)) for p in record["prompts"] if (p["factor"] != 1) == scaled]
        if line and not record["case"]["graphs"]:
            shown.append((record, sorted(line)))
    return shown


def _times(panel: Any, result: Record, looks: Looks) -> None:
    shown = times_shown(result)
    for record, line in shown:
        panel.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=1.2, **looks.of(record))
    if shown:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({length for _, line in shown for length, _ in line})
        panel.set_xticks(lengths, [tokens(length) for length in lengths])
        low, high = panel.get_ylim()
        seconds = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
        ticks = [one for one in seconds if low <= one <= high]
        panel.set_yticks(ticks, [f"{one:g}" for one in ticks])
        panel.set_yticks([], minor=True)


def _answers(panel: Any, result: Record, looks: Looks) -> None:
    """A point per engine; those that select nothing read all of the past."""
    panel.set(title="answers", xlabel="past blocks read", ylabel="words of the answers that are right")
    labels = set()
    for record in in_order(result, "answers"):
        read, score, look = share_read(record["read"]), mean_score(record), looks.of(record)
        if not math.isnan(score):
            if look["label"] in labels:
                look["label"] = "_"  # once in the legend
            labels.add(look["label"])
            panel.plot([1.0 if math.isnan(read) else read], [score], marker="o", **{**look, "linestyle": ""})
            panel.set(xlim=(0, 1.05), ylim=(0, 1.05))
