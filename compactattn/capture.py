"""Recorded attention inputs: the queries, keys and values of a real model on a real prompt.

One file holds one prompt: for some layers, what the model handed to attention (after RoPE), and where it came
from. The format is safetensors alone, so a file can be opened without running anything that it contains:

    layers.{i}.q    [T, Hq, D]     i is the layer's number in the model; float16, bfloat16 or float32
    layers.{i}.k    [T, Hkv, D]    all tensors of a file share T, D and dtype
    layers.{i}.v    [T, Hkv, D]
    token_ids       int32 [T]      optional
    text            uint8 [bytes]  optional, the prompt as it was before tokenisation

and one metadata entry, `compactattn`: a JSON object with the format version and the fields of `Capture`.

`load_capture` and `save_capture` hold a whole file in memory, `open_capture` and `capture_writer` a layer at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactattn.files import TensorFile, replacing
from compactattn.validation import DTYPES, fail

FORMAT_VERSION = 1
_METADATA_KEY = "compactattn"


@dataclass(frozen=True, eq=False)
class CapturedLayer:
    """What one layer handed to attention.

    Attributes:
        layer: the layer's number in the model, from 0.
        q: queries after RoPE, [T, Hq, D]; float16, bfloat16 or float32.
        k: keys after RoPE, [T, Hkv, D]; same T, D and dtype, and Hkv divides Hq.
        v: values, like `k`.

    Raises:
        ValueError: anything else, an empty tensor, or a value that is not finite.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise fail("layer", "an int of at least 0", repr(self.layer))
        for name, tensor in self.tensors().items():
            if not isinstance(tensor, Tensor):
                raise fail(name, "a torch.Tensor", type(tensor).__name__)
            if tensor.dtype not in DTYPES:
                raise fail(name, "dtype float16, bfloat16 or float32", tensor.dtype)
            if tensor.ndim != 3 or tensor.numel() == 0:
                raise fail(name, "a shape [tokens, heads, D] without zeros", tuple(tensor.shape))
            if tensor.dtype != self.q.dtype:
                raise fail(name, f"dtype {self.q.dtype}, as in layers.{self.layer}.q", tensor.dtype)
        tokens, heads, dim = self.q.shape
        kv_heads = self.k.shape[1]
        for name, tensor in list(self.tensors().items())[1:]:
            if tuple(tensor.shape) != (tokens, kv_heads, dim):
                raise fail(name, f"shape {(tokens, kv_heads, dim)} (as q and k have it)", tuple(tensor.shape))
        if heads % kv_heads:
            raise fail(f"layers.{self.layer}.q", f"a multiple of {kv_heads} heads (KV heads)", f"{heads} heads")
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise fail(name, "finite values", "NaN or Inf")

    def tensors(self) -> dict[str, Tensor]:
        """The three tensors by their names in a file."""
        prefix = f"layers.{self.layer}."
        return {prefix + "q": self.q, prefix + "k": self.k, prefix + "v": self.v}


@dataclass(frozen=True, eq=False)
class Capture:
    """The attention inputs of some layers of one model over one prompt of T tokens.

    Attributes:
        layers: at least one, ascending by layer number; same T, head counts, D and dtype.
        model: which model, for a reader; may be empty.
        source: which text, and how it was recorded, for a reader; may be empty.
        rope_theta: base of the rotary embedding that `q` and `k` already carry; positions start at 0.
        scale: factor of q·k in the softmax; None means D^-0.5.
        token_ids: int32 [T], or None when not recorded.
        text: the prompt in UTF-8, or None. In a byte-level capture it has T bytes and byte i is token i.

    Raises:
        ValueError: anything else; the message names the field.
    """

    layers: tuple[CapturedLayer, ...]
    model: str
    source: str
    rope_theta: float
    scale: float | None = None
    token_ids: Tensor | None = None
    text: bytes | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise fail("layers", "at least one layer", "none")
        numbers = [layer.layer for layer in self.layers]
        if numbers != sorted(set(numbers)):
            raise fail("layers", "ascending layer numbers without repeats", numbers)
        first = self.layers[0]
        for layer in self.layers[1:]:
            for (_, expected), (name, tensor) in zip(first.tensors().items(), layer.tensors().items(), strict=True):
                if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                    wanted = f"{expected.dtype} {tuple(expected.shape)}, as in layer {first.layer}"
                    raise fail(name, wanted, f"{tensor.dtype} {tuple(tensor.shape)}")
        for name, words in (("model", self.model), ("source", self.source)):
            if not isinstance(words, str):
                raise fail(name, "a string", repr(words))
        _check_positive("rope_theta", self.rope_theta)
        if self.scale is not None:
            _check_positive("scale", self.scale)
        if self.text is not None and not isinstance(self.text, bytes):
            raise fail("text", "bytes", type(self.text).__name__)
        if self.token_ids is not None:
            _check_token_ids(self.token_ids, self.tokens)

    @property
    def tokens(self) -> int:
        """T, the length of the prompt."""
        return int(self.layers[0].q.shape[0])


