"""Recomputes that would draw other noise raise, whatever layer draws it; those that are right by themselves do not."""

import copy
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from oracle import naive
from test_checkpoint import LAYERS, OURS, PLAIN, B, F, Gate, S, Stack, assert_equal, backward, data, direct
from torch import nn

import iwsgd_ext as iw


class TestRefusal:
    """A recompute without the context of its forward: an error that names the layer, never other noise."""

    message = r"IWDropout\(p=0.5\) is computed again during backward .* without the sampling context of its forward: .*iw.checkpoint\("

    @pytest.mark.parametrize("around", [False, True], ids=["ended", "around-backward"])
    @pytest.mark.parametrize("form", PLAIN)
    def test_plain_checkpoint(self, form, around):
        gate, x = Gate(), data()
        with iw.sampling(S, seed=9) as context:
            y = PLAIN[form](gate, x)
            if around:
                with pytest.raises(RuntimeError, match=self.message):
                    y.sum().backward()
                assert context.stream == 1
        if not around:
            with pytest.raises(RuntimeError, match=self.message):
                y.sum().backward()

    @pytest.mark.parametrize("around", [False, True], ids=["own-context", "around-backward"])
    @pytest.mark.parametrize("expand", ["axis", "first", "input"])
    def test_reentrant_in_a_converted_model(self, expand, around):
        model = Stack()
        model.gates[0].drop = nn.Dropout(0.5)
        iw.convert(model, S, expand=expand, verify=False)
        model.ck, x = PLAIN["reentrant"], data()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the axis the model is called one by one
            with iw.sampling(S, seed=1) if around else nullcontext(), pytest.raises(RuntimeError, match="computed again during backward"):
                model(x).sum().backward()

    @pytest.mark.parametrize("around", [False, True], ids=["own-context", "around-backward"])
    @pytest.mark.parametrize("expand", ["axis", "first", "input"])
    def test_not_reentrant_in_a_converted_model(self, expand, around):
        """torch's own checkpoint draws the noise of its forward again."""
        model = Stack(nested=True)
        model.gates[0].drop = nn.Dropout(0.5)
        iw.convert(model, S, expand=expand)
        x, results = data(), []
        for model.ck in (direct, PLAIN["non-reentrant"]):
            torch.manual_seed(3)
            if around:
                with iw.sampling(S, seed=1) as context:
                    results.append(backward(model(x), x, model))
                    assert context.stream == 3
            else:
                results.append(backward(model(x), x, model))
        assert results[0][0].shape == (S * B, F)
        assert_equal(*results)

    @pytest.mark.parametrize("form", PLAIN)
    def test_other_thread(self, form):
        gate, x, raised = Gate(), data(), []

        def work():
            try:
                y.sum().backward()
            except RuntimeError as error:
                raised.append(str(error))

        with iw.sampling(S, seed=9):
            y = PLAIN[form](gate, x)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert "computed again during backward" in raised[0]

    @pytest.mark.parametrize("form", PLAIN)
    def test_every_layer(self, form):
        layers = {iw.IWDropout1d: (B, 4, 6), iw.IWDropout2d: (B, 4, 3, 3), iw.IWDropout3d: (B, 4, 2, 2, 2), iw.IWDropPath: (B, 7)}
        for cls, shape in layers.items():
            x = torch.randn(shape, requires_grad=True)
            with iw.sampling(S, seed=9):
                y = PLAIN[form](nn.Sequential(nn.Tanh(), cls(0.5), nn.Tanh()), x)
            with pytest.raises(RuntimeError, match=cls.__name__ + r"\(p=0.5\)"):
                y.sum().backward()

    @pytest.mark.parametrize("name", LAYERS)
    def test_every_other_layer(self, name):
        """Refused, replayed, and, where it never saw a context, as torch's namesake: in one."""
        layer, call = LAYERS[name]
        x = torch.randn(4, 3, 6, requires_grad=True)

        def function(x):
            return torch.tanh(call(layer, torch.tanh(x)))

        def result(ck, seed):
            torch.manual_seed(1)
            with nullcontext() if seed is None else iw.sampling(S, seed=seed):
                y = ck(function, x)
            return y.detach(), *torch.autograd.grad(y.square().sum(), x)

        # A function is one for the whole process, which may have been in a context before: then it has to be put back always.
        for ck in (*([PLAIN["non-reentrant"]] if layer is not None else []), OURS["checkpoint"]):
            assert_equal(result(ck, None), result(direct, None))
        for ck in OURS["context_fn"], OURS["checkpoint"]:
            assert_equal(result(ck, 9), result(direct, 9))
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}.* computed again during backward|^{name} is computed again"):
            result(PLAIN["non-reentrant"], 9)

    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_batch_norm_per_sample(self, expand):
        """It has no noise, but needs its context to tell the samples apart."""

        class Normed(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop, self.norm = nn.Dropout(0.5), nn.Sequential(nn.Tanh(), nn.BatchNorm1d(F), nn.Tanh())

            def forward(self, x):
                return self.ck(self.norm, self.drop(x))

        model, x = iw.convert(Normed().double(), S, expand=expand, batch_norm="per_sample", verify=False), data()
        if expand == "first":
            model.ck = PLAIN["reentrant"]
            with pytest.raises(RuntimeError, match=r"IWBatchNorm1d.* computed again during backward"):
                model(x).sum().backward()
        results = []
        forms = {**OURS, "non-reentrant": PLAIN["non-reentrant"]}
        for form, model.ck in {"direct": direct, **forms}.items():
            if form == "checkpoint-reentrant" and expand == "axis":
                continue  # an autograd Function, which torch.vmap does not take
            with iw.sampling(S, seed=1):
                y = model(x)
            results.append(backward(y, x, model))
        for other in results[1:]:
            assert_equal(other, results[0])


class TestWhatIsRightByItself:
    @pytest.mark.parametrize("form", [*PLAIN, *OURS])
    def test_layers_that_never_saw_a_context(self, form):
        """Swapping the class alone breaks nothing: noise follows torch's generator, whose state the checkpoint restores."""
        if form == "checkpoint-without-rng":
            pytest.skip("noise outside of contexts follows torch's generator, as nn.Dropout's does")
        ck = {**PLAIN, **OURS}[form]
        model, x = Stack(nested=True), data()
        results = []
        for model.ck in (direct, ck):
            torch.manual_seed(6)
            results.append(backward(model(x), x, model))
        assert_equal(*results)

    @pytest.mark.parametrize("form", ["context_fn", "checkpoint", "checkpoint-reentrant"])
    def test_layers_used_without_a_context_after_one(self, form):
        model, x = Stack(nested=True), data()
        with iw.sampling(S):
            model(x)
        results = []
        for model.ck in (direct, OURS[form]):
            torch.manual_seed(6)
            y = model(x)
            with iw.sampling(S, seed=1):  # is none of its business
                results.append(backward(y, x, model))
        assert_equal(*results)

    @pytest.mark.parametrize("form", [*PLAIN, *OURS])
    def test_a_context_inside_the_function(self, form):
        gate, x = Gate(), data()

        def function(x):
            with iw.sampling(S, seed=9):
                return gate(x)

        {**PLAIN, **OURS}[form](function, x).sum().backward()
        keep = naive.naive_keep(x, 0.5, samples=S, seed=9).double().view(S, B, F).sum(0)
        torch.testing.assert_close(x.grad, gate.w.detach() ** 2 * keep * 2)

    @pytest.mark.parametrize("form", [*PLAIN, "checkpoint"])
    @pytest.mark.parametrize("expand", ["axis", "input"])
    def test_a_converted_model_inside_the_function(self, expand, form):
        """The whole model is checkpointed: its context is opened again, its seed drawn again from the restored generator."""
        model = Stack()
        for gate in model.gates:
            gate.drop = nn.Dropout(gate.drop.p)
        iw.convert(model, S, expand=expand)
        x, results = data(), []
        for ck in (direct, {**PLAIN, **OURS}[form]):
            torch.manual_seed(6)
            results.append(backward(ck(model, x), x, model))
        assert_equal(*results)

    def test_eval_mode(self):
        model, x = Stack().eval(), data()
        for model.ck in PLAIN.values():
            with iw.sampling(S):
                y = model(x)
            assert backward(y, x, model)[0].shape == (B, F)

    def test_a_model_that_draws_within_a_custom_backward(self):
        """A context that is opened in the middle of a backward pass is of that pass."""
        drop, seen = iw.IWDropout(0.5), []

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                with iw.sampling(2, seed=3):
                    seen.append(drop(dy))
                return dy

        with iw.sampling(S, seed=1):
            drop(torch.ones(2, 3))
            Function.apply(torch.ones(2, 3, requires_grad=True)).sum().backward()
        assert torch.equal(seen[0], naive.naive_noise(torch.ones(2, 3), 0.5, samples=2, seed=3))

    def test_deep_copies_are_layers_of_their_own(self):
        gate, x = Gate(), data()
        with iw.sampling(S, seed=9):
            gate(x)
        PLAIN["non-reentrant"](copy.deepcopy(gate), x).sum().backward()
        assert x.grad.isfinite().all()
