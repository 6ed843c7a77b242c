"""What iw.convert says of models whose noise is none: rates of 0, dropout between layers of which there is one, and the like."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw

B, S = 5, 3


class Functional(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self, x)


class First(nn.Module):
    """The first result of a layer that has several."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, None])[0][:, 0] if isinstance(self.layer, nn.RNNBase) else self.layer(x, x, x)[0]


class DropPath(nn.Module):
    """Stochastic depth that does not scale what it keeps."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x * (torch.rand(len(x), 1) >= self.drop_prob) if self.training else x


IDLE = {
    "one layer": (First, lambda: nn.LSTM(6, 6, dropout=0.5), r"layer \(LSTM\): it has one layer, and dropout=0.5 acts between layers only"),
    "no rate": (First, lambda: nn.GRU(6, 6, num_layers=2), r"layer \(GRU\): dropout=0"),
    "attention": (First, lambda: nn.MultiheadAttention(6, 2), r"layer \(MultiheadAttention\): dropout=0"),
}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_a_model_without_noise_says_why(name):
    wrapped, layer, why = IDLE[name]
    with pytest.raises(ValueError, match=rf"found none in its modules, and none in a run on example_inputs\. {why}"):
        iw.convert(wrapped(layer()), S, example_inputs=torch.ones(B, 6))


@pytest.mark.parametrize("given", [True, False], ids=["example inputs", "first forward"])
@pytest.mark.parametrize("layer", [nn.Dropout(0.0), iw.IWDropout(0.0), iw.IWGaussianNoise(0.0)], ids=lambda v: type(v).__name__)
def test_rates_of_zero_are_told(layer, given):
    """All S samples are alike then, and training costs S times as much for nothing."""
    model, x = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer)), torch.ones(B, 6)
    with pytest.warns(UserWarning, match=rf"all samples are alike\. 1 \({type(layer).__name__}\): its rate is 0"):
        iw.convert(model, S, **({"example_inputs": x} if given else {}))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[1].__dict__.update(p=0.5, std=0.5)
        model(x)  # once is enough


def test_rates_of_zero_of_functions_are_told():
    model = Functional(lambda m, x: F.dropout(x, 0.0, m.training))
    with pytest.warns(UserWarning, match="all samples are alike"):
        iw.convert(model, S, example_inputs=torch.ones(B, 6))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(0.5), First(nn.LSTM(6, 6, 2, dropout=0.1))], ids=lambda v: type(v).__name__)
def test_one_rate_is_noise(layer):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*alike")
        warnings.filterwarnings("ignore", message="iw.convert leaves this noise")
        iw.convert(nn.Sequential(nn.Dropout(0.0), copy.deepcopy(layer)), S, example_inputs=torch.ones(B, 6))


def test_stochastic_depth_that_is_none_says_why():
    with pytest.warns(UserWarning, match=r"0 \(DropPath, which on rows of ones does not drop rows and divide the others by 1 - p, as iw"):
        iw.convert(nn.Sequential(DropPath(0.5)), S, example_inputs=torch.ones(B, 6))


def test_noise_that_a_forward_does_not_reach_is_told():
    model = iw.convert(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), S)
    model[1].eval()
    with pytest.warns(UserWarning, match="all samples are alike"):
        model(torch.ones(B, 6))
