"""Tensor parallelism: vLLM's engine in two worker processes, each with this plugin on its own heads.

    python -m tests.vllm.two_ranks ANSWER.json

Workers are spawned, and make themselves ready for the CPU by importing this file as their main module.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_HOST_IP"], os.environ["GLOO_SOCKET_IFNAME"] = "127.0.0.1", "lo"  # no network is needed
os.environ["VLLM_CPU_OMP_THREADS_BIND"], os.environ["OMP_NUM_THREADS"] = "nobind", "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers

from tests.vllm.cpu import use_cpu  # noqa: E402

use_cpu()

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend  # noqa: E402

register_backend(AttentionBackendEnum.CPU_ATTN, "compactattn.integrations.vllm.CompactAttentionBackend")


def heads(model: Any) -> list[tuple[str, int, int]]:
    """What attends on a rank, and with how many heads."""
    layers = [layer for layer in model.modules() if hasattr(layer, "impl")]
    return sorted({(type(layer.impl).__name__, layer.num_heads, layer.num_kv_heads) for layer in layers})


def main(answer: Path) -> None:
    """Write {"tokens": of each prompt and set of options, "heads": of each rank}."""
    from tests.speaking import FLASH
    from tests.vllm.test_engine import TEXT, engine, speak

    prompts, told = [list(TEXT[:700]), list(TEXT[1000:1500])], {}
    for name, options in (("dense", {"selector": "dense"}), ("flashprefill", FLASH)):
        with engine(options, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
            told[name] = {"tokens": [speak(llm, [ids], 24)[0][0] for ids in prompts], "heads": llm.apply_model(heads)}
    answer.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
