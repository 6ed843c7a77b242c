"""Whole models of torch.nn and lookalikes of the common libraries' (those themselves: tests/models): converted, equal to a loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle.equal_to_loop import assert_equal_to_loop
from torch import nn

import iwsgd_ext as iw

B, T = 4, 6


@pytest.mark.parametrize("expand", ["axis", "input"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first, norm_first, expand):
    """Encoder and decoder; without batch_first the rows are in dimension 1. A residual connection goes round the first noise."""
    model = nn.Transformer(8, 2, 2, 2, 12, 0.2, batch_first=batch_first, norm_first=norm_first)
    source, target = torch.randn(B, T, 8, dtype=torch.float64), torch.randn(B, T + 1, 8, dtype=torch.float64)
    inputs = {"src": source, "tgt": target} if batch_first else {"src": source.transpose(0, 1), "tgt": target.transpose(0, 1)}
    inputs["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(T + 1, dtype=torch.float64)
    assert_equal_to_loop(model, inputs, batch_dim=0 if batch_first else 1, expand=expand)


@pytest.mark.parametrize("expand", ["axis", "input"])
def test_encoder_with_padding_and_its_fast_path(expand):
    """In eval torch's encoder takes a road of its own, which must stay as it was."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.2, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(B, T, 8, dtype=torch.float64)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 4:] = True
    assert_equal_to_loop(model, {"src": x, "src_key_padding_mask": padding}, expand=expand)
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=padding)
        iw.revert(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), fast)


class LanguageModel(nn.Module):
    """Embedding and decoder tied, dropout before, inside and behind the LSTM."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(63, 8), nn.Dropout(0.2)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=batch_first)
        self.decoder = nn.Linear(8, 63)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens, state=None):
        y, state = self.lstm(self.drop(self.embedding(tokens)), state)
        return self.decoder(self.drop(y)), state


@pytest.mark.parametrize("expand", ["axis", "first", "input"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_language_model(batch_first, expand):
    model, tokens = LanguageModel(batch_first), torch.randint(63, (B, T) if batch_first else (T, B))
    assert_equal_to_loop(model, {"tokens": tokens}, lambda y: y[0], batch_dim=0 if batch_first else 1, expand=expand)
    assert model.decoder.weight is model.embedding.weight


def test_lstm_language_model_with_the_state_of_the_step_before():
    """Truncated backpropagation: S*B states go in, and each sample goes on from its own."""
    model = iw.convert(LanguageModel(True), 3, expand="first")
    first, second = torch.randint(63, (2, B, T)).unbind()
    with iw.sampling(3, seed=1):
        _, state = model(first)
        y, _ = model(second, state)
    for s in range(3):
        with iw.sampling(1, seed=1, sample_ids=[s]):
            _, state = model(first)
            torch.testing.assert_close(y[s * B : (s + 1) * B], model(second, state)[0])


class DropPath(nn.Module):
    """What timm and Hugging Face call so."""

    def __init__(self, drop_prob: float | None = None):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype) < keep)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class MobileBlock(nn.Module):
    """EfficientNet's: no noise on the skip path, stochastic depth on the other."""

    def __init__(self, width: int, p: float | None):
        super().__init__()
        self.conv, self.norm, self.path = nn.Conv2d(width, width, 3, padding=1, bias=False), Activated(width), DropPath(p)

    def forward(self, x):
        return x + self.path(self.norm(self.conv(x)))


@pytest.mark.parametrize("expand", ["axis", "input", "blocks.0"])
def test_convolutions_with_stochastic_depth_and_functional_dropout(expand):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), Activated(6))
            self.blocks = nn.ModuleList([MobileBlock(6, None), MobileBlock(6, 0.3)])
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(F.dropout(x.mean((2, 3)), 0.4, self.training))

    model = Net()
    audit = assert_equal_to_loop(model, {"x": torch.randn(B, 3, 8, 8, dtype=torch.float64)}, expand=expand)
    assert {("blocks.1.path", "DropPath", "_NamedRate"), ("blocks.1.norm", "Activated", "IWActivated")} <= {
        (v.name, v.was, v.now) for v in audit.layers
    }


class Attention(nn.Module):
    """As in timm: the rate is read from a dropout layer that is never called."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.drop, self.out = heads, nn.Linear(width, 3 * width), nn.Dropout(0.2), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attention, self.path1 = nn.LayerNorm(width), Attention(width, 2), DropPath(0.2)
        self.norm2, self.path2 = nn.LayerNorm(width), DropPath(0.2)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, width), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.path1(self.attention(self.norm1(x)))
        return x + self.path2(self.mlp(self.norm2(x)))


@pytest.mark.parametrize("expand", ["axis", "input", "blocks.0"])
def test_vision_transformer(expand):

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(*(VisionBlock(8) for _ in range(2)))
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    audit = assert_equal_to_loop(Net(), {"x": torch.randn(B, 3, 8, 8, dtype=torch.float64)}, expand=expand)
    assert [call.module for call in audit.replaced] == ["blocks.0.attention", "blocks.1.attention"]


class Masked(nn.Module):
    """Behind the first noise, an index made for the rows that there are goes into an input that was not expanded."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(T, T), nn.Dropout(0.5)

    def forward(self, x, mask):
        x = self.drop(self.linear(x))
        return x * mask[torch.arange(len(x))]


@pytest.mark.parametrize("expand", ["axis", "input"])
def test_an_index_of_the_rows_that_there_are(expand):
    inputs = {"x": torch.randn(B, T, dtype=torch.float64), "mask": torch.ones(B, T, dtype=torch.float64)}
    assert_equal_to_loop(Masked(), inputs, expand=expand)


def test_torchvisions_stochastic_depth():
    class StochasticDepth(nn.Module):
        def __init__(self, p, mode):
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, x):
            return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(1 - self.p) / (1 - self.p) if self.training else x

    model = nn.Sequential(nn.Linear(6, 6), StochasticDepth(0.5, "row"))
    assert_equal_to_loop(model, {"input": torch.randn(B, 6, dtype=torch.float64)})
    assert type(model[1]) is iw.IWDropPath
    iw.revert(model)
    assert type(model[1]) is StochasticDepth
    assert "batch_dim" not in vars(model[1])


TORCHVISION = """
import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
if {matches}:
    for name in ("nms", "qnms"):
        torch.library.define("torchvision::" + name, SCHEMA)  # refused where somebody else has defined it
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name, lambda *a: None)  # refused where it is not defined
"""


@pytest.mark.parametrize("matches", [True, False])
def test_timm_beside_a_torchvision(tmp_path, matches):
    """tests/models/test_timm.py with a stand-in for a torchvision that fits torch, and for one without operators on this torch."""
    for name, text in {"torchvision": TORCHVISION.format(matches=matches), "timm": "import torchvision"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    file = Path(__file__).parent / "models" / "test_timm.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", str(file)]
    path = os.pathsep.join([str(tmp_path), str(file.parents[2]), *filter(None, sys.path)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and "test_model[vgg-axis]" in done.stdout, done.stdout + done.stderr
