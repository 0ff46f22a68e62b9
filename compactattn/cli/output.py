"""What every command writes: text to standard output, files that appear whole, and errors of one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """An argument that cannot be used, or output that cannot be written; the message says which, and what is valid."""


def emit(text: str) -> None:
    """Print at once, so that output that cannot be written is noticed here and not when Python ends."""
    if sys.stdout is None:  # Python has none where file descriptor 1 is closed, and prints into nothing
        raise UsageError("standard output: expected to be writable, got: closed")
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):  # a stream without a file descriptor; else what it still holds would fail once more
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"standard output: expected to be writable, got: {error.strerror}") from error


def escaped(text: str) -> str:
    """On one line, and without anything that a terminal would obey: "\\x1b" in place of an escape character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: Exception) -> str:
    """The message of an exception without its line breaks."""
    return " ".join(str(error).split())


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Let a command write what it found for programs."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write JSON to FILE; without FILE or with '-' to standard output, instead of the text",
    )


def check_json_target(target: str | None, *, spared: Sequence[str | Path] = ()) -> None:
    """Refuse a `--json FILE` that cannot be written before a minute of work, not after.

    spared: files that the command reads or writes besides, which it must not overwrite.
    """
    if target is not None and target != "-" and not (_is_special(target) and os.access(target, os.W_OK)):
        check_file_target("--json", target, valid="'-' or a file in a writable directory", spared=spared)


def check_file_target(
    option: str, target: str, *, valid: str = "a file in a writable directory", spared: Sequence[str | Path] = ()
) -> None:
    """Refuse a file that cannot be put in place: its directory is not there or not writable, or it is no plain file.

    spared: files that the command reads or writes besides, which it must not overwrite.
    """
    if any(_is_same(target, other) for other in spared):
        raise UsageError(f"{option}: expected a file that is not read or written as well, got {target!r}")
    path = Path(os.path.realpath(target))
    # a link that still is one leads to itself
    writable = not path.is_symlink() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if not target or os.path.isdir(target) or _is_special(target) or not writable:
        raise UsageError(f"{option}: expected {valid}, got {target!r}")


def _is_same(target: str, other: str | Path) -> bool:
    """Whether two paths lead to one file, by whatever links, names or mounts; it need not be there yet."""
    try:
        return os.path.realpath(target) == os.path.realpath(other) or os.path.samefile(target, other)
    except OSError:  # one of them is not there
        return False


def _is_special(target: str) -> bool:
    """Whether it is a device, a FIFO or a socket, which must never be replaced."""
    return os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target)


def show(text: str, target: str | None, value: dict[str, Any]) -> None:
    """Print the text, or JSON instead; a file of JSON is written even where nobody reads the text."""
    try:
        if target != "-":
            emit(text)
    finally:
        if target is not None:
            content = json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
            if target == "-":
                emit(content)
            else:
                _write(target, content + "\n")


def _write(target: str, content: str) -> None:
    """Put ASCII in a file that appears whole or not at all, where a link leads; or straight to a device or a FIFO."""
    from compactattn.files import replacing

    try:
        if _is_special(target):
            Path(target).write_text(content, encoding="ascii")
            return
        with replacing(target) as file:
            file.write(content.encode("ascii"))
    except OSError as error:
        raise UsageError(f"--json: expected a file that can be written, got {target!r}: {error.strerror}") from error
