"""The report of a `serving` result: whose tokens are the same, whose answers right, how long a first token takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import rows_of
from benchmarks.records import Record, check_timed, of_kind, read_kind, table, tokens
from benchmarks.report import written
from benchmarks.serving.cases import BASELINE

ASKED = ("mixed", "cached", "cold")


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.md of a result NAME.json; where it went."""
    result = read_kind(path, "serving", 1)
    check_timed(path, result)
    out = path.parent if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    text = out / f"{path.stem}.md"
    text.write_text(markdown(result), encoding="utf-8")
    return (text,)


def markdown(result: Record) -> str:
    sections = (
        ("Greedy tokens beside the baseline's", answers_section),
        ("Where exact engines part", differences_section),
        ("Accuracy by task", accuracy_section),
        ("Time to the first token", ttft_section),
        ("A decode step", decode_section),
        ("Engines", engines_section),
    )
    return written("vLLM's engine", result, sections, [])


def answers_section(result: Record) -> list[str]:
    """Of each engine: prompts that are equal, those that part at near ties, those that part elsewhere; the gate."""
    rows = []
    for record in of_kind(result, "answers"):
        differences = [answer.get("difference") for answer in record["answers"]]
        near = sum(one is not None and one["near_tie"] for one in differences)
        gate = [row["gate"]["passed"] for row in rows_of(record)]
        rows.append(
            (
                record["name"],
                *(_equal(record, asked) for asked in ASKED),
                near,
                sum(one is not None for one in differences) - near,
                ("green" if all(gate) else "**red**") if gate else "-",
                _mean(record, "mixed"),
                _share_read(record["read"]),
                ", ".join(str(answer["cached"]) for answer in record["answers"] if answer["asked"] == "cached"),
            )
        )
    head = ("engine", "equal: one batch", "equal: prefix cached", "equal: prefix cold", "part at near ties")
    more = ("part elsewhere", "gate", "accuracy", "past blocks read", "tokens found in the cache, by question")
    return table((*head, *more), rows)


def _equal(record: Record, asked: str) -> str:
    answers = [answer for answer in record["answers"] if answer["asked"] == asked]
    if "near_tie_bound" not in record:
        return f"baseline, {len(answers)}"
    return f"{sum(answer['difference'] is None for answer in answers)} of {len(answers)}"


def _mean(record: Record, asked: str, task: str | None = None) -> str:
    scores = [
        answer["score"] for answer in record["answers"] if answer["asked"] == asked and task in (None, answer["task"])
    ]
    return f"{sum(scores) / len(scores):.1%}" if scores else "-"


def _share_read(read: Record | None) -> str:
    """Of the past blocks that chunks which select see; engines that select nothing have none."""
    return f"{read['read'] / read['visible']:.1%}" if read and read["visible"] else "-"


def differences_section(result: Record) -> list[str]:
    """Every prompt of an engine without a selection that parts from the baseline, with both two best tokens there."""
    rows = []
    for record in of_kind(result, "answers"):
        for answer in record["answers"]:
            one = answer.get("difference")
            if one is None or record["case"]["contestant"] not in (BASELINE, "dense"):
                continue
            what = f"{answer['task']}, {tokens(answer['length'])}, {answer['key']} ({answer['asked']})"
            sides = (_best_two(one[side]) for side in ("baseline", "top2"))
            rows.append((record["name"], what, one["place"], *sides, "yes" if one["near_tie"] else "**no**"))
    if not rows:
        return []
    bounds = {f"{record['near_tie_bound']:.3g}" for record in of_kind(result, "answers") if "near_tie_bound" in record}
    head = ("engine", "prompt", "token", "baseline's two best", "its own", f"near tie (gap below {', '.join(bounds)})")
    return table(head, rows)


def _best_two(top2: Sequence[float] | None) -> str:
    if top2 is None:
        return "-"
    first, its, second, others = top2
    return f"{first}: {its:.4f}, {second}: {others:.4f}"


def accuracy_section(result: Record) -> list[str]:
    """The share of the answers' words, by task, of the prompts in one batch."""
    records = of_kind(result, "answers")
    found = {answer["task"]: None for record in records for answer in record["answers"] if answer["asked"] == "mixed"}
    rows = [(record["name"], *(_mean(record, "mixed", task) for task in sorted(found))) for record in records]
    return table(("engine", *sorted(found)), rows)


def ttft_section(result: Record) -> list[str]:
    """Fastest times by length; times the baseline's only where the tokens of the plugin's dense engine were right."""
    right = tokens_are_right(result)
    records, rows = of_kind(result, "ttft"), []
    timed = [(record, prompt) for record in records for prompt in record["prompts"]]
    for record, prompt in sorted(timed, key=lambda one: one[1]["length"]):
        base, seconds = _baseline_seconds(records, record, prompt["length"]), min(prompt["seconds"])
        rows.append(
            (
                tokens(prompt["length"]),
                record["name"] + ("" if prompt["factor"] == 1 else ", scaled"),
                seconds,
                ", ".join(f"{one:.3f}" for one in prompt["seconds"]),
                base / seconds if right else math.nan,
                _share_read(prompt["read"]),
            )
        )
    body = table(("prompt", "engine", "s to the first token", "all", "x triton", "past blocks read"), rows)
    said = "No speedups: no dense engine of the plugin has answered with a green gate in this result."
    return body if right or not body else [*body, "", said]


def tokens_are_right(result: Record) -> bool:
    """Whether there is a gate in the result, and all are green."""
    gates = [row["gate"]["passed"] for record in of_kind(result, "answers") for row in rows_of(record)]
    return bool(gates) and all(gates)


def _baseline_seconds(records: Sequence[Record], record: Record, length: int) -> float:
    """Of the same prompt length in the baseline with graphs, or without, as the record."""
    for one in records:
        case = one["case"]
        if case["contestant"] == BASELINE and case["graphs"] == record["case"]["graphs"]:
            found = [min(prompt["seconds"]) for prompt in one["prompts"] if prompt["length"] == length]
            return found[0] if found else math.nan
    return math.nan


def decode_section(result: Record) -> list[str]:
    """Milliseconds of a step of all requests together."""
    rows = []
    for record in of_kind(result, "ttft"):
        decode = record["decode"]
        step = (min(decode["more"]) - min(decode["first"])) / decode["steps"]
        rows.append((record["name"], decode["requests"], tokens(decode["context"]), step * 1e3, decode["steps"]))
    return table(("engine", "requests", "context of each", "ms per step", "steps"), rows)


def engines_section(result: Record) -> list[str]:
    """What ran, engine by engine, and what was tried to get a density."""
    rows, lines = [], []
    for record in result["cases"]:
        if record["status"] != "ok":
            continue
        engine = record["engine"]
        settings = record["case"]["settings"]
        told = ", ".join(f"{name} {value}" for name, value in settings.items()) if settings else "-"
        names = ("block_size", "cudagraph_mode", "model_runner")
        rows.append(
            (record["name"], ", ".join(engine["attention"]), told, *(engine[name] for name in names), record["seconds"])
        )
        lines += [
            f"- {record['name']}: queries and keys x {one['factor']:.3g}: {one['density']:.1%} read"
            for one in record.get("tried", [])
        ]
        if engine["missing_modules"]:
            lines.append(f"- {record['name']}: without {', '.join(engine['missing_modules'])}")
    head = ("engine", "attention", "settings", "cache block", "CUDA graphs", "model runner", "s in all")
    return [*table(head, rows), "", *lines] if lines else table(head, rows)
