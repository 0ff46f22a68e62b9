"""The implementations under test behind one set of names, and `for_all`: a law as a test of each of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import compactattn
import reference
from compactattn import BlockTable, KVSummary, PagedKV, PrefillBatch, Selector
from tests.strategies import Geometry, Sizes, geometries

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Backend:
    """The six functions of SPEC section 3 and those beside them, with what this implementation can be given."""

    name: str
    device: str
    sizes: Sizes
    summarize: Callable[..., KVSummary]
    select: Callable[..., compactattn.SelectionMask]
    unite: Callable[..., compactattn.GroupMask]
    build_table: Callable[..., BlockTable]
    attend: Callable[..., Any]
    prefill: Callable[..., Any]
    select_table: Callable[..., BlockTable]
    merge_attn_states: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    count_density: Callable[..., None]
    shrink: bool = True


def compose_table(
    stages: Any,
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    selector: Selector,
    heads_per_group: int,
    query_blocks_per_span: int | None = None,
    scale: float | None = None,
    summary: KVSummary | None = None,
) -> BlockTable:
    """summarize (a given summary), select, unite and build_table one after the other."""
    if summary is not None:
        stages.summarize(kv, batch, block_size=selector.block_size, summary=summary)
    selection = stages.select(q, kv, batch, selector, scale=scale, summary=summary)
    groups = stages.unite(
        selection, batch, heads_per_group=heads_per_group, query_blocks_per_span=query_blocks_per_span
    )
    return stages.build_table(groups)


def _library(name: str, backend: str, device: str, sizes: Sizes, shrink: bool = True) -> Backend:
    names = ("summarize", "select", "unite", "build_table", "attend", "prefill", "select_table")
    names += ("merge_attn_states", "count_density")
    functions = (functools.partial(getattr(compactattn, function), backend=backend) for function in names)
    return Backend(name, device, sizes, *functions, shrink=shrink)


ALL_DIMS = (64, 64, 80, 96, 128, 192, 256)


def pin(dtype: torch.dtype, dim: int, page: int, block: int, queries: int, heads: int, group: int, layout: str) -> dict:
    """Everything that a Triton kernel is compiled for; lengths, groupings of heads and masks stay free."""
    names = ("dtype", "dim", "page_size", "block_size", "query_block", "kv_heads", "group", "layout")
    return dict(zip(names, (dtype, dim, page, block, queries, heads, group, layout), strict=True))


GPU_PINS = (
    pin(HALF, 64, 16, 64, 64, 1, 4, "NHD"),
    pin(BRAIN, 128, 16, 128, 128, 2, 4, "HND"),
    pin(BRAIN, 128, 128, 128, 128, 2, 4, "NHD"),
    pin(HALF, 128, 64, 64, 64, 1, 16, "stacked"),
    pin(BRAIN, 64, 256, 128, 64, 2, 1, "padded"),
    pin(HALF, 80, 32, 64, 128, 1, 3, "odd"),
    pin(SINGLE, 64, 16, 64, 64, 1, 5, "mixed"),
    pin(HALF, 256, 64, 256, 128, 1, 2, "NHD"),
)

REFERENCE = Backend(
    "reference",
    "cpu",
    Sizes(40, q_len=200, seq_len=1500, requests=3, heads=8, dtypes=(SINGLE, HALF, BRAIN), dims=ALL_DIMS),
    reference.summarize,
    reference.select,
    reference.unite,
    reference.build_table,
    reference.attend,
    reference.prefill,
    functools.partial(compose_table, reference),
    reference.merge_attn_states,
    reference.count_density,
)
NUMBA = _library(
    "numba",
    "numba",
    "cpu",
    Sizes(40, q_len=300, seq_len=2000, requests=4, heads=8, dtypes=(SINGLE, HALF, BRAIN), dims=ALL_DIMS),
)
# Triton 3.9 interprets bfloat16 products wrongly, so bfloat16 is left to the GPU.
INTERPRETER = _library(
    "triton-interpreter",
    "triton",
    "cpu",
    Sizes(
        7,
        q_len=140,
        seq_len=520,
        requests=2,
        heads=2,
        dtypes=(HALF, HALF, SINGLE),
        dims=(64, 64, 64, 80),
        block_sizes=(64, 64, 64, 128),
        groups=(1, 1, 2, 2, 3, 4, 5, 8, 16),
    ),
    shrink=False,
)
GPU = _library(
    "triton-gpu",
    "triton",
    "cuda",
    Sizes(24, q_len=700, seq_len=4000, requests=5, heads=16, pins=GPU_PINS),
    shrink=False,
)


def for_all(
    examples: float = 1.0, geometry: Callable[[Sizes], st.SearchStrategy[Geometry]] = geometries, **drawn: Any
) -> Callable[[Callable[..., None]], Callable[[Backend], None]]:
    """Make `test(backend, geometry, **values)` a test over random geometries of the backend's sizes.

    Each further keyword is a strategy, or a function from the geometry to one. The examples are the same on every
    run (profile "ci"); `--hypothesis-profile=explore` draws others, and more of them.
    """

    def decorate(test: Callable[..., None]) -> Callable[[Backend], None]:
        def run(backend: Backend) -> None:
            @st.composite
            def cases(draw: st.DrawFn) -> tuple[Geometry, dict[str, Any]]:
                shape = draw(geometry(backend.sizes))
                strategies = {name: s(shape) if callable(s) else s for name, s in drawn.items()}
                return shape, {name: draw(strategy) for name, strategy in strategies.items()}

            @settings(
                max_examples=max(3, round(backend.sizes.examples * examples * settings.default.max_examples / 100)),
                phases=[Phase.explicit, Phase.generate, Phase.shrink] if backend.shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                deadline=None,
            )
            @given(cases())
            def law(case: tuple[Geometry, dict[str, Any]]) -> None:
                hypothesis.note(f"geometry: {case[0]}")
                test(backend, case[0], **case[1])

            if settings.default.derandomize:
                law = hypothesis.seed(zlib.crc32(f"{test.__qualname__} {backend.name}".encode()))(law)
            law()

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorate
