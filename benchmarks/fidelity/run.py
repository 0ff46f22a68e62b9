"""`python -m benchmarks fidelity`: what every method does to a model's answers, over sweeps, contexts and chunks.

    python3 -m benchmarks fidelity --preset h200 --corpus out/stdlib.zip --list     # the plan and what it should take
    python3 -m benchmarks fidelity --preset h200 --corpus out/stdlib.zip --resume   # again and again until all is there
    python3 -m benchmarks report benchmarks/results/fidelity-h200.json

The corpus is `python3 -m benchmarks.testbed.corpus --out out/stdlib.zip`, made by the Python whose whole library the
model was trained on: another text is refused, for what is held out of it need not be new to the model. The model is
the committed one, or `--weights DIRECTORY`; it should be trained on the tasks (`testbed.train_tasks`) and have
gates (`testbed.train_gate`), and the report says where it is not or has none.

A cell is one row over one stage's context, chunk and items. The JSON is rewritten after every cell; `--resume` keeps
the cells that it has, those of SeerAttention while the gates are the same. No cell begins that is not expected to end
within `--budget-seconds`. A cell that fails is a record with its reason, and `--resume` tries it again, after all
others; an error that leaves the GPU unusable ends the run.

Several GPUs or machines share a plan, each with a result of its own, which become one:

    CUDA_VISIBLE_DEVICES=0 python3 -m benchmarks fidelity ... --share 1/2 --out out/1    # beside --share 2/2 on GPU 1
    python3 -m benchmarks join out/1/fidelity-h200.json out/2/fidelity-h200.json --out benchmarks/results
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import check_counts
from benchmarks.baselines import reason
from benchmarks.fidelity import answering
from benchmarks.fidelity.items import Items
from benchmarks.fidelity.join import OUT_OF_MEMORY, check_alike, check_rows, joined_model, place
from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import (
    DENSE,
    NEEDLE_TASKS,
    Preset,
    Row,
    Stage,
    planned_seconds,
    preset,
    shared,
)
from benchmarks.fidelity.probing import probe
from benchmarks.files import claim, earlier, write_json, write_new
from benchmarks.latency import torch_threads
from benchmarks.machine import FIDELITY_SOURCES, check_device, environment
from benchmarks.records import sensible
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.intervals import METHODS as INTERVALS
from benchmarks.testbed.model import WEIGHTS_DIRECTORY, file_id, load_model
from benchmarks.testbed.tasks import ANSWER_WORDS, TaskSource
from benchmarks.testbed.train_gate import WEIGHTS_FILE as GATE_FILE
from benchmarks.testbed.training_record import check_corpus, read_record

KIND, SCHEMA = "fidelity", 1
TASK_SEED = 1  # the examples that training reports on are those of seed 0
PROTOCOL = (
    "Items are test examples of benchmarks.testbed.tasks: their strings and their source text were never trained on.",
    "A score is the share of an answer's words; all methods answer the same items.",
    "greedy: chunked prefill of the prompt, then greedy decoding; decode steps read every key.",
    "in chunk: prompt and answer are prefilled together; a word counts if each of its tokens comes first given those "
    "before it.",
    "dense: transformers' own attention (sdpa), the prompt in one piece; all others prefill in chunks, the first of "
    "which has nothing to select from and is dense.",
    "Density: past blocks (QUOKA: tokens) that are read, of those that are visible, averaged over a prompt's chunks, "
    "all layers and heads. It depends on the prompt: beside scores of tasks stands the density on prompts of these "
    "tasks, each counting alike, and beside bits per byte that on held-out text.",
    "Coverage: share of the exact softmax mass on what a query is given. Output error: relative, per layer and head, "
    "against dense attention over the same queries and keys. Density, coverage and error are of a few prompts.",
    "Bits per byte: held-out source text, windows of the context's length, all positions.",
    *INTERVALS,
)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        preset, out: which preset, and the directory of its results.
        weights: directory of the model; its `gate/seer_gate.safetensors` is used if it is there, or `gate`.
        corpus: packed corpus, None for the running Python's library; refused if the model's record names another.
        only: comma-separated parts of row names, or shell patterns; None runs all.
        contexts: comma-separated; None runs all of the preset's.
        share: "I/N": of the cells that the other options leave of the plan every N-th, beginning with the I-th (from
            1), whatever a result already has; None runs all. Every share has an `out` of its own.
        resume: keep the cells that the result in `out` already has from the same sources, weights and corpus; those
            whose row reads gates only if they are of these gates.
        commit: what to write down as the commit where there is no git.
        budget_seconds, device, tokens_at_once, items: instead of the preset's; `items` caps those of a task.
        threads: on the CPU; one by default, because two on a shared core wait for each other.
    """

    preset: str
    out: Path
    weights: Path = WEIGHTS_DIRECTORY
    gate: Path | None = None
    corpus: Path | None = None
    only: str | None = None
    contexts: str | None = None
    share: str | None = None
    resume: bool = False
    commit: str | None = None
    budget_seconds: float | None = None
    device: str | None = None
    tokens_at_once: int | None = None
    items: int | None = None
    threads: int = 1


