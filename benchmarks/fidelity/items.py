"""The examples that every row of a stage answers, and the prompts that its probes read."""

from __future__ import annotations

import multiprocessing
from types import TracebackType

import numpy as np

from benchmarks.fidelity.answering import hidden_needles
from benchmarks.fidelity.plans import NEEDLE_TASKS, TEXT, Stage
from benchmarks.testbed.evaluate import heldout_windows
from benchmarks.testbed.tasks import TASKS, Example, TaskSource


class Items:
    """The examples of a stage, made once for all of its rows, by other processes if there are any.

    Args:
        source: of tasks and text.
        processes: how many make them; 0 makes them here.
    """

    def __init__(self, source: TaskSource, processes: int = 0) -> None:
        self.source = source
        self._pool = multiprocessing.get_context("fork").Pool(processes, _set_source, (source,)) if processes else None
        self._held: tuple[tuple[int, int, int], dict[str, list[Example]]] | None = None

    def __enter__(self) -> Items:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def examples(self, stage: Stage) -> dict[str, list[Example]]:
        """By task."""
        key = (stage.context, stage.first, stage.last)
        if self._held is None or self._held[0] != key:
            wanted = [(task, stage.context, n) for task in TASKS for n in range(stage.first, stage.last)]
            if self._pool is None:
                made = [self.source.example(task, "test", length, n) for task, length, n in wanted]
            else:
                made = self._pool.map(_make, wanted, chunksize=16)
            count = stage.last - stage.first
            self._held = key, {task: made[n * count : (n + 1) * count] for n, task in enumerate(TASKS)}
        return self._held[1]

    def hidden(self, stage: Stage) -> dict[str, dict[str, str]]:
        """Per task and range of items, the number of needles that have to be selected, one digit an item."""
        span = f"{stage.first}-{stage.last}"
        counts = {
            task: "".join(str(hidden_needles(one, stage.chunk)) for one in its)
            for task, its in self.examples(stage).items()
            if task in NEEDLE_TASKS
        }
        return {span: counts}

    def probes(self, stage: Stage) -> dict[str, list[np.ndarray]]:
        """Windows of the stage's context by kind: held-out text and each task, which take turns until there are enough.

        A kind that has run out of windows is passed over.
        """
        kinds = {task: [one.window for one in its] for task, its in self.examples(stage).items()}
        rounds = -(-stage.probes // (len(kinds) + 1))
        text = heldout_windows(self.source.streams["test"], stage.context, rounds)[:, :-1]
        kinds = {TEXT: list(text), **kinds}
        turns = [(kind, its[n]) for n in range(rounds) for kind, its in kinds.items() if n < len(its)][: stage.probes]
        taken: dict[str, list[np.ndarray]] = {}
        for kind, window in turns:
            taken.setdefault(kind, []).append(window)
        return taken


_source: TaskSource | None = None  # of a worker process


def _set_source(source: TaskSource) -> None:
    global _source
    _source = source


def _make(wanted: tuple[str, int, int]) -> Example:
    task, length, index = wanted
    assert _source is not None
    return _source.example(task, "test", length, index)
