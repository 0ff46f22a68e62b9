"""Tuning the test bed layer by layer: what it writes, and what the rows of `fidelity` make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.fidelity import plans
from benchmarks.fidelity.methods import Methods
from benchmarks.testbed import model as models
from benchmarks.testbed import tune_layers
from benchmarks.testbed.tasks import TaskSource
from compactattn import FlashPrefill
from compactattn.settings import load_settings, save_settings
from tests.test_testbed_gate import corpus, packed, tiny_model

CONTEXT = 2048


def test_prompts_are_of_the_train_side() -> None:
    source = TaskSource(corpus())
    windows = tune_layers.prompts(source, CONTEXT)
    assert [len(window) for window in windows] == [CONTEXT] * 3
    assert windows[0].tolist() == source.streams["train"][:CONTEXT].tolist()
    for task, window in zip(tune_layers.TASKS, windows[1:], strict=True):
        assert window.tolist() == source.example(task, "train", CONTEXT, 0).window.tolist()
    with pytest.raises(ValueError, match=r"--context: expected at most the .* tokens of the text, got 999999"):
        tune_layers.prompts(source, 999_999)


def test_a_command_tunes_every_layer_and_a_row_runs_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More coverage never gets a larger alpha; the row's layers have the alphas of the file and are otherwise alike."""
    weights, model = tmp_path / "model", tiny_model()
    models.save_model(model, weights)
    packed(tmp_path / "corpus.zip")
    arguments = ["--weights", str(weights), "--corpus", str(tmp_path / "corpus.zip"), "--chunk", "512"]
    tune_layers.main([*arguments, "--context", str(CONTEXT)])
    assert len(capsys.readouterr().out.splitlines()) == len(tune_layers.COVERAGES)
    found = [load_settings(weights / tune_layers.file_of(coverage)) for coverage in tune_layers.COVERAGES]
    for settings in found:
        assert (settings["heads_per_group"], settings["query_blocks_per_span"]) == (1, 1)
        assert all(replace(its, alpha=0.18) == FlashPrefill() for its in settings["selector"].values())
    alphas = [[settings["selector"][layer].alpha for layer in (0, 1)] for settings in found]
    for layer in (0, 1):
        falling = [its[layer] for its in alphas]
        assert falling == sorted(falling, reverse=True)
    assert alphas[0] != alphas[-1]
    rows = plans.tuned_rows(weights, dict.fromkeys(tune_layers.COVERAGES, 1))
    assert rows[0].name == f"{plans.TUNED}: coverage {tune_layers.COVERAGES[0]:g}"
    methods = Methods(model, None)
    assert [methods.why_not(row) for row in rows] == [None] * len(rows)
    for row, settings in zip(rows, found, strict=True):
        assert methods.selector(row) == settings["selector"]
        assert methods.of_layer(row, 1) == settings["selector"][1]
        assert json.loads(json.dumps(row.as_json()))["by_layer"]["1"] == {"alpha": settings["selector"][1].alpha}
    assert len({json.dumps(row.definition()) for row in rows}) == len(rows)
    one = replace(rows[0], by_layer={"0": {"alpha": 0.5}})
    assert methods.why_not(one) == "its settings are of 1 layers, this model has 2"
    with pytest.raises(SystemExit, match=r"tune_layers: .*expected config\.json and model.safetensors"):
        tune_layers.main(["--weights", str(tmp_path), "--corpus", str(tmp_path / "corpus.zip")])


def test_a_row_without_layers_keeps_its_record() -> None:
    assert "by_layer" not in plans.Row("a", "a", "library", selector="FlashPrefill").as_json()


def test_layers_that_differ_in_more_than_alpha_are_no_row(tmp_path: Path) -> None:
    path = tmp_path / tune_layers.file_of(0.5)
    path.parent.mkdir()
    layers = {0: FlashPrefill(alpha=0.5), 1: FlashPrefill(alpha=0.5, sink_blocks=0)}
    save_settings(path, {"selector": layers, "heads_per_group": 1, "query_blocks_per_span": 1})
    with pytest.raises(ValueError, match=r"coverage-0.5.json: expected layers that differ in alpha alone"):
        plans.tuned_rows(tmp_path, {0.5: 1})
