"""Weight noise against a loop over samples and examples; nn.Linear where there is none."""

import copy
import io

import pytest
import torch
from oracle import naive, naive_layers
from test_attention import B, S, after_noise, assert_same, leaves
from torch import nn

import iwsgd_ext as iw

IN, OUT = 5, 7  # 35 positions end inside a group of eight
IDS = [4, 0, 2]


def layer_of(device, dtype=torch.float64, **options) -> iw.IWDropConnect:
    return iw.IWDropConnect(IN, OUT, **{"p": 0.3, "device": device, "dtype": dtype, **options})


SHAPES = [((B,), 0), ((B, 3), 0), ((3, B), 1), ((3, B, 2), 1), ((3, 4, B), -2)]


@pytest.mark.parametrize(("lead", "batch_dim"), SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"drop_bias": True}, {"p": 1.0}], ids=str)
@pytest.mark.parametrize("expanded", [False, True])
def test_layer(device, backend, lead, batch_dim, options, expanded):
    """Value and all gradients; first_example plays no part, not as a tensor either; the functional form is the same."""
    layer = layer_of(device, batch_dim=batch_dim, **options)
    dim = batch_dim % (len(lead) + 1)
    lead = [S * n if expanded and d == dim else n for d, n in enumerate(lead)]
    x = torch.randn(*lead, IN, device=device, dtype=torch.float64).requires_grad_()
    bias = [] if layer.bias is None else [layer.bias]

    def check(got):
        truth = leaves(x, layer.weight, *bias)
        parameters = (*truth[1:], None)[:2]
        options = {"samples": S, "batch": B, "seed": 9, "stream": 1, "sample_ids": IDS, "drop_bias": layer.drop_bias}
        want = naive_layers.linear_under_weight_noise(truth[0].movedim(dim, 0), *parameters, layer.p, **options).movedim(0, dim)
        assert_same(got, want, [x, layer.weight, *bias], truth)

    for first in (3, torch.tensor(3)):
        with iw.sampling(S, seed=9, sample_ids=IDS, first_example=first) as context:
            iw.IWDropout(0.5)(torch.ones(B, 1))
            got = layer(x)
            assert context.stream == 2 + layer.drop_bias
        check(got)
    address = {"samples": S, "seed": 9, "stream": torch.tensor(1), "sample_ids": IDS}
    rows = {"expand": not expanded, "batch_dim": batch_dim}
    check(iw.functional.drop_connect(x, layer.weight, layer.bias, layer.p, drop_bias=layer.drop_bias, **rows, **address))


def test_first_noise_layer_fixes_the_batch(device, backend):
    """Weight noise expands as any noise layer, the next one keeps its rows; the context's batch_dim holds where the layer has none."""
    one, other = layer_of(device), iw.IWDropConnect(OUT, 4, p=0.6, device=device, dtype=torch.float64)
    x = torch.randn(3, B, IN, device=device, dtype=torch.float64).requires_grad_()
    with iw.sampling(S, seed=9, batch_dim=1):
        got = other(one(x))
    truth = leaves(x, *one.parameters(), *other.parameters())
    address = {"samples": S, "batch": B, "seed": 9}
    want = naive_layers.linear_under_weight_noise(truth[0].transpose(0, 1), *truth[1:3], 0.3, **address)
    want = naive_layers.linear_under_weight_noise(want, *truth[3:], 0.6, stream=1, **address).transpose(0, 1)
    assert_same(got, want, [x, *one.parameters(), *other.parameters()], truth)
    with iw.sampling(S), pytest.raises(ValueError, match=r"met 3 rows, but in this context the batch is 2 and samples=3"):
        iw.IWDropout(0.5)(torch.ones(B, 1))
        one(x)


def test_replay_of_one_sample(device, backend):
    layer = layer_of(device, drop_bias=True)
    x = torch.randn(B, IN, device=device, dtype=torch.float64)
    with iw.sampling(S, seed=2):
        every = layer(x)
    for s in range(S):
        with iw.sampling(1, seed=2, sample_ids=[s]):
            torch.testing.assert_close(layer(x), every[s * B : (s + 1) * B])


