"""Dividing a density between layers: the choice is the cheapest, and what is measured is what the model foresees."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.fidelity import allocate, plans
from benchmarks.fidelity.allocate import Allocation, Option, cheapest
from benchmarks.fidelity.methods import Methods
from benchmarks.testbed import model as models
from benchmarks.testbed import train_gate
from benchmarks.testbed.tasks import TASKS, TaskSource
from compactattn import Dense, KeyBounds, SeerGate
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
    assert allocation._densities(("SeerGate", 0.0)) == [1.0, 1.0]
    # two of the last four query blocks, which see 12 of the 4 · (4 + 8 + 12) past blocks that all see
    assert allocation._densities(("SeerGate", 1.0)) == [2 * 12 / 96] * 2


def test_a_choice_costs_the_divergence_of_what_the_model_foresees(allocation: Allocation) -> None:
    """The mean over kinds of the mean over tokens, computed from the two distributions themselves."""
    chosen = {1: ("SeerGate", 0.9)}
    sparse = allocation._foreseen(allocation.row(chosen)).double()
    dense, its = allocation.dense.double(), allocation.given
    assert torch.allclose(sparse.exp().sum(-1), torch.ones(sparse.shape[:2]).double())
    kinds: dict[str, list[float]] = {}
    for n, m in its.counted.nonzero().tolist():
        apart = float((dense[n, m].exp() * (dense[n, m] - sparse[n, m])).sum())
        kinds.setdefault(its.kinds[n], []).append(apart)
    expected = sum(sum(apart) / len(apart) for apart in kinds.values()) / len(kinds)
    assert expected > 0
    assert allocation.nats(chosen) == pytest.approx(expected, rel=1e-3)
    ids = its.windows[:1, :-1]
    logits = allocation.methods.model(input_ids=ids).logits[:, -its.counted.shape[1] :]
    torch.testing.assert_close(allocation.dense[:1], logits.float().log_softmax(-1), rtol=1e-3, atol=1e-4)


def test_a_command_divides_densities_and_rows_run_with_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocate, "OPTIONS", FEW)
    monkeypatch.setattr(allocate, "ALLOCATED", {0.0: 1, 0.6: 1, 1.0: 1})
    arguments = ["--weights", str(weights), "--corpus", str(weights / "corpus.zip"), "--chunk", str(CHUNK)]
    allocate.main([*arguments, "--context", str(CONTEXT), "--items", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "density 0: even the sparsest options read more" in told
    assert not (tmp_path / plans.allocated_file(0.0)).exists()
    some, every = (json.loads((tmp_path / plans.allocated_file(density)).read_text()) for density in (0.6, 1.0))
    assert every["nats"] <= some["nats"]
    assert some["density"] <= 0.6
    for content in (some, every):
        for n, its in content["layers"].items():
            measured = [(one["selector"], one["threshold"]) for one in content["measured"][n]]
            assert measured == list(FEW)
            assert (its["selector"], its["threshold"]) in measured
    rows = plans.allocated_rows(tmp_path, {0.6: 1, 1.0: 0})
    assert rows[1].name == f"{plans.BY_LAYER}{plans.LAST}: density 1"
    methods = Methods(models.load_model(weights, "cpu"), weights / train_gate.WEIGHTS_FILE)
    layers = {"0": {"selector": "KeyBounds", "threshold": 0.3}, "1": {"selector": "SeerGate", "threshold": 0.02}}
    row = replace(rows[0], by_layer=layers)
    bounds, gate = methods.of_layer(row, 0), methods.of_layer(row, 1)
    assert bounds == KeyBounds(threshold=0.3, dense_last_blocks=2)
    assert isinstance(gate, SeerGate)
    assert (gate.threshold, gate.dense_last_blocks, gate.block_size) == (0.02, 2, 64)
    assert torch.equal(gate.weights, methods.of_layer(replace(row, by_layer={}), 1).weights)  # type: ignore[union-attr]
    assert methods.of_layer(replace(row, by_layer={**layers, "0": {"selector": "Dense"}}), 0) == Dense(
        dense_last_blocks=2
    )
    assert Methods(tiny_model(), None).why_not(row) == "no gate weights"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--items", "0"], "allocate: --items: expected at least 1, got 0"),
        (["--context", "100"], "allocate: .*expected at least 512, got 100"),
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
