"""The test bed: corpus and split, weights, training loop and evaluation, on tiny models."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.testbed import corpus as corpora
from compactattn.capture import load_capture

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.testbed import evaluate, record, train
from benchmarks.testbed import model as models

# Held-out text must be predictable from training text, for a tiny model to show progress in seconds.
LINES = [f"    def method_{i % 7}(self, value):\n        return self.items[{i % 5}] + value\n" for i in range(40)]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library in small: files for both sides of the split, and files to be left out."""
    root = tmp_path / "lib"
    for number in range(60):
        file = root / f"package_{number % 4}" / f"module_{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# module {number}\n" + "".join(LINES[: 8 + number % 30]))
    for left_out in (
        "site-packages/x.py",
        "encodings/cp037.py",
        "lib2to3/tests/data/bom.py",
        "notes.txt",
        "_sysconfigdata_x.py",
    ):
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_text("left = 'out'\n")
    (root / "data").mkdir()
    (root / "data" / "fine.py").write_text("kept = True\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "null.py").write_bytes(b"a\0b\n")
    (root / "empty.py").write_bytes(b"")
    (root / "huge.py").write_bytes(b"#" * (corpora.MAX_FILE_BYTES + 1))
    (root / "zz_copy.py").write_text((root / "package_0" / "module_0.py").read_text())
    return root


def tiny_config() -> Any:
    return models.testbed_config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16
    )


TINY = train.Settings(
    minutes=10, max_steps=40, context=64, tokens_per_step=512, learning_rate=1e-2, warmup_steps=5, log_every=5
)


def tiny_run(corpus: corpora.Corpus, tmp_path: Path, settings: train.Settings = TINY) -> train.Run:
    checkpoint = tmp_path / "checkpoints" / "last.pt"
    return train.Run(tiny_config(), corpus, settings, tmp_path / "out", checkpoint, torch.device("cpu"))


def test_the_corpus_keeps_source_text_and_nothing_else(library: Path) -> None:
    corpus = corpora.collect(library)
    kept = {file.path for file in corpus.train + corpus.heldout}
    assert kept == {f"package_{n % 4}/module_{n}.py" for n in range(60)} | {"data/fine.py"}


def test_the_split_is_disjoint_and_goes_by_path_alone(library: Path) -> None:
    corpus = corpora.collect(library)
    train_paths, heldout_paths = ({f.path for f in side} for side in (corpus.train, corpus.heldout))
    assert train_paths
    assert heldout_paths
    assert not train_paths & heldout_paths
    assert not {f.data for f in corpus.train} & {f.data for f in corpus.heldout}
    for path in heldout_paths:
        (library / path).write_text("changed = True\n" * (1 + len(path)))
    (library / "later.py").write_text("added = 'in a later version'\n")
    later = corpora.collect(library)
    assert train_paths <= {f.path for f in later.train} | {f.path for f in later.heldout}
    assert not heldout_paths & {f.path for f in later.train}
    assert not train_paths & {f.path for f in later.heldout}


def test_equal_contents_never_stand_on_both_sides() -> None:
    names = [f"file_{n}.py" for n in range(200)]
    assert {corpora.is_heldout(name) for name in names} == {True, False}
    corpus = corpora.split(dict.fromkeys(reversed(names), b"same\n"), "3.11.7")
    assert [file.path for file in corpus.train + corpus.heldout] == ["file_0.py"]


def test_the_held_out_share_and_the_default_text_of_recordings() -> None:
    share = np.mean([corpora.is_heldout(f"directory/file_{n}.py") for n in range(20_000)])
    assert 0.045 < share < 0.055
    assert corpora.is_heldout(record.DEFAULT_TEXT)


