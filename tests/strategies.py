"""Random steps: lengths, shapes, layouts, masks and selectors, drawn by hypothesis and built as poisoned tensors.

Whatever no stage may read holds NaN (cache, queries) or a wild id (page table, block table): unused pages, slots at
or after `seq_lens`, padding between strides, query rows at or beyond `cu_seqlens_q[B]`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from compactattn import (
    BlockTable,
    Dense,
    FlashPrefill,
    KeyBounds,
    Oracle,
    PagedKV,
    PrefillBatch,
    SeerGate,
    SelectionMask,
    XAttention,
)

T = TypeVar("T")

PAGE_SIZES = (16, 32, 64, 128, 256)
LAYOUTS = ("NHD", "HND", "padded", "odd", "stacked", "mixed")
WILD = (2**31 - 1, -1, 2**30, -(2**31))
TAIL_ROWS = 3  # query rows that belong to no request


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Geometry:
    """Everything that decides a step; the tensors follow from it."""

    q_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    kv_heads: int = 1
    group: int = 1
    dim: int = 64
    page_size: int = 16
    block_size: int = 64
    query_block: int = 64
    heads_per_group: int = 1
    span: int | None = None
    layout: str = "NHD"
    dtype: torch.dtype = torch.float32
    prompt_lens: tuple[int, ...] | None = None
    slack: tuple[int, int] = (0, 0)  # how far max_q_len and max_seq_len exceed the largest lengths
    shared_pages: int = 0  # leading pages that request 1 has in common with request 0 (prefix caching)
    seed: int = 0

    def __str__(self) -> str:
        lens = f"B{len(self.q_lens)}-q{'.'.join(map(str, self.q_lens))}-kv{'.'.join(map(str, self.seq_lens))}"
        heads = f"H{self.kv_heads}-G{self.group}-D{self.dim}-of{self.heads_per_group}-span{self.span}"
        sizes = f"page{self.page_size}-block{self.block_size}x{self.query_block}"
        return f"{lens}-{heads}-{sizes}-{self.layout}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def requests(self) -> range:
        return range(len(self.q_lens))

    @property
    def past_lens(self) -> tuple[int, ...]:
        return tuple(s - q for q, s in zip(self.q_lens, self.seq_lens, strict=True))

    @property
    def max_q_len(self) -> int:
        return max(self.q_lens) + self.slack[0]

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens) + sum(self.slack)

    @property
    def q_blocks(self) -> int:
        return ceil_div(self.max_q_len, self.query_block)

    @property
    def kv_blocks(self) -> int:
        return ceil_div(self.max_seq_len, self.block_size)

    @property
    def starts(self) -> list[int]:
        return [sum(self.q_lens[:b]) for b in range(len(self.q_lens) + 1)]

    @property
    def grouping(self) -> dict[str, int | None]:
        return {"heads_per_group": self.heads_per_group, "query_blocks_per_span": self.span}

    def batch(self, device: str) -> PrefillBatch:
        prompts = None if self.prompt_lens is None else torch.tensor(self.prompt_lens, dtype=torch.int32, device=device)
        return PrefillBatch(
            torch.tensor(self.starts, dtype=torch.int32, device=device),
            torch.tensor(self.seq_lens, dtype=torch.int32, device=device),
            self.max_q_len,
            self.max_seq_len,
            prompts,
        )


@dataclass(frozen=True, eq=False)
class Step:
    """The tensors of one step. `keys` and `values` are the cache as [seq_len, Hkv, D] per request, unpaged."""

    geometry: Geometry
    q: Tensor
    kv: PagedKV
    batch: PrefillBatch
    keys: list[Tensor]
    values: list[Tensor]

    def queries(self, b: int) -> Tensor:
        return self.q[self.geometry.starts[b] : self.geometry.starts[b + 1]]

    @property
    def rows(self) -> int:
        """Query rows that belong to a request."""
        return self.geometry.starts[-1]


# ---- tensors ----


def empty_cache(pages: int, g: Geometry, device: str, layout: str) -> Tensor:
    """[pages, page_size, Hkv, D] full of NaN, in the given memory layout."""
    shape = (pages, g.page_size, g.kv_heads, g.dim)

    def full(*extents: int) -> Tensor:
        return torch.full(extents, float("nan"), dtype=g.dtype, device=device)

    if layout == "HND":
        return full(pages, g.kv_heads, g.page_size, g.dim).transpose(1, 2)
    if layout == "padded":
        return full(pages, g.page_size + 1, g.kv_heads + 1, g.dim + 16)[:, : g.page_size, : g.kv_heads, : g.dim]
    if layout == "odd":  # neither the address nor a stride is a multiple of 16 bytes
        width = g.dim + 1
        return full(pages * g.page_size * g.kv_heads * width + 1)[1:].view(*shape[:3], width)[..., : g.dim]
    if layout == "stacked":  # K and V of a page side by side, as vLLM keeps them
        return full(pages, 2, *shape[1:])[:, 1]
    return full(*shape)


def paged(g: Geometry, keys: list[Tensor], values: list[Tensor], device: str, generator: torch.Generator) -> PagedKV:
    """Scatter the requests' tokens over shuffled pages of a pool that also holds pages of nobody."""
    counts = [ceil_div(n, g.page_size) for n in g.seq_lens]
    pool = sum(counts) + 3
    ids = torch.randperm(pool, generator=generator).tolist()
    width = ceil_div(g.max_seq_len, g.page_size) + 1
    table = torch.tensor(WILD, dtype=torch.int32).repeat(len(counts), ceil_div(width + 1, len(WILD)))
    k = empty_cache(pool, g, device, "NHD" if g.layout == "mixed" else g.layout)
    v = empty_cache(pool, g, device, "HND" if g.layout == "mixed" else g.layout)
    for b, count in enumerate(counts):
        for n in range(count):
            shared = b == 1 and n < g.shared_pages
            page = int(table[0, n]) if shared else ids.pop()
            table[b, n] = page
            slots = slice(n * g.page_size, min((n + 1) * g.page_size, g.seq_lens[b]))
            k[page, : slots.stop - slots.start] = keys[b][slots]
            v[page, : slots.stop - slots.start] = values[b][slots]
    table = table.to(device)
    return PagedKV(k, v, table[:, :width] if g.layout in ("padded", "odd") else table[:, :width].contiguous())