def plan(options: Options) -> Preset:
    """The preset with what the options change.

    Raises:
        ValueError: an unknown preset, or options that leave nothing to run.
    """
    check_counts(options, "tokens_at_once", "items", "threads")
    if options.gate is not None and not options.gate.is_file():
        raise ValueError(f"--gate: expected a file of gate weights, got {str(options.gate)!r}, which is none")
    chosen = preset(options.preset, options.weights, options.gate)
    rows, stages = chosen.rows, chosen.stages
    if options.only is not None:
        parts = [part.strip() for part in options.only.split(",") if part.strip()]
        rows = tuple(row for row in rows if any(part in row.name or fnmatchcase(row.name, part) for part in parts))
        if not rows:
            raise ValueError(f"--only: expected a part of a row's name, such as {chosen.rows[-1].name!r}, got no match")
    if options.contexts is not None:
        wanted = {part.strip() for part in options.contexts.split(",")}
        stages = tuple(stage for stage in stages if str(stage.context) in wanted)
        if not stages:
            known = sorted({stage.context for stage in chosen.stages})
            raise ValueError(f"--contexts: expected some of {known}, got {options.contexts!r}")
    if options.items is not None:
        stages = tuple(replace(s, last=min(s.last, options.items)) for s in stages if s.first < options.items)
    changes = {"device": options.device, "budget_seconds": options.budget_seconds}
    changes |= {"tokens_at_once": options.tokens_at_once}
    given = {name: value for name, value in changes.items() if value is not None}
    left = replace(chosen, rows=rows, stages=stages, **given)  # type: ignore[arg-type]
    return left if options.share is None else shared(left, options.share)


def listed(options: Options) -> str:
    """The plan, row by row, and what it is planned to take; nothing runs."""
    chosen = plan(options)
    there = {row.name for _, row in chosen.cells()}
    rows = [f"{row.priority}  {row.name}" for row in chosen.rows if row.name in there]
    result: dict[str, Any] = {"cells": [], "absent": {}}
    return "\n".join([*rows, "", estimate(list(chosen.cells()), chosen, result)])


def run(options: Options) -> int:
    """Run a preset, print progress, write JSON; 0 unless a cell of the result failed, in this run or an earlier one."""
    chosen = plan(options)
    check_device(options.preset, chosen.device)
    started, on_cpu = time.perf_counter(), chosen.device == "cpu"
    corpus = corpora.load(options.corpus)
    check_corpus(options.weights, corpus)
    source = TaskSource(corpus, TASK_SEED)
    items = Items(source, processes=0 if on_cpu else 8)  # before CUDA starts: they are forked
    with items, torch_threads(options.threads if on_cpu else torch.get_num_threads()):
        model = load_model(options.weights, chosen.device)
        if chosen.device == "cuda":
            in_bfloat16(model)
        methods = Methods(model, options.gate or options.weights / GATE_FILE)
        path = options.out / f"fidelity-{options.preset}.json"
        result = _opened(options, chosen, methods, source, path)
        todo = remaining(chosen, methods, result)
        print(estimate(todo, chosen, result), flush=True)
        _measure(todo, chosen, methods, items, result, path, started)
    print(f"\n{path}\nreport: python -m benchmarks report {path}")
    return int(any(cell["status"] == "failed" for cell in result["cells"]))


