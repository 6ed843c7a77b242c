"""Dropout by function calls in a converted model: the noise of the context, against naive masks; and where it is not caught."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import naive
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

SEED, B, S = 3, 5, 3


@pytest.fixture(autouse=True)
def _no_mode_left():
    yield
    assert _get_current_function_mode() is None


class Net(nn.Module):
    """A layer, a function, a layer."""

    def __init__(self, call):
        super().__init__()
        self.first, self.second, self.drop, self.call = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.25), call

    def forward(self, x):
        return self.drop(self.call(torch.tanh(self.second(torch.tanh(self.first(x)))), self))

    def naive(self, x, noise):
        """One sample; noise(h, stream) stands for the function."""
        h = noise(torch.tanh(self.second(torch.tanh(self.first(x)))), 0)
        return h * keep(h, 0.25, 1, noise.sample) * naive.effective_scale(0.25)


def keep(h, p, stream, sample, unit="element"):
    return naive.naive_keep(h, p, samples=1, seed=SEED, stream=stream, sample_ids=[sample], unit=unit)


def alpha(h, mask, p):
    """Dropped elements take SELU's limit, then mean 0 and variance 1 are given back (p rounded as the noise rounds it)."""
    q, limit = 1 - naive.threshold(p) / 65536, -1.7580993408473766
    a = (q + limit**2 * q * (1 - q)) ** -0.5
    return a * torch.where(mask, h, torch.full_like(h, limit)) - a * limit * (1 - q)


def wide(h, *ones):
    """Eight features as three channels' worth of positions: [B, 2, 4], [B, 2, 2, 2], ..."""
    return h.reshape(len(h), *ones)


CASES = {
    "dropout": (lambda h, m: F.dropout(h, 0.5, m.training), (), "element", 0.5),
    "positional": (lambda h, m: F.dropout(h, 0.3, True, False), (), "element", 0.3),
    "torch's": (lambda h, m: torch.dropout(h, p=0.5, train=m.training), (), "element", 0.5),
    "dropout1d": (lambda h, m: F.dropout1d(wide(h, 2, 4), training=m.training).flatten(1), (2, 4), "channel", 0.5),
    "dropout2d": (lambda h, m: F.dropout2d(wide(h, 2, 2, 2), 0.4).flatten(1), (2, 2, 2), "channel", 0.4),
    "dropout3d": (lambda h, m: F.dropout3d(wide(h, 4, 2, 1, 1), 0.4).flatten(1), (4, 2, 1, 1), "channel", 0.4),
    "feature_dropout": (lambda h, m: torch.feature_dropout(wide(h, 2, 4), 0.4, True).flatten(1), (2, 4), "channel", 0.4),
    "feature_dropout of features": (lambda h, m: torch.feature_dropout(h, 0.4, True), (), "element", 0.4),
    "dropout2d of three dimensions": (lambda h, m: F.dropout2d(wide(h, 2, 4), 0.4).flatten(1), (2, 4), "channel", 0.4),
    "in place, result used": (lambda h, m: F.dropout(h + 0, 0.5, True, inplace=True), (), "element", 0.5),
    "built in forward": (lambda h, m: nn.Dropout(0.5)(h), (), "element", 0.5),
    "alpha_dropout": (lambda h, m: F.alpha_dropout(h, 0.3, training=True), (), "alpha", 0.3),
    "feature_alpha_dropout": (
        lambda h, m: F.feature_alpha_dropout(wide(h, 2, 4), 0.3, m.training).flatten(1),
        (2, 4),
        "alpha channel",
        0.3,
    ),
}


def naive_function(case, sample):
    _, shape, unit, p = CASES[case]

    def noise(h, stream):
        y = h.reshape(len(h), *shape) if shape else h
        mask = keep(y, p, stream, sample, "channel" if "channel" in unit else "element")
        y = alpha(y, mask, p) if "alpha" in unit else y * mask * naive.effective_scale(p)
        return y.flatten(1)

    noise.sample = sample
    return noise


