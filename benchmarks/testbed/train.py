"""Train the test bed's model on Python's standard library, on one GPU, within a wall-clock budget.

    python -m benchmarks.testbed.corpus --out stdlib.zip   # where Python has its whole library
    python -m benchmarks.testbed.train --corpus stdlib.zip --minutes 4.5 --out benchmarks/testbed/weights

writes `model.safetensors`, `config.json` and `training.json` (settings, machine, corpus, loss curve, held-out
bits per byte). Without `--corpus` the running Python's own library is read. The run goes by the clock:
learning rate and context length follow the elapsed share of the budget, so it always ends annealed, on any
GPU, and two runs differ.

What the model sees: random windows over all training files in path order, so that related files stand side by
side, first short, then `--context` long. Into a share of the windows (`--repeat-share`) copies of earlier
stretches are planted (`corpus.plant_repeats`); the model has to look far back to foresee them. Training
losses include the copies; held-out figures are on real, untouched text unless they say otherwise, and the
final ones are those of the bfloat16 weights as written.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.arguments import directory_name
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.evaluate import heldout_report, repeat_report
from benchmarks.testbed.model import load_model, new_model, save_model, testbed_config
from benchmarks.testbed.training_record import machine_of, write_record

# From which share of the budget on the context is 1/divisor of the full one. Short windows are cheap and
# teach the bytes and words; they leave more than half of the budget to full length.
CONTEXT_PHASES = ((0.0, 8), (0.15, 4), (0.35, 1))
GRADIENT_NORM = 1.0
INTERIM_WINDOWS = 16
FINAL_WINDOWS = 128


@dataclass(frozen=True)
class Settings:
    """What decides a run, apart from the machine's speed.

    Attributes:
        minutes: wall-clock budget of the training loop, interim evaluations included.
        max_steps: optimizer steps at which the run ends even before that, or None.
        context: tokens per window in the last phase; a multiple of 8, at least 64.
        tokens_per_step: tokens in one optimizer step; a multiple of `context`.
        learning_rate: AdamW's peak, after the warm-up.
        warmup_steps: steps of the linear warm-up. Steps, not time: the first ones wait for the GPU to load
            kernels.
        weight_decay: on matrices, embeddings excepted.
        repeat_share: share of the windows that get planted repeats.
        seed: of the initial weights and of the windows.
        log_every: steps between two points of the loss curve.
        milestone_seconds: time between two interim evaluations, each with a checkpoint and the weights so
            far.
    """

    minutes: float = 6.0
    max_steps: int | None = None
    context: int = 8192
    tokens_per_step: int = 65536
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    repeat_share: float = 0.4
    seed: int = 0
    log_every: int = 20
    milestone_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "minutes",
            "max_steps",
            "learning_rate",
            "warmup_steps",
            "log_every",
            "milestone_seconds",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
        if self.context < 64 or self.context % 8:
            raise ValueError(f"--context: expected a multiple of 8 from 64 on, got {self.context}")
        if self.tokens_per_step < self.context or self.tokens_per_step % self.context:
            raise ValueError(f"--tokens-per-step: expected a multiple of {self.context}, got {self.tokens_per_step}")
        if not 0 <= self.repeat_share <= 1:
            raise ValueError(f"--repeat-share: expected 0 to 1, got {self.repeat_share}")

    def defining(self) -> dict[str, object]:
        """The settings that a resumed run may not change."""
        free = ("minutes", "max_steps", "log_every", "milestone_seconds")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class Progress:
    """How far a run has come; grows as it goes, and is part of a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout_curve: list[dict[str, float]] = field(default_factory=list)

    def share(self, settings: Settings) -> float:
        """The used share of the budget: of time or of steps, whichever is further."""
        steps = self.step / settings.max_steps if settings.max_steps else 0.0
        return max(self.seconds / (60 * settings.minutes), steps)


def learning_rate_at(share: float, step: int, settings: Settings) -> float:
    """Linear warm-up by step, times a linear descent to zero by share of the budget."""
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * (1.0 - share)


def context_at(share: float, context: int) -> int:
    """Tokens per window at this share of the budget."""
    divisor = next(divisor for start, divisor in reversed(CONTEXT_PHASES) if share >= start)
    return context // divisor


