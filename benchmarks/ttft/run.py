"""`python -m benchmarks ttft`: whole models, chunk after chunk, dense and sparse attention in the same stack.

    python -m benchmarks ttft --preset cpu                        # small models: tries the code, under a minute
    python -m benchmarks ttft --preset h200 --resume              # one H200, again and again until all cases are there
    python -m benchmarks ttft --preset h200 --list                # cases, and the memory that each needs
    python -m benchmarks report benchmarks/results/ttft-h200.json

Needs transformers (extra `hf`). Prompts of 32K, 64K and 128K share their chunks; of the chunks every `stride`-th is
measured and stands for its neighbours, as in `benchmarks.prompts`. No case begins after the preset's budget of seconds;
the JSON is rewritten after each case.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines
from benchmarks.arguments import check_counts
from benchmarks.cases import Preset, matching
from benchmarks.contestants import groupings_of
from benchmarks.gate import Verdict
from benchmarks.latency import opened, run_cases, torch_threads
from benchmarks.machine import TTFT_SOURCES, check_device, sensors
from benchmarks.measure import Rounds, failed, measure
from benchmarks.prompts import brief_rows, places
from benchmarks.ttft.cases import OWN, StackCase, in_small, needed_bytes, preset, refuse_if_too_large
from benchmarks.ttft.lineup import chunk_field, dense_attentions, workload_tables
from benchmarks.ttft.models import EXPERTS
from benchmarks.ttft.stack import Stack
from benchmarks.ttft.stack_gate import MakeAttention, stack_verdicts
from benchmarks.workloads import Density

KIND, SCHEMA = "ttft", 1
PACKAGES = ("transformers",)
PROTOCOL = (
    "A time is one forward pass of a chunk through the whole model: embedding, every layer with its projections, cache "
    "write, attention and MLP, the last norm, and logits of each request's last token. The time to the first token is "
    "the sum over the prompt's chunks; a measured chunk stands for its neighbours.",
    "The modules are those of transformers, in eager mode; experts run as its grouped_mm.",
    "Weights are random, so attention has no pattern. compactattn rows select on the model's own queries and keys "
    "(select_table, which updates the key means first), and this is part of their time; what was selected is then left "
    "aside, and the attention reads the block table of the calibrated workload at the same context, the same one in "
    "every layer.",
    "How much it would have kept in layer 0 is reported: the closer to every block, the more of the selection's time "
    "goes into long tables that nobody reads.",
    "The cache is head-major and allocated once; all attentions read the same memory in place. The past is "
    "standard normal noise; each pass writes its chunk's own keys and values.",
    "Dense attention is bottom-right causal: cuDNN's past and chunk are merged by log-sum-exp, FlashAttention-2 and "
    "dense compactattn (the table of Dense(), made once for all layers) do it in one call. Speedups are over the one "
    "that takes least.",
    "'no attention' is the same pass with a given output in place of attention: the most that any attention could win. "
    "The attention share of a row is 1 - that ÷ the row.",
    "All rows of a chunk are timed round-robin in one loop. graph: replays of a CUDA graph of the whole pass; plain: "
    "the pass as Python launches it on an idle device, where select_table and attend are two calls of the library "
    "rather than one prefill.",
    "Before that, every attention passes a gate in the whole stack, in small, against float64 logits, and its plain "
    "and its replayed pass are checked on the timed tensors: layer 0's output on float64 rows, the table selected "
    "there, and that the table which is used is canonical and exactly the workload's.",
    "Useful FLOPs: the linear layers', and 4 · rows · keys · D of attention over the tokens in the table.",
    "A power-capped card slows down over seconds: times are compared within one chunk, never between runs.",
)
ROUNDS = Rounds(least=3, warm_ups=0, plain=False, alike=True, host=False)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        preset, out: which preset, and the directory of its results.
        only: comma-separated parts of case names, or shell patterns; None runs all.
        resume: keep the cases that the result in `out` already has from the same sources on the same card.
        commit: what to write down as the commit where there is no git.
        budget_seconds, timing_seconds, device: instead of the preset's.
        shrink: divide contexts and chunks, and take small models, to try a preset's code on a small machine.
        threads: on the CPU; one by default, because two on a shared core wait for each other.
    """

    preset: str
    out: Path
    only: str | None = None
    resume: bool = False
    commit: str | None = None
    budget_seconds: float | None = None
    timing_seconds: float | None = None
    device: str | None = None
    shrink: int = 1
    threads: int = 1


def planned(options: Options) -> tuple[Preset, list[StackCase]]:
    """The preset with what the options change, and its chosen cases.

    Raises:
        ValueError: an unknown preset, or options that leave nothing to run.
    """
    check_counts(options, "shrink", "threads")
    chosen = preset(options.preset)
    changes = {name: getattr(options, name) for name in ("budget_seconds", "timing_seconds", "device")}
    chosen = replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    listed = [case for case in matching(chosen.cases, options.only) if isinstance(case, StackCase)]
    if not listed:
        raise ValueError(f"--only: expected a part of a case's name, such as {chosen.cases[0].name}, got no match")
    return chosen, [in_small(case, options.shrink) for case in listed]


def listing(options: Options) -> str:
    """The cases and what each needs of the device; nothing runs."""
    _, cases = planned(options)
    lines = []
    for case in cases:
        needed = needed_bytes(case, capacity_of(case, cases))
        parts = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in needed.items())
        lines.append(f"{case.name}: {sum(needed.values()) / 2**30:.1f} GiB ({parts})")
    return "\n".join(lines)


