"""Pictures of a run, through matplotlib: throughput and memory against S, roofline, speed-up bars."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

from .case import BASELINE

Row = dict[str, Any]
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000", "0.55")  # Okabe and Ito's
MARKERS = "osD^vPX*<"


def save(document: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the figures for which there are results, and returns their paths."""
    rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"})
    results = [r for r in document["results"] if r["status"] == "ok"]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (("throughput", throughput), ("memory", memory), ("roofline", roofline), ("speedup", speedup)):
        figure = make(results, document["limits"])
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _style(providers: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each provider, the library's own with full lines."""
    return {
        name: {
            "color": COLORS[k % len(COLORS)],
            "marker": MARKERS[(k + k // len(COLORS)) % len(MARKERS)],
            "linestyle": "-" if name.startswith("iw ") else "--",
            "markersize": 4,
        }
        for k, name in enumerate(providers)
    }


def _sweeps(results: list[Row]) -> Iterator[tuple[str, dict[str, dict[int, Row]]]]:
    """(title, provider -> S -> result) of each case that was measured at three or more S."""
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for r in results:
        title = f"{r['op']} {r['size']}\n{r['work']}, {r['dtype']}, {r['threads']} threads"
        if r["level"] != "host":
            found.setdefault(title, {}).setdefault(r["provider"], {})[r["samples"]] = r
    for title, providers in found.items():
        swept = {name: points for name, points in providers.items() if len(points) > 2}
        if swept:
            yield title, swept


def _against_samples(results: list[Row], value: Callable[[Row], float | None], label: str) -> Figure | None:
    sweeps = list(_sweeps(results))
    if not sweeps:
        return None
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines + 0.8), layout="constrained")
    style = _style(sorted({name for _, providers in sweeps for name in providers}))
    for axes, (title, providers) in zip(figure.subplots(lines, columns, squeeze=False).flat, sweeps, strict=False):
        for name, points in providers.items():
            xy = [(s, value(r)) for s, r in sorted(points.items()) if value(r)]
            if xy:
                axes.plot(*zip(*xy, strict=True), label=name, **style[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=title, xlabel="noise samples S", ylabel=label)
        axes.xaxis.set_major_formatter("{x:.0f}")
    handles = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def throughput(results: list[Row], limits: dict[str, Any]) -> Figure | None:
    return _against_samples(results, lambda r: r["samples"] * r["batch"] / r["median_s"], "samples of examples / s")


def memory(results: list[Row], limits: dict[str, Any]) -> Figure | None:
    return _against_samples(results, lambda r: r["memory_bytes"] and r["memory_bytes"] / 1e6, "peak memory, MB")


def operations(r: Row) -> int | None:
    """Arithmetic of a result: counted products where there are, else one product for a masked element, and for a logit four operations
    (compare, subtract, exponential, add) and two more with its gradient.
    """
    if r["flops"]:
        return r["flops"]
    if r["op"] == "noise" and r["level"] == "op":
        rows, features = (int(v) for v in r["size"].split("x"))
        return r["samples"] * rows * features
    if r["op"] == "iw_cross_entropy" and r["level"] == "op":
        return (6 if "backward" in r["work"] else 4) * r["samples"] * r["batch"] * r["classes"]
    return None


def roofline(results: list[Row], limits: dict[str, Any]) -> Figure | None:
    """Operations a second against operations per byte that the provider moves, under the machine's two limits."""
    points = [(r, operations(r)) for r in results if r["bytes"] and r["samples"] == 8]
    points = [(r, n) for r, n in points if n]
    peak = max((v for k, v in limits.items() if k.startswith("matrix_")), default=None)
    if not points or peak is None:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    style = _style(sorted({r["provider"] for r, _ in points}))
    low = min(n / r["bytes"] for r, n in points) / 2
    high = 2 * peak / limits["copy"]
    corner = peak / limits["copy"]
    axes.plot([low, corner, high], [low * limits["copy"], peak, peak], color="0.3", linewidth=1.5, label="copy bandwidth, matrix rate")
    seen = set()
    for r, n in points:
        label = None if r["provider"] in seen else r["provider"]
        seen.add(r["provider"])
        fill = "none" if r["op"] == "noise" else style[r["provider"]]["color"]
        axes.plot(n / r["bytes"], n / r["median_s"], label=label, markerfacecolor=fill, **{**style[r["provider"]], "linestyle": ""})
    axes.set(title="Roofline, S=8 (hollow: the noise op)", xscale="log", yscale="log")
    axes.set(xlabel="operations per byte that the provider moves", ylabel="operations / s")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def speedup(results: list[Row], limits: dict[str, Any]) -> Figure | None:
    """Bars of how many times as fast as the naive loop, at S = 8, with the range from the 20th to the 80th percentile."""
    cases: dict[str, list[Row]] = {}
    for r in results:
        compared = r["provider"] != BASELINE and not r["provider"].startswith("limit")
        if r["samples"] == 8 and r["ratio"] and r["level"] != "host" and compared:
            cases.setdefault(f"{r['op']} {r['size']}, {r['work']}, {r['dtype']}, {r['threads']} threads", []).append(r)
    if not cases:
        return None
    bars = sum(len(rows) + 1 for rows in cases.values())
    figure = Figure(figsize=(9, 0.21 * bars + 1), layout="constrained")
    axes, y, labels = figure.subplots(), 0.0, []
    for title, rows in cases.items():
        axes.text(0.01, y, title, transform=axes.get_yaxis_transform(), va="center", fontweight="bold", fontsize=8)
        y += 1
        for r in sorted(rows, key=lambda r: -r["ratio"]):
            error = [[max(0, r["ratio"] - r["ratio_p20"])], [max(0, r["ratio_p80"] - r["ratio"])]]
            axes.barh(y, r["ratio"], xerr=error, color=COLORS[0] if r["provider"].startswith("iw ") else "0.7", error_kw={"linewidth": 0.8})
            labels.append((y, r["provider"]))
            y += 1
    axes.set_yticks([y for y, _ in labels], [name for _, name in labels], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="0.2", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast as the naive loop", title="Speed-up at S=8")
    axes.grid(axis="y", visible=False)
    return figure
