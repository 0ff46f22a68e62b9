"""SGLang's layers, pools and batches through random steps: every request gets what it would get alone."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; tests/sglang/run installs what these tests need")

from tests.sglang.layers import (  # noqa: I001
    DIM,
    HEADS,
    KV_HEADS,
    Rows,
    chunks_first,
    forward_batch,
    make_layer,
    make_pool,
    make_runner,
    new_backend,
    new_tokens,
    run_layer,
)

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from compactattn import Dense, FlashPrefill, KVSummary, XAttention
from compactattn.settings import Settings, load_settings, save_settings
from tests.serving import FLASH, Batch, Scheduler, make_step, random_requests
from tests.strategies import Step
from tests.test_engine_steps import assert_corrected, assert_means, assert_tables_of_its_own

LONGEST, POOL = 448, 1000
DENSE = {"selector": "dense", "block_size": 64, "query_block": 64}
EVENTS = ("pages shared", "pages evicted and filled anew", "requests preempted", "pages filled by decoding")


def new_scheduler(seed: int, page_size: int) -> Scheduler:
    pages = POOL // page_size
    scheduler = Scheduler(seed, pages=pages, page_size=page_size, budget=200, max_requests=12, longest=LONGEST)
    random_requests(scheduler, 9, 380, output=50)
    return scheduler


def exact_step(batch: Batch, page_size: int) -> Step:
    return make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)


def decodes_beside(runner: Any) -> HybridAttnBackend:
    """SGLang's own pair: compactattn for chunks, SGLang's plain PyTorch backend for decode steps."""
    halves = {"prefill_backend": new_backend(runner), "decode_backend": TorchNativeAttnBackend(runner)}
    with pytest.MonkeyPatch.context() as patch:
        nothing = type("Speculation", (), {"speculative_attention_mode": "prefill"})
        patch.setattr("sglang.srt.layers.attention.hybrid_attn_backend.get_spec", lambda: nothing)
        return HybridAttnBackend(runner, **halves)


@pytest.mark.parametrize(
    ("options", "page_size", "layout", "seed", "split"),
    [
        (FLASH, 16, "nhd", 6, False),
        (FLASH | {"heads_per_group": 2, "query_blocks_per_span": None}, 64, "hnd", 55, False),
        (FLASH | {"correction": True}, 64, "nhd", 52, False),
        (DENSE, 32, "hnd", 55, False),
        (FLASH, 32, "nhd", 55, True),
    ],
    ids=["flashprefill", "shared", "correction", "dense", "another-decodes"],
)
def test_every_request_gets_what_it_gets_alone(
    options: dict[str, Any], page_size: int, layout: str, seed: int, split: bool
) -> None:
    """Through shared, evicted and refilled pages, and pages that decode steps fill: attention under the tables that a
    request has in a cache of its own, and the means of what its pages hold."""
    layer = make_layer()
    runner = make_runner(options, pool=make_pool(POOL // page_size, page_size, layout), layers=[layer])
    if split:
        runner.decode_attention_backend_str = "torch_native"
    backend = decodes_beside(runner) if split else new_backend(runner)
    ours = backend.prefill_backend if split else backend
    kept = ours._summaries[0]
    assert (kept is not None) == (not split and options != DENSE)
    settings, rows, seen = ours._settings, Rows(runner.req_to_token_pool, page_size), Counter[str]()
    selector, scheduler = settings.of_layer(0), new_scheduler(seed, page_size)
    steps = left_out = 0
    while scheduler.busy:
        batch = chunks_first(scheduler.schedule())
        rows.keep(scheduler.running)
        made = forward_batch(batch, rows.write(batch), padding=steps % 3 if max(batch.q_lens) > 1 else 0)
        if steps % 2:
            made.global_num_token_non_padded_cpu = None  # so that the backend sees the padding, not the layer alone
        exact = exact_step(batch, page_size)
        new = (new_tokens(batch, exact.keys), new_tokens(batch, exact.values))
        out = run_layer(backend, layer, made, exact.q, *new, seen)
        if kept is not None:
            assert_means(kept, batch, exact, page_size, settings.correction)
        if settings.correction:
            assert_corrected(exact, selector, out)  # type: ignore[arg-type]
        elif len(out) >= 24 or steps % 6 == 0:
            left_out += assert_tables_of_its_own(exact, selector, settings, out)
        scheduler.commit(batch)
        steps += 1
    assert (left_out > 0) == (options != DENSE and not settings.correction)
    missing = [event for event in EVENTS if not scheduler.seen[event]]
    assert not missing
    assert min(seen[name] for name in ("EXTEND", "MIXED", "DECODE")) > 0, seen


def test_a_captured_decode_step_sees_later_requests() -> None:
    """What a captured graph reads lies in buffers that every later plan brings up to date; here its plan is run."""
    page_size, layer = 32, make_layer()
    runner = make_runner(FLASH, pool=make_pool(POOL // page_size, page_size), layers=[layer])
    backend, rows, seen = new_backend(runner), Rows(runner.req_to_token_pool, page_size), Counter[str]()
    backend.init_cuda_graph_state(16, 16)  # more than the pool has rows
    captured_size = 6
    dummy = Batch([], [1] * captured_size, [2] * captured_size, torch.zeros(0), torch.zeros(captured_size).long())
    view = forward_batch(dummy, torch.zeros(captured_size, dtype=torch.int64))
    view.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value())
    backend.init_forward_metadata_out_graph(view, in_capture=True)
    captured = backend.forward_metadata
    scheduler, replayed = new_scheduler(3, page_size), 0
    while scheduler.busy and replayed < 5:
        batch = chunks_first(scheduler.schedule())
        rows.keep(scheduler.running)
        made, exact = forward_batch(batch, rows.write(batch)), exact_step(batch, page_size)
        new = (new_tokens(batch, exact.keys), new_tokens(batch, exact.values))
        requests = len(batch.q_lens)
        if made.forward_mode != ForwardMode.DECODE or requests > captured_size:
            run_layer(backend, layer, made, exact.q, *new, seen)
        else:  # padded as DecodeCudaGraphRunner does: row 0 of the pool, slot 0, the fill value
            extra = captured_size - requests
            view.req_pool_indices = torch.nn.functional.pad(made.req_pool_indices, (0, extra))
            view.seq_lens = torch.nn.functional.pad(made.seq_lens, (0, extra), value=1)
            view.out_cache_loc = torch.nn.functional.pad(made.out_cache_loc, (0, extra))
            backend.init_forward_metadata_out_graph(view)
            backend.forward_metadata = captured
            q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, extra)) for x in (exact.q, *new))
            with forward_context(ForwardContext(attn_backend=backend)):
                out = layer(q.flatten(1), k, v, view).view(captured_size, HEADS, DIM)[:requests]
            settings = backend._settings
            assert_tables_of_its_own(exact, settings.dense, settings, out)
            kept = backend._summaries[0]
            assert isinstance(kept, KVSummary)
            assert_means(kept, batch, exact, page_size, values=False)
            replayed += 1
        scheduler.commit(batch)
    assert replayed == 5


@pytest.mark.parametrize("split", [False, True], ids=["both", "another-decodes"])
def test_a_request_that_extends_pages_that_decoding_filled_sees_them(split: bool) -> None:
    """From one request to the next, by way of the prefix cache: the means of pages that only decode steps have filled
    are what the pages hold, or are made anew where another backend decodes."""
    page_size, layer = 16, make_layer()
    runner = make_runner(FLASH, pool=make_pool(90, page_size), layers=[layer])
    if split:
        runner.decode_attention_backend_str = "torch_native"
    backend = decodes_beside(runner) if split else new_backend(runner)
    ours = backend.prefill_backend if split else backend
    kept, rows, seen = ours._summaries[0], Rows(runner.req_to_token_pool, page_size), Counter[str]()
    assert (kept is None) == split
    if kept is not None:
        kept.k_mean.fill_(float("nan"))
    scheduler = Scheduler(0, pages=90, page_size=page_size, budget=400, max_requests=2, longest=LONGEST)
    prompt = [scheduler.random.randrange(9) for _ in range(70)]
    scheduler.add(list(prompt), 200)
    (first,) = scheduler.waiting
    left_out = 0
    for turn in range(2):
        while scheduler.busy:
            batch = chunks_first(scheduler.schedule())
            rows.keep(scheduler.running)
            if turn == 1:
                assert batch.seq_lens[0] - batch.q_lens[0] > 250, "the second finds what the first said"
            made, exact = forward_batch(batch, rows.write(batch)), exact_step(batch, page_size)
            new = (new_tokens(batch, exact.keys), new_tokens(batch, exact.values))
            out = run_layer(backend, layer, made, exact.q, *new, seen)
            if kept is not None and batch.seq_lens[0] % page_size < 2:
                assert_means(kept, batch, exact, page_size, values=False)
            if len(out) > 1:
                left_out += assert_tables_of_its_own(exact, ours._settings.of_layer(0), ours._settings, out)
            scheduler.commit(batch)
        if turn == 0:
            scheduler.add([*first.tokens, *prompt, *prompt], 1)
    assert left_out > 0


def test_a_fused_write_before_the_layer_is_not_repeated() -> None:
    page_size, layer = 16, make_layer()
    runner = make_runner(FLASH, pool=make_pool(30, page_size), layers=[layer])
    backend, rows = new_backend(runner), Rows(runner.req_to_token_pool, page_size)
    scheduler = Scheduler(1, pages=30, page_size=page_size, budget=300, max_requests=1, longest=LONGEST)
    scheduler.add([scheduler.random.randrange(9) for _ in range(260)], 1)
    batch = scheduler.schedule()
    made, exact = forward_batch(batch, rows.write(batch)), exact_step(batch, page_size)
    k, v = new_tokens(batch, exact.keys), new_tokens(batch, exact.values)
    runner.token_to_kv_pool.set_kv_buffer(layer, made.out_cache_loc, k, v)
    wrong = torch.full_like(k, float("nan"))
    with forward_context(ForwardContext(attn_backend=backend)):
        backend.init_forward_metadata(made)
        out = layer(exact.q.flatten(1), wrong, wrong, made, save_kv_cache=False)
    assert_tables_of_its_own(exact, backend._settings.of_layer(0), backend._settings, out.view(-1, HEADS, DIM))


def test_each_layer_has_its_own_pages_and_the_selector_of_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "settings.json")
    sizes = {"block_size": 64, "query_block": 64, "dense_keys": 96}
    selectors = {0: FlashPrefill(0.4, **sizes), 1: FlashPrefill(0.1, **sizes), 3: XAttention(0.5, **sizes)}
    save_settings(path, Settings(selector=selectors, heads_per_group=2, query_blocks_per_span=None))
    layers = [make_layer(number, scaling=0.1 + number) for number in (0, 1, 2, 3)]
    runner = make_runner({"settings": path, "dense_layers": 1}, layers=layers)
    backend = new_backend(runner)
    held, dense = load_settings(path)["selector"], Dense(**sizes)
    assert [backend._plans[n].selector for n in range(4)] == [dense, held[1], dense, held[3]]
    assert [backend._plans[n].scale for n in range(4)] == [0.1, 1.1, 2.1, 3.1]
    means = [backend._summaries[n] is not None for n in range(4)]
    assert means == [False, True, False, False], "FlashPrefill's alone"
    for n in range(4):
        k, v = backend._pages(n)
        assert k.data_ptr() == runner.token_to_kv_pool.k_buffer[n].data_ptr()
        assert v.data_ptr() == runner.token_to_kv_pool.v_buffer[n].data_ptr()


def test_an_idle_step_needs_nothing() -> None:
    layer = make_layer()
    backend = new_backend(make_runner(layers=[layer]))
    idle = forward_batch(Batch([], [1], [2], torch.zeros(0), torch.zeros(1).long()), torch.zeros(1).long())
    idle.forward_mode = ForwardMode.IDLE
    backend.init_forward_metadata(idle)
    assert backend.forward_metadata is None
    with forward_context(ForwardContext(attn_backend=backend)):
        assert layer(torch.zeros(0, HEADS * DIM), None, None, idle).shape == (0, HEADS * DIM)
