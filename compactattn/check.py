"""Find what only device data can show: bad page ids, contradictory lengths, tables that are not canonical."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from compactattn.data import BlockTable, PagedKV, PrefillBatch
from compactattn.validation import (
    check_cache,
    check_queries,
    check_record,
    check_rows,
    check_rows_of_queries,
    fail,
)


def check(kv: PagedKV, batch: PrefillBatch, table: BlockTable | None = None, q: torch.Tensor | None = None) -> None:
    """Read lengths, page ids and tables on the host and refuse what the kernels would silently follow.

    Synchronises, so call it outside of what `torch.compile` compiles and CUDA graphs capture; meant for debugging and
    tests. Entries in the unused tail of the page table or of a row are ignored, as the kernels ignore them.

    Raises:
        ValueError: a decreasing `cu_seqlens_q` or one that does not start at 0, more queries than keys, lengths above
            `max_q_len`, `max_seq_len` or the page table's capacity, a prompt shorter than its sequence, a page id out
            of range, a scale of an FP8 cache that is no finite number above 0, or a row that is not strictly ascending,
            lists a block beyond the last one visible to a member, lacks a block of the current region, or is unused but
            not empty; with `q` [T, Hq, D] also fewer rows than `cu_seqlens_q` promises.

    A sliding window changes nothing here: a table lists the whole current region, and attention masks it.
    """
    check_record("kv", kv, "PagedKV")
    check_cache(kv, batch, kv.k.device)
    _check_lengths(kv, batch)
    _check_pages(kv, batch)
    _check_scales(kv)
    if q is not None:
        check_queries(q, kv, batch)
        check_rows_of_queries(q, batch)
    if table is not None:
        check_record("table", table, "BlockTable")
        _check_table(kv, batch, table)


def _check_lengths(kv: PagedKV, batch: PrefillBatch) -> None:
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    if starts[0] != 0:
        raise fail("batch.cu_seqlens_q[0]", "0", starts[0])
    capacity = kv.page_table.shape[1] * kv.page_size
    prompts = None if batch.prompt_lens is None else batch.prompt_lens.tolist()
    for b, seq_len in enumerate(seq_lens):
        q_len = starts[b + 1] - starts[b]
        if q_len < 0:
            raise fail(f"batch.cu_seqlens_q[{b + 1}]", f"at least cu_seqlens_q[{b}] = {starts[b]}", starts[b + 1])
        if q_len > batch.max_q_len:
            raise fail(f"q_len of request {b}", f"at most max_q_len = {batch.max_q_len}", q_len)
        if not 0 <= seq_len <= batch.max_seq_len:
            raise fail(f"batch.seq_lens[{b}]", f"0 to max_seq_len = {batch.max_seq_len}", seq_len)
        if seq_len > capacity:
            raise fail(f"batch.seq_lens[{b}]", f"at most the page table's {capacity} tokens", seq_len)
        if q_len > seq_len:
            raise fail(f"q_len of request {b}", f"at most seq_lens[{b}] = {seq_len}", q_len)
        if prompts is not None and prompts[b] < seq_len:
            raise fail(f"batch.prompt_lens[{b}]", f"at least seq_lens[{b}] = {seq_len}", prompts[b])


def _check_pages(kv: PagedKV, batch: PrefillBatch) -> None:
    pages = -(-batch.seq_lens // kv.page_size)
    used = torch.arange(kv.page_table.shape[1], device=kv.page_table.device) < pages[:, None]
    bad = (used & ((kv.page_table < 0) | (kv.page_table >= kv.k.shape[0]))).nonzero()
    if len(bad):
        b, n = bad[0].tolist()
        raise fail(f"kv.page_table[{b}, {n}]", f"a page id from 0 to {kv.k.shape[0] - 1}", int(kv.page_table[b, n]))


def _check_scales(kv: PagedKV) -> None:
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        for head, value in enumerate([] if scale is None else scale.tolist()):
            if not 0 < value < math.inf:
                raise fail(f"kv.{name}[{head}]", "a finite number above 0", value)


def _check_table(kv: PagedKV, batch: PrefillBatch, table: BlockTable) -> None:
    check_rows("table", table, table.rows.shape[1], batch)
    num_rows, blocks = table.indices.shape
    if blocks != batch.kv_blocks(table.block_size):
        raise fail("table.indices", f"{batch.kv_blocks(table.block_size)} columns = Kb of the batch", blocks)
    current = _current_region(batch, table, num_rows)
    indices, counts = table.indices.cpu(), table.counts.tolist()
    for r, count in enumerate(counts):
        if not 0 <= count <= blocks:
            raise fail(f"table.counts[{r}]", f"0 to {blocks}", count)
        entries = indices[r, :count].tolist()
        if r not in current:
            if count:
                raise fail(f"table.counts[{r}]", "0, because no query uses the row", count)
            continue
        if any(a >= b for a, b in pairwise(entries)) or (entries and entries[0] < 0):
            raise fail(f"table.indices[{r}]", "strictly ascending block ids from 0", entries)
        first, last = current[r]
        if entries and entries[-1] > last:
            raise fail(f"table.indices[{r}]", f"no block beyond {last}, the last visible one", entries[-1])
        missing = sorted(set(range(first, last + 1)) - set(entries))
        if missing:
            raise fail(
                f"table.indices[{r}]",
                f"every block of the current region, {first} to {last}",
                f"no {missing}",
            )


def _current_region(batch: PrefillBatch, table: BlockTable, num_rows: int) -> dict[int, tuple[int, int]]:
    """Row -> (first, last) block of the current region that its members see."""
    q_lens, seq_lens, rows = batch.q_lens.tolist(), batch.seq_lens.tolist(), table.rows.cpu()
    current: dict[int, tuple[int, int]] = {}
    for b, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        past_len = seq_len - q_len
        for i, first_query in enumerate(range(0, q_len, table.query_block)):
            last_row = past_len + min(first_query + table.query_block, q_len) - 1
            for r in set(rows[b, :, i].tolist()):
                if not 0 <= r < num_rows:
                    raise fail(f"table.rows[{b}, :, {i}]", f"rows from 0 to {num_rows - 1}", r)
                first, last = current.get(r, (past_len // table.block_size, 0))
                current[r] = (
                    min(first, past_len // table.block_size),
                    max(last, last_row // table.block_size),
                )
    return current
