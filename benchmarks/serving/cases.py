"""The engines that are started, one after the other, and what each is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import K, Shape, named
from benchmarks.testbed.tasks import TASKS
from benchmarks.ttft.models import MODELS, ModelShape

GIB = 2**30
MODEL = "Llama-3.1-8B"  # of `ttft`: its shape, random weights
BASELINE, EXACT = "triton", "dense"  # contestants: what all are compared with, and whose tokens must be the same
PLUGIN = "COMPACTATTN"
CAPTURED = (1, 2, 4, 8, 16)  # requests of a decode step that is captured


@dataclass(frozen=True)
class EngineCase:
    """One engine.

    Attributes:
        kind: "answers", tokens of the test bed's model or of `--weights`; or "ttft", times of one of random weights.
        contestant: who attends; "triton" is vLLM's own backend.
        settings: the plugin's, None without it.
        chunk: tokens of a step, `max_num_batched_tokens`.
        graphs: decode steps are CUDA graphs (FULL_DECODE_ONLY); else all is eager.
        lengths: of prompts, in tokens; of `answers` with their answers.
        tasks, items: of `answers`: names of `testbed.tasks`, and prompts of each task and length.
        shared: of `answers`: questions on one document of the first length from 8K on, or of the longest.
        tokens: spoken after each prompt, at most; for `ttft` the decode steps that are timed.
        requests: `max_num_seqs`.
        dtype, cache_bytes: of the model, and of its KV cache.
        small: of `ttft`: two narrow layers of the same class instead.
        limit_seconds: an engine that takes longer is ended.
    """

    kind: str
    contestant: str
    settings: dict[str, Any] | None
    chunk: int
    lengths: tuple[int, ...]
    graphs: bool = False
    tasks: tuple[str, ...] = ()
    items: int = 0
    shared: int = 0
    tokens: int = 32
    requests: int = 16
    dtype: str = "bfloat16"
    cache_bytes: int = 4 * GIB
    small: bool = False
    limit_seconds: int = 200

    @property
    def name(self) -> str:
        """Unique within a preset: "answers-triton-q1024-eager"."""
        return f"{self.kind}-{self.contestant}-q{self.chunk}-{'graphs' if self.graphs else 'eager'}"

    @property
    def selects(self) -> bool:
        return self.settings is not None and self.settings.get("selector") != "dense"

    @property
    def shape(self) -> ModelShape:
        """Of the model of `ttft`."""
        return MODELS[MODEL].small(Shape(1, 8, 2, 64)) if self.small else MODELS[MODEL]


@dataclass(frozen=True)
class Plan:
    """A preset.

    Attributes:
        device: where it runs.
        cases: in the order in which they run; the first of `answers` is what its other engines are compared with.
        budget_seconds: no engine starts once the run has taken so long.
        notes: what the report says of it.
    """

    device: str
    cases: tuple[EngineCase, ...]
    budget_seconds: float
    notes: tuple[str, ...] = field(default=())


def engine_arguments(case: EngineCase, model: Path | str, *, positions: int, stand_ins: bool) -> dict[str, Any]:
    """What `vllm.LLM` is given, all but the backend's name; nothing else is set. `positions`: that the model has."""
    compilation: dict[str, Any] = {"mode": 0, "cudagraph_mode": "NONE"}  # nothing is compiled by torch
    if case.graphs:
        sizes = [size for size in CAPTURED if size <= case.requests]
        compilation |= {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy" if case.kind == "ttft" else "auto",
        "skip_tokenizer_init": True,
        "dtype": case.dtype,
        "max_model_len": min(max(case.lengths) + 2 * case.tokens, positions),
        "max_num_batched_tokens": case.chunk,
        "max_num_seqs": case.requests,
        "enable_prefix_caching": case.kind == "answers",
        "kv_cache_memory_bytes": case.cache_bytes,
        "enforce_eager": not case.graphs,
        "compilation_config": compilation,
        "additional_config": {} if case.settings is None else {"compactattn": case.settings},
        "seed": 0,
    }
    if stand_ins:  # vLLM's own PyTorch forms of what is compiled otherwise
        compilation["custom_ops"] = ["none"]
        operators = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
        arguments["kernel_config"] = {"ir_op_priority": operators, "enable_jit_warmup": False}
    return arguments


