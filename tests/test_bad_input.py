"""Bad input (SPEC section 4): a ValueError names the argument, what was expected and what came, before anything runs.

Every stage is called with valid arguments less one. `out` and `summary` hold a sentinel that a refusal must leave.
"""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import compactattn
from compactattn import (
    BlockTable,
    Dense,
    FlashPrefill,
    GroupMask,
    KVSummary,
    Oracle,
    PagedKV,
    PrefillBatch,
    SelectionMask,
    XAttention,
    check,
)
from compactattn.dispatch import resolve_backend
from tests.strategies import WILD, poison_tails

SELECTORS = (FlashPrefill, XAttention, Oracle, Dense)
STAGES = ("summarize", "select", "unite", "build_table", "attend", "prefill", "select_table")
Q_STAGES = ("select", "attend", "prefill", "select_table")
KV_STAGES = ("summarize", *Q_STAGES)
SELECTOR_STAGES = ("select", "prefill", "select_table")
FUSED = ("prefill", "select_table")
GROUPING_STAGES = ("unite", "prefill", "select_table")
SUMMARY_STAGES = ("summarize", "select", "prefill", "select_table")
OUT_STAGES = ("attend", "prefill")
SENTINEL = 77.0
GAP = pytest.mark.xfail(strict=True, reason="the library does not refuse this as SPEC section 4 demands")
HALF, SINGLE = torch.float16, torch.float32


# ---- a small valid step, 2 requests of 2 query heads over 1 KV head: past 195 and 37, Qb 1, Kb 4 ----


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
    means = [full(26, 1, 1, 64, device=device) for _ in "kv"]
    return replace(KVSummary(*means, unit=16), **changes)


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
    return {
        "q": zeros(8, 2, 64, dtype=SINGLE, device=device),
        "kv": make_kv(device=device),
        "batch": make_batch(device),
        "selector": FlashPrefill(block_size=64, query_block=64),
        "block_size": 64,
        "heads_per_group": 1,
        "selection": make_mask(device),
        "groups": make_groups(device),
        "table": make_table(device),
        "summary": make_summary(device),
        "out": full(8, 2, 64, device=device),
    }


# ---- cases ----


def case(name: str, make: Callable[[], Any], *message: str, marks: Any = ()) -> Any:
    """message: the argument, words of what was expected, what came."""
    return pytest.param(make, *message, id=name, marks=marks)


def stage_case(
    name: str, stages: tuple[str, ...], make: Callable[[], dict[str, Any]], *message: str, gap: tuple[str, ...] = ()
) -> list[Any]:
    """One case per stage; for the stages in `gap` the library is known not to refuse it as it should."""
    return [
        pytest.param(stage, make, *message, id=f"{stage}-{name}", marks=[GAP] if stage in gap else [])
        for stage in stages
    ]


@contextmanager
def refused(argument: str, expected: str, got: str) -> Iterator[None]:
    """The block raises a ValueError "<argument>: expected <..expected..>, got <got>"."""
    with pytest.raises(ValueError, match=r"^.+: expected .+, got .+") as refusal:
        yield
    name, _, rest = str(refusal.value).partition(": expected ")
    wanted, _, came = rest.rpartition(", got ")
    assert (name, came) == (argument, got)
    assert expected in wanted


def call(stage: str, arguments: dict[str, Any], **changes: Any) -> Any:
    function = getattr(compactattn, stage)
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in {**arguments, **changes}.items() if name in taken})


def assert_refused(stage: str, changes: dict[str, Any], *message: str) -> None:
    arguments = make_arguments()
    q = changes.get("q")
    if isinstance(q, Tensor):  # `prefill` looks at `out` beside q before it looks at q
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


# ---- constructors ----

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


def tensor_faults() -> list[Any]:
    """Each kind of fault in each tensor of each record; the others are compared with the device of the first."""
    cases = []
    for make, fields in TENSORS.items():
        strided = make in (make_batch, make_kv, make_table)
        for name in fields:
            kinds = [
                kind for kind in FAULTS if (kind != "device" or name != fields[0]) and (kind != "stride" or strided)
            ]
            for kind in kinds:
                marks = [GAP] if (name, kind) == ("v_mean", "device") else []
                cases.append(pytest.param(make, name, kind, id=f"{make.__name__[5:]}-{name}-{kind}", marks=marks))
    return cases


@pytest.mark.parametrize(("make", "name", "kind"), tensor_faults())
def test_constructors_refuse_faulty_tensors(make: Callable[..., Any], name: str, kind: str) -> None:
    value, expected, got = FAULTS[kind](getattr(make(), name))
    with refused(name, expected, got):
        make(**{name: value})


