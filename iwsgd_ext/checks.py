"""Checks of users' arguments, each written once: a ValueError or TypeError that names the argument, the expected and the given value."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")


def check(condition: bool, name: str, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def as_int(name: str, value: int) -> int:
    """Any integer that a user gives (NumPy's, too) as a Python int; a compiler's symbolic one stays."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def as_samples(samples: int) -> int:
    samples = as_int("samples", samples)
    check(samples >= 1, "samples", "an integer >= 1", samples)
    return samples


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_alpha(alpha: float) -> None:
    check_number("alpha", alpha)
    check(alpha >= 0.0, "alpha", "a number >= 0 or inf", alpha)  # false for NaN


def check_probability(p: float, name: str = "p") -> None:
    if type(p) is not float and (isinstance(p, bool) or not isinstance(p, Real)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(p).__name__}")
    check(0.0 <= p <= 1.0, name, "a probability in [0, 1]", p)


def check_rate(p: float) -> None:
    """Checks the probability of noise that is scaled by 1 / (1 - p), which is infinite at 1."""
    check_probability(p)
    check(p < 1.0, "p", "a probability in [0, 1)", p)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_std(std: float) -> None:
    check_size("std", std)


def check_size(name: str, value: float) -> None:
    check_number(name, value)
    check(0.0 <= value < float("inf"), name, "a finite number >= 0", value)


def check_probabilities(probabilities: Tensor, shape: torch.Size | None = None) -> None:
    """Checks probabilities of one example's elements, which need not sum to 1, and their shape if given. A GPU checks the values without a
    wait."""
    if not isinstance(probabilities, Tensor):
        raise TypeError(f"probabilities: expected a tensor or None, got {type(probabilities).__name__}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities: expected a floating-point tensor, got {probabilities.dtype}")
    if shape is not None and probabilities.shape != shape:
        raise ValueError(f"probabilities: expected the shape of one example, {tuple(shape)}, got {tuple(probabilities.shape)}")
    valid = ((probabilities >= 0) & (probabilities < float("inf"))).all() & ((probabilities > 0).any() | (probabilities.numel() == 0))
    if probabilities.device.type == "cpu" and not torch.compiler.is_compiling():
        check(bool(valid), "probabilities", "finite numbers >= 0 that are not all 0", "others")
    else:
        torch._assert_async(valid)


def check_layer_input(layer: torch.nn.Module, x: Tensor) -> None:
    name = f"input of {type(layer).__name__}"
    check_dtype(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, which holds the rows, got a scalar")


def check_dtype(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")


def as_part(name: str, value: int | Tensor) -> int | Tensor:
    """A seed or an id, as a user gives it: an int, or an int64 tensor of one element."""
    if type(value) is int:
        return value
    if isinstance(value, Tensor) and value.dtype == torch.int64 and value.numel() == 1:
        return value
    if isinstance(value, Tensor | bool) or not isinstance(value, Integral | torch.SymInt):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int or an int64 tensor of one element, got {got}")
    return as_int(name, value)


def as_sample_ids(sample_ids: Tensor | Sequence[int], samples: int) -> Tensor:
    """The ids of ``samples`` noise samples, int64 [K] or [K, B] and contiguous, as the kernels read them."""
    if isinstance(sample_ids, np.ndarray) and np.issubdtype(sample_ids.dtype, np.integer):
        sample_ids = torch.from_numpy(sample_ids.astype(np.int64))
    if not isinstance(sample_ids, Tensor):
        ids = list(sample_ids) if isinstance(sample_ids, Sequence) else [None]
        if not all(isinstance(v, Integral) for v in ids):
            raise TypeError(f"sample_ids: expected an int64 tensor or a sequence of ints, got {sample_ids!r}")
        signed = [(int(v) + 2**63) % 2**64 - 2**63 for v in ids]  # their 64 bits
        sample_ids = torch.tensor(signed, dtype=torch.int64, device="cpu")
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids: expected int64, got {sample_ids.dtype}")
    if sample_ids.dim() not in (1, 2) or sample_ids.shape[0] != samples:
        raise ValueError(f"sample_ids: expected [{samples}] or [{samples}, batch] as samples={samples}, got {tuple(sample_ids.shape)}")
    return sample_ids.contiguous()


ONE_ROW = (
    "either the targets were repeated over the samples, which they must not be, or the model drew no noise or one sample: it is in eval "
    "mode, ran outside of iw.sampling and was not converted (iw.convert), was converted with samples=1, or expanded another dimension "
    "than that of the rows (time-major models take batch_dim=1)."
)


def check_rows(name: str, rows: int, samples: int, batch: int) -> None:
    """Raises where a model's outputs do not have S*B rows for B targets, and names the probable cause."""
    if rows == samples * batch:
        return
    if not rows or not batch:
        diagnosis = "Batches must match."
    elif rows == batch:
        diagnosis = f"There is one row for each target: {ONE_ROW}"
    elif batch % rows == 0:
        diagnosis = f"There are {batch // rows} targets for each row: were they repeated over the samples? They must not be."
    elif samples == 1 and rows % batch == 0:
        diagnosis = f"There are {rows // batch} rows for each target: the model is in training, where it drew {rows // batch} samples."
    elif rows == samples * samples * batch:
        diagnosis = (
            f"There are samples^2 = {samples * samples} rows for each target. Either the model drew so many samples, or rows that were "
            "expanded already were expanded again: of two parts of a model that are converted apart each expands; convert one module that "
            "holds both, or the first part alone."
        )
    elif rows % batch == 0:
        diagnosis = f"There are {rows // batch} rows for each target: the model drew another number of samples, or targets are missing."
    else:
        diagnosis = "The rows are no multiple of the targets: batches must match, and targets must not be repeated over samples."
    raise ValueError(f"{name}: expected {samples} samples * {batch} targets = {samples * batch} rows, got {rows}. {diagnosis}")


def check_loss_options(
    ignore_index: int, reduction: str, label_smoothing: float, lse_square_scale: float, alpha: float, level: str
) -> None:
    as_int("ignore_index", ignore_index)
    check(reduction in REDUCTIONS, "reduction", "'none', 'mean' or 'sum'", repr(reduction))
    check(level in ("example", "position"), "level", "'example' or 'position'", repr(level))
    check_number("label_smoothing", label_smoothing)
    check(0.0 <= label_smoothing <= 1.0, "label_smoothing", "a number in [0, 1]", label_smoothing)
    check_size("lse_square_scale", lse_square_scale)
    check_alpha(alpha)


def check_option(name: str, value: Tensor | None, logits: Tensor, acc: torch.dtype, shapes: list[tuple[int, ...]]) -> Tensor | None:
    """An optional tensor of the loss, converted to the dtype in which the loss is computed."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    check(value.device == logits.device, name, f"a tensor on the logits' device {logits.device}", value.device)
    check(tuple(value.shape) in shapes, name, f"shape {' or '.join(map(str, dict.fromkeys(shapes)))}", tuple(value.shape))
    check(not value.requires_grad, name, "a tensor that does not require grad", "one that does")
    return value.to(acc).contiguous()


def check_mean(example_weight: Tensor) -> None:
    """Raises where a mean over examples has negative weights. A GPU checks this without a wait."""
    least = example_weight.detach().amin() if example_weight.numel() else example_weight.new_zeros(())
    if example_weight.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~(least < 0), "example_weight: expected none below 0 with reduction='mean' and no normalizer")
    elif least < 0:
        raise ValueError(
            f"example_weight: expected none below 0 with reduction='mean', which divides by the sum of weights, got {float(least):.4g}: "
            "that sum may be near 0, or negative, which reverses every gradient. For rewards and advantages take reduction='sum', or "
            "normalizer=, the number of labels"
        )


def check_logits(logits: Tensor, target: Tensor, samples: int) -> None:
    """Checks logits [S*B, C, ...] and their target [B, ...] or [B, C, ...]."""
    check_dtype("logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.uint8) and not target.is_floating_point():
        hint = "" if target.dtype == torch.bool or target.dtype.is_complex else "; target.long() makes them"
        raise TypeError(f"target: expected class indices of int64 or uint8 or floating-point class probabilities, got {target.dtype}{hint}")
    check(logits.dim() >= 2, "logits", "[samples * batch, classes, ...]", f"shape {tuple(logits.shape)}")
    check(logits.device == target.device, "target", f"a tensor on the logits' device {logits.device}", target.device)
    check(not target.requires_grad, "target", "a tensor that does not require grad", "one that does")
    check(logits.shape[1] >= 1, "logits", "at least one class", f"shape {tuple(logits.shape)}")
    rows, spatial = logits.shape[0], tuple(logits.shape[2:])
    soft = target.is_floating_point()
    per_example = (logits.shape[1], *spatial) if soft else spatial
    if target.dim() < 1 or tuple(target.shape[1:]) != per_example:
        shape = f"(batch, {', '.join(map(str, per_example))})" if per_example else "(batch,)"
        hint = ". Classes are dimension 1 of the logits, as in F.cross_entropy" if spatial else ""
        if soft and target.shape[1:] == spatial:
            hint = f". A target of {target.dtype} holds class probabilities; class indices are int64"
        got = f"{tuple(target.shape)} for logits {tuple(logits.shape)}"
        raise ValueError(f"target: expected shape {shape}, got {got}{hint}")
    check_rows("logits", rows, samples, target.shape[0])


def check_inplace(logits: Tensor) -> None:
    """Raises where no gradient can be written over the logits."""
    if logits.numel() == 0:
        return
    origin = logits if logits._base is None or torch.compiler.is_compiling() else logits._base
    check(
        not (origin.is_leaf and origin.requires_grad), "inplace", "logits that a model computed", "a leaf that requires grad, or its view"
    )
    expanded = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    check(not expanded, "inplace", "logits with memory for each element", f"an expanded tensor, strides {logits.stride()}")
    mergeable = logits.dim() <= 3 or all(logits.stride(d) == logits.stride(d + 1) * logits.shape[d + 1] for d in range(2, logits.dim() - 1))
    check(mergeable, "inplace", "logits whose position dimensions are adjacent in memory", f"strides {logits.stride()}")


def as_arguments(value: Any) -> tuple[tuple, dict]:
    """(args, kwargs) of a call: a tuple or list gives positional arguments, a mapping keyword arguments, anything else the only argument.

    (A named tuple is one argument: torch's PackedSequence is one.)
    """
    if isinstance(value, Mapping):
        return (), dict(value)
    several = isinstance(value, tuple | list) and not hasattr(value, "_fields")
    return (tuple(value), {}) if several else ((value,), {})
