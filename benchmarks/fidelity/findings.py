"""From a result to comparisons: the control's verdict, methods at equal density, differences with intervals.

Equal density: of each family of rows (one method over a sweep) the two neighbours in density that enclose the wanted
one are interpolated linearly, item by item, so that intervals and pairs of methods stay those of items. Outside its
sweep a family has no value; nothing is extrapolated. A method reads more of one kind of prompt than of another, so a
density is always that on the kinds of prompt which the compared numbers come from: tasks, or held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.fidelity.plans import CONTROL, DENSE, NEEDLE_TASKS, QUOKA, TEXT
from benchmarks.records import Record, check_fields, check_runs, read_kind
from benchmarks.testbed.intervals import bootstrap_means, bootstrap_ratio, wilson
from benchmarks.testbed.tasks import ANSWER_WORDS

MEASURES = {"greedy": "greedy", "in_chunk": "in chunk"}
DENSITIES = (0.05, 0.10, 0.15, 0.25)
FEWEST_HIDDEN = 20
ENOUGH_ITEMS = 500  # of each task


def load(path: Path) -> Record:
    """Read a result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `python -m benchmarks fidelity`, or one that lacks something.
    """
    result = read_kind(path, "fidelity", 1)
    check_fields(path, result, ("preset", "protocol", "model", "rows", "cells", "hidden", "absent", "runs"))
    check_runs(path, result, ("environment", "not_run"))
    return result


@dataclass(frozen=True, eq=False)
class Point:
    """One row at one context and chunk, the ranges of items that were measured put together.

    Attributes:
        row: the row's record.
        densities: by kind of prompt (a task, or `plans.TEXT`): past entries that attention reads, of the visible ones;
            kinds that were not probed are left out.
        scores: measure, then task, to float [items], the share of right words; NaN for items that it has not met.
        bits, bytes: of each held-out window; empty if not measured.
        probe: the record of the probe, empty if there is none.
    """

    row: Record
    densities: dict[str, float]
    scores: dict[str, dict[str, np.ndarray]]
    bits: np.ndarray
    bytes: np.ndarray
    probe: Record

    def density(self, kinds: Sequence[str]) -> float:
        """On prompts of these kinds, each counting alike; 1 for dense, NaN where one of them was not probed."""
        if self.row["kind"] == "dense":
            return 1.0
        return float(np.mean([self.densities.get(kind, math.nan) for kind in kinds]))

    def mean(self, tasks: Sequence[str], measure: str = "greedy") -> float:
        """The mean over tasks of the mean over items."""
        return float(np.mean([np.nanmean(self.scores[measure][task]) for task in tasks]))

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum() / self.bytes.sum()) if len(self.bits) else math.nan


def items_met(point: Point) -> tuple[tuple[int, int], ...]:
    """The ranges (first, last + 1) of items that a row has met; they are the same for all tasks."""
    known = _known(point)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    return tuple((int(first), int(last)) for first, last in edges.reshape(-1, 2))


def items_words(point: Point) -> str:
    return "items " + ", ".join(f"{first}-{last}" for first, last in items_met(point))


def _known(point: Point) -> np.ndarray:
    """bool [items]: whether a row has met an item."""
    return ~np.isnan(next(iter(point.scores["greedy"].values())))


def on_common_items(found: dict[str, Point]) -> dict[str, Point]:
    """Rows over the same items, to stand side by side: the rows of the item that most have met, on what they all met.

    The other rows are left out.
    """
    longest = max((len(_known(point)) for point in found.values()), default=0)
    known = {name: np.pad(_known(point), (0, longest - len(_known(point)))) for name, point in found.items()}
    if not known:
        return {}
    most = int(np.sum(list(known.values()), axis=0).argmax())
    rows = [name for name, those in known.items() if those[most]]
    chosen = np.flatnonzero(np.all([known[name] for name in rows], axis=0))
    kept = {}
    for name in rows:
        scores = found[name].scores
        cut = {m: {task: shares[chosen] for task, shares in its.items()} for m, its in scores.items()}
        kept[name] = replace(found[name], scores=cut)
    return kept


def settings_of(result: Record) -> list[tuple[int, int]]:
    """The (context, chunk) pairs of a result: the larger chunk first, then by context."""
    found = {(cell["context"], cell["chunk"]) for cell in result["cells"] if cell["status"] == "ok"}
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def points(result: Record, context: int, chunk: int) -> dict[str, Point]:
    """Every row that was measured at a context and chunk, by name, in the order of the plan."""
    cells = [c for c in result["cells"] if (c["context"], c["chunk"], c["status"]) == (context, chunk, "ok")]
    found = {}
    for name, row in result["rows"].items():
        mine = [cell for cell in cells if cell["row"] == name]
        if mine:
            found[name] = _point(row, mine)
    return found


def _point(row: Record, cells: list[Record]) -> Point:
    items = max(cell["last"] for cell in cells)
    scores: dict[str, dict[str, np.ndarray]] = {measure: {} for measure in MEASURES}
    for measure in MEASURES:
        for task in cells[0]["scores"]:
            shares = np.full(items, math.nan)
            for cell in cells:
                digits = [int(digit) for digit in cell["scores"][task][measure]]
                shares[cell["first"] : cell["last"]] = np.array(digits) / ANSWER_WORDS[task]
            scores[measure][task] = shares
    bits = next(((cell["bits"], cell["bytes"]) for cell in cells if "bits" in cell), ([], []))
    probe = next((cell["probe"] for cell in cells if "probe" in cell), {})
    read = {kind: its["read"] for kind, its in probe.get("kinds", {}).items()}
    densities = {kind: its["sub_group_union"] / its["visible"] for kind, its in read.items() if its and its["visible"]}
    return Point(row, densities, scores, *map(np.array, bits), probe)


def families(found: dict[str, Point], kinds: Sequence[str]) -> dict[str, list[Point]]:
    """The points of each family by density on some kinds of prompt, those without a density left out."""
    grouped: dict[str, list[Point]] = {}
    for point in found.values():
        if not math.isnan(point.density(kinds)):
            grouped.setdefault(point.row["family"], []).append(point)
    return {family: sorted(those, key=lambda point: point.density(kinds)) for family, those in grouped.items()}


def at_density(family: Sequence[Point], density: float, kinds: Sequence[str]) -> Point | None:
    """A family between its two neighbours of a density on some kinds of prompt, item by item; None outside its sweep.

    Args:
        family: in the order of `families` for these kinds.
        density: the wanted one.
        kinds: those of the prompts that are looked at in the point that is returned: tasks, or held-out text. Its
            windows of text are interpolated like the items, its probe is empty.
    """
    for point in family:
        if math.isclose(point.density(kinds), density, abs_tol=5e-5):
            return point
    for low, high in pairwise(family):
        less, more = low.density(kinds), high.density(kinds)
        if less < density < more:
            return _between(low, high, (density - less) / (more - less))
    return None


def _between(low: Point, high: Point, weight: float) -> Point:
    def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        both = min(len(first), len(second))
        return (1 - weight) * first[:both] + weight * second[:both]

    scores = {
        measure: {task: mixed(low.scores[measure][task], high.scores[measure][task]) for task in low.scores[measure]}
        for measure in MEASURES
    }
    bits = mixed(low.bits, high.bits)
    both = low.densities.keys() & high.densities.keys()
    densities = {kind: (1 - weight) * low.densities[kind] + weight * high.densities[kind] for kind in both}
    return Point(low.row, densities, scores, bits, low.bytes[: len(bits)], {})


@dataclass(frozen=True)
class Difference:
    """One method's accuracy less another's, in points of 100, over the items (in all: n) that both met."""

    points: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{self.points:+.1f} ({self.low:+.1f} to {self.high:+.1f}), n {self.items}"


def difference(one: Point, other: Point, tasks: Sequence[str], measure: str = "greedy") -> Difference | None:
    """Mean over tasks of the mean difference; None where the two share no items of some task."""
    strata = []
    for task in tasks:
        first, second = one.scores[measure][task], other.scores[measure][task]
        both = min(len(first), len(second))
        gaps = first[:both] - second[:both]
        gaps = gaps[~np.isnan(gaps)]
        if not len(gaps):
            return None
        strata.append(gaps)
    mean = float(np.mean([gaps.mean() for gaps in strata]))
    low, high = bootstrap_means(strata)
    return Difference(100 * mean, 100 * low, 100 * high, sum(map(len, strata)))


def bits_ratio(point: Point, dense: Point) -> tuple[float, float, float] | None:
    """Bits per byte over dense, with its interval; None where one was not measured."""
    both = min(len(point.bits), len(dense.bits))
    if not both:
        return None
    mine, theirs = point.bits[:both], dense.bits[:both]
    return float(mine.sum() / theirs.sum()), *bootstrap_ratio(mine, theirs)


@dataclass(frozen=True)
class Verdict:
    """Whether a task measures a selection: the control must fail where every needle has to be selected.

    Attributes:
        items: those whose needles are all hidden from sink, window and current chunk.
        control, dense: shares of them that were answered without a fault; `high` is the upper end of Wilson's
            interval of the control's.
        words: the verdict.
        measures: whether it measures.
    """

    items: int
    control: float
    high: float
    dense: float
    words: str
    measures: bool


def judge(result: Record, context: int, chunk: int, task: str, measure: str = "greedy") -> Verdict | None:
    """The control against dense on one task; None where one of them was not run."""
    found = points(result, context, chunk)
    if CONTROL not in found or DENSE not in found:
        return None
    control, dense = (found[name].scores[measure][task] for name in (CONTROL, DENSE))
    hidden = _hidden(result, context, chunk, task, len(control))
    both = min(len(control), len(dense))
    chosen = hidden[:both] & ~np.isnan(control[:both]) & ~np.isnan(dense[:both])
    items = int(chosen.sum())
    if items < FEWEST_HIDDEN:
        return Verdict(items, math.nan, math.nan, math.nan, "too few items hide all their needles to judge", False)
    share, exact = (float((scores[:both][chosen] == 1).mean()) for scores in (control, dense))
    high = wilson(share, items)[1]
    if exact < 0.5:
        words, measures = "measures nothing: the model does not solve it with dense attention", False
    elif high > exact / 2:
        words, measures = "MEASURES NOTHING: the control does not fail", False
    else:
        words, measures = "measures: the control fails", True
    return Verdict(items, share, high, exact, words, measures)


def _hidden(result: Record, context: int, chunk: int, task: str, items: int) -> np.ndarray:
    """bool [items]: every needle of the item has to be selected."""
    hidden = np.zeros(items, dtype=bool)
    needles = ANSWER_WORDS[task]  # one line per word of the answer, in all needle tasks
    for span, counts in result["hidden"].get(f"{context}/{chunk}", {}).items():
        first, last = map(int, span.split("-"))
        hidden[first:last] = [int(digit) == needles for digit in counts[task]][: max(0, items - first)]
    return hidden


def measuring_tasks(result: Record, context: int, chunk: int, measure: str = "greedy") -> list[str]:
    """Needle tasks on which the control fails as it must."""
    verdicts = {task: judge(result, context, chunk, task, measure) for task in NEEDLE_TASKS}
    return [task for task, verdict in verdicts.items() if verdict is not None and verdict.measures]


def best_within(found: dict[str, Point], density: float, tasks: Sequence[str]) -> Point | None:
    """The library's row that stands best against dense on tasks, up to a density on their prompts.

    Rows are ranked by their difference to dense on the items that both met, and only those count which met as many as
    dense, or `ENOUGH_ITEMS`: among few items chance finds a good row. QUOKA, the oracle and the control do not count.
    None where there is no such row, or no dense one.
    """
    if DENSE not in found:
        return None
    dense, enough = found[DENSE], min(int(_known(found[DENSE]).sum()), ENOUGH_ITEMS)
    own = [point for point in found.values() if is_own(point) and point.density(tasks) <= density]
    ranked = []
    for point in own:
        gap = difference(point, dense, tasks)
        if gap is not None and int(_known(point).sum()) >= enough:
            ranked.append((gap.points, -point.density(tasks), point))
    return max(ranked, key=lambda one: one[:2])[2] if ranked else None


def best_on_text(found: dict[str, Point], density: float, dense: Point) -> Point | None:
    """The library's row of the fewest bits per byte over dense up to a density on held-out text."""
    ratios = {name: bits_ratio(point, dense) for name, point in found.items() if is_own(point)}
    own = {name: its[0] for name, its in ratios.items() if its and found[name].density((TEXT,)) <= density}
    return found[min(own, key=own.__getitem__)] if own else None


def is_own(point: Point) -> bool:
    """Whether a row is the library's own selection; QUOKA, the oracle, the control and dense rows are not."""
    return point.row["kind"] == "library" and point.row["selector"] not in ("Dense", "Oracle")


def quoka_points(found: dict[str, Point], kinds: Sequence[str]) -> list[Point]:
    """QUOKA's sweep by density on some kinds of prompt."""
    return families(found, kinds).get(QUOKA, [])
