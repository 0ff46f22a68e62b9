"""The whole stack against float64: nothing is timed whose attention does not give the logits that it should.

A small model of the same classes, with the heads of the case, takes a prompt in chunks. Per request its logits may be
as far from float64 ones as twice those of plain attention in the same dtype, plus one rounding:
max|x - x64| <= 2 · max|plain - x64| + eps(dtype) · max|x64|, over all tokens and the vocabulary. Both references have
the same weights and take the prompt in one piece through transformers' own attention, under an explicit mask: neither
this benchmark's cache nor its attentions have a part in them. (transformers computes norms in float32 there too.) The
cache holds NaN wherever nothing has been written yet.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import baselines
from benchmarks.cases import Grouping, table_mask
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
    list random blocks, in chunks of unaligned length. The dense ones take chunks of whole blocks, for other libraries
    may need them.
    """
    small = case.stack.small(case.shape)
    stack = Stack(small, min(case.shape.batch, 2), CAPACITY, device, getattr(torch, case.dtype))
    exact, plain = reference_models(stack)
    tokens = stack.random_chunk(0, sum(LENGTHS)).tokens
    verdicts, absent = {}, {}
    chunks, causal = in_chunks(tokens, ALIGNED), causal_mask(tokens.shape[1], device)
    truth, spelled_out = (in_one_piece(model, tokens, causal) for model in (exact, plain))
    for name, make in dense.items():
        try:
            verdicts[name] = budgeted(logits(stack, chunks, make), spelled_out, truth)
        except Exception as error:
            absent[name] = baselines.reason(error)
    chunks = in_chunks(tokens, LENGTHS)
    for grouping in groupings:
        tables = {
            chunk.past: controlled_table(chunk.batch, small.q_heads, grouping, HALF, seed=n)
            for n, chunk in enumerate(chunks)
        }
        seen = causal & listed_tokens(chunks, tables)
        truth, spelled_out = (in_one_piece(model, tokens, seen) for model in (exact, plain))
        sparse = logits(stack, chunks, functools.partial(_sparse, tables, grouping))
        verdicts[str(grouping)] = budgeted(sparse, spelled_out, truth)
    return verdicts, absent


def reference_models(stack: Stack) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stack's model in float64 and in its own dtype, with transformers' attention instead of the stack's."""
    exact = stack.shape.build("sdpa", stack.device, torch.float64, experts="eager")
    plain = stack.shape.build("eager", stack.device, stack.dtype)
    for model in (exact, plain):
        model.load_state_dict(stack.model.state_dict())
    return exact, plain


@torch.no_grad()
def in_one_piece(model: torch.nn.Module, tokens: Tensor, seen: Tensor) -> Tensor:
    """Logits [B, n, vocab] of a whole prompt, without a cache; `seen`: bool [B, Hq, n, n], or broadcastable to it."""
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def causal_mask(length: int, device: str | torch.device) -> Tensor:
    """Bool [1, 1, length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def listed_tokens(chunks: Sequence[Chunk], tables: Mapping[int, BlockTable]) -> Tensor:
    """The tokens that every query's table row names, by chunk: bool [B, Hq, n, n] over the whole prompt."""
    parts = []
    for chunk in chunks:
        table = tables[chunk.past]
        block = torch.arange(chunk.tokens.shape[1], device=chunk.tokens.device) // table.query_block
        keep = table_mask(table)[table.rows.long()[:, :, block]].repeat_interleave(table.block_size, -1)
        keep = keep[..., : chunk.context]
        parts.append(torch.nn.functional.pad(keep, (0, chunks[-1].context - chunk.context)))
    return torch.cat(parts, dim=2)


def in_chunks(tokens: Tensor, lengths: Sequence[int]) -> list[Chunk]:
    """A prompt [B, n] in chunks of these lengths."""
    starts = itertools.accumulate(lengths, initial=0)
    return [Chunk.of(part, past) for part, past in zip(tokens.split(list(lengths), dim=1), starts, strict=False)]


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
