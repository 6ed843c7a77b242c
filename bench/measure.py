"""Timing variants against each other, their memory, and the limits of the machine, all in one run."""

import contextlib
import ctypes
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import iwsgd_ext as iw

from .case import Variant

NOISY = 1.25  # a variant whose 80th percentile is more than this times its 20th is too noisy to be quoted
DRIFT = 1.10  # so is a run whose copy bandwidth at its end is off by more than this factor from that at its start
LEAST = 5  # and a variant that was run less often


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of a list of measurements."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> "Timing":
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), cuts[0], cuts[-1], len(values))

    @property
    def noise(self) -> str | None:
        """Why this measurement is too noisy, by the criterion above, or None."""
        if self.runs < LEAST:
            return f"{self.runs} runs"
        if self.p80 > NOISY * self.p20:
            return f"p80/p20 = {self.p80 / self.p20:.2f}"
        return None


def drifted(at_start: float, at_end: float) -> str | None:
    """A sentence where the machine changed during the run, or None."""
    change = at_end / at_start
    if 1 / DRIFT <= change <= DRIFT:
        return None
    return f"the copy bandwidth went from {at_start / 1e9:.1f} to {at_end / 1e9:.1f} GB/s during the run: the machine was not quiet"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HOLD = 4_000_000  # cycles, 2 ms on an H100: longer than the host takes to launch an op's or a layer's kernels


def stopwatch(device: torch.device, host: bool = False, hold: int = 0) -> Callable[[Callable[[], Any]], float]:
    """A function that gives the seconds of a call: by events on a GPU, else (and where only the host's time is wanted) by the clock.

    ``hold``: cycles that a GPU is kept busy before the first event, while the host launches what is timed. Without it the events enclose
    the host's time too, which for a kernel of 0.3 ms is a quarter of that.
    """
    if device.type != "cuda" or host:

        def by_clock(run: Callable[[], Any]) -> float:
            synchronize(device)
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return by_clock
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def by_events(run: Callable[[], Any]) -> float:
        if hold:
            torch.cuda._sleep(hold)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return by_events


class Flush:
    """Empties the caches by writing over more memory than they hold: twice a GPU's L2, or once a CPU's largest cache."""

    def __init__(self, device: torch.device):
        self.bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else largest_cache()
        self.memory = torch.empty(self.bytes, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.memory.zero_()


def largest_cache() -> int:
    """Bytes of the CPU's largest cache (32 MiB where the system does not tell), at most 256 MiB."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes if s[-1:] in ("K", "M")]
    return min(max(known, default=32 << 20), 256 << 20)


@contextlib.contextmanager
def forced(backend: str | None):
    """The library's backend inside the block."""
    if backend is None:
        yield
        return
    before = iw.backend_info()["forced"]
    iw.set_backend(backend)
    try:
        yield
    finally:
        iw.set_backend(before)


def interleave(
    variants: dict[str, Variant],
    watch: Callable[[Callable[[], Any]], float],
    *,
    seconds: float,
    least: int = LEAST,
    most: int = 400,
    inner: int = 1,
    flush: Callable[[], None] | None = None,
    now: Callable[[], float] = time.perf_counter,
    times: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each variant's runs, one list per variant, equally long: value i of all of them is from round i.

    The variants take turns, and each round starts with another one, so that a slow moment of the machine falls on all of them. The caches
    are emptied by ``flush`` before each run, or hold what the same variant's run before it has left there, as in training: after another
    one's even the interpreter's code would come from memory. Rounds go on for ``seconds`` per variant, within ``least`` and ``most``.
    ``times`` is filled with whole rounds as they are done: an interrupt leaves them there.
    """
    names = list(variants)
    times = {} if times is None else times
    times.update({name: [] for name in names})
    start = now()
    for done in range(most):
        if done >= least and now() - start >= seconds * len(names):
            break
        first = done % len(names)
        measured = {}
        for name in names[first:] + names[:first]:
            variant = variants[name]
            with forced(variant.backend):
                if flush is None:
                    _prepared(variant)
                    variant.run()
                _prepared(variant)
                if flush is not None:
                    flush()
                measured[name] = watch(_repeated(variant.run, inner)) / inner
        for name in names:
            times[name].append(measured[name])
    return times


def _prepared(variant: Variant) -> None:
    if variant.before is not None:
        variant.before()


def _repeated(run: Callable[[], Any], times: int) -> Callable[[], Any]:
    def several() -> None:
        for _ in range(times):
            run()

    return run if times == 1 else several


class SavedBytes:
    """Peak of the bytes that autograd keeps for backward inside the block, each storage once, without those of ``leaves``.

    On a CPU, where no allocator counts, this is the memory that grows with the number of samples.
    """

    def __init__(self, leaves: list[torch.Tensor]):
        self.leaves = {t.untyped_storage()._cdata for t in leaves}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> "_Held":
        held, storage = _Held(tensor.detach()), tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.leaves:
            self.holders[key] = self.holders.get(key, 0) + 1
            if self.holders[key] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.now -= size


class _Held:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def peak_memory(run: Callable[[], Any], device: torch.device, leaves: list[torch.Tensor]) -> int:
    """Bytes above what was there before: by the allocator on a GPU, by the tensors saved for backward on a CPU."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with SavedBytes(leaves) as saved:
        run()
    return saved.peak


def copy_bandwidth(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes a second, read and written, of copying a tensor that no cache holds."""
    size = (256 << 20) if device.type == "cpu" else (2 << 30)
    source = torch.randint(-100, 100, (size // 8,), dtype=torch.int64, device=device)
    names = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=names, num_threads=torch.get_num_threads())
    return 2 * size / timer.blocked_autorange(min_run_time=seconds).median


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second (a multiplication and an addition are two) of a square matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=seconds).median


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**62)


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory: a fresh large tensor otherwise costs more in page faults than in work, for every variant."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False
