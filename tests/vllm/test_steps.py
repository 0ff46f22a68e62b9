"""vLLM's layers, builder and caches through random steps: every request gets what it would get alone."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; tests/vllm/run installs what these tests need")

from tests.vllm.layers import DIM, HEADS, KV_HEADS, make_builder, make_config, make_layer, metadata, new_cache  # noqa: I001

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_layout import KVCacheLayout

from compactattn import Dense, FlashPrefill, XAttention
from compactattn.integrations.vllm import settings_of
from compactattn.settings import Settings, load_settings, save_settings
from tests.serving import FLASH, Batch, Scheduler, make_step, random_requests
from tests.test_engine_steps import assert_tables_of_its_own

LONGEST, POOL = 448, 1000


def run_layer(layer: Attention, batch: Batch, keys: list[Tensor], values: list[Tensor], q: Tensor, step: Any) -> Tensor:
    """As vLLM calls a layer: the cache's update, then the attention, with rows of padding at the end."""
    new = []
    for per_request in (keys, values):
        rows = [x[n - q_len :] for x, q_len, n in zip(per_request, batch.q_lens, batch.seq_lens, strict=True)]
        new.append(torch.cat([*rows, torch.ones(2, KV_HEADS, DIM)]))
    slots = torch.cat([batch.slots, torch.full((2,), -1)])
    layer.impl.do_kv_cache_update(layer, *new, layer.kv_cache, slots)
    out = torch.full((len(q) + 2, HEADS, DIM), float("nan"))
    queries = torch.cat([q, torch.full((2, HEADS, DIM), float("nan"))])
    assert layer.impl.forward(layer, queries, *new, layer.kv_cache, step, out) is out
    assert out[len(q) :].isnan().all()
    return out[: len(q)]


def drafting(config: VllmConfig, tokens: int) -> VllmConfig:
    """The configuration with so many speculative tokens, as far as a builder looks."""

    class Speculation:
        num_speculative_tokens, parallel_drafting = tokens, False

    config.speculative_config = Speculation()
    return config


@pytest.mark.parametrize(
    ("options", "page_size", "layout", "drafts", "seed"),
    [
        (FLASH, 16, "LBNHC", 0, 6),
        (FLASH | {"heads_per_group": 2, "query_blocks_per_span": None}, 64, "LHBNC", 3, 10),
        ({"selector": "dense"} | {name: FLASH[name] for name in ("block_size", "query_block")}, 32, "BLHNC", 2, 55),
    ],
    ids=["flashprefill", "shared-drafts", "dense-drafts"],
)
def test_every_request_gets_what_it_gets_alone(
    options: dict[str, Any], page_size: int, layout: str, drafts: int, seed: int
) -> None:
    config = make_config(options, block_size=page_size)
    layer = make_layer(config)
    layer.kv_cache = new_cache(POOL // page_size, page_size, KVCacheLayout[layout])
    builder = make_builder(drafting(config, drafts) if drafts else config, [layer], page_size)
    assert builder.reorder_batch_threshold == 1 + drafts
    settings = settings_of(config)
    selector = replace(settings.of_layer(0), dense_queries=1 + drafts)
    scheduler = Scheduler(
        seed, pages=POOL // page_size, page_size=page_size, budget=200, max_requests=12, longest=1024, drafts=drafts
    )
    random_requests(scheduler, 9, 380, output=50)
    steps = left_out = 0
    while scheduler.busy:
        batch = scheduler.schedule()
        bounds = [None, batch.seq_lens, [n + 60 for n in batch.seq_lens]][steps % 3]
        step = builder.build(0, metadata(batch, padding=steps % 2, bounds=bounds))
        exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=page_size, block_size=64)
        out = run_layer(layer, batch, exact.keys, exact.values, exact.q, step)
        if len(out) >= 24 or steps % 6 == 0:
            left_out += assert_tables_of_its_own(exact, selector, settings, out)
        scheduler.commit(batch)
        steps += 1
    assert (left_out > 0) == (options.get("selector") != "dense")
    for event in ("pages shared", "pages evicted and filled anew", "requests preempted", "pages filled by decoding"):
        assert scheduler.seen[event], event


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_every_physical_layout_holds_the_same_cache(layout: KVCacheLayout) -> None:
    config = make_config(FLASH)
    layer = make_layer(config)
    layer.kv_cache = new_cache(30, 16, layout)
    builder = make_builder(config, [layer], 16)
    scheduler = Scheduler(1, pages=30, page_size=16, budget=150, max_requests=2, longest=1024)
    scheduler.add([scheduler.random.randrange(9) for _ in range(260)], 1)
    while scheduler.busy:
        batch = scheduler.schedule()
        step = builder.build(0, metadata(batch))
        exact = make_step(batch, kv_heads=KV_HEADS, heads=HEADS, dim=DIM, page_size=16, block_size=64)
        out = run_layer(layer, batch, exact.keys, exact.values, exact.q, step)
        assert_tables_of_its_own(exact, settings_of(config).of_layer(0), settings_of(config), out)
        scheduler.commit(batch)
    taken = layer.kv_cache.isfinite().flatten(1).any(1).nonzero()[:, 0].tolist()
    assert taken == sorted(set(batch.page_table[0, :17].tolist()))


