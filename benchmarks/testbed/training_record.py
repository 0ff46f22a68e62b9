"""What lies beside weights: a record of their training, and the corpus that they were trained on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.model import write_atomically

RECORD_FILE = "training.json"


def machine_of(device: torch.device) -> dict[str, object]:
    """What a run was on, for its record."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def write_record(directory: Path, record: dict[str, object]) -> None:
    """Write `training.json`, one entry a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    write_atomically(directory / RECORD_FILE, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_record(directory: Path) -> dict[str, Any] | None:
    """What `training.json` in a directory of weights says; None where there is none.

    Raises:
        ValueError: not JSON.
    """
    try:
        return json.loads((directory / RECORD_FILE).read_text())
    except OSError:
        return None
    except ValueError as error:
        raise ValueError(f"{directory / RECORD_FILE}: expected JSON, got: {error}") from error


def check_corpus(directory: Path, corpus: corpora.Corpus) -> None:
    """Refuse another text than that which the weights in a directory were trained on, where their record names it.

    Another Python's library is held out by the same paths, yet much of what is held out there was trained on.

    Raises:
        ValueError: the record names another corpus; or it is not JSON.
    """
    theirs, ours = (read_record(directory) or {}).get("corpus"), corpus.statistics()
    if theirs is not None and theirs["sha256"] != ours["sha256"]:
        words = "{sha256:.16} (the library of Python {python_version})"
        expected, got = (words.format_map(its) for its in (theirs, ours))
        raise ValueError(
            f"--corpus: expected the text that the model in {directory} was trained on, {expected}, got {got}; "
            "`python -m benchmarks.testbed.corpus --out FILE` packs the library of the Python that runs it"
        )
