"""Times each kernel at sizes that fill a GPU, and plain torch beside it, as fractions of the copy bandwidth. Nothing else may run.

    python tools/gpu_timing.py [--out timing.jsonl] [--seconds 0.25] [--only WORD ...] [--once]

What is timed is replays of a CUDA graph, so that the host's time is not in it; it has a column of its own. Every kernel's results are
compared with plain torch on a few rows before. A case is one line of the file, written when it is known; started again with the same
file, the program goes on behind the case that ended it. --once runs each kernel once, and measures nothing: for a profiler.

Bytes are those that any implementation must move, inputs read once and outputs written once: 2n for the loss with its gradient, n bytes
of logits; (1 + S) n for the noise, n bytes of x. A peer of the same work is credited with the same bytes.
"""

import argparse
import faulthandler
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gpu_cases
import torch
import torch.nn.functional as F
from torch import Tensor

import iwsgd_ext as iw
from iwsgd_ext import functional

BLOCKS = 5  # of replays; the median counts
PATIENCE = 30.0  # seconds; a case that takes longer ends the process
LAST = 2  # examples whose results are compared
SAMPLES = 8
CLASSES = (1000, 4096, 256, 32000, 128256, 10)  # the most telling first
LOGITS = 1 << 28  # elements of [S*B, C]: 0.5 GiB in bfloat16
X = (16384, 4096)
COPIED = 1 << 30  # bytes


@dataclass
class Work:
    """The work of a case, the bytes that it must move, and a comparison that raises AssertionError where its results are wrong."""

    call: Callable[[], object]
    bytes: int
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[torch.device, int], Work]  # of the device and of what sizes are divided by
    once: bool = False  # a kernel that --once runs


def cases() -> Iterator[Case]:
    """The most important ones first: time may run out."""
    yield Case("copy", copy)
    yield Case("read", read)
    yield Case("write", write)
    for classes in CLASSES:
        yield Case(f"loss C={classes}", lambda d, k, c=classes: loss(d, k, c), once=True)
    for samples in (8, 4, 1):
        yield Case(f"noise forward S={samples}", lambda d, k, s=samples: noise_forward(d, k, s))
        yield Case(f"noise backward S={samples}", lambda d, k, s=samples: noise_backward(d, k, s), once=samples == 8)
    for classes in CLASSES:
        yield Case(f"F.cross_entropy C={classes}", lambda d, k, c=classes: cross_entropy(d, k, c))
    yield Case("F.dropout S=8", plain_dropout)
    yield Case("copy at the end", copy)


