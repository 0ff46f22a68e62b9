"""Settings, progress and schedule of the further training: all by the elapsed share of a budget that legs share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.testbed.mixture import Mixture
from benchmarks.testbed.model import MAX_POSITIONS
from benchmarks.testbed.tasks import SHORTEST

# From which share of the budget on the context is 1/divisor of the full one (32K: 1K, 2K, 4K, 8K, 16K, 32K).
CONTEXT_PHASES = ((0.0, 32), (0.06, 16), (0.14, 8), (0.34, 4), (0.64, 2), (0.82, 1))


@dataclass(frozen=True)
class Settings:
    """What decides a run, apart from the machine's speed.

    Attributes:
        minutes: wall clock of one leg, from when its imports are done to the end of its training.
        total_minutes: wall clock of training over all legs, interim evaluations included, start-up not.
        max_steps: optimizer steps at which the run ends even before that, or None.
        leg_steps: steps at which a leg ends even before its time, or None.
        context: tokens per window in the last phase.
        tokens_per_step: tokens in one optimizer step; a batch has four windows or more all the same.
        learning_rate: AdamW's peak, after the warm-up; falls linearly to zero over the whole run.
        warmup_steps: steps of the linear warm-up, of the first leg alone.
        weight_decay: on matrices, embeddings excepted.
        text_share, many_share, repeat_share: see `Mixture`.
        seed: of the windows.
        log_every: steps between two points of the loss curve.
        milestone_seconds: time between two interim evaluations, each with a checkpoint.
        final_items: test examples per task and length at the end.
        workers: processes that make batches; 0 makes them in between.
        compiled: whether the layers go through torch.compile, which takes a few seconds for each shape of a batch.
    """

    minutes: float = 8.6
    total_minutes: float = 8.0
    max_steps: int | None = None
    leg_steps: int | None = None
    context: int = 32768
    tokens_per_step: int = 65536
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    text_share: float = 0.3
    many_share: float = 0.4
    repeat_share: float = 0.4
    seed: int = 0
    log_every: int = 50
    milestone_seconds: float = 150.0
    final_items: int = 100
    workers: int = 4
    compiled: bool = True

    def __post_init__(self) -> None:
        positive = ("minutes", "total_minutes", "max_steps", "leg_steps", "learning_rate", "warmup_steps", "log_every")
        for name in (*positive, "milestone_seconds", "final_items", "tokens_per_step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: expected a finite number above 0, got {value}")
        for name in ("weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected a finite number from 0 on, got {getattr(self, name)}"
                )
        if self.workers < 0:
            raise ValueError(f"--workers: expected at least 0, got {self.workers}")
        if not SHORTEST <= self.context <= MAX_POSITIONS or self.context & (self.context - 1):
            expected = f"a power of two from {SHORTEST} to {MAX_POSITIONS}"
            raise ValueError(f"--context: expected {expected}, got {self.context}")
        self.mixture()

    def mixture(self) -> Mixture:
        return Mixture(self.text_share, self.many_share, self.repeat_share)

    def defining(self) -> dict[str, object]:
        """The settings that a later leg may not change."""
        free = ("minutes", "leg_steps", "log_every", "milestone_seconds", "final_items", "workers", "compiled")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class Progress:
    """How far a run has come, over all its legs.

    Attributes:
        seconds: of training, in the sense of `Settings.total_minutes`.
        legs: one entry per leg that was begun: where it began, and on what machine.
        curve: per `log_every` steps the mean losses in bits per learnt token.
        heldout_curve, task_curve: interim evaluations.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    legs: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    heldout_curve: list[dict[str, float]] = field(default_factory=list)
    task_curve: list[dict[str, Any]] = field(default_factory=list)

    def share(self, settings: Settings) -> float:
        """The used share of the budget: of time or of steps, whichever is further."""
        steps = self.step / settings.max_steps if settings.max_steps else 0.0
        return max(self.seconds / (60 * settings.total_minutes), steps)


def learning_rate_at(share: float, step: int, settings: Settings) -> float:
    """Linear warm-up by step, times a linear descent to zero by share of the whole budget."""
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * max(0.0, 1.0 - share)


def context_at(share: float, context: int) -> int:
    """Tokens per window of a phase's long steps."""
    divisor = next(divisor for start, divisor in reversed(CONTEXT_PHASES) if share >= start)
    return max(SHORTEST, context // divisor)
