"""Stage 1: what each selector keeps, against integer rules and float64 scores."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from compactattn import Dense, FlashPrefill, KeyBounds, KVSummary, Oracle, PagedKV, Selector, XAttention
from tests.backends import REFERENCE, Backend, for_all
from tests.laws import forced_and_visible
from tests.numerics import block_mass, decide
from tests.strategies import (
    Geometry,
    Sizes,
    Step,
    ceil_div,
    flash_prefill,
    geometries,
    key_bounds,
    make_step,
    selectors,
)

HALF, SINGLE = torch.float16, torch.float32


def assert_selection(step: Step, selector: Selector, mask: torch.Tensor, scale: float | None = None) -> float:
    """Forced bits kept, invisible ones not, the rest as float64 decides. Returns the share that float64 left open."""
    forced, visible = (bits.to(mask.device) for bits in forced_and_visible(step.geometry, selector))
    assert mask.dtype == torch.bool
    assert mask.shape == (len(step.geometry.q_lens), step.geometry.heads, *visible.shape[1:])
    assert not bool((mask & ~visible[:, None]).any()), "an invisible or padded bit is set"
    assert not bool((forced[:, None] & ~mask).any()), "a sink, window or dense block is missing"
    if isinstance(selector, Dense):
        assert torch.equal(mask, visible[:, None].expand_as(mask))
        return 0.0
    decision = decide(step, selector, visible, forced, scale)
    wrong = (mask != decision.keep) & ~decision.open
    assert not bool(wrong.any()), (
        f"(b, h, i, j) = {wrong.nonzero()[:5].tolist()} differ from float64 in {step.geometry}"
    )
    judged = (visible & ~forced)[:, None].expand_as(mask)
    return float(decision.open.sum()) / max(1, int(judged.sum()))


@for_all(examples=1.5, selector=flash_prefill, scale=st.sampled_from((None, None, None, 0.02, 0.5)))
def test_flash_prefill(backend: Backend, g: Geometry, selector: FlashPrefill, scale: float | None) -> None:
    """S(i, j) >= alpha * max S over complete blocks that some row stands behind, and the common rules."""
    step = make_step(g, backend.device, coherent=True)
    selection = backend.select(step.q, step.kv, step.batch, selector, scale=scale)
    assert (selection.block_size, selection.query_block) == (g.block_size, g.query_block)
    assert selection.dense_last_blocks == selector.dense_last_blocks
    assert_selection(step, selector, selection.mask, scale)


def units_of_complete_blocks(step: Step, summary: KVSummary) -> torch.Tensor:
    """bool [num_pages, units per page]: what a selector may read of a summary."""
    g = step.geometry
    needed = torch.zeros(summary.k_mean.shape[:2], dtype=torch.bool)
    per_page = g.page_size // summary.unit
    for b in g.requests:
        for n in range(g.seq_lens[b] // g.block_size * (g.block_size // summary.unit)):
            needed[int(step.kv.page_table[b, n // per_page]), n % per_page] = True
    return needed


@for_all(selector=flash_prefill)
def test_flash_prefill_trusts_a_summary(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
    """With a summary no key is read, and of the summary only the units of complete blocks."""
    step = make_step(g, backend.device, coherent=True)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size)
    needed = units_of_complete_blocks(step, summary)
    means = summary.k_mean.masked_fill(~needed.to(backend.device)[..., None, None], math.nan)
    nothing = PagedKV(*(torch.full_like(c, math.nan) for c in (step.kv.k, step.kv.v)), step.kv.page_table)
    mask = backend.select(step.q, nothing, step.batch, selector, summary=KVSummary(means, None, summary.unit)).mask
    assert_selection(step, selector, mask)


@for_all(examples=1.5, selector=key_bounds, scale=st.sampled_from((None, None, 0.02, 0.5, -0.1)))
def test_key_bounds(backend: Backend, g: Geometry, selector: KeyBounds, scale: float | None) -> None:
    """Blocks whose bound takes at least the threshold of some row's softmax over the complete blocks behind it."""
    step = make_step(g, backend.device, coherent=True)
    selection = backend.select(step.q, step.kv, step.batch, selector, scale=scale)
    assert_selection(step, selector, selection.mask, scale)


