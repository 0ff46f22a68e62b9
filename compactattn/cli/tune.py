"""`compactattn tune`: the largest threshold of each captured layer that keeps enough of the attention."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from compactattn.cli.info import version_of
from compactattn.cli.output import (
    UsageError,
    add_json_option,
    check_file_target,
    check_json_target,
    escaped,
    one_line,
    show,
)
from compactattn.cli.values import integer

if TYPE_CHECKING:
    from compactattn.capture import CaptureFile
    from compactattn.tuning import LayerTuning, TuneSettings

SELECTORS = ("flashprefill", "keybounds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "captures",
        metavar="CAPTURE",
        nargs="+",
        help="files of `compactattn capture`, of one model; prompts as long as those that will be served",
    )
    parser.add_argument(
        "--coverage", metavar="C", default="0.98", help="mean coverage to keep, above 0, below 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--selector",
        choices=SELECTORS,
        default=SELECTORS[0],
        help="whose threshold: flashprefill's alpha, or that of keybounds (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="the settings, JSON that `load_settings` reads")
    parser.add_argument("--chunk", metavar="N", default="1024", help="queries per step (default: %(default)s)")
    parser.add_argument(
        "--heads-per-group",
        metavar="N",
        default="1",
        help="query heads that share a block table (default: %(default)s)",
    )
    parser.add_argument(
        "--query-blocks-per-span",
        metavar="N",
        default="1",
        help="query blocks that share a block table, or chunk: all of a chunk (default: %(default)s)",
    )
    for name, words, default in (
        ("block-size", "tokens per KV block: 64, 128 or 256", "128"),
        ("query-block", "queries per query block: 64 or 128", "128"),
        ("sink-blocks", "first KV blocks that are always kept", "2"),
        ("window-blocks", "last KV blocks that are always kept", "4"),
    ):
        parser.add_argument(f"--{name}", metavar="N", default=default, help=f"{words} (default: %(default)s)")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tune every layer of the captures, write the settings, and print a table of what they keep and cost."""
    check_file_target("--out", arguments.out, spared=arguments.captures)
    check_json_target(arguments.json, spared=[*arguments.captures, arguments.out])
    settings = _settings(arguments)
    from compactattn.capture import open_capture

    with ExitStack() as stack:
        captures = []
        for path in arguments.captures:
            try:
                captures.append(stack.enter_context(open_capture(path)))
            except (OSError, ValueError) as error:
                raise UsageError(f"CAPTURE: {one_line(error)}") from error
        found = _tune(captures, settings)
    _save(arguments, found, settings, captures[0].model)
    report = {"compactattn": version_of("compactattn"), "model": captures[0].model, **_as_json(found, settings)}
    show(_as_text(arguments, found, settings, captures[0].model), arguments.json, report)
    return 0


def _settings(arguments: argparse.Namespace) -> TuneSettings:
    from compactattn.selectors import FlashPrefill, KeyBounds
    from compactattn.tuning import TuneSettings
    from compactattn.validation import BLOCK_SIZES, QUERY_BLOCKS

    some, any_number = range(1, 2**31), range(2**31)
    span = None
    if arguments.query_blocks_per_span != "chunk":
        span = integer("--query-blocks-per-span", arguments.query_blocks_per_span, some, word="chunk")
    kind = FlashPrefill if arguments.selector == SELECTORS[0] else KeyBounds
    return TuneSettings(
        kind(
            block_size=integer("--block-size", arguments.block_size, BLOCK_SIZES),
            query_block=integer("--query-block", arguments.query_block, QUERY_BLOCKS),
            sink_blocks=integer("--sink-blocks", arguments.sink_blocks, any_number),
            window_blocks=integer("--window-blocks", arguments.window_blocks, any_number),
        ),
        _coverage(arguments.coverage),
        integer("--heads-per-group", arguments.heads_per_group, some),
        span,
        integer("--chunk", arguments.chunk, some),
    )


def _coverage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise UsageError(f"--coverage: expected a number above 0 and below 1, got {text!r}")
    return value


