"""What a row reads and what it misses, measured inside the model on a few prompts: density, coverage, output error.

The model runs on the row's outputs, so every layer sees what it would see in earnest; each layer's output is compared
with dense attention over the same queries and keys. Sums run over all chunks with a past, so densities are averages
over a prompt, and over all layers, those that a row leaves dense included.

What a method reads depends on what it reads it from: QUOKA keeps its ratio of every prompt, a block selector adapts to
each. So the past that was read and the past that was visible are kept for each kind of prompt, text and every task.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.fidelity.methods import Methods, paged, register, unpacked
from benchmarks.fidelity.plans import Row
from benchmarks.testbed.answers import prefill
from compactattn import (
    BlockTable,
    Dense,
    KVSummary,
    PagedKV,
    PrefillBatch,
    SeerGate,
    attend,
    build_table,
    select,
    summarize,
    unite,
)
from compactattn.quality import (
    DensityCascade,
    QuokaSelection,
    coverage,
    density_cascade,
    output_error,
    quoka_attention,
    quoka_select,
    summarize_coverage,
)
from compactattn.selectors import Selector

PROBE_NAME = "fidelity_probe"
COVERAGE_THRESHOLD = 0.9
STEPS = ("mask", "query_block_union", "sub_group_union", "group_union")


Read = dict[str, dict[str, int]]
"""By kind of prompt: past tokens that are read after each of `STEPS`, and those that are "visible", over all heads."""


@dataclass
class Tally:
    """One layer's sums over chunks."""

    read: Read = field(default_factory=dict)
    covered: float = 0.0
    worst: float = 1.0
    below: int = 0
    queries: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, read: Read, shares: Tensor, errors: Tensor) -> None:
        """`shares` [T, Hq]: coverage; `errors` [Hq]."""
        self.add_read(read)
        found = summarize_coverage(shares, threshold=COVERAGE_THRESHOLD)
        heads = shares.shape[1]
        self.covered += float(found.mean.double().sum()) * found.queries
        self.worst = min(self.worst, float(found.worst.min()))
        self.below += int(found.below.sum())
        self.queries += found.queries * heads
        self.errors.append(float(errors.mean()))

    def add_read(self, read: Read) -> None:
        for kind, counts in read.items():
            mine = self.read.setdefault(kind, dict.fromkeys((*STEPS, "visible"), 0))
            for name, count in counts.items():
                mine[name] += count

    def as_json(self) -> dict[str, Any]:
        total = {name: sum(counts[name] for counts in self.read.values()) for name in (*STEPS, "visible")}
        return {
            "density": {name: _share(total[name], total["visible"]) for name in STEPS},
            "coverage": _share(self.covered, self.queries),
            "worst_coverage": round(self.worst, 5),
            f"below_{COVERAGE_THRESHOLD}": _share(self.below, self.queries),
            "output_error": round(float(np.mean(self.errors)), 5) if self.errors else None,
        }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 5) if whole else None


@torch.no_grad()
def probe(methods: Methods, row: Row, windows: Mapping[str, Sequence[np.ndarray]], chunk: int) -> dict[str, Any]:
    """Measure a row on windows int64 [context] of some kinds of prompt, all of one length.

    Returns:
        The record of all layers and kinds; under "layers" that of each layer, and under "kinds" what was read of the
        past, and what was visible, of each kind: tokens, summed over layers, heads and queries' blocks.
    """
    tallies = [Tally() for _ in range(methods.layers)]
    tokens = torch.from_numpy(np.stack([window for its in windows.values() for window in its])).to(methods.device)
    model, before = methods.model, methods.model.config._attn_implementation
    prober = _Prober(methods, row, tallies, tokens.shape[1], {kind: len(its) for kind, its in windows.items()})
    register(PROBE_NAME, prober.attention)
    model.set_attn_implementation(PROBE_NAME)
    try:
        prefill(model, tokens, DynamicCache(config=model.config), chunk)
    finally:
        model.set_attn_implementation(before)
    layers = [tally.as_json() for tally in tallies]
    total = Tally()
    for tally in tallies:
        total.add_read(tally.read)
        total.covered += tally.covered
        total.worst = min(total.worst, tally.worst)
        total.below += tally.below
        total.queries += tally.queries
        total.errors += tally.errors
    kinds = {kind: {"windows": len(its), "read": total.read.get(kind)} for kind, its in windows.items()}
    return {**total.as_json(), "windows": len(tokens), "kinds": kinds, "layers": layers}


