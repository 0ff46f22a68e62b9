"""Results on disk: whole or not at all, of one run at a time, and never lost to the next one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from compactattn.files import replacing

try:
    import fcntl
except ImportError:  # not on Windows, where nothing notices two runs of one result
    fcntl = None  # type: ignore[assignment]

_claimed: dict[Path, IO[str]] = {}
_in_the_way: set[Path] = set()


def claim(path: Path, *, resume: bool) -> None:
    """Before a run: its directory is there and can be written to, and no other process here writes the same result.

    A result that is there and not to be resumed is kept beside it as NAME.before, when this run first writes its own.

    Raises:
        ValueError: another process is writing the result, or it cannot be written.
        OSError: a directory that cannot be made.
    """
    name = path.resolve()
    check_place(name)
    if name not in _claimed:
        _claimed[name] = _locked(path, name)
    if resume:
        _in_the_way.discard(name)
    else:
        _in_the_way.add(name)


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


def earlier(path: Path) -> dict[str, Any]:
    """The result that a run goes on from.

    Raises:
        ValueError: no JSON object with runs.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--resume: expected a result in {path}, got no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--resume: expected a result in {path}, got {type(found).__name__}")
    return found


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write under another name and rename, so that nobody meets half a file; the first time, see `claim`."""
    text, name = _laid_out(result) + "\n", path.resolve()
    if name in _in_the_way and name.exists():
        before = name.with_name(f"{name.name}.before")
        with replacing(before) as file:  # a copy: what is there stays until the new one takes its place
            file.write(name.read_bytes())
        print(f"{before}: the result that was there")
    write_text(name, text)
    _in_the_way.discard(name)


def write_text(path: Path, text: str) -> None:
    """The same of text."""
    with replacing(path) as file:
        file.write(text.encode())


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
