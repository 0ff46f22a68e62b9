"""Training the test bed further: its windows, its checkpoints, and legs that add up to one run."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.testbed import checkpoint, schedule, train_tasks
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed import model as models
from benchmarks.testbed.answers import Accuracy, batches, decode, prefill, task_scores
from benchmarks.testbed.corpus import Corpus, SourceFile
from benchmarks.testbed.intervals import bootstrap_means, bootstrap_ratio, wilson
from benchmarks.testbed.mixture import Batches, Mixture, many_questions
from benchmarks.testbed.schedule import Progress, Settings, context_at, learning_rate_at
from benchmarks.testbed.tasks import ANSWER, END, QUESTION, TASKS, TaskSource, side_of
from benchmarks.testbed.train_tasks import Run

QUICK = Settings(
    max_steps=6,
    context=512,
    tokens_per_step=2048,
    learning_rate=3e-3,
    warmup_steps=2,
    log_every=1,
    milestone_seconds=1e9,
    final_items=1,
    workers=0,
    compiled=False,
)


def corpus() -> Corpus:
    def files(letter: str, count: int) -> tuple[SourceFile, ...]:
        body = "".join(f"def {letter}_{n}(value):\n    return value * {n} + {letter}_{n // 2}\n" for n in range(40))
        return tuple(SourceFile(f"{letter}{n}.py", body[n:].encode()) for n in range(count))

    return Corpus("3", files("train", 3), files("held", 2))


@pytest.fixture(scope="module")
def source() -> TaskSource:
    return TaskSource(corpus())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    config = models.testbed_config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16
    )
    models.save_model(models.new_model(config, 0), directory)
    (directory / "training.json").write_text('{"steps": 7, "loss_curve": [1]}')
    return directory


def leg(weights: Path, place: Path, settings: Settings = QUICK, **others: Any) -> Run:
    return Run(weights, corpus(), settings, place / "out", place / "state", torch.device("cpu"), **others)


# ---- windows ----


def test_many_questions_have_the_answers_of_the_text(source: TaskSource) -> None:
    """A solver of its own answers every question, and the mask holds the answers and nothing else."""
    kinds, apart = set(), 0
    for index in range(30):
        tokens, mask = many_questions(source, "train", 2048, index)
        assert len(tokens) == len(mask) == 2048
        first = tokens.tolist().index(QUESTION)
        assert first > 2048 * 2 // 3 - 80
        text = bytes(t for t in tokens[:first].tolist() if t < 256)
        pairs = re.findall(rb"# The secret of ([a-z]{6}) is (\d{6})\.\n", text)
        known: dict[bytes, bytes] = {}
        for name, origin in re.findall(rb"# let ([a-z]{6}) = (\w{6})\.\n", text):
            known[name] = known.get(origin, origin)
        lines = re.findall(rb"# (?:let|The secret of) (\w+) (?:=|is) (\w+)\.\n", text)
        place = {name: n for n, (name, _) in enumerate(lines)}
        apart += sum(place[name] - place[origin] > 1 for name, origin in lines if origin in place)
        asked: list[bytes] = []
        for part in np.split(np.arange(first, 2048), np.flatnonzero(tokens[first:] == QUESTION)[1:]):
            words, middle = tokens[part].tolist(), tokens[part].tolist().index(ANSWER)
            assert words[-1] == END
            assert mask[part].tolist() == [n > middle for n in range(len(part))]
            kind, _, subject = bytes(words[1:middle]).partition(b" of ")
            answers = bytes(words[middle + 1 : -1]).split()
            if kind == b"secret":
                keys = subject.split()
                assert answers == [value for key in keys for owner, value in pairs if owner == key]
                kinds.add((len(keys) > 1, len(answers) > len(keys)))
            else:
                keys = [subject]
                assert answers == [name for name, value in known.items() if value == subject]
                kinds.add("chain")
            asked += keys
            assert all(side_of(word) == "train" for word in (*keys, *answers))
        assert len(asked) == len(set(asked))
        assert not mask[:first].any()
    assert kinds == {"chain", *itertools.product((False, True), repeat=2)}
    assert apart > 30  # the lines of a chain do not stand together


def test_batches_depend_on_the_step_alone_and_hold_the_mixture(source: TaskSource) -> None:
    data = Batches(source, Mixture(0.25, 0.5), 1024, 8192)
    late, early = data[5], data[2]
    again = Batches(TaskSource(corpus()), Mixture(0.25, 0.5), 1024, 8192)
    for ours, theirs in zip((*early, *late), (*again[2], *again[5]), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(early[0], late[0])
    tokens, learnt = data[2]
    assert (tokens.dtype, tuple(tokens.shape), tuple(learnt.shape)) == (torch.int16, (8, 1025), (8, 1024))
    assert learnt.all(1).tolist() == [True] * 2 + [False] * 6  # a quarter is text, learnt whole
    for row, learnt_row in zip(tokens[2:].tolist(), learnt[2:].tolist(), strict=True):
        questions = row.count(QUESTION)
        assert questions == row.count(END) == row.count(ANSWER) >= 1
        assert row[-1] == END
        inside = 0
        for token, was_learnt in zip(row[1:], learnt_row, strict=True):
            assert was_learnt == bool(inside)
            inside = 1 if token == ANSWER else 0 if token == END else inside
    assert any(row.count(QUESTION) > 1 for row in tokens[2:6].tolist())
    assert all(row.count(QUESTION) == 1 for row in tokens[6:].tolist())


def test_every_fourth_batch_is_a_quarter_as_long_but_long_enough(source: TaskSource) -> None:
    shapes = [tuple(Batches(source, Mixture(), 4096, 8192)[step][0].shape) for step in (2, 3)]
    assert shapes == [(4, 4097), (8, 1025)]
    assert Batches(source, Mixture(), 512, 1024)[3][0].shape == (4, 513)
    with pytest.raises(ValueError, match="--context: expected at least 512, got 256"):
        Batches(source, Mixture(), 256, 1024)
    with pytest.raises(ValueError, match=r"--context: expected less than \d+, the text, got 65536"):
        Batches(source, Mixture(), 65536, 65536)


# ---- checkpoints ----


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn((7, 33), generator=rng)
    return {
        "a": plain,
        "b": plain.bfloat16(),
        "c": checkpoint.rounded(plain)[0],
        "d": torch.arange(5),
        "e": torch.zeros((0, 3)),
    }


def test_a_checkpoint_comes_back_bit_for_bit_in_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 1000)
    files = checkpoint.save(tmp_path, tensors(), {"step": 3})
    assert [file.name.startswith("state-") for file in files] == [False, True, True]
    found, record = checkpoint.load(tmp_path)
    assert record == {"step": 3}
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    monkeypatch.setattr(checkpoint, "FILES_LIMIT", 2)
    with pytest.raises(ValueError, match="checkpoint: expected at most 2 files, got 3 for 1657 bytes"):
        checkpoint.save(tmp_path, tensors(), {})
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 100)
    with pytest.raises(ValueError, match=r"a: expected .* of at most 100 bytes, got float32 of 924"):
        checkpoint.save(tmp_path, tensors(), {})
    with pytest.raises(ValueError, match=r"x: expected float32, .*, got float64"):
        checkpoint.save(tmp_path, {"x": torch.zeros(1, dtype=torch.float64)}, {})
    assert checkpoint.load(tmp_path)[1] == {"step": 3}


def test_the_committed_model_fits_into_the_files_that_may_be_carried(tmp_path: Path) -> None:
    model = models.new_model(models.testbed_config(), 0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {"exp_avg": parameter.detach() * 0.01, "exp_avg_sq": parameter.detach().square()}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    files = checkpoint.save(tmp_path, *checkpoint.capture(model, optimizer))
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) <= checkpoint.FILE_LIMIT_BYTES
    assert sum(file.stat().st_size for file in files) < 28_000_000


@pytest.mark.parametrize("fails_at", range(3))
def test_an_interrupted_save_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Whichever rename does not happen, the directory holds one whole checkpoint and no half file under its names."""
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 1000)
    checkpoint.save(tmp_path, {name: tensor[:0] for name, tensor in tensors().items()}, {"step": 1})
    renamed = itertools.count()
    really = os.replace

    def interrupted(old: Any, new: Any) -> None:
        if next(renamed) == fails_at:
            raise KeyboardInterrupt
        really(old, new)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, tensors(), {"step": 2})
    monkeypatch.setattr(os, "replace", really)
    assert checkpoint.load(tmp_path)[1] == {"step": 1}
    assert not list(tmp_path.glob(".*"))
    checkpoint.save(tmp_path, tensors(), {"step": 2})
    assert checkpoint.load(tmp_path)[1] == {"step": 2}
    assert len(list(tmp_path.glob("state-*"))) == 2  # what the interrupted one wrote is gone or belongs to this one
    checkpoint.remove(tmp_path)
    assert not tmp_path.exists()