def memory(device: torch.device, divided: int) -> Tensor:
    return torch.randint(-100, 100, (COPIED // 4 // divided,), dtype=torch.int32, device=device)


def copy(device: torch.device, divided: int) -> Work:
    source = memory(device, divided)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2 * source.nbytes)


def read(device: torch.device, divided: int) -> Work:
    source = memory(device, divided).view(torch.float32).nan_to_num_()
    return Work(source.amax, source.nbytes)


def write(device: torch.device, divided: int) -> Work:
    target = memory(device, divided)
    return Work(lambda: target.fill_(3), target.nbytes)


def logits_of(device: torch.device, divided: int, classes: int) -> tuple[Tensor, Tensor]:
    batch = max(LAST, LOGITS // divided // (SAMPLES * classes))
    z = torch.randn(SAMPLES * batch, classes, device=device, dtype=torch.bfloat16)
    return z.mul_(2).requires_grad_(), torch.randint(classes, (batch,), device=device)


def last_rows(samples: int, batch: int) -> Tensor:
    """Rows of the last examples, sample by sample."""
    return (torch.arange(samples)[:, None] * batch + torch.arange(batch - LAST, batch)).flatten()


def by_reference(call: Callable[[], object]):
    iw.set_backend("reference")
    try:
        return call()
    finally:
        iw.set_backend(None)


def loss(device: torch.device, divided: int, classes: int) -> Work:
    z, target = logits_of(device, divided, classes)

    def both(z: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(iw.iw_cross_entropy(z, target, SAMPLES), z)[0]

    def check() -> None:
        rows = last_rows(SAMPLES, len(target)).to(device)
        few = z.detach()[rows].float().cpu().requires_grad_()
        expected = by_reference(lambda: both(few, target[-LAST:].cpu())) * LAST  # the mean's denominators differ
        got = both(z, target)[rows].float().cpu() * len(target)
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=1e-3)

    return Work(lambda: both(z, target), 2 * z.nbytes, check)


def cross_entropy(device: torch.device, divided: int, classes: int) -> Work:
    z, target = logits_of(device, divided, classes)
    repeated = target.repeat(SAMPLES)
    return Work(lambda: torch.autograd.grad(F.cross_entropy(z, repeated), z)[0], 2 * z.nbytes)


def x_of(device: torch.device, divided: int) -> Tensor:
    return torch.randn(max(LAST, X[0] // divided), X[1], device=device, dtype=torch.bfloat16)


def noise_check(x: Tensor, samples: int, got: Callable[[], tuple[Tensor, Tensor | None]], dy: Tensor | None) -> Callable[[], None]:
    """The last examples' outputs, bit for bit, and their gradient."""

    def check() -> None:
        rows = last_rows(samples, len(x))
        part = x.detach()[-LAST:].cpu().requires_grad_()
        y = by_reference(lambda: functional.dropout(part, 0.5, samples=samples, seed=7, first_example=len(x) - LAST))
        mine, gradient = got()
        assert torch.equal(mine[rows.to(x.device)].cpu(), y.detach()), "outputs differ"
        if dy is not None:
            expected = torch.autograd.grad(y, part, dy[rows.to(x.device)].cpu())[0]
            torch.testing.assert_close(gradient[-LAST:].cpu(), expected, rtol=2e-2, atol=2e-2)

    return check


def noise_forward(device: torch.device, divided: int, samples: int) -> Work:
    x, seed = x_of(device, divided), torch.tensor(7, device=device)

    def forward() -> Tensor:
        return functional.dropout(x, 0.5, samples=samples, seed=seed)

    return Work(forward, (1 + samples) * x.nbytes, noise_check(x, samples, lambda: (forward(), None), None))


def noise_backward(device: torch.device, divided: int, samples: int) -> Work:
    x, seed = x_of(device, divided).requires_grad_(), torch.tensor(7, device=device)
    y = functional.dropout(x, 0.5, samples=samples, seed=seed)
    dy = torch.randn_like(y)

    def backward() -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    return Work(backward, (1 + samples) * x.nbytes, noise_check(x, samples, lambda: (y.detach(), backward()), dy))


def plain_dropout(device: torch.device, divided: int) -> Work:
    x = x_of(device, divided)
    return Work(lambda: F.dropout(x.repeat(SAMPLES, 1), 0.5), (1 + SAMPLES) * x.nbytes)


Watch = Callable[[Callable[[], object], int], float]  # seconds that so many runs take, one after the other


def by_events(run: Callable[[], object], times: int) -> float:
    """Of the device. One run before the first event keeps the device busy while the host launches the others."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def by_clock(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def replay_of(call: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """A CUDA graph of the call. It was called before, on this stream."""
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def timed(run: Callable[[], object], watch: Watch, seconds: float) -> list[float]:
    """Seconds of a run, of each block; all blocks together take about ``seconds``."""
    one = watch(run, 2) / 2
    times = max(2, min(1000, int(seconds / BLOCKS / max(one, 1e-7))))
    return [watch(run, times) / times for _ in range(BLOCKS)]


def measure(case: Case, device: torch.device, divided: int, seconds: float, watch: Watch, stream: torch.cuda.Stream | None) -> dict:
    """The line of a case. On a GPU everything is done on the stream that is captured: a gradient is, where its forward was."""
    work = case.make(device, divided)
    row = {"case": case.name, "bytes": work.bytes}
    for _ in range(2):
        work.call()
    try:
        work.check()
    except AssertionError as error:
        row["wrong"] = " ".join(str(error).split())[:300]
    if device.type == "cuda":
        torch.cuda.synchronize()
        row["host_us"] = by_clock(work.call, 10) / 10 * 1e6
        try:
            run = replay_of(work.call, stream)
        except RuntimeError as error:  # then the host's time may be in it
            row["eager"], run = " ".join(str(error).split())[:300], work.call
    else:
        run = work.call
    values = timed(run, watch, seconds)
    row |= {"us": statistics.median(values) * 1e6, "least_us": min(values) * 1e6, "most_us": max(values) * 1e6}
    return row | {"bytes_per_s": work.bytes / statistics.median(values)}


def time_cases(
    chosen: list[Case], device: torch.device, out: Path | None, seconds: float, watch: Watch, divided: int = 1, stream=None
) -> list[dict]:
    """Every case that the file does not have yet; what fails is a line with its reason."""
    before = gpu_cases.read(out) if out else []
    rates = {row["case"]: row["bytes_per_s"] for row in before if "bytes_per_s" in row}
    rows = []

    def keep(row: dict) -> None:
        if out:
            with out.open("ab", buffering=0) as file:
                file.write((json.dumps(row) + "\n").encode())

    for case in chosen:
        if any(row["case"] == case.name for row in before):
            continue
        keep({"case": case.name, "began": True})
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            row = measure(case, device, divided, seconds, watch, stream)
            rates[case.name] = row["bytes_per_s"]
            row["of_copy"] = row["bytes_per_s"] / rates["copy"] if "copy" in rates else None
        except Exception as error:
            row = {"case": case.name, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        finally:
            faulthandler.cancel_dump_traceback_later()
        keep(row)
        rows.append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()  # an error that broke the context ends the process here
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="lines are added to this file, too")
    parser.add_argument("--seconds", type=float, default=0.25, help="of replays for each case (0.25)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names contain one of these words, and copy")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--divided", type=int, default=1, metavar="N", help="sizes are divided by this, for a trial without a GPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(7)
    chosen = [c for c in cases() if not options.only or c.name == "copy" or any(word in c.name for word in options.only)]
    if options.once:
        for case in chosen:
            if case.once:
                case.make(device, options.divided).call()
                print(case.name, flush=True)
        return 0
    if device.type != "cuda":
        rows = time_cases(chosen, device, options.out, options.seconds, by_clock, options.divided)
    else:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            rows = time_cases(chosen, device, options.out, options.seconds, by_events, options.divided, stream)
    return int(any("failed" in row or "wrong" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
