"""`python -m benchmarks latency`: how long chunked prefill takes, dense and sparse, one question per kind of case.

Every result goes through the gate on the tensors that are timed, first as a plain call and again as a graph replay; a
red gate is reported and never timed. The JSON is rewritten after every case, so that a run that is cut short keeps
what it has, and `--resume` goes on from there.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.arguments import check_counts
from benchmarks.bounds import bounds_field
from benchmarks.cases import Case, Preset, chosen_cases, preset
from benchmarks.contestants import Field, decode_field, step_field, tables_field
from benchmarks.features import features_field
from benchmarks.files import claim, earlier, write_json, write_new
from benchmarks.host import measured_host
from benchmarks.layouts import layouts_field
from benchmarks.machine import LATENCY_SOURCES, ceilings, check_device, environment
from benchmarks.measure import failed, measure, rows_of
from benchmarks.prompts import measured_prompt
from benchmarks.records import check_timed, environment_of, sensible
from benchmarks.scaling import scaling_field
from benchmarks.workloads import WORKLOADS, Step, make_step

SCHEMA = 2
PROTOCOL = (
    "All rows of a case are timed round-robin in one loop, after a correctness gate on the same tensors.",
    "On a GPU the L2 is evicted before every run unless a row says cold_l2 false.",
    "graph: replays of a CUDA graph, queued; plain: one call on an idle device, host work included; host: the host's "
    "part of such a call; steady host: the host's part of calls in bursts, without synchronisation.",
    "Useful FLOPs: 4 · rows · keys · D over the tokens in the table, half of the current chunk's own square.",
    "Bytes: queries, outputs, and each K and V token once per KV head that reads it.",
    "Dense runs compute bottom-right causal attention; cuDNN's past and chunk are merged by log-sum-exp.",
    "Densities are of FlashPrefill at alpha 0.18; each says whether it is of one chunk or an average over a prompt.",
    "A power-capped card slows down over seconds: rates are compared within one case, never between runs.",
)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        preset, out: which preset, and the directory of its results.
        cases: comma-separated parts of case names; None runs all.
        only: comma-separated kinds of cases; None runs all.
        resume: keep the cases that the result in `out` already has from the same sources on the same card, or on as
            many threads of the CPU.
        commit: what to write down as the commit where there is no git.
        budget_seconds, timing_seconds, device: instead of the preset's.
        shrink: divide contexts, chunks and heads, to try a preset's code on a small machine.
        threads: on the CPU; one by default, because two on a shared core wait for each other.
        warm: leave the L2 as the run before left it, instead of evicting it before each run.
    """

    preset: str
    out: Path
    cases: str | None = None
    only: str | None = None
    resume: bool = False
    commit: str | None = None
    budget_seconds: float | None = None
    timing_seconds: float | None = None
    device: str | None = None
    shrink: int = 1
    threads: int = 1
    warm: bool = False


def run(options: Options) -> int:
    """Run a preset, print progress and a table, write JSON; 0 unless a gate is red or a case fails."""
    check_counts(options, "shrink", "threads")
    chosen = preset(options.preset)
    if options.timing_seconds is not None:
        chosen = replace(chosen, timing_seconds=options.timing_seconds)
    device = options.device or chosen.device
    check_device(options.preset, device)
    listed = chosen_cases(chosen, options.cases, options.only)
    with torch_threads(options.threads if device == "cpu" else torch.get_num_threads()):
        result, path = _measured(options, chosen, device, listed)
    from benchmarks.report_terminal import terminal_table

    print(terminal_table(result))
    print(f"\n{path}\nreport: python -m benchmarks report {path}")
    return int(any(failed(record) for record in result["cases"]))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch runs on so many threads of the CPU inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(options: Options, chosen: Preset, device: str, listed: Sequence[Case]) -> tuple[dict[str, Any], Path]:
    """The result with all cases of the list, and where it is."""
    budget = chosen.budget_seconds if options.budget_seconds is None else options.budget_seconds
    started = time.perf_counter()
    path = options.out / f"latency-{options.preset}.json"
    head = {"schema": SCHEMA, "preset": options.preset, "protocol": PROTOCOL, "notes": chosen.notes}
    result = opened(path, head, device, options.commit, resume=options.resume, threads=True)

    def measured(case: Case) -> dict[str, Any]:
        return measured_case(case, chosen, device, cold=not options.warm)

    run_cases([shrunk(case, options.shrink) for case in listed], measured, result, path, budget, started)
    return result, path


def run_cases(
    cases: Sequence[Case],
    measured: Callable[[Case], dict[str, Any]],
    result: dict[str, Any],
    path: Path,
    budget: float,
    started: float,
) -> None:
    """Measure the cases that the result does not have, one after the other, and rewrite the JSON after each.

    Args:
        cases: in order.
        measured: gives the record of a case: its name, the case, a status and what was measured.
        result: of `opened`; it gets the records.
        path: where to write it.
        budget: no case starts later than so many seconds after `started`.
        started: on the clock of `time.perf_counter`.
    """
    records, current = result["cases"], result["runs"][-1]
    kept = {record["name"] for record in records}
    for case in cases:
        if case.name in kept:
            continue
        elapsed = time.perf_counter() - started
        if elapsed > budget:
            reason = f"the budget of {budget:.0f} s was spent"
            records.append({"name": case.name, "case": asdict(case), "status": "not run", "reason": reason})
        else:
            records.append(measured(case))
            records[-1]["seconds"] = round(time.perf_counter() - started - elapsed, 2)
            print(_progress(records[-1], elapsed), flush=True)
            gc.collect()
            if current["environment"]["gpu"] is not None:
                torch.cuda.empty_cache()
        records[-1]["run"] = len(result["runs"]) - 1
        current["seconds"] = round(time.perf_counter() - started, 1)
        write_json(path, result)