@pytest.mark.parametrize("expand", ["axis", "first", "input", "second"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(backend, case, expand):
    """What comes out for an example is S samples of the loop, functional noise included; no example inputs are needed."""
    model, x = Net(CASES[case][0]).double(), torch.randn(B, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    want = torch.cat([twin.naive(x, naive_function(case, s)) for s in range(S)])
    iw.convert(model, S, expand=expand)
    for run in ("the run that looks", "one that knows"):
        model.zero_grad()
        with iw.sampling(S, seed=SEED) as context:
            got = model(x)
        assert context.stream == 2
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=lambda m, run=run: f"{run}: {m}")
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
    with iw.sampling(1, seed=SEED, sample_ids=[2]):
        torch.testing.assert_close(model(x), want[2 * B :], rtol=1e-11, atol=1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def naive(self, x, sample):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1)) / 2 + torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        probabilities = scores.softmax(-1)
        probabilities = probabilities * keep(probabilities, 0.3, 0, sample) * naive.effective_scale(0.3)
        return self.out((probabilities @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("expand", ["axis", "first", "input", "qkv"])
def test_attention(backend, expand):
    """A model whose only noise is SDPA's dropout_p."""
    model, x = Attention().double(), torch.randn(B, 7, 8, dtype=torch.float64)
    twin, evaluated = copy.deepcopy(model), model.eval()(x)
    want = torch.cat([twin.naive(x, s) for s in range(S)])
    iw.convert(model, S, expand=expand)
    assert torch.equal(model(x), evaluated)
    with iw.sampling(S, seed=SEED):
        got = model.train()(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("expand", ["axis", "input"])
def test_in_place_with_the_result_dropped(backend, expand):
    """``F.dropout(h, inplace=True)`` as a statement: h itself is noisy; on the axis it becomes a noisy tensor."""

    def call(h, model):
        h = h + 0
        F.dropout(h, 0.5, True, inplace=True)
        return h

    model, x = Net(call).double(), torch.randn(B, 6, dtype=torch.float64)
    want = torch.cat([model.naive(x, naive_function("dropout", s)) for s in range(S)])
    iw.convert(model, S, expand=expand)
    with iw.sampling(S, seed=SEED):
        torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-12)


def test_eval_and_outside_are_torch():
    """Eval mode, training after revert, and calls outside of the forward draw what torch draws."""
    model, x = Net(CASES["positional"][0]), torch.randn(B, 6)
    torch.manual_seed(1)
    want = model.eval()(x), model.train()(x)
    iw.convert(model, S)
    model(x)
    torch.manual_seed(1)
    assert torch.equal(model.eval()(x), want[0])
    iw.revert(model)
    assert torch.equal(model.train()(x), want[1])
    iw.convert(model, S)(x)
    torch.manual_seed(1)
    one = F.dropout(x)
    torch.manual_seed(1)
    with iw.sampling(S):
        assert torch.equal(F.dropout(x), one)


class Rare(nn.Module):
    on = False

    def forward(self, x):
        return F.dropout(x, 1.0) if self.on else x


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_a_branch_that_is_taken_later(expand):
    model, x = iw.convert(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), Rare()), S, expand=expand), torch.ones(B, 4)
    model(x)
    model[2].on = True
    with iw.sampling(S) as context:
        assert model(x).abs().sum() == 0
        assert context.stream == 2


def test_only_functional_dropout():
    """Nothing to swap, and still a model to convert."""

    x = torch.randn(B, 4)
    for options in ({}, {"example_inputs": x}, {"expand": "first"}, {"expand": "input", "example_inputs": x}):
        model = iw.convert(Functional(), S, **options)
        with iw.sampling(S, seed=SEED):
            torch.testing.assert_close(model(x), naive.naive_noise(x, 0.5, samples=S, seed=SEED))
        assert model(x).shape == (S * B, 4)
        assert torch.equal(model.eval()(x), x)
    with pytest.raises(ValueError, match="and none in a run on"):
        iw.convert(nn.Linear(4, 4), S, example_inputs=x)


def test_copies_and_threads():
    model, x = iw.convert(Net(F_dropout), S), torch.randn(B, 6)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with iw.sampling(S, seed=SEED):
        want = model(x)
    for other in copies:
        with iw.sampling(S, seed=SEED):
            assert torch.equal(other(x), want)


def F_dropout(h, model):
    return F.dropout(h, 0.5, model.training)


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_exceptions_and_interrupts(expand):
    def fail(h, model):
        raise model.error

    model, x = iw.convert(Net(fail), S, expand=expand), torch.randn(B, 6)
    model.error = RuntimeError("as it happens")
    with pytest.raises(RuntimeError, match="as it happens"):
        model(x)
    assert (_get_current_function_mode(), current()) == (None, None)
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    torch.manual_seed(1)
    noise = F.dropout(x)  # what is left of the interrupted forward does not catch it
    with iw.sampling(S):
        assert F.dropout(x).shape == x.shape  # in a later context neither
        assert torch.equal(F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=1.0), torch.zeros_like(x)[None])
    other = iw.convert(Net(F_dropout), 2, expand=expand)
    assert other(x).shape == (2 * B, 8)
    assert (_get_current_function_mode(), current()) == (None, None)
    torch.manual_seed(1)
    assert torch.equal(F.dropout(x), noise)


