"""Whole networks against a loop in float64: every sample of every example alone, with the masks of naive.py."""

import pytest
import torch
from oracle import naive
from torch import Tensor, nn

import iwsgd_ext as iw

SEED, B = 20, 5


class Mlp(nn.Sequential):
    def __init__(self):
        hidden = (nn.Linear(7, 63), nn.ReLU(), nn.Dropout(0.5), nn.Linear(63, 50), nn.Tanh(), nn.Dropout(0.3))
        super().__init__(*hidden, nn.Linear(50, 10), nn.Dropout(0.1))

    @staticmethod
    def naive(w: dict[str, Tensor], x: Tensor, noise) -> Tensor:
        h = noise(torch.relu(w["0.weight"] @ x + w["0.bias"]), 0.5)
        h = noise(torch.tanh(w["3.weight"] @ h + w["3.bias"]), 0.3)
        return noise(w["6.weight"] @ h + w["6.bias"], 0.1)

    example = (7,)


class ConvNet(nn.Module):
    """Element and channel noise, a residual connection after the first noise, pooling, a head with a shared dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6 * 2 * 3, 10)
        self.drop, self.channels, self.path = nn.Dropout(0.4), nn.Dropout2d(0.3), iw.IWDropPath(0.25)

    def forward(self, x):
        h = self.drop(torch.relu(self.first(x)))
        h = h + self.path(self.channels(torch.relu(self.second(h))))
        h = nn.functional.max_pool2d(h, 2).flatten(1)
        return self.head(self.drop(h))

    @staticmethod
    def naive(w: dict[str, Tensor], x: Tensor, noise) -> Tensor:
        conv, pool = nn.functional.conv2d, nn.functional.max_pool2d
        h = noise(torch.relu(conv(x[None], w["first.weight"], w["first.bias"]))[0], 0.4)
        branch = noise(torch.relu(conv(h[None], w["second.weight"], w["second.bias"], padding=1))[0], 0.3, "channel")
        h = pool(h + noise(branch, 0.25, "row"), 2).flatten()
        return w["head.weight"] @ noise(h, 0.4) + w["head.bias"]

    example = (3, 7, 9)


def naive_noise_of(sample: int, example: int, channels_last: bool):
    """The noise of one example under one sample: each call takes the next stream."""
    stream = 0

    def noise(h: Tensor, p: float, unit: str = "element") -> Tensor:
        nonlocal stream
        position, positions = naive.row_positions((1, *h.shape), 0, unit, channels_last and h.dim() == 3)
        keep = naive.naive_mask(SEED, stream, sample, example, positions, p)[position]
        stream += 1
        return h * torch.from_numpy(keep) * naive.effective_scale(p)

    return noise


def naive_step(
    model: nn.Module, x: Tensor, target: Tensor, samples: int, alpha: float, first_example=0, channels_last=False, dtype=torch.float64
):
    """Loss and gradients of the parameters, [s][b] one after another."""
    w = {name: p.detach().cpu().to(dtype).requires_grad_() for name, p in model.named_parameters()}
    log_p = [
        [
            torch.log_softmax(model.naive(w, x[b].cpu().to(dtype), naive_noise_of(s, first_example + b, channels_last)), 0)[target[b]]
            for b in range(len(x))
        ]
        for s in range(samples)
    ]
    loss = naive.naive_loss(log_p, alpha)
    return loss.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def step(model, x, target, samples, alpha, **context):
    with iw.sampling(samples, seed=SEED, **context):
        logits = model(x)
    loss = iw.iw_cross_entropy(logits, target, samples, alpha=alpha)
    parameters = dict(model.named_parameters())
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_as_naive(got, want) -> None:
    """Float64 to float64: only the order of sums differs."""
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-11, atol=1e-12)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name].cpu(), gradient, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.abs().sum() > 0


def batch(model, device, dtype=torch.float64):
    return torch.randn(B, *model.example, device=device, dtype=dtype), torch.randint(10, (B,), device=device)


@pytest.mark.parametrize("expand", ["first", "input"])
@pytest.mark.parametrize("network", [Mlp, ConvNet])
@pytest.mark.parametrize("samples", [1, 3, 8])
@pytest.mark.parametrize("alpha", [1.0, 0.0, float("inf"), 0.5])
def test_loss_and_every_gradient(device, backend, network, expand, samples, alpha):
    model = iw.convert(network().double().to(device), samples, expand=expand)
    x, target = batch(model, device)
    assert_as_naive(step(model, x, target, samples, alpha), naive_step(model, x, target, samples, alpha))


def test_example_ids_follow_the_batch(device, backend):
    """The second half of a batch draws, with first_example, what it draws within the whole."""
    model = iw.convert(Mlp().double().to(device), 3, expand="first")
    x, target = batch(model, device)
    assert_as_naive(step(model, x[2:], target[2:], 3, 1.0, first_example=2), naive_step(model, x[2:], target[2:], 3, 1.0, first_example=2))


def test_channels_last(device, backend):
    """A channels_last convolution net: positions in memory order, as the definition says of its 4-D tensors."""
    model = iw.convert(ConvNet().double().to(device).to(memory_format=torch.channels_last), 3, expand="input")
    x, target = batch(model, device)
    seen = []
    model.first.register_forward_hook(lambda m, args, y: seen.append(naive.in_channels_last_order(y)))
    got = step(model, x.to(memory_format=torch.channels_last), target, 3, 1.0)
    if seen != [True]:
        pytest.skip("this build of torch gives convolutions of another layout")
    assert_as_naive(got, naive_step(model, x, target, 3, 1.0, channels_last=True))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("network", [Mlp, ConvNet])
def test_exported(device, backend, network, strict):
    """A whole training step that torch.export has made a graph of, for a batch of another size: loss and gradients of the loop."""

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = iw.convert(network().double().to(device), 3, expand="first", verify=False)

        def forward(self, x, target):
            with iw.sampling(3, seed=SEED):
                logits = self.model(x)
            return iw.iw_cross_entropy(logits, target, 3)

    training = Training()
    x, target = batch(training.model, device)
    rows = {0: torch.export.Dim("rows", max=1000)}
    exported = torch.export.export(training, (x, target), dynamic_shapes=(rows, rows), strict=strict).module()
    x, target = (v[:3] for v in (x, target))
    loss, parameters = exported(x, target), dict(exported.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    got = loss.detach(), {name.removeprefix("model."): g for name, g in zip(parameters, gradients, strict=True)}
    assert_as_naive(got, naive_step(training.model, x, target, 3, 1.0))


@pytest.mark.parametrize("network", [Mlp, ConvNet])
def test_float32(device, backend, network):
    """Not further from the truth than twice what the naive loop in float32 is, each gradient in its norm."""
    model = iw.convert(network().to(device), 3, expand="first")
    x, target = batch(model, device, torch.float32)
    loss, gradients = step(model, x, target, 3, 1.0)
    true_loss, truth = naive_step(model, x, target, 3, 1.0)
    naive_loss, low = naive_step(model, x, target, 3, 1.0, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps
    assert abs(loss.item() - true_loss) <= 2 * (abs(naive_loss - true_loss) + eps * abs(true_loss))
    for name, want in truth.items():
        error, budget = (gradients[name].cpu() - want).abs(), (low[name] - want).abs()
        assert error.square().mean().sqrt() <= 2 * (budget.square().mean().sqrt() + eps * want.abs().max())
        assert error.max() <= 2 * (budget.max() + eps * want.abs().max())


def test_one_sample_is_dropout_training(device, backend):
    """S=1, for any alpha: cross-entropy of one noisy forward."""
    model = iw.convert(Mlp().double().to(device), 1, expand="first")
    x, target = batch(model, device)
    with iw.sampling(1, seed=SEED):
        want = nn.functional.cross_entropy(model(x), target)
    for alpha in (0.0, 1.0, 3.0, float("inf")):
        torch.testing.assert_close(step(model, x, target, 1, alpha)[0], want.detach())


@pytest.mark.slow
def test_training_learns(device, backend):
    """Two hundred steps on separable data: the loss falls below a third, and the eval model is right."""
    torch.manual_seed(0)
    model = iw.convert(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 2)).to(device), 4, expand="first")
    criterion, optimizer = iw.IWCrossEntropyLoss(4), torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(100, 2, device=device)
    y = (x[:, 0] > x[:, 1]).long()
    losses = []
    for _ in range(200):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert (model.eval()(x).argmax(1) == y).double().mean() >= 0.95
