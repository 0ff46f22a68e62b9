"""What KeyBounds costs beside FlashPrefill: the summary that both extend, masks, tables and the whole step.

Bounds ask for twice two products where means ask for one, and for twice the bytes per block. The workload is planted
for means: how many blocks KeyBounds keeps of it says nothing about prompts, so its density stands beside its times.
"""

from __future__ import annotations

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Field, add_dense, groupings_of, library, table_of
from benchmarks.workloads import SELECTOR, SINK_BLOCKS, WINDOW_BLOCKS, Step, measure_density
from compactattn import FlashPrefill, KeyBounds, KVSummary, SelectionMask, select, summarize
from compactattn.selection import block_rules

BOUNDS = KeyBounds(sink_blocks=SINK_BLOCKS, window_blocks=WINDOW_BLOCKS)
SELECTORS = (SELECTOR, BOUNDS)


def bounds_field(case: Case, step: Step) -> Field:
    """Dense cuDNN, and for each selector `summarize`, `select`, `select_table` and `prefill` under every grouping."""
    lineup, rows = Field(), gate.sample_rows(step.batch)
    add_dense(lineup, case, step, rows)
    for selector in SELECTORS:
        with_bounds = isinstance(selector, KeyBounds)
        summary = summarize(step.kv, step.batch, block_size=selector.block_size, bounds=with_bounds)
        selection = select(step.q, step.kv, step.batch, selector, summary=summary)
        lineup.contestants.extend(_stages(step, selector, summary))
        for grouping in groupings_of(case, fixed=True):
            table = table_of(step, summary, selection, grouping)
            over = (step, summary, selection, grouping, table, rows)
            lineup.contestants.extend(library(*over, stages=False, selector=selector))
            density = measure_density(step, grouping, selection, table).as_json()
            lineup.density[f"{grouping}, {type(selector).__name__}"] = density
    return lineup


def _stages(step: Step, selector: FlashPrefill | KeyBounds, summary: KVSummary) -> list[Contestant]:
    """`summarize` (the chunk's own units) and `select`."""
    q, kv, batch, name = step.q, step.kv, step.batch, type(selector).__name__
    forced = block_rules(batch, selector).forced

    def chosen(result: SelectionMask) -> gate.Verdict:
        return gate.check_selection(result, q, kv, batch, selector, forced)

    return [
        Contestant(
            f"summarize, {name}",
            "stage",
            lambda: summarize(kv, batch, block_size=selector.block_size, summary=summary),
            lambda result: gate.check_summary(result, kv, batch),
        ),
        Contestant(f"select, {name}", "stage", lambda: select(q, kv, batch, selector, summary=summary), chosen),
    ]
