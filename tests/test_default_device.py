"""Where torch.set_default_device names another device than the data's: what the library makes for itself lies where the data does.

The meta device has no memory, so that anything made on it by default shows as an error or as numbers that nobody wrote.
"""

import copy

import pytest
import torch
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext import functional as F

S, B = 3, 4


class Network(nn.Module):
    """Noise as a layer and as a call, a part that goes sample by sample, batch normalisation."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x):
        h = self.drop(torch.relu(self.norm(self.a(x))))
        return self.b(torch.nn.functional.dropout(h, 0.4, self.training))


def converted(expand, batch_norm="per_sample", **options):
    model = Network()
    return lambda x: iw.convert(copy.deepcopy(model), S, expand=expand, example_inputs=x, batch_norm=batch_norm, **options)


def losses(x, y):
    z = torch.cat([x, x + 1, x - 1])
    soft = torch.softmax(x, 1)
    results = [iw.iw_cross_entropy(z, target, S, normalizer=2.0, reduction="mean", label_smoothing=0.1) for target in (y, soft)]
    results += iw.iw_cross_entropy(z, y, S, return_stats=True)[1]
    return [*results, iw.IWLoss(nn.MSELoss(reduction="none"), S)(z, x), iw.iw_logmeanexp(z[:, 0], S)]


def layers(x, y):
    made = [iw.IWDropout(0.5), iw.IWDropout1d(0.5), iw.IWDropPath(0.5), iw.IWAlphaDropout(0.3), iw.IWGaussianNoise(0.3)]
    made += [iw.IWGaussianDropout(0.3), iw.IWMultinomialDropout(0.4), iw.IWDropConnect(6, 2, 0.5, device="cpu")]
    results = []
    for ids in (None, [4, 0, 7]):
        for layer in made:
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.5)
            with iw.sampling(S, seed=1, sample_ids=ids):
                results.append(layer(x[:, :, None] if isinstance(layer, iw.IWDropout1d) else x))
    with iw.sampling(S, seed=1):
        results.append(iw.IWAdaptiveDropout()(x, torch.full((6,), 0.5, device=x.device)))
    return results


def functions(x, y):
    address = {"samples": S, "seed": 1, "sample_ids": [4, 0, 7]}
    q = x.view(B, 1, 2, 3)
    return [
        *(f(x, 0.5, **address) for f in (F.dropout, F.drop_path, F.alpha_dropout, F.gaussian_dropout, F.gaussian_noise)),
        F.dropout(x, torch.full((6,), 0.5, device=x.device), **address),
        F.multinomial_dropout(x, None, 3, **address),
        F.drop_connect(x, x, samples=S, seed=1),
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.2, samples=S, seed=1),
    ]


def training(expand, strategy, **options):
    convert = converted(expand, **options)

    def run(x, y):
        model = convert(x)
        iw.backward(model, iw.IWCrossEntropyLoss(S), x, y, samples=S, seed=3, strategy=strategy)
        return [*(p.grad for p in model.parameters()), *model.buffers()]

    return run


CONVERT = converted("axis")


def evaluation(x, y):
    model = CONVERT(x)
    iw.audit(model)
    return [iw.predict(model, x, samples=S, seed=2), *iw.bound_curve(model, [(x, y)], samples=S, seed=2)]


def recurrent(x, y):
    layer = iw.IWLSTM(6, 4, num_layers=2, dropout=0.4, device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.1)
    with iw.sampling(S, seed=1):
        return [layer(x.view(B, 1, 6).transpose(0, 1))[0]]


CASES = {
    "losses": losses,
    "layers": layers,
    "functions": functions,
    "recurrent": recurrent,
    "evaluation": evaluation,
    **{
        f"{expand}-{strategy}": training(expand, strategy)
        for expand in ("axis", "input", "first")
        for strategy in ("batched", "streamed", "loop")
    },
    "one by one": training("axis", "batched", one_by_one=["b"]),
    "resampled": training("input", "resampled", batch_norm="frozen"),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_without_it(name):
    x, y = torch.randn(B, 6, device="cpu"), torch.randint(5, (B,), device="cpu")
    before = iw.backend_info()["forced"]
    try:
        for backend in ("cpu", "reference"):
            if not iw.backend_info()["built"][backend]:
                continue
            iw.set_backend(backend)
            torch.manual_seed(0)
            expected = CASES[name](x, y)
            torch.manual_seed(0)
            torch.set_default_device("meta")
            try:
                got = CASES[name](x, y)
            finally:
                torch.set_default_device(None)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    finally:
        iw.set_backend(before)
