"""How well the test bed's model predicts held-out text, and whether it uses what stands far back.

Everything runs under bfloat16 autocast, as training does. One byte is one token, so losses are bits per byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.testbed.corpus import SEPARATOR, plant_repeats

# A copy shows itself only after a few bytes; what it costs to notice it is not what the measure is about.
NOTICED_AFTER = 16


@dataclass(frozen=True)
class HeldoutReport:
    """Loss on held-out text.

    Attributes:
        bits_per_byte: mean over every predicted byte.
        by_position: the same for ranges of the byte's position in its window, such as "1024-2048".
        bytes: how many bytes were predicted.
    """

    bits_per_byte: float
    by_position: dict[str, float]
    bytes: int


def heldout_windows(stream: np.ndarray, context: int, limit: int) -> np.ndarray:
    """At most `limit` windows, spread evenly over the stream: int64 [n, context + 1].

    Raises:
        ValueError: the stream does not fill one window.
    """
    available = (len(stream) - 1) // context
    if available < 1:
        raise ValueError(f"held-out text: expected at least {context + 1} tokens, got {len(stream)}")
    chosen = np.linspace(0, available - 1, min(limit, available)).round().astype(int)
    return np.stack([stream[i * context : (i + 1) * context + 1] for i in chosen]).astype(np.int64)


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, windows: np.ndarray, batch: int) -> np.ndarray:
    """Cross-entropy of every target in bits: float32 [n, context] for windows int64 [n, context + 1]."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = []
    for start in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[start : start + batch]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        nats = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses.append(nats.view(tokens.shape[0], -1).cpu().numpy() / np.log(2))
    model.train(was_training)
    return np.concatenate(losses)


def heldout_report(model: LlamaForCausalLM, stream: np.ndarray, context: int, limit: int, batch: int) -> HeldoutReport:
    """Loss on at most `limit` windows of `context` tokens; separators are not counted."""
    windows = heldout_windows(stream, context, limit)
    losses = token_losses(model, windows, batch)
    counted = windows[:, 1:] < SEPARATOR
    edges = (0, context // 8, context // 4, context // 2, context)
    by_position = {
        f"{low}-{high}": _mean(losses[:, low:high][counted[:, low:high]])
        for low, high in pairwise(edges)
        if counted[:, low:high].any()
    }
    return HeldoutReport(_mean(losses[counted]), by_position, int(counted.sum()))


def repeat_report(
    model: LlamaForCausalLM, stream: np.ndarray, context: int, limit: int, batch: int
) -> dict[str, float]:
    """Bits per byte on copies planted in held-out windows, by how far back the original lies.

    The keys are distance ranges in tokens, such as "1024-4096", and "untouched" for the rest of the same
    windows: a model that cannot look back pays as much for the copies as for the rest. The first bytes of a
    copy do not count.
    """
    windows = heldout_windows(stream, context, limit)
    rng = np.random.default_rng(0)
    distance = np.zeros(windows.shape, dtype=np.int64)
    for row, distances in zip(windows, distance, strict=True):
        for repeat in plant_repeats(row, rng):
            distances[repeat.start : repeat.start + min(NOTICED_AFTER, repeat.length)] = -1
            distances[repeat.start + NOTICED_AFTER : repeat.start + repeat.length] = repeat.start - repeat.source
    losses, distance = token_losses(model, windows, batch), distance[:, 1:]
    edges = (1, context // 8, context // 2, context)
    selected = {f"{low}-{high}": (low <= distance) & (distance < high) for low, high in pairwise(edges)}
    selected["untouched"] = distance == 0
    return {name: _mean(losses[where]) for name, where in selected.items() if where.any()}


def _mean(losses: np.ndarray) -> float:
    return round(float(losses.mean(dtype=np.float64)), 4)
