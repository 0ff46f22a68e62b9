"""`python -m benchmarks latency`: how long one chunk takes, dense and sparse, stage by stage and whole.

Every result goes through the gate on the tensors that are timed, first as a plain call and again as a graph replay; a
red gate is reported and never timed. The JSON is rewritten after every case, so that a run that is cut short keeps
what it has.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import compactattn
from benchmarks import baselines
from benchmarks.cases import Case, Preset, matching, preset
from benchmarks.contestants import Contestant, Field, layouts_field, step_field, tables_field
from benchmarks.gate import Verdict
from benchmarks.timing import (
    ColdCache,
    Timing,
    capture,
    host_time,
    interleaved_cpu,
    interleaved_cuda,
    poison,
)
from benchmarks.workloads import PUBLISHED_DENSITY, WORKLOADS, Density, Step, make_step

SCHEMA = 1
PROTOCOL = (
    "All rows of a case are timed round-robin in one loop, after a correctness gate on the same tensors.",
    "On a GPU the L2 is evicted before every run unless a row says cold_l2 false.",
    "graph: replays of a CUDA graph, queued; plain: one call on an idle device, host work included.",
    "Useful FLOPs: 4 · rows · keys · D over the tokens in the table, half of the current chunk's own square.",
    "Bytes: queries, outputs, and each K and V token once per KV head that reads it.",
    "Dense runs compute bottom-right causal attention; cuDNN's past and chunk are merged by log-sum-exp.",
    "Densities are of FlashPrefill at alpha 0.18; each says whether it is of one chunk or an average over a prompt.",
)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        preset, out: which preset, and the directory of its results.
        cases: comma-separated parts of case names; None runs all.
        budget_seconds, timing_seconds, device: instead of the preset's.
        shrink: divide contexts, chunks and heads, to try a preset's code on a small machine.
        threads: on the CPU; one by default, because two on a shared core wait for each other.
        warm: leave the L2 as the run before left it, instead of evicting it before each run.
    """

    preset: str
    out: Path
    cases: str | None = None
    budget_seconds: float | None = None
    timing_seconds: float | None = None
    device: str | None = None
    shrink: int = 1
    threads: int = 1
    warm: bool = False


