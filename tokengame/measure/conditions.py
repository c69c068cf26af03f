"""Under which conditions something was measured: recorded in every result file."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tokengame
from tokengame import kernels

ENGINES = ("onnxruntime", "openvino")
"""packages"""


def conditions(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement in `dtype` on `device` depends on beside what it measures.

    Returns:
        processor (or GPU), kernels, threads, torch, timm, tokengame (versions), commit (of a checkout; "+" marks
        uncommitted changes; None elsewhere), command.
    """
    device = torch.device(device)
    return {
        "processor": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "kernels": str(kernels.status(dtype, device.type)).removeprefix("kernels: "),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "tokengame": tokengame.__version__,
        "commit": commit(),
        "command": command(),
    }


def engines() -> dict[str, str | None]:
    """Versions of the inference engines that a run with rivals may use; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ENGINES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def processor() -> str:
    """The processor's name, family and model: names alone do not tell generations apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name


@cache
def commit() -> str | None:
    """Short hash of the checkout that the package runs from, with "+" after uncommitted changes; None elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + ("+" if found[1] else "")


def command() -> str:
    """The command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
