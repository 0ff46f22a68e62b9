"""Features of a model's attention (soft-capping, sliding window, sinks) and FP8 caches, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from compactattn import (
    BlockTable,
    Dense,
    FlashPrefill,
    KeyBounds,
    Oracle,
    PagedKV,
    SeerGate,
    XAttention,
    attend,
    check,
    prefill,
)
from compactattn.features import PLAIN, Features, named
from tests.backends import INTERPRETER, NUMBA, REFERENCE, Backend, compose_table, for_all
from tests.laws import live, table_sets
from tests.numerics import assert_attention
from tests.strategies import (
    MASKS,
    WILD,
    Geometry,
    Sizes,
    Step,
    evenly,
    gate_weights,
    geometries,
    in_fp8,
    make_mask,
    make_step,
    poison_tails,
)
from tests.test_correction import assert_corrected
from tests.test_laws import everything
from tests.test_selection import assert_selection
from tests.test_summary import assert_mean, unit_slots

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

#: which of (softcap, window, sinks) a call has; few of the combinations, since each is a kernel of its own
PRESENT = ((True, True, True), (False, True, False), (True, False, True))


def make_features(g: Geometry, device: str, present: tuple[bool, bool, bool], softcap: float, window: int) -> Features:
    """Sinks that the dtype of the step can hold, so that plain attention in it sees the same; one head has none."""
    generator = torch.Generator().manual_seed(g.seed + 3)
    sinks = (2.0 * torch.randn(g.heads, generator=generator)).to(g.dtype).float()
    if g.heads > 1:
        sinks[g.seed % g.heads] = -math.inf
    return Features(
        *(x if there else None for x, there in zip((softcap, window, sinks.to(device)), present, strict=True))
    )


def arguments(features: Features) -> dict[str, Any]:
    return {"softcap": features.softcap, "window": features.window, "sinks": features.sinks}


@st.composite
def settings(draw: st.DrawFn, g: Geometry) -> tuple[tuple[bool, bool, bool], float, int]:
    """Which features, how strong a cap, and a window: of one key, of whole blocks and nearly so, of everything."""
    window = draw(evenly((1, 2, 17, g.block_size, g.block_size + 1, 3 * g.block_size - 1, g.max_seq_len, 10**6)))
    return draw(evenly(PRESENT)), draw(evenly((0.5, 5.0, 50.0))), max(1, window)


def table_of(backend: Backend, g: Geometry, kind: str) -> BlockTable:
    groups = backend.unite(make_mask(g, backend.device, kind), g.batch(backend.device), **g.grouping)
    return poison_tails(backend.build_table(groups))


def poison_unseen(step: Step, table: BlockTable, window: int | None) -> PagedKV:
    """NaN in every token that no query sees: not named by its table rows, or before the window of the first query.

    Pages that two requests share keep what either needs. Pages that lie before the window have ids that lead nowhere.
    """
    g, kv = step.geometry, step.kv
    seen = torch.zeros(kv.k.shape[:3], dtype=torch.bool)
    pages = kv.page_table.cpu()
    for (b, h, _), blocks in zip(live(g), table_sets(g, table), strict=True):
        token = torch.tensor([j * g.block_size + t for j in blocks for t in range(g.block_size)], dtype=torch.long)
        first = 0 if window is None else g.past_lens[b] - window + 1
        token = token[(token >= first) & (token < g.seq_lens[b])]
        seen[pages[b, token // g.page_size].long(), token % g.page_size, h // g.group] = True
    caches = []
    for cache in (kv.k, kv.v):
        copy = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device)
        caches.append(copy.copy_(cache.float().masked_fill(~seen.to(cache.device)[..., None], math.nan)))
    freed = pages.clone()
    for b in g.requests if window is not None else ():
        for n in range(max(0, g.past_lens[b] - window + 1) // g.page_size):
            freed[b, n] = WILD[n % len(WILD)]
    return replace(kv, k=caches[0], v=caches[1], page_table=freed.to(kv.page_table.device))


Drawn = tuple[tuple[bool, bool, bool], float, int]


def with_pins(*numbers: int) -> Callable[[Sizes], st.SearchStrategy[Geometry]]:
    """Geometries with these pins alone, where a backend has pins because each of them compiles kernels of its own."""

    def strategy(sizes: Sizes) -> st.SearchStrategy[Geometry]:
        pins = sizes.pins if len(sizes.pins) == 1 else tuple(sizes.pins[n] for n in numbers)
        return geometries(replace(sizes, pins=pins))

    return strategy


IN_PAGES, SMALL_PAGES = 2, 1  # bfloat16 of D = 128: tiles through TMA descriptors, tiles by pointers
#: what needs no kernel of a GPU again
portable = pytest.mark.parametrize(
    "backend", [REFERENCE, NUMBA, *([] if torch.cuda.is_available() else [INTERPRETER])], ids=lambda b: b.name
)


@for_all(examples=0.4, geometry=with_pins(IN_PAGES), kind=st.sampled_from(MASKS), drawn=settings)
def test_attention_with_features(backend: Backend, g: Geometry, kind: str, drawn: Drawn) -> None:
    """Against float64; every token outside all windows holds NaN, whichever block or page it lies in."""
    step = make_step(g, backend.device, plant=True)
    table = table_of(backend, g, kind)
    features = make_features(g, backend.device, *drawn)
    kv = poison_unseen(step, table, features.window)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True, **arguments(features))
    assert_attention(step, table, out, lse, features=features)


@for_all(
    examples=0.3,
    geometry=with_pins(IN_PAGES, SMALL_PAGES),
    kind=st.sampled_from(MASKS),
    drawn=settings,
    plain=st.booleans(),
)
def test_attention_over_fp8(backend: Backend, g: Geometry, kind: str, drawn: Drawn, plain: bool) -> None:
    """An FP8 cache is the cache that it dequantises to, alone and with features, in every memory layout."""
    g = in_16_bits(g)
    step = in_fp8(make_step(g, backend.device, plant=True))
    table = table_of(backend, g, kind)
    features = PLAIN if plain else make_features(g, backend.device, (True, True, True), *drawn[1:])
    kv = poison_unseen(step, table, features.window)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True, **arguments(features))
    assert_attention(step, table, out, lse, features=features)


def in_16_bits(g: Geometry) -> Geometry:
    return replace(g, dtype=HALF) if g.dtype == SINGLE else g


# What random draws may miss: ragged batches of chunks, decode and speculative rows, and tiles cut at both edges.
HARD = (
    Geometry((67, 1, 0, 5), (390, 300, 64, 205), group=4, heads_per_group=4, span=1, page_size=16, dtype=HALF),
    Geometry((1, 1, 8, 3), (449, 1, 8, 131), group=8, heads_per_group=8, page_size=32, layout="HND", dtype=HALF),
    Geometry((130, 2), (386, 290), group=2, dim=80, page_size=256, block_size=256, query_block=128, dtype=HALF),
    Geometry((65, 4), (258, 132), kv_heads=1, group=2, dim=128, page_size=128, block_size=128, layout="stacked"),
)


@pytest.mark.parametrize("window", [1, 40, 300])
@pytest.mark.parametrize("g", HARD, ids=str)
def test_ragged_batches_with_every_feature(backend: Backend, g: Geometry, window: int) -> None:
    """Chunks, decode rows, speculative rows and requests without a query in one call, with all features at once.

    Steps of 16 bits keep their cache in FP8 as well.
    """
    if backend.name == "triton-interpreter" and window != 40:
        pytest.skip("one window is enough where a program takes its time")
    step = make_step(g, backend.device, plant=True)
    step = in_fp8(step) if g.dtype == HALF else step
    features = make_features(g, backend.device, (True, True, True), 5.0, window)
    for table in (table_of(backend, g, "half"), everything(g, backend.device)):
        kv = poison_unseen(step, table, window)
        out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True, **arguments(features))
        assert_attention(step, table, out, lse, features=features)


STEP = Geometry((9, 1, 5), (150, 200, 64), kv_heads=2, group=2, heads_per_group=2, span=1, dtype=HALF)


def test_prefill_equals_the_stages(backend: Backend) -> None:
    """Features change nothing about the selection: the same table, and the same bits of attention under it."""
    g = STEP
    step = in_fp8(make_step(g, backend.device, coherent=True))
    how = arguments(make_features(g, backend.device, (True, True, True), 5.0, 70))
    selector = FlashPrefill(alpha=0.9, sink_blocks=0, window_blocks=1, block_size=64, query_block=64)
    table = compose_table(backend, step.q, step.kv, step.batch, selector=selector, **g.grouping)
    expected, expected_lse = backend.attend(step.q, step.kv, step.batch, table, return_lse=True, **how)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **g.grouping, **how)
    assert torch.equal(out[: step.rows], expected[: step.rows])
    assert torch.equal(lse[: step.rows], expected_lse[: step.rows])


@portable
def test_features_that_change_nothing(backend: Backend) -> None:
    """A window over everything and sinks of -inf are none: not a bit of the result differs."""
    step = make_step(STEP, backend.device)
    table = table_of(backend, STEP, "half")
    expected = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    sinks = torch.full((STEP.heads,), -math.inf, device=backend.device)
    for features in ({"window": 200}, {"window": 2**31 - 1}, {"sinks": sinks}):
        got = backend.attend(step.q, step.kv, step.batch, table, return_lse=True, **features)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one[: step.rows], other[: step.rows]), features


@portable
def test_a_window_of_one_key_is_the_own_value(backend: Backend) -> None:
    """A query sees `window` keys, its own the last of them: with one alone the result is its value, bit for bit."""
    g = STEP
    step = make_step(g, backend.device)
    selector = Dense(block_size=64, query_block=64)
    out, lse = backend.prefill(
        step.q, step.kv, step.batch, selector=selector, heads_per_group=1, window=1, return_lse=True
    )
    for b in g.requests:
        own = step.values[b][g.past_lens[b] :].repeat_interleave(g.group, 1)
        assert torch.equal(out[g.starts[b] : g.starts[b + 1]], own)
    assert bool(lse[: step.rows].isfinite().all())


@portable
def test_a_sink_alone(backend: Backend) -> None:
    """With nothing else to see, the output is 0 and the log-sum-exp is the sink."""
    step = make_step(STEP, backend.device)
    table = replace(everything(STEP, backend.device), counts=torch.zeros(3, dtype=torch.int32, device=backend.device))
    sinks = torch.tensor([0.5, -3.0, -math.inf, 7.0], device=backend.device)
    out, lse = backend.attend(step.q, step.kv, step.batch, table, sinks=sinks, return_lse=True)
    assert not bool(out[: step.rows].any())
    torch.testing.assert_close(lse[: step.rows], sinks.expand(step.rows, -1), rtol=1e-6, atol=0)


def test_transformers_means_the_same_window() -> None:
    """`sliding_window` of a configuration is `window` here."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    seen = sliding_window_causal_mask_function(3)
    expected = [[bool(seen(0, 0, torch.tensor(p), torch.tensor(k))) for k in range(9)] for p in range(9)]
    assert expected == [[p - 3 < k <= p for k in range(9)] for p in range(9)]


