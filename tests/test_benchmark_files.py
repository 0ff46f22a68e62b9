"""Results of benchmarks on disk: one run at a time, nothing lost, nothing measured that could not be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import latency
from benchmarks.__main__ import main
from benchmarks.files import claim, earlier, write_json, write_text

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


def test_two_runs_do_not_write_one_result(tmp_path: Path) -> None:
    claim(tmp_path / "latency-cpu.json", resume=False)
    claim(tmp_path / "latency-cpu.json", resume=True)  # the same process
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
        claim(tmp_path / "latency-cpu.json", resume=False)


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measured_case", interrupted)
    assert main([*RUN, "--out", str(tmp_path)]) == 130
    assert "interrupted; what was measured is written, and --resume goes on" in capsys.readouterr().err


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
