"""What the test bed is trained further on: source text, tasks, and windows with many questions about one text.

A task asks one thing, so of thousands of tokens a handful teach. A window of many questions strews keys, values and
chains over one text as the tasks do, and asks for all of them that fit into a third of it, in the tasks' own words:

    text  QUESTION secret of <key>  ANSWER <value> END  QUESTION variables of <value>  ANSWER <name> ... END  ...

No key is asked for twice, so no answer can be copied from an earlier one. Everything is of the train side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.tasks import (
    CHAIN,
    END,
    QUERIES,
    SHORTEST,
    TASKS,
    VALUES,
    Maker,
    Side,
    TaskSource,
    bytes_as_tokens,
    chain_lines,
    needle_line,
)

# The tasks that windows of many questions cannot teach, and the longest ones, come more often.
TASK_WEIGHTS = {"variable_tracking": 2.0, "common_words": 3.0, "frequent_words": 3.0}
WINDOWS = 4
_SEVERAL, _CHAIN = 0.2, 0.3  # keys of several values, and chains, in a text of many questions; the rest: one value
_TOGETHER = 0.4  # share of the keys that are asked for in one question with others


@dataclass(frozen=True)
class Mixture:
    """Shares of the windows; the rest are single tasks.

    Attributes:
        text_share: windows of source text, learnt whole.
        many_share: windows with many questions, of which the answers are learnt.
        repeat_share: windows of source text that get planted repeats, see `corpus.plant_repeats`.
    """

    text_share: float = 0.3
    many_share: float = 0.4
    repeat_share: float = 0.4

    def __post_init__(self) -> None:
        for name in ("text_share", "many_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected 0 to 1, got {getattr(self, name)}")
        if self.text_share + self.many_share > 1:
            total = self.text_share + self.many_share
            raise ValueError(f"--many-share: expected at most 1 together with --text-share, got {total}")


class Batches(Dataset):  # type: ignore[type-arg]  # torch leaves the class without a parameter at run time
    """Training batches by step: equal arguments give equal batches, whatever was drawn before.

    Args:
        source: of tasks and text; its seed decides everything.
        mixture: the shares.
        context: tokens per window; those of every fourth step are a quarter as long, but `SHORTEST` at least.
        tokens_per_step: tokens of a batch, which has `WINDOWS` windows or more all the same.

    Raises:
        ValueError: a context that is too short for a task, or longer than the text.
    """

    def __init__(self, source: TaskSource, mixture: Mixture, context: int, tokens_per_step: int) -> None:
        if context < SHORTEST:
            raise ValueError(f"--context: expected at least {SHORTEST}, got {context}")
        if len(source.streams["train"]) <= context:
            raise ValueError(f"--context: expected less than {len(source.streams['train'])}, the text, got {context}")
        self.source, self.mixture, self.context, self.tokens_per_step = source, mixture, context, tokens_per_step
        weights = np.array([TASK_WEIGHTS.get(task, 1.0) for task in TASKS])
        self.task_shares = weights / weights.sum()

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int16 [n, T + 1], learnt bool [n, T]: which of the tokens from the second on are learnt)."""
        context = max(SHORTEST, self.context // 4) if step % 4 == 3 else self.context
        count = max(WINDOWS, self.tokens_per_step // context)
        rng = np.random.default_rng((self.source.seed, 11, context, step))
        tokens = np.empty((count, context + 1), dtype=np.int16)
        learnt = np.empty((count, context), dtype=bool)
        # one draw from each of `count` equal parts, so that a batch of few windows is mixed as well
        for row, draw in enumerate((np.arange(count) + rng.random(count)) / count):
            window, targets = self._window(draw, context + 1, step * count + row, rng)
            tokens[row], learnt[row] = window, targets[1:]
        return torch.from_numpy(tokens), torch.from_numpy(learnt)

    def _window(self, draw: float, length: int, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(window, learnt), each [length]; `draw` from 0 to 1 says of which kind."""
        mixture = self.mixture
        if draw < mixture.text_share:
            stream = self.source.streams["train"]
            (window,) = corpora.sample_windows(stream, 1, length, mixture.repeat_share, rng)
            return window, np.ones(length, dtype=bool)
        if draw < mixture.text_share + mixture.many_share:
            return many_questions(self.source, "train", length, index)
        task = str(rng.choice(list(TASKS), p=self.task_shares))
        windows, mask = self.source.windows((task,), "train", length, range(index, index + 1))
        return windows[0], mask[0]


def many_questions(source: TaskSource, side: Side, length: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A text with many questions: tokens int64 [length], and bool [length], True in the answers and their ENDs."""
    rng = np.random.default_rng((source.seed, 13, list(source.streams).index(side), length, index))
    make = Maker("many_questions", side, length, rng, source.streams[side])
    lines, questions = _lines_and_questions(make, int(np.exp(rng.uniform(np.log(4), np.log(length // 64)))))
    tail, mask = _asked([questions[n] for n in rng.permutation(len(questions))], length // 3, make)
    text, _ = make.strewn(lines, length - len(tail))
    return np.concatenate([text, tail]), np.concatenate([np.zeros(len(text), dtype=bool), mask])


def _lines_and_questions(make: Maker, count: int) -> tuple[list[bytes], list[tuple[bytes, Sequence[bytes]]]]:
    """At least `count` lines in the order of the text, and (question, answers) about all of them."""
    rng, taken = make.rng, set[bytes]()
    placed: list[tuple[float, bytes, bytes, bytes]] = []  # place, line, key, value
    chains: list[tuple[bytes, list[bytes]]] = []
    keys: list[bytes] = []
    while len(placed) < count:
        kind = rng.random()
        if kind < _CHAIN:
            value, names = make.value(taken), [make.word(taken) for _ in range(int(rng.integers(2, CHAIN + 1)))]
            chains.append((value, names))
            own_order = np.sort(rng.random(len(names)))
            placed += [(at, line, b"", b"") for at, line in zip(own_order, chain_lines(value, names), strict=True)]
        else:
            keys.append(make.word(taken))
            several = int(rng.integers(2, VALUES + 1)) if kind < _CHAIN + _SEVERAL else 1
            for value in [make.value(taken) for _ in range(several)]:
                placed.append((rng.random(), needle_line(keys[-1], value), keys[-1], value))
    placed.sort()
    values: dict[bytes, list[bytes]] = {key: [] for key in keys}
    for _, _, key, value in placed:
        if key:
            values[key].append(value)
    questions: list[tuple[bytes, Sequence[bytes]]] = [(b"variables of " + value, names) for value, names in chains]
    while keys:
        together = keys[: int(rng.integers(2, QUERIES + 1)) if rng.random() < _TOGETHER else 1]
        keys = keys[len(together) :]
        questions.append((b"secret of " + b" ".join(together), [one for key in together for one in values[key]]))
    return [line for _, line, _, _ in placed], questions


def _asked(questions: Sequence[tuple[bytes, Sequence[bytes]]], room: int, make: Maker) -> tuple[np.ndarray, np.ndarray]:
    """As many questions with their answers as fit: (tokens, True in the answers), at least one question."""
    parts: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for question, answers in questions:
        asked, answer = make.tail(question), np.append(bytes_as_tokens(b" ".join(answers)), END)
        if parts and sum(map(len, parts)) + len(asked) + len(answer) > room:
            break
        parts += [asked, answer]
        masks += [np.zeros(len(asked), dtype=bool), np.ones(len(answer), dtype=bool)]
    return np.concatenate(parts), np.concatenate(masks)