# ---- the mean correction ----


@for_all(examples=0.2, geometry=with_pins(IN_PAGES), kind=st.sampled_from(("sparse", "structured")))
def test_corrected_with_features(backend: Backend, g: Geometry, kind: str) -> None:
    """Means are capped as scores are, sinks count once, and an FP8 cache's means are those of its keys."""
    g = in_16_bits(g)
    step = in_fp8(make_step(g, backend.device, coherent=True))
    table = table_of(backend, g, kind)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    features = make_features(g, backend.device, (True, False, True), 2.0, 0)
    how = {"softcap": 2.0, "sinks": features.sinks, "correction": summary}
    out, lse = backend.attend(step.q, step.kv, step.batch, table, return_lse=True, **how)
    assert_corrected(step, table, out, lse, features)


# ---- FP8: summaries and selection ----


@for_all(examples=0.3, geometry=with_pins(IN_PAGES))
def test_means_of_fp8(backend: Backend, g: Geometry) -> None:
    """Summaries hold the means of the dequantised keys and values."""
    g = in_16_bits(g)
    step = in_fp8(make_step(g, backend.device))
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    for b, start, count, page, slot in unit_slots(step):
        assert_mean(summary.k_mean[page, slot], step.keys[b][start : start + count])
        assert_mean(summary.v_mean[page, slot], step.values[b][start : start + count])


