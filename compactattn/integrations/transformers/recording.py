"""Record what some layers of a model hand to attention over one prompt, straight to a capture file.

The prompt runs in one piece and without a cache, so no more than one layer's queries, keys and values are in memory at
a time, and it stops at the last layer that is wanted: later layers and the logits are never computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from compactattn.capture import CaptureLayout, capture_writer
from compactattn.files import TensorFile
from compactattn.integrations.transformers.attention import refuse_unsupported
from compactattn.integrations.transformers.steps import is_plain_causal
from compactattn.validation import DTYPES, HEAD_DIMS, MAX_HEADS_PER_KV_HEAD, check_choice, check_int, fail

CAPTURE_NAME = "compactattn_capture"
_PROBE_TOKENS = 2
_BYTES_AT_ONCE = 1 << 26


def full_attention_layers(config: Any) -> list[int]:
    """The layers of a model that attend to everything before a token, as far as its configuration says."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers_of(config)
    return [number for number, kind in enumerate(kinds) if kind == "full_attention"]


def layers_of(config: Any) -> int:
    """How many layers a model has.

    Raises:
        ValueError: its configuration does not say.
    """
    return _count(config.get_text_config(decoder=True), "num_hidden_layers")


def planned_layout(config: Any, layers: Sequence[int], tokens: int, dtype: torch.dtype) -> CaptureLayout:
    """What a capture will hold, from a model's configuration alone, before its weights are loaded.

    Args:
        config: the model's configuration, as transformers reads it.
        layers: layer numbers, ascending.
        tokens: the length of the prompt.
        dtype: of the tensors in the file.

    Raises:
        ValueError: layers that the model does not have, more tokens than it has positions for, a configuration that
            does not say what is needed, no rotary positions, or heads that compactattn cannot run.
    """
    text, available = config.get_text_config(decoder=True), layers_of(config)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= available:
        raise fail("layers", f"ascending layer numbers from 0 to {available - 1}", list(layers))
    check_int("tokens", tokens, 1)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise fail("tokens", f"at most the {positions} positions that the model was made for", tokens)
    if dtype not in DTYPES:
        raise fail("dtype", "float16, bfloat16 or float32", dtype)
    rope_theta_of(config)
    heads = _count(text, "num_attention_heads")
    kv_heads = heads if getattr(text, "num_key_value_heads", None) is None else _count(text, "num_key_value_heads")
    head_dim = getattr(text, "head_dim", None) or _count(text, "hidden_size") // heads
    check_choice("head dimension of the model", head_dim, HEAD_DIMS)
    if heads % kv_heads or heads // kv_heads > MAX_HEADS_PER_KV_HEAD:
        limit = f"a multiple of its {kv_heads} KV heads, at most {MAX_HEADS_PER_KV_HEAD} for each"
        raise fail("query heads of the model", limit, heads)
    return CaptureLayout(tuple(layers), tokens, heads, kv_heads, head_dim, dtype)


