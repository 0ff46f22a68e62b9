"""A replay launches what the same call would have launched anew: the library's own host code, kernels that take notes.

What the kernels compute then is compared on a GPU (`test_gpu_replay`).
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactattn import (
    BlockTable,
    FlashPrefill,
    KeyBounds,
    PagedKV,
    PrefillBatch,
    _triton,
    attention,
    pipeline,
    summarize,
)
from compactattn._triton import replay
from compactattn._triton.launch import recorder

PAGE, HEADS, KV_HEADS, DIM = 128, 4, 2, 64
LENGTHS = (([40, 3], [300, 130]), ([17, 1], [512, 40]), ([0, 60], [200, 60]))

Noted = tuple[Any, tuple[int, ...], tuple[Any, ...]]


class Compiled:
    """A kernel with its constants; notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list[Noted]) -> None:
        self.log = log

    def run(self, x: int, y: int, z: int, *more: Any) -> None:
        assert more[1:6] == ("function", "metadata", None, None, None)
        self.log.append((self, (x, y, z), more[6:]))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """Every launch of the Triton backend, in order; nothing is launched."""
    found: list[Noted] = []
    compiled: dict[Any, Compiled] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: dict[str, Any], **_: Any) -> None:
        own, whole = (*args, *constants.values()), (*grid, 1, 1)[:3]
        one = compiled.setdefault((id(kernel), *constants.items()), Compiled(found))
        found.append((one, whole, own))
        if recorder.launches is not None:
            recorder.launches.append((one, whole, own))

    for info in pkgutil.iter_modules(_triton.__path__):
        module = importlib.import_module(f"compactattn._triton.{info.name}")
        if info.name != "launch" and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(replay, "INTERPRETED", False)
    monkeypatch.setattr(replay, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 9)))
    monkeypatch.setattr(replay, "_recordings", {})
    return found


