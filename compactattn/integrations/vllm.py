"""Run vLLM's models on compactattn (extra `vllm`, vLLM 0.31 to 0.33).

    pip install '.[vllm]'  # in a checkout
    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"compactattn": {"alpha": 0.18}}'

`register` is an entry point of `vllm.general_plugins`: vLLM calls it in each of its processes. The settings are those
of `compactattn.integrations.engine_settings`; docs/vllm.md says what they do. What a model asks for that this plugin
does not do is refused when its layers are made, by name.

What runs where: decode and speculative rows and contexts of at most `dense_keys` tokens attend to every block, exactly;
other chunks of a prompt run `prefill`. Decode steps can be captured in CUDA graphs (`UNIFORM_BATCH`). Heads are those
of the rank.

Facts about vLLM that this file relies on: a layer's cache is a view [num_blocks, Hkv, block_size, 2 D] with K before V
and strides by layout; new keys and values are written by `do_kv_cache_update`, for all requests, before `forward`;
`build` runs in every step, outside of captured graphs, on buffers that graphs may read; rows of few queries come first;
`forward` without metadata is a profiling run; padding requests have no queries and no keys. A block that is handed out
again is filled by the steps of its new owner. With KV connectors, which fill blocks on their own, that would not hold,
so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from compactattn.integrations.engine_settings import (
    EngineSettings,
    check_dtypes,
    check_layer,
    layer_number,
    own_object,
    page_sizes,
    parse_settings,
)
from compactattn.integrations.engine_steps import LayerPlan, Step, StepPlanner, write_slots
from compactattn.validation import HEAD_DIMS, fail

try:
    from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
    from vllm.logger import init_logger
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
except ImportError as error:
    needed = "compactattn.integrations.vllm needs vLLM 0.31 to 0.33, the extra `vllm`: pip install '.[vllm]'"
    raise ImportError(needed) from error

NAME = "COMPACTATTN"
KEY = "compactattn"  # of the object in --additional-config
PREFERRED_BLOCK = 128  # tokens: a page of one KV block, whose summary takes under 1 % of the cache

logger = init_logger("vllm.compactattn")  # vLLM prints what its own loggers say


def register() -> None:
    """Make the backend known to this process, as CUSTOM and, where vLLM can add names (0.32), as COMPACTATTN.

    Does nothing the second time, and leaves CUSTOM alone where another plugin has taken it.
    """
    path = f"{__name__}.{CompactAttentionBackend.__qualname__}"
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, path)
    elif custom.get_path() != path:
        logger.warning("the attention backend CUSTOM is taken by %s; compactattn is not CUSTOM", custom.get_path())
    if hasattr(AttentionBackendEnum, "register") and NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, path)
        # A process that vLLM spawns unpickles its configuration before it loads plugins, and would not know the name.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: (_member, ())


def _member() -> AttentionBackendEnum:
    register()
    return AttentionBackendEnum[NAME]


def settings_of(config: VllmConfig) -> EngineSettings:
    """The plugin's settings in a vLLM configuration."""
    additional = config.additional_config
    if not isinstance(additional, Mapping):
        raise fail("additional_config", f"a JSON object with an object {KEY!r}", type(additional).__name__)
    return parse_settings(own_object(additional, KEY, "additional_config"), f"additional_config[{KEY!r}]")


class CompactAttentionBackend(AttentionBackend):
    """What vLLM asks an attention backend before it builds a model."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return NAME if NAME in AttentionBackendEnum.__members__ else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CompactAttentionImpl]:
        return CompactAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompactAttentionMetadataBuilder]:
        return CompactAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return page_sizes(PREFERRED_BLOCK)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        config = get_current_vllm_config_or_none()
        return PREFERRED_BLOCK if config is None else min(PREFERRED_BLOCK, settings_of(config).dense.block_size)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Of the user's --block-size: one that vLLM need not split."""
        return block_size is None or block_size in page_sizes(PREFERRED_BLOCK)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """vLLM's own reasons why this backend cannot run a layer, each with what would be valid."""
        valid = {
            "head_size": HEAD_DIMS,
            "dtype": cls.supported_dtypes,
            "kv_cache_dtype": cls.supported_kv_cache_dtypes,
            "block_size": page_sizes(PREFERRED_BLOCK),
        }
        reasons = []
        for reason in super().validate_configuration(**asked):
            name = reason.removesuffix(" not supported")
            if name in valid:
                reason += f" (expected one of {', '.join(map(str, valid[name]))}, got {asked[name]})"
            reasons.append(reason)
        return reasons


class CompactAttentionMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Plans each step once for a group of layers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        for layer in self._layers:
            if type(layer).__name__ != "Attention":
                raise fail(f"layer {layer.layer_name}", "plain causal self-attention", type(layer).__name__)
            layer.impl.check(layer)
        settings, model = settings_of(vllm_config), vllm_config.model_config
        self._num_layers = model.get_total_num_hidden_layers()
        settings.check_model(num_layers=self._num_layers, page_size=kv_cache_spec.block_size)
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._settings = settings
        chunk = vllm_config.scheduler_config.max_num_batched_tokens
        if (reason := settings.why_all_dense(chunk=chunk, longest=model.max_model_len)) is not None:
            logger.warning("compactattn leaves nothing out: %s", reason)
        self._planner = StepPlanner(
            settings,
            max_requests=max(vllm_config.scheduler_config.max_num_seqs, captured),
            max_seq_len=model.max_model_len,
            page_size=kv_cache_spec.block_size,
            dense_queries=self.reorder_batch_threshold or 1,
            heads=sorted({layer.num_heads for layer in self._layers}),
            device=device,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise fail("causal", "causal attention alone", batch.causal)
        if not self._layers[0].impl.is_bound(self._layers[0].kv_cache):
            self._bind()
        host_seq_lens = batch.seq_lens_cpu_upper_bound
        return self._planner.plan(
            query_starts=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            page_table=batch.block_table_tensor,
            host_starts=batch.query_start_loc_cpu.tolist(),
            host_seq_lens=None if host_seq_lens is None else host_seq_lens.tolist(),
            max_seq_len=batch.max_seq_len,
        )

    def _bind(self) -> None:
        """Make the layers ready for their caches, before their first step and after vLLM has replaced the caches.

        `build` calls this, and so never a CUDA graph capture, where summaries could not be allocated.
        """
        pages, _, page_size, _ = self._layers[0].kv_cache.shape
        blocks = self.vllm_config.cache_config.num_gpu_blocks
        if page_size != self._planner.page_size or (blocks is not None and pages != blocks):
            expected = "one that is not split, of " + ", ".join(map(str, page_sizes(PREFERRED_BLOCK)))
            raise fail("KV cache block size (--block-size)", expected, f"blocks split into {page_size} tokens")
        summary_bytes = sum(layer.impl.bind(layer, self._settings, self._num_layers) for layer in self._layers)
        logger.info("compactattn runs with %s; %.0f MiB of key means", self._settings, summary_bytes / 2**20)


class CompactAttentionImpl(AttentionImpl[Step]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        context_parallel = self.dcp_world_size * self.pcp_world_size
        asked = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            "context parallelism": context_parallel if context_parallel > 1 else None,
            **others,
        }
        check_layer(
            heads=num_heads,
            kv_heads=self.num_kv_heads,
            head_size=head_size,
            attention_type=str(AttentionType(attn_type).value),
            cache_dtype=kv_cache_dtype,
            settings=settings_of(get_current_vllm_config()),
            others=asked,
        )
        self._plan: LayerPlan | None = None
        self._summaries = WeakTensorKeyDictionary()  # freed with the cache

    def is_bound(self, kv_cache: Tensor) -> bool:
        return kv_cache in self._summaries

    def check(self, layer: Any) -> None:
        """Refuse a layer whose values, cache or name this plugin does not know, before there is a cache."""
        if layer.head_size_v != self.head_size:
            raise fail("head size of values", f"{self.head_size}, as that of keys", layer.head_size_v)
        check_dtypes(layer.dtype, layer.kv_cache_torch_dtype)
        layer_number(layer.layer_name)

    def bind(self, layer: Any, settings: EngineSettings, num_layers: int) -> int:
        """Make room for the key means of the layer's cache; returns their bytes. Layers of a draft model are dense."""
        check_dtypes(layer.dtype, layer.kv_cache.dtype)
        number = layer_number(layer.layer_name)
        drafts = layer.is_draft_layer or number >= num_layers
        self._plan = LayerPlan(settings.dense if drafts else settings.of_layer(number), settings, self.scale)
        summary = self._plan.new_summary(self._split(layer.kv_cache)[0])
        self._summaries[layer.kv_cache] = summary
        return 0 if summary is None else summary.nbytes

    def _split(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a cache [num_blocks, Hkv, block_size, 2 D], each [num_blocks, block_size, Hkv, D]."""
        keys_and_values = kv_cache.transpose(1, 2)
        return keys_and_values[..., : self.head_size], keys_and_values[..., self.head_size :]

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the step's keys and values into the cache, by slot; vLLM calls this before `forward`."""
        k, v = self._split(kv_cache)
        if not kv_cache.is_cuda:
            write_slots(key, value, k, v, slot_mapping)
            return
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

        scales = (layer._k_scale, layer._v_scale)  # of quantised caches; not read for others
        triton_reshape_and_cache_flash(key, value, k, v, slot_mapping, self.kv_cache_dtype, *scales)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query and output [T, Hq, D]; rows of padding are left as they are."""
        if output_scale is not None or output_block_scale is not None:
            raise fail("output_scale", "none (no quantised output)", "a scale")
        if attn_metadata is None:  # a profiling run
            return output.fill_(0)
        assert self._plan is not None, "the metadata builder binds every layer before its first step"
        k, v = self._split(kv_cache)
        self._plan.run(query, k, v, attn_metadata, self._summaries[kv_cache], output)
        return output
