"""Stages under torch.compile: operators that keep their word, graphs without breaks, the bits of eager calls."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import compactattn
from compactattn import (
    BlockTable,
    Dense,
    DensityCounters,
    FlashPrefill,
    KeyBounds,
    KVSummary,
    Oracle,
    PagedKV,
    PrefillBatch,
    SeerGate,
    XAttention,
    operators,
)
from compactattn.validation import check_device
from tests.strategies import gate_weights

RULES: dict[str, Any] = {"block_size": 64, "query_block": 64, "sink_blocks": 0, "window_blocks": 0}
FLASH = FlashPrefill(alpha=0.7, dense_last_blocks=1, **RULES)
GATE = SeerGate(gate_weights(4, 64, 0), 10_000.0 ** -torch.linspace(0, 1, 32), threshold=0.1, **RULES)
BOUNDS = KeyBounds(threshold=0.3, **RULES)
SELECTORS = (
    FLASH,
    BOUNDS,
    XAttention(threshold=0.6, stride=8, **RULES),
    Oracle(mass=0.6, **RULES),
    Oracle(top_k=2, **RULES),
    GATE,
    Dense(block_size=64, query_block=64),
)
PAGES = 40


def make_step(q_lens: list[int], seq_lens: list[int], fp8: bool = False) -> tuple[Tensor, PagedKV, PrefillBatch]:
    """Queries, a cache and lengths; 2 requests at most, 4 query heads, 2 KV heads, pages of 16."""
    generator = torch.Generator().manual_seed(sum(seq_lens))
    k, v = torch.randn(2, PAGES, 16, 2, 64, generator=generator).half()
    table = torch.randperm(PAGES, generator=generator).int().view(2, -1)[: len(q_lens)]
    scales = (torch.tensor([0.5, 2.0]), torch.tensor([1.5, 1.0])) if fp8 else ()
    kv = PagedKV(*((k, v) if not fp8 else (k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn))), table, *scales)
    batch = PrefillBatch.from_lens(q_lens, seq_lens, prompt_lens=[n + 7 * i for i, n in enumerate(seq_lens)])
    return torch.randn(sum(q_lens), 4, 64, generator=generator).half(), kv, batch


LENGTHS = (([70, 3], [200, 150]), ([65, 1], [190, 100]), ([130, 0], [310, 100]), ([2, 8], [311, 64]))


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor in a result of stages; tails of tables, which are unspecified, cut off."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, BlockTable):
        valid = torch.arange(result.indices.shape[1]) < result.counts[:, None]
        return [result.indices.where(valid, -1), result.counts, result.rows]
    if not isinstance(result, (tuple, list)):
        result = list(vars(result).values())
    return [t for part in result if not isinstance(part, (int, float, str, type(None))) for t in tensors_of(part)]


def same(one: Any, other: Any) -> bool:
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# ---- operators ----


def calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Calls of every operator: ragged batches, with and without what is optional. id: (operator, stage arguments).

    No FP8: opcheck compares tensors with arithmetic that PyTorch does not have for it.
    """
    q, kv, batch = make_step(*LENGTHS[0])
    step: dict[str, Any] = {"q": q, "kv": kv, "batch": batch}
    plain: dict[str, Any] = {"scale": None, "backend": None}
    fine, coarse = ({"heads_per_group": h, "query_blocks_per_span": s} for h, s in ((1, 1), (2, None)))
    chosen = {"heads_per_group": "auto", "query_blocks_per_span": "auto"}
    means = compactattn.summarize(kv, batch, block_size=64, values=True)
    gate = compactattn.summarize(kv, batch, block_size=64, gate=GATE)
    bounds = compactattn.summarize(kv, batch, block_size=64, bounds=True)
    selection = compactattn.select(q, kv, batch, FLASH)
    groups = compactattn.unite(selection, batch, heads_per_group=2)
    table = compactattn.build_table(groups)
    counter = DensityCounters.zeros(2).of_layer(1)
    none: dict[str, Any] = {"softcap": None, "window": None, "sinks": None}
    model: dict[str, Any] = {"softcap": 5.0, "window": 70, "sinks": torch.randn(4)}
    out = {"return_lse": True, "out": torch.zeros_like(q)}
    alone = {"return_lse": False, "out": torch.zeros_like(q)}
    states = {"out_a": q, "lse_a": q[..., 0].float(), "out_b": q.flip(0), "lse_b": q[..., 1].float(), "backend": None}
    cache: dict[str, Any] = {"kv": kv, "batch": batch, "block_size": 64, "values": False, "backend": None}
    return {
        "summarize": ("summarize", cache | {"since": None, "summary": means}),
        "summarize-since": ("summarize", cache | {"since": torch.tensor([5, 9], dtype=torch.int32), "summary": gate}),
        "select": ("select", step | plain | {"selector": FLASH, "summary": None}),
        "summarize-bounds": ("summarize", cache | {"since": None, "summary": bounds}),
        "select-bounds": ("select", step | plain | {"selector": BOUNDS, "summary": bounds}),
        "select-gate": ("select", step | plain | {"selector": GATE, "summary": gate}),
        "unite": ("unite", {"selection": selection, "batch": batch, "backend": None} | coarse),
        "unite-auto": ("unite", {"selection": selection, "batch": batch, "backend": None} | chosen),
        "build_table": ("build_table", {"groups": groups, "backend": None}),
        "attend": ("attend", step | plain | {"table": table, "correction": None} | none | out),
        "attend-model": ("attend", step | plain | {"table": table, "correction": None} | model | alone),
        "attend-corrected": ("attend", step | plain | {"table": table, "correction": means} | none | out),
        "prefill": (
            "prefill",
            step
            | plain
            | {"selector": FLASH, "summary": None, "correction": False, "density": None}
            | fine
            | none
            | alone,
        ),
        "prefill-all": (
            "prefill",
            step
            | plain
            | {"selector": FLASH, "summary": means, "correction": False, "density": counter}
            | chosen
            | model
            | out,
        ),
        "select_table": ("select_table", step | plain | {"selector": FLASH, "summary": means} | coarse),
        "select_table-auto": (
            "select_table",
            step | plain | {"selector": Dense(block_size=64), "summary": None} | chosen,
        ),
        "merge_attn_states": ("merge_attn_states", states | {"out": torch.zeros_like(q)}),
        "count_density": (
            "count_density",
            {"table": table, "batch": batch, "counter": counter, "window": 99, "backend": None},
        ),
    }


