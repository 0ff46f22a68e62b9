"""Exact softmax attention over the blocks that a table names: gather a little, multiply through BLAS, accumulate."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compactattn._numba.pages import gather, in_units, locate_units, of_head
from compactattn._numba.summary import block_means
from compactattn._numba.threads import run_each
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.features import PLAIN, Features, first_visible

_SCORE_ELEMENTS = 1 << 18  # of one tile times one run of keys: 1 MiB in float32, which a core's own cache holds
_MIN_KEYS, _MAX_KEYS = 512, 4096  # gathered at a time
_MAX_ROWS = 8192  # of running results in one task; the next task of the same row gathers its keys again
_SUMMED_DIMS = 32  # of D summed at once: sums of four short sums are twice as exact as one long sum, and as fast
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, eq=False)
class _Row:
    """A table row, as one KV head of one request reads it.

    Attributes:
        blocks: int64 [count], ascending KV block ids.
        run: blocks gathered at a time; the same for all tiles of the row, so that they round alike however they are
            dealt out.
        left_out: means [n, D] of keys and of values of the n past blocks that the row does not name, rounded to the
            queries' dtype, float32; None without a correction.
    """

    kv: PagedKV
    request: int
    kv_head: int
    blocks: np.ndarray
    block_size: int
    run: int
    left_out: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Tile:
    """Rows that meet the same keys: query block `block` of the chunk, of the heads that share a table row.

    Attributes:
        heads: query heads, ascending, of one KV group.
        first, count: the block's first query in the packed [T] and its number of queries.
        position: where its first query stands; the last stands at position + count - 1.
    """

    heads: list[int]
    first: int
    count: int
    position: int

    @property
    def rows(self) -> int:
        return len(self.heads) * self.count

    @property
    def last(self) -> int:
        return self.position + self.count - 1


class _Running:
    """Softmax of one tile so far: float32 maximum and sum [rows, 1], weighted values [rows, D] before division.

    Rows are head by head, the query block's rows within each. Scores are base-2 logarithms, because torch's `exp` is
    ten times slower where it underflows (half of all keys, in real attention) and its `exp2` is not.
    """

    def __init__(self, tile: _Tile, q: Tensor, scale: float, features: Features) -> None:
        self.tile, self.scale, self.window = tile, scale / math.log(2), features.window
        self.softcap = None if features.softcap is None else features.softcap / math.log(2)
        queries = q[tile.first : tile.first + tile.count, tile.heads]
        self.queries = queries.transpose(0, 1).float().flatten(0, 1)
        self.top = torch.full((tile.rows, 1), _LOWEST, dtype=torch.float32)
        self.total = torch.zeros_like(self.top)
        self.values = torch.zeros_like(self.queries)
        if features.sinks is not None:  # the first key: its value is 0
            sinks = features.sinks[tile.heads].repeat_interleave(tile.count)[:, None] / math.log(2)
            self.top.copy_(sinks.clamp(min=_LOWEST))
            self.total.copy_(sinks > -math.inf)

    def add_visible(self, keys: Tensor, values: Tensor, positions: Tensor, buffer: Tensor) -> None:
        """Attend to those of the keys [n, D] at ascending int64 `positions` [n] that some row of the tile sees."""
        stop = int(torch.searchsorted(positions, self.tile.last, right=True))
        start = 0 if self.window is None else int(torch.searchsorted(positions, self.tile.position - self.window + 1))
        if start < stop:
            self.add(keys[start:stop], values[start:stop], positions[start:stop], buffer)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor, buffer: Tensor, tokens: int = 1) -> None:
        """Attend to keys [n, D] at ascending int64 `positions` [n], each of which some row of the tile sees.

        Each key stands for so many `tokens`.
        """
        scores = buffer[: len(self.queries) * len(keys)].view(len(self.queries), len(keys))
        for d in range(0, keys.shape[1], _SUMMED_DIMS):
            part = slice(d, d + _SUMMED_DIMS)
            torch.addmm(scores, self.queries[:, part], keys[:, part].T, beta=min(d, 1), alpha=self.scale, out=scores)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if tokens > 1:
            scores += math.log2(tokens)
        self._hide_later_keys(scores, positions)
        if self.window is not None:
            self._hide_earlier_keys(scores, positions, self.window)
        top = torch.maximum(self.top, scores.amax(1, keepdim=True))
        shrink = self.top.sub_(top).exp2_()
        weights = scores.sub_(top).exp2_()
        self.total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        self.values.mul_(shrink).addmm_(weights, values)
        self.top = top

    def _hide_later_keys(self, scores: Tensor, positions: Tensor) -> None:
        seen_by_all = int(torch.searchsorted(positions, self.tile.position, right=True))
        if seen_by_all < len(positions):
            rows = self.tile.position + torch.arange(self.tile.count)
            later = positions[seen_by_all:] > rows[:, None]
            scores.unflatten(0, (-1, self.tile.count))[..., seen_by_all:].masked_fill_(later, -math.inf)

    def _hide_earlier_keys(self, scores: Tensor, positions: Tensor, window: int) -> None:
        seen_by_all = int(torch.searchsorted(positions, self.tile.last - window, right=True))
        if seen_by_all > 0:
            rows = self.tile.position + torch.arange(self.tile.count)
            earlier = positions[:seen_by_all] <= rows[:, None] - window
            scores.unflatten(0, (-1, self.tile.count))[..., :seen_by_all].masked_fill_(earlier, -math.inf)

    def write(self, out: Tensor, lse: Tensor | None) -> None:
        tile = self.tile
        rows, shape = slice(tile.first, tile.first + tile.count), (len(tile.heads), tile.count)
        result = self.values.div_(self.total.clamp(min=torch.finfo(torch.float32).tiny))
        out[rows, tile.heads] = result.unflatten(0, shape).transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[rows, tile.heads] = ((self.top + self.total.log2()) * math.log(2)).view(shape).T


def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    features: Features = PLAIN,
    correction: KVSummary | None = None,
) -> None:
    """Write softmax attention of each query over the visible tokens of its row's blocks to `out` and `lse`.

    Keys and values of a table row and KV head are gathered to float32 a run at a time, and every query block and head
    that shares the row meets the run before the next is gathered. Nothing after the last row of the query blocks
    at hand is multiplied, nor is anything that no table names or that lies before their window: it may hold NaN.

    Args:
        q: [T, Hq, D], any strides with a contiguous last dimension.
        out: [T, Hq, D], q's dtype; rows at or beyond `cu_seqlens_q[B]` are not touched.
        lse: float32 [T, Hq], natural log, or None.
        features: what the model changes about attention.
        correction: means of the past blocks that a row leaves out, or None.
    """
    past_blocks = (batch.past_lens // table.block_size).tolist()
    rows_at_a_time = min(_MAX_ROWS, q.shape[0] * q.shape[1] // (4 * torch.get_num_threads()))
    tasks = []
    for request, kv_head, row, tiles in _tiles_by_table_row(batch, table, q.shape[1], kv.num_kv_heads):
        blocks = table.indices[row, : int(table.counts[row])].numpy().astype(np.int64)
        keys_at_a_time = _SCORE_ELEMENTS // max(tile.rows for tile in tiles)
        run = max(1, min(max(keys_at_a_time, _MIN_KEYS), _MAX_KEYS) // table.block_size)
        left_out = None
        if correction is not None:
            past = past_blocks[request]
            left_out = _left_out(kv, request, kv_head, past, blocks, table.block_size, correction, q.dtype)
        where = _Row(kv, request, kv_head, blocks, table.block_size, run, left_out)
        for part in _parts(tiles, rows_at_a_time):
            tasks.append(functools.partial(_attend_tiles, where, part, q, scale, out, lse, features))
    run_each(tasks)


def attend_corrected(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    summary: KVSummary,
    out: Tensor,
    lse: Tensor | None,
    features: Features = PLAIN,
) -> None:
    """`attend`, where every complete past block that a row leaves out is one more key and value: its means."""
    attend(q, kv, batch, table, scale, out, lse, features, summary)


def _left_out(
    kv: PagedKV,
    request: int,
    kv_head: int,
    past: int,
    blocks: np.ndarray,
    block_size: int,
    summary: KVSummary,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Means [n, D] of the past blocks that are not among `blocks`, rounded to the queries' dtype, as float32."""
    assert summary.v_mean is not None
    absent = torch.from_numpy(np.setdiff1d(np.arange(past), blocks))
    per_block = block_size // summary.unit
    units = (absent[:, None] * per_block + torch.arange(per_block)).flatten()
    places = locate_units(kv, request, units, summary.unit)
    keys, values = (
        block_means(means[places.pages, places.slots, kv_head][:, None], per_block)[:, 0].to(dtype).float()
        for means in (summary.k_mean, summary.v_mean)
    )
    return keys, values


