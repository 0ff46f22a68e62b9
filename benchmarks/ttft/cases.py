"""What is measured of whole models: prompts of a model, or of one rank of it, and whether they fit on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.cases import Case, K, Preset, Shape, prompt_cases
from benchmarks.latency import shrunk
from benchmarks.ttft.models import MODELS, ModelShape
from benchmarks.workloads import BLOCK

ENDS = (32 * K, 64 * K, 128 * K)
NOTHING, COMPLETE, SPARSE = "no attention", "dense compactattn", "compactattn "  # rows; the last + a grouping
OWN = "layer 0's own selection"  # beside the densities of the workload's tables
RESERVE = 0.05  # of a device's memory: its context, library workspaces, and what allocators cannot use


@dataclass(frozen=True)
class StackCase(Case):
    """The chunks of a prompt from `since` on, through a whole model.

    Attributes:
        model: a name of `models.MODELS`.
        ranks: tensor parallelism; one rank's part is measured, `shape` being that of the part.
        small: two narrow layers instead, see `ModelShape.small`.
        plain: on a GPU, time calls as Python launches them too, not only replays of CUDA graphs.
    """

    model: str = ""
    ranks: int = 1
    small: bool = False
    plain: bool = False

    @property
    def name(self) -> str:
        """Unique within a preset: "Llama-3.1-8B-tp2-prompt-128K-q1024-B8-Hq16-Hkv4-vertical-slash-c0.9"."""
        return f"{self.part}-{super().name}"

    @property
    def part(self) -> str:
        """The model, as it is built."""
        words = [self.model, *(["small"] if self.small else []), *([f"tp{self.ranks}"] if self.ranks > 1 else [])]
        return "-".join(words)

    @property
    def stack(self) -> ModelShape:
        """What is built: a rank's part of the model, or the small one with the case's heads."""
        whole = MODELS[self.model]
        return whole.small(self.shape) if self.small else whole.rank(self.ranks)

    @property
    def setting(self) -> tuple[str, Shape, str]:
        """Cases that are equal in this share one stack."""
        return self.part, self.shape, self.dtype


def case_of(model: str, batch: int, ranks: int = 1, *, plain: bool = False) -> StackCase:
    """A case in a model's own shape; `prompt_cases` gives it lengths."""
    shape = MODELS[model].rank(ranks).heads(batch)
    return StackCase("prompt", shape, 128 * K, 1024, model=model, ranks=ranks, plain=plain)


def _h200_cases() -> tuple[StackCase, ...]:
    """The paper's setting first. Plain passes are timed at batch 1, where the host's part weighs most."""
    settings = (
        case_of("Llama-3.1-8B", 8, 2),
        case_of("Llama-3.1-8B", 1, plain=True),
        case_of("Qwen3-30B-A3B", 1, plain=True),
        case_of("Qwen3-30B-A3B", 8, 2),
    )
    return tuple(case for setting in settings for case in _prompts(setting, ENDS, 16))


def _cpu_cases() -> tuple[StackCase, ...]:
    small = StackCase("prompt", Shape(1, 4, 1), 4 * K, 256, dtype="float32", small=True)
    settings = (
        replace(small, model="Llama-3.1-8B", shape=Shape(2, 4, 1), ranks=2),
        replace(small, model="Qwen3-30B-A3B", shape=Shape(1, 8, 1, 64)),
    )
    return tuple(case for setting in settings for case in _prompts(setting, (2 * K, 4 * K), 8))


def _prompts(setting: StackCase, ends: tuple[int, ...], stride: int) -> list[StackCase]:
    return [replace(setting, **_lengths(case)) for case in prompt_cases(setting, ends, dict.fromkeys(ends, stride))]


def _lengths(case: Case) -> dict[str, int]:
    return {"context": case.context, "since": case.since, "stride": case.stride}


