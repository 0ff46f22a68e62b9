"""Command-line arguments: their types, and what commands that run a preset ask of their options alike."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

MOST = {"threads": 1024}  # PyTorch starts as many as it is told to, or crashes


def directory_name(text: str) -> Path:
    """A directory, which may have to be made; an empty name, of a variable that is not set, is not the current one.

    Raises:
        argparse.ArgumentTypeError: an empty name, or one at or below something that is no directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got ''")
    path = Path(text)
    there = next((one for one in (path, *path.parents) if one.exists()), None)
    if there is not None and not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a directory, got {text!r}, where {there} is a file")
    return path


def check_counts(options: object, *names: str) -> None:
    """Refuse options of these names that are given and less than 1.

    Raises:
        ValueError: one of them is.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
        if value is not None and value > MOST.get(name, value):
            raise ValueError(f"--{name.replace('_', '-')}: expected at most {MOST[name]}, got {value}")


def seconds(text: str) -> float:
    """A finite number above 0.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return number
