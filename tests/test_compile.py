"""What the Triton kernels compile to, for GPUs that need not be there: registers, spills and the Hopper kernel's loop.

`.ci/run` runs this file twice: with the Triton of the environment, and with 3.6, that of the GPU builds of PyTorch that
the Hopper kernel ran with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Problem = tuple[str, dict[str, Any]]

D64 = {"dtype": "float16", "dim": 64, "page": 64, "block": 64}
#: the general attention kernel: pages through TMA (sm_90 and up) or by pointers, head dimensions, IEEE float32
ATTEND: list[Problem] = [("attend", p) for p in ({}, D64, {"dim": 256}, {"dtype": "float32"})]
SMALL_PAGES: list[Problem] = [("attend", {"page": 16})]  # by pointers on every GPU; before sm_90 the same as {}
SELECT: list[Problem] = [(stage, {}) for stage in ("scores", "bounds", "update", "pooled", "union", "table")]
SELECT += [("table", {"heads": "auto", "span": "auto"}), ("bounds", {"dtype": "float32"}), ("bounds", {"dim": 256})]

#: what models ask for beside plain attention, in FP8, each variant a kernel of its own; and the small kernels beside
MODEL: dict[str, Any] = {"softcap": 30.0, "window": 1000, "sinks": True}
FEATURES: list[Problem] = [("attend", MODEL | {"fp8": True}), ("attend", {"fp8": True, "page": 16})]
FEATURES += [("update", {"fp8": True}), ("merge", {}), ("density", {"window": 1000})]

#: (registers, bytes of spill stores) per thread, at most. The file of an SM has 65,536 registers, a thread 255: the
#: bounds are what so many programs at once leave, and spills none where measurement does not say otherwise.
BOUNDS = {
    "_scores_kernel": (255, 0),  # 128 threads, 2 programs, as its tiles of shared memory allow
    "_key_bounds_kernel": (255, 24),  # 256 threads, 1 program; with Triton 3.6 float32 spills for sm_100
    "_unit_bounds_kernel": (128, 0),  # 128 threads, 4 programs; 256 threads for float32 and large heads
    "_block_bounds_kernel": (32, 0),  # 64 threads, as many programs as an SM takes
    "_unit_means_kernel": (96, 0),  # 128 threads, 5 programs
    "_block_means_kernel": (32, 0),  # 32 threads, as many programs as an SM takes
    "_unite_kernel": (128, 0),  # 128 threads, 4 programs
    "_compact_kernel": (64, 0),  # 128 threads, 8 programs
    "_table_from_scores_kernel": (255, 16),  # 128 threads, 2 programs; 16 members of a row by 1024 blocks at once
    "_union_sizes_kernel": (128, 0),  # 128 threads, 4 programs
    "_merge_kernel": (64, 0),  # 128 threads, 8 programs
    "_density_kernel": (64, 0),  # 128 threads; a program per 256 (head, query block) pairs
    "_plan_kernel": (255, 0),  # 128 threads; a program per 128 tiles never fills the GPU
    "_queue_kernel": (128, 0),  # 256 threads; the only program
}


#: KiB of shared memory that a program may have; a kernel that wants more compiles, but does not launch
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def compile_kernels(arch: int, problems: list[Problem], cache: Path) -> list[list[dict[str, Any]]]:
    """What each problem compiles to, in a fresh process: this one may interpret its kernels."""
    spec = find_spec("triton")
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path("missing")
    for tool in ("cuobjdump", "ptxas", *(["ptxas-blackwell"] if arch >= 100 else [])):
        if not (tools / tool).is_file():
            pytest.skip(f"this Triton brings no {tool}, which sm_{arch} needs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled"],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment | {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(cache)},
        input=json.dumps([arch, problems]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def attend_bound(problem: dict[str, Any]) -> tuple[int, int]:
    """255 registers allow two programs of 128 threads or one of 256; spills are those measured, rounded up to 8."""
    if problem.get("dtype") == "float32":
        return 255, 0
    if problem.get("page") == 16:
        return 255, 168
    if problem.get("window"):
        return 255, 504
    return 255, 40 if problem.get("dim") == 64 else 480  # outside the loops mostly: locating and masking tiles


@pytest.mark.parametrize("arch", SHARED, ids="sm_{}".format)
def test_general_kernels(arch: int, tmp_path: Path) -> None:
    assert_within_bounds(arch, [*ATTEND, *(SMALL_PAGES if arch >= 90 else []), *SELECT], tmp_path)


def test_features_of_models(tmp_path: Path) -> None:
    """Soft-capping, a window, sinks and FP8 pages, through TMA and by pointers, on the GPU that most servers have."""
    assert_within_bounds(90, FEATURES, tmp_path)


def assert_within_bounds(arch: int, problems: list[Problem], tmp_path: Path) -> None:
    too_much = []
    for (stage, problem), kernels in zip(problems, compile_kernels(arch, problems, tmp_path), strict=True):
        assert kernels
        for kernel in kernels:
            registers, spills = BOUNDS[kernel["kernel"]] if stage != "attend" else attend_bound(problem)
            allowed = {"registers": registers, "spill_stores": spills, "shared": SHARED[arch] * 1024}
            if any(kernel[what] > most for what, most in allowed.items()):
                too_much.append((stage, problem, kernel))
    assert too_much == []


#: problem; bytes of spill stores with Triton 3.6 and with newer ones, measured, rounded up to 16. Spills lie around the
#: loops over stages and in the producers: what comes once an item.
HOPPER: list[tuple[dict[str, Any], int, int]] = [
    ({}, 32, 320),
    ({"group": 1, "block": 256, "page": 256, "lse": False}, 16, 272),
    ({"group": 16, "block": 64, "page": 64, "dtype": "float16"}, 96, 352),
    ({"group": 5, "page": 16}, 144, 496),
    ({"dim": 64, "dtype": "float16"}, 0, 32),
    ({"dim": 64, "group": 5, "block": 64, "page": 16, "lse": False}, 80, 176),
]


@pytest.mark.parametrize("part", [0, 1])
def test_hopper_kernel(part: int, tmp_path: Path) -> None:
    """Each consumer's loop over unmasked stages keeps both products in flight beside the softmax, in registers."""
    cases = HOPPER[part::2]
    compiled = compile_kernels(90, [("hopper", problem) for problem, *_ in cases], tmp_path)
    for (problem, spills_36, spills), kernels in zip(cases, compiled, strict=True):
        for kernel in kernels:
            if kernel["kernel"] != "_hopper_kernel":  # the plan and the queue
                assert kernel["registers"] <= BOUNDS[kernel["kernel"]][0], kernel
                assert kernel["spill_stores"] <= BOUNDS[kernel["kernel"]][1], kernel
        kernel = kernels[-1]
        assert kernel["kernel"] == "_hopper_kernel"
        assert kernel["warps"] == 12
        assert kernel["registers"] == 168, kernel  # 65,536 over 384 threads; setmaxnreg moves them between the warps
        assert kernel["spill_stores"] <= (spills_36 if triton_version() == (3, 6) else spills), (problem, kernel)
        assert kernel["serialised"] == [], problem  # ptxas' warnings C7510 to C7514
        # a product of 64 x 128 x 16 takes one instruction; the branches that some layouts turn back to hold fewer
        products = problem.get("dim", 128) // 16 + 128 // 16
        loops = [loop for loop in kernel["loops"] if loop["products"] == products and loop["instructions"] <= 560]
        assert len(loops) == 2, (problem, kernel["loops"])
        for loop in loops:
            scores_done, product_done = loop["waits"]  # two: one behind each product is wgmma in series
            assert scores_done < min(loop["exponentials"]), (problem, loop)
            assert max(loop["exponentials"]) < product_done, (problem, loop)
            assert loop["local_accesses"] == 0, (problem, loop)


