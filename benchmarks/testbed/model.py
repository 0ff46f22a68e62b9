"""The test bed's network: a byte-level Llama of 7.6 million parameters, and its files.

A directory holds `config.json` and `model.safetensors` (bfloat16), as transformers' own `from_pretrained`
reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.testbed.corpus import SEPARATOR

WEIGHTS_DIRECTORY = Path(__file__).parent / "weights"
WEIGHTS_LIMIT_BYTES = 16_000_000
MODEL_NAME = "compactattn test bed (byte-level Llama, 7.6M)"
# 256 bytes, the separator, and 15 ids that no text uses yet, for tasks that the model is trained on later.
VOCABULARY = 272
# Llama 3's base: a third of the 32 frequencies turn by less than one cycle in 32K tokens, so the model
# trained at 8K can be trained on at 32K without rescaling them.
ROPE_THETA = 500_000.0
MAX_POSITIONS = 32_768


def testbed_config(**changes: Any) -> LlamaConfig:
    """The network's shape: 6 layers, 8 query heads over 2 KV heads, head dimension 64. Tests shrink it."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "bos_token_id": SEPARATOR,
        "eos_token_id": SEPARATOR,
        "use_cache": True,
    }
    return LlamaConfig(**(fields | changes))


def new_model(config: LlamaConfig, seed: int, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """A float32 model; `seed` alone decides its random weights. Attention goes through torch's SDPA."""
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.to(torch.device(device), torch.float32)  # type: ignore[arg-type]  # transformers hides Module.to's types
    return model


def save_model(model: LlamaForCausalLM, directory: Path) -> int:
    """Write weights (bfloat16) and configuration, each file whole or not at all; returns the weights' bytes.

    Raises:
        ValueError: the file would exceed `WEIGHTS_LIMIT_BYTES`; nothing is written then.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    data = save(tensors, {"format": "pt"})
    if len(data) > WEIGHTS_LIMIT_BYTES:
        raise ValueError(f"weights: expected at most {WEIGHTS_LIMIT_BYTES} bytes, got {len(data)}")
    fields = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    fields.pop("_attn_implementation", None)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())
    write_atomically(directory / "model.safetensors", data)
    return len(data)


def load_model(directory: Path, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """The model in `directory`: float32, in evaluation mode.

    Raises:
        ValueError: a file is missing or is not what `save_model` writes.
    """
    try:
        config = LlamaConfig(**json.loads((directory / "config.json").read_text()))
        tensors = load_file(directory / "model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory}: expected config.json and model.safetensors, got: {error}") from error
    model = new_model(config, 0, device)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{directory}: expected the weights that config.json describes, got: {error}") from error
    model.eval()
    return model


def file_id(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file, by which results name weights."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write_atomically(path: Path, data: bytes) -> None:
    """Write under another name beside `path`, then rename: a reader meets the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
