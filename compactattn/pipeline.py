"""One chunked-prefill step, whole. Read this file first.

    select -> unite -> build_table -> attend
      which blocks does     which lists must     the minimal       softmax attention over
      each head want?       be one list?         list per row      the pages the list names

`prefill` gives exactly what the four stages give one after the other. For `FlashPrefill` and `KeyBounds` the first
three are fused: scores go straight to tables, and no mask is ever written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactattn import operators
from compactattn.attention import run_attention
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.density import check_counter, run_count
from compactattn.dispatch import Backend, check_cache_dtype, has_triton, replays, resolve_backend
from compactattn.features import PLAIN, Features, check_correctable, check_features
from compactattn.selection import block_scores, select
from compactattn.selectors import Oracle, Scored, SeerGate, Selector, check_selector
from compactattn.summary import refresh
from compactattn.table import build_table
from compactattn.union import unite
from compactattn.validation import (
    Auto,
    check_blocks,
    check_flag,
    check_heads_per_group,
    check_no_gradients,
    check_out,
    check_queries,
    check_span,
    check_summary,
    check_tensor,
    fail,
    resolve_scale,
)


def prefill(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
    scale: float | None = None,
    summary: KVSummary | None = None,
    correction: bool | KVSummary = False,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    density: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention of one chunk of queries over a paged KV cache that already holds the chunk.

    Equals `attend(q, kv, batch, build_table(unite(select(q, ...), ...)))`: the same tables, the same bits. On a GPU no
    stage copies K or V or reads a device value on the host, so a call can be captured in a CUDA graph and replayed
    with other lengths, page ids and contents within the batch's bounds.

    Args:
        q: [T, Hq, D], packed queries after RoPE, the cache's dtype.
        kv: the paged cache, this step's keys and values included.
        batch: the lengths of the step.
        selector: what proposes the blocks.
        heads_per_group: adjacent query heads of one KV group that share a table; divides Hq / Hkv. "auto" picks per
            request and KV head, on the device, see `unite`.
        query_blocks_per_span: adjacent query blocks that share a table; None is the whole chunk, "auto" picks.
        scale: softmax scale, default D^-0.5.
        summary: key means kept beside the cache; brought up to date for this chunk first.
        correction: let the past blocks that a row leaves out speak through their means, see `attend`. True needs a
            summary with values; the summary itself means the same.
        softcap, window, sinks: features of the model's attention, see `attend`. The selection judges plain scores of
            every visible block, whatever they are; `Oracle`, whose word is the exact mass, is refused beside them.
        density: int64 [2], a layer's counters (`DensityCounters.of_layer`), to which the step adds what it reads. On a
            GPU the launches of a step by `FlashPrefill` or `KeyBounds` are remembered and repeated, which costs the
            host less; steps of other selectors, with counters, features or a correction, or over FP8 caches are
            launched kernel by kernel.
        return_lse: also return the log-sum-exp, natural log, float32 [T, Hq]; see `attend` for sinks.
        out: where to write the result, [T, Hq, D] of q's dtype; must not overlap q or the cache.
        backend: None (by device), "triton" or "numba".

    Returns:
        out [T, Hq, D], or (out, lse float32 [T, Hq]).

    Raises:
        ValueError: wrong shape, dtype, device or stride, tensors that require gradients, or a backend that cannot
            run, before anything runs.
    """
    grouping = (heads_per_group, query_blocks_per_span)
    if torch.compiler.is_compiling():
        summary, correction = _corrected_by(summary, correction)
        step = {"q": q, "kv": kv, "batch": batch, "selector": selector, "scale": scale, "summary": summary}
        shared = {"heads_per_group": heads_per_group, "query_blocks_per_span": query_blocks_per_span}
        model = {"softcap": softcap, "window": window, "sinks": sinks}
        how = {"correction": correction, "density": density, "return_lse": return_lse, "out": out, "backend": backend}
        return operators.call("prefill", **step, **shared, **model, **how)
    check_flag("return_lse", return_lse)
    check_no_gradients("out", out)
    arguments = (q, kv, batch, selector, *grouping, scale, summary, correction, return_lse, out, backend)
    if softcap is not None or window is not None or sinks is not None or density is not None:
        check_tensor("q", q, ndim=3)
        return _prefill(*arguments, check_features(softcap, window, sinks, q), density)
    if isinstance(q, Tensor) and q.is_cuda and has_triton():
        return replays().prefill(_prefill, *arguments)
    return _prefill(*arguments)


