"""Bad input (SPEC section 4): a ValueError names the argument, what was expected and what came, before anything runs.

One argument at a time spoils a valid step: 2 requests, past 195 and 37, 2 query heads, 1 KV head, Qb 1, Kb 4.
`out` and `summary` hold a sentinel that a refusal must leave.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compactattn
from compactattn import DensityCounters, check, grouping_of
from compactattn.data import BlockTable, GroupMask, KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.dispatch import resolve_backend
from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, XAttention
from tests.strategies import WILD, poison_tails

SELECTORS = (FlashPrefill, KeyBounds, XAttention, Oracle, Dense)
STAGES = ("summarize", "select", "unite", "build_table", "attend", "prefill", "select_table")
Q_STAGES = ("select", "attend", "prefill", "select_table")
KV_STAGES = ("summarize", *Q_STAGES)
FUSED = ("prefill", "select_table")
GROUPING_STAGES = ("unite", "prefill", "select_table")
SUMMARY_STAGES = ("summarize", "select", "prefill", "select_table")
OUT_STAGES = ("attend", "prefill")
SENTINEL = 77.0
HALF, SINGLE = torch.float16, torch.float32


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def full(*shape: int, dtype: torch.dtype = SINGLE, device: str = "cpu") -> Tensor:
    return torch.full(shape, SENTINEL, dtype=dtype, device=device)


def zeros(*shape: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def make_batch(device: str = "cpu", **changes: Any) -> PrefillBatch:
    starts, seq_lens, prompts = (ints(*values, device=device) for values in ((0, 5, 8), (200, 40), (200, 40)))
    return replace(PrefillBatch(starts, seq_lens, 5, 200, prompts), **changes)


def make_kv(heads: int = 1, dim: int = 64, dtype: torch.dtype = SINGLE, device: str = "cpu", **changes: Any) -> PagedKV:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn((26, 16, heads, dim), generator=generator).to(device, dtype) for _ in "kv")
    table = torch.arange(26, dtype=torch.int32, device=device).reshape(2, 13)
    return replace(PagedKV(k, v, table), **changes)


def make_summary(device: str = "cpu", **changes: Any) -> KVSummary:
    return replace(KVSummary(*(full(26, 1, 1, 64, device=device) for _ in "kv"), unit=16), **changes)


def make_mask(device: str = "cpu", **changes: Any) -> SelectionMask:
    return replace(SelectionMask(zeros(2, 2, 1, 4, device=device).bool(), 64, 64), **changes)


def make_groups(device: str = "cpu", **changes: Any) -> GroupMask:
    return replace(GroupMask(zeros(2, 4, device=device).bool(), zeros(2, 2, 1, device=device), 64, 64), **changes)


def make_table(device: str = "cpu", **changes: Any) -> BlockTable:
    """Row 0 and row 1 for the heads of request 0, row 2 for request 1; canonical."""
    indices = torch.tensor([[0, 1, 3, 0], [3, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    rows = ints(0, 1, 2, 2, device=device).reshape(2, 2, 1)
    return replace(BlockTable(indices, ints(3, 1, 1, device=device), rows, 64, 64), **changes)


def make_arguments(device: str = "cpu") -> dict[str, Any]:
    """The arguments of every stage by name."""
    makers = (make_kv, make_batch, make_summary, make_groups, make_table)
    records = {make.__name__.removeprefix("make_"): make(device=device) for make in makers}
    numbers = {"block_size": 64, "heads_per_group": 1, "selector": FlashPrefill(block_size=64, query_block=64)}
    q, out = zeros(8, 2, 64, dtype=SINGLE, device=device), full(8, 2, 64, device=device)
    return {**records, **numbers, "selection": make_mask(device), "q": q, "out": out}


def case(name: str, make: Any, *message: str, marks: Any = ()) -> Any:
    """message: the argument, words of what was expected, what came."""
    return pytest.param(make, *message, id=name, marks=marks)


def on(stages: tuple[str, ...], name: str, changes: dict[str, Any], *message: str) -> list:
    """One case per stage."""
    return [pytest.param(stage, changes, *message, id=f"{stage}-{name}") for stage in stages]


@contextmanager
def refused(argument: str, expected: str, got: str) -> Iterator[None]:
    """The block raises a ValueError "<argument>: expected <..expected..>, got <got>"."""
    with pytest.raises(ValueError, match=r"^.+: expected .+, got .+") as refusal:
        yield
    name, _, rest = str(refusal.value).partition(": expected ")
    wanted, _, came = rest.rpartition(", got ")
    assert (name, came, expected in wanted) == (argument, got, True), str(refusal.value)


def call(stage: str, arguments: dict[str, Any], **changes: Any) -> Any:
    function, given = getattr(compactattn, stage), {**arguments, **changes}
    return function(**{name: given[name] for name in inspect.signature(function).parameters if name in given})


def assert_refused(stage: str, changes: dict[str, Any], *message: str) -> None:
    arguments = make_arguments()
    if isinstance(q := changes.get("q"), Tensor):  # `prefill` looks at `out` beside q before it looks at q
        arguments["out"] = full(*q.shape, dtype=q.dtype) if q.ndim == 3 and q.device.type == "cpu" else None
    with refused(*message):
        call(stage, arguments, **changes)
    summary = arguments["summary"]
    for untouched in (arguments["out"], summary.k_mean, summary.v_mean):
        assert untouched is None or bool((untouched == SENTINEL).all())


def test_the_valid_arguments_are_accepted() -> None:
    """Otherwise the refusals below prove nothing."""
    arguments = make_arguments()
    for stage in STAGES:
        call(stage, arguments)
    check(arguments["kv"], arguments["batch"], arguments["table"])


TENSORS = {
    make_batch: ("cu_seqlens_q", "seq_lens", "prompt_lens"),
    make_kv: ("k", "v", "page_table"),
    make_summary: ("k_mean", "v_mean"),
    make_mask: ("mask",),
    make_groups: ("keep", "rows"),
    make_table: ("indices", "counts", "rows"),
}
FAULTS: dict[str, Callable[[Tensor], tuple[Any, str, str]]] = {
    "type": lambda x: (x.tolist(), "a torch.Tensor", "list"),
    "dimensions": lambda x: (x[None], f"{x.ndim} dimensions", f"shape {(1, *x.shape)}"),
    "dtype": lambda x: (x.long(), "dtype ", "torch.int64"),
    "device": lambda x: (x.to("meta"), "device cpu", "meta"),
    "stride": lambda x: (spread(x), "a contiguous ", f"strides {spread(x).stride()}"),
}


def spread(x: Tensor) -> Tensor:
    """x with stride 2 in its last dimension."""
    return x.repeat_interleave(2, -1)[..., ::2]


def tensor_faults() -> Iterator[Any]:
    """Each fault in each tensor of each record; the first tensor of a record is the one that sets the device."""
    for make, fields in TENSORS.items():
        strided = make in (make_batch, make_kv, make_table)
        for name, kind in itertools.product(fields, FAULTS):
            if (kind != "stride" or strided) and (kind != "device" or name != fields[0]):
                yield pytest.param(make, name, kind, id=f"{make.__name__[5:]}-{name}-{kind}")


@pytest.mark.parametrize(("make", "name", "kind"), list(tensor_faults()))
def test_constructors_refuse_faulty_tensors(make: Callable[..., Any], name: str, kind: str) -> None:
    value, expected, got = FAULTS[kind](getattr(make(), name))
    with refused(name, expected, got):
        make(**{name: value})


FLOATS = "dtype float16, bfloat16 or float32"
CUDA, NO_CUDA = torch.device("cuda"), "'numba': the numba backend runs CPU tensors only"
lens = PrefillBatch.from_lens
pages = PagedKV.from_contiguous
NARROW, BENT = torch.zeros(1, 32, 1, 64), spread(torch.zeros(1, 32, 1, 64))
WIDE, ODD, EMPTY = torch.zeros(1, 32, 1, 80), torch.zeros(1, 48, 1, 64), torch.zeros(1, 0, 1, 64)
CONSTRUCTORS = [
    case("cu-short", lambda: make_batch(cu_seqlens_q=ints(0, 8)), "cu_seqlens_q", "shape (3,)", "(2,)"),
    case("prompt-shape", lambda: make_batch(prompt_lens=zeros(3)), "prompt_lens", "shape (2,)", "(3,)"),
    case("no-request", lambda: PrefillBatch(zeros(1), zeros(0), 0, 0), "seq_lens", "at least one request", "none"),
    case("max-seq-float", lambda: make_batch(max_seq_len=200.0), "max_seq_len", "an int", "200.0"),
    case("max-q-above-max-seq", lambda: make_batch(max_q_len=201), "max_q_len", "at most max_seq_len 200", "201"),
    case("lens-differ", lambda: lens([1], [1, 2]), "seq_lens", "1 entries", "2"),
    case("lens-empty", lambda: lens([], []), "q_lens", "at least one request", "none"),
    case("lens-negative-q", lambda: lens([1, -1], [9, 9]), "q_lens[1]", "at least 0", "-1"),
    case("lens-q-above-seq", lambda: lens([1, 9], [1, 8]), "q_lens[1]", "at most seq_lens[1] = 8", "9"),
    case("lens-prompts-differ", lambda: lens([1], [1], "cpu", [1, 2]), "prompt_lens", "1 entries", "2"),
    case("lens-prompt-short", lambda: lens([1], [8], "cpu", [7]), "prompt_lens[0]", "an int of at least 8", "7"),
    case("v-dimension", lambda: make_kv(v=full(26, 16, 1, 80)), "v", "value dimension 64, the same as k's", "80"),
    case("v-shape", lambda: make_kv(v=full(26, 16, 2, 64)), "v", "shape (26, 16, 1, 64)", "(26, 16, 2, 64)"),
    case("head-dimension", lambda: make_kv(dim=72), "head dimension of k", "one of 64, 80, 96", "72"),
    case("no-kv-head", lambda: make_kv(heads=0), "k", "at least one page and one KV head", "shape (26, 16, 0, 64)"),
    case("pages-of-48", lambda: pages(ODD, ODD, 48), "page_size", "a power of two", "48"),
    case("contiguous-v", lambda: pages(NARROW, WIDE, 16), "v", "shape (1, 32, 1, 64)", "(1, 32, 1, 80)"),
    case("contiguous-empty", lambda: pages(EMPTY, EMPTY, 16), "k", "one token", "shape (1, 0, 1, 64)"),
    case("contiguous-stride", lambda: pages(BENT, BENT, 16), "k", "(stride 1)", "strides (2048, 128, 128, 2)"),
    case("v-mean-shape", lambda: make_summary(v_mean=full(26, 1, 2, 64)), "v_mean", "(26, 1, 1, 64)", "(26, 1, 2, 64)"),
    case("unit", lambda: make_summary(unit=0), "unit", "at least 1", "0"),
    case("mask-last-blocks", lambda: make_mask(dense_last_blocks=-1), "dense_last_blocks", "at least 0", "-1"),
    case("counts-shape", lambda: make_table(counts=zeros(4)), "counts", "shape (3,)", "(4,)"),
    case("alpha", lambda: FlashPrefill(alpha=1.5), "alpha", "a number from 0 to 1", "1.5"),
    case("threshold", lambda: XAttention(threshold="0.9"), "threshold", "a number from 0 to 1", "'0.9'"),
    case("stride", lambda: XAttention(stride=3), "stride", "one of 1, 2, 4, 8, 16, 32, 64", "3"),
    case("mass", lambda: Oracle(mass=-0.1), "mass", "a number from 0 to 1", "-0.1"),
    case("top-k", lambda: Oracle(top_k=2.0), "top_k", "an int of at least 0", "2.0"),
    case("numba-on-cuda", lambda: resolve_backend("numba", CUDA), "backend", "'triton' (or None)", NO_CUDA),
    case("lens-tensor", lambda: lens(ints(1), [1]), "q_lens", "a list of ints", "Tensor"),
    case("lens-sum", lambda: lens([2**30] * 3, [2**30] * 3), "the sum of q_lens", "at most 2147483647", str(3 * 2**30)),
    case("seq-len", lambda: lens([1], [2**30 + 1]), "max_seq_len", "at most 1073741824 tokens", str(2**30 + 1)),
    case("int32", lambda: FlashPrefill(sink_blocks=2**31), "sink_blocks", "at most 2147483647", str(2**31)),
    case("block-float", lambda: Dense(block_size=64.0), "block_size", "one of 64, 128, 256", "64.0"),
    case("e5m2", lambda: make_kv(dtype=torch.float8_e5m2), "k", "(float64 for references alone)", "torch.float8_e5m2"),
    case("fp8", lambda: make_kv(dtype=torch.float8_e4m3fn), "k_scale", "a torch.Tensor", "NoneType"),
    case("lens-bool", lambda: lens([True], [1]), "q_lens[0]", "an int of at least 0", "True"),
    case("lens-true", lambda: lens([1], [np.True_]), "seq_lens[0]", "an int of at least 0", "np.True_"),
    case("lens-mask", lambda: lens([torch.tensor(True)], [1]), "q_lens[0]", "an int of at least 0", "tensor(True)"),
    case("lens-word", lambda: lens([1], [1], "cpu", "1"), "prompt_lens[0]", "an int of at least 1", "'1'"),
    case("lens-device", lambda: lens([1], [1], "bogus"), "device", "cpu, or a GPU of this machine", "'bogus'"),
    case("lens-gpu", lambda: lens([1], [1], "cuda:99"), "device", "cpu, or a GPU of this machine", "'cuda:99'"),
    case("counters-device", lambda: DensityCounters.zeros(1, None), "device", "cpu, or a GPU", "None"),
    case("kv-heads", lambda: make_mask(kv_heads=3), "kv_heads", "a divisor of the 2 query heads", "3"),
    *(case(f"kv-heads-{n!r}", partial(make_mask, kv_heads=n), "kv_heads", "at least 1", repr(n)) for n in (0, -1, "x")),
    case("grouping-of-none", lambda: grouping_of(None, 2), "table", "a BlockTable or a GroupMask", "NoneType"),
    case("grouping-of-mask", lambda: grouping_of(make_mask(), 2), "table", "a BlockTable or", "SelectionMask"),
    case("oracle-neither", Oracle, "Oracle", "exactly one of mass and top_k", "mass=None, top_k=None"),
    case("oracle-both", lambda: Oracle(0.5, 3), "Oracle", "exactly one of mass and top_k", "mass=0.5, top_k=3"),
]


COUNTS = ("sink_blocks", "window_blocks", "dense_queries", "dense_keys", "dense_last_blocks")
SETTINGS = [(make, name, "an int of at least 0", -1) for make in SELECTORS for name in COUNTS]
SIZED = (*SELECTORS, make_mask, make_groups, make_table)
SETTINGS += [(make, "block_size", "one of 64, 128, 256", 32) for make in SIZED]
SETTINGS += [(make, "query_block", "one of 64, 128", 256) for make in SIZED]


@pytest.mark.parametrize(("make", "name", "expected", "value"), SETTINGS)
def test_block_sizes_and_common_settings(make: Callable[..., Any], name: str, expected: str, value: int) -> None:
    with refused(name, expected, str(value)):
        make(**{name: value}, **({"top_k": 1} if make is Oracle else {}))


def test_lengths_of_any_integer_type() -> None:
    batch = lens([np.int64(5), torch.tensor(3)], (np.uint8(200), 40), prompt_lens=[np.array(200), np.int32(41)])
    assert (batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()) == ([0, 5, 8], [200, 40])
    assert batch.prompt_lens is not None
    assert batch.prompt_lens.tolist() == [200, 41]
    assert [type(bound) for bound in (batch.max_q_len, batch.max_seq_len)] == [int, int]


def test_outputs_that_want_gradients_are_taken_where_none_are_made() -> None:
    arguments = make_arguments() | {"out": full(8, 2, 64).requires_grad_()}
    with torch.no_grad():
        for stage in OUT_STAGES:
            call(stage, arguments)


def queries(*shape: int, dtype: torch.dtype = SINGLE, device: str = "cpu") -> dict[str, Any]:
    return {"q": zeros(*shape, dtype=dtype, device=device)}


def tables(**changes: Any) -> dict[str, Any]:
    return {"table": make_table(**changes)}


def grad_kv(name: str) -> dict[str, Any]:
    return {"kv": make_kv(**{name: torch.zeros(26, 16, 1, 64, requires_grad=True)})}


def means(units: int, device: str = "cpu") -> dict[str, Any]:
    return {"summary": KVSummary(full(units, 1, 1, 64, device=device), None, 16)}


GRAD = ("tensors without gradients (inference only)", "requires_grad=True under grad mode")
WIDE_GROUP = {"q": zeros(8, 4, 64, dtype=SINGLE), "kv": make_kv(heads=2), "heads_per_group": 4}
META = make_arguments("meta")
LONG = make_mask(mask=zeros(2, 2, 1, 5).bool())
INSIDE = full(9, 2, 64)
STAGE_CASES = [
    *on(KV_STAGES, "kv-none", {"kv": None}, "kv", "a PagedKV", "NoneType"),
    *on(KV_STAGES, "batch-list", {"batch": [5, 3]}, "batch", "a PrefillBatch", "list"),
    *on(SUMMARY_STAGES, "summary-flag", {"summary": True}, "summary", "a KVSummary", "bool"),
    *on(("attend",), "table-groups", {"table": make_groups()}, "table", "a BlockTable", "GroupMask"),
    *on(("unite",), "selection-tensor", {"selection": make_mask().mask}, "selection", "a SelectionMask", "Tensor"),
    *on(
        ("build_table",),
        "no-rows",
        {"groups": make_groups(keep=zeros(0, 4).bool())},
        "groups.keep",
        "at least the rows that groups.rows uses",
        "none",
    ),
    *on(
        ("unite",),
        "beyond-a-kv-head",
        {"selection": make_mask(kv_heads=2), "heads_per_group": 2},
        "heads_per_group",
        "a divisor of the 1 query heads per KV head",
        "2",
    ),
    *on(OUT_STAGES, "lse-flag", {"return_lse": "yes"}, "return_lse", "True or False", "'yes'"),
    *on(("summarize",), "values-flag", {"values": "yes"}, "values", "True or False", "'yes'"),
    *on(("summarize",), "values-number", {"values": 1, "summary": None}, "values", "True or False", "1"),
    *on(OUT_STAGES, "out-grad", {"out": full(8, 2, 64).requires_grad_()}, "out", "a tensor without gradients", GRAD[1]),
    *on(("build_table",), "groups-mask", {"groups": make_mask()}, "groups", "a GroupMask", "SelectionMask"),
    *on(Q_STAGES, "q-short", queries(7, 2, 64), "q", "at least the 8 rows of batch.cu_seqlens_q[-1]", "7 rows"),
    *on(OUT_STAGES, "out-in-q", {"q": INSIDE[:8], "out": INSIDE[1:]}, "out", "memory apart from q's", "an overlap"),
    *on(
        OUT_STAGES,
        "out-in-itself",
        {"out": full(2000).as_strided((8, 2, 64), (96, 32, 1))},
        "out",
        "rows that do not overlap",
        "strides (96, 32, 1)",
    ),
    *on(Q_STAGES, "scale-large", {"scale": 2e38}, "scale", "to 1.70141e+38, or None", "2e+38"),
    *on(Q_STAGES, "q-list", {"q": [1], "out": None}, "q", "a torch.Tensor", "list"),
    *on(Q_STAGES, "q-2d", queries(8, 128), "q", "3 dimensions", "shape (8, 128)"),
    *on(Q_STAGES, "q-int", queries(8, 2, 64, dtype=torch.int8), "q", FLOATS, "torch.int8"),
    *on(Q_STAGES, "q-half", queries(8, 2, 64, dtype=HALF), "q", "the cache's dtype", "torch.float16"),
    *on(Q_STAGES, "q-dimension", queries(8, 2, 80), "q", "head dimension 64, as in the cache", "80"),
    *on(Q_STAGES, "q-stride", {"q": spread(full(8, 2, 64))}, "q", "stride 1", "strides (256, 128, 2)"),
    *on(Q_STAGES, "no-heads", queries(8, 0, 64), "q", "a multiple of the cache's 1", "0 heads"),
    *on(Q_STAGES, "heads", queries(8, 3, 64) | {"kv": make_kv(2)}, "q", "2 KV heads", "3 heads"),
    *on(Q_STAGES, "group", queries(8, 17, 64), "q", "at most 16 query heads per", "17 over 1 KV heads"),
    *on(Q_STAGES, "q-device", queries(8, 2, 64, device="meta"), "batch", "device meta", "cpu"),
    *on(Q_STAGES, "q-grad", {"q": full(8, 2, 64).requires_grad_()}, "q, k, v", *GRAD),
    *on(Q_STAGES, "k-grad", grad_kv("k"), "q, k, v", *GRAD),
    *on(("summarize",), "kv-grad", grad_kv("k"), "k, v", *GRAD),
    *on(
        ("summarize",), "float64-cache", {"kv": make_kv(dtype=torch.float64)}, "kv.k", "float8_e4m3fn", "torch.float64"
    ),
    *on(Q_STAGES, "kv-device", {"kv": META["kv"]}, "kv", "device cpu", "meta"),
    *on(KV_STAGES, "batch-device", {"batch": META["batch"]}, "batch", "device cpu", "meta"),
    *on(KV_STAGES, "requests", {"batch": lens([5], [9])}, "kv.page_table", "1 rows", "2 rows"),
    *on(KV_STAGES, "bound", {"batch": lens([1, 1], [9, 209])}, "batch.max_seq_len", "208", "209"),
    *on(Q_STAGES, "scale", {"scale": math.nan}, "scale", "a number from -1.70141e+38", "nan"),
    *on(
        ("select", *FUSED), "name", {"selector": "dense"}, "selector", "FlashPrefill, KeyBounds, XAttention", "'dense'"
    ),
    *on(("summarize",), "block", {"block_size": 96}, "block_size", "one of 64, 128, 256", "96"),
    *on(SUMMARY_STAGES, "unit", {"summary": make_summary(unit=64)}, "summary", "unit 16 = min", "64"),
    *on(SUMMARY_STAGES, "pages", means(9), "summary.k_mean", "shape (26, 1, 1, 64)", "(9, 1, 1, 64)"),
    *on(SUMMARY_STAGES, "means", means(26, device="meta"), "summary.k_mean", "device cpu", "meta"),
    *on(("summarize",), "values", means(26) | {"values": True}, "summary", "with values", "v_mean=None"),
    *on(("summarize",), "since", {"since": -1}, "since", "an int of at least 0", "-1"),
    *on(("summarize",), "since-shape", {"since": zeros(3)}, "since", "shape (2,)", "(3,)"),
    *on(("summarize",), "since-device", {"since": zeros(2, device="meta")}, "since", "cpu", "meta"),
    *on(("unite",), "mask-shape", {"selection": LONG}, "selection.mask", "(2, 2, 1, 4)", "(2, 2, 1, 5)"),
    *on(("unite",), "mask-device", {"selection": META["selection"]}, "selection.mask", "cpu", "meta"),
    *on(GROUPING_STAGES, "per-group-0", {"heads_per_group": 0}, "heads_per_group", "at least 1", "0"),
    *on(GROUPING_STAGES, "per-group-3", {"heads_per_group": 3}, "heads_per_group", "of the 2 query", "3"),
    *on(FUSED, "per-group-4", WIDE_GROUP, "heads_per_group", "of the 2 query heads per KV head", "4"),
    *on(GROUPING_STAGES, "span", {"query_blocks_per_span": 0}, "query_blocks_per_span", "least 1", "0"),
    *on(("attend",), "rows", tables(rows=zeros(2, 4, 1)), "table.rows", "(2, 2, 1)", "(2, 4, 1)"),
    *on(("attend",), "Kb", tables(indices=zeros(3, 5)), "table.indices", "4 columns = Kb", "5"),
    *on(("attend",), "table-device", {"table": META["table"]}, "table", "device cpu", "meta"),
    *on(OUT_STAGES, "out-shape", {"out": full(8, 3, 64)}, "out", "shape (8, 2, 64)", "(8, 3, 64)"),
    *on(OUT_STAGES, "out-dtype", {"out": full(8, 2, 64).half()}, "out", "float32", "torch.float16"),
    *on(OUT_STAGES, "out-device", {"out": META["out"]}, "out", "device cpu", "meta"),
    *on(
        OUT_STAGES,
        "out-overlap",
        {"out": full(1, 2, 64).expand(8, 2, 64)},
        "out",
        "do not overlap",
        "strides (0, 64, 1)",
    ),
    *on(("summarize",), "since-stride", {"since": zeros(4)[::2]}, "since", "a contiguous tensor", "strides (2,)"),
    *on(OUT_STAGES, "out-stride", {"out": spread(full(8, 2, 64))}, "out", "stride 1", "strides (256, 128, 2)"),
    *on(STAGES, "unknown", {"backend": "cuda"}, "backend", "None, 'triton' or 'numba'", "'cuda'"),
    *on(STAGES, "no-backend", META, "backend", "tensors on a CUDA device ('triton')", "meta tensors"),
    *on(("prefill",), "q-beside-out", {"q": [1]}, "q", "a torch.Tensor", "list"),
]


@pytest.mark.parametrize(("stage", "changes", "argument", "expected", "got"), STAGE_CASES)
def test_stages_refuse(stage: str, changes: dict[str, Any], argument: str, expected: str, got: str) -> None:
    assert_refused(stage, changes, argument, expected, got)


def test_triton_is_refused_for_cpu_tensors_without_its_interpreter() -> None:
    pytest.importorskip("triton")
    script = "from tests.test_bad_input import refuse_triton; refuse_triton()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-c", script], Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def refuse_triton() -> None:
    got = "'triton': on CPU tensors Triton runs only under its interpreter (TRITON_INTERPRET=1, set before triton "
    message = ("backend", "'numba' (or None) for cpu tensors", got + "is imported)")
    for stage in STAGES:
        assert_refused(stage, {"backend": "triton"}, *message)


def indices(row: int, *blocks: int) -> dict[str, Any]:
    """The valid table with other blocks in one row."""
    values, counts = make_table().indices.clone(), make_table().counts.clone()
    values[row, : len(blocks)], counts[row] = ints(*blocks), len(blocks)
    return tables(indices=values, counts=counts)


def page(request: int, column: int, value: int) -> dict[str, Any]:
    table = make_kv().page_table.clone()
    table[request, column] = value
    return {"kv": make_kv(page_table=table)}


def lengths(starts: tuple[int, ...] = (0, 5, 8), seq_lens: tuple[int, ...] = (200, 40), **rest: Any) -> dict[str, Any]:
    return {"batch": make_batch(cu_seqlens_q=ints(*starts), seq_lens=ints(*seq_lens), **rest)}


def rows(*values: int) -> dict[str, Any]:
    return tables(rows=ints(*values).reshape(2, 2, 1))


START, ROW = "batch.cu_seqlens_q", "table.indices[0]"
CHECKS = [
    case("kv-none", {"kv": None}, "kv", "a PagedKV", "NoneType"),
    case("page-negative", page(0, 3, -1), "kv.page_table[0, 3]", "a page id from 0 to 25", "-1"),
    case("page-too-large", page(1, 2, 26), "kv.page_table[1, 2]", "a page id from 0 to 25", "26"),
    case("starts-at-1", lengths((1, 5, 8)), START + "[0]", "0", "1"),
    case("starts-decrease", lengths((0, 5, 4)), START + "[2]", "at least cu_seqlens_q[1] = 5", "4"),
    case("q-above-max", lengths((0, 5, 11)), "q_len of request 1", "at most max_q_len = 5", "6"),
    case("seq-above-max", lengths((0, 5, 8), (201, 40)), "batch.seq_lens[0]", "max_seq_len = 200", "201"),
    case("seq-negative", lengths((0, 5, 8), (200, -1)), "batch.seq_lens[1]", "0 to max_seq_len", "-1"),
    case("seq-above-pages", lengths(max_seq_len=209), "batch.max_seq_len", "208 tokens", "209"),
    case("q-above-seq", lengths((0, 5, 8), (200, 2)), "q_len of request 1", "at most seq_lens[1] = 2", "3"),
    case("prompt", lengths(prompt_lens=ints(200, 39)), "batch.prompt_lens[1]", "seq_lens[1] = 40", "39"),
    case("descending", indices(0, 1, 0, 3), ROW, "strictly ascending", "[1, 0, 3]"),
    case("duplicate", indices(0, 1, 1, 3), ROW, "strictly ascending", "[1, 1, 3]"),
    case("negative", indices(0, -1, 3), ROW, "strictly ascending block ids from 0", "[-1, 3]"),
    case("beyond", indices(2, 0, 1), "table.indices[2]", "no block beyond 0, the last visible", "1"),
    case("missing", indices(0, 0, 1), ROW, "every block of the current region, 3 to 3", "no [3]"),
    case("empty", tables(counts=ints(3, 1, 0)), "table.indices[2]", "the current region, 0 to 0", "no [0]"),
    case("count-negative", tables(counts=ints(-1, 1, 1)), "table.counts[0]", "0 to 4", "-1"),
    case("count-too-large", tables(counts=ints(5, 1, 1)), "table.counts[0]", "0 to 4", "5"),
    case("unused-row", rows(0, 0, 2, 2), "table.counts[1]", "0, because no query uses the row", "1"),
    case("row-negative", rows(0, -1, 2, 2), "table.rows[0, :, 0]", "from 0 to 2", "-1"),
    case("row-too-large", rows(0, 1, 3, 2), "table.rows[1, :, 0]", "from 0 to 2", "3"),
]


@pytest.mark.parametrize(("make", "argument", "expected", "got"), CONSTRUCTORS)
def test_constructors_refuse(make: Callable[[], Any], argument: str, expected: str, got: str) -> None:
    with refused(argument, expected, got):
        make()


@pytest.mark.parametrize(("changes", "argument", "expected", "got"), CHECKS)
def test_check_refuses(changes: dict[str, Any], argument: str, expected: str, got: str) -> None:
    with refused(argument, expected, got):
        call("check", make_arguments(), **changes)


def test_check_ignores_unused_tails() -> None:
    page_table = make_kv().page_table.clone()
    page_table[1, 3:] = ints(*WILD, *WILD, *WILD)[:10]  # request 1 has 40 tokens: 3 pages of 13
    check(make_kv(page_table=page_table), make_batch(), poison_tails(make_table()))


@pytest.mark.parametrize("span", [None, 1, 2])
@pytest.mark.parametrize("make", SELECTORS)
def test_check_accepts_the_tables_of_every_selector(make: Callable[..., Any], span: int | None) -> None:
    """Requests: a chunk at the end of its prompt, a chunk in the middle, decode, idle, absent."""
    batch = lens([130, 70, 1, 0, 0], [333, 190, 65, 50, 0], prompt_lens=[333, 999, 64 + 1, 50, 0])
    heads = torch.randn((201, 4, 64), generator=torch.Generator().manual_seed(1))
    kv = make_kv(heads=2, page_table=torch.arange(5 * 21, dtype=torch.int32).reshape(5, 21) % 26)
    settings = {"top_k": 1} if make is Oracle else {}
    selector = make(block_size=64, query_block=64, dense_last_blocks=1, **settings)
    table = compactattn.select_table(heads, kv, batch, selector=selector, heads_per_group=2, query_blocks_per_span=span)
    check(kv, batch, table)


def test_interleaved_outputs_are_accepted() -> None:
    """Queries and outputs may lie side by side in one tensor."""
    both = full(8, 4, 64)
    arguments = make_arguments() | {"q": both[:, :2], "out": both[:, 2:]}
    arguments["q"].zero_()
    expected = call("attend", make_arguments())
    assert torch.equal(call("attend", arguments), expected)


@pytest.mark.parametrize("stage", OUT_STAGES)
@pytest.mark.parametrize("name", ["k", "v"])
def test_outputs_inside_the_cache_are_refused(stage: str, name: str) -> None:
    """Beside the pages in one allocation is as good as anywhere."""
    memory = full(27, 16, 1, 64)
    kv = replace(make_kv(), **{name: memory[:26]})
    inside, beside = (memory.view(-1)[start : start + 8 * 2 * 64].view(8, 2, 64) for start in (64, 26 * 16 * 64))
    with refused("out", f"memory apart from {name}'s", "an overlap"):
        call(stage, make_arguments() | {"kv": kv, "out": inside})
    call(stage, make_arguments() | {"kv": kv, "out": beside})


def test_check_sees_too_few_queries() -> None:
    arguments = make_arguments()
    check(arguments["kv"], arguments["batch"], arguments["table"], arguments["q"])
    with refused("q", "at least the 8 rows", "6 rows"):
        check(arguments["kv"], arguments["batch"], q=arguments["q"][:6])
