"""SeerAttention's gate: published weights, and the probability that a query block gives to each KV block.

The backends undo RoPE and pool; what is left is small (one vector per block and head) and plain PyTorch on any device,
without a synchronisation.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactattn.data import GateKeys, KVSummary, PagedKV, PrefillBatch
from compactattn.dispatch import Backend
from compactattn.selectors import SeerGate
from compactattn.summary import empty_gate_keys
from compactattn.validation import DTYPES, check_device, check_int, check_tensor, fail

_WEIGHT_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.attn_gate\.mask_linear_k\.weight")


def load_seer_gates(
    path: str | os.PathLike[str],
    *,
    layers: int | None,
    heads: int,
    head_dim: int,
    inv_freq: Tensor,
    device: torch.device | str | None = None,
    **settings: Any,
) -> dict[int, SeerGate]:
    """Read a published checkpoint (`attn_gate_weights.pth`), or the same tensors from a `.safetensors` file.

    The file holds one tensor per layer, `model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight`, of shape
    [Hq, 3 * D, D], and nothing else. Nothing that it contains is run: anything but tensors is refused.

        rope = model.model.rotary_emb
        gates = load_seer_gates(path, layers=32, heads=32, head_dim=128, inv_freq=rope.inv_freq)
        enable(selector=gates, heads_per_group=4)

    Args:
        path: the file; ".safetensors" says which kind it is.
        layers: how many layers the model has; the file must have each. None takes the layers that the file has.
        heads, head_dim: Hq and D of the model.
        inv_freq: [D / 2], see `SeerGate`.
        device: where the weights shall lie; None is where inv_freq lies.
        settings: the other fields of `SeerGate`, such as `threshold` and `rope_scale`.

    Returns:
        A selector per layer, which `compactattn.integrations.transformers.enable` accepts as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a missing layer, another shape, NaN or Inf: the message names file and tensor. Or
            an argument of another kind, or a device that is not here.
    """
    for name, value in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
        if name != "layers" or value is not None:
            check_int(name, value, 1)
    check_tensor("inv_freq", inv_freq, ndim=1)
    device = inv_freq.device if device is None else check_device("device", device)
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a file of gate weights, got no file at all")
    tensors = _read(file)
    if not tensors:
        raise fail(f"{file}", "gate weights of at least one layer", "none")
    numbers = range(layers) if layers is not None else sorted({_layer(name) for name in tensors})
    gates = {}
    for layer in numbers:
        name = f"model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight"
        if name not in tensors:
            wanted = f"a tensor {name}" if layers is None else f"a tensor {name} (the model has {layers} layers)"
            raise fail(f"{file}", wanted, f"{len(tensors)} other tensors")
        weights = tensors.pop(name)
        if tuple(weights.shape) != (heads, 3 * head_dim, head_dim) or weights.dtype not in DTYPES:
            wanted = f"a floating-point tensor of shape {(heads, 3 * head_dim, head_dim)} (Hq, 3 D, D)"
            raise fail(f"{file}: {name}", wanted, f"{weights.dtype} {tuple(weights.shape)}")
        if not bool(torch.isfinite(weights).all()):
            raise fail(f"{file}: {name}", "finite values", "NaN or Inf")
        gates[layer] = SeerGate(weights.to(device), inv_freq.to(device), **settings)
    if tensors:
        raise fail(f"{file}", f"only the gate weights of {len(gates)} layers", ", ".join(sorted(tensors)[:4]))
    return gates


def _layer(name: str) -> int:
    """The layer whose gate weights a tensor of this name holds."""
    match = _WEIGHT_NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _read(file: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name; nothing but named gate weights is let through."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise fail(f"{file}", "tensors only", "a file that torch.load refuses with weights_only=True") from error
    except Exception as error:  # torch and safetensors raise many kinds on a damaged file, and their words say little
        why = getattr(error, "strerror", None) or type(error).__name__
        raise fail(f"{file}", "a checkpoint written by torch.save or safetensors", f"something else ({why})") from error
    if not isinstance(content, dict):
        raise fail(f"{file}", "a dictionary of tensors", type(content).__name__)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not _WEIGHT_NAME.fullmatch(name):
            wanted = "only tensors named model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight"
            raise fail(f"{file}", wanted, f"{name!r}: {type(value).__name__}")
    return dict(content)


def probabilities(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: SeerGate,
    summary: KVSummary | None,
    visible: Tensor,
    backend: Backend,
) -> Tensor:
    """The gate's softmax over visible KV blocks, float32 [B, Hq, Qb, Kb]; NaN where a query block sees nothing.

    Args:
        summary: gate keys to trust; None, or one without them, pools every unit on the spot.
        visible: bool [B, Qb, Kb].
    """
    if backend == "triton":
        from compactattn._triton.gate import pool_queries, update_gate
    else:
        from compactattn._numba.gate import pool_queries, update_gate
    unit = min(kv.page_size, selector.block_size)
    if summary is not None and summary.gate is not None:
        gate = summary.gate
        if gate.rope_scale != float(selector.rope_scale):
            raise fail("summary.gate", f"keys pooled with rope_scale {float(selector.rope_scale)}", gate.rope_scale)
    else:
        gate = empty_gate_keys(kv, unit, selector)
        update_gate(kv, batch, gate, unit, 0)
    pooled_k = _block_keys(kv, batch, gate, unit, selector.block_size)  # [B, Kb, Hkv, 3 D]
    weights = selector.weights.float().unflatten(0, (kv.num_kv_heads, -1))
    keys = torch.einsum("bjhc,hgcd->bhgjd", pooled_k, weights)
    inv_freq, rope_scale = gate.inv_freq, selector.rope_scale
    queries = pool_queries(q, batch, selector.query_block, inv_freq, rope_scale)  # [B, Qb, Hq, D]
    queries = queries.transpose(1, 2).unflatten(1, (kv.num_kv_heads, -1))
    first_query = batch.past_lens[:, None] + torch.arange(queries.shape[3], device=q.device) * selector.query_block
    first_key = torch.arange(keys.shape[3], device=q.device) * selector.block_size
    queries = rotate(queries, first_query[:, None, None], inv_freq, rope_scale)
    keys = rotate(keys, first_key, inv_freq, rope_scale)
    logits = torch.matmul(queries, keys.transpose(-1, -2)).flatten(1, 2) * q.shape[-1] ** -0.5
    return logits.masked_fill(~visible[:, None], -math.inf).softmax(-1)


def _block_keys(kv: PagedKV, batch: PrefillBatch, gate: GateKeys, unit: int, block_size: int) -> Tensor:
    """[max | min | mean] of each KV block over its tokens below seq_lens, float32 [B, Kb, Hkv, 3 D]; 0 for others."""
    per_page, per_block = kv.page_size // unit, block_size // unit
    units = torch.arange(batch.kv_blocks(block_size) * per_block, device=kv.k.device)
    tokens = (batch.seq_lens[:, None] - units * unit).clamp(0, unit)  # [B, units]
    column = (units // per_page).clamp(max=kv.page_table.shape[1] - 1)
    pages = torch.where(tokens > 0, kv.page_table[:, column], 0).long()  # an entry behind seq_lens is never followed
    pooled = gate.pooled[pages, units % per_page].unflatten(1, (-1, per_block))  # [B, Kb, per_block, Hkv, 3 D]
    tokens = tokens.unflatten(1, (-1, per_block))[..., None, None]
    largest, smallest, mean = pooled.chunk(3, dim=-1)
    count = tokens.sum(2)
    parts = (
        largest.masked_fill(tokens == 0, -math.inf).amax(2),
        smallest.masked_fill(tokens == 0, math.inf).amin(2),
        (mean * tokens).masked_fill(tokens == 0, 0.0).sum(2) / count.clamp(min=1),
    )
    return torch.cat(parts, dim=-1).masked_fill(count == 0, 0.0)


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    """RoPE of x [..., n, D] at int positions [..., n]: dimensions d and d + D / 2 turn by position * inv_freq[d]."""
    angle = position[..., None].float() * inv_freq
    cos, sin = angle.cos() * scale, angle.sin() * scale
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def unrotate(x: Tensor, position: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    """Undo `rotate`: x [..., n, D] as it was before RoPE, in float32."""
    angle = position[..., None].float() * inv_freq
    cos, sin = angle.cos() / scale, angle.sin() / scale
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos + high * sin, high * cos - low * sin), dim=-1)
