"""Results on disk: whole or not at all, of one run at a time, and never lost to the next one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from compactattn.files import replacing

try:
    import fcntl
except ImportError:  # not on Windows, where nothing notices two runs of one result
    fcntl = None  # type: ignore[assignment]

_claimed: dict[Path, IO[str]] = {}


def claim(path: Path) -> None:
    """Before a run: its directory is there and can be written to, and no other process here writes the same result.

    Raises:
        ValueError: another process is writing the result, or it cannot be written.
        OSError: a directory that cannot be made.
    """
    name = path.resolve()
    check_place(name)
    if name not in _claimed:
        _claimed[name] = _locked(path, name)


def check_place(path: Path, option: str = "--out") -> None:
    """The file's directory is there, or is made, and can be written to.

    Raises:
        ValueError: a directory in the file's place, or one that cannot be written to; the message names `option`.
        OSError: a directory that cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"{option}: expected a place for a file, got the directory {path}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: expected a directory that can be written to, got {path.parent}")


def _locked(path: Path, name: Path) -> IO[str]:
    """A lock for as long as this process lives, among temporary files: nothing lies beside results but results."""
    digest = hashlib.sha256(f"{os.getuid() if fcntl else 0} {name}".encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir(), f"compactattn-{digest}.lock").open("w")  # noqa: SIM115 (it stays open)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ValueError(f"--out: expected a result that no other run writes, got {path}") from error
    return lock


def parsed(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        ValueError: none, or one that is too deep to be read.
        OSError: a file that cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(str(error)) from error


def earlier(path: Path) -> dict[str, Any]:
    """The result that a run goes on from.

    Raises:
        ValueError: no JSON object.
    """
    try:
        found = parsed(path)
    except ValueError as error:
        raise ValueError(f"--resume: expected a result in {path}, got no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--resume: expected a result in {path}, got {type(found).__name__}")
    return found


def write_new(path: Path, result: dict[str, Any]) -> None:
    """Write the first JSON of a result that goes on from no other; what is there is kept beside it as NAME.before."""
    name = path.resolve()
    if name.exists():
        before = name.with_name(f"{name.name}.before")
        with replacing(before) as file:  # a copy: what is there stays until the new one takes its place
            file.write(name.read_bytes())
        print(f"{before}: the result that was there")
    write_json(name, result)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write under another name and rename, so that nobody meets half a file."""
    write_text(path, _laid_out(result) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same of text."""
    with replacing(path) as file:
        file.write(text.encode())


def write_beside(
    path: Path,
    out: Path | None,
    markdown: Callable[[Sequence[str]], str],
    figures: Mapping[str, Callable[[Path], None]],
) -> tuple[Path, ...]:
    """Write the report of a result NAME.json: its figures, then NAME.md, so that no text names a picture not there.

    Args:
        path: the result.
        out: the directory, by default the result's.
        markdown: the text, given the figures' file names.
        figures: what draws NAME + suffix + ".png", by suffix.

    Returns:
        where they went, the text first.
    """
    out = path.parent if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    pictures = {out / f"{path.stem}{suffix}.png": draw for suffix, draw in figures.items()}
    text, words = out / f"{path.stem}.md", markdown([picture.name for picture in pictures])
    for picture, draw in pictures.items():
        draw(picture)
    write_text(text, words)
    return text, *pictures


def _laid_out(value: object, depth: int = 0) -> str:
    """JSON with one line per row of a case, and per row of a prompt's chunk."""
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if not isinstance(value, dict | list | tuple) or not value or depth == 5 or (depth == 4 and "gate" in value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{deeper}{json.dumps(str(name))}: {_laid_out(one, depth + 1)}" for name, one in value.items()]
    else:
        parts = [f"{deeper}{_laid_out(one, depth + 1)}" for one in value]
    return "\n".join((opening, ",\n".join(parts), f"{' ' * depth}{closing}"))
