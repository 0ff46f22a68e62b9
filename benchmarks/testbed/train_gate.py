"""Distil SeerAttention gates for the test bed's model: one linear layer per head learns the model's own attention.

    python3 -m benchmarks.testbed.train_gate --corpus out/stdlib.zip --weights out/weights --out out/weights

writes `gate/seer_gate.safetensors`, which `compactattn.load_seer_gates` reads (the tensors of a published checkpoint,
in bfloat16), and `gate/seer_gate.json`, the record of the run: a directory of their own, because engines load every
safetensors file that lies beside a model's. The corpus must be the one that the model's record names; without
`--corpus` it is the library of the Python that runs this. `--layers 2,4` leaves the other layers out, as a capture
does. It takes `--minutes` (4) of training and less than a minute around it. A run that is stopped (SIGTERM, SIGINT,
`--leg-minutes`), or killed while it measures the gates at the end, leaves a checkpoint in `--state`, and the same
command goes on from there; the checkpoint is removed when the gates are written.

What a gate learns (SeerAttention, arXiv 2410.13276): attention maps are max-pooled over (query block, KV block) tiles
and normalised to sum to one over the visible KV blocks; the gate's softmax over blocks is fitted to that by its
Kullback-Leibler divergence. The model stays as it is. Half of the windows are source text and half are tasks of
`benchmarks.testbed.tasks`, both of the train side; what is reported is of held-out text and test tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.arguments import directory_name
from benchmarks.testbed import checkpoint as checkpoints
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.model import WEIGHTS_DIRECTORY, load_model, write_atomically
from benchmarks.testbed.record import attention_inputs, parse_layers
from benchmarks.testbed.tasks import TASKS, Side, TaskSource
from benchmarks.testbed.train import stopping, usable_device
from benchmarks.testbed.training_record import check_corpus
from compactattn.seer_gate import rotate, unrotate

WEIGHTS_FILE, RECORD_FILE = "gate/seer_gate.safetensors", "gate/seer_gate.json"
EVALUATION_WINDOWS = 8
KEPT_SHARE = 0.25  # of the visible blocks, in the measure of what a gate finds


@dataclass(frozen=True)
class Settings:
    """What decides a run, apart from the machine's speed.

    Attributes:
        minutes: wall-clock budget of the training loop, over all legs.
        leg_minutes: wall clock after which a leg ends with a checkpoint, or None.
        max_steps: optimizer steps at which the run ends even before that, or None.
        length: tokens per window; one window is one step.
        block: tokens per KV block and queries per query block.
        learning_rate: Adam's, falling linearly to zero over the budget.
        task_share: share of the windows that are tasks.
        seed: of the windows.
        log_every: steps between two points of the loss curve.
        layers: the layers that get a gate, ascending; None is all of them.
    """

    minutes: float = 4.0
    leg_minutes: float | None = None
    max_steps: int | None = None
    length: int = 4096
    block: int = 64
    learning_rate: float = 1e-3
    task_share: float = 0.5
    seed: int = 0
    log_every: int = 50
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("minutes", "leg_minutes", "max_steps", "learning_rate", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
        if self.block not in (64, 128):
            raise ValueError(f"--block: expected 64 or 128, got {self.block}")
        if self.length < 512 or self.length % self.block:
            raise ValueError(f"--length: expected a multiple of {self.block} from 512 on, got {self.length}")
        if not 0 <= self.task_share <= 1:
            raise ValueError(f"--task-share: expected 0 to 1, got {self.task_share}")

    def defining(self) -> dict[str, object]:
        """The settings that a later leg may not change."""
        return {name: value for name, value in asdict(self).items() if name not in ("leg_minutes", "log_every")}


class Gates(torch.nn.Module):
    """The gates of some layers.

    Attributes:
        layers: their numbers, ascending.
        weights: float32 [len(layers), Hq, 3 * D, D]. They begin as "mean key against mean query": zeros, and the
            identity where the mean enters.
    """

    def __init__(self, model: LlamaForCausalLM, block: int, layers: tuple[int, ...] | None = None) -> None:
        super().__init__()
        config, rope = model.config, model.model.rotary_emb
        dim = int(config.head_dim)
        self.layers = tuple(range(config.num_hidden_layers)) if layers is None else layers
        weights = torch.zeros((len(self.layers), config.num_attention_heads, 3 * dim, dim))
        weights[..., 2 * dim :, :] = torch.eye(dim)
        self.weights = torch.nn.Parameter(weights.to(model.device))
        self.inv_freq, self.rope_scale = rope.inv_freq.detach().float(), float(rope.attention_scaling)
        self.block = block

    def log_probabilities(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """Log of the gate's softmax over visible blocks, [Hq, Qb, Kb], of one prompt: q [T, Hq, D], k [T, Hkv, D].

        T is a multiple of the block; query block i sees the KV blocks up to i.
        """
        tokens, heads, dim = q.shape
        position = torch.arange(tokens, device=q.device)
        rope = (self.inv_freq, self.rope_scale)
        queries = unrotate(q.transpose(0, 1), position, *rope).unflatten(1, (-1, self.block)).mean(2)
        keys = unrotate(k.transpose(0, 1), position, *rope).unflatten(1, (-1, self.block))
        pooled = torch.cat((keys.amax(2), keys.amin(2), keys.mean(2)), dim=-1)  # [Hkv, Kb, 3 D]
        pooled = pooled.repeat_interleave(heads // len(pooled), 0) @ self.weights[self.layers.index(layer)]
        first = position[:: self.block]
        logits = rotate(queries, first, *rope) @ rotate(pooled, first, *rope).transpose(1, 2) * dim**-0.5
        return logits.masked_fill(_unseen(logits), -math.inf).log_softmax(-1)


def _unseen(maps: Tensor) -> Tensor:
    """bool [Qb, Kb]: KV blocks behind a query block."""
    return torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device).triu(1)


@torch.no_grad()
def attention_map(q: Tensor, k: Tensor, scale: float, block: int) -> Tensor:
    """Exact causal attention, max-pooled over tiles and normalised over the visible blocks: float32 [Hq, Qb, Kb]."""
    tokens, heads, _ = q.shape
    keys = k.float().permute(1, 2, 0).repeat_interleave(heads // k.shape[1], 0)  # [Hq, D, T]
    position = torch.arange(tokens, device=q.device)
    rows = []
    for start in range(0, tokens, block):
        scores = q[start : start + block].float().transpose(0, 1) @ keys * scale
        mass = scores.masked_fill(position > position[start : start + block, None], -math.inf).softmax(-1)
        rows.append(mass.amax(1).unflatten(1, (-1, block)).amax(2))
    pooled = torch.stack(rows, dim=1)
    return pooled / pooled.sum(-1, keepdim=True)


def divergence(target: Tensor, log_probability: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the gate from the map, in nats, averaged over heads and query blocks."""
    apart = torch.special.entr(target).neg() - target * log_probability.masked_fill(target == 0, 0.0)
    return apart.sum(-1).mean()


