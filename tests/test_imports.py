"""What `import compactattn` costs and shows: no heavy or optional import, docstrings, types, a working command."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import compactattn

UNWANTED = ("streamlit", "transformers", "vllm", "sglang", "matplotlib", "triton", "numba", "safetensors")
INSPECT = f"""
import sys
import compactattn
import compactattn.cli
print(*[name for name in {UNWANTED!r} if name in sys.modules])
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository, without what the test run sets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_import_pulls_in_nothing_heavy_or_optional() -> None:
    """Backends are imported at first use, extras only by the modules that need them."""
    done = python("-c", INSPECT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_whoever_reads_a_fidelity_result_needs_no_transformers() -> None:
    done = python("-c", "import sys, benchmarks.fidelity.report; print('transformers' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize("name", compactattn.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    public = getattr(compactattn, name)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}("), "only the signature that dataclass fills in"


def test_public_names_are_listed_once() -> None:
    assert len(set(compactattn.__all__)) == len(compactattn.__all__)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(compactattn.__file__).parent / "py.typed").is_file()


def test_python_m_compactattn_info() -> None:
    done = python("-m", "compactattn", "info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("compactattn", compactattn.__version__, "torch", "triton", "numba", "cpu:", "cuda"):
        assert word in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_vllm_plugin_says_what_it_needs() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="compactattn")
    with pytest.raises(ImportError, match=r"needs vLLM 0\.31 to 0\.33, .*: pip install '\.\[vllm\]'"):
        point.load()


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed")
def test_the_sglang_plugin_says_what_it_needs() -> None:
    (point,) = entry_points(group="sglang.srt.plugins", name="compactattn")
    with pytest.raises(ImportError, match=r"needs SGLang 0\.5\.23, .*: pip install '\.\[sglang\]'"):
        point.load()
