"""Settings of an engine's plugin: what they mean, and what is refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compactattn import Dense, FlashPrefill, XAttention
from compactattn.integrations.engine_settings import (
    DENSE_KEYS,
    FILE_LIMIT,
    EngineSettings,
    check_dtypes,
    check_layer,
    layer_number,
    page_sizes,
    parse_settings,
)


def parse(**options: Any) -> EngineSettings:
    return parse_settings(options, "options")


def test_without_settings_every_layer_runs_flash_prefill_alone() -> None:
    settings = parse()
    assert settings == EngineSettings(FlashPrefill(dense_keys=DENSE_KEYS), {}, 1, 1, 0, False)
    assert settings.of_layer(0) == settings.of_layer(31) == FlashPrefill(dense_keys=DENSE_KEYS)
    assert settings.dense == Dense(dense_keys=DENSE_KEYS)
    assert (settings.dense_queries, settings.dense_keys) == (1, DENSE_KEYS)


def test_settings_reach_the_selector() -> None:
    settings = parse(
        alpha=0.12, sink_blocks=1, block_size=64, dense_keys=0, dense_queries=4, dense_layers=2, correction=True
    )
    assert settings.of_layer(1) == Dense(block_size=64, dense_queries=4)
    assert settings.of_layer(2) == FlashPrefill(0.12, sink_blocks=1, block_size=64, dense_queries=4)
    assert settings.correction
    others = parse(selector="xattention", threshold=0.8, stride=8, heads_per_group=4, query_blocks_per_span=None)
    assert others.of_layer(0) == XAttention(0.8, stride=8, dense_keys=DENSE_KEYS)
    assert (others.heads_per_group, others.query_blocks_per_span) == (4, None)
    assert parse(selector="dense").of_layer(0) == Dense(dense_keys=DENSE_KEYS)
    assert parse(heads_per_group="auto", query_blocks_per_span="auto").heads_per_group == "auto"


def test_layers_start_from_the_common_values_and_the_rest_is_dense() -> None:
    settings = parse(
        alpha=0.2,
        sink_blocks=3,
        dense_layers=1,
        layers={"0": {}, "1": {}, "2": {"alpha": 0.05}, "3": {"selector": "xattention", "threshold": 0.7}},
    )
    assert settings.of_layer(0) == Dense(dense_keys=DENSE_KEYS)
    assert settings.of_layer(1) == FlashPrefill(0.2, sink_blocks=3, dense_keys=DENSE_KEYS)
    assert settings.of_layer(2) == FlashPrefill(0.05, sink_blocks=3, dense_keys=DENSE_KEYS)
    assert settings.of_layer(3) == XAttention(0.7, dense_keys=DENSE_KEYS)
    assert settings.of_layer(4) == Dense(dense_keys=DENSE_KEYS)


def test_a_file_gives_what_is_not_said_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"alpha": 0.3, "dense_keys": 512, "layers": {"5": {"alpha": 0.4}}}))
    settings = parse(settings=str(path), dense_keys=1024)
    assert settings.of_layer(5) == FlashPrefill(0.4, dense_keys=1024)
    assert settings.of_layer(6) == Dense(dense_keys=1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"options: expected a JSON object, got list"),
        ({"alhpa": 0.1}, r"options: expected settings among selector, alpha, .*, settings, got 'alhpa'"),
        ({"selector": "seer"}, r"options: selector: expected one of flashprefill, xattention, dense, got 'seer'"),
        ({"selector": ["dense"]}, r"selector: expected one of flashprefill, xattention, dense, got \['dense'\]"),
        ({"alpha": 1.5}, r"options: alpha: expected a number from 0 to 1, got 1.5"),
        ({"threshold": 0.9}, r"threshold: expected a parameter of flashprefill \(alpha, .*\), got 0.9"),
        ({"selector": "dense", "alpha": 0.1}, r"alpha: expected a parameter of dense \(block_size, .*\), got 0.1"),
        ({"block_size": 100}, r"options: block_size: expected one of 64, 128, 256, got 100"),
        ({"dense_keys": -1}, r"dense_keys: expected an int of at least 0, got -1"),
        ({"dense_keys": 0.5}, r"dense_keys: expected an int of at least 0, got 0.5"),
        ({"heads_per_group": 0}, r"heads_per_group: expected an int of at least 1, got 0"),
        ({"heads_per_group": None}, r"heads_per_group: expected an int of at least 1, got None"),
        ({"query_blocks_per_span": "all"}, r"query_blocks_per_span: expected None, 'auto' or an int .*, got 'all'"),
        ({"dense_layers": "2"}, r"dense_layers: expected an int of at least 0, got '2'"),
        ({"correction": 1}, r"correction: expected true or false, got 1"),
        ({"layers": {}}, r"layers: expected a JSON object of layer numbers .*, got \{\}"),
        ({"layers": {"a": {}}}, r"layers: expected layer numbers as strings of digits, got 'a'"),
        ({"layers": {"1": {"dense_keys": 3}}}, r"layers\[1\]: expected settings among .*, got 'dense_keys'"),
        ({"layers": {"1": {"alpha": 7}}}, r"layers\[1\]: alpha: expected a number from 0 to 1, got 7"),
        ({"settings": 3}, r"settings: expected the path of a JSON file, got 3"),
        ({"settings": "/no/such/file"}, r"settings: .*'/no/such/file': No such file or directory"),
    ],
)
def test_refused_settings_are_named(options: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(options, "options")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"settings: expected a JSON file, got '.*': Expecting property name"),
        ("[1]", r"settings file '.*': expected a JSON object, got list"),
        ('{"settings": "again.json"}', r"settings file '.*': expected settings among .*, got 'settings'"),
        (" " * (FILE_LIMIT + 1), r"settings: expected a file of at most 1048576 bytes, got '.*', which is larger"),
    ],
)
def test_refused_settings_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(settings=str(path))


def test_a_model_without_such_layers_or_pages_is_refused() -> None:
    settings = parse(layers={"0": {}, "30": {}}, dense_layers=3)
    settings.check_model(num_layers=31, page_size=128)
    with pytest.raises(ValueError, match="layers: expected layer numbers from 0 to 29, got 30"):
        settings.check_model(num_layers=30, page_size=16)
    with pytest.raises(ValueError, match="dense_layers: expected at most the model's 2 layers, got 3"):
        parse(dense_layers=3).check_model(num_layers=2, page_size=16)
    assert page_sizes(64) == [16, 32, 64]
    for page_size in (8, 48, 256, 544):
        with pytest.raises(ValueError, match=f"block size: expected one of 16, 32, 64, 128 .*, got {page_size}"):
            settings.check_model(num_layers=31, page_size=page_size)


def layer(**changes: Any) -> None:
    plain: dict[str, Any] = {
        "heads": 8,
        "kv_heads": 2,
        "head_size": 128,
        "attention_type": "decoder",
        "cache_dtype": "auto",
        "settings": parse(),
        "others": {"alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "use_alibi_sqrt": False},
    }
    check_layer(**(plain | changes))


def test_a_plain_layer_is_accepted() -> None:
    layer()
    layer(cache_dtype="bfloat16", others={"logits_soft_cap": 0.0}, settings=parse(heads_per_group=4))
    check_dtypes(torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "encoder_only"}, "attention type: expected decoder .*, got encoder_only"),
        ({"others": {"alibi_slopes": [1.0]}}, r"alibi_slopes: expected none \(no ALiBi .*\), got \[1.0\]"),
        ({"others": {"sliding_window": 4096}}, r"sliding_window: expected none \(.*another backend\), got 4096"),
        ({"others": {"logits_soft_cap": 30.0}}, "logits_soft_cap: expected none .*, got 30.0"),
        ({"others": {"sinks": torch.zeros(8)}}, "sinks: expected none .*, got Tensor"),
        ({"others": {"kv_sharing_target_layer_name": "a.0"}}, "kv_sharing_target_layer_name: expected none"),
        ({"others": {"chunk_lookback": 1}}, r"chunk_lookback: expected none \(unknown here\), got 1"),
        ({"head_size": 112}, "head size: expected one of 64, 80, 96, 128, 192, 256, got 112"),
        ({"cache_dtype": "fp8_e4m3"}, "KV cache dtype: expected auto, float16 or bfloat16, got fp8_e4m3"),
        ({"heads": 34}, "query heads of a rank: expected a multiple of the 2 KV heads, at most 16 for each, got 34"),
        ({"heads": 7}, "query heads of a rank: expected a multiple of the 2 KV heads"),
        ({"settings": parse(heads_per_group=8)}, "heads_per_group: expected a divisor of the 4 query heads per KV"),
    ],
)
def test_layers_that_cannot_run_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**changes)


def test_dtypes_that_cannot_run_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model dtype: expected float16, bfloat16 or float32, got torch\.float64"):
        check_dtypes(torch.float64, torch.float64)
    with pytest.raises(ValueError, match=r"KV cache dtype: expected torch\.bfloat16, as the model, got torch\.float16"):
        check_dtypes(torch.bfloat16, torch.float16)


def test_layer_numbers_are_read_from_names() -> None:
    assert layer_number("model.layers.17.self_attn.attn") == 17
    for name in ("model.attn", "model.layers.3.blocks.1.attn"):
        with pytest.raises(ValueError, match="layer name: expected one with one number in it"):
            layer_number(name)
