"""`python -m benchmarks serving` without vLLM: what is asked, near ties, the way from engines to a report."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main
from benchmarks.records import read_kind
from benchmarks.serving import figure, report, run
from benchmarks.serving.cases import BASELINE, baseline, chosen_cases, engine_arguments, preset
from benchmarks.serving.compare import compared, difference, first_difference, near_tie_bound, verdict
from benchmarks.serving.engine import RandomPrompts, distance_to_wanted
from benchmarks.serving.findings import in_order, middle
from benchmarks.serving.questions import questions_of
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.tasks import ANSWER, END, TaskSource
from compactattn.integrations.engine_settings import parse_settings
from tests.vllm import gpu

# ---- what is planned and asked ----


@pytest.mark.parametrize("name", ["h200", "cpu"])
def test_a_preset_begins_with_its_baseline_and_has_an_exact_engine(name: str) -> None:
    cases = preset(name).cases
    assert len({case.name for case in cases}) == len(cases)
    assert cases[0].contestant == BASELINE
    assert baseline(cases) is cases[0]
    assert {case.contestant for case in cases if not case.selects} == {"triton", "dense"}
    for case in cases:
        if case.settings is not None:
            parse_settings(case.settings, case.name)


def test_engines_get_the_settings_that_the_report_speaks_of() -> None:
    by_name = {case.name: case for case in preset("h200").cases}
    eager = engine_arguments(
        by_name["answers-keybounds-0.13-q1024-eager"], "somewhere", positions=32768, stand_ins=False
    )
    assert eager["additional_config"] == {
        "compactattn": {"selector": "keybounds", "threshold": 0.13, "dense_last_blocks": 0}
    }
    assert (eager["max_num_batched_tokens"], eager["enable_prefix_caching"], eager["load_format"]) == (
        1024,
        True,
        "auto",
    )
    assert eager["max_model_len"] == 32768, "no more than the model has"
    assert (eager["enforce_eager"], eager["compilation_config"]) == (True, {"mode": 0, "cudagraph_mode": "NONE"})
    graphs = engine_arguments(by_name["ttft-triton-q1024-graphs"], "somewhere", positions=1 << 20, stand_ins=True)
    assert (graphs["additional_config"], graphs["load_format"], graphs["enforce_eager"]) == ({}, "dummy", False)
    assert graphs["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert graphs["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4]
    assert graphs["compilation_config"]["custom_ops"] == ["none"]
    assert "custom_ops" not in eager["compilation_config"]


def test_a_choice_of_engines_brings_the_baseline_that_it_needs() -> None:
    plan = preset("h200")
    assert [case.name for case in chosen_cases(plan, "ttft-dense-q1024-eager")] == ["ttft-dense-q1024-eager"]
    chosen = [case.name for case in chosen_cases(plan, "answers-dense-q1024")]
    assert chosen == ["answers-triton-q1024-eager", "answers-dense-q1024-eager", "answers-dense-q1024-graphs"]


def test_questions_are_mixed_and_the_last_share_a_document(source: TaskSource) -> None:
    case = preset("cpu").cases[0]
    questions = questions_of(case, source)
    assert [q.example.prompt.tolist() for q in questions] == [
        q.example.prompt.tolist() for q in questions_of(case, source)
    ]
    mixed, shared = questions[: -case.shared], questions[-case.shared :]
    assert sorted(q.length for q in mixed) == sorted(case.lengths * len(case.tasks))
    assert [q.shared for q in questions] == [False] * len(mixed) + [True] * case.shared
    documents = {q.example.prompt.tobytes()[: 8 * (len(q.example.prompt) - 18)] for q in shared}
    assert len(documents) == 1
    assert len({q.key for q in shared}) == case.shared
    for question in shared:
        (answer,) = question.example.answers
        line = f"# The secret of {question.key} is ".encode() + answer
        assert line in bytes(token for token in question.example.prompt.tolist() if token < 256)
        assert question.example.prompt[-1] == ANSWER


def test_random_prompts_are_new_each_time_and_the_same_in_every_run() -> None:
    once, again = RandomPrompts(100), RandomPrompts(100)
    first, second = once.prompt(50), once.prompt(50)
    assert first != second
    assert [first, second] == [again.prompt(50), again.prompt(50)]
    assert set(first) <= set(range(100))


def test_the_distance_to_the_wanted_density() -> None:
    assert distance_to_wanted([]) == float("inf")
    found = [distance_to_wanted([{"density": density}]) for density in (0.01, 0.05, 0.1, 0.2, 0.5)]
    assert found == pytest.approx([0.04, 0, 0, 0, 0.3])


# ---- the same tokens, near ties ----


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_the_first_difference_is_where_the_common_beginning_ends(ours: list[int], theirs: list[int]) -> None:
    place = first_difference(ours, theirs)
    common = max(n for n in range(7) if ours[:n] == theirs[:n] and n <= min(len(ours), len(theirs)))
    assert place == (None if ours == theirs else common)


def answer(tokens: list[int], top2: list[list[float]], question: int = 0) -> dict[str, Any]:
    return {"asked": "mixed", "question": question, "tokens": tokens, "top2": top2}


def test_the_bound_of_a_near_tie_by_hand() -> None:
    assert near_tie_bound("bfloat16", 16.0) == 2 * 2**-7 * 16
    assert near_tie_bound("float32", 16.0) == 2 * 2**-23 * 16


logits, errors = st.floats(-30, 30), st.floats(-1, 1)


@given(st.lists(logits, min_size=2, max_size=2), st.lists(errors, min_size=4, max_size=4))
def test_what_rounding_alone_turns_is_a_near_tie(exact: list[float], rounding: list[float]) -> None:
    """Two logits, each with an error of at most eps / 2 of its size in each of two engines."""
    eps = torch.finfo(torch.bfloat16).eps
    sides = []
    for errors_of_engine in (rounding[:2], rounding[2:]):
        seen = [x * (1 + eps / 2 * error) for x, error in zip(exact, errors_of_engine, strict=True)]
        best = int(seen[1] > seen[0])
        sides.append(answer([best], [[best, seen[best], 1 - best, seen[1 - best]]]))
    found = difference(*sides, near_tie_bound("bfloat16", 30 * (1 + eps)))
    assert found is None or found["near_tie"]


@pytest.mark.parametrize(
    ("theirs", "near"),
    [
        ([5, -0.1, 4, -0.12], True),
        ([5, -0.1, 6, -0.12], False),  # another second best
        ([6, -0.1, 4, -0.12], False),  # another best
    ],
)
def test_a_near_tie_is_between_the_same_two_tokens_and_narrow(theirs: list[float], near: bool) -> None:
    base = answer([9, 4, 1], [[9, 0.0, 8, -9.0], [4, -0.5, 5, -0.7], [1, 0.0, 2, -9.0]])
    other = answer([9, int(theirs[0]), 1], [[9, 0.0, 8, -9.0], theirs, [1, 0.0, 2, -9.0]])
    found = difference(base, other, 0.25)
    assert found == {"place": 1, "baseline": [4, -0.5, 5, -0.7], "top2": theirs, "near_tie": near}
    narrower = difference(base, other, 0.19)
    assert narrower is not None
    assert not narrower["near_tie"]
    wide = difference(base, answer([9, 5, 1], [[9, 0.0, 8, -9.0], [5, -0.1, 4, -0.4], [1, 0.0, 2, -9.0]]), 0.25)
    assert wide is not None
    assert not wide["near_tie"], "the gap is narrow in the baseline alone"


def test_an_answer_that_stops_early_is_no_near_tie() -> None:
    base, other = answer([4, 5], [[4, 0.0, 5, -0.1]] * 2), answer([4], [[4, 0.0, 5, -0.1]])
    found = difference(base, other, 1.0)
    assert found is not None
    assert (found["place"], found["top2"], found["near_tie"]) == (1, None, False)


def test_the_verdict_counts_what_is_no_near_tie() -> None:
    near, far = ({"near_tie": one} for one in (True, False))
    assert verdict([None, None, near]).passed
    red = verdict([None, far, near, far])
    assert (red.passed, red.worst, red.rows) == (False, 2.0, 4)
    assert not verdict([None, near, near]).passed, "more near ties than rounding explains"
    assert verdict([near] * 2 + [None] * 38).passed
    assert not verdict([near] * 3 + [None] * 37).passed
    with pytest.raises(ValueError, match="expected those to the baseline's 1 questions, got 1, others"):
        compared([answer([1], [])], [answer([1], [], question=1)], 1.0)


# ---- engines in processes of their own ----


def test_a_process_gives_its_answer_or_its_reason(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("print('before the end')\nraise SystemExit(3)\n")
    more = {"PYTHONPATH": str(tmp_path)}
    assert run.in_its_own_process("json.tool", {"a": [1]}, 60, more) == {"a": [1]}  # which copies one file to another
    told = run.in_its_own_process("dies", {}, 60, more)
    assert told == {"reason": "its process ended with 3 and no answer", "traceback": "before the end\n"}


def test_an_engine_tells_why_it_fails_and_ends_with_its_run() -> None:
    order = {"parent": os.getpid(), "case": {"kind": "answers"}}
    told = run.in_its_own_process("benchmarks.serving.engine", order, 60, {})
    assert told["reason"].startswith("TypeError: EngineCase.__init__() missing")
    assert "in answered" in told["traceback"]
    told = run.in_its_own_process("benchmarks.serving.engine", order | {"parent": 0}, 60, {})
    assert told["reason"] == "its process ended with 1 and no answer"


def _runs(number: int) -> bool:
    """Whether a process is there that is not just waiting for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    (tmp_path / "hangs.py").write_text(
        f"import pathlib, subprocess\nprocess = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(process.pid))\nprocess.wait()\n"
    )
    told = run.in_its_own_process("hangs", {}, 4, {"PYTHONPATH": str(tmp_path)})
    assert told["reason"] == "no answer within 4 s"
    number, until = int(child.read_text()), time.monotonic() + 20
    while _runs(number) and time.monotonic() < until:  # a kill is on its way for a moment
        time.sleep(0.05)
    assert not _runs(number)


