"""The architectures whose training steps are measured, in plain torch.nn: every dropout is an ``nn.Dropout`` of its own.

Widths and depths are arguments: a CPU is given smaller ones. Attention has its dropout on its output, not on its weights, so that every
provider can draw it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.wide_resnet import wide_resnet as wide_resnet


def mlp(inputs: int, hidden: int, classes: int, p: float = 0.5) -> nn.Module:
    """Two hidden layers with dropout, and dropout on the inputs: nothing is shared between the samples."""
    first = [nn.Dropout(0.2), nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, classes))


def head(features: int, classes: int, p: float = 0.5) -> nn.Module:
    """The last layers of most classifiers, alone."""
    return nn.Sequential(nn.Dropout(p), nn.Linear(features, classes))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def vgg(width: int, blocks: tuple[int, ...], classes: int, p: float = 0.4) -> nn.Module:
    """VGG with BatchNorm for 32x32 images, with dropout between its convolutions."""
    layers, channels = [], 3
    for i, convolutions in enumerate(blocks):
        outputs = min(width << i, 8 * width)
        for j in range(convolutions):
            layers += [_conv(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.Dropout(p)] if j + 1 < convolutions else [nn.MaxPool2d(2)]
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, classes))


def shared_trunk(width: int, blocks: tuple[int, ...], classes: int) -> nn.Module:
    """The same convolutions with dropout in the head alone: all samples share the trunk."""
    layers, channels = [], 3
    for i, convolutions in enumerate(blocks):
        for _ in range(convolutions):
            layers += [_conv(channels, width << i), nn.BatchNorm2d(width << i), nn.ReLU()]
            channels = width << i
        layers.append(nn.MaxPool2d(2))
    top = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, 4 * channels), nn.ReLU()]
    return nn.Sequential(*layers, *top, nn.Dropout(0.5), nn.Linear(4 * channels, classes))


class SkipPath(nn.Module):
    """A deep path without noise, to which a short noisy one is added: from the sum on samples differ."""

    def __init__(self, width: int, depth: int, classes: int, p: float = 0.5):
        super().__init__()
        self.deep = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))
        self.noisy = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(p))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(x) + self.noisy(x))


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm, each with dropout on what it adds."""

    def __init__(self, width: int, heads: int, p: float, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(n, t, width)
        x = x + self.dropout1(self.out(y))
        return x + self.dropout2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int, p: float = 0.1):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, width))
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, p, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.patches(x).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.norm(self.blocks(h)).mean(1))


class GPT2(nn.Module):
    """Decoder with tied embeddings; logits [B, V, T] as cross-entropy wants them."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, p: float = 0.1):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, p, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.tokens(x) + self.positions.weight[: x.shape[1]])
        return F.linear(self.norm(self.blocks(h)), self.tokens.weight).transpose(1, 2)


class LSTM(nn.Module):
    """Language model of two LSTM layers with dropout before, between and after them; logits [B, V, T]."""

    def __init__(self, vocabulary: int, width: int, p: float = 0.5):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layer1, self.layer2 = nn.LSTM(width, width, batch_first=True), nn.LSTM(width, width, batch_first=True)
        self.dropout1, self.dropout2, self.dropout3 = nn.Dropout(p), nn.Dropout(p), nn.Dropout(p)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer1(self.dropout1(self.tokens(x)))[0]
        return self.head(self.dropout3(self.layer2(self.dropout2(h))[0])).transpose(1, 2)