def test_packing_is_deterministic_and_loses_nothing(library: Path, tmp_path: Path) -> None:
    corpus = corpora.collect(library)
    corpora.pack(corpus, tmp_path / "a.zip")
    corpora.pack(corpora.collect(library), tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    unpacked = corpora.load(tmp_path / "a.zip")
    assert unpacked.statistics() == corpus.statistics()
    assert [asdict(file) for file in unpacked.train] == [asdict(file) for file in corpus.train]


def test_broken_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_text("no")
    with pytest.raises(ValueError, match=r"no\.zip: expected a corpus packed by"):
        corpora.load(tmp_path / "no.zip")
    with pytest.raises(ValueError, match=r"corpus: expected Python source files under .*, got none"):
        corpora.collect(tmp_path)
    with pytest.raises(ValueError, match=r"corpus: expected at least 65 tokens for one window, got 3"):
        corpora.sample_windows(np.zeros(3, np.uint16), 1, 65, 0.0, np.random.default_rng(0))


def test_the_stream_separates_files() -> None:
    files = (corpora.SourceFile("a.py", b"a\xff"), corpora.SourceFile("b.py", b"b"))
    assert corpora.token_stream(files).tolist() == [256, 97, 255, 256, 98]
    assert corpora.token_stream(()).tolist() == []


@pytest.mark.parametrize("tokens", [64, 257, 8193])
def test_planted_repeats_are_copies_of_earlier_text(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for _ in range(20):
        original = rng.integers(0, 256, tokens)
        window = original.copy()
        repeats = corpora.plant_repeats(window, rng)
        untouched = np.ones(tokens, dtype=bool)
        end = tokens // 8
        for repeat in repeats:
            assert end < repeat.start
            assert repeat.source >= 0
            assert repeat.source + repeat.length <= repeat.start
            end = repeat.start + repeat.length
            assert end <= tokens
            copied = window[repeat.source : repeat.source + repeat.length]
            assert np.array_equal(window[repeat.start : end], copied)
            untouched[repeat.start : end] = False
        assert np.array_equal(window[untouched], original[untouched])
    assert repeats


def test_windows_depend_on_the_generator_alone(library: Path) -> None:
    stream = corpora.token_stream(corpora.collect(library).train)
    first, second = (corpora.sample_windows(stream, 6, 129, 0.5, np.random.default_rng((3, 7))) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (6, 129)
    plain = corpora.sample_windows(stream, 4, 129, 0.0, np.random.default_rng(0))
    text = stream.tobytes()
    assert all(row.astype(np.uint16).tobytes() in text for row in plain)


def test_the_committed_shape_has_the_size_it_claims(tmp_path: Path) -> None:
    model = models.new_model(models.testbed_config(), seed=0)
    assert 6_000_000 < sum(p.numel() for p in model.parameters()) < 8_000_000
    assert models.save_model(model, tmp_path) <= models.WEIGHTS_LIMIT_BYTES
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (
        8,
        2,
        64,
    )


def test_weights_come_back_as_written_also_through_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = models.new_model(tiny_config(), seed=1)
    models.save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    ours = models.load_model(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not ours.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16().float())
        assert torch.equal(theirs.state_dict()[name], tensor.bfloat16().float())
    tokens = torch.arange(64)[None]
    assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_weights_that_are_missing_broken_foreign_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"expected config\.json and model\.safetensors, got: "):
        models.load_model(tmp_path / "absent")
    models.save_model(models.new_model(tiny_config(), seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"expected the weights that config\.json describes"):
        models.load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"expected config\.json and model\.safetensors, got: "):
        models.load_model(tmp_path)
    monkeypatch.setattr(models, "WEIGHTS_LIMIT_BYTES", 1000)
    with pytest.raises(ValueError, match=r"weights: expected at most 1000 bytes, got"):
        models.save_model(models.new_model(tiny_config(), seed=1), tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_training_learns_and_leaves_its_record(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "INTERIM_WINDOWS", 1)
    run = tiny_run(corpora.collect(library), tmp_path, replace(TINY, milestone_seconds=1e-6))
    run.train()
    written_early = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written_early["complete"] is False
    run.finish()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["complete"] is True
    assert (written["steps"], written["tokens"], written["corpus"]) == (40, 40 * 512, run.corpus_statistics)
    curve = written["loss_curve"]
    assert [point["step"] for point in curve] == list(range(5, 41, 5))
    assert {point["context"] for point in curve} == {8, 16, 64}
    assert curve[-1]["train_bits_per_token"] < 0.8 * curve[0]["train_bits_per_token"]
    assert written["heldout"]["bits_per_byte"] < written["heldout_curve"][0]["bits_per_byte"]
    assert "untouched" in written["heldout_with_planted_repeats_bits_per_byte"]


def test_a_resumed_run_takes_the_same_steps(library: Path, tmp_path: Path) -> None:
    corpus = corpora.collect(library)
    settings = replace(TINY, max_steps=8, log_every=1)
    straight = tiny_run(corpus, tmp_path / "straight", settings)
    straight.train()

    broken = tiny_run(corpus, tmp_path / "broken", settings)
    steps = 0

    def stop_in_the_middle(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt

    broken._log = stop_in_the_middle  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.save_checkpoint()
    resumed = tiny_run(corpus, tmp_path / "broken", settings)
    resumed.resume()
    assert resumed.progress.step == 4
    resumed.train()
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    losses = [[point["train_bits_per_token"] for point in run.progress.curve[-4:]] for run in (straight, resumed)]
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-3)


def test_checkpoints_that_do_not_belong_are_refused(library: Path, tmp_path: Path) -> None:
    corpus = corpora.collect(library)
    run = tiny_run(corpus, tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint, got: "):
        run.resume()
    run.save_checkpoint()
    with pytest.raises(ValueError, match=r"last\.pt: expected settings .*'seed': 5"):
        tiny_run(corpus, tmp_path, replace(TINY, seed=5)).resume()
    tiny_run(corpus, tmp_path, replace(TINY, minutes=99, max_steps=None)).resume()
    other = replace(corpus, train=corpus.train[1:])
    with pytest.raises(ValueError, match=r"last\.pt: expected corpus "):
        tiny_run(other, tmp_path).resume()
    torch.save({"step": 1}, run.checkpoint)
    with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint of this script"):
        run.resume()
    run.checkpoint.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint, got: "):
        run.resume()


def test_a_loss_that_is_not_finite_ends_the_run(library: Path, tmp_path: Path) -> None:
    run = tiny_run(corpora.collect(library), tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss: expected a finite value, got nan at step 5"):
        run.train()


def test_the_budget_ends_by_time_or_by_steps_annealed() -> None:
    settings = replace(TINY, minutes=2, max_steps=100)
    assert train.Progress(step=50, seconds=30).share(settings) == 0.5
    assert train.Progress(step=10, seconds=90).share(settings) == 0.75
    assert train.Progress(step=10, seconds=90).share(replace(settings, max_steps=None)) == 0.75
    rates = [train.learning_rate_at(step / 100, step, settings) for step in range(100)]
    assert rates[0] == settings.learning_rate / 5
    assert max(rates) == rates[4]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(settings.learning_rate / 100)
    assert [train.context_at(share, 8192) for share in (0.0, 0.1, 0.2, 0.4, 0.99)] == [
        1024,
        1024,
        2048,
        8192,
        8192,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], r"--minutes: expected a number above 0, got 0\.0"),
        (["--context", "100"], r"--context: expected a multiple of 8 from 64 on, got 100"),
        (["--tokens-per-step", "100"], r"--tokens-per-step: expected a multiple of 8192, got 100"),
        (["--repeat-share", "2"], r"--repeat-share: expected 0 to 1, got 2\.0"),
        (["--device", "abacus"], r"--device: expected cuda, cuda:N or cpu, got 'abacus'"),
        (["--corpus", "absent.zip", "--device", "cpu"], r"absent\.zip"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_training_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=r"^train: .*" + message):
        train.main(["--out", str(tmp_path), *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_the_training_command_wants_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^train: --device: expected a machine with a CUDA GPU, got none"):
        train.main(["--out", str(tmp_path)])


def test_both_commands_from_end_to_end(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "testbed_config", tiny_config)
    (library / record.DEFAULT_TEXT).write_text("".join(LINES))
    archive, out = tmp_path / "corpus.zip", tmp_path / "out"
    corpora.pack(corpora.collect(library), archive)
    words = ["--corpus", str(archive), "--device", "cpu"]
    train.main([*words, "--out", str(out), "--max-steps", "3", "--context", "64", "--tokens-per-step", "1024"])
    assert "bits_per_byte" in capsys.readouterr().out
    sample = tmp_path / "samples" / "sample.safetensors"
    record.main([*words, "--weights", str(out), "--tokens", "700", "--out", str(sample)])
    assert "far share" in capsys.readouterr().out
    capture = load_capture(sample)
    assert (len(capture.layers), capture.tokens, capture.rope_theta) == (2, 700, 500_000.0)
    assert capture.layers[0].q.dtype == torch.float16
    assert capture.text == (library / record.DEFAULT_TEXT).read_bytes()[:700]
    assert capture.scale is None
    with pytest.raises(SystemExit, match=r"^record: --text: expected a held-out file of at least 700 bytes"):
        record.main([*words, "--weights", str(out), "--tokens", "700", "--text", "no.py", "--out", str(sample)])
    with pytest.raises(SystemExit, match=r"^record: .*expected config\.json and model\.safetensors"):
        record.main([*words, "--weights", str(tmp_path / "absent"), "--out", str(sample)])


def test_evaluation_counts_bytes_and_not_separators() -> None:
    model = models.new_model(tiny_config(), seed=0)
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 256, 64 * 5 + 1).astype(np.uint16)
    stream[[10, 200]] = corpora.SEPARATOR
    report = evaluate.heldout_report(model, stream, context=64, limit=99, batch=2)
    assert report.bytes == 64 * 5 - 2
    assert report.bits_per_byte == pytest.approx(np.log2(models.VOCABULARY), abs=0.2)
    assert list(report.by_position) == ["0-8", "8-16", "16-32", "32-64"]
    assert evaluate.heldout_windows(stream, 64, 2).shape == (2, 65)
    with pytest.raises(ValueError, match=r"held-out text: expected at least 65 tokens, got 64"):
        evaluate.heldout_windows(stream[:64], 64, 1)
    assert model.training