@pytest.mark.parametrize("case", calls())
def test_operators_keep_their_word(case: str) -> None:
    """Schema (what is written, what is aliased), fake tensors, tracing with symbolic shapes: `opcheck`."""
    name, arguments = calls()[case]
    torch.library.opcheck(getattr(torch.ops.compactattn, name).default, (), operators.apart(name, arguments))


def test_every_stage_has_an_operator() -> None:
    stages = {"summarize", "select", "unite", "build_table", "attend", "prefill", "select_table"}
    assert {name for name, _ in calls().values()} == stages | {"merge_attn_states", "count_density"}
    for name in stages:
        written = str(getattr(torch.ops.compactattn, name).default._schema)
        assert ("(z!) written" in written) == (name in ("attend", "prefill"))
        assert ("(a!)? k_mean" in written) == (name in ("summarize", "prefill", "select_table"))


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_selectors_survive(selector: Any) -> None:
    """Taken apart and put together, a selector is what it was."""
    part = operators._SELECTOR
    again = part.together(*(part.apart(selector)[name] for name in operators._names(part.schema)))
    assert type(again) is type(selector)
    assert all(
        a is b if isinstance(a, Tensor) else a == b
        for a, b in zip(vars(again).values(), vars(selector).values(), strict=True)
    )


# ---- graphs ----


