"""RULER beside the paper's Table 1, from a result alone."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.files import write_beside
from benchmarks.published import PAPER_RULER
from benchmarks.records import Record, check_fields, read_kind, table, tokens

#: All thirteen tasks, as the harness names them.
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)


def load(path: Path) -> Record:
    """Read a result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `python -m benchmarks ruler`, or one that lacks something.
    """
    result = read_kind(path, "ruler", 1)
    check_fields(path, result, ("settings", "cells", "absent"))
    check_fields(path, result["settings"], ("model", "limit", "chunk", "tasks"), "settings")
    return result


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.md; where it went."""
    result = load(path)
    words = "\n".join([f"# RULER, {result['settings']['model']}", "", *table_lines(result), ""])
    return write_beside(path, out, lambda pictures: words, {})


def published_for(model: str) -> tuple[str, dict[str, dict[int, float]]]:
    """(the paper's model, its figures) that a model's name belongs to; ("", {}) for others."""
    name = Path(model).name.lower()
    return next(((known, its) for known, its in PAPER_RULER.items() if known.lower() in name), ("", {}))


def table_lines(result: Record) -> list[str]:
    """Markdown: the mean over tasks per method and length in percent, the paper's beside it, then every task."""
    settings = result["settings"]
    known, paper = published_for(settings["model"])
    lengths = sorted({cell["length"] for cell in result["cells"]} | {n for its in paper.values() for n in its})
    names = list(dict.fromkeys([*paper, *(cell["method"] for cell in result["cells"])]))
    cells = {(cell["method"], cell["length"]): cell for cell in result["cells"]}
    rows = [
        (name, *(_beside(cells.get((name, length)), paper.get(name, {}).get(length)) for length in lengths))
        for name in names
    ]
    items = settings["limit"] or 500
    lines = [f"{settings['model']}, chunk {settings['chunk']}, {items} items per task, mean over the tasks in percent."]
    if paper:
        lines.append(f"In brackets: published for {known}, arXiv 2605.16839, Table 1.")
    else:
        lines.append("The paper has no figures for this model.")
    missing = len(RULER_TASKS) - len(set(settings["tasks"]) & set(RULER_TASKS))
    if missing:
        lines.append(
            f"{missing} of RULER's {len(RULER_TASKS)} tasks were left out: NOT comparable with a published mean."
        )
    lines += ["", *table(("", *map(tokens, lengths)), rows), ""]
    for length in sorted({cell["length"] for cell in result["cells"]}):
        tasks = settings["tasks"]
        detail = [
            (name, *(100 * cells[name, length]["scores"].get(task, math.nan) for task in tasks))
            for name in names
            if (name, length) in cells
        ]
        lines += [*table((tokens(length), *tasks), detail), ""]
    lines += [f"- {name} did not run: {why}" for name, why in result["absent"].items()]
    return lines


def _beside(cell: Record | None, published: float | None) -> str:
    own = "-" if cell is None else f"{100 * sum(cell['scores'].values()) / len(cell['scores']):.2f}"
    return own if published is None else f"{own} [{published:.2f}]"
