"""All runs of a command, one after another or several at a time, and what becomes of them when somebody presses Ctrl-C."""

import multiprocessing
import os
import signal
import statistics
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .options import Arm
from .recipe import Data, UserError, find
from .run import Batches, Run, Stopped

WARM_UP = 5  # steps that are not timed
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDED = "--jobs: a process was ended from outside (out of memory?). Go on with --resume, and with fewer --jobs if memory was short"


class Interrupt:
    """True once Ctrl-C (or SIGTERM) asked the runs to finish their step and keep a checkpoint. A second Ctrl-C ends the process at once.

    In a worker, ``parent`` is the tool's process: the worker stops also where that has gone, and a second signal is the same one.
    """

    def __init__(self, parent: int | None = None):
        self.asked, self.parent = False, parent

    def __call__(self) -> bool:
        return self.asked or (self.parent is not None and os.getppid() != self.parent)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and self.parent is None:
            raise KeyboardInterrupt
        self.asked = True

    def catch(self) -> dict[int, Any]:
        return {number: signal.signal(number, self._handle) for number in SIGNALS}

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = self.catch()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def folder(arm: Arm, seed: int) -> Path:
    return arm.out / arm.folder / f"seed-{seed}"


def results(arms: list[Arm], data: Data, console: Console) -> dict[tuple[str, int], dict[str, Any]]:
    """The result of every arm and seed, by the arm's folder and the seed; those of finished runs are read. Raises :class:`Stopped`."""
    first = arms[0]
    runs = [(arm, seed) for seed in range(first.first_seed, first.first_seed + first.seeds) for arm in arms]
    found, todo = {}, []
    for arm, seed in runs:
        run = Run(arm, seed, folder(arm, seed))
        result = run.result()
        if not first.resume and (result is not None or (run.folder / "log.csv").exists()):
            raise UserError(f"--out: {run.folder} holds a run already; give --resume to go on with it, or another --out")
        if result is not None:
            found[arm.folder, seed] = result
        else:
            todo.append((arm, seed))
    if found:
        console.print(f"{len(found)} of {len(runs)} runs were finished before.", highlight=False)
    go = _side_by_side if first.jobs > 1 and len(todo) > 1 else _one_by_one
    for arm, seed, result in go(todo, data, console, len(runs)):
        found[arm.folder, seed] = result
    return found


def _bars(console: Console) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[seen]}")
    return Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)


def name(arm: Arm, seed: int) -> str:
    return f"{arm.label}, p={arm.rate:g}, seed {seed}"


def seen(line: dict[str, Any]) -> str:
    """The last line of a log in words, short."""
    if "error" not in line:
        return ""
    return f"loss {line['loss']:.3f}  ess {line['ess']:.1f}  test error {line['error']:.2f}%  nll {line['nll']:.3f}"


def _tell(console: Console, arm: Arm, seed: int, result: dict[str, Any]) -> None:
    m = result["metrics"]
    values = {"test error": m["error"], "nll": m["nll"], "ess": m["ess"]}
    words = "  ".join(f"{k} {'diverged' if v is None else f'{float(v):.4g}'}" for k, v in values.items())
    console.print(f"{name(arm, seed):<40} {words}", highlight=False)


def _one_by_one(todo: list[tuple[Arm, int]], data: Data, console: Console, total: int) -> Iterator[tuple[Arm, int, dict[str, Any]]]:
    interrupt = Interrupt()
    with interrupt.caught(), _bars(console) as bars:
        everything = bars.add_task("runs", total=total, completed=total - len(todo), seen="", visible=total > 1)
        steps = bars.add_task("steps", total=None, seen="")
        for arm, seed in todo:
            run, lines = Run(arm, seed, folder(arm, seed)), [None]
            prepare_process(arm)

            def report(step: int, of: int, line: dict[str, Any], arm=arm, seed=seed, lines=lines) -> None:
                bars.update(steps, description=name(arm, seed), completed=step, total=of, seen=seen(line))
                if total == 1 and line.get("step") not in (None, lines[0]):  # of a single run each line is shown, and stays
                    lines[0] = line["step"]
                    console.print(f"step {line['step']:>7}  epoch {line['epoch']:>7.2f}  {seen(line)}", highlight=False)

            result = run.train(data, interrupt, report)
            _tell(console, arm, seed, result)
            bars.advance(everything)
            yield arm, seed, result


