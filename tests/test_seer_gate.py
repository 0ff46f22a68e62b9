"""SeerGate: what it keeps against float64, its pooled keys, and the files that its weights come in."""

from __future__ import annotations

import functools
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from compactattn import (
    GateKeys,
    KVSummary,
    PagedKV,
    SeerGate,
    load_seer_gates,
    prefill,
    select,
    select_table,
    summarize,
)
from compactattn.seer_gate import rotate, unrotate
from tests.backends import REFERENCE, Backend, for_all
from tests.numerics import pooled_key
from tests.strategies import Geometry, Step, gate_weights, make_step, seer_gate
from tests.test_selection import assert_selection

HALF = torch.float16


def on(selector: SeerGate, device: str) -> SeerGate:
    return replace(selector, weights=selector.weights.to(device), inv_freq=selector.inv_freq.to(device))


# ---- what it keeps ----


@for_all(selector=seer_gate)
def test_kept_is_what_exceeds_the_threshold(backend: Backend, g: Geometry, selector: SeerGate) -> None:
    """Keep iff the probability exceeds the threshold, and the common rules."""
    step = make_step(g, backend.device, coherent=True)
    mask = backend.select(step.q, step.kv, step.batch, on(selector, backend.device)).mask
    assert_selection(step, selector, mask)


HARD = (
    Geometry((130, 70), (450, 333), kv_heads=2, group=2, dtype=HALF),
    Geometry((67, 0, 3), (531, 128, 300), kv_heads=3, group=2, page_size=64, block_size=128, query_block=64, dim=80),
    Geometry((129,), (700,), group=2, page_size=256, block_size=256, query_block=128, layout="stacked"),
    Geometry((200,), (450,), group=2, page_size=32, block_size=64, query_block=128, layout="odd"),
)


@pytest.mark.parametrize("g", HARD, ids=str)
def test_hard_places(backend: Backend, g: Geometry) -> None:
    """Several KV heads of several query heads, query blocks that differ from KV blocks, blocks of several units."""
    step = make_step(g, backend.device, coherent=True)
    frequencies = 10_000.0 ** -torch.linspace(0, 1, g.dim // 2)
    sizes = {"block_size": g.block_size, "query_block": g.query_block}
    for threshold in (0.02, 0.1, 0.2):
        selector = SeerGate(gate_weights(g.heads, g.dim, 5), frequencies, 1.1, threshold, **sizes)
        mask = backend.select(step.q, step.kv, step.batch, on(selector, backend.device)).mask
        assert_selection(step, selector, mask)


def test_float64_leaves_little_open() -> None:
    """The bound is tight enough to judge: over random steps under 1 % of the scored bits are within rounding."""
    shares: list[float] = []
    kept: list[float] = []

    @for_all(examples=2, selector=seer_gate)
    def collect(backend: Backend, g: Geometry, selector: SeerGate) -> None:
        step = make_step(g, backend.device, coherent=True)
        mask = backend.select(step.q, step.kv, step.batch, selector).mask
        shares.append(assert_selection(step, selector, mask))
        kept.extend([float(mask.float().mean())] if mask.numel() else [])

    collect(REFERENCE)
    assert sum(shares) / len(shares) < 0.01
    assert 0.1 < sum(kept) / len(kept) < 0.9, "thresholds that decide nothing"


@for_all(examples=0.5, selector=seer_gate)
def test_gate_keys_are_trusted(backend: Backend, g: Geometry, selector: SeerGate) -> None:
    """With gate keys no key is read, nor the means beside them, nor a unit behind seq_lens."""
    step, selector = make_step(g, backend.device, coherent=True), on(selector, backend.device)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, gate=selector)
    assert summary.gate is not None
    needed = torch.zeros(summary.k_mean.shape[:2], dtype=torch.bool)
    for _, _, _, page, slot in units(step):
        needed[page, slot] = True
    pooled = summary.gate.pooled.masked_fill(~needed.to(backend.device)[..., None, None], math.nan)
    gate = GateKeys(pooled, summary.gate.inv_freq, summary.gate.rope_scale)
    nothing = PagedKV(*(torch.full_like(c, math.nan) for c in (step.kv.k, step.kv.v)), step.kv.page_table)
    means = torch.full_like(summary.k_mean, math.nan)
    mask = backend.select(
        step.q, nothing, step.batch, selector, summary=KVSummary(means, None, summary.unit, gate)
    ).mask
    assert_selection(step, selector, mask)
    assert torch.equal(mask, backend.select(step.q, step.kv, step.batch, selector).mask)


