"""Layers of real-valued noise: Gaussian dropout, and noise of a law that is added or multiplies."""

from torch import Tensor, nn

from ..checks import check_flag, check_layer_input, check_rate, check_std
from ..ops.real_noise import Law, dropout_std, real_noise
from .context import ambient


class IWGaussianDropout(nn.modules.dropout._DropoutNd):
    """Gaussian dropout with S noise samples per example: multiplication by N(1, p / (1 - p)), as much noise as dropout's.

        y[s, b] = x[b] * (1 + sqrt(p / (1 - p)) z[s, b])        z ~ N(0, 1), independent elements (Noh et al. 2017, eq 1)

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
        return real_noise(x, "normal", dropout_std(self.p), True, ambient(self).place(x, self.batch_dim))

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", batch_dim={self.batch_dim}" if self.batch_dim is not None else "")


class _RealNoise(nn.Module):
    """A standard deviation, noise that multiplies or is added, and the dimension that holds the rows."""

    law: Law

    def __init__(self, std: float = 1.0, *, multiply: bool = False, batch_dim: int | None = None):
        check_std(std)
        check_flag("multiply", multiply)
        super().__init__()
        self.std = std
        self.multiply = multiply
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        check_std(self.std)  # which may have changed since
        check_layer_input(self, x)
        return real_noise(x, self.law, self.std, self.multiply, ambient(self).place(x, self.batch_dim))

    def extra_repr(self) -> str:
        dim = f", batch_dim={self.batch_dim}" if self.batch_dim is not None else ""
        return f"std={self.std}" + ", multiply=True" * self.multiply + dim


class IWGaussianNoise(_RealNoise):
    """Gaussian noise with S noise samples per example, added or multiplied (Noh et al. 2017, eq 1).

        y[s, b] = x[b] + std z[s, b]            z ~ N(0, 1), independent elements
        y[s, b] = x[b] * (1 + std z[s, b])      with multiply=True

    In eval mode the layer is the identity. In training outside of any context: one fresh sample, no expansion. There are no parameters
    and no buffers. The gradient of added noise with respect to x is the sum over the samples of the upstream gradient, and draws nothing.

    Args:
        std: standard deviation of the noise, >= 0; in units of x where it is added, and of 1 where it multiplies.
        multiply: the noise multiplies x by a factor of mean 1, instead of being added.
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

    law = "normal"


class IWLaplaceNoise(_RealNoise):
    """Laplace noise with S noise samples per example: as :class:`IWGaussianNoise` (Noh et al. 2017, eq 1), with z of density
    exp(-sqrt(2) |z|) / sqrt(2).

    Its tails are heavier than a Gaussian's: of equal std, four standard deviations are passed 55 times as often. A scale parameter b is
    std = sqrt(2) b.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(3, seed=1):
        ...     y = iw.IWLaplaceNoise(2.0)(torch.zeros(2, 1000))
        >>> y.shape, round(y.std().item())
        (torch.Size([6, 1000]), 2)
    """

    law = "laplace"


class IWUniformNoise(_RealNoise):
    """Uniform noise with S noise samples per example: as :class:`IWGaussianNoise` (Noh et al. 2017, eq 1), with z uniform in
    [-sqrt(3), sqrt(3)].

    It is bounded: noise in [-a, a] is std = a / sqrt(3).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(3, seed=1):
        ...     y = iw.IWUniformNoise(0.5 / 3**0.5)(torch.zeros(2, 1000))
        >>> y.shape, bool(y.abs().max() <= 0.5), bool(y.abs().max() > 0.49)
        (torch.Size([6, 1000]), True, True)
    """

    law = "uniform"
