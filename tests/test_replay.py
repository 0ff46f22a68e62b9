"""A step launched again: the right addresses in the right places, and only for steps of the same kind.

What a replayed step computes is compared on a GPU (`test_gpu.test_a_step_again`); here kernels only note what they get.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compactattn import BlockTable, Dense, FlashPrefill, KeyBounds, KVSummary, PagedKV, PrefillBatch, summarize
from compactattn._triton import replay
from compactattn._triton.launch import recorder
from compactattn._triton.recording import ALIGNMENT, Recording
from compactattn._triton.replay import kind_of_attention, kind_of_step
from compactattn.validation import check_out, memory_bytes

CPU = torch.device("cpu")


@dataclass
class Descriptor:
    base: Any
    block_shape: list[int]


class Kernel:
    """Notes its last launch, by either of the two ways that Triton's compiled kernels have."""

    function, packed_metadata = "function", "metadata"

    def run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *args: object) -> None:
        assert (function, metadata, *args[:3]) == ("function", "metadata", None, None, None)
        self.grid, self.stream, self.args, self.hooked = (x, y, z), stream, args[3:], False

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*args: object, stream: int) -> None:
            self.grid, self.stream, self.args, self.hooked = grid, stream, args, True

        return launch


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_addresses() -> None:
    """Inputs give their own addresses, results are new, what the step allocated lies apart in one scratch."""
    inputs, results = [torch.zeros(5), torch.zeros(7, dtype=torch.int32)], [torch.zeros(2, 3, dtype=torch.int64)]
    whole, other = torch.zeros(100), torch.zeros(3, dtype=torch.float16)
    front, back = whole[:60], whole[60:]
    first, second, third = Kernel(), Kernel(), Kernel()
    launches = [
        (first, (1, 2, 3), (inputs[0], 3, front, 0.5, other)),
        (second, (4, 5, 6), (back, inputs[1], Descriptor(inputs[0], [16]), True, inputs[0], results[0])),
        (third, (7, 8, 9), (Descriptor(whole.view(10, 10)[6:], [5]), other)),
    ]
    recording = Recording(inputs, results, launches)
    del launches
    again = [torch.ones(5), torch.ones(7, dtype=torch.int32)]
    (result,) = recording.replay(addresses(again), CPU, 42)
    q, three, front_at, half, other_at = first.args
    back_at, table, descriptor, true, q_again, result_at = second.args
    of_scratch, other_again = third.args
    assert (first.stream, second.stream) == (42, 42)
    assert (first.grid, second.grid) == ((1, 2, 3), (4, 5, 6))
    assert (q, table, q_again) == (again[0].data_ptr(), again[1].data_ptr(), again[0].data_ptr())
    assert (result.shape, result.dtype) == ((2, 3), torch.int64)
    assert result_at == result.data_ptr() != results[0].data_ptr()
    assert (three, half, true) == (3, 0.5, True)
    assert isinstance(descriptor, Descriptor)
    assert descriptor.base.data_ptr() == again[0].data_ptr()
    assert descriptor.block_shape == [16]
    assert back_at - front_at == 60 * 4  # of one tensor
    assert isinstance(of_scratch, Descriptor)
    assert (of_scratch.base.data_ptr(), of_scratch.block_shape) == (back_at, [5])
    assert other_again == other_at
    scratch = sorted((front_at, other_at))
    assert scratch[1] - scratch[0] == ALIGNMENT * 2  # 400 bytes, then 6
    assert recording.scratch_bytes == ALIGNMENT * 3


def test_constants_keep_their_types() -> None:
    """Numbers that are equal are not the same argument: True, 1 and 1.0, or the two zeros."""
    kernel, constants = Kernel(), (1, True, 1.0, 0.0, -0.0, None, 1 << 40, (1, 4), "x", 0, False)
    Recording([], [], [(kernel, (1, 1, 1), constants)]).replay([], CPU, 1)
    assert repr(kernel.args) == repr(constants)


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_of_triton(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that hooks into Triton's launches sees replayed ones, too."""
    from triton import knobs

    kernel, q = Kernel(), torch.zeros(3)
    recording = Recording([q], [], [(kernel, (1, 2, 1), (q, 7))])
    if hooked:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda _: None)
    recording.replay([q.data_ptr()], CPU, 5)
    assert (kernel.hooked, kernel.grid, kernel.stream) == (hooked, (1, 2, 1), 5)
    assert kernel.args == (q.data_ptr(), 7)


