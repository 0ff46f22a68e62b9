"""Partial attention merged by its log-sum-exps: exact where one side saw nothing, as one pass elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactattn import BlockTable, merge_attn_states
from compactattn.features import Features
from tests.backends import Backend
from tests.numerics import ROUNDING, assert_attention
from tests.strategies import Geometry, Step, make_step
from tests.test_laws import everything

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
State = tuple[Tensor, Tensor]


def states(dtype: torch.dtype, device: str, dim: int = 80) -> tuple[State, State]:
    """Two states of 37 queries and 3 heads; some heads see nothing on one side or both, which then holds NaN."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for side in range(2):
        out = torch.randn(37, 3, dim, generator=generator).to(dtype)
        lse = 8.0 * torch.randn(37, 3, generator=generator)
        for token, nothing in ((5, -math.inf), (6 + side, -math.inf), (8 + side, math.inf)):
            out[token], lse[token] = math.nan, nothing
        made.append((out.to(device), lse.to(device)))
    return made[0], made[1]


def exact(a: State, b: State) -> State:
    """In float64, a side of log-sum-exp -inf or +inf left out."""
    (out_a, lse_a), (out_b, lse_b) = (
        (out.double(), torch.where(lse == math.inf, -math.inf, lse)) for out, lse in (a, b)
    )
    lse = torch.stack((lse_a, lse_b)).double()
    weights = lse.softmax(0).nan_to_num(0.0)[..., None]
    parts = torch.where(weights > 0, torch.stack((out_a, out_b)), 0.0)
    return (weights * parts).sum(0), lse.logsumexp(0)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
def test_merged(backend: Backend, dtype: torch.dtype) -> None:
    """Within the roundings of exp, log and a sum of two products in float32, and one to the output's dtype."""
    if backend.name == "triton-interpreter" and dtype == BRAIN:
        pytest.skip("the interpreter's bfloat16 is wrong")
    a, b = states(dtype, backend.device)
    out, lse = backend.merge_attn_states(*a, *b)
    want, want_lse = exact(a, b)
    assert (out.dtype, lse.dtype) == (dtype, SINGLE)
    size = torch.stack((a[0], b[0])).double().nan_to_num(0.0).abs().amax(0)
    rounded = 0.0 if dtype == SINGLE else torch.finfo(dtype).eps / 2
    assert bool(((out - want).abs() <= 8 * ROUNDING * size + rounded * want.abs()).all())
    finite = want_lse.isfinite()
    assert torch.equal(lse[~finite].double(), want_lse[~finite])
    assert bool(((lse - want_lse).abs() <= 4 * ROUNDING * (1 + want_lse.abs()))[finite].all())


