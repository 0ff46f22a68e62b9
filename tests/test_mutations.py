"""The laws notice: each planted fault turns the named tests red, on the very examples that CI draws."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import reference.attention
import reference.selection
import reference.summary
import reference.table
import reference.union
from compactattn import BlockTable, PagedKV, PrefillBatch
from tests import test_attention, test_correction, test_laws, test_prefill, test_selection, test_summary, test_union
from tests.backends import NUMBA, REFERENCE, Backend, compose_table

# the sequence ends within a page and a block, and its last query block is short
PAST_THE_END = test_attention.HARD[0]
TWO_KV_HEADS = test_attention.HARD[1]


def rebuilt(backend: Backend, **stages: Callable[..., Any]) -> Backend:
    """The backend with some stages replaced, and `prefill` and `select_table` composed of the stages."""
    mutant = replace(backend, name="mutant", shrink=False, **stages)

    def prefill(q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, *, return_lse: bool = False, **kwargs: Any) -> Any:
        table = compose_table(mutant, q, kv, batch, **kwargs)
        return mutant.attend(q, kv, batch, table, scale=kwargs.get("scale"), return_lse=return_lse)

    # the composed table goes through `mutant`, whose stages may be faulty
    object.__setattr__(mutant, "prefill", prefill)
    object.__setattr__(mutant, "select_table", functools.partial(compose_table, mutant))
    return mutant


def edited(backend: Backend, edit: Callable[[BlockTable, PrefillBatch], BlockTable]) -> Backend:
    """A backend whose tables are edited; the batch comes from the last call of `unite`."""
    seen: list[PrefillBatch] = []

    def unite(selection: Any, batch: PrefillBatch, **grouping: Any) -> Any:
        seen[:] = [batch]
        return backend.unite(selection, batch, **grouping)

    def build_table(groups: Any) -> BlockTable:
        return edit(backend.build_table(groups), seen[0])

    return rebuilt(backend, unite=unite, build_table=build_table)


def with_row(table: BlockTable, r: int, entries: list[int]) -> BlockTable:
    indices, counts = table.indices.clone(), table.counts.clone()
    indices[r, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
    counts[r] = len(entries)
    return replace(table, indices=indices, counts=counts)


def drop_a_past_entry(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """One entry of one row: the last one that lies in the past."""
    past = batch.past_lens // table.block_size
    for b in range(batch.size):
        for r in set(table.rows[b].flatten().tolist()):
            entries = table.indices[r, : int(table.counts[r])].tolist()
            old = [j for j in entries if j < int(past[b])]
            if old:
                return with_row(table, r, [j for j in entries if j != old[-1]])
    return table


def drop_a_current_block(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """The last entry of the first row that has one."""
    for r, count in enumerate(table.counts.tolist()):
        if count:
            return with_row(table, r, table.indices[r, : count - 1].tolist())
    return table


def add_a_past_entry(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """One past block that no member selected, in one row."""
    past = batch.past_lens // table.block_size
    for b in range(batch.size):
        for r in set(table.rows[b].flatten().tolist()):
            entries = table.indices[r, : int(table.counts[r])].tolist()
            new = [j for j in range(int(past[b])) if j not in entries]
            if new and entries:
                return with_row(table, r, sorted([*entries, new[0]]))
    return table


def repeat_an_entry(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """The first entry twice."""
    for r, count in enumerate(table.counts.tolist()):
        if 0 < count < table.indices.shape[1]:
            entries = table.indices[r, :count].tolist()
            return with_row(table, r, [entries[0], *entries])
    return table


def add_an_invisible_block(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """The block after the last visible one, as reading one slot past seq_lens would need."""
    for r, count in enumerate(table.counts.tolist()):
        if 0 < count < table.indices.shape[1] and int(table.indices[r, count - 1]) + 1 < table.indices.shape[1]:
            entries = table.indices[r, :count].tolist()
            return with_row(table, r, [*entries, entries[-1] + 1])
    return table


def swap_two_entries(table: BlockTable, batch: PrefillBatch) -> BlockTable:
    """The same blocks, not ascending."""
    for r, count in enumerate(table.counts.tolist()):
        if count > 1:
            entries = table.indices[r, :count].tolist()
            return with_row(table, r, [*entries[:-2], entries[-1], entries[-2]])
    return table


TABLE_FAULTS = [
    (drop_a_past_entry, [test_laws.test_coverage, test_laws.test_tables_match_the_set_oracle]),
    (drop_a_current_block, [test_laws.test_coverage, test_laws.test_dense_is_dense_causal_attention]),
    (add_a_past_entry, [test_laws.test_minimality, test_laws.test_tables_match_the_set_oracle]),
    (
        repeat_an_entry,
        [test_laws.test_canonical_form, test_laws.test_execution_equals_dense_attention_under_the_blocks],
    ),
    (add_an_invisible_block, [test_laws.test_canonical_form, test_laws.test_minimality]),
    (swap_two_entries, [test_laws.test_canonical_form]),
]


def assert_red(law: Callable[[Backend], None], mutant: Backend, how: Any = AssertionError) -> None:
    with pytest.raises(how):
        law(mutant)


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("backend", [REFERENCE, NUMBA], ids=lambda b: b.name)
@pytest.mark.parametrize(("edit", "law"), [(edit, law) for edit, laws in TABLE_FAULTS for law in laws], ids=name_of)
def test_faulty_tables(backend: Backend, edit: Callable[..., BlockTable], law: Callable[[Backend], None]) -> None:
    """Dropping a table entry, adding one, repeating one, disordering two: a law turns red."""
    assert_red(law, edited(backend, edit))


def see_one_key_too_many(backend: Backend) -> Backend:
    """Every query (but the last, which has no later key) also sees the next key; no slot past seq_lens is read."""

    def attend(
        q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, table: BlockTable, *, return_lse: bool = False, **kw: Any
    ) -> Any:
        out, lse = backend.attend(q, kv, batch, table, return_lse=True, **kw)
        starts = batch.cu_seqlens_q.tolist()
        kept = [t for a, b in pairwise(starts) for t in range(a, b - 1)]
        ends = [0]
        for a, b in pairwise(starts):
            ends.append(ends[-1] + max(0, b - a - 1))
        # one query fewer at the same seq_len: each of the others stands one position later
        later = PrefillBatch(torch.tensor(ends, dtype=torch.int32), batch.seq_lens, batch.max_q_len, batch.max_seq_len)
        out[kept], lse[kept] = (
            x[: len(kept)] for x in backend.attend(q[kept].contiguous(), kv, later, table, return_lse=True, **kw)
        )
        return (out, lse) if return_lse else out

    return rebuilt(backend, attend=attend)


EDGE_LAWS = [
    test_laws.test_execution_equals_dense_attention_under_the_blocks,
    test_laws.test_dense_is_dense_causal_attention,
    test_laws.test_chunking_gives_the_one_shot_result,
]


@pytest.mark.parametrize("law", EDGE_LAWS, ids=name_of)
@pytest.mark.parametrize("backend", [REFERENCE, NUMBA], ids=lambda b: b.name)
def test_a_causal_edge_that_is_off_by_one(backend: Backend, law: Callable[[Backend], None]) -> None:
    """Seeing one key too many turns law 8 red, however long the rows are."""
    assert_red(law, see_one_key_too_many(backend))


def read_one_slot_past(backend: Backend) -> Backend:
    """Attention over seq_lens + 1 keys: one more query per request makes the slot after the last key a visible one."""

    def attend(
        q: torch.Tensor, kv: PagedKV, batch: PrefillBatch, table: BlockTable, *, return_lse: bool = False, **kw: Any
    ) -> Any:
        starts = batch.cu_seqlens_q.tolist()
        own = [t for a, b in pairwise(starts) for t in [*range(a, b), starts[-1]]]
        longer = PrefillBatch(
            torch.tensor([t + n for n, t in enumerate(starts)], dtype=torch.int32),
            batch.seq_lens + 1,
            batch.max_q_len + 1,
            batch.max_seq_len + 1,
        )
        out, lse = backend.attend(q[own].nan_to_num(0.0), kv, longer, table, return_lse=True, **kw)
        kept = [n for n, t in enumerate(own) if t != starts[-1]]
        tail = torch.zeros_like(q[starts[-1] :])
        out, lse = torch.cat([out[kept], tail]), torch.cat([lse[kept], tail[..., 0].float()])
        return (out, lse) if return_lse else out

    return rebuilt(backend, attend=attend)


@pytest.mark.parametrize("backend", [REFERENCE, NUMBA], ids=lambda b: b.name)
def test_reading_one_slot_past_the_sequence(backend: Backend) -> None:
    """The slot at seq_lens holds NaN; reading it, even with weight zero, turns law 8 red."""
    assert_red(
        functools.partial(test_attention.test_hard_places, g=PAST_THE_END, kind="full"), read_one_slot_past(backend)
    )


@dataclass(frozen=True)
class Fault:
    """An edit of the reference's source and a test that must notice it."""

    name: str
    module: types.ModuleType
    old: str
    new: str
    law: Callable[[Backend], None]
    how: type[Exception] | tuple[type[Exception], ...] = AssertionError


