"""Settings in, results out: everything that the inspector shows of one chunk. Pure functions, no streamlit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compactattn import BlockTable, Selector, build_table, select, unite
from compactattn.capture import Capture, load_capture, sample_path
from compactattn.demo import PagedPrompt, best_device
from compactattn.quality import DensityCascade, density_cascade


@dataclass(frozen=True)
class Settings:
    """What to look at, and how its blocks are selected.

    Attributes:
        layer: index into the capture's layers.
        start, stop: the chunk's positions.
        head: query head.
        selector: what proposes blocks.
        heads_per_group: heads that share a table row.
        query_blocks_per_span: query blocks that share a table row; None is the whole chunk.
    """

    layer: int
    start: int
    stop: int
    head: int
    selector: Selector
    heads_per_group: int
    query_blocks_per_span: int | None = None


@dataclass(frozen=True, eq=False)
class Inspection:
    """One chunk seen by one head and by its execution group; Qb query blocks, Kb KV blocks, S spans.

    Attributes:
        settings: what was asked for.
        mass: float [Qb, Kb]; share of the query block's exact softmax mass on each KV block, a row sums to 1.
        selected: bool [Qb, Kb]; what the head's selector keeps.
        visible: bool [Qb, Kb]; blocks of which some row sees a token.
        past_blocks: blocks before the current region, which every table lists whole.
        heads: the query heads of the group.
        members: int [S]; (head, query block) pairs that share each row.
        votes: int [S, Kb]; how many members selected each block.
        listed: bool [S, Kb]; the block table.
        seen_by_row: bool [S, Kb]; blocks that are visible to some query of the row.
        cascade: past blocks read by this chunk, all heads, at each step of the cascade.
    """

    settings: Settings
    mass: np.ndarray
    selected: np.ndarray
    visible: np.ndarray
    past_blocks: int
    heads: range
    members: np.ndarray
    votes: np.ndarray
    listed: np.ndarray
    seen_by_row: np.ndarray
    cascade: DensityCascade

    def mass_covered_by_mask(self) -> float:
        """Mean over the query blocks of the mass on the head's own selection."""
        return float((self.mass * self.selected).sum(1).mean())

    def mass_covered_by_table(self) -> float:
        """Mean over the query blocks of the mass on the row that the head walks."""
        spans = np.arange(len(self.mass)) // span_length(self.settings, len(self.mass))
        return float((self.mass * self.listed[spans]).sum(1).mean())


def load(path: str) -> Capture:
    """The capture at `path`, or the sample that ships with the package for an empty one.

    Raises:
        FileNotFoundError, ValueError: as `load_capture`.
    """
    return load_capture(Path(path) if path else sample_path())


def stamp(path: str) -> tuple[str, int]:
    """What identifies a file's contents for a cache: its path and time of change (0 for no such file)."""
    file = Path(path) if path else sample_path()
    return str(file), file.stat().st_mtime_ns if file.exists() else 0


def chunk_starts(tokens: int, chunk: int) -> list[int]:
    return list(range(0, tokens, chunk))


def span_length(settings: Settings, query_blocks: int) -> int:
    """Query blocks that share a row."""
    return query_blocks if settings.query_blocks_per_span is None else settings.query_blocks_per_span


def inspect(capture: Capture, settings: Settings) -> Inspection:
    """Run the first three stages on one chunk and compare one head's mask with its exact attention.

    Raises:
        ValueError: settings that the library refuses.
    """
    selector = settings.selector
    prompt = PagedPrompt.from_layer(capture.layers[settings.layer], best_device())
    if settings.start:
        prompt.feed(0, settings.start)
    batch = prompt.feed(settings.start, settings.stop)
    q, kv_heads = prompt.q[settings.start : settings.stop], prompt.kv.num_kv_heads
    selection = select(q, prompt.kv, batch, selector, scale=capture.scale)
    grouping = {
        "heads_per_group": settings.heads_per_group,
        "query_blocks_per_span": settings.query_blocks_per_span,
    }
    table = build_table(unite(selection, batch, **grouping))
    first_head = settings.head // settings.heads_per_group * settings.heads_per_group
    heads = range(first_head, first_head + settings.heads_per_group)
    masks = selection.mask[0, heads.start : heads.stop].cpu().numpy()
    mass = block_mass(q[:, settings.head], prompt.k[settings.head * kv_heads // q.shape[1]], settings, capture.scale)
    spans = np.arange(masks.shape[1]) // span_length(settings, masks.shape[1])
    span_count, visible = int(spans[-1]) + 1, visible_blocks(settings)
    rows = [int(table.rows[0, settings.head, int(np.argmax(spans == s))]) for s in range(span_count)]
    return Inspection(
        settings=settings,
        mass=mass,
        selected=masks[settings.head - first_head],
        visible=visible,
        past_blocks=settings.start // selector.block_size,
        heads=heads,
        members=np.bincount(spans) * len(heads),
        votes=np.stack([masks[:, spans == s].sum((0, 1)) for s in range(span_count)]),
        listed=np.stack([_listed(table, row) for row in rows]),
        seen_by_row=np.stack([visible[spans == s].any(0) for s in range(span_count)]),
        cascade=density_cascade(selection, batch, kv_heads=kv_heads, **grouping),
    )


def _listed(table: BlockTable, row: int) -> np.ndarray:
    """One row of a block table as bool [Kb]."""
    listed = np.zeros(table.indices.shape[1], dtype=bool)
    listed[table.indices[row, : int(table.counts[row])].cpu().numpy()] = True
    return listed


def visible_blocks(settings: Settings) -> np.ndarray:
    """bool [Qb, Kb]: KV blocks that start at or before the last row of each query block."""
    selector = settings.selector
    ends = np.arange(settings.start, settings.stop, selector.query_block) + selector.query_block
    last_row = np.minimum(ends, settings.stop) - 1
    return np.arange(0, settings.stop, selector.block_size) <= last_row[:, None]


def block_mass(q: torch.Tensor, k: torch.Tensor, settings: Settings, scale: float | None) -> np.ndarray:
    """Exact softmax mass per (query block, KV block), mean over the block's rows, float [Qb, Kb].

    Args:
        q: [n, D], one head's queries of the chunk.
        k: [T, D], the keys of its KV head.
        scale: softmax scale, default D^-0.5.
    """
    selector = settings.selector
    keys = k[: settings.stop]
    edges = torch.arange(0, settings.stop, selector.block_size, device=k.device)
    rows = []
    for first in range(0, len(q), selector.query_block):
        queries = q[first : first + selector.query_block]
        scores = queries.float() @ keys.T.float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(settings.start + first + 1)
        share = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
        owner = torch.arange(settings.stop, device=k.device) // selector.block_size
        rows.append(torch.zeros(len(edges), device=k.device).index_add(0, owner, share))
    return torch.stack(rows).cpu().numpy()
