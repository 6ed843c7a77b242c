"""Layers of Gaussian noise, multiplicative and additive."""

from torch import Tensor, nn

from ..checks import check_layer_input, check_rate, check_std
from ..ops.gaussian import gaussian, gaussian_std
from .context import ambient


class IWGaussianDropout(nn.modules.dropout._DropoutNd):
    """Gaussian dropout with S noise samples per example: multiplication by N(1, p / (1 - p)), as much noise as dropout's.

        y[s, b] = x[b] * (1 + sqrt(p / (1 - p)) z[s, b])        z ~ N(0, 1), independent elements (eq 1)

    Activations are unbiased. In eval mode the layer is the identity. In training outside of any context: one fresh sample, no expansion.
    There are no parameters and no buffers. (Srivastava et al., JMLR 2014, section 10; Keras' GaussianDropout.)

    Args:
        p: rate of the dropout with the same variance, in [0, 1).
        batch_dim: dimension that holds the rows; None takes the context's (0 by default).

    Shape:
        [B, ...] -> [S*B, ...] for the first noise layer, [S*B, ...] -> [S*B, ...] after it; float32, float64, bfloat16, float16.

    Raises:
        ValueError: p outside of [0, 1); rows that are neither B nor S*B.
        TypeError: an input that is not floating-point.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> noise = iw.IWGaussianDropout(0.5)
        >>> with iw.sampling(3, seed=1):
        ...     y = noise(torch.ones(2, 1000))
        >>> y.shape, round(y.mean().item()), round(y.std().item())
        (torch.Size([6, 1000]), 1, 1)
    """

    def __init__(self, p: float = 0.5, *, batch_dim: int | None = None):
        check_rate(p)
        super().__init__(p)
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        check_rate(self.p)  # which may have changed since
        check_layer_input(self, x)
        return gaussian(x, gaussian_std(self.p), True, **ambient(self).place(x, self.batch_dim))

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", batch_dim={self.batch_dim}" if self.batch_dim is not None else "")


class IWGaussianNoise(nn.Module):
    """Additive Gaussian noise with S noise samples per example.

        y[s, b] = x[b] + std z[s, b]        z ~ N(0, 1), independent elements (eq 1)

    In eval mode the layer is the identity. In training outside of any context: one fresh sample, no expansion. There are no parameters
    and no buffers. Its gradient with respect to x is the sum over the samples of the upstream gradient, and draws nothing.

    Args:
        std: standard deviation, >= 0, in units of x.
        batch_dim: dimension that holds the rows; None takes the context's (0 by default).

    Shape:
        [B, ...] -> [S*B, ...] for the first noise layer, [S*B, ...] -> [S*B, ...] after it; float32, float64, bfloat16, float16.

    Raises:
        ValueError: std negative or not finite; rows that are neither B nor S*B.
        TypeError: an input that is not floating-point.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> noise = iw.IWGaussianNoise(2.0)
        >>> with iw.sampling(3, seed=1):
        ...     y = noise(torch.zeros(2, 1000))
        >>> y.shape, round(y.std().item())
        (torch.Size([6, 1000]), 2)
    """

    def __init__(self, std: float = 1.0, *, batch_dim: int | None = None):
        check_std(std)
        super().__init__()
        self.std = std
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        check_std(self.std)
        check_layer_input(self, x)
        return gaussian(x, self.std, False, **ambient(self).place(x, self.batch_dim))

    def extra_repr(self) -> str:
        return f"std={self.std}" + (f", batch_dim={self.batch_dim}" if self.batch_dim is not None else "")
