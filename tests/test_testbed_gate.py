"""Distilling gates for the test bed: what they learn from, that they learn it, and the files they end in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.testbed import model as models
from benchmarks.testbed import train_gate
from benchmarks.testbed.corpus import Corpus, SourceFile, pack
from benchmarks.testbed.record import attention_inputs
from benchmarks.testbed.train_gate import Gates, Run, Settings, attention_map, divergence, found_mass
from compactattn import PagedKV, PrefillBatch, SeerGate, load_seer_gates
from compactattn.seer_gate import probabilities
from compactattn.selection import block_rules

TINY = Settings(max_steps=150, length=512, log_every=25)


def corpus() -> Corpus:
    def files(letter: str, count: int) -> tuple[SourceFile, ...]:
        body = "".join(f"def {letter}_{n}(value):\n    return value * {n} + {letter}_{n // 2}\n" for n in range(60))
        return tuple(SourceFile(f"{letter}{n}.py", body[n:].encode()) for n in range(count))

    return Corpus("3", files("train", 3), files("held", 2))


def packed(path: Path) -> None:
    """A corpus in a file, with so many files that some of them are held out by their paths."""
    named = {f.path: f.data for f in corpus().train + corpus().heldout}
    files = tuple(SourceFile(path, data) for path, data in named.items())
    many = tuple(SourceFile(f"{n}_{f.path}", f.data + b"#" * n) for n in range(12) for f in files)
    pack(Corpus("3", many, ()), path)


def tiny_model(seed: int = 0) -> models.LlamaForCausalLM:
    config = models.testbed_config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return models.new_model(config, seed).eval()


def run(tmp_path: Path, settings: Settings = TINY) -> Run:
    return Run(tiny_model(), corpus(), settings, tmp_path / "out", tmp_path / "state")


def test_the_map_is_max_pooled_attention(tmp_path: Path) -> None:
    inputs = attention_inputs(tiny_model(), run(tmp_path).window("train", 0)[:128])[1]
    pooled = attention_map(inputs.q, inputs.k, inputs.scale, 64)
    assert pooled.shape == (4, 2, 2)
    for h in range(4):
        scores = inputs.q[:, h] @ inputs.k[:, h // 2].T * inputs.scale
        weights = scores.masked_fill(torch.ones(128, 128).triu(1).bool(), -math.inf).softmax(-1)
        tiles = torch.tensor([[weights[a : a + 64, b : b + 64].max() for b in (0, 64)] for a in (0, 64)])
        torch.testing.assert_close(pooled[h], tiles / tiles.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
        assert pooled[h, 0, 1] == 0


def test_the_trained_gate_is_the_one_that_selects(tmp_path: Path) -> None:
    """log_probabilities over a prompt in one piece are the library's probabilities."""
    model, tokens = tiny_model(), run(tmp_path).window("train", 1)[:192]
    gates, inputs = Gates(model, 64), attention_inputs(model, tokens)[0]
    with torch.no_grad():
        gates.weights += 0.05 * torch.randn(gates.weights.shape, generator=torch.Generator().manual_seed(0))
        got = gates.log_probabilities(0, inputs.q, inputs.k).exp()
    selector = SeerGate(gates.weights[0].detach(), gates.inv_freq, gates.rope_scale)
    kv = PagedKV.from_contiguous(inputs.k[None], inputs.v[None], 64)
    batch = PrefillBatch.from_lens([192], [192])
    visible = block_rules(batch, selector).visible
    expected = probabilities(inputs.q, kv, batch, selector, None, visible, "numba")[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_divergence_and_found_mass() -> None:
    target = torch.tensor([[[1.0, 0.0], [0.75, 0.25]]])
    assert float(divergence(target, target.log())) == pytest.approx(0, abs=1e-6)
    even = torch.tensor([[[0.0, -math.inf], [math.log(0.5), math.log(0.5)]]])
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert float(divergence(target, even)) == pytest.approx(expected)
    assert found_mass(target, target.log()) == pytest.approx((1 + 0.75) / 2)
    assert found_mass(target, torch.tensor([[[0.0, -math.inf], [-2.0, -1.0]]])) == pytest.approx((1 + 0.25) / 2)


def test_training_brings_the_gates_nearer_on_the_test_side(tmp_path: Path) -> None:
    training = run(tmp_path)
    before = training.before
    weights = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    assert training.train()
    record = training.finish()
    assert record["steps"] == 150
    assert record["after"]["divergence"] < 0.85 * before["divergence"]
    assert record["after"]["mass_in_best_25%"] > before["mass_in_best_25%"] + 0.01
    assert record["after"]["mass_in_best_25%"] <= record["after"]["most_mass_in_25%"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in training.model.state_dict().items())
    assert json.loads((tmp_path / "out" / "gate" / "seer_gate.json").read_text()) == record
    gates = load_seer_gates(
        tmp_path / "out" / "gate" / "seer_gate.safetensors",
        layers=2,
        heads=4,
        head_dim=64,
        inv_freq=training.gates.inv_freq,
    )
    for layer, gate in gates.items():
        assert torch.equal(gate.weights, training.gates.weights[layer].detach().bfloat16())


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """Bit for bit the run that went on after the same save, and the checkpoint is gone at the end."""
    settings = replace(TINY, max_steps=6, log_every=1)
    whole = run(tmp_path / "whole", settings)
    window = whole.window

    def saving(side: train_gate.Side, index: int) -> torch.Tensor:
        if index == 3:
            whole._save()
        return window(side, index)

    whole.window = saving  # type: ignore[method-assign]
    assert whole.train()

    first = run(tmp_path / "legs", settings)
    plain = first.window

    def stopping(side: train_gate.Side, index: int) -> torch.Tensor:
        if index == 2:
            first.stop()
        return plain(side, index)

    first.window = stopping  # type: ignore[method-assign]
    assert not first.train()
    assert not (tmp_path / "legs" / "out").exists()
    second = run(tmp_path / "legs", settings)
    assert (second.step, second.before) == (3, first.before)
    assert second.train()
    assert torch.equal(second.gates.weights, whole.gates.weights)
    assert [point["divergence"] for point in second.curve] == [point["divergence"] for point in whole.curve]
    assert second.finish()["steps"] == 6
    assert not (tmp_path / "legs" / "state").exists()
    replaced = run(tmp_path / "legs", replace(settings, leg_minutes=1e-9))
    assert not replaced.train()
    with pytest.raises(ValueError, match=r"state: expected settings .*'seed': 1"):
        run(tmp_path / "legs", replace(settings, seed=1))


def test_a_run_that_is_killed_while_it_measures_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, max_steps=3, log_every=1)
    first = run(tmp_path, settings)
    assert first.train()
    evaluate = first.evaluate
    first.evaluate = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.finish()
    first.evaluate = evaluate  # type: ignore[method-assign]
    assert not (tmp_path / "out").exists()
    second = run(tmp_path, settings)
    assert (second.step, second.curve, second.before) == (3, first.curve, first.before)
    monkeypatch.setattr(train_gate, "divergence", lambda *_: pytest.fail("a step was taken"))
    assert second.train()
    monkeypatch.undo()
    assert torch.equal(second.gates.weights, first.gates.weights)
    assert second.finish() == first.finish()
    assert not (tmp_path / "state").exists()


