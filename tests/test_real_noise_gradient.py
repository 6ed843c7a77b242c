"""Derivatives of real-valued noise, what it keeps for backward, and how it behaves under compilers."""

from functools import partial

import pytest
import torch
from oracle import naive
from torch._dynamo.testing import CompileCounterWithBackend

import iwsgd_ext as iw
from iwsgd_ext import functional as F

OPS = torch.ops.iwsgd_ext
P, STD = 0.3, (0.3 / 0.7) ** 0.5
# name -> function of x, law of the factor that the gradient has, or None
FORMS = {
    "gaussian dropout": (partial(F.gaussian_dropout, p=P), "normal"),
    "gaussian": (partial(F.gaussian_noise, std=STD), None),
    "laplace factors": (partial(F.laplace_noise, std=STD, multiply=True), "laplace"),
    "uniform factors": (partial(F.uniform_noise, std=STD, multiply=True), "uniform"),
}


def naive_gradient(x: torch.Tensor, dy: torch.Tensor, form: str, samples: int, batch_dim: int = 0, **address) -> torch.Tensor:
    """sum over s of (1 + std z) * dy, or of dy, in float64."""
    law = FORMS[form][1]
    z = naive.naive_numbers(x, law or "normal", samples=samples, batch_dim=batch_dim, **address)
    terms = dy.detach().cpu().double() * (1 + STD * z if law else torch.ones_like(z))
    return sum(terms.tensor_split(samples, batch_dim)) if address.get("expand", True) else terms


def call(form: str, x: torch.Tensor, **address) -> torch.Tensor:
    return FORMS[form][0](x, **address)


LAYOUTS = [
    pytest.param((5, 63), 0, torch.contiguous_format, id="odd-63"),
    pytest.param((2, 2049), 0, torch.contiguous_format, id="one-more-than-a-chunk"),
    pytest.param((6, 3, 13), 1, torch.contiguous_format, id="time-major"),
    pytest.param((3, 6, 5, 7), 0, torch.channels_last, id="channels_last"),
    pytest.param((3, 6, 5, 7), 2, torch.channels_last, id="channels_last-batch_dim2"),
    pytest.param((2, 3, 2, 5, 3), 0, torch.channels_last_3d, id="channels_last_3d"),
    pytest.param((0, 7), 0, torch.contiguous_format, id="no-examples"),
]