def sample_path() -> Path:
    """The sample that ships with the package: two layers of a small Llama over held-out Python source."""
    return Path(__file__).parent / "samples" / "stdlib.safetensors"


@dataclass(frozen=True)
class CaptureLayout:
    """The tensors of a capture by their sizes: what decides how long a file is.

    Attributes:
        layers: layer numbers, ascending.
        tokens, heads, kv_heads, head_dim: T, Hq, Hkv, D.
        dtype: of queries, keys and values.
    """

    layers: tuple[int, ...]
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each layer's tensors by their names in a file."""
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        return {
            f"layers.{layer}.{part}": (self.dtype, (self.tokens, heads[part], self.head_dim))
            for layer in self.layers
            for part in "qkv"
        }

    def nbytes(self) -> int:
        """Bytes of these tensors: the file, but for its header, token ids and text."""
        row = (self.heads + 2 * self.kv_heads) * self.head_dim * self.dtype.itemsize
        return len(self.layers) * self.tokens * row


@contextmanager
def capture_writer(
    path: str | os.PathLike[str],
    layout: CaptureLayout,
    *,
    model: str,
    source: str,
    rope_theta: float,
    scale: float | None = None,
    token_ids: Tensor | None = None,
    text: bytes | None = None,
) -> Iterator[TensorFile]:
    """Write a capture piece by piece: `append` the rows of each `layers.{i}.{q,k,v}` in the block.

    The file appears when the block has ended and every row has been written, and not at all otherwise; see
    `compactattn.files.replacing`. The same pieces always give the same bytes.

    Args:
        path: the file.
        layout: its tensors.
        model, source, rope_theta, scale, token_ids, text: as in `Capture`.

    Raises:
        ValueError: rows that do not fit or are not finite, or rows that are missing in the end.
        OSError: the file cannot be written, or another process is writing it.
    """
    header = {
        "version": FORMAT_VERSION,
        "layers": list(layout.layers),
        "model": model,
        "source": source,
        "rope_theta": rope_theta,
        "scale": scale,
    }
    others = {}
    if token_ids is not None:
        others["token_ids"] = token_ids
    if text is not None:
        others["text"] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.zeros(0).byte()
    tensors = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()} | layout.tensors()
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))
    # One metadata entry only: safetensors keeps no order among several.
    with replacing(path) as file:
        writer = TensorFile(file, tensors, {_METADATA_KEY: json.dumps(header)})
        for name, tensor in others.items():
            writer.append(name, tensor)
        yield writer
        writer.check_complete()


def save_capture(path: str | os.PathLike[str], capture: Capture) -> None:
    """Write `capture` to `path`; the same capture always gives the same bytes, and nobody meets half a file."""
    first = capture.layers[0]
    numbers = tuple(layer.layer for layer in capture.layers)
    tokens, heads, dim = first.q.shape
    layout = CaptureLayout(numbers, tokens, heads, first.k.shape[1], dim, first.q.dtype)
    with capture_writer(
        path,
        layout,
        model=capture.model,
        source=capture.source,
        rope_theta=capture.rope_theta,
        scale=capture.scale,
        token_ids=capture.token_ids,
        text=capture.text,
    ) as writer:
        for layer in capture.layers:
            for name, tensor in layer.tensors().items():
                writer.append(name, tensor)


class CaptureFile:
    """An open capture, read a layer at a time; see `open_capture`.

    Attributes:
        layers: the numbers of its layers, ascending.
        tokens: T, the length of the prompt.
        model, scale: as in `Capture`.
    """

    def __init__(self, file: Path, opened: Any) -> None:
        self._file, self._opened = file, opened
        self._header = _parse_header(opened.metadata() or {})
        _check_names(self._header["layers"], list(opened.keys()))
        self.layers: tuple[int, ...] = tuple(self._header["layers"])
        shapes = [opened.get_slice(f"layers.{number}.q").get_shape() for number in self.layers[:1]]
        if not shapes or len(shapes[0]) != 3:
            raise fail("layers", "at least one, with queries [tokens, heads, D]", shapes)
        self.tokens: int = shapes[0][0]
        self.model: str = self._header["model"]
        self.scale: float | None = self._header["scale"]

    def layer(self, number: int) -> CapturedLayer:
        """Read one layer.

        Raises:
            ValueError: tensors that do not belong together, or hold NaN or Inf.
        """
        with _blaming(self._file):
            return self._layer(number)

    def whole(self) -> Capture:
        """Read everything.

        Raises:
            ValueError: contents that contradict each other.
        """
        with _blaming(self._file):
            present = set(self._opened.keys())
            token_ids, text = (
                self._opened.get_tensor(name) if name in present else None for name in ("token_ids", "text")
            )
            if text is not None and (text.dtype != torch.uint8 or text.ndim != 1):
                raise fail("text", "uint8 [bytes]", f"{text.dtype} {tuple(text.shape)}")
            return Capture(
                layers=tuple(self._layer(number) for number in self.layers),
                model=self.model,
                source=self._header["source"],
                rope_theta=self._header["rope_theta"],
                scale=self.scale,
                token_ids=token_ids,
                text=None if text is None else text.numpy().tobytes(),
            )

    def _layer(self, number: int) -> CapturedLayer:
        return CapturedLayer(number, *(self._opened.get_tensor(f"layers.{number}.{part}") for part in "qkv"))


@contextmanager
def open_capture(path: str | os.PathLike[str]) -> Iterator[CaptureFile]:
    """Open a capture to read its layers one by one; tensors arrive on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file. The message names the file, what was expected and what came.
    """
    from safetensors import safe_open

    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a capture file, got no file at all")
    with ExitStack() as stack:
        with _blaming(file):
            capture = CaptureFile(file, stack.enter_context(safe_open(file, framework="pt", device="cpu")))
        yield capture


@contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Put the name of the file before the message of whatever is wrong with it."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a safetensors file, got: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_capture(path: str | os.PathLike[str]) -> Capture:
    """Read a whole capture; tensors arrive on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or its contents contradict each other or hold NaN or Inf. The message
            names the file, what was expected and what came.
    """
    with open_capture(path) as capture:
        return capture.whole()


def _parse_header(metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata entry as a JSON object of a known version, with every field that `Capture` needs."""
    if _METADATA_KEY not in metadata:
        raise fail("metadata", f"an entry {_METADATA_KEY!r}", sorted(metadata) or "none")
    try:
        header = json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise fail("metadata", "a JSON object", error) from error
    if not isinstance(header, dict):
        raise fail("metadata", "a JSON object", type(header).__name__)
    if header.get("version") != FORMAT_VERSION:
        raise fail("format version", str(FORMAT_VERSION), repr(header.get("version")))
    absent = [name for name in ("layers", "model", "source", "rope_theta", "scale") if name not in header]
    if absent:
        raise fail("metadata", "the fields layers, model, source, rope_theta and scale", f"no {', '.join(absent)}")
    layers = header["layers"]
    if not isinstance(layers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise fail("metadata layers", "a list of layer numbers", repr(layers))
    return header


def _check_names(layers: list[int], names: list[str]) -> None:
    """Exactly the tensors of these layers, and perhaps the optional two."""
    required = [f"layers.{number}.{part}" for number in layers for part in "qkv"]
    missing = [name for name in required if name not in names]
    if missing:
        raise fail("tensors", ", ".join(required), f"no {', '.join(missing)}")
    unknown = sorted(set(names) - {*required, "token_ids", "text"})
    if unknown:
        raise fail("tensors", f"only {', '.join([*required, 'token_ids', 'text'])}", ", ".join(unknown))


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise fail(name, "a finite number above 0", repr(value))


def _check_token_ids(token_ids: object, tokens: int) -> None:
    if not isinstance(token_ids, Tensor):
        raise fail("token_ids", "a torch.Tensor", type(token_ids).__name__)
    if token_ids.dtype != torch.int32 or tuple(token_ids.shape) != (tokens,):
        raise fail("token_ids", f"int32 [{tokens}]", f"{token_ids.dtype} {tuple(token_ids.shape)}")
    if int(token_ids.min()) < 0:
        raise fail("token_ids", "ids of at least 0", int(token_ids.min()))
