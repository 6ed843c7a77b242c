"""The differences between two runs, beyond their noise."""

from typing import Any, NamedTuple

from .case import KEY
from .table import seconds

LEAST = 1.05  # a change by less than 5% is not reported, however quiet the machine


class Change(NamedTuple):
    name: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        """Above 1: faster now."""
        return self.before / self.after


class Comparison(NamedTuple):
    by: str  # what was compared: seconds, or ratios to the baseline where the machines differ
    faster: list[Change]
    slower: list[Change]
    unchanged: int
    noisy: list[str]
    only_old: list[str]
    only_new: list[str]
    warnings: list[str]


def name_of(row: dict[str, Any]) -> str:
    return ", ".join([*(str(row[k]) for k in KEY), row["provider"]])


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """A result changed where the ranges from 20th to 80th percentile do not meet and the medians differ by 5% or more.

    On another machine, or with another version of torch, seconds say little: there the ratios to the naive loop of the same run are
    compared.
    """
    machines = [(k, old["machine"].get(k), new["machine"].get(k)) for k in ("cpu", "gpu", "cores", "torch")]
    differs = [f"{k}: {before} before, {now} now" for k, before, now in machines if before != now]
    warnings = [*differs, *(f"{which} run: {d['noise']}" for which, d in (("old", old), ("new", new)) if d["noise"])]
    rows = [{name_of(r): r for r in d["results"] if r["status"] == "ok"} for d in (old, new)]
    fields = ("ratio", "ratio_p20", "ratio_p80") if differs else ("median_s", "p20_s", "p80_s")
    result = Comparison("ratio to the baseline" if differs else "time", [], [], 0, [], [], [], warnings)
    unchanged = 0
    for name in rows[0].keys() & rows[1].keys():
        a, b = rows[0][name], rows[1][name]
        if a["noise"] or b["noise"]:
            result.noisy.append(name)
            continue
        if None in (a[fields[0]], b[fields[0]]):
            continue
        (x, x20, x80), (y, y20, y80) = ([r[f] for f in fields] for r in (a, b))
        apart = x80 < y20 or y80 < x20
        if not apart or max(x, y) < LEAST * min(x, y):
            unchanged += 1
            continue
        change = Change(name, 1 / x, 1 / y) if differs else Change(name, x, y)  # so that smaller is faster in both
        (result.faster if change.factor > 1 else result.slower).append(change)
    for changes in (result.faster, result.slower):
        changes.sort(key=lambda c: abs(c.factor - 1), reverse=True)
    return result._replace(
        unchanged=unchanged,
        noisy=sorted(result.noisy),
        only_old=sorted(rows[0].keys() - rows[1].keys()),
        only_new=sorted(rows[1].keys() - rows[0].keys()),
    )


def text(c: Comparison) -> str:
    lines = [f"warning: {warning}" for warning in c.warnings]
    for word, changes in (("faster", c.faster), ("slower", c.slower)):
        for change in changes:
            before, after = (
                (f"{1 / v:.2f}x" for v in (change.before, change.after))
                if c.by != "time"
                else (seconds(change.before), seconds(change.after))
            )
            lines.append(f"{word} {max(change.factor, 1 / change.factor):.2f}x  {before} -> {after}  {change.name}")
    lines += [f"too noisy to compare: {name}" for name in c.noisy]
    lines += [f"only in the old results: {name}" for name in c.only_old] + [f"only in the new results: {name}" for name in c.only_new]
    counts = f"{len(c.faster)} faster, {len(c.slower)} slower, {c.unchanged} without a change beyond noise, {len(c.noisy)} too noisy"
    return "\n".join([*lines, f"compared by {c.by}: {counts}"])