def test_hopper_scores_kernel(tmp_path: Path) -> None:
    """Four warpgroups fit the registers of an SM; what is spilled comes once an item, never in the loop over tiles."""
    problems: list[Problem] = [("hopper scores", p) for p in ({}, {"group": 5, "block": 64}, {**D64, "group": 1})]
    for kernels in compile_kernels(90, problems, tmp_path):
        (kernel,) = kernels
        assert (kernel["kernel"], kernel["warps"], kernel["registers"]) == ("_hopper_scores_kernel", 20, 96)
        assert kernel["spill_stores"] <= 48, kernel
        assert kernel["serialised"] == []
        loops = [loop for loop in kernel["loops"] if loop["instructions"] <= 560]
        assert len(loops) == 4, kernel["loops"]
        assert all(loop["local_accesses"] == 0 for loop in loops), loops
        assert kernel["shared"] <= SHARED[90] * 1024


def test_key_bounds_kernel(tmp_path: Path) -> None:
    """Both passes multiply by warpgroups, both factors from shared memory, and wait for all products of a tile once."""
    problems: list[Problem] = [("bounds", p) for p in ({}, {**D64, "group": 1}, {"dim": 256})]
    for (_, problem), kernels in zip(problems, compile_kernels(90, problems, tmp_path), strict=True):
        kernel = kernels[-1]
        assert kernel["kernel"] == "_key_bounds_kernel"
        assert kernel["spill_stores"] == 0, (problem, kernel)
        assert kernel["serialised"] == []
        assert len(kernel["loops"]) == 4, kernel["loops"]  # of each pass, without a mask and with it
        for loop, exponentials in zip(kernel["loops"], (True, True, False, False), strict=True):
            assert loop["products"] == 2 * problem.get("dim", 128) // 16, loop  # 64 rows times 16 components each
            assert len(loop["waits"]) == 1, loop
            assert bool(loop["exponentials"]) == exponentials, loop
            assert loop["operand_copies"] == loop["local_accesses"] == 0, loop


def test_versions_are_those_that_compile() -> None:
    """The rule for the Hopper kernels knows the Triton that the tests above just compiled them with."""
    from compactattn._triton.hopper_rule import GLUON_COMPILED, GLUON_VERSIONS

    assert triton_version() in (*GLUON_VERSIONS, *GLUON_COMPILED)
    assert not set(GLUON_VERSIONS) & set(GLUON_COMPILED)
