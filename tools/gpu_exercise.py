"""Launches every kernel in every regime on small tensors and compares with plain PyTorch: what compute-sanitizer watches, too.

    python tools/gpu_exercise.py [--family NAME ...] [--kernels] [--patience 60] [--backend cuda|triton] [--dtype bfloat16 ...]

Each case is a line of its own where it fails, and the others still run. --kernels says which of the families' kernels ran, and counts
one that did not as a failure. An error that breaks the CUDA context, and a case that takes longer than --patience, end the process.
Started again, it goes on behind that case, where IWSGD_CASES names the file that tells (tools/gpu_cases.py).
"""

import argparse
import contextlib
import faulthandler
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import gpu_cases
import torch

import iwsgd_ext as iw
from iwsgd_ext import backend, functional
from iwsgd_ext.ops.multinomial import bounds_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"cuda": sorted((ROOT / "csrc" / "cuda").glob("*.cu")), "triton": sorted((ROOT / "iwsgd_ext" / "ops" / "triton").glob("*.py"))}
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SAMPLES = 3
BROKEN = 3  # exit code: the CUDA context cannot be used any more
SHAPES = ((3, 5, 4, 8), (6, 3, 5, 7))  # of x: rows that are whole groups and accesses, and rows that are not


def kernels(name: str) -> set[str]:
    """The names of all kernels of a backend, from its sources."""
    return {kernel for source in SOURCES[name] for kernel in declared(source.read_text(), name)}


def declared(text: str, name: str) -> set[str]:
    """The kernels that a source file of the backend defines."""
    if name == "triton":
        return set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    return {re.search(r"(\w+_kernel)\(", part)[1] for part in text.split("__global__")[1:]}


def apart(x: torch.Tensor, device: torch.device, shift: int) -> torch.Tensor:
    """x on the device, ``shift`` elements behind an aligned address."""
    memory = torch.zeros(x.numel() + shift, dtype=x.dtype).to(device)
    view = memory[shift:].view(x.shape)
    return view.copy_(x)


@contextlib.contextmanager
def on_backend(name: str | None) -> Iterator[None]:
    before = iw.backend_info()["forced"]
    iw.set_backend(name)
    try:
        yield
    finally:
        iw.set_backend(before)


def reference_of(call, *tensors):
    with on_backend("reference"):
        return call(*tensors)


