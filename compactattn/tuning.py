"""The largest threshold of each layer that keeps enough of the attention: `compactattn tune`.

The threshold is `FlashPrefill`'s alpha, or `KeyBounds`' own. Coverage (the share of a query's exact softmax mass on the
tokens it is given) can only fall when it grows, in steps: a past block j that no rule keeps leaves a table row when the
threshold passes the largest score of the row's members (h, i), S(h, i, j) / max_j' S(h, i, j') or the largest p(r, j)
of query block i's rows r, and takes their mass on it along. So one pass over a prompt gives every step and what is lost
there, and sorting the steps gives the threshold at which the mean falls below any target: no search. A second pass
measures what the library does at that threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactattn.capture import CapturedLayer, CaptureFile
from compactattn.data import KVSummary, PrefillBatch
from compactattn.demo import PagedPrompt, best_device
from compactattn.dispatch import resolve_backend
from compactattn.quality import CoverageSummary, DensityCascade, coverage, density_cascade, summarize_coverage
from compactattn.selection import block_rules, block_scores, select
from compactattn.selectors import FlashPrefill, KeyBounds, Oracle, Scored, threshold_of
from compactattn.summary import summarize
from compactattn.table import build_table
from compactattn.union import span_blocks, unite
from compactattn.validation import check_heads_per_group, check_int, check_span, fail, resolve_scale

_DIGITS = 4  # of a threshold: rounded down, so that no rounding error moves a block across it


@dataclass(frozen=True)
class TuneSettings:
    """What is asked for, and how the library will run.

    Attributes:
        selector: the selector of every layer but for its threshold; without `dense_last_blocks`.
        coverage: the mean coverage to keep, above 0 and below 1.
        heads_per_group, query_blocks_per_span: which heads and query blocks share a block table, as for `prefill`.
        chunk: queries per step.

    Raises:
        ValueError: anything else; "auto", because what such groups share depends on the threshold.
    """

    selector: Scored
    coverage: float = 0.98
    heads_per_group: int = 1
    query_blocks_per_span: int | None = None
    chunk: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Scored) or self.selector.dense_last_blocks:
            raise fail("selector", "a FlashPrefill or KeyBounds without dense_last_blocks", repr(self.selector))
        if isinstance(self.coverage, bool) or not isinstance(self.coverage, float) or not 0.0 < self.coverage < 1.0:
            raise fail("coverage", "a number above 0 and below 1", repr(self.coverage))
        for name in ("heads_per_group", "query_blocks_per_span"):
            if getattr(self, name) == "auto":
                raise fail(name, f"groups that do not depend on {threshold_name(self.selector)}", "'auto'")
        check_heads_per_group(self.heads_per_group)
        check_span(self.query_blocks_per_span)
        check_int("chunk", self.chunk, 1)


def threshold_name(selector: Scored) -> str:
    """The field of a selector that is tuned."""
    return "alpha" if isinstance(selector, FlashPrefill) else "threshold"


def _with_threshold(selector: Scored, threshold: float) -> Scored:
    if isinstance(selector, FlashPrefill):
        return replace(selector, alpha=threshold)
    return replace(selector, threshold=threshold)


@dataclass(frozen=True, eq=False)
class LayerTuning:
    """What was found for one layer, over the chunks that have a past of all prompts.

    Attributes:
        layer: its number in the model.
        selector: with the largest threshold that keeps the coverage, rounded down to four digits.
        cascade: past blocks read at each step of the cascade, summed.
        coverage: per query head, of all queries: mean, worst, and how many are under 0.9.
    """

    layer: int
    selector: Scored
    cascade: DensityCascade
    coverage: CoverageSummary

    @property
    def threshold(self) -> float:
        """What was found: the selector's alpha, or its threshold."""
        return threshold_of(self.selector)


@dataclass(frozen=True)
class _Measured:
    cascade: DensityCascade
    coverage: CoverageSummary

    @property
    def mean(self) -> float:
        return float(self.coverage.mean.double().mean())


@dataclass(frozen=True, eq=False)
class _Chunk:
    """One step with a past: queries [n, Hq, D] beside the prompt that holds them, and its lengths."""

    prompt: PagedPrompt
    q: Tensor
    batch: PrefillBatch
    summary: KVSummary
    scale: float


