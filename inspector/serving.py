"""What the server does before its first reader comes: import what every page needs, and open the reader's browser."""

from __future__ import annotations

import asyncio
import importlib
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import streamlit as st

#: No page can do without these: the server answers when they are imported. A browser that asks earlier waits for it.
FIRST = ("torch", "pandas", "altair", "inspector.page", "inspector.charts")
#: These can follow while the reader's browser loads its own side of the page.
MEANWHILE = ("numba", "inspector.quality_charts")


@asynccontextmanager
async def lifespan(_: st.App) -> AsyncIterator[None]:
    """Around the time in which the server answers."""
    if not st.get_option("server.headless"):
        threading.Thread(target=webbrowser.open, args=(address(),), daemon=True).start()
    await asyncio.to_thread(_import, FIRST)
    threading.Thread(target=_import, args=(MEANWHILE,), daemon=True).start()
    yield


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)


def address() -> str:
    """Where this server is reached from the machine that it runs on."""
    scheme = "https" if st.get_option("server.sslCertFile") else "http"
    host = st.get_option("server.address") or "localhost"
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    base = st.get_option("server.baseUrlPath").strip("/")
    return f"{scheme}://{host}:{st.get_option('server.port')}/{base}"


def failed(error: Exception) -> bool:
    """What escapes a page, out of a click's callback for instance, becomes a message on it, not a traceback."""
    from inspector import page

    return page.failed(error)
