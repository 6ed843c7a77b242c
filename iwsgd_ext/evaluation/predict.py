"""Predictions averaged over noise samples."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import as_int, check
from .passes import noisy_evaluation, passes_of

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
    """Class log-probabilities averaged over S noise samples (Noh et al. 2017, eq 1): the ensemble that one forward in eval mode stands for.

        arithmetic:  log p[b, c] = log (1/S) sum_s softmax(z[s, b])[c]
        geometric:   log p[b, c] = log_softmax_c( (1/S) sum_s log_softmax(z[s, b])[c] )

    Only noise layers of this package are in training mode: batch normalisation uses its running statistics, and other dropout stays off.
    There is no gradient. Afterwards the model's modes are as before.

    Args:
        model: a converted model, or any with noise layers of this package. Its output is logits of classes that exclude each other, or
            the argument of ``log_prob``.
        x: the model's inputs: a tensor, a tuple or list of arguments, or a dict of them by name. A model that was converted with
            ``batch_dim=1`` has its examples in dimension 1 of x, and in dimension 0 of its output.
        samples: S.
        reduce: "arithmetic" (a mixture, which has a likelihood) or "geometric" (which scaling by 1 - p approximates).
        class_dim: dimension of the classes in the logits; -1 for most language models.
        log_prob: a function from the model's output to log-probabilities [K*B, ...], instead of log_softmax over ``class_dim``:
            torch.nn.functional.logsigmoid for independent labels, ``lambda output: output["logits"].log_softmax(1)``. Only with
            "arithmetic".
        chunk: samples of one pass, to save memory; it changes the result by rounding only. None takes all at once.
        seed: an int or an int64 tensor of one element repeats its noise; None draws one from torch's default generator of x's device.
        first_example: id of the first example, as in :class:`iwsgd_ext.sampling`.

    Returns:
        Log-probabilities of the logits' shape with B rows, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument is not as above; the model has no noise layer; its output does not have S*B rows, or has one
            class.

    Warns:
        UserWarning: the training forward has functional dropout that eval mode turns off (``dropout_p=0.1 if self.training else 0.0``).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = iw.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)), samples=5).eval()
        >>> log_p = iw.predict(model, torch.ones(2, 4), samples=100, chunk=10)
        >>> log_p.shape, log_p.exp().sum(1)
        (torch.Size([2, 3]), tensor([1.0000, 1.0000]))
    """
    check(reduce in ("arithmetic", "geometric"), "reduce", "'arithmetic' or 'geometric'", repr(reduce))
    check(log_prob is None or reduce == "arithmetic", "reduce", "'arithmetic' with log_prob", repr(reduce))
    total: Any = None
    summed = torch.logaddexp if reduce == "arithmetic" else torch.add
    with noisy_evaluation(model):
        for k, output in passes_of(model, x, samples, chunk, seed, first_example, True):
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
    """Class log-probabilities of B examples from the S*B rows of a training forward (Noh et al. 2017, eq 1): for accuracies and other
    metrics of training.

        log p[b, c] = log (1/S) sum_s softmax(z[s, b])[c]

    This is :func:`predict`'s average over the noise samples that the rows hold. S is the number of rows over ``batch``; the B rows of a
    model in eval mode give their log_softmax.

    Args:
        logits: [S*B, C, ...], sample-major, floating-point.
        batch: B, the number of targets.
        class_dim: dimension of the classes in the logits; -1 for most language models.

    Returns:
        Log-probabilities of the logits' shape with B rows, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument is not as above, or the number of rows is no multiple of ``batch``.

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
    """log_softmax over the classes, with checks; ``name`` is the argument in messages."""
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
    if logits.shape[class_dim] == 1:  # a regression, or the logit of a binary label: its softmax is always 1
        raise ValueError(
            f"{name}: expected logits of two classes or more in dimension {class_dim}, got shape {tuple(logits.shape)}; a softmax over "
            "one output is 1 (binary labels: log_prob=torch.nn.functional.logsigmoid)"
        )
    return torch.log_softmax(logits, class_dim, dtype=torch.promote_types(logits.dtype, torch.float32))
