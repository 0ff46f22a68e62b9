"""What a run prints at its end."""

from __future__ import annotations

import math

from benchmarks.records import DENSE, Record, find, green_rows, milliseconds, of_kind, ratio, teraflops
from benchmarks.report_prompts import row_names, total


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
            faster = ratio(find(record, *DENSE), row) if row["flops"] and row["family"] != "ceiling" else math.nan
            lines.append(
                f"  {row['name']:<38} {modes:<40} {rate:>14} " + ("" if math.isnan(faster) else f"{faster:.2f}x")
            )
    return "\n".join(lines)


def _one_line(record: Record) -> str:
    name, dense = record["name"], find(record, *DENSE)
    if record["status"] != "ok":
        return f"{name}: {record['status']}"
    if record["case"]["kind"] == "prompt":
        chunks = record["chunks"]
        return f"{name}: " + ", ".join(f"{row} {total(chunks, row):.1f} ms" for row in row_names(chunks))
    if record["case"]["kind"] == "host":
        times = {row["name"]: row["times"]["steady host"]["p50_ms"] * 1e3 for row in green_rows(record)}
        return f"{name}: " + ", ".join(f"{row} {time:.0f} µs" for row, time in times.items())
    if record["case"]["kind"] == "scaling":
        return f"{name}: " + ", ".join(f"{row['name']} {milliseconds(row):.4f} ms" for row in green_rows(record))
    if record["case"]["kind"] == "layouts":
        rates = {row["name"]: teraflops(row) for row in green_rows(record) if row["name"].startswith("attend")}
        return f"{name}: " + ", ".join(f"{row} {rate:.3g} TFLOP/s" for row, rate in rates.items())
    words = [f"dense {milliseconds(dense):.3f} ms"]
    for row in green_rows(record):
        if row is not dense and record["case"]["kind"] == "step" and row["family"] != "stage":
            if row["name"].startswith("select_table"):
                words.append(f"select {milliseconds(row):.3f} ms")
            else:
                words.append(f"{row['name'].replace('dense FlashAttention-2', 'FA2')} {ratio(dense, row):.2f}x")
    return f"{name}: " + ", ".join(words)
