"""Words of the command line as values; each refusal names the option and what is valid."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compactattn.cli.output import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def integer(name: str, text: str, valid: Sequence[int], *, word: str | None = None) -> int:
    """An integer that is valid; word: what the caller accepts besides, for the refusal to name."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value not in valid:
        if isinstance(valid, range):
            choices = f"an integer from {valid[0]} to {valid[-1]}"
        else:
            choices = "one of " + ", ".join(map(str, valid))
        also = "" if word is None else f"{word}, or "
        raise UsageError(f"{name}: expected {also}{choices}, got {text!r}")
    return value


def fraction(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name}: expected a number from 0 to 1, got {text!r}")
    return value


def size(name: str, text: str) -> int:
    """Bytes, from words such as 500M, 1.5GB or 123456."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None or float(found[1]) == 0.0:
        raise UsageError(f"{name}: expected a size such as 500M or 2G, got {text!r}")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def size_words(nbytes: int) -> str:
    """A number of bytes for people: 1.25 GB."""
    for unit, divisor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= divisor:
            return f"{nbytes / divisor:.3g} {unit}"
    return f"{nbytes} bytes"


def numbers(name: str, text: str, count: int) -> list[int]:
    """Ascending numbers below `count` of words such as 0,4-7."""
    found: set[int] = set()
    for word in text.split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip(), re.ASCII)
        first, last = (0, count) if ends is None else (int(ends[1]), int(ends[2] or ends[1]))
        if not first <= last < count:
            raise UsageError(f"{name}: expected all, or numbers from 0 to {count - 1} as in 0,4-7; got {text!r}")
        found.update(range(first, last + 1))
    return sorted(found)


def number_words(found: Sequence[int]) -> str:
    """Ascending numbers as words that `numbers` reads: 0,4-7."""
    words: list[list[int]] = []
    for number in found:
        if words and words[-1][-1] == number - 1:
            words[-1] = [words[-1][0], number]
        else:
            words.append([number])
    return ",".join("-".join(map(str, ends)) for ends in words)
