"""A conversion checked by running it: S noise samples together, and some of them alone, must give the same outputs under one seed.

A sample alone is the model's ordinary forward: B rows, one call, no axis and no rows of other samples. So its outputs are the expected
ones, however a conversion runs S samples at once.
"""

from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from ..layers.context import sampling
from .axis_outputs import Output
from .functional_dropout import Watch
from .pass_state import RandomState, Snapshot

SEED = 20171204


@dataclass
class Verification:
    """The verdict on a converted model, from runs of all samples together and of some alone.

    Attributes:
        samples: S of the run together.
        alone: the samples that were run alone, too.
        verdict: "equal": samples together give what each gives alone.
            "different": they do not.
            "unclear": outputs cannot be compared, or equal ones say little.
            "not compared": there was no noise, or no comparison was asked for.
            "stopped": the model raised an error.
        message: the reason, for every verdict but "equal".
        error: the error that the model raised.
        gradients: True where gradients of the parameters were compared, too, and are equal.
        scalar_output: True where the model returns a number for each sample.
        written: names of the buffers, other than BatchNorm's, that a forward writes, once for all samples: by values without noise.
    """

    samples: int
    alone: list[int]
    verdict: str = "not compared"
    message: str = "outputs were not compared with those of samples alone"
    error: Exception | None = None
    gradients: bool = False
    scalar_output: bool = False
    written: list[str] = field(default_factory=list)

    def check(self, expand: str, where: str) -> None:
        """Raises where the verdict is "different"; ``where`` names the inputs."""
        if self.verdict != "different":
            return
        choice = "one_by_one=[''], which calls the model once for each sample"
        choice = choice if expand == "axis" else "expand='axis', which keeps samples apart"
        raise ValueError(
            f"{where}: with expand={expand!r}, {self.samples} samples together do not give what each gives alone: {self.message}. "
            f"Take {choice}, or iw.backward(strategy='loop'); verify=False converts all the same"
        )


