"""`python -m benchmarks report RESULT.json`: Markdown tables and a figure, from the JSON alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

DENSE = ("dense cuDNN", "dense CPU SDPA")


def load(path: Path) -> Record:
    """Read a result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `python -m benchmarks latency`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a result of `python -m benchmarks latency`, got no file")
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != 1 or "cases" not in result:
        raise ValueError(f"{path}: expected a latency result of schema 1, got something else")
    return result


def write_report(path: Path, out: Path | None = None) -> tuple[Path, Path]:
    """Write NAME.md and NAME.png for a result NAME.json; where they went."""
    result = load(path)
    out = path.parent if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    text, picture = out / f"{path.stem}.md", out / f"{path.stem}.png"
    text.write_text(markdown(result, picture.name))
    from benchmarks.figure import draw

    draw(result, picture)
    return text, picture


# ---- reading a record ----


def green_rows(record: Record) -> list[Record]:
    """Rows that passed the gate and were timed."""
    return [row for row in record.get("rows", []) if row["gate"]["passed"] and row.get("times")]


def find(record: Record, *names: str) -> Record | None:
    """The first green row of one of these names."""
    for name in names:
        for row in green_rows(record):
            if row["name"] == name:
                return row
    return None


def milliseconds(row: Record | None, mode: str | None = None) -> float:
    """p50 of a mode; by default of graph replays, or of plain calls where there are none. NaN without a row."""
    if row is None:
        return math.nan
    times = row["times"]
    for one in ("graph", "plain") if mode is None else (mode,):
        if one in times:
            return times[one]["p50_ms"]
    return math.nan


def mode_of(row: Record) -> str:
    return "graph" if "graph" in row["times"] else "plain"


def ratio(base: Record | None, row: Record | None) -> float:
    """How many times faster `row` is than `base`, both timed the same way."""
    if base is None or row is None:
        return math.nan
    both = [mode for mode in ("graph", "plain") if mode in base["times"] and mode in row["times"]]
    return milliseconds(base, both[0]) / milliseconds(row, both[0]) if both else math.nan


def teraflops(row: Record | None) -> float:
    """Useful TFLOP/s at p50."""
    if row is None or not row["flops"]:
        return math.nan
    return row["flops"] / milliseconds(row) / 1e9


def of_kind(result: Record, kind: str) -> list[Record]:
    return [record for record in result["cases"] if record["case"]["kind"] == kind and record["status"] == "ok"]


def shape_name(record: Record) -> str:
    shape = record["case"]["shape"]
    return f"B={shape['batch']}, Hq={shape['q_heads']}, Hkv={shape['kv_heads']}"


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


# ---- tables ----


def markdown(result: Record, picture: str) -> str:
    """The whole report; `picture` is the figure's file name."""
    where = result["environment"]
    lines = [
        f"# Latency, preset {result['preset']}",
        "",
        f"{where['gpu'] or 'CPU'}; " + ", ".join(f"{k} {v}" for k, v in where.items() if k != "gpu" and v is not None),
        "",
    ]
    if result["ceilings"]:
        top = result["ceilings"]
        lines += [f"In the same run: matmul {top['matmul_tflops']:.0f} TFLOP/s, copy {top['copy_tbps']:.2f} TB/s.", ""]
    lines += [*(f"- {line}" for line in [*result["protocol"], *result["notes"]]), "", f"![figure]({picture})", ""]
    sections = (
        ("attend alone, controlled tables", _tables_section),
        ("One chunk, whole steps", _steps_section),
        ("Stages", _stages_section),
        ("What each union costs (past blocks, one chunk)", _growth_section),
        ("Whole prompts", _prompt_section),
        ("Page sizes and ragged lengths", _layouts_section),
        ("Red gates, failures, and what did not run", _absent_section),
    )
    for title, section in sections:
        body = section(result)
        if body:
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    body = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    if not body:
        return []
    return [f"| {' | '.join(head)} |", f"|{'|'.join('---' if n == 0 else '---:' for n in range(len(head)))}|", *body]