def _tune(captures: list[CaptureFile], settings: TuneSettings) -> list[LayerTuning]:
    from tqdm import tqdm

    from compactattn.cli.demo import leave_busy_cores
    from compactattn.tuning import steps, tune_layer

    models = sorted({str(capture.model) for capture in captures})
    if len(models) > 1:
        raise UsageError(f"CAPTURE: expected captures of one model, got {', '.join(models)}")
    leave_busy_cores()
    layers = sorted({number for capture in captures for number in capture.layers})
    total = sum(steps(capture.tokens, settings) * len(capture.layers) for capture in captures)
    found = []
    with tqdm(total=total, unit="chunk", desc="tuning", file=sys.stderr, disable=None) as bar:
        for number in layers:
            having = [capture for capture in captures if number in capture.layers]
            try:
                found.append(tune_layer(number, having, settings, on_step=bar.update))
            except ValueError as error:
                argument, _, rest = (words := one_line(error)).partition(": ")
                named = {"heads_per_group": f"--heads-per-group: {rest}", "captures": f"CAPTURE: {rest}"}
                raise UsageError(named.get(argument, f"CAPTURE: {words}")) from error
    return found


def _save(arguments: argparse.Namespace, found: list[LayerTuning], settings: TuneSettings, model: str) -> None:
    from compactattn.settings import Settings, save_settings

    chosen = Settings(
        selector={layer.layer: layer.selector for layer in found},
        heads_per_group=settings.heads_per_group,
        query_blocks_per_span=settings.query_blocks_per_span,
    )
    origin = (
        f"compactattn tune, version {version_of('compactattn')}: mean coverage {settings.coverage} in chunks of "
        f"{settings.chunk} over {', '.join(map(os.path.basename, arguments.captures))} of {model}"
    )
    try:
        save_settings(arguments.out, chosen, origin=origin)
    except OSError as error:
        words = error.strerror or one_line(error)
        raise UsageError(f"--out: expected a file that can be written, got {arguments.out!r}: {words}") from error


def _as_text(arguments: argparse.Namespace, found: list[LayerTuning], settings: TuneSettings, model: str) -> str:
    """What was asked for, then a row per layer."""
    from compactattn.demo_text import aligned, percent
    from compactattn.tuning import threshold_name

    name = threshold_name(settings.selector)
    heading = [
        escaped(f"{model}: largest {name} with a mean coverage of at least {settings.coverage:.4g}"),
        f"chunks of {settings.chunk}, heads_per_group={settings.heads_per_group}, "
        f"query_blocks_per_span={settings.query_blocks_per_span}; density of the past and coverage are averages over "
        "the chunks after the first [%]",
    ]
    table = [["layer", name, "mask", "query-block", "sub-group", "full group", "coverage", "worst", "under 90 %"]]
    for layer in found:
        densities, its = layer.cascade.densities(), layer.coverage
        below = int(its.below.sum()) / (its.queries * len(its.below))
        coverage = [float(its.mean.double().mean()), float(its.worst.min()), below]
        row = [f"{layer.threshold:.4g}", *(percent(share) for share in (*densities.values(), *coverage))]
        table.append([str(layer.layer), *row])
    written = escaped(f"{arguments.out}: enable(**load_settings(...)) runs these layers so, and all others dense")
    return "\n".join([*heading, "", *aligned(table), "", written])


def _as_json(found: list[LayerTuning], settings: TuneSettings) -> dict[str, Any]:
    """The settings and the figures of each layer: shares of 1, lists over query heads."""
    from dataclasses import asdict

    from compactattn.demo_text import coverage_json
    from compactattn.tuning import threshold_name

    asked, name = asdict(settings), threshold_name(settings.selector)
    del asked["selector"][name]  # that of each layer is what was found
    return {
        "settings": asked,
        "layers": [
            {
                "layer": layer.layer,
                name: layer.threshold,
                "density": layer.cascade.densities(),
                "coverage": coverage_json(layer.coverage),
            }
            for layer in found
        ],
    }
