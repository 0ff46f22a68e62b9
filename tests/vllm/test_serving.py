"""`python -m benchmarks serving --preset cpu` with vLLM's engine: processes, tokens, times and what was read."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; tests/vllm/run installs what these tests need")

from pathlib import Path

import vllm

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.records import read_kind
from benchmarks.serving import run
from benchmarks.testbed.model import WEIGHTS_DIRECTORY
from tests.vllm.cpu import use_cpu


@pytest.mark.skipif(
    vllm.__version__ < "0.33", reason="on the CPU it takes blocks of 128 tokens, whatever a backend prefers"
)
def test_engines_answer_and_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_cpu()
    monkeypatch.setattr(run, "check_corpus", lambda *_: None)  # another Python's library will do here
    assert (
        main(["serving", "--only", "answers-dense,answers-flashprefill,ttft-flashprefill", "--out", str(tmp_path)]) == 0
    )
    path = tmp_path / "serving-cpu.json"
    baseline, exact, sparse, timed = read_kind(path, "serving", 1)["cases"]
    for record, chunk in ((baseline, 256), (exact, 128), (sparse, 128), (timed, 128)):
        assert record["engine"]["attention"] == ["CompactAttentionImpl"]
        assert record["engine"]["arguments"]["max_num_batched_tokens"] == chunk
    assert baseline["engine"]["arguments"]["model"] == WEIGHTS_DIRECTORY.name
    assert str(machine.ROOT) not in path.read_text(), "no path of this machine"
    assert exact["rows"][0]["gate"] == exact["rows"][0]["gate"] | {"passed": True, "worst": 0.0, "rows": 10}
    assert [answer["asked"] for answer in exact["answers"]] == ["mixed"] * 4 + ["cached"] * 3 + ["cold"] * 3
    assert [answer["cached"] > 0 for answer in exact["answers"]] == [False] * 4 + [False, True, True] + [False] * 3
    spoken = {answer["question"]: answer["tokens"] for answer in exact["answers"][4:7]}
    assert {answer["question"]: answer["tokens"] for answer in exact["answers"][7:]} == spoken
    needles = [answer["score"] for answer in baseline["answers"] if answer["task"].startswith("niah")]
    assert len(needles) == 8
    assert sum(needles) / len(needles) > 0.5, "the model finds most of them"
    assert 5 < baseline["largest_logit"] < 100
    assert all(len(answer["top2"]) == len(answer["tokens"]) for answer in baseline["answers"])
    assert exact["read"] is None
    assert 0 < sparse["read"]["read"] < sparse["read"]["visible"]
    assert (sparse["read"]["prompts"], sparse["read"]["other"]) == (4, 0)
    assert [(prompt["length"], prompt["factor"] == 1) for prompt in timed["prompts"]] == [
        (256, True), (512, True), (256, False), (512, False),
    ]  # fmt: skip
    assert 1 <= len(timed["decode"]["steps_s"]) <= 10
    assert timed["checked"] == [], "no prompt is as long as those that are checked"
    for prompt in timed["prompts"]:
        assert min(prompt["seconds"]) > 0
        assert 0 < prompt["read"]["read"] <= prompt["read"]["visible"]
    shares = [prompt["read"]["read"] / prompt["read"]["visible"] for prompt in timed["prompts"]]
    assert shares[3] < 0.9 * shares[1], "scaled queries and keys leave something out"
    assert timed["prompts"][2]["factor"] in [one["factor"] for one in timed["tried"]]
    assert main(["report", str(path)]) == 0
    assert "green" in (tmp_path / "serving-cpu.md").read_text()
