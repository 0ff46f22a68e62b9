"""Which rows are measured over which contexts and chunks, on how many items, and what that is planned to cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.testbed.tasks import SHORTEST
from compactattn.settings import load_settings

K = 1024
UNSHARED = "FlashPrefill unshared"
TUNED = "FlashPrefill tuned by layer"
BOUNDS = "KeyBounds unshared"
PAPER = "CompactAttention-FP {} x chunk"
SEER, BY_LAYER, LAST = "SeerAttention unshared", "allocated by layer", " + last 2 query blocks dense"
CONTROL, DENSE, QUOKA = "sink and window only", "dense", "QUOKA"
LAST_BLOCKS = {"dense_last_blocks": 2}
SINK_BLOCKS, WINDOW_BLOCKS = 2, 4  # of the control, as in FlashPrefill's own settings
TEXT = "text"  # a kind of prompt to probe, beside the tasks
#: densities that `benchmarks.fidelity.allocate` divides, and their rows' priorities
ALLOCATED = {0.10: 1, 0.14: 0, 0.20: 0, 0.30: 1}
NEEDLE_TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking")


@dataclass(frozen=True)
class Row:
    """One method at one setting.

    Attributes:
        name: unique.
        family: the sweep that it is a point of.
        kind: "dense" (transformers' own attention, the prompt in one piece), "library" or "quoka".
        priority: 0 for the rows of the final comparison, 1 for every sweep, 2 for rows beside the question.
        selector: name of the library's selector.
        settings: of the selector; for QUOKA of `quoka_select`.
        heads, span: heads and query blocks that share a table; span None is the whole chunk.
        dense_layers: the first so many layers are dense.
        correction: whether blocks that are left out speak through their means.
        parameter: the setting that the family sweeps, None for a family of one.
        by_layer: settings of single layers in place of the row's, by their number, which is text as in JSON; "selector"
            among them is the layer's own.
    """

    name: str
    family: str
    kind: str
    priority: int = 1
    selector: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    heads: int = 1
    span: int | None = 1
    dense_layers: int = 0
    correction: bool = False
    parameter: str | None = None
    by_layer: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)

    @property
    def selectors(self) -> set[str]:
        """The names of all layers' selectors."""
        return {str(its.get("selector", self.selector)) for its in self.by_layer.values()} or {self.selector}

    def definition(self) -> dict[str, Any]:
        """What decides the numbers of a row: all but where it stands in the plan and in the report."""
        return definition_of(self.as_json())

    def as_json(self) -> dict[str, Any]:
        record = {one.name: getattr(self, one.name) for one in fields(self)} | {"settings": dict(self.settings)}
        by_layer = {number: dict(its) for number, its in record.pop("by_layer").items()}
        return record | ({"by_layer": by_layer} if by_layer else {})  # a row without has the record that it always had


def definition_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """`Row.definition` of a row as a result holds it."""
    return {name: its for name, its in record.items() if name not in ("family", "priority", "parameter")}


def sweep(
    family: str,
    selector: str,
    parameter: str,
    values: Mapping[float, int],
    *,
    heads: int = 1,
    span: int | None = 1,
    **others: Any,
) -> list[Row]:
    """A row per value of a selector's parameter; `values` gives each one's priority."""
    settings = others.pop("settings", {})
    return [
        Row(
            f"{family}: {parameter} {value:g}",
            family,
            "library",
            priority,
            selector,
            {parameter: value, **settings},
            heads,
            span,
            parameter=parameter,
            **others,
        )
        for value, priority in values.items()
    ]


@dataclass(frozen=True)
class Stage:
    """A part of a plan: rows up to a priority, at one context and chunk.

    Attributes:
        context: tokens of prompt and answer together, a multiple of `chunk`.
        first, last: which items of each task.
        priority: rows of this priority or a lower number.
        windows: of held-out text for bits per byte; 0 measures none.
        probes: prompts, of text and every task in turn, to measure density, coverage and error on; 0 measures none.
            A multiple of 8 reaches every kind alike; where it does not reach a kind, that has no density.
    """

    context: int
    chunk: int
    first: int
    last: int
    priority: int
    windows: int = 0
    probes: int = 0

    def __post_init__(self) -> None:
        if self.context < SHORTEST or self.context % self.chunk or self.chunk < 128:
            raise ValueError(
                f"context: expected a multiple of the chunk, which has at least 128 tokens, and {SHORTEST} at least; "
                f"got {self.context} and {self.chunk}"
            )
        if not 0 <= self.first < self.last:
            raise ValueError(f"items: expected a range, got {self.first} to {self.last}")

    def __str__(self) -> str:
        return f"{self.context}/{self.chunk} items {self.first}-{self.last}"


@dataclass(frozen=True)
class Preset:
    """Stages and rows, where they run, and for how long.

    Attributes:
        device: "cuda" or "cpu".
        rows: in the order in which each stage takes them.
        budget_seconds: no new cell begins that is not expected to end in this time.
        tokens_at_once: prompt tokens of one batch.
        share: (I, N) for every N-th cell, beginning with the I-th (from 1): N presets that differ in I are a plan.
    """

    device: str
    stages: tuple[Stage, ...]
    rows: tuple[Row, ...]
    budget_seconds: float
    tokens_at_once: int
    share: tuple[int, int] = (1, 1)

    def cells(self) -> Iterator[tuple[Stage, Row]]:
        """What is measured, in this order."""
        every = ((stage, row) for stage in self.stages for row in self.rows if row.priority <= stage.priority)
        number, of = self.share
        return islice(every, number - 1, None, of)


def shared(whole: Preset, share: str) -> Preset:
    """The share "I/N" of a plan.

    Raises:
        ValueError: not of that form, or no cell is left for it.
    """
    found = re.fullmatch("([0-9]+)/([0-9]+)", share)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"--share: expected I/N with I from 1 to N, such as 1/2, got {share!r}")
    cells = sum(1 for _ in whole.cells())
    if number > cells:
        raise ValueError(f"--share: expected one of at most {cells} shares of as many cells, got {share!r}")
    return replace(whole, share=(number, of))


