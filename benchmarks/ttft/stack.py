"""A model of transformers whose KV cache and attention belong to the benchmark.

The cache is head-major, [B, Hkv, capacity, D] per layer, allocated once: transformers' own layout, in which the dense
baselines take keys and values as they are, and which compactattn sees as pages without a copy. Each chunk's keys and
values are copied into it, as an engine's cache write does, whatever the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from benchmarks.cases import Shape
from benchmarks.ttft.models import EXPERTS, ModelShape
from benchmarks.workloads import BLOCK
from compactattn import KVSummary, PagedKV, PrefillBatch, summarize

NAME = "compactattn-benchmark"

#: (layer, queries after RoPE [B, Hq, n, D]) -> output [B, n, Hq, D]; keys and values are in the stack's cache.
Attention = Callable[[int, Tensor], Tensor]


class Cache:
    """What the model is given as `past_key_values`; it writes a chunk's keys and values behind `past` tokens.

    Attributes:
        keys, values: per layer, [B, Hkv, capacity, D].
        past: tokens before the chunk, of every request; a host number, so a captured step belongs to one place.
    """

    def __init__(
        self, layers: int, shape: Shape, capacity: int, device: str | torch.device, dtype: torch.dtype
    ) -> None:
        size = (shape.batch, shape.kv_heads, capacity, shape.head_dim)
        self.keys = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(size, device=device, dtype=dtype) for _ in range(layers)]
        self.past = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [B, Hkv, n, D] of one layer; gives what that layer then holds."""
        end = self.past + key.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.past :].copy_(key)
        values[:, :, self.past :].copy_(value)
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens before the chunk: some versions of transformers ask."""
        return self.past

    def fill(self, value: float | None = None) -> None:
        """Standard normals everywhere, or one value."""
        for cache in (*self.keys, *self.values):
            if value is None:
                cache.normal_()
            else:
                cache.fill_(value)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of one step, of every request at the same place.

    Attributes:
        tokens: int64 [B, n].
        positions: int64 [1, n].
        past: tokens before them.
        batch: the same for compactattn.
    """

    tokens: Tensor
    positions: Tensor
    past: int
    batch: PrefillBatch

    @classmethod
    def of(cls, tokens: Tensor, past: int) -> Chunk:
        requests, length = tokens.shape
        positions = torch.arange(past, past + length, device=tokens.device)[None]
        batch = PrefillBatch.from_lens([length] * requests, [past + length] * requests, tokens.device)
        return cls(tokens, positions, past, batch)

    @property
    def context(self) -> int:
        return self.past + self.tokens.shape[1]


class Stack:
    """A model with random weights, its cache, and a forward pass of one chunk under any attention.

    Args:
        model: its shape, or a rank's part of it.
        batch: requests.
        capacity: tokens that the cache holds of each, a multiple of the page size.
        device, dtype: of weights and cache.
        experts: which implementation of the experts of transformers.
    """

    def __init__(
        self,
        model: ModelShape,
        batch: int,
        capacity: int,
        device: str | torch.device,
        dtype: torch.dtype,
        *,
        experts: str = EXPERTS,
    ) -> None:
        if capacity % BLOCK:
            raise ValueError(f"capacity: expected a multiple of {BLOCK}, the page size, got {capacity}")
        self.shape, self.heads, self.device, self.dtype = model, model.heads(batch), torch.device(device), dtype
        self.model = model.build(NAME, device, dtype, experts=experts)
        self.cache = Cache(model.layers, self.heads, capacity, device, dtype)

    @torch.no_grad()
    def forward(self, chunk: Chunk, attention: Attention, *, every_token: bool = False) -> Tensor:
        """Logits of each request's last token, [B, 1, vocab], or of every token; the chunk is in the cache then."""
        self.cache.past = chunk.past
        return self.model(
            input_ids=chunk.tokens,
            position_ids=chunk.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if every_token else 1,
            attention_of_stack=attention,
        ).logits

    def random_chunk(self, past: int, length: int) -> Chunk:
        """Random tokens at a place, the same ones every time."""
        generator = torch.Generator().manual_seed(past + 1)
        tokens = torch.randint(self.shape.vocab, (self.heads.batch, length), generator=generator)
        return Chunk.of(tokens.to(self.device), past)

    def paged(self, context: int) -> list[PagedKV]:
        """The first `context` tokens of each layer's cache as pages of `BLOCK` tokens, in place."""
        whole = -(-context // BLOCK) * BLOCK
        pairs = zip(self.cache.keys, self.cache.values, strict=True)
        return [
            PagedKV.from_contiguous(k[:, :, :whole].transpose(1, 2), v[:, :, :whole].transpose(1, 2), BLOCK)
            for k, v in pairs
        ]

    def summaries(self, paged: list[PagedKV], batch: PrefillBatch) -> list[KVSummary]:
        """The block means of each layer's cache before a step, which brings them up to date itself."""
        return [summarize(kv, batch, block_size=BLOCK) for kv in paged]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    attention_of_stack: Attention,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hand the queries of a layer to the stack's attention; its keys and values are in the cache by now."""
    if attention_mask is not None or scaling != query.shape[-1] ** -0.5:
        got = f"a mask: {attention_mask is not None}, scale {scaling}"
        raise ValueError(f"attention: expected no mask and the scale D^-0.5, got {got}")
    return attention_of_stack(int(module.layer_idx), query), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
