"""The small workload that the tests of the benchmarks share."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.workloads import WORKLOADS, Step, make_step

GROUP = Shape(1, 4, 1)
VERTICAL_SLASH = WORKLOADS["vertical-slash"]


def small_step(**changes: Any) -> Step:
    settings: dict[str, Any] = {"dtype": torch.float32, "page_size": 64, **changes}
    return make_step(VERTICAL_SLASH, Shape(2, 4, 1, 64), 2048, 384, **settings)
