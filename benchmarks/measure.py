"""From contestants to rows: gate each one, capture and gate its CUDA graph, then time the green ones in one loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import baselines
from benchmarks.contestants import Contestant, Field
from benchmarks.gate import Verdict
from benchmarks.timing import ColdCache, capture, host_time, interleaved_cpu, interleaved_cuda, poison


@dataclass(frozen=True)
class Rounds:
    """How often everything is timed in turn on a GPU.

    Attributes:
        least, warm_ups: see `timing.interleaved_cuda`.
        plain: time plain calls beside graph replays. Without, a call is timed plainly only if it was not captured.
        alike: if one call was not captured, time all of them plainly, so that all have a mode in common.
        host: time the host's part of the calls that ask for it.
    """

    least: int = 7
    warm_ups: int = 2
    plain: bool = True
    alike: bool = False
    host: bool = True


FULL = Rounds()
#: For series of many cases.
BRIEF = Rounds(least=5, warm_ups=1, plain=False, host=False)


def measure(
    lineup: Field, seconds: float, device: str, *, cold: bool = False, rounds: Rounds = FULL
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """JSON rows of all contestants, and reasons for what did not run.

    Args:
        lineup: what runs.
        seconds: for the timed loop.
        device: "cuda" or "cpu".
        cold: evict the L2 before each run.
        rounds: what is timed on a GPU, and how often.
    """
    absent, rows, ready, replays = dict(lineup.absent), [], {}, {}
    for contestant in lineup.contestants:
        row = _row(contestant)
        verdict = gated(contestant)
        if isinstance(verdict, str):
            absent[contestant.name] = verdict
            continue
        row["gate"] = verdict.as_json()
        rows.append(row)
        if not verdict.passed:
            continue
        ready[contestant.name] = contestant
        if device == "cuda":
            row["graph"] = _captured(contestant, replays, absent)
    times = _times(ready, replays, seconds, device, cold=cold, rounds=rounds)
    asked = {name: one for name, one in ready.items() if one.host and rounds.host and device == "cuda"}
    hosts = {name: host_time(one.run) for name, one in asked.items()}
    for row in rows:
        row["times"] = {mode: timing.as_json() for (name, mode), timing in times.items() if name == row["name"]}
        if row["name"] in hosts:
            row["times"]["host"] = hosts[row["name"]].as_json()
        row["cold_l2"] = cold and device == "cuda"
    return rows, absent


def _times(
    ready: dict[str, Contestant],
    replays: dict[str, Callable[[], object]],
    seconds: float,
    device: str,
    *,
    cold: bool,
    rounds: Rounds,
) -> dict:
    plain = {name: contestant.run for name, contestant in ready.items()}
    if device != "cuda":
        return interleaved_cpu(plain, seconds)
    if not rounds.plain and not (rounds.alike and len(replays) < len(plain)):
        plain = {name: run for name, run in plain.items() if name not in replays}
    flush = ColdCache(torch.device(device), needed=cold)
    return interleaved_cuda(replays, plain, seconds, cold=flush, least=rounds.least, warm_ups=rounds.warm_ups)


def gated(contestant: Contestant) -> Verdict | str:
    """The gate's verdict over one call; for a peer that cannot run, the reason."""
    try:
        contestant.spoil()
        result = contestant.run()
    except Exception as error:
        why = baselines.reason(error)
        if contestant.family in ("dense", "peer"):
            return why
        return Verdict(False, math.inf, 0, f"raised {why}")  # the library itself may not fail
    return checked(contestant, result)


def checked(contestant: Contestant, result: object) -> Verdict:
    """The gate's verdict; a result that the gate cannot even read is a red one."""
    try:
        return contestant.check(result)
    except Exception as error:
        return Verdict(False, math.inf, 0, f"the check raised {baselines.reason(error)}")


def _captured(
    contestant: Contestant, replays: dict[str, Callable[[], object]], absent: dict[str, str]
) -> dict[str, object]:
    """Capture a contestant and gate a replay of it; the verdict, or why there is none."""
    if not contestant.capturable:
        return {"captured": False, "reason": "reads device values on the host"}
    try:
        replay = capture(contestant.run)
        poison(replay.result)
        contestant.spoil()
        replay.run()
    except Exception as error:
        absent[f"{contestant.name}, graph"] = baselines.reason(error)
        return {"captured": False, "reason": baselines.reason(error)}
    verdict = checked(contestant, replay.result)
    if verdict.passed:
        replays[contestant.name] = replay.run
    return {"captured": True, "gate": verdict.as_json()}


def _row(contestant: Contestant) -> dict[str, object]:
    names = ("name", "family", "grouping", "flops", "bytes", "kernel", "note")
    return {name: getattr(contestant, name) for name in names}


def rows_of(record: dict[str, object]) -> list[dict[str, object]]:
    """All rows of a record, those of a prompt's chunks included."""
    return [*record.get("rows", []), *(row for chunk in record.get("chunks", []) for row in chunk["rows"])]


def failed(record: dict[str, object]) -> bool:
    """A case that failed, or one with a red gate, plain or replayed."""
    rows = rows_of(record)
    gates = [row["gate"] for row in rows] + [row["graph"]["gate"] for row in rows if "gate" in row.get("graph", {})]
    return record["status"] == "failed" or not all(verdict["passed"] for verdict in gates)