class Cases:
    """Runs cases and keeps going: a failure is a line, and is written down at once."""

    def __init__(self, device: torch.device, patience: float = 60.0):
        self.device, self.patience = device, patience
        self.before = gpu_cases.begun()
        self.count = self.failures = 0

    def run(self, name: str, work: Callable[[], None]) -> None:
        if name in self.before:
            return
        self.count += 1
        if self.count == 1:
            print(f"first case: {name}", flush=True)  # what starts this program again looks for it
        gpu_cases.write(name, "began")
        faulthandler.dump_traceback_later(self.patience, exit=True)
        try:
            work()
            self._synchronize()
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc())
            try:
                self._synchronize()
            except Exception:
                print(f"the CUDA context is lost in {name}", flush=True)
                os._exit(BROKEN)  # what a profiler or torch does at the end needs the context
        else:
            gpu_cases.write(name, "passed")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def fail(self, name: str, message: str, text: str = "") -> None:
        self.failures += 1
        gpu_cases.write(name, "failed", message, text)
        print(f"FAILED {name}: {' '.join(message.split())[:400]}", flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- noise: forward and backward of a form(x, p, samples=, seed=, stream=, expand=) ----


def agrees(cases: Cases, name: str, form: Callable, p, dtype: torch.dtype, shape: tuple, expand: bool, shift: int, **tolerance) -> None:
    device, name = cases.device, f"{name} {dtype} expand={expand} {shape} shift {shift}"
    x = torch.randn(shape).to(dtype)
    dy = torch.randn((SAMPLES * shape[0] if expand else shape[0], *shape[1:])).to(dtype)

    def both(x, dy, p):
        x = x.requires_grad_()
        y = form(x, p, samples=SAMPLES, seed=7, stream=1, expand=expand)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    def work():
        got = both(apart(x, device, shift), apart(dy, device, shift), p.to(device) if isinstance(p, torch.Tensor) else p)
        for part, mine, expected in zip(("forward", "backward"), got, reference_of(both, x, dy, p), strict=True):
            torch.testing.assert_close(mine.cpu(), expected, **tolerance, msg=lambda text, part=part: f"{part}: {text}")

    cases.run(name, work)


def rates(rows: int, *sizes: int) -> torch.Tensor:
    """Dropout probabilities [rows, *sizes], 0 and 1 among them."""
    p = torch.rand(rows, *sizes)
    p.view(-1)[0], p.view(-1)[-1] = 0.0, 1.0
    return p


def rules(shape: tuple, expand: bool) -> Iterator[tuple]:
    """Name, form and p of every rule of the noise op for an x of the shape."""
    examples = shape[0] if expand else shape[0] // SAMPLES
    channels, single = shape[1], (1,) * (len(shape) - 2)
    yield "dropout", functional.dropout, 0.3
    yield "dropout of channels", functional.dropout2d, 0.3
    yield "dropout of rows", functional.drop_path, 0.3
    yield "alpha dropout", functional.alpha_dropout, 0.3
    yield "alpha dropout of channels", functional.feature_alpha_dropout, 0.3
    yield "rates of positions", functional.dropout, rates(1, *shape[1:])
    yield "rates of examples' channels", functional.dropout2d, rates(examples, channels, *single)
    yield "rates of rows", functional.drop_path, rates(shape[0], 1, *single)
    yield "rates of elements", functional.dropout, rates(*shape)


def exercise_noise(cases: Cases, dtypes: list[torch.dtype]) -> None:
    for dtype, expand, shift, shape in product(dtypes, (True, False), (0, 1), SHAPES):
        for name, form, p in rules(shape, expand):
            agrees(cases, name, form, p, dtype, shape, expand, shift)
    agrees(cases, "p=1", functional.dropout, 1.0, torch.float32, SHAPES[0], True, 0)


def exercise_real_noise(cases: Cases, dtypes: list[torch.dtype]) -> None:
    forms = {"gaussian dropout": functional.gaussian_dropout, "gaussian noise": functional.gaussian_noise}
    forms |= {"laplace noise": functional.laplace_noise, "uniform factors": partial(functional.uniform_noise, multiply=True)}
    for dtype, expand, shift, shape, (name, form) in product(dtypes, (True, False), (0, 1), SHAPES, forms.items()):
        # numbers agree within 5e-5, and three of them are added up; what is rounded to 16 bits may go either way
        close = {"rtol": 2e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 5e-4}
        agrees(cases, name, form, 0.4, dtype, shape, expand, shift, **close)


def exercise_multinomial(cases: Cases, dtypes: list[torch.dtype]) -> None:
    """Few features, which a CUDA block counts in shared memory, and more than fit there; bounds for all samples, and for each."""
    for features, draws, by_sample in product((1, 24, 20011), (1, 7, 2000), (False, True)):
        probabilities = torch.rand(SAMPLES, features) if by_sample else torch.rand(features)
        bounds, origin = bounds_of(probabilities), torch.tensor([7, 0, 0])
        arguments = (SAMPLES, 1, 0, 2)

        def counts(origin, bounds, arguments=arguments, draws=draws):
            return backend.op("multinomial", bounds.device)(origin, None, *arguments, bounds, draws)

        def work(origin=origin, bounds=bounds, counts=counts, draws=draws):
            expected = reference_of(counts, origin, bounds)
            assert torch.equal(counts(origin.to(cases.device), bounds.to(cases.device)).cpu(), expected), "counts differ"
            assert int(expected.sum()) == SAMPLES * 2 * draws, "the draws do not add up"

        cases.run(f"multinomial of {features} features, {draws} draws, bounds by sample {by_sample}", work)
    for dtype, expand, shift in product(dtypes, (True, False), (0, 1)):
        form = lambda x, p, **address: functional.multinomial_dropout(x, p, 9, **address)  # noqa: E731
        agrees(cases, "multinomial dropout", form, None, dtype, SHAPES[1], expand, shift)


# samples, examples, classes, positions, options. Classes by regime: registers (each form, units of one warp and of several, few lanes of a
# row where there are many), several rows of a warp, of a block, one unit of a block, a cluster, slices (units of several positions, classes
# that are not adjacent, and units too large for anything on chip, whose rows are in parts).
LOSSES = [
    (8, 150, 8, 1, {}),
    (8, 37, 256, 1, {"alpha": 0.5}),
    (5, 37, 512, 1, {"reduction": "none"}),
    (64, 5, 40, 1, {}),
    (8, 37, 1001, 1, {"reduction": "sum"}),
    (8, 13, 1500, 1, {}),
    (1, 37, 2048, 1, {}),
    (2, 5, 3001, 1, {}),
    (1, 40_000, 10, 1, {}),
    (1, 5000, 100, 1, {"alpha": 0.5}),
    (1, 2500, 256, 1, {}),
    (4, 37, 2, 1, {}),
    (8, 33, 10, 1, {"label_smoothing": 0.1}),
    (3, 5, 1000, 1, {"reduction": "none"}),
    (8, 2, 4096, 1, {"reduction": "sum"}),
    (8, 2, 20011, 1, {}),
    (8, 2, 32768, 1, {"label_smoothing": 0.1}),
    (2, 3, 17, 9, {}),
    (2, 3, 16, 9, {"level": "position"}),
    (2, 2, 1000, 40, {"alpha": 0.5}),
    (64, 1, 65536, 1, {}),
    (1, 5000, 3, 1, {}),
    (8, 37, 256, 1, {"lse_square_scale": 0.1}),
    (8, 2, 4096, 1, {"lse_square_scale": 0.1, "label_smoothing": 0.1}),
    (8, 2, 20011, 1, {"lse_square_scale": 0.1}),
    (2, 3, 17, 9, {"lse_square_scale": 0.1}),
]
TRITON_LOSSES = [(4, 160, 6000, 1, {})]  # more examples than multiprocessors, each too large to be held: read twice by one program


def exercise_loss(cases: Cases, dtypes: list[torch.dtype]) -> None:
    device, count = cases.device, 0
    losses = LOSSES + (TRITON_LOSSES if backend.backend_of(device) == "triton" else [])
    for (samples, batch, classes, positions, options), dtype, shift, last in product(losses, dtypes, (0, 1), (False, True)):
        large = samples * batch * classes > 100_000
        if (last and positions == 1) or (large and (shift or dtype == torch.float64)):
            continue
        shape = (samples * batch, classes, positions)[: 2 + (positions > 1)]
        logits = torch.randn(shape).to(dtype)
        target = torch.randint(classes, (batch, positions)).squeeze(1) if positions == 1 else torch.randint(classes, (batch, positions))
        target.view(-1)[1:3] = -100
        weight = torch.rand(classes) + 0.5
        upstream = (1.0, 0.5)[count % 2]  # 1 is left to the device, too

        def both(z, y, v, options=options, samples=samples, upstream=upstream):
            z = z.requires_grad_()
            loss, stats = iw.iw_cross_entropy(z, y, samples, weight=v, return_stats=True, **options)
            dz = torch.autograd.grad(loss, z, torch.full_like(loss, upstream))[0]
            return loss.detach(), stats.log_p, stats.weights, stats.bound, dz

        def work(both=both, logits=logits, target=target, weight=weight, shift=shift, last=last):
            there = apart(logits.movedim(1, -1).contiguous(), device, shift).movedim(-1, 1) if last else apart(logits, device, shift)
            got = both(there, target.to(device), weight.to(device))
            expected = reference_of(both, logits, target, weight)
            for part, mine, other in zip(("loss", "log_p", "weights", "bound", "gradient"), got, expected, strict=True):
                rough = {"rtol": 2e-2, "atol": 1e-3} if mine.dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-3, "atol": 1e-5}
                torch.testing.assert_close(mine.cpu(), other, **rough, msg=lambda text, part=part: f"{part}: {text}")

        name = f"loss {dtype} S={samples} B={batch} C={classes} T={positions} {options} shift {shift} class-last {last} upstream {upstream}"
        cases.run(name, work)
        count += 1


