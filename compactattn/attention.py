"""Stage 4: exact attention over the blocks that a table names, read in place from the paged cache."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from compactattn import operators
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.dispatch import Backend, check_cache_dtype, has_triton, replays, resolve_backend
from compactattn.features import PLAIN, Features, check_correctable, check_features
from compactattn.validation import (
    check_flag,
    check_no_gradients,
    check_out,
    check_queries,
    check_summary,
    check_table,
    fail,
    resolve_scale,
)


@overload
def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    *,
    scale: float | None = ...,
    correction: KVSummary | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    *,
    scale: float | None = ...,
    correction: KVSummary | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    out: Tensor | None = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    *,
    scale: float | None = None,
    correction: KVSummary | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the visible tokens of its row's blocks.

    Args:
        q: [T, Hq, D], float16, bfloat16 or float32, the cache's dtype, last dimension contiguous.
        kv: the paged cache, this step's keys and values included.
        batch: the lengths; query i of request b stands at `past_len + i` and sees keys at or before it.
        table: which blocks each (head, query block) reads; any strictly ascending rows are valid.
        scale: softmax scale, default D^-0.5.
        correction: None, or a summary with values: every complete past block j that a row leaves out then speaks
            through its means, as one key of weight n_j · exp(scale · q·kmean_j) and value vmean_j, n_j being its tokens
            (FlashPrefill V2, arXiv 2608.19758). Means are averaged in float32 and rounded once to q's dtype; they are
            trusted to be up to date over the past. Not together with a window, which would cut means in two.
        softcap: replace each score s = scale · q·k by softcap · tanh(s / softcap), before the mask (Gemma 2).
        window: a query at position p sees keys at positions above p - window alone, `window` of them with its own:
            what transformers and vLLM call `sliding_window`. Blocks of the table that lie before the window of every
            row of a query block are not read, nor are the ids of such pages, which an engine may have freed.
        sinks: float32 [Hq], one more logit per query head in the softmax's denominator, natural log (gpt-oss).
        return_lse: also return the log-sum-exp of the scaled scores, natural log, float32 [T, Hq]; with sinks their
            logits are part of the sum, so that of partial results to be merged exactly one takes them.
        out: where to write the result, [T, Hq, D] of q's dtype; must not overlap q or the cache.
        backend: None (by device), "triton" or "numba".

    On a GPU the launches of a call with neither correction nor features, over a cache that is not FP8, are remembered
    and repeated for calls of the same shapes and bounds, as those of `prefill` are.

    Returns:
        out [T, Hq, D], or (out, lse). A query with nothing to see gets out 0 and lse -inf (its head's sink, where
        there are sinks); rows at or beyond `cu_seqlens_q[B]` are unspecified. Accumulation is in float32; float32
        inputs use IEEE products.

    Raises:
        ValueError: wrong shape, dtype, device or stride, tensors that require gradients, or a backend that cannot
            run, before anything runs.
    """
    if torch.compiler.is_compiling():
        model = {"softcap": softcap, "window": window, "sinks": sinks}
        how = {"scale": scale, "correction": correction, "return_lse": return_lse, "out": out, "backend": backend}
        return operators.call("attend", q=q, kv=kv, batch=batch, table=table, **model, **how)
    check_flag("return_lse", return_lse)
    check_no_gradients("out", out)
    arguments = (q, kv, batch, table, scale, return_lse, out, backend)
    plain = correction is None and softcap is None and window is None and sinks is None
    if plain and isinstance(q, Tensor) and q.is_cuda and has_triton():
        return replays().attend(_attend, *arguments)
    return _attend(*arguments, correction, softcap, window, sinks)


def _attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float | None,
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
    correction: KVSummary | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    check_queries(q, kv, batch)
    check_table(table, q, kv, batch)
    features = check_features(softcap, window, sinks, q)
    if correction is not None:
        if not isinstance(correction, KVSummary):
            raise fail("correction", "a KVSummary or None", type(correction).__name__)
        check_summary(correction, kv, table.block_size, values=True, name="correction")
        check_correctable(features)
    check_out(out, q, kv=kv)
    chosen = resolve_backend(backend, q.device, q.dtype)
    check_cache_dtype(kv, chosen)
    scale = resolve_scale(scale, q.shape[-1])
    return run_attention(q, kv, batch, table, scale, correction, return_lse, out, chosen, features)


def run_attention(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    correction: KVSummary | None,
    return_lse: bool,
    out: Tensor | None,
    backend: Backend,
    features: Features = PLAIN,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend` after its checks."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    if backend == "triton":
        from compactattn._triton.attention import attend as run
        from compactattn._triton.correction import attend_corrected as run_corrected
    else:
        from compactattn._numba.attention import attend as run
        from compactattn._numba.attention import attend_corrected as run_corrected
    if correction is None:
        run(q, kv, batch, table, scale, out, lse, features)
    else:
        run_corrected(q, kv, batch, table, scale, correction, out, lse, features)
    return out if lse is None else (out, lse)
