"""`python -m benchmarks latency`, `ttft`, `serving`, `fidelity` and `ruler` measure; `python -m benchmarks report
RESULT.json` turns a result into words; `python -m benchmarks join` makes one result of those of the shares of a
fidelity plan; `python -m benchmarks sources` prints the hash that ties a result to its sources."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arguments import directory_name, seconds

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of use are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    latency = commands.add_parser("latency", help="time chunks, prompts, tables, layouts, scaling and the host's part")
    latency.add_argument("--preset", default="cpu", help="h200, smoke (a GPU in a minute) or cpu (default)")
    latency.add_argument("--out", type=directory_name, default=RESULTS, help="directory for latency-PRESET.json")
    latency.add_argument("--cases", help="comma-separated parts of case names, or shell patterns")
    latency.add_argument(
        "--only", help="comma-separated kinds: step, tables, prompt, scaling, layouts, decode, host, bounds, features"
    )
    latency.add_argument("--resume", action="store_true", help="keep the cases that the result in --out already has")
    latency.add_argument("--budget-seconds", type=seconds, help="start no new case after so long")
    latency.add_argument("--timing-seconds", type=seconds, help="time to spend on the timed loop of one case")
    latency.add_argument("--shrink", type=int, default=1, help="divide contexts and chunks (to try the code)")
    latency.add_argument("--tracebacks", action="store_true", help="print them for whatever did not run")
    _add_machine(latency)
    latency.add_argument("--warm", action="store_true", help="do not evict the L2 before each run")
    latency.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    latency.set_defaults(run=_latency)
    _add_ttft(commands)
    _add_serving(commands)
    _add_fidelity(commands)
    _add_ruler(commands)
    join = commands.add_parser("join", help="one result of those that `fidelity` left of the shares of a plan")
    join.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="two or more, of one preset")
    join.add_argument("--out", type=directory_name, required=True, help="directory for fidelity-PRESET.json")
    join.set_defaults(run=_join)
    report = commands.add_parser("report", help="Markdown tables and figures from a result alone")
    report.add_argument("result", type=Path, help="a JSON file that one of the commands above wrote")
    report.add_argument(
        "--out", type=directory_name, help="directory for .md and .png files (default: beside the result)"
    )
    report.add_argument("--tracebacks", action="store_true", help="print one for a result that makes no sense")
    report.set_defaults(run=_report)
    sources = commands.add_parser("sources", help="the hash of this checkout's sources, as results record it")
    kinds = ("latency", "ttft", "serving", "fidelity")
    sources.add_argument("--of", choices=kinds, default="latency", help="default: %(default)s")
    sources.set_defaults(run=_sources)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; --resume goes on with what was written" if hasattr(parsed, "resume") else ""
        print(f"{parser.prog}: interrupted{goes_on}", file=sys.stderr)
        return 130


def _add_machine(command: argparse.ArgumentParser) -> None:
    """Options of every preset about where it runs."""
    command.add_argument("--commit", help="what to record as the commit on a machine without git")
    command.add_argument("--device", choices=("cuda", "cpu"), help="instead of the preset's device")
    command.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default 1)")


def _given(parsed: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given; for the others a preset's `Options` have their defaults."""
    return {name: its for name in names if (its := getattr(parsed, name)) is not None}


def _latency(parsed: argparse.Namespace) -> int:
    from benchmarks import latency
    from benchmarks.cases import chosen_cases, preset

    if parsed.list:
        print("\n".join(case.name for case in chosen_cases(preset(parsed.preset), parsed.cases, parsed.only)))
        return 0
    if parsed.tracebacks:
        _show_tracebacks()
    names = ("preset", "out", "cases", "only", "resume", "commit", "budget_seconds", "timing_seconds", "device")
    return latency.run(latency.Options(**_given(parsed, *names, "shrink", "threads", "warm")))


def _add_ttft(commands: Any) -> None:
    ttft = commands.add_parser("ttft", help="time whole models of transformers, chunk by chunk, dense and sparse")
    ttft.add_argument("--preset", default="cpu", help="h200 or cpu (default)")
    ttft.add_argument("--out", type=directory_name, default=RESULTS, help="directory for ttft-PRESET.json")
    ttft.add_argument("--only", help="comma-separated parts of case names, or shell patterns")
    ttft.add_argument("--resume", action="store_true", help="keep the cases that the result in --out already has")
    ttft.add_argument("--budget-seconds", type=seconds, help="start no new case after so long")
    ttft.add_argument("--timing-seconds", type=seconds, help="time to spend on the timed loop of one chunk")
    ttft.add_argument("--shrink", type=int, default=1, help="divide contexts, and take small models (to try the code)")
    ttft.add_argument("--tracebacks", action="store_true", help="print them for whatever did not run")
    _add_machine(ttft)
    ttft.add_argument("--list", action="store_true", help="print the cases and the memory that each needs, and stop")
    ttft.set_defaults(run=_ttft)


