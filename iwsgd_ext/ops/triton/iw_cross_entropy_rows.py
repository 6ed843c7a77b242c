"""One row of logits, and one unit of S rows, in Triton: target, statistics, weights and gradient, for every kernel of the loss."""

import math

import triton
import triton.language as tl

from .launch import number, quotient

MEAN_ALPHA, FINITE_ALPHA, BEST_ALPHA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INFINITY = tl.constexpr(float("inf"))
CANCELLED = tl.constexpr(5e-324)


def alpha_mode(alpha: float) -> int:
    """Alpha's limits have code of their own."""
    return (MEAN_ALPHA if alpha == 0 else BEST_ALPHA if math.isinf(alpha) else FINITE_ALPHA).value


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp_below(x):
    """exp(x), x <= 0. In float32 Triton's own takes three instructions more, for results below 1e-38, which are 0 here."""
    return tl.exp2(x * LOG2_E) if x.dtype == tl.float32 else tl.exp(x)


@triton.jit
def expm1(x, e):
    """exp(x) - 1 to full precision, x <= 0, of x and e = exp(x)."""
    if x.dtype == tl.float32:
        # Taylor's series: the next term is below 1e-8 of the sum.
        near = x * (1 / 40320) + 1 / 5040
        near = (((near * x + 1 / 720) * x + 1 / 120) * x + 1 / 24) * x + 1 / 6
        below = tl.where(x > -0.5, ((near * x + 0.5) * x + 1.0) * x, e - 1)
    else:
        # Kahan: the error of exp leaves with its logarithm.
        below = tl.where(e == 1, x, (e - 1) * (x / tl.log(tl.where(e == 1, 2.0, e))))
        below = tl.where(e < 1e-3, e - 1, below)
    return below


@triton.jit
def log1p(x):
    """log(1 + x) to full precision, x > -1 (Kahan)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


# ---- the target of positions ----


@triton.jit
def target_of(labels, class_weight, position_weight, p, there, C, ignore_index, smoothing, ACC: tl.constexpr):
    """Of positions p [N]: whether they count, the label (-1 for probabilities), its q v, and the position's weight."""
    m = tl.full(p.shape, 1.0, ACC)
    if position_weight is not None:
        m = tl.load(position_weight + p, there, 0.0)
    label = tl.full(p.shape, -1, tl.int32)
    hot = tl.full(p.shape, 0.0, ACC)
    counted = there
    if labels is not None:
        given = tl.load(labels + p, there, ignore_index)
        counted = there & (given != ignore_index)
        known = counted & (given >= 0) & (given < C)  # the denominator's kernel stops at others
        label = tl.where(known, given, -1).to(tl.int32)
        hot = tl.full(p.shape, 1.0, ACC) - smoothing
        if class_weight is not None:
            hot *= tl.load(class_weight + given, known, 0.0)  # of label, Triton 3.6 makes a gradient in float64 that it cannot compile
    return counted, label, hot, m