def preset(name: str, weights: Path | None = None, gate: Path | None = None) -> Preset:
    """The plan of a preset.

    Args:
        name: "h200" or "cpu".
        weights: directory of the model, by default the test bed's. Rows with settings by layer are in the plan where
            these have been found for it.
        gate: file of gate weights, by default the one in `weights`.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "h200":
        return Preset("cuda", _h200_stages(), _rows(weights, gate), 480.0, 4 * K * K)
    if name == "cpu":
        stages = (Stage(K, 256, 0, 1, 1, windows=1, probes=8),)
        return Preset("cpu", stages, _cpu_rows(), 150.0, 16 * K)
    raise ValueError(f"--preset: expected h200 or cpu, got {name!r}")


def _h200_stages() -> tuple[Stage, ...]:
    """Over its contexts at chunk 1024 every row meets 512 items of each task or more; those of the final comparison
    meet 512 at 16K and, last of all, at 32K alone, in stages that keep a cell under a minute."""
    long = [Stage(32 * K, K, first, last, 0) for first, last in pairwise((64, 176, 288, 400, 512))]
    return (
        Stage(16 * K, K, 0, 192, 2, windows=24, probes=16),
        Stage(32 * K, K, 0, 64, 1, windows=16, probes=16),
        Stage(16 * K, K, 192, 512, 0),
        long[0],
        Stage(8 * K, K, 0, 160, 2, windows=32, probes=16),
        Stage(4 * K, K, 0, 160, 2, windows=32, probes=16),
        Stage(4 * K, 512, 0, 96, 1, windows=32, probes=16),
        Stage(16 * K, 512, 0, 96, 1, windows=24, probes=16),
        Stage(32 * K, 512, 0, 64, 0, windows=16, probes=16),
        *long[1:],
    )


def tuned_rows(weights: Path, coverages: Mapping[float, int]) -> list[Row]:
    """FlashPrefill with an alpha for each layer, as `benchmarks.testbed.tune_layers` found them; the coverage is swept.

    Raises:
        FileNotFoundError, ValueError: settings that are not there, or not of FlashPrefill in one setting but for alpha.
    """
    from benchmarks.testbed.tune_layers import file_of

    rows = []
    for coverage, priority in coverages.items():
        path = weights / file_of(coverage)
        layers = {number: asdict(its) for number, its in load_settings(path)["selector"].items()}
        alphas = {str(number): {"alpha": its.pop("alpha")} for number, its in layers.items()}
        settings, *others = layers.values()
        if any(its != settings for its in others):
            raise ValueError(f"{path}: expected layers that differ in alpha alone")
        name = f"{TUNED}: coverage {coverage:g}"
        rows.append(
            Row(
                name,
                TUNED,
                "library",
                priority,
                "FlashPrefill",
                settings,
                parameter="coverage",
                by_layer=alphas,
            )
        )
    return rows


OPTIONS_FILE = "layers/options.json"  # below the directory of the weights: what `allocate` chose from, and on what


def allocated_file(density: float) -> str:
    """Where the layers' settings of a density lie, below the directory of the weights."""
    return f"layers/density-{density:g}.json"


