"""The report of a `serving` result: whose tokens are the same, whose answers right, how long a first token takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.files import write_beside
from benchmarks.measure import rows_of
from benchmarks.records import Record, check_timed, read_kind, table, tokens
from benchmarks.report import written
from benchmarks.serving.cases import BASELINE, EXACT, preset
from benchmarks.serving.figure import draw
from benchmarks.serving.findings import (
    beside,
    first_tokens,
    in_order,
    mean_score,
    middle,
    prompt_name,
    share_read,
    step_ms,
    times_dense,
    tokens_are_right,
)

ASKED = ("mixed", "cached", "cold")
SCALED_SAID = (
    "Queries and keys of dense engines are not scaled, and numbers alone change the time of a chunk (maybe through the "
    "card's power): scaled prompts that no chunk could select in (-) show by how much."
)


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.md and NAME.png of a result NAME.json; where they went, the text first."""
    result = read_kind(path, "serving", 1)
    check_timed(path, result)
    return write_beside(path, out, partial(markdown, result), {"": partial(draw, result)})


def markdown(result: Record, pictures: Sequence[str] = ()) -> str:
    """The whole report; `pictures` are the figures' file names."""
    sections = (
        ("Greedy tokens beside the baseline's", answers_section),
        ("Where exact engines part", differences_section),
        ("Accuracy by length", lengths_section),
        ("Accuracy by task", accuracy_section),
        ("Time to the first token", ttft_section),
        ("What the timed engines say", checked_section),
        ("A decode step", decode_section),
        ("Engines", engines_section),
        ("Engines of the preset that are not in this result", missing_section),
    )
    return written("vLLM's engine", result, sections, pictures)


def answers_section(result: Record) -> list[str]:
    """Of each engine: prompts that are equal, those that part at near ties, those that part elsewhere; the gate."""
    rows = []
    for record in in_order(result, "answers"):
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
                _percent(share_read(record["read"])),
                _again(record["read"]),
                ", ".join(str(answer["cached"]) for answer in record["answers"] if answer["asked"] == "cached"),
            )
        )
    head = ("engine", "equal: one batch", "equal: prefix cached", "equal: prefix cold", "part at near ties")
    more = (
        "part elsewhere",
        "gate",
        "past blocks read",
        "equal when counted",
        "tokens found in the cache, by question",
    )
    return table((*head, *more), rows)


def _equal(record: Record, asked: str) -> str:
    answers = [answer for answer in record["answers"] if answer["asked"] == asked]
    if "near_tie_bound" not in record:
        return f"baseline, {len(answers)}"
    return f"{sum(answer['difference'] is None for answer in answers)} of {len(answers)}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _again(read: Record | None) -> str:
    """Prompts with the same tokens when steps were counted, and so launched kernel by kernel, not replayed."""
    return f"{read['prompts'] - read['other']} of {read['prompts']}" if read and "other" in read else "-"


def differences_section(result: Record) -> list[str]:
    """Every prompt of an engine without a selection that parts from the baseline, with both two best tokens there."""
    rows = []
    for record in in_order(result, "answers"):
        for answer in record["answers"]:
            one = answer.get("difference")
            if one is None or record["case"]["contestant"] not in (BASELINE, EXACT):
                continue
            what = f"{answer['task']}, {tokens(answer['length'])}, {answer['key']} ({answer['asked']})"
            sides = (_best_two(one[side]) for side in ("baseline", "top2"))
            rows.append((record["name"], what, one["place"], *sides, "yes" if one["near_tie"] else "**no**"))
    if not rows:
        return []
    bounds = {f"{record['near_tie_bound']:.3g}" for record in in_order(result, "answers") if "near_tie_bound" in record}
    head = ("engine", "prompt", "token", "baseline's two best", "its own", f"near tie (gap below {', '.join(bounds)})")
    return table(head, rows)


def _best_two(top2: Sequence[float] | None) -> str:
    if top2 is None:
        return "-"
    first, its, second, others = top2
    return f"{first}: {its:.4f}, {second}: {others:.4f}"


def lengths_section(result: Record) -> list[str]:
    """The share of the answers' words, by length of the prompt, of the prompts in one batch."""
    return _scores(result, "length", tokens)


