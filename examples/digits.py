"""Dropout, IWSGD and the unweighted ablation on scikit-learn's digits: 300 training images, an MLP, four dropout rates.

Every method sees the same split, initial weights, batches and hyper-parameters; only the number of noise samples S and their
weights differ. Prints a table, saves a figure.

    python examples/digits.py            # under 3 minutes on 2 cores
    python examples/digits.py --quick    # a look, under 25 s
"""

import argparse
import math
import statistics
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iwsgd_ext as iw

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from rich.table import Table
    from scipy.stats import t as student
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(f"{error}: this example needs scikit-learn, rich and matplotlib: pip install 'iwsgd_ext[demo]'") from None

RATES = (0.3, 0.5, 0.7, 0.8)
BATCH, LEARNING_RATE, MOMENTUM = 50, 0.05, 0.9
CAPTION = """Test error and NLL: noise off. Bound (eq 4), ESS (effective sample size): test images, noise on, S samples. loop: the step \
time of S passes in plain PyTorch over this one's; both at p=0.5. mean: equal weights (alpha=0), which at S=1 is IWSGD.\n"""


class Method(NamedTuple):
    name: str
    samples: int
    alpha: float | None  # None: nn.Dropout and nn.CrossEntropyLoss, without this package
    color: str  # Okabe and Ito's, safe for the colour-blind
    line: str


METHODS = (
    Method("nn.Dropout", 1, None, "0.4", "x:"),
    Method("IWSGD S=1", 1, 1.0, "#56B4E9", "o-"),
    Method("IWSGD S=4", 4, 1.0, "#E69F00", "s-"),
    Method("IWSGD S=8", 8, 1.0, "#0072B2", "D-"),
    Method("mean S=4", 4, 0.0, "#E69F00", "s--"),
    Method("mean S=8", 8, 0.0, "#0072B2", "D--"),
)


class Result(NamedTuple):
    error: float  # %, test images, noise off
    nll: float  # test images, noise off
    bound: float  # eq 4 at the method's S, test images, noise on
    ess: float  # effective number of noise samples, of S


class Data(NamedTuple):
    x: Tensor  # [300, 64]
    y: Tensor  # [300]
    x_test: Tensor  # [1497, 64]
    y_test: Tensor  # [1497]


def load() -> Data:
    """One split for all seeds, which choose initial weights, batches and noise."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, train_size=300, stratify=y, random_state=0)
    return Data(torch.tensor(x).float(), torch.tensor(y), torch.tensor(x_test).float(), torch.tensor(y_test))


def build(method: Method, rate: float, data: Data) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A model, its loss and its optimiser. The two lines under the `if` are all that IWSGD changes."""
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(rate), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(rate)]
    model, criterion = nn.Sequential(*hidden, nn.Linear(256, 10)), nn.CrossEntropyLoss()
    if method.alpha is not None:
        # Rows from the first dropout on: in a network this small less Python for each operation counts; the run on data.x verifies them.
        model = iw.convert(model, method.samples, expand="first", example_inputs=data.x)
        criterion = iw.IWCrossEntropyLoss(method.samples, alpha=method.alpha)
    return model, criterion, torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)


def train(method: Method, rate: float, seed: int, data: Data, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model, criterion, optimizer = build(method, rate, data)
    order = torch.Generator().manual_seed(seed)  # of its own: the same batches whatever noise a method draws
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x), generator=order).split(BATCH):
            loss = criterion(model(data.x[rows]), data.y[rows])  # S * 50 rows of logits, 50 targets
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def evaluate(method: Method, model: nn.Module, data: Data) -> Result:
    logits = model.train()(data.x_test)  # noise on: S rows per image
    _, stats = iw.iw_cross_entropy(logits, data.y_test, method.samples, alpha=method.alpha or 0.0, return_stats=True)
    bound = iw.iw_logmeanexp(stats.log_p, method.samples).mean()
    logits = model.eval()(data.x_test)  # noise off: an ordinary network
    error = (logits.argmax(1) != data.y_test).float().mean()
    return Result(100 * error.item(), F.cross_entropy(logits, data.y_test).item(), bound.item(), stats.ess.mean().item())


