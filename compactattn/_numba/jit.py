"""How this backend compiles its loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over NumPy arrays on its first call, and keep the machine code on disk where that is possible.

    Kernels run on the calling thread, without the interpreter's lock: they are a few per cent of a step, and a second
    pool of threads would take the cores from the one that torch multiplies matrices with.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache may anything be written
        return numba.njit(nogil=True)(function)
