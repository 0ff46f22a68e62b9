"""Recording a model: each layer's queries, keys and values as the model's attention gets them, or a refusal by name."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compactattn.capture import load_capture, open_capture
from compactattn.files import TensorFile
from compactattn.integrations.transformers import recording
from compactattn.integrations.transformers.recording import (
    full_attention_layers,
    planned_layout,
    record,
    rope_theta_of,
)
from tests.test_transformers import config, model, prompt

TOKENS = 77


def run_and_keep(run: Any, ids: Tensor) -> dict[int, tuple[Tensor, ...]]:
    """What each layer hands to attention under transformers' own sdpa: q, k and v, [T, H, D]."""
    kept: dict[int, tuple[Tensor, ...]] = {}

    def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        kept[module.layer_idx] = tuple(x[0].transpose(0, 1).clone() for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **others)

    AttentionInterface.register("test_keep", keep)
    AttentionMaskInterface.register("test_keep", sdpa_mask)
    run.set_attn_implementation("test_keep")
    with torch.no_grad():
        run(ids[None], use_cache=False)
    run.set_attn_implementation("sdpa")
    return kept


def recorded(run: Any, path: Path, layers: list[int], dtype: torch.dtype = torch.float32, **how: Any) -> Tensor:
    ids = prompt(1, TOKENS)[0][0]
    record(run, ids, path, planned_layout(run.config, layers, TOKENS, dtype), name="tiny", source="noise", **how)
    return ids


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3Moe", "Mistral"])
def test_what_attention_gets_is_what_the_file_holds(family: str, tmp_path: Path) -> None:
    run = model(family)
    run.set_attn_implementation("sdpa")
    ids = recorded(run, tmp_path / "a", [0, 1], text=b"text")
    assert run.config._attn_implementation == "sdpa"
    capture, kept = load_capture(tmp_path / "a"), run_and_keep(run, ids)
    for layer in capture.layers:
        for tensor, expected in zip(layer.tensors().values(), kept[layer.layer], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, capture.layers[0].tensors().values(), kept[0]))
    assert (capture.model, capture.source, capture.scale, capture.text) == ("tiny", "noise", None, b"text")
    assert capture.rope_theta == rope_theta_of(run.config) > 0
    assert capture.token_ids is not None
    assert torch.equal(capture.token_ids.long(), ids)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_dtype_of_the_file_and_another_scale(tmp_path: Path) -> None:
    run = model("Granite", attention_multiplier=0.5)
    ids = recorded(run, tmp_path / "a", [1], torch.float16)
    capture, kept = load_capture(tmp_path / "a"), run_and_keep(run, ids)
    assert capture.scale == 0.5
    assert [layer.layer for layer in capture.layers] == [1]
    for tensor, expected in zip(capture.layers[0].tensors().values(), kept[1], strict=True):
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), expected, rtol=2e-3, atol=2e-3)


def test_layers_go_to_disk_one_by_one_and_later_ones_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, events = model("Llama", num_hidden_layers=4), []
    append = TensorFile.append

    def spied(self: TensorFile, name: str, rows: Tensor) -> None:
        append(self, name, rows)
        events.append(name)

    monkeypatch.setattr(TensorFile, "append", spied)
    monkeypatch.setattr(recording, "_BYTES_AT_ONCE", 40 * 4 * 64 * 4)  # 40 tokens of four heads
    monkeypatch.setattr(run.model.layers[3], "forward", lambda *a, **k: pytest.fail("layer 3 ran"))
    monkeypatch.setattr(run.lm_head, "forward", lambda *a, **k: pytest.fail("logits were computed"))
    recorded(run, tmp_path / "a", [0, 2], on_layer=events.append)
    expected = ["layers.0.q"] * 2 + ["layers.0.k", "layers.0.v", 0, 1]
    assert events == ["token_ids", *expected, "layers.2.q", "layers.2.q", "layers.2.k", "layers.2.v", 2]
    with open_capture(tmp_path / "a") as capture:
        assert (capture.layers, capture.tokens) == ((0, 2), TOKENS)
        assert capture.layer(2).k.shape == (TOKENS, 2, 64)