def _side_by_side(todo: list[tuple[Arm, int]], data: Data, console: Console, total: int) -> Iterator[tuple[Arm, int, dict[str, Any]]]:
    """Each worker has a pipe of its own: it ends when the tool does, and the tool sees when it has ended, however that was."""
    first, waiting, interrupt, stopped = todo[0][0], list(reversed(todo)), Interrupt(), False
    running: dict[Connection, tuple[Arm, int]] = {}
    with interrupt.caught(), _bars(console) as bars, _workers(min(first.jobs, len(todo)), first) as idle:
        everything = bars.add_task("runs", total=total, completed=total - len(todo), seen="")
        processes = dict(idle)
        while running or (waiting and not stopped):
            while waiting and idle and not stopped:
                worker, _ = idle.popitem()
                running[worker] = waiting.pop()
                try:
                    worker.send((vars(running[worker][0]), running[worker][1]))
                except OSError:
                    raise UserError(ENDED) from None
            if interrupt() and not stopped:
                stopped = True
                for process in processes.values():
                    process.terminate()  # which a worker takes as Ctrl-C
            for worker in connection.wait(list(running), timeout=0.5):
                arm, seed = running.pop(worker)
                try:
                    outcome = worker.recv()
                except (EOFError, ConnectionResetError):
                    if not stopped:
                        raise UserError(ENDED) from None
                    continue
                idle[worker] = processes[worker]
                if isinstance(outcome, Stopped):
                    stopped = True
                elif isinstance(outcome, Exception):
                    raise outcome
                else:
                    bars.advance(everything)
                    _tell(console, arm, seed, outcome)
                    yield arm, seed, outcome
    if stopped:
        raise Stopped


@contextmanager
def _workers(number: int, settings: Arm) -> Iterator[dict[Connection, Any]]:
    """Processes that train, by the pipes to them. At the end, also after an error, those that still train stop with a checkpoint."""
    context, processes = multiprocessing.get_context("spawn"), {}
    resource_tracker.ensure_running()  # the first worker would start it, and it unblocks signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a worker begins with this, until it can take them
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_work, args=(theirs, vars(settings), os.getpid()))
            processes[ours].start()
            theirs.close()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield dict(processes)
    finally:
        for ours, process in processes.items():
            process.terminate()
            ours.close()
        for process in processes.values():
            process.join()


def _work(pipe: Connection, values: dict[str, Any], parent: int) -> None:
    """A worker: reads the data once, then trains what it is sent, until it is asked to stop or the pipe's other end has gone."""
    interrupt = Interrupt(parent)
    interrupt.catch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    data: Data | None = None
    while not interrupt():
        try:
            values, seed = pipe.recv()
        except (EOFError, InterruptedError):
            return
        try:
            arm = Arm(**values)
            prepare_process(arm)
            data = data or find(arm.recipe).load(arm)
            outcome: Any = Run(arm, seed, folder(arm, seed)).train(data, interrupt, lambda step, of, line: None)
        except Exception as error:
            if not isinstance(error, Stopped | UserError):
                traceback.print_exc()  # which does not go through the pipe
            outcome = error
        with suppress(OSError):
            pipe.send(outcome)


def step_times(arms: list[Arm], data: Data, console: Console) -> list[float]:
    """Seconds of a training step of each arm: medians over ``--time`` steps, taken in turn, so that all see the same load."""
    runs, batches = [], []
    for arm in arms:
        prepare_process(arm)
        run = Run(arm, arm.first_seed, folder(arm, arm.first_seed))
        run.begin(data)
        if arm.compile:
            run.model.compile()
        order = list(Batches(len(data.train), arm.batch, 0, 0, WARM_UP + arm.time))  # type: ignore[arg-type]
        runs.append(run)
        batches.append(order)
    times: list[list[float]] = [[] for _ in arms]
    with Progress(console=console, transient=True) as bar:
        for step in bar.track(range(WARM_UP + arms[0].time), description="timing steps"):
            for run, order, of_arm in zip(runs, batches, times, strict=True):
                x, y = data.train[order[step]]
                start = time.perf_counter()
                run.advance(x, y)
                run.wait()
                if step >= WARM_UP:
                    of_arm.append(time.perf_counter() - start)
    return [statistics.median(of_arm) for of_arm in times]


def prepare_process(settings: Namespace) -> None:
    """torch's settings of this process: the same for each run, so that a run in any process has the same bits."""
    torch.set_num_threads(settings.threads)
    if settings.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not settings.deterministic
