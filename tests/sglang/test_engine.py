"""SGLang's engine itself, on the CPU: its scheduler, radix cache, allocator and model runner around this plugin.

The model is the test bed's. With `Dense` the engine speaks the tokens that transformers speaks; with FlashPrefill those
of transformers through `compactattn.integrations.transformers` with the same chunks. Through prefix hits, evictions,
retractions and replies to what was said, every request keeps getting what `prefill` without any kept means gives it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; tests/sglang/run installs what these tests need")

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.speaking import FLASH, SPARSE, WEIGHTS, spoken_by_transformers

ROOT = Path(__file__).parents[2]
CHUNK = 256
TEXT = (ROOT / "compactattn" / "data.py").read_bytes()


def engine_arguments(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plain = {
        "model_path": str(WEIGHTS),
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "compactattn",
        "json_model_override_args": json.dumps({"compactattn": options}),
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "page_size": 16,
        "context_length": 768,
        "chunked_prefill_size": CHUNK,
        "max_running_requests": 8,
        "max_total_tokens": 4096,
        "random_seed": 0,
        "log_level": "warning",
    }
    return plain | changes


def speak(tmp_path: Path, job: dict[str, Any], **environment: str) -> list[list[dict[str, Any]]]:
    """Run a job of `tests.sglang.speak` in a process of its own."""
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.sglang.speak", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    assert lines, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(lines[-1])


@pytest.mark.parametrize("options", [{"selector": "dense"}, FLASH], ids=["dense", "flashprefill"])
def test_the_engine_speaks_what_transformers_speaks(options: dict[str, Any], tmp_path: Path) -> None:
    ids = list(TEXT[4000:4700])  # a stretch whose next words FlashPrefill changes
    settings = SPARSE if options == FLASH else None
    turns = speak(tmp_path, {"engine": engine_arguments(options), "turns": [[ids]], "tokens": 24})
    spoken = turns[0][0]["spoken"]
    assert spoken == spoken_by_transformers(ids, 24, settings, CHUNK)
    if options == FLASH:
        assert spoken != spoken_by_transformers(ids, 24, None, CHUNK), "enough is left out to be heard"


def test_two_ranks_speak_what_transformers_speaks(tmp_path: Path) -> None:
    """Tensor parallelism, each rank in a process of its own with half of the heads."""
    ids = list(TEXT[4000:4700])
    job = {"engine": engine_arguments(FLASH, tp_size=2), "turns": [[ids]], "tokens": 24}
    turns = speak(tmp_path, job, SGLANG_CPU_OMP_THREADS_BIND="0|0", HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    assert turns[0][0]["spoken"] == spoken_by_transformers(ids, 24, SPARSE, CHUNK)


@pytest.mark.parametrize("changes", [{}, {"decode_attention_backend": "torch_native"}], ids=["both", "another-decodes"])
def test_requests_keep_what_they_get_alone_through_a_cache_that_is_too_small(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Prompts share prefixes; the cache holds a few of them, so pages are evicted, filled anew, and found again, those
    that decoding filled among them."""
    choice = random.Random(0)
    documents = [list(TEXT[start : start + 500]) for start in (0, 3000, 6000)]
    prompts = []
    for _ in range(5):
        document = choice.choice(documents)
        prompts.append(document[: choice.randint(150, 480)] + [choice.randrange(256) for _ in range(20)])
    seen_in = tmp_path / "seen"
    job = {
        "engine": engine_arguments(FLASH, max_total_tokens=800, enable_mixed_chunk=True, **changes),
        "turns": [prompts, prompts[::-1], [list(TEXT[500:800])]],
        "tokens": 24,
        "reply": list(TEXT[900:1000]),
        "watch": str(seen_in),
    }
    turns = speak(tmp_path, job, SGLANG_TEST_RETRACT="1", SGLANG_TEST_RETRACT_INTERVAL="15")
    seen = Counter(seen_in.read_text().splitlines())
    assert set(seen) <= {"dense", "sparse", "retracted"}, seen
    assert seen["sparse"]
    assert seen["dense"]
    assert seen["retracted"]
    assert max(said["cached"] for said in turns[1]) > 100
    assert turns[3][0]["cached"] >= 320, "the reply finds the pages that decoding filled"
