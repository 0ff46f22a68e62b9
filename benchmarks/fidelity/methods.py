"""What is compared: every method as a named row, and how it runs inside a transformers model.

Library methods run through `compactattn.integrations.transformers`, as a user would. QUOKA, which selects tokens and
not blocks, is `compactattn.quality`'s, behind an attention function of its own. Decode steps, and chunks without a
past, are exact for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.fidelity.plans import Row
from compactattn import (
    Dense,
    FlashPrefill,
    KeyBounds,
    Oracle,
    PagedKV,
    PrefillBatch,
    SeerGate,
    XAttention,
    load_seer_gates,
)
from compactattn.integrations.transformers import NAME as LIBRARY_NAME
from compactattn.integrations.transformers import enable, prompt_lens
from compactattn.quality import quoka_attention, quoka_select
from compactattn.selectors import Selector

QUOKA_NAME = "fidelity_quoka"
GATE_RECORD = "seer_gate.json"  # `benchmarks.testbed.train_gate` writes it
SELECTORS: dict[str, type] = {
    "Dense": Dense,
    "FlashPrefill": FlashPrefill,
    "KeyBounds": KeyBounds,
    "XAttention": XAttention,
    "Oracle": Oracle,
    "SeerGate": SeerGate,
}
PAGE_SIZE = 128


class Methods:
    """Runs rows inside one model.

    Args:
        model: in evaluation mode.
        gate_file: gate weights, such as `gate/seer_gate.safetensors` of `benchmarks.testbed.train_gate`; they may be
            absent.
    """

    def __init__(self, model: LlamaForCausalLM, gate_file: Path | None) -> None:
        self.model, self.gate_file = model, gate_file
        self.device = next(model.parameters()).device
        self.layers = int(model.config.num_hidden_layers)

    def why_not(self, row: Row) -> str | None:
        """Why a row cannot run on this model, or None."""
        config = self.model.config
        group = config.num_attention_heads // config.num_key_value_heads
        if "SeerGate" in row.selectors and not self.has_gates:
            return "no gate weights" + ("" if self.gate_file is None else f": {self.gate_file.name} does not exist")
        if group % row.heads:
            return f"{row.heads} heads do not divide this model's {group} query heads per KV head"
        if row.by_layer and row.by_layer.keys() != set(map(str, range(self.layers))):
            return f"its settings are of {len(row.by_layer)} layers, this model has {self.layers}"
        if row.dense_layers >= self.layers:
            return f"with {row.dense_layers} dense layers nothing is left of this model's {self.layers}"
        return None

    def selector(self, row: Row) -> Selector | dict[int, Selector]:
        """The row's selector, or one per layer."""
        gates = self._gates(row.settings) if "SeerGate" in row.selectors else {}
        if not row.by_layer:
            return gates if row.selector == "SeerGate" else SELECTORS[row.selector](**row.settings)
        chosen: dict[int, Selector] = {}
        for number, its in row.by_layer.items():
            settings: dict[str, Any] = dict(its)
            name = settings.pop("selector", row.selector)
            if name == "SeerGate":
                chosen[int(number)] = replace(gates[int(number)], **settings)
            else:
                chosen[int(number)] = SELECTORS[name](**{**row.settings, **settings})
        return chosen

    def _gates(self, settings: Mapping[str, float]) -> dict[int, Selector]:
        """The gate of each layer."""
        assert self.gate_file is not None  # `why_not` said nothing
        config, rope = self.model.config, self.model.model.rotary_emb
        gates = load_seer_gates(
            self.gate_file,
            layers=self.layers,
            heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            inv_freq=rope.inv_freq,
            device=self.device,
            rope_scale=float(rope.attention_scaling),
            **{**self._gate_blocks(), **settings},
        )
        return dict(gates)

    def _gate_blocks(self) -> dict[str, int]:
        """The block sizes that gates were trained for, where `train_gate` left its record beside them."""
        record = None if self.gate_file is None else self.gate_file.with_name(GATE_RECORD)
        if record is None or not record.exists():
            return {}
        block = int(json.loads(record.read_text())["settings"]["block"])
        return {"block_size": block, "query_block": block}

    def of_layer(self, row: Row, layer: int) -> Selector:
        """The selector that a layer runs with."""
        selector = self.selector(row)
        chosen = selector[layer] if isinstance(selector, dict) else selector
        if layer < row.dense_layers:
            return Dense(block_size=chosen.block_size, query_block=chosen.query_block)
        return chosen

    @property
    def has_gates(self) -> bool:
        return self.gate_file is not None and self.gate_file.exists()

    @contextmanager
    def running(self, row: Row) -> Iterator[None]:
        """The model's attention is the row's inside."""
        before = self.model.config._attn_implementation
        if row.kind == "dense":
            name = "sdpa"
        elif row.kind == "quoka":
            name = QUOKA_NAME
            register(name, partial(_quoka, dict(row.settings)))
        else:
            name = LIBRARY_NAME
            enable(
                selector=self.selector(row),
                heads_per_group=row.heads,
                query_blocks_per_span=row.span,
                dense_layers=row.dense_layers,
                correction=row.correction,
            )
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def prompts_of(self, row: Row, length: int, count: int) -> Any:
        """A context in which the library knows the prompts' length, where the row needs it."""
        return prompt_lens([length] * count) if row.settings.get("dense_last_blocks") else nullcontext()


Sparse = Callable[[torch.nn.Module, Tensor, Tensor, Tensor, float | None], Tensor]


def register(name: str, sparse: Sparse) -> None:
    """Register an attention function for batches without padding.

    Args:
        sparse: (module, query [B, Hq, q_len, D], key and value [B, Hkv, L, D], scale) to [B, q_len, Hq, D], of a chunk
            with a past. Decode steps, and chunks without a past, have nothing to select from: they are transformers'
            own.
    """

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None
        if query.shape[2] in (1, key.shape[2]):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0], None
        return sparse(module, query, key, value, scaling), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_: object, attention_mask: Tensor | None = None, **__: object) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask: expected a batch without padding, got one with padding")


def paged(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, PagedKV, PrefillBatch]:
    """A step of equally long requests as the library sees it: query [B, Hq, q_len, D], key and value [B, Hkv, L, D]."""
    requests, _, q_len, _ = query.shape
    kv = PagedKV.from_contiguous(key.transpose(1, 2), value.transpose(1, 2), PAGE_SIZE)
    batch = PrefillBatch.from_lens([q_len] * requests, [key.shape[2]] * requests, query.device)
    return query.transpose(1, 2).flatten(0, 1), kv, batch


def unpacked(out: Tensor, query: Tensor) -> Tensor:
    """[T, Hq, D] to [B, q_len, Hq, D]."""
    return out.view(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def _quoka(
    settings: dict[str, float], module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    q, kv, batch = paged(query, key, value)
    selection = quoka_select(q, kv, batch, **settings)
    return unpacked(quoka_attention(q, kv, batch, selection, scale=scale), query)
