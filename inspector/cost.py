"""What a table reads: physical pages, bytes and products, an estimate of its time, and what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import records
from benchmarks.cases import Shape, dense_bytes, dense_flops, table_bytes, table_flops
from inspector.model import Reading
from inspector.sources import Step

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "latency-h200.json"
ELEMENT_BYTES = 2  # what engines keep: 16-bit queries, keys and values

#: What a physical page is to one KV head, by its number in `PageGrid.kinds`.
PAGE_KINDS = ("not the request's", "skipped", "past, read", "current region, read")


@dataclass(frozen=True, eq=False)
class PageGrid:
    """The physical pages of the cache, seen by the query heads of one KV head.

    Attributes:
        kinds: int [num_pages], numbers of `PAGE_KINDS`.
        logical: int [num_pages]; which page of the request it holds, -1 for none.
        readers: int [num_pages]; (head, query block) pairs of the KV head whose row names a block in it.
        page_size, stop: tokens per page; tokens of the request.
        page_bytes: of a page's keys and values for this KV head, in 16-bit elements.
    """

    kinds: np.ndarray
    logical: np.ndarray
    readers: np.ndarray
    page_size: int
    stop: int
    page_bytes: int

    def count(self, kind: str) -> int:
        return int((self.kinds == PAGE_KINDS.index(kind)).sum())


def page_grid(step: Step, reading: Reading, kv_head: int) -> PageGrid:
    """Where in the cache one KV head is read."""
    page_size, block_size = step.kv.page_size, reading.setting.selector.block_size
    heads = slice(kv_head * reading.group, (kv_head + 1) * reading.group)
    readers_of_block = (reading.keep[reading.rows[heads]] & reading.visible).sum((0, 1))
    pages = -(-step.stop // page_size)
    physical = step.kv.page_table[0, :pages].cpu().numpy()
    first = np.arange(pages) * page_size
    last = np.minimum(first + page_size, step.stop) - 1
    readers, current = np.zeros(pages, dtype=int), last // block_size >= reading.past_blocks
    for block in range(-(-page_size // block_size)):  # a page holds several blocks, or a part of one
        j = np.minimum(first // block_size + block, last // block_size)
        readers = np.maximum(readers, readers_of_block[j])
    kinds, logical, spread = (np.full(step.kv.k.shape[0], value) for value in (0, -1, 0))
    kinds[physical] = np.where(readers == 0, 1, np.where(current, 3, 2))
    logical[physical], spread[physical] = np.arange(pages), readers
    page_bytes = 2 * page_size * step.kv.head_dim * ELEMENT_BYTES
    return PageGrid(kinds, logical, spread, page_size, step.stop, page_bytes)


@dataclass(frozen=True)
class Work:
    """Products and bytes of one attention, sparse and dense; 16-bit elements."""

    table_flops: float
    table_bytes: float
    dense_flops: float
    dense_bytes: float


def work(step: Step, reading: Reading) -> Work:
    """As `benchmarks.cases` counts them."""
    shape = Shape(1, step.heads, step.kv_heads, step.q.shape[-1])
    lens = [len(step.q)], [step.start]
    return Work(
        table_flops(reading.table, step.batch, shape),
        table_bytes(reading.table, step.batch, shape, ELEMENT_BYTES),
        dense_flops(*lens, shape),
        dense_bytes(*lens, shape, ELEMENT_BYTES),
    )


@dataclass(frozen=True)
class Ceilings:
    """What one H200 was measured to reach: matrix products in TFLOP/s, copies in TB/s."""

    tflops: float
    tbps: float

    def time_ms(self, flops: float, moved: float) -> float:
        """max(FLOPs ÷ rate of products, bytes ÷ rate of copies): a bound, without launches and imbalance."""
        return max(flops / (self.tflops * 1e9), moved / (self.tbps * 1e9))


@dataclass(frozen=True)
class MeasuredRow:
    """One timing of `benchmarks/results`, beside the roofline of its own products and bytes."""

    case: str
    name: str
    family: str
    context: int
    density: float
    flops: float
    moved: float
    p50_ms: float
    roofline_ms: float

    @property
    def ratio(self) -> float:
        """How many times as long as the bound it took."""
        return self.p50_ms / self.roofline_ms


@dataclass(frozen=True)
class Measured:
    """The measured results that ship with the repository, gates passed, CUDA-graph replays.

    Attributes:
        gpu, commit: on what they were taken, for a reader.
        rows: `attend` and dense rows with products to count.
    """

    gpu: str
    versions: str
    ceilings: Ceilings
    rows: tuple[MeasuredRow, ...]

    def typical_ratio(self, family: str) -> float:
        """Median of measured ÷ bound; NaN without such rows."""
        ratios = [row.ratio for row in self.rows if row.family == family]
        return median(ratios) if ratios else math.nan


def load_measured(path: Path = RESULTS) -> Measured:
    """Read `benchmarks/results/latency-h200.json`.

    Raises:
        FileNotFoundError, ValueError: no such file, or another layout.
    """
    result = records.load(path)
    try:
        environment = records.environment_of(result)
        ceilings = _ceilings(result["runs"][-1]["ceilings"])
        rows = [
            row for case in result["cases"] for row in _case_rows(case, _ceilings(records.ceilings_of(result, case)))
        ]
        versions = f"torch {environment['torch']}, Triton {environment['triton']}"
        return Measured(environment["gpu"], versions, ceilings, tuple(rows))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a result of `python -m benchmarks latency`, got {error!r}") from error


def _ceilings(measured: dict) -> Ceilings:
    return Ceilings(measured["matmul_tflops"], measured["copy_tbps"])


def _case_rows(case: dict, ceilings: Ceilings) -> list[MeasuredRow]:
    """Attention alone: `attend` under each grouping, and the dense baselines."""
    found = []
    for row in case.get("rows", ()) if case["status"] == "ok" else ():
        attends = row["name"].startswith("attend ") and row["family"] == "stage"
        timed, passed = row.get("times", {}).get("graph"), row.get("gate", {}).get("passed")
        if not (attends or row["family"] == "dense") or timed is None or not passed or not row.get("flops"):
            continue
        density = 1.0 if row["family"] == "dense" else _past_density(case, row["grouping"])
        found.append(
            MeasuredRow(
                case=case["name"],
                name=row["name"],
                family="dense" if row["family"] == "dense" else "attend",
                context=case["case"]["context"],
                density=density,
                flops=row["flops"],
                moved=row["bytes"],
                p50_ms=timed["p50_ms"],
                roofline_ms=ceilings.time_ms(row["flops"], row["bytes"]),
            )
        )
    return found


def _past_density(case: dict, grouping: str) -> float:
    counted = (case.get("density") or {}).get(grouping, {}).get("past_density", {}).get("sub_group_union")
    return math.nan if counted is None else counted