def run(options: Options) -> int:
    """Run a preset, print progress and tables, write JSON; 0 unless a gate is red or a case fails."""
    chosen, cases = planned(options)
    check_device(options.preset, chosen.device)
    started = time.perf_counter()
    path = options.out / f"ttft-{options.preset}.json"
    head = {"kind": KIND, "schema": SCHEMA, "preset": options.preset, "protocol": PROTOCOL, "notes": chosen.notes}
    with torch_threads(options.threads if chosen.device == "cpu" else torch.get_num_threads()):
        how = {"resume": options.resume, "patterns": TTFT_SOURCES, "packages": PACKAGES, "threads": True}
        result = opened(path, head, chosen.device, options.commit, **how)
        bench = Bench(chosen, cases)
        run_cases(cases, bench.measured_case, result, path, chosen.budget_seconds, started)
    from benchmarks.ttft.report import summary_section

    print("\n".join(summary_section(result)))
    print(f"\n{path}\nreport: python -m benchmarks report {path}")
    return int(any(failed(record) for record in result["cases"]))


def capacity_of(case: StackCase, cases: list[StackCase]) -> int:
    """Tokens that the cache holds: all prompts of a setting share one stack."""
    return max(other.context for other in cases if other.setting == case.setting)


class Bench:
    """Measures cases; holds the stack and the gate's verdicts of the setting that it measured last.

    Args:
        chosen: gives the device and the time to spend on each chunk.
        cases: all that will come.
    """

    def __init__(self, chosen: Preset, cases: list[StackCase]) -> None:
        self.chosen, self.cases = chosen, cases
        self._setting: tuple[object, ...] | None = None
        self._stack: Stack | None = None
        self._verdicts: dict[str, Verdict] = {}
        self._dense: dict[str, MakeAttention] = {}
        self._absent: dict[str, str] = {}

    def measured_case(self, case: StackCase) -> dict[str, Any]:
        """The record of one case; one that does not fit is not run, one that fails is a failed record."""
        record: dict[str, Any] = {"name": case.name, "case": asdict(case), "status": "ok"}
        needed = needed_bytes(case, capacity_of(case, self.cases))
        cuda = self.chosen.device == "cuda"
        try:
            if cuda:
                refuse_if_too_large(needed, torch.cuda.get_device_properties(0).total_memory)
        except ValueError as error:
            return record | {"status": "not run", "reason": str(error)}
        try:
            stack = self._stack_of(case)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            record |= self._measured(case, stack)
            record["memory"] = {"needed": needed, "peak": torch.cuda.max_memory_reserved() if cuda else None}
            record["sensors"] = sensors() if cuda else {}
        except Exception as error:
            record |= {"status": "failed", "reason": baselines.reason(error)}
        return record

    def _stack_of(self, case: StackCase) -> Stack:
        """The stack of a case's setting, past the gate; another one's is given up first."""
        if self._stack is None or self._setting != case.setting:
            self._stack, self._setting = None, None
            device, dtype = self.chosen.device, getattr(torch, case.dtype)
            _give_memory_back(device)
            dense = dense_attentions(device, flash=case.peers)
            self._verdicts, self._absent = stack_verdicts(case, device, dense, groupings_of(case, fixed=True))
            self._dense = {name: make for name, make in dense.items() if name not in self._absent}
            stack = Stack(case.stack, case.shape.batch, capacity_of(case, self.cases), device, dtype)
            stack.cache.fill()
            self._stack, self._setting = stack, case.setting
        return self._stack

    def _measured(self, case: StackCase, stack: Stack) -> dict[str, Any]:
        """Every measured chunk: its rows, its density, and how many chunks it stands for."""
        chunks, absent = [], dict(self._absent)
        total: dict[str, Density] = {}
        chosen, stands_for = places(case)
        rounds = replace(ROUNDS, plain=case.plain)
        for n in chosen:
            tables = workload_tables(case, (n + 1) * case.chunk, self.chosen.device)
            chunk = stack.random_chunk(n * case.chunk, case.chunk)
            lineup = chunk_field(stack, chunk, self._dense, tables, self._verdicts)
            rows, missing = measure(lineup, self.chosen.timing_seconds, self.chosen.device, rounds=rounds)
            absent |= missing
            density = {name: asdict(one) for name, one in lineup.measured.items()}
            here = {"context": chunk.context, "stands_for": stands_for, "rows": brief_rows(rows), "density": density}
            chunks.append({**here, "own_selection": lineup.density[OWN]})
            for name, one in lineup.measured.items():
                total[name] = total.get(name, Density()) + one
            del lineup, tables
            _give_memory_back(self.chosen.device)  # which a graph's own pool keeps, and a capture may not ask for
        gates = [{"name": name, "family": "gate", "gate": one.as_json()} for name, one in self._verdicts.items()]
        return {
            "model": _described(case, stack),
            "rows": gates,
            "chunks": chunks,
            "did_not_run": absent,
            "density": {name: one.as_json() for name, one in total.items()},
        }


def _give_memory_back(device: str) -> None:
    """What nothing refers to any more, pools of CUDA graphs included, is the device's again."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _described(case: StackCase, stack: Stack) -> dict[str, Any]:
    """What was built, in numbers."""
    described = {"part": case.part, "parameters": stack.shape.parameters(), **asdict(stack.shape)}
    return described | {"experts_implementation": EXPERTS if stack.shape.experts else None}
