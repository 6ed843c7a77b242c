"""The loss op: softmax cross-entropy, log-mean-exp over noise samples, importance weights and gradient in one pass."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from .. import backend, reference
from ..checks import REDUCTIONS, as_samples, check, check_inplace, check_logits, check_loss_options, check_mean, check_number, check_option
from ..reference import LossArguments
from ..stats import IWStats
from . import transforms

Reduction = Literal["none", "mean", "sum"]
Level = Literal["example", "position"]

_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int | torch.SymInt: "SymInt", int: "int", float: "float", bool: "bool"}
_ARGUMENTS = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in LossArguments.__annotations__.items())
_RESULTS = "Tensor loss, Tensor log_p, Tensor weights, Tensor bound, Tensor outer"


def _fake_in_place(logits, *arguments):
    a = LossArguments(*arguments)
    acc = torch.promote_types(logits.dtype, torch.float32)
    batch = logits.shape[0] // a.samples
    units = batch * logits.shape[2] if a.per_position else batch
    loss = logits.new_empty((units,) if a.reduction == 0 else (), dtype=acc)
    return (
        loss,
        logits.new_empty((a.samples, units), dtype=acc),
        logits.new_empty((a.samples, units), dtype=acc),
        logits.new_empty((units,), dtype=acc),
        logits.new_empty((units,), dtype=acc),
    )


def _fake(logits, *arguments):
    *arguments, need_gradient = arguments
    return *_fake_in_place(logits, *arguments), torch.empty_like(logits) if need_gradient else logits.new_empty(0)


def _derivative(gradients, others, kept):
    """Of the loss alone: the statistics are detached."""
    (dloss, *_), (*arguments, need_gradient), (dlogits,) = gradients, others, kept
    if not need_gradient:
        raise RuntimeError("iw_cross_entropy: this graph was exported without gradients: logits did not require grad then")
    result = _scale(dlogits.detach(), dloss, LossArguments(*arguments).samples)
    return _NoSecondDerivative.apply(result, dloss, dlogits) if torch.is_grad_enabled() else result


_SCHEMA = f"(Tensor logits, {_ARGUMENTS}, bool need_gradient) -> ({_RESULTS}, Tensor dlogits)"
backend.define("iw_cross_entropy", _SCHEMA, _fake, _derivative, keeps=1)
backend.define("iw_cross_entropy_", f"(Tensor(a!) logits, {_ARGUMENTS}) -> ({_RESULTS})", _fake_in_place)
backend.define("iw_cross_entropy_scale_", "(Tensor(a!) dlogits, Tensor factor) -> ()", lambda *_: None)


class _IWCrossEntropy(torch.autograd.Function):
    """loss, log_p, weights, bound, outer weight of logits [S*B, C, ...], and an anchor; saves dlogits for an upstream gradient of one."""

    @staticmethod
    def forward(ctx, logits: Tensor, a: LossArguments, inplace: bool, process_group):
        need_gradient = ctx.needs_input_grad[0]
        # A view that autograd tracks could not be unpacked after a change in place. Compilers see to that themselves, and torch 2.13's
        # inductor reads behind logits with gaps that are detached and changed (test_compile_loss.py).
        rows = with_positions(logits if torch.compiler.is_compiling() else logits.detach())
        if inplace and need_gradient and not backend.is_exporting():
            results, dlogits = backend.op("iw_cross_entropy_", logits.device)(rows, *a), rows
            torch.autograd.graph.increment_version(logits)
        else:
            *results, dlogits = backend.op("iw_cross_entropy", logits.device)(rows, *a, need_gradient)
        loss, log_p, weights, bound, outer = results
        if process_group is not None:
            # Equal numbers of samples on all ranks: the bound is the log-mean-exp of the ranks' bounds, and a rank's weights are
            # those among its own samples times the rank's share.
            ranks = [torch.empty_like(bound) for _ in range(process_group.size())]
            torch.distributed.all_gather(ranks, bound, group=process_group)
            bounds = torch.stack(ranks)
            share = reference.importance_weights(bounds, a.alpha)[process_group.rank()]
            bound, weights = reference.logmeanexp(bounds, a.alpha), weights * share
            loss = reference.costs(outer, bound)
            loss = loss if a.reduction == 0 else loss.sum()
            if need_gradient:
                dlogits = _scale(dlogits, share, a.samples, out=dlogits)
        ctx.mark_non_differentiable(log_p, weights, bound, outer)
        ctx.set_materialize_grads(False)
        # The anchor is an output that nobody else sees. It leads a second derivative to the graph behind the logits.
        anchor = loss.new_empty(0) if need_gradient and not torch.compiler.is_compiling() else None
        if need_gradient:
            ctx.save_for_backward(dlogits, anchor)
            ctx.samples, ctx.per_unit, ctx.shape = a.samples, a.reduction == 0, logits.shape
        return loss, log_p, weights, bound, outer, anchor

    @staticmethod
    def backward(ctx, dloss: Tensor | None, *_):
        if dloss is None:
            return None, None, None, None
        dlogits, anchor = ctx.saved_tensors
        factor = dloss.detach()
        # A retained graph needs its dlogits again; a compiler joins the product with what follows.
        once = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
        if once and not ctx.per_unit and _is_dense(dlogits) and backend.backend_of(dlogits.device) != "reference":
            # The device alone reads the factor, and does nothing where it is 1, which it mostly is: no pass over memory, no wait.
            backend.op("iw_cross_entropy_scale_", dlogits.device)(dlogits, factor)
        else:
            dlogits = _scale(dlogits, factor, ctx.samples, out=dlogits if once else None)
        result = dlogits.view(ctx.shape)
        if torch.is_grad_enabled():  # else a second derivative would be zero in silence
            result = _NoSecondDerivative.apply(result, dloss, anchor)
        return result, None, None, None


def _is_dense(x: Tensor) -> bool:
    """True where the elements fill their memory without gaps, in any order."""
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) == x.numel() - 1


def _scale(dlogits: Tensor, factor: Tensor, samples: int, out: Tensor | None = None) -> Tensor:
    """dlogits [S*B, C, T] times a factor [], per example [B] or per position [B*T], in the factor's precision, rounded once."""
    rows = dlogits.unflatten(0, (samples, -1))
    batch, positions = rows.shape[1], rows.shape[3]
    # A factor without dimensions would be rounded to the type of dlogits first.
    factor = factor.view(1, 1, 1) if factor.dim() == 0 else factor.view(batch, 1, positions if factor.numel() == batch * positions else 1)
    if torch.compiler.is_compiling():
        return (rows * factor).to(rows.dtype).flatten(0, 1)
    out = torch.empty_like(rows) if out is None else out.unflatten(0, (samples, -1))
    return torch.mul(rows, factor, out=out).flatten(0, 1)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, *_: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "iw_cross_entropy has no second derivative. For one, take log-likelihoods from torch's own functions, e.g. "
            "-F.cross_entropy(logits, targets, reduction='none'), and iw_logmeanexp(log_p, samples), which has any number of derivatives."
        )


