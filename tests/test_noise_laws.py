"""Laws beside plain dropout: alpha dropout, and a probability for every feature, example or element."""

import math

import numpy as np
import pytest
import torch
from oracle import naive

import iwsgd_ext as iw
from iwsgd_ext import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SEED = 2**63 + 12345


def fields_of(x, *, samples, expand, batch_dim=0, unit="element", stream=0, first_example=0, sample_ids=None) -> torch.Tensor:
    """The 16-bit field that decides each element of the result, one row after another."""
    rows = x.shape[batch_dim]
    examples = rows if expand else rows // samples
    position, positions = naive.row_positions(tuple(x.shape), batch_dim, unit, naive.in_channels_last_order(x))
    ids = sample_ids or range(samples)
    drawn = [naive.random_fields(SEED % 2**64, stream, s, first_example + b, positions)[position] for s in ids for b in range(examples)]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.stack(drawn), 0, batch_dim)))


def in_float64(x, p: torch.Tensor, samples: int, expand: bool, batch_dim: int, fields: torch.Tensor) -> torch.Tensor:
    """x / (1 - p) where the field reaches p's threshold, else 0; p broadcasts to x, its rows 1, B or all."""
    x = torch.cat([x] * samples, batch_dim) if expand else x
    p = p.double()[(None,) * (x.dim() - p.dim())]
    if p.shape[batch_dim] not in (1, x.shape[batch_dim]):
        p = torch.cat([p] * samples, batch_dim)
    threshold = torch.floor(p * 65536 + 0.5)
    scale = 65536 / (65536 - threshold).clamp(min=1)
    return torch.where(fields >= threshold, x * scale, torch.zeros((), dtype=x.dtype))


RATES = {
    # name: (shape of x, p's shape, unit, batch_dim, form)
    "feature": ((4, 63), (63,), "element", 0, F.dropout),
    "example": ((4, 63), (4, 1), "element", 0, F.dropout),
    "element": ((4, 500), (4, 500), "element", 0, F.dropout),
    "row": ((4, 3, 9), (4, 1, 1), "row", 0, F.drop_path),
    "channel": ((4, 5, 7, 7), (5, 1, 1), "channel", 0, F.dropout2d),
    "example's channel": ((4, 13, 3), (4, 13, 1), "channel", 0, F.dropout1d),
    "time-major": ((7, 4, 9), (9,), "element", 1, F.dropout),
    "time-major element": ((7, 4, 9), (7, 4, 9), "element", 1, F.dropout),
    "more than a chunk": ((4, 9001), (9001,), "element", 0, F.dropout),
    "one number": ((4, 63), (), "element", 0, F.dropout),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "rows"])
def test_rates(backend, device, name, expand):
    shape, p_shape, unit, batch_dim, form = RATES[name]
    samples = 2
    p = torch.rand(p_shape, dtype=torch.float64)
    if p.numel() > 4:
        p.view(-1)[:4] = torch.tensor([0.0, 1.0, 1 - 2**-17, 2**-16])
    x = torch.randn(shape, dtype=torch.float64)
    fields = fields_of(x, samples=samples, expand=expand, batch_dim=batch_dim, unit=unit, stream=3, first_example=5)
    for dtype in DTYPES:
        a = x.to(dtype).to(device).requires_grad_()
        y = form(
            a, p.to(device), samples=samples, seed=SEED, stream=3, first_example=5, expand=expand, **({"batch_dim": 1} if batch_dim else {})
        )
        b = x.to(dtype).double().requires_grad_()
        want = in_float64(b, p, samples, expand, batch_dim, fields)
        torch.testing.assert_close(
            y.detach().cpu().double(), want.detach(), rtol=EPS[dtype], atol=1e-7 if dtype == torch.float16 else 0
        )  # subnormal
        dy = torch.randn(want.shape, dtype=torch.float64).to(dtype)
        (dx,) = torch.autograd.grad(y, a, dy.to(device))
        (dx_want,) = torch.autograd.grad(want, b, dy.double())
        factor = float(
            (want / torch.cat([b] * samples, batch_dim if expand else 0) if expand else want / b).detach().nan_to_num().abs().max()
        )
        torch.testing.assert_close(dx.cpu().double(), dx_want, rtol=EPS[dtype], atol=8 * EPS[dtype] * max(1.0, factor))


def test_rates_of_all_rows_of_an_expanded_tensor(backend, device):
    """p [K*B, F] belongs to the rows, p [B, F] to their examples."""
    x, p = torch.randn(6, 9, device=device), torch.rand(6, 9, device=device)
    fields = fields_of(x, samples=3, expand=False)
    for rows in (6, 2):
        y = F.dropout(x, p[:rows], samples=3, seed=SEED, expand=False)
        torch.testing.assert_close(y.cpu().double(), in_float64(x.cpu().double(), p[:rows].cpu(), 3, False, 0, fields), rtol=1e-6, atol=0)


