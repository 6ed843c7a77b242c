"""Wide residual networks with dropout (Zagoruyko and Komodakis 2016), and the initial values of their published code.

Where ports of that code differ, and here do not: dropout stands directly before a block's second convolution, after BatchNorm and ReLU;
the stride is the first convolution's; where widths differ, the shortcut is a 1x1 convolution of the normalised input, else the raw input.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-Dropout-conv beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, p: float):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.dropout, self.conv2 = nn.BatchNorm2d(outputs), nn.Dropout(p), _conv(outputs, outputs, 3)
        self.shortcut = _conv(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        y = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(h)))))
        return y + self.shortcut(x if isinstance(self.shortcut, nn.Identity) else h)


def wide_resnet(depth: int, widen: int, classes: int, p: float = 0.3, channels: int = 3) -> nn.Module:
    """WRN-depth-widen for images [B, channels, H, W] of any size: logits [B, classes].

    Args:
        depth: the number of its layers, 6n + 4: n blocks in each of three groups.
        widen: the groups have 16, 32 and 64 times as many channels.
        classes: C.
        p: rate of each block's dropout.
        channels: of the images.

    Raises:
        ValueError: where an argument is none of these.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth: expected 6n + 4 with n of at least 1 (10, 16, 22, 28, ...), got {depth}")
    for name, value in (("widen", widen), ("classes", classes), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    layers, width = [_conv(channels, 16, 3)], 16
    for group in range(3):
        for block in range((depth - 4) // 6):
            outputs = (16 << group) * widen
            layers.append(WideBlock(width, outputs, 2 if group > 0 and block == 0 else 1, p))
            width = outputs
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return initialise(nn.Sequential(*layers, *head))


def initialise(model: nn.Module) -> nn.Module:
    """Draws the initial values as the published code and its version of Torch do; PyTorch's own are others for convolutions and gamma."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()))  # [outputs, inputs, kh, kw]: fan-in
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
    return model
