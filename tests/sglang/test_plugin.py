"""The plugin's registration, settings and refusals, through SGLang's own loader, command line and classes."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; tests/sglang/run installs what these tests need")

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import sglang.srt.plugins
import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, ServerArgs, prepare_server_args

from compactattn import FlashPrefill
from compactattn.integrations.sglang import ARGUMENTS, CompactAttentionBackend, register, settings_of
from compactattn.settings import Settings, save_settings
from tests.serving import Batch
from tests.sglang.layers import DIM, HEADS, WEIGHTS, forward_batch, make_layer, make_pool, make_runner, new_backend

STEP = "handle_attention_backend_compatibility"


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    sglang.srt.plugins.load_plugins()


def arguments(*given: str, options: dict[str, Any] | None = None, backend: str = "--attention-backend") -> ServerArgs:
    """What a command line gives."""
    plain = ["--model-path", str(WEIGHTS), "--device", "cpu", "--skip-tokenizer-init", backend, "compactattn"]
    settings = [] if options is None else ["--json-model-override-args", json.dumps({"compactattn": options})]
    return prepare_server_args([*plain, *settings, *given])


def resolved(*given: str, **named: Any) -> Any:
    server_args = arguments(*given, **named)
    server_args.resolve_once()
    return resolved_view(server_args)


def test_sglang_finds_the_plugin_by_itself_and_once() -> None:
    assert [point.value for point in entry_points(group="sglang.srt.plugins", name="compactattn")] == [
        "compactattn.integrations.sglang:register"
    ]
    register()
    assert ATTENTION_BACKENDS["compactattn"] is CompactAttentionBackend
    assert ATTENTION_BACKEND_CHOICES.count("compactattn") == 1
    assert len(_HOOKS[STEP]) == 1


def test_the_command_line_takes_the_name_and_the_settings() -> None:
    server_args = arguments(options={"alpha": 0.25, "dense_layers": 2})
    settings = settings_of(server_args)
    assert (settings.others, settings.dense_layers) == (FlashPrefill(0.25, dense_keys=4096, dense_last_blocks=2), 2)
    assert settings_of(arguments()).others == FlashPrefill(dense_keys=4096, dense_last_blocks=2)


@pytest.mark.parametrize("backend", ["--attention-backend", "--prefill-attention-backend"])
@pytest.mark.parametrize(
    ("given", "options", "page_size"),
    [
        ((), {}, 128),
        ((), {"block_size": 64}, 64),
        ((), {"block_size": 256}, 128),
        (("--page-size", "16"), {}, 16),
        (("--page-size", "256"), {"block_size": 256}, 256),
    ],
)
def test_pages_are_one_kv_block_unless_the_user_says_otherwise(
    backend: str, given: tuple[str, ...], options: dict[str, Any], page_size: int
) -> None:
    assert resolved(*given, options=options, backend=backend).page_size == page_size


def test_other_backends_keep_their_page_size() -> None:
    server_args = ServerArgs(model_path=str(WEIGHTS), device="cpu", attention_backend="torch_native")
    server_args.json_model_override_args = json.dumps({"compactattn": {"alpha": 7}})
    server_args.resolve_once()
    assert resolved_view(server_args).page_size == 1


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (("--page-size", "1"), {}, "--page-size: expected one of 16, 32, 64, 128 (for block_size 128), got 1"),
        (("--page-size", "128"), {"block_size": 64}, "--page-size: expected one of 16, 32, 64 (for block_size 64)"),
        ((), {"alhpa": 1}, "--json-model-override-args: compactattn: expected settings among "),
        ((), {"alpha": 2}, "--json-model-override-args: compactattn: alpha: expected a number from 0 to 1, got 2"),
        (
            (),
            {"settings": "no/such"},
            "--json-model-override-args: compactattn: settings: no/such: expected a ",
        ),
        (("--kv-cache-dtype", "fp8_e4m3"), {}, "--kv-cache-dtype: expected auto or bf16 or bfloat16 with "),
        (("--enable-hierarchical-cache",), {}, "--enable-hierarchical-cache: expected False with "),
        (("--enable-lmcache",), {}, "--enable-lmcache: expected False with "),
        (("--disaggregation-mode", "prefill"), {}, "--disaggregation-mode: expected null with "),
        (("--tp-size", "2", "--attn-dp-size", "2"), {}, "--attn-dp-size: expected 1 with "),
        (("--enable-two-batch-overlap",), {}, "--enable-two-batch-overlap: expected False with "),
        (("--speculative-algorithm", "NGRAM"), {}, "--speculative-algorithm: expected None with "),
        (("--cuda-graph-backend-prefill", "full"), {}, "--cuda-graph-backend-prefill: expected breakable or disabled"),
        (
            ("--prefill-attention-backend", "triton"),
            {},
            "--decode-attention-backend: expected another backend beside --prefill-attention-backend triton "
            "(compactattn decodes what it prefills), got compactattn",
        ),
        (
            ("--decode-attention-backend", "torch_native"),
            {"correction": True},
            "correction: expected false beside another decode backend (torch_native), got True",
        ),
    ],
)
def test_arguments_that_cannot_run_stop_the_server(
    given: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolved(*given, options=options)


def test_arguments_that_are_checked_exist_and_have_valid_defaults() -> None:
    view = resolved()
    for name, valid in ARGUMENTS.items():
        assert getattr(view, name) in valid, name


@pytest.mark.parametrize("text", ["[1]", '{"compactattn": [1]}'])
def test_settings_are_a_json_object(text: str) -> None:
    with pytest.raises(ValueError, match=r"--json-model-override-args: .*expected a JSON object"):
        settings_of(ServerArgs(model_path="x", json_model_override_args=text))
    with pytest.raises(ValueError, match=r"--json-model-override-args: expected a JSON object, got '\{'"):
        settings_of(ServerArgs(model_path="x", json_model_override_args="{"))


# ---- layers ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window_size": 512}, "sliding_window: expected none .*, got 512"),
        ({"sliding_window_size": 0}, None),  # SGLang's word for none
        ({"logit_cap": 50.0}, "logits_soft_cap: expected none .*, got 50.0"),
        ({"use_irope": True}, "use_irope: expected none .*, got True"),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode: expected none .*, got 'ALIBI'"),
        ({"is_cross_attention": True}, "attention type: expected decoder .*, got cross"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type: expected decoder .*, got encoder_only"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "attention type: .*, got decoder_bidirectional"),
        ({"head_dim": 112}, "head size: expected one of 64, .*, got 112"),
        ({"v_head_dim": 32}, "head size of values: expected 64, as that of keys, got 32"),
        ({"num_heads": 34}, "query heads of a rank: expected a multiple of the 2 KV heads, at most 16 for each"),
    ],
)
def test_layers_that_cannot_run_are_refused_at_start_up(changes: dict[str, Any], message: str | None) -> None:
    runner = make_runner(layers=[make_layer(0), make_layer(1, **changes)])
    if message is None:
        new_backend(runner)
        return
    with pytest.raises(ValueError, match=message):
        new_backend(runner)


def test_temperatures_and_shared_caches_are_refused_at_start_up() -> None:
    layer = make_layer(1)
    layer.xai_temperature_len = 1024
    with pytest.raises(ValueError, match=r"xai_temperature_len: expected none .*, got 1024"):
        new_backend(make_runner(layers=[layer]))
    with pytest.raises(ValueError, match=r"kv_sharing_target_layer_name: expected none .*, got '1'"):
        new_backend(make_runner(layers=[make_layer(3), make_layer(3)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float8_e4m3fn}, r"KV cache dtype: expected torch\.float32, as the model, got torch\.float8"),
        ({"dtype": torch.float16}, r"KV cache dtype: expected torch\.float32, as the model, got torch\.float16"),
        ({"v_head_dim": 32}, "head size of values: expected 64, as that of keys, got 32"),
    ],
)
def test_caches_that_cannot_be_read_are_refused_at_start_up(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_backend(make_runner(pool=make_pool(8, 16, **changes)))


def test_pools_of_another_class_are_refused_at_start_up() -> None:
    shape = {"dtype": torch.float32, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "layer_num": 1, "device": "cpu"}
    pool = MLATokenToKVPool(size=64, page_size=16, **shape, enable_memory_saver=False)
    with pytest.raises(ValueError, match=r"KV cache: expected MHATokenToKVPool .*, got MLATokenToKVPool"):
        new_backend(make_runner(pool=pool))

    class Other(MHATokenToKVPool):
        """May hold its pages in any other way."""

    other = make_pool(8, 16)
    other.__class__ = Other
    with pytest.raises(ValueError, match=r"KV cache: expected MHATokenToKVPool .*, got Other"):
        new_backend(make_runner(pool=other))


def test_runners_that_cannot_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speculative decoding: expected none, got a draft model"):
        new_backend(make_runner(is_draft_worker=True))
    with pytest.raises(ValueError, match=r"KV cache block size: expected one of 16, 32, 64, 128 .*, got 8"):
        new_backend(make_runner(pool=make_pool(8, 8)))
    with pytest.raises(ValueError, match="heads_per_group: expected a divisor of the 4 query heads per KV head, got 3"):
        new_backend(make_runner({"heads_per_group": 3}))
    with pytest.raises(ValueError, match=r"correction: expected false beside another decode backend \(triton\)"):
        new_backend(make_runner({"correction": True}, decode_attention_backend_str="triton"))
    path = str(tmp_path / "settings.json")
    save_settings(path, Settings(selector={6: FlashPrefill()}, heads_per_group=1, query_blocks_per_span=1))
    with pytest.raises(ValueError, match="layers of the settings file: expected numbers from 0 to 5, got 6"):
        new_backend(make_runner({"settings": path}))


# ---- steps ----


def one_step(q_len: int = 20, mode: ForwardMode | None = None) -> Any:
    made = forward_batch(
        Batch([], [q_len], [20], torch.zeros(0), torch.arange(16, 16 + q_len)), torch.ones(1, dtype=torch.int64)
    )
    made.forward_mode = made.forward_mode if mode is None else mode
    return made


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2", "DLLM_EXTEND"])
def test_steps_with_masks_of_their_own_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"forward mode: expected EXTEND, MIXED or DECODE .*, got {mode}"):
        new_backend(make_runner()).init_forward_metadata(one_step(mode=ForwardMode[mode]))


def test_steps_that_a_backend_cannot_plan_are_refused() -> None:
    backend = new_backend(make_runner(requests=2))
    made = one_step()
    made.encoder_lens = torch.ones(1)
    with pytest.raises(ValueError, match=r"encoder_lens: expected none \(no cross attention\)"):
        backend.init_forward_metadata(made)
    made = one_step()
    made.batch_size = 3
    with pytest.raises(ValueError, match="requests of a step: expected at most 2, got 3"):
        backend.init_forward_metadata(made)
    made = one_step()
    made.extend_seq_lens_cpu = None
    with pytest.raises(ValueError, match="extend_seq_lens_cpu, extend_prefix_lens_cpu: expected the host's lengths"):
        backend.init_forward_metadata(made)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"sinks": torch.zeros(HEADS)}, "sinks: expected none .*, got Tensor"),
        ({"return_lse": True}, "return_lse: expected none .*, got True"),
        ({"rel_bias": torch.zeros(20)}, r"rel_bias: expected none \(unknown here\), got Tensor"),
        ({"sinks": None, "return_lse": False}, None),
    ],
)
def test_what_a_layer_asks_for_beyond_plain_attention_is_refused(named: dict[str, Any], message: str | None) -> None:
    layer = make_layer()
    backend = new_backend(make_runner(layers=[layer]))
    made, tokens = one_step(), torch.zeros(20, 2 * DIM)
    backend.init_forward_metadata(made)
    with forward_context(ForwardContext(attn_backend=backend)):
        if message is None:
            layer(torch.zeros(20, HEADS * DIM), tokens, tokens, made, **named)
            return
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(20, HEADS * DIM), tokens, tokens, made, **named)


def test_layers_and_steps_that_were_not_made_ready_are_refused() -> None:
    backend, made, tokens = new_backend(make_runner()), one_step(), torch.zeros(20, 2 * DIM)
    with forward_context(ForwardContext(attn_backend=backend)):
        with pytest.raises(ValueError, match=r"layer: expected an attention layer that the model had .*, got 0"):
            make_layer()(torch.zeros(20, HEADS * DIM), tokens, tokens, made)
        with pytest.raises(ValueError, match=r"forward_metadata: expected a planned step .*, got None"):
            backend._layers[0](torch.zeros(20, HEADS * DIM), tokens, tokens, made)