def opened(
    path: Path,
    head: dict[str, Any],
    device: str,
    commit: str | None,
    *,
    resume: bool,
    patterns: Sequence[str] = LATENCY_SOURCES,
    packages: Sequence[str] = (),
    alike: Sequence[str] = (),
    threads: bool = False,
) -> dict[str, Any]:
    """The result to add to, with a new run in it: empty, or when resuming with all sound cases of the one in `path`.

    Args:
        path: where the result is, or will be.
        head: what a result says of itself first: its kind (if it has one), schema, preset, protocol and notes, and
            whatever else its cases follow from.
        device, commit, patterns: see `machine.environment`.
        resume: keep what is there.
        packages: whose versions matter too, beside those of torch and the library.
        alike: what of `head` has to be the same in what is there.
        threads: so have PyTorch's threads on the CPU.

    Raises:
        ValueError: another process is writing the result, or what is there comes from other sources, another card or
            other versions, is another kind of result, not alike, or damaged.
    """
    claim(path)
    here = environment(device, commit, patterns)
    here |= {name: importlib.metadata.version(name) for name in packages}
    result: dict[str, Any] = {**head, "runs": [], "cases": []}
    if resume and path.exists():
        before = earlier(path)
        same = all(before.get(name) == head.get(name) for name in ("kind", "schema"))
        if same:
            check_timed(path, before)
        where = environment_of(before) if same else {}
        names = ("sources", "gpu", "torch", *(("threads",) if threads else ()), *packages)
        asked = [(name, where.get(name), here.get(name)) for name in names]
        for name, its, wanted in [*asked, *((name, before.get(name), head[name]) for name in alike)]:
            if its != wanted:
                raise ValueError(f"--resume: expected a result of {name} {wanted!r}, got {path} of {name} {its!r}")
        result["runs"] = before["runs"]
        with sensible(f"--resume: {path}"):
            result["cases"] = [record for record in before["cases"] if record["status"] == "ok" and not failed(record)]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    current: dict[str, Any] = {"started": started, "environment": here, "ceilings": {}, "seconds": 0.0}
    result["runs"].append(current)
    if not resume:
        write_new(path, result)  # from here on, --resume goes on with this one
    if device == "cuda":
        current["ceilings"] = ceilings()
    return result


def shrunk(case: Case, factor: int) -> Case:
    """The same case over lengths divided by `factor`, for trying presets on a small machine."""
    if factor == 1:
        return case
    shape = replace(case.shape, batch=min(case.shape.batch, 2), q_heads=case.shape.group, kv_heads=1)
    chunk = case.chunk if case.kind == "decode" else max(128, case.chunk // factor)
    since, context = case.since // factor, max(case.context // factor, chunk)
    return replace(case, shape=shape, context=context, chunk=chunk, since=since)


def measured_case(case: Case, chosen: Preset, device: str, *, cold: bool = True) -> dict[str, Any]:
    """The record of one case; a case that cannot be made or runs out of memory is a failed record, not an exception."""
    record: dict[str, Any] = {"name": case.name, "case": asdict(case), "status": "ok"}
    try:
        if case.kind == "prompt":
            record |= measured_prompt(case, chosen.timing_seconds / 10, device, cold)
        elif case.kind == "host":
            record |= measured_host(case, _make(case, device, None))
        else:
            lineup = _prepared(case, chosen, device)
            seconds = chosen.timing_seconds / (4 if case.kind == "scaling" else 1)
            rows, absent = measure(lineup, seconds, device, cold=cold)
            record |= {"rows": rows, "did_not_run": absent, "density": lineup.density}
    except Exception as error:
        record |= {"status": "failed", "reason": baselines.reason(error)}
    return record


def _prepared(case: Case, chosen: Preset, device: str) -> Field:
    if case.kind in ("layouts", "scaling"):
        step = _make(case, device, None)
        return layouts_field(case, step) if case.kind == "layouts" else scaling_field(case, step)
    capacity = case.context
    if case.kind == "step" and case.peers and device == "cuda":
        capacity = max(capacity, chosen.capacity)
    step = _make(case, device, capacity)
    fields = {"tables": tables_field, "decode": decode_field, "bounds": bounds_field, "step": step_field}
    fields["features"] = features_field
    return fields[case.kind](case, step)


def _make(case: Case, device: str, capacity: int | None) -> Step:
    return make_step(
        WORKLOADS[case.workload],
        case.shape,
        case.context,
        case.chunk,
        correlation=case.correlation,
        page_size=case.page_size,
        device=device,
        dtype=getattr(torch, case.dtype),
        capacity=capacity,
    )


def _progress(record: dict[str, Any], elapsed: float) -> str:
    state = record["status"] if not failed(record) else f"FAILED {record.get('reason', '(red gate)')}"
    lines = [f"[{elapsed:6.1f} s] {record['name']}: {state}, {record['seconds']} s"]
    for name, one in record.get("density", {}).items():
        own, united = one["past_density"]["mask"] or 0, one["past_density"]["sub_group_union"] or 0
        grown = one["growth"]["sub_group_union"] or 1
        lines.append(f"           {one['scope']}, {name}: past {own:.2%}, united {united:.2%}, growth {grown:.2f}")
    lines += [f"           did not run: {name}: {why}" for name, why in record.get("did_not_run", {}).items()]
    for row in rows_of(record):
        if not row["gate"]["passed"]:
            lines.append(f"           RED {row['name']}: {row['gate']}")
    return "\n".join(lines)
