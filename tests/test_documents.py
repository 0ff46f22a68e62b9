"""What README and docs/ tell a user to type is taken, and they name the versions that the package names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from compactattn import Dense, FlashPrefill, cli
from compactattn.integrations.engine_settings import parse_settings
from compactattn.settings import Settings, save_settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/transformers.md", "docs/vllm.md", "docs/sglang.md")


def commands() -> Iterator[list[str]]:
    """Every command of every block of shell, as words."""
    for name in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", "").splitlines():
                words = shlex.split(line, comments=True)
                starts = [n for n, word in enumerate(words) if word == "&&"]
                for first, stop in zip([-1, *starts], [*starts, len(words)], strict=True):
                    yield words[first + 1 : stop]


def test_commands_in_documents_are_taken() -> None:
    found = [words for words in commands() if words and Path(words[0]).name == "compactattn"]
    assert {words[1] for words in found} >= {"demo", "capture", "tune"}
    for words in found:
        assert cli._parser().parse_args(words[1:]).command == words[1]


@pytest.mark.parametrize("argument", ["--additional-config", "--json-model-override-args"])
def test_plugin_settings_in_documents_are_taken(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = Settings(selector={0: FlashPrefill(), 3: Dense()}, heads_per_group=1, query_blocks_per_span=1)
    save_settings("settings.json", held)
    given = [words[words.index(argument) + 1] for words in commands() if argument in words]
    options = [json.loads(text)["compactattn"] for text in given]
    assert {key for its in options for key in its} >= {"alpha", "settings", "dense_keys", "dense_layers"}
    for its in options:
        assert list(parse_settings(its, "options").layers) == ([0, 3] if "settings" in its else [])


@pytest.mark.parametrize(
    ("engine", "places"),
    [
        ("transformers", ["README.md", "docs/transformers.md", "compactattn/integrations/transformers/__init__.py"]),
        ("vLLM", ["README.md", "docs/vllm.md", "compactattn/integrations/vllm.py"]),
    ],
)
def test_documents_name_the_versions_that_the_package_names(engine: str, places: list[str]) -> None:
    ranges = set()
    for place in places:
        text = (ROOT / place).read_text(encoding="utf-8")
        found = re.findall(rf"{engine} \(?(\d+)\.(\d+)(?:, \d+\.\d+)*(?: to| and) (\d+)\.(\d+)", text)
        assert found, place
        ranges |= {tuple(map(int, version)) for version in found}
    ((major, minor, *newest),) = ranges
    required = re.findall(rf'"{engine.lower()}>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert required
    for oldest, below in required:
        assert oldest == f"{major}.{minor}"
        assert newest < [int(part) for part in below.split(".")]
    pinned = re.search(rf"^{engine.lower()}==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is not None:
        assert [major, minor] <= [int(part) for part in pinned.groups()] <= newest


def test_documents_name_the_one_version_of_sglang_that_the_package_names() -> None:
    (version,) = re.findall(r'"sglang==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for place in ("README.md", "docs/sglang.md", "compactattn/integrations/sglang.py", "tests/sglang/run"):
        text = (ROOT / place).read_text(encoding="utf-8")
        assert set(re.findall(r"\b0\.5\.\d+\b", text)) == {version}, place
