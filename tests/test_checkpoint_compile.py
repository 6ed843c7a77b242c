"""Activation checkpoints under torch.compile: the noise of eager, in one graph or in several, or a refusal."""

import pytest
import torch
from test_checkpoint import OURS, PLAIN, B, F, S, backward, direct
from torch import nn

import iwsgd_ext as iw


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(F, F), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)])
        self.ck = direct

    def forward(self, x):
        for block in self.blocks:
            x = self.ck(block, x)
        return x


def compiled_and_eager(ck, backend="aot_eager", fullgraph=True, around=False):
    """Outputs and gradients of a converted model: eager without checkpoints, and compiled with; one after another for two batches."""
    torch.manual_seed(1)
    model = iw.convert(Mlp(), S, expand="input")
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=True)
    results = []
    for batch in (B, 4):
        x = torch.randn(batch, F, requires_grad=True)
        for run, way in ((model, direct), (compiled, ck)):
            model.ck = way
            with iw.sampling(S, seed=batch) as context:
                y = run(x)
                assert context.stream == 2
                if around:
                    results.append(backward(y, x, model))
            if not around:
                results.append(backward(y, x, model))
    return zip(results[::2], results[1::2], strict=True)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()

    def assert_same(self, pairs):
        for eager, other in pairs:
            assert torch.equal(eager[0] == 0, other[0] == 0)
            for a, b in zip(eager, other, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("form", [*PLAIN, "checkpoint", "checkpoint-reentrant"])
    def test_one_graph(self, form):
        """With torch's switch that lets the stream go on only in the forward, recompute is a part of the graph."""
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            self.assert_same(compiled_and_eager({**PLAIN, **OURS}[form]))

    @pytest.mark.parametrize("form", ["non-reentrant", "checkpoint"])
    @pytest.mark.parametrize("converted", [False, True])
    def test_drawn_seeds(self, form, converted):
        """The seed is drawn inside the graph: layers outside of any context, and a model's own context."""
        torch.manual_seed(1)
        model, x = Mlp(), torch.randn(B, F, requires_grad=True)
        if converted:
            iw.convert(model, S, expand="input")
        else:
            for block in model.blocks:
                block[2] = iw.IWDropout(0.5)
        results = []
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=converted or form == "checkpoint"):
            for run, way in ((model, direct), (torch.compile(model, backend="aot_eager", fullgraph=True), {**PLAIN, **OURS}[form])):
                model.ck = way
                torch.manual_seed(6)
                results.append(backward(run(x), x, model))
        self.assert_same([results])

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["non-reentrant", "checkpoint"])
    def test_one_graph_inductor(self, form):
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
            self.assert_same(compiled_and_eager({**PLAIN, **OURS}[form], backend="inductor"))

    def test_one_graph_without_the_switch(self):
        """torch names the switch."""
        with pytest.raises(torch._dynamo.exc.Unsupported, match="skip_fwd_side_effects_in_bwd_under_checkpoint = True"):
            compiled_and_eager(OURS["checkpoint"])

    @pytest.mark.parametrize("around", [False, True])
    @pytest.mark.parametrize("form", ["checkpoint", "checkpoint-reentrant", "context_fn"])
    def test_broken_graph(self, form, around):
        self.assert_same(compiled_and_eager(OURS[form], fullgraph=False, around=around))

    @pytest.mark.parametrize("around", [False, True])
    @pytest.mark.parametrize("form", PLAIN)
    def test_broken_graph_plain(self, form, around):
        """The eager part of a converted model sees torch's own checkpoints, and mends those that are not reentrant."""
        if form == "non-reentrant":
            self.assert_same(compiled_and_eager(PLAIN[form], fullgraph=False, around=around))
            return
        with pytest.raises(RuntimeError, match="computed again during backward"):
            compiled_and_eager(PLAIN[form], fullgraph=False, around=around)

    @pytest.mark.parametrize("form", ["checkpoint", "context_fn"])
    def test_compiled_block_in_an_eager_checkpoint(self, form):
        torch.manual_seed(1)
        model, x = iw.convert(Mlp(), S, expand="input"), torch.randn(B, F, requires_grad=True)
        with iw.sampling(S, seed=3):
            want = backward(model(x), x, model)
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        model.ck = OURS[form]
        with iw.sampling(S, seed=3):
            y = model(x)
        self.assert_same([(want, backward(y, x, model))])
