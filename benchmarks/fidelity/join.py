"""`python -m benchmarks join RESULT.json RESULT.json --out DIRECTORY`: what `fidelity` measured in shares becomes one
result, to report on or to resume; and what two results must have in common to become one, which `--resume` asks too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.findings import Record, load
from benchmarks.fidelity.plans import Stage, definition_of
from benchmarks.files import claim, write_new
from benchmarks.records import check_fields

PLACE = ("row", "context", "chunk", "first", "last")
ANSWERS = ("scores", "bits", "bytes")
OUT_OF_MEMORY = "out of memory"  # the first words of such a cell's reason


def join(paths: Sequence[Path], out: Path) -> Path:
    """Write `fidelity-PRESET.json` of several results of that preset into a directory.

    The results stay as they are; what is in the way there, one of them maybe, is kept as `fidelity-PRESET.json.before`.

    A cell that failed in one and was measured in another is measured. One that failed for want of memory is left out
    and counts as not reached, because shares of one card take it from each other. Cells and runs that two results have
    in common, because both went on from a third, are taken once. The last run is said to have left undone what no last
    run of these results has reached.

    Results of other sources become one where they are seen to answer alike: cells that both have measured, one of a
    library row at least, have the same answers and the same bits; ours stay. The newest sources come last, so that
    `--resume` goes on with them.

    Raises:
        FileNotFoundError: no such result.
        ValueError: fewer than two results, one twice, what is no result, results that differ in what `--resume` asks to
            be the same (sources that are not seen to answer alike among it), in their gates or in a row's definition,
            or a cell that two of them have measured apart.
    """
    if len(paths) < 2:
        raise ValueError(f"join: expected two results or more, got {len(paths)}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"join: expected different results, got one twice in {', '.join(map(str, paths))}")
    joined, *others = map(_read, paths)
    for other, path in zip(others, paths[1:], strict=True):
        joined = _both(joined, other, path)
    joined = _without_want_of_memory(joined)
    target = out / f"fidelity-{joined['preset']}.json"
    claim(target)
    write_new(target, joined)
    return target


def _read(path: Path) -> Record:
    result = load(path)
    check_fields(path, result, ("corpus",))
    check_fields(path, result["model"], ("weights", "dtype", "gate"), "the model")
    for n, cell in enumerate(result["cells"]):
        check_fields(path, cell, (*PLACE, "status", "run"), f"cells[{n}]")
    return result


def _both(one: Record, other: Record, path: Path) -> Record:
    """Two results in one, the other of which is in `path`."""
    check_alike("join", one, other, path, but=("sources",))
    compared = _compared(one, other, path)
    gates = one["model"].get("gate"), other["model"].get("gate")
    if None not in gates and gates[0] != gates[1]:
        raise ValueError(f"join: expected a result of gates {gates[0]!r}, got {path} of gates {gates[1]!r}")
    check_rows("join", one["rows"], other["rows"], path)
    runs, places = list(one["runs"]), []
    for one_run in other["runs"]:  # shares that went on from one result have its runs in common
        if one_run not in runs:
            runs.append(one_run)
        places.append(runs.index(one_run))
    theirs = [cell | {"run": places[cell["run"]]} for cell in other["cells"] if place(cell) not in compared]
    cells = _united(one["cells"], theirs, path)
    measured = [cell for cell in cells if cell["status"] == "ok"]
    names, labels = {cell["row"] for cell in measured}, set(map(_label, measured))
    absent = one["absent"] | other["absent"]
    left = dict.fromkeys([*one["runs"][-1]["not_run"], *other["runs"][-1]["not_run"]])
    runs[-1] = runs[-1] | {"not_run": [label for label in left if label not in labels]}
    told = [told for result in (one, other) for told in result.get("compared", ())]
    if compared:
        told.append(
            {"sources": [_sources(one), _sources(other)], "cells": [_label(cell) for cell in compared.values()]}
        )
    return one | {
        "compared": [its for n, its in enumerate(told) if its not in told[:n]],
        "model": joined_model(one["model"], other["model"]),
        "rows": one["rows"] | other["rows"],
        "hidden": _hidden(one["hidden"], other["hidden"]),
        "absent": {name: why for name, why in absent.items() if name not in names},
        "runs": runs,
        "cells": cells,
    }


def _without_want_of_memory(result: Record) -> Record:
    """A result whose cells that failed for want of memory are among those that its last run did not reach."""
    *runs, last = result["runs"]
    cells, left = [], dict.fromkeys(last["not_run"])
    for cell in result["cells"]:
        if cell.get("reason", "").startswith(OUT_OF_MEMORY):
            left[_label(cell)] = None
        else:
            cells.append(cell)
    return result | {"runs": [*runs, last | {"not_run": list(left)}], "cells": cells}


def _sources(result: Record) -> Any:
    return result["runs"][-1]["environment"].get("sources")


def _compared(one: Record, other: Record, path: Path) -> dict[tuple[Any, ...], Record]:
    """The cells by place that two results of other sources have both measured, if they are seen to answer alike."""
    if _sources(one) == _sources(other):
        return {}
    ours = {place(cell): cell for cell in one["cells"] if cell["status"] == "ok"}
    both = {place(cell): cell for cell in other["cells"] if cell["status"] == "ok" and place(cell) in ours}
    if not any(other["rows"][cell["row"]]["kind"] == "library" for cell in both.values()):
        wanted = f"sources {_sources(one)!r}, or one that has measured cells of a library row again"
        raise ValueError(f"join: expected a result of {wanted}, got {path} of sources {_sources(other)!r}")
    for where, cell in both.items():
        differing = [name for name in ANSWERS if cell.get(name) != ours[where].get(name)]
        if differing:
            what = f"the same {', '.join(differing)} from sources {_sources(one)!r} and {_sources(other)!r}"
            raise ValueError(f"join: expected {what}, got others of {_label(cell)} in {path}")
    return both


def check_alike(asker: str, ours: Record, theirs: Record, path: Path, but: Sequence[str] = ()) -> None:
    """Refuse a result, theirs in `path`, whose numbers do not stand beside ours; `asker` begins the message."""
    before = _conditions(theirs)
    for name, its in _conditions(ours).items():
        if before[name] != its and name not in but:
            raise ValueError(f"{asker}: expected a result of {name} {its!r}, got {path} of {name} {before[name]!r}")


def _conditions(result: Record) -> Record:
    """What decided a result's numbers beside its rows, stages and gates."""
    where = result["runs"][-1]["environment"]
    found = {"preset": result.get("preset"), **{name: where.get(name) for name in ("sources", "gpu", "torch")}}
    found |= {name: result["model"].get(name) for name in ("weights", "dtype")}
    return found | {"corpus": result.get("corpus")}


