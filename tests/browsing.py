"""How the tests read the inspector: Streamlit serving it, and one tab of Chromium.

    python -m tests.browsing times       # on a machine that does nothing else: the times that the README states
    python -m tests.browsing pictures    # every page in both themes, and the README's pictures

Times and pages are left in `out/inspector`, the README's pictures in `inspector/screenshots`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "out" / "inspector"
PICTURE_FOLDER = ROOT / "inspector" / "screenshots"
PAGES = {
    "data": "Data",
    "masks": "Masks",
    "union": "Union",
    "tables": "Tables",
    "coverage": "Coverage against QUOKA",
    "what_if": "What if",
    "compare": "Compare",
}
#: The README's pictures: page, theme, and what is in the address.
PICTURES = {
    "masks-dark": ("masks", "dark", "?head=3&share=4&alpha=0.14"),
    "union-128k": ("union", "light", "?data=Synthetic"),
    "coverage": ("coverage", "light", ""),
}
PICTURE_SIZE = 1440, 1640


class Server:
    """`streamlit run inspector` from the repository's root, as the README has it, on a free port.

    Attributes:
        started_s: seconds from the command to the first answer.
    """

    def __init__(self) -> None:
        began = time.perf_counter()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", "inspector", "--server.headless", "true"]
        self.log = SHOTS / f"server-{self.port}.log"
        SHOTS.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--server.port", str(self.port)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        while not self._healthy():
            assert self.process.poll() is None, self.log.read_text()
            assert time.perf_counter() - began < 120, self.log.read_text()
            time.sleep(0.02)
        self.started_s = time.perf_counter() - began

    def _healthy(self) -> bool:
        """Whether the server answers, as Streamlit's own page asks it."""
        try:
            with urllib.request.urlopen(self.url("_stcore/health"), timeout=60) as answer:
                return answer.status == 200
        except OSError:
            return False

    def answers(self, address: str) -> bool:
        try:
            socket.create_connection((address, self.port), timeout=2).close()
        except OSError:
            return False
        return True

    def url(self, page: str = "", query: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{'' if page == 'data' else page}{query}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def ends_a_run(frame: str | bytes) -> bool:
    """Whether a message of Streamlit's server says that a script ran to its end."""
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

    if isinstance(frame, str):
        return False
    message = ForwardMsg.FromString(frame)
    return message.WhichOneof("type") == "script_finished" and message.script_finished in (
        ForwardMsg.FINISHED_SUCCESSFULLY,
        ForwardMsg.FINISHED_WITH_COMPILE_ERROR,
    )


class Reader:
    """One tab, and everything that went wrong in it."""

    def __init__(self, browser: Any, server: Server, theme: str = "light") -> None:
        self.server, self.problems = server, []
        size = {"width": 1440, "height": 1000}
        self.context = browser.new_context(viewport=size, color_scheme=theme, accept_downloads=True)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(150_000)
        self.tab.on("websocket", self._follow)
        self.tab.on("console", lambda message: self._note(message.type, message.text, message.location.get("url", "")))
        self.tab.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.tab.on("request", lambda request: self._check_address(request.url))

    def _follow(self, socket: Any) -> None:
        self.server_socket = socket

    def _note(self, kind: str, text: str, url: str) -> None:
        # On a deep link, Streamlit's own page looks for its server below the page's path first.
        if kind == "error" and not re.search(r"/\w+/_stcore/(health|host-config)$", url):
            self.problems.append(f"console: {text} {url}")

    def _check_address(self, url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != "127.0.0.1":
            self.problems.append(f"a request left this machine: {url}")

    def open(self, page: str, query: str = "") -> None:
        self.tab.goto(self.server.url(page, query))
        self.settle()

    def settle(self) -> None:
        """Wait until the script has run and its charts are drawn."""
        self.tab.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"] h1')
        self.tab.wait_for_function(
            "() => !document.querySelector('[data-testid=stSpinner], [data-testid=stSkeleton], [data-stale=true]')"
        )
        charts = "document.querySelectorAll('[data-testid=stVegaLiteChart]')"
        self.tab.wait_for_function(f"() => [...{charts}].every(chart => chart.querySelector('canvas, svg.marks'))")

    def after(self, action: Any) -> float:
        """Seconds from an action to the end of the script run that it causes, charts drawn."""
        self.tab.evaluate(
            """() => {
                const app = document.querySelector('[data-testid=stApp]');
                window.ran = false; window.idle = null;
                window.watch?.disconnect();
                window.watch = new MutationObserver(() => {
                    const running = app.getAttribute('data-test-script-state') === 'running';
                    if (running) { window.ran = true; window.idle = null; }
                    else if (window.ran) { window.idle = performance.now(); }
                });
                window.watch.observe(app, {attributes: true, attributeFilter: ['data-test-script-state']});
                window.began = performance.now();
            }"""
        )
        with self.server_socket.expect_event("framereceived", ends_a_run):
            action()
        # Where the messages of a short run arrive together, the page draws its end only and never says that it ran.
        self.tab.evaluate("() => { window.heard = performance.now(); }")
        self.tab.wait_for_function(
            "() => window.idle !== null || (!window.ran && performance.now() > window.heard + 1000)", polling=20
        )
        return self.tab.evaluate(
            """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(
                () => done((performance.now() - window.began) / 1000))))"""
        )

    def go(self, page: str) -> None:
        self.tab.get_by_test_id("stSidebarNav").get_by_role("link", name=PAGES[page], exact=True).click()
        self.tab.wait_for_function(f"() => document.querySelector('h1')?.innerText === {PAGES[page]!r}")
        self.settle()

    def choose(self, key: str, option: str) -> None:
        """Pick an option of a select box."""
        opener = self.tab.locator(f".st-key-{key} button[aria-haspopup=listbox]")
        opener.scroll_into_view_if_needed()
        self.tab.wait_for_timeout(200)  # a list that opens while the page still scrolls closes again
        opener.click()
        self.after(self.tab.get_by_role("option", name=option, exact=True).click)
        self.settle()

    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.tab.url).query).items()}

    def metrics(self) -> dict[str, str]:
        boxes = self.tab.get_by_test_id("stMetric").all()
        return {
            box.get_by_test_id("stMetricLabel").inner_text(): box.get_by_test_id("stMetricValue").inner_text()
            for box in boxes
        }

    def caption(self) -> str:
        return self.tab.get_by_test_id("stMain").get_by_test_id("stCaptionContainer").first.inner_text()

    def error(self) -> str:
        return self.tab.get_by_test_id("stMain").get_by_test_id("stAlertContentError").first.inner_text()

    def shoot(self, name: str) -> None:
        """A screenshot of the whole page."""
        self.tab.mouse.move(0, 0)
        height = self.tab.evaluate("() => document.querySelector('[data-testid=stMain]').scrollHeight")
        self.tab.set_viewport_size({"width": 1440, "height": max(1000, height)})
        self.settle()
        self.tab.wait_for_timeout(300)
        self.tab.screenshot(path=SHOTS / f"{name}.png")
        self.tab.set_viewport_size({"width": 1440, "height": 1000})

    def photograph(self, name: str) -> None:
        """A picture for the README: the upper part of the page, in as few colours as it needs."""
        from PIL import Image

        width, height = PICTURE_SIZE
        self.tab.mouse.move(0, 0)
        self.tab.set_viewport_size({"width": width, "height": height})
        self.settle()
        self.tab.wait_for_timeout(300)
        image = Image.open(io.BytesIO(self.tab.screenshot())).convert("RGB")
        image.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(PICTURE_FOLDER / f"{name}.png", optimize=True)

    def check(self) -> None:
        assert not self.problems, self.problems
        assert not self.tab.get_by_test_id("stException").count()
        assert not self.tab.get_by_test_id("stAlertContentError").count(), self.error()


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's chromium, or the one that `playwright install chromium` left.

    Raises:
        FileNotFoundError: neither is there.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        path = shutil.which("chromium") or driver.chromium.executable_path
        if not Path(path).exists():
            raise FileNotFoundError("no browser: install chromium (apt) or run `playwright install chromium`")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = driver.chromium.launch(executable_path=path, args=sandbox)
        yield opened
        opened.close()