def preset(name: str) -> Preset:
    """The cases of a preset by name.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "h200":
        notes = (
            "bfloat16; weights are random, of the shapes of Llama-3.1-8B and Qwen3-30B-A3B; every 16th chunk is "
            "measured and stands for its neighbours. The workload is calibrated on Llama-3.1-8B's published densities, "
            "and both models attend under it.",
            "One rank of TP2 has half of the query heads, KV heads, MLP rows (of each expert) and vocabulary, norms "
            "and router whole; its all-reduces are not part of any time.",
        )
        return Preset("cuda", _h200_cases(), 0.8, 340.0, notes=notes)
    if name == "cpu":
        notes = ("Small models of the same classes, float32: these runs try the code, their times mean nothing.",)
        return Preset("cpu", _cpu_cases(), 0.2, 50.0, notes=notes)
    raise ValueError(f"preset: expected h200 or cpu, got {name!r}")


def in_small(case: StackCase, factor: int) -> StackCase:
    """The same case with lengths divided by `factor` and a small model, for trying presets on a small machine."""
    if factor == 1:
        return case
    less = shrunk(case, factor)
    return replace(less, stride=max(1, min(less.stride, (less.context - less.since) // less.chunk)), small=True)


# ---- memory ----


def needed_bytes(case: StackCase, capacity: int) -> dict[str, int]:
    """What a case needs of the device at once, by what it is for; activations and graphs are upper bounds.

    Args:
        case: one prompt of a setting.
        capacity: tokens that the cache holds of each request.

    With e bytes per element, T = B · chunk tokens and M attentions (dense ones, the groupings, none):

        weights      parameters · e
        cache        2 · layers · B · Hkv · capacity · D · e
        key means    layers · pages · Hkv · D · 4; a page id names a page of one head in a head-major cache, so there
                     are ((B - 1) · Hkv + 1) · capacity / 128 pages, of which B · capacity / 128 are used
        activations  M + 1 forward passes (each CUDA graph keeps its own): the residual and its norm in float32, and
                     the larger of attention (queries, keys, values before and after RoPE, outputs of past and chunk)
                     and MLP (gate, up, their product; with experts also rows sorted by expert, before and after)
        workload     pages of one layer's keys and values, and one request's rows, while tables are made
        reference    float64 scores, weights and their copies of 64 rows of one KV head over the context, in the gate
    """
    model, shape, element = case.stack, case.shape, 4 if case.dtype == "float32" else 2
    tokens, dim = shape.batch * case.chunk, shape.head_dim
    attentions = 1 + (2 + case.peers) + len(case.groupings)
    pages = ((shape.batch - 1) * shape.kv_heads + 1) * capacity // BLOCK
    norm = tokens * model.hidden * (3 * element + 3 * 4)
    attention = tokens * dim * element * (6 * shape.q_heads + 6 * shape.kv_heads)
    rows = tokens * max(1, model.experts_per_token)
    mlp = rows * model.intermediate * 4 * element + (rows * model.hidden * 4 * element if model.experts else 0)
    return {
        "weights": model.parameters() * element,
        "cache": 2 * model.layers * shape.batch * shape.kv_heads * capacity * dim * element,
        "key means": model.layers * pages * shape.kv_heads * dim * 4,
        "activations": (attentions + 1) * (norm + max(attention, mlp)),
        "workload": (2 * shape.batch + 2) * shape.kv_heads * case.context * dim * element,
        "reference": 64 * shape.group * case.context * 8 * 6,
    }


def refuse_if_too_large(needed: Mapping[str, int], memory: int) -> None:
    """Stop before anything is allocated.

    Args:
        needed: of `needed_bytes`.
        memory: bytes of the device.

    Raises:
        ValueError: it does not fit, with the numbers.
    """
    total, limit = sum(needed.values()), int(memory * (1 - RESERVE))
    if total > limit:
        parts = ", ".join(f"{name} {count / 2**30:.1f}" for name, count in needed.items())
        raise ValueError(
            f"memory: expected at most {limit / 2**30:.1f} GiB ({1 - RESERVE:.0%} of the device's), got "
            f"{total / 2**30:.1f} GiB: {parts}"
        )
