"""Results as tables: one form of the cells for the terminal, Markdown and HTML."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from .case import BASELINE, KEY, LEVELS

Row = dict[str, Any]
COLUMNS = ("provider", "median", "p20 - p80", "against loop", "own bytes", "of copy", "of limit", "memory", "first call", "note")
LEGEND = (
    f"against loop: how many times as fast as the baseline, {BASELINE}, median of the ratios within rounds. own bytes: what the provider "
    "moves, a second; of copy: that over the copy bandwidth. of limit: the time that the work's fewest bytes or operations need at the "
    "machine's copy bandwidth and matrix rate, over the median. memory: peak, by the allocator on a GPU, by tensors saved for backward on "
    "a CPU. first call: with compilation, where there is one."
)


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    return f"{value * 1e9:.3g} ns"


def bytes_(value: float | None, suffix: str = "") -> str:
    if value is None:
        return ""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}{suffix}"
    return f"{value:.0f} B{suffix}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%" if value >= 0.095 else f"{100 * value:.1f}%"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def cells(row: Row) -> tuple[str, ...]:
    """A result in the order of ``COLUMNS``."""
    if row["status"] != "ok":
        return (row["provider"], *[""] * (len(COLUMNS) - 2), f"{row['status']}: {row['reason']}")
    spread = f"{seconds(row['p20_s'])} - {seconds(row['p80_s'])}"
    return (
        row["provider"],
        seconds(row["median_s"]),
        spread,
        ratio(row["ratio"]),
        bytes_(row["bytes_per_s"], "/s"),
        percent(row["of_copy"]),
        percent(row["of_limit"]),
        bytes_(row["memory_bytes"]),
        seconds(row["first_call_s"]),
        f"noisy: {row['noise']}" if row["noise"] else "",
    )


def title(row: Row) -> str:
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row["device"] == "cpu" else ""
    return f"{row['op']} {row['size']}, S={row['samples']}, {row['dtype']}, {row['work']}, {row['device']}{threads}"


def groups(results: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """(level, title, rows) of each case, level by level, the measured rows first."""
    cases: dict[tuple, list[Row]] = {}
    for row in results:
        cases.setdefault(tuple(row[k] for k in KEY), []).append(row)
    for level in LEVELS:
        for rows in cases.values():
            if rows[0]["level"] == level:
                yield level, title(rows[0]), sorted(rows, key=lambda r: r["status"] != "ok")


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=180)


def show(results: list[Row], out: Console) -> None:
    for level, name, rows in groups(results):
        table = Table(title=f"{level}: {name}", title_justify="left", title_style="bold", pad_edge=False)
        for column in COLUMNS:
            left = column in ("provider", "note")
            table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in rows:
            style = None if row["status"] == "ok" else "bold red" if row["status"] in ("wrong", "failed") else "dim"
            table.add_row(*cells(row), style="bold" if row["provider"].startswith("iw ") and style is None else style)
        out.print(table)
    out.print(LEGEND, style="dim")


def markdown(document: dict[str, Any]) -> str:
    """Machine, date and command, and one table for each level, to be pasted."""
    lines = [about(document), ""]
    if document["noise"]:
        lines += [f"**Too noisy to be quoted**: {document['noise']}.", ""]
    level_before = None
    for level, name, rows in groups(document["results"]):
        if level != level_before:
            lines += ["", f"**{level}**", "", "| case | provider | median | p20 - p80 | against loop | of limit | memory |"]
            lines += ["|---|---|---:|---:|---:|---:|---:|"]
            level_before = level
        for i, row in enumerate(rows):
            if row["status"] != "ok":
                continue
            provider, median, spread, against, _, _, limit, memory, _, note = cells(row)
            cells_ = (name if i == 0 else "", provider + (f" ({note})" if note else ""), median, spread, against, limit, memory)
            lines.append("| " + " | ".join(cells_) + " |")
    left_out = [r for r in document["results"] if r["status"] != "ok"]
    if left_out:
        reasons = dict.fromkeys(f"{r['provider']}: {r['status']}, {r['reason']}" for r in left_out)
        lines += ["", "Not measured: " + "; ".join(reasons) + "."]
    return "\n".join([*lines, ""])


def about(document: dict[str, Any]) -> str:
    """One paragraph: where, when, with what, and how to do it again."""
    m, limits = document["machine"], document["limits"]
    hardware = m.get("gpu") or f"{m['cpu']}, {m['cores']} cores"
    rates = [f"copy {bytes_(limits['copy'], '/s')}"] if "copy" in limits else []
    rates += [f"{k[7:]} matrix product {v / 1e9:.0f} GFLOP/s" for k, v in limits.items() if k.startswith("matrix_")]
    words = [f"{m['date']}, {hardware}", *rates, f"Python {m['python']}, torch {m['torch']}", f"commit {m['commit']}"]
    state = " (interrupted)" if document["interrupted"] else ""
    return f"{'; '.join(words)}{state}. To repeat: `{document['command']}`."