class _Prober:
    """The attention function of a probe; the requests of a kind (`counts`: how many) stand together, in order."""

    def __init__(self, methods: Methods, row: Row, tallies: list[Tally], length: int, counts: dict[str, int]) -> None:
        self.row, self.tallies, self.length = row, tallies, length
        ends = list(itertools.accumulate(counts.values()))
        self.requests = {kind: slice(end - counts[kind], end) for kind, end in zip(counts, ends, strict=True)}
        if row.kind == "library":
            self.selectors: list[Selector] = [methods.of_layer(row, layer) for layer in range(methods.layers)]
        else:
            self.selectors = [Dense()] * methods.layers

    def attention(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        q, kv, batch = paged(query, key, value)
        if self.row.settings.get("dense_last_blocks"):
            batch = self._requests(batch.size, batch)
        everything = build_table(unite(select(q, kv, batch, Dense()), batch, heads_per_group=1))
        dense, dense_lse = attend(q, kv, batch, everything, scale=scale, return_lse=True)
        given: BlockTable | QuokaSelection
        if self.row.kind == "quoka":
            out, given, read = self._quoka(q, kv, batch, scale)
        else:
            out, given, read = self._blocks(int(module.layer_idx), q, kv, batch, scale)  # type: ignore[arg-type]
        shares = coverage(q, kv, batch, given, scale=scale, dense_lse=dense_lse)
        self.tallies[int(module.layer_idx)].add(read, shares, output_error(out, dense))  # type: ignore[arg-type]
        return unpacked(out, query)

    def _blocks(
        self, layer: int, q: Tensor, kv: PagedKV, batch: PrefillBatch, scale: float | None
    ) -> tuple[Tensor, BlockTable, Read]:
        row, selector = self.row, self.selectors[layer]
        gate = selector if isinstance(selector, SeerGate) else None
        corrected = row.correction and not isinstance(selector, Dense)
        summary: KVSummary = summarize(kv, batch, block_size=selector.block_size, values=corrected, gate=gate)
        selection = select(q, kv, batch, selector, scale=scale, summary=summary)
        grouping = {"heads_per_group": row.heads, "query_blocks_per_span": row.span}
        table = build_table(unite(selection, batch, **grouping))
        out = attend(q, kv, batch, table, scale=scale, correction=summary if corrected else None)
        assert isinstance(out, Tensor)
        read: Read = {}
        for kind, its in self.requests.items():
            part = replace(selection, mask=selection.mask[its])
            few = self._requests(len(part.mask), batch)
            cascade: DensityCascade = density_cascade(part, few, kv_heads=kv.num_kv_heads, **grouping)
            # tokens, not blocks, so that layers of different block sizes can be added
            read[kind] = {name: getattr(cascade, name) * selector.block_size for name in (*STEPS, "visible")}
        return out, table, read

    def _requests(self, count: int, batch: PrefillBatch) -> PrefillBatch:
        """So many requests of the lengths that all of the batch have, and of the prompt's where the row asks for it."""
        lengths = [[size] * count for size in (batch.max_q_len, batch.max_seq_len, self.length)]
        prompts = lengths[2] if self.row.settings.get("dense_last_blocks") else None
        return PrefillBatch.from_lens(lengths[0], lengths[1], batch.seq_lens.device, prompts)

    def _quoka(
        self, q: Tensor, kv: PagedKV, batch: PrefillBatch, scale: float | None
    ) -> tuple[Tensor, QuokaSelection, Read]:
        """QUOKA has no cascade: every step of it is what it keeps."""
        selection = quoka_select(q, kv, batch, **self.row.settings)
        out = quoka_attention(q, kv, batch, selection, scale=scale)
        read: Read = {}
        for kind, its in self.requests.items():
            kept, past = int(selection.counts[its].sum()), int(batch.past_lens[its].sum()) * kv.num_kv_heads
            read[kind] = {**dict.fromkeys(STEPS, kept), "visible": past}
        return out, selection, read
