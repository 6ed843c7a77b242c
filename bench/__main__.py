"""``python -m bench``: ratios measured in one run, beside what is wanted. Absolute times depend on the machine; ratios less."""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import iw_cross_entropy, noise
from .measure import keep_freed_memory, machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", choices=["noise", "loss"], help="only this op")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="numbers of threads (default: 1 and all cores)")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--out", type=Path, help="write machine and results to this JSON file")
    options = parser.parse_args()
    about = machine()
    about["freed memory kept"] = keep_freed_memory()
    threads = options.threads or sorted({1, torch.get_num_threads()})
    seconds = 0.3 if options.quick else 1.5
    cases = []
    for n in threads:
        if options.op != "loss":
            cases += [(n, noise.run, (dtype,)) for dtype in (torch.float32, torch.bfloat16)]
        if options.op != "noise":
            cases += [(n, iw_cross_entropy.run, size) for size in iw_cross_entropy.SIZES]

    console = Console(width=None if Console().is_terminal else 150)
    results: list[dict] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        try:
            for n, run, arguments in cases:
                torch.set_num_threads(n)
                results += [{"threads": n, **row} for row in run(*arguments, seconds)]
                progress.advance(task)
        except KeyboardInterrupt:
            console.print("interrupted: what was measured so far")

    table = Table(title="Speed against the limit or the peer named (ratio above 1: ours is faster)", title_justify="left")
    for column in ("threads", "op", "case", "ours", "rate", "against", "its time", "ratio", "wanted", ""):
        table.add_column(column, justify="right" if column in ("threads", "ours", "rate", "its time", "ratio", "wanted") else "left")
    for r in results:
        reached = "" if r["wanted"] is None else "yes" if r["ratio"] >= r["wanted"] else "[bold red]no[/]"
        times = f"{r['ours'] * 1e3:.2f} ms", r["rate"], r["against"], f"{r['other'] * 1e3:.2f} ms"
        wanted = "" if r["wanted"] is None else f"{r['wanted']:.2f}"
        mark = reached + (" (noisy)" if r["noisy"] else "")
        table.add_row(str(r["threads"]), r["op"], r["case"], *times, f"{r['ratio']:.2f}", wanted, mark)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
        console.print(f"written to {options.out}")


main()