FLOATS = "dtype float16, bfloat16 or float32"
lens = PrefillBatch.from_lens
pages = PagedKV.from_contiguous
NARROW, BENT = torch.zeros(1, 32, 1, 64), spread(torch.zeros(1, 32, 1, 64))
WIDE, ODD, EMPTY = torch.zeros(1, 32, 1, 80), torch.zeros(1, 48, 1, 64), torch.zeros(1, 0, 1, 64)
CONSTRUCTORS = [
    case("cu-short", lambda: make_batch(cu_seqlens_q=ints(0, 8)), "cu_seqlens_q", "shape (3,)", "(2,)"),
    case("prompt-shape", lambda: make_batch(prompt_lens=zeros(3)), "prompt_lens", "shape (2,)", "(3,)"),
    case("no-request", lambda: PrefillBatch(zeros(1), zeros(0), 0, 0), "seq_lens", "at least one request", "none"),
    case("max-q-tensor", lambda: make_batch(max_q_len=ints(5)), "max_q_len", "an int", repr(ints(5))),
    case("max-q-negative", lambda: make_batch(max_q_len=-1), "max_q_len", "at least 0", "-1"),
    case("max-seq-float", lambda: make_batch(max_seq_len=200.0), "max_seq_len", "an int", "200.0"),
    case("max-q-above-max-seq", lambda: make_batch(max_q_len=201), "max_q_len", "at most max_seq_len 200", "201"),
    case("lens-differ", lambda: lens([1], [1, 2]), "seq_lens", "1 entries", "2"),
    case("lens-empty", lambda: lens([], []), "q_lens", "at least one request", "none"),
    case("lens-negative-q", lambda: lens([1, -1], [9, 9]), "q_lens[1]", "at least 0", "-1"),
    case("lens-float", lambda: lens([1.0], [9]), "q_lens[0]", "an int", "1.0"),
    case("lens-q-above-seq", lambda: lens([1, 9], [1, 8]), "q_lens[1]", "at most seq_lens[1] = 8", "9"),
    case("lens-prompts-differ", lambda: lens([1], [1], "cpu", [1, 2]), "prompt_lens", "1 entries", "2"),
    case("lens-prompt-short", lambda: lens([1], [8], "cpu", [7]), "prompt_lens[0]", "an int of at least 8", "7"),
    case("float64-cache", lambda: make_kv(dtype=torch.float64), "k", FLOATS, "torch.float64", marks=GAP),
    case("v-dtype", lambda: make_kv(v=full(26, 16, 1, 64, dtype=HALF)), "v", "torch.float32", "torch.float16"),
    case("v-dimension", lambda: make_kv(v=full(26, 16, 1, 80)), "v", "value dimension 64, the same as k's", "80"),
    case("v-shape", lambda: make_kv(v=full(26, 16, 2, 64)), "v", "shape (26, 16, 1, 64)", "(26, 16, 2, 64)"),
    case("head-dimension", lambda: make_kv(dim=72), "head dimension of k", "one of 64, 80, 96", "72"),
    case("no-kv-head", lambda: make_kv(heads=0), "k", "at least one page and one KV head", "shape (26, 16, 0, 64)"),
    case("pages-of-48", lambda: pages(ODD, ODD, 48), "page_size", "a power of two", "48"),
    case("pages-of-8", lambda: pages(NARROW, NARROW, 8), "page_size", "at least 16", "8"),
    case("contiguous-v", lambda: pages(NARROW, WIDE, 16), "v", "shape (1, 32, 1, 64)", "(1, 32, 1, 80)"),
    case("contiguous-device", lambda: pages(NARROW, NARROW.to("meta"), 16), "v", "device cpu", "meta"),
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
    case("oracle-neither", Oracle, "Oracle", "exactly one of mass and top_k", "mass=None, top_k=None"),
    case("oracle-both", lambda: Oracle(0.5, 3), "Oracle", "exactly one of mass and top_k", "mass=0.5, top_k=3"),
]


COMMON = ("sink_blocks", "window_blocks", "dense_queries", "dense_keys", "dense_last_blocks")
SIZED = (*SELECTORS, make_mask, make_groups, make_table)


