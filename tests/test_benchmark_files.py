"""Results of benchmarks on disk: one run at a time, nothing lost, nothing measured that could not be written."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import files, latency, machine
from benchmarks.__main__ import RESULTS, main
from benchmarks.files import claim, earlier, write_json, write_new, write_text

RUN = ["latency", "--preset", "cpu", "--only", "tables", "--shrink", "8", "--timing-seconds", "0.01"]


def test_a_result_that_is_not_resumed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency-cpu.json"
    path.write_text("what was there")
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "latency-cpu.json.before").read_text() == "what was there"
    assert "latency-cpu.json.before: the result that was there" in capsys.readouterr().out
    cases = json.loads(path.read_text())["cases"]
    assert main([*RUN, "--out", str(tmp_path), "--resume"]) == 0
    assert json.loads(path.read_text())["cases"] == cases
    assert (tmp_path / "latency-cpu.json.before").read_text() == "what was there"


def test_a_run_that_is_refused_moves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency-cpu.json"
    path.write_text("what was there")
    answers = {"--show-toplevel": str(machine.ROOT), "HEAD": "1111111"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "output", lambda *command: answers.get(command[-1], ""))
        assert main([*RUN, "--commit", "0000000", "--out", str(tmp_path)]) == 2
    assert "--commit: expected 1111111, as git says, got 0000000" in capsys.readouterr().err
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_run_is_what_is_resumed(tmp_path: Path) -> None:
    """What the first case of a run interrupts is not what was there before."""
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    path = tmp_path / "latency-cpu.json"
    old = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "measured_case", _interrupted)
        assert main([*RUN, "--out", str(tmp_path)]) == 130
    assert json.loads(path.read_text())["cases"] == []
    assert path.with_name("latency-cpu.json.before").read_bytes() == old
    assert main([*RUN, "--out", str(tmp_path), "--resume"]) == 0
    assert [record["run"] for record in json.loads(path.read_text())["cases"]] == [1]


def test_a_result_in_the_way_stays_until_the_new_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a link stays a link: the file that it leads to is the result, and keeps its lock."""
    real, link = tmp_path / "real" / "r.json", tmp_path / "latency-cpu.json"
    real.parent.mkdir()
    real.write_text("what was there")
    link.symlink_to(real)
    claim(link)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_text", _no_space)
        with pytest.raises(OSError, match="No space left"):
            write_new(link, {"cases": [1]})
    assert real.read_text() == "what was there"
    write_new(link, {"cases": [1]})
    write_json(link, {"cases": [2]})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"cases": [2]}
    assert real.with_name("r.json.before").read_text() == "what was there"