def exercise_scale(cases: Cases, dtypes: list[torch.dtype]) -> None:
    """The product with an upstream gradient, in place, also where memory begins and ends inside an access."""
    if backend.backend_of(cases.device) == "reference":
        return  # which makes a new tensor
    for dtype, shift, factor in product(dtypes, (0, 1, 5), (1.0, 0.3)):
        x, by = torch.randn(6, 37, 1).to(dtype), torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32))

        def work(x=x, by=by, shift=shift):
            mine = apart(x, cases.device, shift)
            backend.op("iw_cross_entropy_scale_", cases.device)(mine, by.to(cases.device))
            torch.testing.assert_close(mine.cpu(), (x.to(by.dtype) * by).to(x.dtype), rtol=0, atol=0)

        cases.run(f"scale {dtype} shift {shift} by {factor}", work)


# The kernels that each launches: of CUDA's kernels and of Triton's, which have the same names where they do the same.
EXERCISES = {
    exercise_noise: {"noise_fwd_kernel", "noise_bwd_kernel", "noise_rule_fwd_kernel", "noise_rule_bwd_kernel"},
    exercise_real_noise: {"real_noise_fwd_kernel", "real_noise_bwd_kernel"},
    exercise_multinomial: {"multinomial_fwd_kernel", "multinomial_kernel"},
    exercise_loss: {
        f"iw_cross_entropy_{part}_kernel"
        for part in ("denominator", "registers", "fwd", "cluster", "reread", "statistics", "parts", "weights", "join", "gradient", "total")
    },
    exercise_scale: {"iw_cross_entropy_scale_kernel"},
}