def make_optimizer(model: LlamaForCausalLM, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, windows: np.ndarray) -> torch.Tensor:
    """One optimizer step over windows int64 [n, tokens + 1]; the mean loss in nats, still on the device."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(windows)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)  # never waits for the GPU
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


class Run:
    """A training run: what it reads, what it changes, and the files that it writes."""

    def __init__(
        self,
        config: LlamaConfig,
        corpus: corpora.Corpus,
        settings: Settings,
        out: Path,
        checkpoint: Path,
        device: torch.device,
    ) -> None:
        self.settings, self.out, self.checkpoint = settings, out, checkpoint
        self.corpus_statistics = corpus.statistics()
        self.train_stream = corpora.token_stream(corpus.train)
        self.heldout_stream = corpora.token_stream(corpus.heldout)
        self.model = new_model(config, settings.seed, device).train()
        self.optimizer = make_optimizer(self.model, settings, device)
        self.progress = Progress()
        self.batch = settings.tokens_per_step // settings.context
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        """Step until the budget is used. Losses are read from the device only at points of the curve."""
        settings, progress = self.settings, self.progress
        began = time.monotonic() - progress.seconds
        next_milestone = progress.seconds + settings.milestone_seconds
        pending: list[torch.Tensor] = []
        while (share := progress.share(settings)) < 1.0:
            rate = learning_rate_at(share, progress.step, settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            length = context_at(share, settings.context)
            count = settings.tokens_per_step // length
            rng = np.random.default_rng((settings.seed, progress.step))
            windows = corpora.sample_windows(self.train_stream, count, length + 1, settings.repeat_share, rng)
            pending.append(train_step(self.model, self.optimizer, windows))
            progress.step += 1
            progress.tokens += settings.tokens_per_step
            progress.seconds = time.monotonic() - began
            if progress.step % settings.log_every == 0:
                self._log(pending, length, rate)
                pending = []
            if progress.seconds >= next_milestone:
                self._milestone()
                progress.seconds = time.monotonic() - began
                next_milestone = progress.seconds + settings.milestone_seconds
        if pending:
            self._log(pending, length, rate)

    def finish(self) -> dict[str, object]:
        """Write the weights, measure them as written, and write the record of the run."""
        size = save_model(self.model, self.out)
        model = load_model(self.out, next(self.model.parameters()).device)
        context = self.settings.context
        record = self._record(complete=True)
        record["weights_bytes"] = size
        record["heldout"] = asdict(heldout_report(model, self.heldout_stream, context, FINAL_WINDOWS, self.batch))
        record["heldout_with_planted_repeats_bits_per_byte"] = repeat_report(
            model, self.heldout_stream, context, FINAL_WINDOWS, self.batch
        )
        write_record(self.out, record)
        return record

    def save_checkpoint(self) -> None:
        """Write what `resume` needs; an interrupted write leaves the previous checkpoint whole."""
        unfinished = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        state = {
            "settings": self.settings.defining(),
            "corpus": self.corpus_statistics["sha256"],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint.

        Raises:
            ValueError: there is none, it cannot be read, or it belongs to other settings or another corpus.
        """
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever a broken archive makes it stumble over
            raise ValueError(f"{self.checkpoint}: expected a checkpoint, got: {error}") from error
        if not isinstance(state, dict) or set(state) != {
            "settings",
            "corpus",
            "model",
            "optimizer",
            "progress",
        }:
            raise ValueError(f"{self.checkpoint}: expected a checkpoint of this script, got another file of torch")
        for name, ours in (
            ("settings", self.settings.defining()),
            ("corpus", self.corpus_statistics["sha256"]),
        ):
            if state[name] != ours:
                raise ValueError(f"{self.checkpoint}: expected {name} {ours}, got {state[name]}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _log(self, pending: list[torch.Tensor], context: int, rate: float) -> None:
        bits = float(torch.stack(pending).mean()) / math.log(2)
        progress = self.progress
        if not math.isfinite(bits):
            raise ValueError(
                f"loss: expected a finite value, got {bits} at step {progress.step}; lower --learning-rate"
            )
        last = progress.curve[-1] if progress.curve else {"tokens": 0, "seconds": 0.0}
        speed = (progress.tokens - last["tokens"]) / max(progress.seconds - last["seconds"], 1e-9)
        point = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 2)}
        point |= {"context": context, "learning_rate": round(rate, 8), "train_bits_per_token": round(bits, 4)}
        progress.curve.append(point)
        print(
            f"step {progress.step:6d}  {progress.seconds:6.1f} s  {progress.tokens / 1e6:7.1f} M tokens  "
            f"{speed / 1e3:7.0f} K/s  context {context:5d}  {bits:.3f} bits",
            flush=True,
        )

    def _milestone(self) -> None:
        report = heldout_report(self.model, self.heldout_stream, self.settings.context, INTERIM_WINDOWS, self.batch)
        point = {"step": self.progress.step, "bits_per_byte": report.bits_per_byte}
        self.progress.heldout_curve.append(point)
        print(f"held out: {report.bits_per_byte:.3f} bits per byte", flush=True)
        self.save_checkpoint()
        save_model(self.model, self.out)
        write_record(self.out, self._record(complete=False))

    def _record(self, complete: bool) -> dict[str, object]:
        device = next(self.model.parameters()).device
        return {
            "complete": complete,
            "settings": asdict(self.settings),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 1),
            **machine_of(device),
            "corpus": self.corpus_statistics,
            "loss_curve": self.progress.curve,
            "heldout_curve": self.progress.heldout_curve,
        }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.train", description="Train the test bed.")
    parser.add_argument(
        "--out", type=directory_name, required=True, help="directory for weights, configuration and record"
    )
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    parser.add_argument("--checkpoint", type=Path, help="about 90 MB; default: checkpoint.pt in --out")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    for setting in fields(Settings):
        kind = {"max_steps": int}.get(setting.name, type(setting.default))
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default)
    return parser.parse_args(arguments)


def usable_device(name: str) -> torch.device:
    """Raises ValueError where training cannot run on the device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cuda, cuda:N or cpu, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a machine with a CUDA GPU, got none; --device cpu works, but takes days")
    return device


@contextmanager
def stopping(stop: Callable[..., None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop` inside, so that a run ends between two steps; a batch system sends the former."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> None:
    """Train, or go on training, and write the results; every foreseeable failure ends in one line of text."""
    options = parse_arguments(arguments)
    # A batch system's stop leaves a checkpoint too.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        settings = Settings(**{setting.name: getattr(options, setting.name) for setting in fields(Settings)})
        device = usable_device(options.device)
        checkpoint = options.checkpoint or options.out / "checkpoint.pt"
        run = Run(testbed_config(), corpora.load(options.corpus), settings, options.out, checkpoint, device)
        if options.resume:
            run.resume()
        print(f"corpus: {run.corpus_statistics}", flush=True)
        try:
            run.train()
        except KeyboardInterrupt:
            run.save_checkpoint()
            raise SystemExit(f"train: interrupted at step {run.progress.step}; --resume goes on") from None
        record = run.finish()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"train: the GPU's memory is exhausted; lower --tokens-per-step ({error})") from error
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    print(json.dumps({name: value for name, value in record.items() if "curve" not in name}, indent=1))


if __name__ == "__main__":
    main()
