"""What is measured: frozen, named cases, the presets that list them, and what each of them costs at least.

Useful FLOPs are 4 · rows · keys · D: two products per (query, key) pair, over the tokens that a table names, half of
the current chunk's own square included. Bytes are the fewest that must move: queries and outputs once, and each K and
V token once per KV head that somebody reads it for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from compactattn import BlockTable, PrefillBatch

K = 1024


@dataclass(frozen=True)
class Shape:
    """Requests and heads of one step; D is the same for Q, K and V."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.q_heads // self.kv_heads

    def __str__(self) -> str:
        return f"B{self.batch}-Hq{self.q_heads}-Hkv{self.kv_heads}"


@dataclass(frozen=True)
class Grouping:
    """What shares a table row: `heads` adjacent heads × `span` adjacent query blocks (None: the whole chunk)."""

    heads: int
    span: int | None

    def __str__(self) -> str:
        return f"{self.heads}x{'chunk' if self.span is None else self.span}"


FINEST = Grouping(1, 1)
PAPER = Grouping(4, None)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        kind: "step" (a whole chunk: dense and sparse peers, every stage), "tables" (attend alone on controlled
            tables), "layouts" (page sizes and ragged lengths), or "prompt" (chunks of a whole prompt).
        shape: requests and heads.
        context: keys of each request including the chunk's; for a prompt, its whole length.
        chunk: queries of each request.
        workload: a name of `workloads.WORKLOADS`.
        correlation: share of each head's blocks that it has in common with its KV group.
        page_size: tokens per page; pages lie in permuted order.
        groupings: the execution groups to time.
        peers: time FlashAttention-2, FlexAttention and QUOKA too, not only cuDNN.
        dtype: "bfloat16", or "float32" on the CPU.
        stride: for a prompt, every stride-th chunk is measured and stands for its neighbours.
    """

    kind: str
    shape: Shape
    context: int
    chunk: int
    workload: str = "vertical-slash"
    correlation: float = 0.9
    page_size: int = 128
    groupings: tuple[Grouping, ...] = (FINEST, PAPER)
    peers: bool = True
    dtype: str = "bfloat16"
    stride: int = 8

    @property
    def name(self) -> str:
        """Unique within a preset, and readable: "step-128K-q1024-B1-Hq32-Hkv8-vertical-slash-c1"."""
        parts = [self.kind, _tokens(self.context), f"q{self.chunk}", str(self.shape)]
        if self.kind in ("step", "prompt"):
            parts += [self.workload, f"c{self.correlation:g}"]
        if self.page_size != 128:
            parts.append(f"page{self.page_size}")
        return "-".join(parts)


def _tokens(count: int) -> str:
    return f"{count // K}K" if count % K == 0 else str(count)


ONE = Shape(1, 32, 8)
TP2_RANK = Shape(8, 16, 4)
SMALL = Shape(1, 4, 1)
CONTEXTS = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K)
CHUNKS = (512, 1024, 2048, 4096)
CORRELATIONS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Preset:
    """Cases, the most telling ones first, and how long to spend on them.

    Attributes:
        device: where it runs.
        cases: in the order in which they run.
        timing_seconds: time to spend on the timed loop of one case.
        budget_seconds: no new case starts once the run has taken so long.
        capacity: tokens for which the dense copies are allocated, so that FlexAttention compiles once per chunk size.
    """

    device: str
    cases: tuple[Case, ...]
    timing_seconds: float
    budget_seconds: float
    capacity: int = 0
    notes: tuple[str, ...] = field(default=())


def _h200_cases() -> tuple[Case, ...]:
    both = (ONE, TP2_RANK)
    goal = [Case("step", shape, 128 * K, 1024) for shape in both]
    tables = [Case("tables", shape, 128 * K, 1024, workload="noise") for shape in both]
    prompts = [Case("prompt", shape, 128 * K, 1024) for shape in both]
    layouts = [Case("layouts", shape, 128 * K, 1024, workload="noise") for shape in both]
    grid = [Case("step", shape, context, 1024) for context in reversed(CONTEXTS) for shape in both]
    chunks = [Case("step", shape, 128 * K, chunk) for chunk in CHUNKS for shape in both]
    spread = [
        Case("step", shape, 128 * K, 1024, correlation=correlation, peers=False)
        for shape, correlation in itertools.product(both, CORRELATIONS)
        if correlation != Case.correlation
    ]
    scattered = [Case("step", shape, 128 * K, 1024, workload="scattered", peers=False) for shape in both]
    rest = [
        Case("step", shape, context, chunk)
        for context, chunk, shape in itertools.product(reversed(CONTEXTS), CHUNKS, both)
    ]
    ordered = [*goal, *tables, *spread, *grid, *chunks, *prompts, *layouts, *scattered, *rest]
    return tuple(dict.fromkeys(ordered))


def _cpu_cases() -> tuple[Case, ...]:
    small = Case("step", SMALL, 8 * K, 256, dtype="float32")
    tables = replace(small, kind="tables", workload="noise")
    return (
        small,
        tables,
        replace(small, context=16 * K),
        replace(small, context=4 * K),
        replace(small, chunk=512),
        *(replace(small, correlation=correlation, peers=False) for correlation in (1.0, 0.5, 0.0)),
        replace(small, page_size=16, peers=False),
        replace(small, kind="prompt", stride=8),
        replace(tables, kind="layouts", context=4 * K),
        replace(small, workload="scattered", peers=False),
    )


def preset(name: str) -> Preset:
    """The cases of a preset by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "h200":
        notes = ("bfloat16, D = 128; pages in permuted order; K/V of 128K tokens and more do not fit in L2.",)
        return Preset("cuda", _h200_cases(), 1.0, 340.0, 256 * K, notes)
    if name == "smoke":
        step = Case("step", ONE, 16 * K, 1024)
        return Preset("cuda", (step, replace(step, kind="tables", workload="noise")), 0.3, 120.0, 16 * K)
    if name == "cpu":
        return Preset("cpu", _cpu_cases(), 0.6, 120.0)
    raise ValueError(f"preset: expected h200, smoke or cpu, got {name!r}")


