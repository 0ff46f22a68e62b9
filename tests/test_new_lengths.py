"""What is compiled must follow from shapes of the model and settings, never from a length: none is a new kernel."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch

import compactattn._triton
from compactattn import Dense, FlashPrefill, KeyBounds, PagedKV, PrefillBatch, XAttention, prefill, summarize
from tests.conftest import GLUON

HEADS, KV_HEADS, DIM, PAGE_SIZE = 4, 2, 64, 64
BLOCKS = {"block_size": 64, "query_block": 64}
LENGTHS = (([70, 20], [200, 150]), ([1], [1]), ([64], [64]), ([3, 0, 130], [90, 64, 131]), ([129], [300]))


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(kernel, its constants and options) of every launch from now on; none of them runs."""
    if not compactattn._triton.INTERPRETED:
        pytest.skip("Triton does not interpret its kernels here")
    seen: set[tuple[str, str]] = set()

    def note(kernel: Any, grid: Any, *args: object, **others: Any) -> None:
        how = {name: value for name, value in others.items() if name != "device"}
        seen.add((kernel.fn.__name__, repr(how)))

    for found in pkgutil.iter_modules(compactattn._triton.__path__):
        if found.name in GLUON:
            continue
        module = importlib.import_module(f"compactattn._triton.{found.name}")
        if callable(getattr(module, "launch", None)):
            monkeypatch.setattr(module, "launch", note)
    return seen


@pytest.mark.parametrize("selector", [FlashPrefill, KeyBounds, XAttention, Dense])
@pytest.mark.parametrize(
    "grouping", [(1, 1), (2, None), (1, 3), ("auto", "auto"), ("auto", 2), (2, "auto"), ("auto", None)], ids=str
)
def test_constants_do_not_follow_lengths(constants: set[tuple[str, str]], selector: Any, grouping: Any) -> None:
    if selector in (XAttention, Dense) and "auto" in grouping:
        pytest.skip("the pick of composed stages launches nothing of its own")
    torch.manual_seed(0)
    k, v = torch.randn(2, 20, PAGE_SIZE, KV_HEADS, DIM, dtype=torch.float16)
    known = None
    for q_lens, seq_lens in LENGTHS:
        batch = PrefillBatch.from_lens(q_lens, seq_lens)
        width = -(-max(seq_lens) // PAGE_SIZE)
        kv = PagedKV(k, v, torch.arange(len(q_lens) * width, dtype=torch.int32).view(-1, width))
        q = torch.randn(sum(q_lens), HEADS, DIM, dtype=torch.float16)
        summary = summarize(kv, batch, block_size=64, bounds=selector is KeyBounds, backend="triton")
        how = {"heads_per_group": grouping[0], "query_blocks_per_span": grouping[1], "backend": "triton"}
        prefill(q, kv, batch, selector=selector(**BLOCKS), summary=summary, **how)
        if known is None:
            known = set(constants)
        assert constants == known, constants - known
