"""`python -m benchmarks report FIDELITY.json`: Markdown tables and figures, from the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np

from benchmarks.fidelity import figure
from benchmarks.fidelity.findings import (
    DENSITIES,
    ENOUGH_ITEMS,
    MEASURES,
    Point,
    Record,
    at_density,
    best_on_text,
    best_within,
    bits_ratio,
    difference,
    families,
    is_own,
    items_words,
    judge,
    load,
    measuring_tasks,
    points,
    quoka_points,
    settings_of,
)
from benchmarks.fidelity.plans import DENSE, NEEDLE_TASKS, QUOKA, TEXT
from benchmarks.files import write_beside
from benchmarks.records import table, tokens
from benchmarks.report_targets import Target
from benchmarks.testbed.intervals import wilson
from benchmarks.testbed.tasks import TASKS

GOAL_DENSITY = 0.15
GOAL_CONTEXTS = (16384, 32768)
QUOKA_TASKS = ("niah_multiquery", "niah_multikey")
SHORT_NAMES = {task: task.replace("niah_", "").replace("_", " ") for task in TASKS}


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.md, NAME.png (accuracy against density) and NAME-bits.png (bits per byte); the text first."""
    result = load(path)
    held = {suffix: partial(draw, result) for suffix, draw in figure.FIGURES.items() if settings_of(result)}
    return write_beside(path, out, partial(markdown, result), held)


def markdown(result: Record, pictures: Sequence[str]) -> str:
    """The whole report; `pictures` are the figures' file names."""
    where = result["runs"][-1]["environment"]
    known = ", ".join(f"{name} {value}" for name, value in where.items() if name != "gpu" and value is not None)
    lines = [f"# Fidelity, preset {result['preset']}", "", f"{where['gpu'] or 'CPU'}; {known}", ""]
    lines += [_model_line(result), "", *_code_lines(result), *(f"- {line}" for line in result["protocol"]), ""]
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += ["## Does the test measure anything?", "", *_verdicts(result), ""]
    for title, section in SECTIONS:
        body = section(result)
        if body:
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)


def _model_line(result: Record) -> str:
    model = result["model"]
    words = f"Model: weights {model['weights']}, {model['parameters']} parameters, {model['dtype']}"
    words += f"; gates {model['gate']}" if model["gate"] else "; no gates"
    training = model.get("training")
    if training:
        words += f"; trained {training['steps']} steps, {training['seconds']} s on {training['device']}"
        words += "" if training["complete"] else " (NOT COMPLETE)"
        words += "" if training["tasks"] else "; NOT TRAINED ON THE TASKS"
    return words + f"; corpus {result['corpus']}."


def _code_lines(result: Record) -> list[str]:
    """Which code measured how much, where it was not one alone, and what shows that it answers alike."""
    told = result.get("compared")
    if not told:
        return []
    cells: dict[str, int] = {}
    for cell in result["cells"]:
        where = result["runs"][cell["run"]]["environment"]
        code = f"commit {where.get('commit')}, sources {where.get('sources')}"
        cells[code] = cells.get(code, 0) + 1
    again = sum(len(its["cells"]) for its in told)
    words = "; ".join(f"{count} of {code}" for code, count in cells.items())
    return [f"Cells: {words}. {again} cells were measured with both: same answers, same bits.", ""]


def _where(context: int, chunk: int) -> str:
    return f"context {tokens(context)}, chunk {chunk}"


def _verdicts(result: Record) -> list[str]:
    """The control on items whose needles all have to be selected; without it nothing is known to be measured."""
    rows = []
    for context, chunk in settings_of(result):
        for measure, measure_name in MEASURES.items():
            for task in NEEDLE_TASKS:
                verdict = judge(result, context, chunk, task, measure)
                if verdict is not None:
                    high = (
                        f"{verdict.control:.2f} (≤ {verdict.high:.2f})" if verdict.items and verdict.dense >= 0 else "-"
                    )
                    cells = (verdict.items, high, verdict.dense, verdict.words)
                    rows.append((_where(context, chunk), measure_name, SHORT_NAMES[task], *cells))
    if not rows:
        return ["The control (sink and window only) was not run: **nothing below is known to measure a selection.**"]
    good = {
        pair: measuring_tasks(result, *pair) + measuring_tasks(result, *pair, "in_chunk")
        for pair in settings_of(result)
    }
    lines = ["Shares answered without a fault, of the items whose needles all lie outside sink, window and chunk."]
    if not any(good.values()):
        lines += ["", "**The control fails on no task as it must: these tasks measure nothing on this model.**"]
    elif not all(good.values()):
        bad = "; ".join(_where(*pair) for pair, tasks in good.items() if not tasks)
        lines += ["", f"**Nothing is known to be measured at {bad}.**"]
    head = ("", "score", "task", "items", "control", "dense", "verdict")
    return [*lines, "", *table(head, rows)]


