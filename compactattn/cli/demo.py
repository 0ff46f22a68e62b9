"""`compactattn demo`: prefill a recorded prompt in chunks, beside dense attention and QUOKA."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactattn.cli.info import version_of
from compactattn.cli.output import UsageError, add_json_option, check_json_target, escaped, one_line, show
from compactattn.cli.values import fraction, integer

if TYPE_CHECKING:
    from compactattn.capture import Capture
    from compactattn.demo import DemoSettings

SELECTORS = ("flashprefill", "keybounds", "xattention", "oracle", "dense")
DEFAULT_ALPHA = 0.1  # a little below the published 0.12 and 0.18, which are for far longer prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--capture", metavar="FILE", help="a recorded prompt (default: the sample in the package)")
    parser.add_argument(
        "--selector", choices=SELECTORS, default=SELECTORS[0], help="what proposes blocks (default: %(default)s)"
    )
    parser.add_argument("--alpha", metavar="A", help=f"threshold of flashprefill, 0 to 1 (default: {DEFAULT_ALPHA})")
    parser.add_argument(
        "--heads-per-group",
        metavar="N",
        help="query heads that share a block table (default: 2, or 1 where 2 does not fit)",
    )
    parser.add_argument("--chunk", metavar="N", help="queries per step (default: 512, or the whole prompt if shorter)")
    parser.add_argument(
        "--block-size", metavar="N", default="64", help="tokens per KV block: 64, 128 or 256 (default: %(default)s)"
    )
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure a capture, show a progress bar on standard error and the tables on standard output."""
    from compactattn.capture import sample_path

    target = arguments.json
    path = sample_path() if arguments.capture is None else arguments.capture
    check_json_target(target, spared=[path])
    capture = _load(path)
    settings = _demo_settings(arguments, capture)
    leave_busy_cores()

    from tqdm import tqdm

    from compactattn.demo import measure
    from compactattn.demo_text import as_json, as_text

    steps = len(capture.layers) * -(-capture.tokens // settings.chunk)
    with tqdm(total=steps, unit="chunk", desc="compiling, then prefilling", file=sys.stderr) as bar:
        report = measure(capture, settings, on_step=bar.update)
    name = "the sample in the package" if arguments.capture is None else arguments.capture
    origin = {"file": name, "model": capture.model, "source": capture.source}
    heading = escaped(f"{name}: {capture.model}; {capture.source}")
    found = {"compactattn": version_of("compactattn"), "capture": origin, **as_json(report)}
    show(f"{heading}\n{as_text(report)}", target, found)
    return 0


def leave_busy_cores() -> None:
    """Compute on idle cores only: PyTorch's threads wait for each other by spinning, which a busy core prolongs.

    On two cores that others keep busy, one thread finishes several times sooner than two.
    """
    import torch

    if hasattr(os, "getloadavg"):
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or threads) - round(os.getloadavg()[0]))))


def _load(path: str | Path) -> Capture:
    from compactattn.capture import load_capture

    try:
        return load_capture(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--capture: {one_line(error)}") from error


def _demo_settings(arguments: argparse.Namespace, capture: Capture) -> DemoSettings:
    """The settings of a run, checked against the capture before anything is measured."""
    from compactattn.demo import DemoSettings, PagedPrompt, best_device
    from compactattn.validation import BLOCK_SIZES, check_queries

    q_heads, kv_heads = capture.layers[0].q.shape[1], capture.layers[0].k.shape[1]
    divisors = [n for n in range(1, q_heads // kv_heads + 1) if q_heads // kv_heads % n == 0]
    block_size = integer("--block-size", arguments.block_size, BLOCK_SIZES)
    heads_per_group = 2 if 2 in divisors else 1
    if arguments.heads_per_group is not None:
        heads_per_group = integer("--heads-per-group", arguments.heads_per_group, divisors)
    chunk = min(512, capture.tokens)
    if arguments.chunk is not None:
        chunk = integer("--chunk", arguments.chunk, range(1, capture.tokens + 1))
    settings = DemoSettings(_selector(arguments.selector, arguments.alpha, block_size), heads_per_group, chunk)
    try:
        prompt = PagedPrompt.from_layer(capture.layers[0], best_device(), page_size=settings.page_size)
        check_queries(prompt.q[:1], prompt.kv, prompt.feed(0, 1))
    except ValueError as error:
        raise UsageError(f"--capture: {one_line(error)}") from error
    return settings


def _selector(name: str, alpha: str | None, block_size: int) -> Any:
    """The selector by its name; what it keeps anyway is scaled down for prompts of a few thousand tokens."""
    from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, XAttention

    if alpha is not None and name != "flashprefill":
        raise UsageError(f"--alpha: expected only with --selector flashprefill, got {alpha} with {name}")
    sizes = {"block_size": block_size, "query_block": min(block_size, 128)}
    kept = {"sink_blocks": 1, "window_blocks": 2}
    if name == "flashprefill":
        threshold = DEFAULT_ALPHA if alpha is None else fraction("--alpha", alpha)
        return FlashPrefill(alpha=threshold, **kept, **sizes)
    if name == "keybounds":
        return KeyBounds(**kept, **sizes)
    if name == "xattention":
        return XAttention(**kept, **sizes)
    if name == "oracle":
        return Oracle(mass=0.95, **kept, **sizes)
    return Dense(**sizes)