@for_all(examples=0.6, selector=key_bounds)
def test_key_bounds_trust_a_summary(backend: Backend, g: Geometry, selector: KeyBounds) -> None:
    """With bounds in the summary no key is read, no mean, and of the bounds only those of complete blocks."""
    step = make_step(g, backend.device, coherent=True)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, bounds=True)
    assert summary.k_bounds is not None
    needed = units_of_complete_blocks(step, summary).to(backend.device)[..., None, None]
    means = torch.full_like(summary.k_mean, math.nan)
    bounds = summary.k_bounds.masked_fill(~needed, math.nan)
    nothing = PagedKV(*(torch.full_like(c, math.nan) for c in (step.kv.k, step.kv.v)), step.kv.page_table)
    trusted = KVSummary(means, None, summary.unit, k_bounds=bounds)
    assert_selection(step, selector, backend.select(step.q, nothing, step.batch, selector, summary=trusted).mask)
    without = backend.summarize(step.kv, step.batch, block_size=g.block_size)
    assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector, summary=without).mask)


def test_key_bounds_find_what_means_and_sums_hide(backend: Backend) -> None:
    """One key among 64 that one row among 64 looks for: far under alpha by means, half that row's softmax by bounds."""
    g = Geometry((64,), (576,))
    step = make_step(g, backend.device)
    q, k = torch.zeros_like(step.q), torch.zeros_like(step.kv.k)
    q[:64, :, 0], q[17, :, 0], q[17, :, 1] = 1.0, 0.0, 6.0
    k[int(step.kv.page_table[0, 13]), 5, :, 1] = 8.0  # block 3
    for n in (4, 5, 6, 7):  # block 1, which all other rows like
        k[int(step.kv.page_table[0, n]), ..., 0] = 40.0
    kv = PagedKV(k, step.kv.v, step.kv.page_table)
    rules = {"sink_blocks": 0, "window_blocks": 0, "block_size": 64, "query_block": 64}
    kept = [
        backend.select(q, kv, step.batch, selector).mask[0, 0, 0].nonzero()[:, 0].tolist()
        for selector in (FlashPrefill(alpha=0.1, **rules), KeyBounds(threshold=0.3, **rules))
    ]
    assert kept == [[1], [1, 3]]


def few_keys(sizes: Sizes) -> st.SearchStrategy[Geometry]:
    """Smaller steps, for scores over every key."""
    return geometries(replace(sizes, q_len=min(sizes.q_len, 130), seq_len=min(sizes.seq_len, 460), heads=2))


@for_all(
    examples=2, geometry=few_keys, selector=functools.partial(selectors, kinds=("xattention",)), coherent=st.booleans()
)
def test_xattention(backend: Backend, g: Geometry, selector: Selector, coherent: bool) -> None:
    """Antidiagonal strided scores, the smallest set of blocks that reaches the mass."""
    step = make_step(g, backend.device, coherent=coherent)
    assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector).mask)


@for_all(examples=0.6, geometry=few_keys, selector=functools.partial(selectors, kinds=("mass", "top_k", "dense")))
def test_oracle_and_dense(backend: Backend, g: Geometry, selector: Selector) -> None:
    """Oracle keeps the smallest set of blocks that holds the exact mass, or the top k; Dense keeps everything."""
    step = make_step(g, backend.device, coherent=True)
    assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector).mask)


RULES = {"block_size": 64, "query_block": 64}
SETTINGS = [
    FlashPrefill(alpha=0.3, sink_blocks=0, window_blocks=0, **RULES),
    FlashPrefill(alpha=1.0, sink_blocks=1, window_blocks=2, dense_keys=200, **RULES),
    FlashPrefill(alpha=0.0, sink_blocks=0, window_blocks=0, dense_queries=0, **RULES),
    KeyBounds(threshold=0.1, sink_blocks=0, window_blocks=0, **RULES),
    KeyBounds(threshold=0.3, sink_blocks=1, window_blocks=2, dense_last_blocks=1, **RULES),
    KeyBounds(threshold=0.0, sink_blocks=0, window_blocks=0, dense_queries=0, **RULES),
    XAttention(threshold=0.6, stride=16, **RULES),
    XAttention(threshold=0.8, stride=64, sink_blocks=0, window_blocks=0, dense_queries=4, **RULES),
    XAttention(threshold=0.5, stride=8, dense_last_blocks=1, **RULES),
    Oracle(mass=0.7, **RULES),
    Oracle(top_k=2, sink_blocks=1, window_blocks=1, **RULES),
    Oracle(top_k=0, window_blocks=3, **RULES),
    Dense(**RULES),
]


