"""Writes the outcome of every case to a file when it is known, so that it is there whatever ends the process.

As a plugin of pytest (-p gpu_cases) for tests; as functions for tools/gpu_exercise.py. The file, one JSON object a line, is named by
IWSGD_CASES, the stage by IWSGD_STAGE. A line {"outcome": "began"} without a later one of the same case names what was running.
"""

import contextlib
import json
import os

MOST_TEXTS = 300  # failures of a process that come with their whole text
_texts = 0


def write(case: str, outcome: str, message: str = "", text: str = "", seconds: float = 0.0) -> None:
    """Adds a line; does nothing where no file is named. One write to a file that is open for appending mixes with no other's."""
    global _texts
    path = os.environ.get("IWSGD_CASES")
    if not path:
        return
    line = {"stage": os.environ.get("IWSGD_STAGE", ""), "case": case, "outcome": outcome}
    if outcome != "began":
        line |= {"seconds": round(seconds, 3), "message": message[:600]}
    if text and _texts < MOST_TEXTS:
        _texts += 1
        line["text"] = text[-4000:]
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


def read(path: str | os.PathLike) -> list[dict]:
    """The objects of such a file, without a line that was cut off."""
    found = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return found


def begun() -> set[str]:
    """The stage's cases that the file has already."""
    stage = os.environ.get("IWSGD_STAGE", "")
    return {line["case"] for line in read(os.environ.get("IWSGD_CASES", "")) if line["stage"] == stage}


# ---- the plugin; with pytest-xdist it writes in the process that the workers report to, which also knows of workers that died ----

_in_worker = False


def pytest_configure(config) -> None:
    global _in_worker
    _in_worker = hasattr(config, "workerinput")


def pytest_runtest_logstart(nodeid, location) -> None:
    if not _in_worker:
        write(nodeid, "began")


def pytest_runtest_logreport(report) -> None:
    if _in_worker or (report.passed and report.when != "call"):
        return
    message, text = "", ""
    if report.skipped and isinstance(report.longrepr, tuple):
        message = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        text = str(report.longrepr)
        crash = getattr(report.longrepr, "reprcrash", None)
        message = f"{crash.message} ({crash.path}:{crash.lineno})" if crash else text
        message = f"in its {report.when}: {message}" if report.when in ("setup", "teardown") else message
    write(report.nodeid, report.outcome, message, text, report.duration)
