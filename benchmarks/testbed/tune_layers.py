"""Tune FlashPrefill's alpha layer by layer on the test bed, for the rows of `fidelity` with a selector per layer.

    python -m benchmarks.testbed.tune_layers --corpus out/stdlib.zip

Prompts of the train side, source text and needle tasks, are recorded as `compactattn capture` does it and tuned as
`compactattn tune` does it, one head and one query block to a table. Each coverage gives a settings file, such as
`layers/coverage-0.9.json` beside the weights, which `load_settings` reads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.arguments import directory_name
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed.model import MODEL_NAME, WEIGHTS_DIRECTORY, load_model
from benchmarks.testbed.tasks import TaskSource
from benchmarks.testbed.train import usable_device
from benchmarks.testbed.training_record import check_corpus
from compactattn import FlashPrefill
from compactattn.capture import open_capture
from compactattn.integrations.transformers.recording import planned_layout, record
from compactattn.settings import Settings, save_settings
from compactattn.tuning import LayerTuning, TuneSettings, tune_layer

DIRECTORY = "layers"  # below that of the weights
COVERAGES = (0.8, 0.88, 0.94)
TASKS = ("niah_multikey", "niah_multiquery")
CONTEXT, CHUNK = 16_384, 1024


def file_of(coverage: float) -> str:
    """Where the settings of a coverage lie, below the directory of the weights."""
    return f"{DIRECTORY}/coverage-{coverage:g}.json"


def prompts(source: TaskSource, context: int) -> list[np.ndarray]:
    """Windows of the train side, int64 [context] each: its source text from the beginning, then one of each task."""
    if len(source.streams["train"]) < context:
        most = len(source.streams["train"])
        raise ValueError(f"--context: expected at most the {most} tokens of the text, got {context}")
    tasks = [source.example(task, "train", context, 0).window for task in TASKS]
    return [source.streams["train"][:context].astype(np.int64), *tasks]


def tuned(
    model: LlamaForCausalLM, windows: Sequence[np.ndarray], coverages: Sequence[float], chunk: int
) -> dict[float, list[LayerTuning]]:
    """Every layer at every coverage, over prompts that are recorded into a directory that is gone afterwards."""
    layers = list(range(model.config.num_hidden_layers))
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        captures = []
        for n, window in enumerate(windows):
            path = Path(directory) / f"{n}.safetensors"
            layout = planned_layout(model.config, layers, len(window), torch.float16)
            record(model, torch.from_numpy(window), path, layout, name=MODEL_NAME, source=f"train side, prompt {n}")
            captures.append(stack.enter_context(open_capture(path)))
        return {
            coverage: [
                tune_layer(
                    layer,
                    captures,
                    TuneSettings(FlashPrefill(), coverage, query_blocks_per_span=1, chunk=chunk),
                    device=model.device,
                )
                for layer in layers
            ]
            for coverage in coverages
        }


def layers_parser(program: str, words: str) -> argparse.ArgumentParser:
    """The command line of whatever finds settings for the layers of a model on prompts of one length."""
    parser = argparse.ArgumentParser(prog=program, description=words)
    parser.add_argument("--out", type=directory_name, help="directory (default: that of the weights)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIRECTORY, help="the model (default: the committed)")
    parser.add_argument("--corpus", type=Path, help="packed corpus; default: the running Python's standard library")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="queries per step (default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Tune and write the settings; every foreseeable failure ends in one line of text."""
    options = layers_parser("python -m benchmarks.testbed.tune_layers", "Tune every layer.").parse_args(arguments)
    out = options.out or options.weights
    try:
        corpus = corpora.load(options.corpus)
        check_corpus(options.weights, corpus)
        model = load_model(options.weights, usable_device(options.device))
        found = tuned(model, prompts(TaskSource(corpus), options.context), COVERAGES, options.chunk)
        for coverage, layers in found.items():
            path = out / file_of(coverage)
            path.parent.mkdir(parents=True, exist_ok=True)
            origin = f"mean coverage {coverage:g} in chunks of {options.chunk}, prompts of {options.context} tokens"
            chosen = {layer.layer: layer.selector for layer in layers}
            save_settings(path, Settings(selector=chosen, heads_per_group=1, query_blocks_per_span=1), origin=origin)
            alphas = ", ".join(f"{layer.threshold:g}" for layer in layers)
            print(f"{path}: alpha {alphas}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"tune_layers: {error}") from error


if __name__ == "__main__":
    main()
