"""What the test bed's model answers: greedy decoding in batches, and task scores by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.testbed.intervals import wilson
from benchmarks.testbed.tasks import END, TASKS, Example, TaskSource, score

TOKENS_AT_ONCE = 1 << 20  # prompt tokens of one batch on a GPU


@dataclass(frozen=True)
class Accuracy:
    """Scores of one task at one length: the mean share of right words, its 95 % interval, the share without a fault."""

    mean: float
    low: float
    high: float
    faultless: float
    items: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Accuracy:
        mean = float(np.mean(scores))
        low, high = wilson(mean, len(scores))
        faultless = float(np.mean(np.asarray(scores) == 1.0))
        return cls(*(round(value, 4) for value in (mean, low, high, faultless)), len(scores))


def prefill(model: LlamaForCausalLM, tokens: Tensor, cache: DynamicCache, chunk: int | None) -> Tensor:
    """Run prompts [n, L] through the model, in chunks of `chunk` tokens (None: in one piece).

    Returns:
        The last position's logits, [n, vocabulary].
    """
    for part in tokens.split(tokens.shape[1] if chunk is None else chunk, dim=1):
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def decode(model: LlamaForCausalLM, logits: Tensor, cache: DynamicCache, count: int) -> np.ndarray:
    """Greedy: at most `count` tokens after the prompts in `cache`, whose last logits are given.

    Returns:
        int64 [n, at most count]; a row has no meaning after its first END.
    """
    written = [logits.argmax(-1)]
    over = written[0] == END
    while len(written) < count and not bool(over.all()):
        step = model(input_ids=written[-1][:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        written.append(step.logits[:, -1].argmax(-1))
        over |= written[-1] == END
    return torch.stack(written, dim=1).cpu().numpy()


def batches(examples: Sequence[Example], tokens_at_once: int) -> list[list[Example]]:
    """Examples of one task and length in batches of equally long prompts."""
    rows = max(1, tokens_at_once // len(examples[0].window))
    ordered = sorted(examples, key=lambda example: len(example.prompt))
    parts: list[list[Example]] = []
    for example in ordered:
        if not parts or len(parts[-1]) == rows or len(parts[-1][0].prompt) != len(example.prompt):
            parts.append([])
        parts[-1].append(example)
    return parts


@torch.no_grad()
def task_scores(
    model: LlamaForCausalLM, examples: Sequence[Example], *, tokens_at_once: int = TOKENS_AT_ONCE
) -> list[float]:
    """Each example's score under dense attention, in bfloat16 on a GPU; the examples are of one task and length."""
    device = next(model.parameters()).device
    scores: dict[Example, float] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for part in batches(examples, tokens_at_once):
            prompts = torch.from_numpy(np.stack([example.prompt for example in part])).to(device)
            cache = DynamicCache(config=model.config)
            logits = prefill(model, prompts, cache, None)
            outputs = decode(model, logits, cache, max(len(example.target) for example in part))
            scores.update({one: score(one, out.tolist()) for one, out in zip(part, outputs, strict=True)})
    return [scores[example] for example in examples]


def task_report(
    model: LlamaForCausalLM, source: TaskSource, lengths: Sequence[int], items: int, *, tokens_at_once: int
) -> dict[str, dict[str, Any]]:
    """`Accuracy` of every task on `items` test examples at each length: {length: {task: ...}}, ready for JSON."""
    was_training = model.training
    model.eval()
    report: dict[str, dict[str, Any]] = {}
    for length in lengths:
        report[str(length)] = {}
        for task in TASKS:
            examples = [source.example(task, "test", length, index) for index in range(items)]
            scores = task_scores(model, examples, tokens_at_once=tokens_at_once)
            report[str(length)][task] = asdict(Accuracy.of(scores))
    model.train(was_training)
    return report
