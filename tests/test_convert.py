"""convert and revert: what is swapped, where rows expand, and that a converted model is still a model."""

import random
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

B, S = 5, 3
EXPAND = pytest.mark.parametrize("expand", ["axis", "first", "input"])


class Skip(nn.Module):
    """A path without noise that starts before the first noise layer: only expansion at the input fits."""

    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(self.drop(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(4, 6), nn.Dropout(0.5)

    def forward(self, x, other, scale=1.0, table=None):
        y = self.drop(self.a(x)) + self.b(other) * scale
        return y if table is None else y @ table


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 63), nn.ReLU(), nn.Dropout(0.5), nn.Linear(63, 9), nn.Dropout(0.25), nn.Linear(9, 2))


def masked_mlp(model: nn.Module, x: torch.Tensor, seed: int, samples: int = S, stream: int = 0, shared: bool = True) -> torch.Tensor:
    """The mlp with naive masks: the trunk once (shared), or on repeated rows."""
    address = {"samples": samples, "seed": seed}
    h = model[1](model[0](x if shared else torch.cat([x] * samples)))
    h = h * naive.naive_keep(h, 0.5, stream=stream, expand=shared, **address) * 2 if not shared else torch.cat([h] * samples)
    if shared:
        h = h * naive.naive_keep(h[: len(x)], 0.5, stream=stream, **address) * 2
    h = model[3](h)
    return model[5](h * naive.naive_keep(h, 0.25, stream=stream + 1, expand=False, **address) / 0.75)


