"""`python -m benchmarks ruler`: RULER by EleutherAI's lm-evaluation-harness, every method under chunked prefill.

    python -m benchmarks ruler --model meta-llama/Llama-3.1-8B-Instruct --lengths 32768,65536,131072 --chat-template

needs the extra `ruler` (lm_eval with its RULER tasks), the model, and for most tasks a network: the harness downloads
essays, questions and sentence models. `niah_single_1` and the other tasks without essays need none of them:

    python -m benchmarks ruler --model benchmarks/testbed/weights --tokenizer bytes --device cpu \\
        --lengths 4096 --tasks niah_single_1 --limit 2

Requests run one at a time, so there is no padding. The tasks of a length are made once, and every method answers them.
The JSON is rewritten after every (method, length); `--resume` goes on with the rest.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import Row
from benchmarks.files import claim, earlier, write_json, write_new
from benchmarks.machine import FIDELITY_SOURCES, environment
from benchmarks.records import sensible
from benchmarks.ruler_report import RULER_TASKS, table_lines
from benchmarks.testbed.tokenizer import save_byte_tokenizer

KIND, SCHEMA = "ruler", 1
RULER_SOURCES = (*FIDELITY_SOURCES, *(f"benchmarks/{name}.py" for name in ("ruler", "harness", "testbed/tokenizer")))
PUBLISHED_ALPHAS = {"llama": 0.18, "qwen3_moe": 0.12, "qwen2": 0.08}
METHODS = (
    "dense",
    "QUOKA",
    "XAttention",
    "SeerAttention",
    "CompactAttention-SA",
    "FlashPrefill",
    "CompactAttention-FP",
)


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        model: a directory, or a name on the Hugging Face hub.
        lengths: tokens of prompt and answer.
        out: directory for ruler-NAME.json.
        tokenizer: a directory or name, or "bytes"; None is the model's own.
        tasks: names of the harness, or None for all of RULER.
        methods: names out of `METHODS`.
        limit: items per task; None is all 500 of the harness.
        chunk: tokens per prefill chunk.
        alpha: FlashPrefill's; None is the published one for the model's family.
        gate: SeerAttention's weights; without them the methods that need them are left out.
        chat_template: put the prompt into the tokenizer's chat template.
        device, dtype: where and in what the model runs.
        resume: keep what the result in `out` already has.
        commit: what to write down as the commit where there is no git.
    """

    model: str
    lengths: tuple[int, ...]
    out: Path
    tokenizer: str | None = None
    tasks: tuple[str, ...] | None = None
    methods: tuple[str, ...] = METHODS
    limit: int | None = None
    chunk: int = 1024
    alpha: float | None = None
    gate: Path | None = None
    chat_template: bool = False
    device: str = "cuda"
    dtype: str = "bfloat16"
    resume: bool = False
    commit: str | None = None

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {method!r}")
        for name in ("limit", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected at least 1, got {value}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"--lengths: expected numbers above 0, got {self.lengths}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected a machine with a CUDA GPU, got none; --device cpu works, slowly")


def rows(group: int, alpha: float) -> dict[str, Row]:
    """The paper's methods by name: QUOKA at 0.25 and 0.25, groups of at most 4 heads and the whole chunk.

    Args:
        group: query heads per KV head of the model.
        alpha: FlashPrefill's.
    """
    heads, flash = math.gcd(group, 4), {"alpha": alpha}
    united: dict[str, Any] = {"heads": heads, "span": None}
    made = (
        Row("dense", "dense", "library", selector="Dense"),
        Row("QUOKA", "QUOKA", "quoka", settings={"query_ratio": 0.25, "kv_ratio": 0.25}),
        Row("XAttention", "XAttention", "library", selector="XAttention"),
        Row("SeerAttention", "SeerAttention", "library", selector="SeerGate"),
        Row("CompactAttention-SA", "CompactAttention-SA", "library", selector="SeerGate", **united),
        Row("FlashPrefill", "FlashPrefill", "library", selector="FlashPrefill", settings=flash),
        Row("CompactAttention-FP", "CompactAttention-FP", "library", selector="FlashPrefill", settings=flash, **united),
    )
    return {row.name: row for row in made}


