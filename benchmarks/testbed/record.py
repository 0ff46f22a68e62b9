"""Record what the test bed's model hands to attention over a held-out text.

    python -m benchmarks.testbed.record --layers 2,4 --tokens 5120 --out compactattn/samples/stdlib.safetensors

made the sample that ships: with the committed weights, layer 2 is the most local one and layer 4 the one that
retrieves. `--layers auto`, the default, takes the two layers that differ most in reach, those with the smallest
and the largest share of attention far back (see `Reach`); the far one of these can be a diffuse one, so read the
effective blocks that are printed. The model runs in float32; the file holds float16.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.model import MODEL_NAME, WEIGHTS_DIRECTORY, load_model
from compactattn.capture import Capture, CapturedLayer, save_capture

ATTENTION_NAME = "testbed_record"
# On the held-out side of every Python version, and long enough (40 KB) for captures of several lengths.
DEFAULT_TEXT = "traceback.py"
FAR_TOKENS = 512
BLOCK_TOKENS = 128


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """One layer's queries [T, Hq, D], keys and values [T, Hkv, D] after RoPE, and the softmax scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@dataclass(frozen=True)
class Reach:
    """How far one layer looks back, averaged over its heads and over the queries that can look far.

    Attributes:
        far_share: softmax mass on keys more than `FAR_TOKENS` back, the first `BLOCK_TOKENS` of the prompt
            left out: mass that rests there is a sink, not a memory.
        far_share_by_head: the same for each query head.
        distance: mean distance from query to key in tokens, weighted by softmax mass.
        blocks: effective number of blocks of `BLOCK_TOKENS` keys, exp of the entropy of the blocks' mass.
    """

    far_share: float
    far_share_by_head: tuple[float, ...]
    distance: float
    blocks: float


