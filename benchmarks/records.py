"""Reading a latency result: rows, ratios, rates, and the sums over prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.files import parsed
from benchmarks.measure import rows_of

Record = dict[str, Any]

DENSE = ("dense cuDNN", "dense CPU SDPA")
OF_RUN = ("started", "environment", "ceilings", "seconds")


def load(path: Path) -> Record:
    """Read a result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a result of `python -m benchmarks latency`, or one that lacks something.
    """
    result = read(path, "latency")
    if result.get("kind") is not None or result.get("schema") not in (1, 2) or "cases" not in result:
        raise ValueError(f"{path}: expected a latency result of schema 1 or 2, got something else")
    if result["schema"] == 1:  # one run, written at the top
        check_fields(path, result, OF_RUN)
        result["runs"] = [{name: result[name] for name in OF_RUN}]
    check_timed(path, result)
    return result


def check_fields(path: Path, record: object, names: Iterable[str], where: str = "the result") -> None:
    """Refuse what is no JSON object with these names; `where` says which part of the file it is."""
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected {where} to be an object, got {type(record).__name__}")
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"{path}: expected {where} to have {', '.join(missing)}, got none")


def check_timed(path: Path, result: Record) -> None:
    """What the report of any timed cases begins with is there: the result's head, its runs, and the heads of its cases.

    Raises:
        ValueError: something is missing; the message names it.
    """
    check_fields(path, result, ("preset", "protocol", "notes", "runs", "cases"))
    check_runs(path, result, OF_RUN)
    if not isinstance(result["cases"], list):
        raise ValueError(f"{path}: expected cases to be a list, got {type(result['cases']).__name__}")
    for n, record in enumerate(result["cases"]):
        check_fields(path, record, ("name", "case", "status"), f"cases[{n}]")
        if not isinstance(record["name"], str):
            raise ValueError(f"{path}: expected cases[{n}] to have a name, got {record['name']!r:.40}")
        if record.get("run", 0) not in range(len(result["runs"])):
            raise ValueError(f"{path}: expected cases[{n}] to be of a run that is there, got {record['run']!r:.40}")


@contextmanager
def sensible(what: str) -> Iterator[None]:
    """Where a result is read: what a damaged one does to its reader becomes one line that begins with `what`.

    Raises:
        ValueError: something is missing in the middle of a result, or of another type.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        logging.getLogger("benchmarks").debug(what, exc_info=True)
        got = f"one that makes no sense ({type(error).__name__}: {error})"
        raise ValueError(f"{what}: expected a result as it was written, got {got}") from error


def check_runs(path: Path, result: Record, names: Iterable[str]) -> None:
    """Refuse a result without runs, or with one that lacks some of these names or does not say where it ran."""
    if not isinstance(result["runs"], list) or not result["runs"]:
        raise ValueError(f"{path}: expected runs to be a list of at least one, got {result['runs']!r:.40}")
    for n, run in enumerate(result["runs"]):
        check_fields(path, run, names, f"runs[{n}]")
        check_fields(path, run["environment"], ("gpu",), f"the environment of runs[{n}]")


def read(path: Path, command: str) -> Record:
    """The JSON object in a file; empty for JSON of another kind.

    Raises:
        FileNotFoundError: no such file; the message names the command that makes one.
        ValueError: not JSON, or no file that can be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a result of `python -m benchmarks {command}`, got no file")
    try:
        result = parsed(path)
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    return result if isinstance(result, dict) else {}


def read_kind(path: Path, kind: str, schema: int) -> Record:
    """A result that says of which kind and schema it is; `kind` is also the command's name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind or schema.
    """
    result = read(path, kind)
    if (result.get("kind"), result.get("schema")) != (kind, schema):
        raise ValueError(f"{path}: expected a {kind} result of schema {schema}, got something else")
    return result


def environment_of(result: Record) -> Record:
    """Of the last run: all of them ran the same sources on the same card."""
    return result["runs"][-1]["environment"]


def ceilings_of(result: Record, record: Record) -> Record:
    """The card's ceilings in the run that measured a case."""
    return result["runs"][record.get("run", 0)]["ceilings"]


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


def milliseconds(row: Record | None, mode: str | None = None, at: str = "p50_ms") -> float:
    """p50 of a mode; by default of graph replays, or of plain calls where there are none. NaN without a row."""
    if row is None:
        return math.nan
    times = row["times"]
    for one in ("graph", "plain") if mode is None else (mode,):
        if one in times:
            return times[one][at]
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


def terabytes(row: Record | None) -> float:
    """TB/s at p50, of the fewest bytes that must move."""
    return math.nan if row is None else row["bytes"] / milliseconds(row) / 1e9


def of_kind(result: Record, kind: str) -> list[Record]:
    return [record for record in result["cases"] if record["case"]["kind"] == kind and record["status"] == "ok"]


def shape_name(record: Record) -> str:
    shape = record["case"]["shape"]
    return f"B={shape['batch']}, Hq={shape['q_heads']}, Hkv={shape['kv_heads']}"


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def kernels_of(record: Record) -> dict[str, list[str]]:
    """Which attention kernels ran in a case, and in which rows."""
    found: dict[str, list[str]] = {}
    for row in rows_of(record):
        if row.get("kernel") and row["name"] not in found.get(row["kernel"], []):
            found.setdefault(row["kernel"], []).append(row["name"])
    return found


# ---- Markdown ----


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    body = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    if not body:
        return []
    return [f"| {' | '.join(head)} |", f"|{'|'.join('---' if n == 0 else '---:' for n in range(len(head)))}|", *body]


def cell(value: object) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def spread(row: Record | None, mode: str | None = None) -> str:
    """p50 and, in brackets, p20 to p80."""
    if row is None:
        return "-"
    time = row["times"][mode_of(row) if mode is None else mode]
    return f"{time['p50_ms']:.3f} ({time['p20_ms']:.3f}-{time['p80_ms']:.3f})"


def number(value: float | None) -> float:
    return math.nan if value is None else value
