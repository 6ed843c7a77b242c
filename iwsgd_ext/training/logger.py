"""A logger of noise samples' statistics during training, for TensorBoard or CSV, attached to the loss in one line."""

import csv
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import as_int, check
from ..stats import IWStats, IWSummary
from .likelihood import _IWLoss


def not_compiled(function: Any) -> Any:
    """:func:`torch.compiler.disable` without its import of the compiler, which takes longer than all of this package."""
    function._torchdynamo_disable = True
    return function


class StatsLogger:
    """Writes :class:`IWSummary` of a loss (Noh et al. 2017, eq 4 and 8) during training, without a wait for the device at each step.

    Each training forward of the criterion is one step; in gradient accumulation, each micro-batch. Every ``every`` steps the logger writes
    one line: means over those of these steps in which an example counts (nonfinite is the sum over all of them). Between lines, the device
    adds them up. Evaluation is left out: outputs with one row for each target, and any after ``criterion.eval()``.

    A logger is a plain object. In Lightning, make it where the module is made (or in a callback's on_fit_start), and close it at the end.
    Under torch.distributed each process has its own part of the batch: log on one, or to one file for each. Do not compile the criterion:
    the logger breaks the graph.

    Args:
        criterion: an IWCrossEntropyLoss or IWLoss; its results do not change.
        to: path of a CSV file, or an object with ``add_scalar(tag, value, step)``, as torch.utils.tensorboard.SummaryWriter, or Lightning's
            ``logger.experiment`` of a TensorBoardLogger. An existing CSV file is continued from its last step; half a line at its end
            (from a process that was killed) is cut off.
        every: steps of one line.
        prefix: put before the names of scalars.

    Raises:
        TypeError: criterion or ``to`` is not as above.
        ValueError: every < 1; the file has other columns.

    Example:
        >>> import tempfile, torch, iwsgd_ext as iw
        >>> criterion = iw.IWCrossEntropyLoss(samples=4)
        >>> file = tempfile.mkdtemp() + "/stats.csv"
        >>> with iw.StatsLogger(criterion, file, every=2):
        ...     for step in range(4):
        ...         loss = criterion(torch.zeros(4 * 8, 10), torch.zeros(8, dtype=torch.int64))
        >>> [line.split(",")[0] for line in open(file)]
        ['step', '2', '4']
    """

    def __init__(self, criterion: _IWLoss, to: "str | os.PathLike[str] | Any", every: int = 50, *, prefix: str = "iw/"):
        if not isinstance(criterion, _IWLoss):
            raise TypeError(f"criterion: expected an IWCrossEntropyLoss or IWLoss, got {type(criterion).__name__}")
        every = as_int("every", every)
        check(every >= 1, "every", "a number of steps >= 1", every)
        if isinstance(to, str | os.PathLike):
            self.write: CsvFile | _Scalars = (file := CsvFile(to))
            self.step = file.last_step  # the number of the last forward; users may set it
        elif callable(getattr(to, "add_scalar", None)):
            self.write, self.step = _Scalars(to, prefix), 0
        else:
            raise TypeError(f"to: expected the path of a CSV file or an object with add_scalar, got {type(to).__name__}")
        self.every = every
        # Sums of the summaries since the last line, on the device, and the number of steps in which an example counted.
        self.total: Tensor | None = None
        self.count = 0  # steps since the last line
        self.observers = criterion.observers
        self.observers.append(self.add)

    @not_compiled
    def add(self, stats: IWStats) -> None:
        """Adds one step. The criterion calls this, and so does ``iw.backward`` in the strategies that do not call the criterion."""
        *means, nonfinite = (v.double() for v in stats.summary())
        some = torch.ones_like(nonfinite) if stats.counted is None else stats.counted.any().double()  # 0 where no example counts
        values = torch.stack([*(torch.where(some > 0, v, 0) for v in means), nonfinite, some])
        self.total = values if self.total is None else self.total + values
        self.count += 1
        self.step += 1
        if self.count == self.every:
            self.flush()

    def flush(self) -> None:
        """Writes a line for the steps since the last one, if there are any."""
        if self.total is None:
            return
        *means, nonfinite, steps = self.total.tolist()  # waits for the device
        values = dict(zip(IWSummary._fields, (*(v / steps if steps else math.nan for v in means), int(nonfinite)), strict=True))
        self.total, self.count = None, 0
        self.write(self.step, values)

    def close(self) -> None:
        """Writes the last line and detaches from the criterion; the user's writer stays open."""
        self.flush()
        if self.add in self.observers:
            self.observers.remove(self.add)

    def __enter__(self) -> "StatsLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Scalars:
    """Writes each value as a scalar of a TensorBoard writer."""

    def __init__(self, writer: Any, prefix: str):
        self.writer, self.prefix = writer, prefix

    def __call__(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(self.prefix + name, value, step)


class CsvFile:
    """Writes lines at the end of a CSV file. The file is open only during a write, so that a killed process loses half a line at most."""

    columns = ("step", *IWSummary._fields)

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.last_step = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            if text and not self.header.startswith(text):
                raise ValueError(f"to: expected a CSV file of this logger or none, got {self.path} without a line")
            self.path.write_bytes(self.header)
            return
        lines = whole.splitlines()
        if lines[0] != self.header.rstrip():
            raise ValueError(
                f"to: expected {self.path} to have the columns {','.join(self.columns)}, got {lines[0].decode(errors='replace')}"
            )
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        if len(lines) > 1:
            self.last_step = int(lines[-1].split(b",")[0])

    @property
    def header(self) -> bytes:
        return (",".join(self.columns) + "\n").encode()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([step, *(v if isinstance(v, int) else f"{v:.7g}" for v in values.values())])
