"""A conversion checked by running it: S noise samples together, and some of them alone, must give the same outputs under one seed.

A sample alone is the model's ordinary forward: B rows, one call, no axis and no rows of other samples. So it is the truth for whatever
a conversion does to run S of them at once.
"""

from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from ..layers.context import sampling
from .axis_outputs import Output
from .functional_dropout import Call, Watch
from .pass_state import RandomState, Snapshot

SEED = 20171204


@dataclass
class Verification:
    """What the runs have shown.

    Attributes:
        samples: S of the run together.
        alone: the samples that were run alone, too.
        calls: functional noise that was drawn.
        drew: whether noise of this package was drawn at all.
        error: what stopped the model.
        mismatch: the output that differs, and by how much.
        inconclusive: why equal outputs would say nothing, or outputs could not be compared.
        generators: whose other random numbers the model draws: "torch", "NumPy" or "Python".
        compared: the outputs were compared and are equal.
        gradients: so were the gradients.
        scalar_output: the model returns a number that is no row of an example.
        asks: where the forward asked for the values of a tensor.
        advanced: buffers that a forward writes, other than BatchNorm's: by values that no noise has touched, once for all samples.
    """

    samples: int
    alone: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    drew: bool = False
    error: Exception | None = None
    mismatch: str | None = None
    inconclusive: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)
    compared: bool = False
    gradients: bool = False
    scalar_output: bool = False
    advanced: list[str] = field(default_factory=list)
    asks: str | None = None

    @property
    def complete(self) -> bool:
        return self.compared and self.mismatch is None and not self.inconclusive

    @property
    def text(self) -> str | None:
        return None if self.error is None else _text(self.error)

    def refusal(self, expand: str, where: str) -> str:
        roads = (
            "expand='axis', which keeps samples apart, or"
            if expand != "axis"
            else "one_by_one=[''], which calls the model once for each sample, or"
        )
        return (
            f"{where}: with expand={expand!r}, {self.samples} samples together do not give what each gives alone: {self.mismatch}. "
            f"Take {roads} iw.backward(strategy='loop'); verify=False converts all the same"
        )


def verify_conversion(
    model: nn.Module, samples: int, args: tuple, kwargs: dict, *, compare: bool = True, gradients: bool = False
) -> Verification:
    """Runs a converted model in training mode, together and alone. It is as before afterwards, and so are the random generators."""
    result = Verification(samples)
    conversion = model._iw_conversion
    inputs = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
    snapshot = Snapshot(model, inputs)
    flags = [(m, vars(m).get("training")) for m in model.modules()]
    device = next((v.device for v in (*inputs, *model.parameters()) if v.device.type == "cuda"), torch.device("cpu"))

    def one_pass(k, ids=None, watch: Watch | None = None, torch_noise: str = "same", restored: bool = True) -> tuple[Any, sampling]:
        if restored:
            snapshot.restore()
        else:
            snapshot.random.restore()
        model.train()
        context = sampling(k, seed=SEED, sample_ids=ids, first_example=0)
        context.watch, context.torch_noise = watch, torch_noise
        with torch.enable_grad(), context:
            output = model(*args, **kwargs)
        return output, context

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            watch = Watch.of(model)
            before = RandomState(device)
            together, context = one_pass(samples, None, watch)
            result.calls, result.drew = list(watch.calls), context.stream > 0
            result.advanced, result.asks = snapshot.written(model), watch.asks
            result.generators, result.scalar_output = before.moved(), context.scalar_output
            if "torch" in result.generators and conversion.expand == "axis":
                one_pass(samples, None, Watch.of(model), "different")  # as training will: a number for all lanes may not do then
            conversion.saw(result.calls, result.drew, result.generators)
            if compare and result.drew and samples > 1:
                _compare(model, result, conversion, together, one_pass, gradients, inputs)
    except Exception as error:  # whatever a model raises
        result.error = error
    finally:
        snapshot.restore()
        for module, training in flags:
            if training is not None:
                vars(module)["training"] = training
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                module.reshard()  # FSDP2: else an optimizer that is made now would get the unsharded copies, and train nothing
    return result


