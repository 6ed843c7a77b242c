"""What iw.convert does to a model, or would do, and which noise it does not reach."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .convert import check_convertible, conversion_of, install, revert
from .functional_dropout import Call
from .swaps import draws, original_class
from .verify import Verification, verify_conversion


@dataclass(frozen=True)
class Layer:
    """One module that is swapped."""

    name: str
    was: str
    now: str


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` has found; prints as a table.

    Attributes:
        converted: whether the model is converted; if not, everything here is what iw.convert would do.
        expand: how one example becomes S.
        layers: the modules that are swapped.
        replaced: functional calls that draw noise of the context, and were seen in a run.
        unreached: noise that is no function of seed and sample: modules with dropout inside, functions, other random numbers.
        one_by_one: submodules that are called once for each noise sample, and why: each costs S calls.
        verification: what runs have shown, or None.
        unchecked: what could not be looked into, and why.
    """

    converted: bool
    samples: int
    batch_norm: str
    expand: str
    layers: list[Layer] = field(default_factory=list)
    replaced: list[Call] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    one_by_one: dict[str, str] = field(default_factory=dict)
    verification: Verification | None = None
    unchecked: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all noise is reached, and samples together were seen to give what each gives alone."""
        return not self.unreached and not self.unchecked and self.verification is not None and self.verification.complete

    def __str__(self) -> str:
        state = f"converted, samples={self.samples}, batch_norm={self.batch_norm!r}" if self.converted else "not converted"
        lines, run = [state, f"expand: {self.expand!r}"], self.verification
        if run is not None and run.mismatch is not None:
            lines.append(f"WRONG: {run.samples} samples together do not give what each gives alone: {run.mismatch}")
        elif run is not None and run.complete:
            what = "outputs and gradients" if run.gradients else "outputs"
            lines.append(f"verified: {run.samples} samples together give what samples {', '.join(map(str, run.alone))} give alone ({what})")
        lines += _table("swapped" if self.converted else "would be swapped", [(v.name, v.was, v.now) for v in self.layers])
        lines += _table("functional noise, drawn by the context", [_row(v) for v in self.replaced])
        lines += _table("NOT REACHED, no function of seed and sample", [(v,) for v in self.unreached])
        lines += _table("called once for each noise sample", [(name or "(the model)", why) for name, why in self.one_by_one.items()])
        if run is not None and self.expand == "axis":
            lines += _table("buffers that a forward writes once for all samples", [(name,) for name in run.advanced])
        lines += _table("could not be checked", [(v,) for v in self.unchecked])
        return "\n".join(lines)


def audit(model: nn.Module, *example_inputs: Any, verify: bool = True, gradients: bool = False, **example_keywords: Any) -> Audit:
    """Lists what :func:`convert` has swapped in a model, or would swap, and every noise it does not reach; and checks it by running it.

    With example inputs the model is run in training mode, under its number of samples (2, if it is not converted): that finds function
    calls (F.dropout and its family, attention's dropout_p, modules built in forward, torch.bernoulli, ...), and with ``verify`` compares
    the outputs with those of three samples alone, under one seed. Without example inputs, what the first training forward has shown is
    listed. The model is as before afterwards: its buffers, gradients, training flags and random generators too. (Its forward hooks do
    run.)

    Args:
        model: converted or not.
        *example_inputs: positional arguments of its forward.
        verify: compare with samples alone.
        gradients: compare the gradients of the parameters, too.
        **example_keywords: keyword arguments of its forward.

    Returns:
        An :class:`Audit`: fields, and a table when printed. ``complete`` says that nothing is missed.

    Raises:
        TypeError: model is not a module.
        ValueError: only a part of the model is converted.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> print(iw.audit(model, torch.randn(2, 4)))
        not converted
        expand: 'axis'
        verified: 2 samples together give what samples 0, 1 give alone (outputs)
        would be swapped:
          2  Dropout  IWDropout
    """
    if not isinstance(model, nn.Module) or conversion_of(model) is None:
        check_convertible(model, "axis", "per_sample", ())
        install(model, 2, "axis", "per_sample", None, (), False)
        try:
            return _report(model, False, _verified(model, example_inputs, example_keywords, verify, gradients))
        finally:
            revert(model)
    return _report(model, True, _verified(model, example_inputs, example_keywords, verify, gradients))


def _verified(model: nn.Module, args: tuple, kwargs: dict, verify: bool, gradients: bool) -> Verification | None:
    conversion = conversion_of(model)
    assert conversion is not None
    if not args and not kwargs:
        return conversion.verification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        conversion.verification = verify_conversion(model, conversion.samples, args, kwargs, compare=verify, gradients=gradients)
    return conversion.verification


def _report(model: nn.Module, converted: bool, verification: Verification | None) -> Audit:
    conversion = conversion_of(model)
    assert conversion is not None
    layers = []
    for name, module in model.named_modules():
        was = original_class(module)
        if was is not None or draws(module):
            layers.append(Layer(name, was.__name__ if was else type(module).__name__, type(module).__name__))
    unchecked = []
    if verification is None:
        looked = " (the first training forward was looked at for noise)" if conversion.looked else ""
        unchecked.append(f"no example inputs: nothing was compared{looked}")
    elif verification.error is not None:
        unchecked.append(f"the model stops on the example inputs ({verification.text})")
    else:
        unchecked += verification.inconclusive
        if not verification.drew:
            unchecked.append("no noise was drawn")
        elif not verification.compared and verification.mismatch is None and not verification.inconclusive:
            unchecked.append("outputs were not compared with those of samples alone")
    for name, module in model.named_modules():
        if type(module).__name__ == "RecursiveScriptModule" and "." not in name:
            unchecked.append(f"{name}: scripted code")
    return Audit(
        converted=converted,
        samples=conversion.samples,
        batch_norm=conversion.batch_norm,
        expand=conversion.expand,
        layers=layers,
        replaced=[call for call in conversion.calls if call.kind == "replaced"],
        unreached=conversion.unreached(model),
        one_by_one=dict(conversion.one_by_one),
        verification=verification,
        unchecked=unchecked,
    )


def _row(call: Call) -> tuple[str, str, str]:
    return call.module or "(the model)", call.function + ("" if call.p is None else f", p={call.p}"), call.place


def _table(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [f"{title}:"] + ["  " + "  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
