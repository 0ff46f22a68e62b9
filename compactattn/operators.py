"""The public stages as operators of PyTorch (`torch.ops.compactattn`), for graphs that `torch.compile` makes.

An eager call of a stage goes straight to its backend and asks one flag: whether it is being compiled. While it is, the
stage puts its operator into the graph: arguments are taken apart into tensors and numbers, and put together again when
the graph runs; then the eager stage does the rest, checks included. So a graph that runs refuses what an eager call
refuses, in the same words.

Each operator declares what it writes to (a summary, `out`, counters), and has a fake implementation: the shapes of its
results follow from shapes and host integers alone, so a graph serves other lengths too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from compactattn.data import BlockTable, GateKeys, GroupMask, KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, SeerGate, Selector, XAttention
from compactattn.validation import fail

Given = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """How an operator is given one argument of a stage.

    Attributes:
        schema: the operator's own arguments that it becomes.
        apart: from the stage's argument to those, by name.
        together: from those, in the schema's order, back to the stage's one.
    """

    schema: str
    apart: Callable[[Any], Given]
    together: Callable[..., Any]


def _names(schema: str) -> list[str]:
    return [argument.split()[-1] for argument in schema.split(", ")]


def _plain(schema: str) -> Part:
    """A tensor, a number or a flag as it is."""
    name = _names(schema)[0]
    return Part(schema, lambda value: {name: value}, lambda value: value)


def _record(kind: type, schema: str) -> Part:
    """A record by its fields, which the schema names in their order."""
    names = _names(schema)
    assert names == [field.name for field in fields(kind)]
    return Part(schema, lambda record: {name: getattr(record, name) for name in names}, kind)


_BLOCKS = "SymInt block_size, SymInt query_block"
_KV = _record(PagedKV, "Tensor k, Tensor v, Tensor page_table, Tensor? k_scale, Tensor? v_scale")
_BATCH = _record(
    PrefillBatch, "Tensor cu_seqlens_q, Tensor seq_lens, SymInt max_q_len, SymInt max_seq_len, Tensor? prompt_lens"
)
_SELECTION = _record(SelectionMask, f"Tensor mask, {_BLOCKS}, SymInt dense_last_blocks, SymInt? kv_heads")
_GROUPS = _record(GroupMask, f"Tensor keep, Tensor rows, {_BLOCKS}")
_TABLE = _record(BlockTable, f"Tensor indices, Tensor counts, Tensor rows, {_BLOCKS}")


def _means_apart(summary: KVSummary | None) -> Given:
    means: Given = {"k_mean": None, "v_mean": None, "k_bounds": None, "unit": 0}
    gate: Given = {"gate_keys": None, "gate_inv_freq": None, "gate_scale": 1.0}
    if summary is not None:
        means = {name: getattr(summary, name) for name in means}
        if (keys := summary.gate) is not None:
            gate = {"gate_keys": keys.pooled, "gate_inv_freq": keys.inv_freq, "gate_scale": keys.rope_scale}
    return {**means, **gate}


def _means_together(
    k_mean: Tensor | None,
    v_mean: Tensor | None,
    gate_keys: Tensor | None,
    k_bounds: Tensor | None,
    gate_inv_freq: Tensor | None,
    gate_scale: float,
    unit: int,
) -> KVSummary | None:
    if k_mean is None:
        return None
    gate = None if gate_keys is None or gate_inv_freq is None else GateKeys(gate_keys, gate_inv_freq, gate_scale)
    return KVSummary(k_mean, v_mean, unit, gate, k_bounds)


def _means(written: bool) -> Part:
    marks = ("(a!)", "(b!)", "(c!)", "(d!)") if written else ("", "", "", "")
    tensors = "Tensor{}? k_mean, Tensor{}? v_mean, Tensor{}? gate_keys, Tensor{}? k_bounds".format(*marks)
    schema = f"{tensors}, Tensor? gate_inv_freq, float gate_scale, SymInt unit"
    return Part(schema, _means_apart, _means_together)


_KINDS = {kind.__name__: kind for kind in (FlashPrefill, KeyBounds, XAttention, Oracle, Dense, SeerGate)}
#: the fields of each kind of selector that are floats, and the integers that all of them have
_NUMBERS: dict[str, tuple[str, ...]] = {"FlashPrefill": ("alpha",), "SeerGate": ("rope_scale", "threshold")}
_NUMBERS |= dict.fromkeys(("KeyBounds", "XAttention"), ("threshold",))
_INTEGERS: tuple[str, ...] = ("block_size", "query_block", "sink_blocks", "window_blocks")
_INTEGERS += ("dense_queries", "dense_keys", "dense_last_blocks")


def _selector_fields(kind: str, by_mass: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if kind == "Oracle":
        return (("mass",), _INTEGERS) if by_mass else ((), (*_INTEGERS, "top_k"))
    return _NUMBERS.get(kind, ()), (*_INTEGERS, "stride") if kind == "XAttention" else _INTEGERS


def _selector_apart(selector: Selector) -> Given:
    kind = type(selector).__name__
    numbers, integers = _selector_fields(kind, getattr(selector, "mass", None) is not None)
    return {
        "kind": kind,
        "numbers": [getattr(selector, name) for name in numbers],
        "integers": [getattr(selector, name) for name in integers],
        "weights": getattr(selector, "weights", None),
        "inv_freq": getattr(selector, "inv_freq", None),
    }


def _selector_together(
    kind: str, numbers: list[float], integers: list[int], weights: Tensor | None, inv_freq: Tensor | None
) -> Selector:
    if weights is None or inv_freq is None:
        return _selector(kind, tuple(numbers), tuple(integers))
    return SeerGate(weights=weights, inv_freq=inv_freq, **_selector_values(kind, numbers, integers))


@functools.lru_cache(maxsize=256)
def _selector(kind: str, numbers: tuple[float, ...], integers: tuple[int, ...]) -> Selector:
    """A selector without tensors, which is made and checked once."""
    return _KINDS[kind](**_selector_values(kind, numbers, integers))


def _selector_values(kind: str, numbers: Sequence[float], integers: Sequence[int]) -> Given:
    names = _selector_fields(kind, len(numbers) > 0)
    return dict(zip((*names[0], *names[1]), (*numbers, *integers), strict=True))


_SELECTOR = Part(
    "str kind, float[] numbers, SymInt[] integers, Tensor? weights, Tensor? inv_freq",
    _selector_apart,
    _selector_together,
)
_HEADS = Part(
    "SymInt? heads_per_group",
    lambda heads: {"heads_per_group": None if heads == "auto" else heads},
    lambda heads: "auto" if heads is None else heads,
)
_SPAN = Part(
    "SymInt? query_blocks_per_span, bool any_span",
    lambda span: {"query_blocks_per_span": None if span == "auto" else span, "any_span": span == "auto"},
    lambda span, any_span: "auto" if any_span else span,
)
_SINCE = Part(
    "Tensor? since, SymInt? since_all",
    lambda since: (
        {"since": since, "since_all": None} if isinstance(since, Tensor) else {"since": None, "since_all": since}
    ),
    lambda since, since_all: since_all if since is None else since,
)


# ---- fakes: the shapes of results ----


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _blocks(given: Given) -> tuple[int, int]:
    """(Qb, Kb) of the batch and the selector."""
    block_size, query_block = given["integers"][:2]
    return -(-given["max_q_len"] // query_block), -(-given["max_seq_len"] // block_size)


def _table_rows(given: Given, heads: int, q_blocks: int, dense_last_blocks: int) -> int:
    """R, as `compactattn.unite` says."""
    size, group, span = given["seq_lens"].shape[0], given["heads_per_group"], given["query_blocks_per_span"]
    if group is None or given["any_span"]:
        groups, spans = heads, q_blocks
    else:
        groups, spans = heads // group, min(q_blocks, 1) if span is None else -(-q_blocks // span)
    dense_end = dense_last_blocks > 0 and given["prompt_lens"] is not None
    return size * groups * spans + (size if dense_end else 0)


def _fake_mask(given: Given) -> Tensor:
    shape = (given["seq_lens"].shape[0], given["q"].shape[1], *_blocks(given))
    return _empty(given["q"], *shape, dtype=torch.bool)


def _fake_groups(given: Given) -> tuple[Tensor, Tensor]:
    mask = given["mask"]
    size, heads, q_blocks, kv_blocks = mask.shape
    rows = _table_rows(given, heads, q_blocks, given["dense_last_blocks"])
    return _empty(mask, rows, kv_blocks, dtype=torch.bool), _empty(mask, size, heads, q_blocks)


def _fake_table(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    q, (q_blocks, kv_blocks) = given["q"], _blocks(given)
    rows = _table_rows(given, q.shape[1], q_blocks, given["integers"][_INTEGERS.index("dense_last_blocks")])
    return _empty(q, rows, kv_blocks), _empty(q, rows), _empty(q, given["seq_lens"].shape[0], q.shape[1], q_blocks)


def _fake_lse(given: Given) -> Tensor:
    shape = given["q"].shape[:2] if given["return_lse"] else (0,)
    return _empty(given["q"], *shape, dtype=torch.float32)


# ---- operators ----


@dataclass(frozen=True)
class Operator:
    """A stage of `compactattn` as an operator of the same name.

    Attributes:
        parts: how the operator is given each of the stage's arguments.
        result: the schema of what it returns.
        tensors: from the stage's result to the operator's.
        fake: from the operator's arguments to results of the right shape.
        finish: from the stage's arguments and the operator's result to the stage's.
    """

    parts: dict[str, Part]
    result: str
    tensors: Callable[[Any], Any]
    fake: Callable[[Given], Any]
    finish: Callable[[Given, Any], Any]


def _lse_of(result: Any) -> Tensor:
    """What an operator that writes `out` returns: the log-sum-exp, an empty one where nobody wants it."""
    return result[1] if isinstance(result, tuple) else _empty(result, 0, dtype=torch.float32)


def _with_out(arguments: Given, lse: Tensor) -> Any:
    return (arguments["out"], lse) if arguments.get("return_lse", True) else arguments["out"]


def _selection(arguments: Given, mask: Tensor) -> SelectionMask:
    selector, kv_heads = arguments["selector"], arguments["kv"].num_kv_heads
    return SelectionMask(mask, selector.block_size, selector.query_block, selector.dense_last_blocks, kv_heads)


def _groups(arguments: Given, groups: tuple[Tensor, Tensor]) -> GroupMask:
    selection = arguments["selection"]
    return GroupMask(*groups, selection.block_size, selection.query_block)


def _listed(arguments: Given, listed: tuple[Tensor, Tensor]) -> BlockTable:
    groups = arguments["groups"]
    return BlockTable(*listed, groups.rows.contiguous(), groups.block_size, groups.query_block)


def _selected(arguments: Given, table: tuple[Tensor, Tensor, Tensor]) -> BlockTable:
    return BlockTable(*table, arguments["selector"].block_size, arguments["selector"].query_block)


_STEP = {"q": _plain("Tensor q"), "kv": _KV, "batch": _BATCH}
_GROUPING = {"heads_per_group": _HEADS, "query_blocks_per_span": _SPAN}
_SCALE, _BACKEND, _WINDOW = (
    {_names(schema)[0]: _plain(schema)} for schema in ("float? scale", "str? backend", "SymInt? window")
)
#: by another name, because Dynamo takes no views with gaps for what an operator calls `out`
_OUT = {"out": Part("Tensor(z!) written", lambda out: {"written": out}, lambda written: written)}
_FEATURES = {"softcap": _plain("float? softcap"), **_WINDOW, "sinks": _plain("Tensor? sinks")}
_RESULT = {"return_lse": _plain("bool return_lse"), **_OUT, **_BACKEND}

_OPERATORS = {
    "summarize": Operator(
        {
            "kv": _KV,
            "batch": _BATCH,
            "block_size": _plain("SymInt block_size"),
            "values": _plain("bool values"),
            "since": _SINCE,
            "summary": _means(written=True),
            **_BACKEND,
        },
        "()",
        lambda summary: None,
        lambda given: None,
        lambda arguments, nothing: arguments["summary"],
    ),
    "select": Operator(
        {**_STEP, "selector": _SELECTOR, **_SCALE, "summary": _means(written=False), **_BACKEND},
        "Tensor",
        lambda selection: selection.mask,
        _fake_mask,
        _selection,
    ),
    "unite": Operator(
        {"selection": _SELECTION, "batch": _BATCH, **_GROUPING, **_BACKEND},
        "(Tensor, Tensor)",
        lambda groups: (groups.keep, groups.rows),
        _fake_groups,
        _groups,
    ),
    "build_table": Operator(
        {"groups": _GROUPS, **_BACKEND},
        "(Tensor, Tensor)",
        lambda table: (table.indices, table.counts),
        lambda given: (_empty(given["keep"], *given["keep"].shape), _empty(given["keep"], given["keep"].shape[0])),
        _listed,
    ),
    "attend": Operator(
        {**_STEP, "table": _TABLE, **_SCALE, "correction": _means(written=False), **_FEATURES, **_RESULT},
        "Tensor",
        _lse_of,
        _fake_lse,
        _with_out,
    ),
    "prefill": Operator(
        {
            **_STEP,
            "selector": _SELECTOR,
            **_GROUPING,
            **_SCALE,
            "summary": _means(written=True),
            "correction": _plain("bool correction"),
            **_FEATURES,
            "density": _plain("Tensor(y!)? density"),
            **_RESULT,
        },
        "Tensor",
        _lse_of,
        _fake_lse,
        _with_out,
    ),
    "select_table": Operator(
        {**_STEP, "selector": _SELECTOR, **_GROUPING, **_SCALE, "summary": _means(written=True), **_BACKEND},
        "(Tensor, Tensor, Tensor)",
        lambda table: (table.indices, table.counts, table.rows),
        _fake_table,
        _selected,
    ),
    "merge_attn_states": Operator(
        {name: _plain(f"Tensor {name}") for name in ("out_a", "lse_a", "out_b", "lse_b")} | _OUT | _BACKEND,
        "Tensor",
        _lse_of,
        lambda given: _empty(given["lse_a"], *given["lse_a"].shape, dtype=torch.float32),
        _with_out,
    ),
    "count_density": Operator(
        {"table": _TABLE, "batch": _BATCH, "counter": _plain("Tensor(z!) counter"), **_WINDOW, **_BACKEND},
        "()",
        lambda nothing: None,
        lambda given: None,
        lambda arguments, nothing: None,
    ),
}


def apart(name: str, arguments: Given) -> Given:
    """The arguments of `torch.ops.compactattn.<name>`, by name and in order, for those of the stage."""
    given: Given = {}
    for argument, part in _OPERATORS[name].parts.items():
        given.update(part.apart(arguments[argument]))
    return {key: given[key] for key in _ORDER[name]}


def call(name: str, **arguments: Any) -> Any:
    """A stage while a graph is being made: its operator, between arguments taken apart and a result put together."""
    operator = _OPERATORS[name]
    wanted = arguments.get("out")
    if "out" in operator.parts:
        like = arguments["q"] if "q" in arguments else arguments["out_a"]
        if wanted is None or any(wanted is other for key, other in arguments.items() if key != "out"):
            # an operator must not be given one tensor to read and to write
            arguments["out"] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    given = apart(name, arguments)
    for key in ("q", "k", "v", "sinks", "out_a", "lse_a", "out_b", "lse_b"):
        if isinstance(given.get(key), Tensor) and given[key].requires_grad and torch.is_grad_enabled():
            raise fail(key, "a tensor without gradients (inference only)", "requires_grad=True under grad mode")
    result = getattr(torch.ops.compactattn, name)(*given.values())
    if wanted is not None and wanted is not arguments["out"]:
        arguments["out"] = wanted.copy_(arguments["out"])
    return operator.finish(arguments, result)


#: names of each operator's arguments, as its schema has them
_ORDER = {
    name: [key for part in operator.parts.values() for key in _names(part.schema)]
    for name, operator in _OPERATORS.items()
}
_library = torch.library.Library("compactattn", "DEF")


def _register(name: str, operator: Operator) -> None:
    schema = ", ".join(part.schema for part in operator.parts.values())
    places, end = [], 0
    for argument, part in operator.parts.items():
        start, end = end, end + len(_names(part.schema))
        places.append((argument, part.together, start, end))

    def run(*args: Any) -> Any:
        import compactattn

        arguments = {argument: together(*args[start:end]) for argument, together, start, end in places}
        return operator.tensors(getattr(compactattn, name)(**arguments))

    def fake(*args: Any) -> Any:
        return operator.fake(dict(zip(_ORDER[name], args, strict=True)))

    _library.define(f"{name}({schema}) -> {operator.result}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compactattn::{name}", fake, lib=_library)


for _name, _operator in _OPERATORS.items():
    _register(_name, _operator)
