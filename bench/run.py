"""One run: cases in order of importance, each checked and then timed; what cannot be measured is a row with its reason."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import host, iw_cross_entropy, layer, multinomial, noise, real_noise, step
from .case import BASELINE, Case, Grid, Skip, Variant
from .measure import (
    HOLD,
    LEAST,
    Flush,
    Timing,
    copy_bandwidth,
    drifted,
    forced,
    free_memory,
    interleave,
    matrix_rate,
    peak_memory,
    stopwatch,
    synchronize,
)

MODULES = (noise, real_noise, multinomial, iw_cross_entropy, layer, step, host)
NO_TIME = "the time that was given is used up"
COMPILATION = 45.0  # seconds that torch.compile may take
FIELDS = (
    *("level", "op", "size", "work", "samples", "batch", "classes", "dtype", "device", "threads", "provider", "status", "reason"),
    *("median_s", "p20_s", "p80_s", "runs", "noise", "ratio", "ratio_p20", "ratio_p80", "first_call_s", "memory_bytes"),
    *("bytes", "bytes_per_s", "of_copy", "fewest_bytes", "flops", "of_limit"),
)


@dataclass(frozen=True)
class Selection:
    """The user's choice; empty means everything. Names match where they contain a given word, upper and lower case alike."""

    levels: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()

    def has(self, case: Case) -> bool:
        return (not self.levels or case.level in self.levels) and _matches(case.op, self.ops)

    def providers_of(self, case: Case) -> list[str]:
        """The baseline stays: ratios are taken against it."""
        return [name for name in case.providers if name == BASELINE or _matches(name, self.providers)]


def _matches(name: str, words: tuple[str, ...]) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


def cases(grid: Grid, selection: Selection) -> list[Case]:
    """The cases of a run, the most important ones first."""
    found = [case for module in MODULES for case in module.cases(grid) if selection.has(case)]
    return sorted(found, key=lambda case: case.rank)