def test_rates_channels_last(backend, device):
    x = torch.randn(2, 16, 5, 3, device=device).contiguous(memory_format=torch.channels_last)
    p = torch.rand(16, 5, 3, device=device)
    fields = fields_of(x, samples=2, expand=True)
    y = F.dropout(x, p, samples=2, seed=SEED)
    torch.testing.assert_close(y.cpu().double(), in_float64(x.cpu().double(), p.cpu(), 2, True, 0, fields), rtol=1e-6, atol=0)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "rows"])
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_rates_of_any_strides(backend, device, batch_dim, expand):
    """Rows innermost in memory, dimensions reversed, gaps."""
    x = torch.randn(6, 6, 6, device=device, dtype=torch.float64)
    for p in (torch.rand(6, 6, 6).movedim(-1, batch_dim), torch.rand(6, 6, 6).permute(2, 1, 0), torch.rand(6, 6, 12)[:, :, ::2]):
        fields = fields_of(x, samples=2, expand=expand, batch_dim=batch_dim)
        y = F.dropout(x, p.to(device), samples=2, seed=SEED, expand=expand, batch_dim=batch_dim)
        torch.testing.assert_close(y.cpu(), in_float64(x.cpu(), p, 2, expand, batch_dim, fields), rtol=1e-12, atol=0)


def test_equal_rates_are_dropout(backend, device):
    x = torch.randn(3, 70, device=device)
    torch.testing.assert_close(
        F.dropout(x, torch.full((70,), 0.3), samples=4, seed=1), F.dropout(x, 0.3, samples=4, seed=1), rtol=1e-6, atol=0
    )


def test_what_rates_drop_is_zero_whatever_it_was(backend, device):
    x = torch.full((2, 64), math.inf, device=device)
    x[1] = math.nan
    y = F.dropout(x, torch.full((64,), 0.5), samples=3, seed=0)
    kept = F.dropout(torch.ones_like(x), 0.5, samples=3, seed=0) != 0
    assert torch.equal(y == 0, ~kept)


BAD_RATES = [
    (TypeError, "p: expected a floating-point tensor, got torch.int64", torch.ones(3, dtype=torch.int64)),
    (ValueError, "p: expected a tensor that does not require grad", torch.full((3,), 0.5, requires_grad=True)),
    (ValueError, r"p: expected probabilities in \[0, 1\], got values from -0.5 to 0.5", torch.tensor([-0.5, 0.5, 0.0])),
    (ValueError, r"p: expected probabilities in \[0, 1\]", torch.tensor([math.nan, 0.5, 0.0])),
    (ValueError, r"p: expected a shape that broadcasts to what is drawn \(element\) of \(6, 3\), got \(4,\)", torch.full((4,), 0.5)),
    (ValueError, r"p: expected a shape that broadcasts", torch.full((5, 3), 0.5)),
    (ValueError, r"p: expected a shape that broadcasts", torch.full((1, 6, 3), 0.5)),
]


@pytest.mark.parametrize(("error", "message", "p"), BAD_RATES, ids=range(len(BAD_RATES)))
def test_bad_rates(error, message, p):
    with pytest.raises(error, match=message):
        F.dropout(torch.ones(6, 3), p, seed=0)


def test_a_channel_has_one_rate():
    with pytest.raises(ValueError, match=r"what is drawn \(channel\)"):
        F.dropout1d(torch.ones(2, 3, 4), torch.full((4,), 0.5), seed=0)


def test_adaptive_dropout_layer(device):
    layer, plain = iw.IWAdaptiveDropout(), iw.IWDropout(0.4)
    x = torch.randn(3, 40, device=device)
    with iw.sampling(4, seed=9):
        y, again = layer(x, torch.full((3, 1), 0.4, device=device)), plain(x)
    fields = fields_of(x, samples=4, expand=True)
    with iw.sampling(4, seed=SEED - 2**64):
        torch.testing.assert_close(
            layer(x, torch.tensor(0.4)).cpu().double(),
            in_float64(x.cpu().double(), torch.tensor(0.4), 4, True, 0, fields),
            rtol=1e-6,
            atol=0,
        )
    assert y.shape == again.shape == (12, 40) and not torch.equal(y, again)
    assert layer.eval()(x, 0.4) is x
    with pytest.raises(TypeError, match="p: expected a tensor of probabilities, got float"):
        layer.train()(x, 0.4)


# ---- alpha dropout ----


def alpha_in_float64(x, p: float, kept) -> torch.Tensor:
    """As torch states it: a (x keep + alpha' (1 - keep)) + b."""
    p = naive.threshold(p) / 65536
    limit = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
    a = ((1 - p) * (1 + p * limit**2)) ** -0.5
    return a * torch.where(kept, x, torch.tensor(limit, dtype=torch.float64)) - a * p * limit