def _compare(model: nn.Module, result: Verification, conversion, together: Any, one_pass, gradients: bool, inputs: list[Tensor]) -> None:
    samples = result.samples
    result.alone = sorted({0, samples // 2, samples - 1})
    if conversion.batch_norm == "joint" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        result.inconclusive.append(
            "batch_norm='joint' makes the outputs of samples depend on one another: they cannot be compared with samples alone"
        )
        return
    if "torch" in result.generators and conversion.expand != "axis":
        result.inconclusive.append(
            "the forward draws torch's random numbers, other ones for each number of rows: outputs cannot be compared"
        )
        return
    if result.asks is not None and conversion.expand != "axis":
        result.inconclusive.append(
            f"the forward asks for the values of tensors ({result.asks}), which in rows are those of all samples: other inputs may take "
            "other roads than these; expand='axis' calls such modules once for each sample"
        )
    of_together = _named(together, model)
    alone = {s: _named(one_pass(1, [s])[0], model) for s in result.alone}
    again = _named(one_pass(1, [0])[0], model)
    if not _alike(alone[0], again):
        result.inconclusive.append("the forward does not repeat: the same sample, run twice under one seed, gives other outputs")
        return
    dim = conversion.batch_dim or 0
    result.mismatch = _mismatch(of_together, alone, samples, dim)
    if result.mismatch is not None:  # of a model whose forward changes what the next one reads, samples come one after another
        one_after_another = {s: _named(one_pass(1, [s], restored=s == 0)[0], model) for s in range(samples)}
        if _mismatch(of_together, one_after_another, samples, dim) is not None:
            return
        result.mismatch, alone = None, one_after_another
    if not any(_differs(a, b) for a in alone.values() for b in alone.values()):
        result.inconclusive.append(
            "all noise samples give the same outputs on example_inputs, so that equal outputs say little: are all rates 0, or is something "
            "behind the noise that starts at zero (LoRA)?"
        )
    if next((x.shape[dim] for x in inputs if x.dim() > dim), None) == 1:
        result.inconclusive.append("example_inputs hold one example, which cannot show whether rows meet; give two or more")
    result.compared = True
    if gradients:
        _compare_gradients(model, result, one_pass, samples, dim)


def _mismatch(together: dict[str, Tensor], alone: dict[int, dict[str, Tensor]], samples: int, dim: int) -> str | None:
    """The first output of a sample that is not the same together and alone."""
    largest = max((_largest(x) for x in together.values() if x.dtype.is_floating_point), default=0.0)
    for name, x in together.items():
        if not x.dtype.is_floating_point:
            continue
        for s, each in alone.items():
            if name not in each:
                return f"output {name} is not there for a sample alone"
            part = _part(x, each[name], s, samples, dim)
            if part is None:
                return f"output {name} has shape {tuple(x.shape)} for {samples} samples and {tuple(each[name].shape)} for one"
            off = _difference(part, each[name])
            if not off <= _tolerance(x.dtype) * max(_largest(each[name]), 1e-3 * largest):
                spread = max(_difference(a[name], b[name]) for a in alone.values() for b in alone.values())
                return f"output {name} of sample {s} is off by {off:.2g}, where samples differ by {spread:.2g}"
    return None


def _differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two samples' outputs differ, beyond rounding."""
    floats = [name for name, x in a.items() if x.dtype.is_floating_point and name in b]
    return any(_difference(a[name], b[name]) > 4 * _tolerance(a[name].dtype) * _largest(a[name]) for name in floats)


def _compare_gradients(model: nn.Module, result: Verification, one_pass, samples: int, dim: int) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    together = _named(one_pass(samples, None)[0], model)
    of_samples = {}
    for s in result.alone:
        each = _named(one_pass(1, [s])[0], model)
        of_samples[s] = (_gradients(each, parameters, None), {name: x.shape for name, x in each.items()})
    for s, (want, shapes) in of_samples.items():
        parts = {
            name: _part(x, torch.empty(shapes[name], device="meta"), s, samples, dim) for name, x in together.items() if name in shapes
        }
        got = _gradients(parts, parameters, True)
        for name, g in got.items():
            w = want[name]
            scale = 0.0 if w is None else float(w.abs().max()) if w.numel() else 0.0
            off = (
                0.0
                if w is None and g is None
                else _difference(g if g is not None else torch.zeros_like(w), w if w is not None else torch.zeros_like(g))
            )
            largest = max((float(v.abs().max()) for v in want.values() if v is not None and v.numel()), default=0.0)
            if not off <= 4 * _tolerance(parameters[name].dtype) * max(scale, 1e-3 * largest):
                result.mismatch = f"the gradient of {name} under sample {s} is off by {off:.2g}, where it is up to {scale:.2g}"
                return
    result.gradients = True


def _gradients(outputs: dict[str, Tensor], parameters: dict[str, nn.Parameter], retain: bool | None) -> dict[str, Tensor | None]:
    """Of a fixed weighted sum of the outputs."""
    total = [
        (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum()
        for x in outputs.values()
        if x is not None and x.requires_grad
    ]
    if not total:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(sum(v.double() for v in total), list(parameters.values()), allow_unused=True, retain_graph=retain)
    return dict(zip(parameters, found, strict=True))


def _named(output: Any, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an output, those of objects too."""
    named = {}
    for path, v in tree_flatten_with_path(output)[0]:
        name = f"output{keystr(path)}"
        if isinstance(v, Tensor):
            named[name] = v
        else:
            named |= {f"{name} ({type(v).__name__}, tensor {i})": x for i, x in enumerate(Output(v, model).tensors)}
    return named


def _part(x: Tensor, alone: Tensor, s: int, samples: int, dim: int) -> Tensor | None:
    """The share of sample s in an output of all."""
    if alone.dim() == 0:
        return x[s] if x.shape == (samples,) else None
    wider = [d for d in range(alone.dim()) if x.dim() == alone.dim() and x.shape[d] == samples * alone.shape[d]]
    wider = [d for d in wider if all(x.shape[e] == alone.shape[e] for e in range(alone.dim()) if e != d)]
    if not wider:
        return x if x.shape == alone.shape and not x.numel() else None
    d = dim if dim in wider else wider[0]
    return x.unflatten(d, (samples, -1)).select(d, s)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest, with equal infinities and NaN in the same places as no difference."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf")).max())


def _alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape and (not x.dtype.is_floating_point or _difference(x, b[name]) <= _tolerance(x.dtype) * _largest(x))
        for name, x in a.items()
    )


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """Of outputs, relative to the largest: the rounding of a deep network, far below what another mask changes."""
    return torch.finfo(dtype).eps ** 0.5


def _text(error: Exception) -> str:
    text = " ".join([*str(error).splitlines()[:1], *getattr(error, "__notes__", ())])
    return f"{type(error).__name__}: {shorten(text, 500, placeholder=' ...')}"
