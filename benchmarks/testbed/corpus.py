"""The text of the test bed: the Python source of a standard library, and token windows drawn from it.

    python -m benchmarks.testbed.corpus --out stdlib.zip

packs the text, so that a model can be trained on a machine whose Python lacks a part of it (Debian leaves out
`test`). Tokens are the bytes themselves, and `SEPARATOR` before each file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from benchmarks.files import check_place

SEPARATOR = 256
HELDOUT_SHARE = 0.05
# Code page tables, generated help text, what users installed, and deliberately broken inputs of a converter.
SKIPPED_DIRECTORIES = (
    "__pycache__",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "lib2to3/tests/data",
)
SKIPPED_PREFIXES = ("_sysconfigdata",)  # differs from machine to machine
MAX_FILE_BYTES = 400_000  # no single file may dominate

ARCHIVE_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class SourceFile:
    """One file: its path below the library's root, with forward slashes, and its bytes (UTF-8, not empty)."""

    path: str
    data: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """The files in path order, split by path. No content occurs twice, so the two sides share nothing whole.

    Attributes:
        python_version: of the library that the files came from, such as "3.11.7".
        train: files to train on.
        heldout: files that no training step sees, about `HELDOUT_SHARE` of them.
    """

    python_version: str
    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...]

    def statistics(self) -> dict[str, object]:
        """Sizes and a digest of paths and contents, for the record of a training run."""
        digest = hashlib.sha256()
        for file in sorted(self.train + self.heldout, key=lambda file: file.path):
            digest.update(f"{file.path}\0{len(file.data)}\0".encode() + file.data)
        return {
            "python_version": self.python_version,
            "train_files": len(self.train),
            "train_bytes": sum(len(file.data) for file in self.train),
            "heldout_files": len(self.heldout),
            "heldout_bytes": sum(len(file.data) for file in self.heldout),
            "sha256": digest.hexdigest(),
        }


def is_heldout(path: str) -> bool:
    """Whether a file is on the held-out side; its path alone decides, so every Python version agrees."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def split(files: dict[str, bytes], python_version: str) -> Corpus:
    """Divide files (path → content) into the two sides; of equal contents only the first by path stays."""
    seen: set[bytes] = set()
    kept: list[SourceFile] = []
    for path in sorted(files):
        if files[path] not in seen:
            seen.add(files[path])
            kept.append(SourceFile(path, files[path]))
    heldout = tuple(file for file in kept if is_heldout(file.path))
    return Corpus(python_version, tuple(file for file in kept if not is_heldout(file.path)), heldout)


def collect(root: Path) -> Corpus:
    """The corpus of the library under `root`, which belongs to the running Python.

    Raises:
        ValueError: no usable Python source under `root`.
    """
    files: dict[str, bytes] = {}
    for directory, subdirectories, names in os.walk(root):
        below = PurePosixPath(Path(directory).relative_to(root).as_posix())
        subdirectories[:] = [name for name in subdirectories if not _is_skipped(below / name)]
        for name in names:
            file = Path(directory, name)
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES) and not file.is_symlink():
                data = file.read_bytes()
                if _is_text(data):
                    files[str(below / name)] = data
    if not files:
        raise ValueError(f"corpus: expected Python source files under {root}, got none")
    return split(files, platform.python_version())


def _is_skipped(directory: PurePosixPath) -> bool:
    return directory.name in SKIPPED_DIRECTORIES or str(directory) in SKIPPED_DIRECTORIES


def _is_text(data: bytes) -> bool:
    if not 0 < len(data) <= MAX_FILE_BYTES or b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def pack(corpus: Corpus, archive: Path) -> None:
    """Write the corpus as a zip file whose comment is the Python version; equal corpora give equal bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        packed.comment = corpus.python_version.encode()
        for file in sorted(corpus.train + corpus.heldout, key=lambda file: file.path):
            packed.writestr(
                zipfile.ZipInfo(file.path, ARCHIVE_DATE),
                file.data,
                compress_type=zipfile.ZIP_DEFLATED,
                compresslevel=9,
            )


def load(archive: Path | None = None) -> Corpus:
    """The corpus of a packed file, or of the running Python's standard library when there is none.

    Raises:
        ValueError: not a packed corpus.
    """
    if archive is None:
        return collect(Path(sysconfig.get_path("stdlib")))
    try:
        with zipfile.ZipFile(archive) as packed:
            files = {name: packed.read(name) for name in packed.namelist()}
            version = packed.comment.decode()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: expected a corpus packed by benchmarks.testbed.corpus, got: {error}") from error
    return split(files, version)


def token_stream(files: tuple[SourceFile, ...]) -> np.ndarray:
    """All files one after the other, in the order given, `SEPARATOR` before each: uint16 [tokens]."""
    parts: list[np.ndarray] = []
    for file in files:
        parts.append(np.array([SEPARATOR], dtype=np.uint16))
        parts.append(np.frombuffer(file.data, dtype=np.uint8).astype(np.uint16))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


@dataclass(frozen=True)
class Repeat:
    """`length` tokens at `start` of a window that copy those at `source`, an earlier place in it."""

    start: int
    length: int
    source: int


def plant_repeats(window: np.ndarray, rng: np.random.Generator) -> list[Repeat]:
    """Overwrite parts of a window, in place, with copies of what stands earlier in it.

    Untouched stretches and copies alternate; a third of a window ends up as copies. Lengths are log-uniform,
    and the source of a copy is uniform over all that stands before it: in an 8K window half of the copied
    text lies more than 2K tokens back, where only attention to far keys can foresee it. The first eighth
    stays untouched.

    Args:
        window: integers [tokens], at least 64.
        rng: decides the places.

    Returns:
        The copies, in order.
    """
    tokens = len(window)
    repeats: list[Repeat] = []
    cursor = tokens // 8
    while True:
        cursor += _log_uniform(rng, max(8, tokens // 128), max(9, tokens // 16))
        length = _log_uniform(rng, 16, max(17, tokens // 16))
        if cursor + length > tokens:
            return repeats
        source = int(rng.integers(0, cursor - length)) if cursor > length else 0
        length = min(length, cursor)
        window[cursor : cursor + length] = window[source : source + length].copy()
        repeats.append(Repeat(cursor, length, source))
        cursor += length


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


def sample_windows(
    stream: np.ndarray, count: int, tokens: int, repeat_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Random windows of a token stream, a share of them with planted repeats: int64 [count, tokens].

    Raises:
        ValueError: the stream is shorter than one window.
    """
    if len(stream) < tokens:
        raise ValueError(f"corpus: expected at least {tokens} tokens for one window, got {len(stream)}")
    windows = np.empty((count, tokens), dtype=np.int64)
    for row in windows:
        start = int(rng.integers(0, len(stream) - tokens + 1))
        row[:] = stream[start : start + tokens]
        if rng.random() < repeat_share:
            plant_repeats(row, rng)
    return windows


def main(arguments: list[str] | None = None) -> None:
    """Pack the running Python's standard library into a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.corpus", description="Pack the corpus.")
    parser.add_argument("--out", type=Path, required=True, help="the zip file to write")
    options = parser.parse_args(arguments)
    try:
        check_place(options.out)
        corpus = load()
        pack(corpus, options.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"corpus: {error}") from error
    print(corpus.statistics())


if __name__ == "__main__":
    main()