def _cell(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _spread(row: Record | None) -> str:
    """p50 and, in brackets, p20 to p80."""
    if row is None:
        return "-"
    time = row["times"][mode_of(row)]
    return f"{time['p50_ms']:.3f} ({time['p20_ms']:.3f}-{time['p80_ms']:.3f})"


def _tables_section(result: Record) -> list[str]:
    lines = []
    for record in of_kind(result, "tables"):
        dense = find(record, *DENSE)
        rows = [
            (row["name"], _spread(row), teraflops(row), teraflops(row) / teraflops(dense), row["bytes"] / 1e9)
            for row in green_rows(record)
        ]
        lines += [f"{shape_name(record)}, context {tokens(record['case']['context'])}, chunk {record['case']['chunk']}"]
        lines += ["", *_table(("", "ms", "useful TFLOP/s", "÷ dense", "GB"), rows), ""]
    return lines


def _steps_section(result: Record) -> list[str]:
    rows = []
    for record in of_kind(result, "step"):
        case, dense = record["case"], find(record, *DENSE)
        for row in green_rows(record):
            if row["family"] == "library" and row["name"].startswith("prefill"):
                density = record["density"][row["grouping"]]
                rows.append(
                    (
                        f"{tokens(case['context'])}, {case['chunk']}, {shape_name(record)}",
                        f"{case['workload']} c={case['correlation']:g}",
                        row["grouping"],
                        _number(density["past_density"]["sub_group_union"]),
                        milliseconds(dense),
                        *(ratio(dense, find(record, name)) for name in ("dense FlashAttention-2", "QUOKA")),
                        milliseconds(find(record, "FlexAttention")),
                        milliseconds(find(record, f"attend {row['grouping']}")),
                        milliseconds(row),
                        ratio(dense, row),
                    )
                )
    head = (
        "context, chunk, shape",
        "workload",
        "group",
        "density after union, one chunk",
        "dense ms",
        "FA2 x",
        "QUOKA x",
    )
    head += ("Flex attention alone, ms", "attend ms", "prefill ms", "prefill x")
    note = "x is the speedup over the dense row of the same case; FlexAttention runs the table of one head x one block."
    table = _table(head, rows)
    return [*table, "", note] if table else []


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _stages_section(result: Record) -> list[str]:
    lines = []
    for record in of_kind(result, "step"):
        if not any(row["family"] == "stage" for row in green_rows(record)) or record["case"]["correlation"] != 0.9:
            continue
        rows = [
            (
                row["name"],
                milliseconds(row, "graph"),
                milliseconds(row, "plain"),
                milliseconds(row, "host"),
                teraflops(row),
            )
            for row in green_rows(record)
        ]
        head = ("", "graph ms", "plain ms", "host ms", "useful TFLOP/s")
        lines += [f"<details><summary>{record['name']}</summary>", "", *_table(head, rows), "", "</details>", ""]
    return lines


def growth_rows(result: Record) -> list[tuple[str, str, float, str, Record]]:
    """(shape, workload, correlation, grouping, density) of the steps at the lengths for which correlation was swept."""
    steps = [record for record in of_kind(result, "step") if record["density"]]
    lengths = [(record["case"]["context"], record["case"]["chunk"]) for record in steps]
    swept = {
        length: len(
            {record["case"]["correlation"] for record, own in zip(steps, lengths, strict=True) if own == length}
        )
        for length in lengths
    }
    chosen = max(swept, key=lambda length: (swept[length], length), default=None)
    rows = []
    for record, length in zip(steps, lengths, strict=True):
        case = record["case"]
        if length == chosen and case["page_size"] == 128:
            for grouping, density in record["density"].items():
                rows.append((shape_name(record), case["workload"], case["correlation"], grouping, density))
    return rows


def _growth_section(result: Record) -> list[str]:
    rows = []
    for shape, workload, correlation, grouping, density in growth_rows(result):
        if grouping == "1x1":
            continue
        growth = [_number(density["growth"][step]) for step in ("query_block_union", "sub_group_union", "group_union")]
        own = _number(density["past_density"]["mask"])
        rows.append((f"{shape}, {workload}", correlation, grouping, own, *growth, density["blocks_per_query_block"]))
    head = ("workload", "correlation", "group", "mask density", "x query blocks", "x sub-group", "x KV group", "blocks")
    return _table(head, sorted(set(rows), key=str))


def prompt_totals(record: Record) -> dict[str, float]:
    """p50 of every row, summed over the chunks that each measured one stands for, in milliseconds."""
    totals: dict[str, float] = {}
    for chunk in record["chunks"]:
        for row in chunk["rows"]:
            time = milliseconds(row) if row["gate"]["passed"] else math.nan
            totals[row["name"]] = totals.get(row["name"], 0.0) + time * chunk["stands_for"]
    return totals


def _prompt_section(result: Record) -> list[str]:
    lines = []
    for record in of_kind(result, "prompt"):
        case, totals = record["case"], prompt_totals(record)
        dense = next((totals[name] for name in DENSE if name in totals), math.nan)
        calibration = record["calibration"]
        target = calibration["published"]
        lines += [
            f"{shape_name(record)}: {tokens(case['context'])} in chunks of {case['chunk']}, {len(record['chunks'])} of "
            f"{case['context'] // case['chunk']} chunks measured. Average mask density over the prompt "
            f"{calibration['mask_density']:.2%}" + (f" (published {target:.1%})." if target else "."),
            "",
            *_table(("", "ms", "x dense"), [(name, time, dense / time) for name, time in totals.items()]),
            "",
        ]
    return lines


def _layouts_section(result: Record) -> list[str]:
    lines = []
    for record in of_kind(result, "layouts"):
        rows = []
        for row in green_rows(record):
            page = find(record, f"attend {row['grouping']}, page {record['case']['page_size']}")
            rows.append((row["name"], _spread(row), teraflops(row), teraflops(row) / teraflops(page)))
        lines += [f"{shape_name(record)}, context {tokens(record['case']['context'])}", ""]
        lines += [*_table(("", "ms", "useful TFLOP/s", "÷ aligned"), rows), ""]
    return lines


def _absent_section(result: Record) -> list[str]:
    lines = []
    for record in result["cases"]:
        if record["status"] != "ok":
            lines.append(f"- {record['name']}: {record['status']}: {record['reason']}")
        rows = [*record.get("rows", []), *(row for chunk in record.get("chunks", []) for row in chunk["rows"])]
        for row in rows:
            for what, verdict in (("", row["gate"]), (" (graph)", row.get("graph", {}).get("gate"))):
                if verdict and not verdict["passed"]:
                    lines.append(f"- {record['name']}: RED GATE {row['name']}{what}: {verdict}")
        lines += [
            f"- {record['name']}: {name} did not run: {why}" for name, why in record.get("did_not_run", {}).items()
        ]
    return lines


def terminal_table(result: Record) -> str:
    """What a run prints at its end: a line per case, then the first cases and all controlled tables row by row.

    The most telling cases come last, where a cut log still shows them.
    """
    detailed = of_kind(result, "step")[:2] + of_kind(result, "tables") + of_kind(result, "layouts")
    lines = [_one_line(record) for record in reversed(result["cases"])]
    for record in reversed(detailed):
        lines += ["", record["name"]]
        for row in green_rows(record):
            modes = " ".join(f"{mode} {time['p50_ms']:.3f}" for mode, time in row["times"].items())
            rate = f"{teraflops(row):.3g} TFLOP/s" if row["flops"] else ""
            faster = ratio(find(record, *DENSE), row) if row["flops"] else math.nan
            lines.append(
                f"  {row['name']:<38} {modes:<40} {rate:>14} " + ("" if math.isnan(faster) else f"{faster:.2f}x")
            )
    return "\n".join(lines)


def _one_line(record: Record) -> str:
    name, dense = record["name"], find(record, *DENSE)
    if record["status"] != "ok":
        return f"{name}: {record['status']}"
    if record["case"]["kind"] == "prompt":
        return f"{name}: " + ", ".join(f"{row} {time:.1f} ms" for row, time in prompt_totals(record).items())
    words = [f"dense {milliseconds(dense):.3f} ms"]
    for row in green_rows(record):
        if row is not dense and record["case"]["kind"] == "step" and row["family"] != "stage":
            if row["name"].startswith("select_table"):
                words.append(f"select {milliseconds(row):.3f} ms")
            else:
                words.append(f"{row['name'].replace('dense FlashAttention-2', 'FA2')} {ratio(dense, row):.2f}x")
    return f"{name}: " + ", ".join(words)
