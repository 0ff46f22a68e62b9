"""Load what `compactattn capture` needs of a model: its configuration, a tokenised prompt, its weights.

A model is a directory, which is read without any network, or a name on the Hugging Face Hub. Code that comes with a
model runs only where `trust_remote_code` says so. Every failure is a ValueError of one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from compactattn.validation import fail

_LONGEST_REASON = 500  # characters: transformers lists every class that it knows


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised text.

    Attributes:
        token_ids: int64 [T].
        text: the characters of these tokens in UTF-8, or None where the tokenizer does not say which these are.
    """

    token_ids: Tensor
    text: bytes | None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing anything but errors, and progress where nobody looks at it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration.

    Raises:
        ValueError: no such model, or one that this transformers does not know.
    """
    with _blaming(name, "a model of transformers"):
        return AutoConfig.from_pretrained(name, **_where(name, trust_remote_code))


def load_prompt(
    name: str, config: Any, text: bytes, tokens: int | None, *, as_bytes: bool = False, trust_remote_code: bool = False
) -> Prompt:
    """The first `tokens` tokens of a text (None: all), with the model's own tokenizer and special tokens.

    Args:
        as_bytes: make each byte a token of that number, for models without a tokenizer.

    Raises:
        ValueError: no tokenizer, a text that is not UTF-8 or too short, or tokens that the model does not have.
    """
    if not text:
        raise fail("text", "at least one byte", "none")
    ends: list[int] | None  # of each token's characters
    if as_bytes:
        words, token_ids, ends = text.decode("latin-1"), list(text), list(range(1, len(text) + 1))
    else:
        try:
            words = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise fail("text", "UTF-8", error) from error
        with _blaming(name, "a model with a tokenizer"):
            if os.path.isdir(name) and not any(map(_is_of_tokenizer, os.listdir(name))):
                raise ValueError("no file of a tokenizer")  # transformers 5.1 would make an empty one
            tokenizer = AutoTokenizer.from_pretrained(name, **_where(name, trust_remote_code))
            found = tokenizer(words, return_offsets_mapping=tokenizer.is_fast)
        token_ids = found["input_ids"]
        ends = [end for _, end in found["offset_mapping"]] if tokenizer.is_fast else None
    if not token_ids or (tokens is not None and len(token_ids) < tokens):
        raise fail("text", f"at least {tokens or 1} tokens", len(token_ids))
    count = len(token_ids) if tokens is None else tokens
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if max(token_ids[:count]) >= vocabulary:
        raise fail("text", f"tokens below {vocabulary}, as many as the model has", max(token_ids[:count]))
    own: bytes | None = text
    if tokens is not None:
        own = None if ends is None else words[: max(ends[:count])].encode("latin-1" if as_bytes else "utf-8")
    return Prompt(torch.tensor(token_ids[:count], dtype=torch.int64), own)


def _is_of_tokenizer(file: str) -> bool:
    return file.startswith(("tokenizer", "vocab", "merges")) or file.endswith((".model", ".tiktoken", "tekken.json"))


def dtype_of(config: Any) -> torch.dtype:
    """The dtype that a model's weights are in, float32 where its configuration does not say."""
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(name: str, config: Any, device: torch.device, *, trust_remote_code: bool = False) -> Any:
    """The model, in the dtype of its weights and in evaluation mode.

    Raises:
        ValueError: no weights, weights that do not fit the configuration, a model that is no causal language model, or
            too little memory.
    """
    with _blaming(name, "a causal language model of transformers"):
        where = _where(name, trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype_of(config), **where)
        return model.to(device).eval()


def _where(name: str, trust_remote_code: bool) -> dict[str, Any]:
    return {"local_files_only": os.path.isdir(name), "trust_remote_code": trust_remote_code}


@contextmanager
def _blaming(name: str, expected: str) -> Iterator[None]:
    """Turn what transformers raises about a model into one line that names the model."""
    kinds = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError, StrictDataclassError)
    try:
        yield
    except kinds as error:
        words = " ".join(str(error).split()) or type(error).__name__
        words = words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + " …"
        raise fail(
            "model", f"{expected}, in a directory or on the Hub under this name", f"{name!r}: {words}"
        ) from error