def _goals_section(result: Record) -> list[str]:
    """The goals at 16K and 32K, chunk 1024, with what was measured."""
    targets: list[tuple[Target, str]] = []
    notes = []
    for context in GOAL_CONTEXTS:
        found, where = points(result, context, 1024), tokens(context)
        dense, best = found.get(DENSE), best_within(found, GOAL_DENSITY, tuple(TASKS))
        if dense is None:
            continue
        if best is None:
            notes.append(f"{where}: no row at density ≤ {GOAL_DENSITY} on all tasks has met so many items as dense.")
        for measure, measure_name in MEASURES.items():
            gap = best and difference(best, dense, tuple(TASKS), measure)
            if best is not None and gap is not None:
                name = f"{best.row['name']}, density {best.density(tuple(TASKS)):.3f}"
                what = f"{where}, {measure_name}: best row at density ≤ {GOAL_DENSITY} ({name}) less dense, "
                what += "mean of all tasks"
                targets.append((Target(what, -0.5, gap.points), str(gap)))
        reader = best_on_text(found, GOAL_DENSITY, dense)
        ratio = reader and bits_ratio(reader, dense)
        if reader is not None and ratio:
            name = f"{reader.row['name']}, density {reader.density((TEXT,)):.3f}"
            what = f"{where}: bits per byte ÷ dense, best row at density on text ≤ {GOAL_DENSITY} ({name})"
            targets.append((Target(what, 1.005, ratio[0], most=True), _ratio_words(ratio)))
        for measure in MEASURES:
            targets += _quoka_targets(found, where, measure)
    rows = [
        (one.what, f"{'≤' if one.most else '≥'} {one.bound:g}", measured, "yes" if one.met else "**no**")
        for one, measured in targets
    ]
    body = table(("", "goal", "measured (95 %)", "met"), rows)
    words = (
        "Accuracy in points, on the n items that both sides met. A density beside it is that on prompts of the same "
        "tasks. The best rows (by greedy answers less dense, among those that met as many items as dense or "
        f"{ENOUGH_ITEMS} of each task; and by bits per byte) and the best family (among those of the most items) are "
        "picked on the items that they are then judged on, which flatters them."
    )
    lines = [words, "", *body, *([""] if body and notes else []), *notes]
    return lines if body or notes else []


def _ratio_words(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.4f} ({ratio[1]:.4f} to {ratio[2]:.4f})"


def _quoka_targets(found: dict[str, Point], where: str, measure: str) -> list[tuple[Target, str]]:
    """At each density of QUOKA that a family of the library reaches, the best lead of a family with enough items."""
    targets = []
    for point in quoka_points(found, QUOKA_TASKS):
        gaps, density = {}, point.density(QUOKA_TASKS)
        for family, sweep in families(found, QUOKA_TASKS).items():
            if is_own(sweep[0]):
                level = at_density(sweep, density, QUOKA_TASKS)
                gaps[family] = None if level is None else difference(level, point, QUOKA_TASKS, measure)
        leads = {family: gap for family, gap in gaps.items() if gap is not None}
        most = max((gap.items for gap in leads.values()), default=0)
        enough = min(most, ENOUGH_ITEMS * len(QUOKA_TASKS))
        leads = {family: gap for family, gap in leads.items() if gap.items >= enough}
        if leads:
            family = max(leads, key=lambda name: leads[name].points)
            what = f"{where}, {MEASURES[measure]}: {family} less {point.row['name']}, both at density {density:.3f}"
            what += ", multi-query and multi-key"
            targets.append((Target(what, 5.0, leads[family].points), str(leads[family])))
    return targets