@for_all(examples=0.5, selector=seer_gate, with_gate=st.booleans())
def test_prefill_equals_the_stages(backend: Backend, g: Geometry, selector: SeerGate, with_gate: bool) -> None:
    """Tables exactly, outputs bit for bit, with a summary (brought up to date, gate keys or not) and without."""
    step, selector = make_step(g, backend.device, coherent=True), on(selector, backend.device)
    settings: dict[str, Any] = g.grouping
    selection = backend.select(step.q, step.kv, step.batch, selector)
    table = backend.build_table(backend.unite(selection, step.batch, **settings))
    out = backend.attend(step.q, step.kv, step.batch, table)
    stale = backend.summarize(
        step.kv, step.batch, block_size=g.block_size, since=10**6, gate=selector if with_gate else None
    )
    past = replace(step.batch, cu_seqlens_q=torch.zeros_like(step.batch.cu_seqlens_q), seq_lens=step.batch.past_lens)
    backend.summarize(step.kv, past, block_size=g.block_size, since=0, summary=stale)
    for summary in (None, stale):
        got = backend.prefill(step.q, step.kv, step.batch, selector=selector, summary=summary, **settings)
        assert torch.equal(got[: step.rows], out[: step.rows])
        again = backend.select_table(step.q, step.kv, step.batch, selector=selector, summary=summary, **settings)
        assert torch.equal(again.counts, table.counts)


def test_keys_are_pooled_as_they_were_before_rope(backend: Backend) -> None:
    """The gate keys of a cache of turned keys are those of the keys before they were turned."""
    g = Geometry((70,), (451,))
    step = make_step(g, backend.device)
    frequencies = (10_000.0 ** -torch.linspace(0, 1, 32)).to(backend.device)
    weights = gate_weights(1, 64, 0).to(backend.device)
    k = step.kv.k.clone()
    for _, start, count, page, _ in units(step):
        position = torch.arange(start, start + count, device=backend.device)
        k[page, :count] = rotate(k[page, :count].transpose(0, 1), position, frequencies, 1.5).transpose(0, 1)
    kv = PagedKV(k, step.kv.v, step.kv.page_table)
    turned = backend.summarize(kv, step.batch, block_size=64, gate=SeerGate(weights, frequencies, rope_scale=1.5)).gate
    before = backend.summarize(step.kv, step.batch, block_size=64, gate=SeerGate(weights, frequencies * 0)).gate
    for _, _, _, page, slot in units(step):
        torch.testing.assert_close(turned.pooled[page, slot], before.pooled[page, slot], rtol=1e-4, atol=1e-5)


def test_gate_keys_of_another_scale_are_refused() -> None:
    g = Geometry((70,), (451,))
    step = make_step(g, "cpu")
    frequencies = 10_000.0 ** -torch.linspace(0, 1, 32)
    weights = gate_weights(g.heads, 64, 0)
    summary = summarize(step.kv, step.batch, block_size=64, gate=SeerGate(weights, frequencies, rope_scale=2.0))
    with pytest.raises(ValueError, match=r"^summary\.gate: expected keys pooled with rope_scale 1\.0, got 2\.0$"):
        select(step.q, step.kv, step.batch, SeerGate(weights, frequencies), summary=summary)


# ---- pooled keys ----