def environment(device: str) -> dict[str, object]:
    """What the numbers were measured on."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    found: dict[str, object] = {
        "compactattn": compactattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": commit,
        "uncommitted_changes": commit and bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["power_limit"] = _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader")
        found["triton"] = __import__("triton").__version__
    else:
        found["numba"] = __import__("numba").__version__
        found["threads"] = torch.get_num_threads()
    return found


def _output(*command: str) -> str | None:
    """The first line that a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def ceilings() -> dict[str, float]:
    """What this card reaches today: a large bf16 product, in TFLOP/s, and a device copy, in TB/s read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = interleaved_cuda({}, {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 0.3)
    product, copied = times["product", "plain"].p50_ms, times["copy", "plain"].p50_ms
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tbps": 2 * source.nbytes / copied / 1e9}


def run(options: Options) -> int:
    """Run a preset, print progress and a table, write JSON; 0 unless a gate is red or a case fails."""
    chosen = preset(options.preset)
    if options.timing_seconds is not None:
        chosen = replace(chosen, timing_seconds=options.timing_seconds)
    device = options.device or chosen.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--preset {options.preset}: expected a CUDA device, got none; --preset cpu runs everywhere")
    listed = matching(chosen.cases, options.cases)
    if not listed:
        raise ValueError(f"--cases: expected a part of a case's name, such as {chosen.cases[0].name}, got no match")
    with _threads(options.threads if device == "cpu" else torch.get_num_threads()):
        result, path = _measured(options, chosen, device, listed)
    from benchmarks.report import terminal_table

    print(terminal_table(result))
    print(f"\n{path}\nreport: python -m benchmarks report {path}")
    return int(any(failed(record) for record in result["cases"]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(options: Options, chosen: Preset, device: str, listed: Sequence[Case]) -> tuple[dict[str, Any], Path]:
    """Measure the cases one after the other, and rewrite the JSON after each."""
    budget = chosen.budget_seconds if options.budget_seconds is None else options.budget_seconds
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"latency-{options.preset}.json"
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "preset": options.preset,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "protocol": PROTOCOL,
        "environment": environment(device),
        "ceilings": ceilings() if device == "cuda" else {},
        "notes": chosen.notes,
        "cases": [],
    }
    records = result["cases"]
    for case in listed:
        elapsed = time.perf_counter() - started
        if elapsed > budget:
            reason = f"the budget of {budget:.0f} s was spent"
            records.append({"name": case.name, "case": asdict(case), "status": "not run", "reason": reason})
        else:
            small = shrunk(case, options.shrink)
            records.append(measured_case(small, chosen, device, cold=not options.warm))
            records[-1]["seconds"] = round(time.perf_counter() - started - elapsed, 2)
            print(_progress(records[-1], elapsed), flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_json(path, result)
    return result, path


def shrunk(case: Case, factor: int) -> Case:
    """The same case over a context and a chunk divided by `factor`, for trying presets on a small machine."""
    if factor == 1:
        return case
    shape = replace(case.shape, batch=min(case.shape.batch, 2), q_heads=case.shape.group, kv_heads=1)
    return replace(case, shape=shape, context=case.context // factor, chunk=max(128, case.chunk // factor))


def measured_case(case: Case, chosen: Preset, device: str, *, cold: bool = True) -> dict[str, object]:
    """The record of one case; a case that cannot be made or runs out of memory is a failed record, not an exception."""
    record: dict[str, object] = {"name": case.name, "case": asdict(case), "status": "ok"}
    try:
        if case.kind == "prompt":
            record |= measured_prompt(case, chosen, device, cold)
        else:
            lineup = _prepared(case, chosen, device)
            rows, absent = measure(lineup, chosen.timing_seconds, device, cold=cold)
            record |= {"rows": rows, "did_not_run": absent, "density": lineup.density}
    except Exception as error:
        record |= {"status": "failed", "reason": baselines.reason(error)}
    return record


def _prepared(case: Case, chosen: Preset, device: str) -> Field:
    capacity = case.context
    if case.kind == "step" and case.peers and device == "cuda":
        capacity = max(capacity, chosen.capacity)
    step = _make(case, device, capacity)
    if case.kind == "tables":
        return tables_field(case, step)
    if case.kind == "layouts":
        sizes = [size for size in (16, 64, 256) if size != case.page_size]
        others = {size: _make(replace(case, page_size=size), device, None) for size in sizes}
        return layouts_field(case, step, others)
    return step_field(case, step)


def _make(case: Case, device: str, capacity: int | None, *, context: int | None = None, seed: int = 0) -> Step:
    return make_step(
        WORKLOADS[case.workload],
        case.shape,
        case.context if context is None else context,
        case.chunk,
        correlation=case.correlation,
        page_size=case.page_size,
        seed=seed,
        device=device,
        dtype=getattr(torch, case.dtype),
        capacity=capacity,
    )


def measured_prompt(case: Case, chosen: Preset, device: str, cold: bool) -> dict[str, object]:
    """Every stride-th chunk of a prompt, dense and `prefill`; sums stand for the whole prompt."""
    chunks, density, absent = [], Density(), {}
    growth: dict[str, Density] = {}
    places = range(case.stride // 2, case.context // case.chunk, case.stride)
    for n in places:
        context = (n + 1) * case.chunk
        step = _make(case, device, context, context=context, seed=n)
        lineup = step_field(replace(case, peers=False), step, stages=False)
        rows, missing = measure(lineup, chosen.timing_seconds / 4, device, cold=cold)
        absent |= missing
        chunks.append({"context": context, "stands_for": case.context // case.chunk / len(places), "rows": rows})
        for name, one in lineup.measured.items():
            growth[name] = growth.get(name, Density()) + one
            density = growth[name]
        del step, lineup
    published = PUBLISHED_DENSITY.get(case.context)
    return {
        "chunks": chunks,
        "did_not_run": absent,
        "density": {name: total.as_json() for name, total in growth.items()},
        "calibration": {"mask_density": density.mask_density, "published": published},
    }


def measure(
    lineup: Field, seconds: float, device: str, *, cold: bool = False
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Gate every contestant, then time the green ones: JSON rows, and reasons for what did not run."""
    absent, rows, ready, replays = dict(lineup.absent), [], {}, {}
    for contestant in lineup.contestants:
        row = _row(contestant)
        try:
            contestant.spoil()
            result = contestant.run()
        except Exception as error:
            why = baselines.reason(error)
            if contestant.family in ("dense", "peer"):
                absent[contestant.name] = why
                continue
            verdict = Verdict(False, math.inf, 0, f"raised {why}")  # the library itself may not fail
        else:
            verdict = checked(contestant, result)
        row["gate"] = verdict.as_json()
        rows.append(row)
        if not verdict.passed:
            continue
        ready[contestant.name] = contestant
        if device == "cuda":
            row["graph"] = _captured(contestant, replays, absent)
    if device == "cuda":
        flush = ColdCache(torch.device(device), needed=cold)
        plain = {name: contestant.run for name, contestant in ready.items()}
        times = interleaved_cuda(replays, plain, seconds, cold=flush)
    else:
        times = interleaved_cpu({name: contestant.run for name, contestant in ready.items()}, seconds)
    hosts = {name: host_time(one.run) for name, one in ready.items() if one.host and device == "cuda"}
    for row in rows:
        row["times"] = {mode: timing.as_json() for (name, mode), timing in times.items() if name == row["name"]}
        if row["name"] in hosts:
            row["times"]["host"] = hosts[row["name"]].as_json()
        row["cold_l2"] = cold and device == "cuda"
    return rows, absent


