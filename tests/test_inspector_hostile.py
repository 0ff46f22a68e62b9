"""Links, paths and files that mean no good, or nothing: the inspector's pages stay pages."""

from __future__ import annotations

import dataclasses
import re

import pytest

from compactattn.capture import CapturedLayer, save_capture

pytest.importorskip("streamlit")
pytest.importorskip("matplotlib")

from tests.inspecting import PAGES, context, fine, metrics, start, visit
from tests.test_inspector import TOKENS, noise

#: What nobody's widget can take.
ABSURD = {
    "data": "nope",
    "chunk": "-1",
    "start": "1e309",
    "layer": "999999999999",
    "head": "-3",
    "selector": "<script>",
    "alpha": "nan",
    "threshold": "-inf",
    "mass": "1e400",
    "gate_threshold": "NaN",
    "sink": "99999999999999",
    "window": "-1",
    "block": "7",
    "qblock": "0",
    "share": "3.5",
    "span": "0",
    "page_size": "0",
    "blocks": "5",
    "colour": "red",
    "members": "x",
    "row_span": "99",
    "entry": "-9",
    "budget": "x",
    "order": "y",
    "worst": "z",
    "among": "Nobody",
    "methods": "?",
    "measure": "?",
    "b_selector": "?",
    "b_alpha": "inf",
    "b_sink": "x",
    "b_window": "1e99",
    "b_share": "9",
    "b_span": "-1",
    "file": "/dev/zero",
    "gate": "/dev/zero",
}
ABSURD_WORKLOAD = {"workload": "\0", "correlation": "nan", "kv": "999", "group": "0", "seed": "-5"}


@pytest.mark.parametrize("page", PAGES)
def test_absurd_links_show_the_defaults(page):
    app = fine(start(page, None, **ABSURD))
    assert "layer 4 · tokens 4,608 to 5,119 of 5,120 · head 0 · FlashPrefill · 2 heads by whole chunk" in context(app)


def test_an_absurd_synthetic_prompt_is_the_default_one():
    app = fine(start("masks", None, **ABSURD | ABSURD_WORKLOAD | {"data": "Synthetic", "context": "8192"}))
    assert "synthetic vertical-slash, 8,192 tokens, correlation 0.9" in context(app)
    assert metrics(visit(app, "data"))["Query heads / KV heads"] == "8 / 2"


def test_links_name_no_home_and_no_endless_path():
    for path in ("~nobody-at-all/x.safetensors", "a" * 5000, "\0", "/proc/self/mem", "/dev/zero"):
        app = start("data", path)
        assert not app.exception
        assert app.error[0].value
        assert "The inspector failed" not in app.error[0].value, path


def test_words_from_a_file_stay_words_and_stay_short(tmp_path):
    hostile = "![seen](http://198.51.100.1/a.png) <img src=x onerror=alert(1)> **bold** $x$ :red[x] " * 9000
    long = [
        CapturedLayer(n, *(t.repeat(60, 1, 1) for t in layer.tensors().values()))
        for n, layer in enumerate(noise().layers)
    ]
    path = tmp_path / "<b>hostile.safetensors"
    save_capture(path, dataclasses.replace(noise(), layers=tuple(long), model=hostile, source=hostile))
    app = fine(start("data", str(path), chunk="128"))
    assert metrics(app)["Prompt, tokens"] == f"{60 * TOKENS:,}"
    assert len(app.caption[1].value) < 6000
    assert not re.search(r"(?<!\\)[<>\[\]*$:!]", app.caption[1].value), "a character that Markdown would read"
