"""`python -m benchmarks serving`: vLLM's engine under its own attention and under the plugin, token by token and timed.

    python -m benchmarks serving --preset h200 --list                # the engines, in order
    python -m benchmarks serving --preset h200 --corpus out/stdlib.zip --resume
    python -m benchmarks report benchmarks/results/serving-h200.json

Needs vLLM (extra `vllm`), or its Python files and `--stand-ins`: see `tests/vllm/pack`. The corpus is that of
`fidelity`. An engine that fails is a record with its reason and the end of its traceback, and `--resume` tries it
again; the JSON is rewritten after each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.latency import opened, run_cases
from benchmarks.machine import ROOT, SERVING_SOURCES, check_device
from benchmarks.measure import failed
from benchmarks.serving.cases import EXACT, EngineCase, Plan, baseline, chosen_cases, preset
from benchmarks.serving.compare import EXCUSED, compared, near_tie_bound, verdict
from benchmarks.serving.questions import Question, questions_of
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.model import WEIGHTS_DIRECTORY, file_id
from benchmarks.testbed.tasks import TaskSource, score
from benchmarks.testbed.training_record import check_corpus

KIND, SCHEMA = "serving", 1
TASK_SEED = 2  # `fidelity` asks items of seed 1, training reports on those of seed 0
PACKAGES = ("vllm", "transformers")
PROTOCOL = (
    "Each engine is vLLM's own (scheduler, block manager, model runner, sampler) in a process of its own; its settings "
    "are in its record. 'triton' is vLLM's TRITON_ATTN, the baseline; all others are this library's plugin.",
    "Nothing is compiled by torch.compile. graphs: decode steps alone are CUDA graphs (FULL_DECODE_ONLY); the rest is "
    "eager.",
    "answers: greedy tokens of the test bed's tasks, all prompts in one batch, prefix caching on; then questions on "
    "one document, one after the other behind what the first left in the prefix cache, and again with nothing in it.",
    "near tie: where two answers part, the same two tokens come first in both, and the gap between them is below "
    "2 · eps of the dtype · the largest logit of the baseline's run in both: what rounding two logits, once in each "
    "engine, can turn. Gate of the plugin's dense engine: every prompt is equal, or parts at a near tie, as one "
    f"prompt or {EXCUSED:.0%} of them may.",
    "Answers are spoken as they would be in a server, with launches that are replayed. What a selection reads is "
    "counted when the same batch is asked once more, and its tokens are compared with the first ones.",
    "ttft: median seconds around generate() with one token, of up to three prompts of random tokens, other ones each "
    "time, after prompts of two lengths that warm up. A decode step: the engine's own steps in which every request "
    "gets one token.",
    "Weights of ttft are random and have no pattern that a selection could find. 'scaled' rows multiply the queries "
    "and keys of every layer by the factor, of some that are tried, with which 5 to 20 % of the past is read at 16K, "
    "or the nearest to it. What was read is counted in further, untimed prompts, over the chunks that select: it says "
    "how much work was done, not that answers would be right.",
)
STAND_INS_NOTE = (
    "vLLM's compiled modules were missing (every record names them): what is neither attention nor a Triton kernel of "
    "vLLM's was PyTorch's own operators, one by one. Steps take longer than in an installed vLLM, and what attention "
    "saves is a smaller part of them."
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in the process that measures it
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles small helpers whatever its mode is
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # process groups of one rank need no network, and there may be none
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        preset, out: which preset, and the directory of its results.
        weights: directory of the model that answers.
        corpus: packed corpus, None for the running Python's library; refused if the model's record names another.
        only: comma-separated parts of case names, or shell patterns; None runs all.
        resume: keep the cases that the result in `out` already has from the same sources, weights and questions.
        commit: what to write down as the commit where there is no git.
        budget_seconds: instead of the preset's.
        stand_ins: `tests.vllm.gpu` for vLLM's compiled modules.
    """

    preset: str
    out: Path
    weights: Path = WEIGHTS_DIRECTORY
    corpus: Path | None = None
    only: str | None = None
    resume: bool = False
    commit: str | None = None
    budget_seconds: float | None = None
    stand_ins: bool = False


def planned(options: Options) -> tuple[Plan, list[EngineCase]]:
    """The preset and its chosen cases.

    Raises:
        ValueError: an unknown preset, options that leave nothing to run, or no model.
    """
    chosen = preset(options.preset)
    if not (options.weights / "model.safetensors").is_file():
        raise ValueError(f"--weights: expected a directory with model.safetensors, got {str(options.weights)!r}")
    if options.stand_ins and chosen.device == "cpu":
        raise ValueError("--stand-ins: expected a preset of a GPU, got cpu, which has its own")
    return chosen, chosen_cases(chosen, options.only)


def listing(options: Options) -> str:
    """The engines in order, with what they are asked and when they would be ended; nothing runs."""
    lines = []
    for case in planned(options)[1]:
        prompts = f"{len(case.lengths) * len(case.tasks) * case.items} prompts + {case.shared} on one document, "
        lengths = ", ".join(map(str, case.lengths))
        what = prompts if case.kind == "answers" else "prompts "
        lines.append(f"{case.name}: {what}of {lengths} tokens; at most {case.limit_seconds} s")
    return "\n".join(lines)


