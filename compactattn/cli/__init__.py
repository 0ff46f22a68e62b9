"""The `compactattn` command: measure a recorded prompt, record one, tune settings on it, say what works here.

Each command is a module with `add_arguments` and `run`. Imports of torch and of the library happen inside `run`, after
the arguments have been read.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from compactattn.cli import capture, demo, info, tune
from compactattn.cli.output import UsageError, emit, escaped

EXIT_CODES = (
    "exit codes: 0; 2 for arguments that cannot be used or output that cannot be written; 130 when interrupted; "
    "141 when whatever reads the output stops reading"
)
_COMMANDS = {
    "demo": (demo, "prefill a recorded prompt in chunks; compare with dense attention and QUOKA"),
    "capture": (capture, "record what the layers of a transformers model hand to attention over a text"),
    "tune": (tune, "find the largest alpha of each captured layer that keeps enough of the attention"),
    "info": (info, "versions, devices, and which backends work here"),
}


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and whose help is printed like all output."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: Any = None) -> None:
        emit(self.format_help().rstrip("\n"))


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        emit(f"compactattn {info.version_of('compactattn')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, one of `EXIT_CODES`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that cannot show "é" or "‖"
    try:
        arguments = _parser().parse_args(argv)
        return _COMMANDS[arguments.command][0].run(arguments)
    except UsageError as error:
        with suppress(OSError):
            print(f"compactattn: error: {escaped(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="compactattn", description=__doc__.split("\n")[0], epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    names = "{" + ",".join(_COMMANDS) + "}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, (module, words) in _COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        module.add_arguments(command)
    return parser
