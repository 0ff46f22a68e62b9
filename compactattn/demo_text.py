"""A `DemoReport` as text for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from compactattn.demo import ChunkReport, DemoReport, LayerReport
from compactattn.quality import CoverageSummary


def as_json(report: DemoReport) -> dict[str, Any]:
    """Everything in a report: plain numbers, strings and lists; null where a figure does not exist.

    Densities, coverages and errors are shares of 1, times are seconds, lists run over query heads.
    """
    settings = asdict(report.settings)
    settings["selector"] = {"name": type(report.settings.selector).__name__, **settings["selector"]}
    return {
        "device": report.device,
        "backend": report.backend,
        "dtype": report.dtype,
        "recorded_dtype": report.recorded_dtype,
        "tokens": report.tokens,
        "query_heads": report.heads,
        "kv_heads": report.kv_heads,
        "head_dim": report.head_dim,
        "startup_s": report.startup_s,
        "settings": settings,
        "layers": [_layer_json(layer) for layer in report.layers],
    }


def _layer_json(layer: LayerReport) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "density": {name: _finite(value) for name, value in layer.cascade().densities().items()},
        "output_error": [_finite(value) for value in layer.error.tolist()],
        "quoka_output_error": [_finite(value) for value in layer.quoka_error.tolist()],
        "coverage": None if layer.coverage is None else coverage_json(layer.coverage),
        "quoka_coverage": None if layer.quoka_coverage is None else coverage_json(layer.quoka_coverage),
        "prefill_s": sum(chunk.prefill_s for chunk in layer.chunks),
        "quoka_s": sum(chunk.quoka_s for chunk in layer.chunks),
        "dense_s": sum(chunk.dense_s for chunk in layer.chunks),
        "chunks": [asdict(chunk) for chunk in layer.chunks],
    }


def coverage_json(summary: CoverageSummary) -> dict[str, Any]:
    """Shares of 1 and counts of queries, lists over query heads."""
    return {
        "mean": summary.mean.tolist(),
        "worst": summary.worst.tolist(),
        "below": summary.below.tolist(),
        "threshold": summary.threshold,
        "queries": summary.queries,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(report: DemoReport) -> str:
    """What was run, then one table per layer."""
    return "\n\n".join([_heading(report), *(_layer_text(layer, report) for layer in report.layers)])


def _heading(report: DemoReport) -> str:
    settings, selector = report.settings, report.settings.selector
    options = ", ".join(f"{name}={value}" for name, value in asdict(selector).items() if value is not None)
    dtype = report.dtype
    if report.recorded_dtype != dtype:
        dtype = f"{dtype} (recorded as {report.recorded_dtype}; converted for every method, dense included)"
    chunks = len(report.layers[0].chunks)
    return "\n".join(
        [
            f"{report.tokens} tokens in {chunks} chunks of {settings.chunk}, {report.heads} query heads over "
            f"{report.kv_heads} KV heads, head dimension {report.head_dim}, permuted pages of {settings.page_size}",
            f"{type(selector).__name__}({options})",
            f"heads_per_group={settings.heads_per_group}, one table row per group and chunk",
            f"{report.backend} on {report.device}; {dtype}",
            f"times, medians of {settings.repeats} runs per chunk (one run where it is slow): prefill() with its "
            "summary update; QUOKA's selection, gathering and SDPA; dense: PyTorch's SDPA over contiguous K and V",
            f"first steps, not timed (compilation): {report.startup_s:.1f} s",
        ]
    )


def _layer_text(layer: LayerReport, report: DemoReport) -> str:
    densities = layer.cascade().densities()
    steps = {
        "mask": densities["mask"],
        "query-block union": densities["query_block_union"],
        f"sub-group union ({_heads(report.settings.heads_per_group)})": densities["sub_group_union"],
        f"full group ({_heads(report.heads // report.kv_heads)})": densities["group_union"],
    }
    past = [chunk for chunk in layer.chunks if chunk.start]
    rows = sum(chunk.rows for chunk in layer.chunks)
    listed = sum(chunk.entries for chunk in layer.chunks) / rows
    visible = sum(chunk.visible * chunk.rows for chunk in layer.chunks) / rows
    longest = max(layer.chunks, key=lambda chunk: chunk.longest)
    lines = [
        f"layer {layer.layer}",
        "  density of the past, average over the prompt (entries / visible past blocks, summed over all chunks) [%]:",
        "    " + "  ->  ".join(f"{name} {percent(value)}" for name, value in steps.items()),
        f"  block table: {rows} rows; blocks listed per row: mean {listed:.1f} of {visible:.1f} visible, longest "
        f"{longest.longest} of {longest.visible}",
    ]
    table = [["", "compactattn", "QUOKA, same budget", "dense"], *_comparison(layer, past), *_times(layer)]
    return "\n".join([*lines, "", *aligned(table)])


def _comparison(layer: LayerReport, past: Sequence[ChunkReport]) -> list[list[str]]:
    """Rows of the comparison that need a past; coverage and tokens count the chunks after the first."""
    errors = [
        [
            "output error, mean over heads [%]",
            f"{100 * layer.error.mean():.2f}",
            f"{100 * layer.quoka_error.mean():.2f}",
        ],
        ["output error, worst head [%]", f"{100 * layer.error.max():.2f}", f"{100 * layer.quoka_error.max():.2f}"],
    ]
    rows = [[*row, "0"] for row in errors]
    if not past or layer.coverage is None or layer.quoka_coverage is None:
        return rows
    queries = sum(chunk.queries for chunk in past)

    def average(value: Callable[[ChunkReport], float]) -> str:
        return f"{sum(value(chunk) * chunk.queries for chunk in past) / queries:.1f}"

    ours, quoka = layer.coverage, layer.quoka_coverage
    pairs = ours.queries * len(ours.mean)
    return [
        [
            "past tokens given to a query, mean",
            average(lambda chunk: chunk.past_tokens),
            average(lambda chunk: chunk.quoka_tokens),
            average(lambda chunk: chunk.start),
        ],
        [
            "coverage, mean over queries [%]",
            percent(float(ours.mean.mean())),
            percent(float(quoka.mean.mean())),
            "100",
        ],
        ["coverage, worst query [%]", percent(float(ours.worst.min())), percent(float(quoka.worst.min())), "100"],
        [
            f"queries under {ours.threshold:.0%} coverage, of {pairs}",
            str(int(ours.below.sum())),
            str(int(quoka.below.sum())),
            "0",
        ],
        *rows,
    ]


def _times(layer: LayerReport) -> list[list[str]]:
    rows = []
    for label, chunks in (("all chunks", layer.chunks), ("last chunk", layer.chunks[-1:])):
        ours, quoka, dense = (
            sum(getattr(chunk, name) for chunk in chunks) for name in ("prefill_s", "quoka_s", "dense_s")
        )
        rows.append([f"time, {label} [ms]", *(f"{1e3 * seconds:.1f}" for seconds in (ours, quoka, dense))])
        rows.append([f"speed, {label} [dense = 1]", f"{dense / ours:.2f}", f"{dense / quoka:.2f}", "1"])
    return rows


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"


def percent(share: float) -> str:
    """A share of 1 in percent, a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def aligned(table: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        ("  " + row[0].ljust(widths[0]) + "".join("   " + row[c].rjust(widths[c]) for c in range(1, len(row)))).rstrip()
        for row in table
    ]
