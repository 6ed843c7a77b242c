"""Dropout layers with S masks per example inside ``iw.sampling``: drop-in for torch.nn's."""

from torch import Tensor, nn

from ..checks import check_layer_input, check_probability
from ..ops.address import Unit
from ..ops.noise import Rule, alpha_rule, dropout_rule
from .context import draw


class _Dropout(nn.modules.dropout._DropoutNd):
    """The base of the dropout layers.

    Attributes:
        unit: the part of an example that one draw keeps or drops.
        dims: the numbers of dimensions that an input may have; None allows any.
        expected: the shapes of these inputs, for messages.
        namesake: the name of torch's layer, for messages.
        unbatched: the number of dimensions at which torch's layer takes an input for one example without a dimension of rows.
    """

    unit: Unit = "element"
    dims: tuple[int, ...] | None = None
    expected = ""
    namesake = ""
    unbatched = 0

    def __init__(self, p: float = 0.5, *, batch_dim: int | None = None):
        check_probability(p)
        super().__init__(p)
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return draw(x, self.rule(), self.unit, self.batch_dim, self, self._check)

    def rule(self) -> Rule:
        """The values that an element takes where it is kept and where it is dropped."""
        check_probability(self.p)  # users may have set it
        return dropout_rule(self.p)

    def _check(self, x: Tensor) -> None:
        check_layer_input(self, x)
        if self.dims is not None and x.dim() not in self.dims:
            hint = (
                f". {self.namesake} takes this for one example without rows: give x[None], which has one"
                if x.dim() == self.unbatched
                else ""
            )
            raise ValueError(
                f"input of {type(self).__name__} ({self.namesake}): expected {self.expected}, got {x.dim()}-D {tuple(x.shape)}{hint}"
            )

    def extra_repr(self) -> str:
        return f"p={self.p}" + (f", batch_dim={self.batch_dim}" if self.batch_dim is not None else "")


class IWDropout(_Dropout):
    """:class:`torch.nn.Dropout` with S noise samples per example inside ``iw.sampling(S)``.

        y[s, b] = x[b] * keep[s, b] / (1 - p)        keep ~ Bernoulli(1 - p), independent elements (Noh et al. 2017, eq 1)

    p is rounded to a multiple of 1/65536, and kept values are scaled by the inverse of the rounded 1 - p, so that the mean of y is x.
    p = 0 is the identity and p = 1 gives zeros, exactly. In eval mode the layer is the identity. In training outside of any context it
    is nn.Dropout: one fresh sample, no expansion. It has no parameters and no buffers, so that a state_dict is the same after a swap.

    Args:
        p: probability that an element is dropped, in [0, 1].
        batch_dim: dimension that holds the rows; None takes the context's (0 by default).

    Shape:
        [B, ...] -> [S*B, ...] for the first noise layer, [S*B, ...] -> [S*B, ...] after it; float32, float64, bfloat16, float16.

    Returns:
        y, of x's dtype.

    Raises:
        ValueError: p is outside of [0, 1]; the number of rows is neither B nor S*B.
        TypeError: the input is not a tensor of these dtypes.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> drop = iw.IWDropout(0.5)
        >>> with iw.sampling(3, seed=1):
        ...     y = drop(torch.ones(2, 6))
        >>> y.shape, sorted(set(y.flatten().tolist()))
        (torch.Size([6, 6]), [0.0, 2.0])
    """


class IWDropout1d(_Dropout):
    """:class:`torch.nn.Dropout1d` with S noise samples per example (Noh et al. 2017, eq 1): whole channels are dropped.

    Args, Returns, Raises:
        as :class:`IWDropout`.

    Shape:
        [B, C, L] or [S*B, C, L] -> [S*B, C, L].

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> iw.IWDropout1d(0.2).eval()(torch.ones(2, 3, 5)).shape
        torch.Size([2, 3, 5])
    """

    unit, dims, expected = "channel", (3,), "[B, C, L]"
    namesake, unbatched = "nn.Dropout1d", 2


class IWDropout2d(_Dropout):
    """:class:`torch.nn.Dropout2d` with S noise samples per example (Noh et al. 2017, eq 1): whole channels are dropped.

    Args, Returns, Raises:
        as :class:`IWDropout`.

    Shape:
        [B, C, H, W] or [S*B, C, H, W] -> [S*B, C, H, W]; a 3-D input is [B, C, L], as torch reads it.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(4):
        ...     y = iw.IWDropout2d(0.5)(torch.ones(2, 3, 5, 5))
        >>> y.shape, bool((y.amax((2, 3)) == y.amin((2, 3))).all())
        (torch.Size([8, 3, 5, 5]), True)
    """

    unit, dims, expected = "channel", (3, 4), "[B, C, H, W] or [B, C, L]"
    namesake = "nn.Dropout2d"


