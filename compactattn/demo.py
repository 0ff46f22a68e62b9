"""A recorded prompt prefilled chunk by chunk, measured against dense attention and QUOKA: `compactattn demo`.

`measure` turns a capture and settings into a `DemoReport`; `as_table` and `as_json` show it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compactattn.capture import Capture, CapturedLayer
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.pipeline import prefill
from compactattn.quality import (
    CoverageSummary,
    DensityCascade,
    causal_attention,
    coverage,
    density_cascade,
    exact_lse,
    output_error,
    past_tokens,
    quoka_attention,
    quoka_select,
    summarize_coverage,
)
from compactattn.selection import select
from compactattn.selectors import FlashPrefill, Selector
from compactattn.summary import summarize
from compactattn.table import build_table
from compactattn.union import unite
from compactattn.validation import check_heads_per_group, check_int

_SLOW_S = 0.5


@dataclass(frozen=True)
class DemoSettings:
    """How to prefill: `chunk` queries per step, `page_size` tokens per page, `repeats` timed runs per chunk."""

    selector: Selector
    heads_per_group: int
    chunk: int = 512
    page_size: int = 16
    repeats: int = 3

    def __post_init__(self) -> None:
        check_int("chunk", self.chunk, 1)
        check_int("heads_per_group", self.heads_per_group, 1)
        check_int("repeats", self.repeats, 1)


@dataclass(frozen=True)
class ChunkReport:
    """One step of one layer.

    Attributes:
        start, queries: the chunk's first position and length.
        cascade: past blocks read at each step of the cascade, sums over heads and query blocks.
        rows, entries, longest, visible: the block table: its rows in use, blocks listed in all of them, in the longest
            one, and blocks that a row could list at most (past and current).
        past_tokens: past tokens given to a query, mean over the queries and KV heads.
        quoka_tokens: past tokens that QUOKA keeps per KV head, mean.
        prefill_s, dense_s, quoka_s: seconds of `prefill` (its summary update included), of PyTorch's SDPA over
            contiguous keys and values, and of QUOKA's selection, gathering and SDPA.
    """

    start: int
    queries: int
    cascade: DensityCascade
    rows: int
    entries: int
    longest: int
    visible: int
    past_tokens: float
    quoka_tokens: float
    prefill_s: float
    dense_s: float
    quoka_s: float


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One layer over the whole prompt.

    Attributes:
        layer: its number in the model.
        chunks: one report per step.
        error, quoka_error: ‖out - dense‖ / ‖dense‖ over the whole prompt, float64 [Hq].
        coverage, quoka_coverage: over the queries of the chunks that have a past; None if there is one chunk only.
    """

    layer: int
    chunks: tuple[ChunkReport, ...]
    error: Tensor
    quoka_error: Tensor
    coverage: CoverageSummary | None
    quoka_coverage: CoverageSummary | None

    def cascade(self) -> DensityCascade:
        """Sums over the prompt's chunks."""
        return sum((chunk.cascade for chunk in self.chunks), DensityCascade())


