"""The one error budget: how far a float may be from its float64 value, and which selections float64 leaves open.

Attention (SPEC 3.3), per request and head: max|o - o64| <= 2 * max|plain - o64| + eps(dtype) * max|o64|, and for the
log-sum-exp likewise. `plain` is softmax attention in the input dtype, spelled out in PyTorch over the unpaged keys. In
float32 its error depends on the order in which keys and dimensions are summed, so the worst of several orders counts.

Selection: every backend is compared with the float64 decision, except where a score lies within its rounding error
of the threshold. With u = 2**-24 (eps of float32 / 2, doubled below because tensor cores truncate):

- a key mean of n tokens, summed in float32 in any order, is off by at most (n + 1) * 2u * mean|k|; rounding to q's
  dtype turns that into nothing at all, or into one step of the dtype where the interval holds a rounding boundary;
- a dot product of n terms is off by at most (n + 1) * 2u * sum|q||k|, its scaling by one more rounding;
- exp, log and a sum of m terms are off by a relative (m + 8) * 2u, and exp(x) by |x| * 2u more, since exp2 is
  given x * log2(e) rounded once;
- log S = log-sum-exp over rows moves by no more than its largest argument does; a threshold moves like its maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compactattn import BlockTable, FlashPrefill, KeyBounds, Oracle, SeerGate, Selector, XAttention
from compactattn.features import PLAIN, Features
from tests.strategies import Step, ceil_div

ROUNDING = 2.0**-23
ORDERS, SAMPLES = 4, 192


# ---- attention ----


def softmax_attention(
    step: Step,
    table: BlockTable,
    dtype: torch.dtype,
    scale: float,
    features: Features = PLAIN,
    order: torch.Generator | None = None,
    few: int = 0,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch attention under the table, in `dtype`: out [rows, Hq, D], lse [rows, Hq].

    With `order`, keys and dimensions are summed in a random order; with `few`, only requests of at most so many rows.
    """
    g, device = step.geometry, step.q.device
    out = torch.zeros(step.rows, g.heads, g.dim, dtype=dtype, device=device)
    lse = torch.full((step.rows, g.heads), -math.inf, dtype=dtype, device=device)
    listed = torch.zeros(table.indices.shape[0], g.kv_blocks, dtype=torch.bool)
    for r, count in enumerate(table.counts.tolist()):
        listed[r, table.indices[r, :count].long().cpu()] = True
    listed, rows = listed.to(device), table.rows.long()
    for b, i, span in query_blocks(step):
        if few and g.q_lens[b] > few:
            continue
        first = g.past_lens[b] + span.start - g.starts[b]
        position = torch.arange(first, first + span.stop - span.start, device=device)
        key = torch.arange(first + len(position), device=device)
        key = key[listed[rows[b, :, i]].any(0)[key // g.block_size]]
        if features.window is not None:
            key = key[key > first - features.window]
        dim = torch.arange(g.dim, device=device)
        if order is not None:
            key = key[torch.randperm(len(key), generator=order).to(device)]
            dim = dim[torch.randperm(g.dim, generator=order).to(device)]
        seen = listed[rows[b, :, i]][:, key // g.block_size][:, None] & (key <= position[:, None])  # [Hq, rows, keys]
        if features.window is not None:
            seen &= key > position[:, None] - features.window
        if len(key) == 0 and features.sinks is None:
            continue
        q, k, v = (x.to(dtype).transpose(0, 1) for x in (step.q[span], step.keys[b][key], step.values[b][key]))
        for h in range(g.heads):  # a product of its own for each head: a batch of them would sum in another order
            s = q[h][:, dim] @ k[h // g.group][:, dim].T * scale
            if features.softcap is not None:
                s = features.softcap * torch.tanh(s / features.softcap)
            s = s.masked_fill(~seen[h], -math.inf)
            if features.sinks is not None:
                s = torch.cat((features.sinks[h].to(dtype).expand(len(s), 1), s), 1)
            weights = s.softmax(-1).masked_fill((s == -math.inf).all(-1, keepdim=True), 0.0)
            out[span, h] = weights[:, -len(key) :] @ v[h // g.group] if len(key) else 0.0
            lse[span, h] = s.logsumexp(-1)
    return out, lse


def query_blocks(step: Step) -> Iterator[tuple[int, int, slice]]:
    """(request, query block, its rows of q)."""
    g = step.geometry
    for b in g.requests:
        for i in range(ceil_div(g.q_lens[b], g.query_block)):
            first = g.starts[b] + i * g.query_block
            yield b, i, slice(first, min(first + g.query_block, g.starts[b + 1]))


def assert_attention(
    step: Step,
    table: BlockTable,
    out: Tensor,
    lse: Tensor | None = None,
    scale: float | None = None,
    features: Features = PLAIN,
) -> None:
    """SPEC 3.3: `out` (and `lse`) are as close to float64 as plain attention in the same dtype is, give or take 2."""
    g = step.geometry
    scale = g.dim**-0.5 if scale is None else scale
    assert out.dtype == g.dtype
    assert out.shape == step.q.shape
    results = {"out": out[: step.rows]}
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.shape == step.q.shape[:2]
        results["lse"] = lse[: step.rows]
    exact = dict(zip(("out", "lse"), softmax_attention(step, table, torch.float64, scale, features), strict=True))
    plain = dict(zip(("out", "lse"), softmax_attention(step, table, g.dtype, scale, features), strict=True))
    errors = {name: _worst(step, plain[name], exact[name]) for name in plain}
    if g.dtype == torch.float32 and any(_excess(step, x, exact[n], errors[n]) for n, x in results.items()):
        errors = _repeated(step, table, scale, features, exact, errors)
    for name, result in results.items():
        excess = _excess(step, result, exact[name], errors[name])
        assert not excess, f"{name} of {excess}, in {g}"


def _repeated(
    step: Step,
    table: BlockTable,
    scale: float,
    features: Features,
    exact: dict[str, Tensor],
    errors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """max|plain - o64| over plain attention with its keys and dimensions summed in other orders too, [B, Hq] each.

    In float32 one maximum is a matter of luck (zero, at times, for a handful of rows): every request is repeated
    ORDERS times, and a short one until about SAMPLES rows were seen.
    """
    g = step.geometry
    order = torch.Generator().manual_seed(g.seed)
    shortest = min((n for n in g.q_lens if n), default=SAMPLES)
    for n in range(1, max(ORDERS, ceil_div(SAMPLES, shortest)) + 1):
        few = max(g.q_lens) if n <= ORDERS else SAMPLES // n
        plain = dict(zip(exact, softmax_attention(step, table, g.dtype, scale, features, order, few), strict=True))
        short = torch.tensor([length <= few for length in g.q_lens], device=step.q.device)[:, None]
        again = {name: _worst(step, plain[name], exact[name]) for name in plain}
        errors = {name: torch.where(short, torch.maximum(again[name], e), e) for name, e in errors.items()}
    return errors


def _worst(step: Step, got: Tensor, exact: Tensor) -> Tensor:
    """max|got - exact| per request and head, [B, Hq]; inf for NaN; 0 where both are -inf."""
    g = step.geometry
    error = (got.double() - exact).abs().masked_fill(got.double() == exact, 0.0).nan_to_num(math.inf, math.inf)
    error = error.flatten(2).amax(2) if error.ndim == 3 else error
    worst = torch.zeros(len(g.q_lens), g.heads, dtype=torch.float64, device=got.device)
    for b in g.requests:
        if g.q_lens[b]:
            worst[b] = error[g.starts[b] : g.starts[b + 1]].amax(0)
    return worst


def _excess(step: Step, got: Tensor, exact: Tensor, plain_error: Tensor) -> str:
    """What exceeds the budget, in words; empty if nothing does."""
    g = step.geometry
    finite = exact.masked_fill(exact == -math.inf, 0.0)
    budget = 2 * plain_error + torch.finfo(g.dtype).eps * _worst(step, finite, torch.zeros_like(finite))
    error = _worst(step, got, exact)
    for b, h in (error > budget).nonzero().tolist():
        off = (got - exact)[g.starts[b] : g.starts[b + 1], h].abs().nan_to_num(math.inf, math.inf)
        row = off.reshape(len(off), -1).amax(1)
        return (
            f"request {b}, head {h}: error {float(error[b, h]):.3e} at row {int(row.argmax())}, "
            f"budget {float(budget[b, h]):.3e}"
        )
    return ""


# ---- selection ----


@dataclass(frozen=True, eq=False)
class Decision:
    """keep: bool [B, Hq, Qb, Kb] by float64. open: where rounding may decide either way."""

    keep: Tensor
    open: Tensor


def decide(step: Step, selector: Selector, visible: Tensor, forced: Tensor, scale: float | None = None) -> Decision:
    """The float64 selection, given the visible and the forced bits (bool [B, Qb, Kb], derived from lengths alone)."""
    scale = step.geometry.dim**-0.5 if scale is None else scale
    g = step.geometry
    keep = forced[:, None].expand(-1, g.heads, -1, -1).clone()
    doubt = torch.zeros_like(keep)
    for b, i, span in query_blocks(step):
        for h in range(g.heads):
            blocks = int(visible[b, i].sum())
            if forced[b, i, :blocks].all():
                continue
            if isinstance(selector, FlashPrefill):
                kept, unsure = _threshold_rule(step, selector, b, h, span, scale)
            elif isinstance(selector, KeyBounds):
                kept, unsure = _bounds_rule(step, selector, b, h, span, scale)
            elif isinstance(selector, SeerGate):
                kept, unsure = _gate_rule(step, selector, b, h, span, blocks)
            else:
                assert isinstance(selector, (XAttention, Oracle))
                kept, unsure = _mass_rule(step, selector, b, h, span, scale, forced[b, i, :blocks].cpu())
            keep[b, h, i, : len(kept)] |= kept.to(keep.device)
            doubt[b, h, i, : len(kept)] = unsure.to(keep.device)
    return Decision(keep, doubt & ~forced[:, None] & visible[:, None])


def _threshold_rule(
    step: Step, selector: FlashPrefill, b: int, h: int, span: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """FlashPrefill over the complete blocks of one request, for one head and query block."""
    g = step.geometry
    size, complete = g.block_size, g.seq_lens[b] // g.block_size
    if complete == 0:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    q = step.q[span, h].double().cpu()
    first = g.past_lens[b] + span.start - g.starts[b]
    position = torch.arange(first, first + len(q))
    k = step.keys[b][: complete * size, h // g.group].double().cpu().view(complete, size, -1)
    mean, slip = k.mean(1), (size + 1) * ROUNDING * k.abs().mean(1)
    low, high = ((mean + side * slip).to(g.dtype).double() for side in (-1, 1))
    rounded = mean.to(g.dtype).double()
    mean_error = torch.maximum(high - rounded, rounded - low)
    s = q @ rounded.T * scale
    s_error = scale * (q.abs() @ mean_error.T + (g.dim + 2) * ROUNDING * (q.abs() @ (rounded.abs() + mean_error).T))
    unseen = position[:, None] < torch.arange(1, complete + 1) * size - 1
    s, s_error = s.masked_fill(unseen, -math.inf), s_error.masked_fill(unseen, 0.0)
    log_s = s.logsumexp(0)
    scored = log_s > -math.inf
    spread = (s - s.amax(0)).masked_fill(unseen, 0.0).abs().amax(0)
    magnitude = log_s.abs().nan_to_num(posinf=0.0)
    error = s_error.amax(0) + (len(q) + 8 + spread + 2 * magnitude) * ROUNDING
    if selector.alpha == 0 or not scored.any():
        return scored, torch.zeros_like(scored)
    threshold = log_s.max() + math.log(selector.alpha)
    threshold_error = error[scored].max() + 2 * abs(math.log(selector.alpha)) * ROUNDING
    unsure = scored & ((log_s - threshold).abs() <= error + threshold_error)
    best = int(log_s.argmax())
    rivals = log_s - log_s[best] + error + error[best] >= 0
    unsure[best] &= int(rivals.sum()) > 1  # alone at the top, it is kept at any alpha up to 1
    return scored & (log_s >= threshold), unsure


def _bounds_rule(step: Step, selector: KeyBounds, b: int, h: int, span: slice, scale: float) -> tuple[Tensor, Tensor]:
    """KeyBounds over the complete blocks of one request, for one head and query block.

    The bounds themselves are exact, but for one rounding of those of an FP8 cache. A row's u is off by the rounding of
    2 D products and sums and of two scalings, its log-sum-exp by the largest of these and by a sum over blocks in any
    order.
    """
    g = step.geometry
    size, complete = g.block_size, g.seq_lens[b] // g.block_size
    if complete == 0:
        return torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
    q = step.q[span, h].double().cpu() * scale
    first = g.past_lens[b] + span.start - g.starts[b]
    k = step.keys[b][: complete * size, h // g.group].double().cpu().view(complete, size, -1)
    largest, smallest = (x.to(g.dtype).double() for x in (k.amax(1), k.amin(1)))
    u = torch.maximum(q[:, None] * largest, q[:, None] * smallest).sum(-1)
    reach = torch.maximum((q[:, None] * largest).abs(), (q[:, None] * smallest).abs()).sum(-1)
    position = torch.arange(first, first + len(q))
    unseen = position[:, None] < torch.arange(1, complete + 1) * size - 1
    u, u_error = u.masked_fill(unseen, -math.inf), ((2 * g.dim + 4) * ROUNDING * reach).masked_fill(unseen, 0.0)
    total = u.logsumexp(1, keepdim=True)
    share = (u - torch.where(total > -math.inf, total, 0.0)).amax(0)
    spread = (u.amax(1, keepdim=True) - u).masked_fill(unseen, 0.0)
    magnitude = u.abs().masked_fill(unseen, 0.0).amax(1, keepdim=True)
    error = (u_error + u_error.amax(1, keepdim=True) + (complete + 8 + spread + 4 * magnitude) * ROUNDING).amax(0)
    scored = share > -math.inf
    if selector.threshold == 0:
        return scored, torch.zeros_like(scored)
    threshold = math.log(selector.threshold)
    return scored & (share >= threshold), scored & ((share - threshold).abs() <= error + 2 * abs(threshold) * ROUNDING)


def unrotated(x: Tensor, position: Tensor, selector: SeerGate) -> tuple[Tensor, Tensor]:
    """Rows [n, D] before RoPE in float64, and a bound on the float32 error of each number.

    The angle is the float32 product that RoPE itself uses; cos and sin are off by at most two units of 2 ** -24, and
    two products, their sum and the scaling round once each.
    """
    angle = (position.float()[:, None] * selector.inv_freq.float().cpu()).double()
    low, high = x.double().chunk(2, dim=-1)
    turned = low * angle.cos() + high * angle.sin(), high * angle.cos() - low * angle.sin()
    error = 6 * ROUNDING * (low.abs() + high.abs()).repeat(1, 2)
    return torch.cat(turned, dim=-1) / selector.rope_scale, error / selector.rope_scale


def pooled_key(k: Tensor, position: Tensor, selector: SeerGate) -> tuple[Tensor, Tensor]:
    """[max | min | mean] of keys [n, D] before RoPE, float64 [3 D], and its error bound."""
    before, error = unrotated(k, position, selector)
    mean_error = error.mean(0) + (len(k) + 8) * ROUNDING * before.abs().mean(0)
    pooled = torch.cat((before.amax(0), before.amin(0), before.mean(0)))
    return pooled, torch.cat((error.amax(0), error.amax(0), mean_error))


def _gate_rule(step: Step, selector: SeerGate, b: int, h: int, span: slice, blocks: int) -> tuple[Tensor, Tensor]:
    """SeerGate over the visible blocks of one request, for one head and query block."""
    g, size = step.geometry, selector.block_size
    first = g.past_lens[b] + span.start - g.starts[b]
    rows, error = unrotated(step.q[span, h].cpu(), first + torch.arange(span.stop - span.start), selector)
    query_error = error.mean(0) + (len(rows) + 8) * ROUNDING * rows.abs().mean(0)
    query, query_error = _rotated(rows.mean(0), query_error, first, selector)
    weights = selector.weights[h].double().cpu()
    logit, logit_error = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64)
    for j in range(blocks):
        position = torch.arange(j * size, min((j + 1) * size, g.seq_lens[b]))
        pooled, error = pooled_key(step.keys[b][position, h // g.group].cpu(), position, selector)
        key, key_error = pooled @ weights, (error + (3 * g.dim + 2) * ROUNDING * pooled.abs()) @ weights.abs()
        key, key_error = _rotated(key, key_error, j * size, selector)
        logit[j] = query @ key * g.dim**-0.5
        product = query_error @ (key.abs() + key_error) + query.abs() @ key_error
        product = product + (g.dim + 4) * ROUNDING * (query.abs() @ key.abs())
        logit_error[j] = product * g.dim**-0.5
    probability = logit.softmax(0)
    relative = (2 * logit_error.max() + (blocks + 20 + 2 * (logit.max() - logit)) * ROUNDING).expm1()
    return probability > selector.threshold, (probability - selector.threshold).abs() <= probability * relative + 1e-30


def _rotated(x: Tensor, error: Tensor, position: int, selector: SeerGate) -> tuple[Tensor, Tensor]:
    """RoPE of a float64 vector [D] at a position, and what becomes of its error."""
    angle = (torch.tensor(float(position)) * selector.inv_freq.float().cpu()).double()
    (low, high), (low_error, high_error) = x.chunk(2), error.chunk(2)
    turned = low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()
    off = low_error + high_error + 6 * ROUNDING * (low.abs() + high.abs())
    return torch.cat(turned) * selector.rope_scale, off.repeat(2) * selector.rope_scale


def _mass_rule(
    step: Step, selector: XAttention | Oracle, b: int, h: int, span: slice, scale: float, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The smallest set of blocks that reaches a mass, or the top k, for one head and query block."""
    mass, error = block_mass(step, selector, b, h, span, scale)
    mass, error = mass[: len(forced)], error[: len(forced)]
    keep, unsure = forced.clone(), torch.zeros_like(forced)
    slack = float(error.sum()) + len(mass) * 2.0**-50 * float(mass.sum())
    for j in (~forced).nonzero()[:, 0].tolist():
        gap, tie = mass - mass[j], error + error[j]
        surely = ~forced & (gap > tie)
        perhaps = ~forced & (gap.abs() <= tie)
        perhaps[j] = False
        ahead = ~forced & ((gap > 0) | ((gap == 0) & (torch.arange(len(mass)) < j)))
        if selector_top_k(selector) is not None:
            free = selector_top_k(selector) - int(forced.sum())
            keep[j] = int(ahead.sum()) < free
            unsure[j] = int(surely.sum()) < free <= int(surely.sum() + perhaps.sum())
        else:
            share = selector.threshold if isinstance(selector, XAttention) else selector.mass
            target, taken = share * float(mass.sum()), float(mass[forced].sum())
            keep[j] = taken + float(mass[ahead].sum()) < target
            least, most = taken + float(mass[surely].sum()), taken + float(mass[surely | perhaps].sum())
            unsure[j] = least - slack < target <= most + slack
    return keep, unsure


def selector_top_k(selector: XAttention | Oracle) -> int | None:
    return selector.top_k if isinstance(selector, Oracle) else None


def block_mass(
    step: Step, selector: XAttention | Oracle, b: int, h: int, span: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax mass of each KV block summed over the (strided) rows, float64 [blocks], and its error bound."""
    g = step.geometry
    stride = selector.stride if isinstance(selector, XAttention) else 1
    q = pad_to(step.q[span, h].double().cpu(), stride)
    k = pad_to(step.keys[b][:, h // g.group].double().cpu(), stride)
    # row a of a query group meets row stride - 1 - a of a key group: one antidiagonal
    q = q.view(-1, stride, g.dim).flip(1).reshape(-1, stride * g.dim)
    k = k.view(-1, stride * g.dim)
    rows = span.stop - span.start
    last_row = (torch.arange(len(q)) * stride + stride - 1).clamp(max=rows - 1)
    position = g.past_lens[b] + span.start - g.starts[b] + last_row
    unseen = torch.arange(len(k)) * stride > position[:, None]
    s = (q @ k.T * (scale / stride)).masked_fill(unseen, -math.inf)
    s_error = (stride * g.dim + 3) * ROUNDING * (q.abs() @ k.abs().T * abs(scale / stride)).masked_fill(unseen, 0.0)
    share = s.softmax(1)
    spread = (s - s.amax(1, keepdim=True)).masked_fill(unseen, 0.0).abs()
    relative = 2 * s_error.amax(1, keepdim=True) + (len(k) + 2 * len(q) + 20 + 2 * spread) * ROUNDING
    block = torch.arange(len(k)) * stride // g.block_size
    blocks = ceil_div(g.seq_lens[b], g.block_size)
    mass, error = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64)
    mass.index_add_(0, block, share.sum(0))
    error.index_add_(0, block, (share * relative.expm1()).sum(0))
    return mass, error + 1e-30


def pad_to(rows: Tensor, stride: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % stride))


# ---- whole models ----


def assert_as_close(got: Tensor, plain: list[Tensor], exact: Tensor, where: str) -> None:
    """The budget of SPEC 3.3 for any result: `plain` are plain results in the input dtype, `exact` in float64."""
    assert got.shape == exact.shape
    worst = max(float((p.double() - exact).abs().max()) for p in plain)
    error = float((got.double() - exact).abs().nan_to_num(math.inf, math.inf).max())
    budget = 2 * worst + torch.finfo(plain[0].dtype).eps * float(exact.abs().max())
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}, {where}"
