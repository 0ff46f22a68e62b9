"""The `compactattn` command: `demo` measures a recorded prompt, `info` says what works on this machine.

Imports of torch and of the library happen inside the commands, after the arguments have been read.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from compactattn.capture import Capture
    from compactattn.demo import DemoSettings

SELECTORS = ("flashprefill", "xattention", "oracle", "dense")
DEFAULT_ALPHA = 0.1  # a little below the published 0.12 and 0.18, which are for far longer prompts


EXIT_CODES = (
    "exit codes: 0; 2 for arguments that cannot be used or output that cannot be written; 130 when interrupted; "
    "141 when whatever reads the output stops reading"
)


class UsageError(Exception):
    """An argument that cannot be used, or output that cannot be written; the message says which, and what is valid."""


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and whose help is printed like all output."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        _print(self.format_help().rstrip("\n"))


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        _print(f"compactattn {_version('compactattn')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, one of `EXIT_CODES`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that cannot show "é" or "‖"
    try:
        arguments = _parser().parse_args(argv)
        run = demo if arguments.command == "demo" else info
        return run(arguments)
    except UsageError as error:
        with suppress(OSError):
            print(f"compactattn: error: {_escaped(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _print(text: str) -> None:
    """Print at once, so that output that cannot be written is noticed here and not when Python ends."""
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):  # a stream without a file descriptor; else what it still holds would fail once more
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"standard output: expected to be writable, got: {error.strerror}") from error


def _escaped(text: str) -> str:
    """On one line, and without anything that a terminal would obey: "\\x1b" in place of an escape character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="compactattn", description=__doc__.split("\n")[0], epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,info}")
    demo_parser = commands.add_parser(
        "demo",
        help="prefill a recorded prompt in chunks; compare with dense attention and QUOKA",
        allow_abbrev=False,
    )
    demo_parser.add_argument("--capture", metavar="FILE", help="a recorded prompt (default: the sample in the package)")
    demo_parser.add_argument(
        "--selector", choices=SELECTORS, default=SELECTORS[0], help="what proposes blocks (default: %(default)s)"
    )
    demo_parser.add_argument(
        "--alpha", metavar="A", help=f"threshold of flashprefill, 0 to 1 (default: {DEFAULT_ALPHA})"
    )
    demo_parser.add_argument(
        "--heads-per-group",
        metavar="N",
        help="query heads that share a block table (default: 2, or 1 where 2 does not fit)",
    )
    demo_parser.add_argument(
        "--chunk", metavar="N", help="queries per step (default: 512, or the whole prompt if shorter)"
    )
    demo_parser.add_argument(
        "--block-size", metavar="N", default="64", help="tokens per KV block: 64, 128 or 256 (default: %(default)s)"
    )
    info_parser = commands.add_parser(
        "info", help="versions, devices, and which backends work here", allow_abbrev=False
    )
    for command in (demo_parser, info_parser):
        command.add_argument(
            "--json",
            metavar="FILE",
            nargs="?",
            const="-",
            help="write JSON to FILE; without FILE or with '-' to standard output, instead of the text",
        )
    return parser


def demo(arguments: argparse.Namespace) -> int:
    """Measure a capture, show a progress bar on standard error and the tables on standard output."""
    target = arguments.json
    _check_target(target)
    capture = _load(arguments.capture)
    settings = _demo_settings(arguments, capture)
    _leave_busy_cores()

    from tqdm import tqdm

    from compactattn.demo import measure
    from compactattn.demo_text import as_json, as_text

    steps = len(capture.layers) * -(-capture.tokens // settings.chunk)
    with tqdm(total=steps, unit="chunk", desc="compiling, then prefilling", file=sys.stderr) as bar:
        report = measure(capture, settings, on_step=bar.update)
    name = "the sample in the package" if arguments.capture is None else arguments.capture
    origin = {"file": name, "model": capture.model, "source": capture.source}
    heading = _escaped(f"{name}: {capture.model}; {capture.source}")
    found = {"compactattn": _version("compactattn"), "capture": origin, **as_json(report)}
    _show(f"{heading}\n{as_text(report)}", target, found)
    return 0


def _leave_busy_cores() -> None:
    """Compute on idle cores only: PyTorch's threads wait for each other by spinning, which a busy core prolongs.

    On two cores that others keep busy, one thread finishes several times sooner than two.
    """
    import torch

    if hasattr(os, "getloadavg"):
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or threads) - round(os.getloadavg()[0]))))


