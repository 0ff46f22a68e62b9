"""A step like one that ran before, launched again without deciding anything anew.

Which kernels run on a step, with which grids and arguments, follows from shapes, strides, dtypes, host integers and
settings; tensors enter as addresses alone. So the launches of the first step of its kind are recorded as they happen,
and a later one repeats them with its own addresses, and with one allocation for all scratch. Every layer of a model
takes steps of one kind, so this is what a serving engine's host does between two launches of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from compactattn._triton import INTERPRETED, on_device
from compactattn._triton.launch import Grid, recorder, relaunch
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selectors import FlashPrefill, Selector
from compactattn.validation import Auto, check_out

ALIGNMENT = 256  # bytes; of scratch tensors, as PyTorch's allocator aligns its own at least
MOST = 512  # recordings that are kept; the least recently used goes first


@dataclass
class Launch:
    """One launch; the places of `args` that hold addresses are filled in anew each time.

    Attributes:
        compiled, grid: the kernel as Triton compiled it, and how many programs run it.
        args: what the kernel is given, without references to tensors.
        inputs: (place, which input).
        scratch: (place, offset in bytes).
        input_descriptors: (place, which input): tensor descriptors of inputs.
        scratch_descriptors: (place, offset in bytes): tensor descriptors of scratch.
    """

    compiled: Any
    grid: Grid
    args: list[Any]
    inputs: list[tuple[int, int]]
    scratch: list[tuple[int, int]]
    input_descriptors: list[tuple[int, int]]
    scratch_descriptors: list[tuple[int, int]]


@dataclass(frozen=True)
class Memory:
    """What a tensor descriptor asks of the tensor that it describes."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Recording:
    """The launches of one kind of step.

    Args:
        inputs: the tensors that the step was given, results included, each an object of its own.
        launches: (compiled kernel, grid, arguments) in their order.
    """

    def __init__(self, inputs: Sequence[Tensor], launches: Sequence[tuple[Any, Grid, Sequence[object]]]) -> None:
        self._inputs = {id(tensor): n for n, tensor in enumerate(inputs)}
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
        self._offsets: dict[int, int] = {}
        self.scratch_bytes = 0
        self.launches = [self._launch(compiled, grid, list(args)) for compiled, grid, args in launches]
        del self._inputs, self._memory, self._offsets  # ids and addresses mean nothing later

    def _launch(self, compiled: Any, grid: Grid, args: list[Any]) -> Launch:
        launch = Launch(compiled, grid, args, [], [], [], [])
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if id(arg) in self._inputs:
                    launch.inputs.append((place, self._inputs[id(arg)]))
                else:
                    launch.scratch.append((place, self._offset(arg)))
                args[place] = 0
            elif hasattr(arg, "block_shape"):  # a descriptor, of Triton or of Gluon
                if id(arg.base) in self._inputs:
                    launch.input_descriptors.append((place, self._inputs[id(arg.base)]))
                else:
                    launch.scratch_descriptors.append((place, self._offset(arg.base)))
                args[place] = _with_base(arg, None)
        return launch

    def _offset(self, tensor: Tensor) -> int:
        """Where a tensor that the step allocated lies in the scratch of a replay."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._memory:
            raise RuntimeError("a view of an input: expected the input itself, or a tensor that the step allocated")
        if storage.data_ptr() not in self._offsets:
            self._offsets[storage.data_ptr()] = self.scratch_bytes
            self.scratch_bytes += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        return self._offsets[storage.data_ptr()] + tensor.data_ptr() - storage.data_ptr()

    def replay(self, inputs: Sequence[Tensor], stream: int) -> None:
        """Launch everything on a stream of the inputs' device, which is current."""
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=inputs[0].device)
        addresses, base = [tensor.data_ptr() for tensor in inputs], scratch.data_ptr()
        for launch in self.launches:
            args = launch.args.copy()
            for place, n in launch.inputs:
                args[place] = addresses[n]
            for place, offset in launch.scratch:
                args[place] = base + offset
            for place, n in launch.input_descriptors:
                args[place] = _with_base(args[place], inputs[n])
            for place, offset in launch.scratch_descriptors:
                args[place] = _with_base(args[place], Memory(base + offset))
            relaunch(launch.compiled, launch.grid, stream, args)


