"""Runs stages one after the other or side by side, each with a time limit and a log, and writes the report: tools/gpu.py's machinery."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 2  # exit code


class Failed(Exception):
    """A stage did not do what it is for; the message says what was seen."""


class Skipped(Exception):
    """A stage cannot run here; the message says why."""


@dataclass
class Stage:
    """A step of the run.

    ``work(run)`` does it and returns what is worth a line in the table; it raises Failed or Skipped. Stages of one group that
    follow one another run side by side. ``needs``: a stage without which this one makes no sense.
    """

    name: str
    seconds: float  # its limit
    work: Callable[["Run"], str]
    group: str | None = None
    needs: str | None = None


@dataclass
class Result:
    name: str
    status: str  # ok, failed, skipped
    text: str
    seconds: float


@dataclass
class Session:
    """A run of all stages: where it writes, when it must be over, and what has come out so far."""

    out: Path
    logs: Path
    deadline: float  # of time.monotonic()
    results: list[Result] = field(default_factory=list)
    facts: dict = field(default_factory=dict)  # of the machine, and what stages found: for results.json
    running: set[subprocess.Popen] = field(default_factory=set)

    def result(self, name: str) -> Result | None:
        return next((r for r in self.results if r.name == name), None)

    def stop(self, *_) -> None:
        """Ends what runs and starts nothing more; the report is still written."""
        self.deadline = time.monotonic()
        for process in list(self.running):
            _kill(process)


@dataclass
class Run:
    """One stage at work: its commands write to its log and are stopped when its time is over."""

    session: Session
    name: str
    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def log(self) -> Path:
        return self.session.logs / f"{self.name}.log"

    def command(self, *words: object, environment: dict[str, str] | None = None, log: Path | None = None) -> tuple[int, str]:
        """Exit code and output of a command in the checkout's root. Raises Failed where the stage's time runs out."""
        log = log or self.log
        log.parent.mkdir(parents=True, exist_ok=True)
        started = log.stat().st_size if log.exists() else 0
        with log.open("a") as file:
            print("$", *words, file=file, flush=True)
            begin = file.tell()
            # A group of its own, so that what it starts can be stopped with it.
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env={**os.environ, **_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.session.running.add(process)
            try:
                code = process.wait(timeout=max(self.left, 0.1))
            except subprocess.TimeoutExpired:
                raise Failed("stopped at its time limit") from None
            finally:
                _kill(process)
                self.session.running.discard(process)
        return code, log.read_bytes()[max(begin, started) :].decode(errors="replace")

    def python(self, *words: object, **options) -> tuple[int, str]:
        return self.command(sys.executable, *words, **options)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    # ninja is a program beside Python, which need not be on the PATH; cuBLAS is deterministic, as the tests ask, with this only
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PATH": path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run_stages(stages: list[Stage], session: Session, say: Callable[[str], None] = print) -> int:
    """Runs them all, whatever fails, writing the report after each; returns the exit code."""
    for folder in (session.logs, session.out):
        folder.mkdir(parents=True, exist_ok=True)
    for stale in ("report.md", "results.json", "logs.tar.gz", "bench.html"):
        (session.out / stale).unlink(missing_ok=True)
    waiting = list(stages)
    while waiting:
        together = [waiting.pop(0)]
        while waiting and together[0].group and waiting[0].group == together[0].group:
            together.append(waiting.pop(0))
        say(f"{', '.join(s.name for s in together)} ...")
        with ThreadPoolExecutor(len(together)) as pool:
            for result in pool.map(lambda stage: _run_stage(stage, session), together):
                session.results.append(result)
                say(f"  {result.name}: {result.status}, {result.seconds:.0f} s{': ' + result.text if result.text else ''}")
        write_report(session)
    say(table(session.results))
    say(f"written to {session.out}")
    if session.facts.get("no_gpu"):
        return NO_GPU
    return int(any(r.status == "failed" for r in session.results))


def _run_stage(stage: Stage, session: Session) -> Result:
    begin = time.monotonic()
    needed = session.result(stage.needs) if stage.needs else None
    status, text = "ok", ""
    try:
        if needed is not None and needed.status != "ok":
            raise Skipped(f"{needed.name} {'was skipped' if needed.status == 'skipped' else 'failed'}")
        if session.deadline - begin < 5:
            raise Skipped("no time was left")
        text = stage.work(Run(session, stage.name, min(begin + stage.seconds, session.deadline)))
    except Skipped as why:
        status, text = "skipped", str(why)
    except Failed as why:
        status, text = "failed", str(why)
    except Exception as error:  # a mistake in a stage must not hide what the others find
        status, text = "failed", f"{type(error).__name__}: {error}"
    return Result(stage.name, status, text, time.monotonic() - begin)


def table(results: list[Result]) -> str:
    width = max((len(r.name) for r in results), default=0)
    lines = [f"{'stage':<{width}}  {'result':<7}  {'time':>5}  "]
    lines += [f"{r.name:<{width}}  {r.status:<7}  {r.seconds:>3.0f} s  {r.text.splitlines()[0] if r.text else ''}" for r in results]
    return "\n".join(line.rstrip() for line in lines)


def write_report(session: Session) -> None:
    """report.md, results.json and logs.tar.gz, as far as the run has come."""
    results = [vars(r) for r in session.results]
    (session.out / "results.json").write_text(json.dumps({**session.facts, "stages": results}, indent=1, default=str) + "\n")
    lines = ["# GPU run", ""]
    lines += [f"- {key}: {value}" for key, value in session.facts.get("machine", {}).items()]
    lines += ["", "| stage | result | seconds | |", "|---|---|---:|---|"]
    for r in session.results:
        first = r.text.splitlines()[0].replace("|", "\\|") if r.text else ""
        lines.append(f"| {r.name} | {'**failed**' if r.status == 'failed' else r.status} | {r.seconds:.0f} | {first} |")
    for r in session.results:
        log = session.logs / f"{r.name}.log"
        if r.status == "failed":
            tail = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
            lines += ["", f"## {r.name} failed", "", r.text, "", "```", *tail, "```"]
        elif len(r.text.splitlines()) > 1:
            lines += ["", f"## {r.name}", "", *r.text.splitlines()[1:]]
    pictures = sorted(p.name for p in session.out.iterdir() if p.suffix in (".png", ".svg"))
    lines += ["", *(f"![{Path(name).stem}]({name})" for name in pictures)]
    (session.out / "report.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(session.out / "logs.tar.gz", "w:gz") as archive:
        archive.add(session.logs, "logs")
