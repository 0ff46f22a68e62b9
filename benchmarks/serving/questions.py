"""What the engines of `answers` are asked: tasks of the test bed, and questions on one document."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.serving.cases import EngineCase
from benchmarks.testbed.tasks import ANSWER, QUESTION, SEPARATOR, Example, TaskSource, bytes_as_tokens

DOCUMENT = 8192  # tokens of the document that several questions share, where there are prompts so long
SHARED_TASK = "niah_multikey"


@dataclass(frozen=True, eq=False)
class Question:
    """`key`: the number of the item, or the key that a question on the document asks for."""

    example: Example
    length: int
    key: str
    shared: bool = False

    def about(self) -> dict[str, Any]:
        return {"task": self.example.task, "length": self.length, "key": self.key}


def questions_of(case: EngineCase, source: TaskSource) -> list[Question]:
    """A case's prompts, tasks and lengths mixed, and then those on one document; equal for equal lengths and tasks."""
    mixed = [
        Question(source.example(task, "test", length, n), length, str(n))
        for length in case.lengths
        for task in case.tasks
        for n in range(case.items)
    ]
    random.Random(0).shuffle(mixed)
    return [*mixed, *_on_one_document(source, case.shared, DOCUMENT if DOCUMENT in case.lengths else max(case.lengths))]


def _on_one_document(source: TaskSource, count: int, length: int) -> list[Question]:
    """Questions for the first keys of a text, which is their common prefix."""
    example = source.example(SHARED_TASK, "test", length, 0)
    document = example.prompt[: int(np.flatnonzero(example.prompt == QUESTION)[-1])]
    text = bytes(token if token < SEPARATOR else 0 for token in document.tolist())
    found = re.findall(rb"# The secret of (\w+) is (\d+)\.\n", text)[:count]
    asked = []
    for key, value in found:
        tail = np.concatenate([[QUESTION], bytes_as_tokens(b"secret of " + key), [ANSWER]])
        one = replace(example, prompt=np.concatenate([document, tail]), answers=(value,), needles=())
        asked.append(Question(one, length, key.decode(), shared=True))
    return asked
