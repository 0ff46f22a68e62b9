"""Tasks over bytes after RULER (arXiv 2404.06654), with train and test apart by construction.

    python -m benchmarks.testbed.tasks --task niah_multikey --length 2048 --side test --index 3

prints one. A task is a long text, a question and an answer of a few words:

    text  QUESTION  question  ANSWER  answer  END

Bytes are tokens, and the three words in capitals are ids that no text uses. The tasks:

- `niah_single`: one line "# The secret of <key> is <value>." somewhere in Python source; asked for the value.
- `niah_multikey`: many such lines; asked for the value of one key.
- `niah_multivalue`: four lines of one key among those of others; asked for all values, in the order of the text.
- `niah_multiquery`: many keys; asked for the values of four of them, in the order of the question.
- `variable_tracking`: lines "# let <a> = <value>." and "# let <b> = <a>." in chains of five; asked for every variable
  that has a value, in the order of the text.
- `common_words`: a list in which five words stand often and all others three times; asked for the five, in the order
  in which they first appear.
- `frequent_words`: a list of words whose counts fall with the square of their rank; asked for the three most frequent,
  the most frequent first.

Every key, value, variable and word belongs to the train side or to the test side by a hash of its letters, and the
source around the needles is that side's part of the corpus, so no seed can bring a test string into training.
"""

from __future__ import annotations

import argparse
import hashlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.corpus import SEPARATOR, Corpus, token_stream

QUESTION, ANSWER, END = SEPARATOR + 1, SEPARATOR + 2, SEPARATOR + 3
Side = Literal["train", "test"]
TEST_SHARE = 0.25  # of all strings; there are enough of either side for any number of examples
WORD_LETTERS, VALUE_DIGITS = 6, 6
VALUES, QUERIES, CHAIN = 4, 4, 5
COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 5, 30, 3
FREQUENT_WORDS, ZIPF_EXPONENT = 3, 2.0
SHORTEST = 512


@dataclass(frozen=True, eq=False)
class Example:
    """One task.

    Attributes:
        task, side: which task, and on which side of the split.
        prompt: int64 [n], what the model is given: the text, QUESTION, the question and ANSWER.
        answers: the words of the answer, in order.
        needles: where in the prompt the lines that the answer needs begin; empty for lists of words.
    """

    task: str
    side: Side
    prompt: np.ndarray
    answers: tuple[bytes, ...]
    needles: tuple[int, ...]

    @property
    def target(self) -> np.ndarray:
        """int64: the answer as the model should go on, its words parted by spaces, and END."""
        return np.concatenate([bytes_as_tokens(b" ".join(self.answers)), [END]])

    @property
    def window(self) -> np.ndarray:
        """int64 [length]: prompt and target."""
        return np.concatenate([self.prompt, self.target])


def score(example: Example, output: Sequence[int]) -> float:
    """The share of the answer's words that stand in what a model wrote, tokens up to END; order does not count."""
    written = bytes(token for token in _until_end(output) if token < SEPARATOR).split()
    return sum(word in written for word in example.answers) / len(example.answers)


def _until_end(output: Sequence[int]) -> list[int]:
    tokens = [int(token) for token in output]
    return tokens[: tokens.index(END)] if END in tokens else tokens


def side_of(word: bytes) -> Side:
    """The side that a key, value, variable or word belongs to; its letters alone decide."""
    digest = hashlib.sha256(b"testbed task:" + word).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


