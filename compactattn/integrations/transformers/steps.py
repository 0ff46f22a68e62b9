"""What one forward pass is, as the attention function sees it: its mask, the lengths it states, K and V as pages."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from compactattn.data import PagedKV, PrefillBatch
from compactattn.validation import as_ints, check_int, fail

NAME = "compactattn"  # transformers takes names with "flash" in them for FlashAttention


def chunk_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """Say what the attention function shall do: a 2-D mask for compactattn, and what `sdpa` gets for all else.

    The 2-D mask is bool [B, tokens seen so far, this step's included], False for left padding. Older transformers
    (5.2) give positions as `cache_position`, an int64 tensor [q_length], newer ones (5.4) as `q_length` and `q_offset`.
    """
    position = others.get("cache_position")
    q_length = others["q_length"] if position is None else len(position)
    if is_plain_causal(mask_function, kv_offset, others) and q_length > 1:
        offset = int(others.get("q_offset", 0) if position is None else position[0])
        device = others.get("device", "cpu") if position is None else position.device
        seen = offset + q_length
        if attention_mask is None:
            return torch.ones((batch_size, seen), dtype=torch.bool, device=device)
        if attention_mask.shape[1] >= seen and _is_left_padded(attention_mask[:, :seen]):
            return attention_mask[:, :seen]  # a tensor of its own in every pass: `chunk_of` knows passes apart by it
        warnings.warn(
            "compactattn runs chunks of left-padded batches; this attention_mask is not one, so the step runs sdpa",
            stacklevel=2,
        )
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **others,
    )


def is_plain_causal(mask_function: Any, kv_offset: int, others: dict[str, Any]) -> bool:
    """Whether a mask function is asked for a causal mask and no more: no window, no chunks, no packed sequences."""
    return mask_function is causal_mask_function and others.get("local_size") is None and kv_offset == 0


def _is_left_padded(mask: Tensor) -> bool:
    """Whether no row of a bool mask [B, n] has padding after a token; reads the device once per forward pass."""
    return bool((mask[:, 1:] >= mask[:, :-1]).all())


@dataclass(frozen=True, eq=False)
class Chunk:
    """The lengths of one forward pass.

    Attributes:
        pads: tokens of padding at the left of each request, on the host.
        q_lens, past_lens: of each request, padding not counted.
        past, seen: tokens in the cache before and after this step, padding included.
        batch: the same for compactattn, on the device.
        rows: int64 [T], the rows of [B * q_len] that are no padding; None where all are.
    """

    pads: tuple[int, ...]
    q_lens: tuple[int, ...]
    past_lens: tuple[int, ...]
    past: int
    seen: int
    batch: PrefillBatch
    rows: Tensor | None

    def with_prompt_lens(self) -> PrefillBatch:
        """The batch with the lengths of the surrounding `prompt_lens`."""
        lengths = _prompt_lens.get()
        if lengths is None:
            raise fail("dense_last_blocks", "0, or a forward pass inside prompt_lens(...)", "no prompt lengths")
        seq_lens = [self.seen - pad for pad in self.pads]
        return PrefillBatch.from_lens(self.q_lens, seq_lens, self.batch.seq_lens.device, lengths)


_local = threading.local()


def chunk_of(mask: Tensor, q_len: int) -> Chunk:
    """The lengths that a 2-D mask states; the device is read at a forward pass's first layer only."""
    held = getattr(_local, "chunk", None)
    if held is not None and held[0]() is mask and held[1] == q_len:
        return held[2]
    seen = mask.shape[1]
    pads = tuple((~mask).sum(1).tolist())
    q_lens = tuple(min(q_len, seen - pad) for pad in pads)
    past_lens = tuple(seen - pad - n for pad, n in zip(pads, q_lens, strict=True))
    batch = PrefillBatch.from_lens(q_lens, [seen - pad for pad in pads], mask.device)
    rows = None
    if min(q_lens) < q_len:
        ends = [torch.arange((b + 1) * q_len - n, (b + 1) * q_len) for b, n in enumerate(q_lens)]
        rows = torch.cat(ends).to(mask.device)
    chunk = Chunk(pads, q_lens, past_lens, seen - q_len, seen, batch, rows)
    _local.chunk = (weakref.ref(mask), q_len, chunk)
    return chunk


def paged(key: Tensor, value: Tensor, step: Chunk, page_size: int) -> PagedKV:
    """See [B, Hkv, L, D] as pages of each request's own tokens, in place where that is possible."""
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    requests, length = keys.shape[:2]
    whole = -(-step.seen // page_size) * page_size
    if not any(step.pads) and whole <= length and (requests == 1 or length % page_size == 0):
        keys, values = keys[:, :whole], values[:, :whole]
    else:
        first = torch.tensor(step.pads, device=key.device)[:, None]
        token = (torch.arange(whole, device=key.device) + first).clamp_(max=step.seen - 1)
        request = torch.arange(requests, device=key.device)[:, None]
        keys, values = keys[request, token], values[request, token]
    return PagedKV.from_contiguous(keys, values, page_size)


_prompt_lens: ContextVar[tuple[int, ...] | None] = ContextVar("compactattn_prompt_lens", default=None)


@contextmanager
def prompt_lens(lengths: list[int] | tuple[int, ...]) -> Iterator[None]:
    """Tell selectors with `dense_last_blocks` how long each whole prompt is, padding not counted.

    A chunk does not know how much of its prompt is still to come:

        with prompt_lens([len(prompt)]):
            model.generate(prompt_ids, prefill_chunk_size=1024)

    Args:
        lengths: one per row of the batch that the model runs; beam search makes `num_beams` rows of each prompt.

    Raises:
        ValueError: a length that is no int of at least 1. A number of lengths that is not the batch's, or a length
            below the tokens seen so far at a chunk of several tokens, is refused by that forward pass.
    """
    given = as_ints("prompt_lens", lengths)
    for b, length in enumerate(given):
        check_int(f"prompt_lens[{b}]", length, 1)
    before = _prompt_lens.set(tuple(given))
    try:
        yield
    finally:
        _prompt_lens.reset(before)