# ---- from engines to a report ----


class Engines:
    """Stands for the processes: they say the right answers, but for what `says` and `fails` name."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.says: dict[str, Any] = {}
        self.fails: dict[str, str] = {}
        self.answers: list[list[int]] = []

    def __call__(self, module: str, order: dict[str, Any], limit: float, more: dict[str, str]) -> dict[str, Any]:
        case = order["case"]
        name = f"{case['kind']}-{case['contestant']}"
        self.started.append(name)
        if name in self.fails:
            return {"reason": self.fails[name], "traceback": "Traceback …"}
        engine = dict.fromkeys(("block_size", "cudagraph_mode", "model_runner"), "-")
        told: dict[str, Any] = {"engine": {**engine, "attention": ["Impl"], "missing_modules": ["_C"], "start_s": 1.0}}
        if case["kind"] == "ttft":
            read = {"read": 10, "visible": 100}
            prompts = [{"length": n, "factor": 1.0, "seconds": [n / 1e3, 1.0], "read": read} for n in case["lengths"]]
            decode = {"requests": 4, "context": 256, "steps_s": [0.1, 0.2, 0.1]}
            checked = [{"length": 256, "tokens": [1, 2], "top2": [[1, self.says.get(name, -0.5), 3, -1.0]]}]
            told |= {"prompts": prompts, "decode": decode, "tried": [{"factor": 10.0, "density": 0.1}]}
            return told | {"checked": checked}
        first = len(order["prompts"]) - order["shared"]
        asked = [("mixed", n) for n in range(first)]
        asked += [(what, n) for what in ("cached", "cold") for n in range(first, len(order["prompts"]))]
        told["answers"] = [
            {"asked": what, "question": n, "tokens": tokens, "top2": [[t, 0.0, 7, -1.0] for t in tokens], "cached": 64}
            for what, n in asked
            for tokens in [self.says.get((name, n), self.answers[n])]
        ]
        read = {"read": 5, "visible": 20, "prompts": first, "other": 1} if "flash" in name else None
        return told | {"largest_logit": 20.0, "read": read}


@pytest.fixture(scope="module")
def source() -> TaskSource:
    return TaskSource(corpora.load(), run.TASK_SEED)


@pytest.fixture
def engines(source: TaskSource, monkeypatch: pytest.MonkeyPatch) -> Engines:
    found = Engines()
    questions = questions_of(preset("cpu").cases[0], source)
    found.answers = [question.example.target.tolist() for question in questions]
    monkeypatch.setattr(run, "in_its_own_process", found)
    monkeypatch.setattr(run, "PACKAGES", ())
    monkeypatch.setattr(run, "task_source", lambda options: source)  # of another Python's library, maybe
    return found


def test_equal_tokens_become_a_green_report(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines.says = {"ttft-flashprefill-0.18": -0.75}
    assert run.run(run.Options("cpu", tmp_path)) == 0
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    assert [record["name"] for record in result["cases"]] == [case.name for case in preset("cpu").cases]
    first, exact = result["cases"][:2]
    assert all(one["score"] == 1.0 for one in first["answers"])
    assert "rows" not in first
    assert exact["rows"][0]["gate"]["passed"]
    assert exact["near_tie_bound"] == near_tie_bound("float32", 20.0)
    assert "top2" in first["answers"][0]
    assert "top2" not in exact["answers"][0]
    assert main(["report", str(tmp_path / "serving-cpu.json")]) == 0
    words = (tmp_path / "serving-cpu.md").read_text()
    assert "| answers-dense-q128-eager | 4 of 4 | 3 of 3 | 3 of 3 | 0 | 0 | green | - | - |" in words
    assert "| answers-flashprefill-0.18-q128-eager | 4 of 4 | 3 of 3 | 3 of 3 | 0 | 0 | - | 25.0% | 3 of 4 |" in words
    assert "| engine | 512 (2) | 640 (2) |" in words
    assert "| 256 | ttft-flashprefill-0.18-q128-eager | 0.628 | 0.256, 1.000 | 1.000 | - | 10.0% |" in words
    assert "| ttft-triton-q128-eager | 4 | 256 | 100.0 | 100.00-160.00 | 3 |" in words
    assert "| ttft-flashprefill-0.18-q128-eager | 1 of 1 | 0.250 |" in words
    assert "that are not in this result" not in words
    assert report.SCALED_SAID not in words, "nothing is scaled"
    scaled = result["cases"][-1]["prompts"][0]
    scaled["factor"] = 10.0
    assert report.SCALED_SAID not in report.markdown(result), "nor is a prompt that could not select"
    scaled["read"] = {"read": 0, "visible": 0}
    exact = {**result["cases"][-1], "case": {**result["cases"][-1]["case"], "contestant": "dense"}}
    assert report.SCALED_SAID not in report.markdown(result), "there is no dense engine to hold it against"
    result["cases"].append(exact)
    assert report.SCALED_SAID in report.markdown(result)
    assert "queries and keys x 10: 10.0% read" in words
    assert "- without _C\n" in words
    assert "Where exact engines part" not in words


def test_a_report_keeps_the_order_of_the_preset(engines: Engines, tmp_path: Path) -> None:
    engines.fails = {"answers-dense": "no memory"}
    run.run(run.Options("cpu", tmp_path))
    engines.fails = {}
    assert run.run(run.Options("cpu", tmp_path, resume=True)) == 0
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    names = [case.name for case in preset("cpu").cases]
    assert [record["name"] for record in result["cases"]] == [*names[:1], *names[2:], names[1]]
    assert [record["name"] for record in in_order(result)] == names
    words = report.markdown(result)
    places = [words.index(f"| {name} |") for name in names]
    assert places[:3] == sorted(places[:3])


def test_the_figure_tells_contestants_and_chunks_apart(engines: Engines, tmp_path: Path) -> None:
    run.run(run.Options("cpu", tmp_path))
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    timed = [record for record in result["cases"] if record["case"]["kind"] == "ttft"]
    captured, spoken = copy.deepcopy(timed[0]), copy.deepcopy(result["cases"][1])
    captured["case"]["graphs"] = spoken["case"]["graphs"] = True
    scaled = [{**prompt, "factor": 10.0, "seconds": [7.0]} for prompt in timed[1]["prompts"]]
    timed[1]["prompts"] += scaled
    result["cases"] += [captured, spoken]
    shown = figure.times_shown(result)
    assert [record["name"] for record, _ in shown] == [record["name"] for record in timed], "none with graphs"
    assert shown[0][1] == [(n, middle({"seconds": [n / 1e3, 1.0]})) for n in (256, 512)]
    assert shown[1][1] == [(256, 7.0), (512, 7.0)], "of the scaled model alone"
    looks = figure.Looks(result)
    ours = [looks.of(record) for record in result["cases"]]
    assert len({(look["color"], look["linestyle"]) for look in ours}) == len({look["label"] for look in ours})
    assert [look["linestyle"] for look in ours[:2]] == ["-", "--"], "chunks of 256 and of 128"
    legends: list[list[str]] = []
    drawn = figure.finish

    def finish(picture: Any, panels: Any, *more: Any) -> None:
        drawn(picture, panels, *more)
        legends.extend([text.get_text() for text in panel.get_legend().get_texts()] for panel in panels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "finish", finish)
        figure.draw(result, tmp_path / "drawn.png")
    assert legends[0] == ["triton, chunks of 128", "flashprefill-0.18, chunks of 128"]
    assert legends[1] == ["triton, chunks of 256", "dense, chunks of 128", "flashprefill-0.18, chunks of 128"]


def test_other_tokens_of_the_exact_engine_are_red_and_no_speedup_is_told(engines: Engines, tmp_path: Path) -> None:
    wrong = [*engines.answers[1][:3], 65, END]
    engines.says = {("answers-dense", 1): wrong, ("answers-flashprefill-0.18", 0): wrong}
    assert run.run(run.Options("cpu", tmp_path)) == 1
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    assert [record["rows"][0]["gate"]["worst"] for record in result["cases"] if record.get("rows")] == [1.0]
    parted = [one["difference"] for one in result["cases"][1]["answers"] if one["difference"]]
    assert [one["place"] for one in parted] == [first_difference(engines.answers[1], wrong)]
    words = report.markdown(result)
    assert "**red**" in words
    assert "No speedups: " in words
    assert "| 0.256, 1.000 | - | - | 10.0% |" in words
    assert "RED GATE answers-dense-q128-eager" in words
    assert words.count("**no**") == 1, "tokens of a selection may differ, and are not listed"
    engines.says, engines.started = {}, []
    assert run.run(run.Options("cpu", tmp_path, resume=True)) == 0
    assert engines.started == ["answers-dense"]


def test_an_engine_that_fails_is_a_record_and_tried_again(engines: Engines, tmp_path: Path) -> None:
    engines.fails = {"answers-triton": "ImportError: nothing there", "ttft-triton": "out of GPU memory"}
    assert run.run(run.Options("cpu", tmp_path)) == 1
    assert engines.started == ["answers-triton", "ttft-triton", "ttft-flashprefill-0.18"]
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    assert [record["status"] for record in result["cases"]] == ["failed", "not run", "not run", "failed", "ok"]
    assert result["cases"][0]["traceback"] == "Traceback …"
    words = report.markdown(result)
    assert "failed: ImportError: nothing there" in words
    assert "not run: its baseline, answers-triton-q256-eager, has no answers" in words
    engines.fails, engines.started = {}, []
    assert run.run(run.Options("cpu", tmp_path, resume=True)) == 0
    assert len(engines.started) == 4


def test_no_engine_starts_after_the_budget(engines: Engines, tmp_path: Path) -> None:
    assert run.run(run.Options("cpu", tmp_path, only="ttft", budget_seconds=-1.0)) == 0
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    assert {record["reason"] for record in result["cases"]} == {"the budget of -1 s was spent"}
    assert not engines.started
    del result["cases"][1:]
    assert report.markdown(result).count("- answers-") == 3, "what a whole run would have is named"


def test_resuming_refuses_what_was_asked_otherwise(engines: Engines, tmp_path: Path) -> None:
    assert run.run(run.Options("cpu", tmp_path, only="ttft")) == 0
    weights = Path(shutil.copytree(run.WEIGHTS_DIRECTORY, tmp_path / "weights"))
    (weights / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"--resume: expected a result of weights '.*', got .* of weights '.*'"):
        run.run(run.Options("cpu", tmp_path, weights=weights, resume=True))


def test_the_listing_names_engines_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", "--preset", "h200", "--list", "--only", "triton-q1024-eager"]) == 0
    asked = "112 prompts + 6 on one document, of 4096, 8192, 16384, 32768 tokens"
    assert capsys.readouterr().out.splitlines() == [
        f"answers-triton-q1024-eager: {asked}; at most 200 s",
        "ttft-triton-q1024-eager: prompts of 8192, 32768, 65536, 131072 tokens; at most 300 s",
    ]


def test_sources_of_a_result_are_printed(engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.run(run.Options("cpu", tmp_path, only="ttft"))
    capsys.readouterr()
    assert main(["sources", "--of", "serving"]) == 0
    result = read_kind(tmp_path / "serving-cpu.json", "serving", 1)
    assert capsys.readouterr().out.strip() == result["runs"][0]["environment"]["sources"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "a100"], "expected h200 or cpu, got 'a100'"),
        (["--only", "nothing"], "expected a part of a case's name"),
        (["--weights", "no/such"], "--weights: expected a directory with model.safetensors, got 'no/such'"),
        (["--stand-ins"], "--stand-ins: expected a preset of a GPU, got cpu"),
        pytest.param(
            ["--preset", "h200"],
            "expected vllm (extra `vllm`: pip install '.[vllm]'), got none",
            marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there"),
        ),
    ],
)
def test_errors_of_use_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- stand-ins ----


def test_stand_ins_know_which_modules_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert gpu.missing() == list(gpu.COMPILED)
    (tmp_path / "vllm_flash_attn").mkdir()
    for name in ("_C_stable_libtorch.abi3.so", "vllm_flash_attn/_vllm_fa2_C.abi3.so"):
        (tmp_path / name).touch()
    assert set(gpu.COMPILED) - set(gpu.missing()) == {"_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C"}
    with pytest.raises(RuntimeError, match="expected a vLLM without compiled modules, got one with _C_stable_libtorch"):
        gpu.install()


def test_the_stand_in_for_the_activation_is_its_product() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 8)))
    out = torch.empty(3, 4, dtype=x.dtype)
    gpu.OPERATORS["silu_and_mul(Tensor(a!) out, Tensor x) -> ()"](out, x)
    gate, up = x[:, :4], x[:, 4:]
    torch.testing.assert_close(out, gate / (1 + (-gate).exp()) * up)
