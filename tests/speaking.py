"""What transformers speaks with the test bed's model, which serving engines are held to."""

from __future__ import annotations

from pathlib import Path

import torch

from compactattn import FlashPrefill
from compactattn.integrations.transformers import enable
from compactattn.settings import Settings

WEIGHTS = Path(__file__).parents[1] / "benchmarks" / "testbed" / "weights"  # 6 layers, 8 heads over 2, D = 64
#: settings of an engine's plugin under which the model says something else than with everything read
FLASH = {
    "alpha": 0.3,
    "sink_blocks": 1,
    "window_blocks": 1,
    "block_size": 64,
    "query_block": 64,
    "dense_keys": 128,
    "dense_last_blocks": 0,
}
#: the same for transformers
SPARSE = Settings(selector=dict.fromkeys(range(6), FlashPrefill(**FLASH)), heads_per_group=1, query_blocks_per_span=1)


def spoken_by_transformers(ids: list[int], tokens: int, settings: Settings | None, chunk: int) -> list[int]:
    """So many greedy tokens after a prompt: without settings on transformers' own attention, in one piece; with them on
    compactattn, in chunks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    pieces: dict[str, int] = {}
    if settings is not None:
        enable(**settings)
        model.set_attn_implementation("compactattn")
        pieces = {"prefill_chunk_size": chunk}
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, **pieces,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()
