"""iw.audit and strict: every noise that a swap of modules cannot reach is found by a run, and the model is untouched."""

import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

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


@pytest.mark.parametrize("case", REPLACED)
def test_function_that_is_replaced(case):
    """Found by a run and by the first forward, with its probability and its line; nothing is left to warn of."""
    call, name, p = REPLACED[case]
    model = Calls(call)
    model.train()
    x = torch.randn(B, 4)
    audit = iw.audit(model, x)
    assert [(v.function, v.p, v.kind, v.module) for v in audit.replaced] == [(name, p, "replaced", "")]
    assert audit.replaced[0].place.startswith("test_audit.py:")
    assert (audit.unreached, audit.one_by_one, audit.unchecked, audit.complete) == ([], {}, [], True)
    assert name in str(audit) and "verified: 2 samples" in str(audit)
    blind = iw.audit(model)
    assert (blind.replaced, blind.complete) == ([], False) and "no example inputs" in blind.unchecked[0]
    converted = iw.convert(model, S)
    assert converted(x).shape == (S * B, 4)
    audit = iw.audit(converted)
    assert [v.function for v in audit.replaced] == [name] and audit.unreached == []
    assert not audit.complete and "the first training forward has shown the noise" in audit.unchecked[0]
    for expand in ("axis", "first"):
        iw.convert(iw.revert(model), S, expand=expand, example_inputs=x, strict=True)
        assert iw.audit(model).complete


@pytest.mark.parametrize("case", UNREACHED)
@pytest.mark.filterwarnings("ignore:.*called once for each noise sample", "ignore:.*draws torch's random numbers, other ones")
@pytest.mark.parametrize("expand", ["axis", "first"])
def test_function_out_of_reach(case, expand):
    """Listed; convert warns, or raises where strict; without example inputs the first training forward does, once."""
    call, text = UNREACHED[case]
    model, x = Calls(call), torch.randn(B, 4)
    audit = iw.audit(model, x)
    assert len(audit.unreached) == 1
    assert not audit.complete
    with pytest.warns(UserWarning, match=text + r" in the model, test_audit\.py:"):
        iw.convert(model, S, expand=expand, example_inputs=x)
    iw.revert(model)
    with pytest.raises(ValueError, match="strict=True.*" + text):
        iw.convert(model, S, expand=expand, example_inputs=x, strict=True)
    assert type(model.drop) is nn.Dropout
    iw.convert(model, S, expand=expand)
    with pytest.warns(UserWarning, match=text):
        model(x)
    model(x)  # says it once
    iw.revert(model)
    iw.convert(model, S, expand=expand, strict=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="strict=True.*" + text):
            model(x)
    assert current() is None


