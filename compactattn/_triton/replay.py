"""A step like one that ran before, launched again without deciding anything anew; or attention over a given table.

Which kernels run on a step, with which grids and arguments, follows from shapes, strides, dtypes, host integers and
settings; tensors enter as addresses alone. So the launches of the first step of its kind are recorded as they happen,
and a later one repeats them with its own addresses, and with one allocation for all scratch. Every layer of a model
takes steps of one kind, so this is what a serving engine's host does between two launches of its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from compactattn._triton import INTERPRETED, on_device
from compactattn._triton.launch import recorder
from compactattn._triton.recording import Recording
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.selectors import FlashPrefill, KeyBounds, Selector
from compactattn.validation import Auto, check_out, memory_bytes

MOST = 512  # recordings that are kept; then an eighth of them goes, those that were used longest ago


@dataclass
class _Kept:
    """A recording, the memory in bytes that q, k, v and `out` span where `out` is given, and when it was used last."""

    recording: Recording
    extents: tuple[int, ...]
    used: int


_recordings: dict[Hashable, _Kept] = {}
_lock = threading.Lock()  # of whoever adds a recording
_clock = itertools.count(1)

_HEADS_TYPES, _SPAN_TYPES, _SCALE_TYPES = (int, str), (int, str, NoneType), (int, float, NoneType)
_address, _stride, _device = Tensor.data_ptr, Tensor.stride, Tensor.get_device


class Kind(NamedTuple):
    """A step as a replay sees it.

    Attributes:
        key: what decides its launches, its validity included.
        inputs: every tensor that it is given: q, k and v first, `out` last if there is one.
        addresses: theirs.
    """

    key: Hashable
    inputs: list[Tensor]
    addresses: list[int]


def kind_of_step(
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
) -> Kind | None:
    """The kind of a step; None for one that is always run anew.

    Replayed are the steps whose kernels all go through `launch`: those of `FlashPrefill` and `KeyBounds` without a
    correction. Shapes, strides, dtypes and devices are read anew each time: a tensor can be given others in place.
    """
    if not (
        type(selector) in (FlashPrefill, KeyBounds)
        and _repeatable(kv, batch, scale, return_lse, out, backend)
        and (summary is None or (type(summary) is KVSummary and summary.gate is None))
        and correction is False
        and type(heads_per_group) in _HEADS_TYPES
        and type(query_blocks_per_span) in _SPAN_TYPES
    ):
        return None
    inputs = [q, kv.k, kv.v, kv.page_table, batch.cu_seqlens_q, batch.seq_lens]
    prompts, unit, values, bounds = batch.prompt_lens, None, None, None
    if prompts is not None:
        inputs.append(prompts)
    if summary is not None:
        unit, values, bounds = summary.unit, summary.v_mean, summary.k_bounds
        inputs.append(summary.k_mean)
        if values is not None:
            inputs.append(values)
        if bounds is not None:
            inputs.append(bounds)
    shared = (heads_per_group, query_blocks_per_span)
    present = (prompts is None, unit, values is None, bounds is None)
    return _kind((selector, *shared, *present), inputs, batch, scale, return_lse, out)


def kind_of_attention(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float | None,
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
) -> Kind | None:
    """The same of a call of `attend` without features and correction, which does not read the lengths of prompts."""
    if not (type(table) is BlockTable and _repeatable(kv, batch, scale, return_lse, out, backend)):
        return None
    inputs = [q, kv.k, kv.v, kv.page_table, batch.cu_seqlens_q, batch.seq_lens]
    inputs += (table.indices, table.counts, table.rows)
    return _kind(("attend", table.block_size, table.query_block), inputs, batch, scale, return_lse, out)


def _repeatable(
    kv: PagedKV, batch: PrefillBatch, scale: float | None, return_lse: bool, out: Tensor | None, backend: str | None
) -> bool:
    """Whether what every kind of call is given can be told from its kind."""
    return (
        type(kv) is PagedKV
        and kv.k_scale is None  # scales are not among the inputs
        and type(batch) is PrefillBatch
        and type(return_lse) is bool
        and type(scale) in _SCALE_TYPES
        and (out is None or isinstance(out, Tensor))
        and (backend is None or backend == "triton")
    )


def _kind(
    settings: tuple[Hashable, ...],
    inputs: list[Tensor],
    batch: PrefillBatch,
    scale: float | None,
    return_lse: bool,
    out: Tensor | None,
) -> Kind | None:
    """The kind of a call with these settings and inputs, `out` not yet among them; None where one stands for two."""
    if out is not None:
        inputs.append(out)
    if len(set(map(id, inputs))) < len(inputs):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3]):
        return None
    addresses = [*map(_address, inputs)]
    key = (
        *settings,
        scale,
        return_lse,
        batch.max_q_len,
        batch.max_seq_len,
        out is None,
        *[tensor.shape for tensor in inputs],
        *map(_stride, inputs),
        *[tensor.dtype for tensor in inputs],
        *map(_device, inputs),
        *[address % 16 for address in addresses],
    )
    return Kind(key, inputs, addresses)


def prefill(run: Callable[..., Any], *step: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`run` of a step, given as to `kind_of_step`, or its launches of a step of the same kind once more."""
    return _repeated(run, step, kind_of_step)