def with_positions(logits: Tensor) -> Tensor:
    """[S*B, C, T] with T = 1 where there are no positions; a view where the strides allow."""
    return logits.unsqueeze(2) if logits.dim() == 2 else logits.flatten(2) if logits.dim() > 3 else logits


class Options(TypedDict, total=False):
    """The loss's options but for ``return_stats``, for type checkers: what the function returns depends on that alone."""

    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    lse_square_scale: float
    alpha: float
    level: Level
    example_weight: Tensor | None
    normalizer: float | Tensor | None
    inplace: bool
    process_group: Any


@overload
def iw_cross_entropy(
    logits: Tensor, target: Tensor, samples: int, *, return_stats: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def iw_cross_entropy(
    logits: Tensor, target: Tensor, samples: int, *, return_stats: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, IWStats]: ...
@overload
def iw_cross_entropy(
    logits: Tensor, target: Tensor, samples: int, *, return_stats: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, IWStats]: ...
def iw_cross_entropy(
    logits: Tensor,
    target: Tensor,
    samples: int,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    alpha: float = 1.0,
    level: Level = "example",
    example_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    process_group: Any = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, IWStats]:
    r"""Importance weighted cross-entropy (Noh et al. 2017): the loss whose gradient weights S noise samples by their likelihoods.

    With the log-likelihood l[s, b] = log p(y_b | x_b, noise_s) of example b under noise sample s,

        L[b] = (1/alpha) (logsumexp_s(alpha l[s, b]) - log S)        the bound, eq 4
        w[s, b] = softmax_s(alpha l[s, b])                           importance weights, eq 8
        loss = - sum_b c[b] L[b] / N,    dloss = - sum_b c[b] / N sum_s w[s, b] dl[s, b]      eq 7

    For a position t with target distribution q (one-hot, or smoothed, or given) and class weights v: u[s, t] = sum_c q[c] v[c]
    log p[s, t, c], c[t] = sum_c q[c] v[c], and d[t] = v[y] for class indices, 1 for probabilities; an ignored position has u = c = d
    = 0. At ``level="position"`` every position has its own importance weights: l = u / c, outer weight c, and N is the sum of d. At
    ``level="example"`` an example's positions share them: outer weight cbar[b] = mean of c over its positions that are not ignored,
    l[s, b] = sum_t u[s, t] / cbar[b]. Without positions both levels are the same.

    Weights may be negative, as rewards and advantages are: the gradient then lowers the likelihood. Two kinds raise a ValueError on the
    CPU; on a GPU the first gives a loss of NaN and the second stops the kernel by an assertion: an outer weight whose terms are not 0
    and add up to 0, and, at level "example" with samples > 1, positions of both signs in one example, as these share importance weights.
    The mean takes no negative ``example_weight``, as their sum may be anything: give ``reduction="sum"``, or ``normalizer``, the number of
    labels. (Class weights of both signs are divided by their sum, as torch does.)

    With samples=1 this is :func:`torch.nn.functional.cross_entropy`, value and gradient, for every option, with three exceptions: where
    nothing counts (everything ignored, an empty batch), the mean's loss and gradient are 0 instead of NaN; reduction "none" at level
    "example" gives [B]; and terms that add up to an outer weight of 0 raise, as above.

    Args:
        logits: [S*B, C] or [S*B, C, d1, ...], float32, float64, bfloat16 or float16. Sample-major: row s*B + b. Any strides.
        target: class indices int64 (or uint8) [B] or [B, d1, ...], or class probabilities [B, C] or [B, C, d1, ...]. Not
            repeated over samples.
        samples: S, the number of noise samples of each example.
        weight: [C] class weights.
        ignore_index: class index of positions that do not count. Their logits get a gradient of exactly 0.
        reduction: "mean" (divided by the sum of d), "sum", or "none" ([B], or [B, d1, ...] at level "position").
        label_smoothing: e in [0, 1]: q becomes (1 - e) q + e / C.
        lse_square_scale: k >= 0, z-loss: k/S sum_s lse[s, t]^2, lse = log sum_c exp(logits), is added to the loss of every position that
            is not ignored, times the size of its ``example_weight``, before the division by N. It keeps logits small, outside of the
            importance weights and of the statistics; class weights play no part. With ``process_group`` it must be 0.
        alpha: 1 is IWSGD; 0 the plain mean over samples (eq 9, 10: multi-sample dropout); inf the best sample; in between, and
            above, a temperature on the likelihoods.
        level: "example" or "position", what has importance weights of its own.
        example_weight: [B], which multiplies outer weight and d; or [B, d1, ...], which multiplies u, c and d: rewards of positions
            belong to level "position". A position of weight 0 still counts in the mean of c; use ``ignore_index`` for padding.
        normalizer: N of the mean, instead of the sum of d: for gradient accumulation and data parallelism. A number or a tensor of one
            element.
        inplace: the gradient is written over ``logits``, which then must not be used again. Saves their size in memory.
        process_group: a torch.distributed group whose ranks hold ``samples`` noise samples each of the same examples (give
            ``iw.sampling`` one seed on all ranks, each rank its own ``sample_ids``, and ``first_example=0``). Loss and bound are those of
            all samples, on every rank; the gradient is that of the rank's own samples, so gradients of parameters must be summed over
            the ranks, not averaged. ``return_stats`` gives the rank's own samples' log-likelihoods and weights.
        return_stats: return (loss, :class:`IWStats`).

    Returns:
        The loss, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it, what was expected and what came.
        RuntimeError: on a second derivative (see :func:`iw_logmeanexp` for that).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> logits, target = torch.randn(4 * 8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> loss, stats = iw.iw_cross_entropy(logits, target, samples=4, return_stats=True)
        >>> loss.backward()
        >>> bool((stats.bound >= stats.mean_log_p).all()), tuple(stats.weights.shape)
        (True, (4, 8))
    """
    a = arguments_of(
        logits,
        target,
        samples,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        alpha=alpha,
        level=level,
        example_weight=example_weight,
        normalizer=normalizer,
    )
    samples, acc = a.samples, torch.promote_types(logits.dtype, torch.float32)
    if inplace:
        check_inplace(logits)
    if process_group is not None:
        instead = "0 with a process_group (add the squares of torch.logsumexp(logits, 1) to the loss)"
        check(lse_square_scale == 0, "lse_square_scale", instead, lse_square_scale)
    # NOTE [float16 gradients]
    # dlogits is made in forward, before the upstream gradient is known. Over a large denominator float16 would lose it (below 6e-8),
    # and a loss scale in the upstream gradient could not bring it back: so the denominator is left to backward too.
    late = logits.dtype == torch.float16 and reduction == "mean"
    denominator = denominator_of(a, acc) if late else None
    if late:
        a = a._replace(normalizer=None, reduction=REDUCTIONS.index("sum"))
    if samples == 1 and process_group is not None and process_group.size() > 1 and level == "example" and alpha != 0:
        reference.check_signs(position_weights_of(a, acc)[0])
    given = logits if torch.is_grad_enabled() else logits.detach()  # a Function does not know
    if transforms.active():  # any derivative, and lanes of any kind: in plain torch
        check(process_group is None and not inplace, "inplace, process_group", "neither inside of torch.func's transforms", "one")
        if a.target.dtype == torch.int64 and a.target.device.type == "cpu":
            reference.check_labels(transforms.plain(a.target).flatten(0, -2), a.ignore_index, logits.shape[1])
        loss, *statistics, _ = reference.iw_cross_entropy(with_positions(logits), *a, False)
        log_p, w, bound, outer = (v.detach() for v in statistics)
    else:
        loss, log_p, w, bound, outer, _ = backend.apply(_IWCrossEntropy, given, a, inplace, process_group)
    if denominator is not None:
        loss = loss * reference.reciprocal(denominator)
    shape = (target.shape[0], *logits.shape[2:]) if level == "position" else (target.shape[0],)
    if reduction == "none":
        loss = loss.view(shape)
    if not return_stats:
        return loss
    return loss, IWStats(log_p.view(samples, *shape), w.view(samples, *shape), bound.view(shape), (outer != 0).view(shape))


def arguments_of(
    logits,
    target,
    samples,
    *,
    weight,
    ignore_index,
    reduction,
    label_smoothing,
    lse_square_scale,
    alpha,
    level,
    example_weight,
    normalizer,
) -> LossArguments:
    """The op's arguments of what a user gave to :func:`iw_cross_entropy`, checked and in the precision of the loss."""
    check_loss_options(ignore_index, reduction, label_smoothing, lse_square_scale, alpha, level)
    samples = as_samples(samples)
    check(normalizer is None or reduction == "mean", "normalizer", "None unless reduction is 'mean'", f"one with {reduction!r}")
    check_logits(logits, target, samples)
    acc = torch.promote_types(logits.dtype, torch.float32)
    batch, classes, spatial = target.shape[0], logits.shape[1], tuple(logits.shape[2:])
    positions = math.prod(spatial)
    labels = not target.is_floating_point()
    target = target.reshape(batch, positions).long() if labels else target.reshape(batch, classes, positions).to(acc)
    weight = check_option("weight", weight, logits, acc, [(classes,)])
    example_weight = check_option("example_weight", example_weight, logits, acc, [(batch,), (batch, *spatial)])
    if example_weight is not None and reduction == "mean" and normalizer is None:
        check_mean(transforms.plain(example_weight))
    position_weight = None
    if example_weight is not None and example_weight.dim() > 1:
        example_weight, position_weight = None, example_weight.reshape(batch, positions)
    if normalizer is not None and not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer)
        check(normalizer >= 0, "normalizer", "a number >= 0, or a tensor of one element", normalizer)
        normalizer = torch.full((), normalizer, dtype=acc, device=logits.device)
    if normalizer is not None:
        check(normalizer.numel() == 1, "normalizer", "a number or a tensor of one element", f"shape {tuple(normalizer.shape)}")
        normalizer = normalizer.detach().to(device=logits.device, dtype=acc).reshape(())
    return LossArguments(
        target=target.contiguous(),
        samples=samples,
        class_weight=weight,
        example_weight=example_weight,
        position_weight=position_weight,
        normalizer=normalizer,
        ignore_index=int(ignore_index),
        smoothing=float(label_smoothing),
        lse_square_scale=float(lse_square_scale),
        alpha=float(alpha),
        per_position=level == "position",
        reduction=REDUCTIONS.index(reduction),
    )


