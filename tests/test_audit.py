"""iw.audit and strict: every noise that a swap of modules cannot reach is found, by a run or by reading, and the model is untouched."""

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.sampling import current

B, S = 5, 3


def helper(x):
    return F.dropout(x, 0.125)


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


@decorated
def hidden(x):
    return torch.nn.functional.dropout(x, 0.25)


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5))

    @staticmethod
    def backward(ctx, dy):
        return dy


TABLE = {"drop": helper}


class Calls(nn.Module):
    """Calls one function in its training forward."""

    def __init__(self, call):
        super().__init__()
        self.linear, self.drop, self.call = nn.Linear(4, 4), nn.Dropout(0.5), call

    def forward(self, x):
        return self.call(self.drop(self.linear(x)))


def attention_forward(x):
    w, b = torch.zeros(12, 4), torch.zeros(12)
    return F.multi_head_attention_forward(x[None], x[None], x[None], 4, 2, w, b, None, None, False, 0.2, torch.eye(4), None)[0][0]


REPLACED = {
    "dropout": (F.dropout, "torch.nn.functional.dropout", 0.5),
    "dropout, through a function": (helper, "torch.nn.functional.dropout", 0.125),
    "dropout, under a decorator": (hidden, "torch.nn.functional.dropout", 0.25),
    "dropout, in a table": (lambda x: TABLE["drop"](x), "torch.nn.functional.dropout", 0.125),
    "dropout, of torch": (lambda x: torch.dropout(x, 0.5, True), "torch.dropout", 0.5),
    "dropout, in place": (lambda x: torch.dropout_(x, 0.5, True), "torch.dropout_", 0.5),
    "dropout1d": (lambda x: F.dropout1d(x[:, None], 0.2)[:, 0], "torch.nn.functional.dropout1d", 0.2),
    "dropout2d": (lambda x: F.dropout2d(x[:, None, None], 0.2)[:, 0, 0], "torch.nn.functional.dropout2d", 0.2),
    "dropout3d": (lambda x: F.dropout3d(x[:, None, None, None])[:, 0, 0, 0], "torch.nn.functional.dropout3d", 0.5),
    "feature_dropout": (lambda x: torch.feature_dropout(x[:, None], 0.2, True)[:, 0], "torch.feature_dropout", 0.2),
    "built in forward": (lambda x: nn.Dropout(0.75)(x), "torch.nn.functional.dropout", 0.75),
    "partial": (functools.partial(F.dropout, p=0.75), "torch.nn.functional.dropout", 0.75),
}
UNREACHED = {
    "attention's function": (attention_forward, r"torch\.nn\.functional\.multi_head_attention_forward\(p=0\.2\)"),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.5, True)[0], r"torch\.native_dropout\(p=0\.5\)"),
    "rrelu": (lambda x: F.rrelu(x, training=True), r"torch\.nn\.functional\.rrelu"),
    "bernoulli": (lambda x: x * torch.bernoulli(torch.ones(4)), r"torch\.bernoulli"),
    "bernoulli_": (lambda x: x * torch.empty_like(x).bernoulli_(0.5), r"torch\.Tensor\.bernoulli_"),
    "rand_like": (lambda x: x * (torch.rand_like(x) > 0.5), r"torch\.rand_like"),
    "randn": (lambda x: x + torch.randn(4), r"torch\.randn"),
    "autograd function": (Kept.apply, r"torch\.bernoulli"),
}


def found_by_code(calls):
    return [call.function for call in calls]


@pytest.mark.parametrize("case", REPLACED)
def test_function_that_is_replaced(case):
    """Found by a dry run, by reading and by the first forward, with its probability and its line; nothing is left to warn of."""
    call, name, p = REPLACED[case]
    model = Calls(call)
    model.train()
    audit = iw.audit(model, torch.ones(B, 4))
    assert [(v.function, v.p, v.kind, v.module) for v in audit.replaced] == [(name, p, "replaced", "")]
    assert audit.replaced[0].place.startswith("test_audit.py:")
    assert (audit.unreached, audit.suspected, audit.unchecked, audit.complete) == ([], [], [], True)
    assert name in str(audit)
    read = iw.audit(model)
    assert read.suspected, "reading the code finds it"
    assert not read.complete
    converted = iw.convert(model, S)
    assert converted(torch.ones(B, 4)).shape == (S * B, 4)
    assert [v.function for v in iw.audit(converted).replaced] == [name]
    assert iw.audit(converted).complete
    iw.convert(iw.revert(model), S, example_inputs=torch.ones(B, 4), strict=True)


