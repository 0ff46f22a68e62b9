"""The command line: what it measures, what it prints, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import compactattn
from compactattn import Dense, FlashPrefill, cli
from compactattn.capture import Capture, CapturedLayer, sample_path, save_capture
from compactattn.cli import demo, info
from compactattn.demo import DemoSettings, PagedPrompt, measure
from compactattn.demo_text import as_json, as_text

TOKENS, HEADS, KV_HEADS = 600, 4, 2


def small_capture(tokens: int = TOKENS, dtype: torch.dtype = torch.float16, scale: float | None = None) -> Capture:
    generator = torch.Generator().manual_seed(5)
    layers = [
        CapturedLayer(
            number, *(torch.randn(tokens, n, 64, generator=generator).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
        )
        for number in (2, 7)
    ]
    return Capture(layers=tuple(layers), model="noise", source="a generator", rope_theta=1e4, scale=scale)


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("captures") / "noise.safetensors"
    save_capture(path, small_capture())
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_demo_prints_a_table_per_layer(capture_file, capsys):
    assert cli.main(["demo", "--capture", capture_file, "--chunk", "200"]) == 0
    printed = capsys.readouterr()
    for words in (
        "600 tokens in 3 chunks of 200, 4 query heads over 2 KV heads",
        "FlashPrefill(alpha=0.1,",
        "numba on CPU, 1 thread; float32 (recorded as float16; converted for every method, dense included)",
        "layer 2",
        "layer 7",
        "query-block union",
        "output error, worst head [%]",
        "coverage, mean over queries [%]",
        "time, all chunks [ms]",
        "QUOKA, same budget",
    ):
        assert words in printed.out
    assert "6/6" in printed.err  # the progress bar: two layers of three chunks


@pytest.mark.parametrize("selector", demo.SELECTORS)
def test_demo_json_is_what_was_measured(selector, capture_file, capsys):
    found = run_json(capsys, "demo", "--capture", capture_file, "--selector", selector, "--chunk", "256")
    assert [layer["layer"] for layer in found["layers"]] == [2, 7]
    assert found["settings"]["selector"]["block_size"] == 64
    assert found["capture"] == {"file": capture_file, "model": "noise", "source": "a generator"}
    for layer in found["layers"]:
        steps = [layer["density"][step] for step in ("mask", "query_block_union", "sub_group_union", "group_union")]
        assert steps == sorted(steps)
        assert 0 <= steps[0] <= steps[-1] <= 1
        assert layer["coverage"]["queries"] == TOKENS - 256
        assert len(layer["output_error"]) == len(layer["coverage"]["worst"]) == HEADS
        assert [(chunk["start"], chunk["queries"]) for chunk in layer["chunks"]] == [(0, 256), (256, 256), (512, 88)]
        assert layer["prefill_s"] > 0
        for chunk in layer["chunks"]:
            assert abs(chunk["past_tokens"] - chunk["quoka_tokens"]) <= 0.5  # equal budget
    if selector == "dense":
        assert steps == [1.0] * 4
        assert max(layer["output_error"]) < 1e-5
        assert min(layer["coverage"]["worst"]) > 1 - 1e-5


def test_alpha_thins_the_mask(capture_file, capsys):
    def density(alpha: str) -> float:
        found = run_json(capsys, "demo", "--capture", capture_file, "--alpha", alpha, "--heads-per-group", "1")
        assert found["settings"]["selector"]["alpha"] == float(alpha)
        return found["layers"][0]["density"]["mask"]

    assert density("0") == 1.0
    assert density("1") < 0.7


def test_demo_honours_the_scale_of_the_capture():
    settings = DemoSettings(FlashPrefill(alpha=0.9, block_size=64, query_block=64), 1, chunk=300, repeats=1)
    plain, scaled = (measure(small_capture(scale=scale), settings, device=torch.device("cpu")) for scale in (None, 1.0))
    assert as_json(plain)["layers"][0]["coverage"] != as_json(scaled)["layers"][0]["coverage"]


def test_one_chunk_has_no_past_to_report():
    settings = DemoSettings(Dense(block_size=64, query_block=64), 2, chunk=TOKENS, repeats=1)
    report = measure(small_capture(), settings, device=torch.device("cpu"))
    layer = as_json(report)["layers"][0]
    assert layer["coverage"] is None
    assert set(layer["density"].values()) == {None}
    assert json.loads(json.dumps(layer, allow_nan=False)) == layer
    assert "mask -" in as_text(report)
    assert "coverage" not in as_text(report)


def test_paged_prompt_fills_permuted_pages():
    layer = small_capture(tokens=100).layers[0]
    prompt = PagedPrompt.from_layer(layer, torch.device("cpu"), page_size=16)
    batch = prompt.feed(0, 33)
    assert (batch.max_q_len, batch.max_seq_len) == (33, 33)
    pages = prompt.kv.page_table[0].tolist()
    assert sorted(pages) == list(range(7))
    assert pages != sorted(pages)
    assert torch.equal(prompt.kv.k[pages[1]], layer.k[16:32].float())
    assert prompt.kv.k[pages[2], 1:].isnan().all()
    assert prompt.kv.v[pages[3]].isnan().all()


def test_json_file_appears_whole(capture_file, tmp_path, capsys):
    target = tmp_path / "found.json"
    assert cli.main(["demo", "--capture", capture_file, "--json", str(target)]) == 0
    assert "layer 2" in capsys.readouterr().out
    assert len(json.loads(target.read_text())["layers"]) == 2
    assert list(tmp_path.iterdir()) == [target]


REFUSED = {
    "unknown selector": (["--selector", "quest"], "--selector", "flashprefill"),
    "alpha too large": (["--alpha", "1.5"], "--alpha", "0 to 1"),
    "alpha nan": (["--alpha", "nan"], "--alpha", "0 to 1"),
    "alpha no number": (["--alpha", "much"], "--alpha", "0 to 1"),
    "alpha of another selector": (["--selector", "dense", "--alpha", "0.1"], "--alpha", "flashprefill"),
    "group does not divide": (["--heads-per-group", "3"], "--heads-per-group", "1, 2"),
    "group beyond the KV group": (["--heads-per-group", "4"], "--heads-per-group", "1, 2"),
    "group no number": (["--heads-per-group", "two"], "--heads-per-group", "1, 2"),
    "chunk zero": (["--chunk", "0"], "--chunk", "1 to 600"),
    "chunk too long": (["--chunk", "601"], "--chunk", "1 to 600"),
    "block size": (["--block-size", "100"], "--block-size", "64, 128, 256"),
    "json into nowhere": (["--json", "/no/such/folder/x.json"], "--json", "writable directory"),
    "json onto a folder": (["--json", "."], "--json", "'-' or a file"),
    "unknown option": (["--quick"], "--quick", "unrecognized"),
}


@pytest.mark.parametrize(("arguments", "names", "valid"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_arguments_are_one_line_and_exit_2(arguments, names, valid, capture_file, capsys):
    assert cli.main(["demo", "--capture", capture_file, *arguments]) == 2
    assert_one_line(capsys, names, valid)


def test_bad_captures_are_one_line_and_exit_2(tmp_path, capsys):
    malformed = tmp_path / "malformed.safetensors"
    malformed.write_bytes(b"not a capture" * 10)
    odd = tmp_path / "odd.safetensors"
    generator = torch.Generator().manual_seed(1)
    layer = CapturedLayer(0, *(torch.randn(70, 2, 48, generator=generator) for _ in range(3)))
    save_capture(odd, Capture(layers=(layer,), model="", source="", rope_theta=1e4))
    for path, valid in (
        (tmp_path / "missing", "expected a capture file"),
        (tmp_path, "safetensors"),
        (malformed, "safetensors"),
        (odd, "64, 80, 96, 128, 192, 256"),
    ):
        assert cli.main(["demo", "--capture", str(path)]) == 2
        assert_one_line(capsys, "--capture", valid)


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("compactattn: error: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err
    return printed.err


def test_one_head_per_kv_head_needs_no_option(tmp_path, capsys):
    generator = torch.Generator().manual_seed(1)
    layer = CapturedLayer(0, *(torch.randn(200, 3, 64, generator=generator) for _ in range(3)))
    save_capture(tmp_path / "mha", Capture(layers=(layer,), model="", source="", rope_theta=1e4))
    found = run_json(capsys, "demo", "--capture", str(tmp_path / "mha"), "--chunk", "100")
    assert found["settings"]["heads_per_group"] == 1


def test_no_command_is_an_error(capsys):
    assert cli.main([]) == 2
    assert_one_line(capsys, "{demo,capture,tune,info}")


def test_info_says_which_backends_work_and_why_others_do_not(capsys, monkeypatch):
    triton = pytest.importorskip("compactattn._triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "INTERPRETED", False)
    facts = run_json(capsys, "info")
    assert facts["versions"]["torch"] == torch.__version__
    cpu = facts["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["backends"]["numba"] is None
    assert "TRITON_INTERPRET=1" in cpu["backends"]["triton"]
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "numba    works" in printed
    assert "triton   does not work: on CPU tensors" in printed


def test_info_says_which_attention_kernel_a_gpu_runs_and_why(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    hopper, ampere = info._triton_attention((9, 0)), info._triton_attention((8, 0))
    assert hopper["bfloat16, head dimension 128, query blocks of 128"] == "warp-specialised Hopper kernel"
    assert "general kernel (query blocks" in hopper["bfloat16, head dimension 128, query blocks of 64"]
    assert all(kernel == "general kernel (compute capability 8.0, not 9.0)" for kernel in ampere.values())


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"compactattn {compactattn.__version__}\n"


def test_json_goes_where_a_link_leads(tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("there.json", "dangling.json"):
        link = tmp_path / name
        link.symlink_to(folder / name)
    (folder / "there.json").write_text("old")
    for name in ("there.json", "dangling.json"):
        assert cli.main(["info", "--json", str(tmp_path / name)]) == 0
        assert (tmp_path / name).is_symlink()
        assert json.loads((folder / name).read_text())["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in folder.iterdir()) == ["dangling.json", "there.json"]
    capsys.readouterr()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert cli.main(["info", "--json", str(loop)]) == 2
    assert loop.is_symlink()
    assert_one_line(capsys, "--json")


def test_json_never_takes_the_place_of_what_is_read(capture_file, tmp_path, capsys):
    before = Path(capture_file).read_bytes()
    link, twin = tmp_path / "link", tmp_path / "twin"
    link.symlink_to(capture_file)
    os.link(capture_file, twin)
    for read, written in ((capture_file, capture_file), (capture_file, link), (link, capture_file), (twin, link)):
        assert cli.main(["demo", "--capture", str(read), "--json", str(written)]) == 2
        assert_one_line(capsys, f"--json: expected a file that is not read or written as well, got '{written}'")
    assert Path(capture_file).read_bytes() == before
    assert cli.main(["demo", "--json", str(sample_path())]) == 2
    assert_one_line(capsys, "--json: expected a file that is not read or written as well")


def test_json_goes_through_a_fifo_and_leaves_it_there(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()), daemon=True)
    reader.start()
    assert cli.main(["info", "--json", str(fifo)]) == 0
    assert fifo.is_fifo()
    reader.join(10)
    assert "versions" in json.loads(received[0])


def test_json_that_cannot_be_written_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    target = tmp_path / "found.json"
    target.write_text("old")
    assert cli.main(["info", "--json", str(target)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "--json" in printed.err
    assert "No space left on device" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert target.read_text() == "old"
    assert cli.main(["info", "--json", str(tmp_path)]) == 2
    assert_one_line(capsys, "--json", "expected '-' or a file in a writable directory")


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_leaves_ends_the_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        ended = run_module(*arguments, stdout=output)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_to_a_full_device_is_one_line_and_exit_2():
    with open("/dev/full", "w") as output:
        ended = run_module("info", stdout=output)
    assert ended.returncode == 2
    assert (
        ended.stderr == "compactattn: error: standard output: expected to be writable, got: No space left on device\n"
    )


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"]], ids=" ".join)
def test_closed_output_is_one_line_and_exit_2(arguments):
    ended = run_module(*arguments, stdout=None, preexec_fn=lambda: os.close(1))
    assert ended.returncode == 2
    assert ended.stderr == "compactattn: error: standard output: expected to be writable, got: closed\n"


def test_json_is_written_even_if_nobody_reads_the_text(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["info", "--json", str(tmp_path / "found.json")]) == 141
    assert "versions" in json.loads((tmp_path / "found.json").read_text())


def test_metadata_is_shown_escaped_and_in_any_encoding(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    layer = CapturedLayer(0, *(torch.randn(100, 2, 64, generator=generator) for _ in range(3)))
    path = tmp_path / "odd"
    model, source = "modèle\x1b[31m\nlayer 9", "a\rb\x7f\x9b2J\u202e"
    save_capture(path, Capture(layers=(layer,), model=model, source=source, rope_theta=1e4))
    for encoding, word in (("utf-8", "modèle"), ("ascii", "mod\\xe8le")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert cli.main(["demo", "--capture", str(path), "--selector", "dense"]) == 0
        heading, *others = raw.getvalue().decode(encoding).split("\n")
        assert heading.endswith(rf"odd: {word}\x1b[31m\nlayer 9; a\rb\x7f\x9b2J\u202e")
        assert all(line.isprintable() for line in others)
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert cli.main(["demo", "--capture", str(path), "--selector", "dense", "--json"]) == 0
        text = raw.getvalue().decode(encoding)
        assert text.replace("\n", "").isprintable()
        assert json.loads(text)["capture"]["source"] == source


def test_errors_show_no_control_characters(capsys):
    assert cli.main(["demo", "--capture", "no\x1b[2Jsuch\nfile"]) == 2
    assert "\x1b" not in assert_one_line(capsys, "--capture")


def run_module(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    command, root = [sys.executable, "-m", "compactattn", *arguments], Path(__file__).parents[1]
    how = {"stdout": subprocess.PIPE, **how}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, cwd=root, check=False, **how)


def test_module_reports_errors_without_a_traceback(capture_file):
    ended = run_module("demo", "--capture", capture_file, "--alpha", "7")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "compactattn: error: --alpha: expected a number from 0 to 1, got '7'\n"
