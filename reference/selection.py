"""The selectors: which KV blocks does each query block of each head want?"""

from __future__ import annotations

import math

import torch

from compactattn.data import KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, SeerGate, Selector, XAttention
from reference.gate import gate_probabilities
from reference.requests import Request, requests, tokens
from reference.summary import summarize


def select(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    *,
    scale: float | None = None,
    summary: KVSummary | None = None,
) -> SelectionMask:
    """Apply the selector's own rules to every visible block; mask: bool [B, Hq, Qb, Kb]."""
    block_size, query_block = selector.block_size, selector.query_block
    q_blocks, kv_blocks = -(-batch.max_q_len // query_block), -(-batch.max_seq_len // block_size)
    shape = (len(batch.seq_lens), q.shape[1], q_blocks, kv_blocks)
    mask = torch.zeros(shape, dtype=torch.bool, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(selector, FlashPrefill):
        scores = flash_prefill_scores(q, kv, batch, selector, scale=scale, summary=summary)
    elif isinstance(selector, KeyBounds):
        scores = key_bounds_scores(q, kv, batch, selector, scale=scale, summary=summary)
    elif isinstance(selector, SeerGate):
        scores = gate_probabilities(q, kv, batch, selector, summary=summary)
    elif isinstance(selector, (XAttention, Oracle)):
        scores = block_mass(q, kv, batch, selector, scale=scale)
    for request in requests(batch):
        dense_request = request.q_len <= selector.dense_queries or request.seq_len <= selector.dense_keys
        for i, queries in enumerate(request.query_blocks(query_block)):
            last = request.last_visible_block(queries, block_size)
            if dense_request or isinstance(selector, Dense):
                mask[request.index, :, i, : last + 1] = True
                continue
            if request.ends_prompt(queries, selector.dense_last_blocks * query_block):
                mask[request.index, :, i, : last + 1] = True
                continue
            forced = torch.zeros(last + 1, dtype=torch.bool, device=q.device)
            forced[: selector.sink_blocks] = True
            forced[max(0, last + 1 - selector.window_blocks) :] = True
            for h in range(q.shape[1]):
                visible = scores[request.index, h, i, : last + 1]
                mask[request.index, h, i, : last + 1] = _keep(visible, forced, selector)
    return SelectionMask(mask, block_size, query_block, selector.dense_last_blocks, kv.k.shape[2])


def _keep(scores: torch.Tensor, forced: torch.Tensor, selector: Selector) -> torch.Tensor:
    if isinstance(selector, FlashPrefill):
        log_alpha = math.log(selector.alpha) if selector.alpha > 0 else -math.inf
        scored = scores > -math.inf
        return (scored & (scores >= scores.max() + log_alpha)) | forced
    if isinstance(selector, KeyBounds):
        log_threshold = math.log(selector.threshold) if selector.threshold > 0 else -math.inf
        return ((scores > -math.inf) & (scores >= log_threshold)) | forced
    if isinstance(selector, SeerGate):
        return (scores > selector.threshold) | forced
    if isinstance(selector, XAttention):
        return smallest_set(scores, forced, mass=selector.threshold)
    assert isinstance(selector, Oracle)
    return smallest_set(scores, forced, mass=selector.mass, top_k=selector.top_k)


def smallest_set(
    mass_per_block: torch.Tensor, forced: torch.Tensor, mass: float | None = None, top_k: int | None = None
) -> torch.Tensor:
    """Forced blocks first, then the heaviest (ties to the lower id) until the share `mass`, or `top_k`, is reached."""
    weights = mass_per_block.double()
    keep, reached, taken = forced.clone(), weights[forced].sum(), int(forced.sum())
    others = [j for j in range(len(weights)) if not forced[j]]
    for j in sorted(others, key=lambda j: (-float(weights[j]), j)):
        if (top_k is not None and taken >= top_k) or (mass is not None and reached >= mass * weights.sum()):
            break
        keep[j] = True
        reached, taken = reached + weights[j], taken + 1
    return keep


def flash_prefill_scores(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: FlashPrefill,
    *,
    scale: float,
    summary: KVSummary | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """log S(i, j), natural log, [B, Hq, Qb, Kb]; -inf where no row of i stands at or after the last token of j."""
    block_size, group = selector.block_size, q.shape[1] // kv.k.shape[2]
    q_blocks, kv_blocks = -(-batch.max_q_len // selector.query_block), -(-batch.max_seq_len // block_size)
    shape = (len(batch.seq_lens), q.shape[1], q_blocks, kv_blocks)
    log_s = torch.full(shape, -math.inf, dtype=dtype, device=q.device)
    if summary is None:
        summary = summarize(kv, batch, block_size=block_size)
    for request in requests(batch):
        complete = request.seq_len // block_size
        if complete == 0:
            continue
        means = block_means(summary, kv, request, complete, block_size).to(q.dtype)  # rounded once
        ends = torch.arange(1, complete + 1, device=q.device) * block_size - 1
        for i, queries in enumerate(request.query_blocks(selector.query_block)):
            rows = q[request.start + queries.start : request.start + queries.stop]
            position = request.past_len + torch.tensor(queries, device=q.device)
            keys = means.repeat_interleave(group, dim=1)
            s = torch.einsum("rhd,jhd->hrj", rows.to(dtype), keys.to(dtype)) * scale
            s = s.masked_fill(position[:, None] < ends, -math.inf)
            log_s[request.index, :, i, :complete] = s.logsumexp(dim=1)
    return log_s


def key_bounds_scores(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: KeyBounds,
    *,
    scale: float,
    summary: KVSummary | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """max over the rows r of i of log p(r, j), [B, Hq, Qb, Kb]; -inf where no row stands at or after j's last token.

    p(r, .) = softmax over the blocks that row r scores of u(r, j) = sum over d of max(x_d kmin_d, x_d kmax_d), where
    x = scale * q_r.
    """
    block_size, group = selector.block_size, q.shape[1] // kv.k.shape[2]
    q_blocks, kv_blocks = -(-batch.max_q_len // selector.query_block), -(-batch.max_seq_len // block_size)
    shape = (len(batch.seq_lens), q.shape[1], q_blocks, kv_blocks)
    log_p = torch.full(shape, -math.inf, dtype=dtype, device=q.device)
    if summary is None or summary.k_bounds is None:
        summary = summarize(kv, batch, block_size=block_size, bounds=True)
    for request in requests(batch):
        complete = request.seq_len // block_size
        largest, smallest = block_bounds(summary, kv, request, complete, block_size).to(q.dtype).to(dtype).chunk(2, -1)
        for i, queries in enumerate(request.query_blocks(selector.query_block)):
            for r in queries:
                scored = (request.past_len + r + 1) // block_size
                if scored == 0:
                    continue
                row = q[request.start + r].to(dtype) * scale
                for h in range(q.shape[1]):
                    high, low = largest[:scored, h // group], smallest[:scored, h // group]
                    share = torch.maximum(row[h] * high, row[h] * low).sum(-1).log_softmax(0)
                    best = log_p[request.index, h, i, :scored]
                    log_p[request.index, h, i, :scored] = torch.maximum(best, share)
    return log_p


def block_bounds(summary: KVSummary, kv: PagedKV, request: Request, blocks: int, block_size: int) -> torch.Tensor:
    """Largest, then smallest key of each dimension of a request's first blocks, float32 [blocks, Hkv, 2 D]."""
    assert summary.k_bounds is not None
    per_page = kv.k.shape[1] // summary.unit
    units = torch.arange(blocks * (block_size // summary.unit), device=kv.k.device)
    pages = kv.page_table[request.index].long()[units // per_page]
    bounds = summary.k_bounds[pages, units % per_page].unflatten(0, (blocks, block_size // summary.unit))
    largest, smallest = bounds.chunk(2, dim=-1)
    return torch.cat((largest.amax(1), smallest.amin(1)), dim=-1)


def block_means(summary: KVSummary, kv: PagedKV, request: Request, blocks: int, block_size: int) -> torch.Tensor:
    """Float32 key means of the first `blocks` blocks of a request, [blocks, Hkv, D], from the means of their units."""
    per_page = kv.k.shape[1] // summary.unit
    units = torch.arange(blocks * (block_size // summary.unit), device=kv.k.device)
    pages = kv.page_table[request.index].long()[units // per_page]
    means = summary.k_mean[pages, units % per_page]
    return means.view(blocks, block_size // summary.unit, *means.shape[1:]).mean(1)


def block_mass(
    q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, selector: XAttention | Oracle, *, scale: float
) -> torch.Tensor:
    """Attention mass of each KV block, summed over the rows of a query block, [B, Hq, Qb, Kb].

    With a stride, `stride` neighbouring keys are laid side by side and as many queries in reverse order, so that a
    product sums one antidiagonal of a stride x stride tile; stride 1 is exact attention. A strided query sees a
    strided key if the group's last row sees its first token; partial groups are padded with zeros.
    """
    stride = selector.stride if isinstance(selector, XAttention) else 1
    block_size, group = selector.block_size, q.shape[1] // kv.k.shape[2]
    q_blocks, kv_blocks = -(-batch.max_q_len // selector.query_block), -(-batch.max_seq_len // block_size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros((len(batch.seq_lens), q.shape[1], q_blocks, kv_blocks), dtype=dtype, device=q.device)
    for request in requests(batch):
        keys = _strided(tokens("k", kv, request).to(dtype), stride).repeat_interleave(group, dim=1)
        key_block = torch.arange(keys.shape[0], device=q.device) * stride // block_size
        for i, queries in enumerate(request.query_blocks(selector.query_block)):
            rows = q[request.start + queries.start : request.start + queries.stop].to(dtype)
            strided = _strided(rows, stride).flip(2)
            last_row = torch.arange(strided.shape[0], device=q.device) * stride + stride - 1
            position = request.past_len + queries.start + last_row.clamp(max=len(queries) - 1)
            s = torch.einsum("mhsd,nhsd->hmn", strided, keys) * (scale / stride)
            s = s.masked_fill(torch.arange(keys.shape[0], device=q.device) * stride > position[:, None], -math.inf)
            share = s.softmax(-1).sum(1)
            mass[request.index, :, i].index_add_(1, key_block, share)
    return mass


def _strided(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """[n, H, D] to [ceil(n / stride), H, stride, D], padded with zeros."""
    padding = -len(rows) % stride
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, padding))
    return rows.view(-1, stride, *rows.shape[1:]).transpose(1, 2)
