"""Dividing a density between layers: the choice is the cheapest, and what is measured is what the model foresees."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from transformers import DynamicCache

from benchmarks.fidelity import allocate, plans
from benchmarks.fidelity.allocate import Allocation, Option, cheapest
from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.probing import probe
from benchmarks.testbed import model as models
from benchmarks.testbed import train_gate
from benchmarks.testbed.evaluate import heldout_windows
from benchmarks.testbed.tasks import TASKS, TaskSource
from compactattn import Dense, KeyBounds, SeerGate
from compactattn.integrations.transformers import prompt_lens
from tests.test_testbed_gate import corpus, packed, tiny_model

CONTEXT, CHUNK = 1024, 256
FEW = (("SeerGate", 0.9), ("SeerGate", 0.0), ("KeyBounds", 0.6))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with gates that know nothing."""
    place = tmp_path_factory.mktemp("model")
    models.save_model(tiny_model(), place)
    packed(place / "corpus.zip")
    settings = train_gate.Settings(max_steps=1, length=512)
    run = train_gate.Run(tiny_model(), corpus(), settings, place, place / "state")
    run.train()
    run.finish()
    return place


@pytest.fixture(scope="module")
def allocation(weights: Path) -> Allocation:
    methods = Methods(models.load_model(weights, "cpu"), weights / train_gate.WEIGHTS_FILE)
    given = allocate.prompts(TaskSource(corpus()), CONTEXT, CHUNK, 1, torch.device("cpu"))
    return Allocation(methods, given, CHUNK)


options = st.builds(Option, st.just("SeerGate"), st.just(0.1), st.integers(0, 8), st.integers(0, 8))


@given(st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 9))
def test_no_choice_within_the_density_is_cheaper(layers: list[list[Option]], density: int) -> None:
    def read(chosen: tuple[Option, ...]) -> float:
        return sum(one.density for one in chosen) / len(chosen)

    within = [chosen for chosen in itertools.product(*layers) if read(chosen) <= density]
    found = cheapest(layers, density)
    assert (found is None) == (not within)
    if found is not None:
        assert all(one in its for one, its in zip(found, layers, strict=True))
        assert read(tuple(found)) <= density
        assert sum(one.nats for one in found) == min(sum(one.nats for one in chosen) for chosen in within)


def test_prompts_are_of_the_train_side_and_answers_count() -> None:
    source = TaskSource(corpus())
    given = allocate.prompts(source, CONTEXT, CHUNK, 2, torch.device("cpu"))
    assert given.kinds == (*[plans.TEXT] * given.kinds.count(plans.TEXT), *(task for task in TASKS for _ in range(2)))
    assert given.counted.shape == (len(given.kinds), CHUNK - 1)  # of 1,023 tokens that foresee one
    for n, kind in enumerate(given.kinds):
        if kind == plans.TEXT:
            text = heldout_windows(source.streams["train"], CONTEXT, 2)[n, :-1]
            assert given.windows[n].tolist() == text.tolist()
            assert bool(given.counted[n].all())
            continue
        example = source.example(kind, "train", CONTEXT, given.kinds[:n].count(kind))
        assert given.windows[n].tolist() == example.window.tolist()
        told = given.windows[n, -given.counted.shape[1] :][given.counted[n]]
        assert told.tolist() == example.target.tolist()


def test_what_reads_everything_costs_nothing_and_less_costs_more(allocation: Allocation) -> None:
    everything = dict.fromkeys(range(2), ("SeerGate", 0.0))
    nothing = dict.fromkeys(range(2), ("SeerGate", 1.0))
    assert allocation.nats({}) == 0.0
    assert abs(allocation.nats(everything)) < 1e-6
    assert allocation.nats(nothing) > 1e-4
    assert allocation.densities(everything) == [1.0, 1.0]
    # two of the last four query blocks, which see 12 of the 4 · (4 + 8 + 12) past blocks that all see
    assert allocation.densities(nothing) == [2 * 12 / 96] * 2