@pytest.mark.parametrize(("shape", "batch_dim", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_sums_over_samples(device, backend, shape, batch_dim, memory_format, form, dtype):
    """Every error below that of the numbers (5e-5), S float32 sums and one rounding."""
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    for samples in (1, 3, 8):
        address = {"samples": samples, "seed": 9, "stream": 2, "first_example": 4, "batch_dim": batch_dim}
        y = call(form, x, **address)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        want = naive_gradient(x, dy, form, **address)
        assert dx.dtype == dtype
        assert dx.shape == x.shape
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        size = naive_gradient(x, dy.abs(), "gaussian", **address)
        noise = (1e-13 if dtype == torch.float64 else 5e-5) * STD if FORMS[form][1] else 0.0
        bound = (
            torch.finfo(dtype).eps / 2 * want.abs() + (5 * (samples + 3) * torch.finfo(acc).eps + noise) * size + torch.finfo(dtype).tiny
        )
        assert bool(((dx.detach().cpu().double() - want).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMS)
def test_backward_of_expanded_rows(device, backend, form):
    x = torch.randn(6, 5, 3, 7, device=device, dtype=torch.float64, requires_grad=True)
    address = {"samples": 3, "seed": 1, "expand": False, "sample_ids": [4, 0, 9]}
    y = call(form, x, **address)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.cpu(), naive_gradient(x, dy, form, **address), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_layout_of_the_gradient_does_not_choose_the_noise(device, backend, form, expand):
    """The order of positions is the forward input's: a gradient of the other layout meets the same numbers."""
    dense = torch.randn(4, 6, 5, 7, device=device, dtype=torch.float64)
    for x in (dense, dense.to(memory_format=torch.channels_last)):
        x = x.clone().requires_grad_()
        y = call(form, x, samples=2, seed=3, expand=expand)
        dy = torch.randn(y.shape, device=device, dtype=torch.float64)
        transposed = dy.transpose(1, 3).contiguous().transpose(1, 3)
        for layout in (dy, dy.to(memory_format=torch.channels_last), transposed, torch.ones_like(dy[:1]).expand_as(dy)):
            (dx,) = torch.autograd.grad(y, x, layout, retain_graph=True)
            want = naive_gradient(x, layout, form, samples=2, seed=3, expand=expand)
            torch.testing.assert_close(dx.cpu(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("expand", [True, False])
def test_gradcheck_and_gradgradcheck(device, backend, form, expand):
    x = torch.randn(2, 3, 2, 3, device=device, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    function = partial(call, form, samples=2, seed=2, expand=expand)
    assert torch.autograd.gradcheck(lambda v: function(v).pow(2), x)
    assert torch.autograd.gradgradcheck(lambda v: function(v).pow(3), x)


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients(device, backend, form):
    """Of torch.autograd's own batching (is_grads_batched), which knows fewer functions than torch.func."""
    x = torch.randn(2, 5, device=device, dtype=torch.float64)
    power = lambda v: call(form, v, samples=3, seed=1).pow(3).sum()  # noqa: E731
    hessians = [torch.autograd.functional.hessian(power, x, vectorize=vectorize) for vectorize in (True, False)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("form", FORMS)
def test_kept_for_backward_is_the_address(device, backend, form):
    """No noise and no input: 24 bytes of origin and the sample ids, for any size, and nothing for an addition."""
    for n in (8, 100_000):
        saved = []
        x = torch.randn(2, n, device=device, requires_grad=True)

        def keep(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = call(form, x, samples=4, seed=0, sample_ids=torch.arange(4))
            call(form, y, samples=4, seed=0, stream=1, expand=False)
        assert sum(t.untyped_storage().nbytes() for t in saved) == (24 + 32 + 24 if FORMS[form][1] else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, backend, dtype):
    if backend == "reference":
        pytest.skip("the reference is plain torch")
    ids = torch.tensor([[2, 0, 1], [5, 4, 1]], device=device)
    x, y = torch.randn(1, 3, 5, device=device).to(dtype), torch.randn(1, 6, 5, device=device).to(dtype)
    for sample_ids in (None, ids[:, 0].contiguous(), ids):
        address = torch.tensor([3, 0, 0], device=device), sample_ids, 2, 1, 0, 5, 1
        for multiply in (True, False):
            torch.library.opcheck(OPS.real_noise, (x, *address, 0, 0.5, multiply, True))
            torch.library.opcheck(OPS.real_noise, (y, *address, 1, 0.5, multiply, False))
        torch.library.opcheck(OPS.real_noise_sum, (y, *address, 2, 0.5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
@pytest.mark.parametrize("form", FORMS)
def test_written_in_place_by_the_next_layer(device, backend, form, memory_format):
    """A ReLU(inplace=True) behind the noise, forward and gradient."""
    x = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for in_place in (False, True):
        y = torch.nn.functional.relu(call(form, x, samples=3, seed=1), inplace=in_place)
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_meta_device_gives_shapes():
    x, origin = torch.empty(5, 6, 7, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    y = OPS.real_noise(x, origin, None, 3, 0, 0, 7, 1, 0, 0.5, True, True)
    assert y.shape == (5, 18, 7)
    assert OPS.real_noise_sum(y, origin, None, 3, 0, 0, 7, 1, 0, 0.5).shape == (5, 6, 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_compiled_is_eager(device, memory_format):
    """The same noise, values and gradients, and one graph for any seed and batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, seed):
        y = F.gaussian_dropout(x * 2, 0.4, samples=3, seed=seed)
        return F.gaussian_noise(y.sin(), 0.4, samples=3, seed=seed, stream=1, expand=False)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for seed, batch in ((0, 5), (-7, 2), (2**40, 3)):
        x = torch.randn(batch, 6, 4, 7, device=device).to(memory_format=memory_format)
        results = []
        for f in (step, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf, torch.tensor(seed, device=device))
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_layers_compile(device):
    """In a context inside the compiled region, and outside of any."""
    multiply, add = iw.IWGaussianDropout(P), iw.IWGaussianNoise(STD)

    def f(x):
        with iw.sampling(3, seed=7):
            y = add(multiply(x))
        return y, add(x)

    x = torch.randn(5, 63, device=device)
    torch.manual_seed(3)
    eager = f(x)
    torch.manual_seed(3)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


def test_model_gradient_is_the_loops(device, backend):
    """A network with both layers under S samples: the gradient of the sum of S passes, one sample each."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 16), iw.IWGaussianDropout(P), torch.nn.Tanh(), iw.IWGaussianNoise(0.1), torch.nn.Linear(16, 2)]
    model = torch.nn.Sequential(*layers).double().to(device)
    x = torch.randn(4, 5, dtype=torch.float64, device=device)
    with iw.sampling(3, seed=1):
        together = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    alone = [torch.zeros_like(p) for p in model.parameters()]
    for s in range(3):
        with iw.sampling(1, seed=1, sample_ids=[s]):
            for total, g in zip(alone, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), strict=True):
                total += g
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_a_law_that_is_none():
    """The bare op of the kernels writes no result of nothing."""
    if not iw.backend_info()["built"]["cpu"]:
        pytest.skip("no native build")
    with pytest.raises(RuntimeError):
        OPS.real_noise(torch.ones(1, 3, 5), torch.zeros(3, dtype=torch.int64), None, 2, 0, 0, 5, 1, 3, 0.5, True, True)
