"""Small steps through every kernel of the Triton backend, for NVIDIA's compute-sanitizer on a GPU.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.sanitized
    compute-sanitizer --tool racecheck python -m tests.sanitized

Without PyTorch's caching allocator every tensor is an allocation of its own, so that an access one byte outside it is
found. Each step is also compared with the reference: a sanitized run that computes nonsense proves nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TypeVar

import torch

import compactattn
import reference
from compactattn import (
    BlockTable,
    Dense,
    DensityCounters,
    FlashPrefill,
    KeyBounds,
    KVSummary,
    PagedKV,
    PrefillBatch,
    XAttention,
)
from compactattn._triton.hopper_rule import why_not_hopper

Record = TypeVar("Record", PagedKV, PrefillBatch, BlockTable, KVSummary)

HEADS = 4

#: name: (query lengths, sequence lengths, page size, block size, query block, KV heads, head dimension, dtype)
STEPS = {
    "long, a dense request among sparse ones": ([150, 1, 40], [2100, 700, 40], 128, 128, 128, 2, 128, torch.bfloat16),
    "small pages": ([129, 3], [600, 515], 16, 128, 128, 2, 64, torch.float16),
    "small blocks": ([70], [450], 64, 64, 128, 2, 128, torch.bfloat16),
    "large pages": ([70], [700], 256, 128, 128, 2, 128, torch.bfloat16),
    "as many KV heads": ([150, 7], [2000, 900], 128, 128, 128, 4, 128, torch.float16),
    "general kernel": ([70, 2], [330, 130], 32, 64, 64, 2, 80, torch.bfloat16),
    "float32": ([40], [290], 16, 64, 64, 2, 64, torch.float32),
}


def run_step(name: str) -> str:
    """One step under several selectors and groupings; what ran the attention, after the comparison."""
    q_lens, seq_lens, page_size, block_size, query_block, kv_heads, dim, dtype = STEPS[name]
    generator = torch.Generator().manual_seed(0)
    width = -(-max(seq_lens) // page_size)
    pages = torch.randperm(width * len(q_lens), generator=generator).int().view(len(q_lens), width)
    k, v = torch.randn(2, pages.numel(), page_size, kv_heads, dim, generator=generator).to("cuda", dtype)
    q = torch.randn(sum(q_lens), HEADS, dim, generator=generator).to("cuda", dtype)
    kv, batch = PagedKV(k, v, pages.cuda()), PrefillBatch.from_lens(q_lens, seq_lens, "cuda", prompt_lens=seq_lens)
    blocks = {"block_size": block_size, "query_block": query_block}
    fine, coarse = (1, 1), (HEADS // kv_heads, None)
    for selector, (heads, span), correction in (
        (FlashPrefill(alpha=0.9, sink_blocks=1, window_blocks=1, dense_last_blocks=1, **blocks), fine, False),
        (FlashPrefill(alpha=0.9, sink_blocks=1, window_blocks=1, dense_keys=700, **blocks), coarse, True),
        (FlashPrefill(alpha=0.9, **blocks), ("auto", "auto"), False),
        (KeyBounds(threshold=0.1, sink_blocks=1, window_blocks=1, **blocks), fine, False),
        (KeyBounds(threshold=0.1, **blocks), coarse, True),
        (XAttention(threshold=0.5, **blocks), fine, False),
        (Dense(**blocks), coarse, False),
    ):
        grouping = {"heads_per_group": heads, "query_blocks_per_span": span}
        bounds = isinstance(selector, KeyBounds) and not correction  # else they are made anew from the keys
        summary = compactattn.summarize(kv, batch, block_size=block_size, values=True, bounds=bounds, since=0)
        how = {"selector": selector, "summary": summary, "correction": correction, "return_lse": True, **grouping}
        out, lse = compactattn.prefill(q, kv, batch, **how)
        table = compactattn.select_table(q, kv, batch, selector=selector, summary=summary, **grouping)
        arguments = (q.cpu(), _on_cpu(kv), _on_cpu(batch), _on_cpu(table))
        means = _on_cpu(summary) if correction else None
        want = reference.attend(*arguments, correction=means, return_lse=True)
        bound = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for got, expected in zip((out, lse), want, strict=True):
            worst = (got.cpu().double() - expected.double()).abs().max() / expected.double().abs().max()
            if not worst <= bound:
                raise SystemExit(f"{name}, {selector}, {grouping}: error {worst:.1e}, more than {bound:.1e}")
    _run_features(q, kv, batch, Dense(**blocks), bound)
    refusal = why_not_hopper(torch.cuda.get_device_capability(), dtype, dim, query_block)
    return "Hopper kernel" if refusal is None else "general kernel"


def _run_features(q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, selector: Dense, bound: float) -> None:
    """Soft-capping, a window, sinks and counters, over FP8 pages where queries have 16 bits; then a merge."""
    if q.dtype != torch.float32:
        scales = [torch.linspace(*ends, kv.num_kv_heads, device="cuda") for ends in ((0.5, 2.0), (1.5, 0.75))]
        k, v = ((x.float() / s[:, None]).to(torch.float8_e4m3fn) for x, s in zip((kv.k, kv.v), scales, strict=True))
        kv = PagedKV(k, v, kv.page_table, *scales)
    sinks, counters = torch.linspace(-1, 1, HEADS, device="cuda"), DensityCounters.zeros(1, "cuda")
    how = {"selector": selector, "heads_per_group": 1, "softcap": 20.0, "window": 300, "return_lse": True}
    out, lse = compactattn.prefill(q, kv, batch, sinks=sinks, density=counters.of_layer(0), **how)
    counted = DensityCounters.zeros(1)
    want = reference.prefill(
        q.cpu(), _on_cpu(kv), _on_cpu(batch), sinks=sinks.cpu(), density=counted.of_layer(0), **how
    )
    merged = compactattn.merge_attn_states(out, lse, out, lse)
    merged_want = reference.merge_attn_states(*want, *want)
    for got, expected in zip((out, lse, *merged), (*want, *merged_want), strict=True):
        worst = (got.cpu().double() - expected.double()).abs().max() / expected.double().abs().max()
        if not worst <= bound:
            raise SystemExit(f"features of models: error {worst:.1e}, more than {bound:.1e}")
    if counters.counts.tolist() != counted.counts.tolist():
        raise SystemExit(f"density counters: {counters.counts.tolist()}, not {counted.counts.tolist()}")


def _on_cpu(record: Record) -> Record:
    tensors = {name: value.cpu() for name, value in vars(record).items() if isinstance(value, torch.Tensor)}
    return replace(record, **tensors)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized", description=__doc__.split("\n")[0])
    parser.add_argument("--step", choices=tuple(STEPS), action="append", help="default: all")
    for name in parser.parse_args().step or STEPS:
        print(f"{name}: {run_step(name)}, as the reference", flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
