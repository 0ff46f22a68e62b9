"""What tells one compiled kernel from another where Triton is not asked."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from compactattn._triton.launch import _specialisation


def test_descriptors_of_two_dtypes_are_two_kernels() -> None:
    """bfloat16 and float16 have the same size, strides and boxes: only the dtype says which products are meant."""
    kinds = set()
    for dtype in (torch.bfloat16, torch.float16):
        tensor = torch.zeros(64, 64, dtype=dtype)
        kinds.add(_specialisation(TensorDescriptor.from_tensor(tensor, [64, 64])))
        assert _specialisation(TensorDescriptor.from_tensor(tensor.clone(), [64, 64])) in kinds
    assert len(kinds) == 2
