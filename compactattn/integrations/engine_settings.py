"""Settings of a serving engine's plugin, and what a plugin refuses at start-up; nothing here imports an engine.

An engine hands over one JSON object, such as

    {"alpha": 0.18, "dense_layers": 2, "dense_keys": 8192}
    {"settings": "/path/to/settings.json", "dense_keys": 8192}

`SETTINGS` lists what it may hold. Without `settings`, every layer has the one selector that the object describes. With
it, each layer has the selector of the file, as `compactattn.settings` reads it and `compactattn tune` writes it: layers
that are not in the file are dense, the file's groups hold, and so does every field of its selectors, `dense_keys` too.
What is said of the whole model beside it (`OF_THE_MODEL`) counts more than the file; a selector and its parameters
beside it are refused, because the file has those for each layer. An engine's steps do not say where a prompt ends:
`dense_last_blocks` holds for the end of each of a request's chunks, the last of which ends its prompt. It is 2 without
a settings file: a question at a prompt's end is what loses most where it does not read everything. Every error is a
ValueError that names the setting, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import torch

from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Selector, XAttention
from compactattn.settings import load_settings
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

#: selectors by the names that the command line has for them
SELECTORS: dict[str, type[FlashPrefill | KeyBounds | XAttention | Dense]] = {
    "flashprefill": FlashPrefill,
    "keybounds": KeyBounds,
    "xattention": XAttention,
    "dense": Dense,
}
#: what a selector is, and how it sees the cache: in a settings file, or for all layers beside none
OF_THE_SELECTOR = (
    "selector",
    "alpha",
    "threshold",
    "stride",
    "sink_blocks",
    "window_blocks",
    "block_size",
    "query_block",
)
#: which requests run dense in every layer
DENSE_REQUESTS = ("dense_keys", "dense_queries")
#: fields of selectors that may be said of all of them at once
OF_ALL_SELECTORS = (*DENSE_REQUESTS, "dense_last_blocks")
#: what holds for the whole model, whatever its selectors are
OF_THE_MODEL = (*OF_ALL_SELECTORS, "dense_layers", "heads_per_group", "query_blocks_per_span", "correction")
SETTINGS = (*OF_THE_SELECTOR, *OF_THE_MODEL, "settings")
#: fields of selectors that all layers share, so that one plan of a step serves them all
SHARED = ("block_size", "query_block", *DENSE_REQUESTS)
#: unless the settings say otherwise: a context of at most so many keys runs dense, and so does the end of every chunk
DENSE_KEYS, DENSE_LAST_BLOCKS = 4096, 2


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
    def ends_dense(self) -> bool:
        """Whether some layer that selects keeps the end of each chunk dense."""
        return any(its.dense_last_blocks for its in self._selecting)

    @property
    def dense_end(self) -> int:
        """A request with at most so many queries in a step runs dense, because they all are the end of its chunk."""
        return min((its.dense_last_blocks * its.query_block for its in self._selecting), default=0)

    @property
    def _selecting(self) -> list[Selector]:
        return [its for its in (self.others, *self.layers.values()) if not isinstance(its, Dense)]

    @property
    def dense_queries(self) -> int:
        """A request with at most so many queries in a step runs dense."""
        return self.others.dense_queries

    @property
    def dense_keys(self) -> int:
        """A request with at most so many keys, this step's included, runs dense."""
        return self.others.dense_keys

    def why_all_dense(self, *, chunk: int, longest: int) -> str | None:
        """Why no step can leave anything out, though some layer selects; None if one can, or none selects.

        Args:
            chunk: queries of a request in a step, at most.
            longest: keys of a request, at most.
        """
        if not self._selecting:
            return None
        if self.dense_keys >= longest:
            return f"requests have at most {longest} tokens, and up to dense_keys {self.dense_keys} they run dense"
        for name, end in (("dense_queries", self.dense_queries), ("dense_last_blocks", self.dense_end)):
            if end >= chunk:
                return f"chunks have at most {chunk} tokens, and up to {end} they run dense by {name}"
        return None

    def check_model(self, *, num_layers: int, page_size: int) -> None:
        """Refuse layer numbers that the model does not have, and pages that are larger than a KV block."""
        for layer in self.layers:
            if layer >= num_layers:
                raise fail("layers of the settings file", f"numbers from 0 to {num_layers - 1}", layer)
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


def own_object(given: Mapping[str, Any], key: str, where: str, *, alone: bool = True) -> object:
    """The plugin's object among what an engine was given for all; an empty one where there is none.

    Args:
        given: by the names of whom it is for.
        key: of the plugin's object.
        where: what the user calls the whole, for errors.
        alone: nobody else has settings by the names of `SETTINGS` in it.

    Raises:
        ValueError: no such object, but one with nearly its name, or the settings themselves.
    """
    if key in given:
        return given[key]
    for name in get_close_matches(key, map(str, given), n=1, cutoff=0.85):
        raise fail(where, f"the plugin's settings in an object {key!r}", f"{name!r}")
    for name in given if alone else ():
        if name in SETTINGS:
            raise fail(where, f"{name!r} in an object {key!r}", f"{name!r} beside it")
    return {}


def parse_settings(options: object, name: str) -> EngineSettings:
    """Read an engine's JSON object (`SETTINGS`).

    Args:
        options: the object; an empty one gives the defaults.
        name: what the user calls it, for errors.

    Raises:
        ValueError: an unknown setting, a value out of range, a settings file that cannot be used, or a setting that has
            no meaning beside one.
    """
    if not isinstance(options, Mapping):
        raise fail(name, "a JSON object", type(options).__name__)
    for key in options:
        if key not in SETTINGS:
            raise fail(name, "settings among " + ", ".join(SETTINGS), repr(key))
    chosen = dict(options)
    settings = _of_file(chosen, name) if "settings" in chosen else _of_one_selector(chosen, name)
    try:
        check_heads_per_group(settings.heads_per_group)
        check_span(settings.query_blocks_per_span)
        check_int("dense_layers", settings.dense_layers, 0)
        if not isinstance(settings.correction, bool):
            raise fail("correction", "true or false", repr(settings.correction))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return settings


