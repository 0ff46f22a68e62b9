"""Files that appear whole or not at all, and safetensors files that are written piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from compactattn.validation import fail

try:
    import fcntl
except ImportError:  # not on Windows, where nothing notices two writers of one file
    fcntl = None  # type: ignore[assignment]

_DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well, and is removed when it does not.

    Until then its bytes are in `.{name}.partial` beside `path`. A process that is killed leaves that file behind; the
    next writer of the same path starts it afresh. Where `path` is a link, the file goes where the link leads.

    Raises:
        BlockingIOError: another process is writing the same file at this moment.
        OSError: a directory that does not exist or cannot be written to, a full disk.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    with _lock_alone(partial) as file:
        try:
            yield file
            file.flush()
            if fcntl is None:
                file.close()  # Windows moves no open file
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _lock_alone(partial: Path) -> BinaryIO:
    """Open `partial` for writing, empty, and lock it against other processes."""
    while True:
        file = open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "wb")  # noqa: SIM115 (the caller closes it)
        try:
            if fcntl is not None:
                _lock(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                        file.truncate(0)
                        return file
                file.close()  # another writer moved or removed it between the opening and the lock
                continue
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        return file


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process is writing this file") from error
    except OSError:
        return  # a file system without locks


class TensorFile:
    """A safetensors file whose tensors are known by dtype and shape first, and written later, rows at a time.

    Args:
        file: opened for binary writing, at its start, seekable.
        tensors: dtype and shape of each tensor by its name, in the order of the file. Those of larger dtypes come
            first, so that each lies at a multiple of its item size.
        metadata: strings by name.
    """

    def __init__(
        self,
        file: BinaryIO,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._file = file
        self._shapes = dict(tensors)
        self._rows: dict[str, int] = dict.fromkeys(tensors, 0)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in tensors.items():
            self._offsets[name] = end
            end += torch.Size(shape).numel() * dtype.itemsize
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        words = json.dumps(header, separators=(",", ":")).encode()
        words += b" " * (-len(words) % 8)
        file.write(len(words).to_bytes(8, "little") + words)
        self._start = 8 + len(words)

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows (first dimension) of a tensor; they are brought to the CPU and to its dtype.

        Raises:
            ValueError: a name that is not in the file, other extents than announced, more rows than announced, or
                values that are not finite in the dtype of the file.
        """
        if name not in self._shapes:
            raise fail("name", "a tensor of this file", repr(name))
        dtype, shape = self._shapes[name]
        first = self._rows[name]
        if tuple(rows.shape[1:]) != shape[1:] or first + len(rows) > shape[0]:
            raise fail(name, f"at most {shape[0] - first} rows of {shape[1:]}", tuple(rows.shape))
        rows = rows.detach().to("cpu", dtype).contiguous()
        if dtype.is_floating_point and not bool(torch.isfinite(rows).all()):
            raise fail(name, f"finite values in {str(dtype).removeprefix('torch.')}", "NaN or Inf")
        size = torch.Size(shape[1:]).numel() * dtype.itemsize
        self._file.seek(self._start + self._offsets[name] + first * size)
        self._file.write(rows.flatten().view(torch.uint8).numpy().data)
        self._rows[name] = first + len(rows)

    def check_complete(self) -> None:
        """Raise a ValueError if rows of some tensor are still to be written."""
        for name, rows in self._rows.items():
            if rows != self._shapes[name][1][0]:
                raise fail(name, f"{self._shapes[name][1][0]} rows", rows)