def check_rows(asker: str, ours: Mapping[str, Record], theirs: Mapping[str, Record], path: Path) -> None:
    """Refuse a row of theirs, in `path`, that has the name of one of ours and is another; rows by name, as in JSON."""
    for name, row in ours.items():
        mine, other = definition_of(row), definition_of(theirs.get(name, row))
        if mine != other:
            raise ValueError(f"{asker}: expected {name!r} to be {mine}, got {path} with {other}")


def joined_model(before: Record, here: Record) -> Record:
    """The record of the model that is here; where no gates are, the result's stay those of its cells."""
    return here if here["gate"] is not None else here | {"gate": before["gate"]}


def place(cell: Record) -> tuple[Any, ...]:
    """The row and the items of a cell, which a result has once."""
    return tuple(cell[name] for name in PLACE)


def _label(cell: Record) -> str:
    """A cell as runs name those that they did not run."""
    name, *where = place(cell)
    return f"{name} at {Stage(*where, priority=0)}"


def _united(ours: Sequence[Record], theirs: Sequence[Record], path: Path) -> list[Record]:
    """Every cell once: measured rather than failed, and of two that failed ours; copies of a cell are one."""
    found = {place(cell): cell for cell in ours}
    for cell in theirs:
        before = found.setdefault(place(cell), cell)
        if before is not cell and cell["status"] == "ok":
            if before["status"] == "ok" and before != cell:
                raise ValueError(f"join: expected each cell to be measured once, got {_label(cell)} again in {path}")
            found[place(cell)] = cell
    return list(found.values())


def _hidden(ours: Record, theirs: Record) -> Record:
    """Needles that have to be selected, by context and chunk, range of items, and task."""
    both: Record = {}
    for hidden in (ours, theirs):
        for where, spans in hidden.items():
            for span, counts in spans.items():
                both.setdefault(where, {}).setdefault(span, {}).update(counts)
    return both
