"""The test bed's tasks: a solver of its own finds every answer in the text, and the two sides share nothing."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.testbed import tasks
from benchmarks.testbed.corpus import SEPARATOR, Corpus, SourceFile
from benchmarks.testbed.tasks import ANSWER, ANSWER_WORDS, END, QUESTION, TASKS, Example, TaskSource, score, side_of

LENGTHS = (512, 2048, 5001)
NEEDLE = re.compile(rb"# The secret of ([a-z]{6}) is (\d{6})\.\n")
ASSIGNMENT = re.compile(rb"# let ([a-z]{6}) = (\w{6})\.\n")


def corpus() -> Corpus:
    """Sides of different letters, so that the source of a text shows."""

    def files(letter: str, count: int) -> tuple[SourceFile, ...]:
        line = f"{letter * 9} = {letter * 20}\n".encode()
        return tuple(SourceFile(f"{letter}{n}.py", line * (40 + n)) for n in range(count))

    return Corpus("3", files("T", 9), files("H", 3))


@pytest.fixture(scope="module")
def source() -> TaskSource:
    return TaskSource(corpus())


def text_of(example: Example) -> tuple[bytes, bytes]:
    """The text and the question, separators left out."""
    tokens = example.prompt.tolist()
    asked = tokens.index(QUESTION)
    assert tokens[-1] == ANSWER
    assert all(token <= SEPARATOR for token in tokens[:asked] + tokens[asked + 1 : -1])
    return bytes(t for t in tokens[:asked] if t < SEPARATOR), bytes(tokens[asked + 1 : -1])


def solve(example: Example) -> list[bytes]:
    """The answer from the text and the question alone."""
    text, question = text_of(example)
    if example.task.startswith("niah"):
        pairs = NEEDLE.findall(text)
        keys = question.removeprefix(b"secret of ").split()
        return [value for query in keys for key, value in pairs if key == query]
    if example.task == "variable_tracking":
        known: dict[bytes, bytes] = {}
        for name, origin in ASSIGNMENT.findall(text):
            known[name] = known.get(origin, origin)
        asked = question.removeprefix(b"variables of ")
        return [name for name, value in known.items() if value == asked]
    counts = Counter(text.split())
    if example.task == "common_words":
        assert question == b"common words"
        best = counts.most_common(6)
        assert best[4][1] > best[5][1] == 3
        return sorted((word for word, _ in best[:5]), key=text.split().index)
    assert question == b"frequent words"
    best = counts.most_common(4)
    assert all(more > less for (_, more), (_, less) in pairwise(best))
    return [word for word, _ in best[:3]]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_a_solver_finds_the_answer(source: TaskSource, task: str, side: tasks.Side, length: int) -> None:
    for index in range(20):
        example = source.example(task, side, length, index)
        assert solve(example) == list(example.answers)
        assert len(example.window) == length
        assert example.target.tolist() == [*b" ".join(example.answers), END]


def test_each_task_asks_for_what_it_says(source: TaskSource) -> None:
    """Words in the answer, and how many lines compete for it at 8K."""
    lines = {}
    for task, words in ANSWER_WORDS.items():
        example = source.example(task, "test", 8192, 0)
        assert len(example.answers) == words
        text, _ = text_of(example)
        lines[task] = len(NEEDLE.findall(text)) + len(ASSIGNMENT.findall(text))
    assert lines == {
        "niah_single": 1,
        "niah_multikey": 16,
        "niah_multivalue": 11,
        "niah_multiquery": 12,
        "variable_tracking": 25,
        "common_words": 0,
        "frequent_words": 0,
    }
    counts = Counter(text_of(source.example("common_words", "test", 8192, 0))[0].split())
    assert sorted(counts.values())[-6:] == [3, 30, 30, 30, 30, 30]
    zipf = sorted(Counter(text_of(source.example("frequent_words", "test", 8192, 0))[0].split()).values())[-4:]
    assert zipf[3] > 3 * zipf[2] > 3 * zipf[1] > 3 * zipf[0] > 3


def strings(example: Example) -> set[bytes]:
    """Every drawn string of an example, the answers and the distractors."""
    text, _ = text_of(example)
    if example.task.startswith("niah"):
        return {part for pair in NEEDLE.findall(text) for part in pair}
    if example.task == "variable_tracking":
        return {part for pair in ASSIGNMENT.findall(text) for part in pair}
    return set(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_the_sides_share_no_string_and_no_text(task: str) -> None:
    """Under several seeds every string is of its side, and so is the source around the needles."""
    found: dict[str, set[bytes]] = {"train": set(), "test": set()}
    for seed in range(3):
        source = TaskSource(corpus(), seed)
        for side, own, foreign in (("train", b"T", b"H"), ("test", b"H", b"T")):
            for index in range(10):
                example = source.example(task, side, 1024, index)
                assert all(side_of(word) == side for word in strings(example))
                found[side] |= strings(example)
                text, _ = text_of(example)
                without = ASSIGNMENT.sub(b"", NEEDLE.sub(b"", text))
                assert foreign * 9 not in without
                assert (own * 9 in without) == (not task.endswith("words"))
    assert len(found["train"]) > 20
    assert len(found["test"]) > 20
    assert not found["train"] & found["test"]


def test_a_quarter_of_all_strings_is_for_tests() -> None:
    words = [f"{n:06d}".encode() for n in range(4000)]
    share = sum(side_of(word) == "test" for word in words) / len(words)
    assert abs(share - tasks.TEST_SHARE) < 0.03


@pytest.mark.parametrize("task", TASKS)
def test_equal_arguments_give_equal_examples_and_others_do_not(source: TaskSource, task: str) -> None:
    first = source.example(task, "test", 1024, 5)
    again = TaskSource(corpus()).example(task, "test", 1024, 5)
    assert np.array_equal(first.window, again.window)
    assert first.needles == again.needles
    others = [
        source.example(task, "test", 1024, 6),
        source.example(task, "train", 1024, 5),
        TaskSource(corpus(), seed=1).example(task, "test", 1024, 5),
    ]
    assert all(not np.array_equal(first.window, other.window) for other in others)


def test_needles_stand_where_they_are_said_to_and_at_every_depth(source: TaskSource) -> None:
    depths = []
    for index in range(200):
        example = source.example("niah_single", "train", 1024, index)
        (place,) = example.needles
        found = NEEDLE.fullmatch(bytes(example.prompt[place : place + 34].tolist()))
        assert found
        assert found.group(2) == example.answers[0]
        assert place == 0 or example.prompt[place - 1] == ord("\n")
        depths.append(place / 950)
    assert np.histogram(depths, bins=5, range=(0, 1))[0].min() > 20
    for task in ("niah_multivalue", "niah_multiquery", "variable_tracking"):
        example = source.example(task, "train", 2048, 0)
        lines = [bytes(example.prompt[place : place + 34].tolist()) for place in example.needles]
        for answer in example.answers:
            assert any(answer in line for line in lines)


def test_windows_for_training(source: TaskSource) -> None:
    """Tasks in turn, and a mask that holds exactly the answer and END."""
    names = ("niah_single", "variable_tracking")
    windows, mask = source.windows(names, "train", 600, range(3, 8))
    assert windows.shape == mask.shape == (5, 600)
    for row, where, index in zip(windows, mask, range(3, 8), strict=True):
        example = source.example(names[index % 2], "train", 600, index)
        assert np.array_equal(row, example.window)
        assert np.array_equal(row[where], example.target)
        assert row[~where][-1] == ANSWER


def test_scores() -> None:
    example = Example("t", "test", np.zeros(1, dtype=np.int64), (b"one", b"two", b"six", b"ten"), ())
    assert score(example, example.target) == 1.0
    assert score(example, [*b"two one ten", END, *b" six"]) == 0.75
    assert score(example, list(b"ones two")) == 0.25
    assert score(example, [END]) == 0.0
    assert score(example, [SEPARATOR, *b"six", QUESTION]) == 0.25


def test_what_cannot_be_made_is_refused(source: TaskSource) -> None:
    with pytest.raises(ValueError, match=r"task: expected one of niah_single, .*, got 'niah'"):
        source.example("niah", "test", 1024, 0)
    with pytest.raises(ValueError, match="side: expected train or test, got 'dev'"):
        source.example("niah_single", "dev", 1024, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length: expected at least 512, got 511"):
        source.example("niah_single", "test", 511, 0)
    with pytest.raises(ValueError, match="index: expected at least 0, got -1"):
        source.example("niah_single", "test", 512, -1)
    with pytest.raises(ValueError, match="corpus: expected text on the test side, got none"):
        TaskSource(Corpus("3", corpus().train, ()))


def test_the_command_prints_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    tasks.main(["--task", "variable_tracking", "--length", "1500", "--side", "train"])
    printed = capsys.readouterr().out
    question = re.search(r"<QUESTION> variables of (\d{6})\n<ANSWER> (\w{6} ){5}<END>", printed)
    assert question
    assert f"= {question.group(1)}." in printed
    with pytest.raises(SystemExit, match="tasks: length: expected at least 512, got 9"):
        tasks.main(["--task", "niah_single", "--length", "9"])