def test_checkpoints_that_are_damaged_or_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state\.json: expected a checkpoint, got: "):
        checkpoint.load(tmp_path)
    _, shard = checkpoint.save(tmp_path, tensors(), {})
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state-.*\.npz: expected the file of this checkpoint, got other content"):
        checkpoint.load(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"expected the checkpoint's file state-.*\.npz, got: "):
        checkpoint.load(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state\.json: expected a checkpoint, got: "):
        checkpoint.load(tmp_path)


def test_rounding_keeps_an_eighth_and_zero() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 4000)
    values = values[values.abs() > 2**-29 * values.abs().max()]
    assert len(values) > 3900
    small, exponent = checkpoint.rounded(values)
    again = checkpoint.widened(small, exponent)
    assert float(((again - values).abs() / values.abs()).max()) <= 1 / 8
    assert torch.equal(checkpoint.widened(*checkpoint.rounded(again)), again)
    assert torch.equal(checkpoint.widened(*checkpoint.rounded(torch.zeros(3))), torch.zeros(3))
    tiny = torch.tensor([1e-37, 1e-40])
    assert checkpoint.widened(*checkpoint.rounded(tiny)).tolist() == pytest.approx([1e-37, 0.0], rel=0.13)


# ---- legs ----


def test_legs_add_up_to_the_run_that_was_not_stopped(weights: Path, tmp_path: Path) -> None:
    """Bit for bit: the same batches, rates, weights, moments and losses, whether a stop follows a save or not."""
    whole = leg(weights, tmp_path / "whole")
    original, steps = whole._log, []

    def save_after_the_second(*arguments: Any) -> None:
        original(*arguments)
        steps.append(whole.progress.step)
        if whole.progress.step in (2, 4):
            whole.save()

    whole._log = save_after_the_second  # type: ignore[method-assign]
    assert whole.train()
    assert steps == [1, 2, 3, 4, 5, 6]

    outcomes = []
    for _ in range(3):
        part = leg(weights, tmp_path / "legs", replace(QUICK, leg_steps=2))
        outcomes.append(part.train())
    assert outcomes == [False, False, True]
    assert [entry["step"] for entry in part.progress.legs] == [0, 2, 4]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(part.model.state_dict()[name], tensor), name
    for ours, theirs in zip(whole.optimizer.state.values(), part.optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    keys = ("step", "tokens", "context", "learning_rate", "text_bits", "answer_bits", "gradient_norm")
    curves = [[{key: point.get(key) for key in keys} for point in run.progress.curve] for run in (whole, part)]
    assert curves[0] == curves[1]
    assert curves[0][0]["learning_rate"] < curves[0][1]["learning_rate"] > curves[0][-1]["learning_rate"]
    unmeasured = leg(weights, tmp_path / "legs")
    assert unmeasured.is_over
    assert len(unmeasured.progress.legs) == 3
    assert unmeasured.finish()["complete"]
    with pytest.raises(ValueError, match="--state: expected a run with something left to do, got one that is over"):
        leg(weights, tmp_path / "legs")


class Clock:
    """A second per look."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_schedule_goes_by_the_time_of_all_legs(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time between legs and before their first step does not count; the rate falls from where it was."""
    monkeypatch.setattr(train_tasks, "train_step", lambda *_: (torch.zeros(4), torch.zeros(())))
    settings = replace(QUICK, max_steps=None, total_minutes=1.0, minutes=0.5, warmup_steps=1)
    rates: list[float] = []
    ended = []
    for _ in range(3):
        part = leg(weights, tmp_path, settings, began=980.0, clock=Clock())
        ended.append(part.train())
        rates = [point["learning_rate"] for point in part.progress.curve]
    assert ended == [False, False, False]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == settings.learning_rate
    share = part.progress.share(settings)
    assert 0.2 < share < 0.6
    assert rates[-1] == pytest.approx(settings.learning_rate * (1 - part.progress.curve[-2]["seconds"] / 60), abs=1e-8)
    assert [entry["seconds"] for entry in part.progress.legs] == sorted(e["seconds"] for e in part.progress.legs)
    while not part.is_over:
        part = leg(weights, tmp_path, settings, clock=Clock())
        part.train()
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["seconds"] >= 60
    assert record["loss_curve"][-1]["learning_rate"] < 0.1 * settings.learning_rate


def test_phases_cover_short_then_long_contexts() -> None:
    shares = np.linspace(0, 0.999, 1000)
    contexts = [context_at(share, 32768) for share in shares]
    assert contexts == sorted(contexts)
    assert sorted(set(contexts)) == [1024, 2048, 4096, 8192, 16384, 32768]
    assert 0.45 < np.mean([context in (4096, 8192) for context in contexts]) < 0.55
    assert {context_at(share, 1024) for share in shares} == {512, 1024}
    settings = replace(QUICK, max_steps=None, total_minutes=2.0)
    assert Progress(seconds=30).share(settings) == 0.25
    assert learning_rate_at(1.5, 10, settings) == 0.0


def test_a_loss_on_answers_falls_and_the_record_is_honest(weights: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, max_steps=30, learning_rate=1e-2, milestone_seconds=1e-9, log_every=3)
    run = leg(weights, tmp_path, settings)
    milestones = iter([True])
    interim = run._milestone
    run._milestone = lambda context: interim(context) if next(milestones, False) else None  # type: ignore[method-assign]
    assert run.train()
    early = json.loads((tmp_path / "out" / "training.json").read_text())
    assert early["complete"] is False
    record = run.finish()
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["complete"] is True
    first, *_, last = written["loss_curve"]
    assert last["answer_bits"] < 0.75 * first["answer_bits"]
    assert last["text_bits"] < first["text_bits"]
    assert written["continued_from"] == {"steps": 7}
    assert set(written["tasks"]) == {"512"}
    assert set(written["tasks"]["512"]) == set(TASKS) == set(written["task_curve"][0]) - {"step", "length", "items"}
    for scores in written["tasks"]["512"].values():
        assert 0 <= scores["low"] <= scores["mean"] <= scores["high"] <= 1
        assert scores["items"] == 1
    assert written["heldout"]["bits_per_byte"] < 8.1
    assert models.load_model(tmp_path / "out").config.hidden_size == 64


def test_a_signal_ends_a_leg_between_two_steps(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {f.path: f.data for f in corpus().train + corpus().heldout}
    many = {f"{n}_{path}": data + b"#" * n for n in range(12) for path, data in named.items()}
    corpora.pack(corpora.split(many, "3"), tmp_path / "corpus.zip")
    words = ["--init", str(weights), "--corpus", str(tmp_path / "corpus.zip"), "--device", "cpu", "--workers", "0"]
    words += ["--context", "512", "--tokens-per-step", "2048", "--max-steps", "3", "--log-every", "1"]
    words += ["--no-compiled", "--final-items", "1", "--out", str(tmp_path / "out")]
    really, handlers = train_tasks.train_step, signal.getsignal(signal.SIGTERM)

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return really(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tasks, "train_step", signalled)
        train_tasks.main(words)
    assert "leg ends at step 1, 0.0 of 8.0 min" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handlers
    assert checkpoint.load(tmp_path / "out" / "state")[1]["progress"]["step"] == 1
    train_tasks.main(words)
    assert '"complete": true' in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^train_tasks: --state: expected a run with something left to do"):
        train_tasks.main(words)
    with pytest.raises(SystemExit, match=r"^train_tasks: .*state: expected settings .*'seed': 3"):
        train_tasks.main([*words, "--seed", "3"])


def test_workers_make_the_same_batches(weights: Path, tmp_path: Path) -> None:
    run = leg(weights, tmp_path, replace(QUICK, workers=2))
    run.progress.step = 3
    stream = run._batches(512)
    made = [next(stream) for _ in range(3)]
    stream.close()
    here = Batches(run.source, QUICK.mixture(), 512, QUICK.tokens_per_step)
    for step, batch in enumerate(made, start=3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch, here[step], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0.0}, "--minutes: expected a finite number above 0, got 0.0"),
        ({"leg_steps": 0}, "--leg-steps: expected a finite number above 0, got 0"),
        ({"context": 1000}, "--context: expected a power of two from 512 to 32768, got 1000"),
        ({"context": 65536}, "--context: expected a power of two from 512 to 32768, got 65536"),
        ({"learning_rate": math.inf}, "--learning-rate: expected a finite number above 0, got inf"),
        ({"weight_decay": math.nan}, "--weight-decay: expected a finite number from 0 on, got nan"),
        ({"seed": -1}, "--seed: expected a finite number from 0 on, got -1"),
        ({"workers": -1}, "--workers: expected at least 0, got -1"),
        (
            {"text_share": 0.7, "many_share": 0.7},
            "--many-share: expected at most 1 together with --text-share, got 1.4",
        ),
        ({"repeat_share": 2.0}, r"--repeat-share: expected 0 to 1, got 2\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


def test_a_loss_that_is_not_finite_ends_the_run(weights: Path, tmp_path: Path) -> None:
    run = leg(weights, tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="loss: expected finite values, got others by step 1"):
        run.train()
    assert not (tmp_path / "state").exists()


# ---- answers ----


def test_greedy_answers_are_those_of_transformers(weights: Path, source: TaskSource) -> None:
    """A batch, in chunks or in one piece, against `generate` one prompt at a time."""
    model = models.load_model(weights)
    examples = [source.example("niah_multivalue", "test", 600, n) for n in range(3)]
    prompts = torch.from_numpy(np.stack([one.prompt for one in examples]))
    for chunk in (None, 128):
        cache = train_cache(model)
        with torch.no_grad():
            written = decode(model, prefill(model, prompts, cache, chunk), cache, 12)
        for row, prompt in zip(written.tolist(), prompts, strict=True):
            settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": END, "pad_token_id": END}
            expected = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)
            until = expected[0, len(prompt) :].tolist()
            assert row[: len(until)] == until


def train_cache(model: models.LlamaForCausalLM) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def test_scores_are_given_back_in_the_order_of_the_examples(
    weights: Path, source: TaskSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load_model(weights)
    examples = [source.example("niah_single", "test", 512, n) for n in range(5)]
    right = {tuple(one.prompt.tolist()): one.target for one in examples[::2]}

    def knows_some(model: Any, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        rows = [right.get(tuple(row.tolist()), np.full(7, END)) for row in tokens]
        return torch.from_numpy(np.stack(rows))

    monkeypatch.setattr("benchmarks.testbed.answers.prefill", knows_some)
    monkeypatch.setattr("benchmarks.testbed.answers.decode", lambda model, rows, cache, count: rows.numpy())
    assert task_scores(model, examples, tokens_at_once=1024) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert [len(part) for part in batches(examples, 1024)] == [2, 2, 1]


def test_intervals() -> None:
    assert wilson(0.0, 10)[0] == 0.0
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="expected at least one item and a mean from 0 to 1"):
        wilson(1.1, 5)
    rng = np.random.default_rng(0)
    strata = [rng.normal(mean, 1, 400) for mean in (0.0, 1.0)]
    low, high = bootstrap_means(strata)
    middle, spread = float(np.mean([s.mean() for s in strata])), np.sqrt(2 / 400) / 2
    assert low == pytest.approx(middle - 1.96 * spread, abs=0.2 * spread)
    assert high == pytest.approx(middle + 1.96 * spread, abs=0.2 * spread)
    parts = rng.uniform(1, 2, 50)
    assert bootstrap_ratio(2 * parts, parts) == pytest.approx((2.0, 2.0))
    assert Accuracy.of([1.0, 0.5, 0.0, 1.0]).faultless == 0.5


def test_the_schedule_is_the_documented_one() -> None:
    assert schedule.CONTEXT_PHASES[0][0] == 0.0
    assert Settings().total_minutes <= Settings().minutes
    assert Settings().minutes < 9
    assert Settings().workers == 4


def test_one_graph_for_all_layers_per_shape_and_the_same_losses(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interim evaluations run other shapes, with a cache, and compile nothing."""
    monkeypatch.setattr(schedule, "CONTEXT_PHASES", ((0.0, 2), (0.5, 1)))
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    settings = replace(QUICK, context=1024, milestone_seconds=1e-9, max_steps=4)
    runs = [leg(weights, tmp_path / str(on), replace(settings, compiled=on)) for on in (False, True)]
    for run in runs:
        assert run.train()
    assert len(runs[0].model.model.layers) > 1
    assert len(graphs) == len({point["context"] for point in runs[1].progress.curve}) == 2
    assert len(runs[1].progress.task_curve) == 4
    curves = [[point.get("text_bits", point.get("answer_bits")) for point in run.progress.curve] for run in runs]
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