class TaskSource:
    """Makes examples of every task from a corpus; equal arguments give equal examples.

    Args:
        corpus: its training files surround the needles of the train side, its held-out files those of the test side.
        seed: of everything that is drawn.

    Raises:
        ValueError: a side of the corpus has no text.
    """

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.seed = seed
        self.streams: dict[Side, np.ndarray] = {
            "train": token_stream(corpus.train),
            "test": token_stream(corpus.heldout),
        }
        for side, stream in self.streams.items():
            if not len(stream):
                raise ValueError(f"corpus: expected text on the {side} side, got none")

    def example(self, task: str, side: Side, length: int, index: int) -> Example:
        """Example number `index` of a task: prompt and target together have exactly `length` tokens.

        Raises:
            ValueError: an unknown task or side, a negative index, or a length below `SHORTEST`.
        """
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        if side not in self.streams:
            raise ValueError(f"side: expected train or test, got {side!r}")
        if length < SHORTEST:
            raise ValueError(f"length: expected at least {SHORTEST}, got {length}")
        if index < 0:
            raise ValueError(f"index: expected at least 0, got {index}")
        rng = np.random.default_rng((self.seed, list(self.streams).index(side), list(TASKS).index(task), length, index))
        return TASKS[task](Maker(task, side, length, rng, self.streams[side]))

    def windows(self, tasks: Sequence[str], side: Side, length: int, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """Examples to train on, tasks in turn: int64 [n, length], and bool [n, length], True where the target is."""
        examples = [self.example(tasks[index % len(tasks)], side, length, index) for index in indices]
        mask = np.arange(length) >= np.array([[len(example.prompt)] for example in examples])
        return np.stack([example.window for example in examples]), mask


@dataclass(eq=False)
class Maker:
    """What a task is made of: one example's random numbers, its side's strings and text.

    Attributes:
        task, side, length: of the example; `length` counts prompt and target.
        rng: of this example alone.
        stream: the side's source text, uint16 tokens.
    """

    task: str
    side: Side
    length: int
    rng: np.random.Generator
    stream: np.ndarray

    def word(self, taken: set[bytes]) -> bytes:
        return self._draw(string.ascii_lowercase, WORD_LETTERS, taken)

    def value(self, taken: set[bytes]) -> bytes:
        return self._draw(string.digits, VALUE_DIGITS, taken)

    def _draw(self, alphabet: str, count: int, taken: set[bytes]) -> bytes:
        """A string of this side that was not drawn before; `taken` grows by it."""
        while True:
            letters = self.rng.integers(0, len(alphabet), count)
            word = "".join(alphabet[n] for n in letters).encode()
            if side_of(word) == self.side and word not in taken:
                taken.add(word)
                return word

    def strewn(self, lines: Sequence[bytes], length: int) -> tuple[np.ndarray, list[int]]:
        """Lines strewn over source text in their order, at line starts drawn uniformly.

        Returns:
            (int64 [length], where each line begins).
        """
        source = self._source(length - sum(map(len, lines)))
        starts = np.concatenate([[0], np.flatnonzero(source == ord("\n")) + 1])
        places = np.sort(self.rng.choice(starts, size=len(lines)))
        parts, begins, position, before = [], [], 0, 0
        for line, place in zip(lines, places, strict=True):
            position += int(place) - before
            begins.append(position)
            parts += [source[before:place], bytes_as_tokens(line)]
            position, before = position + len(line), int(place)
        return np.concatenate([*parts, source[before:]]), begins

    def in_source(self, lines: list[bytes], wanted: list[int], question: bytes, answers: Sequence[bytes]) -> Example:
        """Lines strewn over source text, a question and its answers; `wanted` are the lines that hold the answer."""
        tail = self.tail(question)
        text, begins = self.strewn(lines, self.length - len(tail) - _target_length(answers))
        needles = tuple(begins[n] for n in sorted(wanted))
        return Example(self.task, self.side, np.concatenate([text, tail]), tuple(answers), needles)

    def of_words(self, words: list[bytes], question: bytes, answers: Sequence[bytes]) -> Example:
        """A list of words, parted by spaces and filled up with newlines."""
        tail = self.tail(question)
        text = b" ".join(words)
        room = self.length - len(tail) - _target_length(answers)
        prompt = np.concatenate([bytes_as_tokens(text + b"\n" * (room - len(text))), tail])
        return Example(self.task, self.side, prompt, tuple(answers), ())

    def room_for_words(self, question: bytes, answers: int) -> int:
        """How many words of a list fit beside a question and an answer of so many words."""
        tokens = self.length - len(self.tail(question)) - _target_length([b" " * WORD_LETTERS] * answers)
        return (tokens + 1) // (WORD_LETTERS + 1)

    def tail(self, question: bytes) -> np.ndarray:
        """QUESTION, the question and ANSWER."""
        return np.concatenate([[QUESTION], bytes_as_tokens(question), [ANSWER]])

    def _source(self, length: int) -> np.ndarray:
        """A stretch of the side's source text, from a random place on, around the end of it if need be."""
        start = int(self.rng.integers(0, len(self.stream)))
        return np.take(self.stream, np.arange(start, start + length), mode="wrap").astype(np.int64)


def bytes_as_tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


def _target_length(answers: Sequence[bytes]) -> int:
    return sum(len(answer) + 1 for answer in answers)  # a space or END after each


def needle_line(key: bytes, value: bytes) -> bytes:
    return b"# The secret of " + key + b" is " + value + b".\n"


def chain_lines(value: bytes, names: Sequence[bytes]) -> list[bytes]:
    """The first name gets the value, every other name the one before it."""
    return [b"# let " + name + b" = " + origin + b".\n" for name, origin in zip(names, [value, *names], strict=False)]


def _retrieval(make: Maker, keys: int, values_of_first: int, asked: int) -> Example:
    """Lines of `keys` keys in random order, `values_of_first` of them the first key's; the first `asked` are asked."""
    taken: set[bytes] = set()
    pairs = [(key, make.value(taken)) for key in (make.word(taken) for _ in range(keys))]
    pairs += [(pairs[0][0], make.value(taken)) for _ in range(values_of_first - 1)]
    queries = [key for key, _ in pairs[:asked]]
    order = make.rng.permutation(len(pairs))
    pairs = [pairs[n] for n in order]
    wanted = [n for n, (key, _) in enumerate(pairs) if key in queries]
    answers = [value for query in queries for key, value in pairs if key == query]
    return make.in_source([needle_line(*pair) for pair in pairs], wanted, b"secret of " + b" ".join(queries), answers)


def _niah_single(make: Maker) -> Example:
    return _retrieval(make, 1, 1, 1)


def _niah_multikey(make: Maker) -> Example:
    return _retrieval(make, max(4, make.length // 512), 1, 1)


def _niah_multivalue(make: Maker) -> Example:
    return _retrieval(make, max(2, make.length // 1024), VALUES, 1)


def _niah_multiquery(make: Maker) -> Example:
    return _retrieval(make, QUERIES + max(2, make.length // 1024), 1, QUERIES)


def _variable_tracking(make: Maker) -> Example:
    taken: set[bytes] = set()
    chains = []
    for _ in range(1 + max(1, make.length // 2048)):
        value, names = make.value(taken), [make.word(taken) for _ in range(CHAIN)]
        chains.append(chain_lines(value, names))
        if len(chains) == 1:
            asked, answers = value, names
    turn = make.rng.permutation(np.repeat(np.arange(len(chains)), CHAIN))  # chains interleave, each in its own order
    rest = [iter(chain) for chain in chains]
    lines = [next(rest[n]) for n in turn]
    return make.in_source(lines, np.flatnonzero(turn == 0).tolist(), b"variables of " + asked, answers)


def _common_words(make: Maker) -> Example:
    question = b"common words"
    room = make.room_for_words(question, COMMON_WORDS)
    times = min(COMMON_TIMES, room // (2 * COMMON_WORDS))
    taken: set[bytes] = set()
    common = [make.word(taken) for _ in range(COMMON_WORDS)]
    words = common * times
    while len(words) + OTHER_TIMES <= room:
        words += [make.word(taken)] * OTHER_TIMES
    words = [words[n] for n in make.rng.permutation(len(words))]
    return make.of_words(words, question, sorted(common, key=words.index))


def _frequent_words(make: Maker) -> Example:
    question = b"frequent words"
    room = make.room_for_words(question, FREQUENT_WORDS)
    weights = np.arange(1, room + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    counts = np.floor(room * weights / weights.sum()).astype(int)
    counts[: FREQUENT_WORDS + 1] += np.arange(FREQUENT_WORDS, -1, -1)  # no ties among those that count
    counts = counts[np.cumsum(counts) <= room]
    taken: set[bytes] = set()
    ranked = [make.word(taken) for _ in range(int((counts > 0).sum()))]
    words = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
    words += [make.word(taken) for _ in range(room - len(words))]  # the long tail: once each
    words = [words[n] for n in make.rng.permutation(len(words))]
    return make.of_words(words, question, ranked[:FREQUENT_WORDS])


TASKS: dict[str, Callable[[Maker], Example]] = {
    "niah_single": _niah_single,
    "niah_multikey": _niah_multikey,
    "niah_multivalue": _niah_multivalue,
    "niah_multiquery": _niah_multiquery,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
ANSWER_WORDS = {
    "niah_single": 1,
    "niah_multikey": 1,
    "niah_multivalue": VALUES,
    "niah_multiquery": QUERIES,
    "variable_tracking": CHAIN,
    "common_words": COMMON_WORDS,
    "frequent_words": FREQUENT_WORDS,
}
"""Words in each task's answer."""


def main(arguments: list[str] | None = None) -> None:
    """Print one example; every foreseeable failure ends in one line of text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.tasks", description="Print one task.")
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--side", choices=get_args(Side), default="test", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=2048, help="tokens, answer included (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    options = parser.parse_args(arguments)
    try:
        source = TaskSource(corpora.load(options.corpus), options.seed)
        example = source.example(options.task, options.side, options.length, options.index)
    except (ValueError, OSError) as error:
        raise SystemExit(f"tasks: {error}") from error
    names = {SEPARATOR: "\n<SEPARATOR>\n", QUESTION: "\n<QUESTION> ", ANSWER: "\n<ANSWER> ", END: " <END>"}
    text = b"".join(bytes([t]) if t < SEPARATOR else names[t].encode() for t in example.window.tolist())
    print(text.decode(errors="replace"))


if __name__ == "__main__":
    main()
