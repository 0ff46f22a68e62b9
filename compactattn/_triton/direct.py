"""The C function that launches a compiled kernel, called with arguments that were prepared once.

In every launch Triton's Python launcher asks for scratch memory, which no kernel of this library needs, and encodes
each tensor descriptor anew as the driver's CUtensorMap, which follows from the view that it describes and the address.
How the C function is called is no interface of Triton, so there is one rule: with the versions whose launcher was read,
where it says that its arguments are those that were read (builds of one version may differ), for kernels that need no
scratch memory and whose descriptors all become CUtensorMaps. Every other kernel is launched as Triton launches it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton.runtime import driver

from compactattn._triton.launch import Grid

#: Triton versions whose `CudaLauncher` calls its C function in the way that is repeated here.
DIRECT_VERSIONS = ((3, 6),)
ARGUMENTS = "iiiKKppOOOOOO"  # before the kernel's own: what Triton's driver calls `_BASE_ARGS_FORMAT`
ENCLOSED = {"launcher", "tensordesc_meta"}  # what is read of the Python function around a C function
MOST_MAPS = 512  # addresses per view: K and V of 256 layers that lie alike

STREAM = object()  # stands for the stream among the arguments of a launch


class TensorMaps:
    """CUtensorMaps of one view at different addresses, each encoded once.

    A map is a value that the launch copies: it stays right when the memory is freed and handed out again.

    Args:
        encode: makes a map for an address.
    """

    def __init__(self, encode: Callable[[int], object]) -> None:
        self._encode = encode
        self._known: dict[int, object] = {}

    def at(self, address: int) -> object:
        found = self._known.get(address)
        if found is None:
            found = self._encode(address)
            if len(self._known) >= MOST_MAPS:
                self._known.clear()
            self._known[address] = found
        return found


class Way(NamedTuple):
    """How a launcher makes CUtensorMaps of one of its descriptors: what `fill_tma_descriptor` calls these."""

    swizzle: int
    element_size: int
    element_type: int
    box: tuple[int, ...]


class Entry(NamedTuple):
    """A launcher's C function, and how each of its descriptors becomes a CUtensorMap."""

    c_function: Callable[..., object]
    ways: tuple[Way, ...]

    def before(self, run: Any, compiled: Any, grid: Grid) -> tuple[object, ...]:
        """What the C function is given before the kernel's own arguments, STREAM in the place of the stream.

        Of these, a descriptor gives its CUtensorMap, the numbers of its shape and those of its strides.
        """
        options, hooks = (run.launch_cooperative_grid, run.launch_pdl), (None, None, None)  # and what they are told
        scratch = (None, None)
        return (*grid, STREAM, compiled.function, *options, *scratch, compiled.packed_metadata, *hooks)


@functools.cache
def entry_of(run: Any) -> Entry | None:
    """Of a compiled kernel's launcher; None where the rule does not hold."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) not in DIRECT_VERSIONS:
        return None
    from triton.backends.nvidia import driver as nvidia

    if getattr(nvidia, "_BASE_ARGS_FORMAT", None) != ARGUMENTS or type(run) is not nvidia.CudaLauncher:
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    wrapper = run.launch
    if not hasattr(wrapper, "__closure__"):  # it is the C function: the kernel has no descriptors
        return Entry(wrapper, ())
    names = wrapper.__code__.co_freevars
    if not set(names) >= ENCLOSED:
        return None
    enclosed = {name: cell.cell_contents for name, cell in zip(names, wrapper.__closure__, strict=True)}
    ways = []
    for one in enclosed["tensordesc_meta"]:
        if one is None or one["fp4_padded"]:
            return None
        host_type = nvidia.TMA_DTYPE_DEVICE_TO_HOST[one["elem_type"]]
        ways.append(Way(one["swizzle"], one["elem_size"], host_type, tuple(one["block_size"])))
    return Entry(enclosed["launcher"], tuple(ways))


def maps_of(way: Way, descriptor: Any) -> TensorMaps:
    """The CUtensorMaps of a descriptor, whose tensor is there; one for all kinds of steps that see memory alike."""
    where = descriptor.base.get_device()
    return _maps(way, where, tuple(descriptor.shape), tuple(descriptor.strides), descriptor.padding)


@functools.lru_cache(maxsize=1024)
def _maps(way: Way, device: int, shape: tuple[int, ...], strides: tuple[int, ...], padding: str) -> TensorMaps:
    fill, nan = driver.active.utils.fill_tma_descriptor, int(padding == "nan")
    return TensorMaps(lambda address: fill(address, *way, shape, strides, nan))
