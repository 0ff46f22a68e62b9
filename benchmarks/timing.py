"""Clocks: interleaved CUDA events, CUDA-graph replays, and the CPU's counter; always p20, p50 and p80.

Everything that is compared is timed in one loop, one run of each after the other, because a power-capped card slows
down over seconds. Two ways to run on a GPU are kept apart:

    graph   replays of a captured CUDA graph, queued without a gap: GPU time alone;
    plain   one call on an idle device, from before the first launch to the end: what the host costs shows.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from compactattn import BlockTable, GroupMask, SelectionMask

FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU


@dataclass(frozen=True)
class Timing:
    """Percentiles of the runs, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def summarize_times(samples: list[float]) -> Timing:
    """p20, p50 and p80 of at least one time in milliseconds, by linear interpolation."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = math.floor(place), math.ceil(place)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Timing(percentile(0.2), percentile(0.5), percentile(0.8), len(ordered))


@dataclass(frozen=True, eq=False)
class Replay:
    """A captured call: `run` replays it, `result` is where each replay leaves what the call returned."""

    run: Callable[[], object]
    result: object


def capture(run: Callable[[], object]) -> Replay:
    """Capture a call that has run before (so that everything is compiled) in a CUDA graph.

    Raises:
        RuntimeError: whatever the call does that cannot be captured, such as reading a device value on the host.
    """
    # torch.cuda.graph() would empty the allocator's cache each time; with dozens of captures that is most of the run.
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    gc.disable()  # destroying an older graph would break this capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                result = run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a broken capture must still be ended
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return Replay(graph.replay, result)


def poison(result: object) -> None:
    """Overwrite what a call returned, so that a replay that does not write it anew is found out."""
    if isinstance(result, Tensor):
        result.fill_(math.nan)
    elif isinstance(result, BlockTable):
        result.indices.fill_(-1)
        result.counts.fill_(-1)
    elif isinstance(result, SelectionMask):
        result.mask.logical_not_()
    elif isinstance(result, GroupMask):
        result.keep.logical_not_()
    elif isinstance(result, tuple):
        for part in result:
            poison(part)


def poison_free_memory(like: Tensor) -> None:
    """Leave NaN behind in memory that the allocator is likely to hand out for the next tensor of this shape."""
    blocks = [torch.full_like(like, math.nan) for _ in range(2)]
    del blocks


class ColdCache:
    """Evicts the L2 between timed runs by reading a buffer, which leaves nothing to write back."""

    def __init__(self, device: torch.device, *, needed: bool) -> None:
        self._buffer = torch.ones(FLUSH_BYTES // 4, device=device) if needed else None

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.amax()


def rounds_for(one_round: float, seconds: float, *, least: int = 7, most: int = 60) -> int:
    """How many rounds fill `seconds`, within bounds."""
    return max(least, min(most, int(seconds / max(one_round, 1e-9))))


def interleaved_cuda(
    replays: Mapping[str, Callable[[], object]],
    plain: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    cold: Callable[[], None] | None = None,
    least: int = 7,
    warm_ups: int = 2,
) -> dict[tuple[str, str], Timing]:
    """Time everything round-robin: {(name, "graph" or "plain"): Timing}. `cold` runs before each, untimed.

    At least `least` rounds are timed, after `warm_ups` and one more to see how long a round takes.
    """
    order = [(name, "graph", run) for name, run in replays.items()]
    order += [(name, "plain", run) for name, run in plain.items()]
    cold = cold or (lambda: None)

    def one_round() -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        events = []
        for _, mode, run in order:
            cold()
            if mode == "plain":
                torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        return events

    for _ in range(warm_ups):
        one_round()
    torch.cuda.synchronize()
    started = time.perf_counter()
    one_round()
    torch.cuda.synchronize()
    count = rounds_for(time.perf_counter() - started, seconds, least=least)
    rounds = [one_round() for _ in range(count)]
    torch.cuda.synchronize()
    times: dict[tuple[str, str], list[float]] = {(name, mode): [] for name, mode, _ in order}
    for events in rounds:
        for (name, mode, _), (start, end) in zip(order, events, strict=True):
            times[name, mode].append(start.elapsed_time(end))
    return {key: summarize_times(samples) for key, samples in times.items()}


def interleaved_cpu(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[tuple[str, str], Timing]:
    """The same on the CPU, where every run is "plain"."""

    def one_round() -> list[float]:
        times = []
        for run in runs.values():
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    started, rounds = time.perf_counter(), []
    while len(rounds) < 3 or (time.perf_counter() - started < seconds and len(rounds) < 60):
        rounds.append(one_round())
    by_run = zip(*rounds, strict=True)
    return {(name, "plain"): summarize_times(list(samples)) for name, samples in zip(runs, by_run, strict=True)}


def host_time(run: Callable[[], object], calls: int = 30) -> Timing:
    """Host time of a call that only queues work, the device being idle before each."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return summarize_times(samples)
