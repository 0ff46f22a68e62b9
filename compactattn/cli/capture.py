"""`compactattn capture`: record what the layers of a transformers model hand to attention over a text."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactattn.cli.output import UsageError, check_file_target, emit, escaped, one_line
from compactattn.cli.values import integer, number_words, numbers, size, size_words

if TYPE_CHECKING:
    import torch

    from compactattn.capture import CaptureLayout
    from compactattn.integrations.transformers.loading import Prompt

DTYPES = ("float16", "bfloat16", "float32")
_DEFAULT_SIZE = "2G"  # the inspector opens files up to 2 GiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR_OR_NAME",
        required=True,
        help="a directory, read without any network, or a name on the Hugging Face Hub",
    )
    parser.add_argument("--text", metavar="FILE", required=True, help="the prompt, in UTF-8")
    parser.add_argument(
        "--layers",
        metavar="LIST",
        default="all",
        help="such as 0,4-7, or all with full attention (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="the capture; it appears when it is complete")
    parser.add_argument("--tokens", metavar="N", help="the first N tokens of the text (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the file (default: that of the model's weights)")
    parser.add_argument(
        "--max-size", metavar="SIZE", default=_DEFAULT_SIZE, help="refuse to write more, as 500M (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: the first GPU, else cpu)")
    parser.add_argument(
        "--bytes", action="store_true", help="each byte of the text is a token, for models without a tokenizer"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(arguments: argparse.Namespace) -> int:
    """Plan from the configuration and the text, refuse what cannot be, then load the weights and record."""
    model = Path(arguments.model)
    check_file_target("--out", arguments.out, spared=[arguments.text, *(model.iterdir() if model.is_dir() else ())])
    if not arguments.model or os.path.isfile(arguments.model):
        raise UsageError(f"--model: expected a directory or a name, got {arguments.model!r}")
    limit = size("--max-size", arguments.max_size)
    text = _read(arguments.text)
    try:
        from compactattn.integrations.transformers import loading
    except ImportError as error:
        raise UsageError(f"capture: {one_line(error)}") from error
    with loading.quiet(), _naming_options(), _until_terminated():
        config = loading.load_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
        layout, prompt = _plan(arguments, config, text)
        _check_size(layout, prompt, limit, arguments.out)
        device = _device(arguments.device)
        model = loading.load_model(arguments.model, config, device, trust_remote_code=arguments.trust_remote_code)
        _record(arguments, model, layout, prompt)
    written = size_words(os.path.getsize(arguments.out))
    emit(escaped(f"{arguments.out}: {_words(layout)}; {written}"))
    return 0


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--text: expected a file that can be read, got {path!r}: {error.strerror}") from error


def _plan(arguments: argparse.Namespace, config: Any, text: bytes) -> tuple[CaptureLayout, Prompt]:
    """What the capture will hold, and the prompt, before any weights are loaded."""
    import torch

    from compactattn.integrations.transformers import loading, recording

    count = recording.layers_of(config)
    if arguments.layers == "all":
        layers = recording.full_attention_layers(config)
    else:
        layers = numbers("--layers", arguments.layers, count)
    tokens = None
    if arguments.tokens is not None:
        tokens = integer("--tokens", arguments.tokens, range(1, 2**31))
    prompt = loading.load_prompt(
        arguments.model,
        config,
        text,
        tokens,
        as_bytes=arguments.bytes,
        trust_remote_code=arguments.trust_remote_code,
    )
    dtype = loading.dtype_of(config) if arguments.dtype is None else getattr(torch, arguments.dtype)
    return recording.planned_layout(config, layers, len(prompt.token_ids), dtype), prompt


def _check_size(layout: CaptureLayout, prompt: Prompt, limit: int, out: str) -> None:
    """Refuse a file that would be longer than the limit, or than the disk has room for."""
    needed = layout.nbytes() + 4 * layout.tokens + len(prompt.text or b"")
    if needed > limit:
        raise UsageError(
            f"--max-size: expected at least {size_words(needed)} for {_words(layout)}, got {size_words(limit)}: "
            "raise it, or choose fewer --layers or --tokens"
        )
    folder = os.path.dirname(os.path.realpath(out))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(f"--out: expected {size_words(needed)} of free space in {folder!r}, got {size_words(free)}")


def _words(layout: CaptureLayout) -> str:
    dtype = str(layout.dtype).removeprefix("torch.")
    return (
        f"layers {number_words(layout.layers)}, {layout.tokens} tokens, {layout.heads} query heads over "
        f"{layout.kv_heads} KV heads of {layout.head_dim}, {dtype}"
    )


def _device(name: str | None) -> torch.device:
    import torch

    from compactattn.demo import best_device

    refusal = UsageError(f"--device: expected cpu, or a GPU of this machine such as cuda:0, got {name!r}")
    try:
        device = best_device() if name is None else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise refusal from error
    if device.type == "meta":  # tensors without data, which cannot be recorded
        raise refusal
    return device


def _record(arguments: argparse.Namespace, model: Any, layout: CaptureLayout, prompt: Prompt) -> None:
    from tqdm import tqdm

    from compactattn.integrations.transformers.recording import record

    name = os.path.basename(os.path.realpath(arguments.model)) if os.path.isdir(arguments.model) else arguments.model
    source = f"the first {layout.tokens} tokens of {os.path.basename(arguments.text)}"
    last = layout.layers[-1]
    with tqdm(total=last + 1, unit="layer", desc="recording", file=sys.stderr, disable=None) as bar:
        try:
            record(
                model,
                prompt.token_ids,
                arguments.out,
                layout,
                name=name,
                source=source,
                text=prompt.text,
                on_layer=lambda number: bar.update(number + 1 - bar.n),
            )
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; on the CPU it has no type of its own
            if "memory" not in str(error):
                raise
            raise UsageError(f"--tokens: expected a prompt that fits in memory, got {layout.tokens} tokens") from error
        except OSError as error:
            words = error.strerror or one_line(error)
            raise UsageError(f"--out: expected a file that can be written, got {arguments.out!r}: {words}") from error


@contextmanager
def _naming_options() -> Iterator[None]:
    """Refusals of the library name an argument; say which option that is."""
    options = ("layers", "tokens", "dtype", "text", "model")
    try:
        yield
    except ValueError as error:
        words = one_line(error).replace("trust_remote_code=True", "--trust-remote-code")
        argument = words.split(":")[0]
        if "finite values in float16" in words:
            words = f"--dtype: {words}: bfloat16 and float32 hold larger values than float16"
        elif argument in options:
            words = f"--{words}"
        else:
            words = f"--model: {words}"
        raise UsageError(words) from error


@contextmanager
def _until_terminated() -> Iterator[None]:
    """Leave nothing behind where the process is asked to end (SIGTERM) either."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
