"""What vLLM's engine speaks under an attention backend, and how long its first token takes: one run, one line of JSON.

    python -m tests.vllm.speak --model DIR --backend TRITON_ATTN --lengths 8192,131072
    python -m tests.vllm.speak --model DIR --backend COMPACTATTN --options '{"selector": "dense"}' --lengths 8192,131072

Two runs with the same prompts should agree where the attention is exact. The prompts are random tokens from a fixed
seed. `--load-format dummy` needs a directory with a config.json alone. All but the attention runs in plain PyTorch,
under either backend, so that the Python files of a wheel, without its native code, will do.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", required=True, help="a name that --attention-backend takes")
    parser.add_argument("--options", type=json.loads, default={}, help="compactattn's settings, a JSON object")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], required=True)
    parser.add_argument("--tokens", type=int, default=32, help="to speak after each prompt")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no compilation")
    parser.add_argument("--cpu", action="store_true", help="a vLLM of tests/vllm/run, on the CPU, COMPACTATTN alone")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.cpu:
        from tests.vllm.cpu import use_cpu

        use_cpu()
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, "compactattn.integrations.vllm.CompactAttentionBackend")
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=chosen.model,
        load_format=chosen.load_format,
        skip_tokenizer_init=True,
        dtype=chosen.dtype,
        attention_backend=chosen.backend,
        additional_config={"compactattn": chosen.options} if chosen.options else {},
        max_model_len=max(chosen.lengths) + chosen.tokens,
        max_num_batched_tokens=chosen.chunk,
        enable_prefix_caching=False,
        enforce_eager=chosen.eager,
        compilation_config={"custom_ops": ["none"]},
        seed=0,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def generate(ids: list[int], tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)
        return list(outputs[0].outputs[0].token_ids)

    rows: list[dict[str, Any]] = []
    for length in chosen.lengths:
        choice = random.Random(length)
        ids = [choice.randrange(vocabulary) for _ in range(length)]
        spoken = generate(ids, chosen.tokens)  # compiles what there is to compile
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            generate(ids, 1)
            seconds.append(time.perf_counter() - start)
        rows.append({"prompt": length, "spoken": spoken, "first_token_s": sorted(seconds)})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"backend": chosen.backend, "options": chosen.options, "chunk": chosen.chunk, "device": device}
    print(json.dumps({**about, "vllm": vllm.__version__, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
