"""A serving engine's steps: how they are cut, and that every request gets what it would get alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from compactattn import (
    Dense,
    FlashPrefill,
    KeyBounds,
    KVSummary,
    Oracle,
    PagedKV,
    Selector,
    XAttention,
    prefill,
    select_table,
    summarize,
)
from compactattn._triton.replay import kind_of_step
from compactattn.integrations.engine_settings import EngineSettings
from compactattn.integrations.engine_steps import LayerPlan, Step, StepPlanner, cut, write_slots
from tests.numerics import assert_as_close, softmax_attention
from tests.serving import Batch, Scheduler, make_step, random_requests
from tests.strategies import Step as Tokens
from tests.strategies import ceil_div

KV_HEADS, HEADS, DIM = 2, 4, 64
LONGEST, POOL = 448, 1000  # tokens of a request, and of the cache
SIZES = {"block_size": 64, "query_block": 64, "dense_keys": 96}


# ---- runs ----


@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 3000)), min_size=1, max_size=24),
    st.integers(1, 4),
    st.integers(0, 2000),
)
def test_runs_hold_every_request_with_queries_once(
    lengths: list[tuple[int, int]], dense_queries: int, dense_keys: int
) -> None:
    q_lens, seq_lens = [q for q, _ in lengths], [q + past for q, past in lengths]
    runs = cut(q_lens, seq_lens, dense_queries=dense_queries, dense_keys=dense_keys, query_block=64)
    held = [b for run in runs for b in range(run.first, run.stop)]
    assert held == sorted(set(held))
    assert set(held) >= {b for b, q_len in enumerate(q_lens) if q_len}
    for run in runs:
        members = [b for b in range(run.first, run.stop) if q_lens[b]]
        assert members[0] == run.first
        assert members[-1] == run.stop - 1
        assert run.max_q_len == max(q_lens[b] for b in members)
        assert run.max_seq_len == max(seq_lens[b] for b in members)
        assert {q_lens[b] <= dense_queries or seq_lens[b] <= dense_keys for b in members} == {run.dense}
        blocks = [ceil_div(q_lens[b], 64) for b in members]
        assert len(members) == 1 or (run.stop - run.first) * max(blocks) <= 2 * sum(blocks) + 8


def test_equal_requests_stay_in_one_run() -> None:
    assert len(cut([1] * 200, [900] * 200, dense_queries=1, dense_keys=0, query_block=128)) == 1
    assert len(cut([512] * 16, [9000] * 16, dense_queries=1, dense_keys=0, query_block=128)) == 1


def test_a_long_chunk_is_kept_apart_from_many_decode_rows() -> None:
    runs = cut([1] * 200 + [2048], [900] * 200 + [50_000], dense_queries=1, dense_keys=0, query_block=128)
    assert [(run.first, run.stop, run.dense) for run in runs] == [(0, 200, True), (200, 201, False)]


# ---- random traces ----


class Layer:
    """One layer's cache and means, as an engine would keep them: K before V in each head, any strides."""

    def __init__(self, plan: LayerPlan, pages: int, page_size: int, layout: str, device: str = "cpu") -> None:
        shape = (pages, KV_HEADS, page_size, 2 * DIM)
        order = (0, 1, 2, 3) if layout == "HND" else (0, 2, 1, 3)
        physical = torch.full([shape[i] for i in order], float("nan"), device=device)
        cache = physical.permute(*[order.index(i) for i in range(4)])
        self.k, self.v = cache.transpose(1, 2).split(DIM, dim=-1)
        self.plan, self.summary = plan, plan.new_summary(self.k)

    def step(self, q: Tensor, batch: Batch, keys: list[Tensor], values: list[Tensor], step: Step) -> Tensor:
        """Write the step's keys and values, attend; rows of padding follow the queries, and keep their NaN."""
        new = [torch.cat([x[n - q_len :] for x, q_len, n in zip(xs, batch.q_lens, batch.seq_lens, strict=True)])
               for xs in (keys, values)]  # fmt: skip
        padding = torch.full((3, *q.shape[1:]), float("nan"))
        slots = torch.cat([batch.slots, torch.full((3,), -1)])
        write_slots(*[torch.cat([x, torch.ones(3, *x.shape[1:])]) for x in new], self.k, self.v, slots)
        out = torch.full((len(q) + 3, *q.shape[1:]), float("nan"))
        self.plan.run(torch.cat([q, padding]), self.k, self.v, step, self.summary, out)
        assert out[len(q) :].isnan().all()
        return out[: len(q)]