def run(options: Options) -> int:
    """Measure, print the table, write JSON; 0."""
    harness = _harness()
    with _one_line("--model"):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    longest = model.config.max_position_embeddings
    if max(options.lengths) > longest:
        raise ValueError(f"--lengths: expected at most {longest}, the model's positions, got {max(options.lengths)}")
    methods = Methods(model, options.gate)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    alpha = options.alpha or PUBLISHED_ALPHAS.get(model.config.model_type, 0.18)
    chosen = {name: row for name, row in rows(group, alpha).items() if name in options.methods}
    path = options.out / f"ruler-{Path(options.model).name}.json"
    result = _opened(options, alpha, chosen, methods, path)
    with tempfile.TemporaryDirectory() as directory:
        name = options.tokenizer or options.model
        if name == "bytes":
            name = str(save_byte_tokenizer(Path(directory)))
        with _one_line("--tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        for length in options.lengths:
            todo = [
                row for row in chosen.values() if row.name not in result["absent"] and not _has(result, row, length)
            ]
            tasks = harness.tasks(options.tasks or RULER_TASKS, length, name) if todo else {}
            for row in todo:
                began = time.perf_counter()
                with methods.running(row):
                    lm = harness.model(model, tokenizer, options.chunk)
                    scores = harness.evaluate(lm, tasks, length, options.limit, options.chat_template)
                cell = {"method": row.name, "length": length, "scores": scores}
                cell["seconds"] = round(time.perf_counter() - began, 1)
                result["cells"].append(cell)
                write_json(path, result)
                print(f"{row.name} at {length}: {scores}, {cell['seconds']} s", flush=True)
    print("\n".join(["", *table_lines(result), "", str(path)]))
    return 0


def _opened(options: Options, alpha: float, chosen: dict[str, Row], methods: Methods, path: Path) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in ("model", "limit", "chunk", "chat_template", "dtype")}
    settings |= {"tasks": list(options.tasks or RULER_TASKS), "alpha": alpha}
    claim(path)
    here = environment(options.device, options.commit, RULER_SOURCES)
    result: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "settings": settings, "environment": here}
    result |= {"absent": {}, "cells": []}
    if options.resume and path.exists():
        before = earlier(path)
        for name, ours in (("settings", settings), ("kind", KIND), ("schema", SCHEMA)):
            if before.get(name) != ours:
                raise ValueError(f"--resume: expected a result of {name} {ours}, got {path} of {before.get(name)}")
        with sensible(f"--resume: {path}"):
            for name in ("sources", "gpu", "torch"):
                if before["environment"].get(name) != here[name]:
                    got = before["environment"].get(name)
                    raise ValueError(f"--resume: expected a result of {name} {here[name]!r}, got {path} of {got!r}")
            result["cells"] = before["cells"]
            result["absent"] = {name: why for name, why in before["absent"].items() if name not in chosen}
    result["absent"] |= {row.name: why for row in chosen.values() if (why := methods.why_not(row)) is not None}
    if not options.resume:
        write_new(path, result)  # from here on, --resume goes on with this one
    return result


def _has(result: dict[str, Any], row: Row, length: int) -> bool:
    return any((cell["method"], cell["length"]) == (row.name, length) for cell in result["cells"])


@contextmanager
def _one_line(option: str) -> Iterator[None]:
    """What transformers says of a model that it cannot get is an error of use."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{option}: expected what transformers can load, got: {' '.join(str(error).split())}"
        ) from error


def _harness() -> Any:
    """`benchmarks.harness`, which imports lm_eval."""
    try:
        from benchmarks import harness
    except ImportError as error:
        raise ValueError(
            f"ruler: expected lm_eval with its RULER tasks (extra `ruler`: pip install '.[ruler]'): {error}"
        ) from error
    return harness


def parse_numbers(words: str) -> tuple[int, ...]:
    """Numbers of "32768,65536".

    Raises:
        ValueError: anything else.
    """
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError as error:
        raise ValueError(f"--lengths: expected numbers such as 32768,65536, got {words!r}") from error


def parse_names(words: str | None, default: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of "a,b"; the default for None."""
    if words is None:
        return None if default is None else tuple(default)
    return tuple(word.strip() for word in words.split(",") if word.strip())
