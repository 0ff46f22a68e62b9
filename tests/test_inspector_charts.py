"""What the inspector shows of its numbers: tables, charts, figures, and the Python to copy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compactattn import Dense, FlashPrefill, KeyBounds, Oracle, SeerGate, XAttention
from compactattn.capture import save_capture
from tests.test_inspector import HEADS, PLACE, TOKENS, noise, setting

pytest.importorskip("matplotlib")
pytest.importorskip("altair")

from inspector import (
    charts,
    cost,
    figures,
    frames,
    gates,
    model,
    quality_charts,
    quality_figures,
    quality_frames,
    recall,
    snippets,
    sources,
)
from inspector.files import GateWeights, Recorded
from inspector.model import Setting
from inspector.sources import Place, Step, Synthetic


@pytest.fixture(scope="module")
def step() -> Step:
    return sources.make_recorded_step(noise(), PLACE, 16)


def test_text_around_a_token():
    assert recall.excerpt(b"one two\nthree", 4, around=4) == "one [t]wo⏎t"
    assert recall.excerpt(None, 4) == ""
    assert recall.excerpt(b"ab", 2) == ""


def seer_gate(folder: Path) -> tuple[GateWeights, SeerGate]:
    """Weights of a gate for both layers of the noise, in a file, and the gate of the second layer."""
    generator = torch.Generator().manual_seed(3)
    name = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"
    tensors = {name.format(n): 0.3 * torch.randn(HEADS, 192, 64, generator=generator) for n in (1, 5)}
    save_file(tensors, folder / "gate.safetensors")
    weights = GateWeights.from_path(str(folder / "gate.safetensors"))
    recorded = sources.describe(Recorded(), noise())
    return weights, dataclasses.replace(gates.load(weights, recorded)[5], threshold=0.13, sink_blocks=1)


#: What each page asks for, and what it fills in.
PAGES_PYTHON = (
    (("mass", "mask"), {"head": 1}),
    (("density", "row"), {"head": 2, "row_span": 0, "by": "heads"}),
    (("table", "pages"), {"kv_head": 1}),
    (("recall", "frontier", "time"), {"field": "alpha", "values": (0.5, 0.9)}),
)


def run_python(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a script of a page defines; what it saves goes to the folder."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"print": lambda *_: None}
    exec(compile(text, "view.py", "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["FlashPrefill", "KeyBounds", "XAttention", "Oracle", "Dense", "SeerGate"])
def test_the_python_of_a_view_gives_its_table(tmp_path, monkeypatch, kind):
    save_capture(tmp_path / "noise.safetensors", noise())
    recorded = Recorded.from_path(str(tmp_path / "noise.safetensors"))
    drawn, weights = Synthetic(context=8192, kv_heads=1, group=2), None
    if kind == "SeerGate":
        weights, selector = seer_gate(tmp_path)
    else:
        selector = {
            "FlashPrefill": FlashPrefill(alpha=0.6, sink_blocks=1, window_blocks=1, block_size=64, query_block=64),
            "KeyBounds": KeyBounds(threshold=0.2, block_size=64),
            "XAttention": XAttention(threshold=0.5, block_size=64),
            "Oracle": Oracle(mass=0.5),
            "Dense": Dense(),
        }[kind]
    wanted = Setting(selector, 2, 2)
    places = [(recorded, PLACE), (recorded, Place(1, 0, 200))]
    if weights is None:
        places.append((drawn, Place(0, 7168, 8192)))
    for source, place in places:
        text = snippets.python_call(source, place, 32, wanted, ("table",), weights=weights)
        names = run_python(text, tmp_path, monkeypatch)
        step = (
            sources.make_synthetic_step(drawn, place, 32)
            if source is drawn
            else sources.make_recorded_step(noise(), place, 32)
        )
        reading = model.read(step, wanted)
        assert np.array_equal(frames_of(names["table"]), reading.keep)
        if place == PLACE:
            assert 0 < reading.density().mean() <= 1


def test_the_python_of_each_page_gives_what_the_page_shows(tmp_path, monkeypatch, step):
    save_capture(tmp_path / "noise.safetensors", noise())
    recorded, wanted = Recorded.from_path(str(tmp_path / "noise.safetensors")), setting(2, 2, alpha=0.9)
    assert {name for additions, _ in PAGES_PYTHON for name in additions} | {"difference"} == set(snippets.ADDITIONS)
    found: dict[str, object] = {}
    for additions, names in PAGES_PYTHON:
        found |= run_python(
            snippets.python_call(recorded, PLACE, 32, wanted, additions, **names), tmp_path, monkeypatch
        )
    assert np.array_equal(found["mass"].share, model.block_mass(step, 64, 64).share)
    assert found["union"].row == model.row_union(model.read(step, wanted), 2, 0).row
    assert found["pages"].page_size == 32
    assert {(tmp_path / name).read_bytes()[:4] for name in ("mask.png", "union.png")} == {b"\x89PNG"}
    other = setting(1, 1, alpha=0.97)
    text = snippets.python_call(recorded, PLACE, 32, wanted, ("difference",), head=1, other=other)
    names, difference = (
        run_python(text, tmp_path, monkeypatch),
        model.difference(model.read(step, wanted), model.read(step, other), 1),
    )
    assert int((names["a"] & ~names["b"]).sum()) == difference.only_a.sum() > 0


def frames_of(table) -> np.ndarray:
    keep = np.zeros(tuple(table.indices.shape), dtype=bool)
    for row, count in enumerate(table.counts.tolist()):
        keep[row, table.indices[row, :count]] = True
    return keep


def test_the_python_of_the_sample_needs_no_file():
    text = snippets.python_call(Recorded(), Place(0, 0, 512), 16, setting())
    assert "sample_path()" in text
    assert "feed(0, 0)" not in text


def test_bins_keep_the_mass_and_never_hide_a_block(step):
    reading, mass = model.read(step, setting()), model.block_mass(step, 64, 64)
    fine, coarse = (frames.mask_frame(reading, mass, 1, cells=cells) for cells in (None, 8))
    assert frames.bin_width(4, 8, 8) == 4
    assert len(fine) == int(reading.visible.sum())
    assert coarse["mass"].sum() == pytest.approx(fine["mass"].sum(), abs=1e-5)
    for _, row in coarse.iterrows():
        inside = fine[
            (fine["query_block"] == row["query_block"]) & (fine["first"] >= row["first"]) & (fine["end"] <= row["end"])
        ]
        assert row["kind"] in set(inside["kind"])
        chosen = {kind for kind in inside["kind"] if kind != "left out"}
        assert (row["kind"] == "left out") == (not chosen)
    part = frames.mask_frame(reading, mass, 1, blocks=(2, 5))
    assert set(part["first"]) == {2, 3, 4}
    one = fine[(fine["query_block"] == 1) & (fine["first"] == 2)].iloc[0]
    assert one["tokens"] == "128 to 191"
    assert one["queries"] == "364 to 427"
    wanted = [str(h) for h in (0, 1) if reading.mask[h, 1, 2]]
    assert one["selected_by"] == (", ".join(wanted) or "nobody")


def test_frames_count_what_the_model_found(step):
    reading, mass = model.read(step, setting(2, 2)), model.block_mass(step, 64, 64)
    union = model.row_union(reading, 3, 1)
    table = frames.table_frame(union, reading, "heads")
    assert table["block"].tolist() == np.flatnonzero(union.listed).tolist()
    for _, entry in table.iterrows():
        seeing = sum(int(reading.visible[i, entry["block"]]) for i in union.query_blocks) * len(union.heads)
        pairs = len(union.needed_by(entry["block"])) if entry["block"] < 4 else seeing
        assert entry["needed_by_pairs"] == pairs > 0
    past = int((union.listed & reading.past).sum())
    for by, parts in (("heads", union.heads), ("query blocks", union.query_blocks)):
        responsible = frames.responsibility_frame(union, by)
        assert responsible.iloc[:, 0].tolist() == list(parts)
        assert (responsible["shared"] + responsible["alone"] + responsible["given, not asked for"] == past).all()
        members = frames.members_frame(union, reading, by)
        group = members[members["stage"] == "group"]
        assert group["first"].tolist() == np.flatnonzero(union.listed).tolist()
        assert (group["share"] == frames.ALONE[by]).sum() == responsible["alone"].sum()
        packed = members[members["stage"] == "table"]
        assert packed["first"].tolist() == list(range(len(packed)))
        assert packed["block"].tolist() == table["block"].tolist()
    rows = frames.rows_frame(reading)
    assert sorted(rows["row"]) == [n for n, count in enumerate(reading.table.counts.tolist()) if count]
    assert dict(zip(rows["row"], rows["entries"], strict=True)) == {
        n: count for n, count in enumerate(reading.table.counts.tolist()) if count
    }
    strips = frames.heads_frame(reading, mass), frames.heads_frame(reading, mass, by_mass=True)
    assert len(strips[1]) == HEADS * int(reading.visible.sum()) > len(strips[0])
    for heads in strips:
        assert heads["kept"].sum() == int((reading.mask & reading.visible).sum())
        assert heads["mass"].sum() == pytest.approx(HEADS * reading.query_blocks, rel=1e-5)
        painted = np.zeros(reading.mask.shape, dtype=int)
        for _, stretch in heads.iterrows():
            part = painted[stretch["head"], stretch["query_block"], stretch["first"] : stretch["end"]]
            part[:] = model.KINDS.index(stretch["kind"])
            where = slice(stretch["first"], stretch["end"])
            kv_head = stretch["head"] // 2
            chosen = [h for h in (2 * kv_head, 2 * kv_head + 1) if reading.mask[h, stretch["query_block"], where].any()]
            assert stretch["selected_by"] == (", ".join(map(str, chosen)) or "nobody")
        assert np.array_equal(painted, np.stack([reading.kinds(head) for head in range(HEADS)]))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("place", [PLACE, Place(0, 0, 200)], ids=["past", "first"])
def test_everything_can_be_drawn(dark, place):
    step = sources.make_recorded_step(noise(), place, 16)
    reading, mass = model.read(step, setting(2, 2)), model.block_mass(step, 64, 64)
    other = model.read(step, setting(1, 1, alpha=0.2))
    union, costs = model.row_union(reading, 1, 0), model.sharing_costs(step, reading)
    profiles = model.profile(step, mass, reading.setting.selector)
    observed = recall.observe(step)
    ours, quoka = recall.judge(observed, reading), recall.judge_quoka(observed)
    grid, found = cost.page_grid(step, reading, 0), model.difference(reading, other, 1)
    past, blocks = reading.past_blocks, reading.blocks
    mask, table = frames.mask_frame(reading, mass, 1), frames.table_frame(union, reading, "heads")
    members, sharing = frames.members_frame(union, reading, "heads"), frames.sharing_frame(costs, 4)
    responsible = frames.responsibility_frame(union, "query blocks")
    per_query = quality_frames.recall_frame(observed, ours, quoka, 1, b"x" * 500)
    curve, errors = quality_frames.recall_curve_frame(ours, quoka, 1), quality_frames.error_frame(ours, quoka)
    scatter = quality_frames.scatter_frame({"FlashPrefill": ours, "SeerGate": ours, "QUOKA": quoka.judged})
    moves = quality_frames.moves_frame(quality_frames.compare_frame(reading, other, ours, ours))
    measured = quality_frames.measured_frame(cost.load_measured())
    point = recall.outcome("FlashPrefill", 0.7, ours)
    outcomes = quality_frames.outcome_frame([point, recall.outcome("QUOKA", 0.25, quoka.judged)])
    heat, pages = quality_frames.recall_heat_frame(observed, ours, quoka), frames.pages_frame(grid, 8, (64, 128))
    sampled = quality_frames.sampled_frame(quoka, step.start, slice(0, 2), None)
    drawn = [
        charts.mass_chart(mask, 0, blocks, past, 64, dark=dark),
        charts.kinds_chart(mask, 0, blocks, past, 64, dark=dark),
        *(
            charts.heads_chart(
                frames.heads_frame(reading, mass, by_mass=by_mass),
                1,
                (blocks, 64, step.stop),
                group=2,
                by_mass=by_mass,
                dark=dark,
            )
            for by_mass in (True, False)
        ),
        charts.profile_chart(frames.profile_frame(profiles), dark=dark),
        *(charts.cascade_chart(members, stage, blocks, past, "heads", dark=dark) for stage in charts.STAGES),
        charts.responsibility_chart(responsible, dark=dark),
        charts.sharing_chart(sharing, 2, "2", dark=dark),
        charts.table_chart(table, 0, "heads", dark=dark),
        charts.pages_chart(pages, dark=dark),
        charts.difference_chart(frames.difference_frame(found, step.start, step.stop), past, 4, dark=dark),
        quality_charts.recall_chart(per_query, dark=dark),
        quality_charts.recall_curve_chart(curve, dark=dark),
        quality_charts.moves_chart(moves, dark=dark),
        quality_charts.sampled_chart(sampled, dark=dark),
        *(quality_charts.recall_heat_chart(heat, method, dark=dark) for method in ("block table", "QUOKA")),
        quality_charts.error_chart(errors, dark=dark),
        quality_charts.scatter_chart(scatter, dark=dark),
        *(quality_charts.frontier_chart(outcomes, outcomes[:1], name, dark=dark) for name in quality_charts.MEASURES),
        quality_charts.measured_chart(measured, {"this table": 0.01}, dark=dark),
        charts.prompt_chart(frames.prompt_frame(TOKENS, 200, place.start), dark=dark),
    ]
    for chart in drawn:
        assert chart.to_dict(validate=True)["$schema"].startswith("https://vega.github.io/schema/vega-lite")
    if dark:
        return  # figures are for print, where no theme is dark
    for figure in (
        figures.prompt_figure(TOKENS, 200, place.start),
        figures.mask_figure(reading, mass, 1),
        *(figures.heads_figure(reading, mass, by_mass) for by_mass in (True, False)),
        figures.profile_figure(profiles),
        *(figures.cascade_figure(union, reading, by) for by in ("heads", "query blocks")),
        figures.responsibility_figure(responsible),
        figures.row_figure(table, union.row, "heads"),
        *([figures.sharing_figure(costs)] if past else []),
        figures.pages_figure(grid, 8),
        quality_figures.recall_figure(per_query, 1),
        quality_figures.recall_curve_figure(curve, 1),
        quality_figures.recall_heat_figure(heat),
        quality_figures.error_figure(errors),
        quality_figures.sampled_figure(sampled),
        quality_figures.scatter_figure(scatter),
        quality_figures.moves_figure(moves),
        quality_figures.measured_figure(measured, {"this table": 0.01}),
        *(quality_figures.frontier_figure(outcomes, outcomes[:1], name) for name in quality_charts.MEASURES),
        figures.difference_figure(found, max(past, 1), 1),
    ):
        figure.canvas.draw()


def test_figures_show_the_numbers(step):
    reading, mass = model.read(step, setting()), model.block_mass(step, 64, 64)
    top, bottom = (axes.images[0].get_array() for axes in figures.mask_figure(reading, mass, 1).axes[:2])
    assert np.array_equal(bottom, reading.kinds(1))
    assert np.array_equal(np.ma.getmaskarray(np.ma.masked_invalid(top)), ~reading.visible)
    union = model.row_union(reading, 1, 0)
    row, packed = (axes.images[0].get_array()[0] for axes in figures.cascade_figure(union, reading, "heads").axes[2:])
    assert np.array_equal(row > 0, union.listed)
    assert np.array_equal(packed[: union.listed.sum()], row[union.listed])
    assert not packed[union.listed.sum() :].any()


def test_text_from_files_is_no_markdown():
    pytest.importorskip("streamlit")
    from inspector.page import plain

    assert plain("![x](http://a/b.png) **b** `c`\n# d") == (r"\!\[x\]\(http\://a/b\.png\) \*\*b\*\* \`c\` \# d")