@pytest.mark.parametrize("selector", SETTINGS, ids=lambda s: f"{type(s).__name__}-{SETTINGS.index(s)}")
def test_settings(backend: Backend, selector: Selector) -> None:
    """Each selector on a step with everything in it: chunk, decode, speculation and idle rows, a prompt's end."""
    g = Geometry(
        (70, 1, 3, 0),
        (450, 300, 199, 128),
        kv_heads=1,
        group=2,
        prompt_lens=(460, 300, 900, 128),
        dtype=HALF,
        slack=(1, 0),
    )
    step = make_step(g, backend.device, coherent=True)
    assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector).mask)


@pytest.mark.parametrize(
    "g",
    [
        Geometry((70,), (9001,), group=1, page_size=256, seed=1),
        Geometry((5, 66), (33000, 20000), group=1, page_size=256, dtype=HALF),
    ],
    ids=str,
)
def test_loops_over_many_blocks(backend: Backend, g: Geometry) -> None:
    """More KV blocks than any tile of scores holds: the maximum spans all tiles."""
    step = make_step(g, backend.device, coherent=True)
    selector = FlashPrefill(alpha=0.3, sink_blocks=0, window_blocks=0, block_size=64, query_block=64)
    assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector).mask)
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, heads_per_group=1)
    assert 3 < int(table.counts[0]) < ceil_div(g.seq_lens[0], 64) - 3


@pytest.mark.parametrize("past_len", [62, 63, 64, 65])
def test_a_row_scores_a_block_from_its_last_token_on(backend: Backend, past_len: int) -> None:
    """alpha = 0 keeps all that is scored: complete blocks whose last token some row of the query block reaches."""
    g = Geometry((70,), (past_len + 70,))
    step = make_step(g, backend.device)
    selector = FlashPrefill(alpha=0.0, sink_blocks=0, window_blocks=0, **RULES)
    mask = backend.select(step.q, step.kv, step.batch, selector).mask[0, 0].tolist()
    for i, last_row in enumerate((past_len + 63, past_len + 69)):
        assert mask[i] == [64 * (j + 1) - 1 <= last_row for j in range(g.kv_blocks)]


def test_the_maximum_includes_the_current_chunk(backend: Backend) -> None:
    """A complete block of the current chunk raises the threshold for the past, if some row stands behind it."""
    g = Geometry((128,), (512,))
    step = make_step(g, backend.device)
    q, k = step.q.clone(), step.kv.k.clone()
    q[: step.rows] = 1.0
    for j in range(8):  # scores 0, 0, ..., and 5 for block 6, the first of the chunk
        for n in range(4 * j, 4 * j + 4):
            k[int(step.kv.page_table[0, n])] = 5.0 / 8.0 if j == 6 else 0.0
    kv = PagedKV(k, step.kv.v, step.kv.page_table)
    selector = FlashPrefill(alpha=0.18, sink_blocks=0, window_blocks=0, **RULES)
    mask = backend.select(q, kv, step.batch, selector).mask[0, 0].tolist()
    # row 63 alone scores block 6 in query block 0: exp(5) against 64 rows that score the past at exp(0)
    assert mask[0] == [True] * 6 + [True, False]
    assert mask[1] == [False] * 6 + [True, False]