def _with_base(descriptor: Any, base: Tensor | Memory | None) -> Any:
    """The same view of another tensor; nothing is checked again, since nothing but the address differs."""
    other = object.__new__(type(descriptor))
    other.__dict__.update(descriptor.__dict__, base=base)
    return other


_recordings: OrderedDict[Hashable, Recording] = OrderedDict()
_lock = threading.Lock()


def inputs_of_step(
    q: Tensor, kv: PagedKV, batch: PrefillBatch, summary: KVSummary | None, out: Tensor | None, lse: Tensor | None
) -> list[Tensor]:
    """Every tensor that comes from outside or goes there."""
    tensors = [q, kv.k, kv.v, kv.page_table, batch.cu_seqlens_q, batch.seq_lens, batch.prompt_lens, out, lse]
    if summary is not None:
        tensors += [summary.k_mean, summary.v_mean, summary.k_bounds]
    return [tensor for tensor in tensors if tensor is not None]


def kind_of_step(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float | None,
    summary: KVSummary | None,
    correction: bool | KVSummary,
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
) -> Hashable | None:
    """What decides the launches of a step, its validity included; None for a step that is always run anew.

    Replayed are the steps whose kernels all go through `launch`: those of `FlashPrefill` without a correction.
    """
    if not (
        type(selector) is FlashPrefill
        and type(kv) is PagedKV
        and kv.k_scale is None  # scales are not among the inputs
        and type(batch) is PrefillBatch
        and (summary is None or (type(summary) is KVSummary and summary.gate is None))
        and correction is False
        and type(return_lse) is bool
        and type(heads_per_group) in (int, str)
        and type(query_blocks_per_span) in (int, str, type(None))
        and type(scale) in (int, float, type(None))
        and (out is None or isinstance(out, Tensor))
        and backend in (None, "triton")
    ):
        return None
    tensors = inputs_of_step(q, kv, batch, summary, out, None)
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return None
    if torch.is_grad_enabled() and (q.requires_grad or kv.k.requires_grad or kv.v.requires_grad):
        return None
    settings = (selector, heads_per_group, query_blocks_per_span, scale, return_lse)
    means = summary is None or (summary.unit, summary.v_mean is None, summary.k_bounds is None)
    present = (batch.prompt_lens is None, out is None, means)
    of_tensors = [(t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16) for t in tensors]
    return settings, batch.max_q_len, batch.max_seq_len, present, *of_tensors


def prefill(
    run: Callable[..., Any],
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
    scale: float | None,
    summary: KVSummary | None,
    correction: bool | KVSummary,
    return_lse: bool,
    out: Tensor | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`run` of the other arguments, or its launches of a step of the same kind once more."""
    grouping = (heads_per_group, query_blocks_per_span)
    arguments = (q, kv, batch, selector, *grouping, scale, summary, correction, return_lse, out, backend)
    kind = None if INTERPRETED else kind_of_step(*arguments)
    if kind is None:
        return run(*arguments)
    with _lock:
        recording = _recordings.get(kind)
        if recording is not None:
            _recordings.move_to_end(kind)
    if recording is None:
        return _recorded(run, kind, *arguments)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        check_out(out, q, kv=kv)  # whether they overlap depends on the addresses
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    with on_device(q):
        stream = driver.active.get_current_stream(q.get_device())
        recording.replay(inputs_of_step(q, kv, batch, summary, out, lse), stream)
    return out if lse is None else (out, lse)


def _recorded(run: Callable[..., Any], kind: Hashable, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    recorder.launches = []
    try:
        result = run(*arguments)
        launches = recorder.launches
    finally:
        recorder.launches = None
    q, kv, batch, *_, summary, _correction, return_lse, _out, _backend = arguments
    out, lse = result if return_lse else (result, None)
    recording = Recording(inputs_of_step(q, kv, batch, summary, out, lse), launches)
    with _lock:
        _recordings[kind] = recording
        if len(_recordings) > MOST:
            _recordings.popitem(last=False)
    return result
