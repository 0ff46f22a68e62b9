"""`compactattn capture` and `compactattn tune`, from a model in a directory to a model that runs on its settings."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from compactattn import Dense, FlashPrefill, KeyBounds, cli
from compactattn.capture import Capture, load_capture, save_capture
from compactattn.cli import capture as command
from compactattn.cli.values import number_words, numbers, size, size_words
from compactattn.integrations.engine_settings import parse_settings
from compactattn.integrations.transformers import attention, enable, recording
from compactattn.settings import load_settings
from tests.test_cli import assert_one_line
from tests.test_transformers import config, model
from tests.test_tuning import make_layer

SENTENCE = "the quick brown fox jumps over a lazy dog and some naïve café owners watch it go by once more"
WORDS = SENTENCE.split()
TEXT = " ".join(WORDS[(n * n + n // 7) % len(WORDS)] for n in range(700))


def save_tokenizer(folder: Path) -> None:
    """A token per word, after a first one that marks the beginning."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of models with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("Llama", "Qwen3", "Qwen3Moe", "Mistral"):
        model(family).save_pretrained(folder / family)
        save_tokenizer(folder / family)
    (folder / "text").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def dense_afterwards() -> Iterator[None]:
    yield
    enable(selector=Dense(block_size=64, query_block=64), heads_per_group=2)


def run_capture(folder: Path, family: str, out: Path, *others: str) -> int:
    return cli.main(
        ["capture", "--model", str(folder / family), "--text", str(folder / "text"), "--out", str(out), *others]
    )


TUNE = ("--chunk", "192", "--block-size", "64", "--query-block", "64", "--sink-blocks", "1", "--window-blocks", "1")


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe", "Mistral"])
def test_from_a_model_and_a_text_to_a_model_on_tuned_settings(
    family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, tuned = tmp_path / "captured", tmp_path / "tuned.json"
    assert run_capture(folder, family, captured, "--tokens", "600", "--dtype", "float16") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{captured}: layers 0-1, 600 tokens, 4 query heads over 2 KV heads of 64, float16; ")
    assert printed.err == "", "no progress bar where nobody looks at it"
    found = load_capture(captured)
    assert (found.model, found.source) == (family, "the first 600 tokens of text")
    assert found.text == " ".join(TEXT.split()[:599]).encode(), "the first token stands for no text"
    assert found.token_ids is not None
    assert found.token_ids[:3].tolist() == [1, 4 + WORDS.index("the"), 4 + WORDS.index(TEXT.split()[1])]

    assert cli.main(["tune", str(captured), "--coverage", "0.9", "--out", str(tuned), *TUNE]) == 0
    printed = capsys.readouterr()
    for words in (f"{family}: largest alpha with a mean coverage of at least 0.9", "under 90 %", "all others dense"):
        assert words in printed.out
    assert printed.err == ""
    settings = load_settings(tuned)
    assert list(settings["selector"]) == [0, 1]
    assert (settings["heads_per_group"], settings["query_blocks_per_span"]) == (1, 1)
    plugin = parse_settings({"settings": str(tuned)}, "the settings of vLLM's plugin")
    assert plugin.layers == settings["selector"]
    assert (plugin.heads_per_group, plugin.query_blocks_per_span) == (1, 1)

    used = []

    def spied(*arguments: Any, **how: Any) -> Any:
        used.append(how["selector"])
        return prefill(*arguments, **how)

    prefill = attention.prefill
    monkeypatch.setattr(attention, "prefill", spied)
    enable(**settings)
    run = transformers.AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="compactattn")
    ids = found.token_ids[None].long()
    written = run.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, prefill_chunk_size=192)
    assert written.shape[1] > 600
    assert used[2:] == [settings["selector"][0], settings["selector"][1]] * 3, "after a first chunk that is dense"


def test_a_byte_is_a_token_where_asked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_capture(folder, "Llama", tmp_path / "a", "--bytes") == 2
    assert_one_line(capsys, "--text", "tokens below 61, as many as the model has")
    wide = transformers.LlamaForCausalLM(config("Llama", vocab_size=256))
    wide.save_pretrained(tmp_path / "wide")
    text = TEXT.encode()
    assert (
        run_capture(tmp_path, "wide", tmp_path / "a", "--bytes", "--text", str(folder / "text"), "--layers", "1") == 0
    )
    found = load_capture(tmp_path / "a")
    assert found.text == text
    assert bytes(found.token_ids.tolist()) == text  # type: ignore[union-attr]
    assert [layer.layer for layer in found.layers] == [1]
    assert found.layers[0].q.dtype == torch.float32, "that of the weights"


