"""What a `serving` result says: scores, shares, fastest times, and whether tokens are right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.measure import rows_of
from benchmarks.records import Record, of_kind
from benchmarks.serving.cases import BASELINE, EXACT


def tokens_are_right(result: Record) -> bool:
    """Whether there is a gate in the result, and all are green."""
    gates = [row["gate"]["passed"] for record in of_kind(result, "answers") for row in rows_of(record)]
    return bool(gates) and all(gates)


def mean_score(record: Record, task: str | None = None) -> float:
    """The share of the answers' words that an engine said, of the prompts in one batch; NaN without any."""
    scores = [
        answer["score"] for answer in record["answers"] if answer["asked"] == "mixed" and task in (None, answer["task"])
    ]
    return sum(scores) / len(scores) if scores else math.nan


def share_read(read: Record | None) -> float:
    """Of the past blocks that chunks which select see; NaN for engines that select nothing."""
    return read["read"] / read["visible"] if read and read["visible"] else math.nan


def prompt_name(record: Record, prompt: Record) -> str:
    """Of a timed prompt: its engine, and whether queries and keys were scaled."""
    return record["name"] + ("" if prompt["factor"] == 1 else ", scaled")


def times_dense(result: Record, record: Record, prompt: Record) -> dict[str, float]:
    """How many times faster a prompt is than in either engine that reads everything: vLLM's backend, the plugin."""
    seconds = min(prompt["seconds"])
    engines = of_kind(result, "ttft")
    return {name: _fastest(engines, name, record, prompt["length"]) / seconds for name in (BASELINE, EXACT)}


def _fastest(engines: Sequence[Record], contestant: str, beside: Record, length: int) -> float:
    """Seconds of a contestant with graphs or without, as `beside`; NaN where it has no such prompt."""
    for one in engines:
        case = one["case"]
        if case["contestant"] == contestant and case["graphs"] == beside["case"]["graphs"]:
            found = [min(prompt["seconds"]) for prompt in one["prompts"] if prompt["length"] == length]
            return found[0] if found else math.nan
    return math.nan


def step_ms(record: Record) -> float:
    """Milliseconds of a decode step of all requests together."""
    decode = record["decode"]
    return (min(decode["more"]) - min(decode["first"])) / decode["steps"] * 1e3
