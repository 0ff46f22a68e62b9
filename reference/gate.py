"""SeerGate: a trained gate over queries and keys as they were before RoPE, pooled per block."""

from __future__ import annotations

import torch

from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selectors import SeerGate
from reference.requests import Request, requests
from reference.summary import summarize, unrotate


def gate_probabilities(
    q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, selector: SeerGate, *, summary: KVSummary | None = None
) -> torch.Tensor:
    """Softmax over the visible KV blocks j of gate(i, j), [B, Hq, Qb, Kb]; 0 where nothing is visible.

    gate(i, j) = D^-0.5 · RoPE(mean of the queries of i) · RoPE([max | min | mean of the keys of j] W_h), each RoPE at
    the first position of its block.
    """
    block_size, query_block, group = selector.block_size, selector.query_block, q.shape[1] // kv.k.shape[2]
    q_blocks, kv_blocks = -(-batch.max_q_len // query_block), -(-batch.max_seq_len // block_size)
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (len(batch.seq_lens), q.shape[1], q_blocks, kv_blocks)
    probability = torch.zeros(shape, dtype=dtype, device=q.device)
    if summary is None or summary.gate is None:
        summary = summarize(kv, batch, block_size=block_size, gate=selector)
    rope = (selector.inv_freq.float(), selector.rope_scale)
    for request in requests(batch):
        keys = [block_keys(summary, kv, request, j, block_size) for j in range(-(-request.seq_len // block_size))]
        for i, queries in enumerate(request.query_blocks(query_block)):
            rows = q[request.start + queries.start : request.start + queries.stop].to(dtype)
            position = request.past_len + torch.tensor(queries, device=q.device)
            mean = unrotate(rows.transpose(0, 1), position, *rope).mean(1)  # [Hq, D]
            visible = range(request.last_visible_block(queries, block_size) + 1)
            for h in range(q.shape[1]):
                query = rotate(mean[h], position[0], *rope)
                logits = []
                for j in visible:
                    key = keys[j][h // group].to(dtype) @ selector.weights[h].to(dtype)
                    key = rotate(key, torch.tensor(j * block_size, device=q.device), *rope)
                    logits.append(query @ key * q.shape[-1] ** -0.5)
                probability[request.index, h, i, : len(visible)] = torch.stack(logits).softmax(0)
    return probability


def block_keys(summary: KVSummary, kv: PagedKV, request: Request, block: int, block_size: int) -> torch.Tensor:
    """[max | min | mean] of a block's tokens below seq_len, [Hkv, 3 D], from those of its units."""
    assert summary.gate is not None
    page_size, unit = kv.k.shape[1], summary.unit
    largest, smallest, total, tokens = [], [], [], 0
    for start in range(block * block_size, min((block + 1) * block_size, request.seq_len), unit):
        page = int(kv.page_table[request.index, start // page_size])
        high, low, mean = summary.gate.pooled[page, start % page_size // unit].chunk(3, dim=-1)
        count = min(unit, request.seq_len - start)
        largest.append(high)
        smallest.append(low)
        total.append(mean * count)
        tokens += count
    parts = torch.stack(largest).amax(0), torch.stack(smallest).amin(0), torch.stack(total).sum(0) / tokens
    return torch.cat(parts, dim=-1)


def rotate(x: torch.Tensor, position: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    """RoPE: dimensions d and d + D/2 turn by the float32 angle position · inv_freq[d], and are scaled."""
    angle = (position.float()[..., None] * inv_freq).to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    turned = low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()
    return torch.cat(turned, dim=-1) * scale
