"""What attention reads of the past, counted on the device: for a server to export, without a synchronisation.

counters = DensityCounters.zeros(layers=32, device="cuda")
prefill(q, kv, batch, ..., density=counters.of_layer(7))  # in every step, in CUDA graphs too
counters.densities()  # now and then: this reads the device
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compactattn import operators
from compactattn.data import BlockTable, PrefillBatch
from compactattn.dispatch import Backend, resolve_backend
from compactattn.validation import (
    check_device,
    check_int,
    check_record,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)


@dataclass(frozen=True, eq=False)
class DensityCounters:
    """Running counts of past KV blocks, a pair for each layer.

    Every (query head, query block) counts the past blocks of the list that it walks, and the past blocks that it could
    have walked: what `compactattn.quality.density_cascade` calls `sub_group_union` and `visible`.

    Attributes:
        counts: int64 [layers, 2]; blocks read, blocks visible.
    """

    counts: Tensor

    def __post_init__(self) -> None:
        check_tensor("counts", self.counts, ndim=2, dtype=torch.int64)
        check_shape("counts", self.counts, (self.counts.shape[0], 2), "read and visible blocks of each layer")
        if not self.counts.is_contiguous():
            raise fail("counts", "a contiguous tensor", f"strides {self.counts.stride()}")

    @classmethod
    def zeros(cls, layers: int, device: torch.device | str = "cpu") -> DensityCounters:
        """Counters of so many layers that have counted nothing.

        Raises:
            ValueError: no positive number of layers, or a device that is not here.
        """
        check_int("layers", layers, 1)
        return cls(torch.zeros((layers, 2), dtype=torch.int64, device=check_device("device", device)))

    def of_layer(self, layer: int) -> Tensor:
        """int64 [2], the counters of one layer: what `prefill(density=...)` and `count_density` add to."""
        check_int("layer", layer, 0)
        if layer >= self.counts.shape[0]:
            raise fail("layer", f"a layer below {self.counts.shape[0]}", layer)
        return self.counts[layer]

    def densities(self) -> list[float]:
        """Blocks read ÷ blocks visible of each layer, from 0 to 1; NaN where there was no past yet. Synchronises."""
        return [read / visible if visible else math.nan for read, visible in self.counts.tolist()]


def count_density(
    table: BlockTable,
    batch: PrefillBatch,
    counter: Tensor,
    *,
    window: int | None = None,
    backend: str | None = None,
) -> None:
    """Add what attention under a table reads of the past, and what it could read, to a layer's counters.

    Args:
        table: the block table of a step.
        batch: the lengths of the step.
        counter: int64 [2] on the table's device, added to in place: past blocks that the (query head, query block)
            pairs read, and past blocks that they see.
        window: the sliding window that `attend` is given, or None: a block that lies before the window of each of
            a query block's rows is neither read nor seen.
        backend: None (by device), "triton" or "numba".

    Raises:
        ValueError: wrong shape, dtype or device, or a backend that cannot run, before anything runs.
    """
    if torch.compiler.is_compiling():
        how = {"counter": counter, "window": window, "backend": backend}
        operators.call("count_density", table=table, batch=batch, **how)
        return
    check_record("table", table, "BlockTable")
    check_record("batch", batch, "PrefillBatch")
    check_rows("table", table, table.rows.shape[1], batch)
    if window is not None:
        check_int("window", window, 1)
    check_counter("counter", counter, table.rows.device)
    run_count(table, batch, counter, window, resolve_backend(backend, table.rows.device))


def check_counter(name: str, counter: Tensor, device: torch.device) -> None:
    check_tensor(name, counter, ndim=1, dtype=torch.int64)
    check_shape(name, counter, (2,), "read and visible blocks")
    check_same_device(name, counter, device)
    if not counter.is_contiguous():
        raise fail(name, "a contiguous tensor", f"strides {counter.stride()}")


def run_count(table: BlockTable, batch: PrefillBatch, counter: Tensor, window: int | None, backend: Backend) -> None:
    """`count_density` after its checks."""
    if backend == "triton":
        from compactattn._triton.density import count_density as run
    else:
        from compactattn._numba.density import count_density as run
    run(table, batch, counter, window)
