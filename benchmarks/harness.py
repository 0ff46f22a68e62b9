"""The one file that imports lm_eval (EleutherAI's lm-evaluation-harness, extra `ruler`).

Its RULER tasks make their examples when they are loaded. Loading asks nltk for a sentence model, which only tasks with
essays use; without a network nltk says that it could not be had, and the other tasks work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import nltk  # noqa: F401  # of the harness's extra `ruler`: say now what is missing
import torch
import wonderwords  # noqa: F401
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS_DIRECTORY = Path(lm_eval.tasks.__file__).parent / "ruler"
SEED = 0


class GeneratingModel(LM):
    """A transformers model for tasks that generate: one request at a time, prefilled in chunks, greedy.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        chunk: tokens per prefill chunk.
    """

    def __init__(self, model: Any, tokenizer: Any, chunk: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self.longest_prompt = 0

    @torch.no_grad()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each request's text, up to a stop string or the task's number of tokens."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, text: str, settings: dict[str, Any]) -> str:
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=bos is None or not text.startswith(bos))
        ids = encoded.input_ids.to(self.model.device)
        self.longest_prompt = max(self.longest_prompt, ids.shape[1])
        written = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(settings["max_gen_toks"]),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
            prefill_chunk_size=self.chunk,
        )
        answer = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in settings.get("until") or ():
            answer = answer.split(stop)[0]
        return answer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("tasks: expected tasks that generate, as RULER's do, got one of log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise ValueError("tasks: expected tasks that generate, as RULER's do, got one of log-likelihoods")

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def model(model: Any, tokenizer: Any, chunk: int) -> GeneratingModel:
    """The model as the harness takes it."""
    return GeneratingModel(model, tokenizer, chunk)


def tasks(names: Sequence[str], length: int, tokenizer: str) -> dict[str, Any]:
    """RULER tasks of one length by name; equal arguments make equal examples.

    Raises:
        ValueError: a name that is none of the harness's RULER tasks.
    """
    metadata: Any = {"max_seq_lengths": [length], "tokenizer": tokenizer}
    manager = TaskManager(include_path=TASKS_DIRECTORY, include_defaults=False, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"--tasks: expected some of {', '.join(sorted(manager.all_tasks))}, got {name!r}")
    random.seed(SEED)  # the tasks draw from Python's global generator
    return dict(manager.load(list(names))["tasks"])


def evaluate(
    lm: GeneratingModel, tasks: dict[str, Any], length: int, limit: int | None, chat_template: bool
) -> dict[str, float]:
    """Each task's score, from 0 to 1."""
    evaluated = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=chat_template,
        task_manager=TaskManager(include_path=TASKS_DIRECTORY, include_defaults=False),
    )
    assert evaluated is not None
    return {name: float(evaluated["results"][name][f"{length},none"]) for name in tasks}
