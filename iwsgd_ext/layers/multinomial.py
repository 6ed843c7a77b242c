"""The layer of multinomial dropout."""

from typing import Any

from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from ..checks import check_layer_input, check_probabilities, check_rate
from ..ops import transforms
from ..ops.multinomial import multinomial_noise, one_example
from .context import ambient


class IWMultinomialDropout(nn.modules.dropout._DropoutNd):
    """Multinomial dropout (Li, Gong and Yang 2016) with S noise samples per example: k draws of features, with replacement.

        y[s, b, f] = x[b, f] * n[s, b, f] / (k q[f])        n ~ Mult(k; q), k = round((1 - p) F)   (Noh et al. 2017, eq 1)

    F is the number of elements of one example, whose probabilities q sum up to 1. Activations are unbiased; a feature of larger q is
    dropped more rarely and scaled less. In eval mode the layer is the identity. In training outside of any context: one fresh sample,
    no expansion. There are no parameters, and a state_dict is empty.

    Args:
        p: k = round((1 - p) F), at least 1: as many draws as there are elements that dropout of this rate keeps. In [0, 1).
        probabilities: q up to its sum, of the shape of one example, >= 0; None is uniform; "evolutional" takes the root mean square of each
            feature over the batch, by noise sample where rows are expanded already (so that samples in chunks draw the same).
        batch_dim: dimension that holds the rows; None takes the context's (0 by default).

    Shape:
        [B, ...] -> [S*B, ...] for the first noise layer, [S*B, ...] -> [S*B, ...] after it; float32, float64, bfloat16, float16.

    Raises:
        ValueError: p outside of [0, 1); probabilities of another shape, negative, or all 0; rows that are neither B nor S*B; evolutional
            probabilities of expanded rows where sample_ids differ among examples.
        TypeError: an input that is not floating-point.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> noise = iw.IWMultinomialDropout(0.5)
        >>> with iw.sampling(3, seed=1):
        ...     y = noise(torch.ones(2, 8))
        >>> y.sum(1).tolist()  # 4 draws of features that count 2 each
        [8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    """

    def __init__(self, p: float = 0.5, *, probabilities: Tensor | str | None = None, batch_dim: int | None = None):
        check_rate(p)
        super().__init__(p)
        self.evolutional = isinstance(probabilities, str)
        if isinstance(probabilities, str) and probabilities != "evolutional":
            raise ValueError(f"probabilities: expected a tensor, None or 'evolutional', got {probabilities!r}")
        given = None if isinstance(probabilities, str) else probabilities
        if given is not None:
            check_probabilities(given)
        self.register_buffer("probabilities", given, persistent=False)
        self.batch_dim = batch_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        check_rate(self.p)
        check_layer_input(self, x)
        place = ambient(self).place(x, self.batch_dim)
        probabilities: Any = "evolutional" if self.evolutional else self.probabilities
        if isinstance(probabilities, Tensor):
            check_probabilities(probabilities, one_example(x, place.batch_dim))
        ids = place.address.sample_ids
        shared = place.expand or (transforms.active() and not is_batchedtensor(x))  # by all samples
        if self.evolutional and not shared and ids is not None and ids.dim() == 2:
            expected = f"[{place.address.samples}] where evolutional probabilities are those of one sample's expanded rows"
            raise ValueError(f"sample_ids: expected {expected}, got {tuple(ids.shape)} (strategy='resampled' draws for each example)")
        return multinomial_noise(x, probabilities, 1.0 - self.p, place)

    def extra_repr(self) -> str:
        evolutional = ", probabilities='evolutional'" if self.evolutional else ""
        return f"p={self.p}{evolutional}" + (f", batch_dim={self.batch_dim}" if self.batch_dim is not None else "")
