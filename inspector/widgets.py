"""Widgets that are bound to the address: whatever a link says, what comes back is a value that the page can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import streamlit as st

from inspector import cached
from inspector.files import ChosenFile

BOUND = {"bind": "query-params"}
Chosen = TypeVar("Chosen", bound=ChosenFile)


class UndecidedError(Exception):
    """There is nothing to show before the reader has decided; what to decide is on the page already."""


def choose(label: str, key: str, options: Sequence[Any], default: Any, **more: Any) -> Any:
    """A select box that falls back to its default when its options change."""
    options = list(options)
    if key in st.session_state and st.session_state[key] not in options:
        del st.session_state[key]
    index = options.index(default) if default in options else 0
    return st.selectbox(label, options, index, key=key, **BOUND, **more)


def either(label: str, key: str, options: Sequence[str], default: str, **more: Any) -> str:
    """One of a few words, side by side."""
    if key in st.session_state and st.session_state[key] not in options:
        del st.session_state[key]
    return st.segmented_control(label, options, default=default, key=key, required=True, **BOUND, **more)


def ask_file(kind: type[Chosen], key: str, label: str, endings: Sequence[str], **more: Any) -> Chosen | None:
    """A path to type, or a file to upload; None where neither was given. The upload wins.

    A path that a link brought along is read only when the reader says so.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that is too large.
        UndecidedError: a link named a file, and the reader has not agreed yet.
    """
    path = st.text_input(label, key=key, on_change=_agree, args=(key,), **BOUND, **more).strip()
    upload = st.file_uploader("or upload one", type=list(endings), key=f"{key}_upload", max_upload_size=512)
    if upload is not None:
        return _keep_upload(kind, upload, key)
    if not path:
        return None
    if st.session_state.get(f"{key}_agreed") != path:
        st.warning("This link names a file on this machine. It is not read before you say so.")
        st.code(path, language=None, wrap_lines=True)
        if not st.button("Open this file", key=f"{key}_open", icon=":material/lock_open:"):
            raise UndecidedError
        st.session_state[f"{key}_agreed"] = path
    return kind.from_path(path)


def _agree(key: str) -> None:
    """What the reader types, the reader wants to be read."""
    st.session_state[f"{key}_agreed"] = st.session_state[key].strip()


def _keep_upload(kind: type[Chosen], upload: Any, key: str) -> Chosen:
    """The upload of one widget; its bytes are taken once and kept in this session only, until another one comes."""
    held = st.session_state.get(f"{key}_held")
    if held is None or held[0] != upload.file_id:
        data = upload.getvalue()
        file = kind.from_upload(upload.name, data)
        uploads = st.session_state.setdefault(cached.UPLOADS, {})
        if held is not None:
            uploads.pop(held[1].upload, None)
        uploads[file.upload] = data
        held = st.session_state[f"{key}_held"] = (upload.file_id, file)
    return held[1]