def units(step: Step) -> list[tuple[int, int, int, int, int]]:
    """(request, first token, tokens, page, slot of the page) of every unit that holds a token."""
    g = step.geometry
    unit = min(g.page_size, g.block_size)
    table = step.kv.page_table.tolist()
    return [
        (b, start, min(unit, g.seq_lens[b] - start), table[b][start // g.page_size], start % g.page_size // unit)
        for b in g.requests
        for start in range(0, g.seq_lens[b], unit)
    ]


@for_all(selector=seer_gate)
def test_pooled_keys_of_every_unit(backend: Backend, g: Geometry, selector: SeerGate) -> None:
    """Largest, smallest and mean of each unit's valid tokens before RoPE; what no request owns is zero."""
    step = make_step(g, backend.device)
    gate = backend.summarize(step.kv, step.batch, block_size=g.block_size, gate=on(selector, backend.device)).gate
    owned = torch.zeros(gate.pooled.shape[:2], dtype=torch.bool)
    for b, start, count, page, slot in units(step):
        owned[page, slot] = True
        for h in range(g.kv_heads):
            tokens, position = step.keys[b][start : start + count, h].cpu(), torch.arange(start, start + count)
            exact, error = pooled_key(tokens, position, selector)
            assert bool(((gate.pooled[page, slot, h].cpu().double() - exact).abs() <= error + 1e-30).all())
    assert not bool(gate.pooled[~owned.to(backend.device)].any())


@for_all(examples=0.5, selector=seer_gate, cut=st.floats(0, 1))
def test_extended_equals_recomputed(backend: Backend, g: Geometry, selector: SeerGate, cut: float) -> None:
    """Made over a part and then extended, gate keys have the bits of ones that were made whole, and units of the part
    are not touched."""
    step, selector = make_step(replace(g, shared_pages=0), backend.device), on(selector, backend.device)
    whole = backend.summarize(step.kv, step.batch, block_size=g.block_size, gate=selector)
    part = torch.tensor([int(n * cut) for n in g.seq_lens], dtype=torch.int32, device=backend.device)
    before = replace(
        step.batch, cu_seqlens_q=torch.zeros_like(step.batch.cu_seqlens_q), seq_lens=part, prompt_lens=None
    )
    summary = backend.summarize(step.kv, before, block_size=g.block_size, gate=selector)
    for b, start, count, page, slot in units(step):
        if start + count <= int(part[b]) // summary.unit * summary.unit:
            summary.gate.pooled[page, slot] += 1.0
    backend.summarize(step.kv, step.batch, block_size=g.block_size, since=part, summary=summary)
    for b, start, count, page, slot in units(step):
        marked = start + count <= int(part[b]) // summary.unit * summary.unit
        expected = whole.gate.pooled[page, slot] + (1.0 if marked else 0.0)
        assert torch.equal(summary.gate.pooled[page, slot], expected)


def test_rope_is_that_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=1,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        )
    )
    assert rope.attention_scaling > 1.05
    position = torch.tensor([0, 1, 700, 3999])
    x = torch.randn((1, 1, 4, 64), generator=torch.Generator().manual_seed(0))
    expected, _ = apply_rotary_pos_emb(x, x, *rope(x, position[None]))
    turned = rotate(x[0, 0], position, rope.inv_freq, rope.attention_scaling)
    torch.testing.assert_close(turned, expected[0, 0], rtol=0, atol=1e-6)
    back = unrotate(turned, position, rope.inv_freq, rope.attention_scaling)
    torch.testing.assert_close(back, x[0, 0], rtol=0, atol=1e-5)


# ---- bad input ----


def gate(**changes: Any) -> SeerGate:
    return SeerGate(**({"weights": torch.zeros(2, 192, 64), "inv_freq": torch.ones(32)} | changes))


BAD_GATES: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"weights": [1.0]}, "weights: expected a torch.Tensor, got list"),
    "dims": ({"weights": torch.zeros(192, 64)}, "weights: expected 3 dimensions"),
    "dtype": ({"weights": torch.zeros(2, 192, 64, dtype=torch.float64)}, "weights: expected dtype float16"),
    "shape": ({"weights": torch.zeros(2, 128, 64)}, "weights: expected shape (2, 192, 64) (Hq, 3 D, D)"),
    "frequencies": ({"inv_freq": torch.ones(64)}, "inv_freq: expected shape (32,) (half the head dimension"),
    "integers": ({"inv_freq": torch.ones(32, dtype=torch.int64)}, "inv_freq: expected a floating-point dtype"),
    "scale": ({"rope_scale": 0.0}, "rope_scale: expected a finite number above 0, got 0.0"),
    "infinite": ({"rope_scale": math.inf}, "rope_scale: expected a finite number above 0, got inf"),
    "scale type": ({"rope_scale": "1"}, "rope_scale: expected a finite number above 0, got '1'"),
    "threshold": ({"threshold": 1.5}, "threshold: expected a number from 0 to 1, got 1.5"),
    "sinks": ({"sink_blocks": -1}, "sink_blocks: expected an int of at least 0, got -1"),
    "block": ({"block_size": 32}, "block_size: expected one of 64, 128, 256, got 32"),
}


