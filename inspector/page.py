"""What every page has: a heading, its errors as messages, downloads, and the Python that gives the same."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from inspector import snippets
from inspector.sidebar import UndecidedError, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEW = "view"  # where the sidebar leaves the reader's settings for the page


def plain(text: str) -> str:
    """Text from a file or an address as Markdown that shows it as it is: no images are fetched, no links made."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&])", r"\\\1", " ".join(text.split()))


def guarded(work: Callable[[], None]) -> None:
    """Run a part of the page; what it raises becomes a message that says what to do."""
    try:
        work()
    except UndecidedError:
        pass
    except (OSError, ValueError) as error:
        st.error(f"{plain(str(error))}\n\nChange the setting or the file that is named here.")
    except MemoryError:
        st.error("Not enough memory for this chunk. Choose a shorter prompt, fewer KV heads or a smaller chunk.")
    except Exception as error:
        logging.getLogger(__name__).exception("the inspector failed")
        st.error(
            f"The inspector failed on this view ({type(error).__name__}); the terminal that runs it shows where. "
            "Change a setting to go on, and please report the settings in the address."
        )


def render(show: Callable[[View], None]) -> None:
    """What a page shows, under its heading, for the settings in the sidebar."""
    view = st.session_state.get(VIEW)
    if view is None:
        st.info("Choose what to look at in the sidebar.", icon=":material/arrow_back:")
        return
    st.caption(context(view))
    guarded(lambda: show(view))


def context(view: View) -> str:
    """One line: what is looked at."""
    about, place, setting = view.about, view.place, view.setting
    span = setting.query_blocks_per_span
    members = "whole chunk" if span is None else _count(span, "query block")
    grouping = f"{_count(setting.heads_per_group, 'head')} by {members}"
    return (
        f"{plain(about.label)} · layer {about.layers[place.layer]} · tokens {place.start:,} to {place.stop - 1:,} of "
        f"{about.tokens:,} · head {view.head} · {type(setting.selector).__name__} · {grouping}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def need_past(view: View) -> bool:
    """Whether there is a past to select from; if not, the page says so."""
    if view.place.start >= view.setting.selector.block_size:
        return True
    st.info(
        "The first chunk has no complete past block: every block is in the current region, and nothing is left out. "
        "Walk to a later chunk in the sidebar.",
        icon=":material/skip_next:",
    )
    return False


def drawn(name: str, *results: object) -> Callable[[], Figure]:
    """A figure of `figures.py` over results, drawn when it is asked for: the page does not wait for matplotlib."""

    def draw() -> Figure:
        from inspector import figures

        return getattr(figures, name)(*results)

    return draw


def downloads(name: str, figure: Callable[[], Figure], frame: Callable[[], pd.DataFrame]) -> None:
    """The view as PNG and SVG, drawn by matplotlib when asked for, and its data as CSV."""

    def image(kind: str) -> Callable[[], bytes]:
        def draw() -> bytes:
            data = io.BytesIO()
            figure().savefig(data, format=kind, dpi=200)
            return data.getvalue()

        return draw

    def table() -> bytes:
        return frame().to_csv(index=False).encode("utf-8")

    row = st.container(horizontal=True)
    files = (("PNG", image("png"), "image/png"), ("SVG", image("svg"), "image/svg+xml"), ("CSV", table, "text/csv"))
    for label, data, mime in files:
        row.download_button(
            label,
            data,
            f"{name}.{label.lower()}",
            mime,
            key=f"{name} {label}",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )


def python(view: View, addition: str = "") -> None:
    """The call that gives what the page shows, with a button that copies it."""
    with st.expander("Python that gives this view", icon=":material/code:"):
        st.code(snippets.python_call(*view.at, view.setting, addition), language="python")
        if getattr(view.source, "upload", ""):
            st.caption("Upload: put the path of your file in the call.")


def chart(spec: object, **more: object) -> object:
    """An interactive chart, as wide as the page."""
    return st.altair_chart(spec, width="stretch", **more)
