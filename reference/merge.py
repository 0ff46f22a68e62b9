"""Attention over two disjoint sets of keys, merged by the log-sum-exps."""

from __future__ import annotations

import math

import torch


def merge_attn_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, D] and lse [T, Hq]: each side weighs exp(its lse - the lse of both); a side of lse -inf is nothing.

    +inf is FlashAttention-2's word for a row without keys.
    """
    lse_a, lse_b = (torch.where(lse == math.inf, -math.inf, lse) for lse in (lse_a, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros(out_a.shape, dtype=lse.dtype, device=out_a.device)
    for part, own in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(own == -math.inf, 0.0, (own - lse).exp())[..., None]
        out += torch.where(weight == 0.0, 0.0, weight * part.to(lse.dtype))
    return out.to(out_a.dtype), lse
