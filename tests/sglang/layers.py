"""SGLang's attention layers, pools and batches, as its model runner and scheduler make them, without a model."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.server_args import ServerArgs
from torch import Tensor, nn

from compactattn.integrations.sglang import CompactAttentionBackend
from tests.serving import Batch, Request
from tests.speaking import WEIGHTS

KV_HEADS, HEADS, DIM, NUM_LAYERS = 2, 8, 64, 6  # of the test bed's model


def make_layer(number: int = 0, **changes: Any) -> RadixAttention:
    """An attention layer of the test bed's shape."""
    shape = {"num_heads": HEADS, "head_dim": DIM, "scaling": DIM**-0.5, "num_kv_heads": KV_HEADS}
    return RadixAttention(**(shape | changes), layer_id=number)


def make_pool(pages: int, page_size: int, layout: str = "nhd", **changes: Any) -> MHATokenToKVPool:
    """A cache of so many pages, page 0 included, filled with NaN."""
    shape = {"dtype": torch.float32, "head_num": KV_HEADS, "head_dim": DIM, "layer_num": NUM_LAYERS, "device": "cpu"}
    size = {"size": (pages - 1) * page_size, "page_size": page_size}
    with envs.SGLANG_USE_HND_KVCACHE.override(True) if layout == "hnd" else nullcontext():
        pool = MHATokenToKVPool(**(size | shape | changes), enable_memory_saver=False)
    assert pool.kv_cache_layout == layout
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
    return pool


def make_arguments(options: dict[str, Any] | None = None, **changes: Any) -> ServerArgs:
    """Of a server that runs the test bed's model; `options` are compactattn's settings."""
    overrides = json.dumps({} if options is None else {"compactattn": options})
    plain = {"model_path": str(WEIGHTS), "attention_backend": "compactattn", "json_model_override_args": overrides}
    return ServerArgs(**(plain | {"device": "cpu", "skip_tokenizer_init": True} | changes))


def make_runner(
    options: dict[str, Any] | None = None,
    *,
    pool: MHATokenToKVPool | None = None,
    layers: list[RadixAttention] | None = None,
    requests: int = 12,
    longest: int = 1024,
    **changes: Any,
) -> Any:
    """What a backend reads of a model runner."""
    plain = {
        "req_to_token_pool": ReqToTokenPool(requests, longest, "cpu", enable_memory_saver=False),
        "token_to_kv_pool": make_pool(8, 16) if pool is None else pool,
        "kv_index_translator": None,
        "server_args": make_arguments(options),
        "prefill_attention_backend_str": "compactattn",
        "decode_attention_backend_str": "compactattn",
        "is_draft_worker": False,
        "dtype": torch.float32,
        "kv_cache_dtype": torch.float32,
        "device": "cpu",
        "model": nn.ModuleList([make_layer()] if layers is None else layers),
        "model_config": SimpleNamespace(num_hidden_layers=NUM_LAYERS, context_len=longest),
    }
    return SimpleNamespace(**(plain | changes))


class Rows:
    """Rows of the request pool: taken when a request first runs, given back when it ends or is preempted, never
    wiped, as SGLang's scheduler leaves them."""

    def __init__(self, pool: ReqToTokenPool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.of: dict[int, int] = {}

    def keep(self, running: list[Request]) -> None:
        alive = {id(request) for request in running}
        for key in [key for key in self.of if key not in alive]:
            self.pool.free_rows([self.of.pop(key)])

    def write(self, batch: Batch) -> Tensor:
        """Write each request's slots up to its length; returns the rows, int64 [B]."""
        for request, seq_len in zip(batch.requests, batch.seq_lens, strict=True):
            if id(request) not in self.of:
                taken = self.pool.alloc_rows(1)
                assert taken is not None
                (self.of[id(request)],) = taken
            place = torch.arange(seq_len)
            pages = torch.tensor(request.pages)
            slots = pages[place // self.page_size] * self.page_size + place % self.page_size
            self.pool.write((self.of[id(request)], slice(0, seq_len)), slots.to(torch.int32))
        return torch.tensor([self.of[id(request)] for request in batch.requests], dtype=torch.int64)


def chunks_first(batch: Batch) -> Batch:
    """The same step in SGLang's order: chunks before decode rows."""
    order = sorted(range(len(batch.q_lens)), key=lambda b: -batch.q_lens[b])
    slots = batch.slots.split(batch.q_lens)
    return Batch(
        [batch.requests[b] for b in order],
        [batch.q_lens[b] for b in order],
        [batch.seq_lens[b] for b in order],
        batch.page_table[order],
        torch.cat([slots[b] for b in order]),
    )


def forward_batch(batch: Batch, rows: Tensor, *, padding: int = 0) -> ForwardBatch:
    """What SGLang makes of a step: a decode step if every request has one token, else chunks with decode rows."""
    decodes = max(batch.q_lens) == 1 and min(batch.seq_lens) > 1
    mode = ForwardMode.DECODE if decodes else ForwardMode.MIXED if batch.q_lens[-1] == 1 else ForwardMode.EXTEND
    tokens = sum(batch.q_lens)
    made = ForwardBatch(
        forward_mode=mode,
        batch_size=len(batch.q_lens),
        input_ids=torch.zeros(tokens + padding, dtype=torch.int64),
        req_pool_indices=rows,
        seq_lens=torch.tensor(batch.seq_lens, dtype=torch.int64),
        out_cache_loc=torch.cat([batch.slots, torch.zeros(padding, dtype=torch.int64)]),
        seq_lens_sum=sum(batch.seq_lens),
        positions=torch.zeros(tokens + padding, dtype=torch.int64),
        global_num_token_non_padded_cpu=tokens,
    )
    if not decodes:
        past = [n - q_len for n, q_len in zip(batch.seq_lens, batch.q_lens, strict=True)]
        made.extend_seq_lens = torch.tensor(batch.q_lens, dtype=torch.int32)
        made.extend_prefix_lens = torch.tensor(past, dtype=torch.int32)
        made.extend_seq_lens_cpu, made.extend_prefix_lens_cpu = list(batch.q_lens), past
    return made


def new_tokens(batch: Batch, keys: list[Tensor]) -> Tensor:
    """Of every request's keys or values, those of this step, [T, Hkv, D]."""
    return torch.cat([x[n - q_len :] for x, q_len, n in zip(keys, batch.q_lens, batch.seq_lens, strict=True)])


def run_layer(
    backend: Any, layer: RadixAttention, made: ForwardBatch, q: Tensor, k: Tensor, v: Tensor, seen: Counter[str]
) -> Tensor:
    """As SGLang runs a step of one layer: metadata first, then the layer itself; padding in q, k and v is NaN."""
    tokens = len(q)
    padding = len(made.input_ids) - tokens
    q, k, v = (
        torch.cat([x.flatten(1), torch.full((padding, x[0].numel()), float("nan"))]) for x in (q, k, v)
    )  # fmt: skip
    seen[made.forward_mode.name] += 1
    with forward_context(ForwardContext(attn_backend=backend)):
        backend.init_forward_metadata(made)
        out = layer(q, k, v, made)
    assert out.shape == q.shape
    assert not out[tokens:].any(), "padding comes back 0"
    return out[:tokens].view(tokens, HEADS, DIM)


def new_backend(runner: Any) -> CompactAttentionBackend:
    return CompactAttentionBackend(runner)