WILD_READ = (
    AssertionError,
    IndexError,
)  # on the CPU a wild page id ends in an IndexError, if the law sees no NaN first
EXECUTION = test_laws.test_execution_equals_dense_attention_under_the_blocks
FAULTS = [
    Fault(
        "union forgets earlier members",
        reference.union,
        "keep[r, :past] |= ",
        "keep[r, :past] = ",
        test_laws.test_coverage,
    ),
    Fault(
        "union drops the last visible block",
        reference.union,
        "keep[r, past : last + 1] = True",
        "keep[r, past:last] = True",
        test_laws.test_coverage,
    ),
    Fault(
        "union keeps all of a past that anyone likes",
        reference.union,
        "selection.mask[b, h, i, :past].cpu()",
        "selection.mask[b, h, i, :past].cpu().any()",
        test_laws.test_minimality,
    ),
    Fault(
        "union takes visible bits for past bits",
        reference.union,
        "keep[r, past : last + 1] = True",
        "keep[r, past : min(last + 2, kv_blocks)] = True",
        test_laws.test_canonical_form,
    ),
    Fault(
        "rows are numbered by another rule",
        reference.union,
        "h // heads_per_group) * spans",
        "h % groups) * spans",
        test_union.test_row_formula,
    ),
    Fault("rows descend", reference.table, "nonzero()[:, 0]", "nonzero()[:, 0].flip(0)", test_laws.test_canonical_form),
    Fault("edge + 1", reference.attention, "key > position[:, None]", "key > position[:, None] + 1", EXECUTION),
    Fault("edge - 1", reference.attention, "key > position[:, None]", "key >= position[:, None]", EXECUTION),
    Fault(
        "a slot past seq_lens",
        reference.attention,
        "key <= position[-1]]",
        "key <= position[-1] + 1]",
        functools.partial(test_attention.test_hard_places, g=PAST_THE_END, kind="full"),
    ),
    Fault(
        "the next KV head",
        reference.attention,
        "kv, request, key)[:, h // group]",
        "kv, request, key)[:, h // group - 1]",
        functools.partial(
            test_attention.test_hard_places, g=next(g for g in test_attention.HARD if g.kv_heads > 1), kind="full"
        ),
    ),
    Fault(
        "entries past counts are read",
        reference.attention,
        ": int(table.counts[r])]",
        ": int(table.counts[r]) + 1]",
        EXECUTION,
        WILD_READ,
    ),
    Fault(
        "lse in base 2",
        reference.attention,
        "(out, lse) if return_lse",
        "(out, lse / math.log(2)) if return_lse",
        EXECUTION,
    ),
    Fault(
        "a mean counts as one token",
        reference.attention,
        " + math.log(block_size)",
        "",
        test_correction.test_uniform_blocks_are_exact,
    ),
    Fault(
        "blocks of the table speak through their means too",
        reference.attention,
        " if j not in blocks.tolist()",
        "",
        test_correction.test_with_every_block_in_the_table_it_has_no_effect,
    ),
    Fault(
        "means of the next KV head",
        reference.attention,
        "left_out, block_size)[:, h // group]",
        "left_out, block_size)[:, h // group - 1]",
        functools.partial(test_correction.test_hard_places, g=test_correction.HARD[0], kind="sparse"),
    ),
    Fault(
        "blocks are scored before their last token",
        reference.selection,
        "position[:, None] < ends",
        "position[:, None] < ends - 1",
        functools.partial(test_selection.test_a_row_scores_a_block_from_its_last_token_on, past_len=63),
    ),
    Fault(
        "the window is one block longer",
        reference.selection,
        "max(0, last + 1 - selector.window_blocks)",
        "max(0, last - selector.window_blocks)",
        test_selection.test_flash_prefill,
    ),
    Fault(
        "scores of an incomplete block",
        reference.selection,
        "complete = request.seq_len // block_size",
        "complete = -(-request.seq_len // block_size)",
        test_selection.test_flash_prefill_trusts_a_summary,
        WILD_READ,
    ),
    Fault(
        "ties go to the higher id",
        reference.selection,
        "key=lambda j: (-float(weights[j]), j)",
        "key=lambda j: (-float(weights[j]), -j)",
        functools.partial(
            test_selection.test_ties_go_to_the_lower_id, selector=test_selection.Oracle(top_k=3, **test_selection.RULES)
        ),
    ),
    Fault(
        "an undivided antidiagonal",
        reference.selection,
        "strided = _strided(rows, stride).flip(2)",
        "strided = _strided(rows, stride)",
        test_selection.test_xattention_sums_antidiagonals,
    ),
    Fault(
        "means over the whole unit",
        reference.summary,
        "min(start + unit, request.seq_len)",
        "min(start + unit, len(kv.page_table[request.index]) * page_size)",
        test_summary.test_means_of_every_unit,
    ),
    Fault(
        "only new tokens are averaged",
        reference.summary,
        "first // unit * unit",
        "first",
        test_summary.test_extended_equals_recomputed,
    ),
]


