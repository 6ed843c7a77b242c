"""Comparisons of a run at equal time and at equal compute."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .case import BASELINE
from .training import MORE_EXAMPLES

Row = dict[str, Any]


def by_case(results: list[Row]) -> dict[tuple, dict[str, Row]]:
    """(device, op, work, size, samples, dtype, threads) -> provider -> result, of what was measured."""
    found: dict[tuple, dict[str, Row]] = {}
    for r in results:
        if r["status"] == "ok":
            key = (r["device"], r["op"], r["work"], r["size"], r["samples"], r["dtype"], r["threads"])
            if r["level"] != "host":
                found.setdefault(key, {})[r["provider"]] = r
    return found


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