@torch.no_grad()
def attention_inputs(model: LlamaForCausalLM, token_ids: Tensor) -> dict[int, AttentionInputs]:
    """Run the model over one prompt, int64 [T]; what each layer hands to attention, by layer number."""
    recorded: dict[int, AttentionInputs] = {}

    def attend_and_record(
        module: LlamaAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Causal attention over q [1, Hq, T, D], k and v [1, Hkv, T, D]; the result is [1, T, Hq, D]."""
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        recorded[module.layer_idx] = AttentionInputs(q, k, v, scaling)
        # Repeated by hand: in float32 on a GPU, SDPA has grouped heads only in the kernel that stores all
        # scores.
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION_NAME, attend_and_record)
    usual = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        # The body alone: logits of the whole prompt are of no use here.
        model.model(input_ids=token_ids[None], use_cache=False)
    finally:
        model.set_attn_implementation(usual)
    return recorded


@torch.no_grad()
def reach(inputs: AttentionInputs) -> Reach:
    """Measure one layer's exact attention, a few queries at a time.

    Raises:
        ValueError: the prompt is too short for any query to look far.
    """
    tokens, heads, _ = inputs.q.shape
    first = FAR_TOKENS + BLOCK_TOKENS
    if tokens <= first:
        raise ValueError(f"--tokens: expected more than {first} to measure reach, got {tokens}")
    keys = inputs.k.repeat_interleave(heads // inputs.k.shape[1], 1).permute(1, 2, 0)  # [Hq, D, T]
    position = torch.arange(tokens, device=keys.device)
    block = position // BLOCK_TOKENS
    far_mass, distance_sum, blocks_sum = torch.zeros(heads), 0.0, 0.0
    rows = max(16, 2**25 // (tokens * heads))
    for start in range(first, tokens, rows):
        queries = position[start : start + rows, None]
        scores = inputs.q[start : start + rows].transpose(0, 1) @ keys * inputs.scale
        mass = scores.masked_fill_(position > queries, -math.inf).softmax(-1)  # [Hq, rows, T]
        back = queries - position
        far_mass += (mass * ((back > FAR_TOKENS) & (position >= BLOCK_TOKENS))).sum((1, 2)).cpu()
        distance_sum += float((mass * back).sum())
        block_mass = mass.new_zeros(*mass.shape[:2], int(block[-1]) + 1).index_add_(2, block, mass)
        blocks_sum += float(torch.special.entr(block_mass).sum(-1).exp().sum())
    queries_measured = tokens - first
    by_head = tuple(round(float(share), 4) for share in far_mass / queries_measured)
    total = queries_measured * heads
    return Reach(float(far_mass.sum()) / total, by_head, distance_sum / total, blocks_sum / total)


def contrasting_layers(reaches: dict[int, Reach]) -> list[int]:
    """The layers with the smallest and the largest far share, ascending.

    Raises:
        ValueError: fewer than two layers.
    """
    if len(reaches) < 2:
        raise ValueError(f"--layers auto: expected a model of at least 2 layers, got {len(reaches)}")
    ordered = sorted(reaches, key=lambda layer: (reaches[layer].far_share, layer))
    return sorted([ordered[0], ordered[-1]])


def heldout_text(corpus: corpora.Corpus, path: str, tokens: int) -> bytes:
    """The first `tokens` bytes of a held-out file.

    Raises:
        ValueError: the file is not on the held-out side, or is too short; the message names files that would
            do.
    """
    fitting = [file.path for file in corpus.heldout if len(file.data) >= tokens]
    if path not in fitting:
        longest = max((len(file.data) for file in corpus.heldout), default=0)
        names = ", ".join(fitting[:12]) or f"none (the longest has {longest} bytes)"
        raise ValueError(f"--text: expected a held-out file of at least {tokens} bytes, such as {names}; got {path!r}")
    return next(file.data for file in corpus.heldout if file.path == path)[:tokens]


def parse_layers(words: str, available: int) -> list[int] | None:
    """Layer numbers of "1,4", or None for "auto".

    Raises:
        ValueError: anything else, or a layer that the model lacks.
    """
    if words == "auto":
        return None
    try:
        layers = sorted({int(word) for word in words.split(",")})
    except ValueError:
        layers = []
    if not layers or layers[0] < 0 or layers[-1] >= available:
        raise ValueError(f"--layers: expected auto, or numbers from 0 to {available - 1} as in 1,4; got {words!r}")
    return layers


def record(
    model: LlamaForCausalLM, text: bytes, source: str, layers: list[int] | None, dtype: torch.dtype
) -> tuple[Capture, dict[int, Reach]]:
    """The capture of `layers` (None: the two contrasting ones) over `text`, and the reach of every layer."""
    token_ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    inputs = attention_inputs(model, token_ids.to(model.device))
    reaches = {layer: reach(inputs[layer]) for layer in sorted(inputs)}
    chosen = layers if layers is not None else contrasting_layers(reaches)
    words = ", ".join(f"{reaches[layer].far_share:.1%} in layer {layer}" for layer in chosen)
    scale = inputs[chosen[0]].scale
    rope: Any = model.config.rope_parameters
    usual_scale = math.isclose(scale, inputs[chosen[0]].q.shape[-1] ** -0.5)
    capture = Capture(
        layers=tuple(
            CapturedLayer(layer, *(getattr(inputs[layer], part).to("cpu", dtype) for part in "qkv")) for layer in chosen
        ),
        model=MODEL_NAME,
        source=f"{source}; attention more than {FAR_TOKENS} tokens back: {words}",
        rope_theta=float(rope["rope_theta"]),
        scale=None if usual_scale else scale,
        token_ids=token_ids.int(),
        text=text,
    )
    return capture, reaches


def main(arguments: list[str] | None = None) -> None:
    """Record a sample; every foreseeable failure ends in one line of text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.record", description="Record a sample.")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIRECTORY, help="directory (default: the committed)")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    parser.add_argument("--text", default=DEFAULT_TEXT, help="a held-out file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=5120, help="length of the prompt (default: %(default)s)")
    parser.add_argument("--layers", default="auto", help="auto, or numbers such as 1,4 (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        model = load_model(options.weights, options.device)
        corpus = corpora.load(options.corpus)
        text = heldout_text(corpus, options.text, options.tokens)
        source = f"{options.text} of Python {corpus.python_version} (held out), its first {options.tokens} bytes"
        layers = parse_layers(options.layers, model.config.num_hidden_layers)
        capture, reaches = record(model, text, source, layers, getattr(torch, options.dtype))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_capture(options.out, capture)
    except (ValueError, OSError) as error:
        raise SystemExit(f"record: {error}") from error
    for layer, its in reaches.items():
        print(
            f"layer {layer}: far share {its.far_share:.1%}, mean distance {its.distance:.0f} tokens, "
            f"{its.blocks:.1f} effective blocks, far share by head {its.far_share_by_head}"
        )
    print(f"{options.out}: {options.out.stat().st_size} bytes; {capture.source}")


if __name__ == "__main__":
    main()
