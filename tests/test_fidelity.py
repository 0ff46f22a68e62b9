"""`python -m benchmarks fidelity` in small: methods inside a model, scores, probes, runs, findings, reports."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the methods run inside a transformers model")
from transformers import DynamicCache

from benchmarks import machine
from benchmarks.__main__ import RESULTS, main
from benchmarks.fidelity import answering, figure, findings, items, join, plans, probing, report, run
from benchmarks.fidelity.methods import Methods
from benchmarks.fidelity.plans import CONTROL, DENSE, NEEDLE_TASKS, QUOKA, Preset, Row, Stage
from benchmarks.testbed import corpus as corpora
from benchmarks.testbed import model as models
from benchmarks.testbed import train_gate
from benchmarks.testbed.answers import decode, prefill
from benchmarks.testbed.model import WEIGHTS_DIRECTORY
from benchmarks.testbed.tasks import ANSWER_WORDS, END, QUESTION, TASKS, Example, TaskSource
from benchmarks.testbed.train_gate import WEIGHTS_FILE as GATE_FILE
from benchmarks.testbed.training_record import write_record
from compactattn import Oracle, select
from tests.test_quality import step

CONTEXT, CHUNK = 1024, 128
ROWS = {row.name: row for row in plans.preset("h200").rows}
UNSHARED, WIDE = plans.sweep(plans.UNSHARED, "FlashPrefill", "alpha", {0.8: 1, 0.08: 1})
(PAPER,) = plans.sweep(plans.PAPER.format(4), "FlashPrefill", "alpha", {0.8: 1}, heads=4, span=None)
(CORRECTED,) = plans.sweep(f"{plans.UNSHARED} + mean correction", "FlashPrefill", "alpha", {0.5: 2}, correction=True)
GATED = next(row for row in ROWS.values() if row.selector == "SeerGate")
SWEEP = (ROWS["QUOKA: kv_ratio 0.25"], ROWS["QUOKA: kv_ratio 0.1"])
PAPERS = plans.sweep(PAPER.family, "FlashPrefill", "alpha", {0.3: 1, 0.9: 1}, heads=4, span=None)
FEW = {"alpha": 0.8, "sink_blocks": 0, "window_blocks": 1}
LIBRARY_DENSE, FULL_QUOKA = ROWS["dense through the library"], Row("all", QUOKA, "quoka", settings={"kv_ratio": 1.0})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model of sharp attention, gates for it, and a corpus."""
    directory = tmp_path_factory.mktemp("fidelity")
    config = models.testbed_config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    model = models.new_model(config, 0).eval()
    models.save_model(model, directory / "model")
    files = {
        f"{n}.py": "".join(f"def f{n}_{i}(x):\n    return x + {i}\n" for i in range(150)).encode() for n in range(60)
    }
    corpora.pack(corpora.split(files, "3"), directory / "corpus.zip")
    settings = train_gate.Settings(max_steps=1, length=512, log_every=1)
    gates = train_gate.Run(
        model, corpora.load(directory / "corpus.zip"), settings, directory / "gates", directory / "state"
    )
    gates.train()
    gates.finish()
    return directory


@pytest.fixture(scope="module")
def methods(place: Path) -> Methods:
    return Methods(models.load_model(place / "model"), place / "gates" / train_gate.WEIGHTS_FILE)


@pytest.fixture(scope="module")
def source(place: Path) -> TaskSource:
    return TaskSource(corpora.load(place / "corpus.zip"), run.TASK_SEED)