def _prefill(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float | None,
    summary: KVSummary | None,
    correction: bool | KVSummary,
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
    features: Features = PLAIN,
    density: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    summary, correction = _corrected_by(summary, correction)
    chosen, scale = _check_step(q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary, backend)
    check_out(out, q, kv=kv)
    if correction:
        if summary is None:
            raise fail("summary", "a summary with values, for correction=True", "None")
        check_summary(summary, kv, selector.block_size, values=True)
        check_correctable(features)
    if features is not PLAIN and isinstance(selector, Oracle):
        judges = "FlashPrefill, KeyBounds, XAttention, SeerGate or Dense beside softcap, window or sinks"
        raise fail("selector", judges, repr(selector))
    if density is not None:
        check_counter("density", density, q.device)
    table = _table(q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary, chosen)
    if density is not None:
        run_count(table, batch, density, features.window, chosen)
    means = summary if correction else None
    return run_attention(q, kv, batch, table, scale, means, return_lse, out, chosen, features)


def _corrected_by(summary: KVSummary | None, correction: bool | KVSummary) -> tuple[KVSummary | None, bool]:
    """(the summary of a step, whether it corrects as well): a correction may be given as the summary itself."""
    if isinstance(correction, KVSummary):
        if summary is not None and summary is not correction:
            raise fail("correction", "True, or the very summary that summary is", "another summary")
        return correction, True
    if not isinstance(correction, bool):
        raise fail("correction", "True, False or a KVSummary", repr(correction))
    return summary, correction


def select_table(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
    scale: float | None = None,
    summary: KVSummary | None = None,
    backend: str | None = None,
) -> BlockTable:
    """The first three stages of `prefill`, with its arguments: the block tables that it attends over.

    As of whole steps, the launches are remembered and repeated on a GPU; the tensors of a table are new in each call.
    """
    if torch.compiler.is_compiling():
        step = {"q": q, "kv": kv, "batch": batch, "selector": selector, "scale": scale, "summary": summary}
        shared = {"heads_per_group": heads_per_group, "query_blocks_per_span": query_blocks_per_span}
        return operators.call("select_table", **step, **shared, backend=backend)
    arguments = (q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary, backend)
    if isinstance(q, Tensor) and q.is_cuda and has_triton():
        return replays().select_table(_select_table, *arguments)
    return _select_table(*arguments)


def _select_table(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float | None,
    summary: KVSummary | None,
    backend: str | None,
) -> BlockTable:
    chosen, scale = _check_step(q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary, backend)
    return _table(q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary, chosen)


def _check_step(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float | None,
    summary: KVSummary | None,
    backend: str | None,
) -> tuple[Backend, float]:
    """(backend, scale), after every check of a step's arguments."""
    check_selector(selector)
    check_queries(q, kv, batch)
    check_blocks(kv, selector.block_size)
    check_heads_per_group(heads_per_group, q.shape[1], q.shape[1] // kv.num_kv_heads)
    if isinstance(selector, SeerGate):
        selector.check_heads(q)
    check_span(query_blocks_per_span)
    if summary is not None:
        check_summary(summary, kv, selector.block_size)
    chosen = resolve_backend(backend, q.device, q.dtype)
    check_cache_dtype(kv, chosen)
    return chosen, resolve_scale(scale, q.shape[-1])


def _table(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float,
    summary: KVSummary | None,
    backend: Backend,
) -> BlockTable:
    """The table of a checked step; the summary is brought up to date first."""
    if summary is not None:
        refresh(kv, batch, summary, None, backend)
    if not isinstance(selector, Scored):
        selection = select(q, kv, batch, selector, scale=scale, summary=summary, backend=backend)
        groups = unite(
            selection,
            batch,
            heads_per_group=heads_per_group,
            query_blocks_per_span=query_blocks_per_span,
            backend=backend,
        )
        return build_table(groups, backend=backend)
    if backend == "triton":
        from compactattn._triton.table import table_from_scores
    else:
        from compactattn._numba.table import table_from_scores
    scores = block_scores(q, kv, batch, selector, scale, summary, backend)
    return table_from_scores(scores, batch, selector, kv.num_kv_heads, heads_per_group, query_blocks_per_span)
