"""What every model has to show: S*B rows, the loop's outputs, gradients and running statistics, and eval mode bit for bit as before."""

import copy

import torch
from torch import Tensor, nn

import iwsgd_ext as iw

SEED, S = 9, 3


def assert_equal_to_loop(model: nn.Module, inputs: dict[str, Tensor], output=lambda y: y, expand: str = "auto", **options) -> iw.Audit:
    """Converts the model (made double) and returns its audit. The loop is the same model, one noise sample after another."""
    model = model.double()
    before = output(model.eval()(**inputs))
    batch = len(before)
    iw.convert(model, S, expand=expand, example_inputs=inputs, strict=True, batch_norm="per_sample", **options)
    assert torch.equal(output(model.eval()(**inputs)), before)
    model.train()
    twin = copy.deepcopy(model)

    with iw.sampling(S, seed=SEED):
        got = output(model(**inputs))
    assert got.shape == (S * batch, *before.shape[1:])
    samples = []
    for s in range(S):
        with iw.sampling(1, seed=SEED, sample_ids=[s]):
            samples.append(output(twin(**inputs)))
    want = torch.cat(samples)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(samples[0], samples[1]), "no noise reaches the output"
    assert not torch.allclose(got[0], before[0])
    weight = torch.randn_like(want)
    for y in (got, want):
        (y * weight).sum().backward()
    norms = 0.0
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
            norms += p.grad.norm().item()
    assert norms > 0
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    return iw.audit(model, **inputs)