def _tiles_by_table_row(
    batch: PrefillBatch, table: BlockTable, q_heads: int, kv_heads: int
) -> Iterator[tuple[int, int, int, list[_Tile]]]:
    """(request, KV head, table row, tiles that use the row, in the order of their query blocks)."""
    group, query_block = q_heads // kv_heads, table.query_block
    starts = batch.cu_seqlens_q.tolist()
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        q_len = starts[request + 1] - starts[request]
        for kv_head in range(kv_heads):
            first_head = kv_head * group
            rows = table.rows[request, first_head : first_head + group, : -(-q_len // query_block)].numpy()
            for row in np.unique(rows).tolist():
                tiles = []
                for i in range(rows.shape[1]):
                    heads = (np.flatnonzero(rows[:, i] == row) + first_head).tolist()
                    first, count = i * query_block, min(query_block, q_len - i * query_block)
                    if heads:
                        tiles.append(_Tile(heads, starts[request] + first, count, seq_len - q_len + first))
                yield request, kv_head, row, tiles


def _parts(tiles: list[_Tile], rows: int) -> Iterator[list[_Tile]]:
    """Cut a list of tiles so that each part has at most so many rows, or is a single tile."""
    part: list[_Tile] = []
    for tile in tiles:
        if part and sum(other.rows for other in part) + tile.rows > rows:
            yield part
            part = []
        part.append(tile)
    if part:
        yield part


def _attend_tiles(
    row: _Row, tiles: list[_Tile], q: Tensor, scale: float, out: Tensor, lse: Tensor | None, features: Features
) -> None:
    """Let tiles that share a table row attend to its blocks, and write their results."""
    kv, block_size = row.kv, row.block_size
    horizon = max(tile.last for tile in tiles)
    first = min(first_visible(features, tile.position) for tile in tiles)
    blocks = torch.from_numpy(row.blocks[row.blocks * block_size <= horizon])
    running = [_Running(tile, q, scale, features) for tile in tiles]
    keys_at_a_time = min(row.run, len(blocks)) * block_size
    if row.left_out is not None:
        keys_at_a_time = max(keys_at_a_time, min(row.run * block_size, len(row.left_out[0])))
    buffer = torch.empty(max(tile.rows for tile in tiles) * keys_at_a_time, dtype=torch.float32)
    unit = min(kv.page_size, block_size)
    units_in_block = torch.arange(block_size // unit)
    k, v = in_units(kv.k[:, :, row.kv_head], unit), in_units(kv.v[:, :, row.kv_head], unit)
    k_scale, v_scale = of_head(kv.k_scale, row.kv_head), of_head(kv.v_scale, row.kv_head)
    for some in blocks.split(row.run):
        units = (some[:, None] * len(units_in_block) + units_in_block).flatten()
        units = units[(units * unit <= horizon) & ((units + 1) * unit > first)]
        positions = (units[:, None] * unit + torch.arange(unit)).flatten()
        places = locate_units(kv, row.request, units, unit)
        keys, values = gather(k, places, k_scale).flatten(0, 1), gather(v, places, v_scale).flatten(0, 1)
        for state in running:
            state.add_visible(keys, values, positions, buffer)
    if row.left_out is not None:
        for keys, values in zip(*(means.split(row.run * block_size) for means in row.left_out), strict=True):
            everywhere = torch.zeros(len(keys), dtype=torch.int64)  # before any query
            for state in running:
                if len(keys):
                    state.add(keys, values, everywhere, buffer, tokens=block_size)
    for state in running:
        state.write(out, lse)
