"""`python -m benchmarks ruler`: the table beside the published one, and the harness itself where it is installed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, ruler_report
from benchmarks.__main__ import main
from benchmarks.published import PAPER_RULER

pytest.importorskip("transformers", reason="the methods run inside a transformers model")
from benchmarks import ruler
from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import Row
from benchmarks.testbed import model as models
from benchmarks.testbed.tokenizer import byte_tokenizer, save_byte_tokenizer


def result(model: str, tasks: list[str], **scores: float) -> dict[str, Any]:
    cells = [
        {"method": method, "length": 32768, "scores": dict.fromkeys(tasks, score), "seconds": 1.0}
        for method, score in scores.items()
    ]
    settings = {"model": model, "limit": None, "chunk": 1024, "tasks": tasks}
    return {"kind": "ruler", "schema": 1, "settings": settings, "cells": cells, "absent": {"SeerAttention": "no gate"}}


def test_the_published_figures_stand_beside_the_own_ones() -> None:
    found = result("meta-llama/Llama-3.1-8B-Instruct", list(ruler_report.RULER_TASKS), dense=0.88, FlashPrefill=0.5)
    lines = ruler_report.table_lines(found)
    assert "|  | 32K | 64K | 128K |" in lines
    assert "| dense | 88.00 [88.23] | - [83.52] | - [76.59] |" in lines
    assert "| FlashPrefill | 50.00 [88.99] | - [83.94] | - [74.12] |" in lines
    assert "| CompactAttention-FP | - [88.77] | - [83.96] | - [74.17] |" in lines
    assert "- SeerAttention did not run: no gate" in lines
    assert not any("left out" in line for line in lines)
    assert set(PAPER_RULER["Llama-3.1-8B"]) == set(ruler.METHODS)


def test_a_part_of_the_tasks_is_not_passed_off_as_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result("somewhere/testbed", ["niah_single_1"], dense=1.0)
    path = tmp_path / "ruler-testbed.json"
    path.write_text(json.dumps(found))
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "ruler-testbed.md")]
    words = (tmp_path / "ruler-testbed.md").read_text()
    assert "12 of RULER's 13 tasks were left out: NOT comparable with a published mean." in words
    assert "The paper has no figures for this model." in words
    assert "| dense | 100.00 |" in words
    path.write_text('{"kind": "ruler", "schema": 2}')
    assert main(["report", str(path)]) == 2
    path.write_text('{"kind": "ruler", "schema": 1, "cells": [], "settings": {}}')
    with pytest.raises(ValueError, match="expected the result to have absent, got none"):
        ruler_report.load(path)
    path.write_text('{"kind": "ruler", "schema": 1, "cells": [], "settings": {}, "absent": {}}')
    with pytest.raises(ValueError, match="expected settings to have model, limit, chunk, tasks, got none"):
        ruler_report.load(path)
    with pytest.raises(FileNotFoundError, match="expected a result of `python -m benchmarks ruler`, got no file"):
        ruler_report.load(tmp_path / "absent.json")


def test_the_methods_are_the_papers() -> None:
    made = ruler.rows(4, 0.18)
    assert tuple(made) == ruler.METHODS
    assert made["QUOKA"].settings == {"query_ratio": 0.25, "kv_ratio": 0.25}
    united = [name for name, row in made.items() if (row.heads, row.span) == (4, None)]
    assert united == ["CompactAttention-SA", "CompactAttention-FP"]
    assert made["CompactAttention-FP"].settings == {"alpha": 0.18}
    assert [ruler.rows(group, 0.1)["CompactAttention-FP"].heads for group in (1, 2, 6, 8, 12)] == [1, 2, 2, 4, 4]
    assert all(isinstance(row, Row) for row in made.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "--methods: expected some of dense, QUOKA"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--lengths", "4K"], "--lengths: expected numbers such as 32768,65536, got '4K'"),
        (["--lengths", "-1"], "--lengths: expected numbers above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ruler", "--model", "m", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "benchmarks.harness", raising=False)
    assert main(["ruler", "--model", "m", "--device", "cpu"]) == 2
    assert (
        "ruler: expected lm_eval with its RULER tasks (extra `ruler`: pip install '.[ruler]')"
        in capsys.readouterr().err
    )


def test_bytes_are_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "def f():\n\treturn 'é' + \"日本\"  # \x00\x7f ~<|file|>"
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path))):
        ids = tokenizer(text).input_ids
        assert ids == [*text.removesuffix("<|file|>").encode(), 256]
        assert tokenizer.decode(ids) == text
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256)


def test_resuming_asks_for_the_same_harness_and_keeps_what_other_methods_said(
    options: ruler.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that drives lm_eval decides scores as much as the library does."""
    copied = sorted({file for pattern in ruler.RULER_SOURCES for file in machine.ROOT.glob(pattern.lstrip("!"))})
    for file in copied:
        place = tmp_path / "tree" / file.relative_to(machine.ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    monkeypatch.setattr(machine.sources, "__defaults__", (tmp_path / "tree", machine.LATENCY_SOURCES))
    methods = Methods(models.load_model(Path(options.model)), None)
    rows, path = ruler.rows(4, 0.1), tmp_path / "ruler-model.json"
    first = ruler._opened(options, 0.1, rows, methods, path)
    assert list(first["absent"]) == ["SeerAttention", "CompactAttention-SA"]
    path.write_text(json.dumps(first | {"cells": [{"method": "dense"}]}))
    again = replace(options, resume=True, methods=("dense", "SeerAttention"))
    some = {name: rows[name] for name in again.methods}
    gated = Methods(methods.model, tmp_path / "tree" / "benchmarks" / "ruler.py")  # any file that exists
    assert list(ruler._opened(again, 0.1, some, gated, path)["absent"]) == ["CompactAttention-SA"]
    with (tmp_path / "tree" / "benchmarks" / "harness.py").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="--resume: expected a result of sources"):
        ruler._opened(again, 0.1, some, methods, path)


