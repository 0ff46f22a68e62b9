"""The capture format: what is written is read back, and every malformed file is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compactattn.capture import Capture, CapturedLayer, load_capture, sample_path, save_capture

TOKENS, HEADS, KV_HEADS, DIM = 37, 6, 2, 64


def make_layer(number: int, dtype: torch.dtype = torch.float16, tokens: int = TOKENS) -> CapturedLayer:
    generator = torch.Generator().manual_seed(number)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return CapturedLayer(number, q, k, v)


def make_capture(dtype: torch.dtype = torch.float16) -> Capture:
    return Capture(
        layers=(make_layer(1, dtype), make_layer(4, dtype)),
        model="a model",
        source="a text, with “quotes”",
        rope_theta=500_000.0,
        scale=0.25,
        token_ids=torch.arange(TOKENS, dtype=torch.int32),
        text=bytes(range(TOKENS)),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    written = make_capture(dtype)
    save_capture(tmp_path / "a.safetensors", written)
    read = load_capture(tmp_path / "a.safetensors")
    assert [layer.layer for layer in read.layers] == [1, 4]
    for ours, theirs in zip(written.layers, read.layers, strict=True):
        for name, tensor in ours.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name])
            assert theirs.tensors()[name].dtype == dtype
    assert (read.model, read.source, read.rope_theta) == (written.model, written.source, written.rope_theta)
    assert (read.scale, read.text, read.tokens) == (written.scale, written.text, TOKENS)
    assert read.token_ids is not None
    assert written.token_ids is not None
    assert torch.equal(read.token_ids, written.token_ids)


@pytest.mark.parametrize("text", [None, b"", b"x"])
def test_optional_fields(tmp_path: Path, text: bytes | None) -> None:
    save_capture(tmp_path / "a.safetensors", replace(make_capture(), scale=None, token_ids=None, text=text))
    read = load_capture(tmp_path / "a.safetensors")
    assert (read.scale, read.token_ids, read.text) == (None, None, text)


def test_saving_is_deterministic_takes_any_strides_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = make_capture()
    layers = tuple(
        CapturedLayer(layer.layer, *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in layer.tensors().values()))
        for layer in first.layers
    )
    save_capture(tmp_path / "a", first)
    save_capture(tmp_path / "b", replace(first, layers=layers))
    save_capture(tmp_path / "a", first)  # over an existing file
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_one_tensor_may_serve_as_both_k_and_v(tmp_path: Path) -> None:
    layer = make_layer(0)
    save_capture(tmp_path / "a", replace(make_capture(), layers=(CapturedLayer(0, layer.q, layer.k, layer.k),)))
    read = load_capture(tmp_path / "a").layers[0]
    assert torch.equal(read.k, read.v)


def test_sample_path_is_inside_the_package() -> None:
    assert sample_path().name == "stdlib.safetensors"
    assert sample_path().parent.parent.name == "compactattn"


@pytest.mark.skipif(not sample_path().exists(), reason="the sample is not recorded yet")
def test_the_shipped_sample() -> None:
    assert sample_path().stat().st_size <= 16_000_000
    sample = load_capture(sample_path())
    assert sample.tokens >= 5000
    assert len(sample.layers) == 2
    assert sample.text is not None
    assert len(sample.text) == sample.tokens


def nan_in_v() -> CapturedLayer:
    layer = make_layer(0)
    v = layer.v.clone()
    v[3, 1, 7] = float("nan")
    return CapturedLayer(0, layer.q, layer.k, v)


BAD_LAYERS: dict[str, tuple[Callable[[CapturedLayer], Any], str]] = {
    "number": (lambda good: replace(good, layer=-1), "layer: expected an int of at least 0, got -1"),
    "type": (lambda good: replace(good, k=[1.0]), "layers.0.k: expected a torch.Tensor, got list"),
    "dtype": (
        lambda good: replace(good, q=good.q.double()),
        "layers.0.q: expected dtype float16, bfloat16 or float32, got",
    ),
    "mixed": (
        lambda good: replace(good, v=good.v.float()),
        "layers.0.v: expected dtype torch.float16, as in layers.0.q",
    ),
    "dimensions": (
        lambda good: replace(good, q=good.q[0]),
        "layers.0.q: expected a shape [tokens, heads, D]",
    ),
    "empty": (
        lambda good: replace(good, q=good.q[:0], k=good.k[:0], v=good.v[:0]),
        "without zeros, got (0, 6, 64)",
    ),
    "tokens": (
        lambda good: replace(good, k=good.k[1:], v=good.v[1:]),
        "layers.0.k: expected shape (37, 2, 64)",
    ),
    "head dim": (lambda good: replace(good, q=good.q[..., :32]), "layers.0.k: expected shape (37, 2, 32)"),
    "v heads": (lambda good: replace(good, v=good.v[:, :1]), "layers.0.v: expected shape (37, 2, 64)"),
    "groups": (
        lambda good: replace(good, q=good.q[:, :5]),
        "layers.0.q: expected a multiple of 2 heads (KV heads), got 5",
    ),
    "infinite": (
        lambda good: replace(good, k=good.k / 0),
        "layers.0.k: expected finite values, got NaN or Inf",
    ),
    "nan": (lambda _: nan_in_v(), "layers.0.v: expected finite values, got NaN or Inf"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers_are_refused(case: str) -> None:
    spoil, message = BAD_LAYERS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        spoil(make_layer(0))


BAD_CAPTURES: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"layers": ()}, "layers: expected at least one layer"),
    "order": ({"layers": (make_layer(2), make_layer(1))}, "layers: expected ascending layer numbers"),
    "twice": ({"layers": (make_layer(2), make_layer(2))}, "layers: expected ascending layer numbers"),
    "tokens": (
        {"layers": (make_layer(1), make_layer(2, tokens=36))},
        "layers.2.q: expected torch.float16 (37, 6, 64)",
    ),
    "dtypes": (
        {"layers": (make_layer(1), make_layer(2, torch.float32))},
        "layers.2.q: expected torch.float16",
    ),
    "model": ({"model": 7}, "model: expected a string, got 7"),
    "source": ({"source": None}, "source: expected a string, got None"),
    "theta": ({"rope_theta": 0.0}, "rope_theta: expected a finite number above 0, got 0.0"),
    "theta type": ({"rope_theta": "1"}, "rope_theta: expected a finite number above 0, got '1'"),
    "scale": ({"scale": float("nan")}, "scale: expected a finite number above 0, got nan"),
    "text": ({"text": "str"}, "text: expected bytes, got str"),
    "ids": ({"token_ids": torch.zeros(TOKENS)}, "token_ids: expected int32 [37], got torch.float32 (37,)"),
    "ids length": ({"token_ids": torch.zeros(5, dtype=torch.int32)}, "token_ids: expected int32 [37]"),
    "ids sign": (
        {"token_ids": torch.full((TOKENS,), -1, dtype=torch.int32)},
        "token_ids: expected ids of at least 0",
    ),
    "ids type": ({"token_ids": [1]}, "token_ids: expected a torch.Tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_CAPTURES)
def test_bad_captures_are_refused(case: str) -> None:
    changes, message = BAD_CAPTURES[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(make_capture(), **changes)


def saved_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header of a good file, to be spoiled and written back."""
    save_capture(path, make_capture())
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["compactattn"])
        return {name: opened.get_tensor(name) for name in opened.keys()}, header  # noqa: SIM118