FAMILIES = {work.__name__.removeprefix("exercise_"): work for work in EXERCISES}


def exercise(cases: Cases, families: list[str], dtypes: list[torch.dtype]) -> None:
    for name in families:
        FAMILIES[name](cases, dtypes)


def never_launched(families: list[str], there: set[str], ran: set[str]) -> list[str]:
    """Of a backend's kernels those that the families are to launch and did not; ``ran``: names with template arguments and all."""
    wanted = {kernel for name in families for kernel in EXERCISES[FAMILIES[name]]} & there
    return sorted(name for name in wanted if not any(re.search(rf"\b{name}\b", launched) for launched in ran))


def started_profiler(cases: Cases):
    """torch's, or None and a failure: the cases run without it, too."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    try:
        profiler.start()
    except Exception as error:
        cases.fail("profiler", f"it does not start, so nobody knows which kernels ran: {error}")
        return None
    return profiler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="default: the one that the library takes for the device")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args()
    cases = Cases(torch.device(options.device), options.patience)
    dtypes = [DTYPES[name] for name in options.dtype]
    torch.manual_seed(7)
    with on_backend(options.backend):
        profiler = started_profiler(cases) if options.kernels and not cases.before else None
        exercise(cases, options.family, dtypes)
        if profiler is not None:
            profiler.stop()
            there, ran = kernels(backend.backend_of(cases.device)), {event.key for event in profiler.key_averages()}
            for name in never_launched(options.family, there, ran):
                cases.fail(f"launch of {name}", "it was never launched")
    print(f"{cases.count} cases of {', '.join(options.family)}, {cases.failures} failed")
    return int(cases.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
