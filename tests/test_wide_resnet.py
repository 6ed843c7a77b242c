"""Wide residual networks: sizes, layers and initial values, each against what the published source has."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw
from recipes.wide_resnet import WideBlock, wide_resnet

PARAMETERS = {  # by depth and width, for 10 and 100 classes
    (10, 1): (77_850, 83_700),
    (10, 2): (303_706, 315_316),
    (10, 4): (1_198_810, 1_221_940),
    (16, 1): (175_066, 180_916),
    (16, 2): (691_674, 703_284),
    (16, 4): (2_748_890, 2_772_020),
    (16, 8): (10_961_370, 11_007_540),
    (22, 8): (17_158_106, 17_204_276),
    (28, 1): (369_498, 375_348),
    (28, 2): (1_467_610, 1_479_220),
    (28, 4): (5_849_050, 5_872_180),
    (28, 10): (36_479_194, 36_536_884),
    (40, 1): (563_930, 569_780),
    (40, 2): (2_243_546, 2_255_156),
    (40, 4): (8_949_210, 8_972_340),
    (40, 10): (55_841_754, 55_899_444),
}
DROPOUTS = {10: 3, 16: 6, 22: 9, 28: 12, 40: 18}


@pytest.mark.parametrize(("depth", "widen"), PARAMETERS, ids=lambda value: str(value))
def test_numbers_of_parameters_and_dropouts(depth, widen):
    for classes, expected in zip((10, 100), PARAMETERS[depth, widen], strict=True):
        with torch.device("meta"):
            model = wide_resnet(depth, widen, classes, 0.4)
        assert sum(p.numel() for p in model.parameters()) == expected
        drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in drops] == [0.4] * DROPOUTS[depth]
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth - 3 + (3 if widen > 1 else 2)  # WRN-28-10: 1 + 24 + 3
        assert all(m.bias is None for m in convolutions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 1, 10, 0.3), r"depth: expected 6n \+ 4 .*, got 12"),
        ((4, 1, 10, 0.3), "depth: .*, got 4"),
        ((10, 0, 10, 0.3), "widen: expected at least 1, got 0"),
        ((10, 1, 0, 0.3), "classes: expected at least 1, got 0"),
        ((10, 1, 10, 0.3, 0), "channels: expected at least 1, got 0"),
    ],
)
def test_arguments_that_no_network_has(arguments, message):
    with pytest.raises(ValueError, match=message):
        wide_resnet(*arguments)


@pytest.mark.parametrize("size", [32, 45], ids=["as CIFAR's", "odd"])
def test_shapes_and_strides(size):
    model, seen = wide_resnet(16, 2, 10, 0.3), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append((m.kernel_size[0], m.stride[0], x[0].shape[1], *y.shape[1:])))
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)
    half = (size + 1) // 2
    quarter = (half + 1) // 2
    expected = [(3, 1, 3, 16, size, size)]
    for inputs, outputs, stride, side in ((16, 32, 1, size), (32, 64, 2, half), (64, 128, 2, quarter)):
        first = (3, stride, inputs, outputs, side, side)
        expected += [first, (3, 1, outputs, outputs, side, side), (1, stride, inputs, outputs, side, side)]
        expected += [(3, 1, outputs, outputs, side, side)] * 2
    assert seen == expected


def functional(model: nn.Module, depth: int, x: torch.Tensor) -> torch.Tensor:
    """The published network in training mode, from the parameters alone; its dropout is left out."""
    values = list(model.parameters())

    def norm_relu(x, gamma, beta):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)).clamp(min=0)

    x = F.conv2d(x, values.pop(0), padding=1)
    for group in range(3):
        for block in range((depth - 4) // 6):
            stride = 2 if group and not block else 1
            gamma1, beta1, conv1, gamma2, beta2, conv2 = (values.pop(0) for _ in range(6))
            o = norm_relu(x, gamma1, beta1)
            shortcut = F.conv2d(o, values.pop(0), stride=stride) if conv1.shape[0] != conv1.shape[1] else x
            x = F.conv2d(norm_relu(F.conv2d(o, conv1, stride=stride, padding=1), gamma2, beta2), conv2, padding=1) + shortcut
    gamma, beta, weight, bias = values
    return norm_relu(x, gamma, beta).mean((2, 3)) @ weight.T + bias


@pytest.mark.parametrize("widen", [1, 2], ids=["no projection in the first group", "three projections"])
def test_network_against_its_formula(widen):
    """A projection takes the input after BatchNorm and ReLU, an identity the raw one."""
    model = wide_resnet(16, widen, 7, 0.0).double()
    nn.init.normal_(model[-1].bias)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), functional(model, 16, x), rtol=1e-9, atol=1e-9)
    blocks = [m for m in model if isinstance(m, WideBlock)]
    projected = [k for k, block in enumerate(blocks) if isinstance(block.shortcut, nn.Conv2d)]
    assert projected == ([0, 2, 4] if widen > 1 else [2, 4])


def test_dropout_is_between_the_convolutions():
    block = WideBlock(4, 4, 1, 0.5)
    nn.init.normal_(block.norm2.bias)
    x, order = torch.randn(2, 4, 6, 6), []
    for name, module in block.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: order.append((name, i[0].detach().clone(), o.detach().clone())))
    block(x)
    assert [name for name, _, _ in order] == ["norm1", "conv1", "norm2", "dropout", "conv2", "shortcut"]
    _, conv1, norm2, dropout, conv2, shortcut = order
    assert torch.equal(conv1[1], order[0][2].relu())
    assert torch.equal(norm2[1], conv1[2])
    assert torch.equal(dropout[1], norm2[2].relu())
    assert torch.equal(conv2[1], dropout[2])
    assert torch.equal(shortcut[1], x)
    kept = dropout[2] != 0
    assert 0.3 < kept[dropout[1] > 0].float().mean() < 0.7 and torch.equal(dropout[2][kept], 2 * dropout[1][kept])


def test_initial_values():
    model = wide_resnet(16, 4, 100, 0.3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.in_channels))
            w = layer.weight.detach() / std
            error = 5 / math.sqrt(w.numel())
            assert abs(w.mean()) < error and abs(w.std() - 1) < error
            assert abs((w.abs() > 2).double().mean() - 0.0455) < error / 4  # a normal law's part beyond two standard deviations
        elif isinstance(layer, nn.BatchNorm2d):
            assert not layer.bias.any() and layer.eps == 1e-5 and layer.momentum == 0.1
            assert 0 <= layer.weight.min() < 0.3 and 0.7 < layer.weight.max() <= 1
    gamma = torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(gamma.mean() - 0.5) < 0.03 and abs(gamma.std() - 12**-0.5) < 0.02
    head = model[-1]
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < head.weight.abs().max() <= bound and abs(head.weight.std() - bound / 3**0.5) < 0.01 * bound
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("expand", "batch_norm", "updates"), [("axis", "per_sample", 3), ("input", "joint", 1)], ids=["baseline", "authors"]
)
def test_both_protocols_convert_the_network(expand, batch_norm, updates):
    model, x = wide_resnet(10, 1, 5, 0.3), torch.randn(4, 3, 8, 8)
    model = iw.convert(model, 3, expand=expand, batch_norm=batch_norm, example_inputs=x if batch_norm == "per_sample" else None)
    before = model[-5].num_batches_tracked.item()
    logits = model.train()(x)
    assert logits.shape == (12, 5) and not torch.equal(logits[:4], logits[4:8])
    assert model[-5].num_batches_tracked.item() - before == updates
