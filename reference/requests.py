"""Walk over the requests of a batch, and see a request's paged cache as one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compactattn.data import PagedKV, PrefillBatch


@dataclass(frozen=True)
class Request:
    """Request `index`: its query rows are `start` to `start + q_len`, its keys 0 to `seq_len`."""

    index: int
    start: int
    q_len: int
    seq_len: int
    prompt_len: int | None

    @property
    def past_len(self) -> int:
        return self.seq_len - self.q_len

    def query_blocks(self, query_block: int) -> list[range]:
        """The chunk's queries, cut into blocks from its first query; the last may be short."""
        return [range(i, min(i + query_block, self.q_len)) for i in range(0, self.q_len, query_block)]

    def last_visible_block(self, queries: range, block_size: int) -> int:
        """w: the KV block of the query block's last row, and so the last one visible to it."""
        return (self.past_len + queries[-1]) // block_size

    def past_blocks(self, block_size: int) -> int:
        """Blocks that end at or before past_len; everything visible after them is the current region."""
        return self.past_len // block_size

    def ends_prompt(self, queries: range, positions: int) -> bool:
        """Does the query block reach into the last `positions` positions of the prompt?"""
        if self.prompt_len is None:
            return False
        return positions > 0 and self.past_len + queries[-1] >= self.prompt_len - positions


def requests(batch: PrefillBatch) -> Iterator[Request]:
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    prompts = [None] * len(seq_lens) if batch.prompt_lens is None else batch.prompt_lens.tolist()
    for b, (seq_len, prompt_len) in enumerate(zip(seq_lens, prompts, strict=True)):
        yield Request(b, starts[b], starts[b + 1] - starts[b], seq_len, prompt_len)


def tokens(name: str, kv: PagedKV, request: Request, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of kv.k or kv.v (name "k" or "v") at the given positions of a request, default all: [n, Hkv, D].

    An FP8 cache holds numbers that count in units of their head's scale: the rows are then float32.
    """
    cache, scale = getattr(kv, name), getattr(kv, f"{name}_scale")
    if positions is None:
        positions = torch.arange(request.seq_len, device=cache.device)
    page_size = cache.shape[1]
    pages = kv.page_table[request.index].long()[positions // page_size]
    rows = cache[pages, positions % page_size]
    return rows if scale is None else rows.float() * scale[:, None]
