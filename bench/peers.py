"""Other people's kernels, where they are installed. None of them knows noise samples: they stand in the place of F.cross_entropy or
F.dropout in the expanded batch, and the log-mean-exp over the samples stays plain torch.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Skip


def _function(package: str, module: str, name: str, device: torch.device) -> Any:
    """A peer's function, or the reason why it cannot be called here."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Skip(f"{package} is not installed ({error})") from None
    except Exception as error:  # a peer that is there and does not load: its own reason
        raise Skip(f"{package} does not load: {type(error).__name__}: {error}") from None
    if device.type != "cuda":
        raise Skip(f"{package} needs a GPU")
    if not hasattr(found, name):
        raise Skip(f"{package} has no {module}.{name} in this version")
    return getattr(found, name)


Rows = Callable[[Tensor, Tensor], Tensor]  # logits [N, C], target [N] -> cross-entropy of each row [N]


def liger(device: torch.device) -> Rows:
    function = _function("liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy", device)
    return lambda logits, target: function(logits, target, reduction="none")


def quack(device: torch.device) -> Rows:
    function = _function("quack-kernels", "quack.cross_entropy", "cross_entropy", device)
    return lambda logits, target: function(logits, target, reduction="none")


def flash_attention(device: torch.device) -> Rows:
    function = _function("flash-attn", "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", device)
    return lambda logits, target: function(logits, target)[0]


LinearRows = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # h [N, F], weight [C, F], bias [C], target [N] -> [N]


def liger_linear(device: torch.device) -> LinearRows:
    function = _function("liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", device)
    return lambda h, weight, bias, target: function(h, weight, target, bias, reduction="none")


def cut_cross_entropy(device: torch.device) -> LinearRows:
    function = _function("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", device)
    return lambda h, weight, bias, target: function(h, weight, target, bias=bias, reduction="none")


def quack_linear(device: torch.device) -> LinearRows:
    function = _function("quack-kernels", "quack.linear_cross_entropy", "linear_cross_entropy_func", device)
    return lambda h, weight, bias, target: function(h, weight, bias, target, reduction="none")


def torch_linear(device: torch.device) -> LinearRows:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Skip(f"F.linear_cross_entropy came with torch 2.13, this is {torch.__version__}")
    function = torch.nn.functional.linear_cross_entropy
    return lambda h, weight, bias, target: function(h, weight, target, linear_bias=bias, reduction="none")


def seeded_dropout(samples: int, p: float, device: torch.device) -> Callable[[Tensor], list[Tensor]]:
    """Dropout in the form of Triton's tutorial on low memory: no stored mask, 32 random bits for each element; one call a sample."""
    try:
        from . import seeded_dropout as kernel
    except ImportError as error:
        raise Skip(f"triton is not installed ({error})") from None
    if device.type != "cuda":
        raise Skip("triton needs a GPU")
    return lambda x: [kernel.seeded_dropout(x, p, seed) for seed in range(samples)]