def position_weights_of(a: LossArguments, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """c of positions [B, T], as the kernels have it, and whether they are not ignored."""
    if a.target.dtype == torch.int64:
        counted = a.target != a.ignore_index
        c = counted.to(acc)
        if a.class_weight is not None:
            v = (1 - a.smoothing) * a.class_weight[torch.where(counted, a.target, 0)]
            c = torch.where(counted, v + (a.smoothing * a.class_weight.mean() if a.smoothing else 0), 0)
    else:
        counted = torch.ones(a.target.shape[0], a.target.shape[2], dtype=torch.bool, device=a.target.device)
        q = (1 - a.smoothing) * a.target + a.smoothing / a.target.shape[1]
        c = q.sum(1) if a.class_weight is None else (q * a.class_weight[:, None]).sum(1)
    return c if a.position_weight is None else c * a.position_weight, counted


def denominator_of(a: LossArguments, acc: torch.dtype) -> Tensor:
    """The denominator of the mean: the normalizer, or the sum of d, as the kernels compute it."""
    if a.normalizer is not None:
        return a.normalizer
    if a.target.dtype == torch.int64:  # weights of the labels that are not ignored
        counted = a.target != a.ignore_index
        d = counted.to(acc) if a.class_weight is None else torch.where(counted, a.class_weight[torch.where(counted, a.target, 0)], 0)
    else:
        d = torch.ones(a.target.shape[0], a.target.shape[2], dtype=acc, device=a.target.device)
    d = d if a.position_weight is None else d * a.position_weight
    return reference.total_of(d if a.example_weight is None else d * a.example_weight[:, None])