def _equal_section(result: Record) -> list[str]:
    """Families between their neighbours of each density: accuracy less dense's, and bits per byte over dense's."""
    lines = [
        "Mean over the five needle tasks, less dense, in points (95 %, n items), at densities on prompts of these "
        "tasks; and bits per byte ÷ dense at densities on held-out text. Each family between the two points of its "
        "sweep that enclose the density, interpolated linearly item by item; a dash is outside its sweep.",
        "",
    ]
    heads = [f"at {density:g}" for density in DENSITIES]
    for measure, measure_name in MEASURES.items():
        rows = []
        for context, chunk in settings_of(result):
            found = points(result, context, chunk)
            if DENSE not in found:
                continue
            for family, levels in _levels(found, NEEDLE_TASKS).items():
                gaps = [level and difference(level, found[DENSE], NEEDLE_TASKS, measure) for level in levels]
                rows.append((_where(context, chunk), family, *map(_or_dash, gaps)))
        body = table(("", measure_name, *heads), rows)
        lines += [*body, ""] if body else []
    rows = []
    for context, chunk in settings_of(result):
        found = points(result, context, chunk)
        for family, levels in _levels(found, (TEXT,)).items() if DENSE in found else ():
            ratios = [level and bits_ratio(level, found[DENSE]) for level in levels]
            if any(ratios):
                rows.append((_where(context, chunk), family, *(_ratio_words(one) if one else "-" for one in ratios)))
    body = table(("", "bits per byte ÷ dense", *heads), rows)
    lines += [*body, ""] if body else []
    return lines if len(lines) > 2 else []


def _levels(found: dict[str, Point], kinds: Sequence[str]) -> dict[str, list[Point | None]]:
    """Families that are swept, at each of `DENSITIES` on some kinds of prompt that one of their sweeps encloses."""
    swept = {family: sweep for family, sweep in families(found, kinds).items() if len(sweep) > 1}
    levels = {family: [at_density(sweep, density, kinds) for density in DENSITIES] for family, sweep in swept.items()}
    return {family: its for family, its in levels.items() if any(its)}


def _quoka_section(result: Record) -> list[str]:
    """Every family at QUOKA's own densities: multi-query and multi-key, families less QUOKA."""
    lines = []
    for words, tasks in (("Multi-query and multi-key", QUOKA_TASKS), ("The needle tasks", NEEDLE_TASKS)):
        rows = []
        for context, chunk in settings_of(result):
            found = points(result, context, chunk)
            for point in quoka_points(found, tasks):
                density = point.density(tasks)
                for family, sweep in families(found, tasks).items():
                    level = at_density(sweep, density, tasks)
                    if family != QUOKA and len(sweep) > 1 and level is not None:
                        gaps = (difference(level, point, tasks, measure) for measure in MEASURES)
                        head = (_where(context, chunk), point.row["name"], density, family)
                        rows.append((*head, *map(_or_dash, gaps)))
        body = table(("", "QUOKA", "density", "family", *MEASURES.values()), rows)
        what = f"{words}: points of each family less QUOKA's, at QUOKA's density on their prompts (95 %, n items)."
        lines += [what, "", *body, ""] if body else []
    return lines


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _beside_section(result: Record) -> list[str]:
    """Families with a change against the same family without it, at the density of each changed point."""
    rows = []
    for context, chunk in settings_of(result):
        found = points(result, context, chunk)
        swept = families(found, NEEDLE_TASKS)
        for family, sweep in swept.items():
            base = swept.get(family.partition(" + ")[0], [])
            if " + " not in family or len(base) < 2:
                continue
            for point in sweep:
                density = point.density(NEEDLE_TASKS)
                level = at_density(base, density, NEEDLE_TASKS)
                same = next((one for one in base if _sweeps_alike(one.row, point.row)), None)
                gaps = (
                    None if other is None else difference(point, other, NEEDLE_TASKS, measure)
                    for other in (level, same)
                    for measure in MEASURES
                )
                rows.append((_where(context, chunk), point.row["name"], density, *map(_or_dash, gaps)))
    head = ["", "row", "density"]
    head += [f"{name}, {base}" for base in ("at equal density", "at equal alpha") for name in MEASURES.values()]
    body = table(head, rows)
    words = "Points over the needle tasks, with the change less without it (95 %, n items)."
    return [words, "", *body] if body else []