@triton.jit
def soft_of(probabilities, class_weight, p, c, mask, C, T, smoothing):
    """q v of classes c [1, N] without the label's own part, of positions p [M, 1]; 0 outside of mask."""
    q = smoothing / tl.full((), C, smoothing.dtype)
    if probabilities is not None:
        row = (p // T) * C * T + p % T
        q = q + (1.0 - smoothing) * tl.load(probabilities + row + c.to(tl.int64) * T, mask, 0.0)
    if class_weight is not None:
        q = q * tl.load(class_weight + c, c < C, 0.0)
    return tl.where(mask, q, 0.0)


@triton.jit
def scale_of(denominators, normalizer, MEAN: tl.constexpr, PARTIALS: tl.constexpr):
    """1 / (what the loss is divided by), float64; 0 where that is 0."""
    n = tl.full((), 1.0, tl.float64)
    if normalizer is not None:
        n = tl.load(normalizer).to(tl.float64)
    elif MEAN:
        parts = tl.load(denominators + tl.arange(0, PARTIALS))
        n = cancelled(tl.sum(parts, 0), tl.max((parts != 0).to(tl.int32), 0) != 0)
    return tl.where(n == 0, 0.0, 1.0 / tl.where(n == 0, 1.0, n))


@triton.jit
def cancelled(total, any_term):
    """A sum of d; the smallest number, 1 over which is infinite as torch's 1 / 0, where terms that are not 0 add up to 0."""
    return tl.where((total == 0) & any_term, CANCELLED, total)


# ---- a row, and a unit ----


@triton.jit
def reference_of(top):
    """The number that is subtracted from logits before exp: the largest, or 0 where all are -infinity."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def likelihood_of(top, total, weighted, alone, z_label, hot, m, counted, LABELS: tl.constexpr, SOFT: tl.constexpr):
    """u = sum_c q v log p and c = sum_c q v of rows, each term of u relative to the largest logit first."""
    log_total = tl.log(total)
    u, c = tl.zeros_like(total), hot
    if LABELS:
        u = hot * (z_label - top - log_total)
    if SOFT:
        u += weighted - alone * log_total
        c = hot + alone
    return tl.where(counted, u * m, 0.0), tl.where(counted, c * m, 0.0)


@triton.jit
def row_statistics(
    logits, row, inside, p, probabilities, class_weight, C, T, class_stride, smoothing, ACC: tl.constexpr, SOFT: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of rows [R] at offsets ``row``: the largest logit, the sum of exp(z - it), and the sums of soft (z - it) and of soft.

    Merged as a log-sum-exp from step to step; a step's own sums stay apart, class by class, until the end.
    """
    top = tl.full(row.shape, -INFINITY, ACC)
    total = tl.zeros((row.shape[0], BLOCK_C), ACC)
    weighted, alone = tl.zeros_like(top), tl.zeros_like(top)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (c < C)[None, :]
        offsets = row[:, None] + (c.to(tl.int64) * class_stride)[None, :]
        z = tl.load(logits + offsets, mask, -INFINITY, eviction_policy="evict_last" if KEEP else "").to(ACC)
        larger = tl.maximum(top, tl.max(z, 1))
        before, after = reference_of(top), reference_of(larger)
        shrink = tl.where(top == -INFINITY, 0.0, tl.exp(top - after))
        total = total * shrink[:, None] + exp_below(z - after[:, None])
        top = larger
        if SOFT:
            soft = soft_of(probabilities, class_weight, p[:, None], c[None, :], mask, C, T, smoothing)
            weighted += alone * (before - after) + tl.sum(tl.where(mask, soft * (z - after[:, None]), 0.0), 1)
            alone += tl.sum(soft, 1)
    return top, tl.sum(total, 1), weighted, alone


@triton.jit
def gradient_of(e, factor, k, soft, hot, is_label, live, LABELS: tl.constexpr, SOFT: tl.constexpr):
    """factor * e - k * (q v), where e = exp(z - its row's largest), and zeros where not live; the arguments broadcast together."""
    gradient = factor * e
    if SOFT:
        gradient -= k * soft
    if LABELS:
        gradient = tl.where(is_label, gradient - k * hot, gradient)
    return tl.where(live, gradient, 0.0)


@triton.jit
def example_weight_of(example_weight, p, T, there, ACC: tl.constexpr):
    """Of positions p [N]."""
    e = tl.full(p.shape, 1.0, ACC)
    if example_weight is not None:
        e = tl.load(example_weight + p // T, there, 0.0)
    return e


@triton.jit
def factors_of(w, scale, e, c, m, top, total, counted, lse_square_share):
    """Factor and k of the gradient of rows under importance weights w (:func:`gradient_of`), and where it is not zeros.

    Where all logits are -infinity the softmax is NaN, as torch's. Of weight 0 the gradient is zeros, whatever the logits are: NaN would
    have made the weight NaN. scale: 1 over the denominator, in the precision of w.
    """
    weight = w * scale * e
    pull, live = weight * c, counted
    if lse_square_share is not None:
        pull += 2.0 * number(lse_square_share, w.dtype) * scale * tl.abs(e * m) * (top + tl.log(total))
    else:
        live = counted & (w != 0)
    return tl.where(top == -INFINITY, float("nan"), pull / total), weight * m, live


@triton.jit
def squares_of(m, top, total, counted, lse_square_share):
    """lse^2 of rows times the size of their position's weight; 0 where it is not wanted."""
    squares = tl.zeros_like(top)
    if lse_square_share is not None:
        lse = top + tl.log(total)
        squares = tl.where(counted, tl.abs(m) * lse * lse, 0.0)
    return squares


@triton.jit
def unit_log_likelihood(u, c, ACC: tl.constexpr):
    """l of outer weight c, of any sign. Without any weight u is 0, or NaN; terms that add up to 0 have no log-likelihood: NaN.

    An infinite weight makes the loss infinite, as torch's: not the NaN of inf / inf.
    """
    infinite, weighs = tl.abs(c) == INFINITY, c != 0
    without = tl.where(u == 0, u, float("nan"))
    return tl.where(infinite, u * c, tl.where(weighs, quotient(u, tl.where(weighs & ~infinite, c, 1.0), ACC), without))


@triton.jit
def unit_cost(outer, bound):
    """The terms of units in the loss, their outer weights divided by the denominator: 0, not 0 * infinity, where the weight is 0."""
    return tl.where((outer == 0) & (bound == bound), 0.0, -outer * bound)


@triton.jit
def weigh(l, s, S, alpha, ACC: tl.constexpr, MODE: tl.constexpr):
    """Importance weights [BLOCK_S, N] and bound [N] of log-likelihoods l [BLOCK_S, N], of which the rows s < S are there."""
    there, samples = s < S, tl.full((), S, ACC)
    top = tl.max(tl.where(there, l, -INFINITY), 0)
    mean = tl.sum(tl.where(there, l, 0.0), 0) / samples
    nan = mean != mean
    dead = nan | (top == -INFINITY)
    share = tl.full(l.shape, 1.0, ACC) * (1.0 / samples.to(tl.float64)).to(ACC)  # rounded, where float32's own division is not
    # One sample has all the weight, whatever its likelihood: its gradient is then torch's.
    alike = tl.where((nan & (S > 1))[None, :], mean[None, :], share)
    if MODE == MEAN_ALPHA:
        w, bound = share, mean
    elif MODE == BEST_ALPHA:
        best = tl.min(tl.where(there & (l == top[None, :]), s, S), 0)  # the first of equals
        w, bound = tl.where(dead[None, :], alike, tl.where(s == best[None, :], 1.0, 0.0)), tl.where(dead, mean, top)
    else:
        # The largest may be infinite.
        below = alpha * tl.where(dead[None, :] | (l == top[None, :]), 0.0, l - tl.where(dead, 0.0, top)[None, :])
        # log1p and expm1 keep the bound exact as alpha goes to 0, where it is the mean.
        e = exp_below(below)
        excess = tl.sum(tl.where(there, expm1(below, e), 0.0), 0)
        w = e * (1.0 / (samples + excess))[None, :]
        w = tl.where(dead[None, :], alike, w)
        bound = tl.where(dead, mean, top + log1p(excess / samples) / alpha)
    return w, bound