@pytest.fixture(params=[True, False], ids=["Hopper", "general"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        for name in ("attention", "scores"):
            module = importlib.import_module(f"compactattn._triton.{name}")
            monkeypatch.setattr(module, "why_not_hopper", lambda *_: None)
    return request.param


def make_step(n: int) -> tuple[Tensor, PagedKV, PrefillBatch]:
    """The n-th of several steps of one kind."""
    generator = torch.Generator().manual_seed(n)
    k, v = torch.randn(2, 12, PAGE, KV_HEADS, DIM, generator=generator).half()
    pages = torch.randperm(12, generator=generator)[:8].view(2, 4).int()
    q = torch.randn(64, HEADS, DIM, generator=generator).half()
    batch = replace(PrefillBatch.from_lens(*LENGTHS[n]), max_q_len=64, max_seq_len=512)
    return q, PagedKV(k, v, pages), batch


def make_table(n: int) -> BlockTable:
    counts = torch.tensor([4, 1, 2 + n % 2, 4], dtype=torch.int32)
    rows = torch.arange(8, dtype=torch.int32).remainder(4).view(2, HEADS, 1)
    return BlockTable(torch.arange(4, dtype=torch.int32).repeat(4, 1), counts, rows, 128, 128)


class Places:
    """What stands for what in two runs of one call: inputs for themselves, other memory for other memory."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.bases: dict[int, tuple[int, int]] = {}

    def check(self, fresh: Tensor, address: int) -> None:
        storage = fresh.untyped_storage()
        start = storage.data_ptr()
        if start in self.inputs:
            assert address == fresh.data_ptr()
        else:
            base = address - (fresh.data_ptr() - start)
            assert self.bases.setdefault(start, (base, storage.nbytes()))[0] == base

    def check_apart(self) -> None:
        stretches = sorted(self.bases.values())
        for (base, size), (after, _) in itertools.pairwise(stretches):
            assert base + size <= after


def check_argument(fresh: Any, again: Any, places: Places) -> None:
    if isinstance(fresh, Tensor):
        assert type(again) is int
        places.check(fresh, again)
    elif hasattr(fresh, "block_shape"):
        assert type(fresh) is type(again)
        ours, theirs = ({**vars(one), "base": None} for one in (fresh, again))
        assert ours == theirs
        places.check(fresh.base, again.base.data_ptr())
    else:
        assert (type(fresh), repr(fresh)) == (type(again), repr(again))


def check_launches(call: Callable[[int], tuple[Any, list[Tensor]]], log: list[Noted]) -> None:
    """`call(n)`: the result of the n-th of several calls of one kind, and its inputs."""
    call(0)
    (kept,) = replay._recordings.values()
    assert len(kept.recording.launches) == len(log) > 0
    for n in (1, 2):
        replay._recordings.clear()
        log.clear()
        fresh, _ = call(n)
        anew = log.copy()
        replay._recordings.clear()
        call(0)
        log.clear()
        result, inputs = call(n)
        assert len(replay._recordings) == 1
        places = Places(inputs)
        assert [noted[:2] for noted in log] == [noted[:2] for noted in anew]
        for (_, _, ours), (_, _, theirs) in zip(anew, log, strict=True):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                check_argument(one, other, places)
        for one, other in zip(tensors_of(fresh), tensors_of(result), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            places.check(one, other.data_ptr())
        places.check_apart()


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, BlockTable):
        return [result.indices, result.counts, result.rows]
    return list(result) if isinstance(result, tuple) else [result]


STEPS = [make_step(n) for n in range(3)]


@pytest.mark.parametrize("given", [False, True], ids=["new out", "given out"])
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
def test_attention(lse: bool, given: bool, hopper: bool, log: list[Noted]) -> None:
    tables, outs = [make_table(n) for n in range(3)], [torch.empty_like(STEPS[0][0]) for _ in range(3)]

    def call(n: int) -> tuple[Any, list[Tensor]]:
        q, kv, batch = STEPS[n]
        out, table = outs[n] if given else None, tables[n]
        result = replay.attend(attention._attend, q, kv, batch, table, None, lse, out, "triton")
        inputs = [q, kv.k, kv.v, kv.page_table, batch.cu_seqlens_q, batch.seq_lens]
        inputs += [table.indices, table.counts, table.rows, *([outs[n]] if given else [])]
        return result, inputs

    check_launches(call, log)
    names = {noted[0] for noted in log}
    assert len(names) == (3 if hopper else 1)


@pytest.mark.parametrize("tables_alone", [False, True], ids=["prefill", "select_table"])
@pytest.mark.parametrize("with_summary", [False, True], ids=["pooled", "summary"])
@pytest.mark.parametrize("grouping", [(1, 1), (2, None), ("auto", "auto")], ids=str)
@pytest.mark.parametrize("selector", [FlashPrefill(), KeyBounds()], ids=["means", "bounds"])
def test_steps(
    selector: Any, grouping: Any, with_summary: bool, tables_alone: bool, hopper: bool, log: list[Noted]
) -> None:
    how = {"block_size": 128, "bounds": isinstance(selector, KeyBounds), "backend": "numba"}
    summaries = [summarize(kv, batch, **how) for _, kv, batch in STEPS]

    def call(n: int) -> tuple[Any, list[Tensor]]:
        q, kv, batch = STEPS[n]
        summary = summaries[n] if with_summary else None
        arguments = (q, kv, batch, selector, *grouping, None, summary)
        if tables_alone:
            result = replay.select_table(pipeline._select_table, *arguments, "triton")
        else:
            result = replay.prefill(pipeline._prefill, *arguments, False, False, None, "triton")
        inputs = [q, kv.k, kv.v, kv.page_table, batch.cu_seqlens_q, batch.seq_lens]
        inputs += [one for one in vars(summaries[n]).values() if isinstance(one, Tensor)] if with_summary else []
        return result, inputs

    check_launches(call, log)
