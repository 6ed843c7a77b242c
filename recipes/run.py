"""One run: a model trained with one seed, which ends with the same bits whether it was stopped in between or not.

Everything random in a step is a function of the seed and the step's number: torch's generators are seeded before each step, and so is
the order of the examples before each epoch. So a checkpoint needs no generator's state, and a step needs nothing of those before it but
weights, optimiser and running sums.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import iwsgd_ext as iw

from . import evaluate
from .files import Log, load, owned, read_json, save, write_json
from .options import identity
from .recipe import Data, UserError, find

STATISTICS = ("bound", "mean_log_p", "gap", "ess", "ess_p05", "ess_p50", "ess_p95", "entropy", "largest_weight", "nonfinite")
COLUMNS = ("step", "epoch", "lr", "loss", *STATISTICS, "error", "nll", "ece")
TIMES = ("step", "seconds", "examples_per_second")

Report = Callable[[int, int, dict[str, Any]], None]  # step, of how many, the last line of the log
Stop = Callable[[], bool]  # True once somebody wants the run to stop


class Stopped(Exception):
    """The run was asked to stop; its checkpoint has every finished step."""


def mixed(*numbers: int) -> int:
    """A seed of 63 bits from numbers; others have another, but for zeros at the end, which NumPy takes as not given. (So the order of epoch
    1 and the noise of step 0 have one seed, for two generators.)
    """
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


class Batches(Sampler):
    """The indices of each step's examples, from step ``start`` to ``stop``. The last part of an epoch, too small for a batch, is left
    out; an epoch's order depends on the seed and the epoch's number.
    """

    def __init__(self, examples: int, batch: int, seed: int, start: int, stop: int):
        self.examples, self.batch, self.seed, self.start, self.stop = examples, batch, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, order, drawn = self.examples // self.batch, None, -1
        for step in range(self.start, self.stop):
            epoch, part = divmod(step, per_epoch)
            if epoch != drawn:
                order = torch.randperm(self.examples, generator=torch.Generator().manual_seed(mixed(self.seed, epoch)))
                drawn = epoch
            yield order[part * self.batch : (part + 1) * self.batch].tolist()


class Run:
    """A run in its folder: log.csv and result.json (functions of the settings alone), time.csv, last.pt, best.pt."""

    def __init__(self, settings: Namespace, seed: int, folder: Path):
        self.settings, self.seed, self.folder = settings, seed, folder
        self.recipe = find(settings.recipe)
        self.identity = identity(settings) | {"seed": seed, "torch": str(torch.__version__)}
        self.facts = self.recipe.facts(settings)

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run under these settings, or None."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        result = read_json(path)
        if not (isinstance(result, dict) and all(isinstance(result.get(part), dict) for part in ("settings", "metrics"))):
            raise UserError(f"{path}: expected a file that this tool wrote, got other JSON. Remove it to have its run made again")
        self._check(path, result)
        return result

    def begun(self) -> bool:
        return (self.folder / "last.pt").exists()

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        """A file of other settings or other data is not used, and not overwritten."""
        for name, there, now in (("--", found["settings"], self.identity), ("", found.get("facts", self.facts), self.facts)):
            off = sorted(k for k in {**now, **there} if k not in there or k not in now or there[k] != now[k])
            if off:
                said = ", ".join(
                    f"{name}{k.replace('_', '-') if name else k} {there.get(k, 'nothing')} there, {now.get(k, 'nothing')} now" for k in off
                )
                advice = "Give the options that it was made with, or another --out" if name else "Give another --out"
                raise UserError(f"{path} is of another configuration: {said}. {advice}")

    def train(self, data: Data, stop: Stop, report: Report) -> dict[str, Any]:
        """Trains to the end, from the last checkpoint where there is one. Raises :class:`Stopped`, after a checkpoint, when asked to."""
        with owned(self.folder):
            try:
                return self._train(data, stop, report)
            except RuntimeError as error:  # torch raises it anywhere in a step: the last checkpoint is the one that is whole
                if "DataLoader worker" not in str(error):
                    raise
                if stop():
                    raise Stopped from None
                raise UserError(f"--workers: {str(error).splitlines()[0]} Go on with --resume") from None

    def _train(self, data: Data, stop: Stop, report: Report) -> dict[str, Any]:
        s = self.settings
        self.begin(data)
        if self.begun():
            self._take_up(load(self.folder / "last.pt", s.device))
        else:
            self._open_logs(0, 0)
        if s.compile:
            self.model.compile()
        kept = time.monotonic()
        report(self.step, self.steps, self.last_line)
        self.watch.go()
        for x, y in self._loader(data.train, self._order(data)):
            self.advance(x, y)
            last = self.step == self.steps
            if self.step % self.period == 0 or last:
                self._pause()
                self._line(data)
                self.watch.go()
            report(self.step, self.steps, self.last_line)
            stopping = stop() and not last
            if stopping or last or time.monotonic() - kept >= s.checkpoint_every:
                self._pause()
                self._keep("last.pt")
                kept = time.monotonic()
                self.watch.go()
            if stopping:
                raise Stopped
        return self._finish(data)

    def begin(self, data: Data) -> None:
        """Makes the model and all that is trained with it, as it is before the first step."""
        s, device = self.settings, torch.device(self.settings.device)
        examples = len(data.train)  # type: ignore[arg-type]
        if examples < s.batch:
            raise UserError(f"--batch: expected at most the {examples} training examples, got {s.batch}")
        self.per_epoch = examples // s.batch
        self.steps = s.steps or max(1, round(s.epochs * self.per_epoch))
        self.period = max(1, round(s.evaluate_every * self.per_epoch))  # steps between lines of the log
        torch.manual_seed(mixed(self.seed, 0))
        self.model = self.recipe.build(s, data).to(device).train()
        # The conversion is tried on two examples: samples together against samples alone. Joint statistics mix them.
        two = None if s.batch_norm == "joint" else self._to(data.train[list(range(min(2, examples)))][0], train=False)
        try:
            iw.convert(self.model, s.samples, expand=s.expand, batch_norm=s.batch_norm, example_inputs=two)
        except ValueError as error:
            raise UserError(f"the model of {s.recipe}: {error}") from None
        self.criterion = iw.IWCrossEntropyLoss(s.samples, alpha=s.alpha, level=s.level)
        self.optimizer, self.schedule = self.recipe.optimizer(s, self.model, self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.amp == "float16")
        self.last_line: dict[str, float] = {}
        self.statistics = iw.StatsLogger(self.criterion, _Into(self.last_line), every=2**62, prefix="")
        self.loss = torch.zeros((), dtype=torch.float64, device=device)  # the sum over the steps since the last line
        self.step, self.best, self.watch = 0, float("inf"), Stopwatch()

    def _order(self, data: Data) -> Batches:
        seed = self.seed if self.settings.order_seed is None else self.settings.order_seed
        return Batches(len(data.train), self.settings.batch, seed, self.step, self.steps)  # type: ignore[arg-type]

    def advance(self, x: Tensor, y: Tensor) -> None:
        """One step of the optimiser, on a batch."""
        self.lr = self.optimizer.param_groups[0]["lr"]
        s, noise = self.settings, mixed(self.seed, 1, self.step)
        torch.manual_seed(noise)
        x, y = self._to(x, train=True), y.to(s.device, non_blocking=True)
        self.optimizer.zero_grad()
        size = len(y) // s.accumulate
        scale = self.scaler.scale(torch.ones((), device=s.device) / s.accumulate) if self.scaler.is_enabled() else 1 / s.accumulate
        for part in range(s.accumulate):
            rows = slice(part * size, (part + 1) * size)
            with evaluate.autocast(s):
                loss = iw.backward(
                    self.model,
                    self.criterion,
                    x[rows],
                    y[rows],
                    samples=s.samples,
                    strategy=s.strategy,
                    chunk=s.chunk and min(s.chunk, s.samples),
                    keep=s.keep,
                    seed=noise,
                    first_example=part * size,
                    grad_scale=scale,
                )
            self.loss += loss.double() / s.accumulate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1

    def _to(self, x: Tensor, train: bool) -> Tensor:
        return self.recipe.prepare(x.to(self.settings.device, non_blocking=True), train)

    def _loader(self, dataset: Dataset, order: Any) -> DataLoader:
        s = self.settings
        return DataLoader(dataset, sampler=order, batch_size=None, num_workers=s.workers, pin_memory=s.device.startswith("cuda"))

    def _test(self, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
        n, size = len(data.test), self.settings.test_batch  # type: ignore[arg-type]
        for x, y in self._loader(data.test, [list(range(i, min(i + size, n))) for i in range(0, n, size)]):
            yield self._to(x, train=False), y.to(self.settings.device)

    def _pause(self) -> None:
        """Evaluations and checkpoints are not training time."""
        self.wait()
        self.watch.pause()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _line(self, data: Data) -> None:
        """A line of the log: statistics of the steps since the last one, and an evaluation."""
        self.statistics.flush()
        steps, seconds = self.step - self.timed[0], self.watch.seconds - self.timed[1]
        values: dict[str, Any] = {name: self.last_line[name] for name in STATISTICS}
        values |= {"step": self.step, "epoch": self.step / self.per_epoch, "lr": self.lr}
        values["loss"] = self.loss.item() / steps
        self.loss.zero_()
        values |= evaluate.evaluate(self.model, self._test(data), self.settings)
        self.last_line.update(values)
        self.log.add(values)
        speed = steps * self.settings.batch / max(seconds, 1e-9)
        self.times.add({"step": self.step, "seconds": self.watch.seconds, "examples_per_second": speed})
        self.timed = self.step, self.watch.seconds
        if self.scalars is not None:
            for name in (*STATISTICS, "error", "nll", "ece", "lr", "loss"):
                self.scalars.add_scalar(name, values[name], self.step)
            self.scalars.add_scalar("examples_per_second", speed, self.step)
            self.scalars.flush()
        if values["nll"] < self.best:
            self.best = values["nll"]
            self._keep("best.pt")

    def _open_logs(self, length: int, length_of_times: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.times = Log(self.folder / "log.csv", COLUMNS, length), Log(self.folder / "time.csv", TIMES, length_of_times)
        self.timed = self.step, self.watch.seconds  # of the last line
        self.scalars = None
        if self.settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Also of a run that was killed before its first checkpoint the events are not to be shown twice.
            self.scalars = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def _keep(self, name: str) -> None:
        save(
            self.folder / name,
            {
                "settings": self.identity,
                "facts": self.facts,
                "step": self.step,
                "seconds": self.watch.seconds,
                "best": self.best,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "statistics": (self.statistics.total, self.statistics.count),
                "loss": self.loss,
                "line": self.last_line,
                "logs": (self.log.length, self.times.length),
                "timed": self.timed,
            },
        )

    def _take_up(self, state: dict[str, Any]) -> None:
        self._check(self.folder / "last.pt", state)
        self.step, self.best, self.watch = state["step"], state["best"], Stopwatch(state["seconds"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.statistics.total, self.statistics.count = state["statistics"]
        self.loss.copy_(state["loss"])
        self.last_line.update(state["line"])
        self._open_logs(*state["logs"])
        self.timed = state["timed"]

    def _finish(self, data: Data) -> dict[str, Any]:
        metrics = {name: self.last_line[name] for name in ("error", "nll", "ece", "bound", "gap", "ess", "entropy")}
        metrics |= evaluate.noisy(self.model, lambda: self._test(data), self.settings)
        result = {
            "settings": self.identity,
            "facts": self.facts,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.steps / self.per_epoch,
            "metrics": metrics,
        }
        write_json(self.folder / "result.json", result)
        if self.scalars is not None:
            self.scalars.close()
        return read_json(self.folder / "result.json")


class _Into:
    """Takes the place of a TensorBoard writer: the logger's values go into a dict."""

    def __init__(self, values: dict[str, float]):
        self.values = values

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.values[tag] = value


class Stopwatch:
    """Seconds of training, over all parts of a run."""

    def __init__(self, seconds: float = 0.0):
        self.before, self.since = seconds, None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.since is None else time.monotonic() - self.since)

    def go(self) -> None:
        self.since = time.monotonic()

    def pause(self) -> None:
        self.before, self.since = self.seconds, None