class IWDropout3d(_Dropout):
    """:class:`torch.nn.Dropout3d` with S noise samples per example (Noh et al. 2017, eq 1): whole channels are dropped.

    Args, Returns, Raises:
        as :class:`IWDropout`.

    Shape:
        [B, C, D, H, W] or [S*B, C, D, H, W] -> [S*B, C, D, H, W].

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> iw.IWDropout3d(0.2).eval()(torch.ones(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    unit, dims, expected = "channel", (5,), "[B, C, D, H, W]"
    namesake, unbatched = "nn.Dropout3d", 4


class IWDropPath(_Dropout):
    """Stochastic depth with S noise samples per example (Noh et al. 2017, eq 1): each row of a residual branch is dropped as a whole, or
    kept and scaled.

    Args, Shape, Returns, Raises:
        as :class:`IWDropout`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(4, seed=0):
        ...     y = iw.IWDropPath(0.5)(torch.ones(2, 3, 5))
        >>> bool((y.amax((1, 2)) == y.amin((1, 2))).all())
        True
    """

    unit = "row"


class IWAlphaDropout(_Dropout):
    """:class:`torch.nn.AlphaDropout` with S noise samples per example (Noh et al. 2017, eq 1): dropped elements take the value that keeps
    SELU's statistics.

        y = keep ? a * x + b : a * alpha' + b        alpha' = -1.7581, a = ((1-p)(1 + p alpha'^2))^(-1/2), b = -a p alpha'

    An input of mean 0 and variance 1 keeps both (Klambauer et al. 2017, section 3); a and b are those of the rounded p. p = 0 is the
    identity, p = 1 gives zeros, as in torch.

    Args, Shape, Returns, Raises:
        as :class:`IWDropout`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(4, seed=0):
        ...     y = iw.IWAlphaDropout(0.2)(torch.randn(1000, 50))
        >>> y.shape, bool(y.mean().abs() < 0.02), bool((y.std() - 1).abs() < 0.02)
        (torch.Size([4000, 50]), True, True)
    """

    def rule(self) -> Rule:
        check_probability(self.p)
        return alpha_rule(self.p)


class IWFeatureAlphaDropout(IWAlphaDropout):
    """:class:`torch.nn.FeatureAlphaDropout` with S noise samples per example (Noh et al. 2017, eq 1): whole channels take the value of
    :class:`IWAlphaDropout`.

    Args, Returns, Raises:
        as :class:`IWDropout`.

    Shape:
        [B, C, ...] or [S*B, C, ...] -> [S*B, C, ...], of 2 to 5 dimensions.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> with iw.sampling(4, seed=0):
        ...     y = iw.IWFeatureAlphaDropout(0.2)(torch.ones(2, 3, 5))
        >>> bool((y.amax(2) == y.amin(2)).all())
        True
    """

    unit, dims, expected = "channel", (2, 3, 4, 5), "[B, C, ...]"
    namesake = "nn.FeatureAlphaDropout"


class IWAdaptiveDropout(_Dropout):
    """Dropout whose probabilities are given with each input: one for every feature, or for every element, say from another network.

        y[s, b, i] = x[b, i] * keep[s, b, i] / (1 - p[b, i])        keep ~ Bernoulli(1 - p[b, i]) (Noh et al. 2017, eq 1)

    With rates that a second network computes, this is adaptive dropout (Ba and Frey 2013); with fixed rates, dropout by feature. Kept
    values are scaled by the inverse of their own 1 - p. A mask has no derivative by its rate, so p must not require grad: train the
    network that gives the rates by an objective of its own.

    Args:
        batch_dim: as :class:`IWDropout`.

    Shape:
        x as :class:`IWDropout`; p floating-point, values in [0, 1] (rounded to multiples of 1/65536), of a shape that broadcasts to x,
        with 1 or B rows, or as many as x has.

    Returns:
        y, of x's dtype.

    Raises:
        ValueError: the shape of p does not fit; a value of p is outside of [0, 1] (on a GPU, an assertion of the device).
        TypeError: x or p is not a floating-point tensor.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> rates = torch.tensor([0.0, 0.5, 1.0])
        >>> with iw.sampling(4, seed=0):
        ...     y = iw.IWAdaptiveDropout()(torch.ones(2, 3), rates)
        >>> sorted(set(y[:, 0].tolist())), sorted(set(y[:, 1].tolist())), sorted(set(y[:, 2].tolist()))
        ([1.0], [0.0, 2.0], [0.0])
    """

    def __init__(self, *, batch_dim: int | None = None):
        super().__init__(0.0, batch_dim=batch_dim)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:  # type: ignore[override]  # the rates come with the call
        if not self.training:
            return x
        if not isinstance(p, Tensor):
            raise TypeError(f"p: expected a tensor of probabilities, got {type(p).__name__}; IWDropout takes a number")
        return draw(x, p, self.unit, self.batch_dim, self, self._check)

    def extra_repr(self) -> str:
        return f"batch_dim={self.batch_dim}" if self.batch_dim is not None else ""