@pytest.mark.parametrize("make", SIZED, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("name", "value"), [("block_size", 32), ("query_block", 256), *((n, -1) for n in COMMON)])
def test_block_sizes_and_common_settings(make: Callable[..., Any], name: str, value: int) -> None:
    if name in COMMON and make not in SELECTORS:
        return
    valid = {"top_k": 1} if make is Oracle else {}
    wanted = {"block_size": "one of 64, 128, 256", "query_block": "one of 64, 128"}
    with refused(name, wanted.get(name, "an int of at least 0"), str(value)):
        make(**valid, **{name: value})


# ---- stages ----


def queries(*shape: int, dtype: torch.dtype = SINGLE, device: str = "cpu") -> dict[str, Any]:
    return {"q": zeros(*shape, dtype=dtype, device=device)}


def grad_kv(name: str) -> dict[str, Any]:
    return {"kv": make_kv(**{name: torch.zeros(26, 16, 1, 64, requires_grad=True)})}


def means(units: int, device: str = "cpu") -> dict[str, Any]:
    return {"summary": KVSummary(full(units, 1, 1, 64, device=device), None, 16)}


GRAD = ("tensors without gradients (inference only)", "requires_grad=True under grad mode")
WIDE_GROUP = {"q": zeros(8, 4, 64, dtype=SINGLE), "kv": make_kv(heads=2), "heads_per_group": 4}
META = make_arguments("meta")
STAGE_CASES = [
    *stage_case("q-list", Q_STAGES, lambda: {"q": [1], "out": None}, "q", "a torch.Tensor", "list"),
    *stage_case("q-2d", Q_STAGES, lambda: queries(8, 128), "q", "3 dimensions", "shape (8, 128)"),
    *stage_case("q-int", Q_STAGES, lambda: queries(8, 2, 64, dtype=torch.int8), "q", FLOATS, "torch.int8"),
    *stage_case("q-half", Q_STAGES, lambda: queries(8, 2, 64, dtype=HALF), "q", "the cache's dtype", "torch.float16"),
    *stage_case("q-dimension", Q_STAGES, lambda: queries(8, 2, 80), "q", "head dimension 64, as in the cache", "80"),
    *stage_case("q-stride", Q_STAGES, lambda: {"q": spread(full(8, 2, 64))}, "q", "stride 1", "strides (256, 128, 2)"),
    *stage_case("no-heads", Q_STAGES, lambda: queries(8, 0, 64), "q", "a multiple of the cache's 1", "0 heads"),
    *stage_case("heads", Q_STAGES, lambda: queries(8, 3, 64) | {"kv": make_kv(2)}, "q", "2 KV heads", "3 heads"),
    *stage_case("group", Q_STAGES, lambda: queries(8, 17, 64), "q", "at most 16 query heads per", "17 over 1 KV heads"),
    *stage_case("q-device", Q_STAGES, lambda: queries(8, 2, 64, device="meta"), "batch", "device meta", "cpu"),
    *stage_case("q-grad", Q_STAGES, lambda: {"q": full(8, 2, 64).requires_grad_()}, "q, k, v", *GRAD),
    *stage_case("k-grad", Q_STAGES, lambda: grad_kv("k"), "q, k, v", *GRAD),
    *stage_case("v-grad", Q_STAGES, lambda: grad_kv("v"), "q, k, v", *GRAD),
    *stage_case("kv-grad", ("summarize",), lambda: grad_kv("k"), "k, v", *GRAD, gap=("summarize",)),
    *stage_case("kv-device", Q_STAGES, lambda: {"kv": META["kv"]}, "kv", "device cpu", "meta"),
    *stage_case("batch-device", KV_STAGES, lambda: {"batch": META["batch"]}, "batch", "device cpu", "meta"),
    *stage_case("requests", KV_STAGES, lambda: {"batch": lens([5], [9])}, "kv.page_table", "1 rows", "2 rows"),
    *stage_case("bound", KV_STAGES, lambda: {"batch": lens([1, 1], [9, 209])}, "batch.max_seq_len", "208", "209"),
    *stage_case("scale", Q_STAGES, lambda: {"scale": math.nan}, "scale", "a finite number or None", "nan", gap=FUSED),
    *stage_case(
        "name", SELECTOR_STAGES, lambda: {"selector": "dense"}, "selector", "FlashPrefill, XAttention", "'dense'"
    ),
    *stage_case("block", ("summarize",), lambda: {"block_size": 96}, "block_size", "one of 64, 128, 256", "96"),
    *stage_case("unit", SUMMARY_STAGES, lambda: {"summary": make_summary(unit=64)}, "summary", "unit 16 = min", "64"),
    *stage_case("pages", SUMMARY_STAGES, lambda: means(9), "summary.k_mean", "shape (26, 1, 1, 64)", "(9, 1, 1, 64)"),
    *stage_case("means", SUMMARY_STAGES, lambda: means(26, device="meta"), "summary.k_mean", "device cpu", "meta"),
    *stage_case(
        "values", ("summarize",), lambda: means(26) | {"values": True}, "summary", "with values", "v_mean=None"
    ),
    *stage_case("since", ("summarize",), lambda: {"since": -1}, "since", "an int of at least 0", "-1"),
    *stage_case("since-shape", ("summarize",), lambda: {"since": zeros(3)}, "since", "shape (2,)", "(3,)"),
    *stage_case("since-dtype", ("summarize",), lambda: {"since": full(2)}, "since", "torch.int32", "torch.float32"),
    *stage_case("since-device", ("summarize",), lambda: {"since": zeros(2, device="meta")}, "since", "cpu", "meta"),
    *stage_case(
        "mask-shape",
        ("unite",),
        lambda: {"selection": make_mask(mask=zeros(2, 2, 1, 5).bool())},
        "selection.mask",
        "(2, 2, 1, 4)",
        "(2, 2, 1, 5)",
    ),
    *stage_case("mask-device", ("unite",), lambda: {"selection": META["selection"]}, "selection.mask", "cpu", "meta"),
    *stage_case("per-group-0", GROUPING_STAGES, lambda: {"heads_per_group": 0}, "heads_per_group", "at least 1", "0"),
    *stage_case(
        "per-group-3", GROUPING_STAGES, lambda: {"heads_per_group": 3}, "heads_per_group", "of the 2 query", "3"
    ),
    *stage_case("per-group-4", FUSED, lambda: WIDE_GROUP, "heads_per_group", "of the 2 query heads per KV head", "4"),
    *stage_case("span", GROUPING_STAGES, lambda: {"query_blocks_per_span": 0}, "query_blocks_per_span", "least 1", "0"),
    *stage_case(
        "rows", ("attend",), lambda: {"table": make_table(rows=zeros(2, 4, 1))}, "table.rows", "(2, 2, 1)", "(2, 4, 1)"
    ),
    *stage_case(
        "Kb", ("attend",), lambda: {"table": make_table(indices=zeros(3, 5))}, "table.indices", "4 columns = Kb", "5"
    ),
    *stage_case("table-device", ("attend",), lambda: {"table": META["table"]}, "table", "device cpu", "meta"),
    *stage_case("out-shape", OUT_STAGES, lambda: {"out": full(8, 3, 64)}, "out", "shape (8, 2, 64)", "(8, 3, 64)"),
    *stage_case("out-dtype", OUT_STAGES, lambda: {"out": full(8, 2, 64).half()}, "out", "float32", "torch.float16"),
    *stage_case("out-device", OUT_STAGES, lambda: {"out": META["out"]}, "out", "device cpu", "meta"),
    *stage_case(
        "out-stride", OUT_STAGES, lambda: {"out": spread(full(8, 2, 64))}, "out", "stride 1", "strides (256, 128, 2)"
    ),
    *stage_case("unknown", STAGES, lambda: {"backend": "cuda"}, "backend", "None, 'triton' or 'numba'", "'cuda'"),
    *stage_case("no-backend", STAGES, lambda: META, "backend", "tensors on a CUDA device ('triton')", "meta tensors"),
]


