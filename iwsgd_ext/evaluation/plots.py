"""Pictures of noise samples (Noh et al. 2017) by matplotlib: the bound against S, importance weights, effective sample size over training.

Each function draws into the given axes, or into a new figure, and returns the axes: ``ax.figure.savefig("bound.png")`` saves the figure.

Example:
    >>> import torch, iwsgd_ext as iw
    >>> curve = iw.BoundCurve(torch.arange(1, 4), torch.tensor([-1.5, -1.25, -1.2]), torch.full((3,), 0.05))
    >>> iw.plots.bound(curve).get_xlabel()
    'noise samples S'
"""

import csv
import math
import os
from typing import TYPE_CHECKING

from torch import Tensor

from ..stats import IWStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .bound_curve import BoundCurve  # only for types: bound_curve.py imports this file

LINE, BARS, BAND = "#1f4e79", "#7fa3c7", "#c9d8e8"  # dark, medium and light grey in black-and-white print


def bound(curve: "BoundCurve", ax: "Axes | None" = None) -> "Axes":
    """Draws the bound (eq 4) against the number of noise samples, with a band of one standard error on either side.

    Args:
        curve: the result of :func:`iwsgd_ext.bound_curve`.
        ax: matplotlib axes, or None for a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: curve is not a BoundCurve.
        ImportError: matplotlib is not installed.
    """
    if getattr(curve, "_fields", None) != ("samples", "bound", "standard_error"):
        raise TypeError(f"curve: expected a BoundCurve (iw.bound_curve), got {type(curve).__name__}")
    ax = _axes(ax)
    samples, mean, error = (column.tolist() for column in curve)
    low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
    ax.fill_between(samples, low, high, color=BAND, linewidth=0, label="± 1 standard error")
    ticks = [2**i for i in range(samples[-1].bit_length())]
    ax.plot(samples, mean, color=LINE, marker="o", markersize=4, markevery=[tick - 1 for tick in ticks], label="bound")
    ax.set_xlabel("noise samples S")
    ax.set_ylabel("bound on log p(y | x), nats per example")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.legend(loc="lower right")  # with its white frame: it may lie on the band, whose colour it explains
    return ax


def weights(stats: IWStats | Tensor, ax: "Axes | None" = None) -> "Axes":
    """Draws a histogram of importance weights (eq 8) times S: 1 is the weight of an unweighted mean, and S that of a sample alone.

    Args:
        stats: :class:`iwsgd_ext.IWStats`, of which the examples that count are drawn, or weights [S, ...].
        ax: matplotlib axes, or None for a new figure.

    Returns:
        The axes.

    Raises:
        TypeError, ValueError: stats is not as above, or no example counts.
        ImportError: matplotlib is not installed.
    """
    w = stats.weights if isinstance(stats, IWStats) else stats
    if isinstance(stats, IWStats) and stats.counted is not None:
        w = w[:, stats.counted]
        if not w.numel():
            raise ValueError("stats: expected an example that counts, got none")
    if not isinstance(w, Tensor) or w.dim() < 1 or not w.numel():
        got = f"a tensor of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(stats).__name__
        raise TypeError(f"stats: expected IWStats or a tensor of weights [S, ...], got {got}")
    ax = _axes(ax)
    samples = w.shape[0]
    bins = [samples * i / 40 for i in range(41)]
    shares = (w.detach().flatten() * samples).tolist()
    ax.hist(shares, bins=bins, weights=[100 / len(shares)] * len(shares), color=BARS)
    ax.axvline(1, color="black", linewidth=1, linestyle="--", label="equal weights")
    ax.set_xlim(0, samples)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel(f"importance weight × S (S = {samples})")
    ax.set_ylabel("noise samples, %")
    ax.legend(frameon=False)
    return ax


def effective_sample_size(path: "str | os.PathLike[str]", ax: "Axes | None" = None) -> "Axes":
    """Draws the effective sample size over training, from the CSV file of a :class:`iwsgd_ext.StatsLogger`: its mean, and the range that
    holds 90% of the examples.

    Args:
        path: path of the file.
        ax: matplotlib axes, or None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the file is not of a StatsLogger, or has no line of numbers.
        ImportError: matplotlib is not installed.
    """
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or "ess_p05" not in lines[0]:
        raise ValueError(f"path: expected a CSV file of StatsLogger with at least one line of numbers, got {path}")
    ax = _axes(ax)
    step, mean, low, high = ([float(line[name]) for line in lines] for name in ("step", "ess", "ess_p05", "ess_p95"))
    ax.fill_between(step, low, high, color=BAND, linewidth=0, label="5% to 95% of examples")
    ax.plot(step, mean, color=LINE, label="mean")
    ax.set_ylim(bottom=1, top=1.05 * max([v for v in high if math.isfinite(v)], default=2))
    ax.set_xlabel("training step")
    ax.set_ylabel("effective sample size, noise samples")
    ax.legend(frameon=False)
    return ax


def _axes(ax):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("iwsgd_ext.plots needs matplotlib: pip install 'iwsgd_ext[plots]' (or pip install matplotlib)") from error
    if ax is None:
        ax = Figure(figsize=(5.5, 3.6), dpi=150, layout="constrained").add_subplot()  # no global state, no window
    ax.spines[["top", "right"]].set_visible(False)
    return ax