def test_densities_are_of_each_layer_over_all_tasks(allocation: Allocation) -> None:
    """The mean of what probes of single tasks read, each of two windows where there are so many."""
    chosen = {0: ("SeerGate", 0.06), 1: ("KeyBounds", 0.9)}
    rows, given = allocation.row(chosen), allocation.given
    single = []
    for task in TASKS:
        windows = [window.numpy() for window, kind in zip(given.windows, given.kinds, strict=True) if kind == task]
        layers = probe(allocation.methods, rows, {task: windows}, CHUNK)["layers"]
        single.append([its["density"]["mask"] for its in layers])
    found = allocation.densities(chosen)
    assert found[0] != found[1]
    assert len({its[0] for its in single}) > 1
    assert found == pytest.approx(np.mean(single, axis=0).tolist(), abs=2e-5)


def test_options_are_measured_layer_by_layer(allocation: Allocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "OPTIONS", (("SeerGate", 0.06), ("SeerGate", 0.9)))
    found = list(allocation.options())
    assert [[(one.selector, one.threshold) for one in its] for its in found] == [list(allocate.OPTIONS)] * 2
    for layer, its in enumerate(found):
        for one in its:
            option = one.selector, one.threshold
            assert one.nats == pytest.approx(allocation.nats({layer: option}), rel=1e-3)
            assert one.density == allocation.densities(dict.fromkeys(range(2), option))[layer]
    assert found[0][1].nats != found[1][1].nats
    assert found[0][0].density != found[1][0].density


