"""The layers: in place of torch.nn's, and inside a sampling context the noise of the address that the context gives."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw

LAYERS = [
    pytest.param(iw.IWDropout, nn.Dropout, (4, 63), "element", id="IWDropout"),
    pytest.param(iw.IWDropout1d, nn.Dropout1d, (4, 50, 7), "channel", id="IWDropout1d"),
    pytest.param(iw.IWDropout2d, nn.Dropout2d, (4, 50, 3, 5), "channel", id="IWDropout2d"),
    pytest.param(iw.IWDropout3d, nn.Dropout3d, (4, 50, 3, 2, 3), "channel", id="IWDropout3d"),
    pytest.param(iw.IWDropPath, nn.Identity, (40, 5, 3), "row", id="IWDropPath"),
]


@pytest.mark.parametrize(("layer", "namesake", "shape", "unit"), LAYERS)
class TestEachLayer:
    def test_noise_of_a_context(self, device, backend, layer, namesake, shape, unit):
        """The first call expands, the second takes the next stream of expanded rows."""
        x = torch.randn(shape, device=device)
        first, second = layer(0.3), layer(0.6)
        with iw.sampling(3, seed=5, first_example=7):
            y = first(x)
            z = second(y)
        address = {"samples": 3, "seed": 5, "first_example": 7, "unit": unit}
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.3, stream=0, **address))
        assert torch.equal(z.cpu(), naive.naive_noise(y, 0.6, stream=1, expand=False, **address))

    def test_alone_is_one_fresh_sample(self, device, backend, layer, namesake, shape, unit):
        """Outside of a context: no expansion, other noise at each call, which follows torch.manual_seed."""
        x, drop = torch.ones(shape, device=device), layer(0.5)
        torch.manual_seed(3)
        one, other = drop(x), drop(x)
        torch.manual_seed(3)
        again = drop(x)
        assert one.shape == x.shape
        assert set(one.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(one, other)
        assert torch.equal(one, again)

    def test_what_shares_a_draw(self, device, backend, layer, namesake, shape, unit):
        y = layer(0.5)(torch.ones(shape, device=device))
        kept = y if unit == "element" else y.flatten(2 if unit == "channel" else 1)
        if unit != "element":
            assert torch.equal(kept.amax(-1), kept.amin(-1))
            kept = kept[..., 0]
        assert 0 < (kept == 0).sum() < kept.numel()

    def test_eval_is_the_identity_and_draws_no_stream(self, device, backend, layer, namesake, shape, unit):
        x = torch.randn(shape, device=device)
        drop = layer(0.5)
        with iw.sampling(3, seed=5) as context:
            assert drop.eval()(x) is x
            assert context.stream == 0
            y = drop.train()(x)
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=3, seed=5, unit=unit))

    def test_ends_of_p_expand_too(self, device, backend, layer, namesake, shape, unit):
        x = torch.randn(shape, device=device)
        with iw.sampling(3):
            assert torch.equal(layer(0.0)(x), torch.cat([x] * 3))
        with iw.sampling(3) as context:
            assert torch.equal(layer(1.0)(x), torch.zeros(3 * x.shape[0], *x.shape[1:], device=device))
            assert context.stream == 1

    def test_state_dict_is_the_namesakes(self, layer, namesake, shape, unit):
        model = nn.Sequential(nn.Linear(3, 5), layer(), nn.Linear(5, 2))
        original = nn.Sequential(nn.Linear(3, 5), namesake(), nn.Linear(5, 2))
        assert list(model.state_dict()) == list(original.state_dict())
        assert model.load_state_dict(original.state_dict()) == original.load_state_dict(model.state_dict())
        assert not list(layer().parameters())
        assert not list(layer().buffers())

    def test_is_a_layer_of_torch_to_those_who_ask(self, layer, namesake, shape, unit):
        """Code that sets p on all dropout layers finds these."""
        drop = layer(0.25)
        assert isinstance(drop, nn.modules.dropout._DropoutNd)
        drop.p = 1.0
        assert not drop(torch.ones(shape)).any()
        assert repr(layer(0.25)) == f"{layer.__name__}(p=0.25)"
        assert repr(layer(0.25, batch_dim=1)) == f"{layer.__name__}(p=0.25, batch_dim=1)"
        assert layer().p == 0.5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, device, backend, layer, namesake, shape, unit, dtype):
        x = torch.randn(shape, device=device).to(dtype)
        with iw.sampling(2, seed=1):
            y = layer(0.3)(x)
        assert y.dtype == dtype
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.3, samples=2, seed=1, unit=unit))

    def test_bad_arguments(self, layer, namesake, shape, unit):
        for p in (-0.01, 1.01, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\], got"):
                layer(p)
        for p in ("0.5", None, True, torch.tensor(0.5)):
            with pytest.raises(TypeError, match="p: expected a number"):
                layer(p)
        with pytest.raises(TypeError, match=rf"input of {layer.__name__}: expected float32, float64, bfloat16 or float16, got torch.int64"):
            layer()(torch.ones(shape, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"input of {layer.__name__}: expected at least one dimension"):
            layer()(torch.tensor(1.0))

    def test_no_dtype_but_those_it_computes(self, device, backend, layer, namesake, shape, unit):
        for dtype in (torch.complex64, torch.float8_e4m3fn):
            with pytest.raises(TypeError, match=layer.__name__):
                layer()(torch.ones(shape, device=device).to(dtype))


@pytest.mark.parametrize(("layer", "dims"), [(iw.IWDropout1d, {3}), (iw.IWDropout2d, {3, 4}), (iw.IWDropout3d, {5})])
def test_channel_layers_take_inputs_with_rows_and_channels(layer, dims):
    for dim in {2, 3, 4, 5, 6} - dims:
        namesake = f"nn.{layer.__name__[2:]}"
        with pytest.raises(ValueError, match=rf"input of {layer.__name__} \({namesake}\): expected \[B, C, .*\], got {dim}-D") as error:
            layer()(torch.ones([2] * dim))
        # what torch takes for one example has no rows
        unbatched = dim == min(dims) - 1 and layer is not iw.IWDropout2d
        assert ("one example without rows: give x[None], which has one" in str(error.value)) == unbatched


def test_dropout2d_takes_three_dimensions_as_torch_does(device, backend):
    """[B, C, L]: whole channels, as nn.Dropout1d."""
    x = torch.randn(5, 6, 7, device=device)
    with iw.sampling(3, seed=4):
        y = iw.IWDropout2d(0.4)(x)
    with iw.sampling(3, seed=4):
        assert torch.equal(y, iw.IWDropout1d(0.4)(x))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will read it otherwise
        kept = nn.Dropout2d(0.5)(torch.ones(50, 6, 7))
    assert torch.equal(kept.amax(2), kept.amin(2)) and len(kept.unique()) == 2


def test_a_layers_batch_dim_rules_over_the_contexts(device, backend):
    x = torch.randn(6, 4, 9, device=device)
    with iw.sampling(3, seed=5, batch_dim=1):
        y = iw.IWDropout(0.3)(x)
        z = iw.IWDropout(0.3, batch_dim=0)(y.transpose(0, 1).contiguous())
        u = iw.IWDropout(0.3, batch_dim=-2)(y)
    address = {"samples": 3, "seed": 5}
    assert torch.equal(y.cpu(), naive.naive_noise(x, 0.3, batch_dim=1, **address))
    assert torch.equal(z.cpu(), naive.naive_noise(y.transpose(0, 1).contiguous(), 0.3, stream=1, expand=False, **address))
    assert torch.equal(u.cpu(), naive.naive_noise(y, 0.3, stream=2, expand=False, batch_dim=1, **address))
    with pytest.raises(ValueError, match=r"batch_dim: expected a dimension of the input in \[-3, 3\), got 3"):
        iw.IWDropout(batch_dim=3)(x)


def test_gradient_of_a_stack_is_the_product_of_its_masks(device, backend):
    x = torch.randn(4, 63, device=device, requires_grad=True)
    with iw.sampling(3, seed=2):
        y = iw.IWDropout(0.5)(iw.IWDropout(0.25)(x))
    dy = torch.randn_like(y)
    y.backward(dy)
    keep = [naive.naive_keep(x, p, samples=3, seed=2, stream=i) for i, p in enumerate((0.25, 0.5))]
    want = (dy.cpu().double() * keep[0] * keep[1] / (0.75 * 0.5)).view(3, 4, 63).sum(0)
    torch.testing.assert_close(x.grad.cpu().double(), want, rtol=1e-6, atol=1e-5)


def test_autocast_keeps_the_input_dtype(device, backend):
    layer = nn.Sequential(nn.Linear(5, 63), iw.IWDropout(0.5))
    with torch.autocast(device.type, dtype=torch.bfloat16), iw.sampling(2):
        y = layer.to(device)(torch.randn(3, 5, device=device))
    assert y.dtype == torch.bfloat16
    assert y.shape == (6, 63)


def test_swapping_the_class_alone(device, backend):
    """Swapping the class alone, by hand, leaves a model's shapes and training as they were."""
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1)).to(device)
    model[1].__class__ = iw.IWDropout
    model[1].batch_dim = None
    x = torch.randn(7, 5, device=device)
    assert model(x).shape == (7, 1)
    model(x).sum().backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 3])