def make_queries(g: Geometry, rows: Tensor, device: str) -> Tensor:
    """[T + tail, Hq, D], the tail NaN; a slice of a wider projection unless the layout is NHD."""
    width = {"NHD": g.dim, "odd": g.dim + 1}.get(g.layout, g.dim + 8)
    heads = g.heads + (0 if g.layout == "NHD" else 2 * g.kv_heads)
    q = torch.full((len(rows) + TAIL_ROWS, heads, width), float("nan"), dtype=g.dtype, device=device)
    q = q[:, : g.heads, : g.dim]
    q[: len(rows)] = rows.to(device, g.dtype)
    return q


def make_step(g: Geometry, device: str, *, coherent: bool = False, plant: bool = False) -> Step:
    """Build a step.

    coherent: keys share a direction within a KV block, and so do the queries of one block, so that selectors have
        something to find. plant: a few rows get a large key and value just behind their causal edge.
    """
    generator = torch.Generator().manual_seed(g.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values, rows = [], [], []
    for q_len, seq_len in zip(g.q_lens, g.seq_lens, strict=True):
        k, q = normal(seq_len, g.kv_heads, g.dim), normal(q_len, g.kv_heads, g.group, g.dim)
        if coherent:
            topics = normal(ceil_div(seq_len, g.block_size), g.kv_heads, g.dim)
            k = k + 2.0 * topics.repeat_interleave(g.block_size, 0)[:seq_len]
            blocks = ceil_div(q_len, g.query_block)
            wishes = 0.8 * normal(blocks, g.kv_heads, 1, g.dim) + 0.6 * normal(blocks, g.kv_heads, g.group, g.dim)
            q = 0.5 * q + wishes.repeat_interleave(g.query_block, 0)[:q_len]
        keys.append(k)
        values.append(normal(seq_len, g.kv_heads, g.dim))
        rows.append(q.reshape(q_len, g.heads, g.dim))
    rows = [row.to(g.dtype).float() for row in rows]
    if plant:
        for b in g.requests:
            _plant_edges(g, b, rows[b], keys[b], values[b], generator)
    shared = g.shared_pages * g.page_size
    if shared:
        keys[1][:shared], values[1][:shared] = keys[0][:shared], values[0][:shared]
    keys = [k.to(device, g.dtype) for k in keys]
    values = [v.to(device, g.dtype) for v in values]
    kv = paged(g, keys, values, device, generator)
    return Step(g, make_queries(g, torch.cat(rows), device), kv, g.batch(device), keys, values)


def _plant_edges(g: Geometry, b: int, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> None:
    """At rows where tiles and blocks begin or end, make the first key that the row must not see irresistible."""
    q_len, past_len = g.q_lens[b], g.past_lens[b]
    rows = {0, g.query_block - 1, q_len // 2, g.block_size - 1 - past_len % g.block_size, q_len - 2}
    for n, row in enumerate(sorted(r for r in rows if 0 <= r < q_len - 1)):
        for kv_head in range(g.kv_heads):
            query = q[row, kv_head * g.group + n % g.group]
            k[past_len + row + 1, kv_head] = query * (20.0 * g.dim**0.5 / query.square().sum())
            v[past_len + row + 1, kv_head] = 20.0 * torch.randn(g.dim, generator=generator).sign()


def in_fp8(step: Step) -> Step:
    """The step with its cache in FP8, a scale of its own for each KV head; `keys` and `values` are what that holds."""
    generator = torch.Generator().manual_seed(step.geometry.seed + 2)

    def scales() -> Tensor:
        drawn = torch.rand(step.geometry.kv_heads, generator=generator) + 0.25
        return drawn.to(step.q.device)

    def stored(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() / scale[:, None]).to(torch.float8_e4m3fn)

    def cache(x: Tensor, scale: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=torch.float8_e4m3fn, device=x.device).copy_(
            stored(x, scale)
        )

    k_scale, v_scale = scales(), scales()
    kv = PagedKV(cache(step.kv.k, k_scale), cache(step.kv.v, v_scale), step.kv.page_table, k_scale, v_scale)
    keys = [stored(k, k_scale).float() * k_scale[:, None] for k in step.keys]
    values = [stored(v, v_scale).float() * v_scale[:, None] for v in step.values]
    return replace(step, kv=kv, keys=keys, values=values)


def poison(kv: PagedKV, geometry: Geometry, needed: Callable[[int, int, int], bool]) -> PagedKV:
    """A copy of the cache with NaN in each (request, KV head, KV block) that is not `needed`.

    Pages that two requests share keep what either needs.
    """
    block, page_size = geometry.block_size, geometry.page_size
    read = torch.zeros(kv.k.shape[:3], dtype=torch.bool)
    table = kv.page_table.tolist()
    for b in geometry.requests:
        for j in range(ceil_div(geometry.seq_lens[b], block)):
            heads = torch.tensor([needed(b, h, j) for h in range(geometry.kv_heads)])
            stop = min((j + 1) * block, geometry.seq_lens[b])
            for start in range(j * block, stop, min(block, page_size)):
                slot = start % page_size
                read[table[b][start // page_size], slot : slot + min(block, page_size, stop - start)] |= heads
    unread = ~read.to(kv.k.device)[..., None]
    caches = []
    for cache in (kv.k, kv.v):
        copy = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device)
        caches.append(copy.copy_(cache.float().masked_fill(unread, float("nan"))))
    return replace(kv, k=caches[0], v=caches[1])


def poison_tails(table: BlockTable) -> BlockTable:
    """Wild block ids behind the valid entries of each row."""
    column = torch.arange(table.indices.shape[1], device=table.indices.device)
    wild = torch.tensor(WILD, dtype=torch.int32, device=table.indices.device)[column % len(WILD)]
    indices = torch.where(column < table.counts[:, None], table.indices, wild)
    return BlockTable(indices, table.counts, table.rows, table.block_size, table.query_block)


def make_mask(g: Geometry, device: str, kind: str) -> SelectionMask:
    """A mask [B, Hq, Qb, Kb] of the named kind; padded and invisible bits are random and mean nothing."""
    generator = torch.Generator().manual_seed(g.seed + 1)
    shape = (len(g.q_lens), g.heads, g.q_blocks, g.kv_blocks)
    noise = torch.rand(shape, generator=generator)
    density = {"empty": 0.0, "sparse": 0.08, "half": 0.5, "full": 1.0}
    if kind == "structured":  # columns that a whole KV group likes, more of them for some heads
        liked = torch.rand((shape[0], g.kv_heads, 1, 1, shape[3]), generator=generator)
        greed = torch.linspace(0.05, 0.4, g.group)[:, None, None]
        mask = ((liked < greed).reshape(shape[0], g.heads, 1, shape[3]) | (noise < 0.02)).expand(shape)
    else:
        mask = noise < density[kind]
    return SelectionMask(mask.contiguous().to(device), g.block_size, g.query_block)


MASKS = ("empty", "sparse", "sparse", "half", "full", "structured", "structured")


# ---- strategies ----


@dataclass(frozen=True)
class Sizes:
    """How large the steps of a backend may be, and which kernels it may have to compile."""

    examples: int
    q_len: int
    seq_len: int
    requests: int
    heads: int  # query heads in all, unless G alone is larger
    pins: tuple[dict[str, object], ...] = ({},)  # one is drawn: fields of the Geometry, where variants cost a compile
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    dims: tuple[int, ...] = (64,)
    block_sizes: tuple[int, ...] = (64, 64, 128, 256)
    groups: tuple[int, ...] = tuple(range(1, 17))


def evenly(options: Sequence[T]) -> st.SearchStrategy[T]:
    """One of the options, all equally often (hypothesis likes some integers, and repeats itself in small choices)."""
    return st.binary(min_size=4, max_size=4).map(lambda drawn: options[zlib.crc32(drawn) % len(options)])


@st.composite
def request_lens(draw: st.DrawFn, longest_q: int, longest: int, block_size: int, query_block: int) -> tuple[int, int]:
    """(q_len, seq_len) of one request: chunks on and off the block grid, decode and speculation rows, nothing."""
    kinds = ("chunk",) * 6 + ("first", "decode", "decode", "speculation", "idle", "idle", "absent")
    kind = draw(evenly(kinds))
    most_blocks = max(1, min(3, longest_q // query_block))
    near = st.builds(
        lambda n, d: min(n * query_block + d, longest_q), evenly(range(1, most_blocks + 1)), evenly((-1, 0, 0, 0, 1))
    )
    upper_half = st.integers(longest_q // 2, longest_q)
    any_len = draw(evenly((st.integers(2, longest_q), upper_half, upper_half, near)))
    fixed = {"decode": st.just(1), "speculation": st.integers(2, 5), "idle": st.just(0), "absent": st.just(0)}
    q_len = draw(fixed.get(kind, any_len))
    if kind in ("first", "absent"):
        return q_len, q_len
    most = max(0, (longest - q_len) // block_size - 1)
    blocks = (
        draw(evenly(range(min(most, 3), most + 1)))
        if draw(evenly((True, True, False)))
        else draw(evenly(range(most + 1)))
    )
    offset = draw(st.sampled_from((0, 1, block_size // 2 + 3, block_size - 1)) | st.integers(0, block_size - 1))
    return q_len, q_len + min(blocks * block_size + offset, max(0, longest - q_len))


@st.composite
def geometries(draw: st.DrawFn, sizes: Sizes, **fixed: object) -> Geometry:
    """Any step of the given sizes; `fixed` pins fields of the Geometry."""
    pin = draw(evenly(sizes.pins))
    block_size = pin.get("block_size") or draw(st.sampled_from(sizes.block_sizes))
    query_block = pin.get("query_block") or draw(evenly((64, 64, 64, 64, 128)))
    page_size = pin.get("page_size") or draw(evenly(PAGE_SIZES))
    group = pin.get("group") or draw(evenly(sizes.groups))
    lens = request_lens(sizes.q_len if group <= 4 else sizes.q_len // 2, sizes.seq_len, block_size, query_block)
    q_lens, seq_lens = zip(*draw(st.lists(lens, min_size=1, max_size=sizes.requests)), strict=True)
    if draw(evenly(range(16))) == 0:  # nobody asks anything
        q_lens = (0,) * len(q_lens)
    sharing = [n for n in range(1, group + 1) if group % n == 0]
    kv_heads = draw(st.integers(1, max(1, sizes.heads // group)))
    past = [s - q for q, s in zip(q_lens, seq_lens, strict=True)]
    common = min(past[:2]) // page_size if len(past) > 1 else 0
    span = draw(evenly((None, None, 1, 1, 1, 1, 1, 1, 2, 3)))
    prompts = None
    if draw(evenly(range(3))) == 0:
        prompts = tuple(s + draw(st.sampled_from((0, 0, 1, query_block, 999))) for s in seq_lens)
    drawn = Geometry(
        q_lens=q_lens,
        seq_lens=seq_lens,
        kv_heads=kv_heads,
        group=group,
        dim=draw(st.sampled_from(sizes.dims)),
        page_size=page_size,
        block_size=block_size,
        query_block=query_block,
        heads_per_group=draw(st.sampled_from(sharing if not pin else [*sharing[:2], group])),
        span=span,
        layout=draw(evenly(LAYOUTS)),
        dtype=draw(st.sampled_from(sizes.dtypes)),
        prompt_lens=prompts,
        slack=draw(st.sampled_from(((0, 0), (0, 0), (1, 0), (70, 200)))),
        shared_pages=draw(evenly((0, common, common))),
        seed=draw(st.integers(0, 10**6)),
    )
    return replace(drawn, **{**pin, **fixed})


@st.composite
def flash_prefill(
    draw: st.DrawFn, g: Geometry, alphas: tuple[float, ...] = (0.0, 0.05, 0.18, 0.5, 1.0)
) -> FlashPrefill:
    return FlashPrefill(alpha=draw(st.sampled_from(alphas)), **draw(common_rules(g)))


@st.composite
def key_bounds(draw: st.DrawFn, g: Geometry) -> KeyBounds:
    return KeyBounds(threshold=draw(st.sampled_from((0.0, 0.05, 0.1, 0.3, 0.9))), **draw(common_rules(g)))


@st.composite
def common_rules(draw: st.DrawFn, g: Geometry) -> dict[str, int]:
    """The fields that every selector has."""
    return {
        "sink_blocks": draw(st.integers(0, 2)),
        "window_blocks": draw(st.integers(0, 3)),
        "block_size": g.block_size,
        "query_block": g.query_block,
        "dense_queries": draw(st.sampled_from((0, 1, 1, 4))),
        "dense_keys": draw(st.sampled_from((0, 0, 150))),
        "dense_last_blocks": draw(evenly((0, 1, 2))) if g.prompt_lens else 0,
    }


def gate_weights(heads: int, dim: int, seed: int) -> Tensor:
    """Random weights [Hq, 3 D, D] of SeerGate under which probabilities differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((heads, 3 * dim, dim), generator=generator) * (0.5 / dim)


@st.composite
def seer_gate(draw: st.DrawFn, g: Geometry, device: str = "cpu") -> SeerGate:
    frequencies = draw(st.sampled_from((100.0, 10_000.0, 500_000.0))) ** -torch.linspace(0, 1, g.dim // 2)
    return SeerGate(
        gate_weights(g.heads, g.dim, g.seed).to(device),
        frequencies.to(device),
        rope_scale=draw(st.sampled_from((1.0, 1.0, 1.25))),
        threshold=draw(st.sampled_from((0.0, 5e-4, 0.02, 0.1, 0.3))),
        **draw(common_rules(g)),
    )


KINDS = ("flash", "flash", "flash", "bounds", "xattention", "mass", "top_k", "dense")


@st.composite
def selectors(
    draw: st.DrawFn, g: Geometry, kinds: tuple[str, ...] = KINDS
) -> FlashPrefill | KeyBounds | XAttention | Oracle | Dense:
    """Any selector, FlashPrefill more often than the others."""
    kind = draw(evenly(kinds))
    if kind == "flash":
        return draw(flash_prefill(g))
    if kind == "bounds":
        return draw(key_bounds(g))
    rules = draw(common_rules(g))
    if kind == "xattention":
        return XAttention(
            threshold=draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))), stride=draw(st.sampled_from((4, 8, 16))), **rules
        )
    if kind == "mass":
        return Oracle(mass=draw(st.sampled_from((0.0, 0.5, 0.95, 1.0))), **rules)
    if kind == "top_k":
        return Oracle(top_k=draw(st.integers(0, 6)), **rules)
    return Dense(**rules)
