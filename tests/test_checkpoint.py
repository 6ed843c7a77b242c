"""Activation checkpointing: a recompute draws the noise of its forward, in both of torch's forms, or raises."""

import contextlib
import functools
import gc
import threading
import warnings

import pytest
import torch
from oracle import naive
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

S, B, F = 3, 5, 63

PLAIN = {
    "non-reentrant": lambda f, *a: torch_checkpoint(f, *a, use_reentrant=False),
    "reentrant": lambda f, *a: torch_checkpoint(f, *a, use_reentrant=True),
}
OURS = {
    "context_fn": lambda f, *a: torch_checkpoint(f, *a, use_reentrant=False, context_fn=iw.checkpoint_contexts),
    "checkpoint": lambda f, *a: iw.checkpoint(f, *a),
    "checkpoint-reentrant": lambda f, *a: iw.checkpoint(f, *a, use_reentrant=True),
    "checkpoint-without-rng": lambda f, *a: iw.checkpoint(f, *a, preserve_rng_state=False),
}


LAYERS = {
    "alpha": (iw.IWAlphaDropout(0.5), lambda layer, x: layer(x)),
    "feature alpha": (iw.IWFeatureAlphaDropout(0.5), lambda layer, x: layer(x)),
    "gaussian dropout": (iw.IWGaussianDropout(0.5), lambda layer, x: layer(x)),
    "gaussian noise": (iw.IWGaussianNoise(0.5), lambda layer, x: layer(x)),
    "multinomial": (iw.IWMultinomialDropout(0.5), lambda layer, x: layer(x)),
    "recurrent": (iw.IWLSTM(6, 6, 2, dropout=0.5, batch_first=True), lambda layer, x: layer(x)[0]),
    "weights": (iw.IWDropConnect(6, 6), lambda layer, x: layer(x)),
    "attention": (iw.IWMultiheadAttention(6, 2, dropout=0.5, batch_first=True), lambda layer, x: layer(x, x, x)[0]),
    "scaled_dot_product_attention": (None, lambda _, x: iw.scaled_dot_product_attention(x, x, x, dropout_p=0.5)),
}


def direct(f, *a):
    return f(*a)


class Gate(nn.Module):
    """w * drop(w * x): two noise-free factors around one noise call, so that gradients are sums that a loop can do."""

    def __init__(self, p=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.rand(F, dtype=torch.float64) + 0.5)
        self.drop = iw.IWDropout(p)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.w * self.drop(self.w * x)


class Stack(nn.Module):
    """A chain of gates, each called through ``ck``; nested: the last two within one more checkpoint."""

    def __init__(self, nested=False):
        super().__init__()
        self.gates = nn.ModuleList([Gate(p) for p in (0.5, 0.25, 0.75)])
        self.nested = nested
        self.ck = direct

    def tail(self, x):
        return self.ck(self.gates[2], self.ck(self.gates[1], x))

    def forward(self, x):
        x = self.ck(self.gates[0], x)
        return self.ck(self.tail, x) if self.nested else self.tail(x)


def naive_stack(model: Stack, x: torch.Tensor, seed: int, first_stream: int = 0) -> list[torch.Tensor]:
    """Output and gradients of sum(y^2) by masks of the naive generator and autograd, in float64."""
    weights = [g.w.detach().clone().requires_grad_() for g in model.gates]
    x = x.detach().clone().requires_grad_()
    y = torch.cat([x] * S)
    for i, (w, gate) in enumerate(zip(weights, model.gates, strict=True)):
        keep = naive.naive_keep(x, gate.drop.p, samples=S, seed=seed, stream=first_stream + i)
        y = w * (w * y * keep * naive.effective_scale(gate.drop.p))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights])]


def backward(y, x, model):
    model.zero_grad()
    x.grad = None
    y.square().sum().backward()  # the reentrant form allows no torch.autograd.grad
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def one_by_one(form, expand):
    """Reentrant checkpoints are autograd Functions, which torch.vmap does not take."""
    return [""] if form == "checkpoint-reentrant" and expand == "axis" else []


