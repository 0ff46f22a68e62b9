"""The attention implementation "compactattn": its settings, and the function that transformers calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compactattn.dispatch import BACKENDS
from compactattn.integrations.transformers.means import cache_layer, follow, summary_of, watch
from compactattn.integrations.transformers.steps import NAME, chunk_mask, chunk_of, paged
from compactattn.pipeline import prefill
from compactattn.selectors import Dense, Scored, SeerGate, Selector, check_selector
from compactattn.summary import summarize
from compactattn.validation import Auto, check_heads_per_group, check_int, check_span, fail

# Arguments that change the scores or the result, with what they belong to.
_REFUSED = {
    "softcap": "no soft-capping of scores (Gemma 2)",
    "s_aux": "no sink logits (gpt-oss)",
    "sinks": "no sink logits",
    "position_bias": "no position bias",
    "block_indices": "no selection of blocks by the model itself",
    "cache": "a DynamicCache or a StaticCache, no paged cache",
    "output_attentions": "no attention weights as output",
}


@dataclass(frozen=True)
class _Settings:
    selector: Selector | Mapping[int, Selector]
    heads_per_group: int | Auto
    query_blocks_per_span: int | Auto | None
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
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
    dense_layers: int = 0,
    correction: bool = False,
    backend: str | None = None,
) -> None:
    """Register the attention implementation "compactattn", or give it other settings.

    The settings hold for every model that runs under this name, from its next forward pass on. Those in a file of
    `compactattn tune` are given as `enable(**load_settings(path))`, see `compactattn.settings`.

    Args:
        selector: what proposes the blocks: one selector for all layers, or a mapping from layer number to selector;
            layers that the mapping leaves out are dense.
        heads_per_group: adjacent query heads of one KV group that share a block table; divides Hq / Hkv. "auto" picks
            at every layer and chunk, per request and KV head, see `compactattn.unite`.
        query_blocks_per_span: adjacent query blocks that share a block table; None is the whole chunk, "auto" picks.
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
    check_heads_per_group(heads_per_group)
    check_span(query_blocks_per_span)
    check_int("dense_layers", dense_layers, 0)
    if not isinstance(correction, bool):
        raise fail("correction", "True or False", repr(correction))
    if backend is not None and backend not in BACKENDS:
        raise fail("backend", "None, 'triton' or 'numba'", repr(backend))
    settings = _Settings(selector, heads_per_group, query_blocks_per_span, dense_layers, correction, backend)
    AttentionInterface.register(NAME, partial(_attention, settings))
    AttentionMaskInterface.register(NAME, chunk_mask)


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
    refuse_unsupported(module, dropout, others)
    if attention_mask is not None and attention_mask.ndim == 2:
        return _sparse_attention(settings, module, query, key, value, attention_mask, scaling), None
    if not torch.compiler.is_compiling():
        follow(module, key, query.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)


def refuse_unsupported(module: torch.nn.Module, dropout: float, others: dict[str, Any]) -> None:
    """Raise a ValueError that names what a layer's attention needs besides softmax attention under its mask."""
    for name, expected in _REFUSED.items():
        if others.get(name) is not None and others[name] is not False:
            raise fail(name, expected, type(others[name]).__name__)
    if getattr(module, "attn_logit_softcapping", None) is not None:  # some models leave it to their eager attention
        raise fail("attn_logit_softcapping", _REFUSED["softcap"], module.attn_logit_softcapping)
    if dropout:
        raise fail("dropout", "0 (inference only)", dropout)


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
    layer = cache_layer(module, key)
    watch(module)
    selector = settings.of_layer(int(module.layer_idx))  # type: ignore[arg-type]
    step = chunk_of(mask, query.shape[2])
    batch = step.with_prompt_lens() if selector.dense_last_blocks else step.batch
    if not any(step.past_lens):
        selector = _dense_like(selector)
    kv = paged(key, value, step, selector.block_size)
    summary = None
    corrected = settings.correction and not isinstance(selector, Dense)
    if layer is not None and (corrected or isinstance(selector, (Scored, SeerGate))):
        summary = summary_of(layer, key, kv, step, selector, corrected, settings.backend)
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
