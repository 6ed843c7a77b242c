"""What every model has to show: S*B rows, the loop's outputs, gradients and running statistics, and eval mode bit for bit as before."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import iwsgd_ext as iw

SEED, S = 9, 3


def assert_equal_to_loop(
    model: nn.Module, inputs: dict[str, Any] | tuple, output: Callable = lambda y: y, expand: str = "axis", **options
) -> iw.Audit:
    """Converts the model (made double) and returns its audit. The loop is the same model, one noise sample after another.

    ``output`` takes what of the model's output is compared: a tensor, or a tuple of some.
    """
    model, dim = model.double(), options.get("batch_dim", 0)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def outputs(m: nn.Module) -> tuple[Tensor, ...]:
        y = output(m(*args, **kwargs))
        return y if isinstance(y, tuple) else (y,)

    before = outputs(model.eval())
    iw.convert(model, S, expand=expand, example_inputs=inputs, **{"strict": True, "batch_norm": "per_sample", **options})
    assert all(map(torch.equal, outputs(model.eval()), before))
    model.train()
    twin = copy.deepcopy(model)

    with iw.sampling(S, seed=SEED):
        got = outputs(model)
    samples = []
    for s in range(S):
        with iw.sampling(1, seed=SEED, sample_ids=[s]):
            samples.append(outputs(twin))
    want = [torch.cat(each, dim) if each[0].dim() else torch.stack(each) for each in zip(*samples, strict=True)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert not all(map(torch.allclose, samples[0], samples[1])), "no noise reaches the output"
    assert not all(map(torch.allclose, samples[0], before))
    weights = [torch.randn_like(y) for y in want]
    for outs in (got, want):
        sum((y * w).sum() for y, w in zip(outs, weights, strict=True)).backward()
    norms = 0.0
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
            norms += p.grad.norm().item()
    assert norms > 0
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    audit = iw.audit(model, *args, gradients=True, **kwargs)
    assert audit.complete and audit.verification.gradients, str(audit)
    return audit


def assert_is_loop(
    model: nn.Module, x: Tensor, forward: Callable[[nn.Module], Callable] = lambda m: m, tolerance: float = 1e-10, **options
) -> nn.Module:
    """The converted model, after one training forward without example inputs: outputs, gradients and buffers are those of the same model
    called for one noise sample after another. ``forward`` makes what is called of the converted model: compiled, say."""
    model = model.train()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that are called one by one
        iw.convert(model, S, **options), iw.convert(twin, S, **options)
        with iw.sampling(S, seed=SEED):
            got = forward(model)(x)
        each = []
        for s in range(S):
            with iw.sampling(1, seed=SEED, sample_ids=[s]):
                each.append(twin(x))
    want = torch.cat(each)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, want, **close)
    for y in (got, want):
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **close)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, **close, msg=lambda text, name=name: f"{name}: {text}")
    return model