@pytest.mark.parametrize("expand", [pytest.param("axis", marks=pytest.mark.slow), "first"])
@pytest.mark.parametrize("case", ["dropout", "alpha_dropout", pytest.param("built in forward", marks=pytest.mark.slow)])
def test_compiled(case, expand):
    """fullgraph: the masks of eager, with gradients, and the next step draws others."""
    torch._dynamo.reset()
    model, x = iw.convert(Net(CASES[case][0]), S, expand=expand, verify=False), torch.randn(B, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        results = []
        for m in (compiled, model):
            with iw.sampling(S, seed=seed):
                y = m(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(compiled(x), compiled(x))
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, checkpoint):
        super().__init__()
        self.block, self.checkpoint, self.last = Net(F_dropout), checkpoint, nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.checkpoint(self.block, x))


def plain_checkpoint(block, x, **options):
    return torch_checkpoint(block, x, **options)


CHECKPOINTS = {
    "iw": iw.checkpoint,
    "iw, reentrant": functools.partial(iw.checkpoint, use_reentrant=True),
    "contexts": functools.partial(plain_checkpoint, use_reentrant=False, context_fn=iw.checkpoint_contexts),
    "torch's": functools.partial(plain_checkpoint, use_reentrant=False),
}


@pytest.mark.parametrize("expand", ["axis", "first", "input"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recompute_draws_the_same(name, expand):
    model = iw.convert(Checkpointed(lambda block, x: block(x)).double(), S, expand=expand)
    x = torch.randn(B, 6, dtype=torch.float64, requires_grad=True)
    if name == "iw, reentrant" and expand == "axis":  # an autograd Function without a rule for vmap
        model.checkpoint = CHECKPOINTS[name]
        with pytest.warns(UserWarning, match="called once for each noise sample.*the model itself"):
            model(x)
        model.checkpoint = lambda block, x: block(x)
    gradients = []
    for checkpoint in (model.checkpoint, CHECKPOINTS[name]):
        model.checkpoint = checkpoint
        with iw.sampling(S, seed=SEED):
            y = model(x)
        y.square().sum().backward()  # (the reentrant form allows no grad())
        leaves = [x, *model.parameters()]
        gradients.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_with_noise():
    """iw.predict turns noise on in eval mode; an eval forward teaches nothing about the training forward."""
    model, x, drawn = iw.convert(Functional(), S).eval(), torch.ones(B, 4), []
    model.register_forward_hook(lambda m, args, y: drawn.append(y))
    iw.predict(model, x, S, seed=SEED)
    torch.testing.assert_close(drawn[0], naive.naive_noise(x, 0.5, samples=S, seed=SEED))
    assert torch.equal(model(x), x)
    assert not model._iw_conversion.watched


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_reentrant_checkpoints_of_torch_are_refused(expand):
    """Backward would draw other noise."""
    model = Checkpointed(functools.partial(plain_checkpoint, use_reentrant=True))
    x = torch.randn(B, 6, requires_grad=True)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=r"dropout is noise of a converted model here.*Use iw.checkpoint\("):
        warnings.simplefilter("ignore")
        iw.convert(model, S, expand=expand)(x)
    assert current() is None


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("expand", ["axis", "input"])
def test_bad_input(expand):
    model = iw.convert(Net(lambda h, m: F.dropout(h, 1.5)), S, expand=expand)
    with pytest.raises(ValueError, match="p: expected a probability"):
        model(torch.ones(B, 6))
    model = iw.convert(Net(lambda h, m: F.dropout1d(h, 0.5)), S, expand=expand)
    with pytest.raises(ValueError, match=r"nn.Dropout1d\): expected \[B, C, L\]"):
        model(torch.ones(B, 6))
    assert current() is None
