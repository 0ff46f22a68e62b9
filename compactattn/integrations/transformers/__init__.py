"""Run Hugging Face transformers models on compactattn (extra `hf`).

    import compactattn
    from compactattn.integrations.transformers import enable

    enable(selector=compactattn.FlashPrefill(alpha=0.18), heads_per_group=4)
    model.set_attn_implementation("compactattn")  # or from_pretrained(..., attn_implementation="compactattn")
    model.generate(**inputs, prefill_chunk_size=1024)

What runs where:

- A chunk of several queries under a plain causal mask, left padding included, runs `compactattn.prefill`. Without a
  past (a first chunk, a prompt in one piece) it is dense.
- Everything else is handed to transformers' own `sdpa`, with the mask that transformers makes for it, and so is exact:
  decode steps (one query), sliding-window and chunked-attention layers, packed sequences, masks of the caller's own,
  right padding (with a warning, since such batches gain nothing here).
- Refused by name: soft-capped scores (Gemma 2), sink logits (gpt-oss), position biases, attention over blocks that
  the model itself picks, paged caches, attention weights as output, dropout, gradients, and head dimensions that
  compactattn does not have.

K and V are read where the cache holds them. They are copied, padded to whole pages, only where a page of `block_size`
tokens cannot be seen in place: the tokens in a `DynamicCache` are no whole number of pages (at most the last chunk of
a prompt if `prefill_chunk_size` is a multiple of `block_size`), a `StaticCache` for several requests has a length that
is no multiple of `block_size`, or requests are left-padded.

The key means that `FlashPrefill` selects by, the bounds of `KeyBounds` and the pooled keys of `SeerGate` are kept per
layer of a cache, extended by each chunk, and freed with the cache. They are only used while nothing else wrote to the
layer: after `crop`, `reset`, `reorder_cache` or a step of another attention implementation they are made anew.
`SeerGate` undoes RoPE by position, so it needs what `generate` gives: position ids that count from each request's first
token.

Facts about transformers (5.1 to 5.24) that this package relies on: an attention function gets K and V as
[B, Hkv, L, D] after the cache's update, not repeated over heads, and after RoPE; L is the number of tokens for a
`DynamicCache` and the capacity of a `StaticCache`; a mask function is called once per forward pass (twice with a
`StaticCache`, the second time with what it returned the first time) and whatever it returns reaches the attention
function; a 4-D mask is passed on as it is.

`attention.py` holds the settings and the attention function, `steps.py` what a forward pass is (masks, lengths, pages),
`means.py` what is kept beside a cache; `loading.py` and `recording.py` are for `compactattn capture`.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "compactattn.integrations.transformers needs transformers, the extra `hf`: pip install '.[hf]'"
    ) from error

from compactattn.integrations.transformers.attention import enable
from compactattn.integrations.transformers.steps import NAME, prompt_lens

__all__ = ["NAME", "enable", "prompt_lens"]