def stages(q: Tensor, kv: PagedKV, batch: PrefillBatch, selector: Any) -> Any:
    """One stage after the other, records made and passed inside the graph."""
    gate = selector if isinstance(selector, SeerGate) else None
    wanted = {"values": True, "gate": gate, "bounds": isinstance(selector, KeyBounds)}
    summary = compactattn.summarize(kv, batch, block_size=selector.block_size, **wanted)
    selection = compactattn.select(q, kv, batch, selector, summary=summary)
    groups = compactattn.unite(selection, batch, heads_per_group=2)
    table = compactattn.build_table(groups)
    out, lse = compactattn.attend(q, kv, batch, table, softcap=20.0, window=70, return_lse=True)
    later = replace(batch, prompt_lens=None)
    rest = compactattn.attend(q, kv, later, table, correction=summary, return_lse=True)
    return compactattn.merge_attn_states(out * 2, lse, *rest), table, summary, selection, groups


def fused(q: Tensor, kv: PagedKV, batch: PrefillBatch, selector: Any) -> Any:
    """The whole step, with a summary, counters and an output that exist before."""
    summary = compactattn.summarize(kv, batch, block_size=selector.block_size, since=0)
    counters, out = DensityCounters.zeros(2), torch.zeros_like(q)
    how: dict[str, Any] = {"selector": selector, "summary": summary, "heads_per_group": "auto"}
    alone = compactattn.prefill(q + 0, kv, batch, density=counters.of_layer(1), sinks=q[0, :, 0].float(), **how)
    result = compactattn.prefill(q, kv, batch, query_blocks_per_span=1, out=out, return_lse=True, **how)
    table = compactattn.select_table(q, kv, batch, selector=selector, heads_per_group=2, query_blocks_per_span=1)
    compactattn.count_density(table, batch, counters.of_layer(0), window=80)
    return alone, result, out, table, counters, summary


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda function, backend="aot_eager": torch.compile(function, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("function", [stages, fused], ids=lambda f: f.__name__)
def test_one_graph_serves_any_length(compiled: Any, function: Callable[..., Any]) -> None:
    """Ragged batches give the bits of eager calls, and soon none makes a graph.

    There is a first one, one for any length, and one for chunks of a single query block: PyTorch sets sizes of 1 apart.
    """
    run = compiled(function)
    made = []
    for lens in (*LENGTHS, ([100, 2], [250, 90]), ([7, 9], [66, 300])):
        step = make_step(*lens)
        assert same(run(*step, FLASH), function(*step, FLASH)), lens
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[3:] == [made[3]] * 3
    assert made[3] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_gate_in_a_graph(compiled: Any) -> None:
    """Selectors are constants of a graph; the tensors of this one are its inputs."""
    step = make_step(*LENGTHS[0])
    assert same(compiled(stages)(*step, GATE), stages(*step, GATE))


def test_inductor(compiled: Any) -> None:
    """The backend of `torch.compile` without arguments."""

    def prefill(q: Tensor, kv: PagedKV, batch: PrefillBatch) -> Any:
        return compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=2, window=100, return_lse=True)

    step = make_step(*LENGTHS[0], fp8=True)
    assert same(compiled(prefill, backend="inductor")(*step), prefill(*step))


def test_writes_are_seen_outside(compiled: Any) -> None:
    """A summary, counters and an output that were there before hold what an eager call would leave in them."""
    q, kv, batch = make_step(*LENGTHS[0])
    lefts = []
    for wrap in (lambda f: f, compiled):

        def step(summary: KVSummary, counter: Tensor, out: Tensor) -> Tensor:
            how: dict[str, Any] = {"selector": FLASH, "heads_per_group": 2, "summary": summary}
            return compactattn.prefill(q, kv, batch, density=counter, out=out, **how)

        summary = compactattn.summarize(kv, batch, block_size=64)
        summary.k_mean.fill_(math.nan)
        compactattn.summarize(kv, batch, block_size=64, since=0, summary=summary)
        counters, out = DensityCounters.zeros(2), torch.full_like(q, math.nan)
        assert wrap(step)(summary, counters.of_layer(1), out) is out
        lefts.append([summary.k_mean.nan_to_num(7.0), counters.counts, out])
    assert same(*lefts)