def test_law(device, backend):
    """Mean W x and variance p / (1 - p) sum w^2 x^2 over 4096 samples, and samples independent; six standard deviations of 2 * 7 + 1
    comparisons of nearly normal sums: below 1e-7 in all."""
    n, p, features = 4096, 0.3, 64
    layer = iw.IWDropConnect(features, OUT, p=p, bias=False, device=device, dtype=torch.float64)
    x = torch.randn(1, features, device=device, dtype=torch.float64)
    with iw.sampling(n, seed=3), torch.no_grad():
        y = layer(x)
    mean, variance = x[0] @ layer.weight.T, p / (1 - p) * (x.square() @ layer.weight.square().T)[0]
    assert ((y.mean(0) - mean).abs() <= 6 * (variance / n).sqrt()).all()
    assert ((y.var(0) / variance - 1).abs() <= 6 * (3 / n) ** 0.5).all()  # 2/n for a normal sum, and room for its kurtosis
    z = (y[:, 0] - mean[0]) / variance[0].sqrt()
    assert abs((z[1:] * z[:-1]).mean().item()) <= 6 / n**0.5


def test_examples_share_a_samples_weights(device, backend):
    """What is linear in x for each sample: y(a) + y(b) = y(a + b)."""
    layer = layer_of(device, bias=False)
    a, b = torch.randn(2, 1, IN, device=device, dtype=torch.float64)
    with iw.sampling(S, seed=1):
        y = layer(torch.cat([a, b, a + b])).view(S, 3, OUT)
    torch.testing.assert_close(y[:, 0] + y[:, 1], y[:, 2])
    assert not torch.allclose(y[0], y[1])


@pytest.mark.parametrize("shape", [(IN,), (B, IN), (B, 3, IN)])
def test_alone_is_one_fresh_sample(device, backend, shape):
    """Outside of any context: nn.Linear with dropped weights, other ones at each call, after torch.manual_seed."""
    layer = layer_of(device)
    x = torch.randn(shape, device=device, dtype=torch.float64)
    torch.manual_seed(5)
    one, other = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(one, layer(x))
    assert one.shape == (*shape[:-1], OUT)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    seed = torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None).item()
    keep = naive_layers.keep_scale(0.3, seed=seed, stream=0, sample=0, example=0, shape=(OUT, IN)).to(device)
    torch.testing.assert_close(one, nn.functional.linear(x, layer.weight * keep, layer.bias))


def test_eval_is_linear(device):
    layer = layer_of(device, torch.float32).eval()
    x = torch.randn(B, IN, device=device)
    with iw.sampling(S) as context:
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert context.stream == 0


