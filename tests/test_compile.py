"""Converted models and layers under torch.compile and torch.export: what eager gives, and how often it compiles."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

S = 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(torch.relu(self.linear(x)))


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


def network(device) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), Skip(), nn.Dropout(0.25), nn.Linear(6, 63)).to(device)


def run(model: nn.Module, x: torch.Tensor, seed: int | None) -> list[torch.Tensor]:
    """Output and gradients, by the model's own context (seed None) or an explicit one."""
    x = x.clone().requires_grad_()
    if seed is None:
        torch.manual_seed(5)
        y = model(x)
    else:
        with iw.sampling(S, seed=seed):
            y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def check(model: nn.Module, backend, seeds=(None, 0, 1, 2**63 - 1), batches=(5, 2, 17), dynamic=True) -> None:
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    device = next(model.parameters()).device
    for batch in batches:
        x = torch.randn(batch, 6, device=device)
        for seed in seeds:
            eager, other = run(model, x, seed), run(compiled, x, seed)
            assert eager[0].shape[0] == S * batch
            for a, b in zip(eager, other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
            assert torch.equal(eager[0] == 0, other[0] == 0)
    assert current() is None


@pytest.mark.slow
@pytest.mark.parametrize("expand", ["input", "1", "0"])
def test_converted_model_is_eager(device, expand):
    check(iw.convert(network(device), S, expand=expand), "aot_eager")


@pytest.mark.parametrize("expand", ["first", "axis"])
def test_converted_model_that_computes_its_trunk_once(device, expand):
    model = nn.Sequential(nn.Linear(6, 63), nn.ReLU(), nn.Dropout(0.5), nn.Linear(63, 9), nn.Dropout(0.5)).to(device)
    check(iw.convert(model, S, expand=expand, example_inputs=torch.randn(2, 6, device=device)), "aot_eager")


def test_channels_last_convolutions(device):
    """Positions are in the order of the layer's input, which a compiler may not change."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 5, 3), nn.Dropout2d(0.5), nn.Flatten()).to(device)
    model = iw.convert(model.to(memory_format=torch.channels_last), S, expand="first")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(4, 3, 9, 7, device=device).contiguous(memory_format=memory_format)
        for a, b in zip(run(model, x, 3), run(compiled, x, 3), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_channels_last_before_a_relu_in_place(device):
    """What the layer returns is no view, which an autograd Function's caller may not write in place; the gradient arrives."""
    model = iw.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.5), nn.ReLU(inplace=True)).to(device), S, expand="first")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 7, device=device).contiguous(memory_format=torch.channels_last)
    for a, b in zip(run(model, x, 3), run(compiled, x, 3), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("expand", ["input", "1"])
def test_inductor(device, expand):
    check(iw.convert(network(device), S, expand=expand), "inductor", seeds=(None, 0, 1), batches=(5, 17))


@pytest.mark.slow
def test_inductor_with_channels_last(device):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 5, 3), nn.Dropout(0.5), nn.Flatten()).to(device)
    model = iw.convert(model.to(memory_format=torch.channels_last), S, expand="first")
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3, 9, 7, device=device).to(memory_format=torch.channels_last)
    for a, b in zip(run(model, x, 3), run(compiled, x, 3), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_new_seeds_do_not_recompile(device):
    """Explicit contexts of six seeds are one graph; so are six steps of a model's own context."""
    for seeds in (range(6), [None] * 6):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = iw.convert(network(device), S, expand="input")
        check(model, counter, seeds=seeds, batches=(5,), dynamic=None)
        assert counter.frame_count == 1


def test_changing_batches_compile_twice_at_most(device):
    """Once for the first size, once for any size."""
    counter = CompileCounterWithBackend("aot_eager")
    check(iw.convert(network(device), S, expand="input"), counter, seeds=(1,), batches=(5, 7, 9, 11), dynamic=None)
    assert counter.frame_count <= 2


def test_regionally_compiled_blocks(device):
    """One block compiled, called at many streams by a model whose loop is eager: two graphs at most, the noise eager's."""
    counter = CompileCounterWithBackend("aot_eager")
    blocks = nn.Sequential(*[Skip() for _ in range(6)]).to(device)
    iw.convert(blocks, S, expand="input")
    x = torch.randn(5, 6, device=device)
    want = run(blocks, x, 4)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        for a, b in zip(want, run(blocks, x, 4), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


def test_forwards_of_one_context_do_not_recompile(device):
    """Streams go on within a context; each forward starts at another."""
    counter = CompileCounterWithBackend("aot_eager")
    model = iw.convert(network(device), S, expand="input")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 6, device=device)
    with iw.sampling(S, seed=1) as context:
        want = [model(x) for _ in range(5)]
        assert context.stream == 10
    with iw.sampling(S, seed=1):
        for y in want:
            torch.testing.assert_close(compiled(x), y)
    assert counter.frame_count <= 2


def test_context_inside_the_compiled_function(device):
    """A context opened in the compiled region, and a layer outside of any."""
    drop = iw.IWDropout(0.5)

    def f(x):
        with iw.sampling(S, seed=7):
            y = drop(x)
        return y, drop(x)

    x = torch.randn(5, 63, device=device)
    torch.manual_seed(3)
    eager = f(x)
    torch.manual_seed(3)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_draw_of_a_seed_is_one_of_its_own(device, compiler):
    """Layers outside of any context, and contexts of two models, in one graph with gradients: equal draws are not merged."""
    layers = [iw.IWDropout(0.5) for _ in range(3)]
    models = [iw.convert(nn.Sequential(nn.Dropout(0.5)), 1, expand="first") for _ in range(2)]

    def f(x):
        return [layer(x) for layer in (*layers, *models)]

    x = torch.ones(5, 63, device=device, requires_grad=True)
    results = []
    for run in (f, torch.compile(f, backend=compiler, fullgraph=True)):
        torch.manual_seed(3)
        results.append([y.detach() for y in run(x)])
    for i, (eager, compiled) in enumerate(zip(*results, strict=True)):
        assert torch.equal(eager, compiled)
        assert not any(torch.equal(compiled, other) for other in results[1][:i])


RECOMPUTES = {
    "all": {"activation_memory_budget": 0.0},
    "half": {"activation_memory_budget": 0.5},
    "aggressive": {"aggressive_recomputation": True},
    "denylist": {"ban_recompute_not_in_allowlist": False},
}


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("settings", RECOMPUTES.values(), ids=RECOMPUTES.keys())
def test_a_draw_is_not_recomputed(device, settings, given):
    """Where the compiler computes in backward again what it can, the gradient's masks are those of the forward."""
    x = torch.randn(8, 32, device=device, requires_grad=True)
    drop = iw.IWDropout(0.5)

    def within(x):
        with iw.sampling(S, seed=7 if given else None):
            return drop(x.sin()).exp()

    functions = [within] if given else [within, iw.convert(nn.Sequential(Sine(), nn.Dropout(0.5), Exponential()), S, example_inputs=x)]
    for function in functions:
        with torch._functorch.config.patch(**settings):
            y = torch.compile(function, backend="aot_eager", fullgraph=given)(x)
            (dx,) = torch.autograd.grad(y.sum(), x)
        kept = (y.detach() != 1) * 2.0
        torch.testing.assert_close(dx, (kept * y.detach()).view(S, 8, 32).sum(0) * x.detach().cos())


def test_a_draw_that_would_be_recomputed_breaks_the_graph(device):
    def within(x):
        with iw.sampling(S):
            return iw.IWDropout(0.5)(x)

    x = torch.randn(8, 32, device=device, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=0.5), pytest.raises(Exception, match=r"iw.sampling\(S, seed=...\)"):
        torch.compile(within, backend="aot_eager", fullgraph=True)(x)


def test_export_of_the_eval_model(device):
    """The converted model in eval mode exports, with a dynamic batch, without a trace of the noise."""
    model = iw.convert(network(device), S, expand="input").eval()
    x = torch.randn(5, 6, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "iwsgd_ext" not in str(program.graph)
    other = torch.randn(17, 6, device=device)
    torch.testing.assert_close(program.module()(other), model(other))
    assert torch.equal(model(x), iw.revert(model)(x))


def test_export_of_training(device):
    """A layer's noise is one op of the exported graph."""

    class Noisy(nn.Module):
        def forward(self, x, seed):
            return iw.functional.dropout(x, 0.5, samples=S, seed=seed)

    x = torch.randn(5, 63, device=device)
    program = torch.export.export(Noisy(), (x, torch.tensor(3, device=device)))
    assert "iwsgd_graph.noise" in str(program.graph)
    for seed in (3, 8):
        assert torch.equal(program.module()(x, torch.tensor(seed, device=device)), iw.functional.dropout(x, 0.5, samples=S, seed=seed))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize(
    "layer",
    [
        iw.IWDropout(0.5),
        iw.IWDropout2d(0.5),
        iw.IWAlphaDropout(0.5),
        iw.IWGaussianDropout(0.5),
        iw.IWGaussianNoise(0.5),
        iw.IWMultinomialDropout(0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_exported_noise_trains(device, layer, strict):
    """Gradients, and those of a penalty on them, through two layers, of which the first expands: what eager mode gives."""

    class Noisy(nn.Module):
        def forward(self, x):
            with iw.sampling(S, seed=5):
                return layer(layer(x.sin()).exp())

    x = torch.randn(4, 6, 3, 5, device=device, requires_grad=True)
    results = []
    for module in (Noisy(), torch.export.export(Noisy(), (x,), strict=strict).module()):
        y = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append((y, dx, *torch.autograd.grad(dx.square().sum(), x)))
    for eager, exported in zip(*results, strict=True):
        torch.testing.assert_close(exported, eager)


def test_opcheck_of_exported_ops():
    ops, x, dy = torch.ops.iwsgd_graph, torch.randn(1, 3, 5, requires_grad=True), torch.randn(1, 6, 5, requires_grad=True)
    address = (torch.tensor([3, 0, 0]), None, 2, 1, 0, 5, 1)
    torch.library.opcheck(ops.noise.default, (x, *address, 20000, None, 1.5, 0.5, -0.5, True))
    torch.library.opcheck(ops.noise_sum.default, (dy, *address, 20000, None, 1.5))
    torch.library.opcheck(ops.real_noise.default, (x, *address, 1, 0.5, True, True))
    torch.library.opcheck(ops.real_noise_sum.default, (dy, *address, 2, 0.5))