def preset(name: str) -> Plan:
    """The engines of a preset by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "h200":
        return Plan("cuda", _h200_cases(), 450.0)
    if name == "cpu":
        notes = (
            "A small run in float32 that tries the code: times mean nothing. vLLM's own backend for the CPU is "
            "compiled code, so the baseline 'triton' is dense compactattn here too, with other chunks than 'dense'.",
        )
        return Plan("cpu", _cpu_cases(), 300.0, notes)
    raise ValueError(f"preset: expected h200 or cpu, got {name!r}")


def chosen_cases(plan: Plan, only: str | None) -> list[EngineCase]:
    """The cases that `only` names (see `benchmarks.cases.named`), and the baseline of `answers` before others of them.

    Raises:
        ValueError: it names none.
    """
    chosen = named(plan.cases, only)
    if not chosen:
        raise ValueError(f"--only: expected a part of a case's name, such as {plan.cases[0].name}, got no match")
    base = baseline(plan.cases)
    needed = any(case.kind == "answers" for case in chosen)
    return [case for case in plan.cases if case in chosen or (needed and case is base)]


def baseline(cases: Sequence[EngineCase]) -> EngineCase:
    return next(case for case in cases if case.kind == "answers")


DENSE: dict[str, Any] = {"selector": "dense"}
FLASH = {"selector": "flashprefill", "alpha": 0.18, "dense_last_blocks": 0}
BOUNDS = {"selector": "keybounds", "threshold": 0.13, "dense_last_blocks": 0}
DENSE_END = {"dense_last_blocks": 2}  # of every chunk
#: in chunks of 1,024, where a dense end would be a quarter of all queries, and of 8,192, vLLM's own size
SHORT, LONG = 1024, 8192
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    BASELINE: None, EXACT: DENSE, "flashprefill-0.18": FLASH, "keybounds-0.13": BOUNDS,
}  # fmt: skip
IN_LONG_CHUNKS: dict[str, dict[str, Any] | None] = {
    BASELINE: None, EXACT: DENSE, "default": {}, "keybounds-0.13-dense-end": BOUNDS | DENSE_END,
}  # fmt: skip


def _h200_cases() -> tuple[EngineCase, ...]:
    asked = {"lengths": (4 * K, 8 * K, 16 * K, 32 * K), "tasks": tuple(TASKS), "items": 4, "shared": 6, "tokens": 48}
    timed = {"tokens": 128, "requests": 4, "cache_bytes": 32 * GIB, "limit_seconds": 300}
    lengths = (8 * K, 32 * K, 64 * K, 128 * K)
    answers = [EngineCase("answers", name, settings, SHORT, **asked) for name, settings in CONTESTANTS.items()]
    long_answers = [EngineCase("answers", name, settings, LONG, **asked) for name, settings in IN_LONG_CHUNKS.items()]
    ttft = [EngineCase("ttft", name, settings, SHORT, lengths, **timed) for name, settings in CONTESTANTS.items()]
    long_ttft = [
        EngineCase("ttft", name, settings, LONG, lengths, **timed)
        for name, settings in IN_LONG_CHUNKS.items()
        if settings is not None  # three minutes of GPU
    ]
    captured = [replace(case, graphs=True) for case in answers]
    decoding = [replace(case, graphs=True, lengths=(8 * K,)) for case in ttft if not case.selects]
    return (*answers, *long_answers, *ttft, *long_ttft, *decoding, *captured)


def _cpu_cases() -> tuple[EngineCase, ...]:
    blocks = {"block_size": 64, "query_block": 64, "dense_keys": 128, "sink_blocks": 0, "window_blocks": 0}
    flash = FLASH | blocks
    small = {"dtype": "float32", "cache_bytes": GIB // 8, "requests": 4, "small": True, "limit_seconds": 200}
    asked = {"lengths": (512, 640), "tasks": ("niah_single", "frequent_words"), "items": 1, "shared": 3, "tokens": 12}
    timed = {"lengths": (256, 512), "tokens": 12}
    return (
        EngineCase("answers", BASELINE, DENSE, 256, **asked, **small),
        EngineCase("answers", EXACT, DENSE, 128, **asked, **small),
        EngineCase("answers", "flashprefill-0.18", flash, 128, **asked, **small),
        EngineCase("ttft", BASELINE, DENSE, 128, **timed, **small),
        EngineCase("ttft", "flashprefill-0.18", flash, 128, **timed, **small),
    )
