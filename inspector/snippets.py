"""The Python that gives what a page shows: text to copy, run from the repository's root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from compactattn import SeerGate, Selector
from inspector.files import ChosenFile, GateWeights
from inspector.model import Setting
from inspector.sources import HEAD_DIM, Place, Source, Synthetic

_RECORDED = """\
from compactattn import {imports}, build_table, select, unite
from compactattn.capture import load_capture{sample}
from compactattn.demo import PagedPrompt, best_device

capture = load_capture({path})
prompt = PagedPrompt.from_layer(capture.layers[{layer}], best_device(), page_size={page_size})
{past}batch = prompt.feed({start}, {stop})
q, kv, scale = prompt.q[{start}:{stop}], prompt.kv, capture.scale
"""

_SYNTHETIC = """\
import torch
from benchmarks.cases import Shape
from benchmarks.workloads import WORKLOADS, make_step
from compactattn import {imports}, build_table, select, unite
from compactattn.demo import best_device

drawn = make_step(
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
q, kv, batch, scale = drawn.q, drawn.kv, drawn.batch, None
"""

_GATE = """\
from dataclasses import replace
from inspector.gates import inverse_frequencies

inv_freq = inverse_frequencies(capture.rope_theta, {head_dim}).to(best_device())
gates = load_seer_gates({path}, layers=None, heads={heads}, head_dim={head_dim}, inv_freq=inv_freq)
{name} = replace(gates[capture.layers[{layer}].layer], {fields})
"""

_TABLE = """\
selection = select(q, kv, batch, selector, scale=scale)
groups = unite(selection, batch, heads_per_group={heads_per_group}, query_blocks_per_span={span})
table = build_table(groups)
"""

_STEP = """\
from inspector.sources import Step

step = Step(q, kv, batch, scale)
"""

_READING = """\
from inspector.model import Setting, read

reading = read(step, Setting(selector, heads_per_group={heads_per_group}, query_blocks_per_span={span}))
"""

#: What pages show beyond the table, and which of the parts above each needs.
ADDITIONS = {
    "mass": (
        (_STEP,),
        """\
from inspector.model import block_mass

mass = block_mass(step, selector.block_size, selector.query_block)
print(mass.share.shape)  # [Hq, Qb, Kb]; a row sums to 1
""",
    ),
    "mask": (
        (_STEP, _READING),
        """\
from inspector.figures import mask_figure

mask_figure(reading, mass, {head}).savefig("mask.png")
""",
    ),
    "row": (
        (_STEP, _READING),
        """\
from inspector.figures import cascade_figure
from inspector.model import row_union

union = row_union(reading, {head}, {row_span})
print(union.alone({by!r}).sum(1))  # blocks that one of them alone asked for
cascade_figure(union, reading, {by!r}).savefig("union.png")
""",
    ),
    "density": (
        (),
        """\
from compactattn.quality import density_cascade

print(density_cascade(selection, batch, kv_heads=kv.num_kv_heads, heads_per_group={heads_per_group},
                      query_blocks_per_span={span}).densities())
""",
    ),
    "table": (
        (),
        """\
for row, count in enumerate(table.counts.tolist()):
    print(row, table.indices[row, :count].tolist())
""",
    ),
    "pages": (
        (_STEP, _READING),
        """\
from inspector.cost import PAGE_KINDS, page_grid, work

pages = page_grid(step, reading, {kv_head})
for kind in PAGE_KINDS:
    print(kind, pages.count(kind), pages.count(kind) * pages.page_bytes)
print(work(step, reading))
""",
    ),
    "recall": (
        (),
        """\
from compactattn import attend
from compactattn.quality import coverage, past_tokens, quoka_attention, quoka_select, summarize_coverage

budget = past_tokens(table, batch, kv_heads=kv.num_kv_heads).round().int()
kept = quoka_select(q, kv, batch, budget=budget)
for given in (table, kept):
    recall = summarize_coverage(coverage(q, kv, batch, given, scale=scale))
    print(recall.mean, recall.worst, recall.below)
out, quoka_out = attend(q, kv, batch, table, scale=scale), quoka_attention(q, kv, batch, kept, scale=scale)
""",
    ),
    "frontier": (
        (_STEP,),
        """\
from dataclasses import replace
from inspector.model import Setting, read
from inspector.recall import judge, observe, outcome

observed = observe(step)
for value in {values}:
    setting = Setting(replace(selector, {field}=value), {heads_per_group}, {span})
    print(outcome({selector_name!r}, value, judge(observed, read(step, setting))))
""",
    ),
    "time": (
        (_STEP, _READING),
        """\
from inspector.cost import load_measured, work

found, ceilings = work(step, reading), load_measured().ceilings
print(ceilings.time_ms(found.table_flops, found.table_bytes), ceilings.time_ms(found.dense_flops, found.dense_bytes))
""",
    ),
    "difference": (
        (),
        """\
wanted = select(q, kv, batch, other, scale=scale)
groups_b = unite(wanted, batch, heads_per_group={other_heads}, query_blocks_per_span={other_span})
table_b = build_table(groups_b)
past = (batch.max_seq_len - len(q)) // selector.block_size
a, b = (g.keep[g.rows[0, {head}].long(), :past] for g in (groups, groups_b))
print("both", int((a & b).sum()), "only A", int((a & ~b).sum()), "only B", int((b & ~a).sum()))
""",
    ),
}


def python_call(
    source: Source,
    place: Place,
    page_size: int,
    setting: Setting,
    additions: Sequence[str] = (),
    *,
    weights: GateWeights | None = None,
    other: Setting | None = None,
    other_weights: GateWeights | None = None,
    **names: object,
) -> str:
    """A script that makes the page's chunk, its masks and its tables.

    Args:
        additions: names of `ADDITIONS`, for what the page shows beyond the table.
        weights: the file of the gate's weights, where the selector is a gate.
        other, other_weights: the second setting of a comparison.
        names: what else the additions fill in, such as the head.
    """
    selectors = {"selector": (setting.selector, weights)}
    if other is not None:
        selectors["other"] = (other.selector, other_weights)
        names |= {"other_heads": other.heads_per_group, "other_span": other.query_blocks_per_span}
    imports = sorted({_imported(selector) for selector, _ in selectors.values()})
    grouping = {"heads_per_group": setting.heads_per_group, "span": setting.query_blocks_per_span}
    names |= {**grouping, "selector_name": type(setting.selector).__name__}
    parts = [_chunk(source, place, page_size, ", ".join(imports))]
    parts += [_selector(name, *chosen, place) for name, chosen in selectors.items()]
    parts.append(_TABLE)
    for addition in additions:
        needed, code = ADDITIONS[addition]
        parts += [part for part in (*needed, code) if part not in parts]
    filled = [part if n <= len(selectors) else part.format(**names) for n, part in enumerate(parts)]
    return "\n".join(filled).strip()


def _chunk(source: Source, place: Place, page_size: int, imports: str) -> str:
    """What makes q, kv, batch and scale."""
    at = {"imports": imports, "page_size": page_size, "start": place.start, "stop": place.stop}
    if isinstance(source, Synthetic):
        return _SYNTHETIC.format(
            workload=source.workload,
            heads=source.kv_heads * source.group,
            kv_heads=source.kv_heads,
            head_dim=HEAD_DIM,
            chunk=place.stop - place.start,
            correlation=source.correlation,
            seed=source.seed,
            **at,
        )
    return _RECORDED.format(
        path=_path(source, "sample_path()"),
        sample="" if source.path else ", sample_path",
        layer=place.layer,
        past=f"prompt.feed(0, {place.start})\n" if place.start else "",
        **at,
    )


def _imported(selector: Selector) -> str:
    return "load_seer_gates" if isinstance(selector, SeerGate) else type(selector).__name__


def _selector(name: str, selector: Selector, weights: GateWeights | None, place: Place) -> str:
    """What makes a selector; a gate is read from its file."""
    if not isinstance(selector, SeerGate):
        return f"{name} = {selector!r}\n"
    assert weights is not None
    heads, _, head_dim = selector.weights.shape
    tensors = ("weights", "inv_freq")
    plain = [field.name for field in fields(selector) if field.name not in tensors]
    return _GATE.format(
        name=name,
        path=_path(weights, repr("inspector/gate/seer_gate.safetensors")),
        heads=heads,
        head_dim=head_dim,
        layer=place.layer,
        fields=", ".join(f"{field}={getattr(selector, field)!r}" for field in plain),
    )


def _path(file: ChosenFile, shipped: str) -> str:
    return repr(file.path) if file.path else shipped