@dataclass(frozen=True, eq=False)
class DemoReport:
    """All layers, and on what they were measured. `startup_s`: seconds of the untimed first steps (compilation)."""

    settings: DemoSettings
    device: str
    backend: str
    dtype: str
    recorded_dtype: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    startup_s: float
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True, eq=False)
class PagedPrompt:
    """One captured layer beside a paged cache that it fills chunk by chunk, as an engine would.

    Attributes:
        q: [T, Hq, D] queries.
        k, v: [Hkv, T, D], contiguous: what dense attention reads.
        kv: the cache; pages lie in random order, and slots that no chunk has filled yet hold NaN.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv: PagedKV

    @classmethod
    def from_layer(cls, layer: CapturedLayer, device: torch.device, *, page_size: int = 16) -> PagedPrompt:
        """Move a layer to `device`; on the CPU float16 and bfloat16 become float32, which CPUs compute in anyway.

        Raises:
            ValueError: a shape that `PagedKV` refuses.
        """
        dtype = torch.float32 if device.type == "cpu" else layer.q.dtype
        q, k, v = (tensor.to(device, dtype) for tensor in (layer.q, layer.k, layer.v))
        pages = -(-len(k) // page_size)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        cache = torch.full((2, pages, page_size, *k.shape[1:]), float("nan"), dtype=dtype, device=device)
        kv = PagedKV(cache[0], cache[1], order.to(device, torch.int32)[None])
        return cls(q.contiguous(), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), kv)

    def feed(self, start: int, stop: int) -> PrefillBatch:
        """Write positions [start, stop) to their pages and return the lengths of that step."""
        position = torch.arange(start, stop, device=self.q.device)
        page, slot = self.kv.page_table[0].long()[position // self.kv.page_size], position % self.kv.page_size
        self.kv.k[page, slot] = self.k[:, start:stop].transpose(0, 1)
        self.kv.v[page, slot] = self.v[:, start:stop].transpose(0, 1)
        return PrefillBatch.from_lens([stop - start], [stop], self.q.device)


def best_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def measure(
    capture: Capture,
    settings: DemoSettings,
    *,
    device: torch.device | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> DemoReport:
    """Prefill every captured layer in chunks and measure each step.

    Args:
        capture: the recorded prompt.
        settings: how to prefill.
        device: default `best_device()`.
        on_step: called after each chunk of each layer.

    Raises:
        ValueError: a capture or a group size that the library refuses.
    """
    device = best_device() if device is None else device
    first = capture.layers[0]
    heads, kv_heads, head_dim = first.q.shape[1], first.k.shape[1], first.q.shape[2]
    check_heads_per_group(settings.heads_per_group, heads, heads // kv_heads)
    started = time.perf_counter()
    prompt = PagedPrompt.from_layer(first, device, page_size=settings.page_size)
    two_chunks = min(capture.tokens, 2 * settings.chunk)
    _measure_layer(0, prompt, replace(settings, repeats=1), capture.scale, two_chunks, lambda: None)
    startup_s = time.perf_counter() - started
    layers = []
    for layer in capture.layers:
        prompt = PagedPrompt.from_layer(layer, device, page_size=settings.page_size)
        layers.append(_measure_layer(layer.layer, prompt, settings, capture.scale, capture.tokens, on_step))
    return DemoReport(
        settings=settings,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        backend="triton" if device.type == "cuda" else "numba",
        dtype=str(prompt.q.dtype).removeprefix("torch."),
        recorded_dtype=str(first.q.dtype).removeprefix("torch."),
        tokens=capture.tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        startup_s=startup_s,
        layers=tuple(layers),
    )


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _measure_layer(
    number: int,
    prompt: PagedPrompt,
    settings: DemoSettings,
    scale: float | None,
    stop: int,
    on_step: Callable[[], None],
) -> LayerReport:
    """Positions 0 to `stop` of one layer."""
    summary, chunks, outputs, shares = None, [], [], []
    for start in range(0, stop, settings.chunk):
        end = min(start + settings.chunk, stop)
        batch = prompt.feed(start, end)
        if summary is None and isinstance(settings.selector, FlashPrefill):
            summary = summarize(prompt.kv, batch, block_size=settings.selector.block_size)
        report, outs, covered = _measure_chunk(prompt, batch, slice(start, end), summary, settings, scale)
        chunks.append(report)
        outputs.append(outs)
        if start:
            shares.append(covered)
        on_step()
    out, quoka, dense = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    summaries: list[CoverageSummary | None] = [None, None]
    if shares:
        summaries = [summarize_coverage(torch.cat(parts)) for parts in zip(*shares, strict=True)]
    error, quoka_error = output_error(out, dense), output_error(quoka, dense)
    return LayerReport(number, tuple(chunks), error, quoka_error, *summaries)


def _measure_chunk(
    prompt: PagedPrompt,
    batch: PrefillBatch,
    chunk: slice,
    summary: KVSummary | None,
    settings: DemoSettings,
    scale: float | None,
) -> tuple[ChunkReport, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The report, the outputs (ours, QUOKA's, dense) and the coverages (ours, QUOKA's) of one step."""
    q, kv, selector, group = prompt.q[chunk], prompt.kv, settings.selector, settings.heads_per_group

    def sparse() -> Tensor:
        out = prefill(q, kv, batch, selector=selector, heads_per_group=group, scale=scale, summary=summary)
        assert isinstance(out, Tensor)
        return out

    def dense() -> Tensor:
        return causal_attention(q, prompt.k[:, : chunk.stop], prompt.v[:, : chunk.stop], scale=scale)

    out, prefill_s = _median_time(sparse, q.device, settings.repeats)
    dense_out, dense_s = _median_time(dense, q.device, settings.repeats)
    selection = select(q, kv, batch, selector, scale=scale, summary=summary)
    table = build_table(unite(selection, batch, heads_per_group=group))
    given = past_tokens(table, batch, kv_heads=kv.num_kv_heads)
    budget = given.round().int()

    def quoka() -> Tensor:
        return quoka_attention(q, kv, batch, quoka_select(q, kv, batch, budget=budget), scale=scale)

    quoka_out, quoka_s = _median_time(quoka, q.device, settings.repeats)
    kept = quoka_select(q, kv, batch, budget=budget)
    counts = table.counts[table.counts > 0]
    report = ChunkReport(
        start=chunk.start,
        queries=chunk.stop - chunk.start,
        cascade=density_cascade(selection, batch, kv_heads=kv.num_kv_heads, heads_per_group=group),
        rows=len(counts),
        entries=int(counts.sum()),
        longest=int(counts.max()),
        visible=batch.kv_blocks(selector.block_size),
        past_tokens=float(given.mean()),
        quoka_tokens=float(kept.counts.double().mean()),
        prefill_s=prefill_s,
        dense_s=dense_s,
        quoka_s=quoka_s,
    )
    dense_lse = exact_lse(q, kv, batch, scale=scale)
    ours = coverage(q, kv, batch, table, scale=scale, dense_lse=dense_lse)
    theirs = coverage(q, kv, batch, kept, scale=scale, dense_lse=dense_lse)
    return report, (out, quoka_out, dense_out), (ours, theirs)


def _median_time(run: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[Tensor, float]:
    """The result of the last run and the median seconds of a run, the device idle before and after.

    A run of more than `_SLOW_S` seconds is not repeated: a long prompt on a CPU should take minutes, not hours.
    """
    seconds: list[float] = []
    while len(seconds) < repeats and not (seconds and seconds[-1] > _SLOW_S):
        _wait(device)
        started = time.perf_counter()
        result = run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