def test_windows_are_of_their_side(tmp_path: Path) -> None:
    training = run(tmp_path, replace(TINY, task_share=0.0))
    for side, own, foreign in (("train", b"train_", b"held_"), ("test", b"held_", b"train_")):
        for index in range(5):
            text = bytes(t for t in training.window(side, index).tolist() if t < 256)
            assert own in text
            assert foreign not in text
    mixed = [run(tmp_path).window("train", n) for n in range(12)]
    tasks = sum(bool((tokens > 256).any()) for tokens in mixed)
    assert 2 <= tasks <= 10


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"minutes": 0}, "--minutes: expected a number above 0, got 0"),
        ({"max_steps": -1}, "--max-steps: expected a number above 0, got -1"),
        ({"leg_minutes": 0}, "--leg-minutes: expected a number above 0, got 0"),
        ({"block": 32}, "--block: expected 64 or 128, got 32"),
        ({"length": 500}, "--length: expected a multiple of 64 from 512 on, got 500"),
        ({"task_share": 2.0}, "--task-share: expected 0 to 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
    with pytest.raises(ValueError, match=r"--length: expected at most \d+, the train text, got 65536"):
        run(tmp_path, replace(TINY, length=65536))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_model(tiny_model(), tmp_path / "model")
    packed(tmp_path / "corpus.zip")
    arguments = ["--weights", str(tmp_path / "model"), "--corpus", str(tmp_path / "corpus.zip"), "--device", "cpu"]
    settings = ["--max-steps", "2", "--length", "512", "--log-every", "1"]
    train_gate.main([*arguments, *settings, "--out", str(tmp_path / "gates")])
    assert '"steps": 2' in capsys.readouterr().out
    assert (tmp_path / "gates" / "gate" / "seer_gate.safetensors").exists()
    train_gate.main([*arguments, *settings, "--layers", "1", "--out", str(tmp_path / "one")])
    record = json.loads((tmp_path / "one" / "gate" / "seer_gate.json").read_text())
    assert record["settings"]["layers"] == [1]
    inv_freq = tiny_model().model.rotary_emb.inv_freq
    shape = {"heads": 4, "head_dim": 64, "inv_freq": inv_freq}
    [(layer, gate)] = load_seer_gates(tmp_path / "one" / "gate" / "seer_gate.safetensors", layers=None, **shape).items()
    assert layer == 1
    assert not torch.equal(gate.weights, Gates(tiny_model(), 64, (1,)).weights[0].bfloat16()), "it was trained"
    assert list(load_seer_gates(tmp_path / "gates" / "gate" / "seer_gate.safetensors", layers=None, **shape)) == [0, 1]
    with pytest.raises(SystemExit, match="--layers: expected auto, or numbers from 0 to 1"):
        train_gate.main([*arguments, "--layers", "7", "--out", str(tmp_path / "gates")])
    train_gate.main([*arguments, *settings, "--leg-minutes", "1e-9", "--out", str(tmp_path / "stopped")])
    assert "stopped at step 0, 0.0 of 4.0 min; the same command goes on" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["gate_state"]
    with pytest.raises(SystemExit, match="train_gate: --block: expected 64 or 128, got 7"):
        train_gate.main([*arguments, "--block", "7", "--out", str(tmp_path / "gates")])
