"""The launches of one step, kept so that they can be repeated on other tensors with little Python in between.

A replay lays whatever the launches take in one list, its *values*: the stream, the addresses of inputs and results, and
then the rest, that is constants, between which it writes addresses of scratch and tensor descriptors. Each launch picks
its arguments from the values by place, which costs next to nothing. Nothing of a replay is written to the recording, so
several threads can replay it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactattn._triton.direct import STREAM, TensorMaps, Way, entry_of, maps_of
from compactattn._triton.launch import Grid, hooked

ALIGNMENT = 256  # bytes; of scratch tensors, as PyTorch's allocator aligns its own at least


class Launch(NamedTuple):
    """One launch.

    Attributes:
        compiled, grid: the kernel as Triton compiled it, and how many programs run it.
        args: places of what the kernel is given, for a launch that Triton's hooks see.
        call: launches the kernel where there are no hooks.
        pick: takes everything that `call` is given from the values.
    """

    compiled: Any
    grid: Grid
    args: list[int]
    call: Callable[..., object]
    pick: Callable[[Sequence[object]], tuple[object, ...]]


@dataclass(frozen=True)
class Memory:
    """What a tensor descriptor asks of the tensor that it describes."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class Described(NamedTuple):
    """A tensor descriptor among the values.

    Attributes:
        place, source: its own place, and that of the address which it describes.
        descriptor: without a tensor.
        maps: what its launch takes in its stead where there are no hooks, or None: the descriptor itself.
    """

    place: int
    source: int
    descriptor: Any
    maps: TensorMaps | None

    def at(self, address: int, hooks: bool) -> object:
        if self.maps is not None and not hooks:
            return self.maps.at(address)
        return _with_base(self.descriptor, Memory(address))


def _with_base(descriptor: Any, base: Memory | None) -> Any:
    """The same view of other memory; nothing is checked again, since nothing but the address differs."""
    other = object.__new__(type(descriptor))
    other.__dict__.update(descriptor.__dict__, base=base)
    return other


class _Values:
    """Gives everything that launches take its place among the values, and scratch tensors theirs in one allocation.

    Args:
        given: inputs and results, whose addresses a replay knows. They and the launches outlive this object, so that
            an id stands for one object.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.rest: list[Any] = []
        self.scratch: list[tuple[int, int]] = []  # (place, offset in bytes)
        self.scratch_bytes = 0
        self.described: list[Described] = []
        self._first = 1 + len(given)  # place of the rest
        self._places = {id(STREAM): 0, **{id(tensor): n for n, tensor in enumerate(given, 1)}}
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.numel()}
        self._offsets: dict[int, int] = {}

    def launch(self, compiled: Any, grid: Grid, args: Sequence[Any]) -> Launch:
        run = compiled.run
        entry = entry_of(run)
        if entry is None:
            before = self._all((*grid, STREAM, compiled.function, compiled.packed_metadata, None, None, None))
            places = self._all(args)
            return Launch(compiled, grid, places, run, itemgetter(*before, *places))
        places = own = self._all(args, iter(entry.ways))
        if entry.ways:  # beside the map of a descriptor, its shape and strides
            own = []
            for arg, place in zip(args, places, strict=True):
                own.append(place)
                if hasattr(arg, "block_shape"):
                    own += map(self._new, (*arg.shape, *arg.strides))
        before = self._all(entry.before(run, compiled, grid))
        return Launch(compiled, grid, places, entry.c_function, itemgetter(*before, *own))

    def _all(self, args: Sequence[Any], ways: Iterator[Way] | None = None) -> list[int]:
        """The place of each, new ones included; `ways`: how the descriptors among them become CUtensorMaps."""
        places, found = self._places, []
        for arg in args:
            place = places.get(id(arg))
            if place is None:
                if hasattr(arg, "block_shape"):  # a descriptor, of Triton or of Gluon; each launch has its own way
                    place = self._describe(arg, None if ways is None else next(ways))
                else:
                    place = places[id(arg)] = self._address(arg) if isinstance(arg, Tensor) else self._new(arg)
            found.append(place)
        return found

    def _new(self, value: object) -> int:
        self.rest.append(value)
        return self._first + len(self.rest) - 1

    def _address(self, tensor: Tensor) -> int:
        """Of a tensor that the step allocated: where it lies in the scratch of a replay."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start in self._memory:
            raise RuntimeError("a view of an input: expected the input itself, or a tensor that the step allocated")
        if start not in self._offsets:
            self._offsets[start] = self.scratch_bytes
            self.scratch_bytes += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        place = self._new(0)
        self.scratch.append((place, self._offsets[start] + tensor.data_ptr() - start))
        return place

    def _describe(self, descriptor: Any, way: Way | None) -> int:
        (source,), place = self._all((descriptor.base,)), self._new(None)
        maps = None if way is None else maps_of(way, descriptor)
        self.described.append(Described(place, source, _with_base(descriptor, None), maps))
        return place


class Recording:
    """The launches of one kind of step.

    Args:
        inputs: the tensors that the step was given, each an object of its own.
        results: the tensors that it allocated and returned.
        launches: (compiled kernel, grid, arguments) in their order.

    Attributes:
        launches: how each is repeated.
        scratch_bytes: of the one allocation beside the results.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        launches: Sequence[tuple[Any, Grid, Sequence[object]]],
    ) -> None:
        values = _Values((*inputs, *results))
        self.launches = [values.launch(*launch) for launch in launches]
        self.scratch_bytes = values.scratch_bytes
        self._calls = [(launch.call, launch.pick) for launch in self.launches]
        self._rest, self._scratch, self._described = values.rest, values.scratch, values.described
        self._results = [(tensor.shape, tensor.dtype) for tensor in results]

    def replay(self, addresses: Sequence[int], device: torch.device, stream: int) -> list[Tensor]:
        """Launch everything on a stream of a device, which is current, over inputs at these addresses: new results."""
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._results]
        scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)
        values = [stream, *addresses, *[tensor.data_ptr() for tensor in results], *self._rest]
        base = scratch.data_ptr()
        for place, offset in self._scratch:
            values[place] = base + offset
        hooks = hooked()
        for one in self._described:
            values[one.place] = one.at(values[one.source], hooks)
        if hooks:
            for launch in self.launches:
                launch.compiled[launch.grid](*[values[place] for place in launch.args], stream=stream)
        else:
            for call, pick in self._calls:
                call(*pick(values))
        return results
