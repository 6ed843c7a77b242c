"""Results of all runs as a table (text, Markdown, JSON) and a picture."""

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .files import write, write_json
from .options import Arm

Results = dict[tuple[str, int], dict[str, Any]]  # by an arm's folder and a seed

COLUMNS = (
    ("error", "test error %", 2),
    ("nll", "test NLL", 3),
    ("ece", "ECE %", 2),
    ("ensemble_nll", "ensemble NLL", 3),
    ("ess", "ESS", 2),
)
CAPTION = (
    "Mean (standard deviation, n - 1) over {seeds}. Test error, NLL (nats) and calibration error (ECE): noise off, after the last step. "
    "Ensemble NLL: noise on, probabilities averaged over 16 noise samples. ESS: effective sample size of the weights, of S, in the steps "
    "before the last evaluation."
)


def values(results: Results, arm: Arm, metric: str) -> list[float]:
    """A metric over the seeds; nan or infinite for a run that diverged."""
    found = [result["metrics"][metric] for (folder, _), result in sorted(results.items()) if folder == arm.folder]
    return [math.nan if v is None else float(v) for v in found]


def mean_std(numbers: list[float], digits: int) -> str:
    if not all(map(math.isfinite, numbers)):
        return "diverged"
    spread = f"{statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "-"
    return f"{statistics.fmean(numbers):.{digits}f} ({spread})"


def rows(arms: list[Arm], results: Results) -> list[list[str]]:
    return [[f"{a.rate:g}", a.label, *(mean_std(values(results, a, metric), digits) for metric, _, digits in COLUMNS)] for a in arms]


HEADINGS = ["p", "method", *(heading for _, heading, _ in COLUMNS)]


def _caption(arms: list[Arm]) -> str:
    return CAPTION.format(seeds=f"{arms[0].seeds} seed{'s' * (arms[0].seeds > 1)}")


def table(arms: list[Arm], results: Results) -> Table:
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, caption=_caption(arms), caption_justify="left")
    for heading in HEADINGS:
        found.add_column(heading, justify="left" if heading in ("p", "method") else "right", no_wrap=True)
    for row in rows(arms, results):
        found.add_row(*row)
    return found


def markdown(arms: list[Arm], results: Results, about: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * 2 + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(arms, results)]
    return "\n".join([*lines, "", _caption(arms), "", f"    {about['command']}", ""])


def write_all(out: Path, arms: list[Arm], results: Results, about: dict[str, Any]) -> list[str]:
    """The names of the files."""
    text = Console(file=io.StringIO(), width=140, markup=False, emoji=False, highlight=False)
    text.print(table(arms, results))
    text.print(about["command"], soft_wrap=True)
    write(out / "summary.txt", text.file.getvalue().encode())  # type: ignore[attr-defined]
    write(out / "summary.md", markdown(arms, results, about).encode())
    write(out / "runs.csv", _csv(arms, results))
    document = {
        **about,
        "arms": [
            {
                "label": a.label,
                "samples": a.samples,
                "alpha": a.alpha,
                "rate": a.rate,
                "folder": a.folder,
                "runs": {seed: results[folder, seed] for folder, seed in sorted(results) if folder == a.folder},
            }
            for a in arms
        ],
    }
    write_json(out / "summary.json", document)
    written = ["summary.txt", "summary.md", "summary.json", "runs.csv"]
    if len({a.rate for a in arms}) > 1:
        try:
            written.append(figure(out, arms, results))
        except ImportError as error:
            written.append(f"no picture ({error}: pip install matplotlib)")
    return written


def _csv(arms: list[Arm], results: Results) -> bytes:
    """A line for each run, for other programs."""
    text = io.StringIO()
    writer, metrics = csv.writer(text, lineterminator="\n"), None
    for arm in arms:
        for (folder, seed), result in sorted(results.items()):
            if folder == arm.folder:
                if metrics is None:
                    metrics = list(result["metrics"])
                    writer.writerow(["method", "samples", "alpha", "rate", "epochs", "seed", *metrics])
                numbers = ["nan" if v is None else f"{float(v):.6g}" for v in (result["metrics"][m] for m in metrics)]
                writer.writerow([arm.label, arm.samples, f"{arm.alpha:g}", f"{arm.rate:g}", f"{result['epochs']:g}", seed, *numbers])
    return text.getvalue().encode()


# By S; Okabe and Ito's, safe for the colour-blind.
COLORS = {1: "#000000", 2: "#56B4E9", 4: "#E69F00", 8: "#0072B2", 16: "#009E73", 32: "#CC79A7"}
LINES = {1.0: "o-", 0.0: "s--", math.inf: "^:"}


def color(samples: int) -> str:
    return COLORS.get(samples, "#D55E00" if samples % 2 else "#F0E442")


def figure(out: Path, arms: list[Arm], results: Results, metrics: tuple[str, ...] = ("error", "nll")) -> str:
    """Test error and NLL against the dropout rate, a curve for each method, as Figure 2 of the paper: means and standard deviations."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(a.label for a in arms))
    headings = {metric: heading for metric, heading, _ in COLUMNS}
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"}):
        picture = Figure(figsize=(5.5 * len(metrics), 4.6), layout="constrained")
        for axes, metric in zip(picture.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            for i, label in enumerate(labels):
                curve = sorted((a for a in arms if a.label == label), key=lambda a: a.rate)
                numbers = [values(results, a, metric) for a in curve]
                at = [a.rate + 0.004 * (i - len(labels) / 2) for a in curve]  # beside each other, so that error bars can be told apart
                numbers = [v if all(map(math.isfinite, v)) else [math.nan] for v in numbers]  # a gap in the curve
                spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in numbers]
                style = {"fmt": LINES.get(curve[0].alpha, "D-."), "color": color(curve[0].samples)}
                axes.errorbar(at, [statistics.fmean(v) for v in numbers], spread, label=label, ms=4, capsize=2, elinewidth=1, **style)
            axes.set(xlabel="dropout rate p", ylabel=headings[metric], xticks=sorted({a.rate for a in arms}))
        bars = f", bars: standard deviation over {arms[0].seeds} seeds" if arms[0].seeds > 1 else ""
        picture.suptitle(f"{arms[0].recipe}{bars}", fontsize=10)
        handles = picture.axes[0].get_legend_handles_labels()
        picture.legend(*handles, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=150)
    write(out / "figure.png", buffer.getvalue())
    return "figure.png"