def _count(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise fail("model", f"a configuration with {name}", repr(value))
    return value


def rope_theta_of(config: Any) -> float:
    """The base of the rotary embedding of a model's full-attention layers.

    Raises:
        ValueError: a model without rotary embedding.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        raise fail("model", "a configuration with rope_theta (rotary positions)", "none")
    return float(rope["rope_theta"])


@torch.inference_mode()
def record(
    model: Any,
    token_ids: Tensor,
    path: str | os.PathLike[str],
    layout: CaptureLayout,
    *,
    name: str,
    source: str,
    text: bytes | None = None,
    on_layer: Callable[[int], None] = lambda number: None,
) -> None:
    """Run a model over a prompt and write what the layers of `layout` hand to attention.

    A first run over two tokens finds what cannot be recorded; nothing is written before.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        token_ids: int64 [T], the prompt, on any device.
        path: the capture; it appears when everything is written, see `compactattn.capture.capture_writer`.
        layout: what `planned_layout` gave for this model's configuration and T.
        name, source: for readers of the file, as `model` and `source` of a capture.
        text: the prompt before tokenisation, or None.
        on_layer: called with the number of each layer once it has attended.

    Raises:
        ValueError: a layer that does not attend to everything before a token (a sliding window), that is no softmax
            attention, or that the attention implementation "compactattn" refuses too; heads that are not what the
            configuration says; values that are not finite in the dtype of the file.
        OSError: the file cannot be written.
    """
    if model.training:
        raise fail("model", "a model in evaluation mode (model.eval())", "training mode")
    if token_ids.shape != (layout.tokens,):
        raise fail("token_ids", f"shape ({layout.tokens},), as the layout says", tuple(token_ids.shape))
    token_ids = token_ids.to(model.device)
    probe = _Recorder(layout)
    _run(model, token_ids[:_PROBE_TOKENS], probe)
    scales = set(probe.scales.values())
    missing = sorted(set(layout.layers) - set(probe.scales))
    if missing:
        raise fail("layers", "layers with softmax attention", f"{missing[0]}, which has another kind")
    if len(scales) > 1:
        raise fail("layers", "layers of one softmax scale", f"scales {sorted(scales)}")
    (scale,) = scales
    usual_scale = math.isclose(scale, layout.head_dim**-0.5)
    with capture_writer(
        path,
        layout,
        model=name,
        source=source,
        rope_theta=rope_theta_of(model.config),
        scale=None if usual_scale else scale,
        token_ids=token_ids.to("cpu", torch.int32),
        text=text,
    ) as file:
        _run(model, token_ids, _Recorder(layout, file, on_layer))


class _AllRecorded(Exception):  # noqa: N818 (no error: it ends a forward pass that has done its work)
    """Raised by the last layer that is wanted."""


@dataclass(eq=False)
class _Recorder:
    """What the attention function does with the layers of `layout`: checks them, and appends them to `file`.

    Attributes:
        scales: the softmax scale of each layer that has been met.
    """

    layout: CaptureLayout
    file: TensorFile | None = None
    on_layer: Callable[[int], None] = lambda number: None
    scales: dict[int, float] = field(default_factory=dict)

    def meet(self, number: int, tensors: dict[str, Tensor], causal: bool, scaling: float | None) -> None:
        """Check one layer's tensors [1, H, T, D] and write them; layers that are not wanted pass."""
        if number not in self.layout.layers:
            return
        if not causal:
            raise fail("layers", "layers that attend to everything before a token", f"{number}, which does not")
        if number in self.scales:
            raise fail("layers", "layers that attend once", f"{number}, which attends several times")
        self.scales[number] = self.layout.head_dim**-0.5 if scaling is None else float(scaling)
        expected = {"q": self.layout.heads, "k": self.layout.kv_heads, "v": self.layout.kv_heads}
        for part, tensor in tensors.items():
            shape = (1, expected[part], tensors["q"].shape[2], self.layout.head_dim)
            if tuple(tensor.shape) != shape:
                wanted = f"shape {shape}, as the configuration of the model says"
                raise fail(f"layers.{number}.{part}", wanted, tuple(tensor.shape))
            if self.file is not None:
                rows = tensor[0].transpose(0, 1)
                for piece in rows.split(max(1, _BYTES_AT_ONCE // rows[0].nbytes)):
                    self.file.append(f"layers.{number}.{part}", piece)


_recorder: ContextVar[_Recorder] = ContextVar("compactattn_recorder")


def _run(model: Any, token_ids: Tensor, recorder: _Recorder) -> None:
    """One forward pass over token ids [T], up to the last layer that is wanted."""
    AttentionInterface.register(CAPTURE_NAME, _attend_and_record)
    AttentionMaskInterface.register(CAPTURE_NAME, _mask)
    usual = model.config._attn_implementation
    before = _recorder.set(recorder)
    model.set_attn_implementation(CAPTURE_NAME)
    try:
        model(input_ids=token_ids[None], use_cache=False)
    except _AllRecorded:
        pass
    finally:
        _recorder.reset(before)
        model.set_attn_implementation(usual)


def _mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """None for a plain causal mask, and sdpa's mask, never None, for every other."""
    if is_plain_causal(mask_function, kv_offset, others) and attention_mask is None:
        return None
    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **(others | whole),
    )


def _attend_and_record(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Exact attention, query [1, Hq, T, D], key and value [1, Hkv, T, D] to [1, T, Hq, D]."""
    refuse_unsupported(module, dropout, others)
    recorder, number = _recorder.get(), int(module.layer_idx)  # type: ignore[arg-type]
    causal = attention_mask is None and bool(getattr(module, "is_causal", True))
    recorder.meet(number, {"q": query, "k": key, "v": value}, causal, scaling)
    recorder.on_layer(number)
    if number == recorder.layout.layers[-1]:
        raise _AllRecorded
    if not causal:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    # Heads are repeated by hand: in float32 on a GPU, SDPA runs grouped ones in the kernel that stores all scores.
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
