"""The parts of a report about growth with the context, layouts of the cache, and the host."""

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
    spread,
    table,
    teraflops,
    tokens,
)
from benchmarks.scaling import KEPT


def selection_floor(result: Record, record: Record) -> float:
    """Milliseconds that the scores' FLOPs take at the matmul ceiling of the same run; NaN where none was measured."""
    product, top = find(record, "score product"), ceilings_of(result, record)
    if product is None or not top:
        return math.nan
    return product["flops"] / top["matmul_tflops"] / 1e9


def scaling_rows(result: Record) -> list[tuple]:
    """Per case, ascending: shape, context, and the milliseconds of its floors and rows."""
    rows = []
    for record in sorted(of_kind(result, "scaling"), key=lambda one: (shape_name(one), one["case"]["context"])):
        for row in green_rows(record):
            if row["name"].startswith("select_table"):
                grouping = row["grouping"]
                floor, product = selection_floor(result, record), milliseconds(find(record, "score product"))
                attention = find(record, f"attend {grouping}, {KEPT} blocks")
                own = milliseconds(row)
                rows.append(
                    (
                        shape_name(record),
                        record["case"]["context"],
                        grouping,
                        floor,
                        product,
                        own,
                        own / floor,
                        own / product,
                        milliseconds(attention),
                        milliseconds(find(record, f"prefill {grouping}")),
                    )
                )
    return rows


def scaling_section(result: Record) -> list[str]:
    head = ("context", "shape", "group", "floor: FLOPs at matmul rate, ms", "product in cuBLAS, ms", "select_table, ms")
    head += ("÷ floor", "÷ product", f"attend over {KEPT} past blocks, ms", "prefill, ms")
    rows = [(tokens(context), shape, *rest) for shape, context, *rest in scaling_rows(result)]
    return table(head, rows)


def layouts_section(result: Record) -> list[str]:
    """`attend` by time per useful FLOP, `prefill` by time, relative to the aligned case on the case's own pages."""
    lines = []
    for record in of_kind(result, "layouts"):
        rows = []
        for row in green_rows(record):
            kind, _, what = row["name"].partition(f" {row['grouping']}, ")
            relative = relative_time(record, row)
            rows.append((f"{kind} {row['grouping']}", what, spread(row), teraflops(row), relative, _kernel(row)))
        rows.sort(key=lambda row: row[0])
        lines += [f"{shape_name(record)}, context {tokens(record['case']['context'])}", ""]
        head = ("", "layout", "ms", "useful TFLOP/s", "time ÷ aligned, per useful FLOP (attend)", "kernel")
        lines += [*table(head, rows), ""]
    return lines


def relative_time(record: Record, row: Record) -> float:
    """Time ÷ that of the same call on the case's own pages, aligned; per useful FLOP where a row counts them."""
    kind = row["name"].partition(f" {row['grouping']}, ")[0]
    aligned = find(record, f"{kind} {row['grouping']}, page {record['case']['page_size']}")
    if kind == "attend":
        return teraflops(aligned) / teraflops(row)
    return milliseconds(row) / milliseconds(aligned)


def _kernel(row: Record) -> str:
    return row.get("kernel", "").partition(":")[0] or "-"


def host_section(result: Record) -> list[str]:
    """Microseconds of host time per call, and what the calls kept of memory.

    Where a result says what a bare call of PyTorch cost its host, each call is also counted in these.
    """
    records = of_kind(result, "host")
    bare = any("bare_call" in record for record in records)
    rows = []
    for record in records:
        for row in green_rows(record):
            steady, new = row["times"]["steady host"], row.get("new_lengths")
            memory = row["memory"]
            rows.append(
                (
                    f"{shape_name(record)}, context {tokens(record['case']['context'])}",
                    row["name"],
                    steady["p50_ms"] * 1e3,
                    f"{steady['p20_ms'] * 1e3:.0f}-{steady['p80_ms'] * 1e3:.0f}",
                    *(_in_bare_calls(record, steady) if bare else ()),
                    new["p50_ms"] * 1e3 if new else math.nan,
                    new["max_ms"] * 1e3 if new else math.nan,
                    str(memory["calls"]),
                    _bytes(memory, "allocated_growth"),
                    _bytes(memory, "reserved_growth"),
                    _bytes(memory, "peak_above_start"),
                )
            )
    head = ("", "", "µs per call, p50", "p20-p80", *(("bare `add_`, µs", "call ÷ `add_`") if bare else ()))
    head += ("at new lengths, p50", "slowest", "calls")
    return table((*head, "allocated growth, bytes", "reserved growth, bytes", "peak above start, bytes"), rows)


def _in_bare_calls(record: Record, steady: Record) -> tuple[float, float]:
    """(µs of a bare call in the same case, how many of them a call costs); NaN where it was not timed."""
    bare = record.get("bare_call", {}).get("p50_ms", math.nan)
    return bare * 1e3, steady["p50_ms"] / bare


def _bytes(memory: Record, name: str) -> str:
    return str(memory[name]) if name in memory else "-"