def _of_one_selector(chosen: dict[str, Any], name: str) -> EngineSettings:
    """Every layer has the selector that the settings describe."""
    own = {key: chosen.pop(key) for key in (*OF_THE_SELECTOR, *OF_ALL_SELECTORS) if key in chosen}
    usual = {"dense_keys": DENSE_KEYS}
    if own.get("selector") != "dense":
        usual["dense_last_blocks"] = DENSE_LAST_BLOCKS
    return EngineSettings(_selector(usual | own, name), {}, **chosen)


def _of_file(chosen: dict[str, Any], name: str) -> EngineSettings:
    """Each layer has the selector of the file; what else is chosen counts more than the file."""
    path = chosen.pop("settings")
    if not isinstance(path, str):
        raise fail(f"{name}: settings", "the path of a settings file", repr(path))
    for key in OF_THE_SELECTOR:
        if key in chosen:
            raise fail(f"{name}: {key}", "nothing beside settings, whose file has it by layer", repr(chosen[key]))
    try:
        held = load_settings(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: settings: {error}") from error
    overrides = {key: chosen.pop(key) for key in OF_ALL_SELECTORS if key in chosen}
    for key, value in overrides.items():
        check_int(f"{name}: {key}", value, 0)
    layers = {number: replace(selector, **overrides) for number, selector in held["selector"].items()}
    others = _dense_beside(layers, f"{name}: settings: {path}")
    layers = {number: others if isinstance(selector, Dense) else selector for number, selector in layers.items()}
    grouping = {key: held[key] for key in ("heads_per_group", "query_blocks_per_span")}
    return EngineSettings(others, layers, **{**grouping, **chosen})


def _dense_beside(layers: Mapping[int, Selector], where: str) -> Dense:
    """Every block, in the sizes that all layers share; a ValueError where they do not.

    A dense layer is the same in all sizes, and takes those of the others.
    """
    selecting = {number: its for number, its in layers.items() if not isinstance(its, Dense)}
    first, model = next(iter((selecting or layers).items()))
    for number, selector in selecting.items():
        for key in SHARED:
            if getattr(selector, key) != getattr(model, key):
                expected = f"{getattr(model, key)}, as layer {first} has"
                raise fail(f"{where}: layers.{number}.{key}", expected, getattr(selector, key))
    return Dense(**{key: getattr(model, key) for key in SHARED})


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

#: what a layer may ask of its attention, with what is expected of it: the one place where models are refused by name.
#: `attend` has windows, soft caps and sinks; these plugins do not hand them on.
REFUSED = {
    "alibi_slopes": "none (compactattn has no ALiBi position biases)",
    "sliding_window": "none (this plugin runs no sliding-window layers; give those another backend)",
    "logits_soft_cap": "none (this plugin runs no layers with soft-capped scores)",
    "sinks": "none (this plugin runs no layers with attention sinks)",
    "kv_sharing_target_layer_name": "none (this plugin runs no layers that share another layer's KV cache)",
    "use_irope": "none (this plugin runs no chunked local attention)",
    "xai_temperature_len": "none (compactattn has no temperature by position)",
    "pos_encoding_mode": "none (compactattn has no position biases)",
    "return_lse": "none (this plugin hands no log-sum-exp back)",
}


def check_refused(asked: Mapping[str, object]) -> None:
    """Refuse, by name, whatever a layer asks for beyond plain attention.

    Args:
        asked: by the engine's name for it; a value of None or False asks for nothing, and neither does a soft cap of 0.

    Raises:
        ValueError: naming what was asked for and what is possible.
    """
    for name, value in asked.items():
        if value is None or value is False or (name == "logits_soft_cap" and value == 0):
            continue
        shown = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise fail(name, REFUSED.get(name, "none (unknown here)"), shown)


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
    """Refuse, by name, a layer that a plugin does not run.

    Args:
        heads, kv_heads: of this rank.
        head_size: D, of keys and values alike.
        attention_type: the engine's word for it; "decoder" is causal self-attention.
        cache_dtype: the engine's word for the cache's type; "auto" is the model's.
        settings: of the plugin.
        others: everything else that the engine asks for, see `check_refused`.

    Raises:
        ValueError: naming what was asked for and what is possible.
    """
    if attention_type != "decoder":
        raise fail("attention type", "decoder (causal self-attention)", attention_type)
    check_refused(others)
    if head_size not in HEAD_DIMS:
        raise fail("head size", "one of " + ", ".join(map(str, HEAD_DIMS)), head_size)
    if cache_dtype not in ("auto", "float16", "bfloat16"):
        raise fail("KV cache dtype", "auto, float16 or bfloat16 (this plugin runs no quantised caches)", cache_dtype)
    if kv_heads < 1 or heads % kv_heads or heads // kv_heads > MAX_HEADS_PER_KV_HEAD:
        expected = f"a multiple of the {kv_heads} KV heads, at most {MAX_HEADS_PER_KV_HEAD} for each"
        raise fail("query heads of a rank", expected, heads)
    check_heads_per_group(settings.heads_per_group, heads, heads // kv_heads)


def check_dtypes(q: torch.dtype, cache: torch.dtype) -> None:
    """Refuse a model dtype that compactattn does not have, and a cache of another dtype than the model's."""
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
