"""The Python that gives what a page shows: text to copy, run from the repository's root."""

from __future__ import annotations

from inspector.model import Setting
from inspector.sources import Place, Recorded, Source, Synthetic

_RECORDED = """\
import torch
from compactattn import {selector}, build_table, select, unite
from compactattn.capture import load_capture, sample_path
from compactattn.demo import PagedPrompt, best_device

capture = load_capture({path})
prompt = PagedPrompt.from_layer(capture.layers[{layer}], best_device(), page_size={page_size})
prompt.feed(0, {start})
batch = prompt.feed({start}, {stop})
q, kv, scale = prompt.q[{start}:{stop}], prompt.kv, capture.scale
"""

_SYNTHETIC = """\
import torch
from benchmarks.cases import Shape
from benchmarks.workloads import WORKLOADS, make_step
from compactattn import {selector}, build_table, select, unite
from compactattn.demo import best_device

step = make_step(
    WORKLOADS[{workload!r}],
    Shape(batch=1, q_heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}),
    {stop},
    {chunk},
    correlation={correlation},
    page_size={page_size},
    seed={seed},
    device=best_device(),
    dtype=torch.float32,
)
q, kv, batch, scale = step.q, step.kv, step.batch, None
"""

_TABLE = """\
selector = {selector!r}
selection = select(q, kv, batch, selector, scale=scale)
groups = unite(selection, batch, heads_per_group={heads_per_group}, query_blocks_per_span={span})
table = build_table(groups)
"""

ADDITIONS = {
    "density": """\
from compactattn.quality import density_cascade

print(density_cascade(selection, batch, kv_heads=kv.num_kv_heads, heads_per_group={heads_per_group},
                      query_blocks_per_span={span}).densities())
""",
    "table": """\
for row, count in enumerate(table.counts.tolist()):
    print(row, table.indices[row, :count].tolist())
""",
    "recall": """\
from compactattn import attend
from compactattn.quality import coverage, past_tokens, quoka_attention, quoka_select, summarize_coverage

budget = past_tokens(table, batch, kv_heads=kv.num_kv_heads).round().int()
kept = quoka_select(q, kv, batch, budget=budget)
for given in (table, kept):
    recall = summarize_coverage(coverage(q, kv, batch, given, scale=scale))
    print(recall.mean, recall.worst, recall.below)
out, quoka_out = attend(q, kv, batch, table, scale=scale), quoka_attention(q, kv, batch, kept, scale=scale)
""",
}


def python_call(source: Source, place: Place, page_size: int, setting: Setting, addition: str = "") -> str:
    """A script that makes the page's chunk, its masks and its tables.

    Args:
        addition: a name of `ADDITIONS`, for what the page shows beyond the table.
    """
    selector = type(setting.selector).__name__
    grouping = {"heads_per_group": setting.heads_per_group, "span": setting.query_blocks_per_span}
    if isinstance(source, Synthetic):
        from inspector.sources import HEAD_DIM

        head = _SYNTHETIC.format(
            selector=selector,
            workload=source.workload,
            heads=source.kv_heads * source.group,
            kv_heads=source.kv_heads,
            head_dim=HEAD_DIM,
            stop=place.stop,
            chunk=place.stop - place.start,
            correlation=source.correlation,
            page_size=page_size,
            seed=source.seed,
        )
    else:
        head = _RECORDED.format(
            selector=selector,
            path=_path(source),
            layer=place.layer,
            page_size=page_size,
            start=place.start,
            stop=place.stop,
        )
        if not place.start:
            head = head.replace("prompt.feed(0, 0)\n", "")
        head = head.removeprefix("import torch\n")
        if source.path or source.upload:
            head = head.replace("load_capture, sample_path", "load_capture")
    return "\n".join(
        [head, _TABLE.format(selector=setting.selector, **grouping), _addition(addition, grouping)]
    ).strip()


def _path(source: Recorded) -> str:
    return repr(source.path) if source.path else "sample_path()"


def _addition(name: str, grouping: dict[str, int | None]) -> str:
    return ADDITIONS[name].format(**grouping) if name else ""
