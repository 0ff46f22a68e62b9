"""A step launched again: the right addresses in the right places, and only for steps of the same kind.

What a replayed step computes is compared on a GPU (`test_gpu.test_a_step_again`); here kernels only note what they get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from compactattn import Dense, FlashPrefill, KVSummary, PagedKV, PrefillBatch, summarize
from compactattn._triton.replay import ALIGNMENT, Recording, inputs_of_step, kind_of_step


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


def test_addresses() -> None:
    """Inputs give their own addresses, what the step allocated lies apart in one scratch, the rest stays."""
    inputs = [torch.zeros(5), torch.zeros(7, dtype=torch.int32)]
    whole, other = torch.zeros(100), torch.zeros(3, dtype=torch.float16)
    front, back = whole[:60], whole[60:]
    first, second, third = Kernel(), Kernel(), Kernel()
    launches = [
        (first, (1, 2, 3), (inputs[0], 3, front, 0.5, other)),
        (second, (4, 5, 6), (back, inputs[1], Descriptor(inputs[0], [16]), True, inputs[0])),
        (third, (7, 8, 9), (Descriptor(whole.view(10, 10)[6:], [5]), other)),
    ]
    recording = Recording(inputs, launches)
    del launches
    again = [torch.ones(5), torch.ones(7, dtype=torch.int32)]
    recording.replay(again, stream=42)
    q, three, front_at, half, other_at = first.args
    back_at, table, descriptor, true, q_again = second.args
    of_scratch, other_again = third.args
    assert (first.stream, second.stream) == (42, 42)
    assert (first.grid, second.grid) == ((1, 2, 3), (4, 5, 6))
    assert (q, table, q_again) == (again[0].data_ptr(), again[1].data_ptr(), again[0].data_ptr())
    assert (three, half, true) == (3, 0.5, True)
    assert isinstance(descriptor, Descriptor)
    assert descriptor.base is again[0]
    assert descriptor.block_shape == [16]
    assert back_at - front_at == 60 * 4  # of one tensor
    assert isinstance(of_scratch, Descriptor)
    assert (of_scratch.base.data_ptr(), of_scratch.block_shape) == (back_at, [5])
    assert other_again == other_at
    scratch = sorted((front_at, other_at))
    assert scratch[1] - scratch[0] == ALIGNMENT * 2  # 400 bytes, then 6
    assert recording.scratch_bytes == ALIGNMENT * 3


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_of_triton(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that hooks into Triton's launches sees replayed ones, too."""
    from triton import knobs

    if hooked:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda _: None)
    kernel, q = Kernel(), torch.zeros(3)
    Recording([q], [(kernel, (1, 1, 1), (q, 7))]).replay([q], stream=1)
    assert kernel.hooked == hooked
    assert kernel.args == (q.data_ptr(), 7)


def test_nothing_is_kept_alive() -> None:
    """A recording holds no tensor: neither the caller's cache nor the step's scratch."""
    inputs, scratch = [torch.zeros(5)], torch.zeros(8)
    recording = Recording(inputs, [(Kernel(), (1, 1, 1), (inputs[0], scratch, Descriptor(inputs[0], [16])))])
    held = [arg for launch in recording.launches for arg in launch.args]
    assert [type(arg) for arg in held] == [int, int, Descriptor]
    assert held[2].base is None


def test_a_view_of_an_input_is_refused() -> None:
    """Its address follows from an input's, which a replay does not know."""
    inputs = [torch.zeros(5)]
    with pytest.raises(RuntimeError, match="view of an input"):
        Recording(inputs, [(Kernel(), (1, 1, 1), (inputs[0][1:],))])


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
        return kind_of_step(**vars(self))


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
    given = {id(tensor) for tensor in inputs_of_step(step.q, step.kv, step.batch, summary, None, None)}
    assert {id(tensor) for tensor in held} <= given


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
