"""Exact softmax attention of each query over the visible tokens of its row's blocks."""

from __future__ import annotations

import math

import torch

from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from reference.requests import Request, requests, tokens


def attend(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    *,
    scale: float | None = None,
    correction: KVSummary | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, D] in q's dtype, lse float32 (float64 for float64 inputs) [T, Hq], natural log.

    Computes in float32, in float64 for float64 inputs. A query with an empty table gets out 0 and lse -inf.

    With a correction (a summary with values) each past block j that the row leaves out is one more key, its mean, of
    weight n_j exp(scale q·kmean_j), and one more value, its mean; n_j is its number of tokens.

    With a softcap every score s, those of means included, becomes softcap tanh(s / softcap). With a window a query at
    position p sees keys at positions above p - window only. With sinks [Hq] each query has one more key, whose logit is
    its head's sink and whose value is 0.
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
                if window is not None:
                    key = key[key > position[0] - window]  # nor anything before its first row's window
                k = tokens("k", kv, request, key)[:, h // group].to(dtype)
                v = tokens("v", kv, request, key)[:, h // group].to(dtype)
                s = capped(q[rows, h].to(dtype) @ k.T * scale, softcap)
                s = s.masked_fill(key > position[:, None], -math.inf)
                if window is not None:
                    s = s.masked_fill(key <= position[:, None] - window, -math.inf)
                if correction is not None:
                    left_out = [j for j in range(request.past_blocks(block_size)) if j not in blocks.tolist()]
                    k_mean = block_means(correction.k_mean, kv, request, left_out, block_size)[:, h // group]
                    v_mean = block_means(correction.v_mean, kv, request, left_out, block_size)[:, h // group]
                    s_mean = capped(q[rows, h].to(dtype) @ k_mean.to(q.dtype).to(dtype).T * scale, softcap)
                    s = torch.cat((s, s_mean + math.log(block_size)), dim=1)
                    v = torch.cat((v, v_mean.to(q.dtype).to(dtype)))
                if sinks is not None:
                    s = torch.cat((s, sinks[h].to(dtype).expand(len(s), 1)), dim=1)
                    v = torch.cat((v, v.new_zeros(1, v.shape[1])))
                if s.shape[1] == 0:
                    continue
                row_lse = s.logsumexp(-1)
                weights = s.softmax(-1).masked_fill(row_lse[:, None] == -math.inf, 0.0)
                out[rows, h] = (weights @ v).to(q.dtype)
                lse[rows, h] = row_lse
    return (out, lse) if return_lse else out


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def block_means(means: torch.Tensor, kv: PagedKV, request: Request, blocks: list[int], block_size: int) -> torch.Tensor:
    """Means [n, Hkv, D] of complete blocks of a request, from the means [num_pages, units, Hkv, D] of their units."""
    per_page = means.shape[1]
    per_block = block_size * per_page // kv.k.shape[1]
    units = torch.tensor([j * per_block + u for j in blocks for u in range(per_block)], dtype=torch.long)
    units = units.to(kv.k.device)
    chosen = means[kv.page_table[request.index].long()[units // per_page], units % per_page]
    return chosen.view(len(blocks), per_block, *means.shape[2:]).mean(1)