def test_a_choice_costs_the_divergence_of_what_the_model_foresees(allocation: Allocation) -> None:
    """The mean over kinds of the mean over tokens, from forward passes of one window in chunks."""
    chosen = {0: ("SeerGate", 0.9), 1: ("SeerGate", 0.5)}  # what layer 0 gets wrong, layer 1 reads
    methods, its = allocation.methods, allocation.given
    last = its.counted.shape[1]

    def foreseen(window: torch.Tensor, row: plans.Row) -> torch.Tensor:
        cache, logits = DynamicCache(config=methods.model.config), []
        with torch.no_grad(), methods.running(row), prompt_lens([CONTEXT - 1]):
            for begin in range(0, CONTEXT - 1, CHUNK):
                part = window[None, begin : min(begin + CHUNK, CONTEXT - 1)]
                logits.append(methods.model(input_ids=part, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(logits)[-last:].double().log_softmax(-1)

    kinds: dict[str, list[float]] = {}
    for window, counted, kind in zip(its.windows, its.counted, its.kinds, strict=True):
        sparse, dense = (foreseen(window, allocation.row(row)) for row in (chosen, {}))
        apart = (dense.exp() * (dense - sparse)).sum(-1)
        kinds.setdefault(kind, []).extend(apart[counted].tolist())
    expected = sum(sum(apart) / len(apart) for apart in kinds.values()) / len(kinds)
    assert expected > 0
    assert allocation.nats(chosen) == pytest.approx(expected, rel=2e-3)
    logits = methods.model(input_ids=its.windows[:1, :-1]).logits[:, -last:]
    torch.testing.assert_close(allocation.dense[:1], logits.float().log_softmax(-1), rtol=1e-3, atol=1e-4)


def test_a_command_divides_densities_and_rows_run_with_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocate, "OPTIONS", FEW)
    monkeypatch.setattr(allocate, "ALLOCATED", {0.0: 1, 0.6: 1, 1.0: 1})
    old = tmp_path / plans.allocated_file(0.0)
    old.parent.mkdir()
    old.write_text("of other options")
    arguments = ["--weights", str(weights), "--corpus", str(weights / "corpus.zip"), "--chunk", str(CHUNK)]
    allocate.main([*arguments, "--context", str(CONTEXT), "--items", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "density 0: even the sparsest options read more" in told
    assert not old.exists()
    some, every = (json.loads((tmp_path / plans.allocated_file(density)).read_text()) for density in (0.6, 1.0))
    assert every["expected_nats"] <= some["expected_nats"]
    assert some["expected_density"] <= 0.6
    options = json.loads((tmp_path / plans.OPTIONS_FILE).read_text())
    assert options["prompts"] == f"1 of each kind, {CONTEXT} tokens in chunks of {CHUNK}"
    for content in (some, every):
        for n, its in content["layers"].items():
            measured = [(one["selector"], one["threshold"]) for one in options["measured"][n]]
            assert measured == list(FEW)
            assert (its["selector"], its["threshold"]) in measured
    gate = weights / train_gate.WEIGHTS_FILE
    shutil.copytree(tmp_path / "layers", weights / "layers")
    rows = plans.allocated_rows(weights, gate, {0.0: 1, 0.6: 1, 1.0: 0})
    assert rows[1].name == f"{plans.BY_LAYER}{plans.LAST}: density 1"
    other = tmp_path / "other.safetensors"
    other.write_bytes(gate.read_bytes() + b" ")
    assert plans.allocated_rows(weights, other, {0.6: 1}) == [], "of other gates"
    assert plans.allocated_rows(tmp_path, gate, {0.6: 1}) == [], "no weights beside them"
    (weights / plans.OPTIONS_FILE).unlink()
    assert plans.allocated_rows(weights, gate, {0.6: 1}) == [], "never measured"
    methods = Methods(models.load_model(weights, "cpu"), gate)
    layers = {"0": {"selector": "KeyBounds", "threshold": 0.3}, "1": {"selector": "SeerGate", "threshold": 0.02}}
    mixed = replace(rows[0], by_layer=layers)
    for row in (mixed, replace(mixed, selector="KeyBounds")):  # whatever the row's own selector is
        assert row.selectors == {"KeyBounds", "SeerGate"}
        bounds, gates = methods.of_layer(row, 0), methods.of_layer(row, 1)
        assert bounds == KeyBounds(threshold=0.3, dense_last_blocks=2)
        assert isinstance(gates, SeerGate)
        assert (gates.threshold, gates.dense_last_blocks, gates.block_size) == (0.02, 2, 64)
        alone = methods.of_layer(replace(row, selector="SeerGate", by_layer={}), 1)
        assert torch.equal(gates.weights, alone.weights)  # type: ignore[union-attr]
    dense = replace(mixed, by_layer={**layers, "0": {"selector": "Dense"}})
    assert methods.of_layer(dense, 0) == Dense(dense_last_blocks=2)
    assert Methods(tiny_model(), None).why_not(mixed) == "no gate weights"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--items", "0"], "allocate: --items: expected at least 1, got 0"),
        (["--context", "256", "--chunk", "128"], "allocate: .*expected at least 512, got 256"),
        (["--context", "1000"], "allocate: --context: expected a multiple of the chunk, 1024, got 1000"),
        (["--chunk", "32"], "allocate: --chunk: expected at least 36, the longest answer and a token, got 32"),
        (["--weights", "absent"], "allocate: .*absent"),
        (["--device", "tpu"], "allocate: --device: expected cuda"),
    ],
)
def test_bad_options_end_in_a_line(weights: Path, more: list[str], message: str) -> None:
    arguments = ["--weights", str(weights), "--corpus", str(weights / "corpus.zip"), "--context", str(CONTEXT)]
    with pytest.raises(SystemExit, match=message):
        allocate.main([*arguments, *more])


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    models.save_model(tiny_model(), tmp_path)
    packed(tmp_path / "corpus.zip")
    with pytest.raises(SystemExit, match=r"allocate: .*: expected gates in gate/seer_gate.safetensors, got none"):
        allocate.main(["--weights", str(tmp_path), "--corpus", str(tmp_path / "corpus.zip")])