@pytest.mark.parametrize("case", BAD_GATES)
def test_bad_gates_are_refused(case: str) -> None:
    changes, message = BAD_GATES[case]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        gate(**changes)
    assert message in str(refusal.value)


@pytest.mark.parametrize("stage", ["select", "prefill", "select_table"])
def test_gates_of_another_model_are_refused_before_anything_runs(stage: str) -> None:
    step = make_step(Geometry((5,), (200,), group=4), "cpu")
    summary = summarize(step.kv, step.batch, block_size=64, since=200)
    arguments: dict[str, Any] = {"summary": summary}
    if stage == "select":
        run: Callable[..., Any] = functools.partial(select, step.q, step.kv, step.batch)
    else:
        run = functools.partial({"prefill": prefill, "select_table": select_table}[stage], step.q, step.kv, step.batch)
        arguments |= {"heads_per_group": 1}
    name = {"selector": gate()} if stage != "select" else {}
    positional = (gate(),) if stage == "select" else ()
    with pytest.raises(ValueError, match=r"selector.weights: expected shape \(4, 192, 64\)"):
        run(*positional, **name, **arguments)
    assert not bool(summary.k_mean.any())


def test_summaries_without_gate_keys_and_foreign_gates() -> None:
    step = make_step(Geometry((5,), (200,), group=2), "cpu")
    plain = summarize(step.kv, step.batch, block_size=64)
    with pytest.raises(ValueError, match=r"summary: expected a summary with gate keys"):
        summarize(step.kv, step.batch, block_size=64, summary=plain, gate=gate())
    with pytest.raises(ValueError, match="gate: expected a SeerGate or None, got str"):
        summarize(step.kv, step.batch, block_size=64, gate="seer")  # type: ignore[arg-type]
    wide = gate(weights=torch.zeros(2, 384, 128), inv_freq=torch.ones(64))
    with pytest.raises(ValueError, match=r"gate.inv_freq: expected shape \(32,\)"):
        summarize(step.kv, step.batch, block_size=64, gate=wide)
    good = summarize(step.kv, step.batch, block_size=64, gate=gate()).gate
    assert good is not None
    with pytest.raises(ValueError, match=r"gate.inv_freq: expected shape \(32,\)"):
        GateKeys(good.pooled, torch.ones(5), 1.0)
    with pytest.raises(ValueError, match=r"gate\.pooled: expected shape"):
        KVSummary(plain.k_mean[:2], None, 16, good)
    strided = GateKeys(good.pooled.repeat(1, 1, 1, 2)[..., ::2], good.inv_freq, 1.0)
    with pytest.raises(ValueError, match=r"summary.gate.pooled: expected a contiguous tensor"):
        select(step.q, step.kv, step.batch, gate(), summary=KVSummary(plain.k_mean, None, 16, strided))


# ---- files ----

LAYERS, HEADS, DIM = 3, 4, 64
MODEL: dict[str, Any] = {"layers": LAYERS, "heads": HEADS, "head_dim": DIM}


def name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight"


def published() -> dict[str, Tensor]:
    """The tensors of a checkpoint in the published format, bfloat16 as published."""
    return {name(i): gate_weights(HEADS, DIM, i).bfloat16() for i in range(LAYERS)}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("file", ["attn_gate_weights.pth", "gates.safetensors"])
def test_published_files_become_selectors(tmp_path: Path, file: str) -> None:
    frequencies = torch.ones(32)
    gates = load_seer_gates(
        write(tmp_path / file, published()),
        inv_freq=frequencies,
        threshold=0.25,
        rope_scale=1.5,
        query_block=128,
        **MODEL,
    )
    assert sorted(gates) == [0, 1, 2]
    for layer, its in gates.items():
        assert torch.equal(its.weights, published()[name(layer)])
        assert (its.threshold, its.rope_scale, its.block_size, its.query_block) == (0.25, 1.5, 64, 128)
        assert torch.equal(its.inv_freq, frequencies)


