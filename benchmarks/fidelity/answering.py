"""Scores of one row: what the model answers to tasks after a sparse prefill, and what it pays for held-out text.

Two scores per item, as counts of right words:

- greedy: the prompt is prefilled in chunks, then the answer is decoded greedily; decode steps are exact and dense.
- in chunk: prompt and answer are prefilled together, and a word counts if the model puts each of its tokens first,
  given those before it. Here the retrieving queries themselves stand in a sparse chunk.

Both share every chunk but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import SINK_BLOCKS, WINDOW_BLOCKS, Row
from benchmarks.testbed.answers import batches, decode, prefill
from benchmarks.testbed.corpus import SEPARATOR
from benchmarks.testbed.evaluate import heldout_windows
from benchmarks.testbed.tasks import QUESTION, VALUE_DIGITS, WORD_LETTERS, Example, needle_line, score

BLOCK = 128
NEEDLE_BYTES = len(needle_line(b" " * WORD_LETTERS, b" " * VALUE_DIGITS))  # the longest line with a part of an answer


@dataclass(frozen=True)
class Answers:
    """Right words per item, one digit each: what `decode` wrote, and what a sparse chunk foresaw."""

    greedy: str
    in_chunk: str


@torch.no_grad()
def answer(methods: Methods, row: Row, examples: Sequence[Example], chunk: int, tokens_at_once: int) -> Answers:
    """Answers of a row to examples of one task and length."""
    greedy: dict[Example, int] = {}
    in_chunk: dict[Example, int] = {}
    if row.kind == "dense":
        tokens_at_once //= 4  # a prompt in one piece has every token's activations at once
    with methods.running(row):
        for part in batches(examples, tokens_at_once):
            written, foreseen = _answer_batch(methods, row, part, chunk)
            for example, output, guess in zip(part, written, foreseen, strict=True):
                greedy[example] = round(score(example, output.tolist()) * len(example.answers))
                in_chunk[example] = right_words(example, guess)
    return Answers(*("".join(str(right[example]) for example in examples) for right in (greedy, in_chunk)))


def _answer_batch(methods: Methods, row: Row, part: Sequence[Example], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens decoded [n, at most target], the token foreseen in place of each of the target's [n, target])."""
    model, target = methods.model, len(part[0].target)
    windows = torch.from_numpy(np.stack([example.window for example in part])).to(methods.device)
    prompt_len = windows.shape[1] - target
    pieces = None if row.kind == "dense" else chunk
    # where both ways part: the last chunk, or for a prompt in one piece its last token
    shared = prompt_len - 1 if pieces is None else (prompt_len - 1) // chunk * chunk
    cache = DynamicCache(config=model.config)
    with methods.prompts_of(row, prompt_len, len(part)):
        if pieces is not None and shared:
            prefill(model, windows[:, :shared], cache, pieces)
        begun = 0 if pieces is None else shared
        logits = prefill(model, windows[:, begun:prompt_len], cache, None)
        written = decode(model, logits, cache, target)
    if shared:
        cache.crop(shared - cache.get_seq_length())  # negative: so many tokens off the end
    else:
        cache = DynamicCache(config=model.config)
    with methods.prompts_of(row, windows.shape[1] - 1, len(part)):
        logits = model(
            input_ids=windows[:, shared:-1], past_key_values=cache, use_cache=True, logits_to_keep=target
        ).logits
    return written, logits.argmax(-1).cpu().numpy()


def right_words(example: Example, foreseen: np.ndarray) -> int:
    """How many words of the answer have every token right; `foreseen`: int64 [target]."""
    hits, right, begin = foreseen == example.target, 0, 0
    for word in example.answers:
        right += bool(hits[begin : begin + len(word)].all())
        begin += len(word) + 1
    return right


def hidden_needles(example: Example, chunk: int) -> int:
    """How many of the lines that the answer needs have to be selected.

    Sink, window and current region are read whatever a selector thinks. The window is that of the query block in which
    the question begins.
    """
    begins = int(np.flatnonzero(example.prompt == QUESTION)[0])
    seen_from = min((len(example.prompt) - 1) // chunk * chunk, (begins // BLOCK - WINDOW_BLOCKS + 1) * BLOCK)
    sink = SINK_BLOCKS * BLOCK
    return sum(sink <= place and place + NEEDLE_BYTES <= seen_from for place in example.needles)


@torch.no_grad()
def text_bits(
    methods: Methods, row: Row, stream: np.ndarray, context: int, chunk: int, windows: int, tokens_at_once: int
) -> tuple[list[float], list[int]]:
    """(bits, bytes) of each of at most `windows` held-out windows under chunked prefill; separators do not count."""
    texts = heldout_windows(stream, context, windows)
    bits: list[float] = []
    with methods.running(row):
        # logits of a whole chunk are kept in float32, so batches are smaller than those of the tasks
        for part in torch.from_numpy(texts).split(max(1, tokens_at_once // (4 * context))):
            tokens = part.to(methods.device)
            pieces = context if row.kind == "dense" else chunk
            with methods.prompts_of(row, context, len(tokens)):
                losses = _losses(methods.model, tokens, pieces)
            counted = tokens[:, 1:] < SEPARATOR
            bits += [round(float(value), 3) for value in (losses * counted).sum(1).double() / np.log(2)]
    return bits, (texts[:, 1:] < SEPARATOR).sum(1).tolist()


def _losses(model: LlamaForCausalLM, tokens: Tensor, chunk: int) -> Tensor:
    """Cross-entropy in nats of every token but the first: float32 [n, context] for tokens [n, context + 1]."""
    cache, losses = DynamicCache(config=model.config), []
    for begin in range(0, tokens.shape[1] - 1, chunk):
        end = min(begin + chunk, tokens.shape[1] - 1)
        logits = model(input_ids=tokens[:, begin:end], past_key_values=cache, use_cache=True).logits
        nats = functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, begin + 1 : end + 1].flatten(), reduction="none"
        )
        losses.append(nats.view(len(tokens), -1))
    return torch.cat(losses, dim=1)
