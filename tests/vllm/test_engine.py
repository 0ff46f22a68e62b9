"""vLLM's engine itself, on the CPU: its scheduler, block manager and model runner around this plugin.

The model is the test bed's. With `Dense` the engine speaks the tokens that transformers speaks; with FlashPrefill those
of transformers through `compactattn.integrations.transformers` with the same chunks, and so do both on one file of
`compactattn tune`. Through prefix hits, evictions and
preemptions every request keeps getting what `prefill` without any kept means gives it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; tests/vllm/run installs what these tests need")

from tests.vllm.layers import engine_arguments  # noqa: I001

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from compactattn import PagedKV, PrefillBatch, cli, prefill
from compactattn.integrations.engine_steps import LayerPlan
from compactattn.settings import load_settings
from tests.speaking import FLASH, SPARSE, WEIGHTS, spoken_by_transformers

CHUNK = 256
TEXT = (Path(__file__).parents[2] / "compactattn" / "data.py").read_bytes()


@contextmanager
def engine(options: dict[str, Any], **changes: Any) -> Iterator[LLM]:
    """On the CPU vLLM always takes its backend CPU_ATTN, so that is the name under which the plugin's stands here."""
    register_backend(AttentionBackendEnum.CPU_ATTN, "compactattn.integrations.vllm.CompactAttentionBackend")
    try:
        with pytest.MonkeyPatch.context() as patch:
            # vLLM looks through every loaded module for Triton kernels, and takes what llvmlite has there for an object
            # with a dictionary.
            patch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)
            llm = LLM(**engine_arguments(options, max_num_batched_tokens=CHUNK, **changes))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()


def speak(llm: LLM, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[int]]:
    """(greedy tokens, tokens of the prompt found in the prefix cache) of each prompt."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


@pytest.mark.parametrize("options", [{"selector": "dense"}, FLASH], ids=["dense", "flashprefill"])
def test_the_engine_speaks_what_transformers_speaks(options: dict[str, Any]) -> None:
    ids = list(TEXT[:700])
    settings = SPARSE if options == FLASH else None
    with engine(options) as llm:
        spoken, _ = speak(llm, [ids], 24)
    assert spoken == [spoken_by_transformers(ids, 24, settings, CHUNK)]


def test_two_ranks_speak_what_transformers_speaks(tmp_path: Path) -> None:
    """Tensor parallelism, in worker processes that load the plugin by themselves: each has half of the heads."""
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", "tests.vllm.two_ranks", str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert answer.exists(), done.stderr[-3000:]
    told = json.loads(answer.read_text())
    prompts = [list(TEXT[:700]), list(TEXT[1000:1500])]
    for name, settings in (("dense", None), ("flashprefill", SPARSE)):
        assert told[name]["heads"] == [[["CompactAttentionImpl", 4, 1]]] * 2
        assert told[name]["tokens"] == [spoken_by_transformers(ids, 24, settings, CHUNK) for ids in prompts]


def test_the_engine_speaks_what_transformers_speaks_on_a_tuned_file(tmp_path: Path) -> None:
    text, captured, tuned = (str(tmp_path / name) for name in ("text", "captured", "tuned.json"))
    Path(text).write_bytes(TEXT[:900])
    capture = ["capture", "--model", str(WEIGHTS), "--bytes", "--text", text, "--out", captured, "--layers", "1,3-5"]
    assert cli.main(capture) == 0
    tune = ["tune", captured, "--out", tuned, "--coverage", "0.6", "--chunk", str(CHUNK), "--heads-per-group", "2"]
    small = ["--block-size", "64", "--query-block", "64", "--sink-blocks", "0", "--window-blocks", "0"]
    assert cli.main([*tune, *small]) == 0
    ids = list(TEXT[1000:1700])  # a stretch that the file leaves enough out of
    with engine({"settings": tuned}) as llm:
        spoken, _ = speak(llm, [ids], 24)
    assert spoken == [spoken_by_transformers(ids, 24, load_settings(tuned), CHUNK)]
    assert spoken != [spoken_by_transformers(ids, 24, None, CHUNK)], "this file leaves enough out to be heard"


@contextmanager
def watched(seen: Counter[str]) -> Iterator[None]:
    """Compare every seventh call of a layer with `prefill` of each request alone, on the same cache, no means kept."""
    run = LayerPlan.run

    def checked(self: LayerPlan, q: Any, k: Any, v: Any, step: Any, summary: Any, out: Any) -> None:
        run(self, q, k, v, step, summary, out)
        seen["calls"] += 1
        for planned in step.runs if seen["calls"] % 7 == 0 else ():
            starts, seq_lens = planned.batch.cu_seqlens_q.tolist(), planned.batch.seq_lens.tolist()
            for b, seq_len in enumerate(seq_lens):
                rows = slice(planned.rows.start + starts[b], planned.rows.start + starts[b + 1])
                kv = PagedKV(k, v, planned.page_table[b : b + 1])
                ends = [seq_len] if self.settings.ends_dense else None
                batch = PrefillBatch.from_lens([rows.stop - rows.start], [seq_len], prompt_lens=ends)
                alone = prefill(
                    q[rows], kv, batch, selector=self.selector, heads_per_group=1, query_blocks_per_span=1,
                    scale=self.scale,
                )  # fmt: skip
                assert isinstance(alone, torch.Tensor)
                torch.testing.assert_close(out[rows], alone, atol=2e-5, rtol=0)
                seen["dense" if planned.run.dense else "sparse"] += 1

    LayerPlan.run = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        LayerPlan.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "options",
    [{"selector": "dense"}, FLASH, FLASH | {"dense_last_blocks": 1}],
    ids=["dense", "flashprefill", "dense ends"],
)
def test_requests_keep_what_they_get_alone_through_a_cache_that_is_too_small(options: dict[str, Any]) -> None:
    """Prompts share prefixes; the cache holds a few of them, so pages are evicted, filled anew, and found again."""
    choice = random.Random(0)
    documents = [list(TEXT[start : start + 500]) for start in (0, 3000, 6000)]
    prompts = []
    for _ in range(6):
        document = choice.choice(documents)
        prompts.append(document[: choice.randint(150, 480)] + [choice.randrange(256) for _ in range(20)])
    seen: Counter[str] = Counter()
    with engine(options, num_gpu_blocks_override=50) as llm, watched(seen):
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*arguments: Any, **named: Any) -> Any:
            seen["preempted"] += 1
            return preempt(*arguments, **named)

        scheduler._preempt_request = counted
        first, _ = speak(llm, prompts, 28)
        again, found = speak(llm, prompts[::-1], 28)
    if options == {"selector": "dense"}:  # a selection follows the chunks, and they begin where the prefix cache ends
        assert first == again[::-1]
    assert max(found) > 100
    assert seen["preempted"]
    assert seen["dense"]
    assert bool(seen["sparse"]) == (options != {"selector": "dense"})


def test_this_is_the_vllm_that_was_asked_for() -> None:
    assert vllm.__version__.startswith(("0.31.", "0.32.", "0.33."))