@pytest.mark.parametrize("case", UNREACHED)
def test_function_out_of_reach(case):
    """Listed; convert warns, or raises where strict; without example inputs the first training forward does, once."""
    call, text = UNREACHED[case]
    model, x = Calls(call), torch.ones(B, 4)
    audit = iw.audit(model, x)
    assert len(audit.unreached) == 1
    assert not audit.complete
    with pytest.warns(UserWarning, match=text + r" in the model, test_audit\.py:"):
        iw.convert(model, S, example_inputs=x)
    iw.revert(model)
    with pytest.raises(ValueError, match="strict=True.*" + text):
        iw.convert(model, S, example_inputs=x, strict=True)
    assert type(model.drop) is nn.Dropout
    iw.convert(model, S)
    with pytest.warns(UserWarning, match=text):
        model(x)
    model(x)  # says it once
    iw.revert(model)
    iw.convert(model, S, strict=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="strict=True.*" + text):
            model(x)
    assert current() is None


def test_what_is_below_python_is_seen_in_a_dry_run():
    """Scripted functions and operators called by torch.ops, which no mode of functions sees."""
    scripted = torch.jit.script(lambda_with_noise)
    for call, text in ((scripted, "aten."), (lambda x: torch.ops.aten.bernoulli.p(x, 0.5), "aten.bernoulli.p")):
        assert [text in v for v in iw.audit(Calls(call), torch.ones(B, 4)).unreached] == [True]


def lambda_with_noise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


def test_calls_that_draw_nothing():
    """Switched off by their arguments: no dropout, and nothing to warn of."""

    def call(x):
        x = F.dropout(x, 0.5, training=False)
        y = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return F.rrelu(F.alpha_dropout(y, 0.5), training=False)

    model = Calls(call)
    audit = iw.audit(model, torch.ones(B, 4))
    assert (audit.replaced, audit.unreached) == ([], [])
    assert sorted(found_by_code(audit.suspected)) == [
        "torch.nn.functional.alpha_dropout",
        "torch.nn.functional.dropout",
        "torch.nn.functional.rrelu",
        "torch.nn.functional.scaled_dot_product_attention",
    ]
    iw.convert(model, S, strict=True, example_inputs=torch.ones(B, 4))


def test_swaps_and_places():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Dropout(0.1), nn.Dropout1d(0.2)), iw.IWDropPath(0.5), nn.BatchNorm1d(6))
    audit = iw.audit(model)
    assert [(v.name, v.was, v.now) for v in audit.layers] == [
        ("1.0", "Dropout", "IWDropout"),
        ("1.1", "Dropout1d", "IWDropout1d"),
        ("2", "IWDropPath", "IWDropPath"),
    ]
    assert (audit.converted, audit.expand) == (False, "input")
    assert type(model[1][0]) is nn.Dropout
    iw.convert(model, S, expand="1", batch_norm="per_sample")
    audit = iw.audit(model)
    assert (audit.converted, audit.samples, audit.batch_norm, audit.expand, audit.reason) == (True, S, "per_sample", "1", "asked for")
    assert ("3", "BatchNorm1d", "IWBatchNorm1d") in [(v.name, v.was, v.now) for v in audit.layers]
    assert iw.audit(nn.Linear(2, 2), torch.ones(2, 2)).complete


def test_a_dry_run_that_stops_says_so():
    def call(x):
        return x if x.sum().item() > 0 else F.dropout(x)

    audit = iw.audit(Calls(call), torch.ones(B, 4))
    assert "the dry run stopped" in audit.unchecked[0]
    assert found_by_code(audit.suspected) == ["torch.nn.functional.dropout"]


def test_keyword_inputs():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, *, a, b=None):
            return self.drop(a) + F.dropout(b)

    audit = iw.audit(Keywords(), a=torch.ones(B, 4), b=torch.ones(B, 4))
    assert (audit.expand, len(audit.replaced)) == ("first", 1)
    model = iw.convert(Keywords(), S, example_inputs={"a": torch.ones(B, 4), "b": torch.ones(B, 4)})
    assert model(a=torch.ones(B, 4), b=torch.ones(B, 4)).shape == (S * B, 4)


