"""What some models change about attention: sink logits, soft-capped scores, a sliding window.

They belong to the model, not to the selection: tables mean the same with and without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compactattn.data import PagedKV
from compactattn.validation import MAX_SCALE, check_int, check_same_device, check_shape, check_tensor, fail


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one attention layer, in the order in which they act on a score.

    Attributes:
        softcap: a score s = scale · q·k becomes softcap · tanh(s / softcap), before any mask (Gemma 2); None: it stays.
        window: a query at position p sees keys at positions above p - window, its own included: so `sliding_window`
            counts in transformers' configurations and in vLLM, and FlashAttention's left window is one less.
        sinks: float32 [Hq], one more logit per query head, natural log, in the softmax's denominator; it is neither
            scaled nor capped and has no value (gpt-oss). -inf is none.
    """

    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


PLAIN = Features()


def check_features(softcap: float | None, window: int | None, sinks: Tensor | None, q: Tensor) -> Features:
    """The three as one record, `PLAIN` where all are None; q: [T, Hq, D], checked before."""
    if softcap is None and window is None and sinks is None:
        return PLAIN
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap <= MAX_SCALE:
            raise fail("softcap", f"a number above 0 and at most {MAX_SCALE:g}, or None", repr(softcap))
        softcap = float(softcap)
    if window is not None:
        check_int("window", window, 1)
    if sinks is not None:
        check_tensor("sinks", sinks, ndim=1, dtype=torch.float32)
        check_shape("sinks", sinks, (q.shape[1],), "one logit per query head")
        check_same_device("sinks", sinks, q.device)
        if not sinks.is_contiguous():
            raise fail("sinks", "a contiguous tensor", f"strides {sinks.stride()}")
        if torch.is_grad_enabled() and sinks.requires_grad:
            raise fail("sinks", "a tensor without gradients (inference only)", "requires_grad=True under grad mode")
    return Features(softcap, window, sinks)


def check_correctable(features: Features) -> None:
    """A mean stands for all tokens of its block, and a window cuts blocks in two."""
    if features.window is not None:
        raise fail("window", "None beside a correction", features.window)


def named(features: Features, kv: PagedKV) -> tuple[str, ...]:
    """What of a call only the general attention kernels know, in words."""
    present = (
        ("soft-capped scores", features.softcap is not None),
        ("a sliding window", features.window is not None),
        ("attention sinks", features.sinks is not None),
        ("an FP8 cache", kv.k_scale is not None),
    )
    return tuple(name for name, is_there in present if is_there)


def first_visible(features: Features, position: int) -> int:
    """The first position that a query at `position` sees."""
    return 0 if features.window is None else max(0, position - features.window + 1)