def test_written_in_place_by_the_next_layer(device, backend, memory_format, samples):
    """A ReLU(inplace=True) behind a dropout, forward and gradient."""
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for in_place in (False, True):
        with iw.sampling(samples, seed=1):
            y = torch.nn.functional.relu(iw.IWDropout(0.5)(x), inplace=in_place)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert results[1][0].is_contiguous(memory_format=memory_format)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer", [iw.IWDropout, iw.IWAlphaDropout, iw.IWGaussianDropout, iw.IWMultinomialDropout, iw.IWDropPath])
@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), "0.5"])
def test_a_rate_that_is_changed_is_checked(layer, wrong):
    """A schedule that runs too far is found by the next forward."""
    layer = layer(0.5)
    layer.p = 0.25
    assert layer(torch.ones(2, 8)).shape == (2, 8)
    layer.p = wrong
    with pytest.raises((TypeError, ValueError), match="p: expected a"):
        layer(torch.ones(2, 8))


def test_a_deviation_that_is_changed_is_checked():
    layer = iw.IWGaussianNoise(0.5)
    layer.std = -1.0
    with pytest.raises(ValueError, match="std: expected a finite number >= 0"):
        layer(torch.ones(2, 8))


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, Fraction])
def test_other_numbers_than_pythons(device, backend, number):
    x = torch.ones(3, 63, device=device)
    with iw.sampling(2, seed=3):
        y = iw.IWDropout(number(0.5))(x)
    with iw.sampling(2, seed=3):
        assert torch.equal(y, iw.IWDropout(0.5)(x))