def test_what_is_below_python():
    """Scripted functions and operators called by torch.ops, which no mode of functions sees: torch's generator has moved."""
    for call in (torch.jit.script(lambda_with_noise), lambda x: x * torch.ops.aten.bernoulli.p(x.detach(), 0.5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what vmap cannot do is called one by one
            audit = iw.audit(Calls(call), torch.randn(B, 4))
        assert audit.unreached == ["torch's random numbers, through a function that iw.convert does not know"] and not audit.complete


def lambda_with_noise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


def test_calls_that_draw_nothing():
    """Switched off by their arguments: no dropout, and nothing to warn of."""

    def call(x):
        x = F.dropout(x, 0.5, training=False)
        y = F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
        return F.rrelu(F.alpha_dropout(y, 0.5), training=False)

    model = Calls(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rrelu is one of the operators that vmap cannot do
        audit = iw.audit(model, torch.randn(B, 4))
        assert (audit.replaced, audit.unreached, audit.complete) == ([], [], True)
        iw.convert(model, S, strict=True, example_inputs=torch.randn(B, 4))


def test_swaps_and_places():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Dropout(0.1), nn.Dropout1d(0.2)), iw.IWDropPath(0.5), nn.BatchNorm1d(6))
    audit = iw.audit(model)
    assert [(v.name, v.was, v.now) for v in audit.layers] == [
        ("1.0", "Dropout", "IWDropout"),
        ("1.1", "Dropout1d", "IWDropout1d"),
        ("2", "IWDropPath", "IWDropPath"),
        ("3", "BatchNorm1d", "IWBatchNorm1d"),
    ]
    assert (audit.converted, audit.expand) == (False, "axis")
    assert type(model[1][0]) is nn.Dropout
    iw.convert(model, S, expand="1", batch_norm="per_sample")
    audit = iw.audit(model)
    assert (audit.converted, audit.samples, audit.batch_norm, audit.expand) == (True, S, "per_sample", "1")
    assert ("3", "BatchNorm1d", "IWBatchNorm1d") in [(v.name, v.was, v.now) for v in audit.layers]
    audit = iw.audit(nn.Linear(2, 2), torch.ones(2, 2))
    assert audit.unchecked == ["no noise was drawn"] and not audit.complete


@pytest.mark.parametrize("expand", [None, "axis", "first"])
def test_a_model_that_stops_on_the_example_inputs(expand):
    model = Calls(F.dropout)
    if expand is not None:
        iw.convert(model, S, expand=expand)
    audit = iw.audit(model, torch.ones(B, 5))
    assert "the model stops on these inputs: RuntimeError: mat1 and mat2" in audit.unchecked[0] and not audit.complete
    assert "could not be checked" in str(audit) and iw.audit(model, torch.randn(B, 4)).complete


def minus_mean(x):
    return x - x.mean(0)


def test_samples_that_do_not_give_what_they_give_alone():
    """Rows that meet: the table has the output, and by how much."""
    model, x = Calls(minus_mean), torch.randn(B, 4)
    assert iw.audit(model, x).complete
    iw.convert(model, S, expand="first")
    audit = iw.audit(model, x)
    assert not audit.complete and audit.verification.message.startswith("output")
    assert f"WRONG: {S} samples together do not give what each gives alone: output" in str(audit)
    audit = iw.audit(model, x, verify=False)
    assert not audit.complete and audit.unchecked == ["outputs were not compared with those of samples alone"]


def test_an_audit_without_comparison_leaves_it_to_the_first_forward():
    model, x = iw.convert(Calls(minus_mean), S, expand="input"), torch.randn(B, 4)
    assert iw.audit(model, x, verify=False).verification.verdict == "not compared"
    with pytest.raises(ValueError, match=r"the first training forward: .* do not give what each gives alone"):
        model(x)


class Scaled(torch.autograd.Function):
    """An identity whose gradient depends on the number of rows."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy * len(dy)


def test_gradients():
    model, x = Calls(Scaled.apply), torch.randn(B, 4)
    iw.convert(model, S, expand="first", example_inputs=x)
    assert iw.audit(model, x).complete
    audit = iw.audit(model, x, gradients=True)
    assert "the gradient of linear.weight under sample" in audit.verification.message and not audit.complete
    model = Calls(torch.tanh)
    text = f"verified: {S} samples together give what samples 0, 1, 2 give alone (outputs and gradients)"
    for expand in ("axis", "first", "input"):
        iw.convert(model, S, expand=expand)
        assert text in str(iw.audit(model, x, gradients=True))
        assert all(p.grad is None for p in model.parameters())
        iw.revert(model)


@pytest.mark.parametrize(
    ("x", "p", "reason"),
    [(torch.randn(1, 4), 0.5, "hold one example"), (torch.randn(B, 4), 0.0, "all noise samples give the same outputs")],
)
def test_a_run_that_shows_little(x, p, reason):
    model = Calls(torch.tanh)
    model.drop.p = p
    with pytest.warns(UserWarning, match=f"example_inputs: .*{reason}"):
        iw.convert(model, S, example_inputs=x)
    audit = iw.audit(model, x)
    assert not audit.complete and reason in audit.unchecked[0]


def test_keyword_inputs():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, *, a, b=None):
            return self.drop(a) + F.dropout(b)

    audit = iw.audit(Keywords(), a=torch.ones(B, 4), b=torch.ones(B, 4))
    assert audit.complete and len(audit.replaced) == 1
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


@pytest.mark.filterwarnings("ignore:.*draws torch's random numbers, other ones")
@pytest.mark.parametrize("expand", ["axis", "first", None])
def test_the_model_is_as_before(expand):
    model = Stateful().eval()
    model.drop.train()
    states = [{name: v.clone() for name, v in model.state_dict().items()}, [dict(vars(m)) for m in model.modules()]]
    random.seed(1)
    generators = random.getstate(), torch.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    x = torch.ones(B, 4)
    if expand is not None:
        with pytest.warns(UserWarning, match="torch.rand.*Python's random numbers"):
            iw.revert(iw.convert(model, S, expand=expand, example_inputs=x))
    else:
        assert [name in text for name, text in zip(("torch.rand", "Python"), iw.audit(model, x).unreached, strict=True)] == [True, True]
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
        "depth (StochasticDepth, which on rows of ones does not drop rows and divide the others by 1 - p, as iw.IWDropPath does, p=0.5)",
        "path (DropPath, which on rows of ones does not drop rows and divide the others by 1 - p, as iw.IWDropPath does, p=0.5)",
    ]


def test_modules_out_of_reach_are_said_once():
    class Recurrent(nn.LSTM):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.rnn = nn.Dropout(0.5), Recurrent(4, 4, 2, dropout=0.2, batch_first=True)

        def forward(self, x):
            return self.rnn(self.drop(x))[0]

    model, x, text = Net(), torch.randn(B, 6, 4), r"rnn \(Recurrent, p=0\.2\)"
    with pytest.warns(UserWarning, match=text):
        iw.convert(model, S, example_inputs=x)
    iw.revert(model)
    with pytest.raises(ValueError, match="strict=True.*" + text):
        iw.convert(model, S, example_inputs=x, strict=True)
    assert type(model.drop) is nn.Dropout
    iw.convert(model, S)
    with pytest.warns(UserWarning, match=text):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x).shape == (S * B, 6, 4)


def test_scripted_modules():
    """Their classes are hidden and their code cannot be swapped: listed by the dropout that they hold, and as unchecked."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted, self.drop = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))), nn.Dropout(0.5)

        def forward(self, x):
            return self.scripted(self.drop(x))

    model, x = Net(), torch.randn(B, 4)
    audit = iw.audit(model)
    assert audit.unreached == ["scripted.1 (scripted Dropout)"]
    assert "scripted: scripted code" in audit.unchecked
    with pytest.raises(ValueError, match="scripted Dropout"):
        iw.convert(model, S, strict=True, example_inputs=x)
    assert type(model.drop) is nn.Dropout


def test_compiled_before_anything_is_known():
    """Nobody looks at a compiled forward: strict asks for a look before."""
    torch._dynamo.reset()
    model, x = iw.convert(Calls(torch.tanh), S, strict=True), torch.ones(B, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give iw\\.convert example_inputs"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert current() is None
    model(x)
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager", fullgraph=True)(x).shape == (S * B, 4)
    torch._dynamo.reset()


BAD = [
    (TypeError, "model: expected a torch.nn.Module, got int", lambda: iw.audit(3)),
    (ValueError, r"but '0' is; iw\.revert", lambda: iw.audit(nn.Sequential(iw.convert(nn.Sequential(nn.Dropout()), S)))),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()