class TestExpansion:
    @pytest.mark.parametrize("expand", ["axis", "first", "input", "2", "0"])
    def test_values(self, backend, expand):
        """Wherever rows expand, the noise is the same, and so is the output."""
        model, x = mlp(), torch.randn(B, 6)
        assert iw.convert(model, S, expand=expand, example_inputs=x) is model
        with iw.sampling(S, seed=7):
            y = model(x)
            again = model(x)
        assert y.shape == (S * B, 2)
        torch.testing.assert_close(y, masked_mlp(model, x, 7))
        torch.testing.assert_close(again, masked_mlp(model, x, 7, stream=2))

    @pytest.mark.parametrize(("expand", "rows_of_trunk"), [("axis", B), ("first", B), ("input", S * B), ("2", B), ("0", S * B)])
    def test_place(self, expand, rows_of_trunk):
        """The trunk before the first noise layer is computed once where that is asked for."""
        model, rows = mlp(), []
        model[0].register_forward_hook(lambda m, args, y: rows.append(y.shape[0]))
        iw.convert(model, S, expand=expand, example_inputs=torch.ones(B, 6))
        rows.clear()
        model(torch.ones(B, 6))
        assert rows == [rows_of_trunk]

    @pytest.mark.parametrize("expand", ["axis", "input"])
    @pytest.mark.parametrize("batch", [None, 2, S, B])
    def test_a_skip_path(self, batch, expand):
        model = iw.convert(Skip(), S, expand=expand, example_inputs=None if batch is None else torch.ones(batch, 6))
        x = torch.randn(B, 6)
        with iw.sampling(S, seed=1):
            y = model(x)
        many = torch.cat([x] * S)
        keep = naive.naive_keep(x, 0.5, samples=S, seed=1) * 2
        torch.testing.assert_close(y, many + model.linear(many * keep))

    @EXPAND
    @pytest.mark.parametrize("wrong", [torch.ones(B, 7), 5, (torch.ones(B, 6), torch.ones(B, 6))], ids=["features", "int", "two"])
    def test_example_inputs_on_which_the_model_stops(self, wrong, expand):
        model = mlp()
        with pytest.raises(ValueError, match=r"example_inputs: the model stops on these inputs: (RuntimeError|TypeError|ValueError)"):
            iw.convert(model, S, expand=expand, example_inputs=wrong)
        assert type(model[2]) is nn.Dropout and model(torch.ones(B, 6)).shape == (B, 2)
        assert current() is None

    @pytest.mark.parametrize("context", [False, True], ids=["own-context", "context"])
    @pytest.mark.parametrize("converted", [False, True])
    def test_first_raises_where_a_skip_path_does_not_fit(self, converted, context):
        """torch's own error, with a note that speaks of samples."""
        model = iw.convert(Skip(), S, expand="first") if converted else Skip()
        if not converted:
            model.drop.__class__ = iw.IWDropout
            model.drop.batch_dim = None
        with pytest.raises(RuntimeError, match="size of tensor") as raised, iw.sampling(S) if context or not converted else nullcontext():
            model(torch.ones(B, 6))
        notes = getattr(raised.value, "__notes__", [])  # of Python 3.11 and later
        assert len(notes) == (sys.version_info >= (3, 11)) and all(f"made {S * B} rows ({S} samples) of {B}" in note for note in notes)
        assert current() is None

    def test_an_error_of_something_else_has_no_note(self):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised, iw.sampling(S):
            iw.IWDropout(0.5)(torch.ones(B, 6)) @ torch.ones(11, 13)
        assert not hasattr(raised.value, "__notes__")

    def test_first_that_does_not_fit_the_example_inputs(self):
        model = Skip()
        with pytest.raises(ValueError, match="the model stops on these inputs: RuntimeError: The size of tensor a"):
            iw.convert(model, S, expand="first", example_inputs=torch.ones(B, 6))
        assert type(model.drop) is nn.Dropout

    @EXPAND
    @pytest.mark.parametrize("mixed", [False, True], ids=["tokens", "views"])
    def test_more_rows_than_come_in(self, mixed, expand):
        """Tokens that are flattened into the rows fit anywhere; of two views, "first" would pair rows with those of other samples."""

        class Rows(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.5)

            def forward(self, a, b):
                if mixed:
                    a, b = self.drop(torch.cat([a, b])).chunk(2)
                    return torch.stack([a, b], 1)
                return self.drop(torch.stack([a, b], 1).flatten(0, 1)).unflatten(0, (-1, 2))

        a, b = torch.rand(B, 6) + 1, -torch.rand(B, 6) - 1
        if mixed and expand != "axis":
            with pytest.raises(ValueError, match=f"with expand='{expand}', 3 samples together do not give .*: output.* of sample"):
                iw.convert(Rows(), S, expand=expand, example_inputs=(a, b))
            return
        model = iw.convert(Rows(), S, expand=expand, example_inputs=(a, b))
        y = model(a, b)  # each value is 0, or twice its input
        assert y.shape == (S * B, 2, 6)
        for view, x in enumerate((a, b)):
            kept = y[:, view] != 0
            assert torch.equal(y[:, view][kept], 2 * torch.cat([x] * S)[kept]) and 0.2 < kept.double().mean() < 0.8

    @EXPAND
    def test_running_it_changes_nothing_but_the_layers(self, expand):
        """Mode, parameters, buffers, gradients and random numbers are as before."""
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).eval()
        model[0].train()
        model[0].weight.grad = torch.ones(6, 6)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        iw.convert(model, S, expand=expand, example_inputs=torch.randn(B, 6, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[2]
        assert np.array_equal(np.random.get_state()[1], generators[1])
        assert [m.training for m in model] == [True, False, False, False]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert torch.equal(model[0].weight.grad, torch.ones(6, 6)) and model[3].weight.grad is None

    @pytest.mark.parametrize("expand", ["axis", "input"])
    def test_arguments_by_position_and_keyword(self, expand):
        """Tensors with the first one's rows are expanded, wherever they stand; others and numbers pass."""
        model, x, other, table = iw.convert(TwoInputs(), S, expand=expand), torch.randn(B, 6), torch.randn(B, 4), torch.randn(6, 7)
        with iw.sampling(S, seed=2):
            y = model(x, other, scale=2.0, table=table)
        with iw.sampling(S, seed=2):
            z = model(x=x, other=other, table=table, scale=2.0)
        h = model.a(torch.cat([x] * S))
        want = (h * naive.naive_keep(h, 0.5, samples=S, seed=2, expand=False) * 2 + model.b(torch.cat([other] * S)) * 2.0) @ table
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(z, want)

    @pytest.mark.parametrize("expand", ["axis", "input"])
    def test_nested_arguments(self, expand):
        class Dict(TwoInputs):
            def forward(self, batch):
                return super().forward(batch["x"], *batch["rest"])

        batch = {"x": torch.randn(B, 6), "rest": [torch.randn(B, 4)], "name": "kept"}
        model = iw.convert(Dict(), S, expand=expand, example_inputs=[batch])
        with iw.sampling(S, seed=2):
            y = model(batch)
        h = model.a(batch["x"])
        want = naive.naive_noise(h, 0.5, samples=S, seed=2) + torch.cat([model.b(batch["rest"][0])] * S)
        torch.testing.assert_close(y, want)

    def test_a_table_of_as_many_rows_as_the_batch(self):
        """On the axis nothing is repeated; "input" would repeat it, and says that this does not run."""
        x, other, table = torch.randn(6, 6), torch.randn(6, 4), torch.randn(6, 6)
        model = iw.convert(TwoInputs(), S, example_inputs={"x": x, "other": other, "table": table})
        with iw.sampling(S, seed=2):
            y = model(x, other=other, table=table)
        want = (naive.naive_noise(model.a(x), 0.5, samples=S, seed=2) + torch.cat([model.b(other)] * S)) @ table
        torch.testing.assert_close(y, want)
        with pytest.raises(ValueError, match="the model stops on these inputs"):
            iw.convert(TwoInputs(), S, expand="input", example_inputs={"x": x, "other": other, "table": table})

    def test_input_without_a_tensor(self):
        model = iw.convert(mlp(), S, expand="input")
        with pytest.raises(ValueError, match="expand='input': expected a tensor argument"):
            model([1, 2])
        assert current() is None

    def test_noise_before_the_named_submodule(self):
        model = iw.convert(mlp(), S, expand="3")
        with pytest.raises(ValueError, match="called before the submodule at which this model expands"):
            model(torch.ones(B, 6))
        assert current() is None

    @pytest.mark.parametrize("expand", ["axis", "input"])
    def test_rows_in_another_dimension(self, expand):
        """A context's batch_dim rules where rows expand, too."""
        x = torch.randn(7, B, 6)
        model = iw.convert(Skip(), S, expand=expand)
        with iw.sampling(S, seed=1, batch_dim=1):
            y = model(x)
        many = torch.cat([x] * S, 1)
        keep = naive.naive_keep(x, 0.5, samples=S, seed=1, batch_dim=1) * 2
        torch.testing.assert_close(y, many + model.linear(many * keep))


class TestContexts:
    @EXPAND
    def test_own_context_draws_anew_and_follows_manual_seed(self, expand):
        model, x = iw.convert(mlp(), S, expand=expand), torch.randn(B, 6)
        torch.manual_seed(3)
        one, other = model(x), model(x)
        torch.manual_seed(3)
        assert torch.equal(model(x), one)
        assert not torch.equal(one, other)

    @pytest.mark.parametrize("expand", ["axis", "input"])
    def test_explicit_context_rules(self, expand):
        """Its seed, sample ids and number of samples; the place of expansion stays the model's."""
        model, x = iw.convert(Skip(), S, expand=expand), torch.randn(B, 6)
        with iw.sampling(7, seed=1) as context:
            seven = model(x).view(7, B, 6)
            assert (context.expand, context.batch) == ("first", None)
        with iw.sampling(1, seed=1, sample_ids=[4]):
            torch.testing.assert_close(model(x), seven[4])

    @EXPAND
    def test_batch_starts_afresh_at_each_forward(self, expand):
        model = iw.convert(mlp(), S, expand=expand)
        with iw.sampling(S, seed=1) as context:
            assert model(torch.ones(B, 6)).shape == (S * B, 2)
            assert model(torch.ones(2, 6)).shape == (S * 2, 2)
            assert context.stream == 4

    @pytest.mark.parametrize(("first", "second"), [("first", "input"), ("axis", "input"), ("first", "axis"), ("axis", "axis")])
    def test_two_converted_models_in_one_context(self, first, second):
        """Each with its own place of expansion, and unexpanded layers of the context's own around them."""
        one, two, drop = iw.convert(mlp(), S, expand=first), iw.convert(Skip(), S, expand=second), iw.IWDropout(0.5)
        x = torch.randn(B, 6)
        with iw.sampling(S, seed=1) as context:
            assert drop(x).shape == (S * B, 6)
            assert one(x).shape == (S * B, 2)
            assert two(x).shape == (S * B, 6)
            assert drop(x).shape == (S * B, 6)
            assert context.stream == 5

    @EXPAND
    def test_exception_in_forward(self, expand):
        model = iw.convert(mlp(), S, expand=expand)
        with pytest.raises(RuntimeError):
            model(torch.ones(B, 7))
        assert current() is None
        with iw.sampling(2) as context:
            with pytest.raises(RuntimeError):
                model(torch.ones(B, 7))
            assert (context.expand, context.batch, context.axis) == ("first", None, None)

    @EXPAND
    def test_no_context_is_left_after_an_interrupt(self, expand):
        """Ctrl-C in a notebook's cell, and the cell is run again: forward hooks do not run on KeyboardInterrupt."""

        class Interrupted(nn.Module):
            def forward(self, x):
                raise KeyboardInterrupt

        model, x = iw.convert(nn.Sequential(nn.Dropout(0.5), Interrupted()), S, expand=expand), torch.randn(B, 6)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(x)
        assert torch._C._functorch.peek_interpreter_stack() is None
        assert iw.IWDropout(0.5)(x).shape == (B, 6)
        assert iw.convert(mlp(), 2, expand=expand)(x).shape == (2 * B, 2)
        model[1] = nn.Identity()
        with iw.sampling(S, seed=1):
            assert torch.equal(model(x), naive.naive_noise(x, 0.5, samples=S, seed=1))
        assert current() is None

    @EXPAND
    def test_model_that_changes_its_mode_in_forward(self, expand):
        class Changing(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.5)

            def forward(self, x):
                y = self.drop(x)
                self.eval()
                return y

        model = iw.convert(Changing(), S, expand=expand)
        assert model(torch.ones(B, 6)).shape == (S * B, 6)
        assert current() is None

    @EXPAND
    def test_train_and_eval(self, expand):
        model, x = mlp(), torch.randn(B, 6)
        want = model.eval()(x)
        iw.convert(model, S, expand=expand)
        assert torch.equal(model(x), want)
        with iw.sampling(S) as context:
            assert torch.equal(model(x), want)
            assert context.stream == 0
        assert model.train()(x).shape == (S * B, 2)
        assert torch.equal(model.eval()(x), want)


class TestNoiseOfThisPackage:
    @pytest.mark.parametrize(
        "layer", [iw.IWGaussianNoise(0.1), iw.IWGaussianDropout(0.1), iw.IWMultinomialDropout(0.5), iw.IWDropPath(0.1)]
    )
    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_layers_that_are_there(self, layer, expand):
        """A model whose only noise is this package's converts, and reverts with its layers left in place."""
        model = iw.convert(nn.Sequential(nn.Linear(6, 6), layer), S, expand=expand, example_inputs=torch.ones(B, 6), strict=True)
        assert model(torch.ones(B, 6)).shape == (S * B, 6)
        assert iw.revert(model)[1] is layer
        assert model(torch.ones(B, 6)).shape == (B, 6)


BAD = [
    (TypeError, r"model: expected a torch.nn.Module, got int", lambda: iw.convert(3, S)),
    (TypeError, "samples: expected an int, got float", lambda: iw.convert(mlp(), 2.0)),
    (ValueError, "samples: expected an integer >= 1, got 0", lambda: iw.convert(mlp(), 0)),
    (
        ValueError,
        "model: expected noise, at least one of Dropout, .* found none",
        lambda: iw.convert(nn.Linear(2, 2), S, example_inputs=torch.ones(B, 2)),
    ),
    (ValueError, "expand: expected 'axis', .* got 'nowhere'", lambda: iw.convert(mlp(), S, expand="nowhere")),
    (ValueError, "expand: expected 'axis', .* got 'auto'", lambda: iw.convert(mlp(), S, expand="auto")),
    (ValueError, "batch_norm='joint': expected expand='input'", lambda: iw.convert(mlp(), S, batch_norm="joint")),
    (ValueError, "one_by_one: expected names of submodules, .* got 'nowhere'", lambda: iw.convert(mlp(), S, one_by_one=["nowhere"])),
    (ValueError, "one_by_one: expected none where expand='first'", lambda: iw.convert(mlp(), S, expand="first", one_by_one=["2"])),
    (ValueError, "but it is; iw.revert", lambda: iw.convert(iw.convert(mlp(), S), S)),
    (ValueError, r"but '0' is; iw\.revert", lambda: iw.convert(nn.Sequential(iw.convert(mlp(), S)), S)),
    (ValueError, "model: expected a converted one", lambda: iw.revert(mlp())),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_model_is_unchanged():
    model = mlp()
    with pytest.raises(ValueError, match="expand"):
        iw.convert(model, S, expand="nowhere")
    assert type(model[2]) is nn.Dropout


def test_a_part_of_a_converted_model_is_not_converted_again():
    """It would expand rows that the whole has expanded."""
    model = iw.convert(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))), S)
    with pytest.raises(ValueError, match="'1' was swapped by the conversion of a model around this one"):
        iw.convert(model[1], S)
    with pytest.raises(ValueError, match=r"'0' is; iw\.revert undoes it"):
        iw.convert(nn.Sequential(model), S)
    iw.convert(iw.revert(model)[1], S)
