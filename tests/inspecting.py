"""How the tests drive the inspector without a browser: its pages as Streamlit's `AppTest` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

from compactattn import FlashPrefill
from inspector import sources
from inspector.model import Setting
from inspector.sources import Place
from tests.test_inspector import TOKENS, noise

APP = Path(__file__).parents[1] / "inspector" / "streamlit_app.py"
PAGES = ("data", "masks", "union", "tables", "coverage", "what_if", "compare")


def start(page: str = "data", path: str | None = None, **query: str) -> Any:
    """The app on a page: the sample, or a capture that the reader typed; `query` is the address."""
    app = AppTest.from_file(str(APP), default_timeout=120)
    for name, value in query.items():
        app.query_params[name] = value
    if path is not None:
        app.query_params["data"] = "File"
    app.run()
    if path is not None:
        app.text_input(key="file").set_value(path).run()
    return visit(app, page)


def visit(app: Any, page: str) -> Any:
    return app.switch_page(f"views/{page}.py").run()


def fine(app: Any) -> Any:
    """No traceback, no error box; returns the app."""
    assert not app.exception, app.exception
    assert not app.error, app.error[0].value
    return app


def context(app: Any) -> str:
    """The line that says what is looked at, less the escapes that keep it from being read as Markdown."""
    return app.caption[0].value.replace("\\", "")


def metrics(app: Any) -> dict[str, str]:
    return {metric.label: metric.value for metric in app.metric}


def noise_step(start: int = 512, stop: int = TOKENS, layer: int = 1) -> sources.Step:
    return sources.make_recorded_step(noise(), Place(layer, start, stop), 16)


def default_setting(**changes: Any) -> Setting:
    rules = {"alpha": 0.1, "sink_blocks": 1, "window_blocks": 2, "block_size": 64, "query_block": 64}
    return Setting(FlashPrefill(**{**rules, **changes}), 2)