def checked(contestant: Contestant, result: object) -> Verdict:
    """The gate's verdict; a result that the gate cannot even read is a red one."""
    try:
        return contestant.check(result)
    except Exception as error:
        return Verdict(False, math.inf, 0, f"the check raised {baselines.reason(error)}")


def _captured(contestant: Contestant, replays: dict, absent: dict[str, str]) -> dict[str, object]:
    """Capture a contestant and gate a replay of it; the verdict, or why there is none."""
    if not contestant.capturable:
        return {"captured": False, "reason": "reads device values on the host"}
    try:
        replay = capture(contestant.run)
        poison(replay.result)
        contestant.spoil()
        replay.run()
    except Exception as error:
        absent[f"{contestant.name}, graph"] = baselines.reason(error)
        return {"captured": False, "reason": baselines.reason(error)}
    verdict = checked(contestant, replay.result)
    if verdict.passed:
        replays[contestant.name] = replay.run
    return {"captured": True, "gate": verdict.as_json()}


def _row(contestant: Contestant) -> dict[str, object]:
    names = ("name", "family", "grouping", "flops", "bytes", "note")
    return {name: getattr(contestant, name) for name in names}


def failed(record: dict[str, object]) -> bool:
    """A case that failed, or one with a red gate, plain or replayed."""
    rows = list(record.get("rows", []))
    for chunk in record.get("chunks", []):
        rows += chunk["rows"]
    gates = [row["gate"] for row in rows] + [row["graph"]["gate"] for row in rows if "gate" in row.get("graph", {})]
    return record["status"] == "failed" or not all(verdict["passed"] for verdict in gates)


def _progress(record: dict[str, object], elapsed: float) -> str:
    state = record["status"] if not failed(record) else f"FAILED {record.get('reason', '(red gate)')}"
    lines = [f"[{elapsed:6.1f} s] {record['name']}: {state}, {record['seconds']} s"]
    for name, one in record.get("density", {}).items():
        own, united = one["past_density"]["mask"] or 0, one["past_density"]["sub_group_union"] or 0
        grown = one["growth"]["sub_group_union"] or 1
        lines.append(f"           {one['scope']}, {name}: past {own:.2%}, united {united:.2%}, growth {grown:.2f}")
    lines += [f"           did not run: {name}: {why}" for name, why in record.get("did_not_run", {}).items()]
    for row in record.get("rows", []):
        if not row["gate"]["passed"]:
            lines.append(f"           RED {row['name']}: {row['gate']}")
    return "\n".join(lines)


def write_json(path: Path, result: dict[str, object]) -> None:
    """Write under another name and rename, so that nobody meets half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def timing_of(row: dict[str, object], mode: str) -> Timing | None:
    """A row's timing of one mode, or None."""
    times = row["times"].get(mode)
    return None if times is None else Timing(**times)
