"""Settings files: what is saved is loaded, `enable` takes it, and every malformed file is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compactattn import Dense, FlashPrefill, Oracle, SeerGate, XAttention
from compactattn.settings import FILE_LIMIT, Settings, load_settings, save_settings

SAVED = Settings(
    selector={
        11: FlashPrefill(alpha=0.0625, sink_blocks=1, block_size=64, query_block=64, dense_last_blocks=2),
        2: XAttention(threshold=0.5, stride=8),
        3: Oracle(top_k=7),
        4: Oracle(mass=0.5),
        0: Dense(block_size=256),
    },
    heads_per_group=4,
    query_blocks_per_span="auto",
)


def test_round_trip(tmp_path: Path) -> None:
    save_settings(tmp_path / "a", SAVED, origin="a test, “quoted”")
    assert load_settings(tmp_path / "a") == SAVED
    first = (tmp_path / "a").read_bytes()
    content = json.loads(first)
    assert list(content["layers"]) == ["0", "2", "3", "4", "11"]
    assert content["layers"]["11"]["alpha"] == 0.0625
    assert content["origin"] == "a test, “quoted”"
    save_settings(tmp_path / "a", load_settings(tmp_path / "a"), origin="a test, “quoted”")
    assert (tmp_path / "a").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("span", [None, 3])
def test_fields_that_are_left_out_have_their_defaults(tmp_path: Path, span: int | None) -> None:
    save_settings(tmp_path / "a", SAVED)
    content = json.loads((tmp_path / "a").read_text())
    content |= {"query_blocks_per_span": span, "heads_per_group": "auto", "layers": {"5": {"selector": "FlashPrefill"}}}
    (tmp_path / "a").write_text(json.dumps(content))
    loaded = load_settings(tmp_path / "a")
    assert loaded == {"selector": {5: FlashPrefill()}, "heads_per_group": "auto", "query_blocks_per_span": span}


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | changes


def layer(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return changed(layers={"1": {"selector": "FlashPrefill", **fields}})


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [content], "settings: expected a JSON object, got list"),
    "another format": (changed(format="settings"), "format: expected 'compactattn settings', got 'settings'"),
    "no format": (without("format"), "format: expected 'compactattn settings', got None"),
    "a later version": (changed(version=2), "version: expected 1, got 2"),
    "a true version": (changed(version=True), "version: expected 1, got True"),
    "unknown field": (changed(alpha=0.1), "heads_per_group, query_blocks_per_span, layers, got alpha"),
    "missing field": (without("query_blocks_per_span"), "got no query_blocks_per_span"),
    "origin": (changed(origin=3), "origin: expected a string, got 3"),
    "heads": (changed(heads_per_group=0), "heads_per_group: expected an int of at least 1, got 0"),
    "heads of a kind": (changed(heads_per_group=1.5), "heads_per_group: expected an int of at least 1, got 1.5"),
    "span": (changed(query_blocks_per_span="chunk"), "query_blocks_per_span: expected None, 'auto' or an int"),
    "no layers": (changed(layers={}), "layers: expected an object with at least one layer, got {}"),
    "a list of layers": (changed(layers=[1]), "layers: expected an object with at least one layer, got [1]"),
    "a layer's name": (changed(layers={"first": {}}), "layers: expected layer numbers such as 0 or 17, got 'first'"),
    "a zero before": (changed(layers={"01": {}}), "layers: expected layer numbers such as 0 or 17, got '01'"),
    "a negative layer": (changed(layers={"-1": {}}), "layers: expected layer numbers such as 0 or 17, got '-1'"),
    "another digit": (changed(layers={"²": {}}), "layers: expected layer numbers such as 0 or 17, got '²'"),
    "a large layer": (changed(layers={"9999999999": {}}), "layers: expected an int of at most 2147483647"),
    "a bare selector": (changed(layers={"1": "Dense"}), 'layers.1: expected an object with "selector"'),
    "no selector": (changed(layers={"1": {"alpha": 0.1}}), 'layers.1: expected an object with "selector"'),
    "unknown selector": (
        layer(selector="Quest"),
        "layers.1.selector: expected FlashPrefill or KeyBounds or XAttention or Oracle",
    ),
    "a gate": (
        layer(selector="SeerGate"),
        "layers.1.selector: expected FlashPrefill or KeyBounds or XAttention or Oracle",
    ),
    "unknown selector field": (layer(treshold=0.5), "layers.1: expected fields of FlashPrefill (alpha, sink_blocks"),
    "another selector's field": (layer(threshold=0.5), "dense_last_blocks), got threshold"),
    "alpha": (layer(alpha=1.5), "layers.1.alpha: expected a number from 0 to 1, got 1.5"),
    "alpha of a kind": (layer(alpha="0.5"), "layers.1.alpha: expected a number from 0 to 1, got '0.5'"),
    "block size": (layer(block_size=100), "layers.1.block_size: expected one of 64, 128, 256, got 100"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    path = tmp_path / "spoiled.json"
    save_settings(path, SAVED)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_settings(path)
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, got: Expecting value"),
        ("{", "expected JSON, got: "),
        ('{"version": 1, "version": 1}', "version: expected one value, got several"),
        ('{"version": NaN}', "numbers: expected finite ones, got NaN"),
        ("[" * 100_000, "expected JSON, got: "),
        (b"\xff\xfe{", "expected JSON, got: "),
        (" " * (FILE_LIMIT + 1), f"settings: expected at most {FILE_LIMIT} bytes, got more"),
    ],
    ids=["empty", "cut off", "twice", "nan", "too deep", "bytes", "too long"],
)
def test_files_that_are_no_json_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_settings(path)
    assert str(refusal.value).startswith(f"{path}: ")


def test_nothing_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: expected a settings file, got no file at all"):
        load_settings(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected a settings file, got: Is a directory"):
        load_settings(tmp_path)


def test_settings_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    gate = SeerGate(torch.zeros(2, 192, 64), torch.ones(32))
    for spoiled, message in (
        (
            SAVED | {"selector": {0: gate}},
            "selector of layer 0: expected FlashPrefill or KeyBounds or XAttention or Oracle or Dense",
        ),
        (SAVED | {"selector": {}}, "layers: expected an object with at least one layer"),
        (SAVED | {"selector": {-1: Dense()}}, "layers: expected layer numbers such as 0 or 17, got '-1'"),
        (SAVED | {"heads_per_group": None}, "heads_per_group: expected an int of at least 1, got None"),
        ({}, "settings: expected a mapping with selector, heads_per_group, query_blocks_per_span, got {}"),
        (None, "settings: expected a mapping with selector, heads_per_group, query_blocks_per_span, got None"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            save_settings(tmp_path / "a", spoiled)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"settings: expected at most {FILE_LIMIT} bytes, got more"):
        save_settings(tmp_path / "a", SAVED, origin="x" * FILE_LIMIT)
    assert list(tmp_path.iterdir()) == []
