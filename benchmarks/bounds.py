"""What KeyBounds costs beside FlashPrefill: the summary that both extend, masks, tables and the whole step.

Bounds ask for twice two products where means ask for one, and for twice the bytes per block. The workload is planted
for means: how many blocks KeyBounds keeps of it says nothing about prompts, so its density stands beside its times.
"""

from __future__ import annotations

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import Field, add_dense, groupings_of, library, selection_stages, table_of
from benchmarks.workloads import SELECTOR, SINK_BLOCKS, WINDOW_BLOCKS, Step, measure_density
from compactattn import KeyBounds, select, summarize

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
        name = type(selector).__name__
        lineup.contestants.extend(selection_stages(step, summary, selector, f", {name}"))
        for grouping in groupings_of(case, fixed=True):
            table = table_of(step, summary, selection, grouping)
            over = (step, summary, selection, grouping, table, rows)
            lineup.contestants.extend(library(*over, stages=False, selector=selector))
            density = measure_density(step, grouping, selection, table).as_json()
            lineup.density[f"{grouping}, {name}"] = density
    return lineup
