"""What only a GPU can show of steps that are launched again: they compute what they would have computed anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compactattn import BlockTable, FlashPrefill, KeyBounds, attend, prefill, select_table, summarize
from tests.test_gpu import SELECTOR, make_step

pytestmark = pytest.mark.gpu

BOUNDS = {"max_q_len": 512, "max_seq_len": 4096}
LENGTHS = ([512, 30], [4000, 1700]), ([300, 299], [3001, 4096]), ([1, 0], [77, 4000])
GROUPINGS = [(1, 1), (4, None), ("auto", "auto")]


@pytest.fixture(autouse=True)
def recordings() -> Iterator[Any]:
    """The recordings, empty before and after."""
    from compactattn._triton import replay

    replay._recordings.clear()
    yield replay._recordings
    replay._recordings.clear()


def bounded_step(seed: int, q_lens: list[int], seq_lens: list[int]) -> tuple[Any, ...]:
    """q, kv, batch and summary of one kind, whatever the lengths; rows beyond the requests hold NaN."""
    q, kv, batch, _ = make_step(q_lens, seq_lens, seed=seed)
    batch = replace(batch, **BOUNDS, prompt_lens=batch.seq_lens.clone())
    kv = replace(kv, page_table=torch.nn.functional.pad(kv.page_table, (0, 32 - kv.page_table.shape[1])))
    summary = summarize(kv, batch, block_size=128, bounds=True)
    rest = torch.full((600 - len(q), *q.shape[1:]), float("nan"), device="cuda", dtype=q.dtype)
    return torch.cat((q, rest)), kv, batch, summary


def valid(table: BlockTable) -> list[Tensor]:
    """Everything of a table that carries meaning."""
    columns = torch.arange(table.indices.shape[1], device=table.indices.device)
    return [table.indices.where(columns < table.counts[:, None], -1), table.counts.clone(), table.rows.clone()]


def not_again(*_: object) -> None:
    raise AssertionError("a step of a known kind went through the stages")


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("with_summary", [True, False], ids=["summary", "pooled"])
@pytest.mark.parametrize(
    "selector",
    [SELECTOR, replace(SELECTOR, query_block=64, dense_last_blocks=1), KeyBounds(0.05, sink_blocks=1, window_blocks=2)],
    ids=["128", "64, dense end", "bounds"],
)
def test_a_table_again(
    selector: FlashPrefill | KeyBounds, with_summary: bool, grouping: tuple[Any, Any], recordings: Any, monkeypatch: Any
) -> None:
    from compactattn import pipeline

    how = {"selector": selector, "heads_per_group": grouping[0], "query_blocks_per_span": grouping[1]}

    def table(seed: int) -> BlockTable:
        q, kv, batch, summary = bounded_step(seed, *LENGTHS[seed])
        return select_table(q, kv, batch, summary=summary if with_summary else None, **how)

    anew = []
    for seed in range(len(LENGTHS)):
        recordings.clear()
        anew.append(valid(table(seed)))
    assert len(recordings) == 1
    monkeypatch.setattr(pipeline, "_select_table", not_again)
    again = [table(seed) for seed in range(len(LENGTHS))]  # all of them alive: none may lie on another
    for found, expected in zip(again, anew, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(valid(found), expected, strict=True))


@pytest.mark.parametrize("given", [False, True], ids=["new out", "given out"])
@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("general", [False, True], ids=["Hopper", "general"])
def test_attention_again(general: bool, lse: bool, given: bool, recordings: Any, monkeypatch: Any) -> None:
    """Over other queries, caches and tables of one kind, bit for bit; the general kernel takes query blocks of 64."""
    from compactattn import attention as stage

    selector = replace(SELECTOR, query_block=64 if general else 128)
    steps = [bounded_step(seed, *lens) for seed, lens in enumerate(LENGTHS)]
    tables = [
        select_table(q, kv, batch, selector=selector, heads_per_group=2, summary=summary)
        for q, kv, batch, summary in steps
    ]

    def attention(seed: int) -> list[Tensor]:
        q, kv, batch, _ = steps[seed]
        out = torch.empty_like(q) if given else None
        result = attend(q, kv, batch, tables[seed], return_lse=lse, out=out)
        parts = result if isinstance(result, tuple) else (result,)
        assert out is None or parts[0] is out
        return [part[: sum(LENGTHS[seed][0])] for part in parts]

    anew = []
    for seed in range(len(LENGTHS)):
        recordings.clear()
        anew.append(attention(seed))
    assert len(recordings) == 1
    monkeypatch.setattr(stage, "_attend", not_again)
    for found, expected in zip([attention(seed) for seed in range(len(LENGTHS))], anew, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not any(part.isnan().any() for part in found)


def test_replayed_attention_in_a_graph(recordings: Any) -> None:
    """A capture of a replay serves other contents of its table and cache."""
    steps = [bounded_step(seed, *LENGTHS[0]) for seed in range(2)]
    (q, kv, batch, _), (_, other, _, _) = steps
    table, further = (
        select_table(q, kv, batch, selector=SELECTOR, heads_per_group=2, summary=summary)
        for q, kv, batch, summary in steps
    )
    attend(q, kv, batch, table)
    assert len([key for key in recordings if key[0] == "attend"]) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, kv, batch, table)
    kv.k.copy_(other.k)
    table.indices.copy_(further.indices)
    table.counts.copy_(further.counts)
    table.rows.copy_(further.rows)
    graph.replay()
    recordings.clear()
    tokens = sum(LENGTHS[0][0])
    assert torch.equal(out[:tokens], attend(q, kv, batch, table)[:tokens])


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_layers_take_turns(grouping: tuple[Any, Any], recordings: Any) -> None:
    """Each layer has a cache of its own, step after step; memory that is freed is handed out again for other data."""
    how = {"selector": SELECTOR, "heads_per_group": grouping[0], "query_blocks_per_span": grouping[1]}

    def layer(seed: int) -> tuple[Any, ...]:
        return make_step([512, 300], [4000, 1700], seed=seed)

    def step(q: Tensor, kv: Any, batch: Any, summary: Any) -> Tensor:
        result = prefill(q, kv, batch, summary=summary, return_lse=False, **how)
        assert isinstance(result, Tensor)
        return result

    anew = []
    for seed in range(6):
        recordings.clear()
        anew.append(step(*layer(seed)))
    assert len(recordings) == 1
    layers = [layer(seed) for seed in range(3)]
    for _ in range(3):
        for seed in range(3):
            assert torch.equal(step(*layers[seed]), anew[seed])
    del layers
    for seed in (3, 4, 5):  # where the first ones lay
        assert torch.equal(step(*layer(seed)), anew[seed])
    assert len(recordings) == 1


def test_the_c_function_is_called_where_its_launcher_was_read(recordings: Any) -> None:
    import triton

    from compactattn._triton import direct

    q, kv, batch, summary = make_step([512, 300], [4000, 1700])
    prefill(q, kv, batch, selector=SELECTOR, heads_per_group=2, summary=summary)
    (kept,) = recordings.values()
    ruled = tuple(map(int, triton.__version__.split(".")[:2])) in direct.DIRECT_VERSIONS
    kinds = {type(launch.call).__name__ for launch in kept.recording.launches}
    assert kinds == ({"builtin_function_or_method"} if ruled else {"CudaLauncher"})


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_replayed_launch(hook: str, recordings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    q, kv, batch, summary = make_step([512, 300], [4000, 1700])
    how: dict[str, Any] = {"selector": SELECTOR, "heads_per_group": 2, "summary": summary}
    expected = prefill(q, kv, batch, **how)
    (kept,) = recordings.values()
    seen: list[object] = []
    monkeypatch.setattr(knobs.runtime, hook, seen.append)
    found = prefill(q, kv, batch, **how)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    assert len(seen) == len(kept.recording.launches)


def test_threads_on_their_own_streams(recordings: Any) -> None:
    """Two engines in one process: a recording is replayed by both at once."""
    steps = [make_step([512, 300], [4000, 1700], seed=seed) for seed in range(2)]
    how: dict[str, Any] = {"selector": SELECTOR, "heads_per_group": 1, "query_blocks_per_span": 1}
    expected = [prefill(q, kv, batch, summary=summary, **how) for q, kv, batch, summary in steps]
    assert len(recordings) == 1
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(n: int) -> None:
        q, kv, batch, summary = steps[n]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                found = prefill(q, kv, batch, summary=summary, **how)
                if not torch.equal(found, expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replayed_table_in_a_graph() -> None:
    """A capture of a replay serves other contents, like one of a first step."""
    q, kv, batch, summary = make_step([512, 300], [4000, 1700])
    how: dict[str, Any] = {"selector": SELECTOR, "heads_per_group": 2, "summary": summary}
    select_table(q, kv, batch, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = select_table(q, kv, batch, **how)
    fresh_q, fresh_kv, _, _ = make_step([512, 300], [4000, 1700], seed=1)
    q.copy_(fresh_q)
    kv.k.copy_(fresh_kv.k)
    summarize(kv, batch, block_size=128, since=0, summary=summary)
    table.indices.fill_(-7)
    graph.replay()
    found = valid(table)
    expected = valid(select_table(q, kv, batch, **how))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