def source_mutant(fault: Fault) -> Backend:
    """The reference with one line of one module changed."""
    source = inspect.getsource(fault.module)
    assert fault.old in source, f"{fault.name}: the reference no longer holds {fault.old!r}"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(fault.old, fault.new), f"<{fault.name}>", "exec"), module.__dict__)
    names = ("summarize", "select", "unite", "build_table", "attend")
    own = {name: getattr(module, name) for name in names if inspect.isfunction(getattr(module, name, None))}
    if fault.module is reference.selection:
        own.pop("summarize")
    return rebuilt(REFERENCE, **own)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_faults_in_the_reference(fault: Fault) -> None:
    """One changed line, one red test."""
    assert_red(fault.law, source_mutant(fault), fault.how)


def test_a_correction_that_nobody_asked_for() -> None:
    """prefill(correction=False) that corrects with whatever summary it is given is noticed."""
    eager = replace(REFERENCE, prefill=lambda *a, **how: REFERENCE.prefill(*a, **(how | {"correction": True})))
    assert_red(test_correction.test_without_correction_nothing_changes, eager)


def test_a_summary_that_is_not_extended() -> None:
    """prefill(summary=...) that trusts an old summary is noticed."""
    lazy = rebuilt(
        REFERENCE, summarize=lambda kv, batch, *, summary=None, **kw: summary or REFERENCE.summarize(kv, batch, **kw)
    )
    assert_red(test_prefill.test_a_summary_is_brought_up_to_date, replace(REFERENCE, prefill=lazy.prefill))


def test_the_machinery_itself_is_green() -> None:
    """Without a fault the rebuilt backend passes what every mutant fails."""
    healthy = edited(REFERENCE, lambda table, batch: table)
    for law in {*EDGE_LAWS, test_laws.test_coverage, test_laws.test_minimality, test_laws.test_canonical_form}:
        law(healthy)
    test_attention.test_any_ascending_rows(healthy)
