"""Checkpoints in small files: tensors and a record, in a directory that can be copied from machine to machine.

A directory holds `state.json` (the record, and which tensor lies where) and its shards, `state-NAME-N.npz`, each at
most `FILE_LIMIT_BYTES`. Shards are written under new names and `state.json` is replaced last, so whatever interrupts
a `save`, the directory holds the checkpoint before it or the new one. Tensors are stored byte plane by byte plane and
deflated, which takes a third off trained weights.

`capture` and `restore` turn a module under Adam into such tensors: weights as bfloat16, moments as float8 with an
exponent per tensor. `capture` rounds the running state in the same way, so that a run that goes on and one that is
restored take the same steps.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.testbed.model import write_atomically

RECORD_FILE = "state.json"
FILE_LIMIT_BYTES = 16 * 2**20
FILES_LIMIT = 8  # in all, `state.json` included
_SHARD_BYTES = 15 * 2**20  # of tensors before they are deflated, which never adds a twentieth
_STORABLE = (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64)
_MOMENTS = ("first moment of", "root of the second moment of")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORABLE}


def save(directory: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> list[Path]:
    """Write a checkpoint; the one that was there is removed when the new one is whole.

    Args:
        tensors: float32, bfloat16, float8_e5m2 or int64, on any device.
        record: what JSON can hold.

    Returns:
        The files of the checkpoint.

    Raises:
        ValueError: another dtype, a tensor that no file can hold, or more than `FILES_LIMIT` files; nothing is
            written then.
    """
    shards = list(_shards(tensors))
    if len(shards) + 1 > FILES_LIMIT:
        total = sum(tensor.nbytes for tensor in tensors.values())
        raise ValueError(f"checkpoint: expected at most {FILES_LIMIT} files, got {len(shards) + 1} for {total} bytes")
    directory.mkdir(parents=True, exist_ok=True)
    places: dict[str, Any] = {}
    files: dict[str, str] = {}
    packed = [_pack(shard) for shard in shards]
    name = hashlib.sha256(b"".join(packed)).hexdigest()[:12]
    for number, (shard, data) in enumerate(zip(shards, packed, strict=True)):
        file = f"state-{name}-{number}.npz"
        write_atomically(directory / file, data)
        files[file] = hashlib.sha256(data).hexdigest()
        for key, tensor in shard.items():
            places[key] = {"file": file, "dtype": _name_of(tensor), "shape": list(tensor.shape)}
    content = {"record": record, "files": files, "tensors": places}
    write_atomically(directory / RECORD_FILE, (json.dumps(content, allow_nan=False) + "\n").encode())
    for stale in directory.glob("state-*.npz"):
        if stale.name not in files:
            stale.unlink()
    return [directory / RECORD_FILE, *(directory / file for file in files)]


def exists(directory: Path) -> bool:
    """Whether the directory holds a checkpoint."""
    return (directory / RECORD_FILE).exists()


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, record) as `save` was given them, bit for bit.

    Raises:
        ValueError: no checkpoint, or files that are missing, damaged, or of different checkpoints.
    """
    try:
        content = json.loads((directory / RECORD_FILE).read_text())
        record, files, places = content["record"], content["files"], content["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / RECORD_FILE}: expected a checkpoint, got: {error!r}") from error
    arrays: dict[str, Any] = {}
    for name, digest in files.items():
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{directory}: expected the checkpoint's file {name}, got: {error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{directory / name}: expected the file of this checkpoint, got other content")
        with np.load(io.BytesIO(data), allow_pickle=False) as shard:
            arrays.update({key: shard[key] for key in shard.files})
    return {key: _from_planes(arrays[key], place) for key, place in places.items()}, record