def allocated_rows(weights: Path, gate: Path, densities: Mapping[float, int]) -> list[Row]:
    """Gates and bounds, by layer, as `benchmarks.fidelity.allocate` divided a density; the density is swept.

    None where that was not done, or with other weights or gates than those in `weights` and `gate`; and none of a
    density that no choice was found for.
    """
    from benchmarks.testbed.model import file_id

    files = {"weights": weights / "model.safetensors", "gate": gate}
    if not all(path.is_file() for path in (weights / OPTIONS_FILE, *files.values())):
        return []
    here = {name: file_id(path) for name, path in files.items()}
    if json.loads((weights / OPTIONS_FILE).read_text())["model"] != here:
        return []
    rows = []
    for density, priority in densities.items():
        path = weights / allocated_file(density)
        if not path.exists():
            continue
        layers = json.loads(path.read_text())["layers"]
        family = BY_LAYER + LAST
        name = f"{family}: density {density:g}"
        settings = {"selector": "SeerGate", "settings": LAST_BLOCKS, "parameter": "density", "by_layer": layers}
        rows.append(Row(name, family, "library", priority, **settings))
    return rows


def fixed_rows() -> list[Row]:
    """What every sweep is held against."""
    forced = {"top_k": 0, "sink_blocks": SINK_BLOCKS, "window_blocks": WINDOW_BLOCKS}
    return [
        Row(DENSE, DENSE, "dense", 0),
        Row(CONTROL, CONTROL, "library", 0, "Oracle", forced),
        Row("dense through the library", "dense through the library", "library", 2, "Dense"),
    ]


def quoka_rows(budgets: dict[float, int]) -> list[Row]:
    """QUOKA at shares of the past; a quarter is its own and its comparison's with CompactAttention."""
    return [
        Row(
            f"{QUOKA}: kv_ratio {ratio:g}", QUOKA, "quoka", priority, settings={"kv_ratio": ratio}, parameter="kv_ratio"
        )
        for ratio, priority in budgets.items()
    ]


def _rows(weights: Path | None, gate: Path | None) -> tuple[Row, ...]:
    from benchmarks.testbed.model import WEIGHTS_DIRECTORY  # transformers, which whoever reads a result need not have
    from benchmarks.testbed.train_gate import WEIGHTS_FILE as GATE_FILE
    from benchmarks.testbed.tune_layers import COVERAGES, file_of

    weights = WEIGHTS_DIRECTORY if weights is None else weights
    gate = weights / GATE_FILE if gate is None else gate
    rows = fixed_rows()
    rows += sweep(UNSHARED, "FlashPrefill", "alpha", {0.6: 2, 0.25: 1, 0.12: 1, 0.05: 1, 0.02: 2})
    if all((weights / file_of(coverage)).exists() for coverage in COVERAGES):
        rows += tuned_rows(weights, dict.fromkeys(COVERAGES, 1))
    rows += quoka_rows({0.25: 1, 0.15: 0, 0.10: 2, 0.05: 1})
    rows += sweep(PAPER.format(4), "FlashPrefill", "alpha", {0.95: 1, 0.6: 0, 0.35: 1, 0.15: 2}, heads=4, span=None)
    for heads in (2, 1):
        rows += sweep(PAPER.format(heads), "FlashPrefill", "alpha", {0.8: 1, 0.35: 1, 0.12: 2}, heads=heads, span=None)
    rows += sweep("XAttention unshared", "XAttention", "threshold", {0.95: 2, 0.85: 1, 0.7: 1})
    alone = {0.02: 1, 0.008: 1, 0.005: 0, 0.002: 2}
    rows += sweep(SEER, "SeerGate", "threshold", alone)
    shared = {0.05: 1, 0.02: 1, 0.008: 2, 0.002: 2}
    rows += sweep("CompactAttention-SA 4 x chunk", "SeerGate", "threshold", shared, heads=4, span=None)
    rows += sweep("Oracle unshared", "Oracle", "mass", {0.98: 2, 0.93: 2, 0.8: 1})
    rows += sweep(SEER + LAST, "SeerGate", "threshold", {0.02: 1, 0.008: 1, 0.005: 0, 0.0035: 0}, settings=LAST_BLOCKS)
    rows += allocated_rows(weights, gate, ALLOCATED)
    bounds = {0.3: 1, 0.13: 0, 0.08: 1, 0.05: 2}
    rows += sweep(BOUNDS, "KeyBounds", "threshold", bounds)
    rows += sweep(BOUNDS + LAST, "KeyBounds", "threshold", {0.3: 1, 0.13: 0}, settings=LAST_BLOCKS)
    rows += sweep("KeyBounds 4 x chunk", "KeyBounds", "threshold", {0.5: 1, 0.3: 1, 0.15: 2}, heads=4, span=None)
    rows += sweep("XAttention unshared" + LAST, "XAttention", "threshold", {0.7: 1, 0.5: 1}, settings=LAST_BLOCKS)
    rows += sweep(UNSHARED + LAST, "FlashPrefill", "alpha", {0.4: 0, 0.25: 1, 0.08: 2}, settings=LAST_BLOCKS)
    paper = {"heads": 4, "span": None}
    rows += sweep(PAPER.format(4) + LAST, "FlashPrefill", "alpha", {0.95: 1, 0.6: 1}, settings=LAST_BLOCKS, **paper)
    return (
        *rows,
        *_beside(UNSHARED, 1, 1, (0.25, 0.08), (1,)),
        *_beside(PAPER.format(4), 4, None, (0.6, 0.25), (1, 2)),
    )