def planned(planner: StepPlanner, batch: Batch, slack: int = 0) -> Step:
    starts = [sum(batch.q_lens[:b]) for b in range(len(batch.q_lens) + 1)]
    return planner.plan(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(batch.seq_lens, dtype=torch.int32),
        page_table=batch.page_table,
        host_starts=starts,
        host_seq_lens=[n + slack for n in batch.seq_lens],
        max_seq_len=max(batch.seq_lens) + slack,
    )


def new_planner(
    settings: EngineSettings, page_size: int, dense_queries: int = 1, max_requests: int = 12, device: str = "cpu"
) -> StepPlanner:
    return StepPlanner(
        settings,
        max_requests=max_requests,
        max_seq_len=LONGEST,
        page_size=page_size,
        dense_queries=dense_queries,
        heads=[HEADS],
        device=device,
    )


def new_scheduler(seed: int, page_size: int, drafts: int) -> Scheduler:
    scheduler = Scheduler(
        seed, pages=POOL // page_size, page_size=page_size, budget=200, max_requests=12, longest=LONGEST, drafts=drafts
    )
    random_requests(scheduler, 9, 380, output=50)
    return scheduler


def assert_means(summary: KVSummary, batch: Batch, exact: Tokens, page_size: int, values: bool) -> None:
    """Every complete unit of every request of the step has the mean of what its page holds, bit for bit."""
    bounds = summary.k_bounds is not None
    fresh = summarize(exact.kv, exact.batch, block_size=SIZES["block_size"], values=values, bounds=bounds)
    for b, seq_len in enumerate(batch.seq_lens):
        pages = seq_len // page_size
        here, there = batch.page_table[b, :pages].long(), exact.kv.page_table[b, :pages].long()
        assert torch.equal(summary.k_mean[here], fresh.k_mean[there]), f"request {b}"
        if values:
            assert torch.equal(summary.v_mean[here], fresh.v_mean[there]), f"request {b}"
        if summary.k_bounds is not None:
            assert torch.equal(summary.k_bounds[here], fresh.k_bounds[there]), f"request {b}"


FLASH = FlashPrefill(0.4, sink_blocks=1, window_blocks=1, **SIZES)
TRACES = {
    "flashprefill": EngineSettings(FLASH, {}),
    "shared tables": EngineSettings(replace(FLASH, sink_blocks=0), {}, 2, None),
    "keybounds": EngineSettings(KeyBounds(0.5, sink_blocks=1, window_blocks=1, **SIZES), {}),
    "xattention": EngineSettings(XAttention(0.5, **SIZES), {}),
    "oracle": EngineSettings(Oracle(mass=0.5, **SIZES), {}),
    "dense ends": EngineSettings(replace(FLASH, alpha=1.0, dense_last_blocks=1), {}, 2, None),
    "correction": EngineSettings(FLASH, {}, correction=True),
    "dense": EngineSettings(Dense(**SIZES), {}),
}


