"""What a row reads and what it misses, measured inside the model on a few prompts: density, coverage, output error.

The model runs on the row's outputs, so every layer sees what it would see in earnest; each layer's output is compared
with dense attention over the same queries and keys. Sums run over all chunks with a past, so densities are averages
over a prompt, and over all layers, those that a row leaves dense included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class Tally:
    """One layer's sums over chunks."""

    read: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STEPS, "visible"), 0.0))
    covered: float = 0.0
    worst: float = 1.0
    below: int = 0
    queries: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, read: dict[str, float], shares: Tensor, errors: Tensor) -> None:
        """`read`: past blocks (or tokens) at each step; `shares` [T, Hq]: coverage; `errors` [Hq]."""
        for name, count in read.items():
            self.read[name] += count
        found = summarize_coverage(shares, threshold=COVERAGE_THRESHOLD)
        heads = shares.shape[1]
        self.covered += float(found.mean.double().sum()) * found.queries
        self.worst = min(self.worst, float(found.worst.min()))
        self.below += int(found.below.sum())
        self.queries += found.queries * heads
        self.errors.append(float(errors.mean()))

    def as_json(self) -> dict[str, Any]:
        density = {name: _share(self.read[name], self.read["visible"]) for name in STEPS}
        return {
            "density": density,
            "coverage": _share(self.covered, self.queries),
            "worst_coverage": round(self.worst, 5),
            f"below_{COVERAGE_THRESHOLD}": _share(self.below, self.queries),
            "output_error": round(float(np.mean(self.errors)), 5) if self.errors else None,
        }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 5) if whole else None


@torch.no_grad()
def probe(methods: Methods, row: Row, windows: Sequence[np.ndarray], chunk: int) -> dict[str, Any]:
    """Measure a row on windows int64 [context], all of one length; the record of all layers, and one of each."""
    tallies = [Tally() for _ in range(methods.layers)]
    tokens = torch.from_numpy(np.stack(windows)).to(methods.device)
    model, before = methods.model, methods.model.config._attn_implementation
    prober = _Prober(methods, row, tallies, tokens.shape[1])
    register(PROBE_NAME, prober.attention)
    model.set_attn_implementation(PROBE_NAME)
    try:
        prefill(model, tokens, DynamicCache(config=model.config), chunk)
    finally:
        model.set_attn_implementation(before)
    layers = [tally.as_json() for tally in tallies]
    total = Tally()
    for tally in tallies:
        for name, count in tally.read.items():
            total.read[name] += count
        total.covered += tally.covered
        total.worst = min(total.worst, tally.worst)
        total.below += tally.below
        total.queries += tally.queries
        total.errors += tally.errors
    return {**total.as_json(), "windows": len(windows), "layers": layers}


class _Prober:
    """The attention function of a probe."""

    def __init__(self, methods: Methods, row: Row, tallies: list[Tally], length: int) -> None:
        self.row, self.tallies, self.length = row, tallies, length
        if row.kind == "library":
            self.selectors: list[Selector] = [methods.of_layer(row, layer) for layer in range(methods.layers)]
        else:
            self.selectors = [Dense()] * methods.layers

    def attention(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        q, kv, batch = paged(query, key, value)
        if self.row.settings.get("dense_last_blocks"):
            lengths = [[size] * batch.size for size in (query.shape[2], key.shape[2], self.length)]
            batch = PrefillBatch.from_lens(lengths[0], lengths[1], q.device, lengths[2])
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
    ) -> tuple[Tensor, BlockTable, dict[str, float]]:
        row, selector = self.row, self.selectors[layer]
        gate = selector if isinstance(selector, SeerGate) else None
        corrected = row.correction and not isinstance(selector, Dense)
        summary: KVSummary = summarize(kv, batch, block_size=selector.block_size, values=corrected, gate=gate)
        selection = select(q, kv, batch, selector, scale=scale, summary=summary)
        grouping = {"heads_per_group": row.heads, "query_blocks_per_span": row.span}
        table = build_table(unite(selection, batch, **grouping))
        out = attend(q, kv, batch, table, scale=scale, correction=summary if corrected else None)
        assert isinstance(out, Tensor)
        cascade: DensityCascade = density_cascade(selection, batch, kv_heads=kv.num_kv_heads, **grouping)
        # tokens, not blocks, so that layers of different block sizes can be added
        counts = {name: getattr(cascade, name) * float(selector.block_size) for name in (*STEPS, "visible")}
        return out, table, counts

    def _quoka(
        self, q: Tensor, kv: PagedKV, batch: PrefillBatch, scale: float | None
    ) -> tuple[Tensor, QuokaSelection, dict[str, float]]:
        """QUOKA has no cascade: every step of it is what it keeps."""
        selection = quoka_select(q, kv, batch, **self.row.settings)
        kept, past = float(selection.counts.sum()), float(batch.past_lens.sum()) * kv.num_kv_heads
        out = quoka_attention(q, kv, batch, selection, scale=scale)
        return out, selection, {**dict.fromkeys(STEPS, kept), "visible": past}
