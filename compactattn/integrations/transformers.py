"""Run Hugging Face transformers models on compactattn (extra `hf`).

    import compactattn
    from compactattn.integrations.transformers import enable

    enable(selector=compactattn.FlashPrefill(alpha=0.18), heads_per_group=4)
    model.set_attn_implementation("compactattn")  # or from_pretrained(..., attn_implementation="compactattn")
    model.generate(**inputs, prefill_chunk_size=1024)

What runs where:

- A chunk of several queries under a plain causal mask, left padding included, runs `compactattn.prefill`. Without a
  past (a first chunk, a prompt in one piece) it is dense.
- Everything else is handed to transformers' own `sdpa`, with the mask that transformers makes for it, and so is exact:
  decode steps (one query), sliding-window and chunked-attention layers, packed sequences, masks of the caller's own,
  right padding (with a warning, since such batches gain nothing here).
- Refused by name: soft-capped scores (Gemma 2), sink logits (gpt-oss), position biases, paged caches, attention
  weights as output, dropout, gradients, and head dimensions that compactattn does not have.

K and V are read where the cache holds them. They are copied, padded to whole pages, only where a page of `block_size`
tokens cannot be seen in place: the tokens in a `DynamicCache` are no whole number of pages (at most the last chunk of
a prompt if `prefill_chunk_size` is a multiple of `block_size`), a `StaticCache` for several requests has a length that
is no multiple of `block_size`, or requests are left-padded.

The key means that `FlashPrefill` selects by, and the pooled keys of `SeerGate`, are kept per layer of a cache, extended
by each chunk, and freed with the cache. They are only used while nothing else wrote to the layer: after `crop`,
`reset`, `reorder_cache` or a step of another attention implementation they are made anew. `SeerGate` undoes RoPE by
position, so it needs what `generate` gives: position ids that count from each request's first token.

Facts about transformers (5.1 to 5.23) that this file relies on: an attention function gets K and V as
[B, Hkv, L, D] after the cache's update, not repeated over heads, and after RoPE; L is the number of tokens for a
`DynamicCache` and the capacity of a `StaticCache`; a mask function is called once per forward pass (twice with a
`StaticCache`, the second time with what it returned the first time) and whatever it returns reaches the attention
function; a 4-D mask is passed on as it is.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compactattn.data import GateKeys, KVSummary, PagedKV, PrefillBatch
from compactattn.dispatch import BACKENDS
from compactattn.pipeline import prefill
from compactattn.selectors import Dense, FlashPrefill, SeerGate, Selector, check_selector
from compactattn.summary import summarize
from compactattn.validation import check_int, fail

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "compactattn.integrations.transformers needs transformers: pip install 'compactattn[hf]'"
    ) from error

NAME = "compactattn"

# Arguments that change the scores or the result, with what they belong to.
_REFUSED = {
    "softcap": "no soft-capping of scores (Gemma 2)",
    "s_aux": "no sink logits (gpt-oss)",
    "position_bias": "no position bias",
    "cache": "a DynamicCache or a StaticCache, no paged cache",
    "output_attentions": "no attention weights as output",
}


@dataclass(frozen=True)
class _Settings:
    selector: Selector | Mapping[int, Selector]
    heads_per_group: int
    query_blocks_per_span: int | None
    dense_layers: int
    correction: bool
    backend: str | None

    def of_layer(self, layer: int) -> Selector:
        """The selector of a layer; `Dense` for the first `dense_layers`, and for layers that a mapping leaves out."""
        chosen = self.selector.get(layer) if isinstance(self.selector, Mapping) else self.selector
        if chosen is None:
            return Dense()
        return _dense_like(chosen) if layer < self.dense_layers else chosen


def enable(
    *,
    selector: Selector | Mapping[int, Selector],
    heads_per_group: int,
    query_blocks_per_span: int | None = None,
    dense_layers: int = 0,
    correction: bool = False,
    backend: str | None = None,
) -> None:
    """Register the attention implementation "compactattn", or give it other settings.

    The settings hold for every model that runs under this name, from its next forward pass on.

    Args:
        selector: what proposes the blocks: one selector for all layers, or a mapping from layer number to selector;
            layers that the mapping leaves out are dense.
        heads_per_group: adjacent query heads of one KV group that share a block table; divides Hq / Hkv.
        query_blocks_per_span: adjacent query blocks that share a block table; None is the whole chunk.
        dense_layers: the first so many layers read every block.
        correction: let the past blocks that a table leaves out speak through their means, see `compactattn.attend`.
        backend: None (by device), "triton" or "numba".

    Raises:
        ValueError: a setting that no model could run with. What depends on the model (head dimension, heads per KV
            head, soft-capping and the like) is refused by its first forward pass.
    """
    if isinstance(selector, Mapping):
        if not selector:
            raise fail("selector", "a selector, or a mapping with at least one layer", "an empty mapping")
        for layer, its in selector.items():
            check_int("selector's layer number", layer, 0)
            check_selector(its)
        selector = dict(selector)
    else:
        check_selector(selector)
    check_int("heads_per_group", heads_per_group, 1)
    if query_blocks_per_span is not None:
        check_int("query_blocks_per_span", query_blocks_per_span, 1)
    check_int("dense_layers", dense_layers, 0)
    if not isinstance(correction, bool):
        raise fail("correction", "True or False", repr(correction))
    if backend is not None and backend not in BACKENDS:
        raise fail("backend", "None, 'triton' or 'numba'", repr(backend))
    settings = _Settings(selector, heads_per_group, query_blocks_per_span, dense_layers, correction, backend)
    AttentionInterface.register(NAME, partial(_attention, settings))
    AttentionMaskInterface.register(NAME, _mask)


_prompt_lens: ContextVar[tuple[int, ...] | None] = ContextVar("compactattn_prompt_lens", default=None)


@contextmanager
def prompt_lens(lengths: list[int] | tuple[int, ...]) -> Iterator[None]:
    """Tell selectors with `dense_last_blocks` how long each whole prompt is, padding not counted.

    A chunk does not know how much of its prompt is still to come:

        with prompt_lens([len(prompt)]):
            model.generate(prompt_ids, prefill_chunk_size=1024)

    Args:
        lengths: one per row of the batch.

    Raises:
        ValueError: a length that is no int of at least 1. A number of lengths that is not the batch's, or a length
            below the tokens seen so far at a chunk of several tokens, is refused by that forward pass.
    """
    for b, length in enumerate(lengths):
        check_int(f"prompt_lens[{b}]", length, 1)
    before = _prompt_lens.set(tuple(lengths))
    try:
        yield
    finally:
        _prompt_lens.reset(before)


# ---- the mask function ----


def _mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """Say what the attention function shall do: a 2-D mask for compactattn, and what `sdpa` gets for all else.

    The 2-D mask is bool [B, tokens seen so far, this step's included], False for left padding. Older transformers
    (5.2) give positions as `cache_position`, an int64 tensor [q_length], newer ones (5.4) as `q_length` and `q_offset`.
    """
    position = others.get("cache_position")
    q_length = others["q_length"] if position is None else len(position)
    plain = mask_function is causal_mask_function and others.get("local_size") is None and kv_offset == 0
    if plain and q_length > 1:
        offset = int(others.get("q_offset", 0) if position is None else position[0])
        device = others.get("device", "cpu") if position is None else position.device
        seen = offset + q_length
        if attention_mask is None:
            return torch.ones((batch_size, seen), dtype=torch.bool, device=device)
        if attention_mask.shape[1] >= seen and _is_left_padded(attention_mask[:, :seen]):
            return attention_mask[:, :seen]  # a tensor of its own in every pass: `_chunk` knows passes apart by it
        warnings.warn(
            "compactattn runs chunks of left-padded batches; this attention_mask is not one, so the step runs sdpa",
            stacklevel=2,
        )
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **others,
    )


def _is_left_padded(mask: Tensor) -> bool:
    """Whether no row of a bool mask [B, n] has padding after a token; reads the device once per forward pass."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all())


# ---- the attention function ----


def _attention(
    settings: _Settings,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, q_len, D], key and value [B, Hkv, L, D] to [B, q_len, Hq, D]; no attention weights."""
    for name, expected in _REFUSED.items():
        if others.get(name) is not None and others[name] is not False:
            raise fail(name, expected, type(others[name]).__name__)
    if getattr(module, "attn_logit_softcapping", None) is not None:  # some models leave it to their eager attention
        raise fail("attn_logit_softcapping", _REFUSED["softcap"], module.attn_logit_softcapping)
    if dropout:
        raise fail("dropout", "0 (inference only)", dropout)
    if attention_mask is not None and attention_mask.ndim == 2:
        return _sparse_attention(settings, module, query, key, value, attention_mask, scaling), None
    if not torch.compiler.is_compiling():
        _follow(module, key, query.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)


@torch.compiler.disable
def _sparse_attention(
    settings: _Settings,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
) -> Tensor:
    """A chunk of several queries through `prefill`: [B, q_len, Hq, D], 0 in rows of padding."""
    if key.shape[2] < mask.shape[1]:
        raise fail("key", f"at least the {mask.shape[1]} tokens of attention_mask", f"{key.shape[2]} tokens")
    layer = _cache_layer(module, key)
    _watch(module)
    selector = settings.of_layer(int(module.layer_idx))  # type: ignore[arg-type]
    step = _chunk(mask, query.shape[2])
    batch = step.with_prompt_lens(_prompt_lens.get()) if selector.dense_last_blocks else step.batch
    if not any(step.past_lens):
        selector = _dense_like(selector)
    kv = _paged(key, value, step, selector.block_size)
    summary = None
    corrected = settings.correction and not isinstance(selector, Dense)
    if layer is not None and (corrected or isinstance(selector, (FlashPrefill, SeerGate))):
        summary = _summary(layer, key, kv, step, selector, corrected, settings.backend)
    elif corrected:
        summary = summarize(kv, step.batch, block_size=selector.block_size, values=True, backend=settings.backend)
    rows = query.transpose(1, 2).flatten(0, 1)
    shape = (query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    if not any(step.q_lens):
        return torch.zeros_like(rows).view(shape)
    result = prefill(
        rows if step.rows is None else rows[step.rows],
        kv,
        batch,
        selector=selector,
        heads_per_group=settings.heads_per_group,
        query_blocks_per_span=settings.query_blocks_per_span,
        scale=scaling,
        summary=summary,
        correction=corrected,
        backend=settings.backend,
    )
    assert isinstance(result, Tensor)
    if step.rows is not None:
        result = torch.zeros_like(rows).index_copy_(0, step.rows, result)
    return result.view(shape)


def _dense_like(selector: Selector) -> Dense:
    return Dense(block_size=selector.block_size, query_block=selector.query_block)


# ---- lengths ----


@dataclass(frozen=True, eq=False)
class _Chunk:
    """The lengths of one forward pass.

    Attributes:
        pads: tokens of padding at the left of each request, on the host.
        q_lens, past_lens: of each request, padding not counted.
        past, seen: tokens in the cache before and after this step, padding included.
        batch: the same for compactattn, on the device.
        rows: int64 [T], the rows of [B * q_len] that are no padding; None where all are.
    """

    pads: tuple[int, ...]
    q_lens: tuple[int, ...]
    past_lens: tuple[int, ...]
    past: int
    seen: int
    batch: PrefillBatch
    rows: Tensor | None

    def with_prompt_lens(self, lengths: tuple[int, ...] | None) -> PrefillBatch:
        if lengths is None:
            raise fail("dense_last_blocks", "0, or a forward pass inside prompt_lens(...)", "no prompt lengths")
        seq_lens = [self.seen - pad for pad in self.pads]
        return PrefillBatch.from_lens(self.q_lens, seq_lens, self.batch.seq_lens.device, lengths)


_local = threading.local()


def _chunk(mask: Tensor, q_len: int) -> _Chunk:
    """The lengths that a 2-D mask states; the device is read at a forward pass's first layer only."""
    held = getattr(_local, "chunk", None)
    if held is not None and held[0]() is mask and held[1] == q_len:
        return held[2]
    seen = mask.shape[1]
    pads = tuple((~mask).sum(1).tolist())
    q_lens = tuple(min(q_len, seen - pad) for pad in pads)
    past_lens = tuple(seen - pad - n for pad, n in zip(pads, q_lens, strict=True))
    batch = PrefillBatch.from_lens(q_lens, [seen - pad for pad in pads], mask.device)
    rows = None
    if min(q_lens) < q_len:
        ends = [torch.arange((b + 1) * q_len - n, (b + 1) * q_len) for b, n in enumerate(q_lens)]
        rows = torch.cat(ends).to(mask.device)
    chunk = _Chunk(pads, q_lens, past_lens, seen - q_len, seen, batch, rows)
    _local.chunk = (weakref.ref(mask), q_len, chunk)
    return chunk


def _paged(key: Tensor, value: Tensor, step: _Chunk, page_size: int) -> PagedKV:
    """See [B, Hkv, L, D] as pages of each request's own tokens, in place where that is possible."""
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    requests, length = keys.shape[:2]
    whole = -(-step.seen // page_size) * page_size
    if not any(step.pads) and whole <= length and (requests == 1 or length % page_size == 0):
        keys, values = keys[:, :whole], values[:, :whole]
    else:
        first = torch.tensor(step.pads, device=key.device)[:, None]
        token = (torch.arange(whole, device=key.device) + first).clamp_(max=step.seen - 1)
        request = torch.arange(requests, device=key.device)[:, None]
        keys, values = keys[request, token], values[request, token]
    return PagedKV.from_contiguous(keys, values, page_size)


# ---- key means, kept beside a layer of a cache ----


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


def _watch(module: torch.nn.Module) -> None:
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
    number = int(module.layer_idx)  # type: ignore[arg-type]
    if cache is None or number >= len(cache.layers):
        return
    layer = cache.layers[number]
    pooled = _pooled.get(layer)
    if pooled is not None and not pooled.holds(getattr(layer, "keys", None)):
        del _pooled[layer]
    _local.call = (weakref.ref(module), weakref.ref(layer))


def _cache_layer(module: torch.nn.Module, key: Tensor) -> Any:
    """The cache layer whose very tensor `key` is, or None where that is not known (no cache, a quantized one)."""
    call = getattr(_local, "call", None)
    _local.call = None
    if call is None or call[0]() is not module:
        return None
    layer = call[1]()
    return layer if getattr(layer, "keys", None) is key else None


def _follow(module: torch.nn.Module, key: Tensor, q_len: int) -> None:
    """Keep a layer's means through a step that did not need them."""
    layer = _cache_layer(module, key)
    pooled = None if layer is None else _pooled.get(layer)
    if pooled is not None:
        pooled.look(key, pooled.seen + q_len)


def _summary(
    layer: Any, key: Tensor, kv: PagedKV, step: _Chunk, selector: Selector, values: bool, backend: str | None
) -> KVSummary:
    """The layer's means over its past, to be extended by this step; those that were known are not made again."""
    pooled, block_size = _pooled.get(layer), selector.block_size
    gate = selector if isinstance(selector, SeerGate) else None
    layout = (tuple(kv.k.shape), kv.k.stride(), tuple(kv.page_table.shape))
    if pooled is not None:
        unseen_writes = pooled.version is None and pooled.keys() is key  # in place, and torch does not count them
        same = pooled.pads == tuple(min(pad, pooled.pooled) for pad in step.pads) and pooled.summary.unit == block_size
        same = same and pooled.gate is gate and (pooled.summary.v_mean is not None) == values
        if unseen_writes or not same or pooled.seen != step.past:
            pooled = None
    if pooled is None:
        summary = summarize(kv, step.batch, block_size=block_size, values=values, gate=gate, backend=backend)
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
    v_mean = None if summary.v_mean is None else moved(summary.v_mean)
    return KVSummary(moved(summary.k_mean), v_mean, summary.unit, gate)
