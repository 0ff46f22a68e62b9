"""Settings of an engine's plugin: what they mean, and what is refused, by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compactattn import Dense, FlashPrefill, KeyBounds, Oracle, XAttention
from compactattn.integrations.engine_settings import (
    DENSE_KEYS,
    DENSE_LAST_BLOCKS,
    OF_ALL_SELECTORS,
    OF_THE_MODEL,
    OF_THE_SELECTOR,
    SETTINGS,
    EngineSettings,
    check_dtypes,
    check_layer,
    layer_number,
    own_object,
    page_sizes,
    parse_settings,
)
from compactattn.selectors import Selector
from compactattn.settings import Settings, load_settings, save_settings


def parse(**options: Any) -> EngineSettings:
    return parse_settings(options, "options")


USUAL: dict[str, int] = {"dense_keys": DENSE_KEYS, "dense_last_blocks": DENSE_LAST_BLOCKS}


def test_without_settings_every_layer_runs_flash_prefill_alone() -> None:
    settings = parse()
    assert settings == EngineSettings(FlashPrefill(**USUAL), {}, 1, 1, 0, False)
    assert settings.of_layer(0) == settings.of_layer(31) == FlashPrefill(**USUAL)
    assert settings.dense == Dense(dense_keys=DENSE_KEYS)
    assert (settings.dense_queries, settings.dense_keys) == (1, DENSE_KEYS)


def test_settings_reach_the_selector() -> None:
    settings = parse(
        alpha=0.12, sink_blocks=1, block_size=64, dense_keys=0, dense_queries=4, dense_layers=2, correction=True
    )
    assert settings.of_layer(1) == Dense(block_size=64, dense_queries=4)
    expected = FlashPrefill(0.12, sink_blocks=1, block_size=64, dense_queries=4, dense_last_blocks=DENSE_LAST_BLOCKS)
    assert settings.of_layer(2) == expected
    assert settings.correction
    others = parse(selector="xattention", threshold=0.8, stride=8, heads_per_group=4, query_blocks_per_span=None)
    assert others.of_layer(0) == XAttention(0.8, stride=8, **USUAL)
    assert (others.heads_per_group, others.query_blocks_per_span) == (4, None)
    assert parse(selector="dense").of_layer(0) == Dense(dense_keys=DENSE_KEYS)
    assert parse(heads_per_group="auto", query_blocks_per_span="auto").heads_per_group == "auto"


SMALL: dict[str, Any] = {"block_size": 64, "query_block": 64, "dense_keys": 512, "dense_queries": 3}
BY_LAYER: dict[int, Selector] = {
    1: FlashPrefill(0.0625, sink_blocks=1, **SMALL),
    3: XAttention(0.7, stride=8, **SMALL),
    4: Oracle(mass=0.9, **SMALL),
    6: FlashPrefill(0.5, window_blocks=0, **SMALL),
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return saved(tmp_path, BY_LAYER)


def saved(folder: Path, layers: dict[int, Selector], heads: Any = 2, span: Any = None) -> str:
    path = str(folder / "settings.json")
    save_settings(path, Settings(selector=layers, heads_per_group=heads, query_blocks_per_span=span))
    return path


def test_a_file_gives_every_layer_the_selector_that_load_settings_reads(path: str) -> None:
    settings, held = parse(settings=path), load_settings(path)
    assert {layer: settings.of_layer(layer) for layer in held["selector"]} == held["selector"] == BY_LAYER
    assert settings.of_layer(0) == settings.of_layer(5) == settings.of_layer(99) == settings.dense == Dense(**SMALL)
    assert (settings.heads_per_group, settings.query_blocks_per_span) == (2, None)
    assert (settings.dense_layers, settings.correction) == (0, False)
    assert (settings.dense_queries, settings.dense_keys) == (3, 512)


def test_what_is_said_of_the_model_counts_more_than_the_file(path: str) -> None:
    said = {"dense_keys": 1024, "dense_queries": 0, "dense_layers": 2, "correction": True}
    settings = parse(settings=path, heads_per_group="auto", query_blocks_per_span=1, **said)
    expected = Dense(**SMALL | {"dense_keys": 1024, "dense_queries": 0})
    assert settings.of_layer(0) == settings.of_layer(1) == settings.dense == expected
    for layer in (3, 4, 6):
        assert settings.of_layer(layer) == replace(BY_LAYER[layer], dense_keys=1024, dense_queries=0)
    assert (settings.heads_per_group, settings.query_blocks_per_span, settings.correction) == ("auto", 1, True)
    assert parse(settings=path, query_blocks_per_span=None).heads_per_group == 2


@pytest.mark.parametrize(
    "own",
    [
        {"selector": "flashprefill"},
        {"alpha": 0.1},
        {"threshold": 0.9},
        {"stride": 8},
        {"sink_blocks": 1},
        {"window_blocks": 1},
        {"block_size": 64},
        {"query_block": 64},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_selector_beside_a_file_is_refused_by_name(path: str, own: dict[str, Any]) -> None:
    ((name, value),) = own.items()
    expected = f"options: {name}: expected nothing beside settings, whose file has it by layer, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse(settings=path, **own)


def test_every_setting_is_either_of_the_selector_or_of_the_model() -> None:
    assert sorted(SETTINGS) == sorted([*OF_THE_SELECTOR, *OF_THE_MODEL, "settings"])
    of_selectors = {name for kind in (FlashPrefill, KeyBounds, XAttention, Dense) for name in kind.__dataclass_fields__}
    assert of_selectors == {*OF_THE_SELECTOR, *OF_ALL_SELECTORS} - {"selector"}


def test_layers_of_a_file_may_end_chunks_dense_or_not(tmp_path: Path) -> None:
    ending = replace(BY_LAYER[6], dense_last_blocks=2)
    settings = parse(settings=saved(tmp_path, BY_LAYER | {5: ending}))
    assert settings.of_layer(5) == ending
    assert settings.ends_dense
    path = saved(tmp_path, BY_LAYER)
    assert not parse(settings=path).ends_dense
    assert parse(settings=path, dense_last_blocks=1).of_layer(6) == replace(BY_LAYER[6], dense_last_blocks=1)
    assert not parse(settings=saved(tmp_path, BY_LAYER | {5: ending}), dense_last_blocks=0).ends_dense
    assert parse(dense_last_blocks=0).of_layer(3) == FlashPrefill(dense_keys=DENSE_KEYS)
    assert parse().ends_dense
    assert not parse(dense_last_blocks=0).ends_dense
    assert not parse(selector="dense").ends_dense
    with pytest.raises(ValueError, match="dense_last_blocks: expected an int of at least 0, got -1"):
        parse(dense_last_blocks=-1)


def test_dense_layers_of_a_file_take_the_sizes_of_the_others(tmp_path: Path) -> None:
    dense = Dense(block_size=256, dense_keys=7, dense_last_blocks=1)
    settings = parse(settings=saved(tmp_path, {0: dense, 1: BY_LAYER[1]}))
    assert settings.of_layer(0) == settings.of_layer(2) == Dense(**SMALL)
    assert settings.of_layer(1) == BY_LAYER[1]
    settings = parse(settings=saved(tmp_path, {0: dense, 1: Dense()}))
    assert settings.of_layer(0) == settings.of_layer(1) == Dense(block_size=256, dense_keys=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 128}, "block_size: expected 64, as layer 1 has, got 128"),
        ({"query_block": 128}, "query_block: expected 64, as layer 1 has, got 128"),
        ({"dense_queries": 1}, "dense_queries: expected 3, as layer 1 has, got 1"),
        ({"dense_keys": 0}, "dense_keys: expected 512, as layer 1 has, got 0"),
    ],
    ids=lambda words: next(iter(words)) if isinstance(words, dict) else "",
)
def test_layers_that_cannot_share_a_plan_are_refused_by_name(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    path = saved(tmp_path, BY_LAYER | {5: replace(BY_LAYER[6], **changes)})
    with pytest.raises(ValueError, match=re.escape(f"options: settings: {path}: layers.5.{message}")):
        parse(settings=path)
    (name,) = changes
    if name in ("dense_keys", "dense_queries"):  # unless one value for all is said beside the file
        assert parse(settings=path, **{name: 9}).of_layer(5) == replace(BY_LAYER[6], **{name: 9})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"options: expected a JSON object, got list"),
        ({"alhpa": 0.1}, r"options: expected settings among selector, alpha, .*, settings, got 'alhpa'"),
        (
            {"selector": "seer"},
            r"options: selector: expected one of flashprefill, keybounds, xattention, dense, got 'seer'",
        ),
        (
            {"selector": ["dense"]},
            r"selector: expected one of flashprefill, keybounds, xattention, dense, got \['dense'\]",
        ),
        ({"alpha": 1.5}, r"options: alpha: expected a number from 0 to 1, got 1.5"),
        ({"threshold": 0.9}, r"threshold: expected a parameter of flashprefill \(alpha, .*\), got 0.9"),
        ({"selector": "dense", "alpha": 0.1}, r"alpha: expected a parameter of dense \(block_size, .*\), got 0.1"),
        ({"block_size": 100}, r"options: block_size: expected one of 64, 128, 256, got 100"),
        ({"dense_keys": -1}, r"dense_keys: expected an int of at least 0, got -1"),
        ({"dense_keys": 0.5}, r"dense_keys: expected an int of at least 0, got 0.5"),
        ({"heads_per_group": "all"}, r"options: heads_per_group: expected 'auto' or an int of at least 1, got 'all'"),
        ({"heads_per_group": 0}, r"heads_per_group: expected an int of at least 1, got 0"),
        ({"heads_per_group": None}, r"heads_per_group: expected an int of at least 1, got None"),
        ({"query_blocks_per_span": "all"}, r"query_blocks_per_span: expected None, 'auto' or an int .*, got 'all'"),
        ({"dense_layers": "2"}, r"options: dense_layers: expected an int of at least 0, got '2'"),
        ({"correction": 1}, r"options: correction: expected true or false, got 1"),
        ({"layers": {"1": {}}}, r"options: expected settings among .*, got 'layers'"),
        ({"settings": 3}, r"options: settings: expected the path of a settings file, got 3"),
        ({"settings": None}, r"options: settings: expected the path of a settings file, got None"),
        ({"settings": "/no/such/file"}, r"options: settings: /no/such/file: expected a settings file, got no file"),
        ({"settings": "/"}, r"options: settings: /: expected a settings file, got: Is a directory"),
        ({"settings": "a" * 5000}, r"options: settings: .*File name too long"),
    ],
)
def test_refused_settings_are_named(options: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(options, "options")


def test_the_plugins_own_object_is_found_among_others() -> None:
    assert own_object({"compactattn": {"alpha": 0.1}, "other": 1}, "compactattn", "where") == {"alpha": 0.1}
    assert own_object({"other": {"alpha": 1}, "compute": 2}, "compactattn", "where") == {}
    assert own_object({"alpha": 0.9}, "compactattn", "where", alone=False) == {}
    with pytest.raises(
        ValueError, match="where: expected the plugin's settings in an object 'compactattn', got 'compac"
    ):
        own_object({"compactatn": {"alpha": 7}}, "compactattn", "where", alone=False)
    with pytest.raises(
        ValueError, match="where: expected 'selector' in an object 'compactattn', got 'selector' beside"
    ):
        own_object({"selector": "nonsense"}, "compactattn", "where")


def test_settings_that_leave_nothing_out_are_told_apart() -> None:
    """Exactly where no request of a step can be longer than what always runs dense."""
    assert parse().why_all_dense(chunk=8192, longest=4097) is None
    assert parse(selector="dense").why_all_dense(chunk=1, longest=1) is None
    found = parse().why_all_dense(chunk=8192, longest=4096)
    assert found == "requests have at most 4096 tokens, and up to dense_keys 4096 they run dense"
    ends = parse(dense_last_blocks=8, query_block=64)
    assert ends.why_all_dense(chunk=513, longest=9999) is None
    assert ends.why_all_dense(chunk=512, longest=9999) == (
        "chunks have at most 512 tokens, and up to 512 they run dense by dense_last_blocks"
    )
    few = parse(dense_queries=32, dense_last_blocks=0)
    assert few.why_all_dense(chunk=33, longest=9999) is None
    assert few.why_all_dense(chunk=32, longest=9999).endswith("up to 32 they run dense by dense_queries")


def test_refused_settings_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"alpha": 0.3}')
    message = f"options: settings: {path}: format: expected 'compactattn settings', got None"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(settings=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_keys": -1}, "options: dense_keys: expected an int of at least 0, got -1"),
        ({"dense_queries": True}, "options: dense_queries: expected an int of at least 0, got True"),
        ({"dense_layers": "2"}, "dense_layers: expected an int of at least 0, got '2'"),
        ({"heads_per_group": None}, "heads_per_group: expected an int of at least 1, got None"),
        ({"query_blocks_per_span": 0}, "query_blocks_per_span: expected an int of at least 1, got 0"),
        ({"correction": 1}, "correction: expected true or false, got 1"),
    ],
)
def test_refused_settings_beside_a_file_are_named(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(settings=path, **options)


def test_a_model_without_such_layers_or_pages_is_refused(tmp_path: Path) -> None:
    settings = parse(settings=saved(tmp_path, {0: FlashPrefill(), 30: Dense()}), dense_layers=3)
    settings.check_model(num_layers=31, page_size=128)
    with pytest.raises(ValueError, match="layers of the settings file: expected numbers from 0 to 29, got 30"):
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
        ({"others": {"alibi_slopes": [1.0]}}, r"alibi_slopes: expected none \(.* no ALiBi .*\), got \[1.0\]"),
        ({"others": {"sliding_window": 4096}}, r"sliding_window: expected none \(.*another backend\), got 4096"),
        ({"others": {"logits_soft_cap": 30.0}}, "logits_soft_cap: expected none .*, got 30.0"),
        ({"others": {"sinks": torch.zeros(8)}}, "sinks: expected none .*, got Tensor"),
        ({"others": {"kv_sharing_target_layer_name": "a.0"}}, "kv_sharing_target_layer_name: expected none"),
        ({"others": {"chunk_lookback": 1}}, r"chunk_lookback: expected none \(unknown here\), got 1"),
        ({"head_size": 112}, "head size: expected one of 64, 80, 96, 128, 192, 256, got 112"),
        ({"cache_dtype": "fp8_e4m3"}, r"KV cache dtype: expected auto, float16 or bfloat16 \(.*\), got fp8_e4m3"),
        ({"heads": 34}, "query heads of a rank: expected a multiple of the 2 KV heads, at most 16 for each, got 34"),
        ({"kv_heads": 0}, "query heads of a rank: expected a multiple of the 0 KV heads"),
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
