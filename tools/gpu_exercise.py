"""Launches every kernel in every regime on small tensors and compares with plain PyTorch: what compute-sanitizer watches.

    python tools/gpu_exercise.py [--kernels | --large] [--device cuda]

--kernels says which kernels ran, and fails where one of csrc/cuda was not among them. --large takes sizes that fill a GPU, once
each, for a profiler; nothing is compared then.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

import iwsgd_ext as iw
from iwsgd_ext import functional

SOURCES = sorted((Path(__file__).resolve().parent.parent / "csrc" / "cuda").glob("*.cu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMS = {"element": functional.dropout, "channel": functional.dropout2d, "row": functional.drop_path}


def kernels() -> set[str]:
    """The names of all kernels, from the sources."""
    return {name for source in SOURCES for name in re.findall(r"(\w+_kernel)\(", source.read_text()) if "<<<" not in name}


def apart(x: torch.Tensor, device: torch.device, shift: int) -> torch.Tensor:
    """x on the device, ``shift`` elements behind an aligned address."""
    memory = torch.zeros(x.numel() + shift, dtype=x.dtype).to(device)
    view = memory[shift:].view(x.shape)
    return view.copy_(x)


def reference_of(call, *tensors):
    iw.set_backend("reference")
    try:
        return call(*tensors)
    finally:
        iw.set_backend(None)


def noise_cases() -> Iterator[tuple]:
    for dtype, (unit, form), expand, shift in product(DTYPES, FORMS.items(), (True, False), (0, 1)):
        for shape in ((3, 5, 4, 8), (6, 3, 5, 7)):
            yield f"noise {dtype} {unit} expand={expand} {shape} shift {shift}", form, dtype, shape, expand, shift, 0.3
    yield "noise p=1", functional.dropout, torch.float32, (3, 5, 4, 8), True, 0, 1.0


def exercise_noise(device: torch.device) -> int:
    count = 0
    for name, form, dtype, shape, expand, shift, p in noise_cases():
        samples = 3
        x = torch.randn(shape).to(dtype)
        grow = torch.randn((samples * shape[0] if expand else shape[0], *shape[1:])).to(dtype)

        def both(x, dy, form=form, expand=expand, p=p, samples=samples):
            x = x.requires_grad_()
            y = form(x, p, samples=samples, seed=7, stream=1, expand=expand)
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        got = both(apart(x, device, shift), apart(grow, device, shift))
        for part, mine, expected in zip(("forward", "backward"), got, reference_of(both, x, grow), strict=True):
            torch.testing.assert_close(mine.cpu(), expected, msg=lambda text, at=f"{name} {part}": f"{at}: {text}")
        count += 1
    return count


# samples, examples, classes, positions, options. Classes by regime: several rows of a warp, of a block, one unit of a block, a
# cluster, slices (units of several positions, classes that are not adjacent, and units too large for anything on chip).
LOSSES = [
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


def exercise_loss(device: torch.device) -> int:
    count = 0
    for (samples, batch, classes, positions, options), dtype, shift, last in product(LOSSES, DTYPES, (0, 1), (False, True)):
        large = samples * batch * classes > 100_000
        if (last and positions == 1) or (large and (shift or dtype == torch.float64)):
            continue
        shape = (samples * batch, classes, positions)[: 2 + (positions > 1)]
        logits = torch.randn(shape).to(dtype)
        target = torch.randint(classes, (batch, positions)).squeeze(1) if positions == 1 else torch.randint(classes, (batch, positions))
        target.view(-1)[1:3] = -100
        weight = torch.rand(classes) + 0.5

        def both(z, y, v, options=options, samples=samples):
            z = z.requires_grad_()
            loss, stats = iw.iw_cross_entropy(z, y, samples, weight=v, return_stats=True, **options)
            dz = torch.autograd.grad(loss.sum(), z)[0]
            return loss.detach(), stats.log_p, stats.weights, stats.bound, dz

        there = apart(logits.movedim(1, -1).contiguous(), device, shift).movedim(-1, 1) if last else apart(logits, device, shift)
        got = both(there, target.to(device), weight.to(device))
        expected = reference_of(both, logits, target, weight)
        name = f"loss {dtype} S={samples} B={batch} C={classes} T={positions} {options} shift {shift} class-last {last}"
        for mine, other in zip(got, expected, strict=True):
            rough = {"rtol": 2e-2, "atol": 1e-3} if mine.dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(mine.cpu(), other, **rough, msg=lambda text, at=name: f"{at}: {text}")
        count += 1
    return count


def large(device: torch.device) -> None:
    """One call of each benchmark's kind."""
    x = torch.randn(64 << 20, device=device, dtype=torch.bfloat16).view(1024, -1).requires_grad_()
    functional.dropout(x, 0.5, samples=4, seed=7).backward(torch.randn(4 * 1024, x.shape[1], device=device, dtype=torch.bfloat16))
    for rows, classes in ((131072 * 8, 10), (65536, 256), (65536, 1000), (16384, 4096), (8192, 32000), (4096, 128256)):
        logits = torch.randn(rows, classes, device=device, dtype=torch.bfloat16).requires_grad_()
        iw.iw_cross_entropy(logits, torch.randint(classes, (rows // 8,), device=device), 8).backward()


def kernels_launched(device: torch.device) -> set[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        exercise_noise(device)
        exercise_loss(device)
        torch.cuda.synchronize()
    names = " ".join(event.key for event in seen.key_averages())
    return {name for name in kernels() if re.search(rf"\b{name}\b", names)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true")
    what.add_argument("--large", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(7)
    if options.large:
        large(device)
        return 0
    if options.kernels:
        missing = kernels() - kernels_launched(device)
        print(f"never launched: {', '.join(sorted(missing))}" if missing else f"all {len(kernels())} kernels were launched")
        return int(bool(missing))
    print(f"{exercise_noise(device)} noise cases and {exercise_loss(device)} loss cases agree with plain PyTorch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
