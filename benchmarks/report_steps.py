"""The parts of a report about one chunk: `attend` alone, whole steps, stages, and what each union costs."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.records import (
    DENSE,
    Record,
    find,
    green_rows,
    milliseconds,
    number,
    of_kind,
    ratio,
    shape_name,
    spread,
    table,
    terabytes,
    teraflops,
    tokens,
)


def tables_section(result: Record) -> list[str]:
    """Rates over controlled tables, relative to dense, to the equal-length table of the same density, and to matmul."""
    return _rates(of_kind(result, "tables"))


def decode_section(result: Record) -> list[str]:
    """Rates over decode and speculative rows, relative to dense and to the ceilings."""
    return _rates(of_kind(result, "decode"))


def _rates(records: Iterable[Record]) -> list[str]:
    lines = []
    for record in records:
        dense, matmul = find(record, *DENSE), find(record, "matmul")
        rows = [
            (
                row["name"],
                spread(row),
                teraflops(row),
                teraflops(row) / teraflops(dense),
                teraflops(row) / teraflops(equal_length(record, row)),
                teraflops(row) / teraflops(matmul),
                row["bytes"] / 1e9,
                terabytes(row),
            )
            for row in green_rows(record)
        ]
        lines += [f"{shape_name(record)}, context {tokens(record['case']['context'])}, chunk {record['case']['chunk']}"]
        head = ("", "ms", "useful TFLOP/s", "÷ dense", "÷ equal lengths", "÷ matmul", "GB", "TB/s")
        lines += ["", *table(head, rows), ""]
    return lines


def equal_length(record: Record, row: Record) -> Record | None:
    """For `attend` over uneven tables: the row over tables of equal length and the same density; else None."""
    if ", equal " in row["name"] or not row["name"].startswith("attend"):
        return None
    density = row["name"].rpartition(" ")[2]
    return find(record, f"attend {row['grouping']}, equal {density}")


def breakdown(record: Record, grouping: str) -> dict[str, float]:
    """Milliseconds under graph replay of the stages of one step, fused and composed; NaN where one was not timed."""
    names = ("summarize", "select", f"unite {grouping}", f"build_table {grouping}")
    names += (f"select_table {grouping}", f"attend {grouping}", f"prefill {grouping}")
    return {name.partition(" ")[0]: milliseconds(find(record, name)) for name in names}


def breakdown_section(result: Record) -> list[str]:
    """Stage by stage, for the steps of chunk 1024 on the calibrated workload."""
    rows = []
    for record in of_kind(result, "step"):
        case = record["case"]
        if case["correlation"] == 0.9 and case["workload"] == "vertical-slash" and case["page_size"] == 128:
            for grouping in record["density"]:
                where = f"{tokens(case['context'])}, {case['chunk']}, {shape_name(record)}"
                rows.append((where, grouping, *breakdown(record, grouping).values()))
    head = ("context, chunk, shape", "group", "summarize", "select", "unite", "build_table")
    return table((*head, "all four fused: select_table", "attend", "prefill"), rows)


def bounds_section(result: Record) -> list[str]:
    """KeyBounds beside FlashPrefill: `summarize` and `select`, which no grouping changes, `select_table`, `prefill`."""
    rows = []
    for record in of_kind(result, "bounds"):
        dense = find(record, *DENSE)
        for key, density in record["density"].items():
            grouping, selector = key.split(", ")
            label = grouping if find(record, f"prefill {key}") is None else key
            whole = find(record, f"prefill {label}")
            rows.append(
                (
                    f"{tokens(record['case']['context'])}, {record['case']['chunk']}, {shape_name(record)}",
                    selector,
                    grouping,
                    number(density["past_density"]["sub_group_union"]),
                    *(milliseconds(find(record, f"{stage}, {selector}")) for stage in ("summarize", "select")),
                    milliseconds(find(record, f"select_table {label}")),
                    milliseconds(whole),
                    ratio(dense, whole),
                )
            )
    head = ("context, chunk, shape", "selector", "group", "density after union", "summarize ms", "select ms")
    return table((*head, "select_table ms", "prefill ms", "prefill x"), rows)


def features_section(result: Record) -> list[str]:
    """`attend` with each feature, beside the plain call over the same table."""
    rows = []
    for record in of_kind(result, "features"):
        for row in green_rows(record):
            if row["family"] == "stage":
                grouping, lengths, name = row["name"].split(", ", 2)
                over = f"{grouping}, {lengths}"
                plain = find(record, f"{over}, plain")
                times = milliseconds(row), milliseconds(row) / milliseconds(plain)
                rows.append((shape_name(record), over, name, *times))
    return table(("shape", "over", "with", "ms", "x plain"), rows)


def steps_section(result: Record) -> list[str]:
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
                        number(density["past_density"]["sub_group_union"]),
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
    body = table(head, rows)
    return [*body, "", note] if body else []


def stages_section(result: Record) -> list[str]:
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
        lines += [f"<details><summary>{record['name']}</summary>", "", *table(head, rows), "", "</details>", ""]
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


def growth_section(result: Record) -> list[str]:
    rows = []
    for shape, workload, correlation, grouping, density in growth_rows(result):
        if grouping == "1x1":
            continue
        growth = [number(density["growth"][step]) for step in ("query_block_union", "sub_group_union", "group_union")]
        own = number(density["past_density"]["mask"])
        rows.append((f"{shape}, {workload}", correlation, grouping, own, *growth, density["blocks_per_query_block"]))
    head = ("workload", "correlation", "group", "mask density", "x query blocks", "x sub-group", "x KV group", "blocks")
    return table(head, sorted(set(rows), key=str))
