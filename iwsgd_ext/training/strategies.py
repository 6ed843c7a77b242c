"""``iw.backward``: the gradient of S noise samples, at a cost in memory or in time, or an estimate of it for less of both.

    batched     one pass over S*B rows
    loop        S passes over B rows, all graphs kept: the paper's Figure 1
    streamed    passes without a graph for the importance weights, then the same passes again, each with its graph and its weights
    resampled   passes without a graph for the importance weights, then one pass over samples drawn by them

All four compute log-likelihoods [S, units], and go backward through them from d loss / d log_p[s] = -outer w[s] / N (eq 7). Noise is a
function of its address, so that a second pass draws the same noise as the first.
"""

import warnings
import weakref
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from itertools import accumulate
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from typing_extensions import TypedDict, Unpack

from .. import reference
from ..checks import as_arguments, as_int, check, check_number, check_rows
from ..conversion.batch_norm import _PerSample
from ..conversion.converted import conversion_of
from ..conversion.pass_state import Buffers, Leaves, RandomState
from ..functional import dropout
from ..layers.context import _rank, current, sampling
from ..stats import IWStats
from .likelihood import _IWLoss
from .loss import IWCrossEntropyLoss

Strategy = Literal["batched", "streamed", "resampled", "loop"]
STRATEGIES = ("batched", "streamed", "resampled", "loop")
STREAM = 2**32 - 1  # the stream of a strategy's own draws; no layer takes it
DIGITS = 32  # binary digits of a uniform random number


class Options(TypedDict, total=False):
    """The options of :func:`backward` but for ``return_stats``, for type checkers: the type of its result depends on that alone."""

    strategy: Strategy
    chunk: int | None
    keep: int
    seed: int | Tensor | None
    first_example: int | Tensor | None
    grad_scale: float | Tensor | torch.amp.GradScaler | None