@pytest.mark.parametrize(
    ("name", "page_size", "layout", "drafts", "seed"),
    [
        ("flashprefill", 16, "NHD", 0, 6),
        ("flashprefill", 64, "HND", 3, 10),
        ("shared tables", 32, "HND", 2, 55),
        ("keybounds", 32, "HND", 0, 55),
        ("xattention", 32, "NHD", 0, 55),
        ("oracle", 64, "HND", 0, 55),
        ("dense ends", 32, "NHD", 0, 55),
        ("correction", 64, "NHD", 0, 52),
        ("dense", 64, "NHD", 2, 52),
    ],
)
def test_every_request_gets_what_it_gets_alone(name: str, page_size: int, layout: str, drafts: int, seed: int) -> None:
    """Through shared, evicted and refilled pages: the means of its pages, and attention under the tables that it would
    have in a cache of its own."""
    settings = TRACES[name]
    scheduler = new_scheduler(seed, page_size, drafts)
    layer = Layer(LayerPlan(settings.of_layer(0), settings, DIM**-0.5), POOL // page_size, page_size, layout)
    assert (layer.summary is None) == (name in ("xattention", "oracle", "dense"))
    planner = new_planner(settings, page_size, 1 + drafts)
    selector = replace(settings.of_layer(0), dense_queries=1 + drafts)
    steps = left_out = 0
    while scheduler.busy:
        batch = scheduler.schedule()
        exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
        out = layer.step(exact.q, batch, exact.keys, exact.values, planned(planner, batch, slack=steps % 3 * 40))
        if layer.summary is not None:
            assert_means(layer.summary, batch, exact, page_size, settings.correction)
        if settings.correction:
            assert_corrected(exact, selector, out)
        elif len(out) >= 24 or steps % 6 == 0:
            left_out += assert_tables_of_its_own(exact, selector, settings, out)
        scheduler.commit(batch)
        steps += 1
    assert left_out > 0 or name in ("correction", "dense"), "the selector must leave something out"
    wanted = ["pages shared", "pages shared in the step that fills them", "pages evicted and filled anew"]
    wanted += ["requests preempted", "pages filled by decoding", "steps of decode rows and chunks"]
    missing = [event for event in [*wanted, *(["drafts rejected"] if drafts else [])] if not scheduler.seen[event]]
    assert not missing


def assert_tables_of_its_own(exact: Tokens, selector: Selector, settings: EngineSettings, out: Tensor) -> int:
    """`out` is attention under the tables that the requests have in a cache of their own; how much those leave out."""
    grouping = {
        "heads_per_group": settings.heads_per_group,
        "query_blocks_per_span": settings.query_blocks_per_span,
    }
    batch = replace(exact.batch, prompt_lens=exact.batch.seq_lens) if settings.ends_dense else exact.batch
    step = (exact.q, exact.kv, batch)
    table, every = (select_table(*step, selector=s, **grouping) for s in (selector, settings.dense))
    truth = softmax_attention(exact, table, torch.float64, DIM**-0.5)[0]
    order = torch.Generator().manual_seed(0)  # the largest error of a few rows is a matter of luck: try more orders
    times = 1 + min(64, 192 // len(out))
    plain = [softmax_attention(exact, table, torch.float32, DIM**-0.5, order=order)[0] for _ in range(times)]
    assert_as_close(out, plain, truth, str(exact.geometry))
    return int(every.counts.sum() - table.counts.sum())


def assert_corrected(exact: Tokens, selector: FlashPrefill, out: Tensor) -> None:
    """With the mean correction: as close to the float64 reference as `prefill` on a cache of its own is."""
    kv = PagedKV(exact.kv.k.double(), exact.kv.v.double(), exact.kv.page_table)
    grouping = {"selector": selector, "heads_per_group": 1, "query_blocks_per_span": 1, "correction": True}
    summary = reference.summarize(kv, exact.batch, block_size=selector.block_size, values=True)
    truth = reference.prefill(exact.q.double(), kv, exact.batch, summary=summary, **grouping)
    summary = summarize(exact.kv, exact.batch, block_size=selector.block_size, values=True)
    plain = prefill(exact.q, exact.kv, exact.batch, summary=summary, **grouping)
    for b in exact.geometry.requests:
        rows = slice(exact.geometry.starts[b], exact.geometry.starts[b + 1])
        if exact.geometry.q_lens[b] >= 16:  # the largest error of a few rows is a matter of luck
            assert_as_close(out[rows], [plain[rows]], truth[rows], f"request {b}")


@pytest.mark.parametrize(
    ("prompts", "runs"),
    [
        ([90], [True]),  # short, so dense, and several pages long
        ([448, 430, 428, 426, 424, 422, 420, 418], [False, False]),  # the first fills what the others share
        ([448, 96, 96], [True, False]),
    ],
    ids=["a short prompt", "two sparse runs", "a dense and a sparse run"],
)
def test_pages_filled_and_shared_in_one_step_have_their_means(prompts: list[int], runs: list[bool]) -> None:
    settings, page_size = TRACES["flashprefill"], 32
    scheduler = Scheduler(0, pages=60, page_size=page_size, budget=2000, max_requests=12, longest=LONGEST)
    document = [scheduler.random.randrange(9) for _ in range(LONGEST)]
    for length in prompts:
        scheduler.add(document[:length], 1)
    batch = scheduler.schedule()
    assert len(batch.q_lens) == len(prompts)
    step = planned(new_planner(settings, page_size), batch)
    assert [run.run.dense for run in step.runs] == runs
    layer = Layer(LayerPlan(settings.of_layer(0), settings, DIM**-0.5), 60, page_size, "NHD")
    exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
    out = layer.step(exact.q, batch, exact.keys, exact.values, step)
    assert layer.summary is not None
    assert_means(layer.summary, batch, exact, page_size, values=False)
    assert_tables_of_its_own(exact, settings.of_layer(0), settings, out)


def test_each_chunk_of_a_prompt_ends_dense() -> None:
    """Its last queries read every key, those before them what the selector keeps; a layer without that setting does
    not."""
    settings, page_size = EngineSettings(replace(FLASH, alpha=1.0, sink_blocks=0, dense_last_blocks=1), {}), 32
    plain = replace(settings, others=replace(settings.others, dense_last_blocks=0))
    assert (settings.ends_dense, plain.ends_dense) == (True, False)
    scheduler = Scheduler(0, pages=60, page_size=page_size, budget=200, max_requests=12, longest=LONGEST)
    scheduler.add([scheduler.random.randrange(9) for _ in range(LONGEST)], 1)
    layers = [Layer(LayerPlan(s.of_layer(0), s, DIM**-0.5), 60, page_size, "NHD") for s in (settings, plain)]
    for chunk in (200, 200, 48):
        batch = scheduler.schedule()
        assert batch.q_lens == [chunk]
        exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
        every = select_table(exact.q, exact.kv, exact.batch, selector=settings.dense, heads_per_group=1)
        dense = softmax_attention(exact, every, torch.float32, DIM**-0.5)[0]
        out, without = (
            layer.step(exact.q, batch, exact.keys, exact.values, planned(new_planner(s, page_size), batch))
            for layer, s in zip(layers, (settings, plain), strict=True)
        )
        last = chunk - min(chunk, 64)
        torch.testing.assert_close(out[last:], dense[last:], rtol=1e-4, atol=1e-5)
        scheduler.commit(batch)
        if batch.seq_lens != [chunk]:  # a chunk with a past
            assert not torch.allclose(without[last:], dense[last:], rtol=1e-2, atol=1e-2)
        whole = (chunk - 1) // 64 * 64 - 64  # query blocks that no dense position touches
        if whole > 0:
            assert torch.equal(out[:whole], without[:whole])


def test_steps_whose_chunks_end_dense_can_be_replayed() -> None:
    """Lengths and ends of prompts are tensors of their own, though they hold the same: one twice is never replayed."""
    for ends in (0, 2):
        settings = EngineSettings(replace(FLASH, dense_last_blocks=ends), {})
        scheduler = Scheduler(0, pages=60, page_size=32, budget=400, max_requests=12, longest=LONGEST)
        scheduler.add(list(range(300)), 1)
        (run,) = planned(new_planner(settings, 32), scheduler.schedule()).runs
        prompts, lengths = run.batch.prompt_lens, run.batch.seq_lens
        assert (prompts is None) == (ends == 0)
        if prompts is not None:
            assert torch.equal(prompts, lengths)
        kv = PagedKV(torch.zeros(60, 32, KV_HEADS, DIM), torch.zeros(60, 32, KV_HEADS, DIM), run.page_table)
        q = torch.zeros(300, HEADS, DIM)
        given = (settings.others, 1, 1, None, None, False, False, None, None)
        assert kind_of_step(q, kv, run.batch, *given) is not None


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        (EngineSettings(replace(FLASH, dense_last_blocks=2), {}), True),
        (EngineSettings(replace(FLASH, dense_last_blocks=1), {}), False),
        (EngineSettings(replace(FLASH, dense_last_blocks=2), {3: FLASH}), False),
        (EngineSettings(Dense(**SIZES), {3: replace(FLASH, dense_last_blocks=2)}), True),
        (EngineSettings(Dense(**SIZES), {}), False),
    ],
    ids=["two blocks", "one block", "a layer without", "dense beside it", "dense"],
)
def test_a_chunk_that_is_all_dense_end_is_planned_dense(settings: EngineSettings, dense: bool) -> None:
    scheduler = Scheduler(0, pages=60, page_size=32, budget=128, max_requests=12, longest=LONGEST)
    scheduler.add(list(range(300)), 1)
    scheduler.commit(scheduler.schedule())
    batch = scheduler.schedule()
    assert batch.q_lens == [128]
    (run,) = planned(new_planner(settings, 32), batch).runs
    assert run.run.dense == dense