def run(options: Options) -> int:
    """Run a preset, print progress and tables, write JSON; 0 unless the gate is red or an engine fails."""
    plan, cases = planned(options)
    check_device(options.preset, plan.device)
    started = time.perf_counter()
    questions = questions_of(baseline(plan.cases), task_source(options))
    path = options.out / f"serving-{options.preset}.json"
    notes = (*plan.notes, *([STAND_INS_NOTE] if options.stand_ins else []))
    head = {"kind": KIND, "schema": SCHEMA, "preset": options.preset, "protocol": PROTOCOL, "notes": notes}
    asked = _asked(options, questions)
    how = {"resume": options.resume, "patterns": SERVING_SOURCES, "packages": PACKAGES, "alike": tuple(asked)}
    result = opened(path, head | asked, plan.device, options.commit, **how)
    if plan.device == "cuda":
        torch.cuda.empty_cache()  # of measuring the ceilings: the engines need it
    budget = plan.budget_seconds if options.budget_seconds is None else options.budget_seconds
    bench = Bench(options, plan, questions, result)
    run_cases(cases, bench.measured_case, result, path, budget, started)  # type: ignore[arg-type]
    from benchmarks.serving.report import answers_section, ttft_section

    print("\n".join([*answers_section(result), "", *ttft_section(result)]))
    print(f"\n{path}\nreport: python -m benchmarks report {path}")
    return int(any(failed(record) for record in result["cases"]))


def task_source(options: Options) -> TaskSource:
    """Of the text that the model's record names."""
    corpus = corpora.load(options.corpus)
    check_corpus(options.weights, corpus)
    return TaskSource(corpus, TASK_SEED)


def _asked(options: Options, questions: list[Question]) -> dict[str, Any]:
    """What has to be the same in all runs of a result."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(question.example.prompt.tobytes())
    weights = file_id(options.weights / "model.safetensors")
    return {"weights": weights, "questions": digest.hexdigest()[:16], "stand_ins": options.stand_ins}


class Bench:
    """Starts engines, and holds their answers against those of the baseline.

    Args:
        options, plan: of the run.
        questions: what the engines of `answers` are asked.
        result: where the baseline's record is found.
    """

    def __init__(self, options: Options, plan: Plan, questions: list[Question], result: dict[str, Any]) -> None:
        self.options, self.plan, self.questions, self.result = options, plan, questions, result

    def measured_case(self, case: EngineCase) -> dict[str, Any]:
        """The record of one engine; one that fails is a failed record, one without a baseline is not started."""
        record: dict[str, Any] = {"name": case.name, "case": asdict(case), "status": "ok"}
        first = baseline(self.plan.cases)
        base = next((one for one in self.result["cases"] if one["name"] == first.name and one["status"] == "ok"), None)
        if case.kind == "answers" and case is not first and base is None:
            return record | {"status": "not run", "reason": f"its baseline, {first.name}, has no answers"}
        told = self._ask(case)
        if "reason" in told:
            return record | {"status": "failed", **told}
        if case.kind == "answers":
            told |= self._judged(case, told, base)
        return record | told

    def _ask(self, case: EngineCase) -> dict[str, Any]:
        prompts = self.questions if case.kind == "answers" else []
        order = {
            "parent": os.getpid(),
            "case": asdict(case),
            "device": self.plan.device,
            "stand_ins": self.options.stand_ins,
            "weights": str(self.options.weights.resolve()),
            "prompts": [question.example.prompt.tolist() for question in prompts],
            "shared": sum(question.shared for question in prompts),
        }
        return in_its_own_process("benchmarks.serving.engine", order, case.limit_seconds, ENVIRONMENT)

    def _judged(self, case: EngineCase, told: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
        """Scores, and what differs from the baseline; of other engines the log-probabilities are kept where it does."""
        answers = told["answers"]
        for answer in answers:
            question = self.questions[answer["question"]]
            answer |= question.about() | {"score": score(question.example, answer["tokens"])}
        if base is None:
            return {}
        bound = near_tie_bound(case.dtype, base["largest_logit"])
        differences = compared(base["answers"], answers, bound)
        for answer, one in zip(answers, differences, strict=True):
            answer["difference"] = one
            del answer["top2"]
        judged: dict[str, Any] = {"near_tie_bound": bound}
        if case.contestant == EXACT:
            gate = {"name": case.name, "family": "gate", "gate": verdict(differences).as_json()}
            judged["rows"] = [gate]
        return judged


def in_its_own_process(module: str, order: dict[str, Any], limit: float, more: dict[str, str]) -> dict[str, Any]:
    """What `python -m MODULE ORDER.json ANSWER.json` wrote, or {"reason", "traceback"} of a process that wrote nothing.

    Args:
        module: takes the order and writes the answer, or its own reason.
        order: what to do.
        limit: seconds after which the process and its children are ended.
        more: variables of its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder, name) for name in ("order.json", "answer.json", "log"))
        asked.write_text(json.dumps(order))
        command = [sys.executable, "-m", module, str(asked), str(answered)]
        with log.open("w") as written:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | more, stdout=written, stderr=written, start_new_session=True
            )
            try:
                process.wait(limit)
                reason = f"its process ended with {process.returncode} and no answer"
            except subprocess.TimeoutExpired:
                reason = f"no answer within {limit:g} s"
            finally:
                _end(process)
        if answered.exists():
            return json.loads(answered.read_text())
        return {"reason": reason, "traceback": log.read_text(errors="replace")[-4000:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process, if it still runs, and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
