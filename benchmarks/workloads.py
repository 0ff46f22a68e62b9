"""Synthetic steps whose FlashPrefill selection is known by construction: verticals, slashes, sink and window.

Each KV group has an orthonormal basis of its own. Its first G directions belong to its G query heads: a *vertical* of
head g is a key block whose tokens share direction g, and every query of head g points there too. The other D - G
directions carry a code per band of adjacent key blocks: a *slash* is a distance at which a query block points to the
code of the band that lies there, so the wanted blocks move along with the queries. Everything else is noise with mean
0, which the block means all but remove. Scores of wanted blocks lie `score` to `score - spread` above the noise, near
misses lie below the threshold of alpha 0.18 (1.71 below the largest). Sink and window come from the selector's rules.

Heads of a group rank the same verticals and differ in how many they keep (nested budgets). `correlation` is the share
of its verticals that a head takes from this common ranking, and the probability that it takes a slash from the
group's; the rest is its own. Calibration changes the data (budgets), never alpha.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from benchmarks.cases import PAPER, Grouping, Shape, past_entries
from compactattn import BlockTable, FlashPrefill, PagedKV, PrefillBatch, SelectionMask, select
from compactattn.quality import DensityCascade, density_cascade
from compactattn.selection import block_rules

BLOCK = 128
QUERY_NOISE = 0.5  # a block that all heads of a group share has G directions: rows must not differ much along them
SINK_BLOCKS, WINDOW_BLOCKS = 2, 4
SELECTOR = FlashPrefill(alpha=0.18, sink_blocks=SINK_BLOCKS, window_blocks=WINDOW_BLOCKS)

#: Average mask density of FlashPrefill over a prompt (SPEC section 5), by prompt length.
PUBLISHED_DENSITY = {32 * 1024: 0.178, 64 * 1024: 0.090, 128 * 1024: 0.045}


@dataclass(frozen=True)
class Workload:
    """What the heads of one KV group look for in the past.

    Attributes:
        verticals: budgets in blocks, one per head of a group, dealt in seeded order (repeated where G is larger).
        slashes: bands per head and query block.
        band_blocks: adjacent blocks in a band.
        scattered: bands lie anywhere, drawn anew for each query block, instead of at fixed distances.
        nearest: smallest distance of a slash, in blocks.
        score: log S of the best wanted block over the noise's.
        spread: how much less the weakest wanted vertical has.
        near_miss: share of a head's budget that is planted again just under the threshold.
    """

    name: str
    verticals: tuple[int, ...] = ()
    slashes: int = 0
    band_blocks: int = 4
    scattered: bool = False
    nearest: int = 8
    score: float = 6.5
    spread: float = 1.0
    near_miss: float = 0.5


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vertical-slash", verticals=(6, 10, 16, 24), slashes=2, band_blocks=3),
        Workload("scattered", verticals=(3, 6, 9, 16), slashes=3, band_blocks=4, scattered=True),
        Workload("noise"),
    )
}


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which blocks the heads of one step want.

    Attributes:
        vertical: float32 [B, Hkv, G, Kb], score over the noise of each planted block, 0 elsewhere.
        band: int64 [B, Hkv, G, Qb, slashes], the band that a query block points to, -1 for none.
    """

    vertical: Tensor
    band: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One chunk over its cache, every request of the same length.

    Attributes:
        q: [T, Hq, D], packed.
        kv: the paged cache, pages in permuted order.
        k, v: [B, Hkv, capacity, D], the same tokens contiguous by head, for the dense baselines; None if not asked
            for. Only the first `context` tokens are valid.
    """

    shape: Shape
    context: int
    chunk: int
    q: Tensor
    kv: PagedKV
    batch: PrefillBatch
    k: Tensor | None
    v: Tensor | None

    @property
    def past(self) -> int:
        return self.context - self.chunk


def draw_pattern(
    workload: Workload, shape: Shape, context: int, chunk: int, correlation: float, generator: torch.Generator
) -> Pattern:
    """Draw verticals and slashes for every KV group of a step; on the CPU, from lengths and budgets alone."""
    blocks, past, q_blocks = -(-context // BLOCK), (context - chunk) // BLOCK, -(-chunk // BLOCK)
    vertical = torch.zeros(shape.batch, shape.kv_heads, shape.group, blocks)
    band = torch.full((shape.batch, shape.kv_heads, shape.group, q_blocks, workload.slashes), -1)
    first = SINK_BLOCKS if past > SINK_BLOCKS + WINDOW_BLOCKS else 0
    candidates = torch.arange(first, max(first, past - WINDOW_BLOCKS + 1) if first else past)
    for b in range(shape.batch):
        for h in range(shape.kv_heads):
            _draw_verticals(vertical[b, h], workload, candidates, correlation, generator)
            if workload.slashes and past >= workload.nearest:
                band[b, h] = _draw_bands(workload, shape.group, past, q_blocks, correlation, generator)
    return Pattern(vertical, band)


def _draw_verticals(
    vertical: Tensor, workload: Workload, candidates: Tensor, correlation: float, generator: torch.Generator
) -> None:
    """Fill [G, Kb] of one KV group: each head's share of the common ranking first, then its own blocks."""
    heads = len(vertical)
    if not workload.verticals:
        return
    ranking = candidates[torch.randperm(len(candidates), generator=generator)]
    deal = torch.randperm(heads, generator=generator).tolist()
    for g in range(heads):
        budget = min(len(candidates), workload.verticals[deal[g] % len(workload.verticals)])
        common = round(correlation * budget)
        others = ranking[common:]
        own = others[torch.randperm(len(others), generator=generator)]
        order = torch.cat((ranking[:common], own))
        vertical[g, order[:budget]] = workload.score - workload.spread * torch.linspace(0, 1, max(1, budget))[:budget]
        missed = order[budget : budget + math.ceil(workload.near_miss * budget)]
        vertical[g, missed] = workload.score - torch.linspace(2.6, 4.0, max(1, len(missed)))[: len(missed)]


