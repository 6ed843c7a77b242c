"""What iw.convert does to a model, or would do, and which noise it does not reach."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .convert import check_convertible, conversion_of, install, revert
from .dry_run import dry_run
from .functional_dropout import Call
from .swaps import draws, original_class


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
        expand, reason: where rows expand, and why there.
        layers: the modules that are swapped.
        replaced: functional calls that draw noise of the context, and were seen in a run.
        unreached: noise that stays torch's: modules with dropout inside, functions, other random numbers.
        mixing: where a dry run saw rows of the batch meet, which no expansion keeps in their samples.
        suspected: functions that the model's code names and no run has called, maybe because none was made.
        unchecked: what could not be looked into, and why.
    """

    converted: bool
    samples: int
    batch_norm: str
    expand: str
    reason: str
    layers: list[Layer] = field(default_factory=list)
    replaced: list[Call] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    suspected: list[Call] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    mixing: str | None = None

    @property
    def complete(self) -> bool:
        """Whether all noise is reached, no rows meet, and nothing was left unchecked."""
        return not self.unreached and not self.unchecked and self.mixing is None

    def __str__(self) -> str:
        state = f"converted, samples={self.samples}, batch_norm={self.batch_norm!r}" if self.converted else "not converted"
        lines = [state, f"expand: {self.expand!r} ({self.reason})"]
        lines += _table("swapped" if self.converted else "would be swapped", [(v.name, v.was, v.now) for v in self.layers])
        lines += _table("functional noise, drawn by the context", [_row(v) for v in self.replaced])
        lines += _table("NOT REACHED, drawn by torch", [(v,) for v in self.unreached])
        lines += _table("ROWS OF THE BATCH MEET, wherever they expand", [(self.mixing,)] if self.mixing else [])
        lines += _table("named in the code, seen in no run", [_row(v) for v in self.suspected])
        lines += _table("could not be checked", [(v,) for v in self.unchecked])
        return "\n".join(lines)


def audit(model: nn.Module, *example_inputs: Any, **example_keywords: Any) -> Audit:
    """Lists what :func:`convert` has swapped in a model, or would swap, where rows expand and why, and every noise it does not reach.

    Modules are found by their class. With example inputs a dry run (training mode, fake tensors, nothing is computed) also finds
    function calls: F.dropout and its family, attention's dropout_p, modules built in forward, torch.bernoulli, ... Without them the code
    of the forwards is read for such names, and what that cannot prove is listed as unchecked. The model is as before afterwards, its
    buffers, training flags and random generators too. (Its forward hooks do run.)

    Args:
        model: converted or not.
        *example_inputs: positional arguments of its forward.
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
        >>> print(iw.audit(model, torch.ones(2, 4)))
        not converted
        expand: 'first' (shapes fit)
        would be swapped:
          2  Dropout  IWDropout
    """
    if not isinstance(model, nn.Module) or conversion_of(model) is None:
        check_convertible(model, "auto")
        inputs = example_keywords if example_keywords and not example_inputs else example_inputs or None
        install(model, 2, "auto", inputs, None, "joint", None, False)
        try:
            return _report(model, False)
        finally:
            revert(model)
    if example_inputs or example_keywords:
        conversion = conversion_of(model)
        run = dry_run(model, conversion.batch_dim, example_inputs, example_keywords)
        if run.error is None or conversion.unverified:
            conversion.learn(run.calls, run.error)
        conversion.mixing = run.mixing or conversion.mixing
    return _report(model, True)


def _report(model: nn.Module, converted: bool) -> Audit:
    conversion = conversion_of(model)
    layers = []
    for name, module in model.named_modules():
        was = original_class(module)
        if was is not None or draws(module):
            layers.append(Layer(name, was.__name__ if was else type(module).__name__, type(module).__name__))
    suspected = [call for call in conversion.suspected if not any(_is_it(call, seen) for seen in conversion.calls)]
    unchecked = []
    if conversion.stopped:
        unchecked.append(f"function calls: the dry run stopped ({conversion.stopped})")
    elif conversion.unverified:
        unchecked.append("function calls: no example inputs; names in the code were read, and the first training forward looks")
    for name, module in model.named_modules():
        if type(module).__name__ == "RecursiveScriptModule" and "." not in name:
            unchecked.append(f"{name}: scripted code")
    return Audit(
        converted=converted,
        samples=conversion.samples,
        batch_norm=conversion.batch_norm,
        expand=conversion.expand,
        reason=conversion.reason,
        layers=layers,
        replaced=[call for call in conversion.calls if call.kind == "replaced"],
        unreached=conversion.unreached(model),
        suspected=suspected,
        unchecked=unchecked,
        mixing=conversion.mixing,
    )


def _is_it(suspected: Call, seen: Call) -> bool:
    """Whether a call that a run has made is one that the code names (a function that a module holds has no line of its own)."""
    function = suspected.function == seen.function or suspected.function.endswith("built in forward")
    return function and (suspected.place == seen.place or (":" not in suspected.place and suspected.module == seen.module))


def _row(call: Call) -> tuple[str, str, str]:
    return call.module or "(the model)", call.function + ("" if call.p is None else f", p={call.p}"), call.place


def _table(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [f"{title}:"] + ["  " + "  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