def _ttft(parsed: argparse.Namespace) -> int:
    _check_installed("ttft", "transformers", "hf")
    from benchmarks.ttft import run

    names = ("preset", "out", "only", "resume", "commit", "budget_seconds", "timing_seconds", "device", "shrink")
    options = run.Options(**_given(parsed, *names, "threads"))
    if parsed.list:
        print(run.listing(options))
        return 0
    if parsed.tracebacks:
        _show_tracebacks()
    return run.run(options)


def _add_serving(commands: Any) -> None:
    serving = commands.add_parser("serving", help="vLLM's engine under its own attention and the plugin: tokens, times")
    serving.add_argument("--preset", default="cpu", help="h200 or cpu (default)")
    serving.add_argument("--out", type=directory_name, default=RESULTS, help="directory for serving-PRESET.json")
    serving.add_argument("--weights", type=Path, help="directory of the model that answers (default: the test bed's)")
    serving.add_argument("--corpus", type=Path, help="the model's, packed; default: the running Python's library")
    serving.add_argument("--only", help="comma-separated parts of case names, or shell patterns; their baseline too")
    serving.add_argument("--resume", action="store_true", help="keep the cases that the result in --out already has")
    serving.add_argument("--budget-seconds", type=seconds, help="start no engine after so long")
    serving.add_argument("--stand-ins", action="store_true", help="for vLLM's compiled modules, see tests/vllm/pack")
    serving.add_argument("--commit", help="what to record as the commit on a machine without git")
    serving.add_argument("--list", action="store_true", help="print the engines in order and stop")
    serving.set_defaults(run=_serving)


def _serving(parsed: argparse.Namespace) -> int:
    _check_installed("serving", "transformers", "hf")
    from benchmarks.serving import run

    names = ("preset", "out", "weights", "corpus", "only", "resume", "commit", "budget_seconds", "stand_ins")
    options = run.Options(**_given(parsed, *names))
    if parsed.list:
        print(run.listing(options))
        return 0
    run.planned(options)
    _check_installed("serving", "vllm", "vllm")
    return run.run(options)


def _show_tracebacks() -> None:
    logging.basicConfig()
    logging.getLogger("benchmarks").setLevel(logging.DEBUG)


def _add_fidelity(commands: Any) -> None:
    fidelity = commands.add_parser("fidelity", help="task accuracy and bits per byte of every method inside a model")
    fidelity.add_argument("--preset", default="cpu", help="h200 or cpu (default)")
    fidelity.add_argument("--out", type=directory_name, default=RESULTS, help="directory for fidelity-PRESET.json")
    fidelity.add_argument("--weights", type=Path, help="directory of the model (default: the test bed's)")
    fidelity.add_argument("--gate", type=Path, help="gate weights (default: gate/seer_gate.safetensors in --weights)")
    fidelity.add_argument("--corpus", type=Path, help="the model's, packed; default: the running Python's library")
    fidelity.add_argument("--only", help="comma-separated parts of row names, or shell patterns")
    fidelity.add_argument("--contexts", help="comma-separated contexts of the preset, such as 16384,32768")
    fidelity.add_argument("--share", help="I/N, such as 1/2: only every N-th cell from the I-th; `join` joins results")
    fidelity.add_argument("--items", type=int, help="at most so many items per task")
    fidelity.add_argument("--resume", action="store_true", help="keep the cells that the result in --out already has")
    fidelity.add_argument("--budget-seconds", type=seconds, help="begin no cell that would end after so long")
    fidelity.add_argument("--tokens-at-once", type=int, help="prompt tokens of one batch")
    _add_machine(fidelity)
    fidelity.add_argument("--list", action="store_true", help="print the plan and what it should take, and stop")
    fidelity.set_defaults(run=_fidelity)


