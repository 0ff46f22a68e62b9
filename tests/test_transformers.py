"""The transformers integration: tiny random models give sdpa's logits, and sparse steps the reference's results."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache

import reference
from compactattn import Dense, FlashPrefill, KeyBounds, PagedKV, PrefillBatch, SeerGate, XAttention, prefill, summarize
from compactattn.integrations.transformers import attention, enable, means, prompt_lens
from tests.numerics import assert_as_close
from tests.strategies import gate_weights

DENSE = Dense(block_size=64, query_block=64)
SPARSE = FlashPrefill(alpha=1.0, sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
BOUNDS = KeyBounds(threshold=0.95, sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
GATE = SeerGate(gate_weights(4, 64, 0), 10_000.0 ** (-torch.arange(0, 64, 2) / 64), threshold=0.3)
PADS = (0, 70, 203)
CHUNKS = (128, 64, 1, 1, 100, 3, 1)
TOKENS = sum(CHUNKS)
VOCABULARY = 61


def config(family: str, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "initializer_range": 0.2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "Qwen3Moe":  # every expert of every token: a choice of experts would make rounding errors jump
        fields |= {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    if family == "Mistral":
        fields["sliding_window"] = None
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**(fields | changes))


@remember
def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(7)
    made = getattr(transformers, f"{family}ForCausalLM")(config(family, **changes)).eval().to(torch.float32)
    if family == "Qwen3Moe":
        made.set_experts_implementation("eager")  # the only one for float64
    with torch.no_grad():  # what a cast to dtype would round away is no error of the attention
        for parameter in made.parameters():
            parameter.copy_(parameter.to(dtype))
    return made.to(dtype)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    enable(selector=DENSE, heads_per_group=2)
    yield
    enable(selector=DENSE, heads_per_group=2)


def prompt(requests: int, tokens: int = TOKENS, pads: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, tokens], and the attention mask of left-padded ones."""
    ids = torch.randint(3, VOCABULARY, (requests, tokens), generator=torch.Generator().manual_seed(tokens))
    if pads is None:
        return ids, None
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def logits(
    run: Any, name: str, ids: Tensor, mask: Tensor | None = None, chunks: tuple[int, ...] = CHUNKS, cache: Any = None
) -> Tensor:
    """Feed the chunks one after the other under the attention `name`: logits [B, tokens, vocabulary]."""
    run.set_attn_implementation(name)
    results, stop = [], 0 if cache is None else int(cache.get_seq_length())
    cache = DynamicCache(config=run.config) if cache is None else cache
    for n in chunks:
        start, stop = stop, stop + n
        seen = None if mask is None else mask[:, :stop]
        results.append(run(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(results, 1)


def assert_like_sdpa(
    make: Callable[..., Any], got: Tensor, ids: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> None:
    """SPEC 3.3 for the logits of each request's own tokens: as close to float64 as sdpa's are."""
    exact = logits(copy.deepcopy(make(dtype)).double(), "sdpa", ids, mask, (ids.shape[1],))
    plain = [logits(make(dtype), "sdpa", ids, mask, chunks) for chunks in ((ids.shape[1],), CHUNKS)]
    plain.append(logits(make(dtype), "eager", ids, mask))
    for b in range(len(ids)):
        own = slice(0, None) if mask is None else mask[b].bool()
        assert_as_close(got[b, own], [p[b, own] for p in plain], exact[b, own], f"request {b}")


class Spy:
    """Every call of the library's prefill by the integration: its arguments and its result."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        run = attention.prefill

        def spied(*arguments: Any, **settings: Any) -> Tensor:
            self.calls.append((arguments, settings, run(*arguments, **settings)))
            return self.calls[-1][2]

        monkeypatch.setattr(attention, "prefill", spied)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


# ---- Dense() gives sdpa's logits ----


@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe", "Mistral"])
def test_chunks_with_dense_give_the_logits_of_sdpa(
    family: str, dtype: torch.dtype, pads: tuple[int, ...] | None, spy: Spy
) -> None:
    ids, mask = prompt(3, pads=pads)
    got = logits(model(family, dtype), "compactattn", ids, mask)
    assert len(spy.calls) == 2 * sum(n > 1 for n in CHUNKS)
    assert_like_sdpa(lambda dtype: model(family, dtype), got, ids, mask, dtype)


@pytest.mark.parametrize("capacity", [TOKENS, 320, 384], ids=["exact", "unaligned", "aligned"])
@pytest.mark.parametrize("pads", [None, (0,), PADS], ids=["whole", "one", "left-padded"])
def test_a_static_cache_gives_the_logits_of_sdpa(capacity: int, pads: tuple[int, ...] | None, spy: Spy) -> None:
    ids, mask = prompt(3 if pads is None else len(pads), pads=pads)
    run = model("Llama")
    cache = StaticCache(config=run.config, max_cache_len=capacity)
    got = logits(run, "compactattn", ids, mask, cache=cache)
    assert len(spy.calls) == 8
    assert max(call[0][1].k.shape[0] for call in spy.calls) <= 2 * len(ids) * -(-capacity // 64), "pages"
    assert_like_sdpa(lambda dtype: model("Llama", dtype), got, ids, mask, torch.float32)


def test_without_a_cache_and_in_one_piece() -> None:
    ids, mask = prompt(3, pads=PADS)
    run = model("Llama")
    run.set_attn_implementation("compactattn")
    with torch.no_grad():
        got = run(ids, attention_mask=mask, use_cache=False).logits
    assert_like_sdpa(lambda dtype: model("Llama", dtype), got, ids, mask, torch.float32)


def test_padding_gives_finite_logits_and_no_rows_to_the_library(spy: Spy) -> None:
    ids, mask = prompt(3, pads=PADS)
    assert logits(model("Llama"), "compactattn", ids, mask).isfinite().all()
    (q, _, batch), _, _ = spy.calls[0]
    assert batch.q_lens.tolist() == [128, 58, 0]
    assert len(q) == 186


def test_one_token_at_a_time_is_sdpa_bit_for_bit(spy: Spy) -> None:
    ids, mask = prompt(3, 80, (0, 5, 40))
    results = [logits(model("Llama"), name, ids, mask, (1,) * 80) for name in ("compactattn", "sdpa")]
    assert torch.equal(*results)
    assert not spy.calls


def test_first_chunks_are_dense_under_any_selector(spy: Spy) -> None:
    enable(selector=FlashPrefill(alpha=1.0, sink_blocks=0, window_blocks=0, block_size=64), heads_per_group=1)
    ids, mask = prompt(3, pads=PADS)
    got = logits(model("Llama"), "compactattn", ids, mask, (TOKENS,))
    assert all(isinstance(settings["selector"], Dense) for _, settings, _ in spy.calls), "nothing to select by score"
    assert_like_sdpa(lambda dtype: model("Llama", dtype), got, ids, mask, torch.float32)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
def test_generate_with_prefill_chunks(kind: str, pads: tuple[int, ...] | None, spy: Spy) -> None:
    ids, mask = prompt(3, 300, pads)
    mask = torch.ones_like(ids) if mask is None else mask
    run = model("Llama")
    texts, scores = [], []
    for name in ("compactattn", "sdpa"):
        run.set_attn_implementation(name)
        cache = (
            DynamicCache(config=run.config) if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=308)
        )
        result = run.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            prefill_chunk_size=96,
            output_scores=True,
            return_dict_in_generate=True,
        )
        texts.append(result.sequences)
        scores.append(torch.stack(result.scores))
    assert torch.equal(*texts)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)  # the tests above have the derived tolerance
    lengths = [(call[0][2].max_q_len, call[0][2].max_seq_len) for call in spy.calls]
    assert lengths == [(n, s) for n, s in ((96, 96), (96, 192), (96, 288), (12, 300)) for _ in range(2)]


def test_beam_search_with_prefill_chunks() -> None:
    ids, _ = prompt(1, 300)
    run, results = model("Llama"), []
    for name in ("compactattn", "sdpa"):
        run.set_attn_implementation(name)
        results.append(
            run.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=3,
                num_return_sequences=3,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                prefill_chunk_size=96,
            )
        )
    assert torch.equal(*results)


def test_compiled_decode_steps() -> None:
    """A chunk after compiled decode steps, which nobody follows, equals one after steps that were followed."""
    enable(selector=SPARSE, heads_per_group=2)
    ids, _ = prompt(1)
    run, results = model("Llama"), []
    for compiled in (False, True):
        cache = StaticCache(config=run.config, max_cache_len=320)
        logits(run, "compactattn", ids, None, (128, 63), cache)
        decode = torch.compile(run, backend="eager") if compiled else run
        with torch.no_grad():
            for n in range(191, 195):
                decode(ids[:, n : n + 1], past_key_values=cache)
        results.append(logits(run, "compactattn", ids, None, (100,), cache))
    torch.compiler.reset()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_beside_an_encoder(spy: Spy) -> None:
    """Bart: the decoder's own layers run in chunks, its encoder and the attention between them are sdpa's."""
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    torch.manual_seed(7)
    run = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=VOCABULARY, d_model=128, init_std=0.2, **sizes)
    ).eval()
    ids, _ = prompt(2)
    encoded = run.get_encoder()(ids[:, :90])

    def decode(name: str, chunks: tuple[int, ...]) -> tuple[Tensor, Any]:
        run.set_attn_implementation(name)
        cache = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
        parts = [
            run(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache).logits
            for part in ids.split(chunks, 1)
        ]
        return torch.cat(parts, 1), cache.self_attention_cache

    exact, _ = decode("sdpa", CHUNKS)
    enable(selector=DENSE, heads_per_group=1)
    torch.testing.assert_close(decode("compactattn", CHUNKS)[0], exact, rtol=1e-4, atol=1e-4)
    assert len(spy.calls) == 2 * sum(n > 1 for n in CHUNKS)
    enable(selector=SPARSE, heads_per_group=1)
    sparse, cache = decode("compactattn", CHUNKS)
    assert not torch.allclose(sparse[:, -1], exact[:, -1], atol=1e-3)
    assert [pooled.seen for pooled in pooled_layers(cache)] == [TOKENS] * 2


# ---- layers and steps that are left to sdpa ----


WINDOWED: dict[str, tuple[str, dict[str, Any], int]] = {
    "all layers": ("Mistral", {"sliding_window": 70}, 0),
    "one of two": (
        "Qwen3",
        {"sliding_window": 70, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        1,
    ),
    "Gemma 3": (
        "Gemma3",
        {"sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 64},
        1,
    ),
}


@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("case", WINDOWED)
def test_sliding_windows(case: str, kind: str, pads: tuple[int, ...] | None, spy: Spy) -> None:
    """Windowed layers are sdpa's; the full ones among them are not."""
    family, changes, full = WINDOWED[case]
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    ids, mask = prompt(3, pads=pads)

    def make(dtype: torch.dtype) -> Any:
        return windowed(family, dtype, case)

    run = make(torch.float32)
    cache = None if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=320)
    got = logits(run, "compactattn", ids, mask, cache=cache)
    assert len(spy.calls) == full * 4
    assert_like_sdpa(make, got, ids, mask, torch.float32)


@remember
def windowed(family: str, dtype: torch.dtype, case: str) -> Any:
    return model.__wrapped__(family, dtype, **WINDOWED[case][1])


def test_masks_that_are_not_left_padding_run_sdpa(spy: Spy) -> None:
    ids, _ = prompt(2, 200)
    run = model("Llama")
    right = (torch.arange(200) < torch.tensor([200, 150])[:, None]).long()
    with pytest.warns(UserWarning, match="chunks of left-padded batches"):
        got = logits(run, "compactattn", ids, right, (200,))
    assert torch.equal(got, logits(run, "sdpa", ids, right, (200,)))
    own = torch.ones(200, 200).tril().bool() & (
        torch.rand(2, 1, 200, 200, generator=torch.Generator().manual_seed(0)) < 0.9
    )
    own |= torch.eye(200, dtype=torch.bool)
    results = []
    for name in ("compactattn", "sdpa"):
        run.set_attn_implementation(name)
        with torch.no_grad():
            results.append(run(ids, attention_mask=own, use_cache=False).logits)
    assert torch.equal(*results)
    assert not spy.calls


def test_packed_sequences_stay_apart(spy: Spy) -> None:
    ids, _ = prompt(1, 200)
    run = model("Llama")
    positions = torch.cat([torch.arange(80), torch.arange(120)])[None]
    run.set_attn_implementation("compactattn")
    with torch.no_grad():
        packed = run(ids, position_ids=positions, use_cache=False).logits
        alone = run(ids[:, 80:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 80:], alone, rtol=1e-4, atol=1e-4)
    assert len(spy.calls) == 2, "only the sequence by itself"


# ---- sparse steps ----


@pytest.mark.parametrize(
    "selector",
    [SPARSE, BOUNDS, XAttention(threshold=0.4, block_size=64, query_block=64), GATE],
    ids=["FlashPrefill", "KeyBounds", "XAttention", "SeerGate"],
)
@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
@pytest.mark.parametrize(
    ("heads", "span", "correction"), [(2, None, False), (2, 1, False), (2, 1, True), ("auto", "auto", False)]
)
def test_sparse_steps_are_the_pipeline_of_the_reference(
    selector: Any, pads: tuple[int, ...] | None, heads: Any, span: Any, correction: bool
) -> None:
    """Each layer's result against the reference, given what transformers gave to the attention function."""
    enable(selector=selector, heads_per_group=heads, query_blocks_per_span=span, correction=correction)
    registered = AttentionInterface()["compactattn"]
    calls = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        result = registered(module, query, key, value, mask, **others)
        calls.append((query, key.clone(), value.clone(), result[0], others["scaling"]))
        return result

    AttentionInterface.register("compactattn", record)
    ids, mask = prompt(3, pads=pads)
    chunks = (128, 64, 64, 1, 41)
    sparse = logits(model("Llama"), "compactattn", ids, mask, chunks)
    enable(selector=DENSE, heads_per_group=2)
    assert not torch.allclose(sparse[:, -1], logits(model("Llama"), "compactattn", ids, mask, chunks)[:, -1], atol=1e-3)
    for query, key, value, out, scaling in calls:
        n, seen = query.shape[2], key.shape[2]
        for b, pad in enumerate(pads or (0, 0, 0)):
            rows = min(n, seen - pad)
            if rows <= 0 or n == 1:
                continue
            k, v = (x[b : b + 1, :, pad:].transpose(1, 2).double() for x in (key, value))
            q = query[b, :, n - rows :].transpose(0, 1)
            batch = PrefillBatch.from_lens([rows], [seen - pad])
            exact_kv = PagedKV.from_contiguous(k, v, 64)
            kv = PagedKV(exact_kv.k.float(), exact_kv.v.float(), exact_kv.page_table)
            selection = reference.select(q, kv, batch, selector, scale=scaling)
            table = reference.build_table(
                reference.unite(selection, batch, heads_per_group=heads, query_blocks_per_span=span)
            )
            its_means = reference.summarize(exact_kv, batch, block_size=64, values=True) if correction else None
            exact = reference.attend(q.double(), exact_kv, batch, table, scale=scaling, correction=its_means)
            plain = reference.attend(q, kv, batch, table, scale=scaling, correction=its_means)
            torch.testing.assert_close(out[b, n - rows :].double(), exact, rtol=1e-5, atol=1e-5)
            assert (out[b, n - rows :] - plain).abs().max() < 1e-4
            assert out[b, : n - rows].eq(0).all()


def test_settings_by_layer() -> None:
    """A mapping leaves other layers dense, and so does dense_layers."""
    ids, _ = prompt(1)
    run = model("Llama")
    both = {}
    for name, settings in {
        "second by mapping": {"selector": {1: SPARSE}},
        "second by depth": {"selector": SPARSE, "dense_layers": 1},
        "first": {"selector": {0: SPARSE}},
        "none": {"selector": SPARSE, "dense_layers": 2},
        "dense": {"selector": DENSE},
    }.items():
        enable(**settings, heads_per_group=2)
        both[name] = logits(run, "compactattn", ids)
    torch.testing.assert_close(both["second by mapping"], both["second by depth"], rtol=1e-4, atol=1e-4)
    assert torch.equal(both["none"], both["dense"])
    for one, other in (("first", "second by depth"), ("first", "dense"), ("second by depth", "dense")):
        assert not torch.allclose(both[one], both[other], atol=1e-3)


def test_each_layer_has_the_selector_that_the_mapping_names(spy: Spy) -> None:
    """Of other kinds and block sizes; a layer without one is dense, and so is every first chunk."""
    chosen = {0: XAttention(threshold=0.4, block_size=128), 2: SPARSE}
    enable(selector=chosen, heads_per_group="auto", query_blocks_per_span="auto")
    run = model("Llama", num_hidden_layers=3)
    logits(run, "compactattn", prompt(1)[0], chunks=(192, 100))
    used = [settings["selector"] for _, settings, _ in spy.calls]
    assert used[3:] == [chosen[0], Dense(), chosen[2]]
    assert [type(selector) for selector in used[:3]] == [Dense] * 3
    assert [call[0][1].page_size for call in spy.calls[3:]] == [128, 128, 64]
    assert {settings["heads_per_group"] for _, settings, _ in spy.calls} == {"auto"}
    assert {settings["query_blocks_per_span"] for _, settings, _ in spy.calls} == {"auto"}


@pytest.mark.parametrize("span", [None, 1])
def test_the_end_of_the_prompt_stays_dense_where_its_length_is_known(span: int | None, spy: Spy) -> None:
    """The query blocks that reach into it alone: under a union over the chunk the others are not dense either."""
    selector = FlashPrefill(
        alpha=1.0, sink_blocks=0, window_blocks=0, block_size=64, query_block=64, dense_last_blocks=1
    )
    ids, mask = prompt(2, 600, pads=(0, 70))
    enable(selector=selector, heads_per_group=2, query_blocks_per_span=span)
    with prompt_lens([600, 530]):
        logits(model("Llama"), "compactattn", ids, mask, (384, 216))
    (q, kv, batch), _, out = spy.calls[2]
    assert batch.prompt_lens.tolist() == [600, 530]
    dense, sparse = (
        prefill(q, kv, batch, selector=its, heads_per_group=2, query_blocks_per_span=span)
        for its in (DENSE, replace(selector, dense_last_blocks=0))
    )
    for b, length in enumerate(batch.prompt_lens.tolist()):  # query blocks that reach into the last 64 positions
        n, first = batch.q_lens[b], int(batch.cu_seqlens_q[b])
        end = first + (length - 64 - int(batch.past_lens[b])) // 64 * 64
        assert torch.equal(out[end : first + n], dense[end : first + n])
        assert span is None or torch.equal(out[first:end], sparse[first:end])
        assert not torch.allclose(out[first:end], dense[first:end], atol=1e-3)
    with pytest.raises(ValueError, match="dense_last_blocks: expected 0, or a forward pass inside prompt_lens"):
        logits(model("Llama"), "compactattn", ids, mask)
    with pytest.raises(ValueError, match="prompt_lens: expected a list of ints, got int"), prompt_lens(3000):
        pass
    with prompt_lens([TOKENS]), pytest.raises(ValueError, match="prompt_lens: expected 2 entries"):
        logits(model("Llama"), "compactattn", ids, mask)
    with (
        pytest.raises(ValueError, match=r"prompt_lens\[1\]: expected an int of at least 1, got 0"),
        prompt_lens([5, 0]),
    ):
        pass


# ---- key means ----


def pooled_layers(cache: Any) -> list[Any]:
    return [means._pooled.get(layer) for layer in cache.layers]


def assert_fresh(pooled: Any, spy: Spy, call: int) -> None:
    """The kept means are those that a new summary of the same cache has."""
    (_, kv, batch), settings, _ = spy.calls[call]
    fresh = summarize(kv, batch, block_size=64)
    for b, length in enumerate(batch.seq_lens.tolist()):
        pages = kv.page_table[b, : -(-length // 64)].long()
        assert torch.equal(pooled.summary.k_mean[pages], fresh.k_mean[pages])
    assert settings["summary"] is pooled.summary


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_bounds_are_extended(kind: str, spy: Spy) -> None:
    enable(selector=BOUNDS, heads_per_group=2)
    run = model("Llama")
    ids, mask = prompt(3, pads=PADS)
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=300)
    logits(run, "compactattn", ids, mask, (128, 63), cache)
    pooled = pooled_layers(cache)[1]
    pooled.summary.k_bounds.add_(100.0)
    logits(run, "compactattn", ids, mask, (1, 1, 1, 37), cache)
    assert pooled_layers(cache)[1] is pooled
    assert bool((pooled.summary.k_bounds[pooled.page_table[0, :2].long()] > 50).all())
    (_, kv, batch), settings, _ = spy.calls[-1]
    assert settings["summary"] is pooled.summary
    fresh = summarize(kv, batch, block_size=64, bounds=True).k_bounds
    for b, length in enumerate(batch.seq_lens.tolist()):
        pages = kv.page_table[b, max(0, 191 - PADS[b]) // 64 : -(-length // 64)].long()
        assert torch.equal(pooled.summary.k_bounds[pages], fresh[pages])
    enable(selector=SPARSE, heads_per_group=2)
    logits(run, "compactattn", ids, mask, (40,), cache)
    assert pooled_layers(cache)[1].summary.k_bounds is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
def test_gate_keys_are_extended(kind: str, pads: tuple[int, ...] | None, spy: Spy) -> None:
    enable(selector={1: GATE}, heads_per_group=2)
    run = model("Llama")
    ids, mask = prompt(3, pads=pads)
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=300)
    logits(run, "compactattn", ids, mask, (128, 63), cache)
    assert [p is None for p in pooled_layers(cache)] == [True, False]
    pooled = pooled_layers(cache)[1]
    pooled.summary.gate.pooled.add_(100.0)
    logits(run, "compactattn", ids, mask, (1, 1, 1, 37), cache)
    assert pooled_layers(cache)[1] is pooled
    assert bool((pooled.summary.gate.pooled[pooled.page_table[0, :2].long()] > 50).all())
    (_, kv, batch), _, _ = spy.calls[-1]
    fresh = summarize(kv, batch, block_size=64, gate=GATE).gate
    for b, length in enumerate(batch.seq_lens.tolist()):
        pages = kv.page_table[b, max(0, 191 - (pads or (0, 0, 0))[b]) // 64 : -(-length // 64)].long()
        assert torch.equal(pooled.summary.gate.pooled[pages], fresh.pooled[pages])
    other = SeerGate(gate_weights(4, 64, 1), GATE.inv_freq * 2, threshold=0.3)
    enable(selector={1: other}, heads_per_group=2)
    logits(run, "compactattn", ids, mask, (40,), cache)
    (_, kv, batch), _, _ = spy.calls[-1]
    fresh = summarize(kv, batch, block_size=64, gate=other).gate
    pages = kv.page_table[0, :3].long()
    assert torch.equal(pooled_layers(cache)[1].summary.gate.pooled[pages], fresh.pooled[pages])


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "static-unaligned"])
@pytest.mark.parametrize("pads", [None, PADS], ids=["whole", "left-padded"])
def test_key_means_are_extended_and_freed_with_the_cache(
    kind: str, pads: tuple[int, ...] | None, inference: bool, spy: Spy
) -> None:
    enable(selector=SPARSE, heads_per_group=2)
    run = copy.deepcopy(model("Llama"))  # without hooks from earlier tests
    ids, mask = prompt(3, pads=pads)
    capacity = 320 if kind == "static" else 300
    with torch.inference_mode(inference):
        cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=capacity)
        chunks = (128, 63, 1, 1, 1, 37, 60)  # the decode steps complete the third block and begin the fourth
        logits(run, "compactattn", ids, mask, chunks[:2], cache)
        before = pooled_layers(cache)
        assert all(p.seen == p.pooled == 191 for p in before)
        assert_fresh(before[1], spy, -1)
        known_means = [p.summary.k_mean[p.page_table.long()] for p in before]
        for p in before:
            p.summary.k_mean.add_(100.0)  # a mark: what is extended keeps it, what is made anew does not
        logits(run, "compactattn", ids, mask, chunks[2:6], cache)
        after = pooled_layers(cache)
        in_place = inference and kind != "dynamic"  # where torch does not tell who wrote to the layer
        for p, known in zip(after, known_means, strict=True):
            kept = p.summary.k_mean[p.page_table[0, :2].long()]
            assert bool((kept > 50).all()) != in_place, "the first two blocks of the first request"
            assert p.seen == p.pooled == 231
            if not in_place:
                for b, pad in enumerate(pads or (0, 0, 0)):
                    whole = max(0, 191 - pad) // 64
                    p.summary.k_mean[p.page_table[b, :whole].long()] = known[b, :whole]
        assert_fresh(after[1], spy, -1)
        logits(run, "compactattn", ids, mask, chunks[6:], cache)
        assert_fresh(pooled_layers(cache)[1], spy, -1)
    alive = [weakref.ref(p.summary.k_mean) for p in pooled_layers(cache)]
    spy.calls.clear()
    del before, after, p, known_means, known, kept, cache
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len(means._pooled) == 0


CHANGES = ("reorder", "reset", "copy", "other attention", "other pads", "other settings")


@pytest.mark.parametrize(
    ("kind", "change"),
    [("dynamic", "crop"), ("dynamic", "select"), *((k, c) for k in ("dynamic", "static") for c in CHANGES)],
)
def test_key_means_never_outlive_the_keys_they_are_of(kind: str, change: str) -> None:
    """A chunk after each way to alter a cache equals the same chunk by a model that has no means at all."""
    enable(selector=SPARSE, heads_per_group=2)
    run = model("Llama")
    ids, mask = prompt(3, 400, (0, 0, 0))
    other = ids.flip(0)

    def new_cache() -> Any:
        return DynamicCache() if kind == "dynamic" else StaticCache(config=run.config, max_cache_len=448)

    cache = new_cache()
    logits(run, "compactattn", ids, mask, (128, 128), cache)
    assert any(pooled_layers(cache))
    chunks: tuple[int, ...] = (90,)
    if change == "crop":
        cache.crop(-70)
        ids = ids.roll(1, 0)
        chunks = (1, 1, 100)
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    elif change == "reset":
        cache.reset()
        if kind == "dynamic" and cache.get_seq_length():  # zeroes of the old length, before transformers 5.20 or so
            pytest.skip("this transformers keeps the length of a DynamicCache that is reset")
        ids = other
        logits(run, "sdpa", ids, mask, (128, 128), cache)
    elif change == "copy":
        cache = copy.deepcopy(cache)
    elif change == "other attention":
        logits(run, "sdpa", ids, mask, (40, 1), cache)
    elif change == "other pads":
        mask = mask.clone()
        mask[1, :65] = 0
    elif change == "select":
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
    else:
        enable(selector=FlashPrefill(alpha=1.0, window_blocks=1, sink_blocks=0), heads_per_group=2)
    twin = copy.deepcopy(cache)
    got = logits(run, "compactattn", ids, mask, chunks, cache)
    expected = logits(copy.deepcopy(run), "compactattn", ids, mask, chunks, twin)
    assert torch.equal(got, expected)


def test_two_caches_of_one_model_keep_their_own_means() -> None:
    enable(selector=SPARSE, heads_per_group=2)
    run = model("Llama")
    ids, _ = prompt(1)
    other = ids.flip(1)
    alone = [logits(run, "compactattn", x, chunks=(128, 64, 100)) for x in (ids, other)]
    caches, parts = [DynamicCache(), DynamicCache()], [[], []]
    for n in (128, 64, 100):
        for x, cache, part in zip((ids, other), caches, parts, strict=True):
            part.append(logits(run, "compactattn", x, chunks=(n,), cache=cache))
    for part, whole in zip(parts, alone, strict=True):
        assert torch.equal(torch.cat(part, 1), whole)


# ---- what is refused ----


def test_settings_that_no_model_could_run_with() -> None:
    good: dict[str, Any] = {"selector": DENSE, "heads_per_group": 1}
    for changes, message in (
        ({"selector": "flash"}, "selector: expected "),
        ({"selector": {}}, "selector: expected a selector, or a mapping with at least one layer"),
        ({"selector": {-1: DENSE}}, "selector's layer number: expected an int of at least 0, got -1"),
        ({"selector": {0: None}}, "selector: expected "),
        ({"heads_per_group": 0}, "heads_per_group: expected an int of at least 1, got 0"),
        ({"heads_per_group": None}, "heads_per_group: expected an int of at least 1, got None"),
        ({"heads_per_group": "all"}, "heads_per_group: expected 'auto' or an int of at least 1, got 'all'"),
        ({"query_blocks_per_span": "chunk"}, "query_blocks_per_span: expected None, 'auto' or an int of at least 1"),
        ({"query_blocks_per_span": 0}, "query_blocks_per_span: expected an int of at least 1, got 0"),
        ({"dense_layers": -1}, "dense_layers: expected an int of at least 0, got -1"),
        ({"correction": 1}, "correction: expected True or False, got 1"),
        ({"backend": "cuda"}, "backend: expected None, 'triton' or 'numba', got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            enable(**(good | changes))


def refusal(run: Any, **arguments: Any) -> str:
    ids, _ = prompt(1, 20)
    run.set_attn_implementation("compactattn")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at the words)
        run(ids, **arguments)
    return str(error.value)


@torch.no_grad()
def test_models_that_compactattn_would_run_wrong_are_refused_by_name() -> None:
    gemma = model("Gemma2", query_pre_attn_scalar=64)
    assert refusal(gemma) == "softcap: expected no soft-capping of scores (Gemma 2), got float"
    gpt_oss = model("GptOss", num_local_experts=2, num_experts_per_tok=1)
    assert refusal(gpt_oss) == "s_aux: expected no sink logits (gpt-oss), got Parameter"
    capped = copy.deepcopy(windowed("Gemma3", torch.float32, "Gemma 3"))
    capped.model.layers[0].self_attn.attn_logit_softcapping = 50.0
    assert "soft-capping of scores (Gemma 2), got 50.0" in refusal(capped)
    assert "head dimension of k: expected one of 64, 80" in refusal(model("Llama", head_dim=32))
    enable(selector=DENSE, heads_per_group=4)
    assert refusal(model("Llama")) == "heads_per_group: expected a divisor of the 2 query heads per KV head, got 4"


@pytest.mark.parametrize("name", ["sinks", "block_indices", "position_bias", "cache", "output_attentions"])
def test_arguments_that_change_the_result_are_refused_by_name(name: str) -> None:
    module, x = model("Llama").model.layers[0].self_attn, torch.zeros(1, 2, 3, 64)
    with pytest.raises(ValueError, match=f"{name}: expected "):
        AttentionInterface()["compactattn"](module, x, x, x, None, **{name: x})


def test_training_is_refused() -> None:
    assert "q, k, v: expected tensors without gradients (inference only)" in refusal(model("Llama"))
    run = copy.deepcopy(model("Llama", attention_dropout=0.5)).train()
    with torch.no_grad():
        assert refusal(run) == "dropout: expected 0 (inference only), got 0.5"


def test_models_can_be_copied_and_leave_the_integration_again() -> None:
    ids, _ = prompt(1)
    run = copy.deepcopy(model("Llama"))
    expected = logits(run, "sdpa", ids)
    logits(run, "compactattn", ids)
    logits(copy.deepcopy(run), "compactattn", ids)
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in copy.deepcopy(run).model.layers]
    assert hooks == [1, 1]
    assert torch.equal(logits(run, "sdpa", ids), expected)


def test_the_name_works_when_a_model_is_made() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = transformers.AutoModelForCausalLM.from_config(config("Llama"), attn_implementation="compactattn")
    assert run.config._attn_implementation == "compactattn"


def test_only_the_integration_imports_transformers() -> None:
    code = "import sys, compactattn, compactattn.integrations; print('transformers' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