def accuracy_section(result: Record) -> list[str]:
    """The same by task."""
    return _scores(result, "task", str)


def _scores(result: Record, by: str, name: Callable[[Any], str]) -> list[str]:
    records = in_order(result, "answers")
    asked = [answer[by] for record in records[:1] for answer in record["answers"] if answer["asked"] == "mixed"]
    found = sorted(set(asked))
    rows = [(record["name"], *(_percent(mean_score(record, **{by: one})) for one in found)) for record in records]
    return table(("engine", *(f"{name(one)} ({asked.count(one)})" for one in found)), rows)


def ttft_section(result: Record) -> list[str]:
    """Median times by length; speedups only where the tokens of the plugin's dense engine were right."""
    right = tokens_are_right(result)
    timed = [(record, prompt) for record in in_order(result, "ttft") for prompt in record["prompts"]]
    rows = []
    for record, prompt in sorted(timed, key=lambda one: one[1]["length"]):
        speedups = times_dense(result, record, prompt).values()
        rows.append(
            (
                tokens(prompt["length"]),
                prompt_name(record, prompt),
                middle(prompt),
                ", ".join(f"{one:.3f}" for one in prompt["seconds"]),
                *(speedups if right else [math.nan] * 2),
                _percent(share_read(prompt["read"])),
            )
        )
    head = ("prompt", "engine", "s to the first token", "all", "x triton", "x dense", "past blocks read")
    body = table(head, rows)
    if not body:
        return []
    if not right:
        body += ["", "No speedups: no dense engine of the plugin has answered with a green gate in this result."]
    dense = any(record["case"]["contestant"] == EXACT for record, _ in timed)
    if dense and any(p["factor"] != 1 and math.isnan(share_read(p["read"])) for _, p in timed):
        body += ["", SCALED_SAID]
    return body


def checked_section(result: Record) -> list[str]:
    """First tokens of the timed model as it is, beside those of the baseline with the same chunks."""
    rows = []
    for record in in_order(result, "ttft"):
        base = beside(result, record, BASELINE)
        found = None if base is None or base is record else first_tokens(base, record)
        if found is not None:
            prompts, same, largest = found
            rows.append((record["name"], f"{same} of {prompts}", f"{largest:.3f}"))
    return table(("engine", "equal first tokens", "largest difference of a log-probability among the best two"), rows)


def decode_section(result: Record) -> list[str]:
    """Milliseconds of a step of all requests together."""
    rows = []
    for record in in_order(result, "ttft"):
        decode, found = record["decode"], step_ms(record)
        if found is not None:
            spread = f"{found[1]:.2f}-{found[2]:.2f}"
            about = (decode["requests"], tokens(decode["context"]))
            rows.append((record["name"], *about, found[0], spread, len(decode["steps_s"])))
    return table(("engine", "requests", "context of each", "ms per step, median", "p20-p80", "steps"), rows)


def engines_section(result: Record) -> list[str]:
    """What ran, engine by engine, what was tried to get a density, and what of vLLM was not there."""
    rows, tried, missing = [], [], set()
    for record in in_order(result):
        if record["status"] != "ok":
            continue
        engine = record["engine"]
        settings = record["case"]["settings"]
        told = ", ".join(f"{name} {value}" for name, value in settings.items()) if settings else "-"
        names = ("block_size", "cudagraph_mode", "model_runner")
        rows.append(
            (record["name"], ", ".join(engine["attention"]), told, *(engine[name] for name in names), record["seconds"])
        )
        tried += [
            f"- {record['name']}: queries and keys x {one['factor']:.3g}: {one['density']:.1%} read"
            for one in record.get("tried", [])
        ]
        missing.add(", ".join(engine["missing_modules"]))
    lines = [*tried, *(f"- without {modules}" for modules in sorted(missing) if modules)]
    head = ("engine", "attention", "settings", "cache block", "CUDA graphs", "model runner", "s in all")
    return [*table(head, rows), "", *lines] if lines else table(head, rows)


def missing_section(result: Record) -> list[str]:
    """What a whole run would have: engines that no record speaks of."""
    known = {record["name"] for record in result["cases"]}
    return [f"- {case.name}" for case in preset(result["preset"]).cases if case.name not in known]