RULES = {"block_size": 64, "query_block": 64, "sink_blocks": 0, "window_blocks": 0}
CHOOSY = Geometry((66, 1), (270, 140), kv_heads=2, group=2, page_size=32, dtype=HALF)


@pytest.mark.parametrize(
    "selector",
    [
        FlashPrefill(alpha=0.4, **RULES),
        KeyBounds(threshold=0.2, **RULES),
        XAttention(threshold=0.6, stride=8, **RULES),
        Oracle(mass=0.6, **RULES),
        SeerGate(gate_weights(4, 64, 0), 10_000.0 ** -torch.linspace(0, 1, 32), threshold=0.1, **RULES),
        Dense(**RULES),
    ],
    ids=lambda selector: type(selector).__name__,
)
def test_selection_over_fp8(backend: Backend, selector: Any) -> None:
    """Every selector judges the dequantised keys, with a summary and without."""
    step = in_fp8(make_step(CHOOSY, backend.device, coherent=True))
    if isinstance(selector, SeerGate):
        weights, frequencies = (x.to(backend.device) for x in (selector.weights, selector.inv_freq))
        selector = replace(selector, weights=weights, inv_freq=frequencies)
    mask = backend.select(step.q, step.kv, step.batch, selector).mask
    assert_selection(step, selector, mask)
    if isinstance(selector, (FlashPrefill, KeyBounds, SeerGate)):
        gate = selector if isinstance(selector, SeerGate) else None
        summary = backend.summarize(
            step.kv, step.batch, block_size=64, gate=gate, bounds=isinstance(selector, KeyBounds)
        )
        mask = backend.select(step.q, step.kv, step.batch, selector, summary=summary).mask
        assert_selection(step, selector, mask)


