"""Models by their shapes: published configurations, one rank's part of them, and how many parameters that is.

Weights are random and made on the device. A rank of tensor parallelism has its part of the query heads, KV heads,
rows of the MLP (of every expert) and vocabulary, as an engine splits them, and everything else whole; nothing is
reduced over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases import Shape

#: transformers' own fused path through all experts at once: one grouped product per projection.
EXPERTS = "grouped_mm"


@dataclass(frozen=True)
class ModelShape:
    """What a decoder model is made of.

    Attributes:
        family: "llama" or "qwen3_moe": which classes of transformers.
        layers, hidden, vocab: as in its configuration.
        intermediate: rows of an MLP's gate, or of one expert's.
        q_heads, kv_heads, head_dim: as in its configuration.
        experts, experts_per_token: 0 for a dense MLP.
        rope: transformers' `rope_parameters`, as pairs.
        init: standard deviation of every random weight.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    q_heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    experts_per_token: int = 0
    rope: tuple[tuple[str, Any], ...] = (("rope_type", "default"), ("rope_theta", 500000.0))
    init: float = 0.02

    def rank(self, ranks: int) -> ModelShape:
        """One rank's part.

        Raises:
            ValueError: something that is split does not divide.
        """
        split = ("q_heads", "kv_heads", "intermediate", "vocab")
        for name in split:
            if getattr(self, name) % ranks:
                raise ValueError(f"ranks: expected a divisor of {name} {getattr(self, name)}, got {ranks}")
        return replace(self, **{name: getattr(self, name) // ranks for name in split})

    def small(self, heads: Shape) -> ModelShape:
        """Two narrow layers with other heads: the same classes, for correctness and for trying the code.

        Every expert is asked by every token, so that a result depends smoothly on rounding; weights are larger than in
        the model, so that activations have unit size and attention is not flat.
        """
        experts = min(self.experts, 4)
        return replace(
            self,
            layers=2,
            hidden=128,
            intermediate=64 if experts else 256,
            vocab=512,
            q_heads=heads.q_heads,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            experts=experts,
            experts_per_token=experts,
            init=128**-0.5,
        )

    def heads(self, batch: int) -> Shape:
        """The attention of so many requests."""
        return Shape(batch, self.q_heads, self.kv_heads, self.head_dim)

    def parameters(self) -> int:
        """All weights."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.experts else 0)
        router = self.experts * self.hidden
        mlp = 3 * self.hidden * self.intermediate * max(1, self.experts)
        return self.layers * (self._projections() + norms + router + mlp) + 2 * self.vocab * self.hidden + self.hidden

    def products(self, tokens: int, last: int) -> float:
        """FLOPs of all linear layers over `tokens` tokens, of which `last` get logits."""
        mlp = 3 * self.hidden * self.intermediate * max(1, self.experts_per_token)
        each = self.layers * (self._projections() + mlp + self.experts * self.hidden)
        return 2.0 * (tokens * each + last * self.hidden * self.vocab)

    def _projections(self) -> int:
        return 2 * self.hidden * self.head_dim * (self.q_heads + self.kv_heads)

    def config(self) -> Any:
        """The configuration as transformers has it."""
        from transformers import LlamaConfig, Qwen3MoeConfig

        shared = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 256 * 1024,
            "rope_parameters": dict(self.rope),
            "initializer_range": self.init,
            "tie_word_embeddings": False,
        }
        if self.family == "llama":
            return LlamaConfig(intermediate_size=self.intermediate, rms_norm_eps=1e-5, **shared)
        return Qwen3MoeConfig(
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rms_norm_eps=1e-6,
            **shared,
        )

    def build(
        self, attention: str, device: str | torch.device, dtype: torch.dtype, *, experts: str = EXPERTS, seed: int = 0
    ) -> torch.nn.Module:
        """The model with random weights, made on the device in `dtype`; `attention` and `experts` as transformers
        names its implementations."""
        from transformers import AutoModelForCausalLM

        how = {"experts_implementation": experts} if self.experts else {}
        devices = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype, attn_implementation=attention, **how)
        return model.eval().requires_grad_(False)


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MODELS = {
    "Llama-3.1-8B": ModelShape("llama", 32, 4096, 14336, 128256, 32, 8, 128, rope=tuple(_LLAMA_ROPE.items())),
    "Qwen3-30B-A3B": ModelShape(
        "qwen3_moe",
        48,
        2048,
        768,
        151936,
        32,
        4,
        128,
        experts=128,
        experts_per_token=8,
        rope=(("rope_type", "default"), ("rope_theta", 1000000.0)),
    ),
}
"""Shapes of the published configurations, by name."""
