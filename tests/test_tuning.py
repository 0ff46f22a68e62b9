"""Tuning: the threshold that is found keeps the coverage, and no larger one does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compactattn import FlashPrefill, KeyBounds, PagedKV, PrefillBatch, build_table, select, tuning, unite
from compactattn.capture import Capture, CapturedLayer, CaptureFile, open_capture, save_capture
from compactattn.quality import coverage
from compactattn.tuning import (
    TuneSettings,
    _largest_threshold,
    _measure,
    _rounded_down,
    steps,
    threshold_name,
    tune_layer,
)

SIZES = {"sink_blocks": 1, "window_blocks": 1, "block_size": 64, "query_block": 64}
SELECTOR, BOUNDS = FlashPrefill(**SIZES), KeyBounds(**SIZES)
TOKENS, HEADS, KV_HEADS, DIM = 700, 4, 2, 64


def make_layer(number: int, seed: int, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> CapturedLayer:
    """Keys share a direction within a block, queries want some of these: masks that a selector can find."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    blocks = -(-tokens // 64)
    topics = normal(blocks, KV_HEADS, DIM)
    k = normal(tokens, KV_HEADS, DIM) + 2.0 * topics.repeat_interleave(64, 0)[:tokens]
    wishes = topics[torch.randint(0, blocks, (blocks,), generator=generator)].repeat_interleave(2, 1)
    q = 0.7 * normal(tokens, HEADS, DIM) + 0.4 * wishes.repeat_interleave(64, 0)[:tokens]
    return CapturedLayer(number, q.to(dtype), k.to(dtype), normal(tokens, KV_HEADS, DIM).to(dtype))


@contextmanager
def opened(folder: Path, *prompts: list[CapturedLayer], scale: float | None = None) -> Iterator[list[CaptureFile]]:
    with ExitStack() as stack:
        files = []
        for n, layers in enumerate(prompts):
            save_capture(folder / str(n), Capture(tuple(layers), "noise", "", 1e4, scale))
            files.append(stack.enter_context(open_capture(folder / str(n))))
        yield files


def mean_coverage(prompts: list[CapturedLayer], settings: TuneSettings, threshold: float, scale: float | None) -> float:
    """Of all queries of chunks with a past, by the library's stages over an unpermuted cache."""
    shares = []
    grouping = {n: getattr(settings, n) for n in ("heads_per_group", "query_blocks_per_span")}
    selector = replace(settings.selector, **{threshold_name(settings.selector): threshold})
    for layer in prompts:
        for start in range(settings.chunk, len(layer.q), settings.chunk):
            stop = min(start + settings.chunk, len(layer.q))
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % 64)) for x in (layer.k, layer.v))
            kv = PagedKV.from_contiguous(keys[None].float(), values[None].float(), 64)
            batch, q = PrefillBatch.from_lens([stop - start], [stop]), layer.q[start:stop].float()
            mask = select(q, kv, batch, selector, scale=scale)
            table = build_table(unite(mask, batch, **grouping))
            shares.append(coverage(q, kv, batch, table, scale=scale))
    return float(torch.cat(shares).double().mean())


