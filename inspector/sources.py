"""Where a chunk comes from: a capture (the shipped sample, a file, an upload) or a named synthetic workload."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Shape
from benchmarks.workloads import WORKLOADS, make_step
from compactattn import PagedKV, PrefillBatch
from compactattn.capture import Capture, load_capture
from compactattn.demo import PagedPrompt, best_device
from compactattn.validation import check_queries, fail
from inspector.files import Recorded

PAGE_SIZES = (16, 32, 64, 128, 256)
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
HEAD_DIM = 128


@dataclass(frozen=True)
class Synthetic:
    """One chunk of a workload of `benchmarks.workloads`, drawn anew for every place in the prompt.

    Attributes:
        workload: a name of `WORKLOADS`.
        context: tokens of the whole prompt.
        correlation: share of a head's blocks that it has in common with its KV group.
        kv_heads, group: KV heads, and query heads for each of them; D is 128.
        seed: of the draw.
    """

    workload: str = "vertical-slash"
    context: int = 131072
    correlation: float = 0.9
    kv_heads: int = 2
    group: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise fail("workload", "one of " + ", ".join(WORKLOADS), repr(self.workload))

    @property
    def label(self) -> str:
        return f"synthetic {self.workload}, {self.context:,} tokens, correlation {self.correlation:g}"


Source = Recorded | Synthetic


@dataclass(frozen=True)
class About:
    """What a source holds; heads are query heads.

    Attributes:
        layers: the model's numbers of the layers that can be looked at.
        text: the prompt in UTF-8 where byte i is token i, else None.
        rope_theta: base of the rotary embedding that queries and keys carry; None where no model made them.
    """

    label: str
    model: str
    source: str
    tokens: int
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    text: bytes | None = None
    rope_theta: float | None = None

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Place:
    """Positions [start, stop) of one layer; `layer` is an index into the source's layers."""

    layer: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Step:
    """One chunk over its cache: the arguments of the library's stages. One request.

    Attributes:
        q: [n, Hq, D].
        kv: the paged cache, this chunk included.
        batch: the lengths.
        scale: softmax scale, None for D^-0.5.
    """

    q: Tensor
    kv: PagedKV
    batch: PrefillBatch
    scale: float | None

    @property
    def stop(self) -> int:
        return self.batch.max_seq_len

    @property
    def start(self) -> int:
        return self.stop - len(self.q)

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.kv.num_kv_heads

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def keys(self, kv_head: int) -> Tensor:
        """A copy of one KV head's keys, [stop, D]."""
        pages = self.kv.page_table[0, : -(-self.stop // self.kv.page_size)].long()
        return self.kv.k[pages, :, kv_head].flatten(0, 1)[: self.stop]


def load(source: Recorded, data: bytes | None = None) -> Capture:
    """Read a capture. `data`: the bytes of an upload.

    Raises:
        FileNotFoundError, ValueError: whatever `load_capture` refuses, and an upload whose bytes are gone.
    """
    with source.opened(data) as file:
        return load_capture(file)


def describe(source: Source, capture: Capture | None = None) -> About:
    """What a source holds; `capture` is what was loaded from a recorded one.

    Raises:
        ValueError: a shape that the library does not compute.
    """
    if isinstance(source, Synthetic):
        heads = source.kv_heads * source.group
        made = "drawn by benchmarks.workloads; every chunk is a fresh draw at its own context"
        names = (source.label, "no model", made, source.context, (0,))
        return About(*names, heads, source.kv_heads, HEAD_DIM, "float32")
    assert capture is not None
    first = capture.layers[0]
    try:
        step = make_recorded_step(capture, Place(0, 0, 1), PAGE_SIZES[0])
        check_queries(step.q, step.kv, step.batch)
    except ValueError as error:
        raise ValueError(f"{source.label}: {error}") from error
    text = capture.text if capture.text is not None and len(capture.text) == capture.tokens else None
    return About(
        label=source.label,
        model=capture.model,
        source=capture.source,
        tokens=capture.tokens,
        layers=tuple(layer.layer for layer in capture.layers),
        heads=first.q.shape[1],
        kv_heads=first.k.shape[1],
        head_dim=first.q.shape[2],
        dtype=str(first.q.dtype).removeprefix("torch."),
        text=text,
        rope_theta=capture.rope_theta,
    )


def make_recorded_step(capture: Capture, place: Place, page_size: int) -> Step:
    """The chunk at `place` over a cache that holds everything before it.

    Raises:
        ValueError: a shape that `PagedKV` refuses.
    """
    prompt = PagedPrompt.from_layer(capture.layers[place.layer], best_device(), page_size=page_size)
    if place.start:
        prompt.feed(0, place.start)
    batch = prompt.feed(place.start, place.stop)
    return Step(prompt.q[place.start : place.stop], prompt.kv, batch, capture.scale)


def make_synthetic_step(source: Synthetic, place: Place, page_size: int) -> Step:
    """The chunk at `place`, drawn at its own context with a seed of its own."""
    shape, chunk = Shape(1, source.kv_heads * source.group, source.kv_heads, HEAD_DIM), place.stop - place.start
    made = make_step(
        WORKLOADS[source.workload],
        shape,
        place.stop,
        chunk,
        correlation=source.correlation,
        page_size=page_size,
        seed=source.seed,
        device=best_device(),
        dtype=torch.float32,
    )
    return Step(made.q, made.kv, made.batch, None)


def chunk_starts(tokens: int, chunk: int) -> range:
    """First positions of the chunks that a prompt is cut into."""
    return range(0, tokens, chunk)
