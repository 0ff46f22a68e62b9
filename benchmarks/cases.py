"""What is measured: frozen, named cases, the presets that list them, and what each of them costs at least.

Useful FLOPs are 4 · rows · keys · D: two products per (query, key) pair, over the tokens that a table names, half of
the current chunk's own square included. Bytes are the fewest that must move: queries and outputs once, and each K and
V token once per KV head that somebody reads it for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

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
    """What shares a table row: `heads` adjacent heads × `span` adjacent query blocks (None: the whole chunk).

    Both may be "auto": the library then chooses on the device, and only its own functions can say what it chose.
    """

    heads: int | str
    span: int | str | None

    def __str__(self) -> str:
        if self.chosen_by_library:
            return "auto"
        return f"{self.heads}x{'chunk' if self.span is None else self.span}"

    @property
    def chosen_by_library(self) -> bool:
        return isinstance(self.heads, str)

    @property
    def arguments(self) -> dict[str, Any]:
        """As `unite`, `select_table` and `prefill` take them."""
        return {"heads_per_group": self.heads, "query_blocks_per_span": self.span}

    def fitting(self, group: int) -> Grouping:
        """The same with heads that divide G."""
        return self if isinstance(self.heads, str) else Grouping(math.gcd(self.heads, group), self.span)


FINEST = Grouping(1, 1)
PAPER = Grouping(4, None)
AUTO = Grouping("auto", "auto")
#: What every case compares.
GROUPINGS = (FINEST, PAPER)


#: The questions. What each kind of case measures:
KINDS = {
    "step": "one chunk: dense and sparse peers, every stage, and the whole",
    "tables": "attend alone on controlled tables, against dense and the card's ceilings",
    "prompt": "the chunks of a whole prompt, dense and prefill, per chunk and in sum",
    "scaling": "selection and attention at a fixed number of kept blocks, as the context grows",
    "layouts": "page sizes, unaligned lengths, requests of very different length",
    "decode": "attend alone on decode and speculative rows, which read every block, against dense and the ceilings",
    "features": "attend alone, plain and with soft-capping, a window, sinks and an FP8 cache",
    "host": "host time of a call in steady state and at new lengths, and what it allocates",
    "bounds": "one chunk selected by KeyBounds beside FlashPrefill: summaries, masks, tables, and the whole",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        kind: one of `KINDS`.
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
        since: for a prompt, the chunks that end at or before this position belong to another case: chunk n of every
            longer prompt is the same measurement, so prompts of 32K, 64K, ... share their chunks.
    """

    kind: str
    shape: Shape
    context: int
    chunk: int
    workload: str = "vertical-slash"
    correlation: float = 0.9
    page_size: int = 128
    groupings: tuple[Grouping, ...] = GROUPINGS
    peers: bool = True
    dtype: str = "bfloat16"
    stride: int = 1
    since: int = 0

    @property
    def name(self) -> str:
        """Unique within a preset, and readable: "step-128K-q1024-B1-Hq32-Hkv8-vertical-slash-c1"."""
        parts = [self.kind, _tokens(self.context), f"q{self.chunk}", str(self.shape)]
        if self.kind in ("step", "prompt", "host", "scaling", "bounds"):
            parts += [self.workload, f"c{self.correlation:g}"]
        if self.page_size != 128:
            parts.append(f"page{self.page_size}")
        return "-".join(parts)


def _tokens(count: int) -> str:
    return f"{count // K}K" if count % K == 0 else str(count)


ONE = Shape(1, 32, 8)
TP2_RANK = Shape(8, 16, 4)
SMALL = Shape(1, 4, 1)
SERVED = Shape(32, 32, 8)
NEW_TOKENS = (1, 4, 8)  # a decode step, and two lengths of speculation
CONTEXTS = (8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K)
CHUNKS = (512, 1024, 2048, 4096)
PROMPTS = (32 * K, 64 * K, 128 * K, 256 * K)
CORRELATIONS = (1.0, 0.9, 0.75, 0.5, 0.4, 0.25, 0.0)


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


def prompt_cases(case: Case, ends: Sequence[int], strides: dict[int, int]) -> list[Case]:
    """Prompts that end at each of `ends`, every chunk measured once; `strides`: where fewer are, by end."""
    pairs = zip((0, *ends), ends, strict=False)
    return [replace(case, kind="prompt", context=end, since=since, stride=strides.get(end, 1)) for since, end in pairs]