@dataclass
class Run:
    """The measurements of a run so far.

    Attributes:
        seconds: time given to each provider of a case, if it is not too slow for that.
        deadline: time.monotonic() after which no further case is begun.
    """

    device: torch.device
    selection: Selection = field(default_factory=Selection)
    seconds: float = 1.0
    least: int = LEAST
    deadline: float = float("inf")
    results: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    noise: str | None = None
    flush: Flush | None = None

    def measure(self, todo: list[Case], progress: Callable[[str], None] = lambda name: None, kept: Callable[[], None] = lambda: None):
        """Measures cases in turn; ``kept`` is called after each, for results to be saved. Ctrl-C ends it and keeps what there is."""
        try:
            reason = self._missing_device()
            if reason is None:
                self._limits(todo)
            for case in todo:
                progress(case.name)
                if reason is None and time.monotonic() > self.deadline:
                    self._skip(case, NO_TIME)
                elif reason is not None:
                    self._skip(case, reason)
                else:
                    self._case(case)
                kept()
            if reason is None and todo:
                self.limits["copy_at_end"] = copy_bandwidth(self.device)
                self.noise = self.noise or drifted(self.limits["copy"], self.limits["copy_at_end"])
        except KeyboardInterrupt:
            self.interrupted = True
        kept()

    def _missing_device(self) -> str | None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device: torch.cuda.is_available() is False"
        return None

    def _limits(self, todo: list[Case]) -> None:
        """The machine's copy bandwidth and matrix rates, in bytes and operations a second."""
        self.flush = Flush(self.device)
        self.limits["threads"] = torch.get_num_threads()
        self.limits["copy"] = copy_bandwidth(self.device)
        for name in sorted({str(case.dtype)[6:] for case in todo} | {"float32"}):
            self.limits[f"matrix_{name}"] = matrix_rate(self.device, getattr(torch, name))
        self.limits["flush_bytes"] = self.flush.bytes

    def _row(self, case: Case, provider: str, status: str, reason: str = "", **values: Any) -> None:
        row = dict.fromkeys(FIELDS)
        row.update(case.fields(), threads=torch.get_num_threads(), provider=provider, status=status, reason=reason, **values)
        self.results.append(row)

    def _skip(self, case: Case, reason: str) -> None:
        for provider in self.selection.providers_of(case):
            self._row(case, provider, "skipped", reason)

    def _case(self, case: Case) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        free = free_memory(self.device)
        if case.need > 0.9 * free:
            return self._skip(case, f"the size does not fit: about {case.need / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB")
        torch.compiler.reset()
        torch.manual_seed(20171204)
        try:
            inputs = case.setup(case)
        except (Skip, RuntimeError, MemoryError) as error:
            return self._skip(case, _reason(error))
        ready: dict[str, Variant] = {}
        first: dict[str, float] = {}
        for name in self.selection.providers_of(case):
            try:
                self._in_time(name)
                variant = case.providers[name](inputs)
                with forced(variant.backend):
                    first[name] = self._first(variant)
                    variant.check()
                ready[name] = variant
            except Skip as error:
                self._row(case, name, "skipped", str(error))
            except AssertionError as error:
                self._row(case, name, "wrong", _line(error))
            except Exception as error:
                # A provider that fails must not end the run: its error is its row.
                self._row(case, name, "skipped" if _is_memory(error) else "failed", _reason(error))
        if not ready:
            return None
        # a training step is timed as a user sees it, with the host's time where the GPU waits for it
        hold = HOLD if case.level in ("op", "layer") else 0
        watch = stopwatch(self.device, host=case.level == "host", hold=hold)
        flush = self.flush if case.flush else None
        times: dict[str, list[float]] = {}
        try:
            interleave(ready, watch, seconds=self.seconds, least=self.least, inner=case.inner, flush=flush, times=times)
        except KeyboardInterrupt:
            if times[next(iter(ready))]:
                self._rows(case, ready, first, times, besides=False)
            raise
        except Exception as error:
            for name in ready:
                self._row(case, name, "failed", f"while timing: {_reason(error)}")
            return None
        self._rows(case, ready, first, times)
        return None

    def _in_time(self, provider: str) -> None:
        """A case that has begun should end in time, a compiled one too."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Skip(NO_TIME)
        if "torch.compile" in provider and left < COMPILATION:
            raise Skip(f"a compiler may take more than the {left:.0f} s that are left")

    def _first(self, variant: Variant) -> float:
        """Seconds of the very first call: a compiler's time, where there is one."""
        if variant.before is not None:
            variant.before()
        synchronize(self.device)
        start = time.perf_counter()
        variant.run()
        synchronize(self.device)
        return time.perf_counter() - start

    def _rows(
        self, case: Case, ready: dict[str, Variant], first: dict[str, float], times: dict[str, list[float]], besides: bool = True
    ) -> None:
        """The results of a case; ``besides`` the times, its operations and memory are counted, by runs of their own."""
        counted = {name: variant.count_flops for name, variant in ready.items() if variant.count_flops and besides}
        flops = {name: self._try(ready[name], count) for name, count in counted.items()}
        fewest_flops = min(filter(None, flops.values()), default=None)
        for name, variant in ready.items():
            t, bytes_ = Timing.of(times[name]), variant.bytes
            ratio = Timing.of([b / v for b, v in zip(times[BASELINE], times[name], strict=True)]) if BASELINE in times else None
            memory = self._try(variant, lambda v=variant: self._memory(v)) if besides else None
            self._row(
                case,
                name,
                "ok",
                median_s=t.median,
                p20_s=t.p20,
                p80_s=t.p80,
                runs=t.runs,
                noise=t.noise,
                ratio=ratio and ratio.median,
                ratio_p20=ratio and ratio.p20,
                ratio_p80=ratio and ratio.p80,
                first_call_s=first[name],
                memory_bytes=memory,
                bytes=bytes_,
                bytes_per_s=bytes_ and bytes_ / t.median,
                of_copy=bytes_ and bytes_ / t.median / self.limits["copy"],
                fewest_bytes=case.fewest_bytes,
                flops=flops.get(name),
                of_limit=self._of_limit(case, fewest_flops, t.median),
            )

    def _memory(self, variant: Variant) -> int:
        if variant.before is not None:
            variant.before()
        return peak_memory(variant.memory or variant.run, self.device, variant.leaves)

    def _of_limit(self, case: Case, fewest_flops: int | None, seconds: float) -> float | None:
        """The time that the work must take by the machine's limits, over the time that it took."""
        by_memory = case.fewest_bytes / self.limits["copy"] if case.fewest_bytes else 0.0
        by_matrix = fewest_flops / self.limits[f"matrix_{str(case.dtype)[6:]}"] if fewest_flops else 0.0
        return max(by_memory, by_matrix) / seconds or None

    def _try(self, variant: Variant, run: Callable[[], Any]) -> Any:
        """A number beside the time; where it cannot be had it is left out, and the time stands."""
        try:
            with forced(variant.backend):
                return run()
        except Exception:
            return None


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _reason(error: BaseException) -> str:
    if isinstance(error, Skip):
        return str(error)
    if isinstance(error, Exception) and _is_memory(error):
        return f"the size does not fit: {_line(error)}"
    return f"{type(error).__name__}: {_line(error)}"
