"""torch.compile(fullgraph=True) of models on the sample axis: outputs, gradients and buffers of the eager axis."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import iwsgd_ext as iw
from iwsgd_ext.ops.multinomial import uniform_bounds

B, S = 5, 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """A residual path, BatchNorm before and behind noise, functional dropout, rows that meet, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.d, self.c, self.m, self.b = (
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)),
            *(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Linear(8, 3)),
        )

    def forward(self, x):
        h = self.d(self.n(self.a(x))).relu()
        h = h + self.m(self.c(h)) - h.mean(0)
        h = F.dropout(h, 0.2, self.training)
        return {"y": self.b(h), "aux": h.mean(), "n": 3}


def noises():
    layers = (iw.IWGaussianNoise(0.1), iw.IWGaussianDropout(0.3), iw.IWMultinomialDropout(0.3), iw.IWAlphaDropout(0.2), iw.IWDropPath(0.3))
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.attention, self.out = nn.Dropout(0.3), nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        h = self.d(x)
        return self.out(h + self.attention(h, h, h, need_weights=False)[0])


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def images():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.4), nn.Conv2d(4, 3, 3), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


MODELS = {
    "net": (Net, (6,)),
    "noises": (noises, (6,)),
    "attention": (Attends, (4, 6)),
    "images": (images, (3, 8, 8)),
}


def check(make, shape, backend):
    model, x = make().double(), torch.randn(B, *shape, dtype=torch.float64)
    iw.convert(model, S, example_inputs=x)
    twin, compiled = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend=backend)
    take = lambda y: (y["y"], y["aux"]) if isinstance(y, dict) else (y,)  # noqa: E731
    for seed in (1, 2, 3):
        results = []
        for m in (compiled, twin):
            with iw.sampling(S, seed=seed):
                y = m(x)
            assert not isinstance(y, dict) or y["n"] == 3
            gradients = torch.autograd.grad(sum(v.square().sum() for v in take(y)), list(m.parameters()))
            results.append((*take(y), *gradients, *m.buffers()))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1, "a new seed recompiles"
    assert results[0][0].shape[0] == S * B
    drawn = []
    for m in (compiled, twin, compiled):
        torch.manual_seed(7)
        drawn.append(take(m(x))[0])  # a context of the model's own
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(take(compiled.eval()(x)), take(model.eval()(x)), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_is_eager(name):
    check(*MODELS[name], "aot_eager")


@pytest.mark.slow
def test_inductor_is_eager():
    check(small, (6,), "inductor")


@pytest.mark.slow
def test_training_steps():
    """SGD by the compiled model and by the eager one end at the same parameters."""
    x, y = torch.randn(B, 6, dtype=torch.float64), torch.randint(3, (B,))
    model = iw.convert(Net().double(), S, example_inputs=x)
    twin, results = copy.deepcopy(model), []
    for m in (torch.compile(model, fullgraph=True, backend="aot_eager"), twin):
        optimizer, losses = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), []
        torch.manual_seed(5)
        for _ in range(5):
            optimizer.zero_grad()
            loss = iw.iw_cross_entropy(m(x)["y"], y, S)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, list(m.parameters())))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)
    assert results[0][0][-1] < results[0][0][0]


@pytest.mark.parametrize("features", [8, 1000])
def test_uniform_bounds_by_inductor(features):
    """torch 2.13's inductor had these integers wrong."""
    want = uniform_bounds(features, torch.device("cpu"))
    got = torch.compile(lambda: uniform_bounds(features, torch.device("cpu")), fullgraph=True, backend="inductor")()
    assert torch.equal(got, want)
