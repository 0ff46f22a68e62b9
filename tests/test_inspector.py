"""The inspector: what it computes, what it draws, and the app itself, driven without a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compactattn import Dense, FlashPrefill, Oracle
from compactattn.capture import Capture, CapturedLayer, save_capture

pytest.importorskip("matplotlib")

from inspector import charts, model

TOKENS, HEADS, KV_HEADS = 700, 4, 2
APP = Path(__file__).parents[1] / "inspector" / "streamlit_app.py"


def noise() -> Capture:
    generator = torch.Generator().manual_seed(11)
    layers = [
        CapturedLayer(n, *(torch.randn(TOKENS, h, 64, generator=generator).half() for h in (HEADS, KV_HEADS, KV_HEADS)))
        for n in (1, 5)
    ]
    return Capture(layers=tuple(layers), model="noise", source="a generator", rope_theta=1e4)


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("captures") / "noise.safetensors"
    save_capture(path, noise())
    return str(path)


def settings(span: int | None = None, start: int = 300, head: int = 2, **changes: float) -> model.Settings:
    selector = FlashPrefill(
        **{"alpha": 0.7, "sink_blocks": 1, "window_blocks": 1, **changes}, block_size=64, query_block=64
    )
    return model.Settings(1, start, start + 200, head, selector, heads_per_group=2, query_blocks_per_span=span)


def test_block_mass_is_the_exact_softmax_mass():
    capture, wanted = noise(), settings()
    found = model.inspect(capture, wanted)
    q, k = capture.layers[1].q[300:500, 2].double(), capture.layers[1].k[:500, 1].double()
    for i, j in ((0, 0), (1, 4), (3, 7), (0, 7)):
        mass = []
        for row in range(64 * i, min(64 * i + 64, 200)):
            weights = (k[: 301 + row] @ q[row] / 8).softmax(0)
            mass.append(float(weights[64 * j : 64 * j + 64].sum()))
        assert found.mass[i, j] == pytest.approx(np.mean(mass), abs=1e-6)
    np.testing.assert_allclose(found.mass.sum(1), 1.0, rtol=1e-5)
    assert not found.mass[~found.visible].any()


@pytest.mark.parametrize("span", [None, 1, 3])
def test_table_is_the_union_of_its_members_and_the_current_region(span):
    capture, wanted = noise(), settings(span)
    found = [model.inspect(capture, settings(span, head=head)) for head in (2, 3)]
    assert list(found[0].heads) == [2, 3]
    assert np.array_equal(found[0].listed, found[1].listed)
    length = model.span_length(wanted, 4)
    for s in range(-(-4 // length)):
        rows = slice(s * length, (s + 1) * length)
        union = found[0].selected[rows].any(0) | found[1].selected[rows].any(0)
        current = found[0].visible[rows].any(0) & (np.arange(8) >= 300 // 64)
        assert np.array_equal(found[0].listed[s], union | current)
        assert np.array_equal(found[0].seen_by_row[s], found[0].visible[rows].any(0))
        votes = found[0].selected[rows].sum(0) + found[1].selected[rows].sum(0)
        assert np.array_equal(found[0].votes[s], votes)
    assert found[0].members.sum() == 8


def test_mass_covered_grows_with_the_mask():
    capture = noise()
    thin, wide = (model.inspect(capture, settings(alpha=alpha)) for alpha in (0.95, 0.0))
    assert thin.mass_covered_by_mask() < wide.mass_covered_by_mask() == pytest.approx(1.0, abs=1e-5)
    assert thin.mass_covered_by_mask() <= thin.mass_covered_by_table() <= 1.0 + 1e-5
    assert wide.cascade.mask == wide.cascade.visible


def test_unknown_files_and_impossible_settings_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        model.load(str(tmp_path / "missing"))
    assert model.stamp(str(tmp_path / "missing"))[1] == 0
    impossible = model.Settings(0, 0, 100, 0, Dense(block_size=64, query_block=64), heads_per_group=3)
    with pytest.raises(ValueError, match="heads_per_group"):
        model.inspect(noise(), impossible)


@pytest.mark.parametrize("start", [0, 300])
def test_charts_draw_what_the_model_found(start):
    found = model.inspect(noise(), settings(span=2, start=start))
    mask = charts.mask_figure(found)
    mass, kinds = (axes.images[0].get_array() for axes in mask.axes[:2])
    assert mass.shape == kinds.shape == found.mass.shape
    past = np.arange(found.visible.shape[1]) < found.past_blocks
    assert np.array_equal(kinds == 2, found.selected & past)
    assert np.array_equal(kinds == 3, found.visible & ~past)
    table = charts.table_figure(found)
    votes, listed = (axes.images[0].get_array() for axes in table.axes[:2])
    np.testing.assert_allclose(votes, found.votes / found.members[:, None])
    assert np.array_equal(listed >= 2, found.listed)
    for figure in (mask, table):
        figure.canvas.draw()


def run_app(capture: str):
    testing = pytest.importorskip("streamlit.testing.v1")
    app = testing.AppTest.from_file(str(APP), default_timeout=60).run()
    assert not app.exception
    assert not app.error  # it starts on the sample in the package
    app.sidebar.text_input[0].set_value(capture)
    return app.run()


def choose(app, label: str, value: object):
    [box] = [box for box in app.sidebar.selectbox if box.label == label]
    return box.set_value(value).run()


def test_app_shows_masks_and_tables(capture_file):
    app = run_app(capture_file)
    assert not app.exception
    assert not app.error
    assert [heading.value for heading in app.subheader] == [
        "Head 0, tokens 512 to 699",
        "Union and block table of the group",
    ]
    shown = {metric.label: metric.value for metric in app.metric}
    found = model.inspect(noise(), model.Settings(0, 512, 700, 0, FlashPrefill(0.1, 1, 2, 64, 64), 2))
    assert shown["Mask"] == f"{found.cascade.densities()['mask']:.1%}"
    assert shown["Mass on the head's mask"] == f"{found.mass_covered_by_mask():.1%}"

    app = choose(choose(choose(app, "Selector", "Oracle"), "Layer", 1), "Heads per group", 1)
    found = model.inspect(noise(), model.Settings(1, 512, 700, 0, Oracle(0.95, None, 1, 2, 64, 64), 1))
    shown = {metric.label: metric.value for metric in app.metric}
    assert not app.error
    assert shown["Mass on the head's mask"] == f"{found.mass_covered_by_mask():.1%}"

    app = choose(app, "Chunk starts at token", 0)
    assert not app.exception
    assert [message.value for message in app.info] == [
        "The first chunk has no past: every block is in the current region."
    ]
    for name in ("XAttention", "Dense"):
        app = choose(app, "Selector", name)
        assert not app.exception
        assert not app.error


def test_app_shows_errors_as_messages(tmp_path):
    malformed = tmp_path / "malformed.safetensors"
    malformed.write_bytes(b"not a capture" * 10)
    for path, words in ((tmp_path / "missing", "expected a capture file"), (malformed, "expected a safetensors file")):
        app = run_app(str(path))
        assert not app.exception
        assert words in app.error[0].value