def test_threads_of_a_result_that_is_resumed_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert main([*RUN, "--out", str(tmp_path), "--resume", "--threads", "2"]) == 2
    assert "--resume: expected a result of threads 2, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda result: result.update(cases=None), "expected cases to be a list, got NoneType"),
        (lambda result: result["cases"].insert(0, None), "expected cases[0] to be an object, got NoneType"),
        (lambda result: result.update(runs=3), "expected runs to be a list of at least one, got 3"),
        (lambda result: result["cases"][0].pop("case"), "expected cases[0] to have case, got none"),
        (lambda result: result["runs"][0].update(environment=None), "expected the environment of runs[0] to be"),
        (lambda result: result["cases"][0].update(name=[]), "expected cases[0] to have a name, got []"),
        (lambda result: result["cases"][0].update(run="a"), "expected cases[0] to be of a run that is there, got 'a'"),
        (lambda result: result["cases"][0].update(rows=3), "got one that makes no sense (TypeError: "),
        (lambda result: result["cases"][0]["rows"][0].pop("gate"), "got one that makes no sense (KeyError: 'gate')"),
    ],
)
def test_a_damaged_result_is_not_resumed(
    spoil: Callable[[dict[str, Any]], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    path = tmp_path / "latency-cpu.json"
    result = json.loads(path.read_text())
    spoil(result)
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert main([*RUN, "--out", str(tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert json.loads(path.read_text()) == result


@pytest.mark.parametrize("name", ["features-h200", "serving-h200-again"])
def test_a_report_of_what_makes_no_sense_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    result["cases"][0]["case"] = {}
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(result))
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: expected a result as it was written, got one that makes no sense (KeyError: 'kind')" in error
    assert error.count("\n") == 1
    with caplog.at_level(logging.DEBUG, "benchmarks"):
        assert main(["report", str(path), "--tracebacks"]) == 2
    assert "Traceback" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["latency", "ttft", "serving", "fidelity"])
def test_a_report_whose_picture_fails_leaves_no_text(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text that names a picture is there only when the picture is."""
    for module in ("figure", "serving.report", "ttft.figure"):
        monkeypatch.setattr(f"benchmarks.{module}.draw", _no_space)
    monkeypatch.setattr("benchmarks.fidelity.figure.FIGURES", {"": _no_space})
    assert main(["report", str(RESULTS / f"{kind}-h200.json"), "--out", str(tmp_path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", [["report"], ["latency", "--resume"], ["join"]])
def test_json_that_is_too_deep_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latency-cpu.json"
    path.write_text("[" * 100_000)
    given = ["--out", str(tmp_path)] if command[0] == "latency" else [str(path)]
    given += [str(tmp_path / "other.json"), "--out", str(tmp_path)] if command[0] == "join" else []
    assert main([*command, *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("cpu_speedup", ["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (
            "cpu_speedup",
            ["--chunk", "4096", "--context", "4096"],
            "--chunk: expected less than the context, 4096, got 4096",
        ),
        ("cpu_speedup", ["--json", "/proc/none/a.json"], "/proc/none"),
        ("operator_cost", ["--calls", "0"], "--calls: expected at least 1, got 0"),
        ("operator_cost", ["--device", "foo"], "invalid choice: 'foo'"),
        ("testbed.corpus", ["--out", "/proc/none/a.zip"], "corpus: [Errno 2] No such file or directory: '/proc/none'"),
        ("fidelity.allocate", ["--out", "/proc/none"], "allocate: [Errno 2] No such file or directory: '/proc/none'"),
    ],
)
def test_other_commands_refuse_before_they_run(module: str, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], timeout=60
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_do_not_write_one_result(tmp_path: Path) -> None:
    claim(tmp_path / "latency-cpu.json")
    claim(tmp_path / "latency-cpu.json")  # the same process
    command = [sys.executable, "-m", "benchmarks", *RUN, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "--out: expected a result that no other run writes, got " in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["latency", "ttft", "fidelity"])
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "measured_case", None)
    (tmp_path / f"{command}-cpu.json").mkdir()
    assert main([command, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"expected a place for a file, got the directory {tmp_path / command}-cpu.json" in error
    assert error.count("\n") == 1
    assert main([command, "--out", "/proc/none"]) == 2  # no directory can be made there
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", ["", "{", "[]", "null", "3"])
@pytest.mark.parametrize("command", ["latency", "ttft", "fidelity"])
def test_what_is_no_result_is_not_resumed(
    command: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{command}-cpu.json"
    path.write_text(words)
    with pytest.raises(ValueError, match=r"--resume: expected a result in .*, got "):
        earlier(path)
    assert main([command, "--out", str(tmp_path), "--resume"]) == 2
    assert f"--resume: expected a result in {path}, got " in capsys.readouterr().err
    assert path.read_text() == words


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="--out: expected a directory that can be written to, got "):
        claim(tmp_path / "latency-cpu.json")


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "measured_case", _interrupted)
    assert main([*RUN, "--out", str(tmp_path)]) == 130
    assert "interrupted; --resume goes on with what was written" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.report.write_report", _interrupted)
    assert main(["report", str(RESULTS / "features-h200.json")]) == 130
    assert capsys.readouterr().err == "python -m benchmarks: interrupted\n"


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"cases": [1]})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"cases": [object()]})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]