def found_mass(target: Tensor, log_probability: Tensor) -> float:
    """The share of a map that lies in the `KEPT_SHARE` of the visible blocks that the gate likes best."""
    shares = []
    for i in range(target.shape[1]):
        best = log_probability[:, i, : i + 1].topk(max(1, round(KEPT_SHARE * (i + 1)))).indices
        shares.append(target[:, i].gather(1, best).sum(1))
    return float(torch.stack(shares).mean())


class Run:
    """A training run: what it reads, what it changes, and the files that it writes.

    Args:
        model: what is distilled; stays as it is.
        corpus, settings: what is read and how.
        out: directory of weights and record.
        state: directory of the checkpoint; where it holds one, the run goes on from it.
    """

    def __init__(
        self, model: LlamaForCausalLM, corpus: corpora.Corpus, settings: Settings, out: Path, state: Path
    ) -> None:
        self.model, self.settings, self.out, self.state = model.requires_grad_(False).eval(), settings, out, state
        self.gates = Gates(model, settings.block, settings.layers)
        self.optimizer = torch.optim.Adam(self.gates.parameters(), lr=settings.learning_rate)
        self.source = TaskSource(corpus, settings.seed)
        self.belongs = {"settings": settings.defining(), "corpus": corpus.statistics()["sha256"]}
        self.curve: list[dict[str, float]] = []
        self.step, self.seconds, self.stopped = 0, 0.0, False
        for side, stream in self.source.streams.items():
            if len(stream) < settings.length:
                raise ValueError(f"--length: expected at most {len(stream)}, the {side} text, got {settings.length}")
        if checkpoints.exists(state):
            self._resume()
        else:
            self.before = self.evaluate()

    def window(self, side: Side, index: int) -> Tensor:
        """Token ids int64 [length]: a task or a stretch of source text."""
        rng = np.random.default_rng((self.settings.seed, 7, index))
        if rng.random() < self.settings.task_share:
            task = list(TASKS)[index % len(TASKS)]
            tokens = self.source.example(task, side, self.settings.length, index).window
        else:
            stream = self.source.streams[side]
            start = int(rng.integers(0, len(stream) - self.settings.length + 1))
            tokens = stream[start : start + self.settings.length].astype(np.int64)
        return torch.from_numpy(tokens).to(self.model.device)

    def maps(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(the model's map, the gate's log-probabilities) of each gate's layer over one window."""
        recorded = attention_inputs(self.model, tokens)
        for layer in self.gates.layers:
            inputs = recorded[layer]
            target = attention_map(inputs.q, inputs.k, inputs.scale, self.settings.block)
            yield target, self.gates.log_probabilities(layer, inputs.q, inputs.k)

    def train(self) -> bool:
        """Step until the budget or the leg is used, or `stop` was called; one window is one step.

        Returns:
            Whether the budget is used. A checkpoint was written in either case: what is left to do can be killed.
        """
        settings, losses = self.settings, []
        leg_began = time.monotonic()
        began = leg_began - self.seconds
        leg_seconds = math.inf if settings.leg_minutes is None else 60 * settings.leg_minutes
        while (share := self._share()) < 1.0 and not self.stopped and time.monotonic() - leg_began < leg_seconds:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1.0 - share)
            loss = torch.stack([divergence(*pair) for pair in self.maps(self.window("train", self.step))]).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.step % settings.log_every == 0:
                mean = float(torch.stack(losses).mean())
                if not math.isfinite(mean):
                    raise ValueError(f"loss: expected a finite value, got {mean}; lower --learning-rate")
                self.curve.append({"step": self.step, "seconds": round(self.seconds, 2), "divergence": round(mean, 5)})
                print(f"step {self.step:6d}  {self.seconds:6.1f} s  divergence {mean:.4f}", flush=True)
                losses = []
        self._save()
        return self._share() >= 1.0

    def stop(self, *_: object) -> None:
        """End the leg after the present step; a signal handler."""
        self.stopped = True

    def _save(self) -> None:
        tensors, exponents = checkpoints.capture(self.gates, self.optimizer)
        progress = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "before": self.before}
        checkpoints.save(self.state, tensors, {**self.belongs, "exponents": exponents, "progress": progress})

    def _resume(self) -> None:
        tensors, record = checkpoints.load(self.state)
        checkpoints.check_belongs(self.state, record, self.belongs)
        progress = record["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.curve, self.before = progress["curve"], progress["before"]
        checkpoints.restore(self.gates, self.optimizer, tensors, record["exponents"], self.step)

    def _share(self) -> float:
        steps = self.step / self.settings.max_steps if self.settings.max_steps else 0.0
        return max(self.seconds / (60 * self.settings.minutes), steps)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Divergence and found mass on windows of the test side, averaged over layers."""
        pairs = [pair for index in range(EVALUATION_WINDOWS) for pair in self.maps(self.window("test", index))]
        return {
            "divergence": round(sum(float(divergence(*pair)) for pair in pairs) / len(pairs), 5),
            f"mass_in_best_{KEPT_SHARE:.0%}": round(sum(found_mass(*pair) for pair in pairs) / len(pairs), 5),
            f"most_mass_in_{KEPT_SHARE:.0%}": round(sum(found_mass(t, t.log()) for t, _ in pairs) / len(pairs), 5),
        }

    def finish(self) -> dict[str, Any]:
        """Write the weights and the record, each file whole or not at all; then the checkpoint is of no more use."""
        layers = self.gates.weights.detach().to("cpu", torch.bfloat16)
        tensors = {
            f"model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight": weights.contiguous().clone()
            for i, weights in zip(self.gates.layers, layers, strict=True)
        }
        record = {
            "settings": asdict(self.settings),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "device": str(self.model.device),
            "before": self.before,
            "after": self.evaluate(),
            "loss_curve": self.curve,
        }
        (self.out / WEIGHTS_FILE).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
        write_atomically(self.out / RECORD_FILE, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        checkpoints.remove(self.state)
        return record


def main(arguments: list[str] | None = None) -> None:
    """Train the gates and write them; every foreseeable failure ends in one line of text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed.train_gate", description="Distil the gates.")
    parser.add_argument("--out", type=directory_name, required=True, help="directory for weights and record")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIRECTORY, help="the model (default: the committed)")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--state", type=Path, help="directory of the checkpoint (default: gate_state in --out)")
    for setting in fields(Settings):
        kind = {"max_steps": int, "leg_minutes": float, "layers": str}.get(setting.name, type(setting.default))
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default)
    options = parser.parse_args(arguments)
    try:
        model = load_model(options.weights, usable_device(options.device))
        chosen = parse_layers(options.layers or "auto", model.config.num_hidden_layers)
        options.layers = None if chosen is None else tuple(chosen)
        settings = Settings(**{setting.name: getattr(options, setting.name) for setting in fields(Settings)})
        corpus, state = corpora.load(options.corpus), options.state or options.out / "gate_state"
        check_corpus(options.weights, corpus)
        run = Run(model, corpus, settings, options.out, state)
        with stopping(run.stop):
            complete = run.train()
        if not complete:
            minutes = run.seconds / 60
            print(f"stopped at step {run.step}, {minutes:.1f} of {settings.minutes} min; the same command goes on")
            return
        record = run.finish()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_gate: {error}") from error
    print(json.dumps({name: value for name, value in record.items() if name != "loss_curve"}, indent=1))


if __name__ == "__main__":
    main()
