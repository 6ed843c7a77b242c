"""The loss op: from logits [S*B, C] and targets [B] to the loss, and to the gradient of the logits.

Every provider but those named "computes less" gives -mean_b log((1/S) sum_s p(y_b | logits[s, b])) and its gradient. Bytes are counted in
passes over the logits, L = S*B*C*e bytes: every read and every write of a tensor of that size. Vectors of S*B are left out.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import iwsgd_ext as iw

from . import peers
from .case import BASELINE, Case, Grid, Variant, backends, on_backend

LESS = "F.cross_entropy (computes less)"  # no likelihoods of samples, no importance weights


@dataclass
class Inputs:
    logits: Tensor  # [S*B, C], a leaf
    target: Tensor  # [B]
    samples: int
    gradient: bool
    exact: dict = field(default_factory=dict, repr=False)  # results in float64, once they are known

    @classmethod
    def of(cls, case: Case) -> "Inputs":
        gradient = case.work == "forward+backward"
        logits = torch.randn(case.samples * case.batch, case.classes, device=case.device).mul_(2).to(case.dtype).requires_grad_(gradient)
        return cls(logits, torch.randint(case.classes, (case.batch,), device=case.device), case.samples, gradient)

    @property
    def size(self) -> int:
        return self.logits.numel() * self.logits.element_size()


Loss = Callable[[Tensor | list[Tensor]], Tensor]


def minus_bound(log_p: Tensor, samples: int) -> Tensor:
    """[S, B] -> minus the mean of the bound (eq 4), in plain torch."""
    return -(torch.logsumexp(log_p, 0) - math.log(samples)).mean()


def loop(i: Inputs) -> Loss:
    """As the logits of S passes come: one tensor for each sample."""

    def loss(parts: list[Tensor]) -> Tensor:
        return minus_bound(torch.stack([-F.cross_entropy(z, i.target, reduction="none") for z in parts]), i.samples)

    return loss


def rows(i: Inputs, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The expanded batch, by any cross-entropy that gives one value for each row."""
    repeated = i.target.repeat(i.samples)
    return lambda z: minus_bound(-cross_entropy(z, repeated).view(i.samples, -1), i.samples)


def expanded(i: Inputs) -> Loss:
    return rows(i, lambda z, y: F.cross_entropy(z, y, reduction="none"))


def vmapped(i: Inputs) -> Loss:
    each = torch.vmap(lambda z: -F.cross_entropy(z, i.target, reduction="none"))
    return lambda z: minus_bound(each(z.view(i.samples, -1, z.shape[1])), i.samples)


def fused(i: Inputs) -> Loss:
    return lambda z: iw.iw_cross_entropy(z, i.target, i.samples)


def fused_in_place(i: Inputs) -> Loss:
    return lambda z: iw.iw_cross_entropy(z, i.target, i.samples, inplace=True)


def mean(i: Inputs) -> Loss:
    repeated = i.target.repeat(i.samples)
    return lambda z: F.cross_entropy(z, repeated)


Count = Callable[[Inputs], int]


def passes(forward: float, gradient: float) -> Count:
    """So many passes over the logits for the loss alone, and for the loss with its gradient."""
    return lambda i: int(i.size * (gradient if i.gradient else forward))


# log-softmax reads and writes; its gradient reads the scattered gradient, which was written before, and the log-softmax, and writes.
EAGER = passes(2, 6)
# Under vmap the gradient is scattered into a copy of the zeros, which reads and writes once more.
VMAP = passes(2, 8)
# At the least: the loss reads once (the row stays in a cache for its second look), the gradient reads and writes.
COMPILED = passes(1, 3)
# One read, and one write where a gradient is wanted. An upstream gradient of one is no pass.
FUSED = passes(1, 2)
# Reads twice (softmax, then gradient) and writes the gradient over the logits; reads and writes for the upstream gradient.
LIGER = passes(3, 5)
# The loss reads, the gradient reads and writes.
TWO_KERNELS = passes(1, 3)


def reference_bytes(i: Inputs) -> int:
    """Passes of the reference: log-softmax reads and writes; exp, product, difference, product, choice read and write, the one-hot of an
    example is written and read; the upstream gradient multiplies. 16-bit logits are raised to float32 and the result rounded back.
    """
    wide = i.logits.numel() * max(4, i.logits.element_size())
    raised = i.size + wide if i.logits.element_size() < 4 else 0
    if not i.gradient:
        return 2 * wide + raised
    return 12 * wide + 2 * wide // i.samples + 2 * raised + 2 * i.size


def variant_of(make: Callable[[Inputs], Loss], count: Count, *, definition: Callable[[Inputs], Loss] = expanded, parts: bool = False):
    """A provider from its loss; autograd gives the gradient."""

    def provider(i: Inputs) -> Variant:
        loss = make(i)
        leaves = [z.detach().requires_grad_(i.gradient) for z in i.logits.detach().chunk(i.samples)] if parts else [i.logits]

        def forward():
            with torch.no_grad():
                return loss(leaves if parts else i.logits)

        def both():
            return torch.autograd.grad(loss(leaves if parts else i.logits), leaves)

        def check():
            value, gradient = exact(i, definition)
            close("loss", forward(), value, i.logits.dtype)
            if i.gradient:
                close("gradient", torch.cat(both()), gradient, i.logits.dtype)

        return Variant(both if i.gradient else forward, check, count(i), leaves=[i.logits, i.target])

    return provider


