"""The plugin's registration, names and refusals, through vLLM's own classes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; tests/vllm/run installs what these tests need")

from tests.vllm.layers import DIM, HEADS, WEIGHTS, make_builder, make_config, make_layer, new_cache  # noqa: I001

import torch
import vllm.plugins
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_layout import KVCacheLayout

from compactattn import FlashPrefill
from compactattn.integrations.vllm import CompactAttentionBackend, register, settings_of
from compactattn.settings import Settings, save_settings

PATH = "compactattn.integrations.vllm.CompactAttentionBackend"
NAMED = hasattr(AttentionBackendEnum, "register")  # vLLM 0.32 and newer


def test_vllm_finds_the_plugin_by_itself() -> None:
    assert [point.value for point in entry_points(group="vllm.general_plugins", name="compactattn")] == [
        "compactattn.integrations.vllm:register"
    ]
    vllm.plugins.load_general_plugins()
    assert AttentionBackendEnum["CUSTOM"].get_class() is CompactAttentionBackend


def test_registering_again_changes_nothing() -> None:
    register()
    members = list(AttentionBackendEnum)
    register()
    assert list(AttentionBackendEnum) == members
    assert AttentionBackendEnum.CUSTOM.get_path() == PATH
    assert (CompactAttentionBackend.get_name() == "COMPACTATTN") == NAMED
    assert AttentionBackendEnum[CompactAttentionBackend.get_name()].get_class() is CompactAttentionBackend


def test_a_name_that_another_plugin_took_is_left_to_it() -> None:
    other = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
    register_backend(AttentionBackendEnum.CUSTOM, other)
    try:
        register()
        assert AttentionBackendEnum.CUSTOM.get_path() == other
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()
        register()


@pytest.mark.parametrize("name", ["CUSTOM", *(["COMPACTATTN", "compactattn"] if NAMED else [])])
def test_the_command_line_takes_the_name_and_the_settings(name: str) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = [
        "--model",
        str(WEIGHTS),
        "--attention-backend",
        name,
        "--additional-config",
        '{"compactattn": {"alpha": 0.25}}',
    ]
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(given))
    assert arguments.additional_config == {"compactattn": {"alpha": 0.25}}
    config = make_config(attention_backend=arguments.attention_backend)
    assert config.attention_config.backend.get_class() is CompactAttentionBackend


@pytest.mark.skipif(not NAMED, reason="this vLLM has no names of plugins")
def test_a_spawned_process_reads_the_name_before_it_loads_plugins() -> None:
    sent = pickle.dumps(AttentionBackendEnum["COMPACTATTN"])
    program = f"import pickle; print(pickle.loads({sent!r}).get_path())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == PATH, done.stderr


# ---- what vLLM asks ----


def asked(**changes: Any) -> list[str]:
    plain = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
    }
    return CompactAttentionBackend.validate_configuration(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 112}, "head_size not supported (expected one of 64, 80, 96, 128, 192, 256, got 112)"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported (expected one of auto, float16, bfloat16, got fp8)"),
        ({"block_size": 8}, "block_size not supported (expected one of 16, 32, 64, 128, got 8)"),
        ({"block_size": 256}, "block_size not supported (expected one of 16, 32, 64, 128, got 256)"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"attn_type": "encoder"}, "attention type encoder not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
    ],
)
def test_configurations_that_cannot_run_are_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    assert asked() == []
    assert asked(**changes) == [reason]


def test_pages_are_one_kv_block_unless_the_user_says_otherwise() -> None:
    assert CompactAttentionBackend.get_preferred_block_size(16) == 128
    for block_size, preferred in ((64, 64), (128, 128), (256, 128)):
        with set_current_vllm_config(make_config({"block_size": block_size})):
            assert CompactAttentionBackend.get_preferred_block_size(16) == preferred
    assert CompactAttentionBackend.get_supported_kernel_block_sizes() == [16, 32, 64, 128]


# ---- layers ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_sliding_window": 512}, "sliding_window: expected none .*, got 512"),
        ({"logits_soft_cap": 50.0}, "logits_soft_cap: expected none .*, got 50.0"),
        ({"alibi_slopes": [0.5] * HEADS}, "alibi_slopes: expected none"),
        ({"sinks": torch.zeros(HEADS)}, "sinks: expected none .*, got Tensor"),
        ({"attn_type": "encoder_only"}, "attention type: expected decoder .*, got encoder_only"),
        ({"head_size": 112}, "head size: expected one of 64, .*, got 112"),
        ({"num_heads": 34}, "query heads of a rank: expected a multiple of the 2 KV heads, at most 16 for each"),
    ],
)
def test_layers_that_cannot_run_are_refused_when_they_are_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(make_config(), **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alhpa": 1}, r"additional_config\['compactattn'\]: expected settings among .*, got 'alhpa'"),
        ({"alpha": 2}, r"additional_config\['compactattn'\]: alpha: expected a number from 0 to 1, got 2"),
        ({"heads_per_group": 3}, "heads_per_group: expected a divisor of the 4 query heads per KV head, got 3"),
        ({"settings": "no/such"}, r"additional_config\['compactattn'\]: settings: no/such: expected a settings file"),
    ],
)
def test_settings_that_cannot_be_used_stop_the_first_layer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(make_config(options))


class OtherAttention(Attention):
    """vLLM has such classes for chunked local, cross and encoder attention, with batches of their own making."""


def test_builders_refuse_what_layers_cannot_know(tmp_path: Path) -> None:
    config = make_config()
    with pytest.raises(ValueError, match=r"layer model\.layers\.0.*: expected plain causal self-attention, got Other"):
        make_builder(config, [make_layer(config, kind=OtherAttention)], 16)
    path = str(tmp_path / "settings.json")
    save_settings(path, Settings(selector={6: FlashPrefill()}, heads_per_group=1, query_blocks_per_span=1))
    config = make_config({"settings": path})
    with pytest.raises(ValueError, match="layers of the settings file: expected numbers from 0 to 5, got 6"):
        make_builder(config, [make_layer(config)], 16)
    config = make_config({"block_size": 64})
    with pytest.raises(ValueError, match=r"KV cache block size: expected one of 16, 32, 64 .*, got 128"):
        make_builder(config, [make_layer(config)], 128)


def test_builders_refuse_blocks_that_vllm_splits_and_caches_of_another_dtype() -> None:
    from tests.serving import Scheduler
    from tests.vllm.layers import metadata

    scheduler = Scheduler(0, pages=9, page_size=16, budget=20, max_requests=1, longest=1024)
    scheduler.add([1] * 20, 1)
    common = metadata(scheduler.schedule())
    config = make_config()
    layer = make_layer(config)
    builder = make_builder(config, [layer], 16)
    layer.kv_cache = new_cache(8, 16, KVCacheLayout.LBNHC)
    config.cache_config.num_gpu_blocks = 4
    with pytest.raises(ValueError, match=r"KV cache block size .*: expected one that is not split"):
        builder.build(0, common)
    config.cache_config.num_gpu_blocks = 8
    layer.kv_cache = layer.kv_cache.half()
    with pytest.raises(ValueError, match=r"KV cache dtype: expected torch\.float32, as the model, got torch\.float16"):
        builder.build(0, common)
    layer.kv_cache = layer.kv_cache.float()
    builder.build(0, common)
    with pytest.raises(ValueError, match="causal: expected causal attention alone, got False"):
        builder.build(0, metadata(scheduler.schedule(), causal=False))


def test_builders_refuse_values_of_another_size_names_and_caches_before_there_is_a_cache() -> None:
    config = make_config()
    with pytest.raises(ValueError, match=f"head size of values: expected {DIM}, as that of keys, got 32"):
        make_builder(config, [make_layer(config, head_size_v=32)], 16)
    layer = make_layer(config)
    layer.kv_cache_torch_dtype = torch.float16
    with pytest.raises(ValueError, match=r"KV cache dtype: expected torch\.float32, as the model, got torch\.float16"):
        make_builder(config, [layer], 16)
    layer = make_layer(config)
    config.compilation_config.static_forward_context["model.attn"] = layer
    layer.layer_name = "model.attn"
    with pytest.raises(ValueError, match="layer name: expected one with one number in it"):
        make_builder(config, [layer], 16)


def test_settings_beside_the_plugins_object_are_refused() -> None:
    for given in ({"alpha": 0.9}, {"compactatn": {"alpha": 0.9}}):
        with pytest.raises(ValueError, match=r"additional_config: expected .* in an object 'compactattn', got"):
            settings_of(make_config(additional_config=given))
    assert settings_of(make_config(additional_config={"others": {}})).others == FlashPrefill(
        dense_keys=4096, dense_last_blocks=2
    )


@pytest.mark.parametrize(("dense_keys", "warns"), [(767, False), (768, True)])
def test_settings_that_leave_nothing_out_are_told(
    dense_keys: int, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compactattn.integrations import vllm as plugin

    told: list[Any] = []
    monkeypatch.setattr(plugin.logger, "warning", lambda *words: told.append(words))
    config = make_config({"dense_keys": dense_keys, "dense_last_blocks": 0})
    make_builder(config, [make_layer(config)], 16)
    assert [words[0] for words in told] == ["compactattn leaves nothing out: %s"] * warns


def test_decode_steps_can_be_captured_and_come_first() -> None:
    config = make_config()
    builder = make_builder(config, [make_layer(config)], 16)
    assert builder.get_cudagraph_support(config, builder.kv_cache_spec) == AttentionCGSupport.UNIFORM_BATCH
    assert builder.reorder_batch_threshold == 1
