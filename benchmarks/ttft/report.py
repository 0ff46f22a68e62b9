"""The report of a `ttft` result: times to the first token, attention's share, and every measured chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.files import write_beside
from benchmarks.published import PAPER_END_TO_END, PAPER_END_TO_END_SOURCE
from benchmarks.records import Record, cell, check_timed, environment_of, of_kind, read_kind, table, tokens
from benchmarks.report import written
from benchmarks.report_prompts import Prompt, mask_density, prompts, row_names, time_of, total, union_growth
from benchmarks.ttft import figure, findings
from benchmarks.ttft.cases import SPARSE


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write NAME.md and, where a prompt was measured, NAME.png of a result NAME.json; where they went."""
    result = read_kind(path, "ttft", 1)
    check_timed(path, result)
    held = {"": partial(figure.draw, result)} if of_kind(result, "prompt") else {}
    return write_beside(path, out, partial(markdown, result), held)


def markdown(result: Record, pictures: Sequence[str]) -> str:
    """The whole report; `pictures` are the figures' file names."""
    sections = (
        ("Targets", targets_section),
        ("Whole prompts", summary_section),
        ("Beside the paper", paper_section),
        ("Every measured chunk", chunks_section),
        ("Memory", memory_section),
    )
    return written("Time to the first token", result, sections, pictures)


def targets_section(result: Record) -> list[str]:
    """Met or not, in numbers; the targets are a GPU's."""
    if environment_of(result)["gpu"] is None:
        return []
    rows = [
        (one.what, f"> {one.bound:g}", one.measured, _answer(one.measured > one.bound))
        for one in findings.targets(result)
    ]
    return table(("", "target", "measured", "met"), rows)


def _answer(met: bool) -> str:
    return "yes" if met else "**no**"


def summary_section(result: Record) -> list[str]:
    """A table per model, shape and mode: every attention over prompts of every length."""
    lines = []
    for prompt in (prompt for prompt in prompts(result) if prompt.ends):
        for mode in findings.modes_of(prompt):
            lines += [f"**{prompt.name}, chunks of {prompt.chunk}, {mode}**", "", *_summary(prompt, mode), ""]
    return lines


def _summary(prompt: Prompt, mode: str) -> list[str]:
    rows = []
    for end in prompt.ends:
        chunks = prompt.within(end)
        for name in row_names(chunks):
            grouping = name.removeprefix(SPARSE) if name in findings.sparse_rows(chunks) else ""
            rows.append(
                (
                    f"{tokens(end)}, {len(chunks)} of {end // prompt.chunk} chunks",
                    name + (" (fastest dense)" if name == findings.best_dense(chunks, mode) else ""),
                    total(chunks, name, mode=mode) / 1e3,
                    "-".join(cell(total(chunks, name, at, mode) / 1e3) for at in ("p20_ms", "p80_ms")),
                    findings.speedup(chunks, name, mode),
                    findings.attention_share(chunks, name, mode),
                    findings.attention_speedup(chunks, name, mode),
                    findings.rate(chunks, name, mode),
                    f"{findings.own_density(chunks):.1%}" if grouping else "-",
                    f"{mask_density(chunks):.1%}" if grouping else "-",
                    union_growth(chunks, grouping) if grouping else "-",
                )
            )
    head = ("prompt", "", "s to the first token", "sum of p20-p80", "x fastest dense", "attention share")
    densities = ("kept by the model's own selection", "mask density of the workload", "union growth")
    return table((*head, "x in attention alone", "useful TFLOP/s", *densities), rows)


def paper_section(result: Record) -> list[str]:
    """Every prompt's end-to-end speedups, and the published ones, which are of one setting."""
    ends, rows = sorted(PAPER_END_TO_END["CompactAttention-FP"]), []
    for prompt in prompts(result):
        for mode in findings.modes_of(prompt):
            for name, by_end in findings.end_to_end(prompt, mode).items():
                if set(by_end) & set(ends):
                    whose = ", the shape of the paper" if prompt.is_paper_shape else ""
                    what = f"{name}, {prompt.name}, {mode} (this run{whose})"
                    rows.append((what, *(by_end.get(end, math.nan) for end in ends)))
    if not rows:
        return []
    published = [
        (f"{name}, one rank of TP2, batch 8 ({PAPER_END_TO_END_SOURCE})", *(by_end[end] for end in ends))
        for name, by_end in PAPER_END_TO_END.items()
    ]
    return [
        "Speedup over dense end to end, whole prompts in chunks. Ours is one rank's part, without all-reduces, against "
        "the fastest dense attention of the same run; the published figures are of two ranks, against their own dense.",
        "",
        *table(("", *map(tokens, ends)), [*rows, *published]),
    ]


def chunks_section(result: Record) -> list[str]:
    """p50 and p20 to p80 of every row of every measured chunk, in milliseconds."""
    lines = []
    for prompt in prompts(result):
        for mode in findings.modes_of(prompt):
            names = row_names(prompt.chunks)
            rows = [
                (tokens(chunk["context"]), *(_spread(chunk, name, mode) for name in names)) for chunk in prompt.chunks
            ]
            lines += [f"**{prompt.name}, {mode}, ms**", "", *table(("context", *names), rows), ""]
    return lines


def _spread(chunk: Record, name: str, mode: str) -> str:
    low, middle, high = (time_of(chunk, name, at, mode) for at in ("p20_ms", "p50_ms", "p80_ms"))
    return "-" if math.isnan(middle) else f"{middle:.2f} ({low:.2f}-{high:.2f})"


def memory_section(result: Record) -> list[str]:
    """What each case was reckoned to need of the device at most, and what PyTorch's allocator held at its peak."""
    rows = [
        (record["name"], sum(record["memory"]["needed"].values()) / 2**30, record["memory"]["peak"] / 2**30)
        for record in of_kind(result, "prompt")
        if record["memory"]["peak"] is not None
    ]
    return table(("", "GiB reckoned", "GiB at the peak"), rows)
