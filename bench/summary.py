"""What a run says in short: the goals that this project has set itself, and comparisons at equal time and equal compute."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .case import BASELINE
from .iw_cross_entropy import LESS
from .training import MORE_EXAMPLES

Row = dict[str, Any]
COMPILED = "expanded batch, torch.compile"
LIMIT = "limit: no noise"


class Goal(NamedTuple):
    """The best of some providers, against another one (or the machine's limit where that is None), is at least so many times as fast."""

    device: str
    op: str
    work: str
    ours: tuple[str, ...]
    against: str | None
    wanted: float
    dtype: str | None = None
    classes: tuple[int, int] | None = None  # from, to


STEP = ("iw cpu", "iw cpu, rows", "iw cpu, torch.compile", "iw cpu, rows, torch.compile")
GPU_LOSS = ((4096, 1 << 20, 0.92), (1000, 4095, 0.80), (256, 999, 0.70))
GOALS = (
    Goal("cpu", "noise", "forward", ("iw cpu, out=",), LIMIT, 0.85, "float32"),
    Goal("cpu", "noise", "forward", ("iw cpu, out=", "iw cpu"), BASELINE, 12.0, "float32"),
    Goal("cpu", "noise", "backward", ("iw cpu",), LIMIT, 0.85, "float32"),
    Goal("cpu", "iw_cross_entropy", "forward+backward", ("iw cpu",), LESS, 5.0, "float32"),
    Goal("cpu", "iw_cross_entropy", "forward+backward", ("iw cpu",), f"{LESS}, torch.compile", 1.6, "float32"),
    Goal("cpu", "MLP", "step", STEP, BASELINE, 2.0),
    Goal("cpu", "small MLP", "step", STEP, BASELINE, 2.0),
    Goal("cpu", "WRN", "step", STEP, BASELINE, 1.2),
    Goal("cpu", "shared trunk", "step", STEP, BASELINE, 4.0),
    *(Goal("cpu", op, "step", STEP, COMPILED, 0.95) for op in ("MLP", "small MLP", "WRN", "shared trunk")),
    *(Goal("cpu", op, "step", ("iw cpu, resampled",), "iw cpu", 2.0) for op in ("deep MLP", "wide MLP")),
    Goal("cuda", "deep MLP", "step", ("iw cuda, resampled",), "iw cuda", 2.0),
    # against the bytes that must move, (1 + S) n: S copies of x move 2 S n, and would let half the copy bandwidth pass
    Goal("cuda", "noise", "forward", ("iw cuda, out=", "iw cuda"), None, 0.92, "bfloat16"),
    Goal("cuda", "noise", "backward", ("iw cuda",), None, 0.92, "bfloat16"),
    Goal("cuda", "noise", "forward", ("iw cuda",), COMPILED, 1.4, "bfloat16"),
    Goal("cuda", "noise", "backward", ("iw cuda",), COMPILED, 1.4, "bfloat16"),
    Goal("cuda", "iw_cross_entropy", "forward+backward", ("iw cuda", "iw cuda, inplace=True"), COMPILED, 1.8, "bfloat16"),
    *(
        Goal("cuda", "iw_cross_entropy", "forward+backward", ("iw cuda", "iw cuda, inplace=True"), None, wanted, "bfloat16", (low, high))
        for low, high, wanted in GPU_LOSS
    ),
    Goal("cuda", "noise", "forward", ("iw triton",), "iw cuda", 0.9, "bfloat16"),
    Goal("cuda", "noise", "backward", ("iw triton",), "iw cuda", 0.9, "bfloat16"),
    Goal("cuda", "iw_cross_entropy", "forward+backward", ("iw triton",), "iw cuda", 0.9, "bfloat16", (4096, 1 << 20)),
)


class Reached(NamedTuple):
    what: str
    measured: float
    wanted: float
    noisy: bool

    @property
    def verdict(self) -> str:
        return ("reached" if self.measured >= self.wanted else "NOT reached") + (" (noisy)" if self.noisy else "")


def by_case(results: list[Row]) -> dict[tuple, dict[str, Row]]:
    """(device, op, work, size, samples, dtype, threads) -> provider -> result, of what was measured."""
    found: dict[tuple, dict[str, Row]] = {}
    for r in results:
        if r["status"] == "ok":
            key = (r["device"], r["op"], r["work"], r["size"], r["samples"], r["dtype"], r["threads"])
            if r["level"] != "host":
                found.setdefault(key, {})[r["provider"]] = r
    return found


def goals(results: list[Row]) -> Iterator[Reached]:
    """The goals that the results say something about, all at S = 8."""
    for (device, op, work, size, samples, dtype, threads), of in by_case(results).items():
        for goal in GOALS:
            if (goal.device, goal.op, goal.work) != (device, op, work) or samples != 8 or goal.dtype not in (None, dtype):
                continue
            ours = [of[name] for name in goal.ours if name in of]
            if not ours or (goal.against is not None and goal.against not in of):
                continue
            best = min(ours, key=lambda r: r["median_s"])
            if goal.classes is not None and not goal.classes[0] <= best["classes"] <= goal.classes[1]:
                continue
            other = of.get(goal.against)
            measured = best["of_limit"] if other is None else other["median_s"] / best["median_s"]
            noisy = bool(best["noise"] or (other and other["noise"]))
            name = f"{op} {size}, {work}, {dtype}, {threads} threads: {best['provider']} against {goal.against or 'the limit'}"
            yield Reached(name, measured, goal.wanted, noisy)
    yield from memory_goals(results)


def memory_goals(results: list[Row]) -> Iterator[Reached]:
    """One sample's memory over that of 64 streamed one by one: at least 1 / 1.15. Counted on a CPU, so never noisy."""
    sizes: dict[tuple, dict[tuple[str, int], int]] = {}
    for (device, op, _, size, samples, dtype, threads), of in by_case(results).items():
        for name in (f"iw {device}", f"iw {device}, streamed"):
            if name in of and of[name]["memory_bytes"]:
                sizes.setdefault((op, size, dtype, threads), {})[name.removeprefix(f"iw {device}"), samples] = of[name]["memory_bytes"]
    for (op, size, dtype, threads), of in sizes.items():
        if op == "deep MLP" and ("", 1) in of and (", streamed", 64) in of:
            what = f"{op} {size}, {dtype}, {threads} threads: memory of one sample over that of 64 streamed"
            yield Reached(what, of["", 1] / of[", streamed", 64], 1 / 1.15, False)


class EqualTime(NamedTuple):
    what: str
    provider: str
    samples: str  # that take as long as eight of the naive loop


def equal_time(results: list[Row]) -> Iterator[EqualTime]:
    """How many noise samples a provider affords in the loop's time for eight, from the sweep over S (linear between the logarithms)."""
    sweeps: dict[tuple, dict[str, dict[int, float]]] = {}
    for (device, op, work, size, samples, dtype, threads), of in by_case(results).items():
        for name, row in of.items():
            sweeps.setdefault((op, size, work, dtype, device, threads), {}).setdefault(name, {})[samples] = row["median_s"]
    for (op, size, work, dtype, _, threads), of in sweeps.items():
        budget = of.get(BASELINE, {}).get(8)
        for name, times in of.items():
            if work == "step" and budget is not None and len(times) > 2:
                yield EqualTime(f"{op} {size}, {dtype}, {threads} threads", name, _affordable(times, budget))


def _affordable(times: dict[int, float], budget: float) -> str:
    points = sorted(times.items())
    if points[0][1] > budget:
        return f"fewer than {points[0][0]}"
    if points[-1][1] <= budget:
        return f"{points[-1][0]} or more"
    for (s0, t0), (s1, t1) in itertools.pairwise(points):
        if t0 <= budget < t1:
            return f"{s0 * (s1 / s0) ** (math.log(budget / t0) / math.log(t1 / t0)):.1f}"
    return ""


def equal_compute(results: list[Row]) -> Iterator[tuple[str, str, float]]:
    """Time of S samples of B examples over that of conventional dropout on S*B examples: what the noise samples cost beyond their rows."""
    for (_, op, work, size, samples, dtype, threads), of in by_case(results).items():
        if MORE_EXAMPLES in of:
            for name, row in of.items():
                if name != MORE_EXAMPLES:
                    what = f"{op} {size}, S={samples}, {work}, {dtype}, {threads} threads"
                    yield what, name, row["median_s"] / of[MORE_EXAMPLES]["median_s"]
