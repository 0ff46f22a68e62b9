"""What only the CPU backend promises: threads do not change results, and memory does not grow with length.

That it computes the right thing is tested with all other backends in test_laws, test_selection and test_attention.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compactattn import BlockTable, Dense, FlashPrefill, PagedKV, PrefillBatch, attend, prefill, select_table
from compactattn._numba import jit
from compactattn._numba.threads import run_each
from tests.strategies import Geometry, Step, make_step

GEOMETRIES = [
    Geometry((130, 0, 1), (1517, 400, 700), kv_heads=2, group=4, dim=96, heads_per_group=4, layout="padded"),
    Geometry((300,), (2111,), group=5, dim=128, page_size=256, block_size=128, query_block=128, span=1, layout="HND"),
    Geometry((257, 64), (257, 3000), kv_heads=2, group=2, heads_per_group=2, span=2, dtype=torch.bfloat16),
]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sparse(step: Step) -> tuple[BlockTable, Tensor, Tensor]:
    g = step.geometry
    selector = FlashPrefill(alpha=0.3, block_size=g.block_size, query_block=g.query_block)
    table = select_table(step.q, step.kv, step.batch, selector=selector, **g.grouping)
    out, lse = prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **g.grouping)
    return table, out[: step.rows], lse[: step.rows]


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("g", GEOMETRIES, ids=str)
def test_thread_counts_agree(g: Geometry) -> None:
    """Bit for bit: a task is never cut by the number of threads."""
    step = make_step(g, "cpu", coherent=True)
    torch.set_num_threads(1)
    table, *alone = sparse(step)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        other, *together = sparse(step)
        assert torch.equal(table.indices, other.indices)
        assert torch.equal(table.counts, other.counts)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.usefixtures("restored_threads")
def test_thread_counts_agree_on_windows() -> None:
    """Nor do windows shift the runs of keys, although they begin elsewhere in every task."""
    step = make_step(Geometry((260,), (9000,), group=4), "cpu")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        selector = Dense(block_size=64, query_block=64)
        results.append(prefill(step.q, step.kv, step.batch, selector=selector, heads_per_group=1, window=8000))
    for other in results[1:]:
        assert torch.equal(results[0][: step.rows], other[: step.rows])


@pytest.mark.usefixtures("restored_threads")
def test_threads_leave_nothing_behind() -> None:
    """Neither threads nor torch's settings, here and for threads to come; an error in a task arrives here."""
    torch.set_num_threads(2)
    before = threading.active_count()
    sparse(make_step(GEOMETRIES[0], "cpu"))
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *seen] == [2, 2]
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        run_each([lambda: None, lambda: 1 // 0, lambda: None])


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes_hold_in_threads(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """Gradients are switched off thread by thread: a model's parameters may require them."""
    torch.set_num_threads(2)
    step = make_step(GEOMETRIES[0], "cpu")
    expected = sparse(step)[1]
    with mode():
        step.q.requires_grad_()
        assert torch.equal(sparse(step)[1], expected)


def test_concurrent_calls_agree() -> None:
    """The inspector serves each of its readers on a thread."""
    step = make_step(GEOMETRIES[0], "cpu", coherent=True)
    expected = sparse(step)[1:]
    results: list[tuple[Tensor, Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(sparse(step)[1:])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


class LiveMemory(TorchDispatchMode):
    """Bytes that operators allocated and nobody has freed yet; `peak` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return result


@pytest.mark.parametrize(
    ("q_len", "seq_len", "blocks"), [(1, 131_072, 1024), (128, 131_072, 1024), (20_000, 20_000, 4)], ids=str
)
def test_attend_memory_does_not_grow_with_length(q_len: int, seq_len: int, blocks: int) -> None:
    """Keys and values of 131,072 tokens in float32 would take 64 MiB, queries and results of 20,000 rows 39 MiB."""
    k = torch.zeros(1, seq_len, 1, 64, dtype=torch.float16)
    kv, q = PagedKV.from_contiguous(k, k, 16), torch.zeros(q_len, 4, 64, dtype=torch.float16)
    batch = PrefillBatch.from_lens([q_len], [seq_len])
    indices = torch.arange(batch.kv_blocks(128), dtype=torch.int32)[None]
    counts = torch.tensor([blocks], dtype=torch.int32)
    table = BlockTable(indices, counts, torch.zeros(1, 4, batch.query_blocks(128), dtype=torch.int32), 128, 128)
    out = torch.empty_like(q)
    with LiveMemory() as memory:
        attend(q, kv, batch, table, out=out)
    assert memory.peak < 16 << 20


def test_kernels_compile_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses `cache=True` when it finds no place for its files, as in a read-only image without a home."""
    compile_loop = numba.njit

    def refuse_cache(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_loop(*args, **options)

    monkeypatch.setattr(jit.numba, "njit", refuse_cache)

    @jit.kernel
    def total(values: np.ndarray) -> float:
        result = 0.0
        for value in values:
            result += value
        return result

    assert total(np.arange(5.0)) == 10.0
