"""Measures and the QUOKA baseline, against twins that count token by token."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from compactattn import (
    Dense,
    FlashPrefill,
    PagedKV,
    PrefillBatch,
    SelectionMask,
    attend,
    baselines,
    build_table,
    prefill,
    select,
    unite,
)
from compactattn.quality import (
    DensityCascade,
    QuokaSelection,
    causal_attention,
    coverage,
    density_cascade,
    exact_lse,
    output_error,
    past_tokens,
    quoka_attention,
    quoka_ranking,
    quoka_select,
    summarize_coverage,
)

SELECTOR = FlashPrefill(alpha=0.5, sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
GEOMETRIES = {
    "B3-q70-kv300-G4": ([70, 1, 33], [300, 190, 33], 2, 4),
    "B2-q0-q129-kv517-G3": ([0, 129], [64, 517], 1, 3),
    "B2-q65-kv256-G2": ([65, 64], [256, 128], 2, 2),
    "B1-q100-kv111-G1": ([100], [111], 3, 1),
    "B4-of-equal-lengths-G2": ([33, 20, 33, 33], [150, 40, 150, 150], 2, 2),
}


def step(
    q_lens: list[int],
    seq_lens: list[int],
    kv_heads: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    page: int = 16,
) -> tuple[torch.Tensor, PagedKV, PrefillBatch]:
    """Random keys with a few loud ones, on permuted pages; slots that no request owns are NaN."""
    rng = torch.Generator().manual_seed(len(q_lens) * 1000 + sum(seq_lens) + group)
    batch = PrefillBatch.from_lens(q_lens, seq_lens)
    pages = [-(-n // page) for n in seq_lens]
    ids = torch.randperm(sum(pages) + 3, generator=rng)
    table = torch.zeros((len(seq_lens), max(pages)), dtype=torch.int32)
    k = torch.full((len(ids), page, kv_heads, 64), math.nan, dtype=dtype)
    v = k.clone()
    for b, seq_len in enumerate(seq_lens):
        mine = ids[sum(pages[:b]) : sum(pages[: b + 1])]
        table[b, : pages[b]] = mine
        position = torch.arange(seq_len)
        keys = torch.randn((seq_len, kv_heads, 64), generator=rng, dtype=dtype)
        keys[position % 97 == 5] *= 3
        k[mine[position // page], position % page] = keys
        v[mine[position // page], position % page] = torch.randn(keys.shape, generator=rng, dtype=dtype)
    q = torch.randn((sum(q_lens), kv_heads * group, 64), generator=rng, dtype=dtype)
    return q, PagedKV(k, v, table), batch


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request: pytest.FixtureRequest) -> tuple[list[int], list[int], int, int]:
    return request.param


def same_selection(ours: QuokaSelection, twin: QuokaSelection) -> bool:
    valid = torch.arange(twin.tokens.shape[2]) < twin.counts[..., None]
    return torch.equal(ours.counts, twin.counts) and torch.equal(ours.tokens[valid], twin.tokens[valid])


@pytest.mark.parametrize("span", [None, 1])
def test_density_cascade_counts_what_its_twin_counts(geometry, span):
    q_lens, seq_lens, kv_heads, group = geometry
    batch = PrefillBatch.from_lens(q_lens, seq_lens)
    rng = torch.Generator().manual_seed(7)
    extents = (len(q_lens), kv_heads * group, batch.query_blocks(64), batch.kv_blocks(64))
    selection = SelectionMask(torch.rand(extents, generator=rng) < 0.3, 64, 64)
    for heads_per_group in [h for h in (1, 2, 3, 4) if group % h == 0]:
        arguments = {"kv_heads": kv_heads, "heads_per_group": heads_per_group, "query_blocks_per_span": span}
        ours = density_cascade(selection, batch, **arguments)
        assert ours == reference.density_cascade(selection, batch, **arguments)
        assert ours.mask <= ours.query_block_union <= ours.sub_group_union <= ours.group_union <= ours.visible


def test_density_cascade_keeps_the_dense_end_of_the_prompt_apart():
    batch = PrefillBatch.from_lens([192], [500], prompt_lens=[500])
    rng = torch.Generator().manual_seed(3)
    mask = torch.rand((1, 4, 3, 8), generator=rng) < 0.2
    mask[:, :, 2] = True
    selection = SelectionMask(mask, 64, 64, dense_last_blocks=1)
    arguments = {"kv_heads": 2, "heads_per_group": 1}
    ours = density_cascade(selection, batch, **arguments)
    assert ours == reference.density_cascade(selection, batch, **arguments)
    assert ours.query_block_union < ours.visible


def test_density_is_a_quotient_of_sums():
    chunks = DensityCascade(1, 2, 3, 4, 8) + DensityCascade(1, 1, 1, 2, 4)
    assert chunks.densities() == {
        "mask": 2 / 12,
        "query_block_union": 3 / 12,
        "sub_group_union": 4 / 12,
        "group_union": 6 / 12,
    }
    assert all(math.isnan(d) for d in DensityCascade().densities().values())


def test_quoka_select_keeps_what_its_twin_keeps(geometry):
    q, kv, batch = step(*geometry, dtype=torch.float64)
    uneven = torch.arange(batch.size * kv.num_kv_heads).view(batch.size, -1) * 20 + 3
    for arguments in ({}, {"query_ratio": 0.1, "kv_ratio": 0.5}, {"budget": 17}, {"budget": 0}, {"budget": uneven}):
        ours = quoka_select(q, kv, batch, **arguments)
        assert same_selection(ours, reference.quoka_select(q, kv, batch, **arguments))


def test_one_ranking_serves_every_budget(geometry):
    q, kv, batch = step(*geometry)
    ranking = quoka_ranking(q, kv, batch, query_ratio=0.1)
    for budget in (0, 7, 40):
        kept = quoka_select(q, kv, batch, budget=budget, ranking=ranking)
        assert same_selection(kept, quoka_select(q, kv, batch, query_ratio=0.1, budget=budget))
    with pytest.raises(ValueError, match=r"^ranking: expected the \d+ past tokens of each request, got \("):
        quoka_select(q, kv, batch, budget=40, ranking=[order[:, :0] for order in ranking])


def test_quoka_rounds_up_and_prefers_the_lower_position_among_equals():
    q, kv, batch = step([30], [130], 1, 2)
    kv.k.fill_(0)[..., 0] = 1.0  # every key points the same way
    kept = quoka_select(q, kv, batch, query_ratio=0.1, kv_ratio=0.201)
    assert kept.counts.tolist() == [[21]]
    assert kept.tokens[0, 0].tolist() == list(range(21))
    assert quoka_select(q, kv, batch, kv_ratio=0.0).counts.tolist() == [[1]]
    assert quoka_select(q, kv, batch, kv_ratio=0.29).counts.tolist() == [[29]]  # 0.29 * 100 > 29 in floating point


def test_quoka_finds_the_token_that_an_outlying_query_points_at():
    q, kv, batch = step([32], [232], 1, 1)
    direction = torch.zeros(64)
    direction[3] = 1.0
    q[:, 0] = torch.ones(64) + 0.01 * q[:, 0]
    q[11, 0] = -direction
    page = kv.page_table[0].long()
    kv.k[page[150 // 16], 150 % 16, 0] = -5 * direction
    assert quoka_select(q, kv, batch, query_ratio=0.01, budget=1).tokens.flatten().tolist() == [150]


def test_quoka_attention_equals_its_twin(geometry):
    q, kv, batch = step(*geometry)
    uneven = torch.arange(batch.size * kv.num_kv_heads).view(batch.size, -1) * 20 + 3
    for budget in (None, uneven):
        selection = quoka_select(q, kv, batch, budget=budget)
        ours = quoka_attention(q, kv, batch, selection, scale=0.2)
        twin = reference.quoka_attention(q, kv, batch, selection, scale=0.2)
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-5)


def test_quoka_in_small_pieces_is_the_same(monkeypatch):
    q, kv, batch = step(*GEOMETRIES["B4-of-equal-lengths-G2"])
    whole = quoka_select(q, kv, batch)
    out = quoka_attention(q, kv, batch, whole)
    monkeypatch.setattr(baselines, "_SCORES_AT_ONCE", {"cpu": 500})
    monkeypatch.setattr(baselines, "_COPIED_AT_ONCE", 1)
    assert same_selection(quoka_select(q, kv, batch), whole)
    torch.testing.assert_close(quoka_attention(q, kv, batch, whole), out, rtol=1e-5, atol=1e-5)


def test_quoka_with_the_whole_past_is_dense_attention(geometry):
    q, kv, batch = step(*geometry)
    ours = quoka_attention(q, kv, batch, quoka_select(q, kv, batch, kv_ratio=1.0))
    dense = prefill(q, kv, batch, selector=Dense(), heads_per_group=1)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


def test_coverage_of_a_table_equals_its_twin(geometry):
    q, kv, batch = step(*geometry)
    table = build_table(unite(select(q, kv, batch, SELECTOR), batch, heads_per_group=1, query_blocks_per_span=1))
    ours = coverage(q, kv, batch, table, scale=0.3)
    torch.testing.assert_close(ours.double(), reference.coverage(q, kv, batch, table, scale=0.3), rtol=1e-4, atol=1e-6)


def test_coverage_of_tokens_equals_its_twin(geometry):
    q, kv, batch = step(*geometry)
    selection = quoka_select(q, kv, batch, kv_ratio=0.3)
    ours = coverage(q, kv, batch, selection)
    torch.testing.assert_close(ours.double(), reference.coverage(q, kv, batch, selection), rtol=1e-4, atol=1e-6)


def test_everything_covers_everything_and_padding_is_nan():
    q, kv, batch = step([70], [300], 2, 2)
    padded = torch.cat((q, q[:5]))
    table = build_table(unite(select(padded, kv, batch, Dense()), batch, heads_per_group=2))
    for given in (table, quoka_select(padded, kv, batch, kv_ratio=1.0)):
        shares = coverage(padded, kv, batch, given)
        torch.testing.assert_close(shares[:70], torch.ones(70, 4), rtol=0, atol=1e-5)
        assert shares[70:].isnan().all()


def test_past_tokens_is_the_budget_that_reads_as_much(geometry):
    q, kv, batch = step(*geometry)
    for span in (None, 1):
        mask = select(q, kv, batch, SELECTOR)
        table = build_table(unite(mask, batch, heads_per_group=1, query_blocks_per_span=span))
        valid = torch.arange(table.indices.shape[1]) < table.counts[:, None]
        table.indices[~valid] = 2**31 - 1  # poison
        ours = past_tokens(table, batch, kv_heads=kv.num_kv_heads)
        torch.testing.assert_close(ours, reference.past_tokens(table, batch, kv_heads=kv.num_kv_heads))


def test_output_error_per_head():
    dense = torch.randn((50, 3, 64), generator=torch.Generator().manual_seed(1))
    out = dense.clone()
    out[:, 1] *= 1.25
    dense[:, 2] = out[:, 2] = 0.0
    ours = output_error(out, dense)
    torch.testing.assert_close(ours, reference.output_error(out, dense))
    torch.testing.assert_close(ours, torch.tensor([0.0, 0.25, 0.0], dtype=torch.float64), rtol=1e-6, atol=0)
    out[0, 2] = 1.0
    assert output_error(out, dense)[2] == math.inf


def test_summarize_coverage():
    shares = torch.tensor([[1.0, 0.5], [0.8, 0.95], [0.9, 1.0]])
    summary = summarize_coverage(shares)
    assert (summary.queries, summary.threshold, summary.below.tolist()) == (3, 0.9, [1, 1])
    torch.testing.assert_close(summary.mean, torch.tensor([0.9, 2.45 / 3]))
    torch.testing.assert_close(summary.worst, torch.tensor([0.8, 0.5]))


def test_causal_attention_is_bottom_right_causal():
    q, kv, batch = step([70], [300], 2, 2)
    positions = torch.arange(300)
    pages = kv.page_table[0].long()[positions // 16]
    k, v = (cache[pages, positions % 16].transpose(0, 1) for cache in (kv.k, kv.v))
    table = build_table(unite(select(q, kv, batch, Dense()), batch, heads_per_group=1))
    torch.testing.assert_close(causal_attention(q, k, v), attend(q, kv, batch, table), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda q, kv, b: quoka_select(q, kv, b, query_ratio=1.5), "query_ratio: expected a number from 0 to 1"),
        (lambda q, kv, b: quoka_select(q, kv, b, kv_ratio=math.nan), "kv_ratio: expected a number from 0 to 1"),
        (lambda q, kv, b: quoka_select(q, kv, b, budget=-1), "budget: expected an int of at least 0"),
        (lambda q, kv, b: quoka_select(q, kv, b, budget=torch.ones(1, 3).int()), r"budget: expected shape \(1, 2\)"),
        (lambda q, kv, b: quoka_select(q[:, :3], kv, b), "q: expected a multiple of the cache's 2 KV heads"),
        (lambda q, kv, b: quoka_select(q[..., :32], kv, b), "q: expected torch.float32 of head dimension 64"),
        (lambda q, kv, b: output_error(q, q[1:]), "out: expected shape"),
        (lambda q, kv, b: output_error(q, None), "dense: expected a torch.Tensor, got NoneType"),
        (lambda q, kv, b: coverage(q, kv, b, None), "given: expected a BlockTable or a QuokaSelection, got NoneType"),
        (
            lambda q, kv, b: coverage(q, kv, b, select(q, kv, b, SELECTOR)),
            "given: expected a BlockTable or a QuokaSelection, got SelectionMask",
        ),
        (
            lambda q, kv, b: coverage(q, kv, b, quoka_select(q, kv, b), dense_lse=torch.zeros(1, 4)),
            r"dense_lse: expected shape \(70, 4\)",
        ),
        (
            lambda q, kv, b: coverage(q, kv, b, quoka_select(q, kv, b), dense_lse=0.0),
            "dense_lse: expected a torch.Tensor, got float",
        ),
        (lambda q, kv, b: exact_lse(q, None, b), "kv: expected a PagedKV, got NoneType"),
        (lambda q, kv, b: quoka_select(q, kv, None), "batch: expected a PrefillBatch, got NoneType"),
        (lambda q, kv, b: quoka_attention(q, kv, b, None), "selection: expected a QuokaSelection, got NoneType"),
        (lambda q, kv, b: past_tokens(None, b, kv_heads=2), "table: expected a BlockTable, got NoneType"),
        (
            lambda q, kv, b: causal_attention(q, torch.ones(3, 80, 64), torch.ones(3, 80, 64)),
            "k: expected KV heads that divide the 4 query heads, got 3",
        ),
        (
            lambda q, kv, b: causal_attention(q, torch.ones(2, 69, 64), torch.ones(2, 69, 64)),
            "k: expected at least the 70 keys of the queries themselves, got 69",
        ),
        (
            lambda q, kv, b: causal_attention(q, torch.ones(2, 80, 64), torch.ones(1, 80, 64)),
            r"v: expected shape \(2, 80, 64\)",
        ),
        (
            lambda q, kv, b: causal_attention(q, torch.ones(2, 80, 32), torch.ones(2, 80, 32)),
            r"k: expected shape \(2, 80, 64\)",
        ),
        (
            lambda q, kv, b: density_cascade(None, b, kv_heads=2, heads_per_group=1),
            "selection: expected a SelectionMask, got NoneType",
        ),
        (
            lambda q, kv, b: density_cascade(
                SelectionMask(torch.ones((3, 4, 2, 5), dtype=torch.bool), 64, 64),
                PrefillBatch.from_lens([70, 1], [300, 190]),
                kv_heads=2,
                heads_per_group=1,
            ),
            r"selection.mask: expected shape \(2, 4, 2, 5\)",
        ),
        (lambda q, kv, b: summarize_coverage(q[:0, :, 0]), "shares: expected at least one query"),
        (
            lambda q, kv, b: density_cascade(select(q, kv, b, SELECTOR), b, kv_heads=2, heads_per_group=4),
            "heads_per_group: expected a divisor of the 2 query heads per KV head, got 4",
        ),
        (
            lambda q, kv, b: density_cascade(select(q, kv, b, SELECTOR), b, kv_heads=3, heads_per_group=1),
            "kv_heads: expected a divisor of the 4 query heads, got 3",
        ),
    ],
)
def test_refusals_name_the_argument(call, names):
    q, kv, batch = step([70], [300], 2, 2)
    with pytest.raises(ValueError, match=names):
        call(q, kv, batch)