class Stateful(nn.Module):
    """Leaves things behind in its forward: a cache, a counter, a buffer, a lazily made module."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.steps = nn.BatchNorm1d(4), nn.Dropout(0.5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        self.seen += 1
        self.cache = self.norm(x)
        self.late = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(3))
        random.random()
        return self.late(self.drop(self.cache)) + torch.rand(4)


@pytest.mark.parametrize("convert", [True, False])
def test_the_model_is_as_before(convert):
    model = Stateful().eval()
    model.drop.train()
    states = [{name: v.clone() for name, v in model.state_dict().items()}, [dict(vars(m)) for m in model.modules()]]
    random.seed(1)
    generators = random.getstate(), torch.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    if convert:
        with pytest.warns(UserWarning, match="torch.rand"):
            iw.revert(iw.convert(model, S, example_inputs=torch.ones(B, 4)))
    else:
        assert iw.audit(model, torch.ones(B, 4)).expand == "first"
    assert [name for name, _ in model.named_modules()] == names
    assert (model.steps, hasattr(model, "cache"), hasattr(model, "table")) == (0, False, False)
    assert all(torch.equal(v, states[0][name]) for name, v in model.state_dict().items())
    assert model.state_dict().keys() == states[0].keys()
    assert [dict(vars(m)) for m in model.modules()] == states[1]
    assert [m.training for m in model.modules()] == [False, False, True]
    assert random.getstate() == generators[0]
    assert torch.equal(torch.get_rng_state(), generators[1])


def test_noise_in_modules_out_of_reach():
    """Subclasses with code of their own, and depth that is dropped for the whole batch."""

    class Attention(nn.MultiheadAttention):
        pass

    class Recurrent(nn.LSTM):
        pass

    class StochasticDepth(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.mode = 0.5, "batch"

    class DropPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_prob, self.scale_by_keep = 0.5, False

    model = nn.ModuleDict({"attention": Attention(8, 2, dropout=0.1), "rnn": Recurrent(4, 4, 2, dropout=0.2), "drop": nn.Dropout()})
    model.update({"depth": StochasticDepth(), "path": DropPath(), "quiet": nn.LSTM(4, 4, dropout=0.0), "off": Attention(8, 2)})
    assert iw.audit(model).unreached == [
        "attention (Attention, p=0.1)",
        "rnn (Recurrent, p=0.2)",
        "depth (StochasticDepth, p=0.5)",
        "path (DropPath, p=0.5)",
    ]
    with pytest.warns(UserWarning, match=r"attention \(Attention, p=0\.1\); rnn"):
        iw.convert(model, S)
    iw.revert(model)
    with pytest.raises(ValueError, match="strict=True"):
        iw.convert(model, S, strict=True)
    assert type(model["drop"]) is nn.Dropout


def test_scripted_modules():
    """Their classes are hidden and their code cannot be swapped: listed by the dropout that they hold, and as unchecked."""
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))), "drop": nn.Dropout(0.5)})
    audit = iw.audit(model)
    assert audit.unreached == ["scripted.1 (scripted Dropout)"]
    assert "scripted: scripted code" in audit.unchecked
    with pytest.raises(ValueError, match="scripted Dropout"):
        iw.convert(model, S, strict=True)


def test_compiled_before_anything_is_known():
    """Where reading suggests noise out of reach, a whole graph asks for proof, and one that may break runs eagerly, which gives it."""
    torch._dynamo.reset()
    model, x = iw.convert(Calls(lambda x: x if x.shape[1] == 4 else x * torch.rand_like(x)), S), torch.ones(B, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give iw\\.convert example_inputs"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert current() is None
    assert torch.compile(model, backend="eager")(x).shape == (S * B, 4)
    assert iw.audit(model).complete
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager", fullgraph=True)(x).shape == (S * B, 4)


BAD = [
    (TypeError, "model: expected a torch.nn.Module, got int", lambda: iw.audit(3)),
    (ValueError, r"but '0' is; iw\.revert", lambda: iw.audit(nn.Sequential(iw.convert(nn.Sequential(nn.Dropout()), S)))),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