def _beside(family: str, heads: int, span: int | None, alphas: Sequence[float], first: Sequence[int]) -> list[Row]:
    """A family again: with its first layers dense, and with the mean correction."""
    values = dict.fromkeys(alphas, 2)
    rows = []
    for count in first:
        name = f"{family} + first {count} layer{'s' * (count > 1)} dense"
        rows += sweep(name, "FlashPrefill", "alpha", values, heads=heads, span=span, dense_layers=count)
    name = f"{family} + mean correction"
    return rows + sweep(name, "FlashPrefill", "alpha", values, heads=heads, span=span, correction=True)


def _cpu_rows() -> tuple[Row, ...]:
    """One row of every kind, then a second one of the main sweeps."""
    first, second = {0.8: 1}, {0.18: 1}
    rows = fixed_rows()[:2]
    rows += sweep(UNSHARED, "FlashPrefill", "alpha", first)
    rows += quoka_rows({0.25: 1})
    rows += sweep(PAPER.format(4), "FlashPrefill", "alpha", first, heads=4, span=None)
    rows += sweep(BOUNDS, "KeyBounds", "threshold", {0.3: 1})
    rows += sweep("XAttention unshared", "XAttention", "threshold", {0.8: 1})
    rows += sweep("CompactAttention-SA 4 x chunk", "SeerGate", "threshold", {0.02: 1}, heads=4, span=None)
    rows += sweep("Oracle unshared", "Oracle", "mass", {0.9: 1})
    rows += sweep(UNSHARED + LAST, "FlashPrefill", "alpha", first, settings=LAST_BLOCKS)
    rows += sweep(f"{UNSHARED} + mean correction", "FlashPrefill", "alpha", first, correction=True)
    rows += sweep(PAPER.format(4), "FlashPrefill", "alpha", second, heads=4, span=None)
    return (*rows, *quoka_rows({0.5: 1}))


# ---- what a plan costs ----

# Seconds per million prompt tokens at 32K on an H200 and at 1K on a CPU, and per decode step: planning figures, not
# measurements. A run replaces their common factor by what its first cells took.
_SECONDS_PER_MILLION = {"cuda": 0.5, "cpu": 400.0}
_DECODE_STEP_SECONDS = {"cuda": 0.01, "cpu": 0.03}
_FACTORS = {DENSE: 1.6, CONTROL: 0.8}  # by name, else by kind or selector
_FACTORS |= {"quoka": 3.0, "FlashPrefill": 1.0, "KeyBounds": 1.2, "XAttention": 1.5, "Oracle": 2.0, "SeerGate": 1.2}
_ANSWER_TOKENS = 23  # mean over the tasks
TASK_COUNT = 7


def planned_seconds(stage: Stage, row: Row, device: str, tokens_at_once: int) -> float:
    """What one cell is planned to take; the shorter contexts of a GPU cost less per token."""
    items = stage.last - stage.first
    prompt_tokens = stage.context * (TASK_COUNT * items + stage.windows + 3 * stage.probes)
    factor = next((_FACTORS[one] for one in (row.name, row.kind, row.selector) if one in _FACTORS), 1.6)
    if device == "cuda":
        factor *= 0.4 + 0.6 * stage.context / (32 * K)
    batches = TASK_COUNT * -(-items * stage.context // max(tokens_at_once, stage.context))
    decoding = batches * _ANSWER_TOKENS * _DECODE_STEP_SECONDS[device]
    return prompt_tokens / 1e6 * factor * _SECONDS_PER_MILLION[device] + decoding
