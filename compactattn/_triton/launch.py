"""Launching a compiled kernel again without asking Triton, argument by argument, how it was compiled."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from compactattn._triton import INTERPRETED, capability

Grid = tuple[int, int, int]


class Recorder(threading.local):
    """The launches that this thread records (`replay`): compiled kernel, grid and arguments; or None."""

    launches: list[tuple[Any, Grid, Sequence[object]]] | None = None


recorder = Recorder()

#: compiled kernels by kernel, device, constants and what Triton specialises runtime arguments on
_compiled: dict[tuple[Any, ...], Any] = {}


def _specialisation(arg: object) -> object:
    """What Triton compiles a runtime argument into: its type, whether 16 divides it, whether it is 1.

    Finer than Triton where a kernel declines to specialise: then several keys hold one compiled kernel. Of a tensor
    descriptor the dtype counts: the launcher's caller may have no other argument that says it.
    """
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, -0x80000000 <= arg < 0x80000000
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    base = getattr(arg, "base", None)
    return type(arg), base.dtype if isinstance(base, Tensor) else None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: object,
    constants: dict[str, Any],
    device: torch.device,
    overlap: bool = False,
    **options: Any,
) -> None:
    """`kernel[grid](*args, **constants, **options)`; the constants are the kernel's last parameters, in their order.

    The options, and the boxes and layouts of tensor descriptors, follow from the constants and dtypes. The device is
    current.

    `overlap` is for kernels with a last parameter OVERLAP: true on Hopper and later, where the kernel starts while its
    predecessor ends (programmatic dependent launch). Such a kernel calls `gdc_wait` before it reads what a kernel of
    this library wrote, or writes anything; what was there before the first of a chain of kernels (lengths, page
    table, queries) may be read without waiting by all but the first.
    """
    if overlap:
        overlaps = capability(device)[0] >= 9
        constants = {**constants, "OVERLAP": overlaps}
        if overlaps:
            options["launch_pdl"] = True
    if INTERPRETED:
        kernel[grid](*args, **constants, **options)
        return
    key = (id(kernel), device.index, *constants.values(), *map(_specialisation, args))
    compiled = _compiled.get(key)
    x, y, z = (*grid, 1, 1)[:3]
    whole, own = (x, y, z), (*args, *constants.values())
    if compiled is None:
        if list(kernel.arg_names[len(args) :]) != list(constants):
            raise TypeError(f"{kernel.__name__}: expected the constants {kernel.arg_names[len(args) :]}")
        compiled = _compiled[key] = kernel[grid](*args, **constants, **options)
    else:
        relaunch(compiled, whole, driver.active.get_current_stream(device.index), own)
    if recorder.launches is not None:
        recorder.launches.append((compiled, whole, own))


def hooked() -> bool:
    """Whether somebody, such as a profiler, wants to know of Triton's launches."""
    hooks = knobs.runtime
    return _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook)


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def relaunch(compiled: Any, grid: Grid, stream: int, args: Sequence[object]) -> None:
    """Launch a compiled kernel on a stream, without asking Triton's hooks where there are none: that takes time."""
    if hooked():
        compiled[grid](*args, stream=stream)
    else:
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