# ---- with the harness ----


@pytest.fixture
def options(tmp_path: Path) -> ruler.Options:
    config = models.testbed_config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1
    )
    models.save_model(models.new_model(config, 0), tmp_path / "model")
    return ruler.Options(
        str(tmp_path / "model"),
        (4096,),
        tmp_path / "out",
        tokenizer="bytes",
        tasks=("niah_single_1",),
        methods=("dense", "QUOKA", "SeerAttention", "CompactAttention-FP"),
        limit=1,
        device="cpu",
        dtype="float32",
    )


def test_the_harness_from_end_to_end(
    options: ruler.Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own niah_single_1: every method gets the same prompt of under 4,096 bytes, and a right answer scores 1."""
    pytest.importorskip("lm_eval", reason="extra `ruler`")
    from benchmarks import harness

    asked: dict[str, list[str]] = {}
    really = harness.GeneratingModel._generated

    def answered(self: Any, text: str, settings: dict[str, Any]) -> str:
        name = self.model.config._attn_implementation
        asked.setdefault(name, []).append(text)
        written = really(self, text, {**settings, "max_gen_toks": 2})
        value = text.split(" is: ")[1].split(".")[0]
        return f"{written} {value}" if name == "fidelity_quoka" else written

    monkeypatch.setattr(harness.GeneratingModel, "_generated", answered)
    assert ruler.run(options) == 0
    printed = capsys.readouterr().out
    assert "| QUOKA | 100.00 |" in printed
    assert "| CompactAttention-FP | 0.00 |" in printed
    assert "SeerAttention did not run: no gate weights" in printed
    (quoka,), (dense, united) = asked["fidelity_quoka"], asked["compactattn"]
    assert quoka == dense == united
    assert 2000 < len(dense) < 4096  # the harness adds 25 sentences at a time
    assert "special magic number" in dense
    path = options.out / "ruler-model.json"
    found = ruler_report.load(path)
    assert [cell["method"] for cell in found["cells"]] == ["dense", "QUOKA", "CompactAttention-FP"]
    asked.clear()
    assert ruler.run(replace(options, resume=True)) == 0
    assert not asked
    with pytest.raises(ValueError, match="--resume: expected a result of settings"):
        ruler.run(replace(options, resume=True, limit=2))
    with pytest.raises(ValueError, match="--lengths: expected at most 32768, the model's positions, got 65536"):
        ruler.run(replace(options, lengths=(65536,)))
    with pytest.raises(ValueError, match="--model: expected what transformers can load, got: "):
        ruler.run(replace(options, model=str(options.out / "absent")))
    with pytest.raises(ValueError, match=r"--tasks: expected some of .*niah_single_1.*, got 'mmlu'"):
        ruler.run(replace(options, tasks=("mmlu",)))
