"""SGLang on the CPU without its native code: what importing it takes beside the packages of requirements.txt.

Where SGLang finds no device that it knows, its layers run in plain PyTorch, but two of its imports ask for native code
that no test calls: torchvision, for image processors, describes operators of its own that it does not have where it was
built for another PyTorch; rotary embeddings name a kernel of vLLM's. Importing this module stands in for both.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _rotary_embedding(*arguments: Any) -> None:
    raise RuntimeError("expected a layer in plain PyTorch, got a call of vLLM's kernel")


_kernels: Any = types.ModuleType("vllm._custom_ops")
_kernels.rotary_embedding = _rotary_embedding
for _module in (types.ModuleType("vllm"), _kernels):
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None)
    sys.modules.setdefault(_module.__name__, _module)
