"""The cost of S noise samples, with this library and without it.

python -m bench --quick                       a look, under 2 minutes on 2 cores
python -m bench --out out/bench               everything; JSON, CSV, figures and an HTML report in out/bench
python -m bench --level step --op mlp wrn     training steps of two architectures
python -m bench --device cuda --minutes 6 --out DIR
python -m bench show DIR/results.json --markdown
python -m bench compare old/results.json new/results.json
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

try:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(f"{error}: the benchmarks need rich and matplotlib: pip install 'iwsgd_ext[bench]'") from None

from . import table
from .case import DTYPES, LEVELS, Case, Grid
from .compare import compare, text
from .files import FORMAT, read_json, write_csv, write_json
from .machine import machine
from .measure import keep_freed_memory
from .run import Run, Selection, cases
from .summary import equal_compute, equal_time

QUICK_MINUTES = 1.8
FINISHING = 8.0  # seconds for the last case's timing, the figures and the report


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="few cases, short runs, no compiled training steps")
    p.add_argument("--level", nargs="+", choices=LEVELS, default=[], metavar="LEVEL", help=f"only these levels: {', '.join(LEVELS)}")
    p.add_argument("--op", nargs="+", default=[], help="only ops and architectures whose names contain one of these words")
    p.add_argument("--provider", nargs="+", default=[], help="only providers that contain one of these words, and the baseline")
    p.add_argument("--samples", nargs="+", type=int, default=[], metavar="S", help="these numbers of noise samples")
    p.add_argument("--classes", nargs="+", type=int, default=[], metavar="C", help="these numbers of classes, for the loss and the layer")
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=[], metavar="DTYPE", help=f"these: {', '.join(DTYPES)}")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    p.add_argument("--threads", nargs="+", type=int, default=[], metavar="N", help="numbers of torch's threads (all cores)")
    p.add_argument("--seconds", type=float, help="for each provider of a case (1; with --quick and on a GPU 0.2)")
    p.add_argument("--minutes", type=float, help="for the whole run (1.8 with --quick): important cases come first")
    p.add_argument("--out", type=Path, help="folder for results.json, results.csv, figures and report.html")
    p.add_argument("--markdown", action="store_true", help="print a table to be pasted, instead of the terminal's")
    p.add_argument("--fresh-memory", action="store_true", help="let the C library give freed memory back, as it does by default")
    p.add_argument("--list", action="store_true", help="list the cases and their providers, and measure nothing")
    return p


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    if arguments[:1] == ["show"]:
        return _show(arguments[1:])
    p = parser()
    options = p.parse_args(arguments)
    for name in ("samples", "classes", "threads"):
        if min(getattr(options, name), default=1) < 1:
            p.error(f"--{name}: expected numbers of at least 1, got {getattr(options, name)}")
    for name in ("seconds", "minutes"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            p.error(f"--{name}: expected a number above 0, got {getattr(options, name)}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = tuple(DTYPES[name] for name in options.dtype)
    grid = Grid(device, options.quick, tuple(options.samples), tuple(options.classes), dtypes)
    selection = Selection(tuple(options.level), tuple(options.op), tuple(options.provider))
    todo = cases(grid, selection)
    if not todo:
        p.error("no case is left by these filters; --list shows what there is")
    if options.list:
        return _list(todo, selection)
    return _measure(todo, device, selection, options, arguments)


def _measure(todo: list[Case], device: torch.device, selection: Selection, options: argparse.Namespace, arguments: list[str]) -> int:
    start = time.monotonic()
    out = table.console()
    log = Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=out, transient=True)
    about = machine(device)
    about["freed memory kept"] = keep_freed_memory() if not options.fresh_memory and device.type == "cpu" else False
    # a GPU's runs take under a millisecond, and a case that takes long leaves no time for the next
    seconds = options.seconds or (0.2 if options.quick or device.type == "cuda" else 1.0)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else None)
    deadline = start + 60 * minutes - FINISHING if minutes else float("inf")
    run = Run(device, selection, seconds, least=3 if options.quick else 5, deadline=deadline)
    command = shlex.join(["python", "-m", "bench", *arguments])
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    def document() -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": command,
            "machine": about,
            "limits": run.limits,
            "interrupted": run.interrupted,
            "noise": run.noise,
            "seconds": round(time.monotonic() - start, 1),
            "results": run.results,
        }

    def keep() -> None:
        if options.out is not None:
            write_json(options.out / "results.json", document())

    threads = options.threads or [torch.get_num_threads()]
    # Compilers' caches of earlier runs would make the first call look cheap.
    with tempfile.TemporaryDirectory() as cache, fresh_cache(dir=cache), log as progress:
        task = progress.add_task("", total=len(todo) * len(threads))

        def next_case(name: str) -> None:
            progress.update(task, description=f"{name:<60.60}", completed=done[0])
            done[0] += 1

        done = [0]
        for n in threads:
            if not run.interrupted:
                torch.set_num_threads(n)
                run.measure(todo, next_case, keep)
    print_results(document(), out, options.markdown)
    if options.out is not None:
        for line in write_all(options.out, document()):
            out.print(line)
    return 130 if run.interrupted else 0


def write_all(folder: Path, document: dict[str, Any]) -> list[str]:
    """Every form of the results; what was written, and what could not be and why, in words."""
    from .report import html

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", document)
    write_csv(folder / "results.csv", document["results"])
    (folder / "results.md").write_text(table.markdown(document), encoding="utf-8")
    written, figures = ["results.json", "results.csv", "results.md"], []
    try:
        from .figures import save
    except ImportError as error:
        written.append(f"no figures ({error}: pip install 'iwsgd_ext[bench]')")
    else:
        figures = save(document, folder)
        written += [path.name for path in figures]
    (folder / "report.html").write_text(html(document, figures), encoding="utf-8")
    return [f"written to {folder}: {', '.join([*written, 'report.html'])}"]


def print_results(document: dict[str, Any], out, markdown: bool) -> None:
    if markdown:
        out.print(table.markdown(document), markup=False, highlight=False, soft_wrap=True)
        return
    table.show(document["results"], out)
    times: dict[str, list[str]] = {}
    for what, provider, samples in equal_time(document["results"]):
        times.setdefault(what, []).append(f"{provider} {samples}")
    for what, values in times.items():
        out.print(f"equal time: {what}, noise samples in the naive loop's time for 8: {'; '.join(values)}", markup=False)
    compute: dict[str, list[str]] = {}
    for what, provider, value in equal_compute(document["results"]):
        compute.setdefault(what, []).append(f"{provider} {value:.2f}")
    for what, values in compute.items():
        out.print(f"equal compute: {what}, time over that of plain dropout on S*B examples: {'; '.join(values)}", markup=False)
    out.print(table.about(document), markup=False)
    if document["noise"]:
        out.print(f"TOO NOISY to be quoted: {document['noise']}", style="bold red")
    if document["interrupted"]:
        out.print("interrupted: this is what was measured", style="bold red")


def _list(todo: list[Case], selection: Selection) -> int:
    out = table.console()
    for case in todo:
        out.print(f"{case.level:5} {case.name}: {'; '.join(selection.providers_of(case))}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _compare(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m bench compare", description="What changed beyond noise between two results.json.")
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    options = p.parse_args(arguments)
    try:
        print(text(compare(read_json(options.old), read_json(options.new))))
    except ValueError as error:
        p.error(str(error))
    return 0


def _show(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m bench show", description="Tables of results that were measured before.")
    p.add_argument("results", type=Path)
    p.add_argument("--markdown", action="store_true")
    p.add_argument("--out", type=Path, help="folder for the CSV, figures and report")
    options = p.parse_args(arguments)
    try:
        document = read_json(options.results)
    except ValueError as error:
        p.error(str(error))
    print_results(document, table.console(), options.markdown)
    if options.out is not None:
        print("\n".join(write_all(options.out, document)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