def write_parts(path: Path, tensors: dict[str, torch.Tensor], header: object) -> None:
    save_file(tensors, path, {"compactattn": header if isinstance(header, str) else json.dumps(header)})


BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not json": (lambda _: "{", "metadata: expected a JSON object, got"),
    "too deep": (lambda _: "[" * 100_000, "metadata: expected a JSON object, got"),
    "a list": (lambda _: [1], "metadata: expected a JSON object, got list"),
    "version": (lambda h: h | {"version": 2}, "format version: expected 1, got 2"),
    "no version": (lambda h: {"layers": h["layers"]}, "format version: expected 1, got None"),
    "no theta": (lambda h: {n: h[n] for n in h if n != "rope_theta"}, "got no rope_theta"),
    "layer list": (
        lambda h: h | {"layers": "14"},
        "metadata layers: expected a list of layer numbers, got '14'",
    ),
    "layer types": (lambda h: h | {"layers": [1.5]}, "metadata layers: expected a list of layer numbers"),
    "no layers": (lambda h: h | {"layers": []}, "tensors: expected only token_ids, text, got layers.1.k"),
    "missing": (lambda h: h | {"layers": [1, 4, 5]}, "got no layers.5.q, layers.5.k, layers.5.v"),
    "unknown": (lambda h: h | {"layers": [1]}, "got layers.4.k, layers.4.q, layers.4.v"),
    "scale": (lambda h: h | {"scale": "wide"}, "scale: expected a finite number above 0, got 'wide'"),
    "order": (lambda h: h | {"layers": [4, 1]}, "layers: expected ascending layer numbers"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "spoiled.safetensors"
    spoil, message = BAD_HEADERS[case]
    tensors, header = saved_parts(path)
    write_parts(path, tensors, spoil(header))
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_capture(path)
    assert str(refusal.value).startswith(f"{path}: ")


BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "nan": (
        {"layers.4.v": torch.full((TOKENS, KV_HEADS, DIM), float("nan")).half()},
        "layers.4.v: expected finite",
    ),
    "shape": ({"layers.4.k": torch.zeros(TOKENS, 4, DIM).half()}, "layers.4.v: expected shape (37, 4, 64)"),
    "a scalar": ({"layers.1.q": torch.tensor(1.0)}, "layers: expected at least one, with queries [tokens, heads, D]"),
    "integers": ({"layers.1.q": torch.zeros(TOKENS, HEADS, DIM).int()}, "layers.1.q: expected dtype float16"),
    "text": ({"text": torch.zeros(3)}, "text: expected uint8 [bytes], got torch.float32 (3,)"),
    "ids": (
        {"token_ids": torch.zeros(TOKENS, 1).int()},
        "token_ids: expected int32 [37], got torch.int32 (37, 1)",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "spoiled.safetensors"
    changes, message = BAD_TENSORS[case]
    tensors, header = saved_parts(path)
    write_parts(path, tensors | changes, header)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_capture(path)
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("data", [b"", b"not a tensor in sight", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(ValueError, match=r"other: expected a safetensors file, got: "):
        load_capture(tmp_path / "other")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_capture(tmp_path / "a", make_capture())
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a: expected a safetensors file, got: "):
        load_capture(tmp_path / "a")


def test_a_foreign_safetensors_file_a_directory_and_nothing_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign: metadata: expected an entry 'compactattn', got none"):
        load_capture(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got: "):
        load_capture(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent: expected a capture file"):
        load_capture(tmp_path / "absent")
