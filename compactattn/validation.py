"""Checks shared by the data types and the stages: shapes, dtypes, devices and host integers only.

Nothing here reads a value of a CUDA tensor, so no check synchronises; `check_rows_of_queries` alone does, and is called
for CPU tensors and by `check`. Each failure is a `ValueError` that names the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from compactattn.data import BlockTable, GroupMask, KVSummary, PagedKV, PrefillBatch, SelectionMask

Auto = Literal["auto"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = torch.float8_e4m3fn  # of a cache with scales; queries and results stay in 16 bits
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_HEADS_PER_KV_HEAD = 16
BLOCK_SIZES = (64, 128, 256)
QUERY_BLOCKS = (64, 128)
MAX_INT = 2**31 - 1
MAX_LEN = 2**30  # tokens of a request: kernels add two positions in int32
MAX_SCALE = torch.finfo(torch.float32).max / 2  # kernels multiply it by log2 e


def fail(name: str, expected: str, got: object) -> ValueError:
    """The one wording of every refusal."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, value: object, *, ndim: int, dtype: torch.dtype | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        raise fail(name, "a torch.Tensor", type(value).__name__)
    if value.ndim != ndim:
        raise fail(name, f"{ndim} dimensions", f"shape {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise fail(name, f"dtype {dtype}", value.dtype)


def check_shape(name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise fail(name, f"shape {expected} ({meaning})", tuple(value.shape))


def check_record(name: str, value: object, kind: str) -> None:
    """One of the library's own records, by the name of its class."""
    if not isinstance(value, _record(kind)):
        raise fail(name, f"a {kind}", type(value).__name__)


@functools.cache
def _record(kind: str) -> type:
    from compactattn import data

    return getattr(data, kind)


def check_int(name: str, value: object, minimum: int) -> None:
    """A Python int that an int32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise fail(name, f"an int of at least {minimum}", repr(value))
    if value > MAX_INT:
        raise fail(name, f"an int of at most {MAX_INT}", value)


def as_ints(name: str, values: object) -> list[int]:
    """A sequence of whole numbers as a list of Python ints, NumPy's integers among them.

    What is no whole number, and bools, stay as they are: `check_int` says which entry that is.
    """
    if not isinstance(values, Sequence):
        raise fail(name, "a list of ints", type(values).__name__)
    return [value if isinstance(value, int) else _as_int(value) for value in values]


def _as_int(value: Any) -> Any:
    try:
        return value if isinstance(value, torch.Tensor) and value.dtype == torch.bool else operator.index(value)
    except TypeError:
        return value


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise fail(name, "True or False", repr(value))


def check_device(name: str, value: torch.device | str) -> torch.device:
    """A device that tensors can lie on here: the CPU, a GPU of this machine, or meta, which holds no data."""
    wanted = "cpu, or a GPU of this machine such as cuda:0"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise fail(name, wanted, repr(value)) from error
    is_here = device.type in ("cpu", "meta")
    if device.type == "cuda":  # a graph that is being made cannot count GPUs
        is_here = torch.compiler.is_compiling() or (device.index or 0) < torch.cuda.device_count()
    if not is_here:
        raise fail(name, wanted, repr(value))
    return device


def check_choice(name: str, value: object, choices: tuple[int, ...]) -> None:
    if type(value) is not int or value not in choices:
        raise fail(name, "one of " + ", ".join(map(str, choices)), repr(value))


def check_fraction(name: str, value: object) -> None:
    """A finite number from 0 to 1, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise fail(name, "a number from 0 to 1", repr(value))


def check_same_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise fail(name, f"device {device}, where the other tensors are", value.device)


def check_contiguous(name: str, value: torch.Tensor) -> None:
    if not value.is_contiguous():
        raise fail(name, "a contiguous tensor", f"strides {value.stride()}")


def check_no_gradients(name: str, *values: object) -> None:
    """None of the tensors among the values wants a gradient (other values are left to other checks)."""
    if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        wanted = "tensors without gradients" if len(values) > 1 else "a tensor without gradients"
        raise fail(name, f"{wanted} (inference only)", "requires_grad=True under grad mode")


def check_scales(k: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> None:
    """float32 [Hkv] each for an FP8 cache k [num_pages, page_size, Hkv, D], None for every other."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k.dtype == FP8:
            check_tensor(name, scale, ndim=1, dtype=torch.float32)
            assert scale is not None
            check_shape(name, scale, (k.shape[2],), "one per KV head")
            check_same_device(name, scale, k.device)
        elif scale is not None:
            raise fail(name, f"None for a cache of {k.dtype}", type(scale).__name__)


def check_batch(q: torch.Tensor, batch: PrefillBatch) -> None:
    check_record("batch", batch, "PrefillBatch")
    check_tensor("q", q, ndim=3)
    check_same_device("batch", batch.cu_seqlens_q, q.device)
    if q.device.type == "cpu":  # on a GPU only `check` may look
        check_rows_of_queries(q, batch)


def check_rows_of_queries(q: torch.Tensor, batch: PrefillBatch) -> None:
    """q holds every query of the batch; reads the last of `cu_seqlens_q`."""
    queries = int(batch.cu_seqlens_q[-1])
    if q.shape[0] < queries:
        raise fail("q", f"at least the {queries} rows of batch.cu_seqlens_q[-1]", f"{q.shape[0]} rows")


def check_queries(q: torch.Tensor, kv: PagedKV, batch: PrefillBatch) -> None:
    """q [T, Hq, D] beside the cache and the batch that it will be used with."""
    check_record("kv", kv, "PagedKV")
    check_batch(q, batch)
    if q.dtype not in DTYPES:
        raise fail("q", "dtype float16, bfloat16 or float32", q.dtype)
    if kv.k_scale is not None:
        if q.dtype == torch.float32:
            raise fail("q", "dtype float16 or bfloat16 over an FP8 cache", q.dtype)
    elif q.dtype != kv.k.dtype:
        raise fail("q", f"the cache's dtype {kv.k.dtype}", q.dtype)
    if q.stride(-1) != 1 and q.shape[-1] > 1:
        raise fail("q", "a contiguous last dimension (stride 1)", f"strides {q.stride()}")
    heads, dim = q.shape[1:]
    if dim != kv.head_dim:
        raise fail("q", f"head dimension {kv.head_dim}, as in the cache", dim)
    if heads < 1 or heads % kv.num_kv_heads:
        raise fail("q", f"a multiple of the cache's {kv.num_kv_heads} KV heads", f"{heads} heads")
    if heads // kv.num_kv_heads > MAX_HEADS_PER_KV_HEAD:
        limit = f"at most {MAX_HEADS_PER_KV_HEAD} query heads per KV head"
        raise fail("q", limit, f"{heads} over {kv.num_kv_heads} KV heads")
    check_no_gradients("q, k, v", q, kv.k, kv.v)
    _check_capacity(kv, batch, q.device)


def check_cache(kv: PagedKV, batch: PrefillBatch, device: torch.device) -> None:
    """The cache beside the batch: one page-table row per request, wide enough for `max_seq_len`."""
    check_record("kv", kv, "PagedKV")
    check_record("batch", batch, "PrefillBatch")
    _check_capacity(kv, batch, device)


def _check_capacity(kv: PagedKV, batch: PrefillBatch, device: torch.device) -> None:
    check_same_device("kv", kv.k, device)
    check_same_device("batch", batch.cu_seqlens_q, device)
    if kv.page_table.shape[0] != batch.size:
        raise fail("kv.page_table", f"{batch.size} rows, one per request", f"{kv.page_table.shape[0]} rows")
    capacity = kv.page_table.shape[1] * kv.page_size
    if batch.max_seq_len > capacity:
        limit = f"at most the page table's {capacity} tokens ({kv.page_table.shape[1]} pages of {kv.page_size})"
        raise fail("batch.max_seq_len", limit, batch.max_seq_len)


def check_readable(kv: PagedKV) -> None:
    """What the backends read: a dtype of theirs, without gradients (beside queries, `check_queries` sees to both)."""
    check_record("kv", kv, "PagedKV")
    if kv.k.dtype not in (*DTYPES, FP8):
        raise fail("kv.k", "dtype float16, bfloat16, float32 or float8_e4m3fn", kv.k.dtype)
    check_no_gradients("k, v", kv.k, kv.v)


def check_blocks(kv: PagedKV, block_size: int) -> None:
    check_choice("block_size", block_size, BLOCK_SIZES)
    if block_size % kv.page_size and kv.page_size % block_size:
        raise fail("block_size", f"a divisor or a multiple of page_size {kv.page_size}", block_size)


def check_summary(
    summary: KVSummary, kv: PagedKV, block_size: int, *, values: bool = False, name: str = "summary"
) -> None:
    check_record(name, summary, "KVSummary")
    unit = min(kv.page_size, block_size)
    if summary.unit != unit:
        raise fail(name, f"unit {unit} = min(page_size, block_size)", summary.unit)
    pages, page_size, kv_heads, dim = kv.k.shape
    shape = (pages, page_size // unit, kv_heads, dim)
    check_shape(f"{name}.k_mean", summary.k_mean, shape, "num_pages, page_size // unit, Hkv, D")
    check_same_device(f"{name}.k_mean", summary.k_mean, kv.k.device)
    if summary.v_mean is not None:
        check_same_device(f"{name}.v_mean", summary.v_mean, kv.k.device)
    for part, means in (("k_mean", summary.k_mean), ("v_mean", summary.v_mean), ("k_bounds", summary.k_bounds)):
        if means is not None:
            check_contiguous(f"{name}.{part}", means)
    if summary.gate is not None:
        check_contiguous(f"{name}.gate.pooled", summary.gate.pooled)
    if values and summary.v_mean is None:
        raise fail(name, "a summary with values (summarize(..., values=True))", "v_mean=None")


def check_grouping(
    mask: SelectionMask,
    batch: PrefillBatch,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
) -> None:
    check_record("selection", mask, "SelectionMask")
    check_record("batch", batch, "PrefillBatch")
    check_same_device("selection.mask", mask.mask, batch.cu_seqlens_q.device)
    heads = mask.mask.shape[1]
    extents = (batch.size, heads, batch.query_blocks(mask.query_block), batch.kv_blocks(mask.block_size))
    check_shape("selection.mask", mask.mask, extents, "B, Hq, Qb, Kb of the batch")
    check_heads_per_group(heads_per_group, heads, None if mask.kv_heads is None else heads // mask.kv_heads)
    check_span(query_blocks_per_span)
    if "auto" in (heads_per_group, query_blocks_per_span) and mask.kv_heads is None:
        raise fail("selection.kv_heads", "the number of KV heads, for a grouping that chooses itself", "None")


def check_kv_heads(kv_heads: object, heads: int) -> None:
    check_int("kv_heads", kv_heads, 1)
    assert isinstance(kv_heads, int)
    if heads % kv_heads:
        raise fail("kv_heads", f"a divisor of the {heads} query heads", kv_heads)


def check_span(query_blocks_per_span: object) -> None:
    """None is the whole chunk, "auto" lets the device choose."""
    if query_blocks_per_span is None or query_blocks_per_span == "auto":
        return
    if isinstance(query_blocks_per_span, str):
        raise fail("query_blocks_per_span", "None, 'auto' or an int of at least 1", repr(query_blocks_per_span))
    check_int("query_blocks_per_span", query_blocks_per_span, 1)


def check_heads_per_group(heads_per_group: object, heads: int | None = None, per_kv_head: int | None = None) -> None:
    """`heads_per_group` adjacent heads share a row; where G is known they must lie in one KV group."""
    if heads_per_group == "auto":
        return
    if isinstance(heads_per_group, str):
        raise fail("heads_per_group", "'auto' or an int of at least 1", repr(heads_per_group))
    check_int("heads_per_group", heads_per_group, 1)
    assert isinstance(heads_per_group, int)
    if per_kv_head is not None and per_kv_head % heads_per_group:
        raise fail("heads_per_group", f"a divisor of the {per_kv_head} query heads per KV head", heads_per_group)
    if heads is not None and heads % heads_per_group:
        raise fail("heads_per_group", f"a divisor of the {heads} query heads", heads_per_group)


def check_rows(name: str, table: GroupMask | BlockTable, q_heads: int, batch: PrefillBatch) -> None:
    check_same_device(name, table.rows, batch.cu_seqlens_q.device)
    extents = (batch.size, q_heads, batch.query_blocks(table.query_block))
    check_shape(f"{name}.rows", table.rows, extents, "B, Hq, Qb of the batch")


def check_table(table: BlockTable, q: torch.Tensor, kv: PagedKV, batch: PrefillBatch) -> None:
    check_record("table", table, "BlockTable")
    check_rows("table", table, q.shape[1], batch)
    check_blocks(kv, table.block_size)
    if table.rows.numel() and not table.indices.shape[0]:
        raise fail("table.indices", "at least the rows that table.rows uses", "none")
    blocks = batch.kv_blocks(table.block_size)
    if table.indices.shape[1] != blocks:
        raise fail("table.indices", f"{blocks} columns = Kb of the batch", table.indices.shape[1])


def check_out(out: torch.Tensor | None, q: torch.Tensor, name: str = "q", kv: PagedKV | None = None) -> None:
    """A tensor to write to, beside the input `q` [T, H, D] whose name is given, and a cache; None is fine."""
    check_tensor(name, q, ndim=3)
    if out is None:
        return
    check_tensor("out", out, ndim=3, dtype=q.dtype)
    check_shape("out", out, tuple(q.shape), f"that of {name}")
    check_same_device("out", out, q.device)
    if out.stride(-1) != 1:
        raise fail("out", "a contiguous last dimension (stride 1)", f"strides {out.stride()}")
    reach = 1
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise fail("out", "rows that do not overlap", f"strides {out.stride()}")
            reach += stride * (size - 1)
    if _overlap(out, q):
        raise fail("out", f"memory apart from {name}'s", "an overlap")
    if kv is not None:
        for part, cache in (("k", kv.k), ("v", kv.v)):
            if _stretches_meet(out, cache):
                raise fail("out", f"memory apart from {part}'s", "an overlap")


def _extent(t: torch.Tensor) -> int:
    """Elements of memory from the first one of a tensor to its last."""
    last = 0
    for stride, size in zip(t.stride(), t.shape, strict=True):
        last += stride * (size - 1)
    return last


def memory_bytes(t: torch.Tensor) -> int:
    """Bytes of memory from the first element of a tensor to the end of its last; 0 without elements."""
    return (_extent(t) + 1) * t.element_size() if t.numel() else 0


def _stretches_meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Does some memory lie between the first and the last element of both tensors?"""
    if not a.numel() or not b.numel() or not a.data_ptr():
        return False
    ends = [t.data_ptr() + memory_bytes(t) for t in (a, b)]
    return a.data_ptr() < ends[1] and b.data_ptr() < ends[0]


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors [T, H, D] of one shape and dtype share an element? Interleaved views of equal strides do not."""
    if not a.numel() or not a.data_ptr():
        return False
    distance = (b.data_ptr() - a.data_ptr()) // a.element_size()
    if distance > _extent(a) or -distance > _extent(b):
        return False
    if a.stride() != b.stride():
        return True
    (tokens, heads, dim), (token_stride, head_stride, _) = a.shape, a.stride()
    for h in range(1 - heads, heads):
        rest = distance - h * head_stride
        t = round(rest / token_stride) if token_stride else 0
        if abs(t) < tokens and abs(rest - t * token_stride) < dim:
            return True
    return False


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale: D^-0.5 unless given."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= MAX_SCALE:
        raise fail("scale", f"a number from -{MAX_SCALE:g} to {MAX_SCALE:g}, or None", repr(scale))
    return float(scale)
