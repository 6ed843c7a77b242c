"""What many runs say: methods compared at each dropout rate and at the rate that suits each best, with standard errors and paired tests.

    python -m recipes.evidence NAME runs.csv [runs.csv ...] --out docs/results --page docs/evidence.md

The files are those of ``python -m recipes``; runs of one recipe with other lengths are other methods. Writes evidence-NAME.csv (all runs),
evidence-NAME.png, and the tables into the page, between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

import argparse
import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .files import write
from .options import method
from .summary import color

LEVEL = 0.05


class Method(NamedTuple):
    samples: int
    alpha: float
    epochs: float
    name: str


class Runs(NamedTuple):
    """The runs of a recipe: a method's numbers at a rate are its seeds' in order, and all methods have the same seeds."""

    of: dict[tuple[Method, float], dict[int, dict[str, float]]]  # by method and rate: by seed: the metrics

    @property
    def methods(self) -> list[Method]:
        return list(dict.fromkeys(m for m, _ in self.of))

    @property
    def shortest(self) -> float:
        """Epochs of the shortest runs with one sample."""
        return min(m.epochs for m in self.methods if m.samples == 1)

    def rates(self, method: Method) -> list[float]:
        return sorted(p for m, p in self.of if m == method)

    def values(self, method: Method, rate: float, metric: str) -> list[float]:
        return [metrics[metric] for _, metrics in sorted(self.of[method, rate].items())]


def read(paths: list[Path]) -> Runs:
    """Raises ValueError where the methods were not run with the same seeds: the tests are paired over seeds. Lengths are multiples of that
    of the shortest runs with one sample, with which all are compared.
    """
    lines = [line for path in paths for line in csv.DictReader(path.open(newline=""))]
    ones = [float(line["epochs"]) for line in lines if line["samples"] == "1"]
    if not ones:
        raise ValueError("runs: expected some with one sample, with which the others are compared")
    shortest = min(ones)
    found: dict[tuple[Method, float], dict[int, dict[str, float]]] = defaultdict(dict)
    for line in lines:
        samples, alpha, epochs = int(line["samples"]), float(line["alpha"]), float(line["epochs"])
        longer = "" if epochs == shortest else f", {epochs / shortest:g}x steps"
        key = Method(samples, alpha, epochs, method(samples, alpha) + longer)
        numbers = {k: float(v) for k, v in line.items() if k not in ("method", "samples", "alpha", "rate", "epochs", "seed")}
        rate, seed = float(line["rate"]), int(line["seed"])
        if seed in found[key, rate]:
            raise ValueError(f"runs: {key.name}, p={rate:g}, seed {seed} is there twice; all must be of one recipe and its options")
        found[key, rate][seed] = numbers
    seeds = {tuple(sorted(of_seed)) for of_seed in found.values()}
    if len(seeds) != 1:
        raise ValueError(f"runs: expected the same seeds for all methods and rates, got {sorted(seeds)}")
    if len(next(iter(seeds))) < 2:
        raise ValueError("runs: expected at least two seeds, got one")
    return Runs(dict(found))


def chosen(runs: Runs, method: Method, metric: str) -> tuple[list[float], list[float]]:
    """A metric for each seed at the rate at which its mean over the other seeds is least, and these rates: no seed chooses its own."""
    rates, values, at = runs.rates(method), [], []
    for i in range(len(runs.values(method, rates[0], metric))):

        def others(rate: float, i: int = i) -> float:
            numbers = [v for j, v in enumerate(runs.values(method, rate, metric)) if j != i]
            return statistics.fmean(numbers) if all(map(math.isfinite, numbers)) else math.inf

        best = min(rates, key=others)
        at.append(best)
        values.append(runs.values(method, best, metric)[i])
    return values, at


def error_of(values: list[float]) -> float:
    """Standard error of the mean; nan where a run diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def paired(values: list[float], others: list[float]) -> tuple[float, float, float]:
    """Mean difference, its standard error, and the p-value of a paired t-test over seeds."""
    from scipy import stats

    differences = [a - b for a, b in zip(values, others, strict=True)]
    if len(set(differences)) == 1:
        return differences[0], 0.0, 1.0 if differences[0] == 0 else 0.0
    return statistics.fmean(differences), error_of(differences), float(stats.ttest_rel(values, others).pvalue)