@pytest.mark.parametrize("file", ["attn_gate_weights.pth", "gates.safetensors"])
def test_without_a_number_of_layers_the_file_says_which_it_has(tmp_path: Path, file: str) -> None:
    some = published() | {name(11): published()[name(0)]}
    del some[name(1)]
    anyhow = MODEL | {"layers": None}
    gates = load_seer_gates(write(tmp_path / file, some), inv_freq=torch.ones(32), **anyhow)
    assert list(gates) == [0, 2, 11]
    assert torch.equal(gates[11].weights, published()[name(0)])
    write(tmp_path / file, some | {name(2).replace(".2.", ".02."): some[name(2)].clone()})
    with pytest.raises(ValueError, match=r"expected only the gate weights of 3 layers, got .*layers.02.self_attn"):
        load_seer_gates(tmp_path / file, inv_freq=torch.ones(32), **anyhow)
    write(tmp_path / file, {})
    with pytest.raises(ValueError, match="expected gate weights of at least one layer, got none"):
        load_seer_gates(tmp_path / file, inv_freq=torch.ones(32), **anyhow)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing layer": (lambda t: {n: x for n, x in t.items() if ".1." not in n}, f"expected a tensor {name(1)}"),
    "other shape": (
        lambda t: t | {name(2): torch.zeros(4, 192, 32)},
        f"{name(2)}: expected a floating-point tensor of",
    ),
    "other heads": (lambda t: t | {name(0): torch.zeros(2, 192, 64)}, "shape (4, 192, 64) (Hq, 3 D, D)"),
    "integers": (lambda t: t | {name(0): torch.zeros(4, 192, 64).int()}, "got torch.int32 (4, 192, 64)"),
    "nan": (lambda t: t | {name(1): torch.full((4, 192, 64), math.nan)}, f"{name(1)}: expected finite values"),
    "more layers": (
        lambda t: t | {name(3): t[name(0)].clone()},
        f"expected only the gate weights of 3 layers, got {name(3)}",
    ),
    "query projection": (
        lambda t: t | {name(0).replace("_k", "_q"): torch.zeros(1)},
        "expected only tensors named model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight",
    ),
}


@pytest.mark.parametrize("file", ["attn_gate_weights.pth", "gates.safetensors"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_spoiled_files_are_refused(tmp_path: Path, case: str, file: str) -> None:
    spoil, message = BAD_FILES[case]
    path = write(tmp_path / file, spoil(published()))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are compared below)
        load_seer_gates(path, inv_freq=torch.ones(32), **MODEL)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, proof = tmp_path / "attn_gate_weights.pth", tmp_path / "proof"
    content = published() | {name(1): Malicious(proof)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=r"expected tensors only, got a file that torch\.load refuses with weights_only=True$"
    ):
        load_seer_gates(path, inv_freq=torch.ones(32), **MODEL)
    assert not proof.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert proof.exists(), "the file would have done it"


@pytest.mark.parametrize("file", ["attn_gate_weights.pth", "gates.safetensors"])
@pytest.mark.parametrize("data", [b"", b"not weights", b"\x80\x02K\x01."], ids=["empty", "text", "a number"])
def test_other_files_are_refused(tmp_path: Path, file: str, data: bytes) -> None:
    (tmp_path / file).write_bytes(data)
    what = r"(something else \(\w+\)|a file that torch.load refuses with weights_only=True|int)"
    with pytest.raises(ValueError, match=f"{file}: expected .+, got {what}$"):
        load_seer_gates(tmp_path / file, inv_freq=torch.ones(32), **MODEL)
    with pytest.raises(FileNotFoundError, match="absent: expected a file of gate weights"):
        load_seer_gates(tmp_path / "absent", inv_freq=torch.ones(32), **MODEL)
    with pytest.raises(ValueError, match="layers: expected an int of at least 1, got 0"):
        load_seer_gates(tmp_path / file, inv_freq=torch.ones(32), **(MODEL | {"layers": 0}))
    for given, words in (
        ({"inv_freq": None}, "inv_freq: expected a torch.Tensor, got NoneType"),
        ({"device": "bogus"}, "device: expected cpu, or a GPU of this machine such as cuda:0, got 'bogus'"),
    ):
        with pytest.raises(ValueError, match=words):  # before the file is looked at
            load_seer_gates(tmp_path / "absent", **({"inv_freq": torch.ones(32)} | MODEL | given))
