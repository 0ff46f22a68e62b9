"""vLLM's attention layers, metadata builder and caches, as its model runners make them, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.vllm.cpu import use_cpu

use_cpu()

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from compactattn.integrations.vllm import CompactAttentionBackend, CompactAttentionMetadataBuilder  # noqa: E402
from tests.serving import Batch  # noqa: E402
from tests.speaking import WEIGHTS  # noqa: E402

KV_HEADS, HEADS, DIM, NUM_LAYERS = 2, 8, 64, 6  # of the test bed's model
names = (f"model.layers.{{}}.run{n}" for n in itertools.count())


def engine_arguments(options: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Of an engine that runs the test bed's model; `options` are compactattn's settings."""
    plain = {
        "model": str(WEIGHTS),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 768,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 12,
        "block_size": 16,
        "seed": 0,
        "additional_config": {} if options is None else {"compactattn": options},
        "compilation_config": {"custom_ops": ["none"]},
    }
    return plain | changes


def make_config(options: dict[str, Any] | None = None, **changes: Any) -> VllmConfig:
    return EngineArgs(**engine_arguments(options, **changes)).create_engine_config()


def make_layer(config: VllmConfig, number: int = 0, kind: type[Attention] = Attention, **changes: Any) -> Attention:
    """An attention layer of the test bed's shape, with this plugin's backend."""
    shape = {"num_heads": HEADS, "head_size": DIM, "scale": DIM**-0.5, "num_kv_heads": KV_HEADS}
    with set_current_vllm_config(config), default_dtype(torch.float32):
        name = next(names).format(number).replace(".run", ".attn_")
        backend = {"attn_backend": CompactAttentionBackend}
        return kind(**(shape | backend | changes), cache_config=config.cache_config, prefix=name)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def new_cache(pages: int, page_size: int, layout: KVCacheLayout) -> Tensor:
    """The logical view [num_blocks, Hkv, block_size, 2 D] of one of two layers' caches, NaN, in a physical layout."""
    shape = (2, pages, KV_HEADS, page_size, 2 * DIM)
    order = layout.stride_order
    physical = torch.full([shape[i] for i in order], float("nan"))
    return physical.permute(*[order.index(i) for i in range(5)])[1]


def make_builder(config: VllmConfig, layers: list[Attention], page_size: int) -> CompactAttentionMetadataBuilder:
    spec = layers[0].get_kv_cache_spec(config).copy_with_new_block_size(page_size)
    return CompactAttentionMetadataBuilder(spec, [layer.layer_name for layer in layers], config, torch.device("cpu"))


def metadata(batch: Batch, *, padding: int = 0, bounds: list[int] | None = None, **changes: Any) -> Any:
    """What a model runner makes of a batch, with `padding` requests and tokens at its end."""
    starts = [sum(batch.q_lens[:b]) for b in range(len(batch.q_lens) + 1)] + [sum(batch.q_lens)] * padding
    seq_lens = batch.seq_lens + [0] * padding
    table = torch.nn.functional.pad(batch.page_table, (0, 0, 0, padding))
    starts_cpu = torch.tensor(starts, dtype=torch.int32)
    fields = {
        "query_start_loc": starts_cpu.clone(),
        "query_start_loc_cpu": starts_cpu,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "num_reqs": len(seq_lens),
        "num_actual_tokens": starts[-1],
        "max_query_len": max(batch.q_lens),
        "max_seq_len": max(bounds or seq_lens),
        "block_table_tensor": table,
        "slot_mapping": batch.slots,
        "seq_lens_cpu_upper_bound": None if bounds is None else torch.tensor(bounds + [0] * padding),
    }
    return CommonAttentionMetadata(**(fields | changes))