def matching(cases: Sequence[Case], pattern: str | None) -> tuple[Case, ...]:
    """The cases whose name contains, or matches as a shell pattern, one of the comma-separated `pattern`s."""
    if pattern is None:
        return tuple(cases)
    wanted = [part.strip() for part in pattern.split(",") if part.strip()]
    return tuple(case for case in cases if any(part in case.name or fnmatchcase(case.name, part) for part in wanted))


def dense_flops(q_lens: Sequence[int], past_lens: Sequence[int], shape: Shape) -> float:
    """4 · rows · keys · D of bottom-right causal attention, half of each chunk's own square."""
    pairs = sum(q_len * past + q_len * q_len / 2 for q_len, past in zip(q_lens, past_lens, strict=True))
    return 4.0 * pairs * shape.q_heads * shape.head_dim


def table_flops(table: BlockTable, batch: PrefillBatch, shape: Shape) -> float:
    """4 · rows · keys · D over the past tokens that a table names, and half of each chunk's own square."""
    past_lens = batch.past_lens.tolist()
    q_lens = batch.q_lens.tolist()
    entries = past_entries(table, batch).double()
    starts = torch.arange(table.rows.shape[2], device=table.rows.device) * table.query_block
    rows = (batch.q_lens[:, None] - starts).clamp(0, table.query_block).double()
    past_pairs = float((entries * rows[:, None]).sum()) * table.block_size
    for q_len, past in zip(q_lens, past_lens, strict=True):
        unaligned = past % table.block_size
        past_pairs += shape.q_heads * (q_len * unaligned + q_len * q_len / 2)
    return 4.0 * past_pairs * shape.head_dim


def past_entries(table: BlockTable, batch: PrefillBatch) -> torch.Tensor:
    """Past blocks in the row of each (request, head, query block): int64 [B, Hq, Qb]."""
    keep = table_mask(table)[table.rows.long()]
    blocks = torch.arange(keep.shape[-1], device=keep.device)
    past = blocks < (batch.past_lens // table.block_size)[:, None]
    return (keep & past[:, None, None]).sum(-1)


def table_mask(table: BlockTable) -> torch.Tensor:
    """The blocks of each row, bool [R, Kb]."""
    valid = torch.arange(table.indices.shape[1], device=table.indices.device) < table.counts[:, None]
    keep = torch.zeros(table.indices.shape, dtype=torch.bool, device=table.indices.device)
    row, column = valid.nonzero(as_tuple=True)
    keep[row, table.indices[row, column].long()] = True
    return keep


def table_bytes(table: BlockTable, batch: PrefillBatch, shape: Shape, element: int) -> float:
    """Queries and outputs once, and K and V of each block once per KV head that some of its query heads names."""
    keep = table_mask(table)[table.rows.long()]
    used = keep.unflatten(1, (shape.kv_heads, shape.group)).any(2).any(2)
    starts = torch.arange(used.shape[-1], device=used.device) * table.block_size
    tokens = (batch.seq_lens[:, None] - starts).clamp(0, table.block_size)
    kv = 2 * float((used * tokens[:, None]).sum())
    qo = 2.0 * int(batch.cu_seqlens_q[-1]) * shape.q_heads
    return (kv + qo) * shape.head_dim * element


def dense_bytes(q_lens: Sequence[int], past_lens: Sequence[int], shape: Shape, element: int) -> float:
    """Queries and outputs once, every key and value once."""
    kv = 2.0 * (sum(q_lens) + sum(past_lens)) * shape.kv_heads
    return (kv + 2.0 * sum(q_lens) * shape.q_heads) * shape.head_dim * element