def test_nothing_is_kept_alive() -> None:
    """A recording holds no tensor: neither the caller's cache nor the step's results and scratch."""
    inputs, results, scratch = [torch.zeros(5)], [torch.zeros(6)], torch.zeros(8)
    args = (inputs[0], results[0], scratch, Descriptor(inputs[0], [16]), Descriptor(scratch, [8]))
    recording = Recording(inputs, results, [(Kernel(), (1, 1, 1), args)])
    alive = [weakref.ref(tensor) for tensor in (*inputs, *results, scratch)]
    del inputs, results, scratch, args
    assert [one() for one in alive] == [None] * 3
    assert len(recording.launches) == 1


def test_a_view_of_an_input_is_refused() -> None:
    """Its address follows from an input's, which a replay does not know."""
    inputs = [torch.zeros(5)]
    with pytest.raises(RuntimeError, match="view of an input"):
        Recording(inputs, [], [(Kernel(), (1, 1, 1), (inputs[0][1:],))])


def test_threads_replay_one_recording_at_once() -> None:
    """Nothing of a replay is shared: each launch gets the addresses and the stream of its own thread."""
    inputs, scratch, wrong = [torch.zeros(5), torch.zeros(5)], torch.zeros(8), []
    turn = threading.Barrier(3)

    class Careful(Kernel):
        def run(self, x: int, y: int, z: int, stream: int, *args: Any) -> None:
            q, k, descriptor, at = args[5:]
            n = int(threading.current_thread().name)
            if (stream, q, k, descriptor.base.data_ptr()) != (n, n * 1000, n * 1000 + 1, q) or at == q:
                wrong.append((n, stream, q, k))
            turn.wait(10)  # for the others, between two launches

    args = (inputs[0], inputs[1], Descriptor(inputs[0], [16]), scratch)
    recording = Recording(inputs, [], [(Careful(), (1, 1, 1), args)] * 5)

    def work(stream: int) -> None:
        for _ in range(10):
            recording.replay([stream * 1000, stream * 1000 + 1], CPU, stream)

    threads = [threading.Thread(target=work, args=(n,), name=str(n)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SELECTOR = FlashPrefill()


@dataclass(frozen=True)
class Step:
    q: torch.Tensor
    kv: PagedKV
    batch: PrefillBatch
    selector: Any = SELECTOR
    heads_per_group: Any = 1
    query_blocks_per_span: Any = None
    scale: Any = None
    summary: KVSummary | None = None
    correction: Any = False
    return_lse: Any = False
    out: torch.Tensor | None = None
    backend: str | None = None

    def kind(self) -> Any:
        found = kind_of_step(**vars(self))
        return found and found.key


def make_step(**changes: Any) -> Step:
    kv = PagedKV(*torch.zeros(2, 4, 16, 2, 64), torch.arange(4, dtype=torch.int32)[None])
    return replace(Step(torch.zeros(20, 4, 64), kv, PrefillBatch.from_lens([20], [60])), **changes)


def with_cache(**changes: Any) -> Step:
    step = make_step()
    return replace(step, kv=replace(step.kv, **changes))


def summary_of(step: Step, values: bool, bounds: bool = False) -> KVSummary:
    return summarize(step.kv, step.batch, block_size=128, values=values, bounds=bounds)


OTHER_KINDS = {
    "rows of q": lambda: make_step(q=torch.zeros(21, 4, 64)),
    "strides of q": lambda: make_step(q=torch.zeros(4, 20, 64).transpose(0, 1)),
    "dtype of q": lambda: make_step(q=torch.zeros(20, 4, 64, dtype=torch.float16)),
    "alignment of q": lambda: make_step(q=torch.zeros(20 * 4 * 64 + 1)[1:].view(20, 4, 64)),
    "pages": lambda: with_cache(k=torch.zeros(5, 16, 2, 64), v=torch.zeros(5, 16, 2, 64)),
    "strides of v": lambda: with_cache(v=torch.zeros(4, 2, 16, 64).transpose(1, 2)),
    "width of the page table": lambda: with_cache(page_table=torch.zeros(1, 9, dtype=torch.int32)),
    "requests": lambda: make_step(batch=PrefillBatch.from_lens([10, 10], [60, 60])),
    "longest chunk": lambda: make_step(batch=replace(make_step().batch, max_q_len=21)),
    "longest sequence": lambda: make_step(batch=replace(make_step().batch, max_seq_len=61)),
    "prompts": lambda: make_step(batch=PrefillBatch.from_lens([20], [60], prompt_lens=[60])),
    "selector": lambda: make_step(selector=FlashPrefill(alpha=0.5)),
    "KeyBounds": lambda: make_step(selector=KeyBounds(FlashPrefill().alpha)),
    "heads": lambda: make_step(heads_per_group=2),
    "heads that choose": lambda: make_step(heads_per_group="auto"),
    "span": lambda: make_step(query_blocks_per_span=1),
    "scale": lambda: make_step(scale=0.5),
    "lse": lambda: make_step(return_lse=True),
    "out": lambda: make_step(out=torch.zeros(20, 4, 64)),
    "strides of out": lambda: make_step(out=torch.zeros(4, 20, 64).transpose(0, 1)),
    "summary": lambda: make_step(summary=summary_of(make_step(), False)),
    "summary with values": lambda: make_step(summary=summary_of(make_step(), True)),
    "summary with bounds": lambda: make_step(summary=summary_of(make_step(), False, True)),
}


def test_kinds() -> None:
    """Whatever may change a launch makes another kind of step; other addresses, lengths and contents do not."""
    kinds = {name: make().kind() for name, make in OTHER_KINDS.items()}
    assert None not in kinds.values()
    kinds["the first"] = make_step().kind()
    assert len(set(kinds.values())) == len(kinds)
    for name, make in OTHER_KINDS.items():
        assert make().kind() == kinds[name], name
    shorter = replace(PrefillBatch.from_lens([3], [40]), max_q_len=20, max_seq_len=60)
    assert make_step(batch=shorter, q=torch.ones(20, 4, 64)).kind() == kinds["the first"]


@pytest.mark.parametrize("present", [(), ("values",), ("bounds",), ("values", "bounds")], ids=str)
def test_every_tensor_of_a_summary_is_an_input(present: tuple[str, ...]) -> None:
    """What a step brings up to date must be the caller's at every replay, never the first step's or scratch."""
    step = make_step()
    summary = summary_of(step, "values" in present, "bounds" in present)
    held = [tensor for tensor in vars(summary).values() if isinstance(tensor, torch.Tensor)]
    assert len(held) == 1 + len(present)
    kind = kind_of_step(**vars(replace(step, summary=summary)))
    assert kind is not None
    assert {id(tensor) for tensor in held} <= {id(tensor) for tensor in kind.inputs}


@dataclass(frozen=True)
class Attention:
    q: torch.Tensor
    kv: PagedKV
    batch: PrefillBatch
    table: BlockTable
    scale: Any = None
    return_lse: Any = False
    out: torch.Tensor | None = None
    backend: str | None = None

    def kind(self) -> Any:
        found = kind_of_attention(**vars(self))
        return found and found.key


def table_of(rows: int = 4, **sizes: int) -> BlockTable:
    indices, counts = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    names = {"block_size": 128, "query_block": 128} | sizes
    return BlockTable(indices, counts, torch.arange(4, dtype=torch.int32).view(1, 4, 1), **names)


def make_attention(**changes: Any) -> Attention:
    step = make_step()
    return replace(Attention(step.q, step.kv, step.batch, table_of()), **changes)


OTHER_ATTENTION = {
    "rows of q": lambda: make_attention(q=torch.zeros(21, 4, 64)),
    "strides of q": lambda: make_attention(q=torch.zeros(4, 20, 64).transpose(0, 1)),
    "dtype of q": lambda: make_attention(q=torch.zeros(20, 4, 64, dtype=torch.float16)),
    "pages": lambda: make_attention(kv=with_cache(k=torch.zeros(5, 16, 2, 64), v=torch.zeros(5, 16, 2, 64)).kv),
    "width of the page table": lambda: make_attention(kv=with_cache(page_table=torch.zeros(1, 9).int()).kv),
    "requests": lambda: make_attention(batch=PrefillBatch.from_lens([10, 10], [60, 60])),
    "longest chunk": lambda: make_attention(batch=replace(make_step().batch, max_q_len=21)),
    "longest sequence": lambda: make_attention(batch=replace(make_step().batch, max_seq_len=61)),
    "rows of the table": lambda: make_attention(table=table_of(5)),
    "block size": lambda: make_attention(table=table_of(block_size=64)),
    "query block": lambda: make_attention(table=table_of(query_block=64)),
    "alignment of counts": lambda: make_attention(table=replace(table_of(), counts=torch.ones(5).int()[1:])),
    "scale": lambda: make_attention(scale=0.5),
    "lse": lambda: make_attention(return_lse=True),
    "out": lambda: make_attention(out=torch.zeros(20, 4, 64)),
    "strides of out": lambda: make_attention(out=torch.zeros(4, 20, 64).transpose(0, 1)),
}


def test_kinds_of_attention() -> None:
    """As of steps; the lengths of prompts, which attention does not read, make no other kind."""
    kinds = {name: make().kind() for name, make in OTHER_ATTENTION.items()}
    assert None not in kinds.values()
    kinds |= {"the first": make_attention().kind(), "a step": make_step().kind()}
    assert len(set(kinds.values())) == len(kinds)
    for name, make in OTHER_ATTENTION.items():
        assert make().kind() == kinds[name], name
    shorter = replace(PrefillBatch.from_lens([3], [40], prompt_lens=[50]), max_q_len=20, max_seq_len=60)
    assert make_attention(batch=shorter, q=torch.ones(20, 4, 64)).kind() == kinds["the first"]


@pytest.mark.parametrize(
    "changes",
    [
        {"table": "table"},
        {"kv": "cache"},
        {"batch": "batch"},
        {"return_lse": 1},
        {"scale": torch.tensor(0.5)},
        {"backend": "numba"},
        {"out": "result"},
        {"q": torch.zeros(20, 4, 64, requires_grad=True)},
    ],
    ids=str,
)
def test_attention_that_always_runs_anew(changes: dict[str, Any]) -> None:
    assert make_attention(**changes).kind() is None
    assert make_attention(kv=fp8_cache()).kind() is None
    q = torch.zeros(20, 4, 64)
    assert make_attention(q=q, out=q).kind() is None


def fp8_cache() -> PagedKV:
    """The cache of `make_step` with scales, which a recording would not know."""
    k, v = torch.zeros(2, 4, 16, 2, 64).to(torch.float8_e4m3fn)
    return PagedKV(k, v, torch.arange(4, dtype=torch.int32)[None], torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"selector": Dense()},
        {"correction": True},
        {"heads_per_group": True},
        {"heads_per_group": 1.0},
        {"query_blocks_per_span": 2.0},
        {"return_lse": 1},
        {"scale": torch.tensor(0.5)},
        {"backend": "numba"},
        {"kv": "cache"},
        {"out": "result"},
        {"kv": fp8_cache()},
        {"q": torch.zeros(20, 4, 64, requires_grad=True)},
    ],
    ids=str,
)
def test_always_run_anew(changes: dict[str, Any]) -> None:
    """Steps with kernels outside `launch`, and arguments that the checks must see."""
    assert make_step(**changes).kind() is None


