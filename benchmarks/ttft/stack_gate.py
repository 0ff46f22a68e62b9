"""The whole stack against float64: nothing is timed whose attention does not give the logits that it should.

A small model of the same classes, with the heads of the case, takes a prompt in chunks of unaligned length. Per request
its logits may be as far from a float64 model's as twice those of plain attention in the same dtype and the same stack,
plus one rounding: max|x - x64| <= 2 · max|plain - x64| + eps(dtype) · max|x64|, over all tokens and the vocabulary. The
float64 model has the same weights; where attention is dense it takes the prompt in one piece. The cache holds NaN
wherever nothing has been written yet.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.cases import Grouping
from benchmarks.gate import Verdict
from benchmarks.tables import Lengths, controlled_table
from benchmarks.ttft import attentions
from benchmarks.ttft.cases import StackCase
from benchmarks.ttft.stack import Attention, Chunk, Stack
from compactattn import BlockTable

LENGTHS, ALIGNED = (260, 130, 122), (256, 128, 128)  # of chunks
CAPACITY = 640  # the last page stays NaN
HALF = Lengths("uneven 0.5", 0.5, "uneven")

MakeAttention = Callable[[Stack, Chunk], Attention]


def stack_verdicts(
    case: StackCase, device: str, dense: Mapping[str, MakeAttention], groupings: Sequence[Grouping]
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Verdicts of the dense attentions by name and of the groupings by name, and why a dense one does not run.

    The sparse ones run as they are timed: they select first, and attend over the tables that they are given, which
    list random blocks. The dense ones take chunks of whole blocks, for other libraries may need them.
    """
    small = case.stack.small(case.shape)
    batch, dtype = min(case.shape.batch, 2), getattr(torch, case.dtype)
    stack = Stack(small, batch, CAPACITY, device, dtype)
    exact = Stack(small, batch, CAPACITY, device, torch.float64, experts="eager")
    exact.model.load_state_dict(stack.model.state_dict())
    tokens = stack.random_chunk(0, sum(LENGTHS)).tokens
    truth = logits(exact, [Chunk.of(tokens, 0)], attentions.plain)
    verdicts, absent = {}, {}
    chunks = _chunks(tokens, ALIGNED)
    spelled_out = logits(stack, chunks, attentions.plain)
    for name, make in dense.items():
        try:
            verdicts[name] = budgeted(logits(stack, chunks, make), spelled_out, truth)
        except Exception as error:
            absent[name] = baselines.reason(error)
    chunks = _chunks(tokens, LENGTHS)
    for grouping in groupings:
        tables = {
            chunk.past: controlled_table(chunk.batch, small.q_heads, grouping, HALF, seed=n)
            for n, chunk in enumerate(chunks)
        }
        under_table = functools.partial(_under_table, tables)
        runs = (logits(one, chunks, under_table) for one in (stack, exact))
        sparse = logits(stack, chunks, functools.partial(_sparse, tables, grouping))
        verdicts[str(grouping)] = budgeted(sparse, *runs)
    return verdicts, absent


def _chunks(tokens: Tensor, lengths: Sequence[int]) -> list[Chunk]:
    starts = itertools.accumulate(lengths, initial=0)
    return [Chunk.of(part, past) for part, past in zip(tokens.split(list(lengths), dim=1), starts, strict=False)]


def _under_table(tables: Mapping[int, BlockTable], stack: Stack, chunk: Chunk) -> Attention:
    return attentions.plain(stack, chunk, tables[chunk.past])


def _sparse(tables: Mapping[int, BlockTable], grouping: Grouping, stack: Stack, chunk: Chunk) -> Attention:
    paged = stack.paged(chunk.context)
    means = stack.summaries(paged, chunk.batch)
    return attentions.selected(chunk, paged, means, tables[chunk.past], grouping, {})


def logits(stack: Stack, chunks: Sequence[Chunk], make: MakeAttention) -> Tensor:
    """Logits of every token of a prompt in chunks, [B, tokens, vocab]."""
    stack.cache.fill(math.nan)
    return torch.cat([stack.forward(chunk, make(stack, chunk), every_token=True) for chunk in chunks], dim=1)


def budgeted(got: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Whether [B, tokens, vocab] is as close to float64 as the budget allows; NaN never passes."""
    error, plain_error = ((x.double() - truth).abs().amax((1, 2)).nan_to_num(math.inf, math.inf) for x in (got, plain))
    allowed = 2 * plain_error + torch.finfo(got.dtype).eps * truth.abs().amax((1, 2))
    ratio = float((error / allowed).nan_to_num(math.inf).amax())
    return Verdict(ratio <= 1, ratio, got.shape[1], "logits of the whole stack, in small, against float64")
