"""Launching a compiled kernel again without asking Triton, argument by argument, how it was compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compactattn._triton import INTERPRETED, capability

#: compiled kernels by kernel, device, constants and what Triton specialises runtime arguments on
_compiled: dict[tuple[Any, ...], Any] = {}


def _specialisation(arg: object) -> object:
    """What Triton compiles a runtime argument into: its type, whether 16 divides it, whether it is 1.

    Finer than Triton where a kernel declines to specialise: then several keys hold one compiled kernel.
    """
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, -0x80000000 <= arg < 0x80000000
    return type(arg)


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

    The options, and the boxes and layouts of tensor descriptors, follow from the constants. The device is current.

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
    run = _compiled.get(key)
    if run is not None:
        run[(*grid, 1, 1)[:3]](*args, *constants.values())
        return
    if list(kernel.arg_names[len(args) :]) != list(constants):
        raise TypeError(f"{kernel.__name__}: expected the constants {kernel.arg_names[len(args) :]}")
    _compiled[key] = kernel[grid](*args, **constants, **options)