@pytest.mark.parametrize(("stage", "make", "argument", "expected", "got"), STAGE_CASES)
def test_stages_refuse(stage: str, make: Callable[[], dict[str, Any]], argument: str, expected: str, got: str) -> None:
    assert_refused(stage, make(), argument, expected, got)


@GAP
def test_prefill_names_a_faulty_q_and_not_out() -> None:
    assert_refused("prefill", {"q": [1]}, "q", "a torch.Tensor", "list")


def test_numba_is_refused_for_cuda_tensors() -> None:
    with refused("backend", "'triton' (or None)", "'numba': the numba backend runs CPU tensors only"):
        resolve_backend("numba", torch.device("cuda"))


def test_triton_is_refused_for_cpu_tensors_without_its_interpreter() -> None:
    pytest.importorskip("triton")
    script = "from tests.test_bad_input import refuse_triton; refuse_triton()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def refuse_triton() -> None:
    reason = "runs only under its interpreter (TRITON_INTERPRET=1, set before triton is imported)"
    for stage in STAGES:
        message = ("backend", "'numba' (or None) for cpu tensors", f"'triton': on CPU tensors Triton {reason}")
        assert_refused(stage, {"backend": "triton"}, *message)


# ---- check ----


def indices(row: int, *blocks: int) -> dict[str, Any]:
    """The valid table with other blocks in one row."""
    values, counts = make_table().indices.clone(), make_table().counts.clone()
    values[row, : len(blocks)], counts[row] = ints(*blocks), len(blocks)
    return {"table": make_table(indices=values, counts=counts)}


def page(request: int, column: int, value: int) -> dict[str, Any]:
    table = make_kv().page_table.clone()
    table[request, column] = value
    return {"kv": make_kv(page_table=table)}


def lengths(starts: tuple[int, ...] = (0, 5, 8), seq_lens: tuple[int, ...] = (200, 40), **rest: Any) -> dict[str, Any]:
    return {"batch": make_batch(cu_seqlens_q=ints(*starts), seq_lens=ints(*seq_lens), **rest)}


START, ROW = "batch.cu_seqlens_q", "table.indices[0]"
CHECKS = [
    case("page-negative", lambda: page(0, 3, -1), "kv.page_table[0, 3]", "a page id from 0 to 25", "-1"),
    case("page-too-large", lambda: page(1, 2, 26), "kv.page_table[1, 2]", "a page id from 0 to 25", "26"),
    case("starts-at-1", lambda: lengths((1, 5, 8)), START + "[0]", "0", "1"),
    case("starts-decrease", lambda: lengths((0, 5, 4)), START + "[2]", "at least cu_seqlens_q[1] = 5", "4"),
    case("q-above-max", lambda: lengths((0, 5, 11)), "q_len of request 1", "at most max_q_len = 5", "6"),
    case("seq-above-max", lambda: lengths((0, 5, 8), (201, 40)), "batch.seq_lens[0]", "max_seq_len = 200", "201"),
    case("seq-negative", lambda: lengths((0, 5, 8), (200, -1)), "batch.seq_lens[1]", "0 to max_seq_len", "-1"),
    case("seq-above-pages", lambda: lengths(max_seq_len=209), "batch.max_seq_len", "208 tokens", "209"),
    case("q-above-seq", lambda: lengths((0, 5, 8), (200, 2)), "q_len of request 1", "at most seq_lens[1] = 2", "3"),
    case("prompt", lambda: lengths(prompt_lens=ints(200, 39)), "batch.prompt_lens[1]", "seq_lens[1] = 40", "39"),
    case("descending", lambda: indices(0, 1, 0, 3), ROW, "strictly ascending", "[1, 0, 3]"),
    case("duplicate", lambda: indices(0, 1, 1, 3), ROW, "strictly ascending", "[1, 1, 3]"),
    case("negative", lambda: indices(0, -1, 3), ROW, "strictly ascending block ids from 0", "[-1, 3]"),
    case("beyond", lambda: indices(2, 0, 1), "table.indices[2]", "no block beyond 0, the last visible", "1"),
    case("missing", lambda: indices(0, 0, 1), ROW, "every block of the current region, 3 to 3", "no [3]"),
    case(
        "empty",
        lambda: {"table": make_table(counts=ints(3, 1, 0))},
        "table.indices[2]",
        "the current region, 0 to 0",
        "no [0]",
    ),
    case("count-negative", lambda: {"table": make_table(counts=ints(-1, 1, 1))}, "table.counts[0]", "0 to 4", "-1"),
    case("count-too-large", lambda: {"table": make_table(counts=ints(5, 1, 1))}, "table.counts[0]", "0 to 4", "5"),
    case(
        "unused-row",
        lambda: {"table": with_rows(0, 0, 2, 2)},
        "table.counts[1]",
        "0, because no query uses the row",
        "1",
    ),
    case("row-negative", lambda: {"table": with_rows(0, -1, 2, 2)}, "table.rows[0, :, 0]", "rows from 0 to 2", "-1"),
    case("row-too-large", lambda: {"table": with_rows(0, 1, 3, 2)}, "table.rows[1, :, 0]", "rows from 0 to 2", "3"),
    case("device", lambda: {"batch": META["batch"]}, "batch", "device cpu", "meta"),
]


@pytest.mark.parametrize(("make", "argument", "expected", "got"), CONSTRUCTORS)
def test_constructors_refuse(make: Callable[[], Any], argument: str, expected: str, got: str) -> None:
    with refused(argument, expected, got):
        make()


@pytest.mark.parametrize(("make", "argument", "expected", "got"), CHECKS)
def test_check_refuses(make: Callable[[], dict[str, Any]], argument: str, expected: str, got: str) -> None:
    with refused(argument, expected, got):
        call("check", make_arguments(), **make())


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