@overload
def backward(
    model: nn.Module,
    loss_fn: Any,
    inputs: Any,
    targets: Any,
    *,
    samples: int,
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def backward(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, *, samples: int, return_stats: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, IWStats]: ...
@overload
def backward(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, *, samples: int, return_stats: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, IWStats]: ...
def backward(
    model: nn.Module,
    loss_fn: Any,
    inputs: Any,
    targets: Any,
    *,
    samples: int,
    strategy: Strategy = "batched",
    chunk: int | None = None,
    keep: int = 1,
    seed: int | Tensor | None = None,
    first_example: int | Tensor | None = None,
    grad_scale: float | Tensor | torch.amp.GradScaler | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, IWStats]:
    """Forward and backward of one batch under S noise samples: gradients are added to ``.grad``, as ``loss.backward()`` adds them.

        loss = - sum_b c[b] L[b] / N,    dloss = - sum_b c[b] / N sum_s w[s, b] dl[s, b]      Noh et al. 2017, eq 4, 7, 8

    "batched", "streamed" and "loop" give the same loss and gradients up to rounding, for one seed. "resampled" gives the same loss and an
    unbiased estimate of the gradient: the mean of dl over ``keep`` samples drawn by w, for each example its own, replaces sum_s w[s] dl[s].

    Args:
        model: a converted model (``iw.convert``), or one whose noise layers are this package's (rows then expand at the first of them).
            Where all its modules are in eval mode it draws no noise, and every strategy is one pass of B rows.
        loss_fn: IWCrossEntropyLoss ("mean" or "sum"), IWLoss, or an object with ``log_likelihood(outputs, targets, samples)`` that returns
            log_p [K, units], outer weight [units] and denominator []; its ``alpha``, if it has one, is that of the bound.
        inputs: the model's inputs: a tensor, a tuple or list of arguments, or a dict of them by name.
        targets: the loss's arguments after the outputs, likewise; e.g. ``{"target": y, "normalizer": n}``.
        samples: S, instead of the model's own and the loss's.
        strategy: "batched", "streamed", "resampled" or "loop".
        chunk: samples of one pass of "streamed" (default 1), or of the first pass of "resampled" (default S); it need not divide S.
        keep: samples drawn for each example, with replacement, for "resampled"; may exceed S.
        seed: seed of the noise, an int or an int64 tensor of one element; None draws one from torch's default generator, for all passes.
        first_example: id of the batch's first example, see :class:`iwsgd_ext.sampling`.
        grad_scale: a factor of the gradients (not of the returned loss): a number, a tensor of one element, or a GradScaler.
        return_stats: True returns (loss, :class:`IWStats`), of [S, units] for a loss_fn that is no IWCrossEntropyLoss.

    Returns:
        The loss, detached.

    Raises:
        ValueError, TypeError: an argument is not as above; a sampling context is open around the call; a BatchNorm would normalise other
            rows than in "batched"; in a strategy of several passes, the model changes its inputs in place; with "resampled", the model
            draws noise that is not this package's, or the units of the loss are not the examples.

    Warns:
        UserWarning: ``seed`` is given, and a strategy of several passes saw the model draw noise that is not this package's.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), iw.IWDropout(0.5), nn.Linear(8, 3))
        >>> x, y, gradients = torch.randn(5, 4), torch.randint(3, (5,)), []
        >>> for strategy in ("batched", "streamed"):
        ...     model.zero_grad()
        ...     loss = iw.backward(model, iw.IWCrossEntropyLoss(64), x, y, samples=64, strategy=strategy, seed=1)
        ...     gradients.append(model[0].weight.grad)
        >>> torch.allclose(*gradients, atol=1e-5)
        True
    """
    check(isinstance(strategy, str) and strategy in STRATEGIES, "strategy", f"one of {', '.join(STRATEGIES)}", repr(strategy))
    sampling(samples, seed=seed, first_example=first_example)  # checks them
    samples, chunk, keep = as_int("samples", samples), None if chunk is None else as_int("chunk", chunk), as_int("keep", keep)
    _check_counts(strategy, samples, chunk, keep)
    _check_loss(loss_fn)
    if isinstance(grad_scale, Tensor):
        check(grad_scale.numel() == 1, "grad_scale", "a tensor of one element", f"shape {tuple(grad_scale.shape)}")
    elif grad_scale is not None and not isinstance(grad_scale, torch.amp.GradScaler):
        check_number("grad_scale", grad_scale)
    if current() is not None:
        raise ValueError(
            "iw.backward opens its own sampling context, but one is open here; give samples, seed and first_example to the call"
        )
    if not any(module.training for module in model.modules()):
        samples = 1  # no noise: all samples are alike
    if samples == 1 or (strategy == "streamed" and chunk == samples):
        strategy = "batched"  # one pass has all samples
    if isinstance(loss_fn, IWCrossEntropyLoss):
        loss_fn = copy(loss_fn)
        loss_fn.samples = samples
    step = _Step(model, loss_fn, inputs, targets, samples, strategy, seed, first_example, grad_scale)
    check(
        strategy != "resampled" or not step.penalised,
        "lse_square_scale",
        "0 with strategy='resampled', which goes backward through the kept samples alone ('batched', 'streamed' and 'loop' take it)",
        getattr(loss_fn, "lse_square_scale", 0),
    )
    fused = strategy == "batched" and type(loss_fn) is IWCrossEntropyLoss
    if fused:
        loss, stats = step.fused()
    elif strategy == "batched":
        loss, stats = step.batched()
    elif strategy == "loop":
        loss, stats = step.loop()
    elif strategy == "streamed":
        loss, stats = step.streamed(chunk or 1)
    else:
        loss, stats = step.resampled(chunk or samples, keep)
    if seed is not None and step.states and not step.states[0].is_current():
        warnings.warn(
            "seed: the model also drew torch's random numbers, which a seed given here does not repeat (torch.manual_seed does); "
            "iw.audit(model) lists such noise, and iw.convert swaps most of it",
            stacklevel=2,
        )
    if not fused:  # the fused strategy calls the loss, which calls its observers itself
        for observe in getattr(loss_fn, "observers", ()):
            observe(stats)
    return (loss, stats) if return_stats else loss


def _check_counts(strategy: str, samples: int, chunk: int | None, keep: int) -> None:
    check(chunk is None or 1 <= chunk <= samples, "chunk", f"a number of samples in 1 .. samples={samples}", chunk)
    check(chunk is None or strategy in ("streamed", "resampled"), "chunk", f"None with strategy={strategy!r}", chunk)
    check(keep >= 1, "keep", "an integer >= 1", keep)
    check(keep == 1 or strategy == "resampled", "keep", f"1 with strategy={strategy!r}", keep)


def _check_loss(loss_fn: Any) -> None:
    if not hasattr(loss_fn, "log_likelihood"):
        raise TypeError(f"loss_fn: expected IWCrossEntropyLoss, IWLoss or an object with log_likelihood, got {type(loss_fn).__name__}")
    if isinstance(loss_fn, _IWLoss):
        loss_fn.check_options()
    if isinstance(loss_fn, IWCrossEntropyLoss):
        check(loss_fn.reduction != "none", "loss_fn", "reduction 'mean' or 'sum', one number to go backward from", "'none'")
        own = [getattr(type(loss_fn), name) is not getattr(IWCrossEntropyLoss, name) for name in ("log_likelihood", "penalty")]
        fits = not loss_fn.lse_square_scale or own != [True, False]
        expected = "0, or a class that overrides penalty, too, where it overrides log_likelihood"
        check(fits, "lse_square_scale", expected, f"{type(loss_fn).__name__}, which overrides log_likelihood alone")
        group = loss_fn.process_group
        check(group is None, "loss_fn", "process_group=None (samples over ranks: call the loss inside iw.sampling(sample_ids=...))", group)


class Pass(NamedTuple):
    """One forward under some of the noise samples."""

    log_p: Tensor  # [K, units]
    penalty: Tensor | None  # []: its part of what the loss has outside of the bound


class _Step:
    """One call of ``backward``: its arguments, the passes, and the strategies that are made of these."""

    def __init__(self, model, loss_fn, inputs, targets, samples: int, strategy: str, seed, first_example, grad_scale):
        self.model, self.loss_fn, self.inputs, self.targets, self.samples = model, loss_fn, as_arguments(inputs), targets, samples
        self.strategy, self.first_example, self.grad_scale = strategy, first_example, grad_scale
        self.penalised = isinstance(loss_fn, IWCrossEntropyLoss) and loss_fn.lse_square_scale > 0
        self.given = [v for v in tree_leaves((self.inputs, targets)) if isinstance(v, Tensor) and not v.is_inference()]
        self.versions = [v._version for v in self.given]
        # one seed for all passes
        self.origin = sampling(samples, seed=seed, first_example=first_example).origin_for(tree_leaves(self.inputs), model)
        self.device = self.origin.device
        self.states: list[RandomState] = []  # before each first pass

    # Passes

    def outputs(self, samples: int, ids: Tensor | None = None) -> Any:
        """The model's outputs under the noise samples ``ids``, [K] or [K, B]; None is 0 .. K-1."""
        context = sampling(samples, sample_ids=ids, first_example=self.first_example)
        context._origin = self.origin
        args, named = self.inputs
        with context:
            return self.model(*args, **named)

    def log_likelihood(self, samples: int, ids: Tensor | None = None) -> Pass:
        """One pass. Outer weight and denominator, the same for every pass, are kept."""
        outputs = self.outputs(samples, ids)
        terms = self.loss_fn.log_likelihood(outputs, self.targets, samples)
        if not isinstance(terms, tuple) or len(terms) != 3:
            raise TypeError(f"loss_fn: expected log_likelihood to return (log_p, outer weight, denominator), got {type(terms).__name__}")
        log_p, outer, denominator = terms
        if log_p.dim() != 2 or log_p.shape[0] != samples or outer.shape != log_p.shape[1:]:
            got = f"{tuple(log_p.shape)} and {tuple(outer.shape)}"
            raise ValueError(f"loss_fn: expected log_likelihood to return log_p [{samples}, units] and outer weight [units], got {got}")
        self.outer, self.denominator = outer.detach(), torch.as_tensor(denominator, dtype=log_p.dtype, device=log_p.device).detach()
        if not self.penalised:
            return Pass(log_p, None)
        part = self.loss_fn.penalty(outputs, self.targets, samples) * (samples / self.samples)
        return Pass(log_p, part * reference.reciprocal(self.denominator))

    def first_pass(self, start: int, chunk: int, copies: "Buffers") -> Pass:
        """The samples from ``start`` on. First passes, in the samples' order, write the model's buffers.

        A BatchNorm with joint statistics is before all noise here, so that it gets the same rows in each pass: only the first pass writes
        its buffers, as one pass over all samples would.
        """
        self.states.append(RandomState(self.device))
        joint = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, _PerSample)]
        with copies.used(joint) if start else self.batch_norm_watched():
            result = self.log_likelihood(*self.samples_from(start, chunk))
        if [v._version for v in self.given] != self.versions:
            raise ValueError(f"inputs: strategy={self.strategy!r} reads them again, but the model or the loss changes them in place")
        return result

    def samples_from(self, start: int, chunk: int) -> tuple[int, Tensor]:
        """(number of the samples from ``start`` on, at most ``chunk``; their ids)."""
        end = min(start + chunk, self.samples)
        return end - start, torch.arange(start, end, device=self.device)

    @contextmanager
    def batch_norm_watched(self):
        """A block in which a BatchNorm raises where its statistics would be those of other rows than in one pass over all samples."""
        resampled = self.strategy == "resampled"
        names = {m: name for name, m in self.model.named_modules() if isinstance(m, _BatchNorm)}
        conversions = ((m, conversion_of(m)) for m in self.model.modules())
        on_axis = {inner for m, conversion in conversions if conversion and conversion.expand == "axis" for inner in m.modules()}

        def is_noisy(module: nn.Module, args: tuple, context: sampling) -> bool:
            if module in on_axis:  # (a pass of one sample has no axis)
                return context.stream > 0 if context.axis is None else context.axis.holds(args[0])
            return context.stream > 0 or context.expand == "none"

        def refuse(module: nn.Module, args: tuple) -> None:
            context = current()
            of_batch = module.training or module.running_mean is None
            if of_batch and context is not None and is_noisy(module, args, context):
                raise ValueError(
                    f"strategy={self.strategy!r}: the BatchNorm {names[module]!r} normalises noisy rows by their own statistics, and here "
                    "these would be of other rows than in 'batched'. Convert the model with batch_norm='frozen'"
                    + (", or take 'streamed' and batch_norm='per_sample'" if resampled else " or 'per_sample'")
                )

        hooks = [m.register_forward_pre_hook(refuse) for m in names if resampled or not isinstance(m, _PerSample)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def terms(self, passes: Sequence[Pass]) -> tuple[Tensor, Tensor, IWStats]:
        """Of all samples: loss [], its derivative with respect to log_p [S, units], and the statistics."""
        log_p = torch.cat([p.log_p.detach() for p in passes])
        alpha = getattr(self.loss_fn, "alpha", 1.0)
        bound, weights = reference.logmeanexp(log_p, alpha), reference.importance_weights(log_p, alpha)
        outer = self.outer * reference.reciprocal(self.denominator)
        loss = reference.costs(outer, bound).sum()
        if self.penalised:
            loss = loss + torch.stack([p.penalty.detach() for p in passes]).sum()
        shape = _unit_shape(self.loss_fn, *as_arguments(self.targets)) if type(self.loss_fn) is IWCrossEntropyLoss else bound.shape
        return loss, -outer * weights, IWStats(*(v.unflatten(-1, shape) for v in (log_p, weights, bound, outer != 0)))

    def scaled(self, gradient: Tensor) -> Tensor:
        scale = self.grad_scale
        if isinstance(scale, torch.amp.GradScaler):
            return scale.scale(gradient)
        if isinstance(scale, Tensor):
            scale = scale.detach().reshape(()).to(gradient.dtype)
        return gradient if scale is None else gradient * scale

    def go_backward(self, passes: Sequence[Pass], gradients: Sequence[Tensor]) -> None:
        """From log-likelihoods, with their gradients before ``grad_scale``, and from penalties."""
        pairs = [(p.log_p, self.scaled(g)) for p, g in zip(passes, gradients, strict=True)]
        pairs += [(p.penalty, self.scaled(torch.ones_like(p.penalty))) for p in passes if p.penalty is not None]
        if self.strategy in ("loop", "streamed"):  # a sample may leave out all that depends on a parameter (layer drop)
            pairs = [pair for pair in pairs if pair[0].requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))

    # Strategies: (loss, statistics)

    def fused(self) -> tuple[Tensor, IWStats]:
        """The "batched" strategy, by the op that computes loss and gradient at once."""
        args, named = as_arguments(self.targets)
        criterion = copy(self.loss_fn)
        criterion.samples, criterion.training, criterion.return_stats = self.samples, True, True
        outputs, target = self.outputs(self.samples), args[0] if args else named.get("target")
        if all(isinstance(v, Tensor) and v.dim() for v in (outputs, target)):
            check_rows("outputs", len(outputs), self.samples, len(target))  # the loss alone would take B rows for an evaluation
        loss, stats = criterion(outputs, *args, **named)
        self.scaled(loss).backward()
        return loss.detach(), stats

    def batched(self) -> tuple[Tensor, IWStats]:
        result = self.log_likelihood(self.samples)
        loss, dlog_p, stats = self.terms([result])
        self.go_backward([result], [dlog_p])
        return loss, stats

    def loop(self) -> tuple[Tensor, IWStats]:
        copies = Buffers(self.model)
        passes = [self.first_pass(s, 1, copies) for s in range(self.samples)]
        loss, dlog_p, stats = self.terms(passes)
        self.go_backward(passes, dlog_p.split(1))
        return loss, stats

    def streamed(self, chunk: int) -> tuple[Tensor, IWStats]:
        copies, leaves = Buffers(self.model), Leaves()
        self.inputs, self.targets = leaves.of(self.inputs), leaves.of(self.targets)
        no_sync = getattr(self.model, "no_sync", nullcontext)  # DistributedDataParallel's: ranks add gradients once, in the last backward
        *starts, last = range(0, self.samples, chunk)
        with torch.no_grad():
            passes = [self.first_pass(start, chunk, copies) for start in starts]
        torch.clear_autocast_cache()  # where torch has not pytorch#165068: casts of weights that were made without a graph
        with no_sync():
            of_last = self.first_pass(last, chunk, copies)  # with its graph: it need not be replayed
            loss, dlog_p, stats = self.terms([*passes, of_last])
            *gradients, gradient = dlog_p.split(chunk)
            counts = torch.stack([(d != 0).any() | self.penalised for d in dlog_p.split(chunk)])
            *counts, last_counts = counts.tolist()  # the one wait for the device
            if last_counts or not any(counts):
                self.go_backward([of_last], [gradient])
            del of_last
        if no_sync is not nullcontext:
            counts[-1] = True
        replays = [i for i, weighs in enumerate(counts) if weighs]
        after = RandomState(self.device)
        try:
            with copies.used():
                for i in replays:
                    self.states[i].restore()
                    with nullcontext() if i == replays[-1] else no_sync():
                        self.go_backward([self.log_likelihood(*self.samples_from(starts[i], chunk))], [gradients[i]])
        finally:
            after.restore()
        leaves.pass_on()
        return loss, stats

    def resampled(self, chunk: int, keep: int) -> tuple[Tensor, IWStats]:
        copies = Buffers(self.model)
        with torch.no_grad():
            passes = [self.first_pass(start, chunk, copies) for start in range(0, self.samples, chunk)]
        torch.clear_autocast_cache()  # where torch has not pytorch#165068: casts of weights that were made without a graph
        if not self.states[0].is_current():
            raise ValueError(
                "strategy='resampled': the model drew torch's random numbers, which a second pass cannot draw again; see iw.audit"
            )
        loss, dlog_p, stats = self.terms(passes)
        if stats.bound.dim() > 1:
            raise ValueError("strategy='resampled': expected a loss of level='example', as an example keeps one noise sample whole")
        ids = self.drawn(stats.weights, keep)
        with copies.used():
            kept = self.log_likelihood(keep, ids)
        self.check_kept(stats.log_p, kept.log_p.detach(), ids)
        # The sum over s of w is 1, or NaN where it should be seen.
        self.go_backward([kept], [(dlog_p.sum(0) / keep).expand_as(kept.log_p)])
        return loss, stats

    def check_kept(self, first: Tensor, kept: Tensor, ids: Tensor) -> None:
        """Raises, in a model's first step, where an example's log-likelihood under a sample depends on the samples of other examples."""
        if self.model in _kept_alike:
            return
        expected = first.gather(0, ids)
        spread = (first.amax(0) - first.amin(0)).mean()
        off, finite = (kept - expected).abs(), expected.isfinite() & kept.isfinite()
        half = torch.is_autocast_enabled(self.device.type) or any(p.dtype.itemsize == 2 for p in self.model.parameters())
        if bool(off[finite].mean() > (0.1 if half else 1e-3) * spread + 1e-4 * expected[finite].abs().mean()):
            raise ValueError(
                "strategy='resampled': expected a model that treats each row by itself, but the log-likelihoods of examples change with "
                "the noise samples of the other examples in the batch; 'batched', 'streamed' and 'loop' are right for it"
            )
        _kept_alike.add(self.model)

    def drawn(self, weights: Tensor, keep: int) -> Tensor:
        """Ids [keep, B] of samples drawn by their weights [S, B]: the first whose cumulative weight exceeds a uniform random number."""
        examples = weights.shape[1]
        ones = torch.ones(examples, DIGITS, dtype=torch.float64, device=weights.device)
        first = _rank() * examples if self.first_example is None else self.first_example
        digits = dropout(ones, 0.5, samples=keep, seed=self.origin[:1], stream=STREAM, first_example=first)  # 0 or 2, fair coins
        place = 0.5 ** torch.arange(2, DIGITS + 2, dtype=torch.float64, device=weights.device)
        uniform = (digits.view(keep, examples, DIGITS) * place).sum(-1)  # in [0, 1)
        cumulative = torch.stack(list(accumulate(weights.double())))  # in this order on every device
        return (cumulative[:, None] <= uniform * cumulative[-1]).sum(0)


_kept_alike: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that were seen to treat each row by itself


def _unit_shape(loss_fn: IWCrossEntropyLoss, args: tuple, named: dict) -> tuple[int, ...]:
    """The shape of the loss's units: [B], or [B, d1, ...] at level "position"."""
    target = named["target"] if named else args[0]
    positions = target.shape[2 if target.is_floating_point() else 1 :] if loss_fn.level == "position" else ()
    return (target.shape[0], *positions)