def _draw_bands(
    workload: Workload, heads: int, past: int, q_blocks: int, correlation: float, generator: torch.Generator
) -> Tensor:
    """Bands of one KV group, [G, Qb, slashes]: near distances are likelier (log-uniform), as slashes are."""
    shape = (heads + 1, q_blocks if workload.scattered else 1, workload.slashes)
    draw = torch.rand(shape, generator=generator)
    own = torch.rand(heads, 1, workload.slashes, generator=generator) >= correlation
    draw = torch.where(own, draw[:heads], draw[heads:])
    if workload.scattered:
        return (draw * past).long() // workload.band_blocks
    distance = workload.nearest * (past / workload.nearest) ** draw
    position = past + torch.arange(q_blocks)[:, None]
    return (position - distance.long()).clamp(min=0) // workload.band_blocks


def make_step(
    workload: Workload,
    shape: Shape,
    context: int,
    chunk: int,
    *,
    correlation: float = 0.9,
    page_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    capacity: int | None = None,
    selected_scale: float | None = None,
) -> Step:
    """Make one step on `device`, without anything of size queries × keys.

    Structure is drawn on the CPU, so a seed gives the same blocks everywhere; the noise is drawn on the device.
    `capacity`: tokens of the dense copies, at least `context`; None makes none. `selected_scale`: the softmax scale
    that scores are planted for, default D^-0.5.
    """
    generator = structure_generator(seed, context, chunk)
    pattern = draw_pattern(workload, shape, context, chunk, correlation, generator)
    scale = shape.head_dim**-0.5 if selected_scale is None else selected_scale
    means, directions = plant(workload, shape, pattern, scale, generator, device)
    noise = torch.Generator(device).manual_seed(seed + 1)

    q = torch.empty(shape.batch, chunk, shape.q_heads, shape.head_dim, dtype=dtype, device=device)
    q.normal_(std=QUERY_NOISE, generator=noise)
    directions = directions.to(dtype)
    for i, rows in enumerate(q.split(BLOCK, dim=1)):
        rows += directions[:, i, None]
    pages = -(-context // page_size)
    page_table = torch.randperm(shape.batch * pages, generator=generator).view(shape.batch, pages).to(device)
    paged = (shape.batch * pages, page_size, shape.kv_heads, shape.head_dim)
    k_pages, v_pages = (torch.empty(paged, dtype=dtype, device=device) for _ in "kv")
    dense = None
    if capacity is not None:
        tokens = (shape.batch, shape.kv_heads, max(capacity, context), shape.head_dim)
        dense = tuple(torch.zeros(tokens, dtype=dtype, device=device) for _ in "kv")
    for b in range(shape.batch):
        for which, cache in enumerate((k_pages, v_pages)):
            rows = torch.empty(pages * page_size, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
            rows.normal_(generator=noise)
            if which == 0:
                for j, mean in enumerate(means[b].to(dtype).split(256)):
                    part = rows[j * 256 * BLOCK : min((j + 1) * 256 * BLOCK, context)]
                    part += mean.repeat_interleave(BLOCK, 0)[: len(part)]
            rows[context:] = math.nan  # page slots beyond the sequence are never read
            cache[page_table[b]] = rows.view(pages, page_size, shape.kv_heads, shape.head_dim)
            if dense is not None:
                dense[which][b, :, :context] = rows[:context].transpose(0, 1)
    batch = PrefillBatch.from_lens([chunk] * shape.batch, [context] * shape.batch, device)
    kv = PagedKV(k_pages, v_pages, page_table.int())
    k, v = dense if dense is not None else (None, None)
    return Step(shape, context, chunk, q.flatten(0, 1), kv, batch, k, v)


def structure_generator(seed: int, context: int, chunk: int) -> torch.Generator:
    """What a step's pattern and directions are drawn from, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + context * 31 + chunk)


def plant(
    workload: Workload,
    shape: Shape,
    pattern: Pattern,
    scale: float,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Block means of the keys [B, Kb, Hkv, D] and mean queries [B, Qb, Hq, D], float32 on `device`.

    Everything random is drawn on the CPU.
    """
    batch, kv_heads, heads, blocks = pattern.vertical.shape
    dim, strength = shape.head_dim, math.sqrt(workload.score / scale)
    basis = torch.linalg.qr(torch.randn(batch, kv_heads, dim, dim, generator=generator)).Q.to(device)
    vertical, band = pattern.vertical.to(device), pattern.band.to(device)
    own, rest = basis[..., :heads], basis[..., heads:]  # columns: a direction per head; the space of codes
    means = torch.einsum("bhgj,bhdg->bjhd", vertical / workload.score, own) * strength
    queries = own.transpose(-1, -2)[:, :, :, None].expand(-1, -1, -1, band.shape[3], -1) * strength
    if not workload.verticals:
        queries = torch.zeros_like(queries)
    if workload.slashes:
        bands = -(-blocks // workload.band_blocks)
        codes = torch.randn(batch, kv_heads, bands, dim - heads, generator=generator).to(device)
        codes = torch.nn.functional.normalize(codes, dim=-1)
        planted = vertical.amax(2) > 0  # a vertical carries no code, so that its score stays what it is
        coded = codes[:, :, torch.arange(blocks, device=device) // workload.band_blocks] * ~planted[..., None]
        means += torch.einsum("bhjc,bhdc->bjhd", coded, rest) * strength
        aims = _aim(codes, band)
        queries = queries + torch.einsum("bhgic,bhdc->bhgid", aims, rest) * strength
    return means, queries.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _aim(codes: Tensor, band: Tensor) -> Tensor:
    """The shortest vector with product 1 with the code of each wanted band: [B, Hkv, G, Qb, code dims]."""
    index = band.clamp(min=0).flatten(2)
    wanted = codes.gather(2, index[..., None].expand(-1, -1, -1, codes.shape[-1])).unflatten(2, band.shape[2:])
    wanted = wanted * (band >= 0)[..., None]
    gram = wanted @ wanted.transpose(-1, -2) + 1e-4 * torch.eye(band.shape[-1], device=band.device)
    weights = torch.linalg.solve(gram, torch.ones(*band.shape, 1, device=band.device))
    return (wanted * weights).sum(-2)


@dataclass(frozen=True)
class Density:
    """What a selection keeps, as sums that can be added over the chunks of a prompt.

    Attributes:
        cascade: past blocks at each step of the cascade, from one head's mask to the widest union.
        selected: blocks of the masks, the current chunk's included.
        visible: blocks that the query blocks see, the current chunk's included.
        pairs: (request, head, query block) triples.
        chunks: chunks that were added.
    """

    cascade: DensityCascade = field(default_factory=DensityCascade)
    selected: int = 0
    visible: int = 0
    pairs: int = 0
    chunks: int = 0

    def __add__(self, other: Density) -> Density:
        return Density(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def mask_density(self) -> float:
        """Selected ÷ visible blocks, as published for FlashPrefill: the current chunk counts on both sides."""
        return self.selected / self.visible

    @property
    def blocks_per_query_block(self) -> float:
        return self.selected / self.pairs

    def growth(self) -> dict[str, float]:
        """How many times as many past blocks are read after each union as the masks alone name."""
        entries = asdict(self.cascade)
        return {
            name: count / entries["mask"] if entries["mask"] else math.nan
            for name, count in entries.items()
            if name not in ("mask", "visible")
        }

    def as_json(self) -> dict[str, object]:
        scope = "one chunk" if self.chunks == 1 else f"average over a prompt, {self.chunks} chunks measured"
        return {
            "scope": scope,
            "past_density": _without_nan(self.cascade.densities()),
            "growth": _without_nan(self.growth()),
            "mask_density": self.mask_density,
            "blocks_per_query_block": self.blocks_per_query_block,
        }


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def measure_density(
    step: Step, grouping: Grouping, selection: SelectionMask | None = None, table: BlockTable | None = None
) -> Density:
    """The cascade of one step under a grouping, by the library's own masks and unions.

    A grouping that the library chooses is known by its `table` alone, which then gives the sub-group's union.
    """
    if selection is None:
        selection = select(step.q, step.kv, step.batch, SELECTOR)
    chosen = grouping.chosen_by_library
    fixed = PAPER if chosen else grouping
    cascade = density_cascade(
        selection,
        step.batch,
        kv_heads=step.shape.kv_heads,
        heads_per_group=math.gcd(int(fixed.heads), step.shape.group),
        query_blocks_per_span=fixed.span,
    )
    if chosen and table is not None:
        cascade = replace(cascade, sub_group_union=int(past_entries(table, step.batch).sum()))
    visible = block_rules(step.batch, SELECTOR).visible.sum() * step.shape.q_heads
    pairs = selection.mask[..., 0].numel()
    return Density(cascade, int(selection.mask.sum()), int(visible), pairs, 1)


def prompt_density(
    workload: Workload,
    shape: Shape,
    prompt: int,
    chunk: int,
    *,
    correlation: float = 0.9,
    stride: int = 1,
    grouping: Grouping = PAPER,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Density:
    """Density over a prompt cut into chunks, each chunk a fresh draw of the workload at its own context.

    With a stride, every stride-th chunk stands for its neighbours, from the middle of the first `stride` ones on.
    """
    total = Density()
    for n in range(stride // 2, prompt // chunk, stride):
        step = make_step(
            workload, shape, (n + 1) * chunk, chunk, correlation=correlation, seed=n, device=device, dtype=dtype
        )
        total += measure_density(step, grouping)
    return total
