"""What the numbers were measured on: versions, sources, the card, its ceilings in the same run, and the kernel chosen.

The card is power-capped, so it has two ceilings: cold (the first products after a pause) and sustained (after seconds
of them, when the clock has come down). Everything that is compared is therefore timed in one loop.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import compactattn
from compactattn import PagedKV

ROOT = Path(__file__).resolve().parent.parent
SIZE = 8192  # of the product that stands for the matrix units
LONG = 2 * SIZE
LATENCY_SOURCES = ("compactattn/**/*.py", "benchmarks/*.py")
TTFT_SOURCES = (*LATENCY_SOURCES, "benchmarks/ttft/*.py")
# What decides measured numbers: neither plans, whose rows and stages a result holds itself, nor what reads a result.
FIDELITY_SOURCES = (
    "compactattn/**/*.py",
    "!compactattn/cli/**/*.py",
    *(f"benchmarks/fidelity/{name}.py" for name in ("answering", "items", "methods", "probing", "run")),
    *(f"benchmarks/testbed/{name}.py" for name in ("answers", "corpus", "evaluate", "model", "tasks")),
)
# Likewise; and what stands in for vLLM's compiled modules.
SERVING_SOURCES = (
    "compactattn/**/*.py",
    "!compactattn/cli/**/*.py",
    *(f"benchmarks/serving/{name}.py" for name in ("cases", "compare", "engine", "questions", "run")),
    *(f"benchmarks/testbed/{name}.py" for name in ("corpus", "tasks")),
    "tests/vllm/gpu.py",
)
SENSORS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def sources(root: Path = ROOT, patterns: Sequence[str] = LATENCY_SOURCES) -> str:
    """A hash of every source file that a result depends on, for machines without git: 16 hexadecimal digits.

    It covers the files of the patterns, less those of patterns that begin with "!", by relative path and content:
    `python -m benchmarks sources` prints that of a checkout, so a result can be tied to the commit it came from.
    """
    digest = hashlib.sha256()
    files = {file for pattern in patterns if pattern[0] != "!" for file in root.glob(pattern)}
    files -= {file for pattern in patterns if pattern[0] == "!" for file in root.glob(pattern[1:])}
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def check_device(preset: str, device: str) -> None:
    """Refuse to run a preset on a GPU that is not here.

    Raises:
        ValueError: the device is "cuda" and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--preset {preset}: expected a CUDA device, got none; --preset cpu runs everywhere")


def environment(device: str, commit: str | None = None, patterns: Sequence[str] = LATENCY_SOURCES) -> dict[str, object]:
    """Versions, hardware, and which sources ran; `commit` is for machines that have no git."""
    found: dict[str, object] = {
        "compactattn": compactattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **_revision(commit),
        "sources": sources(patterns=patterns),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["driver"] = _query("driver_version")
        found["power_limit"] = _query("power.limit")
        found["triton"] = __import__("triton").__version__
    else:
        found["numba"] = __import__("numba").__version__
        found["threads"] = torch.get_num_threads()
    return found


def _revision(told: str | None) -> dict[str, object]:
    """The commit by git, or the one that the caller names; whether the tree differs from it is known by git alone.

    A copy of the sources inside another repository is not that repository's.

    Raises:
        ValueError: git knows another commit than the caller.
    """
    top = output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():
        return {"commit": told, "uncommitted_changes": None}
    known = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or ""
    if told is not None and not (told.startswith(known) or known.startswith(told)):
        raise ValueError(f"--commit: expected {known}, as git says, got {told}")
    changes = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": known, "uncommitted_changes": bool(changes)}


def output(*command: str) -> str | None:
    """The first line that a command prints, or None where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def _query(field: str) -> str | None:
    return output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")


def sensors() -> dict[str, str | None]:
    """Clocks, power and temperature at this moment; None where nvidia-smi does not say."""
    answer = _query(",".join(SENSORS))
    values = [None] * len(SENSORS) if answer is None else [part.strip() for part in answer.split(",")]
    return dict(zip(SENSORS, values, strict=False))


def ceilings(seconds: float = 3.0) -> dict[str, object]:
    """What this card reaches today: bf16 products cold and sustained, TFLOP/s, and a device copy, TB/s read + written.

    The sensors are read while idle and in the middle of the sustained products.
    """
    a, b = (torch.randn(LONG, LONG, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    small_a, small_b = (x[:SIZE, :SIZE].contiguous() for x in (a, b))
    large, small = torch.empty_like(a), torch.empty_like(small_a)
    source = a.new_empty(1 << 30)
    target = torch.empty_like(source)
    for _ in range(3):
        torch.mm(small_a, small_b, out=small)
        torch.mm(a, b, out=large)
        target.copy_(source)
    torch.cuda.synchronize()
    time.sleep(1.0)
    idle = sensors()
    cold = _queued(lambda: torch.mm(small_a, small_b, out=small), 10)
    one = _queued(lambda: torch.mm(a, b, out=large), 3)[-1]
    busy: list[dict[str, str | None]] = []

    def look() -> None:
        time.sleep(seconds / 2)
        busy.append(sensors())

    many = _queued(lambda: torch.mm(a, b, out=large), max(4, int(seconds * 1e3 / one)), look)
    sustained = sorted(many[-max(1, len(many) // 4) :])
    copied = _queued(lambda: target.copy_(source), 10)
    return {
        "matmul_tflops": 2 * SIZE**3 / _median(cold) / 1e9,
        "matmul_sustained_tflops": 2 * LONG**3 / _median(sustained) / 1e9,
        "copy_tbps": 2 * source.nbytes / _median(copied) / 1e9,
        "sensors_idle": idle,
        "sensors_busy": busy[0],
    }


def _queued(run, times: int, meanwhile=lambda: None) -> list[float]:
    """Milliseconds of each of `times` runs queued without a gap; `meanwhile` runs on the host before they end."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    meanwhile()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _median(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 2]


def attend_kernel(q: Tensor, kv: PagedKV, block_size: int, query_block: int) -> str:
    """Which attention kernel the library's rule chooses for a call on freshly allocated, aligned tensors, and why.

    "hopper", or "general: " and what the Hopper kernel refuses; "numba" on the CPU.
    """
    if not q.is_cuda:
        return "numba"
    from compactattn._triton.hopper_rule import why_not_hopper

    problem = {
        "capability": torch.cuda.get_device_capability(q.device),
        "dtype": q.dtype,
        "head_dim": q.shape[-1],
        "page_size": kv.page_size,
        "block_size": block_size,
        "query_block": query_block,
        "features": (),
    }
    # the rule's parameters say what it depends on, and that differs between versions of the kernel
    refusal = why_not_hopper(**{name: problem[name] for name in inspect.signature(why_not_hopper).parameters})
    return "hopper" if refusal is None else f"general: {refusal}"
