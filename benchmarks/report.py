"""`python -m benchmarks report RESULT.json`: Markdown tables and figures, from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import (
    figure,
    figure_prompts,
    figure_roofline,
    figure_scaling,
    report_floors,
    report_prompts,
    report_scaling,
    report_steps,
    report_targets,
)
from benchmarks.files import write_beside
from benchmarks.measure import rows_of
from benchmarks.records import Record, environment_of, kernels_of, load

#: Lines of Markdown from a result; none where it has nothing to say.
Section = Callable[[Record], list[str]]

SECTIONS = (
    ("Targets", report_targets.section),
    ("attend alone, controlled tables", report_steps.tables_section),
    ("Whole prompts", report_prompts.section),
    ("One chunk, whole steps", report_steps.steps_section),
    ("One chunk, stage by stage (milliseconds, graph replay)", report_steps.breakdown_section),
    ("KeyBounds beside FlashPrefill, one chunk", report_steps.bounds_section),
    ("What features of a model cost", report_steps.features_section),
    ("Floors", report_floors.section),
    ("Scaling with the context", report_scaling.scaling_section),
    ("Page sizes, unaligned and mixed lengths", report_scaling.layouts_section),
    ("Decode and speculative rows, every block", report_steps.decode_section),
    ("Host time and memory of a call", report_scaling.host_section),
    ("What each union costs (past blocks, one chunk)", report_steps.growth_section),
    ("Every row of every step", report_steps.stages_section),
)
FIGURES = {"": figure, "-prompts": figure_prompts, "-roofline": figure_roofline, "-scaling": figure_scaling}
"""Modules with `holds(result)`, whether their question was measured, and `draw(result, path)`."""


def write_report(path: Path, out: Path | None = None) -> tuple[Path, ...]:
    """Write a figure per question that a result NAME.json holds, then NAME.md; where they went, the text first."""
    result = load(path)
    held = {suffix: partial(module.draw, result) for suffix, module in FIGURES.items() if module.holds(result)}
    return write_beside(path, out, partial(markdown, result), held)


def markdown(result: Record, pictures: Sequence[str]) -> str:
    """The whole report; `pictures` are the figures' file names."""
    return written("Latency", result, SECTIONS, pictures)


def written(title: str, result: Record, sections: Iterable[tuple[str, Section]], pictures: Iterable[str]) -> str:
    """A report: where and how it was measured, pictures, the sections that are not empty, and what every report ends
    with: kernels, and what is red or missing."""
    where = environment_of(result)
    known = ", ".join(f"{name} {value}" for name, value in where.items() if name != "gpu" and value is not None)
    lines = [f"# {title}, preset {result['preset']}", "", f"{where['gpu'] or 'CPU'}; {known}", ""]
    lines += [*_machine_section(result), *(f"- {line}" for line in [*result["protocol"], *result["notes"]]), ""]
    lines += [f"![{name}]({name})\n" for name in pictures]
    for heading, section in (
        *sections,
        ("Kernels", _kernels_section),
        ("Red gates, failures, absences", _absent_section),
    ):
        body = section(result)
        if body:
            lines += [f"## {heading}", "", *body, ""]
    return "\n".join(lines)


def _machine_section(result: Record) -> list[str]:
    """The card's ceilings in every run, and what its sensors said."""
    lines = []
    for run in result["runs"]:
        top = run["ceilings"]
        if not top:
            continue
        words = [f"Run of {run['started']}: matmul {top['matmul_tflops']:.0f} TFLOP/s cold"]
        if "matmul_sustained_tflops" in top:
            words.append(f"{top['matmul_sustained_tflops']:.0f} sustained")
        words.append(f"copy {top['copy_tbps']:.2f} TB/s")
        for state in ("idle", "busy"):
            read = {name: value for name, value in top.get(f"sensors_{state}", {}).items() if value is not None}
            if read:
                words.append(f"{state}: " + " ".join(f"{name} {value}" for name, value in read.items()))
        lines += ["; ".join(words) + ".", ""]
    return lines


def _kernels_section(result: Record) -> list[str]:
    """Which attention kernel ran in how many rows, and why it was not the faster one."""
    count: dict[str, int] = {}
    for record in result["cases"]:
        for kernel, names in kernels_of(record).items():
            count[kernel] = count.get(kernel, 0) + len(names)
    return [f"- {kernel}: {rows} rows" for kernel, rows in count.items()]


def _absent_section(result: Record) -> list[str]:
    """Red gates, failed cases, and baselines that did not run, with their reasons."""
    lines: dict[str, list[str]] = {}
    for record in result["cases"]:
        if record["status"] != "ok":
            lines.setdefault(f"{record['status']}: {record['reason']}", []).append(record["name"])
        for row in rows_of(record):
            for what, verdict in (("", row["gate"]), (" (graph)", row.get("graph", {}).get("gate"))):
                if verdict and not verdict["passed"]:
                    lines.setdefault(f"RED GATE {row['name']}{what}: {verdict}", []).append(record["name"])
        for name, why in record.get("did_not_run", {}).items():
            lines.setdefault(f"{name} did not run: {why}", []).append(record["name"])
    return [f"- {what}: {_cases(names)}" for what, names in lines.items()]


def _cases(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} cases, {names[0]} among them"
