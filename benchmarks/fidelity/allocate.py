"""`python -m benchmarks.fidelity.allocate`: divide a density between the layers by what each layer's costs the answers.

    python3 -m benchmarks.fidelity.allocate --corpus out/stdlib.zip --device cuda

A threshold that all layers share spends most of a density on the layers that look widest, whether the answers need it
or not. So each layer is run with each of `OPTIONS` while all others are dense, on prompts of the train side; an option
costs the Kullback-Leibler divergence of what the model then foresees from what it foresees with dense attention, at
the answers' tokens and, for text, those of the last chunk. Costs of different layers are taken to add up. For each of
`plans.ALLOCATED` the cheapest choice of an option per layer whose mean density is no higher, by the density that a
layer has where all have its option, is written beside the weights, `layers/density-0.14.json` for one, where `fidelity`
finds its rows "allocated by layer"; `layers/options.json` has what they were chosen from.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache

from benchmarks.arguments import check_counts
from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import ALLOCATED, LAST_BLOCKS, OPTIONS_FILE, TEXT, Row, allocated_file
from benchmarks.fidelity.probing import probe
from benchmarks.fidelity.run import in_bfloat16
from benchmarks.files import check_place
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.answers import prefill
from benchmarks.testbed.evaluate import heldout_windows
from benchmarks.testbed.model import file_id, load_model, write_atomically
from benchmarks.testbed.tasks import TASKS, TaskSource
from benchmarks.testbed.train import usable_device
from benchmarks.testbed.train_gate import WEIGHTS_FILE as GATE_FILE
from benchmarks.testbed.training_record import check_corpus
from benchmarks.testbed.tune_layers import layers_parser

ITEMS = 8  # prompts of each kind
OPTIONS = (
    *(("SeerGate", threshold) for threshold in (0.03, 0.02, 0.012, 0.008, 0.005, 0.0035, 0.0025)),
    *(("KeyBounds", threshold) for threshold in (0.3, 0.13, 0.08)),
)


@dataclass(frozen=True)
class Option:
    """What a layer may be run with, and what that was measured to cost.

    Attributes:
        selector, threshold: the layer's selector.
        density: of the past that the layer reads, mean over the tasks.
        nats: divergence from dense attention per token that counts, mean over tasks and text.
    """

    selector: str
    threshold: float
    density: float
    nats: float


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of the train side.

    Attributes:
        windows: int64 [n, context].
        counted: bool [n, m], which of the last m tokens of a window count; m is at most a chunk.
        kinds: of each window, a task or text.
    """

    windows: Tensor
    counted: Tensor
    kinds: tuple[str, ...]


def cheapest(layers: Sequence[Sequence[Option]], density: float) -> list[Option] | None:
    """An option of each layer, the nats of all least in sum and the densities at most `density` in the mean.

    None if even the sparsest options of all layers read more. Exact: what is kept from layer to layer are all sums that
    no other undercuts in both density and nats.
    """
    sums: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for options in layers:
        longer = [
            (read + option.density, nats + option.nats, (*chosen, option))
            for read, nats, chosen in sums
            for option in options
        ]
        longer.sort(key=lambda one: one[:2])
        sums, least = [], math.inf
        for one in longer:
            if one[1] < least:
                sums.append(one)
                least = one[1]
    within = [chosen for read, _, chosen in sums if read <= density * len(layers) * (1 + 1e-9)]
    return list(within[-1]) if within else None  # densities rise, nats fall


def prompts(source: TaskSource, context: int, chunk: int, items: int, device: torch.device) -> Prompts:
    """`items` examples of each task, of which the answers count, and as many stretches of source text, of which the
    last chunk counts.

    Raises:
        ValueError: a context that is no multiple of the chunk, or a chunk that is shorter than an answer.
    """
    if context % chunk:
        raise ValueError(f"--context: expected a multiple of the chunk, {chunk}, got {context}")
    last = chunk - 1  # of the last chunk's tokens the last one foresees nothing
    text = heldout_windows(source.streams["train"], context, items)[:, :-1]
    examples = [source.example(task, "train", context, n) for task in TASKS for n in range(items)]
    counts = [last] * len(text) + [len(example.target) for example in examples]
    if max(counts) > last:
        raise ValueError(f"--chunk: expected at least {max(counts) + 1}, the longest answer and a token, got {chunk}")
    windows = np.concatenate([text, np.stack([example.window for example in examples])])
    counted = np.arange(last) >= last - np.array(counts)[:, None]
    kinds = (*[TEXT] * len(text), *(example.task for example in examples))
    return Prompts(torch.from_numpy(windows).to(device), torch.from_numpy(counted).to(device), kinds)


