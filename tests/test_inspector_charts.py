"""What the inspector shows of its numbers: tables, charts, figures, and the Python to copy."""

from __future__ import annotations

import numpy as np
import pytest

from compactattn import Dense, FlashPrefill, Oracle, XAttention
from compactattn.capture import save_capture
from tests.test_inspector import HEADS, PLACE, TOKENS, noise, setting

pytest.importorskip("matplotlib")
pytest.importorskip("altair")

from inspector import charts, cost, figures, frames, model, quality_charts, recall, snippets, sources
from inspector.model import Setting
from inspector.sources import Place, Recorded, Step, Synthetic


@pytest.fixture(scope="module")
def step() -> Step:
    return sources.make_recorded_step(noise(), PLACE, 16)


def test_text_around_a_token():
    assert recall.excerpt(b"one two\nthree", 4, around=4) == "one [t]wo⏎t"
    assert recall.excerpt(None, 4) == ""
    assert recall.excerpt(b"ab", 2) == ""


@pytest.mark.parametrize(
    "selector",
    [
        FlashPrefill(alpha=0.6, sink_blocks=1, window_blocks=1, block_size=64, query_block=64),
        XAttention(threshold=0.5, block_size=64),
        Oracle(mass=0.5),
        Dense(),
    ],
)
def test_the_python_of_a_view_gives_its_table(tmp_path, selector):
    save_capture(tmp_path / "noise.safetensors", noise())
    recorded = Recorded.from_path(str(tmp_path / "noise.safetensors"))
    drawn = Synthetic(context=8192, kv_heads=1, group=2)
    for source, place in ((recorded, PLACE), (recorded, Place(0, 0, 200)), (drawn, Place(0, 7168, 8192))):
        for addition in ("", *snippets.ADDITIONS):
            wanted = Setting(selector, 2, 2)
            names: dict[str, object] = {"print": lambda *_: None}
            exec(compile(snippets.python_call(source, place, 32, wanted, addition), "view.py", "exec"), names)
            step = (
                sources.make_synthetic_step(drawn, place, 32)
                if source is drawn
                else sources.make_recorded_step(noise(), place, 32)
            )
            reading = model.read(step, wanted)
            assert np.array_equal(frames_of(names["table"]), reading.keep)


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
    table = frames.table_frame(union, reading)
    assert table["block"].tolist() == np.flatnonzero(union.listed).tolist()
    for _, entry in table.iterrows():
        assert entry["needed_by_pairs"] == (len(union.needed_by(entry["block"])) if entry["block"] < 4 else 0)
    needed = frames.needed_frame(union, mass, int(table["block"][0]))
    assert needed["mass on the block"].is_monotonic_decreasing
    responsible = frames.responsibility_frame(union)
    past = int((union.listed & reading.past).sum())
    assert (responsible["shared"] + responsible["alone"] + responsible["given, not asked for"] == past).all()
    members = frames.members_frame(union, reading)
    group = members[members["stage"] == "group"]
    assert sorted(group["first"]) == np.flatnonzero(union.listed).tolist()
    strips = frames.heads_frame(reading, mass), frames.heads_frame(reading, mass, by_mass=True)
    assert len(strips[1]) == HEADS * int(reading.visible.sum()) > len(strips[0])
    for heads in strips:
        assert heads["kept"].sum() == int((reading.mask & reading.visible).sum())
        assert heads["mass"].sum() == pytest.approx(HEADS * reading.query_blocks, rel=1e-5)
        painted = np.zeros(reading.mask.shape, dtype=int)
        for _, stretch in heads.iterrows():
            part = painted[stretch["head"], stretch["query_block"], stretch["first"] : stretch["end"]]
            part[:] = model.KINDS.index(stretch["kind"])
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
    mask, table = frames.mask_frame(reading, mass, 1), frames.table_frame(union, reading)
    members, sharing = frames.members_frame(union, reading), frames.sharing_frame(costs, 4)
    per_query, errors = frames.recall_frame(observed, ours, quoka, 1, b"x" * 500), frames.error_frame(ours, quoka)
    scatter = frames.scatter_frame({"FlashPrefill": ours, "QUOKA": quoka.judged})
    point = recall.outcome("FlashPrefill", 0.7, ours)
    outcomes = frames.outcome_frame([point, recall.outcome("QUOKA", 0.25, quoka.judged)])
    heat, pages = frames.recall_heat_frame(observed, ours, quoka), frames.pages_frame(grid, 8)
    sampled = frames.sampled_frame(quoka, step.start, slice(0, 2), None)
    drawn = [
        charts.mass_chart(mask, 0, blocks, past, 64, dark=dark),
        charts.kinds_chart(mask, 0, blocks, past, 64, dark=dark),
        charts.heads_chart(frames.heads_frame(reading, mass, by_mass=True), 1, blocks, by_mass=True, dark=dark),
        charts.heads_chart(frames.heads_frame(reading, mass), 1, blocks, by_mass=False, dark=dark),
        charts.profile_chart(frames.profile_frame(profiles), dark=dark),
        *(charts.cascade_chart(members, stage, blocks, past, dark=dark) for stage in charts.STAGES),
        charts.responsibility_chart(frames.responsibility_frame(union), dark=dark),
        charts.sharing_chart(sharing, 2, "2", dark=dark),
        charts.table_chart(table, 0, dark=dark),
        charts.pages_chart(pages, dark=dark),
        charts.difference_chart(frames.difference_frame(found, step.start, step.stop), past, 4, dark=dark),
        quality_charts.recall_chart(per_query, dark=dark),
        quality_charts.sampled_chart(sampled, dark=dark),
        *(quality_charts.recall_heat_chart(heat, method, dark=dark) for method in ("block table", "QUOKA")),
        quality_charts.error_chart(errors, dark=dark),
        quality_charts.scatter_chart(scatter, dark=dark),
        *(quality_charts.frontier_chart(outcomes, outcomes[:1], name, dark=dark) for name in quality_charts.MEASURES),
        quality_charts.measured_chart(frames.measured_frame(cost.load_measured()), {"this table": 0.01}, dark=dark),
        quality_charts.prompt_chart(TOKENS, 200, place.start, dark=dark),
    ]
    for chart in drawn:
        assert chart.to_dict(validate=True)["$schema"].startswith("https://vega.github.io/schema/vega-lite")
    for figure in (
        figures.mask_figure(reading, mass, 1),
        figures.heads_figure(reading),
        figures.profile_figure(profiles),
        figures.cascade_figure(union, reading),
        figures.sharing_figure(costs) if past else figures.heads_figure(reading),
        figures.pages_figure(grid, 8),
        figures.recall_figure(per_query, errors, 1),
        figures.sampled_figure(sampled),
        figures.scatter_figure(scatter),
        *(figures.frontier_figure(outcomes, outcomes[:1], name) for name in quality_charts.MEASURES),
        figures.difference_figure(found, max(past, 1), 1),
    ):
        figure.canvas.draw()


def test_figures_show_the_numbers(step):
    reading, mass = model.read(step, setting()), model.block_mass(step, 64, 64)
    top, bottom = (axes.images[0].get_array() for axes in figures.mask_figure(reading, mass, 1).axes[:2])
    assert np.array_equal(bottom, reading.kinds(1))
    assert np.array_equal(np.ma.getmaskarray(np.ma.masked_invalid(top)), ~reading.visible)
    union = model.row_union(reading, 1, 0)
    row = figures.cascade_figure(union, reading).axes[2].images[0].get_array()
    assert np.array_equal(row[0] > 0, union.listed)


def test_text_from_files_is_no_markdown():
    pytest.importorskip("streamlit")
    from inspector.page import plain

    assert plain("![x](http://a/b.png) **b** `c`\n# d") == (r"\!\[x\]\(http\://a/b\.png\) \*\*b\*\* \`c\` \# d")