@pytest.mark.parametrize("p", [0.3, 2**-16, 1 - 2**-16, 0.9])
@pytest.mark.parametrize(
    ("form", "unit", "shape"),
    [(F.alpha_dropout, "element", (3, 67)), (F.feature_alpha_dropout, "channel", (3, 5, 9)), (F.alpha_dropout, "element", (2, 5000))],
    ids=["element", "channel", "more than a chunk"],
)
@pytest.mark.parametrize("expand", [True, False], ids=["expand", "rows"])
def test_alpha_dropout(backend, device, form, unit, shape, p, expand):
    samples = 3
    x = torch.randn(shape if expand else (shape[0] * samples, *shape[1:]), dtype=torch.float64)
    kept = naive.naive_keep(x, p, samples=samples, seed=SEED % 2**64, stream=2, expand=expand, unit=unit)
    for dtype in DTYPES:
        a = x.to(dtype).to(device).requires_grad_()
        y = form(a, p, samples=samples, seed=SEED, stream=2, expand=expand)
        b = x.to(dtype).double().requires_grad_()
        want = alpha_in_float64(torch.cat([b] * samples) if expand else b, p, kept)
        torch.testing.assert_close(y.detach().cpu().double(), want.detach(), rtol=2 * EPS[dtype], atol=2 * EPS[dtype])
        dy = torch.randn(want.shape, dtype=torch.float64).to(dtype)
        (dx,) = torch.autograd.grad(y, a, dy.to(device))
        (dx_want,) = torch.autograd.grad(want, b, dy.double())
        torch.testing.assert_close(dx.cpu().double(), dx_want, rtol=2 * EPS[dtype], atol=8 * EPS[dtype])


def test_alpha_dropout_at_its_ends(backend, device):
    x = torch.randn(2, 9, device=device)
    assert torch.equal(F.alpha_dropout(x, 0.0, samples=2, seed=0), torch.cat([x, x]))
    assert torch.equal(F.alpha_dropout(x, 1.0, samples=2, seed=0), torch.zeros(4, 9, device=device))
    x[0] = math.nan
    y = F.alpha_dropout(x, 0.5, samples=8, seed=0)
    assert (y[0::2].isnan().float().mean() - 0.5).abs() < 0.3, "what is dropped does not depend on what it was"


def test_alpha_dropout_keeps_mean_and_variance(backend, device):
    """Of a standard normal input; 2^20 values, so that a false alarm (5 standard deviations) comes once in a million runs."""
    x = torch.randn(2**17, 8, device=device)
    y = F.alpha_dropout(x, 0.25, samples=1, seed=4).double()
    n = y.numel()
    assert abs(float(y.mean())) < 5 * n**-0.5
    fourth = float((y - y.mean()).pow(4).mean())
    assert abs(float(y.var()) - 1) < 5 * ((fourth - 1) / n) ** 0.5


@pytest.mark.parametrize("layer", [iw.IWAlphaDropout, iw.IWFeatureAlphaDropout])
def test_alpha_layers(device, layer):
    x = torch.randn(2, 5, 4, device=device)
    form = F.alpha_dropout if layer is iw.IWAlphaDropout else F.feature_alpha_dropout
    with iw.sampling(3, seed=8):
        iw.IWDropout(0.5)(x)
        torch.testing.assert_close(layer(0.3)(x), form(x, 0.3, samples=3, seed=8, stream=1))
    assert layer(0.3).eval()(x) is x
    assert layer(0.3)(x).shape == x.shape
    with pytest.raises(TypeError, match="p: expected a number"):
        F.alpha_dropout(x, torch.tensor(0.5), seed=0)


def test_gradcheck(backend, device):
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    rates = torch.rand(5, device=device) * 0.8
    for form in (lambda x: F.alpha_dropout(x, 0.4, samples=3, seed=1), lambda x: F.dropout(x, rates, samples=3, seed=1)):
        assert torch.autograd.gradcheck(form, x)
        assert torch.autograd.gradgradcheck(form, x)


def test_compiled_is_eager(device):
    torch._dynamo.reset()
    alpha, adaptive = iw.IWAlphaDropout(0.3), iw.IWAdaptiveDropout()

    def run(x, p):
        with iw.sampling(3, seed=2):
            return adaptive(alpha(x), p)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, p = torch.randn(4, 6, device=device, requires_grad=True), torch.rand(6, device=device)
    torch.testing.assert_close(compiled(x, p), run(x, p))
    (a,), (b,) = (torch.autograd.grad(f(x, p).square().sum(), x) for f in (compiled, run))
    torch.testing.assert_close(a, b)