def in_place(make: Callable[[Inputs], Loss], count: Count) -> Callable[[Inputs], Variant]:
    """A provider that writes the gradient over the logits, which are given back before each run."""

    def provider(i: Inputs) -> Variant:
        loss, given = make(i), i.logits.clone()  # no leaf, whose memory is nobody's to write

        @torch.no_grad()
        def restore():
            given.copy_(i.logits)

        def both():
            return torch.autograd.grad(loss(given), given)

        def check():
            restore()
            value, gradient = exact(i, expanded)
            l = loss(given)
            close("loss", l.detach(), value, given.dtype)
            close("gradient", torch.autograd.grad(l, given)[0], gradient, given.dtype)

        return Variant(both, check, count(i), before=restore, leaves=[given, i.target])

    return provider


def exact(i: Inputs, make: Callable[[Inputs], Loss]) -> tuple[Tensor, Tensor]:
    """Loss and gradient by their definition, plain torch in float64."""
    if make not in i.exact:
        z = i.logits.detach().double().requires_grad_()
        loss = make(i)(z)
        i.exact[make] = loss.detach(), torch.autograd.grad(loss, z)[0]
    return i.exact[make]


def close(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Relative error of the whole tensor. In 16 bits torch rounds log-likelihoods to about 1%, so importance weights are off by several."""
    allowed = 0.1 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error <= allowed, f"{name}: relative error {error:.1e} against float64, allowed {allowed:.0e}"


def providers(device: torch.device, gradient: bool) -> dict[str, Callable[[Inputs], Variant]]:
    found = {
        BASELINE: variant_of(loop, EAGER, parts=True),
        "expanded batch": variant_of(expanded, EAGER),
        "expanded batch, torch.compile": variant_of(lambda i: torch.compile(expanded(i)), COMPILED),
        "torch.func.vmap": variant_of(vmapped, VMAP),
    }
    for name in backends(device):
        found[f"iw {name}"] = on_backend(name, variant_of(fused, reference_bytes if name == "reference" else FUSED))
    if gradient:
        for name in backends(device)[1:]:
            found[f"iw {name}, inplace=True"] = on_backend(name, in_place(fused_in_place, FUSED))
        found["Liger, expanded batch"] = in_place(lambda i: rows(i, peers.liger(device)), LIGER)
        found["QuACK, expanded batch"] = variant_of(lambda i: rows(i, peers.quack(device)), TWO_KERNELS)
        found["FlashAttention, expanded batch"] = variant_of(lambda i: rows(i, peers.flash_attention(device)), TWO_KERNELS)
        found[LESS] = variant_of(mean, EAGER, definition=mean)
        found[f"{LESS}, torch.compile"] = variant_of(lambda i: torch.compile(mean(i)), COMPILED, definition=mean)
    return found


SAMPLES = 8
CPU_ROWS = {10: 131072, 1000: 8192, 32000: 512}  # rows at S = 8
GPU_LOGITS = 1 << 28


def cases(grid: Grid) -> Iterator[Case]:
    gpu = grid.device.type == "cuda"
    own = (torch.bfloat16, torch.float32) if gpu else (torch.float32, torch.bfloat16)
    dtypes = grid.dtypes_or(*(own[:1] if grid.quick else own))
    classes = grid.classes_or(*((1000, 4096, 256, 32000, 10, 128256) if gpu else (1000,) if grid.quick else (1000, 10, 32000)))
    sweep = grid.samples_or(*((SAMPLES,) if grid.quick else (SAMPLES, 4, 1, 2, 16, 32, 64)))
    works = ("forward+backward",) if grid.quick else ("forward+backward", "forward")
    for dtype, c, samples, work in itertools.product(dtypes, classes, sweep, works):
        if samples != sweep[0] and (c != classes[0] or work == "forward"):
            continue  # the cost of S is shown at one size
        at_eight = min(1 << 20, GPU_LOGITS // c) if gpu else CPU_ROWS.get(c, max(8, (1 << 23) // c))
        batch = max(1, at_eight // SAMPLES)
        size = samples * batch * c * torch.finfo(dtype).bits // 8
        yield Case(
            level="op",
            op="iw_cross_entropy",
            size=f"{batch}x{c}",
            work=work,
            samples=samples,
            batch=batch,
            classes=c,
            dtype=dtype,
            device=grid.device,
            rank=11 + (dtype != dtypes[0]) * 30 + (work == "forward") * 20 + (samples != sweep[0]) * 40,
            setup=Inputs.of,
            providers=providers(grid.device, work != "forward"),
            need=64 * samples * batch * c,  # a check in float64 holds eight tensors of that precision
            fewest_bytes=2 * size if work != "forward" else size,
        )
