"""Noise on the weights of a linear layer: one weight mask for each noise sample, all samples' products in one batched call."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check, check_dtype, check_probability
from ..ops.noise import dropout_rule, noise
from .context import ambient, current


class IWDropConnect(nn.Linear):
    """A :class:`torch.nn.Linear` whose weights are dropped (DropConnect, Wan et al., 2013), one mask for each of S noise samples.

        y[s, b] = (keep[s] / (1 - p) * weight) x[b] + bias        keep[s] ~ Bernoulli(1 - p) of the weight's shape

    (Noh et al. 2017, eq 1, with the weights in the place of h(x)). All examples of a sample share its weights. In eval mode this is
    nn.Linear. In training outside of any context there is one fresh sample. Parameters and state_dict are nn.Linear's, so a module's
    class can be swapped in place; then p is 0.5 until the attribute is set.

    Memory: S copies of the weight, made at each call and kept for backward where x needs a gradient.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        p: probability that a weight is dropped, in [0, 1], rounded to a multiple of 1/65536.
        drop_bias: True draws a mask for the bias too, by the same p and of the next stream.
        batch_dim: dimension that holds the rows; None takes the context's (0 by default). Not the last, which holds the features.

    Shape:
        [B, ..., in] or [S*B, ..., in] -> [S*B, ..., out].

    Returns:
        y, of x's dtype.

    Raises:
        ValueError: p is outside of [0, 1]; the number of rows is neither B nor S*B; the context's sample_ids differ among examples.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> layer = iw.IWDropConnect(6, 5, p=0.5)
        >>> with iw.sampling(3):
        ...     y = layer(torch.ones(2, 6))
        >>> y.shape, bool((y[0] == y[1]).all()), bool((y[0] == y[2]).all())
        (torch.Size([6, 5]), True, False)
    """

    p: float = 0.5  # these three on the class, too, for an nn.Linear whose class was swapped
    drop_bias: bool = False
    batch_dim: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        *,
        drop_bias: bool = False,
        batch_dim: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        check_probability(p)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.p, self.drop_bias, self.batch_dim = p, drop_bias, batch_dim

    @classmethod
    def from_linear(cls, linear: nn.Linear, p: float = 0.5, *, drop_bias: bool = False, batch_dim: int | None = None) -> "IWDropConnect":
        """A layer that has the parameters of an nn.Linear: the same tensors, not copies.

        Example:
            >>> import torch, iwsgd_ext as iw
            >>> linear = torch.nn.Linear(6, 5)
            >>> iw.IWDropConnect.from_linear(linear, p=0.3).weight is linear.weight
            True
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, p, drop_bias=drop_bias, batch_dim=batch_dim, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        check_probability(self.p)
        context = ambient(self)
        batch_dim, expand = 0, True
        if current() is not None or x.dim() > 1:
            batch_dim = check_linear(x, self.weight, self.bias, context.batch_dim if self.batch_dim is None else self.batch_dim)
            rows = x.shape[batch_dim]
            expand = context.examples(rows) == rows
        weights, bias = self._noisy(self.weight), cast("Tensor | None", self.bias)
        if self.drop_bias and bias is not None:
            bias = self._noisy(bias)
        return product(x, weights, bias, expand, batch_dim)

    def _noisy(self, weight: Tensor) -> Tensor:
        return noise(weight[None], dropout_rule(self.p), "element", ambient(self).place_weight(weight))

    def extra_repr(self) -> str:
        return super().extra_repr() + f", p={self.p}" + ", drop_bias=True" * self.drop_bias


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch_dim: int) -> int:
    """The dimension of x that holds its rows, counted from the first; raises where a shape does not fit."""
    check_dtype("x", x)
    check(x.dim() >= 2, "x", "[rows, ..., features]", tuple(x.shape))
    check(weight.dim() == 2 and x.shape[-1] == weight.shape[1], "x", "as many features as the weight's second dimension", tuple(x.shape))
    check(bias is None or bias.shape == weight.shape[:1], "bias", "as many elements as the weight's first dimension", bias)
    expected = "a dimension of the input before its last, which holds the features"
    check(-x.dim() <= batch_dim < x.dim() and batch_dim not in (-1, x.dim() - 1), "batch_dim", expected, batch_dim)
    return batch_dim % x.dim()


def product(x: Tensor, weights: Tensor, bias: Tensor | None, expand: bool, batch_dim: int) -> Tensor:
    """[S*B, ..., out] of x [B, ..., in] (``expand``) or [S*B, ..., in], weights [S, out, in] and bias [out] or [S, out]."""
    samples = weights.shape[0]
    if samples == 1:
        return F.linear(x, weights[0], bias[0] if bias is not None and bias.dim() == 2 else bias)
    if expand:  # a batch of products with one x, whose stride over the samples is 0
        lead, rows = (samples, *x.shape[:-1]), x.reshape(1, -1, x.shape[-1]).expand(samples, -1, -1)
    else:
        x = x.unflatten(batch_dim, (samples, -1)).movedim(batch_dim, 0)
        lead, rows = x.shape[:-1], x.flatten(1, -2)
    transposed = weights.transpose(1, 2)
    bias = bias.unsqueeze(1) if bias is not None and bias.dim() == 2 else bias
    y = torch.bmm(rows, transposed) if bias is None else torch.baddbmm(bias, rows, transposed)
    return y.view(*lead, weights.shape[1]).movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)