def in_bfloat16(model: torch.nn.Module) -> None:
    """Weights to bfloat16, as they are on disk; buffers stay, for RoPE's frequencies must be float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def _opened(options: Options, chosen: Preset, methods: Methods, source: TaskSource, path: Path) -> dict[str, Any]:
    """The result to add to: a new one, or the one in `path` when resuming."""
    claim(path)
    here = environment(chosen.device, options.commit, FIDELITY_SOURCES)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    current = {"started": started, "environment": here, "seconds": 0.0, "not_run": []}
    result: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "preset": options.preset, "protocol": PROTOCOL}
    result["model"] = _model_record(options.weights, methods)
    result |= {"corpus": _text_digest(source), "rows": {}, "hidden": {}, "absent": {}, "runs": [current], "cells": []}
    if options.resume and path.exists():
        before = earlier(path)
        if before.get("kind") != KIND or before.get("schema") != SCHEMA:
            raise ValueError(f"--resume: expected a fidelity result of schema {SCHEMA}, got another in {path}")
        with sensible(f"--resume: {path}"):
            check_alike("--resume", result, before, path)
            measured = {cell["row"] for cell in before["cells"] if cell["status"] == "ok"}
            rows = json.loads(json.dumps({row.name: row.as_json() for row in chosen.rows}))
            check_rows("--resume", rows, {name: before["rows"][name] for name in measured & rows.keys()}, path)
            result = before | {"protocol": PROTOCOL, "model": joined_model(before["model"], result["model"])}
            result["runs"] = [*before["runs"], current]
            result["cells"] = _kept(before["cells"], result["model"]["gate"])
    result["rows"] |= {row.name: row.as_json() for row in chosen.rows}
    measured = {cell["row"] for cell in result["cells"] if cell["status"] == "ok"}
    for row in chosen.rows:  # the others keep what an earlier run said of them
        why = methods.why_not(row)
        result["absent"].pop(row.name, None)
        if why is not None and row.name not in measured:
            result["absent"][row.name] = why
    if not options.resume:
        write_new(path, result)  # from here on, --resume goes on with this one
    return result


def _kept(cells: Sequence[dict[str, Any]], gate: str | None) -> list[dict[str, Any]]:
    """The cells, less those of other gates."""
    kept = [cell for cell in cells if cell.get("gate", gate) == gate]
    if len(kept) < len(cells):
        print(f"{len(cells) - len(kept)} cells are of other gates and are measured again")
    return kept


def _model_record(directory: Path, methods: Methods) -> dict[str, Any]:
    """What was measured: hashes of weights and gates, and how far the model was trained."""
    record: dict[str, Any] = {"weights": file_id(directory / "model.safetensors")}
    gate = methods.gate_file if methods.has_gates else None
    record["gate"] = None if gate is None else file_id(gate)
    record["parameters"] = sum(p.numel() for p in methods.model.parameters())
    record["dtype"] = str(methods.model.dtype).removeprefix("torch.")
    told = read_record(directory)
    if told is not None:
        record["training"] = {name: told.get(name) for name in ("complete", "steps", "tokens", "seconds", "device")}
        record["training"]["tasks"] = told.get("tasks")
    return record


def _text_digest(source: TaskSource) -> str:
    """A hash of both sides' text: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for side, stream in source.streams.items():
        digest.update(side.encode() + stream.tobytes())
    return digest.hexdigest()[:16]


def remaining(chosen: Preset, methods: Methods, result: dict[str, Any]) -> list[tuple[Stage, Row]]:
    """Cells that can run here and are not in the result yet; those that failed come last."""
    status = {(cell["row"], *cell_key(cell)): cell["status"] for cell in result["cells"]}
    able = [(stage, row) for stage, row in chosen.cells() if methods.why_not(row) is None]
    found = [status.get((row.name, *cell_key(asdict(stage)))) for stage, row in able]
    return [
        *(cell for cell, its in zip(able, found, strict=True) if its is None),
        *(cell for cell, its in zip(able, found, strict=True) if its == "failed"),
    ]


def cell_key(cell: dict[str, Any]) -> tuple[int, ...]:
    """What a cell was measured over; of a stage's fields likewise."""
    return tuple(cell[name] for name in ("context", "chunk", "first", "last", "windows", "probes"))


def pace(cells: Sequence[dict[str, Any]]) -> float | None:
    """Measured over planned seconds of the last cells that say something about others; None before the first.

    Those that warm their selector up, which may compile its kernels, and dense ones do not.
    """
    telling = [cell for cell in cells if cell["status"] == "ok" and cell["row"] != DENSE and not cell["warms_up"]]
    recent = telling[-8:]
    return sum(cell["seconds"] for cell in recent) / sum(cell["planned"] for cell in recent) if recent else None


