"""Integers that users have are not always Python's: NumPy's, and the bytes of label images, count as what they are."""

import numpy as np
import pytest
import torch
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext import functional as F

S, B = 3, 4
KINDS = [np.int64, np.int32, np.uint8, np.uint64]


def network(samples):
    torch.manual_seed(0)
    return iw.convert(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5)), samples, example_inputs=torch.ones(B, 6))


def noise(n):
    x, ids = torch.ones(B, 6), [n(4), n(0), n(7)]
    with iw.sampling(n(S), seed=n(9), sample_ids=ids, first_example=n(5), batch_dim=n(0)):
        yield iw.IWDropout(0.5)(x)
    address = {"samples": n(S), "seed": n(9), "stream": n(2), "first_example": n(3), "batch_dim": n(0)}
    yield F.dropout(x, 0.5, sample_ids=ids, **address)
    yield F.dropout(x, 0.5, sample_ids=torch.tensor([[0, 1, 2, 3]] * S) if n is int else np.array([[0, 1, 2, 3]] * S, dtype=n), **address)
    yield F.multinomial_dropout(x, None, n(3), **address)
    yield F.drop_connect(x, x, samples=n(S), seed=n(9), batch_dim=n(0))


def losses(n):
    torch.manual_seed(0)
    z, y = torch.randn(S * B, 5), torch.tensor([0, 2, 4, 2])
    yield iw.iw_cross_entropy(z, y, n(S), ignore_index=n(2))
    criterion = iw.IWCrossEntropyLoss(n(S), ignore_index=n(2))
    yield criterion(z, y)
    yield criterion.log_likelihood(z, y, n(S))[0]
    yield iw.iw_logmeanexp(z[:, 0], n(S))
    yield iw.IWLoss(nn.MSELoss(reduction="none"), n(S))(z, torch.ones(B, 5))


def training(n):
    x, y = torch.ones(B, 6), torch.tensor([0, 2, 4, 2])
    for options in ({"strategy": "streamed", "chunk": n(2)}, {"strategy": "resampled", "keep": n(2)}, {"strategy": "loop"}):
        model = network(n(S))
        yield iw.backward(model, iw.IWCrossEntropyLoss(n(S)), x, y, samples=n(S), seed=n(1), first_example=n(2), **options)
        yield model[0].weight.grad
    yield iw.predict(model, x, samples=n(S), chunk=n(2), seed=n(1))
    yield from iw.bound_curve(model, [(x, y)], samples=n(S), chunk=n(2), seed=n(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", [noise, losses, training])
def test_numpys_integers(use, kind):
    for got, expected in zip(use(kind), use(int), strict=True):
        assert torch.equal(got, expected)


def test_the_largest_seeds():
    """A seed has 64 bits, however it is written."""
    x = torch.ones(B, 6)
    for kind, value, same in ((np.uint64, 2**64 - 1, -1), (np.uint64, 2**63, -(2**63)), (np.int64, -(2**63), 2**63)):
        assert torch.equal(F.dropout(x, 0.5, samples=S, seed=kind(value)), F.dropout(x, 0.5, samples=S, seed=same))


def test_labels_that_are_bytes(backend, device):
    """A label image of bytes is one of class indices, as for F.cross_entropy; 255 is the usual mark of what does not count."""
    z, y = torch.randn(S * B, 5, 7, device=device, requires_grad=True), torch.randint(5, (B, 7), device=device)
    y[0, :3] = 255
    results = []
    for labels in (y, y.byte()):
        loss = iw.iw_cross_entropy(z, labels, S, ignore_index=255)
        results.append((loss, *torch.autograd.grad(loss, z), iw.IWCrossEntropyLoss(S, ignore_index=255).log_likelihood(z, labels, S)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    z, y = z[:B, :, 3], y[:, 3].byte()
    alone = torch.nn.functional.cross_entropy(z, y, ignore_index=255)
    torch.testing.assert_close(iw.iw_cross_entropy(z, y, 1, ignore_index=255), alone)


@pytest.mark.parametrize("wrong", [True, 2.0, "2", np.bool_(True), np.float64(2)])
def test_what_is_no_integer(wrong):
    with pytest.raises(TypeError, match="samples: expected an int, got"):
        iw.sampling(wrong)
    with pytest.raises(TypeError, match="ignore_index: expected an int, got"):
        iw.IWCrossEntropyLoss(2, ignore_index=wrong)
    with pytest.raises(TypeError, match="seed: expected an int or an int64 tensor"):
        iw.sampling(2, seed=wrong)
    with pytest.raises(TypeError, match="sample_ids: expected an int64 tensor or a sequence of ints"):
        iw.sampling(1, sample_ids=[wrong] if wrong is not True else np.array([True]))


@pytest.mark.parametrize("strategy", ["batched", "streamed", "loop"])
def test_bytes_at_the_level_of_positions(strategy):
    model = iw.convert(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Unflatten(1, (4, 2))), S)
    x, y, results = torch.ones(B, 6), torch.randint(4, (B, 2)), []
    for labels in (y, y.byte()):
        results.append(iw.backward(model, iw.IWCrossEntropyLoss(S, level="position"), x, labels, samples=S, strategy=strategy, seed=1))
    assert torch.equal(*results)
