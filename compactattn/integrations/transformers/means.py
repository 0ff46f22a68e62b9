"""Key means, bounds, value means and gate keys, kept beside a cache's layers, extended by each chunk, freed with it."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from compactattn.data import GateKeys, KVSummary, PagedKV
from compactattn.integrations.transformers.steps import NAME, Chunk
from compactattn.selectors import KeyBounds, SeerGate, Selector
from compactattn.summary import summarize

_local = threading.local()


@dataclass(eq=False)
class _Pooled:
    """The key means of one cache layer, and what the layer looked like when they were made.

    Attributes:
        keys, version: the layer's tensor of keys, and how often it had been written to (None: torch does not count).
        seen: tokens in the layer then, padding included; the first `pooled` of them are in `summary`.
        pads: left padding of each request.
        gate: the selector that `summary` has gate keys for.
        page_table: int32 [B, pages], where `summary` has the pages of each request.
        layout: shapes and strides; equal ones have equal page ids.
    """

    keys: weakref.ref[Tensor]
    version: int | None
    seen: int
    pooled: int
    pads: tuple[int, ...]
    gate: SeerGate | None
    page_table: Tensor
    layout: tuple[object, ...]
    summary: KVSummary

    def look(self, keys: Tensor, seen: int) -> None:
        self.keys, self.version, self.seen = weakref.ref(keys), _version(keys), seen

    def holds(self, keys: object) -> bool:
        """Whether nobody replaced the layer's keys, or wrote to them, since the last look."""
        return isinstance(keys, Tensor) and self.keys() is keys and self.version == _version(keys)


_pooled: weakref.WeakKeyDictionary[Any, _Pooled] = weakref.WeakKeyDictionary()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def watch(module: torch.nn.Module) -> None:
    """Have an attention module tell which cache it is called with: attention functions are not given it."""
    if all(hook is not _before_forward for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def _before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note which cache layer the module is about to write to, and drop means that are not about its present keys."""
    mask = kwargs.get("attention_mask")
    if getattr(getattr(module, "config", None), "_attn_implementation", None) != NAME:
        return
    if torch.compiler.is_compiling() and (mask is None or mask.ndim != 2):
        return  # compiled decode steps are not followed; the next chunk finds another number of tokens
    _note_layer(module, (*args, *kwargs.values()))


@torch.compiler.disable
def _note_layer(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
    _local.call = None
    cache = next((argument for argument in arguments if isinstance(argument, Cache)), None)
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder model's pair
    number = int(module.layer_idx)  # type: ignore[arg-type]
    if cache is None or number >= len(cache.layers):
        return
    layer = cache.layers[number]
    pooled = _pooled.get(layer)
    if pooled is not None and not pooled.holds(getattr(layer, "keys", None)):
        del _pooled[layer]
    _local.call = (weakref.ref(module), weakref.ref(layer))


def cache_layer(module: torch.nn.Module, key: Tensor) -> Any:
    """The cache layer whose very tensor `key` is, or None where that is not known (no cache, a quantized one)."""
    call = getattr(_local, "call", None)
    _local.call = None
    if call is None or call[0]() is not module:
        return None
    layer = call[1]()
    return layer if getattr(layer, "keys", None) is key else None


def follow(module: torch.nn.Module, key: Tensor, q_len: int) -> None:
    """Keep a layer's means through a step that did not need them."""
    layer = cache_layer(module, key)
    pooled = None if layer is None else _pooled.get(layer)
    if pooled is not None:
        pooled.look(key, pooled.seen + q_len)


def summary_of(
    layer: Any, key: Tensor, kv: PagedKV, step: Chunk, selector: Selector, values: bool, backend: str | None
) -> KVSummary:
    """The layer's means over its past, to be extended by this step; those that were known are not made again."""
    pooled, block_size = _pooled.get(layer), selector.block_size
    gate, bounds = selector if isinstance(selector, SeerGate) else None, isinstance(selector, KeyBounds)
    layout = (tuple(kv.k.shape), kv.k.stride(), tuple(kv.page_table.shape))
    if pooled is not None:
        unseen_writes = pooled.version is None and pooled.keys() is key  # in place, and torch does not count them
        same = pooled.pads == tuple(min(pad, pooled.pooled) for pad in step.pads) and pooled.summary.unit == block_size
        same = same and pooled.gate is gate and (pooled.summary.v_mean is not None) == values
        same = same and (pooled.summary.k_bounds is not None) == bounds
        if unseen_writes or not same or pooled.seen != step.past:
            pooled = None
    if pooled is None:
        wanted: dict[str, Any] = {"block_size": block_size, "values": values, "gate": gate, "bounds": bounds}
        summary = summarize(kv, step.batch, **wanted, backend=backend)
        pooled = _Pooled(weakref.ref(key), None, step.seen, step.seen, step.pads, gate, kv.page_table, layout, summary)
        _pooled[layer] = pooled
    else:
        if pooled.layout != layout:
            pooled.summary = _moved(pooled.summary, pooled.page_table, kv)
            pooled.page_table, pooled.layout = kv.page_table, layout
        if pooled.pooled < step.past:  # decode steps since; `prefill` itself pools what this step brings
            since = torch.tensor([max(0, pooled.pooled - pad) for pad in step.pads], dtype=torch.int32)
            summarize(
                kv,
                step.batch,
                block_size=block_size,
                since=since.to(key.device),
                summary=pooled.summary,
                backend=backend,
            )
        pooled.pooled = step.seen
    pooled.pads = step.pads
    pooled.look(key, step.seen)
    return pooled.summary


def _moved(summary: KVSummary, page_table: Tensor, kv: PagedKV) -> KVSummary:
    """The means of the pages in `page_table` under the ids that the same pages have in `kv`."""
    pages = min(page_table.shape[1], kv.page_table.shape[1])

    def moved(means: Tensor) -> Tensor:
        there = torch.zeros((kv.k.shape[0], *means.shape[1:]), dtype=torch.float32, device=means.device)
        there[kv.page_table[:, :pages].long()] = means[page_table[:, :pages].long()]
        return there

    gate = summary.gate
    if gate is not None:
        gate = GateKeys(moved(gate.pooled), gate.inv_freq, gate.rope_scale)
    v_mean, k_bounds = (None if part is None else moved(part) for part in (summary.v_mean, summary.k_bounds))
    return KVSummary(moved(summary.k_mean), v_mean, summary.unit, gate, k_bounds)
