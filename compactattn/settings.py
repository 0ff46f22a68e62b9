"""Settings of a model in a file: which selector each layer has, and how its block tables are shared.

A small JSON of plain data, which any engine can read; `compactattn tune` writes it, and `load_settings` gives what
`compactattn.integrations.transformers.enable` takes. The plugins for vLLM and SGLang read it by its path:

    enable(**load_settings("settings.json"))
    vllm serve MODEL … --additional-config '{"compactattn": {"settings": "settings.json"}}'
    sglang serve … --json-model-override-args '{"compactattn": {"settings": "settings.json"}}'

    {
      "format": "compactattn settings",
      "version": 1,
      "origin": "how it came about, for a reader",
      "heads_per_group": 1,
      "query_blocks_per_span": null,
      "layers": {
        "4": {"selector": "FlashPrefill", "alpha": 0.1473, "block_size": 128, ...},
        ...
      }
    }

`heads_per_group` and `query_blocks_per_span` are as for `compactattn.prefill`, "auto" included. `layers` maps the
layer's number to the name of a selector and its fields; fields that are left out have the selector's defaults, and
layers that are left out are dense. Anything else is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from compactattn.files import replacing
from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, Selector, XAttention
from compactattn.validation import Auto, check_heads_per_group, check_int, check_span, fail

FORMAT = "compactattn settings"
VERSION = 1
FILE_LIMIT = 1 << 20  # bytes of a settings file
_FIELDS = ("format", "version", "origin", "heads_per_group", "query_blocks_per_span", "layers")
_SELECTORS: dict[str, type] = {kind.__name__: kind for kind in (FlashPrefill, KeyBounds, XAttention, Oracle, Dense)}


class Settings(TypedDict):
    """Arguments of `compactattn.integrations.transformers.enable`, and per layer of `compactattn.prefill`.

    selector: the selector of each layer by its number; layers that are left out are dense.
    heads_per_group, query_blocks_per_span: which heads and query blocks share a block table.
    """

    selector: dict[int, Selector]
    heads_per_group: int | Auto
    query_blocks_per_span: int | Auto | None


def save_settings(path: str | os.PathLike[str], settings: Settings, *, origin: str = "") -> None:
    """Write settings to a file that appears whole or not at all; the same settings always give the same bytes.

    Args:
        path: the file.
        settings: what to write.
        origin: how the settings came about, for a reader.

    Raises:
        ValueError: settings that `load_settings` would refuse, or a selector that holds tensors (`SeerGate`).
        OSError: the file cannot be written.
    """
    names = ("selector", "heads_per_group", "query_blocks_per_span")
    if not isinstance(settings, Mapping) or any(name not in settings for name in names):
        raise fail("settings", f"a mapping with {', '.join(names)}", repr(settings))
    layers = {}
    for number, selector in sorted(settings["selector"].items()):
        name = type(selector).__name__
        if name not in _SELECTORS:
            raise fail(f"selector of layer {number}", " or ".join(_SELECTORS), name)
        fields = dataclasses.asdict(selector)
        layers[str(number)] = {"selector": name, **{k: v for k, v in fields.items() if v is not None}}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "origin": origin,
        "heads_per_group": settings["heads_per_group"],
        "query_blocks_per_span": settings["query_blocks_per_span"],
        "layers": layers,
    }
    _parse(content)
    text = json.dumps(content, indent=2, allow_nan=False).encode("ascii") + b"\n"
    _check_length(text)
    with replacing(path) as file:
        file.write(text)


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """Read settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, another version, a field that is unknown, missing, given twice or out of range. The
            message names the file, what was expected and what came.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a settings file, got no file at all")
    try:
        with file.open("rb") as opened:
            text = opened.read(FILE_LIMIT + 1)
        _check_length(text)
        return _parse(json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant))
    except OSError as error:
        raise ValueError(f"{file}: expected a settings file, got: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_length(text: bytes) -> None:
    if len(text) > FILE_LIMIT:
        raise fail("settings", f"at most {FILE_LIMIT} bytes", "more")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise fail(name, "one value", "several")
        values[name] = value
    return values


def _no_constant(word: str) -> None:
    raise fail("numbers", "finite ones", word)


def _parse(content: object) -> Settings:
    """The settings in a JSON value; a ValueError for anything that does not belong there."""
    if not isinstance(content, dict):
        raise fail("settings", "a JSON object", type(content).__name__)
    if content.get("format") != FORMAT:
        raise fail("format", repr(FORMAT), repr(content.get("format")))
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise fail("version", str(VERSION), repr(content.get("version")))
    missing, unknown = set(_FIELDS) - set(content), set(content) - set(_FIELDS)
    if missing or unknown:
        got = ", ".join([*(f"no {name}" for name in sorted(missing)), *sorted(unknown)])
        raise fail("fields", ", ".join(_FIELDS), got)
    if not isinstance(content["origin"], str):
        raise fail("origin", "a string", repr(content["origin"]))
    check_heads_per_group(content["heads_per_group"])
    check_span(content["query_blocks_per_span"])
    layers = content["layers"]
    if not isinstance(layers, dict) or not layers:
        raise fail("layers", "an object with at least one layer", repr(layers))
    return Settings(
        selector={_layer_number(name): _selector(f"layers.{name}", its) for name, its in layers.items()},
        heads_per_group=content["heads_per_group"],
        query_blocks_per_span=content["query_blocks_per_span"],
    )


def _layer_number(name: str) -> int:
    if not name.isascii() or not name.isdigit() or str(int(name)) != name:
        raise fail("layers", "layer numbers such as 0 or 17", repr(name))
    check_int("layers", int(name), 0)
    return int(name)


def _selector(where: str, fields: Any) -> Selector:
    """A selector by its name and fields."""
    if not isinstance(fields, Mapping) or not isinstance(fields.get("selector"), str):
        raise fail(where, 'an object with "selector" and its fields', repr(fields))
    kind = _SELECTORS.get(fields["selector"])
    if kind is None:
        raise fail(f"{where}.selector", " or ".join(_SELECTORS), repr(fields["selector"]))
    known = [field.name for field in dataclasses.fields(kind)]
    values = {name: value for name, value in fields.items() if name != "selector"}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise fail(where, f"fields of {kind.__name__} ({', '.join(known)})", ", ".join(unknown))
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