def attend(run: Callable[..., Any], *call: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The same of a call of `attend`, given as to `kind_of_attention`."""
    return _repeated(run, call, kind_of_attention)


def _repeated(
    run: Callable[..., Any], arguments: Sequence[Any], kind_of: Callable[..., Kind | None]
) -> Tensor | tuple[Tensor, Tensor]:
    """`run` of arguments that begin with q and kv and end with `return_lse`, `out` and the backend, or its launches."""
    kind = None if INTERPRETED else kind_of(*arguments)
    if kind is None:
        return run(*arguments)
    q, kv, return_lse, out = arguments[0], arguments[1], arguments[-3], arguments[-2]
    kept = _recordings.get(kind.key)
    if kept is None:
        launches, result = _recorded(run, arguments)
        results = [tensor for tensor in (result if return_lse else (result,)) if tensor is not out]
        extents = () if out is None else tuple(map(memory_bytes, (q, kv.k, kv.v, out)))
        _keep(kind.key, Recording(kind.inputs, results, launches), extents)
        return result
    if out is not None and _may_overlap(kind.addresses, kept.extents):
        check_out(out, q, kv=kv)
    results = _replayed(kept, kind)
    if out is not None:
        results.insert(0, out)
    return (results[0], results[1]) if return_lse else results[0]


def _may_overlap(addresses: Sequence[int], extents: Sequence[int]) -> bool:
    """Whether the memory of `out`, the last input, meets that of q, k or v, the first, from first element to last.

    Of what `check_out` asks, addresses decide this alone; where they do not meet, it has nothing to refuse.
    """
    start = addresses[-1]
    of_q, of_k, of_v, of_out = extents
    end = start + of_out
    q, k, v = addresses[:3]
    return (start < q + of_q and q < end) or (start < k + of_k and k < end) or (start < v + of_v and v < end)


def select_table(
    run: Callable[..., BlockTable],
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
    """`run` of the other arguments, or its launches of a step of the same kind once more, into a new table."""
    arguments = (q, kv, batch, selector, heads_per_group, query_blocks_per_span, scale, summary)
    kind = None if INTERPRETED else kind_of_step(*arguments, False, False, None, backend)
    if kind is None:
        return run(*arguments, backend)
    key = ("table", kind.key)  # apart from steps that attend as well
    kept = _recordings.get(key)
    if kept is None:
        launches, table = _recorded(run, (*arguments, backend))
        _keep(key, Recording(kind.inputs, [table.indices, table.counts, table.rows], launches))
        return table
    indices, counts, rows = _replayed(kept, kind)
    return BlockTable(indices, counts, rows, selector.block_size, selector.query_block)


def _replayed(kept: _Kept, kind: Kind) -> list[Tensor]:
    kept.used = next(_clock)
    q = kind.inputs[0]
    with on_device(q):
        return kept.recording.replay(kind.addresses, q.device, driver.active.get_current_stream(q.get_device()))


def _recorded(run: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Any], Any]:
    """(the launches of a step, what it returned)."""
    recorder.launches = []
    try:
        result = run(*arguments)
        return recorder.launches, result
    finally:
        recorder.launches = None


def _keep(key: Hashable, recording: Recording, extents: tuple[int, ...] = ()) -> None:
    with _lock:
        if len(_recordings) >= MOST:
            for old in sorted(_recordings, key=lambda one: _recordings[one].used)[: MOST // 8]:
                del _recordings[old]
        _recordings[key] = _Kept(recording, extents, next(_clock))
