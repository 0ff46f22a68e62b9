"""The test bed's tokens as a transformers tokenizer, for programs that want text: a token is a byte of its UTF-8."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.testbed.corpus import SEPARATOR
from benchmarks.testbed.model import MAX_POSITIONS

END_TOKEN = "<|file|>"  # what stands for SEPARATOR in text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes, `SEPARATOR` is end of text and padding."""
    # tokenizers spells bytes as printable characters; the first 256 of its alphabet, in the order of the bytes
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token=END_TOKEN, model_max_length=MAX_POSITIONS
    )
    assert fast.eos_token_id == SEPARATOR
    return fast


def save_byte_tokenizer(directory: Path) -> Path:
    """Write it where `AutoTokenizer.from_pretrained` reads it; returns the directory."""
    byte_tokenizer().save_pretrained(directory)
    return directory
