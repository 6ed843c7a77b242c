"""``iw.audit``: the layers and calls of a model that iw.convert swaps, or would swap, and the noise that it does not reach."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from .convert import check_convertible, install, revert
from .converted import Conversion, conversion_of
from .functional_dropout import Call
from .swaps import draws, original_class
from .verify import Verification, verify_conversion


@dataclass(frozen=True)
class Layer:
    """A module that is swapped: its name, and the names of its classes before and after."""

    name: str
    was: str
    now: str


@dataclass(frozen=True)
class Audit:
    """The noise of a model under S noise samples (Noh et al. 2017, eq 1), as :func:`audit` has found it; prints as a table.

    Attributes:
        converted: True for a converted model; for another, all else is what iw.convert would do.
        samples: S.
        batch_norm: as :func:`convert` was given it.
        expand: how one example becomes S.
        layers: the modules that are swapped.
        replaced: function calls that draw noise of the context, seen in a run.
        unreached: noise that is no function of seed and sample: modules with dropout inside, functions, other random numbers.
        one_by_one: submodules that are called once for each noise sample, with the reason: each costs S calls.
        verification: the verdict of the last comparison with samples alone, or None.
        unchecked: checks that were not possible, with the reason.
    """

    converted: bool
    samples: int
    batch_norm: str
    expand: str
    layers: list[Layer]
    replaced: list[Call]
    unreached: list[str]
    one_by_one: dict[str, str]
    verification: Verification | None
    unchecked: list[str]

    @property
    def complete(self) -> bool:
        """True where all noise is reached, and samples together were seen to give what each gives alone."""
        return not self.unreached and not self.unchecked and self.verification is not None and self.verification.verdict == "equal"

    def __str__(self) -> str:
        state = f"converted, samples={self.samples}, batch_norm={self.batch_norm!r}" if self.converted else "not converted"
        lines, run = [state, f"expand: {self.expand!r}"], self.verification
        if run is not None and run.verdict == "different":
            lines.append(f"WRONG: {run.samples} samples together do not give what each gives alone: {run.message}")
        elif run is not None and run.verdict == "equal":
            compared = "outputs and gradients" if run.gradients else "outputs"
            lines.append(
                f"verified: {run.samples} samples together give what samples {', '.join(map(str, run.alone))} give alone ({compared})"
            )
        lines += _table("swapped" if self.converted else "would be swapped", [(v.name, v.was, v.now) for v in self.layers])
        lines += _table("functional noise, drawn by the context", [_entry(v) for v in self.replaced])
        lines += _table("NOT REACHED, no function of seed and sample", [(v,) for v in self.unreached])
        lines += _table("called once for each noise sample", [(name or "(the model)", why) for name, why in self.one_by_one.items()])
        if run is not None and self.expand == "axis":
            lines += _table("buffers that a forward writes once for all samples", [(name,) for name in run.written])
        lines += _table("could not be checked", [(v,) for v in self.unchecked])
        return "\n".join(lines)


def audit(model: nn.Module, *example_inputs: Any, verify: bool = True, gradients: bool = False, **example_keywords: Any) -> Audit:
    """Lists the noise of a model under S noise samples (Noh et al. 2017, eq 1): the layers that :func:`convert` has swapped, or would swap,
    and the noise that it does not reach. Checks the conversion by running it.

    With example inputs the model is run in training mode, under its number of samples (2, if it is not converted). This finds function
    calls (F.dropout and its family, attention's dropout_p, modules made in forward, torch.bernoulli, ...), and with ``verify`` compares
    the outputs with those of up to three samples alone, under one seed. Without example inputs, the audit lists the noise that the first
    training forward has shown. Afterwards the model, its buffers, gradients, training flags and random generators are as before. (Its
    forward hooks do run.)

    Args:
        model: converted or not.
        *example_inputs: positional arguments of its forward.
        verify: compare with samples alone.
        gradients: compare the gradients of the parameters, too.
        **example_keywords: keyword arguments of its forward.

    Returns:
        An :class:`Audit`: fields, and a table when printed. ``complete`` is True where nothing is missed.

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
        install(model, Conversion(2, "axis", "per_sample", None))
        try:
            return _report(model, False, _verified(model, example_inputs, example_keywords, verify, gradients))
        finally:
            revert(model)
    return _report(model, True, _verified(model, example_inputs, example_keywords, verify, gradients))


def _verified(model: nn.Module, args: tuple, kwargs: dict, verify: bool, gradients: bool) -> Verification | None:
    """The verdict of a run on the example inputs, or, without any, of the last run."""
    conversion = conversion_of(model)
    assert conversion is not None
    if not args and not kwargs:
        return conversion.verification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the audit lists the same
        run = verify_conversion(model, conversion.samples, args, kwargs, compare=verify, gradients=gradients)
    if verify:  # else the first training forward has still to compare
        conversion.verification = run
    return run


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
        watched = " (the first training forward has shown the noise)" if conversion.watched else ""
        unchecked.append(f"no example inputs: nothing was compared{watched}")
    elif verification.verdict not in ("equal", "different"):
        unchecked.append(verification.message)
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


def _entry(call: Call) -> tuple[str, str, str]:
    return call.module or "(the model)", call.function + ("" if call.p is None else f", p={call.p}"), call.place


def _table(title: str, entries: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, none where it has no entries."""
    if not entries:
        return []
    widths = [max(len(entry[i]) for entry in entries) for i in range(len(entries[0]))]
    return [f"{title}:"] + ["  " + "  ".join(v.ljust(w) for v, w in zip(entry, widths, strict=True)).rstrip() for entry in entries]
