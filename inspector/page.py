"""What every page has: a heading, its errors as messages, downloads, and the Python that gives the same."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import streamlit as st

from inspector import snippets
from inspector.files import ChosenFile
from inspector.sidebar import View
from inspector.widgets import UndecidedError

if TYPE_CHECKING:
    import altair as alt
    from matplotlib.figure import Figure

VIEW = "view"  # where the sidebar leaves the reader's settings for the page
PERCENT = st.column_config.NumberColumn(format="percent")
_LONGEST = 1200  # characters of a message or a label from a file that are shown


def plain(text: str) -> str:
    """Text from a file or an address as Markdown that shows it as it is: no images are fetched, no links made."""
    words = " ".join(text[: 4 * _LONGEST].split())
    words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&])", r"\\\1", words)


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
        failed(error)


def failed(error: Exception) -> bool:
    """Say that something went wrong which nobody foresaw: the terminal gets the traceback, the page a way on."""
    logging.getLogger(__name__).error("the inspector failed", exc_info=error)
    st.error(
        f"The inspector failed on this view ({type(error).__name__}); the terminal that runs it shows where. "
        "Change a setting to go on, and please report the settings in the address."
    )
    return True


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
    members = "whole chunk" if span is None else count(span, "query block")
    grouping = f"{count(setting.heads_per_group, 'head')} by {members}"
    return (
        f"{plain(about.label)} · layer {view.subject.layer} · tokens {place.start:,} to {place.stop - 1:,} of "
        f"{about.tokens:,} · head {view.head} · {type(setting.selector).__name__} · {grouping}"
    )


def count(number: int, thing: str) -> str:
    """ "1 head", "2 heads"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def few(numbers: Sequence[int], most: int = 6) -> str:
    """ "2, 4", or of many the first ones and the last."""
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= most else [*shown[: most - 2], "…", shown[-1]])


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


class Card(NamedTuple):
    """A number in a box: `beside` is what it is compared with."""

    label: str
    value: str
    beside: str | None = None
    help: str | None = None


def cards(*shown: Card) -> None:
    """Numbers in a row."""
    for column, card in zip(st.columns(len(shown)), shown, strict=True):
        style = {"delta_color": "off", "delta_arrow": "off", "border": True, "height": "stretch"}
        column.metric(card.label, card.value, card.beside, help=card.help, **style)


def drawn(name: str, *results: object) -> Callable[[], Figure]:
    """A figure ("module.function") over results, drawn when it is asked for: the page does not wait for matplotlib."""

    def draw() -> Figure:
        module, function = name.split(".")
        return getattr(importlib.import_module(f"inspector.{module}"), function)(*results)

    return draw


def picture(
    name: str,
    chart: alt.TopLevelMixin | None,
    figure: Callable[[], Figure],
    frame: pd.DataFrame | Callable[[], pd.DataFrame],
    **selection: object,
) -> None:
    """An interactive chart as wide as its place, and its downloads: a figure as PNG and SVG, the data as CSV.

    Args:
        name: of the files.
        chart: None where what is saved stands above already.
        figure: see `drawn`.
        frame: what is saved as CSV.
        selection: of `st.altair_chart`, for charts that can be clicked.
    """
    if chart is not None:
        st.altair_chart(chart, width="stretch", **selection)

    def image(kind: str) -> Callable[[], bytes]:
        def draw() -> bytes:
            data = io.BytesIO()
            figure().savefig(data, format=kind, dpi=200)
            return data.getvalue()

        return draw

    def table() -> bytes:
        return (frame() if callable(frame) else frame).to_csv(index=False).encode("utf-8")

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


def python(view: View, *additions: str, **names: object) -> None:
    """The call that gives what the page shows, with a button that copies it; see `snippets.python_call`."""
    with st.expander("Python that gives this view", icon=":material/code:"):
        code = snippets.python_call(*view.at, view.setting, additions, weights=view.weights, **names)
        st.code(code, language="python")
        for file in (view.source, view.weights, names.get("other_weights")):
            if isinstance(file, ChosenFile) and file.upload:
                st.caption(f"Upload: put the path of your {plain(file.path)} in the call.")
