"""`python -m benchmarks.grouping_costs`: what the cost model of `compactattn.grouping` should know of this GPU.

Four measurements of `attend`, interleaved, with the L2 evicted before each; bf16, D = 128, blocks and pages of 128:

    arithmetic  32 heads and query blocks walk one row of each KV head: the slope over the row's length, per member
    bytes       decode rows of 32 requests read every block of their caches once: time per block
    distinct    each (head, query block) walks a row of its own, of blocks that nobody else reads: time per block
    rows        the same blocks in one shared row, or in a copy of that row for each member: time per row

`distinct` is no constant of the model: near `bytes`, rows without a common block are bound by memory, which no union
helps. Writes JSON and prints the line for `COSTS`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

from benchmarks.arguments import seconds
from benchmarks.files import claim, write_new
from benchmarks.latency import environment
from benchmarks.timing import ColdCache, capture, interleaved_cuda
from compactattn import BlockTable, PagedKV, PrefillBatch, attend

KV_HEADS, GROUP, DIM, BLOCK, CHUNK, CONTEXT = 8, 4, 128, 128, 1024, 131072
DECODE_REQUESTS, DECODE_CONTEXT = 32, 16384
MEMBERS = GROUP * CHUNK // BLOCK  # (head, query block) pairs of one KV head
SHORT, LONG = 64, 512


def make_step(requests: int, q_len: int, context: int) -> tuple[torch.Tensor, PagedKV, PrefillBatch]:
    """Queries, cache and lengths of random bf16 numbers, pages in permuted order."""
    pages = context // BLOCK
    k, v = (
        torch.empty(requests * pages, BLOCK, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda").normal_() for _ in "kv"
    )
    page_table = torch.randperm(requests * pages, device="cuda").view(requests, pages).int()
    q = torch.randn(requests * q_len, KV_HEADS * GROUP, DIM, dtype=torch.bfloat16, device="cuda")
    return q, PagedKV(k, v, page_table), PrefillBatch.from_lens([q_len] * requests, [context] * requests, "cuda")


def shared_rows(length: int, copies: int = 1) -> BlockTable:
    """One row per KV head of `length` past blocks, or `copies` rows alike, spread over its heads and query blocks."""
    past = (CONTEXT - CHUNK) // BLOCK
    blocks = torch.stack([torch.randperm(past, device="cuda")[:length].sort().values for _ in range(KV_HEADS)])
    return _table(blocks.repeat_interleave(copies, 0))


def distinct_rows(length: int) -> BlockTable:
    """A row of its own for each head and query block; the rows of a KV head have no block in common."""
    past = (CONTEXT - CHUNK) // BLOCK
    rows = [
        torch.randperm(past, device="cuda")[: MEMBERS * length].view(MEMBERS, length).sort(-1).values
        for _ in range(KV_HEADS)
    ]
    return _table(torch.cat(rows))


def _table(blocks: torch.Tensor) -> BlockTable:
    """The table of rows of equal length, as many for each KV head, which its members use in turn."""
    indices = torch.zeros(len(blocks), CONTEXT // BLOCK, dtype=torch.int32, device="cuda")
    indices[:, : blocks.shape[1]] = blocks
    counts = torch.full((len(blocks),), blocks.shape[1], dtype=torch.int32, device="cuda")
    per_head = len(blocks) // KV_HEADS
    member = torch.arange(MEMBERS, device="cuda") * per_head // MEMBERS
    rows = torch.arange(KV_HEADS, device="cuda")[:, None] * per_head + member
    rows = rows.view(1, KV_HEADS * GROUP, CHUNK // BLOCK).int().contiguous()
    return BlockTable(indices, counts, rows, BLOCK, BLOCK)


def every_block(requests: int, context: int) -> BlockTable:
    """All blocks of each decode request in one row."""
    blocks = context // BLOCK
    indices = torch.arange(blocks, dtype=torch.int32, device="cuda").repeat(requests, 1)
    counts = torch.full((requests,), blocks, dtype=torch.int32, device="cuda")
    rows = torch.arange(requests, dtype=torch.int32, device="cuda")[:, None, None].expand(-1, KV_HEADS * GROUP, 1)
    return BlockTable(indices, counts, rows.contiguous(), BLOCK, BLOCK)


def measure(seconds: float) -> dict[str, float]:
    """Picoseconds: per block and member (arithmetic), per block (bytes, distinct), per row (rows)."""
    chunk, decode = make_step(1, CHUNK, CONTEXT), make_step(DECODE_REQUESTS, 1, DECODE_CONTEXT)
    own = (CONTEXT - CHUNK) // BLOCK // MEMBERS
    runs = {
        "short": (chunk, shared_rows(SHORT)),
        "long": (chunk, shared_rows(LONG)),
        "decode": (decode, every_block(DECODE_REQUESTS, DECODE_CONTEXT)),
        "distinct": (chunk, distinct_rows(own)),
        "distinct, short": (chunk, distinct_rows(own // 4)),
        "one row": (chunk, shared_rows(own)),
        "copied rows": (chunk, shared_rows(own, MEMBERS)),
    }
    replays = {}
    for name, ((q, kv, batch), table) in runs.items():
        run = functools.partial(attend, q, kv, batch, table)
        run()
        replays[name] = capture(run).run
    times = interleaved_cuda(replays, {}, seconds, cold=ColdCache(torch.device("cuda"), needed=True))
    ps = {name: times[name, "graph"].p50_ms * 1e9 for name in runs}
    pairs = KV_HEADS * MEMBERS
    return {
        "arithmetic_ps": (ps["long"] - ps["short"]) / (pairs * (LONG - SHORT)),
        "bytes_ps": ps["decode"] / (DECODE_REQUESTS * KV_HEADS * DECODE_CONTEXT // BLOCK),
        "distinct_ps": (ps["distinct"] - ps["distinct, short"]) / (pairs * (own - own // 4)),
        "row_ps": max(0.0, (ps["copied rows"] - ps["one row"]) / (pairs - KV_HEADS)),
        **{f"{name}, us": value / 1e6 for name, value in ps.items()},
    }


def main() -> int:
    """Measure this machine's GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouping_costs", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="directory for the JSON")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="time to spend on the timed loop")
    parsed = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.grouping_costs: expected a CUDA device, got none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    path = parsed.out / f"grouping-costs-{name.split()[-1].lower()}.json"
    claim(path)
    measured = measure(parsed.seconds)
    write_new(path, {"environment": environment("cuda"), "measured": measured})
    constants = ", ".join(f"{key}={measured[key]:.0f}" for key in ("arithmetic_ps", "bytes_ps", "row_ps"))
    print("\n".join(f"{key}: {value:.1f}" for key, value in measured.items()))
    print(f'"{name}": GroupingCosts({constants}),')
    return 0


if __name__ == "__main__":
    sys.exit(main())
