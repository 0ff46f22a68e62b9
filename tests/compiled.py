"""Compile the Triton backend's kernels for a GPU that is not there: `python -m tests.compiled < problems.json`.

The library's own launchers run, on CPU tensors, with a driver that names the GPU; each launch compiles and stops.
What is measured is therefore what a user's GPU would get, launch options and specialisations included. To be run
without TRITON_INTERPRET, with TRITON_DUMP_PTXAS_LOG=1 and an empty TRITON_CACHE_DIR, so that ptxas runs and is heard.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from compactattn import BlockTable, FlashPrefill, KeyBounds, KVSummary, Oracle, PagedKV, PrefillBatch
from compactattn.features import Features
from compactattn.selection import BlockScores

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Kernel = tuple[str, Any, str]  # name, what Triton compiled, what ptxas said


class AbsentGPU:
    """A Triton driver that knows its target and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def run(launcher: str, arch: int, p: dict[str, Any]) -> None:
    """Call one of the backend's launchers on tensors of the given shape."""
    from compactattn._triton import (
        attention,
        block_mass,
        bound_scores,
        density,
        launch,
        merge,
        scores,
        summary,
        table,
        union,
    )

    launch.capability = lambda _: divmod(arch, 10)  # the overlap of launches
    bound_scores.capability = launch.capability
    dtype = getattr(torch, p.get("dtype", "bfloat16"))
    dim, page_size, block_size = p.get("dim", 128), p.get("page", 128), p.get("block", 128)
    group, query_block, kv_heads, pages = p.get("group", 4), p.get("query_block", 128), 8, 16
    tokens = pages * page_size
    batch = PrefillBatch.from_lens([256], [tokens], prompt_lens=[tokens])
    q = torch.empty(256, kv_heads * group, dim, dtype=dtype)
    k, v = torch.empty(2, pages, page_size, kv_heads, dim, dtype=torch.float8_e4m3fn if p.get("fp8") else dtype)
    scales = (torch.ones(kv_heads), torch.ones(kv_heads)) if p.get("fp8") else ()
    kv = PagedKV(k, v, torch.zeros(1, pages, dtype=torch.int32), *scales)
    sinks = torch.zeros(kv_heads * group) if p.get("sinks") else None
    features = Features(p.get("softcap"), p.get("window"), sinks)
    q_blocks, kv_blocks = batch.query_blocks(query_block), batch.kv_blocks(block_size)
    rows = torch.zeros(1, q.shape[1], q_blocks, dtype=torch.int32)
    names = {"block_size": block_size, "query_block": query_block}
    blocks = BlockTable(torch.zeros(1, kv_blocks, dtype=torch.int32), torch.ones(1, dtype=torch.int32), rows, **names)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2]) if p.get("lse", True) else None
    selector = FlashPrefill(alpha=0.1, **names)
    unit = min(page_size, block_size)
    if launcher == "hopper":
        from compactattn._triton import hopper

        hopper.attend(q, kv, batch, blocks, dim**-0.5, out, lse)
    elif launcher == "attend":
        tuning = attention.attend_tuning
        capability = divmod(arch, 10)
        attention.attend_tuning = lambda d, t, page, qb, _, tma: tuning(d, t, page, qb, capability, tma)
        attention.attend(q, kv, batch, blocks, dim**-0.5, out, lse, features)
        attention.attend_tuning = tuning
    elif launcher == "hopper scores":
        from compactattn._triton import hopper_scores

        means = torch.empty(1, kv_heads, kv_blocks, dim, dtype=dtype)
        hopper_scores.score_blocks(q, means, batch, block_size, dim**-0.5, -(-kv_blocks // 16) * 16, scores.MAX_PARTS)
    elif launcher == "scores":
        means = KVSummary(torch.empty(pages, page_size // unit, kv_heads, dim), None, unit)
        scores.flash_prefill_scores(q, kv, batch, selector, scale=dim**-0.5, summary=means)
    elif launcher == "pooled":  # means per unit from the cache, then per block
        summary.block_means(kv, batch, block_size, dtype, None)
    elif launcher == "update":
        means = KVSummary(torch.empty(pages, page_size // unit, kv_heads, dim), None, unit)
        summary.update_summary(kv, batch, means, None)
    elif launcher == "bounds":  # of units, from the cache, then of blocks, then scores
        bound_scores.key_bounds_scores(q, kv, batch, KeyBounds(**names), scale=dim**-0.5, summary=None)
    elif launcher == "table":
        log_s = torch.zeros(1, q.shape[1], q_blocks, kv_blocks)
        found = BlockScores(log_s, torch.zeros(1, q.shape[1], q_blocks, math.ceil(kv_blocks / 128)))
        table.table_from_scores(found, batch, selector, kv_heads, p.get("heads", group), p.get("span", 1))
    elif launcher == "union":
        mask = torch.zeros(1, q.shape[1], q_blocks, kv_blocks, dtype=torch.bool)
        from compactattn import SelectionMask

        table.build_table(union.unite(SelectionMask(mask, **names), batch, group, 1))
    elif launcher == "mass":
        block_mass.block_mass(q, kv, batch, Oracle(mass=0.9, **names), stride=1, scale=dim**-0.5)
    elif launcher == "merge":
        merge.merge_attn_states(
            out, torch.empty(q.shape[:2]), q, torch.empty(q.shape[:2]), out, torch.empty(q.shape[:2])
        )
    elif launcher == "density":
        density.count_density(blocks, batch, torch.zeros(2, dtype=torch.int64), p.get("window"))
    else:
        raise ValueError(f"no launcher {launcher}")


def compile_kernels(arch: int, launcher: str, problem: dict[str, Any]) -> list[Kernel]:
    """What a call of the launcher compiles for this architecture, beside what earlier calls already did."""
    found: list[Kernel] = []

    def compile_only(kernel, grid):
        def launch(*args, **options):
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            if log.getvalue():  # ptxas is heard once: a kernel that the process has is not compiled again
                found.append((kernel.fn.__name__, compiled, log.getvalue()))

        return launch

    triton.runtime.driver.set_active(AbsentGPU(arch))
    triton.runtime.jit.JITFunction.__getitem__ = compile_only
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=132)
    run(launcher, arch, problem)
    return found


def disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout
    return [(int(a, 16), code) for a, code in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing)]


def product_loops(code: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """The innermost loops that hold tensor-core products of warpgroups."""
    loops = []
    for address, instruction in code:
        branch = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if branch and int(branch[1], 16) < address:
            body = [(a, text) for a, text in code if int(branch[1], 16) <= a <= address]
            if any("HGMMA" in text for _, text in body):
                loops.append((body[0][0], address, [text for _, text in body]))
    inner = [
        body
        for first, last, body in loops
        if not any((f, s) != (first, last) and first <= f and s <= last for f, s, _ in loops)
    ]

    def places(body: list[str], word: str) -> list[int]:
        return [place for place, text in enumerate(body) if re.search(rf"\b{word}", text)]

    return [
        {
            "instructions": len(body),
            "products": len(places(body, "HGMMA")),
            "waits": places(body, r"WARPGROUP\.DEPBAR"),
            "exponentials": places(body, r"MUFU\.EX2"),
            "operand_copies": len(places(body, "LDSM")),
            "local_accesses": len(places(body, "LDL")) + len(places(body, "STL")),
        }
        for body in inner
    ]


def describe(name: str, compiled: Any, log: str) -> dict[str, Any]:
    """Registers and spills as ptxas counts them; of kernels for warpgroups also the loops of their machine code."""

    def numbers(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, log)]

    return {
        "kernel": name,
        "registers": max(numbers(r"Used (\d+) registers")),
        "spill_stores": sum(numbers(r"(\d+) bytes spill stores")),
        "spill_loads": sum(numbers(r"(\d+) bytes spill loads")),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "serialised": re.findall(r"C75\d\d", log),
        "loops": product_loops(disassemble(compiled.asm["cubin"]))
        if name.startswith(("_hopper", "_key_bounds"))
        else [],
    }


def main() -> None:
    arch, problems = json.load(sys.stdin)
    result = []
    for launcher, problem in problems:
        result.append([describe(*kernel) for kernel in compile_kernels(arch, launcher, problem)])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