@torch.no_grad()
def bound_curve(model: nn.Module, data: Data) -> dict[int, tuple[float, float]]:
    """Bound by the number of samples k (eq 6), mean and standard error over test images: one draw of 64, cut into 64/k sets of k."""
    with iw.sampling(64, seed=0):
        logits = model.train()(data.x_test)
    log_p = -F.cross_entropy(logits, data.y_test.repeat(64), reduction="none").view(64, -1)
    curve = {}
    for k in (1, 2, 4, 8, 16, 32, 64):
        bound = iw.iw_logmeanexp(log_p.view(k, -1), k).view(64 // k, -1).mean(0)  # [1497]
        curve[k] = bound.mean().item(), bound.std().item() / math.sqrt(len(bound))
    return curve


def naive_loop(model: nn.Module, x: Tensor, y: Tensor, samples: int) -> Tensor:
    """The paper's Figure 1 in plain PyTorch: S forward passes of a model with nn.Dropout."""
    log_p = torch.stack([-F.cross_entropy(model(x), y, reduction="none") for _ in range(samples)])
    return -(torch.logsumexp(log_p, 0) - math.log(samples)).mean()


def step_times(data: Data, rounds: int) -> dict[str, tuple[float, float]]:
    """Median ms of a training step of each method and of the naive loop with its S, one after the other in turn."""
    x, y, steps_of = data.x[:BATCH], data.y[:BATCH], {}
    for method in METHODS:
        model, criterion, optimizer = build(method, 0.5, data)
        steps_of[method.name, "ours"] = optimizer, lambda m=model, c=criterion: c(m(x), y)
        plain, _, optimizer = build(METHODS[0], 0.5, data)
        steps_of[method.name, "loop"] = optimizer, lambda m=plain, s=method.samples: naive_loop(m, x, y, s)
    times = {key: [] for key in steps_of}
    for _ in range(rounds):
        for key, (optimizer, loss) in steps_of.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            times[key].append(1000 * (time.perf_counter() - start))
    return {m.name: tuple(statistics.median(times[m.name, kind]) for kind in ("ours", "loop")) for m in METHODS}


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def cell(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({spread(values):.{digits}f})"


def print_table(console: Console, results: dict, times: dict, seeds: int) -> None:
    title = f"Digits, 300 training and 1497 test images: mean (std) over {seeds} seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("p", "method", "test\nerror %", "test\nNLL", "bound", "ESS", "ms/\nstep", "loop"):
        table.add_column(heading, justify="left" if heading in ("p", "method") else "right", no_wrap=True)
    for rate, method in product(RATES, METHODS):
        error, nll, bound, ess = zip(*results[method.name, rate], strict=True)
        ours, loop = times[method.name]
        cells = cell(error, 2), cell(nll, 3), cell(bound, 3), cell(ess, 1), f"{ours:.1f}"
        ratio = "" if method.alpha is None else f"{loop / ours:.1f}x"
        table.add_row(str(rate), method.name, *cells, ratio, end_section=method is METHODS[-1])
    console.print(table, CAPTION, sep="\n")


def compare(results: dict, ours: str, other: str) -> str:
    """The results in words: at which rates a method's test NLL and error are clearly under or over another's, paired over seeds."""
    parts = []
    for field, name in (("nll", "test NLL"), ("error", "test error")):
        where = {"lower": [], "higher": [], "not clearly different": []}
        for rate in RATES:
            d = [getattr(a, field) - getattr(b, field) for a, b in zip(results[ours, rate], results[other, rate], strict=True)]
            clear = abs(statistics.mean(d)) > student.ppf(0.975, len(d) - 1) * spread(d) / math.sqrt(len(d))
            where["not clearly different" if not clear else "lower" if sum(d) < 0 else "higher"].append(str(rate))
        parts.append(f"{name} " + ", ".join(f"{word} at p={'/'.join(rates)}" for word, rates in where.items() if rates))
    return f"{ours} against {other}: {', '.join(parts)}"


def style(method: Method) -> dict:
    fill = "white" if method.alpha == 0 else method.color
    return {"fmt": method.line, "color": method.color, "mfc": fill, "label": method.name, "ms": 5, "capsize": 2, "elinewidth": 1}


def save_figure(path: Path, results: dict, curves: dict) -> None:
    rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92"})
    figure = Figure(figsize=(13, 4.4), layout="constrained")  # without pyplot: drawn by Agg, no display needed
    nll, error, bound = figure.subplots(1, 3)
    for axes, field, title in ((nll, "nll", "Test NLL"), (error, "error", "Test error (%)")):
        for i, method in enumerate(METHODS):
            shifted = [rate + 0.006 * (i - 2.5) for rate in RATES]  # so that error bars stand side by side
            values = [[getattr(result, field) for result in results[method.name, rate]] for rate in RATES]
            axes.errorbar(shifted, [statistics.mean(v) for v in values], [spread(v) for v in values], **style(method))
        axes.set(title=title, xlabel="dropout rate p", xticks=RATES, ylim=(0, None))
    for i, (method, curve) in enumerate(curves.items()):
        bound.errorbar([k * 1.06 ** (i - 1) for k in curve], *zip(*curve.values(), strict=True), **style(method))
    bound.set_xscale("log", base=2)
    bound.set(title="Bound L(S) of networks trained at p=0.5", xlabel="noise samples S in the bound", xticks=(1, 2, 4, 8, 16, 32, 64))
    bound.xaxis.set_major_formatter("{x:.0f}")
    figure.legend(*nll.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="runs of every method at every rate (%(default)s)")
    parser.add_argument("--epochs", type=int, default=50, help="passes over the 300 images (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="where the figure goes (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 seeds and 10 epochs, unless they are given")
    parser.add_argument("--threads", type=int, default=1, help="torch's (%(default)s: the matrices are small)")
    if parser.parse_args().quick:
        parser.set_defaults(seeds=2, epochs=10)
    args = parser.parse_args()
    if min(args.seeds, args.epochs, args.threads) < 1:
        parser.error("--seeds, --epochs and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    console, data, start = Console(), load(), time.perf_counter()
    results, curves = {(method.name, rate): [] for method in METHODS for rate in RATES}, {}
    with Progress(
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        runs = progress.add_task("timing steps", total=args.seeds * len(results))
        times = step_times(data, rounds=20 if args.quick else 100)
        for seed, rate, method in product(range(args.seeds), RATES, METHODS):
            progress.update(runs, description=f"seed {seed}, p={rate}, {method.name:<10}")
            model = train(method, rate, seed, data, args.epochs)
            results[method.name, rate].append(evaluate(method, model, data))
            if seed == 0 and rate == 0.5 and method.alpha == 1:
                curves[method] = bound_curve(model, data)
            progress.advance(runs)

    print_table(console, results, times, args.seeds)
    seen = "; ".join(compare(results, "IWSGD S=8", other) for other in ("nn.Dropout", "mean S=8"))
    console.print(f"Seen (paired t-test over seeds, 5% level each): {seen if args.seeds > 2 else 'too few seeds to say'}.")
    if args.epochs < 30:
        console.print(f"{args.epochs} epochs end far from convergence: methods compare otherwise there than in a full run.")
    save_figure(args.out, results, curves)
    console.print(f"Figure: {args.out}. {time.perf_counter() - start:.0f} s on {args.threads} thread{'s' * (args.threads > 1)}.")


if __name__ == "__main__":
    main()