def _h200_cases() -> tuple[Case, ...]:
    both = (ONE, TP2_RANK)
    goal = [Case("step", shape, 128 * K, 1024) for shape in both]
    tables = [Case("tables", shape, 128 * K, 1024, workload="noise") for shape in both]
    layouts = [Case("layouts", shape, 128 * K, 1024) for shape in both]
    prompts = [prompt_cases(case, PROMPTS, {256 * K: 4}) for case in goal]
    hosts = [Case("host", shape, context, 1024) for shape, context in itertools.product(both, (128 * K, 8 * K))]
    scaling = [Case("scaling", ONE, 8 * K << n, 1024) for n in range(8)]
    decode = [Case("decode", SERVED, 16 * K, count, "noise", groupings=(PAPER,)) for count in NEW_TOKENS]
    bounds = [Case("bounds", shape, 128 * K, 1024, peers=False) for shape in both]
    features = [Case("features", shape, 128 * K, 1024, "noise", groupings=(FINEST,), peers=False) for shape in both]
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
    ordered = [*goal, *tables, *itertools.chain(*prompts), *scaling, *hosts, *bounds, *features, *layouts, *decode]
    cases = dict.fromkeys([*ordered, *spread, *grid, *chunks, *scattered, *rest])
    return tuple(replace(case, groupings=(*GROUPINGS, AUTO)) if _compares_auto(case) else case for case in cases)


def _compares_auto(case: Case) -> bool:
    """Groups that choose themselves are compared over contexts and correlations, and for their host time."""
    return case.kind == "host" or (case.kind == "step" and case.chunk == 1024)


def _cpu_cases() -> tuple[Case, ...]:
    small = Case("step", SMALL, 8 * K, 256, dtype="float32")
    tables = replace(small, kind="tables", workload="noise")
    return (
        small,
        tables,
        *prompt_cases(small, (4 * K, 8 * K), {4 * K: 4, 8 * K: 4}),
        *(replace(small, kind="scaling", context=context * K) for context in (4, 8, 16)),
        replace(small, kind="host"),
        replace(small, kind="bounds", peers=False),
        replace(small, kind="features", workload="noise", groupings=(FINEST,), peers=False),
        replace(small, kind="layouts", shape=replace(SMALL, batch=2), context=4 * K),
        replace(small, kind="decode", shape=replace(SMALL, batch=2), context=4 * K, chunk=4, groupings=(PAPER,)),
        replace(small, context=16 * K),
        replace(small, context=4 * K),
        replace(small, chunk=512),
        *(replace(small, correlation=correlation, peers=False) for correlation in (1.0, 0.5, 0.0)),
        replace(small, page_size=16, peers=False),
        replace(small, workload="scattered", peers=False),
    )


def preset(name: str) -> Preset:
    """The cases of a preset by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "h200":
        notes = ("bfloat16, D = 128; pages in permuted order; K/V of 128K tokens and more do not fit in L2.",)
        return Preset("cuda", _h200_cases(), 1.0, 540.0, 256 * K, notes)
    if name == "smoke":
        step = Case("step", ONE, 16 * K, 1024)
        return Preset("cuda", (step, replace(step, kind="tables", workload="noise")), 0.3, 120.0, 16 * K)
    if name == "cpu":
        return Preset("cpu", _cpu_cases(), 0.6, 120.0)
    raise ValueError(f"preset: expected h200, smoke or cpu, got {name!r}")


def chosen_cases(chosen: Preset, pattern: str | None, only: str | None = None) -> tuple[Case, ...]:
    """The cases of a preset of the kinds `only` whose name contains, or matches, one of the `pattern`s; see `matching`.

    Raises:
        ValueError: a kind that does not exist, or options that leave nothing to run.
    """
    found = matching(chosen.cases, pattern, only)
    if not found:
        if pattern is None:
            raise ValueError(f"--only: expected some of {', '.join(KINDS)}, got no match")
        among = matching(chosen.cases, None, only) or chosen.cases
        raise ValueError(f"--cases: expected a part of a case's name, such as {among[0].name}, got no match")
    return found


def matching(cases: Sequence[Case], pattern: str | None, only: str | None = None) -> tuple[Case, ...]:
    """The cases of the kinds `only` whose name contains, or matches as a shell pattern, one of the `pattern`s.

    Both are comma-separated; None leaves the choice open.

    Raises:
        ValueError: a kind that does not exist.
    """
    kinds = _parts(only) if only is not None else list(KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--only: expected some of {', '.join(KINDS)}, got {kind!r}")
    return tuple(case for case in named(cases, pattern) if case.kind in kinds)


def named(cases: Sequence[Any], pattern: str | None) -> list[Any]:
    """Those whose name contains, or matches as a shell pattern, one of the comma-separated parts; all for None."""
    wanted = _parts(pattern) if pattern is not None else ["*"]
    return [case for case in cases if any(part in case.name or fnmatchcase(case.name, part) for part in wanted)]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