def test_xattention_sums_antidiagonals(backend: Backend) -> None:
    """Slot a of a query group meets slot stride - 1 - a of a key group."""
    g = Geometry((64,), (384,))
    step = make_step(g, backend.device)
    q, k = step.q.clone(), torch.zeros_like(step.kv.k)
    q[: step.rows] = 0.0
    q[: step.rows : 16] = 4.5  # slot 0 alone
    for block, slot in ((1, 15), (3, 0)):  # a page of 16 is a key group
        for n in range(4 * block, 4 * block + 4):
            k[int(step.kv.page_table[0, n]), slot] = 4.5
    selector = XAttention(threshold=0.5, stride=16, sink_blocks=0, window_blocks=0, **RULES)
    mask = backend.select(q, PagedKV(k, step.kv.v, step.kv.page_table), step.batch, selector).mask
    assert mask[0, 0, 0].nonzero()[:, 0].tolist() == [1]


@pytest.mark.parametrize("selector", [Oracle(top_k=3, **RULES), Oracle(mass=0.4, **RULES)], ids=["top_k", "mass"])
def test_ties_go_to_the_lower_id(backend: Backend, selector: Oracle) -> None:
    """Equal keys give every past block the same mass, exactly: the lowest ids win."""
    g = Geometry((64,), (576,))
    step = make_step(g, backend.device)
    q = step.q.clone()
    q[: step.rows] = 0.0
    mask = backend.select(q, step.kv, step.batch, selector).mask[0, 0, 0].tolist()
    kept = [j for j, bit in enumerate(mask) if bit]
    assert kept == list(range(len(kept)))
    assert len(kept) == (3 if selector.top_k else 4)


def test_forced_blocks_count_first(backend: Backend) -> None:
    """top_k and mass include what sink and window keep: two forced blocks leave room for one more of three."""
    g = Geometry((64,), (576,))
    step = make_step(g, backend.device, coherent=True)
    selector = Oracle(top_k=3, sink_blocks=1, window_blocks=1, **RULES)
    mask = backend.select(step.q, step.kv, step.batch, selector).mask[0, 0, 0]
    mass, _ = block_mass(step, selector, 0, 0, slice(0, 64), g.dim**-0.5)
    assert set(mask.nonzero()[:, 0].tolist()) == {0, 8, 1 + int(mass[1:8].argmax())}


@pytest.mark.parametrize(("sinks", "windows"), [(0, 0), (1, 2), (0, 3)])
def test_no_block_beyond_the_forced_ones_needs_no_mass(
    backend: Backend, sinks: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """top_k 0 keeps sink, window and dense blocks; the library does not look at the keys for it."""
    if backend is not REFERENCE:
        package = "_numba" if backend.name == "numba" else "_triton"
        monkeypatch.setattr(f"compactattn.{package}.block_mass.block_mass", None)
    g = Geometry((70, 1, 130), (450, 300, 576), group=2, prompt_lens=(460, 300, 576))
    step = make_step(g, backend.device, coherent=True)
    selector = Oracle(top_k=0, sink_blocks=sinks, window_blocks=windows, dense_last_blocks=1, **RULES)
    mask = backend.select(step.q, step.kv, step.batch, selector).mask
    forced, _ = forced_and_visible(g, selector)
    assert torch.equal(mask.cpu(), forced[:, None].expand_as(mask))
    assert bool(mask.any())


def test_block_and_query_sizes_of_the_selector_rule(backend: Backend) -> None:
    """Extents follow the selector's own sizes and the batch's bounds, not the lengths."""
    g = Geometry((70,), (300,), slack=(200, 500), page_size=64)
    step = make_step(g, backend.device)
    mask = backend.select(step.q, step.kv, step.batch, Dense(block_size=256, query_block=128)).mask
    assert mask.shape == (1, 1, ceil_div(270, 128), ceil_div(1000, 256))
    assert mask[0, 0].tolist() == [[True, True, False, False], [False] * 4, [False] * 4]


def test_float64_leaves_little_open() -> None:
    """The bound is tight enough to judge: over random steps under 1 % of the scored bits are within rounding."""
    shares: list[float] = []

    @for_all(examples=3, selector=flash_prefill)
    def collect(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
        step = make_step(g, backend.device, coherent=True)
        shares.append(assert_selection(step, selector, backend.select(step.q, step.kv, step.batch, selector).mask))

    collect(REFERENCE)
    assert sum(shares) / len(shares) < 0.01
