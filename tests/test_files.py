"""Files appear whole or not at all, and a safetensors file written in pieces is the file that safetensors reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from compactattn.files import TensorFile, replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with replacing(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    for before in ([], ["a"]):
        with pytest.raises(error):
            write_half()
        assert names(tmp_path) == before
        (tmp_path / "a").write_bytes(b"old")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_a_killed_writer_left_is_begun_afresh(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"much longer than what comes now")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with replacing(tmp_path / "a") as file:
        file.write(b"first")
        with pytest.raises(BlockingIOError, match="another process is writing"), replacing(tmp_path / "a"):
            pass
        file.write(b" and last")
    assert (tmp_path / "a").read_bytes() == b"first and last"


def test_a_writer_that_waited_for_the_name_does_not_touch_the_finished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other writer puts its file in place between our opening of the partial file and our lock on it."""
    fcntl: Any = pytest.importorskip("fcntl")
    partial, target, lock, rivals = tmp_path / ".a.partial", tmp_path / "a", fcntl.flock, [1]

    def late(*arguments: Any) -> None:
        if rivals:
            rivals.pop()
            os.replace(partial, target)
        lock(*arguments)

    partial.write_bytes(b"theirs")
    monkeypatch.setattr(fcntl, "flock", late)
    with replacing(target) as file:
        assert target.read_bytes() == b"theirs"
        file.write(b"ours")
    assert target.read_bytes() == b"ours"


def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder / "there")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (folder / "there").read_bytes() == b"new"


DTYPES = (torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.uint8)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=1, max_size=3)), max_size=4),
    st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_are_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]], choice: Any
) -> None:
    shapes = sorted(shapes, key=lambda pair: -pair[0].itemsize)
    generator = torch.Generator().manual_seed(choice.randrange(10**6))
    tensors = {
        f"t{n}": torch.randint(0, 100, shape, generator=generator).to(dtype) for n, (dtype, shape) in enumerate(shapes)
    }
    path = tmp_path_factory.mktemp("files") / "a"
    with path.open("wb") as file:
        writer = TensorFile(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"key": "välue"})
        left = dict(tensors)
        while left:
            name = choice.choice(sorted(left))
            rows = choice.randint(1, len(left[name]))
            writer.append(name, left[name][:rows])
            left[name] = left[name][rows:]
            if not len(left[name]):
                del left[name]
        writer.check_complete()
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"key": "välue"}
        assert sorted(opened.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(name), tensor)
            assert opened.get_tensor(name).dtype == tensor.dtype


def test_rows_that_do_not_belong_in_the_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        writer = TensorFile(file, {"x": (torch.float16, (3, 2))}, {})
        writer.append("x", torch.zeros(2, 2, dtype=torch.float64))
        for name, rows, message in (
            ("y", torch.zeros(1, 2), "name: expected a tensor of this file, got 'y'"),
            ("x", torch.zeros(1, 3), "x: expected at most 1 rows of (2,), got (1, 3)"),
            ("x", torch.zeros(2, 2), "x: expected at most 1 rows of (2,), got (2, 2)"),
            ("x", torch.full((1, 2), 1e6), "x: expected finite values in float16, got NaN or Inf"),
            ("x", torch.full((1, 2), torch.nan), "x: expected finite values in float16, got NaN or Inf"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                writer.append(name, rows)
        with pytest.raises(ValueError, match="x: expected 3 rows, got 2"):
            writer.check_complete()
        writer.append("x", torch.ones(1, 2))
        writer.check_complete()
