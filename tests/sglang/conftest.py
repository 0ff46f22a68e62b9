"""SGLang on the CPU without its native code: what importing it takes beside the packages of requirements.txt."""

from __future__ import annotations

import importlib.util
import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if importlib.util.find_spec("sglang") is not None:
    # SGLang imports torchvision for its image processors, which no test calls. Built for another PyTorch, it describes
    # native operators while it is imported that it then does not have.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
