"""The data of one chunked-prefill step: frozen records of tensors.

Symbols, as in the paper and everywhere in this library: `B` requests, `T` packed query tokens, `Hq` query heads,
`Hkv` KV heads, `G = Hq / Hkv`, `D` head dimension, `Qb` query blocks, `Kb` KV blocks, `R` table rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from compactattn.paging import page_strides
from compactattn.validation import (
    BLOCK_SIZES,
    DTYPES,
    FP8,
    HEAD_DIMS,
    MAX_LEN,
    QUERY_BLOCKS,
    as_ints,
    check_choice,
    check_contiguous,
    check_device,
    check_int,
    check_kv_heads,
    check_same_device,
    check_scales,
    check_shape,
    check_tensor,
    fail,
)


@dataclass(frozen=True, eq=False)
class PrefillBatch:
    """The lengths of one step: ragged requests, packed one after the other.

    Attributes:
        cu_seqlens_q: int32 [B + 1]; request b owns query rows `cu_seqlens_q[b]` up to `cu_seqlens_q[b + 1]`.
        seq_lens: int32 [B]; keys in the cache of each request, *including* this step's.
        max_q_len: host int, an upper bound for every request's number of queries in this step.
        max_seq_len: host int, an upper bound for every entry of `seq_lens`; at most 2^30.
        prompt_lens: int32 [B] or None; length of each whole prompt, needed by `dense_last_blocks` only.

    Raises:
        ValueError: a wrong type, dtype, shape or device, or `max_q_len > max_seq_len`.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    max_q_len: int
    max_seq_len: int
    prompt_lens: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("cu_seqlens_q", self.cu_seqlens_q, ndim=1, dtype=torch.int32)
        check_tensor("seq_lens", self.seq_lens, ndim=1, dtype=torch.int32)
        check_int("max_q_len", self.max_q_len, 0)
        check_int("max_seq_len", self.max_seq_len, 0)
        if self.seq_lens.shape[0] < 1:
            raise fail("seq_lens", "at least one request", "none")
        requests = self.seq_lens.shape[0]
        check_shape("cu_seqlens_q", self.cu_seqlens_q, (requests + 1,), "one more than the requests in seq_lens")
        check_same_device("seq_lens", self.seq_lens, self.cu_seqlens_q.device)
        if self.max_seq_len > MAX_LEN:
            raise fail("max_seq_len", f"at most {MAX_LEN} tokens", self.max_seq_len)
        if self.max_q_len > self.max_seq_len:
            raise fail("max_q_len", f"at most max_seq_len {self.max_seq_len}", self.max_q_len)
        for name, tensor in (("cu_seqlens_q", self.cu_seqlens_q), ("seq_lens", self.seq_lens)):
            check_contiguous(name, tensor)
        if self.prompt_lens is not None:
            check_tensor("prompt_lens", self.prompt_lens, ndim=1, dtype=torch.int32)
            check_shape("prompt_lens", self.prompt_lens, (requests,), "one per request")
            check_same_device("prompt_lens", self.prompt_lens, self.cu_seqlens_q.device)
            check_contiguous("prompt_lens", self.prompt_lens)

    @classmethod
    def from_lens(
        cls,
        q_lens: Sequence[SupportsIndex],
        seq_lens: Sequence[SupportsIndex],
        device: torch.device | str = "cpu",
        prompt_lens: Sequence[SupportsIndex] | None = None,
    ) -> PrefillBatch:
        """Build a batch from lists of ints, NumPy's among them; the bounds are the largest lengths.

        Raises:
            ValueError: lists of different length, a negative length, `q_len > seq_len`, `seq_len > prompt_len`, or a
                device that is not here.
        """
        device = check_device("device", device)
        q_lens, seq_lens = as_ints("q_lens", q_lens), as_ints("seq_lens", seq_lens)
        if len(q_lens) != len(seq_lens):
            raise fail("seq_lens", f"{len(q_lens)} entries, as in q_lens", len(seq_lens))
        if not q_lens:
            raise fail("q_lens", "at least one request", "none")
        for b, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
            check_int(f"q_lens[{b}]", q_len, 0)
            check_int(f"seq_lens[{b}]", seq_len, 0)
            if q_len > seq_len:
                raise fail(f"q_lens[{b}]", f"at most seq_lens[{b}] = {seq_len}", q_len)
        prompts = None
        if prompt_lens is not None:
            prompt_lens = as_ints("prompt_lens", prompt_lens)
            if len(prompt_lens) != len(seq_lens):
                raise fail("prompt_lens", f"{len(seq_lens)} entries, as in seq_lens", len(prompt_lens))
            for b, (seq_len, prompt_len) in enumerate(zip(seq_lens, prompt_lens, strict=True)):
                check_int(f"prompt_lens[{b}]", prompt_len, seq_len)
            prompts = torch.tensor(prompt_lens, dtype=torch.int32, device=device)
        starts = [0]
        for q_len in q_lens:
            starts.append(starts[-1] + q_len)
        check_int("the sum of q_lens", starts[-1], 0)
        return cls(
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            max_q_len=max(q_lens),
            max_seq_len=max(seq_lens),
            prompt_lens=prompts,
        )

    @property
    def size(self) -> int:
        """B, the number of requests."""
        return self.seq_lens.shape[0]

    @property
    def q_lens(self) -> Tensor:
        """int32 [B]: queries of each request in this step."""
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    @property
    def past_lens(self) -> Tensor:
        """int32 [B]: keys that were in the cache before this step, `seq_lens - q_lens`."""
        return self.seq_lens - self.q_lens

    def query_blocks(self, query_block: int) -> int:
        """Qb = ceil(max_q_len / query_block)."""
        return -(-self.max_q_len // query_block)

    def kv_blocks(self, block_size: int) -> int:
        """Kb = ceil(max_seq_len / block_size)."""
        return -(-self.max_seq_len // block_size)


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A paged KV cache, read in place.

    Attributes:
        k, v: [num_pages, page_size, Hkv, D], float16, bfloat16, float32 or float8_e4m3fn; float64 for exact references
            in plain PyTorch, which the stages refuse. Any strides with a contiguous last dimension: token-major (NHD)
            and head-major (HND) caches are both views of this shape.
        page_table: int32 [B, max_pages]; page n of request b holds its tokens `n * page_size` onwards.
        k_scale, v_scale: for a float8_e4m3fn cache, and only for one: float32 [Hkv] each, what a stored number of a
            KV head is multiplied by, above 0; any stride, so that `scale.expand(Hkv)` gives all heads the same.

    Raises:
        ValueError: a wrong type, dtype, shape, stride or device, a head dimension outside 64, 80, 96, 128, 192,
            256, a value dimension other than D, a page size that is no power of two of at least 16, wrong scales.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("k", self.k, ndim=4)
        check_tensor("v", self.v, ndim=4)
        check_tensor("page_table", self.page_table, ndim=2, dtype=torch.int32)
        if self.k.dtype not in (*DTYPES, FP8, torch.float64):
            wanted = "dtype float16, bfloat16, float32 or float8_e4m3fn (float64 for references alone)"
            raise fail("k", wanted, self.k.dtype)
        if self.v.shape[-1] != self.k.shape[-1]:
            raise fail("v", f"value dimension {self.k.shape[-1]}, the same as k's", self.v.shape[-1])
        check_shape("v", self.v, tuple(self.k.shape), "that of k")
        if self.v.dtype != self.k.dtype:
            raise fail("v", f"dtype {self.k.dtype}, as k", self.v.dtype)
        check_same_device("v", self.v, self.k.device)
        check_same_device("page_table", self.page_table, self.k.device)
        check_choice("head dimension of k", self.head_dim, HEAD_DIMS)
        page_size = self.page_size
        if page_size < 16 or page_size & (page_size - 1):
            raise fail("page_size", "a power of two of at least 16", page_size)
        if self.num_kv_heads < 1 or self.k.shape[0] < 1:
            raise fail("k", "at least one page and one KV head", f"shape {tuple(self.k.shape)}")
        for name, tensor in (("k", self.k), ("v", self.v), ("page_table", self.page_table)):
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                raise fail(name, "a contiguous last dimension (stride 1)", f"strides {tensor.stride()}")
        check_scales(self.k, self.k_scale, self.v_scale)

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @classmethod
    def from_contiguous(
        cls, k: Tensor, v: Tensor, page_size: int, k_scale: Tensor | None = None, v_scale: Tensor | None = None
    ) -> PagedKV:
        """See keys and values of shape [B, L, Hkv, D] as a paged cache.

        Any strides with a contiguous last dimension: [B, Hkv, L, D] caches transposed, slices of a longer cache.
        When L is a multiple of `page_size` the result is a view (`as_strided`; the page table skips what lies
        between requests, so `num_pages` can exceed B · L / page_size, and with it the size of a summary: up to one
        page per token for a slice of a longer cache whose length has no factor in common with `page_size`).
        Otherwise, and where k and v are laid out so differently that one page table cannot serve both, k and v are
        copied once, padded with zeros. Scales as in `PagedKV`.

        Raises:
            ValueError: shapes that differ or are not 4-D, L = 0, or whatever `PagedKV` refuses.
        """
        check_tensor("k", k, ndim=4)
        check_tensor("v", v, ndim=4)
        check_shape("v", v, tuple(k.shape), "that of k")
        check_int("page_size", page_size, 16)
        requests, length = k.shape[:2]
        if requests < 1 or length < 1:
            raise fail("k", "at least one request and one token", f"shape {tuple(k.shape)}")
        pages = -(-length // page_size)
        paging = page_strides(k, v, page_size) if length % page_size == 0 else None
        if paging is None:
            padding = (0, 0, 0, 0, 0, pages * page_size - length)
            k = torch.nn.functional.pad(k, padding).contiguous()
            v = torch.nn.functional.pad(v, padding).contiguous()
            paging = page_strides(k, v, page_size)
            assert paging is not None
        page_stride_k, page_stride_v, pages_per_request, step = paging
        table = (
            torch.arange(requests, dtype=torch.int32, device=k.device)[:, None] * pages_per_request
            + torch.arange(pages, dtype=torch.int32, device=k.device) * step
        )
        num_pages = (requests - 1) * pages_per_request + (pages - 1) * step + 1
        shape = (num_pages, page_size, *k.shape[2:])
        return cls(
            k.as_strided(shape, (page_stride_k, *k.stride()[1:])),
            v.as_strided(shape, (page_stride_v, *v.stride()[1:])),
            table,
            k_scale,
            v_scale,
        )


@dataclass(frozen=True, eq=False)
class GateKeys:
    """The cached keys as `SeerGate` sees them: before RoPE, and pooled; part of a `KVSummary`.

    Attributes:
        pooled: float32 [num_pages, page_size // unit, Hkv, 3 * D]; per unit of the summary the largest, the smallest
            and the mean of each dimension over its valid tokens, after RoPE is undone by position.
        inv_freq: float32 [D / 2], the angle per position of each pair of dimensions (d, d + D / 2).
        rope_scale: what RoPE multiplied cos and sin by.
    """

    pooled: Tensor
    inv_freq: Tensor
    rope_scale: float

    def __post_init__(self) -> None:
        check_tensor("gate.pooled", self.pooled, ndim=4, dtype=torch.float32)
        check_tensor("gate.inv_freq", self.inv_freq, ndim=1, dtype=torch.float32)
        check_same_device("gate.inv_freq", self.inv_freq, self.pooled.device)
        check_shape("gate.inv_freq", self.inv_freq, (self.pooled.shape[-1] // 6,), "half the head dimension")


@dataclass(frozen=True, eq=False)
class KVSummary:
    """Means of the cached keys (and values), kept beside the cache and extended chunk by chunk.

    Attributes:
        k_mean: float32 [num_pages, page_size // unit, Hkv, D]; mean over each `unit` tokens of a page, the last
            unit of a request over its valid tokens only.
        v_mean: the same of the values, or None.
        unit: tokens per mean, `min(page_size, block_size)`.
        gate: what `SeerGate` needs of the keys, or None.
        k_bounds: what `KeyBounds` needs of the keys, or None: float32 [num_pages, page_size // unit, Hkv, 2 * D], the
            largest number of each dimension over the same tokens, then the smallest.
    """

    k_mean: Tensor
    v_mean: Tensor | None
    unit: int
    gate: GateKeys | None = None
    k_bounds: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("k_mean", self.k_mean, ndim=4, dtype=torch.float32)
        check_int("unit", self.unit, 1)
        if self.v_mean is not None:
            check_tensor("v_mean", self.v_mean, ndim=4, dtype=torch.float32)
            check_shape("v_mean", self.v_mean, tuple(self.k_mean.shape), "that of k_mean")
            check_same_device("v_mean", self.v_mean, self.k_mean.device)
        if self.gate is not None:
            check_same_device("gate.pooled", self.gate.pooled, self.k_mean.device)
            *pages, dim = self.k_mean.shape
            check_shape("gate.pooled", self.gate.pooled, (*pages, 3 * dim), "that of k_mean, thrice as wide")
        if self.k_bounds is not None:
            check_tensor("k_bounds", self.k_bounds, ndim=4, dtype=torch.float32)
            check_same_device("k_bounds", self.k_bounds, self.k_mean.device)
            *pages, dim = self.k_mean.shape
            check_shape("k_bounds", self.k_bounds, (*pages, 2 * dim), "that of k_mean, twice as wide")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that grow with the cache."""
        pooled = None if self.gate is None else self.gate.pooled
        parts = (self.k_mean, self.v_mean, self.k_bounds, pooled)
        return sum(tensor.nbytes for tensor in parts if tensor is not None)


@dataclass(frozen=True, eq=False)
class SelectionMask:
    """What a selector proposes, per query head and query block.

    Attributes:
        mask: bool [B, Hq, Qb, Kb]; bits of padded or invisible blocks carry no meaning.
        block_size, query_block: tokens per KV block and queries per query block.
        dense_last_blocks: the selector's setting of that name; `unite` gives the query blocks at the end of the
            prompt a table row of their own when it is positive and the batch has `prompt_lens`.
        kv_heads: Hkv, which divides Hq; `unite` checks groups against it and needs it to choose them. None if unknown.
    """

    mask: Tensor
    block_size: int
    query_block: int
    dense_last_blocks: int = 0
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        check_tensor("mask", self.mask, ndim=4, dtype=torch.bool)
        _check_block_sizes(self.block_size, self.query_block)
        check_int("dense_last_blocks", self.dense_last_blocks, 0)
        if self.kv_heads is not None:
            check_kv_heads(self.kv_heads, self.mask.shape[1])


@dataclass(frozen=True, eq=False)
class GroupMask:
    """The union over each execution group.

    Attributes:
        keep: bool [R, Kb]; the KV blocks that each row's table will list.
        rows: int32 [B, Hq, Qb]; the row that each (head, query block) uses.
        block_size, query_block: tokens per KV block and queries per query block.
    """

    keep: Tensor
    rows: Tensor
    block_size: int
    query_block: int

    def __post_init__(self) -> None:
        check_tensor("keep", self.keep, ndim=2, dtype=torch.bool)
        check_tensor("rows", self.rows, ndim=3, dtype=torch.int32)
        check_same_device("rows", self.rows, self.keep.device)
        _check_block_sizes(self.block_size, self.query_block)


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The minimal block table: per row the logical KV blocks to read.

    Attributes:
        indices: int32 [R, Kb]; strictly ascending logical KV block ids, the first `counts[r]` valid. The rest is
            unspecified and never read.
        counts: int32 [R]; 0 for rows that nobody uses.
        rows: int32 [B, Hq, Qb]; the row that each (head, query block) uses.
        block_size, query_block: tokens per KV block and queries per query block.
    """

    indices: Tensor
    counts: Tensor
    rows: Tensor
    block_size: int
    query_block: int

    def __post_init__(self) -> None:
        check_tensor("indices", self.indices, ndim=2, dtype=torch.int32)
        check_tensor("counts", self.counts, ndim=1, dtype=torch.int32)
        check_tensor("rows", self.rows, ndim=3, dtype=torch.int32)
        check_shape("counts", self.counts, (self.indices.shape[0],), "one per row of indices")
        check_same_device("counts", self.counts, self.indices.device)
        check_same_device("rows", self.rows, self.indices.device)
        for name, tensor in (("indices", self.indices), ("counts", self.counts), ("rows", self.rows)):
            check_contiguous(name, tensor)
        _check_block_sizes(self.block_size, self.query_block)


def _check_block_sizes(block_size: int, query_block: int) -> None:
    check_choice("block_size", block_size, BLOCK_SIZES)
    check_choice("query_block", query_block, QUERY_BLOCKS)