def _load(path: str | None) -> Capture:
    from compactattn.capture import load_capture, sample_path

    try:
        return load_capture(sample_path() if path is None else path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--capture: {_one_line(error)}") from error


def _demo_settings(arguments: argparse.Namespace, capture: Capture) -> DemoSettings:
    """The settings of a run, checked against the capture before anything is measured."""
    from compactattn.demo import DemoSettings, PagedPrompt, best_device
    from compactattn.validation import BLOCK_SIZES, check_queries

    q_heads, kv_heads = capture.layers[0].q.shape[1], capture.layers[0].k.shape[1]
    divisors = [n for n in range(1, q_heads // kv_heads + 1) if q_heads // kv_heads % n == 0]
    block_size = _integer("--block-size", arguments.block_size, BLOCK_SIZES)
    heads_per_group = 2 if 2 in divisors else 1
    if arguments.heads_per_group is not None:
        heads_per_group = _integer("--heads-per-group", arguments.heads_per_group, divisors)
    chunk = min(512, capture.tokens)
    if arguments.chunk is not None:
        chunk = _integer("--chunk", arguments.chunk, range(1, capture.tokens + 1))
    settings = DemoSettings(_selector(arguments.selector, arguments.alpha, block_size), heads_per_group, chunk)
    try:
        prompt = PagedPrompt.from_layer(capture.layers[0], best_device(), page_size=settings.page_size)
        check_queries(prompt.q[:1], prompt.kv, prompt.feed(0, 1))
    except ValueError as error:
        raise UsageError(f"--capture: {_one_line(error)}") from error
    return settings


def _selector(name: str, alpha: str | None, block_size: int) -> Any:
    """The selector by its name; what it keeps anyway is scaled down for prompts of a few thousand tokens."""
    from compactattn.selectors import Dense, FlashPrefill, Oracle, XAttention

    if alpha is not None and name != "flashprefill":
        raise UsageError(f"--alpha: expected only with --selector flashprefill, got {alpha} with {name}")
    sizes = {"block_size": block_size, "query_block": min(block_size, 128)}
    kept = {"sink_blocks": 1, "window_blocks": 2}
    if name == "flashprefill":
        threshold = DEFAULT_ALPHA if alpha is None else _fraction("--alpha", alpha)
        return FlashPrefill(alpha=threshold, **kept, **sizes)
    if name == "xattention":
        return XAttention(**kept, **sizes)
    if name == "oracle":
        return Oracle(mass=0.95, **kept, **sizes)
    return Dense(**sizes)


def _integer(name: str, text: str, valid: Sequence[int]) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value not in valid:
        choices = "one of " + ", ".join(map(str, valid))
        if isinstance(valid, range):
            choices = f"an integer from {valid[0]} to {valid[-1]}"
        raise UsageError(f"{name}: expected {choices}, got {text!r}")
    return value


def _fraction(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name}: expected a number from 0 to 1, got {text!r}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_target(target: str | None) -> None:
    """Refuse a `--json FILE` that cannot be written before a minute of work, not after."""
    if target is None or target == "-":
        return
    path = Path(os.path.realpath(target))
    if _is_special(target):
        writable = os.access(target, os.W_OK)
    else:  # a link that still is one leads to itself
        writable = not path.is_symlink() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if os.path.isdir(target) or not writable:
        raise UsageError(f"--json: expected '-' or a file in a writable directory, got {target!r}")


def _is_special(target: str) -> bool:
    """Whether it exists and is not a regular file: a device, a FIFO or a socket, which must never be replaced."""
    return os.path.exists(target) and not os.path.isfile(target)


def _show(text: str, target: str | None, value: dict[str, Any]) -> None:
    """Print the text, or JSON instead; a file of JSON is written even where nobody reads the text."""
    try:
        if target != "-":
            _print(text)
    finally:
        if target is not None:
            content = json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
            if target == "-":
                _print(content)
            else:
                _write(target, content + "\n")


def _write(target: str, content: str) -> None:
    """Put ASCII in a file that appears whole or not at all, where a link leads; or straight to a device or a FIFO."""
    try:
        if _is_special(target):
            Path(target).write_text(content, encoding="ascii")
            return
        path = os.path.realpath(target)
        unfinished = Path(f"{path}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(content, encoding="ascii")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--json: expected a file that can be written, got {target!r}: {error.strerror}") from error


def info(arguments: argparse.Namespace) -> int:
    """Show versions and, for each device, which backends run there and why the others do not."""
    target = arguments.json
    _check_target(target)
    versions, devices = _versions(), _devices()
    lines = [f"{name:12} {number}" for name, number in versions.items()]
    for device in devices:
        lines += ["", f"{device['device']}: {device['name']}"]
        for backend, reason in device["backends"].items():
            lines.append(f"  {backend:8} {'works' if reason is None else 'does not work: ' + reason}")
        lines += [f"  attention, {problem}: {kernel}" for problem, kernel in device["attention"].items()]
    _show("\n".join(lines), target, {"versions": versions, "devices": devices})
    return 0


def _versions() -> dict[str, str]:
    packages = ("compactattn", "torch", "triton", "numba", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    """The version of an installed package; compactattn's own also from a checkout that is not installed."""
    if package == "compactattn":
        from compactattn import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[dict[str, Any]]:
    """Each device with, per backend, null or the reason why it does not run there, and the attention kernels."""
    import torch

    from compactattn.dispatch import BACKENDS, unavailable

    def describe(device: torch.device, name: str, attention: dict[str, str]) -> dict[str, Any]:
        reasons = {backend: unavailable(backend, device) for backend in BACKENDS}
        return {"device": str(device), "name": name, "backends": reasons, "attention": attention}

    products = "numba: gathered runs of keys, multiplied by PyTorch"
    devices = [describe(torch.device("cpu"), f"{torch.get_num_threads()} threads", {"every problem": products})]
    if not torch.cuda.is_available():
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        return [*devices, {"device": "cuda", "name": f"none ({reason})", "backends": {}, "attention": {}}]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        installed = unavailable("triton", device) is None
        kernels = _triton_attention(torch.cuda.get_device_capability(device)) if installed else {}
        devices.append(describe(device, torch.cuda.get_device_name(device), kernels))
    return devices


def _triton_attention(capability: tuple[int, int]) -> dict[str, str]:
    """Which kernel attends on a GPU of this compute capability to some usual problems, and why not the faster one."""
    import torch

    from compactattn._triton.attention import why_not_hopper

    kernels = {}
    for dtype, head_dim, query_block in (
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 128, 64),
        (torch.bfloat16, 96, 128),
        (torch.float32, 128, 128),
    ):
        problem = f"{str(dtype).removeprefix('torch.')}, head dimension {head_dim}, query blocks of {query_block}"
        refusal = why_not_hopper(capability, dtype, head_dim, query_block)
        kernels[problem] = "warp-specialised Hopper kernel" if refusal is None else f"general kernel ({refusal})"
    return kernels
