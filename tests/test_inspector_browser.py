"""The inspector as a reader has it: served by Streamlit, in Chromium, driven by Playwright.

Screenshots of every page and the measured times are left in `out/inspector`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compactattn.capture import CapturedLayer, save_capture
from tests.browsing import PAGES, ROOT, SHOTS, Reader, Server, chromium, first_paint, interactions, medians
from tests.test_inspector import HEADS, TOKENS, noise

pytest.importorskip("streamlit")
pytest.importorskip("matplotlib")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs Playwright for Python")

playwright.expect.set_options(timeout=60_000)  # as patient as the reader: other tests run beside this one
CHARTS = {"data": 2, "masks": 3, "union": 6, "tables": 2, "coverage": 6, "what_if": 2, "compare": 2}
#: Far above what is measured on two idle cores (README): the machine that runs the tests may be busy.
FIRST_PAINT_LIMIT_S, INTERACTION_LIMIT_S = 15.0, 4.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()
    # Not "Traceback": Streamlit's own endpoint logs one when a tab closes just while it is sent something.
    assert f'File "{ROOT / "inspector"}' not in running.log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with chromium() as opened:
            yield opened
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def reader(browser: Any, server: Server) -> Iterator[Reader]:
    tab = Reader(browser, server)
    yield tab
    tab.context.close()


def test_only_this_machine_is_served_and_nothing_leaves_it(server: Server) -> None:
    assert server.answers("127.0.0.1")
    assert not server.answers("127.0.0.2"), "a server on every address would answer here too"
    assert "Collecting usage statistics" not in server.log.read_text()


def test_every_page_with_settings_deep_links_and_both_themes(browser: Any, server: Server, reader: Reader) -> None:
    reader.open("data")
    for page, charts in CHARTS.items():
        if page != "data":
            reader.go(page)
        assert reader.tab.get_by_test_id("stVegaLiteChart").count() == charts
        reader.shoot(page)
        reader.check()

    reader.go("masks")
    before = reader.metrics()
    reader.choose("head", "3")
    reader.choose("share", "4")
    slider = reader.tab.locator(".st-key-alpha input[type=range]")
    slider.focus()
    reader.after(lambda: [slider.press("ArrowRight") for _ in range(8)])
    reader.settle()
    wanted = {"head": "3", "share": "4", "alpha": "0.14"}
    assert {name: reader.query().get(name) for name in wanted} == wanted
    assert reader.metrics() != before
    for page in ("tables", "masks"):
        reader.go(page)
        assert {name: reader.query().get(name) for name in wanted} == wanted, "every setting is in the address"
        assert "head 3 · FlashPrefill · 4 heads by whole chunk" in reader.caption()
    reader.check()

    friend = Reader(browser, server, "dark")
    friend.tab.goto(reader.tab.url)
    friend.settle()
    assert friend.metrics() == reader.metrics(), "the same address shows the same numbers"
    assert friend.caption() == reader.caption()
    friend.check()
    friend.shoot("masks-dark")
    for page in PAGES:
        friend.go(page)
        friend.check()
    friend.context.close()


def test_hovering_clicking_walking_and_downloads(reader: Reader) -> None:
    reader.open("masks")
    charts = reader.tab.get_by_test_id("stVegaLiteChart")
    mask = charts.nth(1)
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    reader.tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=4)
    tooltip = reader.tab.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    for word in ("KV block", "tokens", "share of mass", "heads that selected it"):
        assert word in tooltip.inner_text()

    strips = charts.nth(2)
    strips.scroll_into_view_if_needed()
    box = strips.bounding_box()
    reader.tab.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.93, steps=4)
    for word in ("head", "KV blocks", "tokens", "heads that selected some"):
        playwright.expect(tooltip).to_contain_text(word)
    reader.after(lambda: reader.tab.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.93))
    reader.settle()
    head = reader.query()["head"]
    assert head == "7", "the last strip of the right column"
    assert reader.tab.get_by_role("heading", name=f"Head {head}", exact=True).count() == 1, "a click chooses a head"

    for kind, magic in (("PNG", b"\x89PNG"), ("SVG", b"<?xml"), ("CSV", b"query_block,queries,first")):
        with reader.tab.expect_download() as download:
            reader.tab.get_by_test_id("stDownloadButton").filter(has_text=kind).first.click()
        assert download.value.suggested_filename == f"mask-head-{head}.{kind.lower()}"
        assert Path(download.value.path()).read_bytes().startswith(magic)

    here = reader.caption()
    reader.after(lambda: reader.tab.locator(".st-key-back button").first.click())
    reader.settle()
    assert reader.query()["start"] == "4096"
    assert reader.caption() != here
    reader.tab.locator(".st-key-playing label").first.click()
    reader.tab.wait_for_function("() => new URL(location).searchParams.get('start') !== '4096'")
    reader.tab.locator(".st-key-playing label").first.click()
    reader.settle()
    reader.check()


def test_a_sweep_can_be_cancelled_and_finished(reader: Reader) -> None:
    reader.open("what_if", "?layer=2&chunk=256")
    cancel, sweep = (reader.tab.get_by_role("button", name=name) for name in ("Cancel", "Sweep 29 points"))
    sweep.click()
    playwright.expect(cancel).to_be_enabled(timeout=60_000)
    reader.tab.get_by_test_id("stProgress").wait_for()
    cancel.click()
    playwright.expect(cancel).to_be_disabled(timeout=60_000)
    reader.settle()
    done = reader.tab.get_by_text(re.compile(r"^\d+ of 29 points"))
    finished = int(done.inner_text().split()[0]) if done.count() else 0
    assert finished < 29
    sweep.click()
    playwright.expect(reader.tab.get_by_text("29 of 29 points")).to_be_visible(timeout=60_000)
    playwright.expect(cancel).to_be_disabled(timeout=60_000)
    reader.settle()
    reader.shoot("what_if-swept")
    reader.check()


def bad_files(folder: Path) -> list[tuple[Path, str]]:
    """Five files that are no captures, and what the page should say."""
    good = folder / "good.safetensors"
    text = b"<img src=http://198.51.100.1/hover.png>"
    save_capture(good, dataclasses.replace(noise(), text=(text * TOKENS)[:TOKENS]))
    garbage = folder / "garbage.safetensors"
    garbage.write_bytes(b"not a capture " * 50)
    cut = folder / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1000])
    header = {"version": 1, "layers": [], "model": "", "source": "", "rope_theta": 1.0, "scale": None}
    hostile = folder / "hostile.safetensors"
    image = "![image](http://198.51.100.1/seen.png)"  # shown as it is, not fetched: the reader's requests are watched
    save_file({image: torch.zeros(1)}, hostile, {"compactattn": json.dumps(header)})
    newer = folder / "newer.safetensors"
    save_file({"x": torch.zeros(1)}, newer, {"compactattn": json.dumps({**header, "version": 99})})
    odd = folder / "odd.safetensors"
    layer = CapturedLayer(0, *(torch.ones(40, heads, 72) for heads in (2, 1, 1)))
    save_capture(odd, dataclasses.replace(noise(), layers=(layer,)))
    return [
        (garbage, "expected a safetensors file"),
        (cut, "expected a safetensors file"),
        (hostile, image),
        (newer, "format version: expected 1"),
        (odd, "head dimension of k: expected one of 64"),
    ]


def test_one_good_and_five_bad_uploads(reader: Reader, tmp_path: Path) -> None:
    reader.open("data", "?data=File")
    files = reader.tab.locator(".st-key-file_upload input[type=file]")
    refusal = reader.tab.get_by_test_id("stMain").get_by_test_id("stAlertContentError").first
    for path, words in bad_files(tmp_path):
        reader.after(lambda path=path: files.set_input_files(path))
        playwright.expect(refusal).to_contain_text(path.name)  # an upload may run the script twice
        reader.settle()
        assert words in reader.error(), path.name
        assert not reader.tab.get_by_test_id("stException").count()
        assert "Traceback" not in reader.tab.get_by_test_id("stMain").inner_text()
    reader.after(lambda: files.set_input_files(tmp_path / "good.safetensors"))
    playwright.expect(reader.tab.get_by_test_id("stMetricLabel").get_by_text("Prompt, tokens")).to_be_visible()
    reader.settle()
    assert reader.metrics()["Prompt, tokens"] == str(TOKENS)
    assert reader.caption().startswith("upload good.safetensors")
    for page in ("masks", "coverage"):
        reader.go(page)
        assert reader.caption().startswith("upload good.safetensors")
    _hover_over_hostile_text(reader)

    reader.choose("selector", "SeerGate")
    name = "model.layers.5.self_attn.attn_gate.mask_linear_k.weight"
    torch.save({name: torch.zeros(HEADS, 192, 64)}, tmp_path / "gate.pth")
    reader.after(
        lambda: reader.tab.locator(".st-key-gate_upload input[type=file]").set_input_files(tmp_path / "gate.pth")
    )
    playwright.expect(reader.tab.get_by_test_id("stMain").get_by_text("head 0 · SeerGate")).to_be_visible()
    reader.settle()
    reader.check()


def _hover_over_hostile_text(reader: Reader) -> None:
    """A prompt's text is shown beside a token as it is: no element is made of it, nothing is fetched."""
    strip = reader.tab.get_by_test_id("stVegaLiteChart").nth(1)
    strip.scroll_into_view_if_needed()
    box, tooltip = strip.bounding_box(), reader.tab.locator("#vg-tooltip-element")
    for part in range(8, 40):  # of the two lanes, a token lies in one
        x, y = box["x"] + box["width"] * 0.5 + part, box["y"] + box["height"] * (0.15 if part % 2 else 0.35)
        reader.tab.mouse.move(x, y)
        if tooltip.is_visible() and "<img" in tooltip.inner_text():
            break
    playwright.expect(tooltip).to_contain_text("<img src=")
    assert not tooltip.locator("img").count()
    reader.tab.mouse.move(0, 0)


def test_first_paint_and_interactions_at_128k_are_quick(browser: Any) -> None:
    paint, server = first_paint(browser), Server()
    try:
        reader = Reader(browser, server)
        times = interactions(reader, {"masks": 20, "union": 1, "tables": 1, "coverage": 20}, "?data=Synthetic")
        assert "131,072 tokens" in reader.caption()
        reader.go("union")
        reader.shoot("union-128k")
        reader.context.close()
    finally:
        server.stop()
    report = {
        "load average, processors": [os.getloadavg()[0], os.cpu_count()],
        "first paint, s": {name: round(seconds, 2) for name, seconds in paint.items()},
        "another alpha at 131,072 tokens, median s": medians(times),
        "runs": {page: len(found) for page, found in times.items()},
    }
    (SHOTS / "timings.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    assert paint["answer to complete page"] < FIRST_PAINT_LIMIT_S
    assert statistics.median(times["masks"]) < INTERACTION_LIMIT_S