def check_belongs(directory: Path, record: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse the checkpoint of another run.

    Raises:
        ValueError: an entry of `ours` that the record does not have, or has otherwise.
    """
    for name, value in json.loads(json.dumps(ours)).items():  # as it came back from the file
        if record.get(name) != value:
            raise ValueError(f"{directory}: expected {name} {value}, got {record.get(name)}")


def remove(directory: Path) -> None:
    """Remove a checkpoint, and its directory if nothing else is in there."""
    for file in (directory / RECORD_FILE, *directory.glob("state-*.npz")):
        file.unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, as many to a shard as fit."""
    shard: dict[str, Tensor] = {}
    room = _SHARD_BYTES
    for key, tensor in tensors.items():
        if _name_of(tensor) not in _DTYPES or tensor.nbytes > _SHARD_BYTES:
            expected = f"{', '.join(_DTYPES)} of at most {_SHARD_BYTES} bytes"
            raise ValueError(f"{key}: expected {expected}, got {_name_of(tensor)} of {tensor.nbytes}")
        if tensor.nbytes > room:
            yield shard
            shard, room = {}, _SHARD_BYTES
        shard[key] = tensor
        room -= tensor.nbytes
    if shard:
        yield shard


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pack(tensors: dict[str, Tensor]) -> bytes:
    """An .npz file; level 1 deflates nearly as well as the default here, several times faster."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            planes = flat.view(-1, tensor.element_size()).T.contiguous().numpy()
            plain = io.BytesIO()
            np.save(plain, planes, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{key}.npy"), plain.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)
    return buffer.getvalue()


def _from_planes(planes: np.ndarray, place: dict[str, Any]) -> Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(planes.T)).flatten()
    return flat.view(_DTYPES[place["dtype"]]).view(place["shape"])


def capture(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(tensors, exponents) of a module's parameters and their moments under Adam, for `save`; rounds both in place."""
    tensors: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        tensors[name] = parameter.detach().bfloat16()
        parameter.data.copy_(tensors[name])
        state = optimizer.state.get(parameter)
        if state:
            for part, moment in zip(_MOMENTS, (state["exp_avg"], state["exp_avg_sq"].sqrt()), strict=True):
                key = f"{part} {name}"
                tensors[key], exponents[key] = rounded(moment)
            state["exp_avg"].copy_(widened(tensors[f"{_MOMENTS[0]} {name}"], exponents[f"{_MOMENTS[0]} {name}"]))
            root = widened(tensors[f"{_MOMENTS[1]} {name}"], exponents[f"{_MOMENTS[1]} {name}"])
            state["exp_avg_sq"].copy_(root.square())
    return tensors, exponents


def restore(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    exponents: dict[str, int],
    step: int,
) -> None:
    """Set parameters and moments to what `capture` gave after `step` steps.

    Raises:
        ValueError: tensors of another module.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    numbered = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    state: dict[int, dict[str, Tensor]] = {}
    try:
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(tensors[name])
        for number, name in enumerate(names[parameter] for parameter in numbered) if exponents else ():
            first, root = (widened(tensors[f"{part} {name}"], exponents[f"{part} {name}"]) for part in _MOMENTS)
            state[number] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": root.square()}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"checkpoint: expected the tensors of this model, got: {error!r}") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rounded(tensor: Tensor) -> tuple[Tensor, int]:
    """(tensor as float8_e5m2, exponent): float8 · 2^exponent is within an eighth of each value.

    For moments of an optimizer, of which the order of magnitude matters. Values under 2^-29 of the largest are further
    off, and those under 2^-32 become 0.
    """
    largest = float(tensor.abs().max())
    # the largest lands in [2^14, 2^15), of 57344; float32 has no factor for moments that are all but nothing
    exponent = max(math.frexp(largest)[1] - 15, -120) if largest > 0 else 0
    return torch.ldexp(tensor, torch.tensor(-exponent, device=tensor.device)).to(torch.float8_e5m2), exponent


def widened(tensor: Tensor, exponent: int) -> Tensor:
    """float32 of what `rounded` gave."""
    return torch.ldexp(tensor.float(), torch.tensor(exponent, device=tensor.device))
