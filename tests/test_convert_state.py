"""A converted model stays a model: copies, state, names, hooks, shared modules, and back again."""

import copy
import io
import pickle

import pytest
import torch
from oracle import naive
from test_convert import B, S, mlp
from torch import nn

import iwsgd_ext as iw


class TestModelStaysAModel:
    @pytest.mark.parametrize("expand", ["axis", "first", "input", "2"])
    def test_copies(self, expand):
        """A deep copy, a pickle and a saved one are converted, draw the same, and are independent of the original."""
        model, x = iw.convert(mlp(), S, expand=expand), torch.randn(B, 6)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
        with iw.sampling(S, seed=1):
            want = model(x)
        for other in copies:
            with iw.sampling(S, seed=1):
                assert torch.equal(other(x), want)
            assert other(x).shape == (S * B, 2)
            iw.revert(other)
            assert other(x).shape == (B, 2)
        assert model(x).shape == (S * B, 2)

    def test_state_dict_and_names(self):
        model, original = mlp(), mlp()
        names = [name for name, _ in model.named_modules()]
        iw.convert(model, S)
        assert [name for name, _ in model.named_modules()] == names
        model.load_state_dict(original.state_dict())
        original.load_state_dict(model.state_dict())

    @pytest.mark.parametrize(("expand", "rows"), [("axis", B), ("first", S * B), ("input", S * B)])
    def test_identity_of_layers_and_hooks(self, expand, rows):
        """Hooks of the model see all rows; on the axis those of its parts see what one sample alone has."""
        model, calls = mlp(), []
        drop = model[2]
        drop.register_forward_hook(lambda m, args, y: calls.append(y.shape[0]))
        model.register_forward_pre_hook(lambda m, args: calls.append("before"))
        model.register_forward_hook(lambda m, args, y: calls.append(f"after {len(y)}"))
        iw.convert(model, S, expand=expand, verify=False)
        assert model[2] is drop
        assert type(drop) is iw.IWDropout
        model(torch.ones(B, 6))
        iw.revert(model)
        model(torch.ones(B, 6))
        assert calls == ["before", rows, f"after {S * B}", "before", B, f"after {B}"]

    def test_revert_gives_back_all(self):
        model = nn.Sequential(
            nn.Dropout(0.1, inplace=True), nn.Dropout1d(0.2), nn.Sequential(nn.Dropout2d(0.3), nn.Dropout3d(0.4)), iw.IWDropPath(0.5)
        )
        before = {name: dict(m.__dict__) for name, m in model.named_modules()}
        text, classes = repr(model), [type(m) for m in model.modules()]
        iw.convert(model, S)
        kinds = [iw.IWDropout, iw.IWDropout1d, iw.IWDropout2d, iw.IWDropout3d]
        assert [type(m) for m in model.modules() if not isinstance(m, nn.Sequential)] == [*kinds, iw.IWDropPath]
        assert iw.revert(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert repr(model) == text
        assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
        iw.convert(model, S)

    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_shared_module_draws_at_each_place(self, expand):
        drop = nn.Dropout(0.5)
        model = iw.convert(nn.Sequential(drop, nn.Linear(6, 6), drop), S, expand=expand)
        x = torch.randn(B, 6)
        with iw.sampling(S, seed=1) as context:
            y = model(x)
            assert context.stream == 2
        h = model[1](naive.naive_noise(x, 0.5, samples=S, seed=1))
        torch.testing.assert_close(y, naive.naive_noise(h, 0.5, samples=S, seed=1, stream=1, expand=False))

    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_subclass_of_dropout_is_left(self, expand):
        class Mine(nn.Dropout):
            def forward(self, x):
                return x

        model = iw.convert(nn.Sequential(nn.Dropout(0.5), Mine()), S, expand=expand)
        assert type(model[1]) is Mine
        x = torch.randn(B, 6)
        with iw.sampling(S, seed=1):
            torch.testing.assert_close(model(x), naive.naive_noise(x, 0.5, samples=S, seed=1))
