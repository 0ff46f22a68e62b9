"""`compactattn info`: versions, devices, and which backends work here."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compactattn.cli.output import add_json_option, check_json_target, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show versions and, for each device, which backends run there and why the others do not."""
    target = arguments.json
    check_json_target(target)
    versions, devices = _versions(), _devices()
    lines = [f"{name:12} {number}" for name, number in versions.items()]
    for device in devices:
        lines += ["", f"{device['device']}: {device['name']}"]
        for backend, reason in device["backends"].items():
            lines.append(f"  {backend:8} {'works' if reason is None else 'does not work: ' + reason}")
        lines += [f"  attention, {problem}: {kernel}" for problem, kernel in device["attention"].items()]
    show("\n".join(lines), target, {"versions": versions, "devices": devices})
    return 0


def _versions() -> dict[str, str]:
    packages = ("compactattn", "torch", "triton", "numba", "numpy")
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}


def version_of(package: str) -> str:
    """The version of an installed package; compactattn's own also from a checkout that is not installed."""
    if package == "compactattn":
        from compactattn import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[dict[str, Any]]:
    """Each device with, per backend, null or the reason why it does not run there, and the attention kernels."""
    import torch

    from compactattn.dispatch import BACKENDS, unavailable

    def describe(device: torch.device, name: str, attention: dict[str, str]) -> dict[str, Any]:
        reasons = {backend: unavailable(backend, device) for backend in BACKENDS}
        return {"device": str(device), "name": name, "backends": reasons, "attention": attention}

    products = "numba: gathered runs of keys, multiplied by PyTorch"
    devices = [describe(torch.device("cpu"), f"{torch.get_num_threads()} threads", {"every problem": products})]
    if not torch.cuda.is_available():
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        return [*devices, {"device": "cuda", "name": f"none ({reason})", "backends": {}, "attention": {}}]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        installed = unavailable("triton", device) is None
        kernels = _triton_attention(torch.cuda.get_device_capability(device)) if installed else {}
        devices.append(describe(device, torch.cuda.get_device_name(device), kernels))
    return devices


def _triton_attention(capability: tuple[int, int]) -> dict[str, str]:
    """Which kernel attends on a GPU of this compute capability to some usual problems, and why not the faster one."""
    import torch

    from compactattn._triton.hopper_rule import why_not_hopper

    kernels = {}
    for dtype, head_dim, query_block, features in (
        (torch.bfloat16, 128, 128, ()),
        (torch.bfloat16, 128, 64, ()),
        (torch.bfloat16, 96, 128, ()),
        (torch.float32, 128, 128, ()),
        (torch.bfloat16, 128, 128, ("sinks, soft-capping, a window or an FP8 cache",)),
    ):
        problem = f"{str(dtype).removeprefix('torch.')}, head dimension {head_dim}, query blocks of {query_block}"
        problem += f", with {features[0]}" if features else ""
        refusal = why_not_hopper(capability, dtype, head_dim, query_block, features)
        kernels[problem] = "warp-specialised Hopper kernel" if refusal is None else f"general kernel ({refusal})"
    return kernels
