"""Files that the reader chose: named by a path, or uploaded. Nothing else on this machine is read."""

from __future__ import annotations

import hashlib
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from compactattn.capture import sample_path
from compactattn.validation import fail

MAX_BYTES = 2 << 30
Chosen = TypeVar("Chosen", bound="ChosenFile")


@dataclass(frozen=True)
class ChosenFile:
    """A file that the user named (`upload` empty), or bytes that were uploaded (their SHA-256).

    Attributes:
        path: where it is, or the upload's name; empty for the one that ships with the repository.
        changed: time of the file's last change in ns, so that a rewritten file is another one.
        upload: SHA-256 of an upload's bytes, in hexadecimal.
    """

    CONTENT: ClassVar[str]
    SHIPPED: ClassVar[Path]
    SHIPPED_LABEL: ClassVar[str]

    path: str = ""
    changed: int = 0
    upload: str = ""

    @classmethod
    def from_path(cls: type[Chosen], path: str) -> Chosen:
        """The file at `path`, or the one that ships for an empty path.

        Raises:
            FileNotFoundError, ValueError: no such file, no regular file, or a file larger than 2 GiB.
        """
        try:
            file = Path(path).expanduser() if path else cls.SHIPPED
            found = file.stat()
        except (OSError, ValueError, RuntimeError) as error:  # also a null byte, and the home of nobody
            raise FileNotFoundError(
                f"{path or cls.SHIPPED.name}: expected {cls.CONTENT}, got no file at all"
            ) from error
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{file}: expected {cls.CONTENT}, got a directory or a device")
        cls._check_size(str(file), found.st_size)
        return cls(str(file) if path else "", found.st_mtime_ns)

    @classmethod
    def from_upload(cls: type[Chosen], name: str, data: bytes) -> Chosen:
        """Bytes that somebody uploaded under `name`.

        Raises:
            ValueError: more than 2 GiB.
        """
        cls._check_size(name, len(data))
        return cls(name, 0, hashlib.sha256(data).hexdigest())

    @property
    def label(self) -> str:
        if self.upload:
            return f"upload {self.path}"
        return self.path or self.SHIPPED_LABEL

    @contextmanager
    def opened(self, data: bytes | None = None) -> Iterator[Path]:
        """A path to read from, for as long as it is open; `data` are the bytes of an upload.

        Raises:
            ValueError: an upload whose bytes are gone; and what is raised inside, with the upload's own name.
        """
        if not self.upload:
            yield Path(self.path) if self.path else self.SHIPPED
            return
        if data is None:
            raise ValueError(f"{self.path}: the upload is gone, choose the file again")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"upload{Path(self.path).suffix}"
            file.write_bytes(data)
            try:
                yield file
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), self.path)) from error

    @classmethod
    def _check_size(cls, name: str, size: int) -> None:
        if size > MAX_BYTES:
            raise fail(name, f"{cls.CONTENT} of at most {MAX_BYTES >> 30} GiB", f"{size / 2**30:.1f} GiB")


@dataclass(frozen=True)
class Recorded(ChosenFile):
    """A capture: what a model handed to attention."""

    CONTENT = "a capture file"
    SHIPPED = sample_path()
    SHIPPED_LABEL = "the sample in the package"


@dataclass(frozen=True)
class GateWeights(ChosenFile):
    """Weights of SeerAttention gates, as `compactattn.load_seer_gates` reads them.

    The file that ships was distilled for the model and the layers of the sample, never on the sample's own text, by

        python -m benchmarks.testbed.train_gate --device cpu --layers 2,4 --length 4096 --minutes 35 --log-every 5 \\
            --out inspector

    `seer_gate.json` beside it is the record of that run. A new model or a new sample needs a new gate.
    """

    CONTENT = "a file of gate weights"
    SHIPPED = Path(__file__).parent / "gate" / "seer_gate.safetensors"
    SHIPPED_LABEL = "the sample's own gate"