@portable
def test_scales_may_be_one_number_for_all_heads(backend: Backend) -> None:
    """As engines have it: one scale, expanded without a copy."""
    step = in_fp8(make_step(STEP, backend.device))
    one = torch.tensor(0.75, device=backend.device)
    shared = replace(step.kv, k_scale=one.expand(2), v_scale=one.expand(2))
    copied = replace(step.kv, k_scale=one.expand(2).clone(), v_scale=one.expand(2).clone())
    table = everything(STEP, backend.device)
    for one_kv, other in zip(
        backend.attend(step.q, shared, step.batch, table, return_lse=True),
        backend.attend(step.q, copied, step.batch, table, return_lse=True),
        strict=True,
    ):
        assert torch.equal(one_kv[: step.rows], other[: step.rows])


@portable
@pytest.mark.parametrize("length", [64, 70])
def test_contiguous_fp8_caches(backend: Backend, length: int) -> None:
    """`from_contiguous` sees FP8 keys and values in place, and pads them where it must."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, length, 2, 64, generator=generator).to(torch.float8_e4m3fn).to(backend.device)
    scales = [torch.tensor(x, device=backend.device) for x in ([0.5, 2.0], [1.5, 1.0])]
    kv = PagedKV.from_contiguous(k, v, 16, *scales)
    assert (kv.k.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()) == (length == 64)
    g = Geometry((length,), (length,), kv_heads=2, page_size=16, dtype=HALF)
    step = make_step(g, backend.device)
    dequantised = [(x[0].float() * s[:, None]) for x, s in zip((k, v), scales, strict=True)]
    step = replace(step, kv=kv, keys=dequantised[:1], values=dequantised[1:])
    table = everything(g, backend.device)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True)
    assert_attention(step, table, out, lse)


def test_check_reads_scales() -> None:
    step = in_fp8(make_step(CHOOSY, "cpu"))
    check(step.kv, step.batch)
    for bad in (0.0, -1.0, math.nan, math.inf):
        scales = torch.tensor([1.0, bad])
        with pytest.raises(ValueError, match=r"kv.v_scale\[1\]: expected a finite number above 0, got"):
            check(replace(step.kv, v_scale=scales), step.batch)


# ---- what is refused, and what runs ----


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    sinks = torch.zeros(4)
    return {
        "softcap of 0": ({"softcap": 0.0}, r"softcap: expected a number above 0 and at most 1.7\S*, or None, got 0.0"),
        "softcap of 2e38": (
            {"softcap": 2e38},
            r"softcap: expected a number above 0 and at most 1.7\S*, or None, got 2",
        ),
        "infinite softcap": ({"softcap": math.inf}, r"softcap: expected a number above 0 .*, got inf"),
        "softcap that is a flag": ({"softcap": True}, r"softcap: expected a number above 0 .*, got True"),
        "window of 0": ({"window": 0}, r"window: expected an int of at least 1, got 0"),
        "window pair": ({"window": (3, 0)}, r"window: expected an int of at least 1, got \(3, 0\)"),
        "half sinks": ({"sinks": sinks.half()}, r"sinks: expected dtype torch.float32, got torch.float16"),
        "too few sinks": (
            {"sinks": sinks[:3]},
            r"sinks: expected shape \(4,\) \(one logit per query head\), got \(3,\)",
        ),
        "sinks of pairs": ({"sinks": sinks[:, None]}, r"sinks: expected 1 dimensions, got shape \(4, 1\)"),
        "strided sinks": ({"sinks": torch.zeros(8)[::2]}, r"sinks: expected a contiguous tensor, got strides \(2,\)"),
        "sinks elsewhere": ({"sinks": sinks.to("meta")}, r"sinks: expected device cpu, where the other .*, got meta"),
        "sinks that learn": ({"sinks": sinks.requires_grad_()}, r"sinks: expected a tensor without gradients"),
    }


@pytest.mark.parametrize("case", refusals())
def test_bad_features_are_refused(case: str) -> None:
    features, message = refusals()[case]
    step = make_step(STEP, "cpu")
    with pytest.raises(ValueError, match=message):
        attend(step.q, step.kv, step.batch, everything(STEP, "cpu"), **features)
    with pytest.raises(ValueError, match=message):
        prefill(step.q, step.kv, step.batch, selector=Dense(block_size=64), heads_per_group=1, **features)


def test_what_does_not_go_together_is_refused() -> None:
    step = make_step(STEP, "cpu")
    how: dict[str, Any] = {"heads_per_group": 1}
    fp8 = in_fp8(make_step(CHOOSY, "cpu"))
    from compactattn import summarize
    from compactattn.quality import exact_lse

    summary = summarize(step.kv, step.batch, block_size=64, values=True)
    message = r"window: expected None beside a correction, got 9"
    with pytest.raises(ValueError, match=message):
        attend(step.q, step.kv, step.batch, everything(STEP, "cpu"), correction=summary, window=9)
    selector = FlashPrefill(block_size=64, query_block=64)
    with pytest.raises(ValueError, match=message):
        prefill(step.q, step.kv, step.batch, selector=selector, summary=summary, correction=True, window=9, **how)
    with pytest.raises(ValueError, match=r"selector: expected FlashPrefill, .* beside softcap, window or sinks"):
        prefill(step.q, step.kv, step.batch, selector=Oracle(mass=0.5, block_size=64), softcap=9.0, **how)
    with pytest.raises(ValueError, match=r"q: expected dtype float16 or bfloat16 over an FP8 cache, got torch.float32"):
        attend(fp8.q.float(), fp8.kv, fp8.batch, everything(CHOOSY, "cpu"))
    with pytest.raises(ValueError, match=r"kv.k: expected a cache of 16 bits or more .*, got torch.float8_e4m3fn"):
        exact_lse(fp8.q, fp8.kv, fp8.batch)


def test_scales_belong_to_fp8_caches() -> None:
    step, fp8 = make_step(CHOOSY, "cpu"), in_fp8(make_step(CHOOSY, "cpu"))
    cases: list[tuple[PagedKV, dict[str, Any], str]] = [
        (step.kv, {"k_scale": torch.ones(2)}, r"k_scale: expected None for a cache of torch.float16, got Tensor"),
        (fp8.kv, {"k_scale": None}, r"k_scale: expected a torch.Tensor, got NoneType"),
        (fp8.kv, {"v_scale": 1.0}, r"v_scale: expected a torch.Tensor, got float"),
        (fp8.kv, {"v_scale": torch.ones(3)}, r"v_scale: expected shape \(2,\) \(one per KV head\), got \(3,\)"),
        (fp8.kv, {"v_scale": torch.ones(2).half()}, r"v_scale: expected dtype torch.float32, got torch.float16"),
        (fp8.kv, {"v_scale": torch.ones(2, device="meta")}, r"v_scale: expected device cpu, .*, got meta"),
        (fp8.kv, {"v": step.kv.v}, r"v: expected dtype torch.float8_e4m3fn, as k, got torch.float16"),
    ]
    for kv, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(kv, **changes)


def test_the_hopper_kernel_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn._triton import hopper_rule

    monkeypatch.setattr(hopper_rule.triton, "__version__", "3.6.0")
    step, fp8 = make_step(STEP, "cpu"), in_fp8(make_step(CHOOSY, "cpu"))
    problem = ((9, 0), BRAIN, 128, 128)
    assert hopper_rule.why_not_hopper(*problem, named(PLAIN, step.kv)) is None
    features = Features(5.0, 9, torch.zeros(4))
    words = "soft-capped scores and a sliding window and attention sinks and an FP8 cache"
    assert (
        hopper_rule.why_not_hopper(*problem, named(features, fp8.kv)) == f"{words}, which only the general kernel has"
    )
