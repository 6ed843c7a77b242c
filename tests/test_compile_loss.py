"""The loss under torch.compile, torch.export, autocast and opcheck: the numbers of eager mode, one graph, no recompilation."""

import math

import pytest
import torch
from torch import nn

import iwsgd_ext as iw


def data(device, samples, batch, classes, positions=()):
    logits = torch.randn(samples * batch, classes, *positions, device=device)
    return logits, torch.randint(classes, (batch, *positions), device=device)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiled_is_eager(function, logits, *arguments, compiler="aot_eager", dynamic=None):
    """Outputs and gradient of fullgraph compilation; the gradient with an upstream gradient that is not one."""
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)):
        leaf = logits.detach().clone().requires_grad_()
        out = f(leaf, *arguments)
        outputs = list(out) if isinstance(out, tuple) else [out]
        loss = outputs[0]
        (dlogits,) = torch.autograd.grad(
            loss, leaf, torch.linspace(-1, 2, loss.numel(), device=loss.device).view_as(loss) if loss.dim() else 3 * torch.ones_like(loss)
        )
        results.append([*(x.detach() for x in outputs), dlogits])
    torch.testing.assert_close(results[1], results[0])


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum", "alpha": 0.5},
    "none": {"reduction": "none", "alpha": 0.0},
    "position": {"reduction": "none", "level": "position", "alpha": math.inf},
    "smoothed": {"label_smoothing": 0.1, "ignore_index": 2},
    "normalizer": {"normalizer": 7.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("positions", [(), (4, 5)], ids=str)
def test_options(backend, device, positions, options):
    logits, target = data(device, 3, 7, 10, positions)
    assert_compiled_is_eager(lambda x, y: iw.iw_cross_entropy(x, y, 3, **options), logits, target)


def test_statistics(backend, device):
    logits, target = data(device, 3, 7, 10, (5,))

    def function(x, y):
        loss, stats = iw.iw_cross_entropy(x, y, 3, return_stats=True)
        return loss, *stats, stats.ess, stats.mean_log_p

    assert_compiled_is_eager(function, logits, target)


def test_weights_and_probabilities(backend, device):
    logits, _ = data(device, 3, 7, 10, (5,))
    target, weight, example_weight = torch.rand(7, 10, 5, device=device), torch.rand(10, device=device), torch.rand(7, device=device)
    assert_compiled_is_eager(
        lambda x, y, w, e: iw.iw_cross_entropy(x, y, 3, weight=w, example_weight=e, normalizer=e.sum()),
        logits,
        target,
        weight,
        example_weight,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(backend, device, dtype):
    logits, target = data(device, 3, 7, 10)
    assert_compiled_is_eager(lambda x, y: iw.iw_cross_entropy(x, y, 3), logits.to(dtype), target)


@pytest.mark.parametrize("positions", [(), (5,), (4, 5)], ids=str)
def test_inplace(backend, device, positions):
    logits, target = data(device, 3, 7, 10, positions)
    assert_compiled_is_eager(lambda x, y: iw.iw_cross_entropy(x * 2, y, 3, inplace=True), logits, target)


def test_module_in_a_compiled_step(backend, device):
    """Model, noise-free, and criterion as one graph."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10)).to(device)
    criterion = iw.IWCrossEntropyLoss(3, weight=torch.rand(10), label_smoothing=0.1).to(device)
    _, target = data(device, 3, 7, 10)
    assert_compiled_is_eager(lambda x, y: criterion(model(x), y), torch.randn(21, 6, device=device), target)


def test_loss_of_any_criterion(device):
    criterion = iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), 3, alpha=0.5)
    for dynamic in (None, True):
        assert_compiled_is_eager(criterion, torch.randn(21, 5, device=device), torch.rand(7, 5, device=device), dynamic=dynamic)


def test_dynamic_batch(backend, device):
    """One graph serves every batch size from the second on, with and without positions being static."""
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def function(x, y):
        return iw.iw_cross_entropy(x, y, 3, label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, backend=counting)
    for batch in (7, 5, 63, 11, 500):
        logits, target = data(device, 3, batch, 10, (5,))
        torch.testing.assert_close(compiled(logits, target), function(logits, target))
    assert graphs <= 2
    logits, target = data(device, 3, 7, 10)
    assert_compiled_is_eager(function, logits, target, dynamic=True)
    assert_compiled_is_eager(iw.IWCrossEntropyLoss(3, alpha=0.5, label_smoothing=0.1), logits, target, dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("view", [lambda x: x[:, 1:].transpose(1, 2), lambda x: x[:, 2], lambda x: x[:, 0, :10]], ids=["T", "row", "part"])
def test_inductor_inplace_with_gaps(backend, device, view):
    """Logits between which there is other memory that the compiler has computed too."""
    x = torch.randn(21, 5, 13, device=device)
    target = torch.randint(10, (7, *view(x).shape[2:]), device=device)
    bias = torch.randn(13, device=device)
    assert_compiled_is_eager(lambda x, y: iw.iw_cross_entropy(view(x + bias), y, 3, inplace=True), x, target, compiler="inductor")


@pytest.mark.slow
def test_inductor(backend, device):
    logits, target = data(device, 3, 7, 10, (5,))
    assert_compiled_is_eager(lambda x, y: iw.iw_cross_entropy(2 * x, y, 3) * 1.5, logits, target, compiler="inductor")


def test_export(backend, device):
    """The exported graph gives the same loss, for another batch size too."""

    class Step(nn.Module):
        def forward(self, x, y):
            return iw.iw_cross_entropy(x, y, 3)

    logits, target = data(device, 3, 7, 10)
    batch = torch.export.Dim("batch", min=2, max=1000)
    exported = torch.export.export(Step(), (logits, target), dynamic_shapes={"x": {0: 3 * batch}, "y": {0: batch}})
    for size in (7, 63):
        logits, target = data(device, 3, size, 10)
        torch.testing.assert_close(exported.module()(logits, target), iw.iw_cross_entropy(logits, target, 3))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"reduction": "none"}, {"level": "position", "alpha": 0.5}], ids=str)
def test_export_of_training(backend, device, options, strict):
    """What is made of an exported graph trains, beside another loss too, with the eager gradients; it has no second derivative."""

    class Step(nn.Module):
        def forward(self, x, y):
            penalty = x.square().mean()
            return iw.iw_cross_entropy(x * 2, y, 3, **options) + penalty

    logits, target = data(device, 3, 7, 10, (5,))
    logits.requires_grad_()
    exported = torch.export.export(Step(), (logits, target), strict=strict).module()
    upstream = torch.randn_like(exported(logits, target))
    eager, other = (torch.autograd.grad(step(logits, target), logits, upstream)[0] for step in (Step(), exported))
    torch.testing.assert_close(other, eager)
    (first,) = torch.autograd.grad(exported(logits, target), logits, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="iw_cross_entropy has no second derivative"):
        first.square().sum().backward()


def test_exported_without_gradients(backend, device):
    class Step(nn.Module):
        def forward(self, x, y):
            return iw.iw_cross_entropy(x, y, 3)

    logits, target = data(device, 3, 7, 10)
    exported = torch.export.export(Step(), (logits, target)).module()
    with pytest.raises(RuntimeError, match="exported without gradients: logits did not require grad"):
        exported(logits.requires_grad_(), target).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, device, dtype):
    """Half-precision logits from autocast; loss in float32 and the gradient of the parameters as without autocast, to its rounding."""
    linear = nn.Linear(16, 10).to(device)
    x, target = torch.randn(21, 16, device=device), torch.randint(10, (7,), device=device)
    with torch.autocast(device.type, dtype):
        logits = linear(x)
        loss = iw.iw_cross_entropy(logits, target, 3)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(loss, iw.iw_cross_entropy(logits.float(), target, 3))
    expected = torch.autograd.grad(iw.iw_cross_entropy(linear(x), target, 3), linear.weight)[0]
    got = torch.autograd.grad(loss, linear.weight)[0]
    assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_functional_transforms_of_iw_logmeanexp(device):
    """vmap and grad over plain torch."""
    log_p = torch.randn(5, 3, 7, device=device)
    batched = torch.vmap(lambda l: iw.iw_logmeanexp(l, 3))(log_p)
    torch.testing.assert_close(batched, torch.stack([iw.iw_logmeanexp(l, 3) for l in log_p]))
    weights = torch.func.grad(lambda l: iw.iw_logmeanexp(l, 3).sum())(log_p[0])
    torch.testing.assert_close(weights, log_p[0].softmax(0))


def arguments(device, kind, per_position, reduction, everything):
    """Arguments of the bare op: 3 samples of 5 examples with 11 classes and 7 positions."""
    logits = torch.randn(15, 11, 7, device=device)
    target = torch.randint(11, (5, 7), device=device) if kind == "labels" else torch.rand(5, 11, 7, device=device)
    weights = [torch.rand(n, device=device) for n in ((11,), (5,), (5, 7), ())] if everything else [None] * 4
    smoothing = 0.1 if everything else 0.0
    return logits, *iw.reference.LossArguments(target, 3, *weights, smoothing=smoothing, per_position=per_position, reduction=reduction)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_opcheck(device, kind, per_position, everything):
    """Schema, fake tensors and dispatch of both ops. Their autograd is a Function around them: the bare ops have none."""
    if not iw.backend_info()["built"][device.type]:
        pytest.skip(f"no kernels for {device.type} are built")
    for reduction in (0, 1, 2):
        given = arguments(device, kind, per_position, reduction, everything)
        for need_gradient in (False, True):
            torch.library.opcheck(torch.ops.iwsgd_ext.iw_cross_entropy, (*given, need_gradient))
        torch.library.opcheck(torch.ops.iwsgd_ext.iw_cross_entropy_, given)


@pytest.mark.parametrize(
    "layout", [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[:, 2:9], lambda x: x[:1].expand_as(x)]
)
def test_opcheck_layouts(device, layout):
    """The fake's strides are the kernel's."""
    if not iw.backend_info()["built"][device.type]:
        pytest.skip(f"no kernels for {device.type} are built")
    logits, target, *rest = arguments(device, "labels", False, 1, False)
    torch.library.opcheck(torch.ops.iwsgd_ext.iw_cross_entropy, (layout(logits), target.clamp(max=6), *rest, True))
