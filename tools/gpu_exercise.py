"""Launches every kernel in every regime on small tensors and compares with plain PyTorch: what compute-sanitizer watches.

    python tools/gpu_exercise.py [--kernels | --large] [--device cuda] [--backend cuda|triton] [--dtype bfloat16 ...]

--kernels says which of the backend's kernels ran, and fails where one was not among them. --large takes sizes that fill a GPU, once
each, for a profiler; nothing is compared then.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

import iwsgd_ext as iw
from iwsgd_ext import backend, functional

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"cuda": sorted((ROOT / "csrc" / "cuda").glob("*.cu")), "triton": sorted((ROOT / "iwsgd_ext" / "triton").glob("*.py"))}
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SAMPLES = 3
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


# ---- noise: forward and backward of a form(x, p, samples=, seed=, stream=, expand=) ----


def agrees(
    name: str, form: Callable, p, device: torch.device, dtype: torch.dtype, shape: tuple, expand: bool, shift: int, **tolerance
) -> None:
    x = torch.randn(shape).to(dtype)
    dy = torch.randn((SAMPLES * shape[0] if expand else shape[0], *shape[1:])).to(dtype)

    def both(x, dy, p):
        x = x.requires_grad_()
        y = form(x, p, samples=SAMPLES, seed=7, stream=1, expand=expand)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    got = both(apart(x, device, shift), apart(dy, device, shift), p.to(device) if isinstance(p, torch.Tensor) else p)
    for part, mine, expected in zip(("forward", "backward"), got, reference_of(both, x, dy, p), strict=True):
        at = f"{name} {dtype} expand={expand} {shape} shift {shift} {part}"
        torch.testing.assert_close(mine.cpu(), expected, **tolerance, msg=lambda text, at=at: f"{at}: {text}")


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


def exercise_noise(device: torch.device, dtypes: list[torch.dtype]) -> int:
    count = 0
    for dtype, expand, shift, shape in product(dtypes, (True, False), (0, 1), SHAPES):
        for name, form, p in rules(shape, expand):
            agrees(name, form, p, device, dtype, shape, expand, shift)
            count += 1
    agrees("p=1", functional.dropout, 1.0, device, torch.float32, SHAPES[0], True, 0)
    return count + 1


def exercise_gaussian(device: torch.device, dtypes: list[torch.dtype]) -> int:
    count = 0
    forms = {"gaussian dropout": functional.gaussian_dropout, "gaussian noise": functional.gaussian_noise}
    for dtype, expand, shift, shape, (name, form) in product(dtypes, (True, False), (0, 1), SHAPES, forms.items()):
        # numbers agree within 5e-5, and three of them are added up; what is rounded to 16 bits may go either way
        close = {"rtol": 2e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 5e-4}
        agrees(name, form, 0.4, device, dtype, shape, expand, shift, **close)
        count += 1
    return count


def exercise_multinomial(device: torch.device, dtypes: list[torch.dtype]) -> int:
    """Few features, which a CUDA block counts in shared memory, and more than fit there; bounds for all samples, and for each."""
    count = 0
    for features, draws, by_sample in product((1, 24, 20011), (1, 7, 2000), (False, True)):
        probabilities = torch.rand(SAMPLES, features) if by_sample else torch.rand(features)
        bounds, origin = iw.multinomial.bounds_of(probabilities), torch.tensor([7, 0, 0])
        arguments = (SAMPLES, 1, 0, 2)

        def counts(origin, bounds, arguments=arguments, draws=draws):
            return backend.op("multinomial", bounds.device)(origin, None, *arguments, bounds, draws)

        expected = reference_of(counts, origin, bounds)
        assert torch.equal(counts(origin.to(device), bounds.to(device)).cpu(), expected), (features, draws, by_sample)
        assert int(expected.sum()) == SAMPLES * 2 * draws
        count += 1
    for dtype, expand, shift in product(dtypes, (True, False), (0, 1)):
        form = lambda x, p, **address: functional.multinomial_dropout(x, p, 9, **address)  # noqa: E731
        agrees("multinomial dropout", form, None, device, dtype, SHAPES[1], expand, shift)
        count += 1
    return count


# samples, examples, classes, positions, options. Classes by regime: registers (each form, units of one warp and of several), several rows
# of a warp, of a block, one unit of a block, a cluster, slices (units of several positions, classes that are not adjacent, and units too
# large for anything on chip).
LOSSES = [
    (8, 150, 8, 1, {}),
    (8, 37, 256, 1, {"alpha": 0.5}),
    (5, 37, 512, 1, {"reduction": "none"}),
    (64, 5, 40, 1, {}),
    (8, 37, 1001, 1, {"reduction": "sum"}),
    (8, 13, 1500, 1, {}),
    (1, 37, 2048, 1, {}),
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
]
TRITON_LOSSES = [(4, 160, 6000, 1, {})]  # more examples than multiprocessors, each too large to be held: read twice by one program


def exercise_loss(device: torch.device, dtypes: list[torch.dtype]) -> int:
    count = 0
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

        there = apart(logits.movedim(1, -1).contiguous(), device, shift).movedim(-1, 1) if last else apart(logits, device, shift)
        got = both(there, target.to(device), weight.to(device))
        expected = reference_of(both, logits, target, weight)
        name = f"loss {dtype} S={samples} B={batch} C={classes} T={positions} {options} shift {shift} class-last {last} upstream {upstream}"
        for mine, other in zip(got, expected, strict=True):
            rough = {"rtol": 2e-2, "atol": 1e-3} if mine.dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(mine.cpu(), other, **rough, msg=lambda text, at=name: f"{at}: {text}")
        count += 1
    return count


def exercise_scale(device: torch.device, dtypes: list[torch.dtype]) -> int:
    """The product with an upstream gradient, in place, also where memory begins and ends inside an access."""
    if backend.backend_of(device) == "reference":
        return 0  # which makes a new tensor
    count = 0
    for dtype, shift, factor in product(dtypes, (0, 1, 5), (1.0, 0.3)):
        x, by = torch.randn(6, 37, 1).to(dtype), torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32))
        mine = apart(x, device, shift)
        backend.op("iw_cross_entropy_scale_", device)(mine, by.to(device))
        torch.testing.assert_close(mine.cpu(), (x.to(by.dtype) * by).to(dtype), rtol=0, atol=0)
        count += 1
    return count


# What each launches: of CUDA's kernels and of Triton's, which have the same names where they do the same.
EXERCISES = {
    exercise_noise: {"noise_fwd_kernel", "noise_bwd_kernel", "noise_rule_fwd_kernel", "noise_rule_bwd_kernel"},
    exercise_gaussian: {"gaussian_fwd_kernel", "gaussian_bwd_kernel"},
    exercise_multinomial: {"multinomial_fwd_kernel", "multinomial_kernel"},
    exercise_loss: {
        f"iw_cross_entropy_{part}_kernel"
        for part in ("denominator", "registers", "fwd", "cluster", "reread", "statistics", "weights", "join", "gradient", "total")
    },
    exercise_scale: {"iw_cross_entropy_scale_kernel"},
}


def exercise(device: torch.device, dtypes: list[torch.dtype]) -> str:
    counts = {work.__name__.removeprefix("exercise_"): work(device, dtypes) for work in EXERCISES}
    return ", ".join(f"{count} {name} cases" for name, count in counts.items())


def large(device: torch.device) -> None:
    """One call of each benchmark's kind."""
    x = torch.randn(64 << 20, device=device, dtype=torch.bfloat16).view(1024, -1).requires_grad_()
    functional.dropout(x, 0.5, samples=4, seed=7).backward(torch.randn(4 * 1024, x.shape[1], device=device, dtype=torch.bfloat16))
    x = x.detach()[:256]
    functional.gaussian_dropout(x, 0.5, samples=4, seed=7)
    functional.multinomial_dropout(x[:, :4096], None, 2048, samples=4, seed=7)
    for rows, classes in ((131072 * 8, 10), (65536, 256), (65536, 1000), (16384, 4096), (8192, 32000), (4096, 128256)):
        logits = torch.randn(rows, classes, device=device, dtype=torch.bfloat16).requires_grad_()
        iw.iw_cross_entropy(logits, torch.randint(classes, (rows // 8,), device=device), 8).backward()


def kernels_launched(device: torch.device, dtypes: list[torch.dtype]) -> set[str]:
    """The names of what ran on the GPU, template arguments and all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        exercise(device, dtypes)
        torch.cuda.synchronize()
    return {event.key for event in seen.key_averages()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="default: the one that the library takes for the device")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true")
    what.add_argument("--large", action="store_true")
    options = parser.parse_args()
    device, dtypes = torch.device(options.device), [DTYPES[name] for name in options.dtype]
    torch.manual_seed(7)
    with on_backend(options.backend):
        if options.large:
            large(device)
            return 0
        if options.kernels:
            there, ran = kernels(backend.backend_of(device)), kernels_launched(device, dtypes)
            missing = sorted(name for name in there if not any(re.search(rf"\b{name}\b", launched) for launched in ran))
            print(f"never launched: {', '.join(missing)}" if missing else f"all {len(there)} kernels were launched")
            return int(bool(missing))
        print(f"{exercise(device, dtypes)} agree with plain PyTorch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
