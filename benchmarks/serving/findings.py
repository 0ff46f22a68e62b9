"""What a `serving` result says: scores, shares, fastest times, and whether tokens are right."""

from __future__ import annotations

import math
import statistics

import numpy as np

from benchmarks.measure import rows_of
from benchmarks.records import Record, of_kind
from benchmarks.serving.cases import BASELINE, EXACT, preset


def in_order(result: Record, kind: str | None = None) -> list[Record]:
    """The records in the order of the preset, unknown ones last; of a kind, if given, those that are ok.

    A run that was resumed has measured what failed before, and so behind what followed it.
    """
    places = {case.name: n for n, case in enumerate(preset(result["preset"]).cases)}
    records = result["cases"] if kind is None else of_kind(result, kind)
    return sorted(records, key=lambda record: places.get(record["name"], len(places)))


def tokens_are_right(result: Record) -> bool:
    """Whether there is a gate in the result, and all are green."""
    gates = [row["gate"]["passed"] for record in of_kind(result, "answers") for row in rows_of(record)]
    return bool(gates) and all(gates)


def mean_score(record: Record, **of: object) -> float:
    """The share of the answers' words that an engine said, of the prompts in one batch; NaN without any.

    Args:
        of: a length or a task, to which the prompts are confined.
    """
    scores = [
        answer["score"]
        for answer in record["answers"]
        if answer["asked"] == "mixed" and all(answer[name] == value for name, value in of.items())
    ]
    return sum(scores) / len(scores) if scores else math.nan


def share_read(read: Record | None) -> float:
    """Of the past blocks that chunks which select see; NaN for engines that select nothing."""
    return read["read"] / read["visible"] if read and read["visible"] else math.nan


def prompt_name(record: Record, prompt: Record) -> str:
    """Of a timed prompt: its engine, and whether queries and keys were scaled."""
    return record["name"] + ("" if prompt["factor"] == 1 else ", scaled")


def middle(prompt: Record) -> float:
    """Median seconds to the first token."""
    return statistics.median(prompt["seconds"])


def times_dense(result: Record, record: Record, prompt: Record) -> dict[str, float]:
    """How many times faster a prompt is than in either engine that reads everything: vLLM's backend, the plugin."""
    found = {name: beside(result, record, name) for name in (BASELINE, EXACT)}
    return {name: _seconds(one, prompt["length"]) / middle(prompt) for name, one in found.items()}


def beside(result: Record, record: Record, contestant: str) -> Record | None:
    """The timed engine of a contestant with chunks and graphs as `record`."""
    alike = (record["case"]["chunk"], record["case"]["graphs"])
    for one in of_kind(result, "ttft"):
        case = one["case"]
        if case["contestant"] == contestant and (case["chunk"], case["graphs"]) == alike:
            return one
    return None


def _seconds(record: Record | None, length: int) -> float:
    found = [middle(prompt) for prompt in record["prompts"] if prompt["length"] == length] if record else []
    return found[0] if found else math.nan


def first_tokens(base: Record, record: Record) -> tuple[int, int, float] | None:
    """Of the prompts that both timed engines answered: how many, how many first tokens are the same, and the largest
    difference between the log-probabilities of a token among the two best of both; None without any."""
    ours, theirs = base.get("checked"), record.get("checked")
    if not ours or not theirs or len(ours) != len(theirs):
        return None
    same, largest = 0, 0.0
    for one, other in zip(ours, theirs, strict=True):
        same += one["tokens"][0] == other["tokens"][0]
        first, second = (dict(zip(side["top2"][0][::2], side["top2"][0][1::2], strict=True)) for side in (one, other))
        largest = max([largest, *(abs(first[token] - second[token]) for token in first.keys() & second.keys())])
    return len(ours), same, largest


def step_ms(record: Record) -> tuple[float, float, float] | None:
    """Milliseconds of a decode step of all requests together: median, 20th and 80th percentile; None without any."""
    steps = record["decode"].get("steps_s")
    if not steps:
        return None
    low, middle, high = (float(one) * 1e3 for one in np.percentile(steps, (20, 50, 80)))
    return middle, low, high
