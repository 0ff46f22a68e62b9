"""Exact softmax attention of each query over the visible tokens of its row's blocks."""

from __future__ import annotations

import math

import torch

from compactattn.data import BlockTable, PagedKV, PrefillBatch
from reference.requests import requests, tokens


def attend(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, D] in q's dtype, lse float32 (float64 for float64 inputs) [T, Hq], natural log.

    Computes in float32, in float64 for float64 inputs. A query with an empty table gets out 0 and lse -inf.
    """
    block_size, group = table.block_size, q.shape[1] // kv.k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    for request in requests(batch):
        for i, queries in enumerate(request.query_blocks(table.query_block)):
            rows = slice(request.start + queries.start, request.start + queries.stop)
            position = request.past_len + torch.tensor(queries, device=q.device)
            for h in range(q.shape[1]):
                r = int(table.rows[request.index, h, i])
                blocks = table.indices[r, : int(table.counts[r])].long()
                key = (blocks[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()
                key = key[key <= position[-1]]  # nothing after the query block's last row is read
                if len(key) == 0:
                    continue
                k = tokens(kv.k, kv, request, key)[:, h // group].to(dtype)
                v = tokens(kv.v, kv, request, key)[:, h // group].to(dtype)
                s = q[rows, h].to(dtype) @ k.T * scale
                s = s.masked_fill(key > position[:, None], -math.inf)
                row_lse = s.logsumexp(-1)
                weights = (s - row_lse.clamp(min=torch.finfo(dtype).min)[:, None]).exp()
                out[rows, h] = (weights @ v).to(q.dtype)
                lse[rows, h] = row_lse
    return (out, lse) if return_lse else out
