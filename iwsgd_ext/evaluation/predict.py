"""What noise samples are worth when a model is evaluated: predictions averaged over them, and the bound against their number."""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from copy import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from . import reference
from .batch_norm import _BatchNormMode
from .checks import as_int, as_samples, check, check_alpha
from .convert import Converted, conversion_of
from .functional_dropout import Call, Watch
from .iw_cross_entropy_loss import IWCrossEntropyLoss
from .likelihood import as_arguments
from .one_by_one import LaneByLane
from .sampling import sampling
from .subsets import subset_means

Reduce = Literal["arithmetic", "geometric"]


def predict(
    model: nn.Module,
    x: Any,
    samples: int,
    reduce: Reduce = "arithmetic",
    *,
    class_dim: int = 1,
    log_prob: Callable[[Any], Tensor] | None = None,
    chunk: int | None = None,
    seed: int | Tensor | None = None,
    first_example: int | Tensor | None = None,
) -> Tensor:
    """Class log-probabilities averaged over S noise samples: the ensemble of dropout networks that one forward pass stands for.

        arithmetic:  log p[b, c] = log (1/S) sum_s softmax(z[s, b])[c]
        geometric:   log p[b, c] = log_softmax_c( (1/S) sum_s log_softmax(z[s, b])[c] )

    Noise is on although nothing else is in training: noise layers of this package draw it, batch normalisation uses its running
    statistics, and dropout that is not of this package stays off. No gradient; the model's modes are as before when it is done.

    Args:
        model: a converted model, or any with noise layers of this package. Its output is logits of classes that exclude each other, or
            what ``log_prob`` takes.
        x: what the model is called with: a tensor, a tuple or list of arguments, or a dict of them by name. A model that was converted
            with ``batch_dim=1`` has its examples there; its output has them first.
        samples: S.
        reduce: "arithmetic" (a mixture, which a likelihood belongs to) or "geometric" (what scaling by 1 - p approximates).
        class_dim: dimension of the classes in the logits; -1 for most language models.
        log_prob: what makes log-probabilities [K*B, ...] of the model's output, instead of log_softmax over ``class_dim``:
            torch.nn.functional.logsigmoid for independent labels, ``lambda output: output["logits"].log_softmax(1)``. With "arithmetic".
        chunk: samples of one pass, for memory; the result does not depend on it but for rounding. None takes all at once.
        seed: an int or an int64 tensor of one element repeats its noise; None draws one from torch's default generator of x's device.
        first_example: id of the first example, as in :class:`iwsgd_ext.sampling`.

    Returns:
        Log-probabilities of the logits' shape with B rows, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument is not as above, the model has no noise layer, its output no S*B rows or a single class.

    Warns:
        UserWarning: functional dropout of the training forward (``dropout_p=0.1 if self.training else 0.0``) that eval mode switches off.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = iw.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), samples=5).eval()
        >>> log_p = iw.predict(model, torch.ones(2, 4), samples=100, chunk=10)
        >>> log_p.shape, log_p.exp().sum(1)
        (torch.Size([2, 3]), tensor([1.0000, 1.0000]))
    """
    if reduce not in ("arithmetic", "geometric"):
        raise ValueError(f"reduce: expected 'arithmetic' or 'geometric', got {reduce!r}")
    check(log_prob is None or reduce == "arithmetic", "reduce", "'arithmetic' with log_prob", repr(reduce))
    total, summed = None, torch.logaddexp if reduce == "arithmetic" else torch.add
    with _noisy_evaluation(model):
        for k, output in _passes(model, x, samples, chunk, seed, first_example, True):
            log_p = _log_softmax(output, class_dim) if log_prob is None else log_prob(output)
            if not isinstance(log_p, Tensor) or not log_p.is_floating_point() or log_p.dim() == 0 or len(log_p) % k:
                got = f"{log_p.dtype} {tuple(log_p.shape)}" if isinstance(log_p, Tensor) else type(log_p).__name__
                raise TypeError(f"log_prob: expected a function that returns floating-point log-probabilities [{k} * B, ...], got {got}")
            log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32))
            log_p = log_p.unflatten(0, (k, len(log_p) // k))
            part = log_p.logsumexp(0) if reduce == "arithmetic" else log_p.sum(0)
            total = part if total is None else summed(total, part)
    if reduce == "arithmetic":
        return total - math.log(samples)
    return torch.log_softmax(total / samples, class_dim)


def log_predictive(logits: Tensor, batch: int, *, class_dim: int = 1) -> Tensor:
    """What B examples are predicted to be, from a forward's rows: for accuracies and other metrics of training.

        log p[b, c] = log (1/S) sum_s softmax(z[s, b])[c]

    which is :func:`predict`'s average over the noise samples that the rows hold. S is read off the rows: B of them, of a model in eval
    mode, give their log_softmax.

    Args:
        logits: [S*B, C, ...], sample-major, floating-point.
        batch: B, the number of targets.
        class_dim: dimension of the classes in the logits; -1 for most language models.

    Returns:
        Log-probabilities of the logits' shape with B rows, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: logits or class_dim are not as above, or the rows are no multiple of ``batch``.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> logits, target = torch.randn(4 * 8, 10), torch.randint(10, (8,))  # S = 4, B = 8
        >>> iw.log_predictive(logits, len(target)).argmax(1).eq(target).float().mean().shape
        torch.Size([])
    """
    batch = as_int("batch", batch)
    log_p = _log_softmax(logits, class_dim, "logits")
    rows = logits.shape[0]
    fits = rows == batch if not batch else batch > 0 and rows % batch == 0
    check(fits, "logits", f"a multiple of batch={batch} rows", f"{rows} rows")
    return reference.logmeanexp(log_p.unflatten(0, (rows // batch if batch else 1, batch)), 1.0)


def _log_softmax(logits: Any, class_dim: int, name: str = "model") -> Tensor:
    """What predict makes of a model's output by itself."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        if name == "logits":
            raise TypeError(f"logits: expected a floating-point tensor, got {got}")
        raise TypeError(
            f"model: expected one whose output is a floating-point tensor of logits, got {got}; log_prob takes any output: "
            "iw.predict(..., log_prob=lambda output: output['logits'].log_softmax(1))"
        )
    dims = logits.dim()
    expected = f"a dimension of logits {tuple(logits.shape)} that is not the first"
    check(-dims < class_dim < dims and class_dim != 0, "class_dim", expected, class_dim)
    if logits.shape[class_dim] == 1:  # its softmax is 1 whatever the output: a regression's, or the logit of a binary label
        raise ValueError(
            f"{name}: expected logits of two classes or more in dimension {class_dim}, got shape {tuple(logits.shape)}; a softmax over "
            "one output is 1 (binary labels: log_prob=torch.nn.functional.logsigmoid)"
        )
    return torch.log_softmax(logits, class_dim, dtype=torch.promote_types(logits.dtype, torch.float32))


class BoundCurve(NamedTuple):
    """The bound against the number of noise samples; prints as a table, ``plot()`` draws it.

    Attributes:
        samples: 1 .. S, int64 [S].
        bound: mean bound with that many samples, in nats for each unit (an example, or a position), float64 [S].
        standard_error: of ``bound``, over units, float64 [S]. Bounds of one curve share their examples and samples, so differences
            between them are known better than this.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> curve = iw.BoundCurve(torch.tensor([1, 2]), torch.tensor([-1.5, -1.25]), torch.tensor([0.1, 0.1]))
        >>> print(curve)
         samples        bound   std. error
               1      -1.5000       0.1000
               2      -1.2500       0.1000
    """

    samples: Tensor
    bound: Tensor
    standard_error: Tensor

    def __str__(self) -> str:
        rows = zip(*(column.tolist() for column in self), strict=True)
        return "\n".join([f"{'samples':>8}{'bound':>13}{'std. error':>13}", *(f"{s:8d}{b:13.4f}{e:13.4f}" for s, b, e in rows)])

    def plot(self, ax=None):
        """Draws it, see :func:`iwsgd_ext.plots.bound`."""
        from . import plots  # matplotlib is wanted only here

        return plots.bound(self, ax)


def bound_curve(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    samples: int,
    *,
    loss_fn: Any = None,
    chunk: int | None = None,
    seed: int | Tensor | None = None,
    progress: bool = False,
) -> BoundCurve:
    """The bound with 1, 2, .. S noise samples (eq 4), all from one draw of S: how many are worth their cost.

        bound[k] = sum_b c[b] mean over subsets A of k samples of L_A[b] / sum_b c[b],    L_A = (1/alpha) log mean_{s in A} exp(alpha l[s])

    The mean over all subsets is exact (a U-statistic), so that the curve never falls (eq 6 in its form for one draw) and is an unbiased
    estimate for each k. Noise is on, everything else in eval mode, as in :func:`predict`.

    Args:
        model: a converted model, or any with noise layers of this package.
        batches: pairs (inputs, targets), what the model and what the loss after the outputs is called with; e.g. a DataLoader. Examples
            are numbered through, each with noise of its own.
        samples: S.
        loss_fn: an object with ``log_likelihood(outputs, targets, samples) -> (log_p [K, units], outer weight [units], denominator)``, as
            IWCrossEntropyLoss and IWLoss are; its ``alpha``, if it has one, is the bound's. None is IWCrossEntropyLoss, whatever the
            model was trained with.
        chunk: samples of one pass, for memory.
        seed: an int or an int64 tensor of one element; None draws one.
        progress: show a bar over the batches; needs the package rich.

    Returns:
        :class:`BoundCurve`, on the CPU.

    Raises:
        ValueError, TypeError: an argument is not as above, no batch, a weight of zero in all.

    Warns:
        UserWarning: as :func:`predict`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = iw.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), samples=5)
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]
        >>> curve = iw.bound_curve(model, data, samples=8)
        >>> bool((curve.bound.diff() >= 0).all())
        True
    """
    samples = as_samples(samples)
    own = loss_fn is None
    loss_fn = IWCrossEntropyLoss(samples) if own else copy(loss_fn) if isinstance(loss_fn, IWCrossEntropyLoss) else loss_fn
    if isinstance(loss_fn, IWCrossEntropyLoss):
        loss_fn.samples = samples
    if not hasattr(loss_fn, "log_likelihood"):
        raise TypeError(f"loss_fn: expected IWCrossEntropyLoss, IWLoss or an object with log_likelihood, got {type(loss_fn).__name__}")
    alpha = getattr(loss_fn, "alpha", 1.0)
    check_alpha(alpha)
    curves, weights, first = [], [], 0
    with _noisy_evaluation(model):
        for batch in _with_bar(batches) if progress else batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
                raise TypeError(
                    f"batches: expected pairs (inputs, targets), as a DataLoader or [(x, y)] gives, got {got}; several inputs of a model "
                    "are one tuple or dict"
                )
            inputs, targets = batch
            if own and isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() > 1:
                sums = targets.detach().sum(1)
                expected = "class indices, or probabilities that sum to 1 (give loss_fn, the loss of this model, for other targets)"
                check(torch.allclose(sums, torch.ones_like(sums), atol=1e-2), "batches", f"targets that are {expected}", "other numbers")
            if seed is None:
                seed = _origin(model, inputs, None)[:1]
            passes = _passes(model, inputs, samples, chunk, seed, first, look=not curves)
            parts = [loss_fn.log_likelihood(outputs, targets, k) for k, outputs in passes]
            curves.append(subset_means(torch.cat([log_p for log_p, _, _ in parts]), alpha).cpu())
            weights.append(parts[0][1].double().cpu())
            first += _examples(model, inputs)
    if not curves:
        raise ValueError("batches: expected at least one, got none")
    curve, weight = torch.cat(curves, 1), torch.cat(weights)  # [S, units], [units]
    check(bool(((weight >= 0) & weight.isfinite()).all()), "batches", "finite weights that are not negative, to average over", "others")
    counted = weight > 0
    curve, weight = curve[:, counted], weight[counted]
    if not weight.numel():
        raise ValueError("batches: expected an example that counts, got none of a weight above 0")
    mean = ((curve * weight).sum(1) / weight.sum()).cummax(0).values  # but for rounding, it never falls
    n = weight.numel()
    spread = ((curve - mean[:, None]) * weight).square().sum(1) * (n / (n - 1) if n > 1 else math.nan)
    return BoundCurve(torch.arange(1, samples + 1, device="cpu"), mean, spread.sqrt() / weight.sum())


@contextmanager
def _noisy_evaluation(model: nn.Module):
    """Noise layers in training, everything else in eval mode; no gradient."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    noisy = [module for module in model.modules() if _is_noise_layer(module)]
    conversions = [conversion_of(module) for module in model.modules() if conversion_of(module) is not None]
    functional = any(conversion.has_noise or not conversion.looked for conversion in conversions)  # unknown until a training forward
    if not noisy and not functional:
        raise ValueError("model: expected one with noise layers of this package (iw.convert puts them in), got none")
    # In eval mode torch's encoder layer may compute itself by one fused call, and no layer inside of it is called.
    fused = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    before = [(module, vars(module).get("training", module.training)) for module in model.modules()]
    try:
        model.eval()
        for module in (*noisy, *fused):
            module.training = True
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def _is_noise_layer(module: nn.Module) -> bool:
    """Every class of module of this package is one, but for losses and batch normalisation."""
    kind = type(module)
    while issubclass(kind, Converted | LaneByLane):  # a class of iw.convert's before the module's own
        kind = kind.original
    ours = any(cls.__module__.partition(".")[0] == __package__ for cls in kind.__mro__)
    return ours and not isinstance(module, _BatchNormMode) and not hasattr(module, "log_likelihood")


def _passes(model: nn.Module, inputs: Any, samples: int, chunk: int | None, seed, first_example, look: bool):
    """(k, output of k*B rows) of each pass over at most ``chunk`` of the samples, all with one seed; ``look`` for noise that is off."""
    samples, chunk = as_samples(samples), None if chunk is None else as_int("chunk", chunk)
    check(chunk is None or 1 <= chunk <= samples, "chunk", f"a number of samples in 1 .. samples={samples}", chunk)
    args, named = as_arguments(inputs)
    batch = _examples(model, inputs)
    origin = _origin(model, inputs, seed, first_example)
    chunk = chunk or samples
    for first in range(0, samples, chunk):
        ids = range(first, min(first + chunk, samples))
        context = sampling(len(ids), sample_ids=ids, first_example=first_example)
        context.evaluating = True
        context._origin = origin
        watched = _functional_noise(model) if look and first == 0 else None
        context.watch = watched and watched[0]
        with context:
            output = model(*args, **named)
        if watched:
            _warn_of_noise_that_is_off(*watched)
        for rows in {v.shape[0] for v in tree_leaves(output) if isinstance(v, Tensor) and v.dim() > 0}:
            if rows % max(len(ids) * batch, 1) != 0:
                raise ValueError(
                    f"model: expected an output of {len(ids)} samples * {batch} examples = {len(ids) * batch} rows (or a multiple), got "
                    f"{rows}; was a noise layer called? The output's rows come first: a module around the model can move them."
                )
        yield len(ids), output


def _functional_noise(model: nn.Module) -> tuple[Watch, list[Call]] | None:
    """What looks at an evaluation, and the calls of functional dropout that training was seen to make, if any."""
    for module in model.modules():
        conversion = conversion_of(module)
        calls = [call for call in conversion.calls if call.kind == "replaced" and call.p] if conversion is not None else []
        if calls:
            return Watch.of(module), calls
    return None


def _warn_of_noise_that_is_off(watch: Watch, trained: list[Call]) -> None:
    drawn = {(call.module, call.function, call.place) for call in watch.calls if call.p}
    missing = [str(call) for call in trained if (call.module, call.function, call.place) not in drawn]
    if missing and watch.looks:
        warnings.warn(
            "the model switches noise of its training off in eval mode by itself, so this evaluation does not draw it: "
            + "; ".join(missing),
            stacklevel=4,
        )


def _examples(model: nn.Module, inputs: Any) -> int:
    conversion = conversion_of(model)
    dim = conversion.batch_dim or 0 if conversion is not None else 0  # of a time-major model the first dimension is none of examples
    for v in tree_leaves(as_arguments(inputs), is_leaf=lambda v: isinstance(v, PackedSequence)):
        if isinstance(v, PackedSequence):
            return int(v.batch_sizes[0])  # these are on the CPU, wherever the data is
        if isinstance(v, Tensor) and -v.dim() <= dim < v.dim():
            return v.shape[dim]
    raise ValueError("x: expected at least one tensor with a dimension of examples")


def _origin(model: nn.Module, inputs: Any, seed, first_example=None) -> Tensor:
    """The seed of a whole evaluation, on the device of its data."""
    return sampling(1, seed=seed, first_example=first_example).origin_for(tree_leaves(as_arguments(inputs)), model)


def _with_bar(batches: Iterable) -> Iterable:
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError("progress=True needs the package rich: pip install rich") from error
    return track(batches, description="bound")