def test_a_run_without_metadata_is_a_profiling_run() -> None:
    layer = make_layer(make_config())
    out = torch.full((5, HEADS, DIM), float("nan"))
    q = torch.ones(5, HEADS, DIM)
    assert layer.impl.forward(layer, q, q, q, layer.kv_cache, None, out) is out
    assert not out.any()
    with pytest.raises(ValueError, match="output_scale: expected none"):
        layer.impl.forward(layer, q, q, q, layer.kv_cache, None, out, torch.ones(1))


def test_each_layer_has_the_selector_of_the_file_and_a_drafts_layers_are_dense(tmp_path: Path) -> None:
    path = str(tmp_path / "settings.json")
    sizes = {"block_size": 64, "query_block": 64, "dense_keys": 96}
    selectors = {0: FlashPrefill(0.4, **sizes), 1: FlashPrefill(0.1, **sizes), 3: XAttention(0.5, **sizes)}
    save_settings(path, Settings(selector=selectors, heads_per_group=2, query_blocks_per_span=None))
    config = make_config({"settings": path, "dense_layers": 1})
    layers = [make_layer(config, number) for number in (0, 1, 2, 3, 6)]
    for layer in layers:
        layer.kv_cache = new_cache(4, 16, KVCacheLayout.LBNHC)
    layers.append(make_layer(config, 1))
    layers[-1].is_draft_layer, layers[-1].kv_cache = True, new_cache(4, 16, KVCacheLayout.LBNHC)
    scheduler = Scheduler(0, pages=4, page_size=16, budget=20, max_requests=1, longest=1024)
    scheduler.add([1] * 20, 1)
    make_builder(config, layers, 16).build(0, metadata(scheduler.schedule()))
    held, dense = load_settings(path)["selector"], Dense(**sizes)
    plans = [layer.impl._plan for layer in layers]
    assert [plan.selector for plan in plans] == [dense, held[1], dense, held[3], dense, dense]
    assert {(plan.settings.heads_per_group, plan.settings.query_blocks_per_span) for plan in plans} == {(2, None)}
    has_means = [layer.impl._summaries[layer.kv_cache] is not None for layer in layers]
    assert has_means == [False, True, False, False, False, False], "FlashPrefill's alone"


def test_means_stay_with_their_cache_and_go_with_it() -> None:
    """A second builder (microbatches have one each) finds them; a cache of vLLM's profiling is not kept alive."""
    import gc
    import weakref

    config = make_config(FLASH)
    layer = make_layer(config)
    layer.kv_cache = new_cache(4, 16, KVCacheLayout.LBNHC)
    scheduler = Scheduler(0, pages=4, page_size=16, budget=20, max_requests=1, longest=1024)
    scheduler.add([1] * 20, 1)
    common = metadata(scheduler.schedule())
    make_builder(config, [layer], 16).build(0, common)
    kept = layer.impl._summaries[layer.kv_cache]
    builder = make_builder(config, [layer], 16)
    builder.build(0, common)
    assert layer.impl._summaries[layer.kv_cache] is kept
    means, cache = weakref.ref(kept.k_mean), weakref.ref(layer.kv_cache)
    layer.kv_cache = new_cache(4, 16, KVCacheLayout.LBNHC)
    del kept
    gc.collect()
    assert cache() is None
    assert means() is None
    builder.build(0, common)
    assert layer.impl.is_bound(layer.kv_cache)
