"""Settings of a serving engine's plugin, and what a plugin refuses at start-up; nothing here imports an engine.

An engine hands over one JSON object, such as

    {"alpha": 0.18, "dense_layers": 2, "dense_keys": 8192}
    {"settings": "/path/to/settings.json"}

`SETTINGS` lists what it may hold. `settings` names a file with an object of the same kind; what stands beside it
overrides the file. `layers` maps layer numbers to parameters of their own, {"3": {"alpha": 0.12}, "4": {"selector":
"dense"}}; each starts from the common values, and layers that it leaves out are dense. Every error is a ValueError
that names the setting, what was expected and what came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from compactattn.selectors import Dense, FlashPrefill, Selector, XAttention
from compactattn.validation import (
    DTYPES,
    HEAD_DIMS,
    MAX_HEADS_PER_KV_HEAD,
    Auto,
    check_heads_per_group,
    check_int,
    check_span,
    fail,
)

#: selectors by the names that the command line has for them; the others need more than an engine hands over
SELECTORS: dict[str, type[FlashPrefill | XAttention | Dense]] = {
    "flashprefill": FlashPrefill,
    "xattention": XAttention,
    "dense": Dense,
}
#: a selector's own parameters, which a layer may have to itself
OWN = ("alpha", "threshold", "stride", "sink_blocks", "window_blocks")
#: a selector's parameters that all layers share, so that one plan of a step serves them all
SHARED = ("block_size", "query_block", "dense_queries", "dense_keys")
SETTINGS = (
    "selector",
    *OWN,
    *SHARED,
    "heads_per_group",
    "query_blocks_per_span",
    "dense_layers",
    "correction",
    "layers",
    "settings",
)
DENSE_KEYS = 4096  # a context of at most so many keys runs dense, unless the settings say otherwise
FILE_LIMIT = 1 << 20  # bytes of a settings file


@dataclass(frozen=True)
class EngineSettings:
    """What a plugin runs its layers with.

    Attributes:
        others: the selector of layers that `layers` does not name.
        layers: layer number to selector.
        heads_per_group, query_blocks_per_span: which heads and query blocks share a block table, see `unite`.
        dense_layers: the first so many layers read every block.
        correction: let the past blocks that a table leaves out speak through their means, see `attend`.
    """

    others: Selector
    layers: Mapping[int, Selector]
    heads_per_group: int | Auto = 1
    query_blocks_per_span: int | Auto | None = 1
    dense_layers: int = 0
    correction: bool = False

    def of_layer(self, layer: int) -> Selector:
        return self.dense if layer < self.dense_layers else self.layers.get(layer, self.others)

    @property
    def dense(self) -> Dense:
        """Every block, in the sizes that all layers share."""
        return Dense(**{name: getattr(self.others, name) for name in SHARED})

    @property
    def dense_queries(self) -> int:
        """A request with at most so many queries in a step runs dense."""
        return self.others.dense_queries

    @property
    def dense_keys(self) -> int:
        """A request with at most so many keys, this step's included, runs dense."""
        return self.others.dense_keys

    def check_model(self, *, num_layers: int, page_size: int) -> None:
        """Refuse layer numbers that the model does not have, and pages that are larger than a KV block."""
        for layer in self.layers:
            if layer >= num_layers:
                raise fail("layers", f"layer numbers from 0 to {num_layers - 1}", layer)
        if self.dense_layers > num_layers:
            raise fail("dense_layers", f"at most the model's {num_layers} layers", self.dense_layers)
        block_size = self.others.block_size
        if page_size not in page_sizes(block_size):
            sizes = ", ".join(map(str, page_sizes(block_size)))
            raise fail("KV cache block size", f"one of {sizes} (for block_size {block_size})", page_size)


def page_sizes(block_size: int) -> list[int]:
    """KV cache block sizes that a selector's `block_size` allows, in tokens.

    Engines copy a partly filled cache block when a request takes over part of a prefix. A block that is no larger than
    the unit of a mean then has no complete mean that would have to be copied too.
    """
    return [size for size in (16, 32, 64, 128, 256) if size <= block_size]


def parse_settings(options: object, name: str) -> EngineSettings:
    """Read an engine's JSON object (`SETTINGS`).

    Args:
        options: the object; an empty one gives the defaults.
        name: what the user calls it, for errors.

    Raises:
        ValueError: an unknown setting, a value out of range, or a settings file that cannot be used.
    """
    chosen = _mapping(options, name, SETTINGS)
    path = chosen.pop("settings", None)
    if path is not None:
        chosen = {**_read(path), **chosen}
    own = chosen.pop("layers", None)
    common = {key: chosen.pop(key) for key in ("selector", *OWN, *SHARED) if key in chosen}
    others = _selector({"dense_keys": DENSE_KEYS, **common}, name)
    layers = {}
    if own is not None:
        layers = _layers(own, common, others)
        others = _selector({"selector": "dense", **{key: getattr(others, key) for key in SHARED}}, name)
    settings = EngineSettings(others, layers, **chosen)
    if settings.heads_per_group != "auto":
        check_int("heads_per_group", settings.heads_per_group, 1)
    check_span(settings.query_blocks_per_span)
    check_int("dense_layers", settings.dense_layers, 0)
    if not isinstance(settings.correction, bool):
        raise fail("correction", "true or false", repr(settings.correction))
    return settings