def first_paint(browser: Any) -> dict[str, float]:
    """Seconds until a server answers, until its default page has a heading, and until that page is complete."""
    server = Server()
    try:
        reader = Reader(browser, server)
        began = time.perf_counter()
        reader.tab.goto(server.url())
        reader.tab.wait_for_selector("h1")
        heading = time.perf_counter() - began
        reader.settle()
        painted = time.perf_counter() - began
        reader.check()
        reader.context.close()
    finally:
        server.stop()
    return {"command to answer": server.started_s, "answer to heading": heading, "answer to complete page": painted}


def interactions(reader: Reader, runs: dict[str, int], query: str = "") -> dict[str, list[float]]:
    """Seconds from another alpha to the drawn page, `runs` times on each page, each time a value not seen before."""
    times: dict[str, list[float]] = {}
    for n, (page, count) in enumerate(runs.items()):
        if n:
            reader.go(page)
        else:
            reader.open(page, query)
        slider = reader.tab.locator(".st-key-alpha input[type=range]")
        slider.focus()
        times[page] = [reader.after(partial(slider.press, "ArrowRight")) for _ in range(count)]
        reader.settle()
        reader.check()
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {page: round(statistics.median(found), 2) for page, found in times.items()}


def take_times() -> dict[str, object]:
    """Every time that the README states: medians of 5 fresh servers, and of 20 changes of alpha on each page."""
    report: dict[str, object] = {"processors": os.cpu_count(), "load average before": os.getloadavg()[0]}
    with chromium() as browser:
        paints = [first_paint(browser) for _ in range(5)]
        report["first paint, s"] = medians({name: [paint[name] for paint in paints] for name in paints[0]})
        for name, query in (("sample", ""), ("131,072 tokens", "?data=Synthetic")):
            server = Server()
            try:
                times = interactions(Reader(browser, server), dict.fromkeys(PAGES, 20), query)
            finally:
                server.stop()
            report[f"another alpha, {name}, s"] = medians(times)
    report["load average after"] = os.getloadavg()[0]
    return report


def take_pictures() -> None:
    """Every page in both themes into `out/inspector`, and the README's pictures."""
    with chromium() as browser:
        server = Server()
        try:
            for theme in ("light", "dark"):
                reader = Reader(browser, server, theme)
                for page in PAGES:
                    reader.open(page)
                    reader.shoot(f"{page}-{theme}")
                reader.check()
                reader.context.close()
            for name, (page, theme, query) in PICTURES.items():
                reader = Reader(browser, server, theme)
                reader.open(page, query)
                reader.photograph(name)
                reader.check()
                reader.context.close()
        finally:
            server.stop()


def main() -> None:
    parts = sys.argv[1:] or ["times", "pictures"]
    if not set(parts) <= {"times", "pictures"}:
        raise SystemExit(f"browsing: expected times, pictures or nothing, got {' '.join(parts)}")
    if "times" in parts:
        text = json.dumps(take_times(), indent=2)
        (SHOTS / "timings.json").write_text(text + "\n")
        print(text)
    if "pictures" in parts:
        take_pictures()


if __name__ == "__main__":
    main()