def test_an_output_with_gaps(compiled: Any) -> None:
    """A view made inside the graph, or handed to it, is written to in place."""
    q, kv, batch = make_step(*LENGTHS[0])
    expected = compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=2)
    heads = q.shape[1]

    def inside(wide: Tensor) -> Tensor:
        return compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=2, out=wide[:, 1 : 1 + heads])

    def given(out: Tensor) -> Tensor:
        return compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=2, out=out)

    for step, view in ((inside, lambda wide: wide), (given, lambda wide: wide[:, 1 : 1 + heads])):
        wide = torch.full((len(q), heads + 2, q.shape[2]), 7.0, dtype=q.dtype)
        assert torch.equal(compiled(step)(view(wide)), expected)
        assert torch.equal(wide[:, 1 : 1 + heads], expected)
        assert bool((wide[:, 0] == 7.0).all())
        assert bool((wide[:, -1] == 7.0).all())


def test_merging_into_an_input(compiled: Any) -> None:
    q = make_step(*LENGTHS[0])[0]
    states = [q, q[..., 0].float(), q.flip(0), q[..., 1].float()]
    expected = compactattn.merge_attn_states(*states)
    mine = [t.clone() for t in states]
    out, lse = compiled(lambda a, b, c, d: compactattn.merge_attn_states(a, b, c, d, out=a))(*mine)
    assert same((out, lse), expected)
    assert torch.equal(mine[0], expected[0])


def test_what_is_wrong_is_said_as_always(compiled: Any) -> None:
    """A graph that runs refuses in the words of an eager call."""
    q, kv, batch = make_step(*LENGTHS[0])

    def prefill(heads: int, q: Tensor) -> Any:
        return compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=heads)

    for heads, queries in ((3, q), (1, q[:9])):
        with pytest.raises(ValueError, match="expected") as eager:
            prefill(heads, queries)
        with pytest.raises(ValueError, match=re.escape(str(eager.value))):
            compiled(prefill)(heads, queries)


def test_gradients_are_refused(compiled: Any) -> None:
    q, kv, batch = make_step(*LENGTHS[0])

    def prefill(q: Tensor) -> Any:
        return compactattn.prefill(q, kv, batch, selector=FLASH, heads_per_group=1)

    with pytest.raises(Exception, match="without gradients"):
        compiled(prefill)(q.requires_grad_())
    with torch.no_grad():
        assert same(compiled(prefill)(q), prefill(q))


def test_eager_calls_meet_no_operator() -> None:
    """What an eager call pays for all this is one flag."""
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    step = make_step(*LENGTHS[0])
    with Names():
        stages(*step, FLASH)
        fused(*step, FLASH)
    assert seen
    assert not [name for name in seen if "compactattn" in name]


def test_the_benchmark_of_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls pay for the flag alone, far under the goal."""
    from benchmarks import operator_cost

    monkeypatch.setattr(operator_cost, "ROUNDS", 2)
    result = operator_cost.measured("cpu", 20)
    assert set(result["stages"]) == {name for name, _ in calls().values()}
    assert 0 < result["eager_adds_us"] < result["goal_us"] == 6.0


def test_what_makes_records_runs_inside_graphs() -> None:
    """`from_lens` and counters of nothing; a graph that is being made cannot ask how many GPUs there are."""

    def step(lens: Tensor, q_len: int) -> tuple[Tensor, Tensor, str]:
        batch = PrefillBatch.from_lens([q_len, 1], [q_len + 3, 5], device=lens.device)
        counters = DensityCounters.zeros(2, device=lens.device)
        return batch.seq_lens + lens, counters.counts, str(check_device("device", "cuda:0"))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for q_len in (3, 4, 5):
        lens, counts, device = compiled(torch.zeros(2, dtype=torch.int32), q_len)
        assert (lens.tolist(), counts.tolist(), device) == ([q_len + 3, 5], [[0, 0]] * 2, "cuda:0")