@pytest.mark.parametrize(("heads", "span", "chunk"), [(1, 1, 200), (2, None, 192), (2, 2, 320), (1, 3, 256)])
@pytest.mark.parametrize("target", [0.9, 0.97])
@pytest.mark.parametrize("selector", [SELECTOR, BOUNDS], ids=["alpha", "threshold"])
def test_no_larger_threshold_keeps_the_coverage(
    selector: FlashPrefill | KeyBounds,
    heads: int,
    span: int | None,
    chunk: int,
    target: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over two prompts of different lengths: the found one does, and of a grid of larger ones none does. It is found
    by sorting: measuring takes no step back, or one for rounding."""
    measured = []
    monkeypatch.setattr(tuning, "_measure", lambda *given: measured.append(_measure(*given)) or measured[-1])
    settings = TuneSettings(selector, target, heads, span, chunk)
    prompts = [make_layer(3, 1), make_layer(3, 2, tokens=530, dtype=torch.float16)]
    calls: list[None] = []
    with opened(tmp_path, *([layer] for layer in prompts), scale=0.06) as files:
        found = tune_layer(3, files, settings, on_step=lambda: calls.append(None))
    assert len(calls) == sum(steps(len(layer.q), settings) for layer in prompts)
    assert len(measured) <= 2
    threshold = found.threshold
    assert found.selector == replace(selector, **{threshold_name(selector): threshold})
    assert 0 < threshold < 1
    kept = mean_coverage(prompts, settings, threshold, 0.06)
    assert float(found.coverage.mean.double().mean()) == pytest.approx(kept, abs=1e-6)
    assert kept >= target
    # the next larger ones, from just beyond the four digits that were rounded away
    larger = [min(1.0, threshold * factor) for factor in (1.0011, 1.01, 1.05, 1.2, 1.5, 2.0)]
    assert max(mean_coverage(prompts, settings, other, 0.06) for other in larger) < target


@pytest.mark.gpu
@pytest.mark.parametrize("selector", [SELECTOR, BOUNDS], ids=["alpha", "threshold"])
def test_a_gpu_finds_the_same_threshold(selector: FlashPrefill | KeyBounds, tmp_path: Path) -> None:
    settings = TuneSettings(selector, 0.9, 2, 2, 192)
    with opened(tmp_path, [make_layer(0, 5)], scale=0.06) as files:
        cpu, gpu = (tune_layer(0, files, settings, device=torch.device(kind)) for kind in ("cpu", "cuda"))
    assert gpu.threshold == pytest.approx(cpu.threshold, rel=2e-3)
    torch.testing.assert_close(gpu.coverage.mean, cpu.coverage.mean, rtol=1e-3, atol=1e-3)


def test_what_is_reported_is_what_the_library_does(tmp_path: Path) -> None:
    layer, settings = make_layer(0, 5), TuneSettings(SELECTOR, 0.9, 2, None, 256)
    with opened(tmp_path, [layer], scale=0.06) as files:
        found = tune_layer(0, files, settings)
        everything = tune_layer(0, files, replace(settings, coverage=0.01))
    densities = list(found.cascade.densities().values())
    assert 0 < densities[0] < densities[1] < densities[2] == densities[3] < 1
    assert found.coverage.queries == TOKENS - 256
    assert len(found.coverage.mean) == HEADS
    assert 0 < float(found.coverage.worst.min()) < 0.9
    assert 0 < int(found.coverage.below.sum()) < found.coverage.queries * HEADS
    assert everything.threshold == 1.0, "only the best block of a row, and what sink and window keep"


def test_a_step_too_far_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library measures decides, should rounding ever have moved a step."""
    settings = TuneSettings(SELECTOR, 0.9, chunk=256)
    with opened(tmp_path, [make_layer(0, 5)], scale=0.06) as files:
        right = tune_layer(0, files, settings)
        monkeypatch.setattr(tuning, "_largest_threshold", lambda *arguments: _largest_threshold(*arguments) * 1.01)
        found = tune_layer(0, files, settings)
    assert right.threshold * 0.998 < found.threshold <= right.threshold * 1.0001
    assert float(found.coverage.mean.double().mean()) >= 0.9


def test_steps_of_a_coverage_by_hand() -> None:
    """Blocks that leave at alpha 0.5, 0.25, 0.25 and 0.125 with masses 3, 1, 1, and 2."""
    ratio = torch.tensor([0.5, 0.25, 0.25, 0.125]).log()
    mass = torch.tensor([3.0, 1.0, 1.0, 2.0])
    for budget, alpha in ((0.0, 0.125), (1.9, 0.125), (2.0, 0.25), (3.9, 0.25), (4.0, 0.5), (6.9, 0.5), (7.0, 1.0)):
        assert _largest_threshold(ratio, mass, budget) == pytest.approx(alpha), budget


def test_thresholds_are_rounded_down_to_four_digits() -> None:
    for alpha, rounded in ((0.123456, 0.1234), (0.9999999, 0.9999), (1.0, 1.0), (1.0000001, 1.0), (0.0, 0.0)):
        assert _rounded_down(alpha) == rounded
    assert _rounded_down(1.23456e-30) == 1.234e-30


def test_prompts_without_a_block_to_leave_out_are_refused(tmp_path: Path) -> None:
    short = make_layer(0, 1, tokens=120)
    for chunk in (120, 64):  # no chunk with a past; a past that sink and window keep
        settings = TuneSettings(SELECTOR, 0.9, chunk=chunk)
        with (
            opened(tmp_path, [short]) as files,
            pytest.raises(ValueError, match="captures: expected prompts in which the"),
        ):
            tune_layer(0, files, settings)


def test_heads_that_the_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    message = "heads_per_group: expected a divisor of the 2 query heads per KV head, got 4"
    with opened(tmp_path, [make_layer(0, 1)]) as files, pytest.raises(ValueError, match=message):
        tune_layer(0, files, TuneSettings(SELECTOR, 0.9, heads_per_group=4))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "selector": (
        {"selector": None},
        "selector: expected a FlashPrefill or KeyBounds without dense_last_blocks, got None",
    ),
    "end of the prompt": (
        {"selector": replace(SELECTOR, dense_last_blocks=1)},
        "selector: expected a FlashPrefill or KeyBounds without dense_last_blocks",
    ),
    "coverage": ({"coverage": 1.0}, "coverage: expected a number above 0 and below 1, got 1.0"),
    "nothing": ({"coverage": 0.0}, "coverage: expected a number above 0 and below 1, got 0.0"),
    "nan": ({"coverage": float("nan")}, "coverage: expected a number above 0 and below 1, got nan"),
    "heads": ({"heads_per_group": "auto"}, "heads_per_group: expected groups that do not depend on alpha, got 'auto'"),
    "span": (
        {"selector": BOUNDS, "query_blocks_per_span": "auto"},
        "query_blocks_per_span: expected groups that do not depend on threshold, got 'auto'",
    ),
    "no span": ({"query_blocks_per_span": 0}, "query_blocks_per_span: expected an int of at least 1, got 0"),
    "chunk": ({"chunk": 0}, "chunk: expected an int of at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_cannot_be_tuned_are_refused(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TuneSettings(SELECTOR), **changes)