def test_a_side_that_saw_nothing_changes_no_bit(backend: Backend) -> None:
    """Not even one of NaN; two of them give 0 and -inf."""
    a, b = states(HALF, backend.device)
    out, lse = backend.merge_attn_states(*a, *b)
    for token, (own, own_lse) in ((6, b), (7, a), (8, b), (9, a)):
        assert torch.equal(out[token], own[token])
        assert torch.equal(lse[token], own_lse[token])
    assert torch.equal(out[5], torch.zeros_like(out[5]))
    assert torch.equal(lse[5], torch.full_like(lse[5], -math.inf))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_order_of_the_sides(backend: Backend, dtype: torch.dtype) -> None:
    """Merging is commutative, bit for bit."""
    a, b = states(dtype, backend.device)
    for one, other in zip(backend.merge_attn_states(*a, *b), backend.merge_attn_states(*b, *a), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_in_place_and_strided(library: Backend, dtype: torch.dtype) -> None:
    """`out` may be one of the inputs, or a view with gaps; log-sum-exps may be transposed."""
    a, b = states(dtype, library.device)
    expected, expected_lse = library.merge_attn_states(*a, *b)
    wide = torch.full((37, 5, 96), 7.0, dtype=dtype, device=library.device)
    target = wide[:, 1:4, :80]
    lse_a = a[1].T.contiguous().T
    out, lse = library.merge_attn_states(a[0], lse_a, *b, out=target)
    assert out is target
    assert torch.equal(target, expected)
    assert torch.equal(lse, expected_lse)
    assert bool((wide[:, 0] == 7.0).all())
    assert bool((wide[..., 80:] == 7.0).all())
    for n in (0, 2):
        inputs = [x.clone() for x in (*a, *b)]
        before = inputs[2 - n].clone()
        out, lse = library.merge_attn_states(*inputs, out=inputs[n])
        assert out is inputs[n]
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
        assert torch.equal(inputs[2 - n].nan_to_num(3.0), before.nan_to_num(3.0))  # the other side is left alone


SPLIT = Geometry((9, 1), (300, 200), kv_heads=1, group=2, heads_per_group=2, span=1)


def part(table: BlockTable, blocks: list[int]) -> BlockTable:
    """The rows of `everything` with these blocks alone, as far as they had them."""
    indices, counts = table.indices.clone(), table.counts.clone()
    for r, count in enumerate(table.counts.tolist()):
        kept = [j for j in blocks if j < count]
        indices[r, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        counts[r] = len(kept)
    return replace(table, indices=indices, counts=counts)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_split_attention_is_whole_again(backend: Backend, with_sinks: bool) -> None:
    """Attention over some blocks and over the others, sinks on one side alone, merges to attention over all."""
    step: Step = make_step(SPLIT, backend.device, plant=True)
    table = everything(SPLIT, backend.device)
    sinks = torch.tensor([0.5, 3.0], device=backend.device) if with_sinks else None
    a = backend.attend(step.q, step.kv, step.batch, part(table, [0, 3]), return_lse=True, sinks=sinks)
    b = backend.attend(step.q, step.kv, step.batch, part(table, [1, 2, 4]), return_lse=True)
    out, lse = backend.merge_attn_states(*a, *b)
    assert_attention(step, table, out, lse, features=Features(sinks=sinks))


def test_sinks_are_a_state_without_output(backend: Backend) -> None:
    """Attention with sinks is attention without them, merged with an output of 0 whose log-sum-exp is the sink."""
    step = make_step(SPLIT, backend.device)
    table = everything(SPLIT, backend.device)
    sinks = torch.tensor([0.5, 3.0], device=backend.device)
    out, lse = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    merged = backend.merge_attn_states(out, lse, torch.zeros_like(out), sinks.expand(lse.shape))
    assert_attention(step, table, *merged, features=Features(sinks=sinks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_a": [1.0]}, "out_a: expected a torch.Tensor, got list"),
        ({"out_a": torch.zeros(4, 2, 16, dtype=torch.int8)}, "out_a: expected dtype float16, bfloat16 or float32, got"),
        ({"out_b": torch.zeros(4, 2, 8)}, r"out_b: expected shape \(4, 2, 16\) \(that of out_a\), got \(4, 2, 8\)"),
        ({"out_b": torch.zeros(4, 2, 16).half()}, "out_b: expected dtype torch.float32, got torch.float16"),
        ({"lse_a": torch.zeros(2, 4)}, r"lse_a: expected shape \(4, 2\) \(T, Hq of out_a\), got \(2, 4\)"),
        ({"lse_b": torch.zeros(4, 2).double()}, "lse_b: expected dtype torch.float32, got torch.float64"),
        ({"lse_b": torch.zeros(4, 2, device="meta")}, "lse_b: expected device cpu, where the other .*, got meta"),
        (
            {"out_b": torch.zeros(4, 16, 2).transpose(1, 2)},
            r"out_b: expected a contiguous last dimension .*, got strides",
        ),
        ({"out": torch.zeros(4, 2, 16).half()}, "out: expected dtype torch.float32, got torch.float16"),
        ({"out_a": torch.zeros(4, 2, 16, requires_grad=True)}, "out_a, .*: expected tensors without gradients"),
        ({"out": torch.zeros(4, 2, 16, requires_grad=True)}, "out: expected a tensor without gradients"),
        ({"backend": "cuda"}, "backend: expected None, 'triton' or 'numba', got 'cuda'"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    names = {"out_a": torch.zeros(4, 2, 16), "lse_a": torch.zeros(4, 2)}
    names |= {"out_b": torch.zeros(4, 2, 16), "lse_b": torch.zeros(4, 2)}
    merge_attn_states(**names)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        merge_attn_states(**(names | changes))  # type: ignore[arg-type]


def test_another_view_of_an_input_is_refused() -> None:
    memory = torch.zeros(5, 2, 16)
    zeros = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="out: expected memory apart from out_b's, got an overlap"):
        merge_attn_states(torch.zeros(4, 2, 16), zeros, memory[1:], zeros, out=memory[:4])
