"""The inspector's pages and every control on them, driven without a browser."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from compactattn import Dense, FlashPrefill, KeyBounds, Oracle, XAttention
from compactattn.capture import CapturedLayer, save_capture

pytest.importorskip("streamlit")
pytest.importorskip("matplotlib")

from streamlit.testing.v1 import AppTest

from inspector import cost, model, recall, sources
from inspector.model import Setting
from inspector.sources import Place
from tests.inspecting import APP, PAGES, context, default_setting, fine, metrics, noise_step, start, visit
from tests.test_inspector import TOKENS, noise

TITLES = ("Data", "Masks", "Union", "Tables", "Coverage against QUOKA", "What if", "Compare")


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("captures") / "noise.safetensors"
    save_capture(path, noise())
    return str(path)


@pytest.mark.parametrize(("page", "title"), list(zip(PAGES, TITLES, strict=True)))
def test_every_page_opens_on_the_sample(page, title):
    app = fine(start(page))
    assert [heading.value for heading in app.title] == [title]
    assert context(app).startswith("the sample in the package · layer 4 · tokens 4,608 to 5,119 of 5,120")


def test_settings_stay_across_pages_and_reach_them(capture_file):
    app = start("masks", capture_file)
    app.slider(key="alpha").set_value(0.97)
    app.number_input(key="sink").set_value(0)
    app.number_input(key="window").set_value(0)
    app.selectbox(key="head").set_value(3)
    app.selectbox(key="share").set_value(1)
    app.selectbox(key="span").set_value("1")
    fine(app.run())
    wanted = Setting(default_setting(alpha=0.97, sink_blocks=0, window_blocks=0).selector, 1, 1)
    reading = model.read(noise_step(), wanted)
    assert metrics(app)["Mask density, past"] == f"{reading.mask[3, :, :8].mean():.1%}"
    assert metrics(app)["Table density, past"] == f"{reading.density()[3]:.1%}"
    assert reading.mask[3, :, :8].mean() < 1
    for page in PAGES[2:]:
        assert "head 3 · FlashPrefill · 1 head by 1 query block" in context(fine(visit(app, page)))
    assert app.slider(key="alpha").value == 0.97
    cascade = reading.cascade.densities()
    assert metrics(visit(app, "union"))["Masks"] == f"{cascade['mask']:.1%}"


@pytest.mark.parametrize(
    ("query", "selector"),
    [
        ({"selector": "KeyBounds", "bounds_threshold": "0.3"}, KeyBounds(0.3, 1, 2, 64, 64)),
        ({"selector": "XAttention", "threshold": "0.5"}, XAttention(0.5, 16, 64, 64, 1, 2)),
        ({"selector": "Oracle", "mass": "0.4", "sink": "0"}, Oracle(0.4, None, 0, 2, 64, 64)),
        ({"selector": "Dense", "block": "128", "qblock": "128"}, Dense(128, 128)),
        ({"alpha": "0.8", "window": "1", "block": "256"}, FlashPrefill(0.8, 1, 1, 256, 64)),
    ],
)
def test_the_address_carries_every_selector(capture_file, query, selector):
    app = fine(start("masks", capture_file, layer="1", **query))
    reading = model.read(noise_step(layer=0), Setting(selector, 2))
    past = reading.past_blocks
    assert metrics(app)["Mask density, past"] == f"{reading.mask[0, :, :past].mean():.1%}"
    assert f"layer 1 · tokens 512 to 699 of 700 · head 0 · {type(selector).__name__}" in context(app)


def test_the_address_carries_the_place(capture_file):
    app = fine(start("masks", capture_file, chunk="128", start="256", head="2", layer="5", page_size="64"))
    assert "layer 5 · tokens 256 to 383 of 700 · head 2" in context(app)
    assert app.selectbox(key="page_size").value == 64
    app = fine(start("masks", capture_file, chunk="128", start="300", head="99", alpha="7", layer="x"))
    assert "layer 5 · tokens 256 to 383 of 700 · head 0" in context(app), "impossible values fall back"
    assert app.slider(key="alpha").value == 0.1


def test_walking_through_the_chunks(capture_file):
    app = start("data", capture_file, chunk="256")
    assert "tokens 512 to 699" in context(app)
    app = fine(app.button(key="forward").click().run())
    assert "tokens 0 to 255" in context(app), "after the last chunk comes the first"
    app = fine(app.button(key="forward").click().run())
    assert "tokens 256 to 511" in context(app)
    app = fine(app.button(key="back").click().run())
    app = fine(app.button(key="back").click().run())
    assert "tokens 512 to 699" in context(app)
    assert "tokens 256 to 511" in context(fine(app.slider(key="start").set_value(256).run()))
    app = fine(app.button(key="forward").click().run())
    assert "tokens 512 to 699" in context(app)
    app.session_state["advance"] = True  # what the clock of the play switch leaves
    assert "tokens 0 to 255" in context(fine(app.run()))
    app = fine(app.toggle(key="playing").set_value(True).run())
    app = fine(app.selectbox(key="chunk").set_value(512).run())
    assert "tokens 0 to 511" in context(app)


@pytest.mark.parametrize("page", PAGES)
def test_the_first_chunk_has_no_past(capture_file, page):
    app = fine(start(page, capture_file, chunk="256", start="0"))
    said = [message.value for message in app.info]
    assert any("no complete past block" in words for words in said) == (
        page in ("union", "coverage", "what_if", "compare")
    )


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("selector", ["KeyBounds", "XAttention", "Oracle", "Dense"])
def test_every_page_takes_every_selector(capture_file, page, selector):
    fine(start(page, capture_file, selector=selector, share="1", span="1"))


def test_a_single_query_and_a_capture_of_one_chunk(tmp_path):
    capture = noise()
    cut = [CapturedLayer(layer.layer, *(t[:513] for t in layer.tensors().values())) for layer in capture.layers]
    for tokens in (513, 1):
        path = tmp_path / f"{tokens}.safetensors"
        layers = [CapturedLayer(layer.layer, *(t[:tokens] for t in layer.tensors().values())) for layer in cut]
        save_capture(path, dataclasses.replace(capture, layers=tuple(layers)))
        app = start("data", str(path))
        for page in PAGES:
            fine(visit(app, page))


def test_mask_page_controls(capture_file):
    app = start("masks", capture_file)
    app = fine(app.slider(key="blocks").set_value((3, 9)).run())
    app = fine(app.segmented_control(key="colour").set_value("mass").run())
    app = fine(app.selectbox(key="block").set_value(128).run())
    assert app.slider(key="blocks").value == (0, 6), "a range beyond the blocks falls back to all of them"


def test_union_page_shows_the_row_that_was_chosen(capture_file):
    app = fine(start("union", capture_file, span="1", alpha="0.97", sink="0", window="0", share="2", head="2"))
    setting = Setting(default_setting(alpha=0.97, sink_blocks=0, window_blocks=0).selector, 2, 1)
    reading = model.read(noise_step(), setting)
    for row in (0, 2):
        app = fine(app.selectbox(key="row_span").set_value(row).run())
        union = model.row_union(reading, 2, row)
        past, alone = int((union.listed & reading.past).sum()), int(union.alone("heads").sum())
        words = (
            f"The row of heads 2 to 3 over 1 query block lists {past} past blocks; **{alone}** of them only one head"
        )
        assert any(text.value.startswith(words) for text in app.markdown)
    app = fine(app.selectbox(key="span").set_value("chunk").run())
    assert all(box.key != "row_span" for box in app.selectbox)
    app.slider(key="alpha").set_value(0.99)
    app = fine(app.segmented_control(key="members").set_value("query blocks").run())
    picky = default_setting(alpha=0.99, sink_blocks=0, window_blocks=0).selector
    union = model.row_union(model.read(noise_step(), Setting(picky, 2)), 2, 0)
    assert union.alone("heads").sum() > union.alone("query blocks").sum() == 0
    assert any("**0** of them only one query block asked for" in text.value for text in app.markdown)
    app.selectbox(key="share").set_value(1)
    app = fine(app.selectbox(key="span").set_value("1").run())
    assert any("Query block 0 of head 2 has the row to itself" in text.value for text in app.markdown)


def test_table_page_explains_its_entries(capture_file):
    app = fine(start("tables", capture_file, alpha="0.97", sink="0", window="0", entry="3"))
    reading = model.read(noise_step(), default_setting(alpha=0.97, sink_blocks=0, window_blocks=0))
    union = model.row_union(reading, 0, 0)
    for block in np.flatnonzero(union.listed):
        app = fine(app.selectbox(key="entry").set_value(int(block)).run())
        pairs = union.needed_by(int(block))
        words = f"was selected by **{len(pairs)}**" if block < reading.past_blocks else "**current region**"
        assert any(f"Block {block} (" in text.value and words in text.value for text in app.markdown)
    for size in (32, 64, 128, 256):
        app = fine(app.selectbox(key="page_size").set_value(size).run())
        grid = cost.page_grid(sources.make_recorded_step(noise(), Place(1, 512, TOKENS), size), reading, 0)
        read = grid.count("past, read") + grid.count("current region, read")
        assert metrics(app)["Pages read"] == str(read)
        assert metrics(app)["Pages skipped"] == str(grid.count("skipped"))


def test_the_table_page_names_the_query_that_needs_an_entry_most(capture_file):
    app = fine(start("tables", capture_file, alpha="0.97", sink="0", window="0", entry="3", head="2"))
    reading = model.read(noise_step(), default_setting(alpha=0.97, sink_blocks=0, window_blocks=0))
    needed, layer = app.dataframe[1].value, noise().layers[1]
    assert {(h, i) for h, i in zip(needed["head"], needed["query block"], strict=True)} == {
        (h, i) for h in (2, 3) for i in range(3) if reading.mask[h, i, 3]
    }
    for line in needed.to_dict("records"):
        first = 512 + 64 * line["query block"]
        shares = {}
        for query in range(first, min(first + 64, TOKENS)):
            scores = layer.k[: query + 1, line["head"] // 2].double() @ layer.q[query, line["head"]].double() / 8
            shares[query] = float(scores.softmax(0)[192:256].sum())
        assert line["neediest query"] == max(shares, key=shares.__getitem__)
        assert line["its mass there"] == pytest.approx(max(shares.values()), abs=1e-5)


def test_coverage_page_compares_at_both_budgets(capture_file):
    app = fine(start("coverage", capture_file, alpha="0.97", among="FlashPrefill,XAttention,Oracle"))
    observed = recall.observe(noise_step())
    ours = recall.judge(observed, model.read(noise_step(), default_setting(alpha=0.97)))
    quoka = recall.judge_quoka(observed, budget=ours.tokens)
    assert metrics(app)["Block table: mean recall"] == f"{ours.recall.mean():.2%}"
    assert metrics(app)["QUOKA: mean recall"] == f"{quoka.judged.recall.mean():.2%}"
    app = fine(app.segmented_control(key="budget").set_value("QUOKA's 25 %").run())
    paper = recall.judge_quoka(observed, kv_ratio=0.25)
    assert metrics(app)["QUOKA: mean output error"] == f"{paper.judged.error.mean():.4f}"
    assert paper.judged.error.mean() != quoka.judged.error.mean()
    app = fine(app.slider(key="threshold").set_value(0.3).run())
    app = fine(app.segmented_control(key="order").set_value("worst first").run())
    app = fine(app.segmented_control(key="worst").set_value("Worst of QUOKA").run())
    worst = paper.judged.recall[:, 0].argsort(kind="stable")[:8] + 512
    assert set(app.dataframe[0].value["query"]) <= set(range(512, TOKENS))
    assert app.dataframe[0].value["QUOKA"].min() == pytest.approx(paper.judged.recall[:, 0].min())
    assert app.dataframe[0].value["query"].iloc[0] in worst
    fine(app.multiselect(key="among").set_value([]).run())


def test_what_if_sweeps(capture_file):
    app = fine(start("what_if", capture_file))
    [sweep] = [button for button in app.button if button.label.startswith("Sweep")]
    assert sweep.label == "Sweep 29 points"
    app = fine(sweep.click().run())
    assert any("29 of 29 points" in caption.value for caption in app.caption)
    points = app.session_state["frontiers"]
    assert len(next(iter(points.values()))) == 29
    app = fine(app.multiselect(key="methods").set_value(["Oracle"]).run())
    for name in ("missed mass, worst query", "output error", "queries under 90 %"):
        app = fine(app.selectbox(key="measure").set_value(name).run())
    app = fine(app.selectbox(key="share").set_value(1).run())
    assert len(app.session_state["frontiers"]) == 2, "another grouping has a frontier of its own"
    fine(app.multiselect(key="methods").set_value([]).run())


def test_what_if_estimates_a_time(capture_file):
    app = fine(start("what_if", capture_file))
    found = cost.work(noise_step(), model.read(noise_step(), default_setting()))
    milliseconds = cost.load_measured().ceilings.time_ms(found.table_flops, found.table_bytes)
    assert metrics(app)["Estimate, this table"] == f"{milliseconds * 1e3:,.1f} µs"
    assert any(text.value.startswith("**An estimate**, not a measurement: max(FLOPs") for text in app.markdown)


def test_compare_shows_the_difference(capture_file):
    app = fine(start("compare", capture_file, alpha="0.97", sink="0", window="0"))
    b = {"b_selector": "XAttention", "b_share": 1, "b_span": "2"}
    for key, value in b.items():
        app.selectbox(key=key).set_value(value)
    app = fine(app.run())
    app.slider(key="b_threshold").set_value(0.4)
    app.number_input(key="b_sink").set_value(0)
    app.number_input(key="b_window").set_value(1)
    app = fine(app.run())
    mine = model.read(noise_step(), default_setting(alpha=0.97, sink_blocks=0, window_blocks=0))
    theirs = model.read(noise_step(), Setting(XAttention(0.4, 16, 64, 64, 0, 1), 1, 2))
    found = model.difference(mine, theirs, 0)
    words = f"**{found.both.sum():,}** entries are in both tables, **{found.only_a.sum():,}** only in A"
    assert any(words in text.value for text in app.markdown)
    assert found.only_a.any()


def test_synthetic_workloads(capture_file):
    app = start("masks", capture_file, context="8192", kv="1", group="2", chunk="512", workload="scattered")
    app = fine(app.segmented_control(key="data").set_value("Synthetic").run())
    assert context(app).startswith("synthetic scattered, 8,192 tokens, correlation 0.9 · layer 0")
    assert app.selectbox(key="block").value == 128, "a long prompt starts with the paper's blocks"
    app.slider(key="correlation").set_value(0.5)
    app.number_input(key="seed").set_value(3)
    app.selectbox(key="workload").set_value("vertical-slash")
    app.selectbox(key="kv").set_value(2)
    app.selectbox(key="group").set_value(1)
    app.select_slider(key="context").set_value(16384)
    app = fine(app.run())
    assert context(app).startswith("synthetic vertical-slash, 16,384 tokens, correlation 0.5")
    assert metrics(visit(app, "data"))["Query heads / KV heads"] == "2 / 2"
    for page in PAGES:
        fine(visit(app, page))
    app = fine(app.segmented_control(key="data").set_value("Sample").run())
    assert app.selectbox(key="block").value == 64


def test_a_link_that_names_a_file_opens_it_only_when_told_to(capture_file):
    app = AppTest.from_file(str(APP), default_timeout=120)
    app.query_params.update({"data": "File", "file": capture_file})
    fine(app.run())
    assert "not read before you say so" in app.warning[0].value
    assert not app.metric
    [button] = [button for button in app.button if button.label == "Open this file"]
    app = fine(button.click().run())
    assert metrics(app)["Prompt, tokens"] == f"{TOKENS:,}"
    app = fine(app.run())
    assert not app.warning


def test_nothing_is_read_before_a_file_is_chosen():
    app = fine(start("data", None, data="File"))
    assert any("Nothing else is read" in message.value for message in app.info)
    assert not app.metric


@pytest.mark.parametrize("page", PAGES)
def test_bad_files_become_messages(tmp_path, page):
    malformed = tmp_path / "malformed.safetensors"
    malformed.write_bytes(b"not a capture" * 10)
    cases = (
        (tmp_path / "missing", "expected a capture file"),
        (malformed, "expected a safetensors file"),
        (tmp_path, "got a directory"),
    )
    for path, words in cases:
        app = start(page, str(path))
        assert not app.exception
        assert words in app.error[0].value.replace("\\", "")
        assert "Traceback" not in app.error[0].value


def test_what_nobody_foresaw_becomes_a_message_too(monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("secret details")

    monkeypatch.setattr("inspector.model.profile", fail)
    app = start("data")
    assert not app.exception
    assert "The inspector failed on this view (RuntimeError)" in app.error[0].value
    assert "secret details" not in app.error[0].value
    assert "secret details" in caplog.text


def test_what_escapes_a_page_becomes_a_message(caplog):
    def escape() -> None:
        from inspector import serving

        assert serving.failed(RuntimeError("secret details")), "Streamlit shall not show it"

    app = AppTest.from_function(escape).run()
    assert not app.exception
    assert "The inspector failed on this view (RuntimeError)" in app.error[0].value
    assert "secret details" not in app.error[0].value
    assert "secret details" in caplog.text


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({}, "http://127.0.0.1:8501/"),
        ({"server.address": "0.0.0.0", "server.port": 80}, "http://localhost:80/"),
        ({"server.sslCertFile": "a.pem", "server.baseUrlPath": "/look/"}, "https://127.0.0.1:8501/look"),
    ],
)
def test_the_browser_is_sent_to_the_server(monkeypatch, options, address):
    import streamlit

    from inspector import serving

    usual = {"server.address": "127.0.0.1", "server.port": 8501, "server.sslCertFile": None, "server.baseUrlPath": ""}
    monkeypatch.setattr(streamlit, "get_option", (usual | options).__getitem__)
    assert serving.address() == address


@pytest.mark.parametrize("page", PAGES)
def test_every_chart_can_be_saved_and_every_page_has_its_python(capture_file, page):
    app = fine(start(page, capture_file))
    saved = {
        "data": ["prompt", "profile"],
        "masks": ["mask-head-0", "all-heads"],
        "union": ["union-row-0", "responsible", "sharing"],
        "tables": ["row-0", "pages"],
        "coverage": ["recall-head-0", "quoka-sampled", "recall-heads", "errors", "scatter"],
        "what_if": ["frontier", "measured"],
        "compare": ["difference", "compare-heads"],
    }[page]
    keys = [button.key for button in app.get("download_button")]
    assert keys == [f"{name} {kind}" for name in saved for kind in ("PNG", "SVG", "CSV")]
    [code] = [box.value for box in app.code if "from compactattn" in box.value]
    compile(code, page, "exec")
