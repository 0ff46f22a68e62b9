"""The test bed's recordings: they are what the model attends with, and reach is measured as stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the test bed's model is transformers' Llama")
from benchmarks.testbed import record
from benchmarks.testbed.model import new_model
from benchmarks.testbed.model import testbed_config as model_config


def test_recorded_inputs_reproduce_the_models_own_attention() -> None:
    """q, k and v as recorded, attended by hand in float64 and projected, give what the layer returns."""
    config = model_config(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16)
    model = new_model(config, seed=2).eval()
    tokens = torch.randint(0, 256, (97,), generator=torch.Generator().manual_seed(0))
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _module, _inputs, output, number=number: outputs.__setitem__(number, output[0][0])
        )
    with torch.no_grad():
        model(input_ids=tokens[None], use_cache=False)
    own = dict(outputs)
    inputs = record.attention_inputs(model, tokens)
    assert model.config._attn_implementation == "sdpa"
    assert sorted(inputs) == [0, 1, 2]
    hidden = torch.ones(97, 97).triu(1).bool()
    for number, its in inputs.items():
        assert (tuple(its.q.shape), tuple(its.k.shape)) == ((97, 4, 16), (97, 2, 16))
        k, v = (t.double().repeat_interleave(2, dim=1) for t in (its.k, its.v))
        scores = torch.einsum("thd,shd->hts", its.q.double(), k) * its.scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended = torch.einsum("hts,shd->thd", weights, v).flatten(1)
        projection = model.model.layers[number].self_attn.o_proj.weight.detach().double()
        expected = attended @ projection.T
        torch.testing.assert_close(own[number].double(), expected, rtol=1e-4, atol=1e-6)


def test_reach_agrees_with_a_plain_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(800, 4, 16, generator=generator)
    k, v = (torch.randn(800, 2, 16, generator=generator) for _ in range(2))
    reach = record.reach(record.AttentionInputs(q, k, v, 0.25))
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, dim=1)) * 0.25
    mass = scores.masked_fill(torch.ones(800, 800).triu(1).bool(), -torch.inf).softmax(-1)[:, 640:]
    far, distance, blocks = [], [], []
    for head in range(4):
        for i, row in zip(range(640, 800), mass[head].numpy(), strict=True):
            far.append(row[128 : i - 512].sum())
            distance.append((row * (i - np.arange(800))).sum())
            per_block = np.array([row[start : start + 128].sum() for start in range(0, 800, 128)])
            per_block = per_block[per_block > 0]
            blocks.append(np.exp(-(per_block * np.log(per_block)).sum()))
    assert reach.far_share == pytest.approx(np.mean(far), rel=1e-4)
    assert np.mean(reach.far_share_by_head) == pytest.approx(reach.far_share, abs=1e-4)
    assert reach.distance == pytest.approx(np.mean(distance), rel=1e-4)
    assert reach.blocks == pytest.approx(np.mean(blocks), rel=1e-4)
    with pytest.raises(ValueError, match=r"--tokens: expected more than 640 to measure reach, got 640"):
        record.reach(record.AttentionInputs(q[:640], k[:640], v[:640], 0.25))


def test_layers_are_chosen_by_reach_or_by_number() -> None:
    reaches = {n: record.Reach(share, (share,), 1.0, 1.0) for n, share in enumerate((0.3, 0.1, 0.6, 0.2))}
    assert record.contrasting_layers(reaches) == [1, 2]
    with pytest.raises(ValueError, match=r"--layers auto: expected a model of at least 2 layers, got 1"):
        record.contrasting_layers({0: reaches[0]})
    assert record.parse_layers("auto", 6) is None
    assert record.parse_layers("4,1", 6) == [1, 4]
    for words in ("6", "-1", "one", ""):
        with pytest.raises(ValueError, match=r"--layers: expected auto, or numbers from 0 to 5 as in 1,4; got"):
            record.parse_layers(words, 6)