def outputs(methods: Methods, row: Row, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad(), methods.running(row):
        return answering._answer_batch(methods, row, examples, CHUNK)


# ---- methods ----


@pytest.mark.parametrize("row", [LIBRARY_DENSE, FULL_QUOKA], ids=lambda row: row.name)
def test_whatever_reads_everything_answers_as_dense(methods: Methods, source: TaskSource, row: Row) -> None:
    examples = [source.example("variable_tracking", "test", CONTEXT, n) for n in range(2)]
    expected, got = outputs(methods, ROWS[DENSE], examples), outputs(methods, row, examples)
    assert np.array_equal(expected[0], got[0])
    assert np.array_equal(expected[1], got[1])
    assert expected[0].shape == expected[1].shape == (2, 35)
    assert methods.model.config._attn_implementation == "sdpa"


def test_a_sparse_row_decodes_what_generate_decodes(methods: Methods, source: TaskSource) -> None:
    """Shared chunks, crop and the last chunk are one prompt to the library; prompt and answer in chunks likewise."""
    row = replace(PAPER, settings={"alpha": 1.0, "sink_blocks": 0, "window_blocks": 1})
    (example,) = (source.example("common_words", "test", CONTEXT, 3),)
    written, foreseen = outputs(methods, row, [example])
    dense, _ = outputs(methods, ROWS[DENSE], [example])
    prompt = torch.from_numpy(example.prompt)[None]
    with torch.no_grad(), methods.running(row):
        settings = {"max_new_tokens": len(example.target), "do_sample": False, "eos_token_id": END, "pad_token_id": END}
        expected = methods.model.generate(prompt, prefill_chunk_size=CHUNK, **settings)[0, prompt.shape[1] :]
        cache = DynamicCache(config=methods.model.config)
        logits = [
            methods.model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in torch.from_numpy(example.window)[None, :-1].split(CHUNK, dim=1)
        ]
    assert written[0, : len(expected)].tolist() == expected.tolist()
    assert written.tolist() != dense.tolist()
    assert foreseen[0].tolist() == torch.cat(logits, dim=1)[0, len(example.prompt) - 1 :].argmax(-1).tolist()


def test_every_planned_row_can_be_made_and_run(methods: Methods) -> None:
    tokens = torch.randint(0, 256, (1, 512), generator=torch.Generator().manual_seed(0))
    kinds = set()
    for row in ROWS.values():
        layers = {str(n): row.by_layer[str(n)] for n in range(methods.layers)} if row.by_layer else {}
        row = replace(row, dense_layers=min(row.dense_layers, 1), by_layer=layers)
        kind = (
            row.kind,
            row.selector,
            row.heads,
            row.span,
            row.dense_layers,
            row.correction,
            len(row.settings),
            len(layers),
        )
        if kind in kinds:
            continue
        kinds.add(kind)
        assert methods.why_not(row) is None
        with torch.no_grad(), methods.running(row), methods.prompts_of(row, 512, 1):
            cache = DynamicCache(config=methods.model.config)
            logits = prefill(methods.model, tokens, cache, CHUNK)
            assert decode(methods.model, logits, cache, 2).shape[0] == 1
    assert len(kinds) > 12


def test_rows_that_cannot_run_say_why(methods: Methods, place: Path) -> None:
    gateless = Methods(methods.model, place / "nowhere.safetensors")
    gated = next(row for row in ROWS.values() if row.selector == "SeerGate")
    assert gateless.why_not(gated) == "no gate weights: nowhere.safetensors does not exist"
    assert Methods(methods.model, None).why_not(gated) == "no gate weights"
    assert "3 heads do not divide this model's 4 query heads" in str(methods.why_not(replace(PAPER, heads=3)))
    assert "with 2 dense layers nothing is left" in str(methods.why_not(replace(PAPER, dense_layers=2)))


def test_gates_have_the_block_size_that_they_were_trained_for(methods: Methods, place: Path) -> None:
    gated = next(row for row in ROWS.values() if row.selector == "SeerGate")
    assert {gate.block_size for gate in methods.selector(gated).values()} == {64}  # type: ignore[union-attr]
    record = json.loads((place / "gates" / train_gate.RECORD_FILE).read_text())
    record["settings"]["block"] = 128
    (place / "gates" / train_gate.RECORD_FILE).write_text(json.dumps(record))
    assert {gate.query_block for gate in methods.selector(gated).values()} == {128}  # type: ignore[union-attr]
    record["settings"]["block"] = 64
    (place / "gates" / train_gate.RECORD_FILE).write_text(json.dumps(record))


def test_padding_is_refused_where_no_mask_is_read(methods: Methods) -> None:
    mask = torch.ones((1, 300), dtype=torch.long)
    mask[0, 0] = 0
    with (
        torch.no_grad(),
        methods.running(FULL_QUOKA),
        pytest.raises(ValueError, match="expected a batch without padding"),
    ):
        methods.model(input_ids=torch.zeros((1, 300), dtype=torch.long), attention_mask=mask)


def test_weights_in_bfloat16_keep_the_frequencies_of_rope(place: Path) -> None:
    model = models.load_model(place / "model")
    before = model.model.rotary_emb.inv_freq.clone()
    run.in_bfloat16(model)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


# ---- scores ----


def test_words_count_when_every_token_is_right(source: TaskSource) -> None:
    example = source.example("niah_multivalue", "test", 600, 0)
    foreseen = example.target.copy()
    assert answering.right_words(example, foreseen) == 4
    foreseen[[6, 13, 20, 27]] = 0  # spaces and END
    assert answering.right_words(example, foreseen) == 4
    foreseen[[5, 7]] = 0  # the last digit of the first word and the first of the second
    assert answering.right_words(example, foreseen) == 2


@pytest.mark.parametrize("chunk", [128, 512])
@pytest.mark.parametrize("length", [2048, 2560])
def test_hidden_needles_are_those_that_the_control_does_not_read(source: TaskSource, length: int, chunk: int) -> None:
    """Against the library's own mask of the control, for every query of the question."""
    counts = []
    for index in range(25):
        example = source.example("niah_multikey", "test", length, index)
        prompt_len = len(example.prompt)
        past = (prompt_len - 1) // chunk * chunk
        q, kv, batch = step([prompt_len - past], [prompt_len], 1, 1, page=128)
        control = Oracle(top_k=0, sink_blocks=plans.SINK_BLOCKS, window_blocks=plans.WINDOW_BLOCKS)
        mask = select(q, kv, batch, control).mask[0, 0]
        asked = (int(np.flatnonzero(example.prompt == QUESTION)[0]) - past) // 128
        read = mask[asked:].any(0).repeat_interleave(128)[:prompt_len]
        read[past:] = True
        hidden = answering.hidden_needles(example, chunk)
        if hidden:
            assert all(not read[place : place + 30].any() for place in example.needles)
        else:
            assert all(read[place : place + 38].any() for place in example.needles)
        counts.append(hidden)
    assert 3 < sum(counts) < 25


def test_bits_are_those_of_the_model_and_separators_do_not_count(methods: Methods, source: TaskSource) -> None:
    stream = source.streams["test"]
    losses = {
        row.name: answering.text_bits(methods, row, stream, 512, CHUNK, 2, 4096) for row in (ROWS[DENSE], LIBRARY_DENSE)
    }
    bits, counted = losses[DENSE]
    assert bits == pytest.approx(losses[LIBRARY_DENSE.name][0], rel=1e-4)
    windows = torch.from_numpy(answering.heldout_windows(stream, 512, 2))
    with torch.no_grad():
        logits = methods.model(input_ids=windows[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    real = windows[:, 1:] < corpora.SEPARATOR
    assert bits == pytest.approx(((nats.view(2, -1) * real).sum(1) / math.log(2)).tolist(), rel=1e-4)
    assert counted == real.sum(1).tolist()


# ---- probes ----


@pytest.fixture(scope="module")
def probed(methods: Methods, source: TaskSource) -> dict[str, dict[str, Any]]:
    windows = {"frequent_words": [source.example("frequent_words", "test", CONTEXT, 0).window]}
    rows = [LIBRARY_DENSE, ROWS[CONTROL], PAPER, replace(PAPER, name="half", dense_layers=1), FULL_QUOKA]
    rows += [replace(FULL_QUOKA, name="third", settings={"kv_ratio": 0.3})]
    rows += [replace(UNSHARED, name=f"corrected {yes}", correction=yes) for yes in (False, True)]
    return {row.name: probing.probe(methods, row, windows, CHUNK) for row in rows}


def test_probes_of_what_is_known_by_hand(probed: dict[str, dict[str, Any]]) -> None:
    for name in (LIBRARY_DENSE.name, FULL_QUOKA.name):
        found = probed[name]
        assert set(found["density"].values()) == {1.0}
        assert found["coverage"] == pytest.approx(1.0, abs=1e-4)
        assert found["output_error"] < 1e-4
    # chunks of one block: of n past blocks the control reads two at the front and three at the back
    read = sum(min(n, 5) for n in range(1, 8)) / sum(range(1, 8))
    assert set(probed[CONTROL]["density"].values()) == {round(read, 5)}
    assert 0.2 < probed[CONTROL]["coverage"] < 0.999
    third = sum(math.ceil(0.3 * 128 * n) for n in range(1, 8)) / (128 * sum(range(1, 8)))
    assert probed["third"]["density"]["mask"] == pytest.approx(third, abs=1e-5)
    assert probed["third"]["output_error"] > 0.05


def test_probes_follow_the_cascade_and_the_layers(probed: dict[str, dict[str, Any]]) -> None:
    steps = probed[PAPER.name]["density"]
    assert steps["mask"] <= steps["query_block_union"] <= steps["sub_group_union"] == steps["group_union"] < 1
    assert probed[PAPER.name]["windows"] == 1
    first, second = probed["half"]["layers"]
    assert first["density"]["sub_group_union"] == 1.0 > second["density"]["sub_group_union"]
    mean = (first["density"]["sub_group_union"] + second["density"]["sub_group_union"]) / 2
    assert probed["half"]["density"]["sub_group_union"] == pytest.approx(mean, abs=1e-5)
    plain, corrected = probed["corrected False"], probed["corrected True"]
    assert plain["layers"][0]["density"] == corrected["layers"][0]["density"]
    assert plain["layers"][0]["output_error"] != corrected["layers"][0]["output_error"]
    assert plain["layers"][0]["coverage"] == corrected["layers"][0]["coverage"]


def test_a_probe_sees_what_the_library_runs(methods: Methods, source: TaskSource) -> None:
    """The probed model goes on as the model under the integration does."""
    window = source.example("niah_single", "test", CONTEXT, 1).window
    cache = DynamicCache(config=methods.model.config)
    with torch.no_grad(), methods.running(PAPER):
        expected = prefill(methods.model, torch.from_numpy(window)[None], cache, CHUNK)
    seen: list[torch.Tensor] = []
    hook = methods.model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    probing.probe(methods, PAPER, {"niah_single": [window]}, CHUNK)
    hook.remove()
    torch.testing.assert_close(seen[-1][:, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "row",
    [PAPER, replace(PAPER, settings={**FEW, **plans.LAST_BLOCKS}), SWEEP[1]],
    ids=("paper", "end", "QUOKA"),
)
def test_each_kind_of_prompt_has_its_own_density(methods: Methods, source: TaskSource, row: Row) -> None:
    """What a kind reads is what it reads alone, and the whole is their sum; QUOKA reads its ratio of every kind."""
    windows = {kind: [source.example(kind, "test", CONTEXT, n).window for n in range(2)] for kind in NEEDLE_TASKS[:2]}
    windows[plans.TEXT] = [source.streams["test"][:CONTEXT].astype(np.int64)]
    together = probing.probe(methods, row, windows, CHUNK)
    densities = {}
    for kind, its in windows.items():
        alone = probing.probe(methods, row, {kind: its}, CHUNK)
        assert together["kinds"][kind] == alone["kinds"][kind]
        read = together["kinds"][kind]["read"]
        densities[kind] = read["sub_group_union"] / read["visible"]
        assert alone["density"]["sub_group_union"] == pytest.approx(densities[kind], abs=1e-5)
        assert together["kinds"][kind]["windows"] == len(its)
    reads = [its["read"] for its in together["kinds"].values()]
    for name in probing.STEPS:
        share = sum(read[name] for read in reads) / sum(read["visible"] for read in reads)
        assert together["density"][name] == pytest.approx(share, abs=1e-5)
    if row.kind == "quoka":
        assert list(densities.values()) == [pytest.approx(0.1, abs=2e-3)] * 3
    else:
        assert len(set(densities.values())) == 3


# ---- plans ----


def test_the_h200_plan_has_what_the_comparison_needs() -> None:
    plan = plans.preset("h200")
    names = [row.name for row in plan.rows]
    assert len(names) == len(set(names))
    assert {stage.chunk for stage in plan.stages} == {1024, 512}
    assert {stage.context for stage in plan.stages} == {4096, 8192, 16384, 32768}
    for every in (plan, plans.preset("cpu")):  # every kind of prompt has a density, on the GPU from two prompts
        assert {stage.probes for stage in every.stages} <= {0, 8 if every.device == "cpu" else 16}
    items: dict[str, int] = {}
    at: dict[tuple[str, int], int] = {}
    for stage, row in plan.cells():
        if stage.chunk == 1024:
            items[row.name] = items.get(row.name, 0) + stage.last - stage.first
            at[row.name, stage.context] = at.get((row.name, stage.context), 0) + stage.last - stage.first
    assert min(items.values()) >= 500
    for row in plan.rows:
        if row.priority == 0:
            assert at[row.name, 16384] == at[row.name, 32768] == 512
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for stage in plan.stages:
        ranges.setdefault((stage.context, stage.chunk), []).append((stage.first, stage.last))
    for spans in ranges.values():
        assert spans[0][0] == 0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    for stage, row in plan.cells():
        assert plans.planned_seconds(stage, row, plan.device, plan.tokens_at_once) < 60
    # the last stages at 32K are the longest: what they have is what the goals ask for
    last = [row for stage, row in plan.cells() if (stage.context, stage.chunk, stage.last) == (32768, 1024, 512)]
    assert [row.name for row in last if row.kind != "library"] == [DENSE, "QUOKA: kv_ratio 0.15"]
    ends_dense = {one + plans.LAST for one in (plans.SEER, plans.UNSHARED, plans.BOUNDS, plans.BY_LAYER)}
    selected = {plans.PAPER.format(4), plans.SEER, plans.BOUNDS}
    assert {row.family for row in last} == {DENSE, CONTROL, QUOKA} | selected | ends_dense
    swept = {row.family for row in plan.rows if row.parameter}
    assert swept >= {
        QUOKA,
        plans.UNSHARED,
        plans.BOUNDS,
        plans.TUNED,
        "XAttention unshared",
        "SeerAttention unshared",
        "Oracle unshared",
    }
    assert {plans.PAPER.format(heads) for heads in (1, 2, 4)} <= swept
    assert {row.dense_layers for row in plan.rows} == {0, 1, 2}
    assert any(row.settings.get("dense_last_blocks") for row in plan.rows)
    assert any(row.correction for row in plan.rows)


def test_plans_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="--preset: expected h200 or cpu, got 'tpu'"):
        plans.preset("tpu")
    with pytest.raises(ValueError, match="context: expected a multiple of the chunk"):
        Stage(1000, 256, 0, 1, 0)
    with pytest.raises(ValueError, match="items: expected a range, got 3 to 3"):
        Stage(1024, 256, 3, 3, 0)
    options = run.Options("cpu", Path())
    for changes, message in (
        ({"only": "nothing"}, "--only: expected a part of a row's name"),
        ({"contexts": "7"}, r"--contexts: expected some of \[1024\], got '7'"),
        ({"items": 0}, "--items: expected at least 1, got 0"),
        ({"tokens_at_once": 0}, "--tokens-at-once: expected at least 1, got 0"),
        ({"threads": -1}, "--threads: expected at least 1, got -1"),
        ({"gate": Path("absent")}, "--gate: expected a file of gate weights, got 'absent'"),
    ):
        with pytest.raises(ValueError, match=message):
            run.plan(replace(options, **changes))
    chosen = run.plan(run.Options("h200", Path(), only="QUOKA,dense", contexts="16384", items=200, budget_seconds=5.0))
    assert chosen.budget_seconds == 5.0
    assert [(stage.first, stage.last) for stage in chosen.stages] == [(0, 192), (192, 200), (0, 96)]
    assert {row.family.split(" ")[0] for row in chosen.rows} > {QUOKA, DENSE}


# ---- runs ----


TINY = Preset(
    "cpu",
    (Stage(512, 128, 0, 2, 1, windows=2, probes=3), Stage(512, 128, 2, 3, 0)),
    (ROWS[DENSE], ROWS[CONTROL], replace(UNSHARED, priority=0), replace(SWEEP[0], priority=1), GATED),
    600.0,
    4096,
)


@pytest.fixture(scope="module")
def result(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a few rows leaves behind; it was stopped by its budget and resumed."""
    out = tmp_path_factory.mktemp("result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "preset", lambda *_: TINY)
        patch.setattr(answering, "decode", lambda model, logits, cache, count: decode(model, logits, cache, 1))
        options = run.Options("cpu", out, weights=place / "model", corpus=place / "corpus.zip", budget_seconds=0.0)
        assert run.run(options) == 0
        assert run.run(replace(options, resume=True, budget_seconds=None)) == 0
    return out / "fidelity-cpu.json"


def test_a_run_leaves_every_cell_once(result: Path) -> None:
    found = findings.load(result)
    rows = [row.name for row in TINY.rows if row is not GATED]
    final = [row.name for row in TINY.rows if row.priority == 0]
    expected = [(name, 0) for name in rows] + [(name, 2) for name in final]  # QUOKA is no row of the second stage
    assert sorted((cell["row"], cell["first"]) for cell in found["cells"]) == sorted(expected)
    assert {cell["status"] for cell in found["cells"]} == {"ok"}
    keys = [(cell["row"], run.cell_key(cell)) for cell in found["cells"]]
    assert len(keys) == len(set(keys))
    assert list(found["absent"]) == [GATED.name]
    assert [len(one["not_run"]) for one in found["runs"]] == [len(expected), 0]
    cell = found["cells"][1]
    assert set(cell["scores"]) == set(TASKS)
    assert all(set(map(len, digits.values())) == {2} for digits in cell["scores"].values())
    assert len(cell["bits"]) == len(cell["bytes"]) == 2
    assert cell["probe"]["windows"] == 3
    assert list(cell["probe"]["kinds"]) == [plans.TEXT, "niah_single", "niah_multikey"]
    assert set(found["hidden"]["512/128"]) == {"0-2", "2-3"}
    assert found["runs"][-1]["environment"]["sources"]
    assert list(result.parent.iterdir()) == [result]


def test_probes_take_text_and_tasks_in_turn(source: TaskSource) -> None:
    stage = Stage(512, 128, 0, 3, 0, probes=10)
    windows = items.Items(source).probes(stage)
    assert {kind: len(its) for kind, its in windows.items()} == {
        plans.TEXT: 2,
        **dict.fromkeys(TASKS, 1),
        "niah_single": 2,
    }
    for kind, its in windows.items():
        assert all((QUESTION in window) == (kind != plans.TEXT) for window in its)
        assert {len(window) for window in its} == {512}
    for n in range(2):
        assert np.array_equal(windows["niah_single"][n], source.example("niah_single", "test", 512, n).window)
    alike = items.Items(source).probes(replace(stage, probes=16))
    assert {kind: len(its) for kind, its in alike.items()} == dict.fromkeys((plans.TEXT, *TASKS), 2)


def test_resuming_asks_for_the_same_sources_and_weights(
    result: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "preset", lambda *_: TINY)
    options = run.Options("cpu", tmp_path, weights=place / "model", corpus=place / "corpus.zip", resume=True)
    found = json.loads(result.read_text())
    for change, message in (
        ({"corpus": "other"}, "--resume: expected a result of corpus"),
        ({"model": {}}, "--resume: expected a result of weights"),
        ({"schema": 9}, "--resume: expected a fidelity result of schema 1"),
    ):
        (tmp_path / "fidelity-cpu.json").write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=message):
            run.run(options)


def test_another_corpus_than_the_models_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `fidelity` and by `train_gate`; a record that names none, or no record, asks for none."""
    monkeypatch.setattr(run, "preset", lambda *_: replace(TINY, budget_seconds=0.0))
    weights = tmp_path / "model"
    shutil.copytree(place / "model", weights)
    corpus = corpora.load(place / "corpus.zip")
    options = run.Options("cpu", tmp_path / "out", weights=weights, corpus=place / "corpus.zip")
    gate = ["--weights", str(weights), "--corpus", str(options.corpus), "--out", str(tmp_path / "gates")]
    gate += ["--device", "cpu", "--max-steps", "1", "--length", "512"]
    record: dict[str, Any] = {"complete": True, "steps": 1}
    for named in ({}, {"corpus": corpus.statistics()}):
        write_record(weights, record | named)
        assert run.run(options) == 0
    train_gate.main(gate)
    other = corpora.split({file.path: file.data + b"#" for file in corpus.train + corpus.heldout}, "3.99")
    write_record(weights, record | {"corpus": other.statistics()})
    message = r"--corpus: expected the text that the model in .* was trained on, \w{16} \(the library of Python 3.99"
    with pytest.raises(ValueError, match=message):
        run.run(options)
    with pytest.raises(SystemExit, match=f"train_gate: {message}"):
        train_gate.main(gate)


@pytest.fixture
def resumed(
    result: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[str], Any]]:
    """Resumes the result under another plan or other gates: what is measured then, and the result after that."""
    path, asked = tmp_path / "fidelity-cpu.json", list[str]()
    path.write_text(result.read_text())
    scores = json.loads(result.read_text())["cells"][0]["scores"]

    def measured_cell(stage: Stage, row: Row, *_: Any) -> dict[str, Any]:
        asked.append(f"{row.name} at {stage}")
        shape = {name: getattr(stage, name) for name in ("context", "chunk", "first", "last", "windows", "probes")}
        return {"row": row.name, **shape, "status": "ok", "scores": scores}

    def resume(plan: Preset = TINY, gate: Path | None = None, **others: Any) -> tuple[list[str], Any]:
        asked.clear()
        monkeypatch.setattr(run, "preset", lambda *_: plan)
        options = run.Options("cpu", tmp_path, place / "model", gate, place / "corpus.zip", resume=True, **others)
        assert run.run(options) == 0
        return list(asked), json.loads(path.read_text())

    monkeypatch.setattr(run, "measured_cell", measured_cell)
    return resume


def test_a_row_is_kept_while_it_is_the_same(resumed: Any, result: Path) -> None:
    flash = next(row for row in TINY.rows if row.selector == "FlashPrefill")
    moved = replace(flash, priority=1, family="of another name")
    fresh = replace(flash, name="a new row", settings={"alpha": 0.3}, priority=1)
    rows = tuple(moved if row is flash else row for row in TINY.rows)
    asked, found = resumed(replace(TINY, rows=(*rows, fresh)))
    assert asked == ["a new row at 512/128 items 0-2"]
    assert found["rows"][flash.name]["family"] == "of another name"
    assert len(found["cells"]) == len(json.loads(result.read_text())["cells"]) + 1
    other = replace(flash, settings={"alpha": 0.7})
    with pytest.raises(ValueError, match=r"--resume: expected '.*' to be .*0\.7.*, got .*cpu\.json with .*0\.8"):
        resumed(replace(TINY, rows=tuple(other if row is flash else row for row in TINY.rows)))
    assert resumed()[0] == []


def test_a_stage_that_asks_for_more_is_measured_again_in_place_of_the_old(resumed: Any, result: Path) -> None:
    first, second = TINY.stages
    asked, found = resumed(replace(TINY, stages=(replace(first, probes=8), second)), only=CONTROL)
    assert asked == [f"{CONTROL} at 512/128 items 0-2"]
    assert len(found["cells"]) == len(json.loads(result.read_text())["cells"])
    (cell,) = [one for one in found["cells"] if (one["row"], one["first"]) == (CONTROL, 0)]
    assert cell["probes"] == 8


def test_new_gates_measure_their_own_rows_again_and_no_others(resumed: Any, place: Path, tmp_path: Path) -> None:
    """Rows that an --only leg leaves out stay absent; without gates what was measured with some stays."""
    gated = f"{GATED.name} at 512/128 items 0-2"
    asked, found = resumed(only="QUOKA")
    assert asked == []
    assert list(found["absent"]) == [GATED.name]
    gates = place / "gates" / train_gate.WEIGHTS_FILE
    asked, found = resumed(gate=gates)
    assert asked == [gated]
    assert found["absent"] == {}
    assert resumed(gate=gates)[0] == []
    asked, without = resumed()
    assert asked == []
    assert (without["absent"], without["model"]["gate"]) == ({}, found["model"]["gate"])
    others = tmp_path / "others.safetensors"
    others.write_bytes(gates.read_bytes() + b" ")
    asked, found = resumed(gate=others)
    assert asked == [gated]
    assert found["model"]["gate"] != without["model"]["gate"]
    assert [cell["gate"] for cell in found["cells"] if "gate" in cell] == [found["model"]["gate"]]


# ---- shares, and what joins them ----


@pytest.mark.parametrize("options", [{}, {"only": "FlashPrefill,dense", "items": 200}, {"contexts": "4096"}], ids=str)
def test_shares_are_every_nth_cell_and_leave_none_out(options: dict[str, Any]) -> None:
    whole = list(run.plan(run.Options("h200", Path(), **options)).cells())
    for count in (1, 2, 3, 7, len(whole)):
        for number in range(1, count + 1):
            share = run.plan(run.Options("h200", Path(), share=f"{number}/{count}", **options))
            assert list(share.cells()) == whole[number - 1 :: count]


def test_shares_that_there_are_not_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for share in ("0/2", "3/2", "1/0", "2", "1/2/3", "-1/2", "a/b", "1/ 2", ""):
        assert main(["fidelity", "--list", f"--share={share}"]) == 2
        assert f"--share: expected I/N with I from 1 to N, such as 1/2, got {share!r}" in capsys.readouterr().err
    cells = len(list(plans.preset("cpu").cells()))
    assert main(["fidelity", "--list", f"--share={cells}/99"]) == 0
    assert main(["fidelity", "--list", f"--share={cells + 1}/99"]) == 2
    assert f"--share: expected one of at most {cells} shares" in capsys.readouterr().err


def test_the_list_is_that_of_the_share(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.name for row in plans.preset("cpu").rows]
    for number in (1, 2):
        assert main(["fidelity", "--list", "--share", f"{number}/2"]) == 0
        listed, sums = capsys.readouterr().out.split("\n\n")
        mine = rows[number - 1 :: 2]
        assert [line.split("  ")[1] for line in listed.splitlines()] == mine
        assert f" {len(mine)} rows" in sums


def test_shares_that_are_joined_are_the_whole_plan(
    result: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, and in the words of the report; the second share is stopped and goes on with its own cells."""
    monkeypatch.setattr(run, "preset", lambda *_: TINY)
    monkeypatch.setattr(answering, "decode", lambda model, logits, cache, count: decode(model, logits, cache, 1))
    options = run.Options("cpu", tmp_path / "1", weights=place / "model", corpus=place / "corpus.zip", share="1/2")
    second = replace(options, share="2/2", out=tmp_path / "2")
    assert run.run(options) == 0
    assert run.run(replace(second, budget_seconds=0.0)) == 0
    assert run.run(replace(second, resume=True)) == 0
    paths = [tmp_path / name / "fidelity-cpu.json" for name in "12"]
    planned = list(TINY.cells())
    for n, path in enumerate(paths):
        mine = [(cell["row"], cell["first"]) for cell in findings.load(path)["cells"]]
        assert mine == [(row.name, stage.first) for stage, row in planned[n::2] if row is not GATED]
    assert main(["join", *map(str, paths), "--out", str(tmp_path / "both")]) == 0
    joined = tmp_path / "both" / "fidelity-cpu.json"
    assert str(joined) in capsys.readouterr().out
    assert list(joined.parent.iterdir()) == [joined]
    whole, both = findings.load(result), findings.load(joined)
    measured = [{join.place(cell): cell | dict.fromkeys(OF_A_RUN) for cell in one["cells"]} for one in (whole, both)]
    assert measured[0] == measured[1]
    assert len(both["cells"]) == len(whole["cells"])
    assert [cell["run"] for cell in both["cells"]] == [0] * 3 + [2] * 4
    assert len(both["runs"]) == 3
    assert {name: both[name] for name in ALIKE} == {name: whole[name] for name in ALIKE}
    assert report.markdown(both, []) == report.markdown(whole, [])
    assert main(["report", str(joined)]) == 0
    first = paths[0].read_bytes()
    assert main(["join", *map(str, paths), "--out", str(tmp_path / "1")]) == 0
    assert findings.load(paths[0])["cells"] == both["cells"]
    assert paths[0].with_name("fidelity-cpu.json.before").read_bytes() == first, "a result in the way is kept"


OF_A_RUN = ("run", "seconds", "planned", "warms_up")
ALIKE = ("kind", "schema", "preset", "protocol", "model", "corpus", "rows", "hidden", "absent")


def halves(result: Path, out: Path, change: Callable[[Any], None] = lambda other: None) -> list[Path]:
    """A result's cells in turn in two results of runs of their own, the second of them changed."""
    paths = [out / name for name in ("a.json", "b.json")]
    for n, path in enumerate(paths):
        half = json.loads(result.read_text())
        for one in half["runs"]:
            one["started"] += f" {n}"
        half["cells"] = half["cells"][n::2]
        if n:
            change(half)
        path.write_text(json.dumps(half))
    return paths


def cell_of(result: Path, n: int) -> Any:
    return json.loads(result.read_text())["cells"][n]


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    name: (
        lambda other, name=name: other | {name: "x"},
        f"expected a result of {name} '.*', got .*b.json of {name} 'x'",
    )
    for name in ("preset", "corpus")
}
REFUSED |= {
    name: (lambda other, name=name: other["runs"][-1]["environment"].update({name: "x"}), f"of {name} .* of {name} 'x'")
    for name in ("sources", "gpu", "torch")
}
REFUSED |= {
    name: (lambda other, name=name: other["model"].update({name: "x"}), f"of {name} '.*', got .* of {name} 'x'")
    for name in ("weights", "dtype")
}
REFUSED |= {
    "kind": (lambda other: other | {"kind": "ttft"}, "b.json: expected a fidelity result of schema 1"),
    "schema": (lambda other: other | {"schema": 2}, "b.json: expected a fidelity result of schema 1"),
    "row": (
        lambda other: other["rows"][UNSHARED.name]["settings"].update(alpha=0.7),
        r"expected 'FlashPrefill.*0\.8'? to be .*0\.8.*, got .*b.json with .*0\.7",
    ),
    "run": (lambda other: other["cells"][1].pop("run"), r"b.json: expected cells\[1\] to have run, got none"),
    "gate": (lambda other: other["model"].pop("gate"), "b.json: expected the model to have gate, got none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_results_of_other_conditions_are_not_joined(
    result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    change, message = REFUSED[what]

    def changed(other: Any) -> None:
        other.update(change(other) if what in ("preset", "corpus", "kind", "schema") else {"then": change(other)})

    paths = halves(result, tmp_path, changed)
    with pytest.raises(ValueError, match=message):
        join.join(paths, tmp_path / "both")
    assert main(["join", *map(str, paths), "--out", str(tmp_path / "both")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "both").exists()


def of_other_sources(other: Any, shared: list[Any]) -> None:
    other["runs"][-1]["environment"] |= {"sources": "newer", "commit": "new"}
    other["cells"] += shared


def test_results_of_other_sources_that_answer_alike_are_joined(result: Path, tmp_path: Path) -> None:
    """What both have measured must be the same to the digit, and be some of a library row's; then ours stays."""
    whole = json.loads(result.read_text())
    shared = [cell for cell in whole["cells"][::2] if whole["rows"][cell["row"]]["kind"] == "library"][:1]
    again = [cell | {"seconds": 99.0} for cell in shared]
    paths = halves(result, tmp_path, lambda other: of_other_sources(other, again))
    joined = findings.load(join.join(paths, tmp_path / "both"))
    assert len(joined["cells"]) == len(whole["cells"])
    assert all(cell["seconds"] != 99.0 for cell in joined["cells"])
    old = whole["runs"][-1]["environment"]["sources"]
    label = f"{shared[0]['row']} at 512/128 items {shared[0]['first']}-{shared[0]['last']}"
    assert joined["compared"] == [{"sources": [old, "newer"], "cells": [label]}]
    assert joined["runs"][-1]["environment"]["sources"] == "newer"
    text = report.markdown(joined, [])
    assert "3 of commit new, sources newer. 1 cells were measured with both: same answers" in text
    assert "were measured with both" not in report.markdown(whole, [])
    third = halves(result, tmp_path / "both", lambda other: of_other_sources(other, []))[1]
    once_more = findings.load(join.join([tmp_path / "both" / "fidelity-cpu.json", third], tmp_path / "again"))
    assert once_more["compared"] == joined["compared"]
    dense = [cell for cell in whole["cells"][::2] if whole["rows"][cell["row"]]["kind"] == "dense"]
    alone = halves(result, tmp_path, lambda other: of_other_sources(other, dense))
    with pytest.raises(ValueError, match=r"or one that has measured cells of a library row again, got .* 'newer'"):
        join.join(alone, tmp_path)
    for name in ("scores", "bits"):
        other = json.loads(json.dumps(again))
        other[0][name] = None
        paths = halves(result, tmp_path, lambda its, other=other: of_other_sources(its, other))
        with pytest.raises(ValueError, match=f"expected the same {name} from sources .* and 'newer', got others of "):
            join.join(paths, tmp_path)


def test_what_is_measured_twice_or_alone_is_not_joined(result: Path, tmp_path: Path) -> None:
    first = cell_of(result, 0)
    for change in ({"seconds": 99.0}, {"probes": 8}):
        paths = halves(result, tmp_path, lambda other, change=change: other["cells"].append(first | change))
        again = rf"expected each cell to be measured once, got {DENSE} at 512/128 items 0-2 again in .*b\.json"
        with pytest.raises(ValueError, match=again):
            join.join(paths, tmp_path)
    with pytest.raises(ValueError, match="join: expected two results or more, got 1"):
        join.join(paths[:1], tmp_path)
    with pytest.raises(FileNotFoundError, match="got no file"):
        join.join([*paths[:1], tmp_path / "absent.json"], tmp_path)
    with pytest.raises(ValueError, match="join: expected different results, got one twice in"):
        join.join([paths[0], tmp_path / "." / paths[0].name], tmp_path)
    with pytest.raises(SystemExit):
        main(["join", *map(str, paths), "--out", ""])


def test_want_of_memory_says_nothing_of_a_row(result: Path, tmp_path: Path) -> None:
    """Where shares fill one card, its failures are cells to come; whatever else fails stays."""
    whole = json.loads(result.read_text())
    failures = ("out of memory; lower --tokens-at-once (2 GiB)", "RuntimeError: shapes")

    def failing(other: Any) -> None:
        for cell, why in zip(other["cells"], failures, strict=False):
            cell |= {"status": "failed", "reason": why}

    paths = halves(result, tmp_path, failing)
    joined = findings.load(join.join(paths, tmp_path / "both"))
    wanting, broken = whole["cells"][1], whole["cells"][3]
    assert len(joined["cells"]) == len(whole["cells"]) - 1
    assert [join.place(cell) for cell in joined["cells"] if cell["status"] == "failed"] == [join.place(broken)]
    label = f"{wanting['row']} at 512/128 items {wanting['first']}-{wanting['last']}"
    assert joined["runs"][-1]["not_run"] == [label]
    assert f"1 cells were not reached by the last run, {label} the first" in report.markdown(joined, [])
    measured = halves(result, tmp_path, lambda other: other.update(cells=[wanting]))[1]
    again = findings.load(join.join([tmp_path / "both" / "fidelity-cpu.json", measured], tmp_path / "again"))
    assert sorted(map(join.place, again["cells"])) == sorted(map(join.place, whole["cells"]))
    assert again["runs"][-1]["not_run"] == []


def test_results_that_went_on_from_one_have_its_cells_and_runs_once(result: Path, tmp_path: Path) -> None:
    whole = json.loads(result.read_text())
    paths = []
    for name, mine in (("a", 3), ("b", 4)):  # a base of three cells, and a run of its own with one more
        its = json.loads(result.read_text())
        its["runs"].append({**its["runs"][-1], "started": name})
        its["cells"] = [*its["cells"][:3], its["cells"][mine] | {"run": len(its["runs"]) - 1}]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(its))
    joined = json.loads(join.join(paths, tmp_path / "both").read_text())
    assert [one["started"] for one in joined["runs"]] == [*(one["started"] for one in whole["runs"]), "a", "b"]
    assert [join.place(cell) for cell in joined["cells"]] == [join.place(cell) for cell in whole["cells"][:5]]
    last = len(whole["runs"])
    assert [cell["run"] for cell in joined["cells"][3:]] == [last, last + 1]
    again = json.loads(join.join([paths[0], tmp_path / "both" / "fidelity-cpu.json"], tmp_path / "again").read_text())
    assert (again["cells"], again["runs"]) == (joined["cells"], joined["runs"])


def test_a_cell_that_failed_gives_way_to_one_that_did_not(result: Path, tmp_path: Path) -> None:
    good = [cell_of(result, n) for n in (0, 1)]
    bad = [{**cell, "status": "failed", "reason": "one"} for cell in good]
    halved = halves(result, tmp_path, lambda other: other["cells"].append(bad[0]))
    for paths in (halved, halved[::-1]):
        found = json.loads(join.join(paths, tmp_path / "both").read_text())["cells"]
        assert [cell["status"] for cell in found] == ["ok"] * 7
    for path, reason in zip(halved, "ab", strict=True):
        its = json.loads(path.read_text())
        its["cells"] = [bad[1] | {"reason": reason}]
        path.write_text(json.dumps(its))
    (cell,) = json.loads(join.join(halved, tmp_path / "both").read_text())["cells"]
    assert (cell["reason"], cell["run"]) == ("a", good[1]["run"])


def test_gates_and_rows_that_one_result_has_are_the_joined_ones(result: Path, tmp_path: Path) -> None:
    more = {**cell_of(result, 0), "row": GATED.name, "gate": "g"}

    def gated(other: Any, gate: str = "g") -> None:
        other["model"]["gate"] = gate
        other["absent"] = {"another": "why"}
        other["rows"]["another"] = LIBRARY_DENSE.as_json()
        other["hidden"]["512/128"] = {"0-2": {"other task": "00"}, "7-8": {}}
        other["cells"].append(more)

    paths = halves(result, tmp_path, gated)
    for its in (paths, paths[::-1]):
        found = findings.load(join.join(its, tmp_path / "both"))
        assert found["model"]["gate"] == "g"
        assert found["absent"] == {"another": "why"}
        assert found["rows"].keys() == {row.name for row in TINY.rows} | {"another"}
        assert found["hidden"]["512/128"].keys() == {"0-2", "2-3", "7-8"}
        assert found["hidden"]["512/128"]["0-2"].keys() == {*NEEDLE_TASKS, "other task"}
    halves(result, tmp_path, lambda other: gated(other, "h"))
    joined = join.join(paths, tmp_path / "both")
    third = halves(result, tmp_path, gated)[1]
    with pytest.raises(ValueError, match=r"join: expected a result of gates 'h', got .* of gates 'g'"):
        join.join([joined, third], tmp_path)


def test_what_no_last_run_has_reached_is_left(result: Path, tmp_path: Path) -> None:
    def stopped(other: Any) -> None:
        other["runs"][-1]["not_run"] = ["a row at 512/128 items 0-2", f"{DENSE} at 512/128 items 0-2"]

    for paths in (halves(result, tmp_path, stopped), halves(result, tmp_path, stopped)[::-1]):
        joined = findings.load(join.join(paths, tmp_path / "both"))
        assert joined["runs"][-1]["not_run"] == ["a row at 512/128 items 0-2"]
        assert "1 cells were not reached by the last run, a row at" in report.markdown(joined, [])


@pytest.mark.parametrize("share", [None, "1/2", "2/2"])
def test_a_joined_result_is_resumed(resumed: Any, result: Path, tmp_path: Path, share: str | None) -> None:
    """A share depends on the plan alone: it measures those of its cells that are missing, whatever is there."""
    lost = [cell_of(result, 2), cell_of(result, 4)]  # the plan's third cell, and its sixth: the gated row has none
    paths = halves(result, tmp_path)
    join.join(paths, tmp_path)
    joined = json.loads((tmp_path / "fidelity-cpu.json").read_text())
    joined["cells"] = [cell for cell in joined["cells"] if join.place(cell) not in map(join.place, lost)]
    assert len(joined["cells"]) == 5
    (tmp_path / "fidelity-cpu.json").write_text(json.dumps(joined))
    missing = {f"{cell['row']} at 512/128 items {cell['first']}-{cell['last']}" for cell in lost}
    number, count = map(int, (share or "1/1").split("/"))
    mine = [f"{row.name} at {stage}" for stage, row in TINY.cells()][number - 1 :: count]
    asked, found = resumed(share=share)
    assert asked == [name for name in mine if name in missing]
    assert len(asked) == (1 if share else 2)
    assert [cell["run"] for cell in found["cells"][5:]] == [4] * len(asked)
    assert resumed(share=share)[0] == []


def failing(monkeypatch: pytest.MonkeyPatch, row: Row, error: Exception) -> None:
    """Let one row raise, and answer all others with the right words."""

    def answer(methods: Methods, its: Row, examples: list[Example], *_: Any) -> answering.Answers:
        if its.name == row.name:
            raise error
        return answering.Answers(*["".join(str(len(example.answers)) for example in examples)] * 2)

    monkeypatch.setattr(answering, "answer", answer)
    monkeypatch.setattr(answering, "text_bits", lambda *_: ([1.0] * 2, [1] * 2))
    monkeypatch.setattr(run, "probe", lambda *_: {"density": {"sub_group_union": None}})


def failed_run(
    place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> tuple[run.Options, dict[str, Any]]:
    """The options and the result of a run in which the control raises."""
    monkeypatch.setattr(run, "preset", lambda *_: TINY)
    failing(monkeypatch, ROWS[CONTROL], error)
    options = run.Options("cpu", out, weights=place / "model", corpus=place / "corpus.zip")
    assert run.run(options) == 1
    return options, json.loads((out / "fidelity-cpu.json").read_text())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes"), KeyError("name"), torch.OutOfMemoryError("GiB " * 99)],
    ids=lambda it: type(it).__name__,
)
def test_a_row_that_fails_does_not_stop_the_others_and_is_tried_again_last(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    options, found = failed_run(place, tmp_path, monkeypatch, error)
    names = [(cell["row"], cell["first"]) for cell in found["cells"]]
    assert len(names) == len(set(names)) == 7
    bad = {(cell["row"], cell["first"]): cell["reason"] for cell in found["cells"] if cell["status"] == "failed"}
    assert list(bad) == [(CONTROL, 0), (CONTROL, 2)]
    assert all(str(error).strip("'") in why for why in bad.values())
    words = report.markdown(findings.load(tmp_path / "fidelity-cpu.json"), [])
    assert f"- {CONTROL} at context 512, chunk 128 FAILED: " in words
    assert max(len(line) for line in words.splitlines() if "FAILED" in line) < 200
    del found["cells"][0]  # dense of the first stage was lost, say
    (tmp_path / "fidelity-cpu.json").write_text(json.dumps(found))
    assert run.run(replace(options, resume=True, budget_seconds=0.0)) == 1
    later = json.loads((tmp_path / "fidelity-cpu.json").read_text())
    assert later["cells"] == found["cells"]
    expected = [f"{DENSE} at 512/128 items 0-2", f"{CONTROL} at 512/128 items 0-2", f"{CONTROL} at 512/128 items 2-3"]
    assert later["runs"][-1]["not_run"] == expected
    failing(monkeypatch, GATED, error)
    capsys.readouterr()
    assert run.run(replace(options, resume=True)) == 0
    assert "FAILED" not in capsys.readouterr().out
    cells = json.loads((tmp_path / "fidelity-cpu.json").read_text())["cells"]
    assert len(cells) == 7
    assert {cell["status"] for cell in cells} == {"ok"}


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("illegal access", 700), RuntimeError("CUDA error: an illegal memory access")],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_gpu_ends_the_run_with_what_was_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    options, found = failed_run(place, tmp_path, monkeypatch, error)
    assert [(cell["row"], cell["status"]) for cell in found["cells"]] == [(DENSE, "ok"), (CONTROL, "failed")]
    assert len(found["runs"][-1]["not_run"]) == 5
    failing(monkeypatch, GATED, error)
    assert run.run(replace(options, resume=True)) == 0
    assert [cell["row"] for cell in json.loads((tmp_path / "fidelity-cpu.json").read_text())["cells"]][-1] == CONTROL


def test_an_error_that_the_gpu_does_not_survive_is_known_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not run.is_device_lost(RuntimeError("Triton Error [CUDA]: invalid argument"), "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert run.is_device_lost(RuntimeError("Triton Error [CUDA]: unspecified launch failure"), "cuda")
    assert not run.is_device_lost(RuntimeError("shapes"), "cpu")


def test_the_pace_is_that_of_cells_which_compile_nothing(
    resumed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every first cell of a selector takes 10 times as long as planned, the others take twice as long."""
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    kernels: set[tuple[object, ...]] = set()
    really = run.measured_cell

    def measured_cell(stage: Stage, row: Row, chosen: Preset, *others: Any) -> dict[str, Any]:
        planned = plans.planned_seconds(stage, row, chosen.device, chosen.tokens_at_once)
        now[0] += planned * (2 if run.kernels_of(row) in kernels else 10)
        kernels.add(run.kernels_of(row))
        return really(stage, row, chosen, *others)

    monkeypatch.setattr(run, "measured_cell", measured_cell)
    many = tuple(replace(UNSHARED, name=f"{n}", settings={"alpha": n / 9}) for n in range(4))
    rows = (ROWS[DENSE], ROWS[CONTROL], SWEEP[0], *many, LIBRARY_DENSE)
    stage = Stage(512, 128, 10, 12, 2)
    dense, *rest = (plans.planned_seconds(stage, row, "cpu", TINY.tokens_at_once) for row in rows)
    last = rest[-1]
    # before the last cell: what was spent, and what is planned for it at twice the plan
    budget = 10 * (dense + sum(rest[:3])) + 2 * sum(rest[3:-1]) + 2 * last
    plan = replace(TINY, rows=rows, stages=(stage,), budget_seconds=budget + 1e-6)
    asked, found = resumed(plan)
    assert len(asked) == len(rows)
    mine = [cell for cell in found["cells"] if cell["first"] == 10]
    assert [cell["warms_up"] for cell in mine] == [True] * 4 + [False] * 3 + [True]
    assert run.pace(mine) == pytest.approx(2.0, rel=0.01)
    assert run.pace(mine[:4]) is None
    assert plans.preset("h200").budget_seconds <= 480


def test_sources_are_what_decides_the_numbers(tmp_path: Path) -> None:
    files = {file.relative_to(machine.ROOT).as_posix() for file in machine.ROOT.glob("*/**/*.py")}
    decisive = {
        "compactattn/_triton/union.py": True,
        "compactattn/quality.py": True,
        "compactattn/cli/demo.py": False,
        **{f"benchmarks/fidelity/{name}.py": True for name in ("answering", "items", "methods", "probing", "run")},
        **{f"benchmarks/fidelity/{name}.py": False for name in ("findings", "figure", "join", "plans", "report")},
        **{f"benchmarks/testbed/{name}.py": True for name in ("answers", "corpus", "evaluate", "model", "tasks")},
        **{f"benchmarks/testbed/{name}.py": False for name in ("train_gate", "intervals")},
    }
    assert decisive.keys() <= files
    for name in decisive:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    for name, decides in decisive.items():
        before = machine.sources(tmp_path, machine.FIDELITY_SOURCES)
        (tmp_path / name).write_text("after")
        assert (machine.sources(tmp_path, machine.FIDELITY_SOURCES) != before) == decides, name


def test_the_command_lists_and_reports(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", "--preset", "h200", "--list", "--only", "QUOKA"]) == 0
    printed = capsys.readouterr().out
    assert "16384/1024 items 192-512" in printed
    assert "by planning figures, nothing is measured yet" in printed
    assert main(["report", str(result), "--out", str(tmp_path)]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == ["fidelity-cpu.md", "fidelity-cpu.png", "fidelity-cpu-bits.png"]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names[1:])
    words = (tmp_path / names[0]).read_text()
    for expected in ("too few items hide all their needles", "Every row", "| dense |", "did not run: no gate weights"):
        assert expected in words
    assert report.markdown(findings.load(result), names[1:]) == words
    assert main(["fidelity", "--preset", "x"]) == 2
    assert main(["sources", "--of", "fidelity"]) == 0


# ---- findings, on results made by hand ----


def made(rows: dict[str, tuple[Row, float, float]], *, items: int = 40, words: dict[str, float] | None = None) -> Any:
    """A result at 16384/1024: {name: (row, density, share of right items)}; every needle is hidden."""
    cells = []
    for name, (_, density, share) in rows.items():
        scores = {}
        for task in TASKS:
            right = (words or {}).get(task, share) if name == CONTROL else share
            digits = "".join(str(ANSWER_WORDS[task] if n < right * items else 0) for n in range(items))
            scores[task] = {"greedy": digits, "in_chunk": digits}
        cell = {
            "row": name,
            "context": 16384,
            "chunk": 1024,
            "first": 0,
            "last": items,
            "status": "ok",
            "scores": scores,
        }
        cell |= {"bits": [100.0 * (2 - share)] * 4, "bytes": [100] * 4}
        read = {**dict.fromkeys(probing.STEPS, round(10000 * density)), "visible": 10000}
        kinds = {kind: {"windows": 2, "read": dict(read)} for kind in (plans.TEXT, *TASKS)}
        steps = dict.fromkeys(probing.STEPS, density)
        cell["probe"] = {
            "kinds": kinds,
            "density": steps,
            "coverage": share,
            "worst_coverage": 0,
            "below_0.9": 0,
            "output_error": 0,
        }
        cells.append(cell)
    hidden = {"16384/1024": {f"0-{items}": {task: str(ANSWER_WORDS[task]) * items for task in NEEDLE_TASKS}}}
    return {
        "rows": {row.name: row.as_json() for row, _, _ in rows.values()},
        "cells": cells,
        "hidden": hidden,
        "preset": "h200",
        "protocol": [],
        "model": {"weights": "w", "gate": None, "parameters": 1, "dtype": "bfloat16"},
        "corpus": "c",
        "absent": {},
        "runs": [{"environment": {"gpu": "GPU", "torch": "2", "compactattn": "0"}, "not_run": []}],
    }


def lineup(dense: float = 1.0, control: float = 0.0) -> dict[str, tuple[Row, float, float]]:
    quoka = {n: ROWS[f"QUOKA: kv_ratio {n:g}"] for n in (0.25, 0.1)}
    rows = ((ROWS[DENSE], 1.0, dense), (ROWS[CONTROL], 0.05, control), (quoka[0.25], 0.25, 0.6), (quoka[0.1], 0.1, 0.2))
    rows += ((WIDE, 0.3, 1.0), (UNSHARED, 0.1, 0.8))
    return {row.name: (row, density, share) for row, density, share in rows}


def test_the_control_decides_whether_a_task_measures() -> None:
    found = made(lineup(), words={"niah_multivalue": 0.75, "niah_single": 0.4})
    verdicts = {task: findings.judge(found, 16384, 1024, task) for task in NEEDLE_TASKS}
    assert {task: verdict.measures for task, verdict in verdicts.items() if verdict} == {
        "niah_single": False,  # 0.4 is under a half, but its interval is not
        "niah_multikey": True,
        "niah_multivalue": False,
        "niah_multiquery": True,
        "variable_tracking": True,
    }
    words = report.markdown(found, [])
    assert words.count("MEASURES NOTHING: the control does not fail") == 4
    assert "these tasks measure nothing" not in words
    nothing = report.markdown(made(lineup(control=1.0)), [])
    assert "**The control fails on no task as it must: these tasks measure nothing on this model.**" in nothing
    unsolved = findings.judge(made(lineup(dense=0.4)), 16384, 1024, "niah_single")
    assert unsolved
    assert unsolved.words == "measures nothing: the model does not solve it with dense attention"
    few = findings.judge(made(lineup(), items=19), 16384, 1024, "niah_single")
    assert few
    assert (few.items, few.measures) == (19, False)
    rows = lineup()
    del rows[CONTROL]
    assert "**nothing below is known to measure a selection.**" in report.markdown(made(rows), [])


def test_items_that_the_control_can_see_do_not_count() -> None:
    found = made(lineup(), words={"niah_multikey": 0.5})
    hidden = found["hidden"]["16384/1024"]["0-40"]
    hidden["niah_multikey"] = "0" * 20 + "1" * 20  # the control is right on the first half alone
    verdict = findings.judge(found, 16384, 1024, "niah_multikey")
    assert verdict
    assert (verdict.items, verdict.control, verdict.dense, verdict.measures) == (20, 0.0, 1.0, True)
    hidden["variable_tracking"] = "4" * 40  # one of five lines can be seen
    partial = findings.judge(found, 16384, 1024, "variable_tracking")
    assert partial
    assert partial.items == 0


def test_equal_density_is_between_the_neighbours_of_a_sweep() -> None:
    found = findings.points(made(lineup()), 16384, 1024)
    sweeps = findings.families(found, NEEDLE_TASKS)
    middle = findings.at_density(sweeps[plans.UNSHARED], 0.2, NEEDLE_TASKS)
    assert middle
    assert middle.mean(NEEDLE_TASKS) == pytest.approx(0.9)
    assert middle.bits_per_byte == pytest.approx(1.1)
    assert middle.density(NEEDLE_TASKS) == pytest.approx(0.2)
    assert findings.at_density(sweeps[plans.UNSHARED], 0.1, NEEDLE_TASKS) is found[UNSHARED.name]
    assert findings.at_density(sweeps[plans.UNSHARED], 0.35, NEEDLE_TASKS) is None
    assert findings.at_density(sweeps[plans.UNSHARED], 0.09, NEEDLE_TASKS) is None
    gap = findings.difference(middle, found[DENSE], NEEDLE_TASKS)
    assert gap
    assert gap.points == pytest.approx(-10)
    assert gap.low < -10 < gap.high
    assert gap.items == 5 * 40


def reading(result: Any, name: str, **densities: float) -> None:
    """Let a row read other shares of some kinds of prompt."""
    for kind, density in densities.items():
        for cell in result["cells"]:
            if cell["row"] == name:
                read = cell["probe"]["kinds"][kind]["read"]
                read |= dict.fromkeys(probing.STEPS, round(density * read["visible"]))


def test_equal_density_is_that_on_the_prompts_that_are_compared() -> None:
    """The mean over all prompts stays 0.1 and 0.3 in the record; of these tasks and of text rows read other shares."""
    result = made(lineup())
    for task in report.QUOKA_TASKS:
        reading(result, UNSHARED.name, **{task: 0.2})
        reading(result, WIDE.name, **{task: 0.4})
    reading(result, UNSHARED.name, text=0.01)
    reading(result, WIDE.name, text=0.05)
    found = findings.points(result, 16384, 1024)
    level = {
        kinds: findings.at_density(findings.families(found, kinds)[plans.UNSHARED], density, kinds)
        for kinds, density in ((report.QUOKA_TASKS, 0.3), (("niah_single",), 0.3), ((plans.TEXT,), 0.04))
    }
    assert level[report.QUOKA_TASKS].mean(TASKS) == pytest.approx(0.9)  # type: ignore[union-attr]
    assert level["niah_single",] is found[WIDE.name]
    assert level[plans.TEXT,].bits_per_byte == pytest.approx(1.2 - 0.75 * 0.2)  # type: ignore[union-attr]
    assert found[UNSHARED.name].density(NEEDLE_TASKS) == pytest.approx((3 * 0.1 + 2 * 0.2) / 5)
    words = report.markdown(result, [])
    goals = [line for line in words.splitlines() if line.startswith("| 16K")]
    assert f"best row at density on text ≤ 0.15 ({WIDE.name}, density 0.050)" in goals[2]
    assert not any("QUOKA: kv_ratio 0.1," in line for line in goals)  # 0.1 lies outside of the sweep on these tasks
    assert any(f"{plans.UNSHARED} less QUOKA: kv_ratio 0.25, both at density 0.250" in line for line in goals)
    table = words.split("| bits per byte ÷ dense |")[1].split("\n\n")[0]
    assert f"| {plans.UNSHARED} | 1.0000 (1.0000 to 1.0000) | - | - | - |" in table
    assert "| QUOKA | - | 1.8000 (1.8000 to 1.8000) | 1.6667" in table
    del result["cells"][-1]["probe"]["kinds"]["niah_multikey"]
    unknown = findings.points(result, 16384, 1024)[result["cells"][-1]["row"]]
    assert math.isnan(unknown.density(NEEDLE_TASKS))
    assert not math.isnan(unknown.density(["niah_single"]))
    assert unknown not in findings.families({"it": unknown}, NEEDLE_TASKS).values()


def test_differences_are_paired_and_over_common_items_alone() -> None:
    rows = lineup()
    found = made(rows)
    cut(found, "QUOKA: kv_ratio 0.1", 0, 8)
    points = findings.points(found, 16384, 1024)
    gap = findings.difference(points["QUOKA: kv_ratio 0.1"], points["QUOKA: kv_ratio 0.25"], NEEDLE_TASKS)
    assert gap
    assert (gap.points, gap.low, gap.high, gap.items) == (0.0, 0.0, 0.0, 40)  # the first 8 items are right in both
    same = findings.difference(points[DENSE], points[DENSE], TASKS)
    assert same
    assert str(same) == "+0.0 (+0.0 to +0.0), n 280"


def cut(result: Any, name: str, first: int, last: int) -> None:
    """Let a row have met but a part of its items."""
    cell = next(cell for cell in result["cells"] if cell["row"] == name)
    for digits in cell["scores"].values():
        digits |= {measure: its[first:last] for measure, its in digits.items()}
    cell |= {"first": first, "last": last}


def test_the_best_row_has_met_as_many_items_as_dense_and_is_ranked_against_it() -> None:
    """A row that was right on the few items which it met is no better than one that was right on most of many."""
    rows = lineup(dense=0.9)
    rows[WIDE.name] = (WIDE, 0.12, 0.85)
    rows[UNSHARED.name] = (UNSHARED, 0.1, 0.8)
    result = made(rows)
    cut(result, UNSHARED.name, 0, 8)  # all right, as dense was on these
    best = findings.best_within(findings.points(result, 16384, 1024), 0.15, TASKS)
    assert best
    assert best.row["name"] == WIDE.name
    assert best.mean(TASKS) < 0.9 < findings.points(result, 16384, 1024)[UNSHARED.name].mean(TASKS)
    cut(result, DENSE, 0, 8)
    assert findings.best_within(findings.points(result, 16384, 1024), 0.15, TASKS).row["name"] == UNSHARED.name  # type: ignore[union-attr]
    many = made(rows, items=520)
    cut(many, WIDE.name, 0, 500)  # enough
    found = findings.points(many, 16384, 1024)
    assert findings.best_within(found, 0.15, TASKS) is found[WIDE.name]
    apart = made({**rows, WIDE.name: (WIDE, 0.12, 0.82), CORRECTED.name: (CORRECTED, 0.12, 0.9)}, items=600)
    cut(apart, WIDE.name, 0, 500)  # the easy ones: right more often, and less often than dense
    cut(apart, CORRECTED.name, 90, 600)  # right where dense was
    cut(apart, UNSHARED.name, 0, 499)
    found = findings.points(apart, 16384, 1024)
    assert found[WIDE.name].mean(TASKS) > found[CORRECTED.name].mean(TASKS)
    assert findings.best_within(found, 0.15, TASKS) is found[CORRECTED.name]
    few = made(rows)
    cut(few, WIDE.name, 0, 8)
    cut(few, UNSHARED.name, 0, 8)
    words = report.markdown(few, [])
    assert "16K: no row at density ≤ 0.15 on all tasks has met so many items as dense." in words
    assert any(line.startswith("| 16K, greedy: FlashPrefill unshared less QUOKA") for line in words.splitlines())
    del many["cells"][0]
    assert findings.best_within(findings.points(many, 16384, 1024), 0.15, TASKS) is None


def test_leads_over_quoka_are_those_of_the_most_items() -> None:
    rows = lineup()
    rows |= {row.name: (row, 0.3 - 0.2 * n, 1.0) for n, row in enumerate(PAPERS)}
    result = made(rows)
    for row in PAPERS:
        cut(result, row.name, 30, 40)  # where QUOKA was always wrong
    goals = [line for line in report.markdown(result, []).splitlines() if line.startswith("| 16K")]
    assert len(goals) == 7
    assert all(plans.UNSHARED in line and "n 80 |" in line for line in goals[3:])
    words = [line for line in report.markdown(result, []).splitlines() if f"| {PAPER.family} | +100.0 (" in line]
    assert words
    assert all(", n 20 |" in line or ", n 50 |" in line for line in words)


def test_figures_draw_contexts_that_were_swept_and_dense_ends_dashed(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = plans.sweep(plans.UNSHARED + plans.LAST, "FlashPrefill", "alpha", {0.4: 1}, settings=plans.LAST_BLOCKS)[0]
    result = made(lineup() | {ending.name: (ending, 0.2, 1.0)})
    lone = [cell | {"context": 8192} for cell in result["cells"] if cell["row"] in (DENSE, UNSHARED.name)]
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "finish", lambda canvas, panels, *_, **options: drawn.extend(panels))
    for cells, titled in ((result["cells"] + lone, ["16K"]), (lone, ["8K"])):
        for draw in (figure.draw_accuracy, figure.draw_bits):
            drawn.clear()
            draw(result | {"cells": cells}, Path())
            assert [panel.get_title().split(",")[0] for panel in drawn if panel.get_title()] == titled
    figure.draw_accuracy(result, Path())
    styles = {line.get_label(): (line.get_linestyle(), line.get_color()) for line in drawn[-2].lines}
    assert styles[ending.family] == ("--", styles[UNSHARED.family][1])
    assert styles[UNSHARED.family][0] == "-"


def test_a_figure_has_a_look_for_each_family_and_its_legend_inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More families than colours, and one that is only there with a dense end."""
    found = lineup()
    for n in range(13):
        row = plans.sweep(
            f"a rather long name of the family that has number {n} of many", "FlashPrefill", "alpha", {0.4: 1}
        )[0]
        found[row.name] = (row, 0.1 + 0.02 * n, 0.5)
    alone = replace(row, name="alone: alpha 0.4", family="alone" + plans.LAST, settings=plans.LAST_BLOCKS)
    result, figures = made(found | {alone.name: (alone, 0.2, 1.0)}), []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda its, *_, **__: figures.append(its))
    figure.draw_accuracy(result, tmp_path / "drawn.png")
    (drawn,) = figures
    looks = {
        line.get_label(): (line.get_linestyle(), line.get_color(), line.get_marker()) for line in drawn.axes[0].lines
    }
    assert looks[alone.family][0] == "--"
    del looks["dense"], looks[CONTROL]
    assert len(looks) >= 15
    assert len(set(looks.values())) == len(looks)
    (legend,) = drawn.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= drawn.bbox.width
    assert len(legend.get_texts()) == len(looks) + 2
    more = figures[0].legend(
        legend.legend_handles, looks.keys() | {DENSE, CONTROL}, ncols=legend._ncols + 1, fontsize=8
    )
    drawn.draw_without_rendering()
    assert more.get_window_extent().width > drawn.bbox.width


def test_a_legend_that_is_wider_than_its_figure_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = plans.sweep("long " * 100, "FlashPrefill", "alpha", {0.4: 1})[0]
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda its, *_, **__: figures.append(its))
    figure.draw_accuracy(made(lineup() | {row.name: (row, 0.2, 0.5)}), tmp_path / "drawn.png")
    figure.draw_accuracy(made(lineup()), tmp_path / "drawn.png")
    (long, usual) = figures
    assert [len(one.legends) for one in figures] == [1, 1]
    assert (long.legends[0]._ncols, usual.legends[0]._ncols) == (1, min(6, len(usual.legends[0].get_texts())))
    assert long.get_figheight() > usual.get_figheight()


def test_figures_and_tables_put_rows_of_other_items_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made(lineup())
    cut(result, UNSHARED.name, 0, 30)
    cut(result, WIDE.name, 30, 40)
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "finish", lambda canvas, panels, *_, **options: drawn.extend(panels))
    figure.draw_accuracy(result, Path())
    assert drawn[0].get_title().endswith("\n30 items of each")
    (quoka,) = [line for line in drawn[0].lines if line.get_label() == QUOKA]
    assert quoka.get_ydata() == pytest.approx([8 / 30, 24 / 30])
    found = findings.on_common_items(findings.points(result, 16384, 1024))
    assert list(found) == [name for name in lineup() if name != WIDE.name]
    assert {len(shares) for point in found.values() for shares in point.scores["greedy"].values()} == {30}
    assert found["QUOKA: kv_ratio 0.25"].mean(TASKS) == pytest.approx(24 / 30)
    assert found[UNSHARED.name].density(TASKS) == pytest.approx(0.1)
    assert findings.on_common_items({}) == {}
    far = json.loads(json.dumps(result["cells"])) + [cell | {"context": 8192} for cell in result["cells"]]
    words = report.markdown(result | {"cells": far}, [])
    heads = [line.split(" | ")[0] for line in words.splitlines() if line.startswith("| greedy, items")]
    assert heads == ["| greedy, items 0-40", "| greedy, items 30-40", "| greedy, items 0-30"] * 2
    pooled = [line for line in words.splitlines() if line.startswith("Chunk 1024, ")]
    assert [line.split("; ")[1] for line in pooled] == [f"16K items {one}" for one in ("0-40", "30-40", "0-30")]


def test_the_committed_report_is_that_of_the_committed_result_and_model(tmp_path: Path) -> None:
    path = RESULTS / "fidelity-h200.json"
    written = report.write_report(path, tmp_path)
    assert {one.name for one in written} == {one.name for one in RESULTS.glob("fidelity-h200*") if one != path}
    assert written[0].read_text() == (RESULTS / written[0].name).read_text()
    result = findings.load(path)
    assert not any(cell["status"] == "failed" for cell in result["cells"])
    for name, file in (("weights", "model.safetensors"), ("gate", GATE_FILE)):
        assert result["model"][name] == hashlib.sha256((WEIGHTS_DIRECTORY / file).read_bytes()).hexdigest()[:16]


def test_ranges_of_items_are_put_together() -> None:
    found = made(lineup())
    cell = next(cell for cell in found["cells"] if cell["row"] == DENSE)
    more = json.loads(json.dumps(cell)) | {"first": 50, "last": 60}
    more["scores"] = {task: dict.fromkeys(("greedy", "in_chunk"), "0" * 10) for task in TASKS}
    del more["bits"], more["probe"]
    found["cells"].append(more)
    point = findings.points(found, 16384, 1024)[DENSE]
    shares = point.scores["greedy"]["niah_single"]
    assert findings.items_words(point) == "items 0-40, 50-60"
    assert len(shares) == 60
    assert np.isnan(shares[40:50]).all()
    assert point.mean(["niah_single"]) == pytest.approx(40 / 50)
    assert point.bits_per_byte == pytest.approx(1.0)


def test_the_goals_are_judged_in_numbers() -> None:
    words = report.markdown(made(lineup()), [])
    goals = [line for line in words.splitlines() if line.startswith("| 16K")]
    best, in_chunk, bits, first, second, *others = goals
    assert "alpha 0.8, density 0.100) less dense" in best
    assert "≥ -0.5 | -20.0 (" in best
    assert best.endswith("**no** |")
    assert in_chunk == best.replace("greedy", "in chunk")  # the made up scores are the same
    assert "best row at density on text ≤ 0.15" in bits
    assert "1.2000 (1.2000 to 1.2000) | **no** |" in bits
    assert "FlashPrefill unshared less QUOKA: kv_ratio 0.1, both at density 0.100" in first
    assert "+60.0 (" in first
    assert first.endswith("yes |")
    assert "+35.0 (" in second  # between 0.8 at 0.1 and 1.0 at 0.3 it has 0.95 at 0.25
    assert others == [line.replace("greedy", "in chunk") for line in (first, second)]
    rows = lineup()
    rows[UNSHARED.name] = (UNSHARED, 0.1, 1.0)
    met = [line for line in report.markdown(made(rows), []).splitlines() if line.startswith("| 16K")]
    assert len(met) == 7
    assert all(line.endswith("| yes |") for line in met)


def test_changes_are_held_against_the_same_family() -> None:
    rows = lineup()
    rows[CORRECTED.name] = (CORRECTED, 0.2, 1.0)
    words = report.markdown(made(rows), [])
    (line,) = [line for line in words.splitlines() if line.startswith("| context 16K") and "mean correction: " in line]
    assert "+10.0 (" in line  # over 0.9 at density 0.2


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a result of `python -m benchmarks fidelity`, got no file"):
        findings.load(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"kind": "latency"}')
    with pytest.raises(ValueError, match="expected a fidelity result of schema 1, got something else"):
        findings.load(tmp_path / "x.json")
    head = {"kind": "fidelity", "schema": 1, **dict.fromkeys(("preset", "protocol", "model", "rows", "hidden"))}
    (tmp_path / "x.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="expected the result to have cells, absent, runs, got none"):
        findings.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(head | {"cells": [], "absent": {}, "runs": [{"environment": {}}]}))
    with pytest.raises(ValueError, match=r"expected runs\[0\] to have not_run, got none"):
        findings.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: expected JSON, got"):
        findings.load(tmp_path / "x.json")
    assert main(["report", str(tmp_path / "x.json")]) == 2
