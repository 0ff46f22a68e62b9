"""The requests of a step on the host, those of equal lengths together, for code that may read lengths there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compactattn.data import PrefillBatch


@dataclass(frozen=True)
class Requests:
    """Requests of equal lengths.

    Attributes:
        numbers: which requests of the batch they are, ascending.
        starts: where the rows of each begin in `q`.
        q_len, past_len: of every one of them.
    """

    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    q_len: int
    past_len: int

    def index(self, device: torch.device) -> Tensor:
        """`numbers`, int64 [R]."""
        return torch.tensor(self.numbers, device=device)

    def rows(self, device: torch.device) -> Tensor:
        """Their rows in `q`, int64 [R, q_len]."""
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.q_len, device=device)

    def only(self, numbers: Sequence[int]) -> Requests:
        """Some of them."""
        starts = dict(zip(self.numbers, self.starts, strict=True))
        return replace(self, numbers=tuple(numbers), starts=tuple(starts[number] for number in numbers))

    def each(self) -> Iterator[Requests]:
        """One at a time."""
        return (self.only([number]) for number in self.numbers)


def equal_requests(batch: PrefillBatch) -> list[Requests]:
    """The requests that have queries in this step."""
    starts, seq_lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    together: dict[tuple[int, int], list[int]] = {}
    for b, seq_len in enumerate(seq_lens):
        q_len = starts[b + 1] - starts[b]
        if q_len:
            together.setdefault((q_len, seq_len - q_len), []).append(b)
    return [
        Requests(tuple(numbers), tuple(starts[b] for b in numbers), q_len, past_len)
        for (q_len, past_len), numbers in together.items()
    ]


def with_queries(batch: PrefillBatch) -> list[int]:
    """Which requests have queries in this step."""
    return [b for b, q_len in enumerate(batch.q_lens.tolist()) if q_len]
