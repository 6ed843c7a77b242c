"""The library's computations in plain PyTorch: the definition that every kernel is tested against. Read this first.

Notation, here and everywhere: B examples, S (or K, in one pass) noise samples, T positions, C classes. Expanded tensors are
sample-major: row s*B + b is example b under noise sample s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FIELD_RANGE = 65536  # a dropout probability is a number of 16-bit fields
LOW = 0xFFFFFFFF


def philox(group: Tensor, example: Tensor, sample: Tensor, stream: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011): 128 random bits for each counter, as four words of 32 bits.

    Args:
        group, example, sample, stream: the counter's words, int64 tensors in [0, 2^32) that broadcast together.
        seed: int64, its low half is key word 0, its high half key word 1.

    Returns:
        int64 [..., 4], each in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(group, example, sample, stream)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves their bits as they should be
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack([c0, c1, c2, c3], -1)


def fields(words: Tensor) -> Tensor:
    """The 16-bit fields of words [..., n], as int64 [..., 2n], the lower half of each word first."""
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)


def draw_words(
    origin: Tensor, sample_ids: Tensor | None, samples: int, stream: int, first_example: int, examples: int, words: int
) -> Tensor:
    """The first random words of each row: int64 [samples, examples, words], four of each Philox call. Arguments as in :func:`noise`."""
    device = origin.device
    sample = torch.arange(samples, device=device) if sample_ids is None else sample_ids
    sample = sample[:, None, None] if sample.dim() == 1 else sample[:, :, None]
    example = (torch.arange(examples, device=device) + (origin[2] + first_example))[:, None]
    group = torch.arange((words + 3) // 4, device=device)
    drawn = philox(group, example & LOW, sample & LOW, (origin[1] + stream) & LOW, origin[0])
    return drawn.flatten(-2)[..., :words]


def draw_fields(
    origin: Tensor, sample_ids: Tensor | None, samples: int, stream: int, first_example: int, examples: int, positions: int
) -> Tensor:
    """The 16-bit field of each element: int64 [samples, examples, positions]. Arguments as in :func:`noise`."""
    return fields(draw_words(origin, sample_ids, samples, stream, first_example, examples, (positions + 1) // 2))[..., :positions]


def keep_scale(threshold: int) -> float:
    """The factor of kept elements, so that noise is unbiased: one over the probability that the threshold really keeps. (A threshold of
    FIELD_RANGE keeps none.)"""
    return FIELD_RANGE / max(FIELD_RANGE - threshold, 1)


def _keep(x: Tensor, address: tuple, threshold: int, thresholds: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """(whether to keep each element of x [O, K or 1, B, I], and by which factor beside the call's), for K samples."""
    origin, sample_ids, samples, stream, first_example, positions, share = address
    outer, _, examples, inner = x.shape
    position = torch.arange(outer * inner, device=x.device) // share % max(positions, 1)

    def of_elements(values: Tensor) -> Tensor:  # [K or 1, B or 1, P] -> [O, K or 1, B or 1, I]
        return values[:, :, position].unflatten(2, (outer, inner)).permute(2, 0, 1, 3)

    drawn = draw_fields(origin, sample_ids, samples, stream, first_example, examples, positions=positions)
    if thresholds is None:
        return of_elements(drawn >= threshold), 1.0
    rows = thresholds.shape[0]
    of_row = thresholds.view(*((1, rows) if rows in (1, examples) else (samples, examples)), positions)
    kept = of_elements(drawn >= of_row)
    return kept, FIELD_RANGE / (FIELD_RANGE - of_elements(of_row)).clamp(min=1).to(_accumulated(x.dtype))


def noise(
    x: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    positions: int,
    share: int,
    threshold: int,
    thresholds: Tensor | None,
    scale: float,
    shift: float,
    fill: float,
    expand: bool,
) -> Tensor:
    """Bernoulli noise with the keep mask of the call's address (eq 1): scale * x + shift where kept, ``fill`` where dropped.

    Args:
        x: [O, B, I] where expand, else [O, K*B, I]: the examples' dimension stands second.
        origin: int64 [3]: seed, stream and first example; the next two are added to the stream and first_example given here.
        sample_ids: int64 [K] or [K, B], the noise samples' ids; None is 0 .. K-1.
        samples: K, noise samples in this pass.
        positions, share: element (o, i) of an example has position ((o * I + i) // share) % positions.
        threshold: drop where a 16-bit field is less than this, in 0 .. 65536.
        thresholds: int32 [R, positions], a threshold for each position, for all rows (R = 1), for each example (R = B) or for each row
            (R = K*B), instead of ``threshold``. ``scale`` is then multiplied by each one's own keep_scale.
        expand: draw K noises for each example, or one for each row of K*B.

    Returns:
        [O, K*B, I].
    """
    address = (origin, sample_ids, samples, stream, first_example, positions, share)
    examples = x.shape[1] if expand else x.shape[1] // samples
    outer, inner = x.shape[0], x.shape[2]
    y = (x.view(outer, 1, examples, inner) if expand else x.reshape(outer, samples, examples, inner)).to(_accumulated(x.dtype))
    kept, own_scale = _keep(y, address, threshold, thresholds)
    y = y * (scale * own_scale)
    y = torch.where(kept, y + shift if shift else y, torch.full((), fill, dtype=y.dtype, device=y.device))
    return y.to(x.dtype).reshape(outer, samples * examples, inner).contiguous()


def noise_out(x: Tensor, *arguments) -> None:
    """:func:`noise` written to the tensor that follows its arguments."""
    *arguments, out = arguments
    out.copy_(noise(x, *arguments))


def noise_sum(
    dy: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    positions: int,
    share: int,
    threshold: int,
    thresholds: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of an expanding :func:`noise`: dx = sum over the noise samples of keep * scale * dy, [O, B, I]."""
    address = (origin, sample_ids, samples, stream, first_example, positions, share)
    outer, rows, inner = dy.shape
    y = dy.reshape(outer, samples, rows // samples, inner).to(_accumulated(dy.dtype))
    kept, own_scale = _keep(y, address, threshold, thresholds)
    y = torch.where(kept, y if thresholds is None else y * own_scale, torch.zeros((), dtype=y.dtype, device=y.device))
    return (y.sum(1) * scale).to(dy.dtype).contiguous()


def normals(words: Tensor) -> Tensor:
    """Standard normal numbers (Box and Muller, 1958) of words [..., 2n], as float64 [..., 2n]: two of each two words a, b.

    With u = (a + 1/2) / 2^32 and v = (b + 1/2) / 2^32, which are never 0 or 1: sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v).
    """
    u, v = ((words.double().unflatten(-1, (-1, 2)) + 0.5) / 2**32).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * torch.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)


def laplace(words: Tensor) -> Tensor:
    """Laplace numbers of standard deviation 1 of words [...], as float64 [...]: a word's lower 31 bits m, with u = (m + 1/2) / 2^31, give
    -ln u / sqrt(2), and its highest bit the sign, 1 for negative."""
    size = -(((words & 0x7FFFFFFF).double() + 0.5) / 2**31).log() / 2**0.5
    return torch.where(words < 2**31, size, -size)


def uniform(words: Tensor) -> Tensor:
    """Uniform numbers of standard deviation 1 of words [...], as float64 [...]: sqrt(3) (i + 1/2) / 2^31, i the word as signed integer."""
    signed = torch.where(words < 2**31, words, words - 2**32)
    return (signed.double() + 0.5) / 2**31 * 3**0.5


LAWS = (normals, laplace, uniform)  # by their numbers


def _numbers_of(x: Tensor, law: int, examples: int, samples: int, address: tuple) -> Tensor:
    """The number of each element, [O, K, B, I], for x [O, rows, I]."""
    *row, positions, share = address
    outer, inner = x.shape[0], x.shape[2]
    z = LAWS[law](draw_words(*row, examples, (positions + 3) // 4 * 4))  # [K, B, P]
    position = torch.arange(outer * inner, device=x.device) // share % max(positions, 1)
    z = z[:, :, position].view(samples, examples, outer, inner).permute(2, 0, 1, 3)
    return z.to(_accumulated(x.dtype))


def real_noise(
    x: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    positions: int,
    share: int,
    law: int,
    std: float,
    multiply: bool,
    expand: bool,
) -> Tensor:
    """Real-valued noise: y = x * (1 + std * z), or x + std * z, with z the number of each element's address (eq 1).

    Args:
        x: [O, B, I] where expand, else [O, K*B, I]: the examples' dimension stands second.
        origin, sample_ids, samples, positions, share: as in :func:`noise`.
        law: the law of z, of mean 0 and standard deviation 1: 0 normal, 1 Laplace, 2 uniform.
        std: the noise's standard deviation.
        multiply: the noise multiplies, or is added.
        expand: draw K noises for each example, or one for each row of K*B.

    Returns:
        [O, K*B, I].
    """
    examples = x.shape[1] if expand else x.shape[1] // samples
    outer, inner = x.shape[0], x.shape[2]
    z = _numbers_of(x, law, examples, samples, (origin, sample_ids, samples, stream, first_example, positions, share))
    x = x.view(outer, 1, examples, inner) if expand else x.reshape(outer, samples, examples, inner)
    y = x.to(z.dtype) * (1 + std * z) if multiply else x.to(z.dtype) + std * z
    return y.to(x.dtype).reshape(outer, samples * examples, inner).contiguous()


def real_noise_sum(
    dy: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    positions: int,
    share: int,
    law: int,
    std: float,
) -> Tensor:
    """The gradient of an expanding, multiplying :func:`real_noise`: dx = sum over the noise samples of (1 + std * z) * dy, [O, B, I]."""
    z = _numbers_of(dy, law, dy.shape[1] // samples, samples, (origin, sample_ids, samples, stream, first_example, positions, share))
    return (dy.reshape(z.shape).to(z.dtype) * (1 + std * z)).sum(1).to(dy.dtype).contiguous()


def multinomial(
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    examples: int,
    bounds: Tensor,
    draws: int,
) -> Tensor:
    """How often each of F features comes up in ``draws`` draws: counts int32 [K, B, F].

    Args:
        origin, sample_ids, samples: as in :func:`noise`.
        bounds: int64 [F], or [K, F] for each sample: the features' probabilities summed up, times 2^32 (the last is 2^32). A word draws the
            first feature whose bound is above it.
        draws: draw j takes word j % 4 of group j // 4.
    """
    words = draw_words(origin, sample_ids, samples, stream, first_example, examples, draws)  # [K, B, draws]
    features = bounds.shape[-1]
    drawn = torch.searchsorted(bounds.expand(samples, features).contiguous(), words.flatten(1).contiguous(), right=True).view(words.shape)
    counts = torch.zeros(samples, examples, features, dtype=torch.int32, device=bounds.device)
    return counts.scatter_add_(2, drawn, torch.ones_like(drawn, dtype=torch.int32))


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """The type of computations: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def logmeanexp(l: Tensor, alpha: float) -> Tensor:
    """The bound L = (1/alpha) (logsumexp_s(alpha l_s) - log S) over the first dimension (eq 4 for alpha = 1).

    alpha = 0 is the limit, the mean; alpha = inf is the largest. Differentiable any number of times, with softmax_s(alpha l_s) as
    its gradient; log1p and expm1 keep it exact for small alpha. Where every l is -inf, so is L, and the gradient is 1/S; where some are
    +inf, so is L, and they share the gradient.
    """
    if l.shape[0] == 1:
        return l[0]
    if alpha == 0:
        return l.mean(0)
    most = l.detach().amax(0)
    if alpha == float("inf"):
        return torch.where(most.isnan() | most.isneginf(), l.mean(0), l.gather(0, l.detach().argmax(0, keepdim=True))[0])
    dead, certain = most == -float("inf"), most == float("inf")
    below = torch.where(dead | certain, torch.zeros_like(l), l - most)
    largest = torch.where(l.detach() == most, l, torch.zeros_like(l)).sum(0) / (l.detach() == most).sum(0)
    finite = torch.where(certain, torch.zeros_like(most), most) + torch.log1p(torch.expm1(alpha * below).mean(0)) / alpha
    return torch.where(certain, largest, torch.where(dead, l.mean(0), finite))


def importance_weights(l: Tensor, alpha: float) -> Tensor:
    """w = softmax_s(alpha l_s) over the first dimension (eq 8 for alpha = 1); equal where alpha = 0 or every l is -inf, and among those
    that are +inf."""
    samples = l.shape[0]
    if alpha == 0 or samples == 1:
        return torch.full_like(l, 1 / samples)
    most = l.amax(0)
    if alpha == float("inf"):
        first = torch.arange(samples, device=l.device).view(-1, *[1] * (l.dim() - 1)) == l.argmax(0)
        return torch.where(most.isnan(), most, torch.where(most.isneginf(), 1 / samples, first.to(l.dtype)))
    e = torch.where(l == most, torch.ones_like(l), torch.exp(alpha * (l - most)))  # also of infinities
    return e / e.sum(0)


def unit_log_likelihood(u: Tensor, c: Tensor) -> Tensor:
    """l = u / c of units [..., units] with outer weights c [units] of any sign.

    Without any weight u is 0, or NaN. Terms that are not 0 and add up to 0 have no log-likelihood: NaN. An infinite weight makes the
    loss infinite, as torch's: not the NaN of inf / inf.
    """
    # Factors, so that derivatives are NaN, too, and no others are.
    u = u * torch.where((c == 0) & (u != 0), float("nan"), 1.0)
    return u * torch.where(c.isinf(), c, 1.0) / torch.where((c != 0) & ~c.isinf(), c, 1.0)


def costs(outer: Tensor, bound: Tensor) -> Tensor:
    """-outer * bound of each unit: 0, not 0 * infinity, where the weight is 0."""
    return torch.where((outer == 0) & ~bound.isnan(), 0, -outer * bound)


def total_of(d: Tensor) -> Tensor:
    """The denominator of a mean: the sum of d, or the smallest number there is where terms that are not 0 add up to 0."""
    total = d.sum()
    return torch.where((total == 0) & (d != 0).any(), 5e-324 if d.dtype == torch.float64 else 1.4e-45, total)


def reciprocal(denominator: Tensor) -> Tensor:
    """1 / denominator; 0 where nothing counts, and infinite, as torch's 1 / 0, where the weights of what counts add up to 0."""
    return torch.where(denominator == 0, 0, 1 / denominator)


def check_signs(c: Tensor) -> Tensor:
    """Raises where positions of one example, with outer weights c [B, T], are of both signs: they cannot share importance weights.

    Returns c; inside of vmap, which cannot raise by values, NaN stands for the weights of such examples.
    """
    both = (c > 0).any(1) & (c < 0).any(1)
    compiling = torch.compiler.is_compiling()
    functorch, x = torch._C._functorch, both
    while not compiling and functorch.is_functorch_wrapped_tensor(x):  # the compiler cannot trace this call
        if functorch.is_batchedtensor(x):
            return torch.where(both[:, None], float("nan"), c)
        x = functorch.get_unwrapped(x)
    if compiling or c.device.type != "cpu":
        torch._assert_async(~both.any(), "example_weight, weight: expected positions of one sign in each example at level='example'")
    elif both.any():
        raise ValueError(
            f"example_weight, weight, target: expected positions of one sign in example {int(both.nonzero()[0])}, as at level='example' "
            "they share importance weights, got weights of both signs. Rewards of positions take level='position', with reduction='sum' or "
            "normalizer="
        )
    return c


def check_cancelled(c: Tensor, size: Tensor) -> None:
    """Raises where the outer weight of a unit, of c [B, units], is 0, and the terms of its sum, of size [B, units], are not."""
    wrong = ((c == 0) & (size != 0)).any(1).nonzero()
    if len(wrong):
        raise ValueError(
            f"example_weight, weight, target: expected weights that do not cancel in example {int(wrong[0])}, got some that are not 0 and "
            "add up to 0: no likelihood has such a weight. Rewards of positions take level='position', with reduction='sum' or normalizer="
        )


def check_labels(target: Tensor, ignore_index: int, classes: int) -> None:
    """Raises on the first class index of target [B, T] that is out of range."""
    wrong = ((target != ignore_index) & ((target < 0) | (target >= classes))).nonzero()
    if len(wrong):
        b, t = wrong[0].tolist()
        got = f"{int(target[b, t])} in example {b}"
        raise ValueError(f"target: expected class indices in [0, {classes}) or ignore_index {ignore_index}, got {got}")


class LossArguments(NamedTuple):
    """The arguments of the loss ops behind the logits [S*B, C, T], in the schema's order. The schema is made of them."""

    target: Tensor  # class indices int64 [B, T], or probabilities [B, C, T]
    samples: int | torch.SymInt  # S
    class_weight: Tensor | None = None  # v [C]
    example_weight: Tensor | None = None  # [B]
    position_weight: Tensor | None = None  # [B, T]
    normalizer: Tensor | None = None  # one value that takes the place of the sum of d
    ignore_index: int | torch.SymInt = -100
    smoothing: float = 0.0
    lse_square_scale: float = 0.0
    alpha: float = 1.0
    per_position: bool = False  # the unit that has importance weights of its own is the position, else the example
    reduction: int = 1  # 0 none, 1 mean, 2 sum


def log_sum_exp(logits: Tensor, a: LossArguments) -> tuple[Tensor, Tensor]:
    """log sum_c exp(z) of rows [S, B, T], and by what its square comes into the sum over the samples, before the denominator [B, T]:
    lse_square_scale |e m|, 0 where ignored.
    """
    acc = _accumulated(logits.dtype)
    batch, positions = logits.shape[0] // a.samples, logits.shape[2]
    strength = torch.full((batch, positions), a.lse_square_scale, dtype=acc, device=logits.device)
    if a.position_weight is not None:
        strength = strength * a.position_weight.abs()
    if a.example_weight is not None:
        strength = strength * a.example_weight.abs()[:, None]
    if a.target.dtype == torch.int64:
        counted = a.target != a.ignore_index
        strength = torch.where(counted, strength, 0)
        # Replaced here: an ignored row of NaN that is replaced behind the logarithm would have a derivative of NaN.
        logits = torch.where(counted.repeat(a.samples, 1)[:, None], logits, 0)
    return torch.logsumexp(logits.to(acc), 1).view(a.samples, batch, positions), strength


def iw_cross_entropy(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The importance weighted cross-entropy and its gradient (eq 4, 7 and 8), see :func:`iwsgd_ext.iw_cross_entropy`.

    Args:
        logits: [S*B, C, T].
        arguments: those of :class:`LossArguments`, one by one, and whether the gradient is wanted.

    Returns:
        loss (one value, or [units]), log-likelihoods [S, units], importance weights [S, units], bound L [units], outer
        weight over the denominator [units] (loss = -sum outer L, and lse_square_scale's part), and dlogits [S*B, C, T] (or [0]) for an
        upstream gradient of one.
    """
    *given, need_gradient = arguments
    a = LossArguments(*given)
    target, samples, smoothing = a.target, a.samples, a.smoothing
    acc = _accumulated(logits.dtype)
    rows, classes, positions = logits.shape
    batch = rows // samples
    if target.dtype == torch.int64 and not need_gradient and torch._C._are_functorch_transforms_active():
        # Replaced before the softmax: an ignored row of NaN that is replaced behind it would have a derivative of NaN.
        logits = torch.where((target != a.ignore_index).repeat(samples, 1)[:, None], logits, 0)
    # along the last dimension, where torch adds up in several partial sums
    log_p = torch.log_softmax(logits.to(acc).transpose(1, 2), 2).transpose(1, 2).contiguous().view(samples, batch, classes, positions)
    v = torch.ones(classes, dtype=acc, device=logits.device) if a.class_weight is None else a.class_weight
    m = torch.ones(batch, positions, dtype=acc, device=logits.device) if a.position_weight is None else a.position_weight
    e = torch.ones(batch, dtype=acc, device=logits.device) if a.example_weight is None else a.example_weight

    looks = logits.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()

    # q v = hot (at the label) + soft (everywhere), [B, C, T]
    soft = None if smoothing == 0 else (smoothing / classes * v)[:, None].expand(batch, classes, positions)
    if target.dtype == torch.int64:
        counted = target != a.ignore_index
        label = torch.where(counted, target, 0)
        if looks:
            check_labels(target, a.ignore_index, classes)
        d = torch.where(counted, v[label], 0)
        hot = (1 - smoothing) * d
        u = hot * log_p.gather(2, label.expand(samples, batch, positions)[:, :, None])[:, :, 0]
        c = hot
    else:
        counted = torch.ones(batch, positions, dtype=torch.bool, device=logits.device)
        soft = ((1 - smoothing) * target + smoothing / classes) * v[:, None]
        d = torch.ones(batch, positions, dtype=acc, device=logits.device)
        hot, u, c = None, 0, 0
    size = 0 if hot is None else hot.abs()  # of the terms of c
    if soft is not None:
        u = u + (soft * log_p).sum(2)
        c = c + soft.sum(1)
        size = size + soft.abs().sum(1)
    zero = torch.zeros((), dtype=acc, device=logits.device)
    u, c, d = torch.where(counted, m * u, zero), torch.where(counted, m * c, zero), torch.where(counted, m * d * e[:, None], zero)
    size = torch.where(counted, m * size, zero).abs()
    if looks:
        check_cancelled(c, size) if a.per_position else check_cancelled(c.sum(1, keepdim=True), size.sum(1, keepdim=True))
    if not a.per_position and positions > 1 and samples > 1 and a.alpha != 0:
        c = check_signs(c)

    if a.per_position:
        outer, l = c.flatten(), u.flatten(1)
        outer_example = e.repeat_interleave(positions)
    else:
        outer, l = c.sum(1) / counted.sum(1).clamp(min=1), u.sum(2)
        outer_example = e
    l = unit_log_likelihood(l, outer)
    bound, w = logmeanexp(l, a.alpha), importance_weights(l, a.alpha)

    denominator = a.normalizer.reshape(()) if a.normalizer is not None else total_of(d) if a.reduction == 1 else zero + 1
    scale = reciprocal(denominator)
    outer = outer * outer_example * scale
    of_unit = costs(outer, bound)
    if a.lse_square_scale:
        lse, strength = log_sum_exp(logits, a)
        strength = strength * (scale / samples)
        penalty = (strength * lse.square()).sum(0)
        of_unit = of_unit + (penalty.flatten() if a.per_position else penalty.sum(1))
    loss = of_unit if a.reduction == 0 else of_unit.sum()
    if not need_gradient:
        return loss, l, w, bound, outer, logits.new_empty(0)
    inner = w.view(samples, batch, positions if a.per_position else 1) * (e[:, None] * scale)  # [S, B, T or 1]
    p = torch.exp(log_p)
    dlogits = c[:, None] * p
    if soft is not None:
        dlogits = dlogits - m[:, None] * soft
    if hot is not None:
        dlogits = dlogits - torch.zeros_like(p[0]).scatter_(1, label[:, None], (m * hot)[:, None])
    dlogits = inner[:, :, None] * dlogits
    if a.lse_square_scale:
        dlogits = dlogits + (2 * strength * lse)[:, :, None] * p
    dlogits = torch.where(counted[:, None], dlogits, zero)
    return loss, l, w, bound, outer, dlogits.view(rows, classes, positions).to(logits.dtype)


def iw_cross_entropy_(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    """:func:`iw_cross_entropy` with its gradient written over the logits, and without it among the results."""
    *results, dlogits = iw_cross_entropy(logits, *arguments, True)
    logits.copy_(dlogits)
    return tuple(results)