def data():
    return torch.randn(B, F, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("form", OURS)
class TestReplay:
    def test_backward_after_the_context(self, form, nested):
        model, x = Stack(nested), data()
        model.ck = OURS[form]
        with iw.sampling(S, seed=9):
            y = model(x)
        assert_equal(backward(y, x, model), naive_stack(model, x, 9))
        assert min(g.calls for g in model.gates) >= 2

    def test_streams_go_on_undisturbed(self, form, nested):
        """Two forwards and their backwards in one context: streams 0 .. 5, whatever is computed again between."""
        model, x = Stack(nested), data()
        model.ck = OURS[form]
        with iw.sampling(S, seed=9) as context:
            first = backward(model(x), x, model)
            assert context.stream == 3
            second = backward(model(x), x, model)
            assert context.stream == 6
        assert_equal(first, naive_stack(model, x, 9))
        assert_equal(second, naive_stack(model, x, 9, first_stream=3))

    def test_under_another_context(self, form, nested):
        model, x = Stack(nested), data()
        model.ck = OURS[form]
        with iw.sampling(S, seed=9):
            y = model(x)
        with iw.sampling(2, seed=4) as other:
            got = backward(y, x, model)
            assert current() is other
            assert other.stream == 0
        assert_equal(got, naive_stack(model, x, 9))

    def test_drawn_seed(self, form, nested):
        """A seed that is drawn inside the first checkpoint; torch's own noise in the same block is computed again as it was, too."""

        class WithTorchNoise(nn.Module):
            def __init__(self, gate):
                super().__init__()
                self.gate = gate

            def forward(self, x):
                return nn.functional.dropout(self.gate(nn.functional.dropout(x, 0.3)), 0.3)

        results = []
        model, x = Stack(nested), data()
        model.gates[0] = WithTorchNoise(model.gates[0])
        for ck in (direct, OURS[form]):
            torch.manual_seed(2)
            model.ck = ck
            with iw.sampling(S):
                y = model(x)
            results.append(backward(y, x, model))
        if form == "checkpoint-without-rng":  # torch's noise is then another in the recompute, as asked for; ours is not
            results = [r[:1] for r in results]
        assert_equal(*results)

    def test_gradient_accumulation(self, form, nested):
        """Two micro-batches forward, then both backward, in the other order."""
        model = Stack(nested)
        model.ck = OURS[form]
        parts = [data(), data()]
        with iw.sampling(S, seed=9):
            losses = [model(x).square().sum() for x in parts]
        for loss in reversed(losses):
            loss.backward()
        want = [naive_stack(model, x, 9, first_stream=3 * i)[2:] for i, x in enumerate(parts)]
        assert_equal([p.grad for p in model.parameters()], [a + b for a, b in zip(*want, strict=True)])

    def test_in_a_converted_model(self, form, nested):
        """The model's own context has ended by the time of backward."""
        for expand in ("axis", "input", "first"):
            plain = Stack(nested)
            for gate in plain.gates:
                gate.drop = nn.Dropout(gate.drop.p)
            model, x = iw.convert(plain, S, expand=expand), data()
            results = []
            if form == "checkpoint-reentrant" and expand == "axis":  # an autograd Function, which torch.vmap does not take
                model.ck = OURS[form]
                with pytest.warns(UserWarning, match="called once for each noise sample"):
                    model(x)
            for ck in (direct, OURS[form]):
                torch.manual_seed(2)
                model.ck = ck
                results.append(backward(model(x), x, model))
            assert results[1][0].shape == (S * B, F)
            assert_equal(*results)

    def test_other_thread(self, form, nested):
        """Backward in a thread that has no context (CUDA's engine has such threads)."""
        model, x = Stack(nested), data()
        model.ck = OURS[form]
        got = []
        with iw.sampling(S, seed=9):
            y = model(x)
            thread = threading.Thread(target=lambda: got.append(backward(y, x, model)))
            thread.start()
            thread.join()
            assert current().stream == 3
        assert_equal(got[0], naive_stack(model, x, 9))


def test_samples_are_replayed_by_their_ids():
    """sample_ids, first_example and rows in another dimension belong to what is put back."""
    gate = Gate()
    x = torch.randn(7, B, F, dtype=torch.float64, requires_grad=True)
    settings = {"sample_ids": [5, 2], "first_example": 40}
    with iw.sampling(2, seed=9, batch_dim=1, **settings):
        y = iw.checkpoint(gate, x)
    y.sum().backward()
    keep = naive.naive_keep(x, 0.5, samples=2, seed=9, batch_dim=1, **settings).double()
    torch.testing.assert_close(y.detach(), gate.w.detach() ** 2 * torch.cat([x.detach()] * 2, 1) * keep * 2)
    torch.testing.assert_close(gate.w.grad, (2 * gate.w.detach() * torch.cat([x.detach()] * 2, 1) * keep * 2).sum((0, 1)))


def test_backward_twice():
    """A retained graph is computed again for each backward."""
    model, x = Stack(), data()
    model.ck = OURS["checkpoint"]
    with iw.sampling(S, seed=9):
        y = model(x)
    y.square().sum().backward(retain_graph=True)
    x.grad = None
    assert_equal(backward(y, x, model), naive_stack(model, x, 9))


def test_arguments_pass_through():
    def function(a, n, *, k):
        return k * a * n

    a = torch.ones(3, requires_grad=True)
    assert torch.equal(iw.checkpoint(function, a, 2, k=5), 10 * a)
    with pytest.raises(ValueError, match="nonsense"):
        iw.checkpoint(function, a, 2, k=5, use_reentrant=True, nonsense=1)


def test_selective_checkpoint():
    """``context_fn`` is free: some operators' results are kept, the noise is drawn again."""
    saved = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    block, x = nn.Sequential(nn.Linear(F, F, bias=False), nn.Tanh(), iw.IWDropout(0.5), nn.Linear(F, F, bias=False)).double(), data()
    results = []
    for run in (direct, lambda f, x: iw.checkpoint(f, x, context_fn=saved)):
        with iw.sampling(S, seed=9):
            y = run(block, x)
        results.append(backward(y, x, block))
    assert_equal(*results)


def test_an_exception_in_a_recompute_restores_the_contexts():
    failing = []

    class Fails(nn.Module):
        def forward(self, x):
            if failing:
                raise KeyError("recompute")
            return x * 2

    x = data()
    for form in OURS.values():
        failing.clear()
        with iw.sampling(S, seed=1) as context:
            y = form(nn.Sequential(Gate(), Fails(), nn.Tanh()), x)
            failing.append(True)
            with pytest.raises(KeyError):
                y.sum().backward()
            assert current() is context
            assert context.stream == 1


class TestFunctionalDropout:
    """A converted model whose blocks call F.dropout: noise of the context, which its recompute outside of the model must be, too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.p = nn.Linear(F, F), 0.5

        def forward(self, x):
            return torch.tanh(nn.functional.dropout(torch.tanh(self.linear(x)), self.p, self.training))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([TestFunctionalDropout.Block() for _ in range(2)])
            self.drop = nn.Dropout(0.5)
            self.ck = direct

        def forward(self, x):
            for block in self.blocks:
                x = self.ck(block, x)
            return self.drop(x)

    @pytest.mark.parametrize("expand", ["axis", "first", "input"])
    def test_replayed(self, expand):
        x, model, results = data(), self.Model().double(), []
        if expand == "axis":  # reentrant ones are autograd Functions, which torch.vmap does not take
            model.ck = OURS["checkpoint-reentrant"]
            with pytest.warns(UserWarning, match="called once for each noise sample"):
                iw.convert(model, S, example_inputs=x)
        else:
            iw.convert(model, S, expand=expand, example_inputs=x.detach())
        for ck in (direct, PLAIN["non-reentrant"], *OURS.values()):
            model.ck = ck
            with iw.sampling(S, seed=1):
                y = model(x)
            results.append(backward(y, x, model))
        for other in results[1:]:
            assert_equal(other, results[0])

    @pytest.mark.parametrize("form", ["non-reentrant", "context_fn", "checkpoint"])
    def test_replayed_on_the_axis(self, form):
        """Without any part that is called one by one."""
        x = data()
        model, results = iw.convert(self.Model().double(), S, example_inputs=x.detach()), []
        for model.ck in (direct, {**PLAIN, **OURS}[form]):
            with iw.sampling(S, seed=1):
                y = model(x)
            results.append(backward(y, x, model))
        assert_equal(*results)
        assert iw.audit(model, x.detach()).one_by_one == {}

    @pytest.mark.parametrize("expand", ["axis", "first", "input"])
    def test_refused(self, expand):
        x = data()
        model = iw.convert(self.Model().double(), S, expand=expand, verify=False)
        model.ck = PLAIN["reentrant"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the axis the model is called one by one
            with pytest.raises(RuntimeError, match=r"dropout is noise of a converted model here.*Use iw.checkpoint\("):
                model(x)

    @pytest.mark.parametrize("expand", ["axis", "input"])
    @pytest.mark.parametrize("inner", OURS)
    def test_replayed_around_one_that_is_right(self, inner, expand):
        """Non-reentrant, whatever is inside."""
        x, results = data(), []
        model = iw.convert(self.Model().double(), S, expand=expand, verify=False, one_by_one=one_by_one(inner, expand))
        for model.ck in (
            lambda block, x: block(x).tanh(),
            lambda block, x: PLAIN["non-reentrant"](lambda x: OURS[inner](block, x).tanh(), x),
        ):
            with iw.sampling(S, seed=1):
                y = model(x)
            results.append(backward(y, x, model))
        assert_equal(*results)

    @pytest.mark.parametrize("inner", OURS)
    def test_refused_around_one_that_is_right(self, inner):
        """The recompute of the outer part begins outside of the model, whatever is inside."""
        model, x = iw.convert(self.Model().double(), S, expand="input", verify=False), data()
        model.ck = lambda block, x: PLAIN["reentrant"](lambda x: OURS[inner](block, x).tanh(), x)
        with pytest.raises(RuntimeError, match="is noise of a converted model here"):
            model(x)

    @pytest.mark.parametrize("outer", ["reentrant", "non-reentrant", "checkpoint", "checkpoint-reentrant"])
    def test_refused_in_a_recompute(self, outer):
        """A reentrant part within another checkpoint: where that computes without a graph, it is recorded in backward only."""
        model, x = iw.convert(self.Model().double(), S, expand="input", verify=False), data()
        model.ck = PLAIN["reentrant"]
        with pytest.raises(RuntimeError, match="is noise of a converted model here"):
            {**PLAIN, **OURS}[outer](model, x).sum().backward()
        gc.collect()  # torch 2.11 keeps the hooks of a checkpoint as long as its error lives

    @pytest.mark.parametrize("form", PLAIN)
    @pytest.mark.filterwarnings("error:.*is noise of a converted model")
    def test_not_refused_where_nothing_is_drawn(self, form):
        """p=0, or a part that is not recorded: neither is another when it is computed again."""
        model, x = iw.convert(self.Model().double(), S, expand="input"), data()
        for block in model.blocks:
            block.p = 0.0
        model.ck = PLAIN[form]
        model(x).sum().backward()
        for block in model.blocks:
            block.p = 0.5
        model.blocks.requires_grad_(False)
        model.ck = lambda block, x: PLAIN[form](block, x.detach())
        with torch.no_grad() if form == "non-reentrant" else contextlib.nullcontext():
            model(x)

    @pytest.mark.parametrize("hooks", [False, True], ids=["plain", "save_on_cpu"])
    @pytest.mark.parametrize("inner", OURS)
    @pytest.mark.parametrize("form", PLAIN)
    @pytest.mark.parametrize("expand", ["axis", "first"])
    @pytest.mark.filterwarnings("error:.*is noise of a converted model")
    def test_a_context_inside_of_the_outer_checkpoint(self, expand, form, inner, hooks):
        x = data()
        model = iw.convert(self.Model().double(), S, expand=expand, example_inputs=x.detach(), one_by_one=one_by_one(inner, expand))
        model.ck, results = OURS[inner], []

        def function(x):
            with torch.autograd.graph.save_on_cpu() if hooks else contextlib.nullcontext(), iw.sampling(S, seed=3):
                return model(x)

        for ck in (direct, PLAIN[form]):
            results.append(backward(ck(function, x), x, model))
        assert_equal(*results)

    @pytest.mark.parametrize("inside", ["own-context", "context"])
    @pytest.mark.parametrize("form", PLAIN)
    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_a_whole_model_is_right(self, expand, form, inside):
        """Its recompute opens its context again, and draws the same seed from the generator that the checkpoint restores."""
        x = data()
        model, results = iw.convert(self.Model().double(), S, expand=expand, example_inputs=x.detach()), []

        def function(x):
            with iw.sampling(S) if inside == "context" else contextlib.nullcontext():
                return model(x)

        for ck in (direct, PLAIN[form]):
            torch.manual_seed(6)
            results.append(backward(ck(function, x), x, model))
        assert_equal(*results)


class Checkpointed(nn.Module):
    """Blocks that begin with a noise layer, each in torch's own checkpoint or in none."""

    def __init__(self, layer, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(nn.Sequential(layer(), nn.Linear(5, 5), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = torch_checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


FIRST = [nn.Dropout, nn.AlphaDropout, iw.IWDropout, iw.IWDropPath, iw.IWGaussianDropout, iw.IWLaplaceNoise, iw.IWMultinomialDropout]


@pytest.mark.parametrize("layer", FIRST, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("expand", ["axis", "first"])
def test_plain_checkpoint_that_begins_with_noise(expand, layer):
    """The noise layer is the first function of the checkpoint: nothing before it shows the model's mode that one is running."""
    x, y, results = torch.randn(4, 5), torch.randint(5, (4,)), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = iw.convert(Checkpointed(layer, checkpointed), 4, expand=expand)
        torch.manual_seed(1)
        loss = iw.iw_cross_entropy(model(x), y, 4)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
