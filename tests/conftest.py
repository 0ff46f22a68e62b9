"""Every test of a law takes `backend`; `-m gpu` selects the CUDA one, the default run all others."""

from __future__ import annotations

import importlib
import os
import pkgutil

import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

torch.set_num_threads(1)  # the shapes are small, and spinning threads fight over a shared machine

pytest.register_assert_rewrite("tests.laws", "tests.numerics")

import compactattn._numba  # noqa: E402
import compactattn._triton  # noqa: E402
from tests.backends import GPU, INTERPRETER, NUMBA, REFERENCE, Backend  # noqa: E402

#: modules of the Triton backend whose kernels are written in Gluon: its names change between Triton versions
GLUON = ("gluon_names", "hopper", "hopper_copies", "hopper_scores", "hopper_softmax")

# hypothesis also draws constants of the project's own modules, so load those that load late: the same draws every time
for package in (compactattn._numba, compactattn._triton):
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name.rpartition(".")[2] not in GLUON:
            importlib.import_module(module.name)

settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None, database=None, print_blob=False)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, tests that need one are skipped when they are asked for."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


ON_CPU = [] if torch.cuda.is_available() else [INTERPRETER]
LIBRARY = [pytest.param(b, id=b.name) for b in (NUMBA, *ON_CPU)]
LIBRARY.append(pytest.param(GPU, id=GPU.name, marks=pytest.mark.gpu))


@pytest.fixture(scope="session", params=[pytest.param(REFERENCE, id=REFERENCE.name), *LIBRARY])
def backend(request: pytest.FixtureRequest) -> Backend:
    """An implementation: the reference, numba, Triton under its interpreter, Triton on a GPU."""
    return request.param


@pytest.fixture(scope="session", params=LIBRARY)
def library(request: pytest.FixtureRequest) -> Backend:
    """An implementation of the library itself, for what the reference does not have (`out`, fusion)."""
    return request.param
