"""Which problems the warp-specialised Hopper kernels run: one rule, for attention and for scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

#: Triton versions with which the Hopper kernels ran, correctly, on a GPU: with others the general kernels run.
GLUON_VERSIONS = ((3, 6),)
#: Versions with which they compile to the same loops (tests/test_compile.py) but have not run: no reason to run them.
GLUON_COMPILED = ((3, 7), (3, 9))


def why_not_hopper(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, query_block: int, features: Sequence[str] = ()
) -> str | None:
    """Why the warp-specialised Hopper kernels do not run this problem, or None if they do.

    The rule: compute capability 9.0, a Triton version of GLUON_VERSIONS, float16 or bfloat16, head dimension 64 or
    128, query blocks of 128, a positive scale, and strides of what is read that TMA takes; for attention also none of
    the model's `features` (`compactattn.features.named`). Everything else runs the general kernels.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]}, not 9.0"
    if version not in GLUON_VERSIONS:
        tried = "compiled but never run" if version in GLUON_COMPILED else "never tried"
        proven = ", ".join(f"{major}.{minor}" for major, minor in GLUON_VERSIONS)
        return f"Triton {triton.__version__}, with which it was {tried} on a GPU, not {proven}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}, not float16 or bfloat16"
    if head_dim not in (64, 128):
        return f"head dimension {head_dim}, not 64 or 128"
    if query_block != 128:
        return f"query blocks of {query_block}, not 128"
    if features:
        return f"{' and '.join(features)}, which only the general kernel has"
    return None


def tma_strides(*tensors: Tensor) -> bool:
    """Can tensor descriptors describe these? Strides and addresses in multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])
        for tensor in tensors
    )
