"""The sample axis: whatever a model makes of its rows, each noise sample is what the loop over single-sample passes computes."""

import copy
import dataclasses
import functools
import pickle
import random
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle.equal_to_loop import SEED, S, assert_equal_to_loop, assert_is_loop
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

B, T, W = 5, 6, 8
X, OTHER, TOKENS = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, 6), (B, 6), (B, T, 6)))
LENGTHS, PERM, TABLE = torch.tensor([6, 3, 4, 1, 5]), torch.tensor([3, 0, 4, 1, 2]), torch.randn(B, W, dtype=torch.float64)
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 0, 0], [1, 0, 1, 3, 2, 0, 4, 0]])


class Model(nn.Module):
    """Layers for a function to use: it is the forward."""

    def __init__(self, function, **more):
        super().__init__()
        self.function = function
        self.a, self.q, self.c, self.d, self.e, self.h = (
            *(nn.Linear(6, W), nn.Linear(6, W), nn.Linear(W, W)),
            *(nn.Dropout(0.5), nn.Dropout(0.3), nn.Linear(W, 3)),
        )
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def noisy(m, x):
    return m.d(m.a(x))


def at_lengths(h, n):
    """The last token of each row of h, whatever their number."""
    return h[torch.arange(len(h)), n.repeat(len(h) // len(n)) - 1]


def neighbours(m, x, edges):
    edges, h = edges[:, edges[0] != edges[1]], noisy(m, x)
    return m.h(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


def repeated_rows(m, x):
    h, q = noisy(m, x), m.q(x)
    return m.h(h * q.repeat_interleave(len(h) // len(q), 0))


def viewed_rows(m, x):
    h, q = noisy(m, x), m.q(x)
    return m.h((h.view(len(q), -1, W) * q[:, None]).flatten(0, 1))


# name: (function, inputs, and which rows fit too)
MODELS = {
    "network": (lambda m, x: m.h(m.e(noisy(m, x))), (X,), "first input"),
    "two branches": (lambda m, x, y: m.h(noisy(m, x) + m.e(m.a(y))), (X, OTHER), "first input"),
    "skip": (lambda m, x: m.h(m.c(noisy(m, x)) + m.a(x)), (X,), "input"),
    "attention of tokens": (
        lambda m, x: m.h(F.scaled_dot_product_attention(noisy(m, x), noisy(m, x), noisy(m, x)).mean(1)),
        (TOKENS,),
        "first input",
    ),
    "mean of tokens": (lambda m, x: m.h(m.e(noisy(m, x).mean(1))), (TOKENS,), "first input"),
    "table of as many rows": (lambda m, x, t: noisy(m, x) @ t.T, (X, TABLE), "first"),
    "sorted": (lambda m, x: m.h(noisy(m, x).sort(1).values), (X,), "first input"),
    "tokens looked up": (lambda m, x, n: m.h(at_lengths(noisy(m, x), n)), (TOKENS, LENGTHS), "first input"),
    # rows are S*B after the first noise, and B again before the second
    "rows by arange of the input": (lambda m, x, n: m.h(m.e(noisy(m, x)[torch.arange(x.shape[0]), n - 1])), (TOKENS, LENGTHS), "input"),
    "gather": (lambda m, x, n: m.h(m.e(noisy(m, x).gather(1, (n - 1)[:, None, None].expand(-1, 1, W))[:, 0])), (TOKENS, LENGTHS), "input"),
    "view": (lambda m, x: m.h(m.e(noisy(m, x).view(x.shape[0], -1, W).mean(1))), (TOKENS,), "input"),
    "slice": (lambda m, x: m.h(m.e(noisy(m, x)[: x.shape[0]])), (X,), "input"),
    "rows one by one": (lambda m, x: m.h(m.e(torch.stack([noisy(m, x)[i] for i in range(x.shape[0])]))), (X,), ""),
    # shapes fit, and samples meet
    "repeated rows": (repeated_rows, (X,), "input"),
    "viewed rows": (viewed_rows, (X,), "input"),
    "views of one example": (lambda m, x, y: torch.stack(noisy(m, torch.cat([x, y])).chunk(2), 1), (X, OTHER), ""),
    "permutation": (lambda m, x, p: m.h(noisy(m, x) + noisy(m, x)[p]), (X, PERM), ""),
    "edges": (neighbours, (X, EDGES), ""),
    "mean": (lambda m, x: m.h(noisy(m, x) - noisy(m, x).mean(0)), (X,), ""),
    "deviation": (lambda m, x: m.h(noisy(m, x) / noisy(m, x).std()), (X,), ""),
    "softmax": (lambda m, x: m.h(noisy(m, x).softmax(0)), (X,), ""),
    "roll": (lambda m, x: m.h(noisy(m, x).roll(1, 0)), (X,), ""),
    "flip": (lambda m, x: m.h(noisy(m, x).flip(0)), (X,), ""),
    "running sum": (lambda m, x: m.h(noisy(m, x).cumsum(0)), (X,), ""),
    "ranks": (lambda m, x: m.h(noisy(m, x).sort(0).values), (X,), ""),
    "batch normalisation, by function": (lambda m, x: m.h(F.batch_norm(noisy(m, x), None, None, training=True)), (X,), ""),
    "attention": (lambda m, x: m.h(torch.softmax(noisy(m, x) @ noisy(m, x).T, 1) @ noisy(m, x)), (X,), ""),
    "attention, fused": (lambda m, x: m.h(F.scaled_dot_product_attention(*[noisy(m, x)[None]] * 3)[0]), (X,), ""),
    "attention, dropped": (lambda m, x: m.h(F.scaled_dot_product_attention(*[m.a(x)[None]] * 3, dropout_p=0.3 * m.training)[0]), (X,), ""),
    "contrast": (lambda m, x, y: noisy(m, x) @ noisy(m, y).T, (X, OTHER), ""),
    "table without examples": (lambda m, x: m.h((x @ m.d(m.a.weight).T).tanh()), (X,), ""),
    "another loss": (lambda m, x: (m.h(noisy(m, x)), noisy(m, x).square().mean()), (X,), ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_axis_is_the_loop(name):
    function, inputs, _ = MODELS[name]
    audit = assert_equal_to_loop(Model(function), inputs)
    assert audit.one_by_one == {}


@pytest.mark.parametrize("expand", ["first", "input"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_loop_or_refused(name, expand):
    function, inputs, fit = MODELS[name]
    if expand in fit.split():
        assert_equal_to_loop(Model(function), inputs, expand=expand)
        return
    model = Model(function).double()
    with pytest.raises(ValueError, match=f"with expand='{expand}', {S} samples together do not give what each .*|the model stops on"):
        iw.convert(model, S, expand=expand, example_inputs=inputs)
    assert type(model.d) is nn.Dropout
    iw.convert(model, S, expand=expand)  # without them the first training forward is compared
    for _ in range(2):  # and each one after it, until one is right
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            model(*inputs)


@pytest.mark.parametrize("name", ["mean", "edges", "contrast", "repeated rows"])
def test_strategies_agree(name):
    function, inputs, _ = MODELS[name]
    model, target = iw.convert(Model(function).double(), S, example_inputs=inputs), torch.tensor([0, 2, 1, 1, 0])
    strategies = ("batched", "streamed", "loop")
    losses = [iw.backward(model, iw.IWCrossEntropyLoss(S), inputs, target, samples=S, seed=0, strategy=s).item() for s in strategies]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) == pytest.approx(losses[2], rel=1e-12)


def test_what_no_noise_has_touched_is_computed_once():
    model, seen = Model(lambda m, x: m.h(m.d(m.a(x)))).double(), []
    model.a.register_forward_hook(lambda m, args, y: seen.append(("a", torch._C._functorch.is_batchedtensor(y))))
    model.h.register_forward_hook(lambda m, args, y: seen.append(("h", torch._C._functorch.is_batchedtensor(y), y.shape)))
    iw.convert(model, S)(X)
    assert seen == [("a", False), ("h", True, (B, 3))]


class TestLayers:
    """Layers whose kernels have rules of their own."""

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent(self, kind, batch_first):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.rnn = nn.Dropout(0.5), kind(6, W, 2, dropout=0.3, bidirectional=True, batch_first=batch_first)

            def forward(self, x):
                y, _state = self.rnn(self.drop(x))
                return y.mean(1 if batch_first else 0), y.flatten(1).mean(1)

        x = TOKENS if batch_first else TOKENS.transpose(0, 1).contiguous()
        if batch_first:
            assert_equal_to_loop(Net(), (x,))
        else:
            assert_equal_to_loop(Net(), (x,), lambda y: y[0])

    def test_packed_sequences(self):
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.lstm, self.out = nn.Dropout(0.5), nn.LSTM(6, W, 2, dropout=0.4, batch_first=True), nn.Linear(W, 3)

            def forward(self, x, n):
                packed = pack_padded_sequence(self.drop(x), n, batch_first=True, enforce_sorted=False)
                y, (h, _) = self.lstm(packed)
                return self.out(pad_packed_sequence(y, batch_first=True)[0]), self.out(h[-1])

        assert_equal_to_loop(Tagger(), (TOKENS, LENGTHS))

    @pytest.mark.parametrize("last", [nn.Conv2d(4, 3, 3, groups=1), nn.ConvTranspose2d(4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2)])
    def test_images(self, last):
        layers = [nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Dropout(0.2), last]
        assert_equal_to_loop(nn.Sequential(*layers), (torch.randn(B, 3, 6, 7, dtype=torch.float64),))

    def test_channels_last(self):
        """The masks of the logical order, whatever order memory has."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.Dropout(0.3))
        model = model.double().to(memory_format=torch.channels_last)
        x = torch.randn(B, 3, 6, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
        assert_equal_to_loop(model, (x,))

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_batch_norm_of_more_rows(self, momentum):
        """Of B, 2B and B*T rows, and of one that no noise has touched."""

        def forward(m, x):
            h = noisy(m, m.first(x.transpose(1, 2)).transpose(1, 2))
            h = torch.stack([h, h.tanh()]).flatten(0, 1)
            h = m.norm(h.flatten(0, 1)).unflatten(0, (2, B, T)).mean(0)
            return m.h(m.last(h.mean(1)))

        norms = {"first": nn.BatchNorm1d(6, momentum=momentum), "norm": nn.BatchNorm1d(W, momentum=momentum)}
        assert_equal_to_loop(Model(forward, **norms, last=nn.BatchNorm1d(W, momentum=momentum)), (TOKENS,))

    @pytest.mark.parametrize(
        "layer",
        [iw.IWAlphaDropout(0.4), iw.IWGaussianDropout(0.5), iw.IWGaussianNoise(0.5), iw.IWMultinomialDropout(0.5), iw.IWDropPath(0.5)],
        ids=lambda layer: type(layer).__name__,
    )
    def test_every_noise(self, layer):
        assert_equal_to_loop(nn.Sequential(nn.Linear(6, W), nn.Tanh(), layer, nn.Linear(W, 3), copy.deepcopy(layer)), (X,))

    def test_weights(self):
        assert_equal_to_loop(nn.Sequential(iw.IWDropConnect(6, W), nn.Tanh(), iw.IWDropConnect(W, 3)), (X,))

    def test_time_major_without_batch_dim(self):
        """Nothing is repeated, so a causal model stays one."""

        class LM(nn.Module):
            def __init__(self):
                super().__init__()
                self.emb, self.drop, self.out = nn.Embedding(9, W), nn.Dropout(0.2), nn.Linear(W, 9)
                self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(W, 2, 12, 0.2), 1, enable_nested_tensor=False)

            def forward(self, x):
                mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=torch.float64)
                return self.out(self.enc(self.drop(self.emb(x)), mask, is_causal=True))

        tokens = torch.randint(9, (T, B))
        assert_equal_to_loop(LM(), (tokens,))
        model, future, got = iw.convert(LM().double(), S, example_inputs=tokens), tokens.clone(), []
        future[-1] = (tokens[-1] + 1) % 9
        for x in (tokens, future):
            with iw.sampling(S, seed=0):
                got.append(model(x).view(S, T, B, 9))
        assert torch.equal(got[0][:, :-1], got[1][:, :-1]) and not torch.equal(got[0][:, -1], got[1][:, -1])


def set_item(m, x):
    h = torch.zeros(B, W, dtype=x.dtype)
    h[:, 1:4] = noisy(m, x)[:, 1:4]
    return m.h(h)


def add_to_constant(m, x):
    h = torch.ones(B, W, dtype=x.dtype)
    h += noisy(m, x)
    return m.h(h)


def add_to_the_trunk(m, x):
    h = m.q(x)
    h += noisy(m, x)
    return m.h(h)


def write_into_a_view(m, x):
    h = torch.zeros(B, 2, W, dtype=x.dtype)
    h[:, 1] += noisy(m, x)
    part = h[:, 0]
    part.copy_(noisy(m, x).tanh())
    return m.h(h.sum(1))


def scatter(m, x):
    return m.h(torch.zeros(B, W, dtype=x.dtype).index_add_(0, PERM, noisy(m, x)))


def out_argument(m, x):
    with torch.no_grad():
        h = torch.empty(B, W, dtype=x.dtype)
        torch.mul(noisy(m, x), 2, out=h)
    return m.h(h)


def masked(m, x):
    h = m.q(x)
    return m.h(h.masked_fill_(noisy(m, x) > 0, 0.5))


@pytest.mark.parametrize("write", [set_item, add_to_constant, add_to_the_trunk, write_into_a_view, scatter, masked])
def test_writes_in_place(write):
    """Noisy values written into what has none."""
    audit = assert_equal_to_loop(Model(write), (X,))
    assert audit.one_by_one == {}


def test_out_argument():
    """torch's batching has no rule for one."""
    with pytest.warns(UserWarning, match="called once for each noise sample"):
        model = iw.convert(Model(out_argument).double(), S, example_inputs=X)
    with iw.sampling(S, seed=SEED):
        y = model(X)
    torch.testing.assert_close(y, model.h(2 * iw.functional.dropout(model.a(X), 0.5, samples=S, seed=SEED)))


def test_noise_written_into_an_input():
    """Noise samples share it, and the caller has it: refused on the axis, and one by one the second sample would read the first's."""

    def forward(m, x):
        x += m.d(x)
        return m.h(m.a(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="in place"):
            iw.convert(Model(forward).double(), S, example_inputs=X.clone())


def test_noise_written_into_a_buffer():
    """A running mean of noisy activations: its module is called one by one, and the buffer is the loop's."""

    class Tracks(nn.Module):
        def __init__(self, replace):
            super().__init__()
            self.replace = replace
            self.register_buffer("mean", torch.zeros(W, dtype=torch.float64))

        def forward(self, h):
            if self.replace:
                self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            else:
                self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            return h * 2

    for replace in (False, True):
        model = Model(lambda m, x: m.h(m.e(m.track(noisy(m, x)))), track=Tracks(replace))
        with pytest.warns(UserWarning, match="called once for each noise sample, as they cannot run on the sample axis: track"):
            audit = assert_equal_to_loop(model, (X,))
        assert list(audit.one_by_one) == ["track"] and "called once for each noise sample:\n  track" in str(audit)


# Outputs


@dataclasses.dataclass
class Fields:
    logits: torch.Tensor
    aux: torch.Tensor


class Holder:
    def __init__(self, **tensors):
        self.inner = tensors


Pair = namedtuple("Pair", "logits aux")
OUTPUTS = {
    "dict": (lambda y, aux: {"logits": y, "aux": aux, "n": 3}, lambda o: (o["logits"], o["aux"])),
    "tuple": (lambda y, aux: (y, None, aux), lambda o: (o[0], o[2])),
    "named tuple": (Pair, lambda o: (o.logits, o.aux)),
    "list": (lambda y, aux: [y, [aux]], lambda o: (o[0], o[1][0])),
    "dataclass": (Fields, lambda o: (o.logits, o.aux)),
    "object": (lambda y, aux: Holder(logits=y, aux=aux), lambda o: (o.inner["logits"], o.inner["aux"])),
    "object in a tuple": (lambda y, aux: (y, Holder(aux=[aux])), lambda o: (o[0], o[1].inner["aux"][0])),
    "distribution": (
        lambda y, aux: torch.distributions.Normal(y, F.softplus(aux), validate_args=False),
        lambda o: (o.loc, o.scale),
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind):
    make, take = OUTPUTS[kind]
    second = "h" if kind == "distribution" else "c"
    assert_equal_to_loop(Model(lambda m, x: make(m.h(noisy(m, x)), getattr(m, second)(noisy(m, x)))), (X,), take)


def test_scalars_and_what_no_noise_has_touched():
    """A number becomes one for each sample; an output without noise has its rows for each sample, too."""
    model = Model(lambda m, x: (m.h(noisy(m, x)), noisy(m, x).mean(), m.q(x), 5)).double()
    with pytest.warns(UserWarning, match="the model returns a number for each noise sample"):
        iw.convert(model, S, example_inputs=X)
    y, mean, plain, five = model(X)
    assert (y.shape, mean.shape, plain.shape, five) == ((S * B, 3), (S,), (S * B, W), 5)
    assert torch.equal(plain, torch.cat([model.q(X)] * S)) and mean.unique().numel() == S


def test_time_major_outputs():
    model = Model(lambda m, x: (m.h(noisy(m, x)), noisy(m, x).mean(0))).double()
    iw.convert(model, S, batch_dim=1, example_inputs=TOKENS.transpose(0, 1))
    y, mean = model(TOKENS.transpose(0, 1))
    assert (y.shape, mean.shape) == ((T, S * B, 3), (S * B, W))


def test_attributes_left_on_modules():
    """An auxiliary loss, attention weights: rows or [S] afterwards, with gradients, and no tensor of the axis is left."""

    class Keeps(nn.Module):
        def forward(self, h):
            self.aux, self.maps, self.table = h.square().mean(), [h.softmax(1)], {"h": h}
            return h

    model = Model(lambda m, x: m.h(m.keep(noisy(m, x))), keep=Keeps()).double()
    iw.convert(model, S, example_inputs=X)
    assert "aux" not in vars(model.keep)
    twin = copy.deepcopy(model)
    with iw.sampling(S, seed=SEED):
        y = model(X)
    keep, want = model.keep, []
    assert (keep.aux.shape, keep.maps[0].shape, keep.table["h"].shape) == ((S,), (S * B, W), (S * B, W))
    for s in range(S):
        with iw.sampling(1, seed=SEED, sample_ids=[s]):
            twin(X)
        want.append((twin.keep.aux, twin.keep.maps[0], twin.keep.table["h"]))
    aux, maps, h = zip(*want, strict=True)
    torch.testing.assert_close((keep.aux, keep.maps[0], keep.table["h"]), (torch.stack(aux), torch.cat(maps), torch.cat(h)))
    (y.sum() * 0 + keep.aux.sum()).backward()
    sum(aux).backward()
    torch.testing.assert_close(model.a.weight.grad, twin.a.weight.grad)


# One by one


class Branches(nn.Module):
    """The sign of a noisy number decides."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(W, W)

    def forward(self, h):
        return self.linear(h).tanh() if h.sum() > 0 else h * 2


class Reads(nn.Module):
    def forward(self, h):
        return h * (1 + h.detach().abs().max().item())


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        return dy * (ctx.saved_tensors[0] > 0)


class Calls(nn.Module):
    def forward(self, h):
        return Foreign.apply(h)


class Selects(nn.Module):
    """A number of values that depends on them."""

    def forward(self, h):
        return h - h[h > 0].mean()


ONE_BY_ONE = {"branches": Branches, "reads": Reads, "foreign Function": Calls, "selects": Selects}


def with_part(part):
    return Model(lambda m, x: m.h(m.e(m.part(noisy(m, x)).sigmoid())), part=part)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_parts_that_ask_for_values(name):
    """Right, warned of once, and listed; copies and pickles keep it, revert undoes it."""
    model = with_part(ONE_BY_ONE[name]())
    kind = type(model.part)
    with pytest.warns(UserWarning, match="called once for each noise sample.*: part ") as told:
        audit = assert_equal_to_loop(model, (X,))
    assert sum("called once" in str(w.message) for w in told) == 1
    assert list(audit.one_by_one) == ["part"]
    model.function = forward_of_parts  # a lambda is not pickled
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with iw.sampling(S, seed=1):
            want = model(X)
        for other in copies:
            with iw.sampling(S, seed=1):
                assert torch.equal(other(X), want)
            assert list(iw.audit(other).one_by_one) == ["part"]
            iw.revert(other)
            assert type(other.part) is kind and other(X).shape == (B, 3)
    assert type(model.part) is not kind and isinstance(model.part, kind)


def forward_of_parts(m, x):
    return m.h(m.e(m.part(noisy(m, x)).sigmoid()))


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_parts_that_ask_for_values_without_example_inputs(name):
    """The first training forward finds them, gives what a later one gives, and says so once."""
    model = iw.convert(with_part(ONE_BY_ONE[name]()).double(), S)
    results = []
    with pytest.warns(UserWarning, match="called once for each noise sample.*: part "), iw.sampling(S, seed=SEED):
        results.append(model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with iw.sampling(S, seed=SEED):
            results.append(model(X))
        each = []
        for s in range(S):
            with iw.sampling(1, seed=SEED, sample_ids=[s]):
                each.append(model(X))
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.cat(each), rtol=1e-12, atol=1e-12)


def test_one_by_one_that_is_asked_for():
    for names in (["part"], "part", [""], ["part", "h"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            audit = assert_equal_to_loop(with_part(Branches()), (X,), one_by_one=names)
        assert audit.one_by_one == dict.fromkeys([names] if isinstance(names, str) else names, "asked for")


def test_a_forward_that_branches_by_itself():
    """No submodule is to blame: the model is called one by one."""
    model = Model(lambda m, x: m.h(noisy(m, x)) if noisy(m, x).sum() > 0 else m.h(m.q(x)) + noisy(m, x).sum())
    with pytest.warns(UserWarning, match="called once for each noise sample.*: the model itself"):
        audit = assert_equal_to_loop(model, (X,))
    assert list(audit.one_by_one) == [""]


def test_a_number_for_the_whole_call():
    """LayerDrop, as Hugging Face's models have it: each noise sample draws its own, and it is torch's."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(W, W)

        def forward(self, h):
            return h if torch.rand(()) < 0.5 else self.linear(h).tanh() + 100

    model = Model(lambda m, x: m.part(noisy(m, x)).mean(1), part=Skips()).double()
    with pytest.warns(UserWarning) as told:
        iw.convert(model, 32, example_inputs=X)
    texts = [str(w.message) for w in told]
    assert any("called once for each noise sample" in t and ": part " in t for t in texts) and any("torch.rand in part" in t for t in texts)
    skipped = (model(X).view(32, B) < 50).double().mean(1)
    assert set(skipped.tolist()) == {0.0, 1.0}  # all rows of a sample alike, and samples not
    assert list(iw.audit(model).one_by_one) == ["part"]


def test_samples_under_a_batch_norm():
    """What a part called one by one hands on is normalised sample by sample."""
    model = Model(lambda m, x: m.h(m.norm(m.part(noisy(m, x)))), part=Branches(), norm=nn.BatchNorm1d(W))
    with pytest.warns(UserWarning, match="called once for each noise sample"):
        assert_equal_to_loop(model, (X,))
    part = nn.Sequential(nn.BatchNorm1d(W), nn.Dropout(0.3), Branches(), nn.BatchNorm1d(W))
    model = Model(lambda m, x: m.h(m.part(noisy(m, x))), part=part)
    assert_equal_to_loop(model, (X,), one_by_one=["part"])


# Random numbers of others


@pytest.mark.parametrize("kind", ["NumPy", "Python"])
def test_random_numbers_of_others(kind):
    """Drawn once for all samples of a pass; said at conversion, or in the first training forward, and the audit is not complete."""

    def forward(m, x):
        return m.h(noisy(m, x) * (1 + float(np.random.rand() if kind == "NumPy" else random.random())))

    np.random.seed(3), random.seed(3)
    before = np.random.get_state()[1:3], random.getstate()
    model = Model(forward).double()
    with pytest.warns(UserWarning, match=f"{kind}'s random numbers"):
        iw.convert(model, S, example_inputs=X)
    audit = iw.audit(model, X)
    assert not audit.complete and any(kind in text for text in audit.unreached)
    assert np.array_equal(np.random.get_state()[1], before[0][0]) and np.random.get_state()[2] == before[0][1]
    assert random.getstate() == before[1]
    iw.convert(iw.revert(model), S)
    with pytest.warns(UserWarning, match=f"{kind}'s random numbers"):
        model(X)


def test_random_numbers_of_torch_differ_between_samples():
    model = Model(lambda m, x: noisy(m, x) * 0 + torch.rand(W)).double()
    with pytest.warns(UserWarning, match=r"torch\.rand in the model"):
        iw.convert(model, S, example_inputs=X)
    samples = model(X).view(S, B, W)
    assert all(torch.equal(y, y[:1].expand_as(y)) for y in samples) and not torch.equal(samples[0], samples[1])


# Errors


def test_a_models_own_error_is_raised_as_it_is():
    """No warning, nothing is called one by one, and the next forward is right."""
    model = iw.convert(Model(lambda m, x: m.h(m.e(noisy(m, x)))).double(), S)
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            warnings.simplefilter("error")
            model(X[:, :4])
    assert current() is None and iw.audit(model).one_by_one == {}

    def fails(m, x):
        raise KeyError("the model's own")

    model.function = fails
    with pytest.raises(KeyError, match="the model's own"):
        model(X)
    model.function = lambda m, x: m.d(x)
    with iw.sampling(S, seed=SEED):
        y = model(X)
    assert torch.equal(y, iw.functional.dropout(X, 0.5, samples=S, seed=SEED))


@pytest.mark.parametrize("part", ["axis", "one by one", "checkpoint"])
def test_an_interrupt_leaves_nothing_behind(part):
    class Stops(nn.Module):
        on = True

        def forward(self, h):
            if self.on:
                raise KeyboardInterrupt
            return h

    def forward(m, x):
        return torch_checkpoint(m.part, m.d(x), use_reentrant=False) if part == "checkpoint" else m.part(m.d(x))

    stops = Stops()
    model = iw.convert(Model(forward, part=stops), S, one_by_one=["part"] if part == "one by one" else ())
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(X)
        assert current() is None and torch._C._functorch.peek_interpreter_stack() is None
        assert torch.overrides._get_current_function_mode() is None
    stops.on = False
    with iw.sampling(S, seed=SEED):
        assert torch.equal(model(X), iw.functional.dropout(X, 0.5, samples=S, seed=SEED))


def test_a_function_cached_while_converting():
    """What a cache of the model keeps from the conversion is usable outside of it."""

    @functools.lru_cache
    def positions(n):
        return torch.linspace(0, 1, n, dtype=torch.float64)

    model = iw.convert(Model(lambda m, x: m.h(m.d(m.a(x + positions(x.shape[1]))))).double(), S, example_inputs=X)
    torch.testing.assert_close(model.eval()(X), model.h(model.a(X + torch.linspace(0, 1, 6, dtype=torch.float64))))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast(amp):
    """Every operation in the type that a sample alone has it in, and the numbers of that."""
    layers = [nn.Linear(6, W), nn.Dropout(0.5), nn.Linear(W, W), nn.LayerNorm(W), nn.ReLU(), nn.Dropout(0.3), nn.Linear(W, 3)]
    model, x = nn.Sequential(*layers), X.float()
    iw.convert(model, S, example_inputs=x)
    with torch.autocast("cpu", amp):
        with iw.sampling(S, seed=SEED):
            got = model(x)
        each = []
        for s in range(S):
            with iw.sampling(1, seed=SEED, sample_ids=[s]):
                each.append(model(x))
    assert got.dtype == each[0].dtype == amp
    assert torch.equal(got, torch.cat(each))


def toggled(m, x):
    h = noisy(m, x)
    y = m.n(h)
    m.n.eval()
    z = m.n(2 * h)
    m.n.train()
    return m.h(y + z)


READS_STATISTICS = {"in eval mode": toggled, "by name": lambda m, x: m.h(m.n(noisy(m, x)) - m.n.running_mean)}


@pytest.mark.parametrize("name", READS_STATISTICS)
def test_running_statistics_that_the_forward_reads(name):
    """They are each sample's own, after its update and before the next one's: the model is called one by one."""
    model = Model(READS_STATISTICS[name], n=nn.BatchNorm1d(W)).double()
    with pytest.warns(UserWarning, match="state that a forward writes"):
        iw.convert(copy.deepcopy(model), S, example_inputs=X)
    assert_is_loop(model, X)


def test_embedding_by_frequency():
    """The gradient of a row is divided by how often one sample looks it up, not all."""
    assert_equal_to_loop(
        Model(lambda m, x: m.h(m.t(noisy(m, x).topk(3, 1).indices).mean(1)), t=nn.Embedding(W, W, scale_grad_by_freq=True)), (X,)
    )


def test_hooks_on_gradients_of_what_samples_share():
    """One that looks on sees their sum; one that changes it is refused in backward, and right where its module is called one by one."""
    seen = []

    def forward(m, x, change=None):
        h = m.a(x)
        h.register_hook(lambda g: seen.append(g) if change is None else change(g))
        return m.h(m.d(h))

    model = iw.convert(Model(forward).double(), S)
    model(X).sum().backward()
    assert seen[-1].shape == (B, W)
    clamped = Model(lambda m, x: forward(m, x, lambda g: g.clamp(-0.1, 0.1))).double()
    model = iw.convert(copy.deepcopy(clamped), S)
    with pytest.raises(RuntimeError, match="one_by_one"):
        model(X).sum().backward()
    assert_equal_to_loop(clamped, (X,), one_by_one=[""])


@pytest.mark.parametrize("expand", ["axis", "first"])
@pytest.mark.parametrize("branches", [False, True])
def test_inputs_that_a_forward_changes(expand, branches):
    """Runs that look at the model, or that are begun again, leave the inputs as the one forward alone would."""

    class Branch(nn.Module):
        def forward(self, h):
            return h if h.sum() > -1e9 else -h

    model = Model(lambda m, x: m.h(m.branch(noisy(m, x.mul_(2)))), branch=Branch() if branches else nn.Identity()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        iw.convert(model, S, expand=expand)
        x, given = X.clone(), X.clone()
        with iw.sampling(S, seed=SEED):
            together = model(x)
    assert torch.equal(x, 2 * X)
    with iw.sampling(1, seed=SEED, sample_ids=[1]):
        torch.testing.assert_close(together.view(S, B, 3)[1], model(given), rtol=1e-9, atol=1e-10)


def test_a_loop_over_samples_does_not_change_inputs_for_the_next():
    model = iw.convert(Model(lambda m, x: m.h(noisy(m, x.mul_(2)))).double(), S, one_by_one=[""])
    with pytest.raises(RuntimeError, match="changes its inputs in place"):
        model(X.clone())
