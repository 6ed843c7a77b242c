"""Timing variants against each other in one run, and what machine they ran on."""

import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import iwsgd_ext as iw


@dataclass
class Timing:
    """Seconds of one variant: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @property
    def noisy(self) -> bool:
        return self.p80 > 1.5 * self.p20


def interleave(variants: dict[str, Callable[[], object]], seconds: float = 1.5, least: int = 7) -> dict[str, Timing]:
    """Runs the variants in turn, so that a slow moment of the machine falls on all of them, for about ``seconds`` each."""
    for run in variants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - start < seconds * len(variants):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
        if len(next(iter(times.values()))) >= 400:
            break
    result = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        result[name] = Timing(statistics.median(values), cuts[0], cuts[-1])
    return result


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory: a fresh large tensor otherwise costs more in page faults than in work, for every variant."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


def machine() -> dict[str, object]:
    """Machine, versions and commit, to stand above every result."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    info = iw.backend_info()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "backend": info["cpu"].split(":")[0],
        "build": info["build"],
        "commit": commit or "unknown",
    }