def _mapping(value: object, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise fail(name, "a JSON object", type(value).__name__)
    for key in value:
        if key not in known:
            raise fail(name, "settings among " + ", ".join(known), repr(key))
    return dict(value)


def _read(path: object) -> dict[str, Any]:
    if not isinstance(path, str):
        raise fail("settings", "the path of a JSON file", repr(path))
    try:
        with Path(path).open("rb") as file:
            text = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise fail("settings", "the path of a JSON file", f"{path!r}: {error.strerror}") from error
    if len(text) > FILE_LIMIT:
        raise fail("settings", f"a file of at most {FILE_LIMIT} bytes", f"{path!r}, which is larger")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise fail("settings", "a JSON file", f"{path!r}: {error}") from error
    return _mapping(value, f"settings file {path!r}", tuple(key for key in SETTINGS if key != "settings"))


def _layers(own: object, common: dict[str, Any], others: Selector) -> dict[int, Selector]:
    if not isinstance(own, Mapping) or not own:
        raise fail("layers", "a JSON object of layer numbers and their parameters", repr(own))
    shared = {key: getattr(others, key) for key in SHARED}
    layers: dict[int, Selector] = {}
    for number, parameters in own.items():
        if not (isinstance(number, str) and number.isascii() and number.isdigit()):
            raise fail("layers", "layer numbers as strings of digits", repr(number))
        where = f"layers[{number}]"
        given = _mapping(parameters, where, ("selector", *OWN))
        changed = given.get("selector", common.get("selector")) != common.get("selector")
        inherited = {} if changed else {key: common[key] for key in ("selector", *OWN) if key in common}
        layers[int(number)] = _selector({**inherited, **given, **shared}, where)
    return layers


def _selector(parameters: dict[str, Any], name: str) -> Selector:
    """The selector of a JSON object; parameters that another selector has are refused by name."""
    parameters = dict(parameters)
    kind = parameters.pop("selector", "flashprefill")
    if not isinstance(kind, str) or kind not in SELECTORS:
        raise fail(f"{name}: selector", "one of " + ", ".join(SELECTORS), repr(kind))
    known = [field.name for field in fields(SELECTORS[kind])]
    for key in parameters:
        if key not in known:
            raise fail(f"{name}: {key}", f"a parameter of {kind} ({', '.join(known)})", repr(parameters[key]))
    try:
        return SELECTORS[kind](**parameters)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# ---- what a plugin refuses ----

#: what a layer may ask of its attention, with what is expected of it: the one place where models are refused by name
REFUSED = {
    "alibi_slopes": "none (no ALiBi position biases)",
    "sliding_window": "none (no sliding-window layers; give those another backend)",
    "logits_soft_cap": "none (no soft-capped scores)",
    "sinks": "none (no attention sinks)",
    "kv_sharing_target_layer_name": "none (no layers that share another layer's KV cache)",
}


def check_layer(
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    attention_type: str,
    cache_dtype: str,
    settings: EngineSettings,
    others: Mapping[str, object],
) -> None:
    """Refuse, by name, a layer that cannot run here.

    Args:
        heads, kv_heads: of this rank.
        head_size: D, of keys and values alike.
        attention_type: the engine's word for it; "decoder" is causal self-attention.
        cache_dtype: the engine's word for the cache's type; "auto" is the model's.
        settings: of the plugin.
        others: everything else that the engine asks for, by its name there; a value of None or False asks for nothing,
            and neither does a soft cap of 0.

    Raises:
        ValueError: naming what was asked for and what is possible.
    """
    if attention_type != "decoder":
        raise fail("attention type", "decoder (causal self-attention)", attention_type)
    for name, value in others.items():
        if value is None or value is False or (name == "logits_soft_cap" and value == 0):
            continue
        shown = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise fail(name, REFUSED.get(name, "none (unknown here)"), shown)
    if head_size not in HEAD_DIMS:
        raise fail("head size", "one of " + ", ".join(map(str, HEAD_DIMS)), head_size)
    if cache_dtype not in ("auto", "float16", "bfloat16"):
        raise fail("KV cache dtype", "auto, float16 or bfloat16", cache_dtype)
    if heads % kv_heads or heads // kv_heads > MAX_HEADS_PER_KV_HEAD:
        expected = f"a multiple of the {kv_heads} KV heads, at most {MAX_HEADS_PER_KV_HEAD} for each"
        raise fail("query heads of a rank", expected, heads)
    check_heads_per_group(settings.heads_per_group, heads, heads // kv_heads)


def check_dtypes(q: torch.dtype, cache: torch.dtype) -> None:
    """Refuse a model dtype that the library does not have, or a cache of another dtype."""
    if q not in DTYPES:
        raise fail("model dtype", "float16, bfloat16 or float32", q)
    if cache != q:
        raise fail("KV cache dtype", f"{q}, as the model", cache)


def layer_number(name: str) -> int:
    """The number in a layer's name, such as 3 in "model.layers.3.self_attn.attn"."""
    numbers = [int(part) for part in name.split(".") if part.isascii() and part.isdigit()]
    if len(numbers) != 1:
        raise fail("layer name", "one with one number in it", repr(name))
    return numbers[0]
