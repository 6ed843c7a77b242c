"""The machine, the versions and the commit, to stand above every result."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import iwsgd_ext as iw

PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn")


def machine(device: torch.device) -> dict[str, Any]:
    """The facts that a reader needs to judge and to repeat a measurement."""
    info = iw.backend_info()
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "iwsgd_ext": iw.__version__,
        "commit": _commit(),
        "backend": info[device.type].split(":")[0] if device.type in info else "reference",
        "build": info["build"],
        "load at start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory >> 30} GiB"
        about["cuda"] = torch.version.cuda
    about["peers"] = {name: version for name in PEERS if (version := _version(name))}
    return about


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    """The commit of the checkout, with a + where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    head = git("rev-parse", "--short", "HEAD")
    return (head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) if head else "unknown"
