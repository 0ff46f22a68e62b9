"""Whole prompts, chunk by chunk: dense and `prefill` on the calibrated workload.

Chunk n has the same past in every prompt that is long enough, so each is measured once and the sums of prompts of
32K, 64K, ... share their chunks. Every chunk is a fresh draw of the workload at its own context, planted on noise that
is drawn once for the whole prompt.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import step_field
from benchmarks.measure import BRIEF, measure
from benchmarks.workloads import (
    BLOCK,
    PUBLISHED_DENSITY,
    QUERY_NOISE,
    SELECTOR,
    WORKLOADS,
    Density,
    Step,
    draw_pattern,
    plant,
    structure_generator,
)
from compactattn import PagedKV, PrefillBatch, select
from compactattn.selection import block_rules

SELECTION_CHECKED = 8  # of so many measured chunks, one has its mask compared with float64 scores


class Canvas:
    """Buffers and noise for the keys and values of a whole prompt, on which the structure of one chunk at a time lies.

    Making a step overwrites the keys of the step before. Keys beyond a step's context are NaN until a later step
    writes them; the page table of a step names no page beyond its context.
    """

    def __init__(self, case: Case, device: str) -> None:
        shape, dtype = case.shape, getattr(torch, case.dtype)
        if case.chunk % case.page_size or case.context % case.chunk:
            got = f"chunks of {case.chunk}, pages of {case.page_size}, a prompt of {case.context}"
            raise ValueError(f"case: expected pages that divide the chunk and chunks that divide the prompt, got {got}")
        self.case, self.device = case, device
        tokens = (shape.batch, shape.kv_heads, case.context, shape.head_dim)
        noise = torch.Generator(device).manual_seed(case.context)
        self.noise, self.v = (torch.empty(tokens, dtype=dtype, device=device).normal_(generator=noise) for _ in "kv")
        self.k = torch.full_like(self.noise, torch.nan)
        pages = case.context // case.page_size
        order = torch.randperm(shape.batch * pages, generator=torch.Generator().manual_seed(1))
        self.page_table = order.view(shape.batch, pages).to(device)
        paged = (shape.batch * pages, case.page_size, shape.kv_heads, shape.head_dim)
        self.k_pages, self.v_pages = (torch.full(paged, torch.nan, dtype=dtype, device=device) for _ in "kv")
        for b in range(shape.batch):
            self._write_pages(self.v_pages, self.v, b, pages)

    def _write_pages(self, cache: torch.Tensor, tokens: torch.Tensor, b: int, pages: int) -> None:
        rows = tokens[b, :, : pages * self.case.page_size].transpose(0, 1)
        cache[self.page_table[b, :pages]] = rows.unflatten(0, (pages, self.case.page_size))

    def step(self, n: int) -> Step:
        """The n-th chunk over everything before it, structured like `make_step(..., seed=n)`."""
        case, shape, device = self.case, self.case.shape, self.device
        workload, context, dtype = WORKLOADS[case.workload], (n + 1) * case.chunk, self.k.dtype
        generator = structure_generator(n, context, case.chunk)
        pattern = draw_pattern(workload, shape, context, case.chunk, case.correlation, generator)
        means, directions = plant(workload, shape, pattern, shape.head_dim**-0.5, generator, device)
        pages = context // case.page_size
        for b in range(shape.batch):
            mean = means[b].to(dtype).transpose(0, 1).repeat_interleave(BLOCK, 1)[:, :context]
            torch.add(self.noise[b, :, :context], mean, out=self.k[b, :, :context])
            self._write_pages(self.k_pages, self.k, b, pages)
        q = torch.empty(shape.batch, case.chunk, shape.q_heads, shape.head_dim, dtype=dtype, device=device)
        q.normal_(std=QUERY_NOISE, generator=torch.Generator(device).manual_seed(n + 1))
        for i, rows in enumerate(q.split(BLOCK, dim=1)):
            rows += directions[:, i, None].to(dtype)
        kv = PagedKV(self.k_pages, self.v_pages, self.page_table[:, :pages].int())
        batch = PrefillBatch.from_lens([case.chunk] * shape.batch, [context] * shape.batch, device)
        return Step(shape, context, case.chunk, q.flatten(0, 1), kv, batch, self.k, self.v)


def places(case: Case) -> tuple[list[int], float]:
    """Which chunks of a prompt are measured, and how many chunks each of them stands for."""
    first, last = case.since // case.chunk, case.context // case.chunk
    chosen = list(range(min(first + case.stride // 2, last - 1), last, case.stride))
    return chosen, (last - first) / len(chosen)


def measured_prompt(case: Case, seconds: float, device: str, cold: bool) -> dict[str, object]:
    """A record of the chunks beyond `case.since`: each with the rows of dense and of `prefill`, and its density."""
    canvas = Canvas(case, device)
    chunks, absent = [], {}
    total: dict[str, Density] = {}
    chosen, stands_for = places(case)
    for n in chosen:
        step = canvas.step(n)
        lineup = step_field(replace(case, peers=False), step, stages=False)
        if n in chosen[::SELECTION_CHECKED]:
            _check_selection(step)
        rows, missing = measure(lineup, seconds, device, cold=cold, rounds=BRIEF)
        absent |= missing
        density = {name: asdict(one) for name, one in lineup.measured.items()}
        chunks.append({"context": step.context, "stands_for": stands_for, "rows": brief_rows(rows), "density": density})
        for name, one in lineup.measured.items():
            total[name] = total.get(name, Density()) + one
        del step, lineup
    return {
        "chunks": chunks,
        "did_not_run": absent,
        "density": {name: one.as_json() for name, one in total.items()},
        "published_density": PUBLISHED_DENSITY.get(case.context),
    }


def _check_selection(step: Step) -> None:
    """Hold the mask, which the tables are checked against, to float64 scores.

    Raises:
        RuntimeError: it is not what the scores say.
    """
    selection = select(step.q, step.kv, step.batch, SELECTOR)
    forced = block_rules(step.batch, SELECTOR).forced
    verdict = gate.check_selection(selection, step.q, step.kv, step.batch, SELECTOR, forced)
    if not verdict.passed:
        raise RuntimeError(f"red gate at context {step.context}: {verdict}")


def brief_rows(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Rows without what is the same in every chunk."""
    return [{key: value for key, value in row.items() if key not in ("note", "bytes", "cold_l2")} for row in rows]
