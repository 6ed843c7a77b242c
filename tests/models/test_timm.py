"""timm, random weights, small configurations."""

import pytest
import torch
from oracle.equal_to_loop import assert_equal_to_loop
from torch import nn

# A torchvision built for CUDA does not import on a CPU build of torch, for want of its own operators. Defined before torchvision had
# a chance to load them, they would end the process.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # operator torchvision::nms does not exist
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
timm = pytest.importorskip("timm", reason="timm is not installed (make test-models)")

B = 4

MODELS = {
    "vgg": ({"cfg": (8, "M", 16, "M"), "drop_rate": 0.5, "num_classes": 5, "mlp_ratio": 1 / 64, "norm_layer": nn.BatchNorm2d}, 32),
    "densenet121": ({"drop_rate": 0.3, "num_classes": 5, "growth_rate": 4, "block_config": (2, 2), "proj_drop_rate": 0.2}, 32),
    "efficientnet_b0": ({"drop_rate": 0.2, "drop_path_rate": 0.3, "num_classes": 5}, 32),
    "vit_tiny_patch16_224": (
        {
            "img_size": 32,
            "patch_size": 8,
            "depth": 3,
            "embed_dim": 24,
            "num_heads": 2,
            "num_classes": 5,
            "drop_rate": 0.1,
            "pos_drop_rate": 0.1,
            "proj_drop_rate": 0.1,
            "attn_drop_rate": 0.2,
            "drop_path_rate": 0.3,
        },
        32,
    ),
}


PLACES = {"vgg": "first", "densenet121": "features.denseblock1", "efficientnet_b0": "blocks.1.1", "vit_tiny_patch16_224": "first"}


@pytest.mark.parametrize("expand", ["axis", "input", "inside"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, expand):
    options, size = MODELS[name]
    model = timm.models.vgg.VGG(**options) if name == "vgg" else timm.create_model(name, pretrained=False, **options)
    images = torch.randn(B, 3, size, size, dtype=torch.float64)
    assert_equal_to_loop(model, {"x": images}, expand=PLACES[name] if expand == "inside" else expand)
