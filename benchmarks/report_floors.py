"""The two floors of every row: how long its arithmetic and its bytes take at the ceilings of the same run.

    arithmetic = useful FLOPs / matmul ceiling        bytes = fewest bytes / copy ceiling

A third figure says what neither floor does: `attend` over equal-length tables takes a fixed time plus its FLOPs at some
rate, a line through its lowest density and 0.25 (at 1.0 the card has slowed down).

The ceilings are those timed in the same loop where there are any, else those from the start of the run. No schedule
can beat the larger floor; `÷ floor` says how far a row is from it.
"""

from __future__ import annotations

import math

from benchmarks.records import (
    Record,
    ceilings_of,
    find,
    green_rows,
    milliseconds,
    of_kind,
    shape_name,
    table,
    terabytes,
    teraflops,
    tokens,
)


def ceilings(result: Record, record: Record) -> tuple[float, float]:
    """TFLOP/s and TB/s that the card reached beside a case; NaN where neither was measured."""
    matmul, copy, top = find(record, "matmul"), find(record, "copy"), ceilings_of(result, record)
    rate = top.get("matmul_tflops", math.nan) if matmul is None else teraflops(matmul)
    return rate, top.get("copy_tbps", math.nan) if copy is None else terabytes(copy)


def floors(result: Record, record: Record, row: Record) -> tuple[float, float]:
    """Milliseconds of a row's arithmetic and of its bytes."""
    rate, bandwidth = ceilings(result, record)
    return row["flops"] / rate / 1e9, row["bytes"] / bandwidth / 1e9


def line(record: Record, grouping: str) -> tuple[float, float, dict[float, float]]:
    """Fixed milliseconds and TFLOP/s of `attend` under a grouping, and measured ÷ line by density."""
    rows = {}
    for row in green_rows(record):
        if row["name"].startswith(f"attend {grouping}, equal "):
            rows[float(row["name"].rpartition(" ")[2])] = (row["flops"] / 1e9, milliseconds(row))
    if len(rows) < 2 or 0.25 not in rows:
        return math.nan, math.nan, {}
    (flops_a, time_a), (flops_b, time_b) = rows[min(rows)], rows[0.25]
    slope = (time_b - time_a) / (flops_b - flops_a)
    fixed = time_a - slope * flops_a
    return fixed, 1 / slope, {density: time / (fixed + slope * flops) for density, (flops, time) in rows.items()}


def section(result: Record) -> list[str]:
    """Floors of all that attends, and the line of `attend` alone."""
    lines = []
    for record in of_kind(result, "tables"):
        groupings = dict.fromkeys(row["grouping"] for row in green_rows(record) if row["grouping"])
        fits = {grouping: line(record, grouping) for grouping in groupings}
        lines += [
            f"- {shape_name(record)}, {grouping}: {fixed:.3f} ms + FLOPs at {rate:.0f} TFLOP/s; measured ÷ line "
            + ", ".join(f"{share:.2f} at density {density:g}" for density, share in sorted(shares.items()))
            for grouping, (fixed, rate, shares) in fits.items()
            if shares
        ]
    return [*lines, "", *_table(result)] if lines else _table(result)


def _table(result: Record) -> list[str]:
    """Floors of `attend` and the dense baseline, on controlled tables and in the steps of the calibrated workload."""
    rows = []
    for record in [*of_kind(result, "tables"), *of_kind(result, "step")]:
        case = record["case"]
        if case["kind"] == "step" and (case["correlation"] != 0.9 or case["workload"] != "vertical-slash"):
            continue
        for row in green_rows(record):
            if row["name"].startswith("attend") or row["name"] == "dense cuDNN":
                arithmetic, moved = floors(result, record, row)
                where = f"{case['kind']}: {tokens(case['context'])}, {case['chunk']}, {shape_name(record)}"
                time = milliseconds(row)
                rows.append((where, row["name"], arithmetic, moved, time, time / max(arithmetic, moved)))
    return table(("", "", "arithmetic, ms", "bytes, ms", "measured, ms", "÷ floor"), rows)