def tune_layer(
    layer: int,
    captures: Sequence[CaptureFile],
    settings: TuneSettings,
    *,
    device: torch.device | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> LayerTuning:
    """Find the largest threshold of one layer.

    Args:
        layer: a layer that every capture has.
        captures: prompts of one model, one layer of one of them in memory at a time.
        settings: what to keep, and how the library will run.
        device: default `compactattn.demo.best_device()`; on the CPU in float32, see `PagedPrompt`.
        on_step: called after each of the `steps` chunks.

    Raises:
        ValueError: prompts so short that no block can be left out, or heads that the groups do not divide.
    """
    device = best_device() if device is None else device
    ratios, masses, pairs = [], [], 0
    for capture in captures:
        for chunk in _chunks(capture, layer, settings, device):
            ratio, mass = _steps_of(chunk, settings)
            ratios.append(ratio)
            masses.append(mass)
            pairs += chunk.q.shape[0] * chunk.q.shape[1]
            on_step()
    if not any(map(len, ratios)):
        kept = f"{settings.selector.sink_blocks} sink and {settings.selector.window_blocks} window blocks"
        raise fail("captures", f"prompts in which the {kept} of a query are not all", f"none in layer {layer}")
    largest = _largest_threshold(torch.cat(ratios), torch.cat(masses), (1.0 - settings.coverage) * pairs)
    threshold = _rounded_down(largest)
    selector = _with_threshold(settings.selector, threshold)
    measured = _measure(layer, captures, selector, settings, device, on_step)
    while measured.mean < settings.coverage and threshold > 0.0:  # float32 sums: the step before is the right one
        threshold = _rounded_down(threshold * (1.0 - 10.0 ** (1 - _DIGITS)))
        selector = _with_threshold(selector, threshold)
        measured = _measure(layer, captures, selector, settings, device, lambda: None)
    return LayerTuning(layer, selector, measured.cascade, measured.coverage)


def steps(tokens: int, settings: TuneSettings) -> int:
    """How often `tune_layer` calls `on_step` for one layer of a capture of so many tokens."""
    return 2 * (-(-tokens // settings.chunk) - 1)


def _largest_threshold(ratio: Tensor, mass: Tensor, budget: float) -> float:
    """The largest threshold at which the masses of all blocks with `ratio` below its logarithm sum to at most `budget`.

    Args:
        ratio: [n], natural logarithm of the threshold up to which a row keeps a block; at most 0.
        mass: [n], softmax mass that the members of the row have on it, summed over queries.
    """
    order = ratio.argsort()
    lost = mass[order].double().cumsum(0)
    first_kept = int(torch.searchsorted(lost, budget, right=True))
    return math.exp(float(ratio[order[first_kept]])) if first_kept < len(order) else 1.0


def _rounded_down(threshold: float) -> float:
    return float(Context(prec=_DIGITS, rounding=ROUND_FLOOR).create_decimal_from_float(min(threshold, 1.0)))


def _chunks(capture: CaptureFile, layer: int, settings: TuneSettings, device: torch.device) -> Iterator[_Chunk]:
    """The steps of one captured layer that have a past, in order."""
    captured: CapturedLayer = capture.layer(layer)
    block_size = settings.selector.block_size
    prompt = PagedPrompt.from_layer(captured, device, page_size=block_size)
    check_heads_per_group(settings.heads_per_group, prompt.q.shape[1], prompt.q.shape[1] // prompt.kv.num_kv_heads)
    scale, summary = resolve_scale(capture.scale, prompt.q.shape[-1]), None
    bounds = isinstance(settings.selector, KeyBounds)
    for start in range(0, len(prompt.q), settings.chunk):
        stop = min(start + settings.chunk, len(prompt.q))
        batch = prompt.feed(start, stop)
        summary = summarize(prompt.kv, batch, block_size=block_size, summary=summary, bounds=bounds)
        if start:
            yield _Chunk(prompt, prompt.q[start:stop], batch, summary, scale)


def _steps_of(chunk: _Chunk, settings: TuneSettings) -> tuple[Tensor, Tensor]:
    """Where each table row of a step loses its past blocks, and what goes with them; for `_largest_threshold`.

    Returns:
        (ratio, mass), float32 [n] each, one entry per row and block that is not kept without a score.
    """
    selector, q, kv, batch = settings.selector, chunk.q, chunk.prompt.kv, chunk.batch
    backend = resolve_backend(None, q.device)
    if backend == "triton":
        from compactattn._triton.block_mass import block_mass
    else:
        from compactattn._numba.block_mass import block_mass
    exact = Oracle(mass=1.0, block_size=selector.block_size, query_block=selector.query_block)
    past = (batch.max_seq_len - batch.max_q_len) // selector.block_size
    scores = block_scores(q, kv, batch, selector, chunk.scale, chunk.summary, backend)
    ratio = scores.log_s - scores.part_max.amax(-1, keepdim=True)
    ratio = ratio.masked_fill(block_rules(batch, selector).forced[:, None], math.inf)[0, ..., :past]
    mass = block_mass(q, kv, batch, exact, stride=1, scale=chunk.scale)[0, ..., :past]
    span = span_blocks(q_blocks := ratio.shape[1], settings.query_blocks_per_span)
    padding = (0, 0, 0, -q_blocks % span)
    ratio, mass = pad(ratio, padding, value=-math.inf), pad(mass, padding)
    ratio, mass = (x.unflatten(1, (-1, span)).unflatten(0, (-1, settings.heads_per_group)) for x in (ratio, mass))
    ratio, mass = ratio.amax((1, 3)).flatten(), mass.sum((1, 3)).flatten()
    return ratio[ratio < math.inf].cpu(), mass[ratio < math.inf].cpu()


def _measure(
    layer: int,
    captures: Sequence[CaptureFile],
    selector: Scored,
    settings: TuneSettings,
    device: torch.device,
    on_step: Callable[[], object],
) -> _Measured:
    """Run the library's own stages over every step, and judge them."""
    heads, span = settings.heads_per_group, settings.query_blocks_per_span
    cascade, shares = DensityCascade(), []
    for capture in captures:
        for chunk in _chunks(capture, layer, settings, device):
            q, kv, batch = chunk.q, chunk.prompt.kv, chunk.batch
            selection = select(q, kv, batch, selector, scale=chunk.scale, summary=chunk.summary)
            table = build_table(unite(selection, batch, heads_per_group=heads, query_blocks_per_span=span))
            cascade += density_cascade(
                selection, batch, kv_heads=kv.num_kv_heads, heads_per_group=heads, query_blocks_per_span=span
            )
            shares.append(coverage(q, kv, batch, table, scale=chunk.scale).cpu())
            on_step()
    return _Measured(cascade, summarize_coverage(torch.cat(shares)))