def holm(p_values: list[float], level: float = LEVEL) -> list[bool]:
    """Which of several tests are significant, so that one false one among them all has at most the probability ``level`` (Holm 1979)."""
    p_values = [1.0 if math.isnan(p) else p for p in p_values]  # of runs that diverged nothing is known
    order, found = sorted(range(len(p_values)), key=p_values.__getitem__), [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        found[i] = True
    return found


MEASURES = (("nll", "test NLL", 4), ("error", "test error %", 2), ("ensemble_nll", "ensemble NLL", 4))


def compared(runs: Runs, pairs: list[tuple[Method, Method]], metric: str, digits: int) -> list[str]:
    """Differences of methods to others, each at its best rate; * marks those that are significant among all of them (Holm)."""
    tests = [paired(chosen(runs, m, metric)[0], chosen(runs, other, metric)[0]) for m, other in pairs]
    marks = holm([p for _, _, p in tests])
    return [f"{mean:+.{digits}f} ± {e:.{digits}f}{'*' * mark}" for (mean, e, _), mark in zip(tests, marks, strict=True)]


def best_table(runs: Runs) -> str:
    """Each method's measures at the rate that suits it for this measure, and their differences to dropout's."""
    base = next(m for m in runs.methods if m.samples == 1 and m.epochs == runs.shortest)
    rest = [m for m in runs.methods if m != base]
    columns = []
    for metric, heading, digits in MEASURES:
        of_method = {m: chosen(runs, m, metric) for m in [base, *rest]}
        at = {m: "/".join(f"{p:g}" for p in sorted(set(rates))) for m, (_, rates) in of_method.items()}
        cells = [f"{statistics.fmean(of_method[m][0]):.{digits}f} ({at[m]})" for m in [base, *rest]]
        columns += [[f"{heading} (p)", *cells], ["against dropout", "", *compared(runs, [(m, base) for m in rest], metric, digits)]]
    return _table([["method", *(m.name for m in [base, *rest])], *columns])


def weights_table(runs: Runs) -> str:
    """What the weights do: the differences to equal weights at the same S."""
    equal = {(m.samples, m.epochs): m for m in runs.methods if m.alpha == 0}
    pairs = [(m, equal[m.samples, m.epochs]) for m in runs.methods if m.alpha != 0 and (m.samples, m.epochs) in equal]
    columns = [[heading, *compared(runs, pairs, metric, digits)] for metric, heading, digits in MEASURES]
    return _table([["method", *(m.name for m, _ in pairs)], *columns])


def _table(columns: list[list[str]]) -> str:
    lines = [list(row) for row in zip(*columns, strict=True)]
    lines.insert(1, ["---", *["---:"] * (len(columns) - 1)])
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def rate_table(runs: Runs, metric: str, digits: int) -> str:
    """A metric's mean over seeds by method and rate; the least at each rate is bold."""
    methods = runs.methods
    rates = sorted({p for m in methods for p in runs.rates(m)})
    means = {(m, p): statistics.fmean(runs.values(m, p, metric)) for m in methods for p in rates if (m, p) in runs.of}
    least = {p: min(means[m, p] for m in methods if (m, p) in means) for p in rates}

    def cell(m: Method, p: float) -> str:
        if (m, p) not in means:
            return ""
        text = f"{means[m, p]:.{digits}f}"
        return f"**{text}**" if means[m, p] == least[p] else text

    return _table([["method", *(m.name for m in methods)], *([f"p={p:g}", *(cell(m, p) for m in methods)] for p in rates)])


def tables(runs: Runs) -> str:
    seeds = len(next(iter(runs.of.values())))
    parts = [
        f"Each method at the dropout rate that suits it, which is in brackets: means over {seeds} seeds.",
        best_table(runs),
        "What the weights do: differences to the unweighted mean at the same S.",
        weights_table(runs),
        "Test NLL by dropout rate:",
        rate_table(runs, "nll", 4),
        "Test error % by dropout rate:",
        rate_table(runs, "error", 2),
    ]
    return "\n\n".join(parts) + "\n\n"


def one_unit(m: Method) -> float:
    return 1.0


def picture(runs: Runs, path: Path) -> None:
    """Test NLL and error against the rate, by S and by alpha at the largest S; calibration and effective sample size."""
    from io import BytesIO

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shortest, largest = runs.shortest, max(m.samples for m in runs.methods)
    one = [m for m in runs.methods if m.samples == 1]
    by_samples = [*one, *(m for m in runs.methods if m.samples > 1 and m.alpha == 1)]
    by_alpha = [*(m for m in one if m.epochs == shortest), *(m for m in runs.methods if m.samples == largest)]
    shades = {0.0: "#E69F00", 0.5: "#56B4E9", 1.0: "#D55E00", math.inf: "#CC79A7"}

    def draw(
        axes: Any, methods: list[Method], metric: str, shared: Callable[[Method], str], scale: Callable[[Method], float] = lambda m: 1
    ):
        for i, m in enumerate(methods):
            rates = runs.rates(m)
            values = [[v / scale(m) for v in runs.values(m, p, metric)] for p in rates]
            at = [p + 0.004 * (i - len(methods) / 2) for p in rates]
            line = {1.0: "-", 2.0: "--"}.get(m.epochs / shortest, ":")
            means, errors = [statistics.fmean(v) for v in values], [error_of(v) for v in values]
            axes.errorbar(at, means, errors, fmt=f"o{line}", color=shared(m), label=m.name, ms=3.5, capsize=2, elinewidth=1, lw=1.4)

    def of_samples(m: Method) -> str:
        return color(m.samples)

    def of_alpha(m: Method) -> str:
        return color(1) if m.samples == 1 else shades.get(m.alpha, "#009E73")

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"}):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        axes = figure.subplots(2, 3)
        draw(axes[0, 0], by_samples, "nll", of_samples)
        draw(axes[0, 1], by_samples, "error", of_samples)
        draw(axes[0, 2], by_samples, "ece", of_samples)
        draw(axes[1, 0], by_alpha, "nll", of_alpha)
        draw(axes[1, 1], by_alpha, "error", of_alpha)
        draw(axes[1, 2], [m for m in by_samples if m.samples > 1], "ess", of_samples, lambda m: m.samples)
        for of_metric, metric in zip(axes[1, :2], ("nll", "error"), strict=True):
            # The best sample alone can be so far off that it would hide the differences of the others.
            shown = [v for m in by_alpha if m.alpha < math.inf for p in runs.rates(m) for v in runs.values(m, p, metric)]
            of_metric.set_ylim(top=min(of_metric.get_ylim()[1], 1.05 * max(filter(math.isfinite, shown))), bottom=0.95 * min(shown))
        figure.suptitle("means over seeds, bars: standard error", fontsize=9)
        titles = (
            "Test NLL",
            "Test error %",
            "Calibration error (ECE) %",
            f"Test NLL, S={largest}",
            f"Test error %, S={largest}",
            "ESS / S",
        )
        for of_title, title in zip(axes.flat, titles, strict=True):
            of_title.set(title=title, xlabel="dropout rate p")
        axes[0, 0].legend(frameon=False, fontsize=8)
        axes[1, 0].legend(frameon=False, fontsize=8)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    write(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the files that are written")
    parser.add_argument("runs", type=Path, nargs="+", help="runs.csv of python -m recipes")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--page", type=Path, help="a page whose tables are written anew")
    args = parser.parse_args()
    try:
        runs = read(args.runs)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{error}")
    args.out.mkdir(parents=True, exist_ok=True)
    header, *lines = [line for path in args.runs for line in path.read_text().splitlines()]
    write(args.out / f"evidence-{args.name}.csv", "\n".join([header, *(line for line in lines if line != header), ""]).encode())
    picture(runs, args.out / f"evidence-{args.name}.png")
    print(tables(runs))
    if args.page:
        text = args.page.read_text()
        if block(args.name).search(text) is None:
            parser.error(f"--page: {args.page} has no lines <!-- {args.name} --> and <!-- end of {args.name} -->")
        write(args.page, block(args.name).sub(lambda found: found[1] + tables(runs) + found[3], text).encode())


def block(name: str) -> re.Pattern[str]:
    """A page's text between the lines that name a recipe, as group 2."""
    return re.compile(rf"(<!-- {re.escape(name)} -->\n\n)(.*?)(\n?<!-- end of {re.escape(name)} -->)", re.DOTALL)


if __name__ == "__main__":
    main()
