"""Train the test bed's model further, so that it solves the tasks: one GPU, about eight minutes, in one leg or several.

    python3 -m benchmarks.testbed.corpus --out out/stdlib.zip                  # where Python is whole
    python3 -m benchmarks.testbed.train --corpus out/stdlib.zip --minutes 4.5 --out out/first
    python3 -m benchmarks.testbed.train_tasks --corpus out/stdlib.zip --init out/first --out out/weights

made the committed weights, with `--total-minutes 6.6`; their `training.json` has what they answer at each length. (Its
setting `attention` put flash kernels before cuDNN's, and is gone: PyTorch chooses.)

Each call is a leg, at most `--minutes` (8.6) of wall clock after its imports. A run of more `--total-minutes` (8) takes
several: a leg goes on from the checkpoint in `--state` (default: `state` in `--out`; begin anew by removing it), the
first one from the weights in `--init`. The leg that ends the budget measures the model, which takes about another
minute, and marks the record complete. Every leg leaves `model.safetensors`, `config.json` and `training.json` in
`--out`. A leg that is killed is taken up from its last interim evaluation, and one that is killed while it measures,
measures again.

A checkpoint is `state.json` and two shards, about 21 MB together and none over 16 MiB, so that a leg can go on on
another machine: that needs `out/stdlib.zip` and `out/weights/state`, which git ignores like all of `out/`.

What the model sees is `mixture.Batches`: source text, tasks, and texts with many questions; of the latter two, answers
alone are learnt. Context length and learning rate follow the elapsed share of the total (`schedule.CONTEXT_PHASES`:
half of the time at 4K and 8K, then up to 32K), whatever the legs; every fourth step is a quarter as long. Batches are
made by worker processes and depend on the step alone. The layers are compiled, one graph for all of them and for each
of the seven shapes; what is evaluated is not.

A checkpoint keeps weights as bfloat16 and Adam's moments as float8, and saving rounds the running state alike, so a
resumed run and one that went on after saving take the same steps. The moments are averages over some 20 steps; what
they lose is gone as soon.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from benchmarks.arguments import directory_name
from benchmarks.testbed import checkpoint as checkpoints
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.answers import task_report
from benchmarks.testbed.evaluate import heldout_report, repeat_report
from benchmarks.testbed.mixture import Batches
from benchmarks.testbed.model import WEIGHTS_DIRECTORY, load_model, save_model
from benchmarks.testbed.schedule import Progress, Settings, context_at, learning_rate_at
from benchmarks.testbed.tasks import TaskSource
from benchmarks.testbed.train import (
    FINAL_WINDOWS,
    GRADIENT_NORM,
    INTERIM_WINDOWS,
    make_optimizer,
    stopping,
    usable_device,
)
from benchmarks.testbed.training_record import machine_of, read_record, write_record

HELDOUT_CONTEXT = 8192  # as the first training measured it
EVALUATED_LENGTHS = (4096, 8192, 16384, 32768)
INTERIM_ITEMS = 16
MOST_SHAPES = 64  # compiled forms of a layer: seven shapes of batches, and a few more for short runs


@contextmanager
def compiled(model: LlamaForCausalLM) -> Iterator[None]:
    """Inside, the model's layers go through torch.compile, shape by shape; it is to be called with batches alone."""
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        try:
            yield
        finally:
            for layer in model.model.layers:
                layer._compiled_call_impl = None


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor, learnt: Tensor
) -> tuple[Tensor, Tensor]:
    """One optimizer step; every window counts alike, whatever share of it is learnt.

    Args:
        tokens: int16 [n, T + 1].
        learnt: bool [n, T].

    Returns:
        (mean loss of each window [n] in nats, gradient norm), still on the device.
    """
    device = next(model.parameters()).device
    ids = tokens.to(device, non_blocking=True).long()
    counted = learnt.to(device, non_blocking=True).float()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    nats = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    windows = (nats.view_as(counted) * counted).sum(1) / counted.sum(1)
    windows.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return windows.detach(), norm


