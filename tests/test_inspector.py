"""The inspector without its pages: its numbers agree with the library and with loops, and its charts show them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from compactattn import Dense, FlashPrefill, attend
from compactattn.capture import Capture, CapturedLayer, save_capture
from compactattn.quality import coverage, output_error, past_tokens, quoka_attention, quoka_select

pytest.importorskip("matplotlib")
pytest.importorskip("altair")

from inspector import cost, model, recall, sources
from inspector.files import MAX_BYTES, Recorded
from inspector.model import Setting
from inspector.sources import Place, Step, Synthetic

TOKENS, HEADS, KV_HEADS = 700, 4, 2
PLACE = Place(1, 300, 500)


def noise(tokens: int = TOKENS) -> Capture:
    generator = torch.Generator().manual_seed(11)
    layers = [
        CapturedLayer(n, *(torch.randn(tokens, h, 64, generator=generator).half() for h in (HEADS, KV_HEADS, KV_HEADS)))
        for n in (1, 5)
    ]
    return Capture(layers=tuple(layers), model="noise", source="a generator", rope_theta=1e4)


@pytest.fixture(scope="module")
def step() -> Step:
    return sources.make_recorded_step(noise(), PLACE, 16)


def setting(heads: int = 2, span: int | None = None, **changes: float) -> Setting:
    rules = {"alpha": 0.7, "sink_blocks": 1, "window_blocks": 1, "block_size": 64, "query_block": 64}
    return Setting(FlashPrefill(**{**rules, **changes}), heads, span)


def test_block_mass_is_the_exact_softmax_mass(step):
    found = model.block_mass(step, 64, 64)
    assert found.every == 1
    layer = noise().layers[1]
    q, k = layer.q[300:500, 2].double(), layer.k[:500, 1].double()
    for i, j in ((0, 0), (1, 4), (3, 7), (0, 7)):
        mass = []
        for row in range(64 * i, min(64 * i + 64, 200)):
            weights = (k[: 301 + row] @ q[row] / 8).softmax(0)
            mass.append(float(weights[64 * j : 64 * j + 64].sum()))
        assert found.share[2, i, j] == pytest.approx(np.mean(mass), abs=1e-6)
    np.testing.assert_allclose(found.share.sum(-1), 1.0, rtol=1e-5)
    assert not found.share[:, ~model.visible_blocks(step, setting().selector)].any()


def test_sampled_mass_scores_every_nth_row_and_always_the_last(step):
    limit = len(step.q) * HEADS * step.stop // 8
    sampled, whole = model.block_mass(step, 64, 64, limit=limit), model.block_mass(step, 64, 64)
    assert sampled.every == 8
    seen = model.visible_blocks(step, setting().selector)
    assert np.array_equal(sampled.share.max(0) > 0, seen)
    assert not np.array_equal(sampled.share, whole.share)
    rows = [step.start + r for r in (135, 143, 151, 159, 167, 175, 183, 191)]  # of query block 2, positions 128 to 191
    layer = noise().layers[1]
    mass = [float((layer.k[: p + 1, 0].double() @ layer.q[p, 1].double() / 8).softmax(0)[:64].sum()) for p in rows]
    assert sampled.share[1, 2, 0] == pytest.approx(np.mean(mass), abs=1e-6)


@pytest.mark.parametrize("span", [None, 1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_row_is_the_union_of_its_members_and_the_current_region(step, span, heads):
    reading = model.read(step, setting(heads, span))
    for head in range(HEADS):
        for s in range(-(-reading.query_blocks // reading.span)):
            union = model.row_union(reading, head, s)
            assert head in union.heads
            assert len(union.heads) == heads
            members = [reading.mask[h, i] for h in union.heads for i in union.query_blocks]
            seen = reading.visible[list(union.query_blocks)].any(0)
            past = np.arange(reading.blocks) < step.start // 64
            assert np.array_equal(union.listed, np.any(members, axis=0) & past | seen & ~past)
            assert np.array_equal(
                union.by_head, np.array([reading.mask[h, list(union.query_blocks)].any(0) for h in union.heads])
            )
            for block in np.flatnonzero(union.listed & past):
                needed = {(h, i) for h in union.heads for i in union.query_blocks if reading.mask[h, i, block]}
                assert set(union.needed_by(int(block))) == needed
                assert needed, "an entry that nobody needs"
            for by, asked in (("heads", union.by_head), ("query blocks", union.members.any(0))):
                wanted = {
                    (n, j)
                    for n, j in zip(*asked.nonzero(), strict=True)
                    if asked[:, j].sum() == 1 < len(asked) and past[j]
                }
                assert {(n, j) for n, j in zip(*union.alone(by).nonzero(), strict=True)} == wanted
            shared = [len(union.heads) > 1, len(union.query_blocks) > 1]
            assert union.sharers == [name for name, several in zip(model.SHARERS, shared, strict=True) if several]


def test_kinds_tell_the_rules_apart(step):
    reading = model.read(step, setting(alpha=0.9, sink_blocks=1, window_blocks=3))
    kinds = reading.kinds(0)
    past = step.start // 64
    for i, j in np.ndindex(*kinds.shape):
        last = (min(step.start + 64 * (i + 1), step.stop) - 1) // 64
        if j > last:
            expected = model.NOT_VISIBLE
        elif j >= past:
            expected = model.CURRENT
        elif not reading.mask[0, i, j]:
            expected = model.LEFT_OUT
        elif j < 1:
            expected = model.SINK
        else:
            expected = model.WINDOW if j > last - 3 else model.SELECTED
        assert kinds[i, j] == expected
    assert {model.SINK, model.WINDOW, model.CURRENT, model.LEFT_OUT} <= set(kinds.ravel().tolist())


def test_profiles_share_out_all_of_the_mass(step):
    selector = setting(window_blocks=2).selector
    mass = model.block_mass(step, 64, 64)
    profiles = model.profile(step, mass, selector)
    for head, profile in enumerate(profiles):
        assert profile.sink + profile.far + profile.window + profile.current == pytest.approx(1.0, abs=1e-5)
        assert profile.current == pytest.approx(float(mass.share[head, :, 4:].sum(-1).mean()), abs=1e-6)
        assert profile.sink == pytest.approx(float(mass.share[head, :, 0].mean()), abs=1e-6)
        heaviest = np.sort(mass.share[head], axis=-1)[:, ::-1]
        needed = [int(np.searchsorted(row.cumsum(), 0.9)) + 1 for row in heaviest]
        assert profile.blocks_90 == pytest.approx(np.mean(needed), abs=0.26)  # a row may sum to 0.9 but for rounding


def test_sharing_costs_are_those_of_each_grouping(step):
    reading = model.read(step, setting())
    costs = {(c.heads_per_group, c.query_blocks_per_span): c for c in model.sharing_costs(step, reading)}
    assert set(costs) == {(h, s) for h in (1, 2) for s in (1, 2, 4)}
    for (heads, span), found in costs.items():
        other = model.read(step, setting(heads, span))
        past = other.past_blocks
        assert found.density == pytest.approx(other.keep[other.rows][..., :past].mean())
        assert found.density == pytest.approx(other.density().mean())
        assert found.growth == pytest.approx(found.density / other.mask[..., :past].mean())


def test_names_of_heads():
    bits = np.array([[True, False, True], [False, False, True]])
    assert model.name_heads(bits, [4, 5]).tolist() == ["4", "nobody", "4, 5"]


def test_difference_of_two_tables(step):
    a, b = model.read(step, setting(1, 1, alpha=0.97)), model.read(step, setting(2, None, alpha=0.9))
    found = model.difference(a, b, 1)
    for i, j in np.ndindex(*found.both.shape):
        mine = j < 4 and bool(a.keep[a.rows[1, i], j])
        theirs = j < 4 and bool(b.keep[b.rows[1, i], j])
        assert (found.both[i, j], found.only_a[i, j], found.only_b[i, j]) == (
            mine and theirs,
            mine and not theirs,
            theirs and not mine,
        )
    assert found.only_a.any() or found.only_b.any()
    with pytest.raises(ValueError, match="block sizes"):
        model.difference(a, model.read(step, setting(block_size=128)), 0)


@pytest.mark.parametrize(("page_size", "block_size"), [(16, 64), (64, 64), (128, 64), (256, 64), (32, 256)])
def test_pages_that_are_read(page_size, block_size):
    step = sources.make_recorded_step(noise(), PLACE, page_size)
    reading = model.read(step, setting(1, 1, alpha=0.97, block_size=block_size))
    grid = cost.page_grid(step, reading, kv_head=1)
    table = step.kv.page_table[0].tolist()
    for logical, physical in enumerate(table):
        first, last = logical * page_size, min((logical + 1) * page_size, step.stop) - 1
        if first >= step.stop:
            assert grid.kinds[physical] == 0
            continue
        blocks = range(first // block_size, last // block_size + 1)
        walks = [(h, i) for h in (2, 3) for i in range(reading.query_blocks)]
        counts = [sum(reading.keep[reading.rows[h, i], j] and reading.visible[i, j] for h, i in walks) for j in blocks]
        assert grid.readers[physical] == max(counts)
        kind = (
            "skipped"
            if not max(counts)
            else "current region, read"
            if last // block_size >= step.start // block_size
            else "past, read"
        )
        assert cost.PAGE_KINDS[grid.kinds[physical]] == kind
        assert grid.logical[physical] == logical
    assert grid.page_bytes == page_size * (64 + 64) * 2, "keys and values of a KV head, two bytes each"
    assert sum(grid.count(kind) for kind in cost.PAGE_KINDS) == len(grid.kinds) == step.kv.k.shape[0]


def test_every_query_is_judged_by_the_library(step):
    reading, observed = model.read(step, setting()), recall.observe(step)
    assert observed.whole
    judged = recall.judge(observed, reading)
    expected = coverage(step.q, step.kv, step.batch, reading.table)
    np.testing.assert_allclose(judged.recall, expected.numpy(), atol=2e-6)
    dense = model.read(step, Setting(Dense(), 2)).table
    out, exact = attend(step.q, step.kv, step.batch, reading.table), attend(step.q, step.kv, step.batch, dense)
    np.testing.assert_allclose(judged.error, output_error(out, exact).numpy(), rtol=1e-4)
    budget = past_tokens(reading.table, step.batch, kv_heads=KV_HEADS)
    np.testing.assert_allclose(judged.tokens, budget[0].numpy())

    quoka = recall.judge_quoka(observed, budget=judged.tokens)
    kept = quoka_select(step.q, step.kv, step.batch, budget=budget.round().int())
    np.testing.assert_allclose(quoka.judged.recall, coverage(step.q, step.kv, step.batch, kept).numpy(), atol=2e-6)
    error = output_error(quoka_attention(step.q, step.kv, step.batch, kept), exact)
    np.testing.assert_allclose(quoka.judged.error, error.numpy(), rtol=1e-4)
    for h in range(KV_HEADS):
        assert quoka.tokens[h].tolist() == kept.tokens[0, h, : kept.counts[0, h]].tolist()
    assert quoka.sampled.sum(0).tolist() == [50] * HEADS
    similarity = torch.nn.functional.cosine_similarity(step.q[:, 3], step.q[:, 3].mean(0), dim=-1)
    assert set(quoka.sampled[:, 3].nonzero()[0].tolist()) == set(similarity.argsort(stable=True)[:50].tolist())


@pytest.mark.parametrize(("heads", "span"), [(1, 1), (2, None), (2, 3)])
@pytest.mark.parametrize("query_block", [64, 128])
def test_runs_of_queries_are_judged_as_they_are_among_all(heads, span, query_block):
    step = sources.make_recorded_step(noise(2000), Place(1, 1450, 2000), 16)
    few = {"alpha": 1.0, "sink_blocks": 0, "window_blocks": 0}
    reading = model.read(step, setting(heads, span, query_block=query_block, **few))
    assert reading.density().min() < 1.0
    whole, runs = recall.observe(step), recall.observe(step, limit=60 * HEADS * step.stop)
    assert not runs.whole
    assert runs.runs == ((236, 256), (492, 512), (530, 550))
    mine = recall.judge(runs, reading)
    np.testing.assert_allclose(mine.recall, recall.judge(whole, reading).recall[runs.position], atol=2e-6)
    theirs = recall.judge_quoka(runs, kv_ratio=0.3), recall.judge_quoka(whole, kv_ratio=0.3)
    np.testing.assert_allclose(theirs[0].judged.recall, theirs[1].judged.recall[runs.position], atol=2e-6)
    np.testing.assert_allclose(runs.out.numpy(), whole.out[runs.position].numpy(), atol=2e-6)
    assert np.array_equal(theirs[0].sampled, theirs[1].sampled)


def test_outcomes_summarise_all_heads(step):
    observed = recall.observe(step)
    wide, thin = (recall.judge(observed, model.read(step, setting(1, 1, alpha=alpha))) for alpha in (0.0, 1.0))
    best, worst = (recall.outcome("FlashPrefill", 0.0, judged) for judged in (wide, thin))
    assert best.recall == pytest.approx(1.0, abs=1e-5)
    assert best.density == 1.0
    assert best.low == 0.0
    assert worst.density < 1.0
    assert worst.worst < worst.recall < 1.0
    assert worst.low == pytest.approx((thin.recall < 0.9).mean())
    assert worst.error == pytest.approx(thin.error.mean())


def test_roofline_and_measured_results():
    ceilings = cost.Ceilings(tflops=500.0, tbps=4.0)
    assert ceilings.time_ms(1e12, 1e6) == pytest.approx(2.0)
    assert ceilings.time_ms(1e9, 8e9) == pytest.approx(2.0)
    measured = cost.load_measured()
    result = json.loads(cost.RESULTS.read_text())
    (run,) = result["runs"]
    assert measured.gpu == run["environment"]["gpu"]
    case = result["cases"][0]
    rows = {row.name: row for row in measured.rows if row.case == case["name"]}
    for row in case["rows"]:
        if row["name"] in rows:
            found = rows[row["name"]]
            assert found.p50_ms == row["times"]["graph"]["p50_ms"]
            bound = max(row["flops"] / run["ceilings"]["matmul_tflops"], row["bytes"] / run["ceilings"]["copy_tbps"])
            assert found.roofline_ms == pytest.approx(bound / 1e9)
    assert {"dense cuDNN", "attend 1x1", "attend 4xchunk"} <= set(rows)
    assert "select" not in rows
    ratios = sorted(row.ratio for row in measured.rows if row.family == "attend")
    assert ratios[0] <= measured.typical_ratio("attend") <= ratios[-1]


def test_other_files_are_no_results(tmp_path):
    file = tmp_path / "report.json"
    for text in ("{", "[]", '{"environment": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            cost.load_measured(file)


def test_work_of_a_dense_table_is_dense(step):
    found = cost.work(step, model.read(step, Setting(Dense(block_size=64, query_block=64), 2)))
    assert found.table_bytes == found.dense_bytes
    assert found.table_flops == pytest.approx(found.dense_flops)


def test_unknown_files_and_impossible_settings_are_refused(tmp_path, step):
    with pytest.raises(FileNotFoundError, match="missing"):
        Recorded.from_path(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="got a directory"):
        Recorded.from_path(str(tmp_path))
    with pytest.raises(ValueError, match="heads_per_group"):
        model.read(step, Setting(Dense(), heads_per_group=3))
    with pytest.raises(ValueError, match="workload"):
        Synthetic("unheard of")
    with pytest.raises(ValueError, match="choose the file again"):
        sources.load(Recorded("a.safetensors", 0, "digest"), None)
    with pytest.raises(ValueError, match=r"mine\.safetensors: expected a safetensors file"):
        sources.load(Recorded.from_upload("mine.safetensors", b"x" * 99), b"x" * 99)
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="at most 2 GiB"):
        Recorded.from_path(str(huge))


def test_sources_describe_themselves(tmp_path):
    file = tmp_path / "noise.safetensors"
    save_capture(file, noise())
    source = Recorded.from_path(str(file))
    about = sources.describe(source, sources.load(source))
    assert (about.tokens, about.layers, about.heads, about.kv_heads, about.group) == (TOKENS, (1, 5), 4, 2, 2)
    data = file.read_bytes()
    upload = Recorded.from_upload("mine.safetensors", data)
    assert sources.describe(upload, sources.load(upload, data)).label == "upload mine.safetensors"
    assert upload != Recorded.from_upload("mine.safetensors", data + b" ")
    save_capture(file, dataclasses.replace(noise(), model="other"))
    assert Recorded.from_path(str(file)) != source, "a rewritten file is another source"
    odd = dataclasses.replace(noise(), layers=(CapturedLayer(0, *(torch.ones(9, h, 72) for h in (2, 1, 1))),))
    with pytest.raises(ValueError, match="head dimension"):
        sources.describe(source, odd)


def test_synthetic_chunks_are_drawn_at_their_own_context():
    drawn = Synthetic(context=8192, kv_heads=1, group=2)
    steps = [sources.make_synthetic_step(drawn, Place(0, start, start + 1024), 64) for start in (0, 3072, 7168, 7168)]
    assert [step.start for step in steps] == [0, 3072, 7168, 7168]
    assert torch.equal(steps[2].q, steps[3].q)
    assert not torch.equal(steps[1].q, steps[2].q)
    assert sources.describe(drawn).tokens == 8192


def test_no_module_hides_another_package():
    """Streamlit puts the inspector's folder on the path: a `coverage.py` in it would be imported by numba."""
    taken = {
        "coverage",
        "inspect",
        "select",
        "numpy",
        "torch",
        "altair",
        "data",
        "charts_",
        "code",
        "profile",
        "statistics",
    }
    assert not {file.stem for file in Path(model.__file__).parent.glob("*.py")} & taken