def _fidelity(parsed: argparse.Namespace) -> int:
    _check_installed("fidelity", "transformers", "hf")
    from benchmarks.fidelity import run

    names = ("preset", "out", "weights", "gate", "corpus", "only", "contexts", "share", "items", "resume", "commit")
    options = run.Options(**_given(parsed, *names, "budget_seconds", "device", "tokens_at_once", "threads"))
    if parsed.list:
        print(run.listed(options))
        return 0
    return run.run(options)


def _add_ruler(commands: Any) -> None:
    ruler = commands.add_parser("ruler", help="RULER by lm-evaluation-harness, beside the published figures")
    ruler.add_argument("--model", required=True, help="a directory, or a name on the Hugging Face hub")
    ruler.add_argument("--lengths", default="32768,65536,131072", help="comma-separated (default: %(default)s)")
    ruler.add_argument("--out", type=directory_name, default=RESULTS, help="directory for ruler-NAME.json")
    ruler.add_argument("--tokenizer", help="a directory or name, or bytes (default: the model's)")
    ruler.add_argument("--tasks", help="comma-separated names of the harness (default: RULER's thirteen)")
    ruler.add_argument("--methods", help="comma-separated (default: those of the published table)")
    ruler.add_argument("--limit", type=int, help="items per task (default: the harness's 500)")
    ruler.add_argument("--chunk", type=int, default=1024, help="tokens per prefill chunk (default: %(default)s)")
    ruler.add_argument("--alpha", type=float, help="FlashPrefill's (default: the published one of the model's family)")
    ruler.add_argument("--gate", type=Path, help="SeerAttention's gate weights, for the methods that need them")
    ruler.add_argument("--chat-template", action="store_true", help="put prompts into the tokenizer's chat template")
    ruler.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    ruler.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    ruler.add_argument("--resume", action="store_true", help="keep what the result in --out already has")
    ruler.add_argument("--commit", help="what to record as the commit on a machine without git")
    ruler.set_defaults(run=_ruler)


def _ruler(parsed: argparse.Namespace) -> int:
    _check_installed("ruler", "transformers", "hf")
    from benchmarks import ruler

    names = ("model", "out", "tokenizer", "limit", "chunk", "alpha", "gate", "chat_template", "device", "dtype")
    given = {name: getattr(parsed, name) for name in (*names, "resume", "commit")}
    given["lengths"] = ruler.parse_numbers(parsed.lengths)
    given["tasks"] = ruler.parse_names(parsed.tasks, None)
    given["methods"] = ruler.parse_names(parsed.methods, ruler.METHODS)
    return ruler.run(ruler.Options(**given))


def _check_installed(command: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{command}: expected {package} (extra `{extra}`: pip install '.[{extra}]'), got none")


def _join(parsed: argparse.Namespace) -> int:
    from benchmarks.fidelity.join import join

    path = join(parsed.results, parsed.out)
    print(f"{path}\nreport: python -m benchmarks report {path}")
    return 0


def _report(parsed: argparse.Namespace) -> int:
    _check_installed("report", "matplotlib", "bench")
    from benchmarks.records import sensible

    kind = _kind_of(parsed.result)
    if kind == "ttft":
        from benchmarks.ttft.report import write_report
    elif kind == "serving":
        from benchmarks.serving.report import write_report
    elif kind == "fidelity":
        from benchmarks.fidelity.report import write_report
    elif kind == "ruler":
        from benchmarks.ruler_report import write_report
    else:
        from benchmarks.report import write_report

    if parsed.tracebacks:
        _show_tracebacks()
    with sensible(str(parsed.result)):
        written = write_report(parsed.result, parsed.out)
    print("\n".join(map(str, written)))
    return 0


def _kind_of(path: Path) -> str | None:
    """What a result says it is; results of `latency` say nothing, and what is no result is left to their reader."""
    from benchmarks.files import parsed

    try:
        result = parsed(path)
    except (OSError, ValueError):
        return None
    return result.get("kind") if isinstance(result, dict) else None


def _sources(parsed: argparse.Namespace) -> int:
    from benchmarks.machine import FIDELITY_SOURCES, LATENCY_SOURCES, SERVING_SOURCES, TTFT_SOURCES, sources

    patterns = {"latency": LATENCY_SOURCES, "ttft": TTFT_SOURCES}
    patterns |= {"serving": SERVING_SOURCES, "fidelity": FIDELITY_SOURCES}
    print(sources(patterns=patterns[parsed.of]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
