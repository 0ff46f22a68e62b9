"""Threads of the CPU backend: each takes whole tasks, and computes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_starting = threading.Lock()


def run_each(tasks: Sequence[Callable[[], None]]) -> None:
    """Run independent tasks on as many threads as torch would use here, every operator on a single one.

    Operators that split themselves up meet at a barrier, thousands of times in a step: where somebody else wants a
    core too, each meeting waits for the scheduler, and the step takes thirty times as long. Tasks meet once. The
    threads end with the call, so that none is lost in a fork. Two tasks or more round alike for any number of threads;
    a single one runs in the caller's thread, its operators on all of torch's, whose number may change its rounding.
    """
    with _starting:  # while threads start, others would be told that torch uses one
        threads = torch.get_num_threads()
        workers = min(threads, len(tasks))
        if workers > 1:
            ready = threading.Barrier(workers + 1)
            pool = ThreadPoolExecutor(workers, initializer=_compute_alone, initargs=(ready,))
            running = [pool.submit(_without_gradients, task, torch.is_inference_mode_enabled()) for task in tasks]
            ready.wait()
            torch.set_num_threads(threads)  # which says so to threads yet to come; the workers keep to one
    if workers > 1:
        with pool:
            for future in running:
                future.result()
    else:
        for task in tasks:
            task()


def _compute_alone(ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets its number from the process's, so ask before setting it
    torch.set_num_threads(1)
    ready.wait()


def _without_gradients(task: Callable[[], None], inference: bool) -> None:
    """Run a task in the caller's mode; modes belong to threads."""
    with torch.inference_mode(inference), torch.no_grad():
        task()