def _sweeps_alike(row: Record, other: Record) -> bool:
    parameter = row["parameter"]
    return parameter == other["parameter"] and row["settings"].get(parameter) == other["settings"].get(parameter)


def _pooled_section(result: Record) -> list[str]:
    """Every row over all contexts of a chunk, a table for the rows of the same items: each item counts alike."""
    lines = []
    settings = settings_of(result)
    for chunk in dict.fromkeys(chunk for _, chunk in settings):
        contexts = [context for context, its in settings if its == chunk]
        by_context = [points(result, context, chunk) for context in contexts]
        alike: dict[str, list[tuple[str, ...]]] = {}
        for name in result["rows"]:
            met = {tokens(one): found[name] for one, found in zip(contexts, by_context, strict=True) if name in found}
            if met:
                pooled = [np.concatenate([point.scores["greedy"][task] for point in met.values()]) for task in TASKS]
                where = "; ".join(f"{context} {items_words(point)}" for context, point in met.items())
                alike.setdefault(where, []).append((name, *map(_score, pooled)))
        for where, rows in alike.items() if len(contexts) > 1 else ():
            lines += [f"Chunk {chunk}, {where}; greedy.", "", *table(("", *SHORT_NAMES.values()), rows), ""]
    return lines


def _rows_section(result: Record) -> list[str]:
    """Every row: densities, coverage, errors, scores of every task, bits per byte."""
    lines = []
    for context, chunk in settings_of(result):
        found = points(result, context, chunk)
        rows = [_probe_cells(point, found.get(DENSE)) for point in found.values()]
        head = ("", "own mask", "span union", "table", "KV group", "table, needle tasks", "table, text")
        head += ("coverage", "under 0.9", "worst", "error", "bits per byte ÷ dense (95 %)")
        lines += [f"### {_where(context, chunk)}", "", *table(head, rows), ""]
        for measure, measure_name in MEASURES.items():
            alike: dict[str, list[tuple[str, ...]]] = {}  # rows of other items in a table of their own
            for name, point in found.items():
                scores = [_score(point.scores[measure][task]) for task in TASKS]
                alike.setdefault(items_words(point), []).append((name, *scores))
            for items, those in alike.items():
                lines += [*table((f"{measure_name}, {items}", *SHORT_NAMES.values()), those), ""]
    return lines


def _probe_cells(point: Point, dense: Point | None) -> tuple[object, ...]:
    density, probe = point.probe.get("density", {}), point.probe
    cells = [density.get(step) for step in ("mask", "query_block_union", "sub_group_union", "group_union")]
    cells += [point.density(NEEDLE_TASKS), point.density((TEXT,))] if probe else [None, None]
    cells += [probe.get(name) for name in ("coverage", "below_0.9", "worst_coverage", "output_error")]
    ratio = None if dense is None else bits_ratio(point, dense)
    bits = "-" if ratio is None else _ratio_words(ratio)
    if point is dense and len(point.bits):
        bits = f"{point.bits_per_byte:.4f} bits"
    return point.row["name"], *(math.nan if cell is None else float(cell) for cell in cells), bits


def _score(shares: np.ndarray) -> str:
    known = shares[~np.isnan(shares)]
    if not len(known):
        return "-"
    low, high = wilson(float(known.mean()), len(known))
    return f"{known.mean():.3f} ({low:.2f}-{high:.2f}) of {len(known)}"


def _absent_section(result: Record) -> list[str]:
    lines = [f"- {name} did not run: {why}" for name, why in result["absent"].items()]
    failed = [cell for cell in result["cells"] if cell["status"] != "ok"]
    lines += [
        f"- {cell['row']} at {_where(cell['context'], cell['chunk'])} FAILED: "
        + shorten(cell["reason"], 120, placeholder=" …")
        for cell in failed
    ]
    left = result["runs"][-1]["not_run"]
    if left:
        lines.append(f"- {len(left)} cells were not reached by the last run, {left[0]} the first of them")
    return lines


SECTIONS = (
    ("Goals", _goals_section),
    ("At equal density", _equal_section),
    ("At QUOKA's budget", _quoka_section),
    ("Where dense matters, and the mean correction", _beside_section),
    ("Every task over all contexts", _pooled_section),
    ("Every row", _rows_section),
    ("What did not run", _absent_section),
)
