"""SeerAttention gates for a capture: the reader's own weights, or those that ship for the sample."""

from __future__ import annotations

import torch
from torch import Tensor

from compactattn import SeerGate, load_seer_gates
from compactattn.demo import best_device
from compactattn.validation import fail
from inspector.files import GateWeights
from inspector.sources import About


def inverse_frequencies(rope_theta: float, head_dim: int) -> Tensor:
    """float32 [D / 2]: the angles per position of plain RoPE, as transformers' `rotary_emb.inv_freq` has them."""
    return 1.0 / rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def load(weights: GateWeights, about: About, data: bytes | None = None) -> dict[int, SeerGate]:
    """The gates of a file by layer, on the device that the inspector computes on. `data`: the bytes of an upload.

    A capture knows the base of its RoPE alone: where a model scales its frequencies (Llama 3.1 does), they are undone
    with other angles than the gate was trained with.

    Raises:
        FileNotFoundError, ValueError: whatever `load_seer_gates` refuses: no such file, other heads or another head
            dimension than the capture's, anything but gate weights; and gates for data that no model made.
    """
    if about.rope_theta is None:
        raise fail("gate", "a capture, which a gate was trained for", about.label)
    with weights.opened(data) as file:
        return load_seer_gates(
            file,
            layers=None,
            heads=about.heads,
            head_dim=about.head_dim,
            inv_freq=inverse_frequencies(about.rope_theta, about.head_dim).to(best_device()),
        )


def of_layer(gates: dict[int, SeerGate], layer: int, weights: GateWeights) -> SeerGate:
    """The gate of one of the capture's layers.

    Raises:
        ValueError: the file has none for this layer.
    """
    if layer not in gates:
        raise fail(weights.label, f"gate weights of layer {layer}", "those of " + ", ".join(map(str, gates)))
    return gates[layer]
