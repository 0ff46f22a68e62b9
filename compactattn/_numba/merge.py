"""Merge attention over two sets of keys by their log-sum-exps."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from compactattn._numba.threads import run_each

_ELEMENTS = 1 << 18  # of the outputs that are merged at a time: 1 MiB in float32


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write the merged out [T, Hq, D] (which may be out_a or out_b) and lse float32 [T, Hq]."""
    tokens = max(1, _ELEMENTS // max(1, out[:1].numel()))
    states = (out_a, lse_a, out_b, lse_b, out, lse)
    run_each([functools.partial(_merge, *parts) for parts in zip(*(x.split(tokens) for x in states), strict=True)])


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    lse_a, lse_b = (x.masked_fill(x == math.inf, -math.inf) for x in (lse_a, lse_b))
    top = torch.maximum(lse_a, lse_b)
    base = top.masked_fill(top == -math.inf, 0.0)
    weight_a, weight_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = weight_a + weight_b
    total.masked_fill_(total == 0.0, 1.0)
    part_a = (out_a.float() * weight_a[..., None]).masked_fill_((lse_a == -math.inf)[..., None], 0.0)
    part_b = (out_b.float() * weight_b[..., None]).masked_fill_((lse_b == -math.inf)[..., None], 0.0)
    out.copy_(part_a.add_(part_b).div_(total[..., None]))
    lse.copy_(top + total.log())