def estimate(todo: Sequence[tuple[Stage, Row]], chosen: Preset, result: dict[str, Any]) -> str:
    """What is to come, stage by stage, and how long it should take."""
    factor = pace(result["cells"])
    lines, total = [], 0.0
    for stage in chosen.stages:
        planned = [planned_seconds(stage, row, chosen.device, chosen.tokens_at_once) for s, row in todo if s == stage]
        seconds = sum(planned) * (factor or 1.0)
        total += seconds
        lines.append(f"{stage!s:<32} {len(planned):3d} rows  {seconds:7.0f} s")
    basis = "by the pace of the cells that are there" if factor else "by planning figures, nothing is measured yet"
    lines += [f"in all about {total:.0f} s, {basis}; this run ends after {chosen.budget_seconds:.0f} s"]
    lines += [f"left out: {name}: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def _measure(
    todo: Sequence[tuple[Stage, Row]],
    chosen: Preset,
    methods: Methods,
    items: Items,
    result: dict[str, Any],
    path: Path,
    started: float,
) -> None:
    """Measure cell after cell, and rewrite the JSON after each."""
    current, number, lost = result["runs"][-1], len(result["runs"]) - 1, False
    warm: set[tuple[object, ...]] = set()
    for stage, row in todo:
        planned = planned_seconds(stage, row, chosen.device, chosen.tokens_at_once)
        elapsed = time.perf_counter() - started
        fresh = [cell for cell in result["cells"] if cell["run"] == number]
        expected = planned * (pace(fresh) or pace(result["cells"]) or 1.0)  # this run's own once it has one
        if lost or elapsed + expected > chosen.budget_seconds:
            current["not_run"].append(f"{row.name} at {stage}")
        else:
            cell = measured_cell(stage, row, chosen, methods, items)
            cell |= {"run": number, "planned": round(planned, 2), "warms_up": kernels_of(row) not in warm}
            if cell["status"] == "ok":
                warm.add(kernels_of(row))
            if "SeerGate" in row.selectors:
                cell["gate"] = result["model"]["gate"]
            cell["seconds"] = round(time.perf_counter() - started - elapsed, 2)
            _put(result, cell)
            result["hidden"].setdefault(f"{stage.context}/{stage.chunk}", {}).update(items.hidden(stage))
            print(f"[{elapsed:6.1f} s] {progress(cell)}", flush=True)
            gc.collect()
            lost = cell.get("device_lost", False)
            if chosen.device == "cuda" and not lost:
                torch.cuda.empty_cache()
        current["seconds"] = round(time.perf_counter() - started, 1)
        write_json(path, result)
    if current["not_run"]:
        why = "because the GPU is lost to this process" if lost else "for want of time"
        print(f"{len(current['not_run'])} cells were not run {why}; --resume goes on with them")
        write_json(path, result)


def kernels_of(row: Row) -> tuple[object, ...]:
    """Rows for which this is the same run the same kernels, which the first of them in a process compiles."""
    return row.kind, *sorted(row.selectors), row.correction, row.settings.get("top_k") == 0


def _put(result: dict[str, Any], cell: dict[str, Any]) -> None:
    """Add a cell in place of an earlier one over the same items, such as one with fewer probes."""
    result["cells"] = [*(other for other in result["cells"] if place(other) != place(cell)), cell]


def measured_cell(stage: Stage, row: Row, chosen: Preset, methods: Methods, items: Items) -> dict[str, Any]:
    """The record of one cell; whatever its row stumbles over makes it a failed one, and the other rows go on.

    `device_lost` says that the GPU's context did not survive it.
    """
    where = {name: its for name, its in asdict(stage).items() if name != "priority"}
    cell: dict[str, Any] = {"row": row.name, **where, "status": "ok"}
    examples, heldout = items.examples(stage), items.source.streams["test"]
    try:
        cell["scores"] = {
            task: asdict(answering.answer(methods, row, its, stage.chunk, chosen.tokens_at_once))
            for task, its in examples.items()
        }
        if stage.windows:
            shape = (stage.context, stage.chunk, stage.windows, chosen.tokens_at_once)
            cell["bits"], cell["bytes"] = answering.text_bits(methods, row, heldout, *shape)
        if stage.probes:
            cell["probe"] = probe(methods, row, items.probes(stage), stage.chunk)
    except torch.OutOfMemoryError as error:
        cell |= {"status": "failed", "reason": f"{OUT_OF_MEMORY}; lower --tokens-at-once ({error})"}
    except Exception as error:
        traceback.print_exception(error)
        cell |= {"status": "failed", "reason": reason(error), "device_lost": is_device_lost(error, chosen.device)}
    return cell


def is_device_lost(error: Exception, device: str) -> bool:
    """Whether an error is one of those after which every call of this process to the GPU fails."""
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    try:
        if device == "cuda":  # Triton and cuBLAS have words of their own
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def progress(cell: dict[str, Any]) -> str:
    """One line about a cell."""
    words = f"{cell['row']} at {cell['context']}/{cell['chunk']}: {cell['seconds']:.1f} s"
    if cell["status"] != "ok":
        return f"{words}, FAILED: {cell['reason']}"
    scores = cell["scores"]
    for name in ("greedy", "in_chunk"):
        shares = [int(digit) / ANSWER_WORDS[task] for task in NEEDLE_TASKS for digit in scores[task][name]]
        words += f", {name.replace('_', ' ')} {np.mean(shares):.2f}"
    if "bits" in cell:
        words += f", {sum(cell['bits']) / sum(cell['bytes']):.4f} bits per byte"
    if "probe" in cell and cell["probe"]["density"]["sub_group_union"] is not None:
        words += f", density {cell['probe']['density']['sub_group_union']:.3f}"
    return words
