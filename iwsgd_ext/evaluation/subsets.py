"""The bound with k of S noise samples, averaged over all subsets of size k, for every k at once.

NOTE [All subsets]
With x_s = exp(alpha l_s), the mean over all subsets A of size k of log sum_{s in A} x_s has C(S, k) terms. An integral gives it sooner,

    log x = int_0^inf (e^-t - e^-tx) / t dt,    with    mean over A of exp(-t sum_{s in A} x_s) = M_k(e^{-t x_1}, .., e^{-t x_S}),

where M_k is the k-th elementary symmetric mean. All k together take S^2 steps: M_k of n numbers is (1 - k/n) M_k + (k/n) a_n M_{k-1}, both
of the first n - 1 numbers; all terms are positive. With t = e^u the integrand is analytic, and falls exponentially to the left and faster
to the right, so that the error of the trapezoid rule with step h is exp(-pi^2 / h).
"""

import math

import torch
from torch import Tensor

STEP = 0.4  # exp(-pi^2 / 0.4) = 2e-11
LEFT, RIGHT = 28.0, 4.0  # limits of u; beyond them the integral has e^-28 = 7e-13 and e^-e^4 = 2e-24
FAR = 30.0  # a gap in log-likelihood at which the less likely sample adds 1e-13 to the sum
ELEMENTS = 2**18  # elements of the largest temporary: 2 MiB stay in the cache


def subset_means(l: Tensor, alpha: float) -> Tensor:
    """Mean over all subsets A of k samples of (1/alpha) log mean_{s in A} exp(alpha l[s]), for k = 1 .. S.

    Args:
        l: log-likelihoods [S, units].
        alpha: 1 is the bound of eq 4 (Noh et al. 2017); 0 the mean, inf the largest.

    Returns:
        float64 [S, units]. -inf where some subset holds -inf alone; NaN for units with NaN or inf.
    """
    samples, units = l.shape
    unknown = (l.isnan() | (l == math.inf)).any(0)
    l = l.double().masked_fill(unknown, math.nan if alpha == 0 else 0)
    if alpha == 0:
        return l.mean(0).expand(samples, units).clone()
    ordered = l.sort(0).values
    impossible = ordered == -math.inf  # [S, units]
    if alpha == math.inf:
        means = _mean_largest(ordered.masked_fill(impossible, 0))
    else:
        ordered = ordered * alpha
        # Gaps are cut to FAR, which moves the largest of a subset; the move is added again below.
        gaps = ordered.diff(dim=0).masked_fill(impossible[:-1], 0).clamp(max=FAR)
        near = torch.cat([-gaps.flip(0).cumsum(0).flip(0), torch.zeros_like(ordered[:1])])
        moved = (ordered - near).masked_fill(impossible, 0)
        means = (_mean_log_sum(near, impossible) + _mean_largest(moved)) / alpha
    k = torch.arange(1, samples + 1, dtype=l.dtype, device=l.device)[:, None]
    if alpha != math.inf:
        means -= k.log() / alpha
    means.masked_fill_(k <= impossible.sum(0), -math.inf)
    return means.masked_fill_(unknown, math.nan)


def _mean_largest(ordered: Tensor) -> Tensor:
    """Mean over all subsets of k of their last value in ``ordered`` [S, units]: value i (from 0) is the last in C(i, k-1) of C(S, k)."""
    samples = ordered.shape[0]
    share = [[math.comb(i, k - 1) / math.comb(samples, k) for i in range(samples)] for k in range(1, samples + 1)]
    return torch.tensor(share, dtype=ordered.dtype, device=ordered.device) @ ordered


def _mean_log_sum(near: Tensor, impossible: Tensor) -> Tensor:
    """Mean over all subsets of k of log sum exp(near), for near [S, units] in order, the last 0. NOTE [All subsets]"""
    samples, units = near.shape
    means = near.new_empty(samples, units)
    spread, order = (-near[0]).sort(descending=True)
    first = 0
    while first < units:
        left, right = LEFT + math.log(samples), RIGHT + spread[first].item()
        t = torch.arange(-left, right + STEP, STEP, dtype=near.dtype, device=near.device).exp()[:, None]  # [P, 1]
        of_chunk = order[first : first + max(1, ELEMENTS // (t.numel() * samples))]
        x = near[:, of_chunk].exp().masked_fill(impossible[:, of_chunk], 0)
        symmetric = near.new_zeros(samples + 1, t.numel(), len(of_chunk))  # M_k, [k, P, units]
        symmetric[0] = 1
        for n in range(1, samples + 1):
            share = torch.arange(1, n + 1, dtype=near.dtype, device=near.device)[:, None, None] / n
            symmetric[1 : n + 1].lerp_((-t * x[n - 1]).exp() * symmetric[:n], share)
        means[:, of_chunk] = STEP * ((-t).exp() - symmetric[1:]).sum(1)
        first += len(of_chunk)
    return means