def test_without_transformers_it_says_what_to_install(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("compactattn.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run_capture(folder, "Llama", tmp_path / "a") == 2
    assert_one_line(capsys, "needs transformers, the extra `hf`: pip install '.[hf]'")


def test_a_prompt_that_does_not_fit_in_memory_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 ...")

    monkeypatch.setattr(recording._Recorder, "meet", full)
    assert run_capture(folder, "Llama", tmp_path / "a", "--tokens", "300") == 2
    assert_one_line(capsys, "--tokens: expected a prompt that fits in memory, got 300 tokens")
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_progress(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run_capture(folder, "Llama", tmp_path / "a", "--tokens", "250") == 0
    assert "recording: 100%" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "2/2" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert cli.main(["tune", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *TUNE]) == 0
    assert "tuning: 100%" in sys.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a terminal; a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("ending", ["SIGTERM", "SIGINT", "full disk"])
def test_a_capture_that_ends_early_leaves_what_was_there(
    ending: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    meet = recording._Recorder.meet

    def end(self: Any, number: int, *arguments: Any) -> None:
        meet(self, number, *arguments)
        if self.file is not None and number == 1:
            if ending == "full disk":
                raise OSError(28, "No space left on device")
            os.kill(os.getpid(), getattr(signal, ending))

    monkeypatch.setattr(recording._Recorder, "meet", end)
    before = signal.getsignal(signal.SIGTERM)
    assert run_capture(folder, "Llama", tmp_path / "a") == (2 if ending == "full disk" else 130)
    assert signal.getsignal(signal.SIGTERM) is before
    if ending == "full disk":
        assert_one_line(capsys, "--out: expected a file that can be written", "No space left on device")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    assert run_capture(folder, "Llama", tmp_path / "a") == 0
    assert load_capture(tmp_path / "a").tokens == 701


def test_a_file_that_would_be_too_long_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = ("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr(*nothing)
    assert run_capture(folder, "Llama", tmp_path / "a", "--max-size", "1.4M", "--tokens", "500") == 2
    # 2 layers x 500 tokens x 8 heads x 64 x 4 bytes, 4 bytes per token id, and the text
    needed = 2 * 500 * 8 * 64 * 4 + 4 * 500 + len(" ".join(TEXT.split()[:499]).encode())
    assert_one_line(capsys, "--max-size: expected at least 2.05 MB for layers 0-1, 500 tokens", "got 1.4 MB")
    assert size_words(needed) == "2.05 MB"
    free = shutil_usage(free=10**6)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: free)
    assert run_capture(folder, "Llama", tmp_path / "a", "--tokens", "500") == 2
    assert_one_line(capsys, "--out: expected 2.05 MB of free space", "got 1 MB")
    assert list(tmp_path.iterdir()) == []


def shutil_usage(free: int) -> SimpleNamespace:
    return SimpleNamespace(total=10**9, used=10**9 - free, free=free)


REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such model": (["--model", "/no/such/directory"], ("--model: expected a model of transformers",)),
    "no model in it": (["--model", "{folder}"], ("--model: expected a model of transformers",)),
    "a file for a model": (
        ["--model", "{folder}/Llama/config.json"],
        ("--model: expected a directory or a name, got",),
    ),
    "no name": (["--model", ""], ("--model: expected a directory or a name, got ''",)),
    "no text": (["--text", "/no/such/file"], ("--text: expected a file that can be read", "No such file")),
    "text of other bytes": (["--text", "{folder}/latin"], ("--text: expected UTF-8",)),
    "empty text": (["--text", "{folder}/empty"], ("--text: expected at least one byte, got none",)),
    "short text": (["--tokens", "5000"], ("--text: expected at least 5000 tokens, got 701",)),
    "tokens": (["--tokens", "few"], ("--tokens: expected an integer from 1",)),
    "no tokens": (["--tokens", "0"], ("--tokens: expected an integer from 1",)),
    "layers": (["--layers", "0,2"], ("--layers: expected all, or numbers from 0 to 1 as in 0,4-7", "'0,2'")),
    "layer words": (["--layers", "first"], ("--layers: expected all, or numbers from 0 to 1",)),
    "size": (["--max-size", "large"], ("--max-size: expected a size such as 500M or 2G, got 'large'",)),
    "dtype": (["--dtype", "int8"], ("--dtype", "float16")),
    "device": (["--device", "tpu"], ("--device: expected cpu, or a GPU of this machine", "'tpu'")),
    "device without data": (["--device", "meta"], ("--device: expected cpu, or a GPU of this machine", "'meta'")),
    "out into nowhere": (["--out", "/no/such/folder/x"], ("--out: expected a file in a writable directory",)),
    "out onto a folder": (["--out", "{folder}"], ("--out: expected a file in a writable directory",)),
    "out onto a device": (["--out", "/dev/null"], ("--out: expected a file in a writable directory",)),
    "out onto the weights": (["--out", "{folder}/Llama/config.json"], ("--out: expected a file that is not read",)),
    "out onto the text": (["--out", "{folder}/../{name}/text"], ("--out: expected a file that is not read",)),
    "no weights": (["--model", "{folder}/bare"], ("--model: expected a causal language model", "bare")),
    "spoiled weights": (["--model", "{folder}/spoiled"], ("--model: expected a causal language model", "spoiled")),
    "no rotary positions": (["--model", "{folder}/learned"], ("--model: expected a configuration with rope_theta",)),
    "no tokenizer": (["--model", "{folder}/speechless"], ("--model: expected a model with a tokenizer",)),
    "code of its own": (["--model", "{folder}/coded"], ("--model: ", "--trust-remote-code")),
    "an encoder": (["--model", "{folder}/encoder"], ("--model: ", "causal")),
    "a window": (["--model", "{folder}/windowed"], ("--layers: expected layers that attend to everything", "got 0")),
}


@pytest.fixture(scope="module")
def spoiled(folder: Path) -> Path:
    """More directories, each with something wrong, and texts that are none."""
    (folder / "latin").write_bytes(b"caf\xe9")
    (folder / "empty").write_bytes(b"")
    for name in ("bare", "spoiled", "coded"):
        config("Llama").save_pretrained(folder / name)
        save_tokenizer(folder / name)
    (folder / "spoiled" / "model.safetensors").write_bytes(b"x" * 100)
    coded = json.loads((folder / "coded" / "config.json").read_text())
    coded |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "coded" / "config.json").write_text(json.dumps(coded))
    (folder / "coded" / "own.py").write_text("raise SystemExit('code of the model ran')")
    model("Llama").save_pretrained(folder / "speechless")
    transformers.ModernBertConfig(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(
        folder / "encoder"
    )
    save_tokenizer(folder / "encoder")
    transformers.GPT2Config(vocab_size=61, n_embd=128, n_head=2).save_pretrained(folder / "learned")
    save_tokenizer(folder / "learned")
    model("Mistral", sliding_window=100).save_pretrained(folder / "windowed")
    save_tokenizer(folder / "windowed")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_of_capture_are_one_line_and_exit_2(
    case: str, spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = REFUSED[case]
    others = [argument.replace("{folder}", str(spoiled)).replace("{name}", spoiled.name) for argument in arguments]
    assert run_capture(spoiled, "Llama", tmp_path / "a", *others) == 2
    assert len(assert_one_line(capsys, *words)) < 800
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_dtype_name_the_option(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = transformers.AutoModelForCausalLM.from_pretrained(folder / "Llama")
    run.model.layers[0].self_attn.v_proj.weight.data.mul_(1e7)
    run.save_pretrained(tmp_path / "wild")
    save_tokenizer(tmp_path / "wild")
    text = str(folder / "text")
    capsys.readouterr()
    assert run_capture(tmp_path, "wild", tmp_path / "a", "--text", text, "--dtype", "float16") == 2
    assert_one_line(capsys, "--dtype: layers.0.v: expected finite values in float16", "bfloat16 and float32")
    assert not (tmp_path / "a").exists()


# ---- tune ----


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    for name, layers, origin in (("a", (2, 5), "noise"), ("b", (5, 7), "noise"), ("other", (5,), "another model")):
        made = tuple(make_layer(n, n, tokens=430) for n in layers)
        save_capture(folder / name, Capture(made, origin, "", 1e4, 0.06))
    return folder


def test_several_captures_give_every_layer_once(
    captures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "settings.json"
    arguments = ["tune", str(captures / "a"), str(captures / "b"), "--out", str(out), "--coverage", "0.95", *TUNE]
    assert cli.main([*arguments, "--heads-per-group", "2", "--query-blocks-per-span", "chunk", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = load_settings(out)
    assert [layer["layer"] for layer in found["layers"]] == list(settings["selector"]) == [2, 5, 7]
    assert (settings["heads_per_group"], settings["query_blocks_per_span"]) == (2, None)
    for layer in found["layers"]:
        chosen = settings["selector"][layer["layer"]]
        expected = FlashPrefill(layer["alpha"], sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
        assert chosen == expected
        assert layer["coverage"]["queries"] == (430 - 192) * (2 if layer["layer"] == 5 else 1)
        assert sum(layer["coverage"]["mean"]) / 4 >= 0.95
        steps = [layer["density"][step] for step in ("mask", "query_block_union", "sub_group_union", "group_union")]
        assert steps == sorted(steps)
    assert "noise" in json.loads(out.read_text())["origin"]
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_the_threshold_of_bounds_is_tuned_too(
    captures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "settings.json"
    arguments = ["tune", str(captures / "a"), "--selector", "keybounds", "--out", str(out), "--coverage", "0.95", *TUNE]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "largest threshold with a mean coverage of at least 0.95" in lines[0]
    settings = load_settings(out)["selector"]
    assert list(settings) == [2, 5]
    told = {int(line.split()[0]): float(line.split()[1]) for line in lines if line.strip()[:1].isdigit()}
    for layer, selector in settings.items():
        assert isinstance(selector, KeyBounds)
        assert 0 < selector.threshold < 1
        assert told[layer] == pytest.approx(selector.threshold, rel=1e-3)


TUNE_REFUSED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such file": (["/no/such/file"], ("CAPTURE: ", "expected a capture file")),
    "no capture": (["{folder}"], ("CAPTURE: ", "expected a safetensors file")),
    "two models": (["{folder}/other"], ("CAPTURE: expected captures of one model, got another model, noise",)),
    "coverage": (["--coverage", "1"], ("--coverage: expected a number above 0 and below 1, got '1'",)),
    "no coverage": (["--coverage", "high"], ("--coverage: expected a number above 0 and below 1, got 'high'",)),
    "chunk": (["--chunk", "0"], ("--chunk: expected an integer from 1",)),
    "long chunk": (["--chunk", "430"], ("error: CAPTURE: expected prompts in which the 1 sink and 1 window",)),
    "heads": (
        ["--heads-per-group", "3"],
        ("error: --heads-per-group: expected a divisor of the 2 query heads per KV",),
    ),
    "auto": (["--heads-per-group", "auto"], ("--heads-per-group: expected an integer from 1",)),
    "span": (["--query-blocks-per-span", "all"], ("--query-blocks-per-span: expected chunk, or an integer from 1",)),
    "block size": (["--block-size", "32"], ("--block-size: expected one of 64, 128, 256, got '32'",)),
    "out": (["--out", "/no/such/folder/x"], ("--out: expected a file in a writable directory",)),
    "out onto a capture": (["--out", "{folder}/a"], ("--out: expected a file that is not read",)),
    "json onto a capture": (["--json", "{folder}/a"], ("--json: expected a file that is not read or written as well",)),
    "json onto the settings": (["--json", "{out}"], ("--json: expected a file that is not read or written as well",)),
    "json": (["--json", "/no/such/folder/x"], ("--json: expected '-' or a file in a writable directory",)),
}


@pytest.mark.parametrize("case", TUNE_REFUSED)
def test_bad_arguments_of_tune_are_one_line_and_exit_2(
    case: str, captures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = TUNE_REFUSED[case]
    out = str(tmp_path / "a")
    others = [argument.replace("{folder}", str(captures)).replace("{out}", out) for argument in arguments]
    files, options = (others, []) if len(others) == 1 else ([], others)
    assert cli.main(["tune", str(captures / "a"), *files, "--out", out, *TUNE, *options]) == 2
    assert_one_line(capsys, *words)
    assert list(tmp_path.iterdir()) == []


# ---- words as values ----


def test_sizes_and_numbers() -> None:
    words = ("1", "5k", "500M", "2 GB", "1.5G", "2T")
    assert [size("--max-size", text) for text in words] == [1, 5000, 5 * 10**8, 2 * 10**9, 15 * 10**8, 2 * 10**12]
    for text in ("", "0", "0G", "-1", "1e9", "nan", "٣", "2X", "M"):
        with pytest.raises(cli.UsageError, match="--max-size: expected a size such as 500M or 2G"):
            size("--max-size", text)
    assert numbers("--layers", "3, 0-1,1", 4) == [0, 1, 3]
    for found, text in (([0, 1, 3], "0-1,3"), ([5], "5"), ([0, 2, 4, 5, 6], "0,2,4-6"), (list(range(80)), "0-79")):
        assert number_words(found) == text
        assert numbers("--layers", text, 80) == found
    for text in ("", "4", "1-", "2-1", "-1", "0,,1", "0.5", "٣", "0-99999999999999"):
        with pytest.raises(cli.UsageError, match="--layers: expected all, or numbers from 0 to 3"):
            numbers("--layers", text, 4)
    counts = (999, 1000, 31_820_105, 2 * 10**9, 5 * 10**13)
    assert [size_words(n) for n in counts] == ["999 bytes", "1 kB", "31.8 MB", "2 GB", "50 TB"]
