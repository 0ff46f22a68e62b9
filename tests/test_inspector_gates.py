"""SeerAttention gates in the inspector: the reader's own, those that do not fit, and the one of the sample."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compactattn import SeerGate
from compactattn.capture import save_capture
from compactattn.seer_gate import probabilities
from compactattn.selection import block_rules

pytest.importorskip("streamlit")
pytest.importorskip("matplotlib")

from streamlit.testing.v1 import AppTest

from inspector import gates, model, sources
from inspector.files import GateWeights, Recorded
from inspector.model import Setting
from inspector.sources import Place
from tests.inspecting import APP, PAGES, context, fine, metrics, noise_step, start, visit
from tests.test_inspector import HEADS, noise

GATE = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("captures") / "noise.safetensors"
    save_capture(path, noise())
    return str(path)


@pytest.fixture(scope="module")
def gate_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A gate for both layers of the noise."""
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("gates") / "gate.safetensors"
    save_file({GATE.format(n): 0.3 * torch.randn(HEADS, 192, 64, generator=generator) for n in (1, 5)}, path)
    return str(path)


def test_a_gate_of_the_readers_own(capture_file, gate_file):
    for query, threshold in (({}, 0.01), ({"gate_threshold": "5e-05"}, 5e-5), ({"gate_threshold": "0.05"}, 0.05)):
        app = fine(start("masks", None, selector="SeerGate", **query))
        assert "head 0 · SeerGate" in context(app)
        assert app.select_slider(key="gate_threshold").value == threshold
    app = start("masks", capture_file, selector="SeerGate")
    assert not app.exception
    assert any("Name the weights of a gate" in message.value for message in app.info)
    assert not app.metric
    app.text_input(key="gate").set_value(gate_file)
    app = fine(app.run())
    about = sources.describe(Recorded(), noise())
    gate = gates.load(GateWeights.from_path(gate_file), about)[5]
    for threshold in (0.1, 0.0, 1.0):
        app = fine(app.select_slider(key="gate_threshold").set_value(threshold).run())
        selector = dataclasses.replace(gate, threshold=threshold, sink_blocks=1, window_blocks=2)
        reading = model.read(noise_step(), Setting(selector, 2))
        assert metrics(app)["Mask density, past"] == f"{reading.mask[0, :, :8].mean():.1%}"
    app = fine(app.select_slider(key="gate_threshold").set_value(0.1).run())
    for page in PAGES:
        app = fine(visit(app, page))
        assert "SeerGate" in context(app)
        assert "load_seer_gates" in app.code[-1].value
    app = fine(app.selectbox(key="b_selector").set_value("Oracle").run())
    app = visit(app, "what_if")
    app = fine(app.multiselect(key="methods").set_value(["SeerGate"]).run())
    [sweep] = [button for button in app.button if button.label.startswith("Sweep")]
    fine(sweep.click().run())
    [points] = app.session_state["frontiers"].values()
    assert {name for name, _, _ in points} == {"SeerGate"}
    assert len({point.density for point in points.values()}) > 1


def test_gates_that_do_not_fit_are_refused(tmp_path, capture_file, gate_file):
    other_heads, no_layer, garbage = (tmp_path / f"{name}.pth" for name in ("heads", "layer", "garbage"))
    torch.save({GATE.format(5): torch.zeros(HEADS, 96, 32)}, other_heads)
    torch.save({GATE.format(4): torch.zeros(HEADS, 192, 64)}, no_layer)
    garbage.write_bytes(b"not weights")
    proof = tmp_path / "proof"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(proof),)

    malicious = tmp_path / "malicious.pth"
    torch.save({GATE.format(5): Malicious()}, malicious)
    for path, words in (
        (other_heads, "expected a floating-point tensor of shape (4, 192, 64)"),
        (no_layer, "expected gate weights of layer 5, got those of 4"),
        (garbage, "expected tensors only"),
        (malicious, "expected tensors only"),
        (tmp_path / "missing", "expected a file of gate weights, got no file at all"),
        (tmp_path, "got a directory"),
    ):
        app = start("masks", capture_file, selector="SeerGate")
        app.text_input(key="gate").set_value(str(path))
        app = app.run()
        assert not app.exception
        assert words in app.error[0].value.replace("\\", ""), path
        assert "Traceback" not in app.error[0].value
    assert not proof.exists()

    app = AppTest.from_file(str(APP), default_timeout=120)
    app.query_params.update({"selector": "SeerGate", "gate": gate_file})
    app = fine(app.run())
    assert "not read before you say so" in app.warning[0].value, "a link decides nothing"
    app = fine(start("masks", None, selector="SeerGate", data="Synthetic", context="8192", chunk="512", kv="1"))
    assert "SeerGate" not in app.selectbox(key="selector").options, "no model made a synthetic prompt"


def test_the_sample_has_a_gate_of_its_own():
    """Its favourite quarter of the past holds far more of the mass than a quarter, and more than before training."""
    capture = sources.load(Recorded.from_path(""))
    about = sources.describe(Recorded.from_path(""), capture)
    found = gates.load(GateWeights.from_path(""), about)
    assert set(found) == set(about.layers), "a new sample needs a new gate: see inspector.files.GateWeights"
    shares = {}
    for index, layer in enumerate(about.layers):
        step = sources.make_recorded_step(capture, Place(index, 3584, 5120), 16)
        mass = model.block_mass(step, 64, 64).share[..., :56]
        untrained = torch.zeros_like(found[layer].weights)
        untrained[:, 128:] = torch.eye(64, dtype=untrained.dtype)
        for name, weights in (("trained", found[layer].weights), ("untrained", untrained)):
            best = gate_scores(step, dataclasses.replace(found[layer], weights=weights))[..., :56].argsort(-1)[..., 42:]
            shares[name, layer] = float((np.take_along_axis(mass, best, -1).sum(-1) / mass.sum(-1)).mean())
        assert shares["trained", layer] > 1.7 * 0.25, shares
    means = {name: np.mean([shares[name, layer] for layer in found]) for name in ("trained", "untrained")}
    assert means["trained"] > means["untrained"] + 0.01, shares


def gate_scores(step: sources.Step, gate: SeerGate) -> np.ndarray:
    """The gate's probabilities [Hq, Qb, Kb], of every visible block."""
    visible = block_rules(step.batch, gate).visible
    return probabilities(step.q, step.kv, step.batch, gate, None, visible, "numba")[0].numpy()


def test_settings_of_other_weights_are_other_settings(gate_file):
    about = sources.describe(Recorded(), noise())
    first, second = (gates.load(GateWeights.from_path(gate_file), about) for _ in range(2))
    key = Setting(first[5], 2).key
    assert Setting(second[5], 2).key == key, "the same weights, read twice"
    assert Setting(first[1], 2).key != key
    assert Setting(dataclasses.replace(first[5], threshold=0.5), 2).key != key
    assert Setting(first[5], 1).key != key
    assert hash(key) == hash(Setting(second[5], 2).key)