def verify_conversion(
    model: nn.Module, samples: int, args: tuple, kwargs: dict, *, compare: bool = True, gradients: bool = False
) -> Verification:
    """Runs a converted model in training mode, samples together and alone. Afterwards the model and all random generators are as before."""
    result = Verification(samples, sorted({0, samples // 2, samples - 1}))
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
            drew, moved = context.stream > 0, before.moved()
            result.written, result.scalar_output = snapshot.written(model), context.scalar_output
            if "torch" in moved and conversion.expand == "axis":
                one_pass(samples, None, Watch.of(model), "different")  # as in training, where one number for all samples may raise
            conversion.saw(list(watch.calls), drew, moved)
            if not drew:
                result.message = "no noise was drawn"
            elif compare and samples > 1:
                reason = _reason_against(model, conversion, watch, moved)
                if reason is not None:
                    result.verdict, result.message = "unclear", reason
                else:
                    _compare(model, result, conversion.batch_dim or 0, together, one_pass, gradients, inputs)
    except Exception as error:  # a model may raise anything
        result.verdict, result.message, result.error = "stopped", f"the model stops on these inputs: {_text(error)}", error
    finally:
        snapshot.restore()
        for module, training in flags:
            if training is not None:
                vars(module)["training"] = training
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                module.reshard()  # FSDP2: an optimizer made now would get the unsharded copies, and train nothing
    return result


def _reason_against(model: nn.Module, conversion, watch: Watch, moved: list[str]) -> str | None:
    """The reason why samples in rows cannot be compared with samples alone, or None."""
    if conversion.expand == "axis":
        return None
    if conversion.batch_norm == "joint" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return "batch_norm='joint' makes the outputs of samples depend on one another: they cannot be compared with samples alone"
    if "torch" in moved:
        return "the forward draws torch's random numbers, other ones for each number of rows: outputs cannot be compared"
    if watch.asks is not None:
        return (
            f"the forward asks for the values of tensors ({watch.asks}), which in rows are those of all samples: other inputs may take "
            "other branches than these; expand='axis' calls such modules once for each sample"
        )
    return None


def _compare(model: nn.Module, result: Verification, dim: int, together: Any, one_pass, gradients: bool, inputs: list[Tensor]) -> None:
    """Sets the verdict by the outputs of samples together and alone, and, where ``gradients``, by those of the parameters."""
    samples, of_together = result.samples, _named(together, model)
    alone = {s: _named(one_pass(1, [s])[0], model) for s in result.alone}
    again = _named(one_pass(1, [0])[0], model)
    if not _alike(alone[0], again):
        result.verdict = "unclear"
        result.message = "the forward does not repeat: the same sample, run twice under one seed, gives other outputs"
        return
    mismatch = _mismatch(of_together, alone, samples, dim)
    if mismatch is not None:  # of a model whose forward changes the state that the next one reads, samples come one after another
        alone = {s: _named(one_pass(1, [s], restored=s == 0)[0], model) for s in range(samples)}
        if _mismatch(of_together, alone, samples, dim) is not None:
            result.verdict, result.message = "different", mismatch
            return
    doubts = []
    if all(_alike(a, b) for a in alone.values() for b in alone.values()):
        doubts.append(
            "all noise samples give the same outputs on example_inputs, so that equal outputs say little: are all rates 0, or is there a "
            "layer behind the noise that starts at zero (LoRA)?"
        )
    if next((x.shape[dim] for x in inputs if x.dim() > dim), None) == 1:
        doubts.append("example_inputs hold one example, which cannot show whether rows meet; give two or more")
    mismatch = _gradient_mismatch(model, result.alone, one_pass, samples, dim) if gradients else None
    if mismatch is not None:
        result.verdict, result.message = "different", mismatch
    elif doubts:
        result.verdict, result.message = "unclear", "; ".join(doubts)
    else:
        result.verdict, result.message = "equal", ""
    result.gradients = gradients and mismatch is None


def _mismatch(together: dict[str, Tensor], alone: dict[int, dict[str, Tensor]], samples: int, dim: int) -> str | None:
    """The first output of a sample that is not the same together and alone, and by how much, or None."""
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


def _gradient_mismatch(model: nn.Module, alone: list[int], one_pass, samples: int, dim: int) -> str | None:
    """The first parameter whose gradient under a sample is not the same together and alone."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    together = _named(one_pass(samples, None)[0], model)
    of_samples = {}
    for s in alone:
        each = _named(one_pass(1, [s])[0], model)
        of_samples[s] = (_gradients(each, parameters, None), {name: x.shape for name, x in each.items()})
    for s, (want, shapes) in of_samples.items():
        parts = {
            name: _part(x, torch.empty(shapes[name], device="meta"), s, samples, dim) for name, x in together.items() if name in shapes
        }
        got = _gradients(parts, parameters, True)
        largest = max((_largest(w) for w in want.values()), default=0.0)
        for name, w in want.items():
            off, scale = _difference(got[name], w), _largest(w)
            if not off <= 4 * _tolerance(w.dtype) * max(scale, 1e-3 * largest):
                return f"the gradient of {name} under sample {s} is off by {off:.2g}, where it is up to {scale:.2g}"
    return None


def _gradients(outputs: dict[str, Tensor], parameters: dict[str, nn.Parameter], retain: bool | None) -> dict[str, Tensor]:
    """The gradients of a fixed weighted sum of the outputs; zeros for parameters that it does not depend on."""
    total = [
        (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum()
        for x in outputs.values()
        if x is not None and x.requires_grad
    ]
    if not total:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = torch.autograd.grad(sum(v.double() for v in total), list(parameters.values()), retain_graph=retain, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _named(output: Any, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an output by name, those inside of objects too."""
    named = {}
    for path, v in tree_flatten_with_path(output)[0]:
        name = f"output{keystr(path)}"
        if isinstance(v, Tensor):
            named[name] = v
        else:
            named |= {f"{name} ({type(v).__name__}, tensor {i})": x for i, x in enumerate(Output(v, model).tensors)}
    return named


def _part(x: Tensor, alone: Tensor, s: int, samples: int, dim: int) -> Tensor | None:
    """The part of sample s in an output of all samples, or None where the shape does not fit."""
    if alone.dim() == 0:
        return x[s] if x.shape == (samples,) else None
    wider = [d for d in range(alone.dim()) if x.dim() == alone.dim() and x.shape[d] == samples * alone.shape[d]]
    wider = [d for d in wider if all(x.shape[e] == alone.shape[e] for e in range(alone.dim()) if e != d)]
    if not wider:
        return x if x.shape == alone.shape and not x.numel() else None
    d = dim if dim in wider else wider[0]
    return x.unflatten(d, (samples, -1)).select(d, s)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities, and NaN in the same places, do not differ."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf")).max())


def _alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """True where two samples' outputs are equal, up to rounding."""
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape and (not x.dtype.is_floating_point or _difference(x, b[name]) <= _tolerance(x.dtype) * _largest(x))
        for name, x in a.items()
    )


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """The largest rounding error of a deep network's outputs, relative to the largest of them: far below the change by another mask."""
    return torch.finfo(dtype).eps ** 0.5


def _text(error: Exception) -> str:
    text = " ".join([*str(error).splitlines()[:1], *getattr(error, "__notes__", ())])
    return f"{type(error).__name__}: {shorten(text, 500, placeholder=' ...')}"
