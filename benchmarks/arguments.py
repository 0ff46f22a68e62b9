"""Types of command-line arguments."""

from __future__ import annotations

import argparse
from pathlib import Path


def directory_name(text: str) -> Path:
    """A directory; an empty name, of a variable that is not set, is not the current one.

    Raises:
        argparse.ArgumentTypeError: an empty name.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got ''")
    return Path(text)