def test_layers_of_one_plan_may_end_chunks_dense_or_not() -> None:
    """A layer without that setting does what it does where no layer has it, also where a dense end is longer than the
    chunk."""
    page_size, plain = 32, replace(FLASH, alpha=1.0, sink_blocks=0)
    without = EngineSettings(plain, {})
    for blocks in (1, 3):
        mixed = EngineSettings(plain, {1: replace(plain, dense_last_blocks=blocks)})
        scheduler = Scheduler(0, pages=60, page_size=page_size, budget=150, max_requests=12, longest=LONGEST)
        scheduler.add([scheduler.random.randrange(9) for _ in range(LONGEST)], 1)
        layers = [Layer(LayerPlan(s.of_layer(n), s, DIM**-0.5), 60, page_size, "NHD")
                  for s, n in ((mixed, 0), (without, 0), (mixed, 1))]  # fmt: skip
        for _ in range(3):
            batch = scheduler.schedule()
            exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
            plans = [planned(new_planner(s, page_size), batch) for s in (mixed, without, mixed)]
            given = (exact.q, batch, exact.keys, exact.values)
            beside, alone, ending = (layer.step(*given, plan) for layer, plan in zip(layers, plans, strict=True))
            assert torch.equal(beside, alone)
            every = select_table(exact.q, exact.kv, exact.batch, selector=mixed.dense, heads_per_group=1)
            dense = softmax_attention(exact, every, torch.float32, DIM**-0.5)[0]
            last = max(0, len(ending) - 64 * blocks)
            torch.testing.assert_close(ending[last:], dense[last:], rtol=1e-4, atol=1e-5)
            scheduler.commit(batch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_decode_step_sees_later_lengths(device: str) -> None:
    """A CUDA graph of a decode step, replayed after another step was planned; on the CPU the captured plan is run."""
    settings, page_size = TRACES["flashprefill"], 32
    scheduler = new_scheduler(3, page_size, 0)
    while True:
        batch = scheduler.schedule()
        if len(batch.q_lens) >= 3 and set(batch.q_lens) == {1}:
            break
        scheduler.commit(batch)
    exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
    requests = len(batch.q_lens) + 2
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    seq_lens = torch.full((requests,), LONGEST, dtype=torch.int32, device=device)
    page_table = torch.zeros(requests, batch.page_table.shape[1], dtype=torch.int32, device=device)
    planner = new_planner(settings, page_size, max_requests=requests, device=device)
    layer_plan = LayerPlan(settings.of_layer(0), settings, DIM**-0.5)
    layer = Layer(layer_plan, POOL // page_size, page_size, "NHD", device)
    assert layer.summary is not None
    q = torch.zeros(requests, HEADS, DIM, device=device)
    out = torch.full_like(q, float("nan"))

    def plan(host_starts: list[int]) -> Step:
        return planner.plan(
            query_starts=starts,
            seq_lens=seq_lens,
            page_table=page_table,
            host_starts=host_starts,
            host_seq_lens=None,
            max_seq_len=LONGEST,
        )

    captured = plan(list(range(requests + 1)))
    graph = None
    if device == "cuda":
        layer.plan.run(q, layer.k, layer.v, captured, layer.summary, out)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.plan.run(q, layer.k, layer.v, captured, layer.summary, out)
    starts[len(batch.q_lens) :] = len(batch.q_lens)  # two requests of padding
    seq_lens[:] = torch.tensor([*batch.seq_lens, 0, 0], dtype=torch.int32)
    page_table[:-2] = batch.page_table.to(device)
    plan(starts.tolist())
    for b, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        place = torch.arange(len(k))
        slots = batch.page_table[b, place // page_size] * page_size + place % page_size
        write_slots(k.to(device), v.to(device), layer.k, layer.v, slots.to(device))
    layer.summary.k_mean.fill_(float("nan"))
    q[:-2], q[-2:] = exact.q.to(device), float("nan")
    if graph is None:
        layer.plan.run(q, layer.k, layer.v, captured, layer.summary, out)
    else:
        graph.replay()
    assert_tables_of_its_own(exact, settings.dense, settings, out[: len(exact.q)].cpu())
    made = {int(page) for page in (~layer.summary.k_mean.isnan()).flatten(1).all(1).nonzero()[:, 0]}
    filled = {b: n // page_size - 1 for b, n in enumerate(batch.seq_lens) if n % page_size == 0}
    assert made == {int(batch.page_table[b, n]) for b, n in filled.items()}, "means of the pages that the step fills"


# ---- the cache ----


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_write_slots_skips_what_is_not_kept(layout: str) -> None:
    layer = Layer(LayerPlan(Dense(**SIZES), TRACES["dense"], 1.0), 3, 16, layout)
    key, value = torch.randn(5, KV_HEADS, DIM), torch.randn(5, KV_HEADS, DIM)
    write_slots(key, value, layer.k, layer.v, torch.tensor([33, -1, 0, -1]))
    for cache, new in ((layer.k, key), (layer.v, value)):
        assert torch.equal(cache[2, 1], new[0])
        assert torch.equal(cache[0, 0], new[2])
        assert int(cache.isnan().sum()) == cache.numel() - 2 * KV_HEADS * DIM


def test_a_page_table_that_is_too_narrow_is_refused() -> None:
    planner = new_planner(TRACES["dense"], 64)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table: expected at least 7 pages for 448 tokens, got 6"):
        planner.plan(
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=one,
            page_table=torch.zeros(1, 6, dtype=torch.int32),
            host_starts=[0, 1],
            host_seq_lens=[1],
            max_seq_len=1,
        )