def test_made_from_a_linear(device):
    """By from_linear, which shares its parameters, and by the class alone; copies and pickles draw the same."""
    linear = nn.Linear(IN, OUT, device=device)
    layer = iw.IWDropConnect.from_linear(linear.eval(), 0.3, drop_bias=True)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert repr(layer) == "IWDropConnect(in_features=5, out_features=7, bias=True, p=0.3, drop_bias=True)"
    assert iw.IWDropConnect.from_linear(nn.Linear(2, 3, bias=False)).bias is None
    swapped = copy.deepcopy(linear)
    swapped.__class__ = iw.IWDropConnect
    assert (swapped.p, swapped.drop_bias, swapped.batch_dim) == (0.5, False, None)
    swapped.p, swapped.drop_bias = 0.3, True
    swapped.load_state_dict(linear.state_dict())
    linear.load_state_dict(swapped.state_dict())
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    x, results = torch.randn(B, IN, device=device), []
    for other in (layer, swapped, copy.deepcopy(swapped), torch.load(file, weights_only=False)):
        with iw.sampling(S, seed=1):
            results.append(other.train()(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(device, backend, dtype):
    layer = layer_of(device, dtype)
    x = torch.randn(B, IN, device=device).to(dtype)
    with iw.sampling(S, seed=1):
        got = layer(x)
    assert got.dtype == dtype
    truth = leaves(x, *layer.parameters())
    want = naive_layers.linear_under_weight_noise(*truth, 0.3, samples=S, batch=B, seed=1)
    eps = torch.finfo(dtype).eps
    assert (got.detach().cpu().double() - want).abs().max() <= 8 * eps * want.abs().max()  # a sum of five rounded products and a bias


def test_autocast(device):
    layer = layer_of(device, torch.float32, drop_bias=True)
    x = torch.randn(B, 3, IN, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16), iw.sampling(S, seed=1):
        low = layer(x)
    with iw.sampling(S, seed=1):
        full = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)
    low.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_channels_last_weight_and_strides(device, backend):
    """A weight of other strides keeps its positions: the index is the logical one."""
    layer = layer_of(device)
    x = torch.randn(IN, B, device=device, dtype=torch.float64).T
    with iw.sampling(S, seed=1):
        want = layer(x)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not layer.weight.is_contiguous()
    with iw.sampling(S, seed=1):
        torch.testing.assert_close(layer(x.contiguous()), want)


def test_compiled(device):
    torch._dynamo.reset()
    layer = layer_of(device, torch.float32, drop_bias=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for lead in ((B,), (S * B, 3)):
        x = torch.randn(*lead, IN, device=device).requires_grad_()
        results = []
        for f in (layer, compiled):
            with after_noise():
                y = f(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivative(device):
    layer = layer_of(device)
    x = torch.randn(B, IN, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *a: iw.functional.drop_connect(*a, 0.3, samples=2, seed=1), [x, layer.weight, layer.bias])


def test_same_bits_as_other_noise(device, backend):
    """The mask of a weight is that of dropout of one example with as many positions."""
    weight = torch.ones(OUT, IN, device=device, dtype=torch.float64)
    got = iw.functional.drop_connect(torch.eye(IN, device=device, dtype=torch.float64), weight, p=0.3, samples=S, seed=6, stream=2)
    for s in range(S):
        mask = naive.naive_mask(6, 2, s, 0, OUT * IN, 0.3).reshape(OUT, IN)
        assert torch.equal(got[s * IN : (s + 1) * IN].T.cpu() != 0, torch.from_numpy(mask))


def test_bad_input(device):
    layer = layer_of(device, torch.float32)
    x = torch.ones(B, IN, device=device)
    cases = [
        (ValueError, r"x: expected \[rows, ..., features\], got \(5,\)", x[0]),
        (ValueError, r"x: expected as many features as the weight's second dimension, got \(2, 4\)", x[:, :4]),
        (TypeError, r"x: expected float32, .*, got torch.int64", x.long()),
    ]
    for error, message, given in cases:
        with iw.sampling(S), pytest.raises(error, match=message):
            layer(given)
    with iw.sampling(2, sample_ids=torch.tensor([[0, 1], [2, 3]])) as context:
        with pytest.raises(ValueError, match=r"sample_ids: expected \[2\] where weights are noisy, .* got \(2, 2\)"):
            layer(x)
        assert context.stream == 0
    for batch_dim in (1, -1, 2, -3):
        layer.batch_dim = batch_dim
        with iw.sampling(S), pytest.raises(ValueError, match=r"batch_dim: expected a dimension of the input before its last, .* got"):
            layer(x)
    layer.p = 1.5
    with pytest.raises(ValueError, match=r"p: expected a probability"):
        layer(x)
    with pytest.raises(ValueError, match=r"p: expected a probability"):
        iw.IWDropConnect(2, 3, p=-0.1)
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear, got Identity"):
        iw.IWDropConnect.from_linear(nn.Identity())
    form = iw.functional.drop_connect
    weight = torch.ones(OUT, IN, device=device)
    with pytest.raises(ValueError, match=r"sample_ids: expected \[2\], as all examples"):
        form(x, weight, samples=2, seed=0, sample_ids=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected a number of rows divisible by samples=4"):
        form(x, weight, samples=4, seed=0, expand=False)
    with pytest.raises(ValueError, match=r"bias: expected as many elements"):
        form(x, weight, torch.ones(3), seed=0)