class Allocation:
    """Measures options inside a model.

    Args:
        methods: the model and its gates.
        given: prompts.
        chunk: queries per step.
    """

    def __init__(self, methods: Methods, given: Prompts, chunk: int) -> None:
        self.methods, self.given, self.chunk = methods, given, chunk
        self.dense = self._foreseen(self.row({}))

    def row(self, chosen: Mapping[int, tuple[str, float]]) -> Row:
        """The row whose layers have these selectors and thresholds; the others are dense."""
        layers: dict[str, dict[str, float | str]] = {str(n): {"selector": "Dense"} for n in range(self.methods.layers)}
        layers |= {str(n): {"selector": name, "threshold": threshold} for n, (name, threshold) in chosen.items()}
        return Row("allocated", "allocated", "library", selector="SeerGate", settings=LAST_BLOCKS, by_layer=layers)

    def options(self) -> Iterator[list[Option]]:
        """The options of each layer in turn."""
        numbers = range(self.methods.layers)
        everywhere = {option: self.densities(dict.fromkeys(numbers, option)) for option in OPTIONS}
        for layer in numbers:
            yield [
                Option(*option, everywhere[option][layer], float(f"{self.nats({layer: option}):.4g}"))
                for option in OPTIONS
            ]

    def nats(self, chosen: Mapping[int, tuple[str, float]]) -> float:
        """Divergence per token that counts of a choice from dense attention, each kind of prompt counting alike."""
        apart = kl_div(self._foreseen(self.row(chosen)), self.dense, reduction="none", log_target=True).sum(-1)
        apart, kinds = apart * self.given.counted, np.array(self.given.kinds)
        means = [apart[kinds == kind].sum() / self.given.counted[kinds == kind].sum() for kind in dict.fromkeys(kinds)]
        return float(torch.stack(means).mean())

    @torch.no_grad()
    def _foreseen(self, row: Row) -> Tensor:
        """Log-probabilities float32 [n, m, vocabulary] of the tokens that may count."""
        model, (count, context) = self.methods.model, self.given.windows.shape
        fed, last = self.given.windows[:, :-1], self.given.counted.shape[1]
        cache = DynamicCache(config=model.config)
        with self.methods.running(row), self.methods.prompts_of(row, context - 1, count):
            if fed.shape[1] > last:
                prefill(model, fed[:, :-last], cache, self.chunk)
            logits = model(input_ids=fed[:, -last:], past_key_values=cache, use_cache=True).logits
        return logits.float().log_softmax(-1)

    def densities(self, chosen: Mapping[int, tuple[str, float]]) -> list[float]:
        """What each layer reads of the past under a choice, over two prompts of each task."""
        windows = {}
        for kind in TASKS:
            numbers = [n for n, its in enumerate(self.given.kinds) if its == kind][:2]
            windows[kind] = list(self.given.windows[numbers].cpu().numpy())
        return [its["density"]["mask"] for its in probe(self.methods, self.row(chosen), windows, self.chunk)["layers"]]


def write_options(path: Path, layers: Sequence[Sequence[Option]], conditions: Mapping[str, object]) -> None:
    """Write what was measured of each layer, and under which conditions."""
    measured = {str(n): [asdict(option) for option in options] for n, options in enumerate(layers)}
    _write(path, {**conditions, "measured": measured})


def write_choice(path: Path, chosen: Sequence[Option]) -> None:
    """Write the settings of each layer, with the density and nats that are expected of them."""
    content = {
        "expected_density": round(float(np.mean([option.density for option in chosen])), 5),
        "expected_nats": float(f"{sum(option.nats for option in chosen):.4g}"),
        "layers": {str(n): {"selector": its.selector, "threshold": its.threshold} for n, its in enumerate(chosen)},
    }
    _write(path, content)


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure, choose and write; every foreseeable failure ends in one line of text."""
    parser = layers_parser("python -m benchmarks.fidelity.allocate", "Divide a density between the layers.")
    parser.add_argument("--items", type=int, default=ITEMS, help="prompts of each kind (default: %(default)s)")
    options = parser.parse_args(arguments)
    out, began = options.out or options.weights, time.perf_counter()
    try:
        check_counts(options, "context", "chunk", "items")
        if options.out is not None:
            check_place(out / OPTIONS_FILE)
        corpus = corpora.load(options.corpus)
        check_corpus(options.weights, corpus)
        device = usable_device(options.device)
        model = load_model(options.weights, device)
        if device.type == "cuda":
            in_bfloat16(model)
        gate = options.weights / GATE_FILE
        methods = Methods(model, gate)
        if not methods.has_gates:
            raise ValueError(f"{options.weights}: expected gates in {GATE_FILE}, got none; see testbed.train_gate")
        given = prompts(TaskSource(corpus), options.context, options.chunk, options.items, device)
        allocation, layers = Allocation(methods, given, options.chunk), []
        for number, its in enumerate(allocation.options()):
            layers.append(its)
            told = ", ".join(f"{one.selector} {one.threshold:g}: {one.density:.3f} {one.nats:.2g}" for one in its)
            print(f"[{time.perf_counter() - began:6.1f} s] layer {number}: density and nats of {told}", flush=True)
        conditions = {
            "prompts": f"{options.items} of each kind, {options.context} tokens in chunks of {options.chunk}",
            "model": {"weights": file_id(options.weights / "model.safetensors"), "gate": file_id(gate)},
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch": torch.__version__,
        }
        for density in ALLOCATED:
            path, chosen = out / allocated_file(density), cheapest(layers, density)
            if chosen is None:
                path.unlink(missing_ok=True)  # of other options
                print(f"density {density:g}: even the sparsest options read more")
                continue
            write_choice(path, chosen)
            told = ", ".join(f"{one.selector} {one.threshold:g}" for one in chosen)
            together = {n: (one.selector, one.threshold) for n, one in enumerate(chosen)}
            read, nats = float(np.mean(allocation.densities(together))), allocation.nats(together)
            print(f"{path}: {told}; expected {sum(one.nats for one in chosen):.3g} nats, got {nats:.3g} at {read:.3f}")
        write_options(out / OPTIONS_FILE, layers, conditions)  # last: rows are planned where it is of these weights
    except (ValueError, OSError) as error:
        raise SystemExit(f"allocate: {error}") from error


if __name__ == "__main__":
    main()
