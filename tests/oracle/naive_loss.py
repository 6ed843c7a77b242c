"""The loss by its definition: Python loops over noise samples, examples and positions, and torch's autograd. The tests' truth."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Naive(NamedTuple):
    """loss (() or [units]), log_p and weights [S, *unit], bound [*unit], and dlogits for the upstream gradient that was given."""

    loss: Tensor
    log_p: Tensor
    weights: Tensor
    bound: Tensor
    dlogits: Tensor


def bound_of(l: list[Tensor], alpha: float) -> Tensor:
    """L of one unit from its log-likelihoods under each noise sample."""
    if alpha == 0 or max(l) == -math.inf:
        return sum(l) / len(l)
    if alpha == math.inf:
        return l[max(range(len(l)), key=lambda s: (float(l[s].detach()), -s))]
    return (torch.logsumexp(alpha * torch.stack(l), 0) - math.log(len(l))) / alpha


def weights_of(l: list[Tensor], alpha: float) -> list[Tensor]:
    if alpha == 0 or max(l) == -math.inf:
        return [torch.tensor(1 / len(l), dtype=l[0].dtype)] * len(l)
    if alpha == math.inf:
        best = max(range(len(l)), key=lambda s: (float(l[s].detach()), -s))
        return [torch.tensor(float(s == best), dtype=l[0].dtype) for s in range(len(l))]
    return list(torch.softmax(alpha * torch.stack(l), 0))


def one_hot(label: int, classes: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([float(i == label) for i in range(classes)], dtype=dtype)


def naive_loss(logits: Tensor, target: Tensor, samples: int, **options) -> Naive:
    """The loss of ``iw_cross_entropy`` in float64 (or ``dtype``), on the CPU, and its gradient for the ``upstream`` gradient."""
    return loss_and_terms(logits, target, samples, **options)[0]


def loss_and_terms(
    logits: Tensor,
    target: Tensor,
    samples: int,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    alpha: float = 1.0,
    level: str = "example",
    example_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    upstream: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Naive, float]:
    """Also the largest of the terms c p, q v and 2 lse p whose sum is dlogits: its rounding stays where they cancel."""

    def number(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().cpu().to(dtype)

    z = logits.detach().cpu().to(dtype).requires_grad_()
    target, weight, example_weight = target.cpu(), number(weight), number(example_weight)
    batch, classes, spatial = target.shape[0], z.shape[1], z.shape[2:]
    positions = math.prod(spatial)
    rows = z.reshape(samples * batch, classes, positions).permute(0, 2, 1).reshape(-1, classes).unbind(0)
    v = torch.ones(classes, dtype=dtype) if weight is None else weight
    zero = torch.zeros((), dtype=dtype)

    units, denominator = [], zero  # units: (outer weight, [l of each sample], what is added to outer * L)
    most_penalty = 0.0  # of a row's derivative
    for b in range(batch):
        e = example_weight[b] if example_weight is not None and example_weight.dim() == 1 else zero + 1
        u_of_example, c_of_example, penalty_of_example, counted = [zero] * samples, zero, zero, 0
        for t in range(positions):
            m = example_weight[b].flatten()[t] if example_weight is not None and example_weight.dim() > 1 else zero + 1
            labels = not target.is_floating_point()
            y = int(target[b].flatten()[t]) if labels else None
            if labels and y == ignore_index:
                u, c, d, penalty = [zero] * samples, zero, zero, zero
            else:
                counted += 1
                lse = [torch.logsumexp(rows[(s * batch + b) * positions + t], 0) for s in range(samples)]
                strength = abs(e) * abs(m) * lse_square_scale / samples
                penalty = sum(strength * x**2 for x in lse) if lse_square_scale else zero
                most_penalty = max([most_penalty, *(float(2 * strength * x.detach().abs()) for x in lse)])
                log_p = [torch.log_softmax(rows[(s * batch + b) * positions + t], 0) for s in range(samples)]
                if labels and label_smoothing == 0:  # not a sum over classes: 0 * log 0 is not meant
                    c = d = m * v[y]
                    u = [c * l[y] for l in log_p]
                else:
                    q = one_hot(y, classes, dtype) if labels else target[b].reshape(classes, positions)[:, t].to(dtype)
                    qv = m * ((1 - label_smoothing) * q + label_smoothing / classes) * v
                    c, d = qv.sum(), m * (v[y] if labels else 1)
                    u = [(qv * l).sum() for l in log_p]
            denominator = denominator + e * d
            if level == "position":
                units.append((e * c, [u_s / c if c != 0 else u_s for u_s in u], penalty))
            u_of_example = [a + u_s for a, u_s in zip(u_of_example, u, strict=True)]
            c_of_example, penalty_of_example = c_of_example + c, penalty_of_example + penalty
        if level == "example":
            cbar = c_of_example / max(counted, 1)
            units.append((e * cbar, [u_s / cbar if cbar != 0 else u_s for u_s in u_of_example], penalty_of_example))

    given = denominator if normalizer is None else torch.as_tensor(normalizer).cpu().to(dtype).reshape(())
    n = given if reduction == "mean" else zero + 1
    unit_shape = (batch, *spatial) if level == "position" else (batch,)
    if not units:
        empty = torch.zeros(samples, *unit_shape, dtype=dtype)
        return Naive(empty[0] if reduction == "none" else zero, empty, empty, empty[0], torch.zeros_like(z)), 0.0
    bounds = torch.stack([bound_of(l, alpha) for _, l, _ in units])
    outer, penalties = torch.stack([c for c, _, _ in units]), torch.stack([penalty for _, _, penalty in units])
    costs = ((penalties - outer * bounds) / n if n != 0 else 0 * bounds) + z[:0].sum()  # so that there is a gradient where nothing counts
    loss = costs if reduction == "none" else costs.sum()
    upstream = number(torch.as_tensor(upstream)).expand(unit_shape if reduction == "none" else ()).reshape(loss.shape)
    (dlogits,) = torch.autograd.grad((loss * upstream).sum(), z)
    result = Naive(
        loss.detach().reshape(unit_shape if reduction == "none" else ()),
        torch.stack([torch.stack(l) for _, l, _ in units], 1).detach().reshape(samples, *unit_shape),
        torch.stack([torch.stack(weights_of(l, alpha)) for _, l, _ in units], 1).detach().reshape(samples, *unit_shape),
        bounds.detach().reshape(unit_shape),
        dlogits,
    )
    terms = (upstream * outer).abs().max().item() + upstream.abs().max().item() * most_penalty
    return result, terms / abs(n.item()) if n != 0 else 0.0


def assert_within_budget(name: str, got: Tensor, exact: Tensor, rough: Tensor, amplified: float = 0.0, floor: float = 0.0) -> None:
    """|got - exact| <= 2 (|rough - exact| + (eps + amplified) max|exact| + floor), at its largest and in the mean square; eps is got's.

    In float64 naive and kernel err alike, so the bound is a stated one: 512 eps, for sums of up to 50257 terms. ``amplified``: the
    rounding of float32 log-likelihoods, which comes out of the exponential in weights as a relative error. ``floor``: see above.
    """
    eps = torch.finfo(got.dtype).eps * (256 if got.dtype == torch.float64 else 1) + amplified
    got, rough = got.detach().cpu().double(), rough.to(got.dtype).double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    odd = ~exact.isfinite()
    torch.testing.assert_close(got[odd], exact[odd], equal_nan=True, msg=f"{name}: {got} where {exact} was expected")
    got, exact, rough = (x[~odd] for x in (got, exact, rough))
    if not exact.numel():
        return
    for norm, of in (("largest", lambda x: x.abs().max()), ("mean square", lambda x: x.square().mean().sqrt())):
        error, budget = of(got - exact), 2 * (of(rough - exact) + eps * of(exact) + floor)
        assert error <= budget, f"{name}: {norm} error {error:.3e}, allowed {budget:.3e}"


def assert_equals_naive(got: Naive, logits: Tensor, target: Tensor, samples: int, **options) -> None:
    """Holds a result in the logits' own precision to the loop in float64, with the loop in float32 as the measure of rounding."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    exact, terms = loss_and_terms(logits, target, samples, **options)
    rough = exact if acc == torch.float64 else naive_loss(logits, target, samples, **options, dtype=acc)
    alpha = options.get("alpha", 1.0)
    sizes = exact.log_p[exact.log_p.isfinite()].abs().tolist() if 0 < alpha < math.inf else []
    amplified = alpha * max(sizes) * torch.finfo(acc).eps if sizes else 0.0
    for name, *values in zip(Naive._fields, got, exact, rough, strict=True):
        floor = terms * torch.finfo(acc).eps if name == "dlogits" else 0.0
        assert_within_budget(name, *values, amplified if name in ("weights", "dlogits") else 0.0, floor)


def result_of(loss_function, logits: Tensor, target: Tensor, samples: int, *, upstream: float | Tensor = 1.0, **options) -> Naive:
    """What a loss function and its gradient give, in the naive loop's terms; the logits keep their strides."""
    logits = logits.detach().requires_grad_()
    loss, stats = loss_function(logits, target, samples, return_stats=True, **options)
    upstream = torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand_as(loss)
    (dlogits,) = torch.autograd.grad(loss, logits, upstream)
    assert dlogits.dtype == logits.dtype
    return Naive(loss, stats.log_p, stats.weights, stats.bound, dlogits)