def test_one_tensor_in_two_roles() -> None:
    """Where two inputs are one object, the launches do not tell which of them they mean."""
    step = make_step()
    assert replace(step, kv=replace(step.kv, v=step.kv.k)).kind() is None


def stretched(tensor: torch.Tensor) -> None:
    tensor.as_strided_(tensor.shape, (2 * tensor.stride(0), *tensor.stride()[1:]))


IN_PLACE: dict[str, Callable[[torch.Tensor], object]] = {
    "resized": lambda tensor: tensor.resize_(tensor.shape[0] - 1, *tensor.shape[1:]),
    "given other strides": stretched,
    "given other data": lambda tensor: setattr(tensor, "data", torch.zeros(tensor.shape, dtype=torch.float64)),
    "moved by one element": lambda tensor: tensor.set_(tensor.untyped_storage(), 1, tensor.shape, tensor.stride()),
}


@pytest.mark.parametrize("name", ["q", "k", "v", "page_table", "cu_seqlens_q", "seq_lens", "k_mean", "v_mean", "out"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_a_tensor_changed_in_place_is_another_kind(name: str, how: str) -> None:
    """What a record was checked for when it was made may hold no more, and nothing is remembered of it."""
    step = make_step(summary=summary_of(make_step(), True), out=torch.zeros(20, 4, 64))
    for holder in (step, step.kv, step.batch, step.summary):
        if hasattr(holder, name):
            tensor = getattr(holder, name)
            spare = torch.zeros(2 * tensor.numel() + 1, dtype=tensor.dtype)
            tensor.set_(spare.untyped_storage(), 0, tensor.shape, tensor.stride())
    before = step.kind()
    assert step.kind() == before
    IN_PLACE[how](tensor)
    assert step.kind() not in (None, before)


@pytest.mark.parametrize("name", ["indices", "counts", "rows"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_a_table_changed_in_place_is_another_kind(name: str, how: str) -> None:
    call = make_attention()
    tensor = getattr(call.table, name)
    tensor.set_(torch.zeros(2 * tensor.numel() + 1, dtype=torch.int32).untyped_storage(), 0, tensor.shape)
    before = call.kind()
    assert call.kind() == before
    IN_PLACE[how](tensor)
    assert call.kind() not in (None, before)


# ---- whole steps, with kernels that only take notes ----


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand for the stages: they count their runs, and launch one kernel on q and on what they return."""
    monkeypatch.setattr(replay, "INTERPRETED", False)
    monkeypatch.setattr(replay, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 9)))
    monkeypatch.setattr(replay, "_recordings", {})
    return Stages()


class Stages:
    def __init__(self) -> None:
        self.ran, self.kernel = 0, Kernel()

    def _launch(self, q: torch.Tensor, *results: torch.Tensor) -> None:
        self.ran += 1
        assert recorder.launches is not None
        recorder.launches.append((self.kernel, (1, 1, 1), (q, *results)))
        self.kernel.run(1, 1, 1, 9, "function", "metadata", None, None, None, *addresses([q, *results]))

    def prefill(self, q: torch.Tensor, *arguments: Any) -> Any:
        return_lse, out, _ = arguments[-3:]
        out = torch.empty_like(q) if out is None else out
        lse = [torch.empty(q.shape[:2])] if return_lse else []
        self._launch(q, out, *lse)
        return (out, *lse) if return_lse else out

    def select_table(self, q: torch.Tensor, *arguments: Any) -> BlockTable:
        table = [torch.zeros(shape, dtype=torch.int32) for shape in ((4, 1), (4,), (1, 4, 1))]
        self._launch(q, *table)
        return BlockTable(*table, SELECTOR.block_size, SELECTOR.query_block)

    def attend(self, q: torch.Tensor, kv: Any, batch: Any, table: BlockTable, *arguments: Any) -> Any:
        out = arguments[-2]
        self._launch(table.counts, out)
        return out

    def attention(self, call: Attention) -> Any:
        return replay.attend(self.attend, *vars(call).values())

    def run(self, step: Step) -> Any:
        return replay.prefill(self.prefill, *vars(step).values())

    def table(self, step: Step) -> BlockTable:
        return replay.select_table(self.select_table, *list(vars(step).values())[:8], step.backend)


@pytest.mark.parametrize("given", [False, True], ids=["new out", "given out"])
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "lse"])
def test_a_step_runs_once_and_is_replayed(stages: Any, return_lse: bool, given: bool) -> None:
    """A second step returns what its own launches wrote: results of the same form, new unless they were given."""
    seen = []
    for _ in range(3):
        out = torch.zeros(20, 4, 64) if given else None
        step = make_step(return_lse=return_lse, out=out)
        result = stages.run(step)
        parts = result if return_lse else (result,)
        assert isinstance(result, tuple) == return_lse
        assert [(part.shape, part.dtype) for part in parts] == [
            ((20, 4, 64), torch.float32),
            ((20, 4), torch.float32),
        ][: len(parts)]
        assert stages.kernel.args == (step.q.data_ptr(), *addresses(parts))
        assert not given or parts[0] is out
        seen += parts
    assert stages.ran == 1
    assert len(set(addresses(seen))) == len(seen)


def test_tables_are_replayed_apart_from_steps(stages: Any) -> None:
    """`select_table` and `prefill` of one step are two kinds; a table's tensors are new each time."""
    step = make_step()
    stages.run(step)
    first = stages.table(step)
    assert stages.ran == 2
    table = stages.table(make_step())
    assert stages.ran == 2
    assert isinstance(table, BlockTable)
    parts = [table.indices, table.counts, table.rows]
    assert stages.kernel.args[1:] == tuple(addresses(parts))
    assert not set(addresses(parts)) & set(addresses([first.indices, first.counts, first.rows]))
    assert [part.shape for part in parts] == [(4, 1), (4,), (1, 4, 1)]
    assert (table.block_size, table.query_block) == (SELECTOR.block_size, SELECTOR.query_block)
    stages.run(step)
    stages.table(with_cache(k=torch.zeros(5, 16, 2, 64), v=torch.zeros(5, 16, 2, 64)))
    assert stages.ran == 3


def test_attention_is_replayed_over_its_own_table(stages: Any) -> None:
    """A table is an input like any other; `out` may not meet the queries of a replay."""
    for _ in range(3):
        call = make_attention(out=torch.zeros(20, 4, 64))
        assert stages.attention(call) is call.out
        assert stages.kernel.args == (call.table.counts.data_ptr(), call.out.data_ptr())
    assert stages.ran == 1
    with pytest.raises(ValueError, match="out: expected memory apart from q's, got an overlap"):
        stages.attention(replace(call, out=call.q[:]))
    stages.run(make_step(out=torch.zeros(20, 4, 64)))
    assert stages.ran == 2


def test_the_oldest_recordings_go(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 16)
    steps = [make_step(batch=replace(make_step().batch, max_seq_len=60 + n)) for n in range(17)]
    for step in steps[:16]:
        stages.run(step)
    stages.run(steps[0])
    assert stages.ran == 16
    stages.run(steps[16])  # makes room: steps 1 and 2 were used longest ago
    assert len(replay._recordings) == 15
    for step in (steps[0], *steps[3:]):
        stages.run(step)
    assert stages.ran == 17
    stages.run(steps[1])
    assert stages.ran == 18


def test_an_overlap_is_refused_in_a_replay(stages: Any) -> None:
    """Whether `out` lies on an input depends on the addresses of the step at hand."""
    step = make_step(out=torch.zeros(20, 4, 64))
    stages.run(step)
    pages = step.kv.k.numel()
    memory = torch.zeros(3 * pages)
    kv = replace(step.kv, k=memory[:pages].view(step.kv.k.shape), v=memory[pages : 2 * pages].view(step.kv.v.shape))
    for name, out in (
        ("q", step.q),
        ("k", memory[pages - 8 : pages - 8 + 5120]),
        ("v", memory[2 * pages - 8 : 2 * pages - 8 + 5120]),
        (None, memory[2 * pages : 2 * pages + 5120]),
    ):
        other = replace(step, kv=kv, out=out.view(20, 4, 64)[:])
        if name is None:
            stages.run(other)
        else:
            with pytest.raises(ValueError, match=f"out: expected memory apart from {name}'s, got an overlap"):
                stages.run(other)
    assert stages.ran == 1
    both = torch.zeros(20, 8, 64)  # heads of q and out in turns: memory of the one lies between that of the other
    interleaved = replace(step, q=both[:, :4], out=both[:, 4:])
    stages.run(interleaved)
    stages.run(interleaved)
    assert stages.ran == 2


@given(st.data())
def test_memory_that_is_apart_is_never_refused(data: st.DataObject) -> None:
    """The short check of a replay may only pass what the whole one passes: both see the same views of one memory."""
    memory = torch.zeros(600)

    def view(*shape: int) -> torch.Tensor:
        strides, stride = [], 1
        for size in reversed(shape):
            strides.insert(0, stride)
            stride = stride * size + data.draw(st.integers(0, 2))
        span = 1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
        return memory.as_strided(shape, strides, data.draw(st.integers(0, 600 - span)))

    tokens = data.draw(st.integers(0, 3))
    q, out, k, v = view(tokens, 2, 4), view(tokens, 2, 4), view(2, 4, 2, 4), view(2, 4, 2, 4)
    tensors = [q, k, v, out]
    kv: Any = SimpleNamespace(k=k, v=v)
    extents = [memory_bytes(tensor) for tensor in tensors]
    if not replay._may_overlap(addresses(tensors), extents):
        check_out(out, q, kv=kv)
    elif tokens:
        ends = [(a, a + n) for a, n in zip(addresses(tensors), extents, strict=True)]
        assert any(start < ends[3][1] and ends[3][0] < end for start, end in itertools.islice(ends, 3))