class Run:
    """One leg of a training run: what it reads, what it changes, and the files that it writes.

    Args:
        init: directory of the weights that the first leg begins with.
        corpus, settings: what is learnt and how.
        out: directory of the results.
        state: directory of the checkpoint; where it holds one, the run goes on from it.
        device: where to train.
        began: when the leg began, by `clock`, to count `Settings.minutes` from; None is now.
        clock: seconds.

    Raises:
        ValueError: no weights, a checkpoint of other settings or another corpus, a run that is over and measured.
    """

    def __init__(
        self,
        init: Path,
        corpus: corpora.Corpus,
        settings: Settings,
        out: Path,
        state: Path,
        device: torch.device,
        began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.out, self.state, self.device, self.clock = settings, out, state, device, clock
        self.began = clock() if began is None else began
        self.corpus_statistics = corpus.statistics()
        self.source = TaskSource(corpus, settings.seed)
        self.model = load_model(init, device).train()
        self.optimizer = make_optimizer(self.model, settings, device)
        self.progress, self.earlier = Progress(), _without_curves(read_record(init))
        self.stopped = False
        if checkpoints.exists(state):
            self._resume()
        if self.is_over:
            if (read_record(out) or {}).get("complete"):
                raise ValueError(f"--state: expected a run with something left to do, got one that is over, in {state}")
            return
        machine = machine_of(device)
        self.progress.legs.append({"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **machine})
        out.mkdir(parents=True, exist_ok=True)

    @property
    def is_over(self) -> bool:
        """Whether the whole budget is used, so that the model can be measured."""
        return self.progress.share(self.settings) >= 1.0

    def train(self) -> bool:
        """Step until the leg or the whole budget is used, or `stop` was called; whether the budget is used."""
        with compiled(self.model) if self.settings.compiled else nullcontext():
            self._steps()
        self.save()
        return self.is_over

    def _steps(self) -> None:
        settings, progress, clock = self.settings, self.progress, self.clock
        started, first_step = clock() - progress.seconds, progress.step
        next_milestone = progress.seconds + settings.milestone_seconds
        pending: list[tuple[Tensor, Tensor, Tensor]] = []
        context = context_at(progress.share(settings), settings.context)
        stream, rate = self._batches(context), 0.0
        while (share := progress.share(settings)) < 1.0 and not self._leg_is_over(first_step):
            if context_at(share, settings.context) != context:
                context = context_at(share, settings.context)
                stream.close()
                stream = self._batches(context)
            rate = learning_rate_at(share, progress.step, settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            tokens, learnt = next(stream)
            windows, norm = train_step(self.model, self.optimizer, tokens, learnt)
            pending.append((windows, learnt.all(1), norm))
            progress.step += 1
            progress.tokens += learnt.numel()
            progress.seconds = clock() - started
            if progress.step % settings.log_every == 0:
                self._log(pending, context, rate)
                pending = []
            if progress.seconds >= next_milestone:
                self._milestone(context)
                progress.seconds = clock() - started
                next_milestone = progress.seconds + settings.milestone_seconds
        stream.close()
        if pending:
            self._log(pending, context, rate)

    def stop(self, *_: object) -> None:
        """End the leg after the present step; a signal handler."""
        self.stopped = True

    def _leg_is_over(self, first_step: int) -> bool:
        steps = self.settings.leg_steps
        full = steps is not None and self.progress.step - first_step >= steps
        return self.stopped or full or self.clock() - self.began >= 60 * self.settings.minutes

    def _batches(self, context: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Batches from the present step on, made ahead of time; close the generator to end its processes."""
        settings = self.settings
        yield from DataLoader(
            Batches(self.source, settings.mixture(), context, settings.tokens_per_step),
            batch_size=None,
            sampler=itertools.count(self.progress.step),
            num_workers=settings.workers,
            prefetch_factor=4 if settings.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )

    def save(self) -> None:
        """Write the checkpoint, the weights so far and the record; rounds the running state as the checkpoint is."""
        tensors, exponents = checkpoints.capture(self.model, self.optimizer)
        record = {
            "settings": self.settings.defining(),
            "corpus": self.corpus_statistics["sha256"],
            "earlier": self.earlier,
            "exponents": exponents,
            "progress": asdict(self.progress),
        }
        checkpoints.save(self.state, tensors, record)
        save_model(self.model, self.out)
        write_record(self.out, self._record(complete=False))

    def _resume(self) -> None:
        tensors, record = checkpoints.load(self.state)
        ours = {"settings": self.settings.defining(), "corpus": self.corpus_statistics["sha256"]}
        checkpoints.check_belongs(self.state, record, ours)
        self.progress, self.earlier = Progress(**record["progress"]), record["earlier"]
        checkpoints.restore(self.model, self.optimizer, tensors, record["exponents"], self.progress.step)

    def finish(self) -> dict[str, object]:
        """Measure the weights as they were written, and write the record of the whole run."""
        model = load_model(self.out, self.device)
        settings = self.settings
        record = self._record(complete=True)
        record["weights_bytes"] = (self.out / "model.safetensors").stat().st_size
        heldout = self.source.streams["test"]
        for name, context in (("heldout", HELDOUT_CONTEXT), ("heldout_long", settings.context)):
            context = min(context, settings.context)
            report = heldout_report(model, heldout, context, FINAL_WINDOWS, self._rows(context))
            record[name] = {"context": context, **asdict(report)}
        context = min(HELDOUT_CONTEXT, settings.context)
        record["heldout_with_planted_repeats_bits_per_byte"] = repeat_report(
            model, heldout, context, FINAL_WINDOWS, self._rows(context)
        )
        record["tasks"] = self._tasks(model, self._lengths(), settings.final_items)
        write_record(self.out, record)
        return record

    def _lengths(self) -> tuple[int, ...]:
        fitting = tuple(length for length in EVALUATED_LENGTHS if length <= self.settings.context)
        return fitting or (self.settings.context,)

    def _rows(self, context: int) -> int:
        """Windows to evaluate at once."""
        return max(1, 2 * self.settings.tokens_per_step // context)

    def _tasks(self, model: LlamaForCausalLM, lengths: tuple[int, ...], items: int) -> dict[str, dict[str, Any]]:
        return task_report(model, self.source, lengths, items, tokens_at_once=16 * self.settings.tokens_per_step)

    def _log(self, pending: list[tuple[Tensor, Tensor, Tensor]], context: int, rate: float) -> None:
        """A point of the loss curve; the only place of the loop that waits for the device."""
        losses = torch.cat([windows for windows, _, _ in pending]).cpu() / math.log(2)
        text = torch.cat([is_text for _, is_text, _ in pending])
        progress = self.progress
        if not bool(torch.isfinite(losses).all()):
            raise ValueError(f"loss: expected finite values, got others by step {progress.step}; lower --learning-rate")
        norm = float(torch.stack([norm for _, _, norm in pending]).mean())
        last = progress.curve[-1] if progress.curve else {"tokens": 0, "seconds": 0.0}
        speed = (progress.tokens - last["tokens"]) / max(progress.seconds - last["seconds"], 1e-9)
        point: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        point |= {"seconds": round(progress.seconds, 2), "context": context, "learning_rate": round(rate, 8)}
        for name, those in (("text_bits", text), ("answer_bits", ~text)):
            if bool(those.any()):
                point[name] = round(float(losses[those].mean()), 4)
        point["gradient_norm"] = round(norm, 3)
        progress.curve.append(point)
        print(
            f"step {progress.step:6d}  {progress.seconds:6.1f} s  {progress.tokens / 1e6:7.1f} M tokens  "
            f"{speed / 1e3:7.0f} K/s  context {context:5d}  text {point.get('text_bits', math.nan):.3f}  "
            f"answers {point.get('answer_bits', math.nan):.3f} bits",
            flush=True,
        )

    def _milestone(self, context: int) -> None:
        self.save()
        model = load_model(self.out, self.device)  # as written, and not compiled
        heldout = min(HELDOUT_CONTEXT, self.settings.context)
        report = heldout_report(model, self.source.streams["test"], heldout, INTERIM_WINDOWS, self._rows(heldout))
        tasks = self._tasks(model, (context,), INTERIM_ITEMS)[str(context)]
        means = {task: its["mean"] for task, its in tasks.items()}
        step = self.progress.step
        self.progress.heldout_curve.append({"step": step, "bits_per_byte": report.bits_per_byte})
        self.progress.task_curve.append({"step": step, "length": context, "items": INTERIM_ITEMS, **means})
        words = ", ".join(f"{task} {mean:.2f}" for task, mean in means.items())
        print(f"held out: {report.bits_per_byte:.3f} bits per byte; at {context}: {words}", flush=True)

    def _record(self, complete: bool) -> dict[str, object]:
        progress = self.progress
        return {
            "complete": complete,
            "settings": asdict(self.settings),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            **machine_of(self.device),
            "corpus": self.corpus_statistics,
            "continued_from": self.earlier,
            "legs": progress.legs,
            "loss_curve": progress.curve,
            "heldout_curve": progress.heldout_curve,
            "task_curve": progress.task_curve,
        }


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the workers too; the run ends them


def _without_curves(record: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if record is None else {name: its for name, its in record.items() if not name.endswith("curve")}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.train_tasks", description="Train further.")
    parser.add_argument(
        "--out", type=directory_name, required=True, help="directory for weights, configuration and record"
    )
    parser.add_argument("--init", type=Path, default=WEIGHTS_DIRECTORY, help="first weights (default: the committed)")
    parser.add_argument("--state", type=Path, help="directory of the checkpoint (default: state in --out)")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    for setting in fields(Settings):
        name, default = f"--{setting.name.replace('_', '-')}", setting.default
        if isinstance(default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = int if setting.name in ("max_steps", "leg_steps") else type(default)
            parser.add_argument(name, type=kind, default=default)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train one leg and write the results; every foreseeable failure ends in one line of text."""
    began = time.monotonic()  # imports lie before it
    options = parse_arguments(arguments)
    try:
        settings = Settings(**{setting.name: getattr(options, setting.name) for setting in fields(Settings)})
        device, state = usable_device(options.device), options.state or options.out / "state"
        run = Run(options.init, corpora.load(options.corpus), settings, options.out, state, device, began)
        print(
            f"corpus: {run.corpus_statistics}\nleg {len(run.progress.legs)}, from step {run.progress.step}", flush=True
        )
        if not run.is_over:  # else the process ended while it measured
            with stopping(run.stop):
                run.train()
        if not run.is_over:
            minutes = run.progress.seconds / 60
            again = "run the same command again for the next"
            print(f"leg ends at step {run.progress.step}, {minutes:.1f} of {settings.total_minutes} min; {again}")
            return
        record = run.finish()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_tasks: {error}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"train_tasks: the GPU's memory is exhausted; lower --tokens-per-step ({error})") from error
    print(json.dumps({name: value for name, value in record.items() if "curve" not in name}, indent=1))


if __name__ == "__main__":
    main()