def test_an_interruption_leaves_nothing_and_the_next_run_starts_afresh(tmp_path: Path) -> None:
    run = model("Llama")

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(run, tmp_path / "a", [0, 1], on_layer=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert run.config._attn_implementation != recording.CAPTURE_NAME
    (tmp_path / ".a.partial").write_bytes(b"x" * 10**6)  # of a run that was killed
    recorded(run, tmp_path / "a", [0, 1])
    again = (tmp_path / "a").read_bytes()
    recorded(run, tmp_path / "a", [0, 1])
    assert (tmp_path / "a").read_bytes() == again
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ---- what is refused ----

MIXED: dict[str, Any] = {
    "sliding_window": 70,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_hidden_layers": 3,
}


def test_layers_with_a_window_are_refused_and_not_among_all(tmp_path: Path) -> None:
    run = model.__wrapped__("Qwen3", **MIXED)
    assert full_attention_layers(run.config) == [1, 2]
    ids = recorded(run, tmp_path / "a", [1, 2])
    kept = run_and_keep(run, ids)
    for layer in load_capture(tmp_path / "a").layers:  # after a layer whose window is shorter than the prompt
        torch.testing.assert_close(layer.q, kept[layer.layer][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="layers: expected layers that attend to everything before a token, got 0, which"
    ):
        recorded(run, tmp_path / "b", [0, 1])
    with pytest.raises(ValueError, match="layers that attend to everything before a token, got 0"):
        recorded(model("Mistral", sliding_window=4096), tmp_path / "b", [0])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft-capping": ("Gemma2", {"query_pre_attn_scalar": 64}, "softcap: expected no soft-capping of scores (Gemma 2)"),
    "sinks": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux: expected no sink logits (gpt-oss)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_enable_refuses_are_refused(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        recorded(model(family, **changes), tmp_path / "a", [1])
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_dtype_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    run = copy.deepcopy(model("Llama"))
    run.model.layers[1].self_attn.v_proj.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match=r"layers\.1\.v: expected finite values in float16, got NaN or Inf"):
        recorded(run, tmp_path / "a", [0, 1], torch.float16)
    assert list(tmp_path.iterdir()) == []
    recorded(run, tmp_path / "a", [0, 1], torch.bfloat16)


def test_a_model_that_is_not_what_its_configuration_says_is_refused(tmp_path: Path) -> None:
    run, ids = model("Llama"), prompt(1, TOKENS)[0][0]
    layout = planned_layout(config("Llama", num_key_value_heads=4), [0], TOKENS, torch.float32)
    words = re.escape(
        "layers.0.k: expected shape (1, 4, 2, 64), as the configuration of the model says, got (1, 2, 2, 64)"
    )
    with pytest.raises(ValueError, match=words):
        record(run, ids, tmp_path / "a", layout, name="", source="")
    with pytest.raises(ValueError, match=r"token_ids: expected shape \(77,\), as the layout says, got \(76,\)"):
        record(run, ids[1:], tmp_path / "a", layout, name="", source="")
    assert list(tmp_path.iterdir()) == []


PLANS: dict[str, tuple[dict[str, Any], list[int], int, torch.dtype, str]] = {
    "no layer": ({}, [], 5, torch.float32, "layers: expected ascending layer numbers from 0 to 1, got []"),
    "beyond": ({}, [0, 2], 5, torch.float32, "layers: expected ascending layer numbers from 0 to 1, got [0, 2]"),
    "twice": ({}, [1, 1], 5, torch.float32, "layers: expected ascending layer numbers from 0 to 1, got [1, 1]"),
    "too long": (
        {},
        [0],
        5000,
        torch.float32,
        "tokens: expected at most the 4096 positions that the model was made for",
    ),
    "nothing": ({}, [0], 0, torch.float32, "tokens: expected an int of at least 1, got 0"),
    "dtype": ({}, [0], 5, torch.float64, "dtype: expected float16, bfloat16 or float32, got torch.float64"),
    "head dimension": ({"head_dim": 32}, [0], 5, torch.float32, "head dimension of the model: expected one of 64, 80"),
    "heads": (
        {"num_attention_heads": 48},
        [0],
        5,
        torch.float32,
        "query heads of the model: expected a multiple of its 2 KV heads, at most 16 for each, got 48",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_cannot_be_are_refused(case: str) -> None:
    changes, layers, tokens, dtype, message = PLANS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        planned_layout(config("Llama", **changes), layers, tokens, dtype)


def test_a_plan_is_the_size_of_the_file(tmp_path: Path) -> None:
    run = model("Llama")
    recorded(run, tmp_path / "a", [0, 1])
    layout = planned_layout(run.config, [0, 1], TOKENS, torch.float32)
    assert layout.nbytes() == 2 * TOKENS * (4 + 2 + 2) * 64 * 4
    assert 0 < (tmp_path / "a").stat().st_size - layout.nbytes() - 4 * TOKENS < 1500, "the header"
