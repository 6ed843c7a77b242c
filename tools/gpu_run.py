"""Runs stages one after the other or side by side, each with a time limit, and writes down what they find: tools/gpu.py's machinery.

Whatever ends the run, SIGKILL among it, what was found until then is in the output folder: commands write to log.txt line by line, cases
(of tests and of the exercise) to cases.jsonl one by one, and report.md and results.json are written anew when a stage begins or ends.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import gpu_cases

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
NO_GPU = 2  # exit code
GRACE = 4.0  # seconds after its limit in which a stage must give up; then it is left alone
LEAST = 5.0  # seconds below which nothing is begun
MOST_LOG = 1 << 20  # characters of one stage in log.txt, so that all of them make a file that can be sent
MOST_PRINTED = 11_000  # characters of the summary at the end
FILES = ("report.md", "results.json", "log.txt", "cases.jsonl", "timing.jsonl", "bench.html")


class Failed(Exception):
    """A stage did not do what it is for; the message says what was seen."""


class Skipped(Exception):
    """A stage cannot run here; the message says why."""


@dataclass
class Stage:
    """A step of the run.

    ``work(run)`` does it and returns what is worth a line in the table (further lines: a section of the report); it raises Failed or
    Skipped. Stages of one group that follow one another run side by side. ``needs``: a stage without which this one makes no sense.
    """

    name: str
    seconds: float  # its limit
    work: Callable[["Run"], str]
    group: str | None = None
    needs: str | None = None


@dataclass
class Result:
    name: str
    status: str = "waiting"  # then running; at the end ok, failed or skipped
    text: str = ""
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)  # the last lines of a stage that failed


@dataclass
class Session:
    """A run of all stages: where it writes, when it must be over, and what has come out so far."""

    out: Path
    deadline: float  # of time.monotonic()
    results: dict[str, Result] = field(default_factory=dict)  # in the order of the stages
    facts: dict = field(default_factory=dict)  # of the machine, and what stages found: for results.json
    running: set[subprocess.Popen] = field(default_factory=set)
    begin: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self, *_) -> None:
        """Ends what runs and starts nothing more; the report is still written."""
        self.deadline = time.monotonic()
        for process in list(self.running):
            _kill(process)


@dataclass
class Run:
    """One stage at work: its commands write to the log and are stopped when its time is over."""

    session: Session
    name: str
    end: float
    logged: int = 0
    tail: deque = field(default_factory=lambda: deque(maxlen=15))

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def command(self, *words: object, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """Exit code and output of a command in the checkout's root. Raises Failed where the stage's time runs out."""
        if self.left <= 0:
            raise Failed("stopped at its time limit")
        self._say(" ".join(["$", *map(str, words)]).replace("\n", " "))
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env={**os.environ, **_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_bound_to_this_process,
        )
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
        self.session.running.add(process)
        reader.start()
        try:
            code = process.wait(timeout=max(self.left, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
            self.session.running.discard(process)
        reader.join(2)  # what the command started and nobody could end may hold the pipe open
        if not reader.is_alive():
            process.stdout.close()
        if code is None:
            raise Failed("stopped at its time limit")
        return code, "".join(lines)

    def python(self, *words: object, **options) -> tuple[int, str]:
        return self.command(sys.executable, *words, **options)

    def _read(self, process: subprocess.Popen, lines: list[str]) -> None:
        for line in process.stdout:
            lines.append(line)
            self._say(line.rstrip("\n"))

    def _say(self, line: str) -> None:
        """A line of log.txt: seconds since the begin, stage, text. It is in the file, not in a buffer of this process, on return."""
        if not line.startswith("$ "):
            self.tail.append(line[:300])
        if self.logged > MOST_LOG:
            return
        self.logged += len(line) + 1
        if self.logged > MOST_LOG:
            line = "(the rest is left out)"
        with self.session.lock, (self.session.out / "log.txt").open("a", errors="replace") as file:
            file.write(f"{time.monotonic() - self.session.begin:6.1f} {self.name} | {line[:2000]}\n")


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _bound_to_this_process() -> None:
    # A group of its own, so that what it starts can be stopped with it, but no session of its own; and it ends with this process, also
    # where that is killed: a command that goes on would hold the GPU, and write into the folder of a run that is over.
    os.setpgid(0, 0)
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # also what is left of a group whose first process has ended
    with contextlib.suppress(subprocess.TimeoutExpired):  # inside the driver it may not end at all; the run goes on without it
        process.wait(3)


def _environment() -> dict[str, str]:
    # ninja is a program beside Python, which need not be on the PATH; cuBLAS is deterministic, as the tests ask, with this only
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [str(ROOT), str(TOOLS), os.environ.get("PYTHONPATH")]))
    return {"PATH": path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def side_by_side(calls: list[Callable[[], tuple[int, str]]]) -> list[tuple[int, str] | Failed]:
    """Results of commands that run at the same time, in order; Failed in the place of one that was stopped."""
    results: list = [Failed("did not end")] * len(calls)

    def one(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Failed as why:
            results[i] = why

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


say_at_once = partial(print, flush=True)


def run_stages(stages: list[Stage], session: Session, say: Callable[[str], None] = say_at_once) -> int:
    """Runs them all, whatever fails, writing down what they find; returns the exit code."""
    session.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (session.out / name).unlink(missing_ok=True)
    session.results.update((stage.name, Result(stage.name)) for stage in stages)
    waiting = list(stages)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and together[0].group and waiting[0].group == together[0].group:
            together.append(waiting.pop(0))
        _run_together(together, session, say)
    say(summary(session))
    if session.facts.get("no_gpu"):
        return NO_GPU
    return int(any(r.status == "failed" for r in session.results.values()))


def _run_together(together: list[Stage], session: Session, say: Callable[[str], None]) -> None:
    """Runs stages side by side. A stage that does not end where it must is left alone, and reported so."""
    done: queue.SimpleQueue[Result] = queue.SimpleQueue()
    for stage in together:
        session.results[stage.name].status = "running"
    write_report(session)
    for stage in together:
        threading.Thread(target=lambda stage=stage: done.put(_run_stage(stage, session)), daemon=True).start()
    begin, missing = time.monotonic(), {stage.name: stage for stage in together}
    while missing:
        end = min(begin + max(stage.seconds for stage in missing.values()), session.deadline) + GRACE
        try:
            result = done.get(timeout=min(1.0, max(0.05, end - time.monotonic())))  # the deadline may come nearer meanwhile
        except queue.Empty:
            if time.monotonic() < end:
                continue
            result = Result(next(iter(missing)), "failed", "did not end at its time limit", time.monotonic() - begin)
        if missing.pop(result.name, None) is None:
            continue  # of a stage that was left alone
        session.results[result.name] = result
        write_report(session)
        say(_cut(f"{result.name}: {result.status}, {result.seconds:.0f} s{': ' + result.text if result.text else ''}", 4000))


def _run_stage(stage: Stage, session: Session) -> Result:
    begin = time.monotonic()
    run = Run(session, stage.name, min(begin + stage.seconds, session.deadline))
    needed = session.results.get(stage.needs) if stage.needs else None
    status, text = "ok", ""
    try:
        if needed is not None and needed.status != "ok":
            raise Skipped(f"{needed.name} {'was skipped' if needed.status == 'skipped' else 'failed'}")
        if session.deadline - begin < min(LEAST, stage.seconds):
            raise Skipped("no time was left")
        text = stage.work(run) or ""
    except Skipped as why:
        status, text = "skipped", str(why)
    except Failed as why:
        status, text = "failed", str(why)
    except Exception as error:  # a mistake in a stage must not hide what the others find
        status, text = "failed", f"{type(error).__name__}: {error}"
    return Result(stage.name, status, text, time.monotonic() - begin, list(run.tail) if status == "failed" else [])


def exit_at(seconds: float) -> None:
    """Ends this process after so many seconds, whatever its threads are doing."""
    faulthandler.dump_traceback_later(seconds, exit=True)


# ---- what was found: cases.jsonl, report.md, results.json, and the summary that is printed last ----


@dataclass
class Cases:
    """The cases of some stages, from cases.jsonl."""

    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> number of cases
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, message
    unfinished: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed, {sum(self.skipped.values())} skipped"

    def lines(self, most: int = 30, characters: int = 1 << 20) -> list[str]:
        """The failures, what had begun and did not end, and why cases were skipped: in one line for each reason.

        The failures share so many characters, so that many long ones still name the cases of every process.
        """
        share = min(350, characters // max(1, min(len(self.failed), most)))
        lines = [f"- {name}: {' '.join(message.split())}"[:share] for name, message in self.failed[:most]]
        lines += [f"- and {len(self.failed) - most} more failures, in cases.jsonl"] * (len(self.failed) > most)
        lines += [f"- began and did not end: {name}" for name in self.unfinished[:most]]
        reasons = sorted(self.skipped.items(), key=lambda item: -item[1])[:4]
        return lines + ["- skipped: " + "; ".join(f"{count} {reason[:100]}" for reason, count in reasons)] * bool(reasons)


def read_cases(path: Path, *stages: str) -> Cases:
    """Of the stages named, or of all, then with the stage's name.

    A case that failed and then passed has failed: its end may have broken the device.
    """
    found, open_, failed = Cases(), {}, {}
    for line in gpu_cases.read(path):
        if stages and line["stage"] not in stages:
            continue
        key = (line["stage"], line["case"])
        if line["outcome"] == "began":
            open_[key] = None
            continue
        open_.pop(key, None)
        if line["outcome"] == "passed":
            found.passed += 1
        elif line["outcome"] == "skipped":
            found.skipped[line["message"]] = found.skipped.get(line["message"], 0) + 1
        else:
            failed.setdefault(key, line["message"])
    name = (lambda key: key[1]) if stages else ": ".join
    found.failed = [(name(key), message) for key, message in failed.items()]
    found.unfinished = [name(key) for key in open_]
    return found


def table(session: Session) -> list[str]:
    results = list(session.results.values())
    width = max((len(r.name) for r in results), default=0)
    lines = [f"{'stage':<{width}}  {'result':<7}  {'time':>5}"]
    lines += [f"{r.name:<{width}}  {r.status:<7}  {r.seconds:>3.0f} s  {r.text.splitlines()[0][:150] if r.text else ''}" for r in results]
    return [line.rstrip() for line in lines]


LAST = "timing"  # the stage whose section is the last of all but the failures


def report(session: Session, most: int = 1 << 20) -> tuple[str, list[str]]:
    """The head (machine and table of stages) and the sections, the most important one last, each of at most so many characters."""
    facts = [f"{key}: {value}" for key, value in session.facts.get("machine", {}).items()]
    head = "\n".join(["# GPU run", "", *facts, "", "```", *table(session), "```"])
    sections = []
    for r in sorted(session.results.values(), key=lambda r: r.name == LAST):
        lines = r.text.splitlines()[1:]
        if r.status == "failed":
            lines += ["", "the end of its log:", *r.log]
        if lines:
            sections.append(_cut("\n".join([f"## {r.name}{' failed' if r.status == 'failed' else ''}", "```", *lines]), most) + "\n```")
    failed = read_cases(session.out / "cases.jsonl").lines(characters=most * 3 // 4)
    if failed:
        sections.append(_cut("\n".join(["## Cases that failed", *failed]), most))
    return head, sections


def write_report(session: Session) -> None:
    """report.md and results.json, as far as the run has come: each is there as a whole at any moment."""
    head, sections = report(session)
    results = [asdict(r) for r in list(session.results.values())]
    _replace(session.out / "results.json", json.dumps({**session.facts, "stages": results}, indent=1, default=str) + "\n")
    _replace(session.out / "report.md", "\n\n".join([head, *sections]) + "\n")


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text, errors="replace")
    new.replace(path)


def summary(session: Session) -> str:
    """The text that is printed last: the report in at most MOST_PRINTED characters. Its last sections are the ones that stay whole."""
    head, sections = report(session, most=2600)
    head, tail = _cut(head, 4000), [f"written to {session.out}"]
    for section in reversed(sections):
        left = MOST_PRINTED - len(head) - sum(len(part) + 2 for part in tail)
        if left < 200:
            break
        tail.insert(0, _cut(section, left - 4))
    return "\n\n".join([head, *tail])


def _cut(text: str, most: int) -> str:
    """The text, or as many of its first lines as fit, and a word on the rest."""
    if len(text) <= most:
        return text
    kept = text[: most - 40].rsplit("\n", 1)[0]
    return f"{kept}\n({text.count(chr(10)) - kept.count(chr(10))} more lines in report.md)"
