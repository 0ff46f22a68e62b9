"""What only a GPU can show: launches, memory, CUDA graphs, streams, synchronisation, compilation, 64-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactattn import (
    Dense,
    DensityCounters,
    FlashPrefill,
    KeyBounds,
    KVSummary,
    PagedKV,
    PrefillBatch,
    attend,
    build_table,
    prefill,
    select,
    select_table,
    summarize,
    unite,
)
from tests.strategies import Geometry
from tests.strategies import make_step as make_random_step
from tests.test_selection import assert_selection

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, PAGES = 8, 2, 128, 300
SELECTOR = FlashPrefill(alpha=0.3, sink_blocks=1, window_blocks=2)


def make_cache(page_size: int, pages: int = PAGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (pages, page_size, KV_HEADS, DIM)
    k, v = (torch.randn(shape, generator=generator, device="cuda") for _ in "kv")
    return k.bfloat16(), v.bfloat16()


def make_step(
    q_lens: list[int], seq_lens: list[int], page_size: int = 128, seed: int = 0, num_pages: int = PAGES
) -> tuple[Any, ...]:
    """q, kv, batch and an up-to-date summary over permuted pages, at least `num_pages` of them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch = PrefillBatch.from_lens(q_lens, seq_lens, "cuda")
    width = -(-max(seq_lens) // page_size)
    pages = torch.randperm(max(num_pages, width * len(q_lens)), generator=generator, device="cuda")
    kv = PagedKV(*make_cache(page_size, len(pages), seed), pages[: width * len(q_lens)].view(-1, width).int())
    q = torch.randn(sum(q_lens), HEADS, DIM, generator=generator, device="cuda").bfloat16()
    return q, kv, batch, summarize(kv, batch, block_size=128)


def call(q: Tensor, kv: PagedKV, batch: PrefillBatch, summary: KVSummary | None = None, **options: Any) -> Tensor:
    out = prefill(q, kv, batch, heads_per_group=2, summary=summary, **({"selector": SELECTOR} | options))
    assert isinstance(out, Tensor)
    return out


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles meanwhile."""
    import triton

    names: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*args: Any, **kwargs: Any) -> None:
        names.append(str(kwargs.get("repr", args)))

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def test_launches() -> None:
    """A prefill with a summary is seven kernels: unit means, block means, scores, table, plan, queue, attention."""
    q, kv, batch, summary = make_step([512, 300], [4000, 1700])
    call(q, kv, batch, summary)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(q, kv, batch, summary)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.name.startswith("_") and "kernel" in event.name]
    assert len(launched) == (7 if torch.cuda.get_device_capability() == (9, 0) else 5), launched
    others = [e.name for e in profile.events() if "Memcpy" in e.name or "at::native" in e.name]
    assert not others, others


AGAIN: list[dict[str, Any]] = [
    {"heads_per_group": 2, "return_lse": True},
    {"heads_per_group": 1, "query_blocks_per_span": 1, "summary": False},
    {"heads_per_group": "auto", "query_blocks_per_span": "auto"},
    {"heads_per_group": 4, "query_block": 64, "return_lse": True},  # the general kernel
    {"heads_per_group": 2, "dense_last_blocks": 1, "return_lse": True, "given": True},
    {"heads_per_group": 2, "selector": KeyBounds(0.05, sink_blocks=1, window_blocks=2), "return_lse": True},
]


@pytest.mark.parametrize("options", AGAIN, ids=str)
def test_a_step_again(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a kind seen before repeats its launches, and computes what it would have computed anew, bit for bit."""
    from compactattn import pipeline
    from compactattn._triton import replay

    options = dict(options)
    names = [name for name in ("query_block", "dense_last_blocks") if name in options]
    selector = replace(options.pop("selector", SELECTOR), **{name: options.pop(name) for name in names})
    with_summary, given = options.pop("summary", True), options.pop("given", False)

    def step(seed: int, q_lens: list[int], seq_lens: list[int]) -> Any:
        q, kv, batch, summary = make_step(q_lens, seq_lens, seed=seed)
        bounds = {"max_q_len": 512, "max_seq_len": 4096}
        batch = replace(batch, **bounds, prompt_lens=batch.seq_lens.clone())
        kv = replace(kv, page_table=torch.nn.functional.pad(kv.page_table, (0, 32 - kv.page_table.shape[1])))
        q = torch.cat((q, torch.full((600 - len(q), *q.shape[1:]), float("nan"), device="cuda", dtype=q.dtype)))
        if with_summary:
            options["summary"] = summary
        if given:
            options["out"] = torch.empty_like(q)
        result = prefill(q, kv, batch, selector=selector, **options)
        return [part[: sum(q_lens)].clone() for part in (result if isinstance(result, tuple) else (result,))]

    lengths = ([512, 30], [4000, 1700]), ([300, 299], [3001, 4096]), ([1, 0], [77, 4000])
    replay._recordings.clear()
    anew = []
    for seed, lens in enumerate(lengths):
        replay._recordings.clear()
        anew.append(step(seed, *lens))
    assert len(replay._recordings) == 1

    def not_again(*_: object) -> None:
        raise AssertionError("a step of a known kind went through the stages")

    monkeypatch.setattr(pipeline, "_prefill", not_again)
    for seed, lens in enumerate(lengths):
        for found, expected in zip(step(seed, *lens), anew[seed], strict=True):
            assert not found.isnan().any()
            assert torch.equal(found, expected)


def test_peak_allocation() -> None:
    """Scratch is scores, block means, tables, and what attention shares its work with: nothing grows with the cache."""
    used = []
    for num_pages in (PAGES, 20 * PAGES):
        q, kv, batch, summary = make_step([1024, 700], [30000, 20001], num_pages=num_pages)
        out = torch.empty_like(q)
        call(q, kv, batch, summary, out=out)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # as asked for, whatever block was free
        torch.cuda.reset_peak_memory_stats()
        call(q, kv, batch, summary, out=out)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
    q_blocks, kv_blocks = batch.query_blocks(128), batch.kv_blocks(128)
    scores = 4 * 2 * HEADS * q_blocks * (-(-kv_blocks // 16) * 16 + 8)  # aligned rows, the maxima of their parts
    means = 2 * 2 * KV_HEADS * kv_blocks * DIM
    tables = 4 * (2 * HEADS // 2) * (kv_blocks + 1) + 4 * 2 * HEADS * q_blocks
    parts = 4 * torch.cuda.get_device_properties(0).multi_processor_count  # of divided tiles, on Hopper
    shared = 4 * parts * (128 * (DIM + 2) + 4) + 4 * 11 * (2 * HEADS * q_blocks + 128)
    assert used[0] == used[1] <= scores + means + tables + shared + 16 * 256, used  # each is aligned to 256 bytes
    assert used[1] < kv.k.nbytes / 8


LENGTHS = [
    ([256, 256], [4096, 4096]),
    ([200, 31], [3001, 777]),
    ([0, 256], [2000, 4096]),
    ([1, 0], [4096, 1]),
    ([256, 1], [256, 3333]),
]


@pytest.mark.parametrize("page_size", [128, 16])
def test_graph_replay(page_size: int) -> None:
    """One capture serves other lengths (up, down, to 0), page ids and contents within the bounds."""
    q, kv, batch, summary = make_step(*LENGTHS[0], page_size=page_size)
    call(q, kv, batch, summary)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, kv, batch, summary)
    for n, (q_lens, seq_lens) in enumerate([*LENGTHS, LENGTHS[0]]):
        fresh_q, fresh_kv, fresh, _ = make_step([256, 256], [4096, 4096], page_size, seed=n + 1)
        fresh = PrefillBatch.from_lens(q_lens, seq_lens, "cuda")
        for target, source in (
            (q, fresh_q),
            (kv.k, fresh_kv.k),
            (kv.v, fresh_kv.v),
            (kv.page_table, fresh_kv.page_table),
            (batch.cu_seqlens_q, fresh.cu_seqlens_q),
            (batch.seq_lens, fresh.seq_lens),
        ):
            target.copy_(source)
        summarize(kv, batch, block_size=128, since=0, summary=summary)
        rows = sum(q_lens)
        q[rows:] = torch.nan  # rows beyond the last request are not read
        out.fill_(torch.nan)
        graph.replay()
        expected = call(q[:rows], kv, fresh, summarize(kv, fresh, block_size=128))
        assert torch.equal(out[:rows], expected)
        assert not out[:rows].isnan().any()


def test_no_synchronisation() -> None:
    """No stage reads a device value on the host."""
    q, kv, batch, summary = make_step([300, 0, 17], [3000, 40, 2222])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(q, kv, batch, summary)
        call(q, kv, batch)
        selection = select(q, kv, batch, SELECTOR, summary=summary)
        attend(q, kv, batch, build_table(unite(selection, batch, heads_per_group=4)), return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("span", [None, "auto", 2], ids=str)
@pytest.mark.parametrize("page_size", [128, 16])
def test_a_new_length_compiles_nothing(page_size: int, span: Any) -> None:
    """After one call, any other lengths, batch sizes and bounds use the same kernels."""
    q, kv, batch, summary = make_step([512, 300], [4000, 1700], page_size)
    call(q, kv, batch, summary, query_blocks_per_span=span)
    with compilations() as names:
        for q_lens, seq_lens in (
            ([1], [1]),
            ([16], [1600]),
            ([1024], [8192]),
            ([777, 1, 0, 128], [5001, 333, 64, 128]),
            ([129], [129]),
            ([128] * 17, [2048] * 17),
        ):
            q, kv, batch, summary = make_step(q_lens, seq_lens, page_size)
            call(q, kv, batch, summary, query_blocks_per_span=span)
    assert not names, names


def test_another_stream() -> None:
    """Work goes to the current stream, scratch included: two streams at once do not disturb each other."""
    steps = [make_step([512, 300], [4000, 1700], seed=seed) for seed in range(2)]
    expected = [call(*step) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for step, stream, result in zip(steps, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(call(*step))
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert all(torch.equal(got, want) for got in result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device() -> None:
    """Tensors on a device that is not the current one."""
    q, kv, batch, _ = make_step([300], [3000])
    expected = call(q, kv, batch)
    with torch.cuda.device(1):
        moved = PagedKV(*(t.to("cuda:1") for t in (kv.k, kv.v, kv.page_table)))
    there = PrefillBatch.from_lens([300], [3000], "cuda:1")
    assert torch.equal(call(q.to("cuda:1"), moved, there).cpu(), expected.cpu())


@pytest.mark.parametrize("page_size", [128, 16])
def test_offsets_beyond_2_to_31(page_size: int) -> None:
    """Pages at the end of a cache of more than 2^31 elements give what the same pages give in a small one."""
    q, kv, batch, _ = make_step([200, 64], [2000, 1500], page_size)
    pages = (1 << 31) // (page_size * KV_HEADS * DIM) + kv.k.shape[0] + 1
    if torch.cuda.mem_get_info()[0] < 5 * pages * page_size * KV_HEADS * DIM:
        pytest.skip("needs 10 GiB of free GPU memory")
    k, v = (torch.empty((pages, page_size, KV_HEADS, DIM), dtype=torch.bfloat16, device="cuda") for _ in "kv")
    first = pages - kv.k.shape[0]
    k[first:], v[first:] = kv.k, kv.v
    large = PagedKV(k, v, kv.page_table + first)
    assert torch.equal(call(q, large, batch), call(q, kv, batch))
    table = select_table(q, large, batch, selector=Dense(), heads_per_group=1)
    assert torch.equal(attend(q, large, batch, table), attend(q, kv, batch, table))


def in_fp8(kv: PagedKV) -> PagedKV:
    scales = torch.tensor([0.5, 2.0], device="cuda"), torch.tensor([1.5, 0.75], device="cuda")
    k, v = ((x.float() / s[:, None]).to(torch.float8_e4m3fn) for x, s in zip((kv.k, kv.v), scales, strict=True))
    return PagedKV(k, v, kv.page_table, *scales)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_scores_of_any_group(group: int, dim: int) -> None:
    """Heads are scored together where they pair up; 16-bit dtypes that differ in nothing else do not share a kernel."""
    selector = FlashPrefill(alpha=0.02, sink_blocks=0, window_blocks=0)
    for dtype in (torch.bfloat16, torch.float16):
        geometry = Geometry((300, 1, 129), (9000, 700, 2000), 2, group, dim, 128, 128, 128, dtype=dtype)
        step = make_random_step(geometry, "cuda", coherent=True)
        mask = select(step.q, step.kv, step.batch, selector).mask
        assert_selection(step, selector, mask)
        assert 0.2 < float(mask[0].float().mean()) < 0.8


def test_no_query_within_the_bounds() -> None:
    """A step without rows, as a server's idle rank runs it, selects nothing and writes nothing."""
    q, kv, batch, summary = make_step([300, 1], [4096, 700])
    idle = replace(batch, cu_seqlens_q=torch.zeros_like(batch.cu_seqlens_q))
    assert call(q[:0], kv, idle, summary).shape == (0, HEADS, DIM)
    assert not bool(select(q[:0], kv, idle, SELECTOR, summary=summary).mask.any())


def test_features_in_a_graph() -> None:
    """Sinks, soft-capping, a window, an FP8 cache and counters: no synchronisation, captured once, replayed."""
    from compactattn._triton import replay

    q, kv, batch, _ = make_step([256, 256], [4096, 4096])
    kv, counters = in_fp8(kv), DensityCounters.zeros(2, "cuda")
    summary = summarize(kv, batch, block_size=128)
    sinks = torch.randn(HEADS, device="cuda")
    choosy = replace(SELECTOR, alpha=0.99)  # random keys are much alike
    how: dict[str, Any] = {"softcap": 20.0, "window": 1500, "sinks": sinks, "selector": choosy}
    replay._recordings.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(q, kv, batch, summary, density=counters.of_layer(0), **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    call(q, kv, batch, summary)
    assert not replay._recordings  # such steps are run anew each time
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, kv, batch, summary, density=counters.of_layer(1), **how)
    counters.counts.zero_()
    for q_lens, seq_lens in (LENGTHS[1], LENGTHS[3], LENGTHS[4]):
        fresh = PrefillBatch.from_lens(q_lens, seq_lens, "cuda")
        batch.cu_seqlens_q.copy_(fresh.cu_seqlens_q)
        batch.seq_lens.copy_(fresh.seq_lens)
        rows = sum(q_lens)
        graph.replay()
        expected = call(q[:rows], kv, fresh, summary, density=counters.of_layer(0), **how)
        assert torch.equal(out[:rows], expected)
    first, second = counters.counts.tolist()
    assert first == second
    assert 0 < counters.densities()[1] < 1


def test_a_compiled_step() -> None:
    """Stages in one graph of torch.compile give the bits of eager calls."""

    def step(q: Tensor, kv: PagedKV, batch: PrefillBatch, summary: KVSummary) -> Any:
        out = prefill(q * 1.0, kv, batch, selector=SELECTOR, heads_per_group=2, summary=summary)
        return attend(q, kv, batch, build_table(unite(select(q, kv, batch, SELECTOR), batch, heads_per_group=2))), out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n, (q_lens, seq_lens) in enumerate(([[300, 17], [3000, 2222]], [[129, 1], [500, 900]])):
        arguments = make_step(q_lens, seq_lens, seed=n)
        for found, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(found, expected)
