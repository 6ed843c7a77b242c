"""Attention as a function call of a converted model, where it draws, and where it does not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw

B, S = 5, 3


class Attends(nn.Module):
    """Padded attention that the model itself switches, between other noise and a reshaping that Python's Tensor has a method for."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, padding):
        q = self.q(F.dropout(x, 0.3, self.training)).unflatten(-1, (2, 4)).transpose(1, 2)
        p = 0.3 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, q, q, ~padding[:, None, None], dropout_p=p)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_attention_without_dropout_among_noise(expand):
    """Masks of B rows meet S*B rows in an evaluation as in training, which draws less: said once, not of what is drawn."""
    x, padding, target = torch.randn(B, 5, 8), torch.zeros(B, 5, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
    padding[:, 3:] = True
    model = iw.convert(Attends(), S, example_inputs=(x, padding), expand=expand)
    assert model(x, padding).shape == (S * B, 3)
    for evaluate in (
        lambda: iw.predict(model, (x, padding), S, chunk=2, seed=3),
        lambda: iw.bound_curve(model, [((x, padding), target)] * 2, S, seed=3),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluate()
        assert [str(w.message).count("scaled_dot_product_attention(p=0.3)") for w in caught] == [1]
        assert "F.dropout" not in str(caught[0].message)
    expanded = iw.convert(iw.revert(model), S, expand="input")
    expanded(x, padding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(iw.predict(expanded, (x, padding), S, seed=3), iw.predict(model, (x, padding), S, seed=3))


@pytest.mark.parametrize("expand", [pytest.param("axis", marks=pytest.mark.slow), "first"])
def test_compiled_with_methods_of_pythons_tensor(expand):
    torch._dynamo.reset()
    x, padding = torch.randn(B, 5, 8), torch.zeros(B, 5, dtype=torch.bool)
    model = iw.convert(Attends(), S, example_inputs=(x, padding), expand=expand)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = []
    for run in model, compiled:
        torch.manual_seed(3)
        results.append(run(x, padding))
    torch.testing.assert_close(*results)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "in eval mode the model.s own code turns off noise")  # nobody looks at a compiled forward
        iw.predict(compiled, (x, padding), S)


def test_attention_that_draws_nothing_is_not_named():
    """A function that may draw, and here does not."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = self.drop(x)[:, None]
            return F.scaled_dot_product_attention(h, h, h)

    assert iw.audit(Plain(), torch.randn(B, 5, 8)).complete
