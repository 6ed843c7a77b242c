"""Noise (Noh et al. 2017, eq 1) at an address that is given: no context, no state. An address gives the same noise on every backend."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import (
    as_int,
    as_part,
    as_sample_ids,
    as_samples,
    check,
    check_dtype,
    check_flag,
    check_probabilities,
    check_probability,
    check_rate,
    check_std,
)
from .layers.attention import attend, check_attention
from .layers.drop_connect import check_linear, product
from .ops.address import Address, Place, Rows, Unit, make_origin
from .ops.multinomial import multinomial_noise, one_example
from .ops.noise import Rule, alpha_rule, dropout_rule, noise
from .ops.real_noise import Law, dropout_std, real_noise

_ARGS = """
    Args:
        x: {shape} where ``expand``, else with samples * B rows, sample-major. float32, float64, bfloat16, float16; any strides.
        p: probability of being dropped, in [0, 1], rounded to a multiple of 1/65536.{rates}
        samples: K, noise samples for each example.
        seed: the noise's 64-bit seed, an int or an int64 tensor of one element.
        stream: which noise call, modulo 2^32; an int or an int64 tensor of one element.
        sample_ids: ids of the K samples, int64 [K] or [K, B] or a sequence of K ints; 0 .. K-1 by default.
        first_example: id of the first example, an int or an int64 tensor of one element.
        expand: draw K noises for each of B rows, or one for each of K*B rows.
        batch_dim: the dimension that holds the rows.
        out: where the result goes, contiguous (channels_last where x is); for calls that need no gradient.

    Returns:
        {result} with K*B rows, of x's dtype, computed in float32 (float64) and rounded once.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import {name}
        >>> x = torch.ones({example})
        >>> a = {name}(x, 0.5, samples=4, seed=7)
        >>> replay = {name}(x, 0.5, samples=1, seed=7, sample_ids=[2])
        >>> bool((a[4:6] == replay).all())
        True
    """


_FEATURES = (2, 3, 4, 5)  # dimensions of a tensor that has channels
_RATES = """
            Or a tensor of probabilities that broadcasts to what is drawn of x (its rows: 1, B, or as x), float, without gradient."""


class _Form(Protocol):
    """The signature of every form below."""

    def __call__(
        self,
        x: Tensor,
        p: float | Tensor = 0.5,
        *,
        samples: int = 1,
        seed: int | Tensor,
        stream: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        first_example: int | Tensor = 0,
        expand: bool = True,
        batch_dim: int = 0,
        out: Tensor | None = None,
    ) -> Tensor: ...


def _form(
    name: str,
    unit: Unit,
    summary: str,
    shape: str,
    dims: tuple[int, ...] | None,
    example: str,
    rule_of: Callable[[float], Rule] = dropout_rule,
) -> _Form:
    rates = rule_of is dropout_rule  # whether p may be a tensor

    def form(
        x: Tensor,
        p: float | Tensor = 0.5,
        *,
        samples: int = 1,
        seed: int | Tensor,
        stream: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        first_example: int | Tensor = 0,
        expand: bool = True,
        batch_dim: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        rule: Any = p
        if not (rates and isinstance(p, Tensor)):
            check_probability(rule)
            rule = rule_of(rule)
        return _noise(x, rule, unit, shape, dims, samples, seed, stream, sample_ids, first_example, expand, batch_dim, out)

    form.__name__ = form.__qualname__ = name
    result = "x * keep / (1 - p)" if rates else "keep ? a * x + b : a * alpha + b"
    form.__doc__ = summary + "\n" + _ARGS.format(name=name, shape=shape, example=example, rates=_RATES if rates else "", result=result)
    return form


dropout = _form(
    "dropout", "element", "Dropout of independent elements (eq 1, g multiplicative) under K noise samples.", "[B, ...]", None, "2, 6"
)
dropout1d = _form("dropout1d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, L]", (3,), "2, 6, 3")
dropout2d = _form(
    "dropout2d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, H, W] or [B, C, L]", (3, 4), "2, 6, 3, 3"
)
dropout3d = _form("dropout3d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, D, H, W]", (5,), "2, 6, 2, 2, 2")
drop_path = _form("drop_path", "row", "Stochastic depth: whole rows are dropped, under K noise samples.", "[B, ...]", None, "2, 6")
alpha_dropout = _form(
    "alpha_dropout", "element", "Alpha dropout of independent elements under K noise samples.", "[B, ...]", None, "2, 6", alpha_rule
)
feature_alpha_dropout = _form(
    "feature_alpha_dropout", "channel", "Alpha dropout of whole channels under K samples.", "[B, C, ...]", _FEATURES, "2, 6, 3", alpha_rule
)


def _noise(x, rule, unit, shape, dims, samples, seed, stream, sample_ids, first_example, expand, batch_dim, out) -> Tensor:
    check_dtype("x", x)
    if x.dim() == 0 or (dims is not None and x.dim() not in dims):
        raise ValueError(f"x: expected {shape}, got {x.dim()}-D {tuple(x.shape)}")
    place = _place(x, samples, seed, stream, sample_ids, first_example, expand, batch_dim)
    samples, batch_dim, rows = place.address.samples, place.batch_dim, x.shape[place.batch_dim]
    if out is not None:
        result = list(x.shape)
        result[batch_dim] = rows * samples if expand else rows
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("out: expected a call that needs no gradient, but x requires grad")
        if list(out.shape) != result or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(f"out: expected {result} {x.dtype} on {x.device}, got {list(out.shape)} {out.dtype} on {out.device}")
        layout = Rows.of(x, batch_dim)
        if not out.permute(layout.order(x.dim())).is_contiguous():
            order = "channels_last" if layout.channels_last else "contiguous"
            raise ValueError(f"out: expected a tensor that is {order}, as the result is, got strides {out.stride()}")
    return noise(x, rule, unit, place, out)


def _place(x, samples, seed, stream, sample_ids, first_example, expand, batch_dim) -> Place:
    """The place of a call, checked: the arguments that every noise shares."""
    samples, batch_dim = as_samples(samples), as_int("batch_dim", batch_dim)
    if not -x.dim() <= batch_dim < x.dim():
        raise ValueError(f"batch_dim: expected a dimension of x in [{-x.dim()}, {x.dim()}), got {batch_dim}")
    seed, stream, first_example = as_part("seed", seed), as_part("stream", stream), as_part("first_example", first_example)
    batch_dim = batch_dim % x.dim()
    rows = x.shape[batch_dim]
    if not expand and rows % samples != 0:
        raise ValueError(f"x: expected a number of rows divisible by samples={samples} where expand=False, got {rows} rows")
    if sample_ids is not None:
        sample_ids = as_sample_ids(sample_ids, samples)
        examples = rows if expand else rows // samples
        if sample_ids.dim() == 2 and sample_ids.shape[1] != examples:
            raise ValueError(f"sample_ids: expected [{samples}, {examples}], got {tuple(sample_ids.shape)}")
        sample_ids = sample_ids.to(x.device)
    # As ints where they are: a tensor made of them would cost a copy to the device at each call.
    stream_int, stream = (0, stream) if isinstance(stream, Tensor) else (stream % 2**32, 0)
    first_int, first_example = (0, first_example) if isinstance(first_example, Tensor) else (first_example % 2**32, 0)
    origin = make_origin(seed, stream, first_example, x.device)
    return Place(Address(origin, sample_ids, samples, stream_int, first_int), expand, batch_dim)


def gaussian_dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    samples: int = 1,
    seed: int | Tensor,
    stream: int | Tensor = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    first_example: int | Tensor = 0,
    expand: bool = True,
    batch_dim: int = 0,
) -> Tensor:
    """Gaussian dropout: x * (1 + sqrt(p / (1 - p)) z) with independent z ~ N(0, 1) (eq 1, g multiplicative), under K noise samples.

    Args:
        x: [B, ...] where ``expand``, else with samples * B rows, sample-major. float32, float64, bfloat16, float16; any strides.
        p: rate of the dropout whose noise has the same variance, in [0, 1).
        samples: K, noise samples for each example.
        seed, stream, sample_ids, first_example: the noise's address, as in :func:`dropout`.
        expand: draw K noises for each of B rows, or one for each of K*B rows.
        batch_dim: the dimension that holds the rows.

    Returns:
        The noisy x with K*B rows, of x's dtype, computed in float32 (float64) and rounded once; z within 5e-5 on every backend.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import gaussian_dropout
        >>> x = torch.ones(2, 6)
        >>> a = gaussian_dropout(x, 0.5, samples=4, seed=7)
        >>> replay = gaussian_dropout(x, 0.5, samples=1, seed=7, sample_ids=[2])
        >>> bool((a[4:6] == replay).all())
        True
    """
    _check_input(x)
    check_rate(p)
    place = _place(x, samples, seed, stream, sample_ids, first_example, expand, batch_dim)
    return real_noise(x, "normal", dropout_std(p), True, place)


_REAL_ARGS = """
    Args:
        x: [B, ...] where ``expand``, else with samples * B rows, sample-major. float32, float64, bfloat16, float16; any strides.
        std: standard deviation of the noise, a finite number >= 0; in units of x where it is added, and of 1 where it multiplies.
        multiply: the noise multiplies x, x * (1 + std z), instead of being added.
        samples: K, noise samples for each example.
        seed, stream, sample_ids, first_example: the noise's address, as in :func:`dropout`.
        expand: draw K noises for each of B rows, or one for each of K*B rows.
        batch_dim: the dimension that holds the rows.

    Returns:
        The noisy x with K*B rows, of x's dtype, computed in float32 (float64) and rounded once; z within 5e-5 on every backend.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import {name}
        >>> y = {name}(torch.zeros(2, 1000), 3.0, samples=4, seed=7)
        >>> y.shape, round(y.std().item())
        (torch.Size([8, 1000]), 3)
    """


class _RealForm(Protocol):
    """The signature of every form below."""

    def __call__(
        self,
        x: Tensor,
        std: float = 1.0,
        *,
        multiply: bool = False,
        samples: int = 1,
        seed: int | Tensor,
        stream: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        first_example: int | Tensor = 0,
        expand: bool = True,
        batch_dim: int = 0,
    ) -> Tensor: ...


def _real_form(name: str, law: Law, summary: str) -> _RealForm:
    def form(
        x: Tensor,
        std: float = 1.0,
        *,
        multiply: bool = False,
        samples: int = 1,
        seed: int | Tensor,
        stream: int | Tensor = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        first_example: int | Tensor = 0,
        expand: bool = True,
        batch_dim: int = 0,
    ) -> Tensor:
        _check_input(x)
        check_std(std)
        check_flag("multiply", multiply)
        return real_noise(x, law, std, multiply, _place(x, samples, seed, stream, sample_ids, first_example, expand, batch_dim))

    form.__name__ = form.__qualname__ = name
    form.__doc__ = summary + "\n" + _REAL_ARGS.format(name=name)
    return form


gaussian_noise = _real_form(
    "gaussian_noise", "normal", "Gaussian noise (eq 1): x + std z with independent z ~ N(0, 1), under K noise samples."
)
laplace_noise = _real_form(
    "laplace_noise",
    "laplace",
    "Laplace noise (eq 1): x + std z with independent z of density exp(-sqrt(2) |z|) / sqrt(2), under K noise samples.",
)
uniform_noise = _real_form(
    "uniform_noise", "uniform", "Uniform noise (eq 1): x + std z with independent z uniform in [-sqrt(3), sqrt(3)], under K noise samples."
)


def multinomial_dropout(
    x: Tensor,
    probabilities: Tensor | None,
    draws: int,
    *,
    samples: int = 1,
    seed: int | Tensor,
    stream: int | Tensor = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    first_example: int | Tensor = 0,
    expand: bool = True,
    batch_dim: int = 0,
) -> Tensor:
    """Multinomial dropout (Li, Gong and Yang 2016): x * n / (draws * q) with counts n ~ Mult(draws; q), under K noise samples.

    Args:
        x: [B, ...] where ``expand``, else with samples * B rows, sample-major. float32, float64, bfloat16, float16; any strides.
        probabilities: q up to its sum, of the shape of one example, >= 0; below 2^-33 of the sum is 0. None is uniform.
        draws: features drawn for each row, with replacement, in 1 .. 2^31 - 1. Feature f is its row-major index within the example.
        samples: K, noise samples for each example.
        seed, stream, sample_ids, first_example: the noise's address, as in :func:`dropout`.
        expand: draw K noises for each of B rows, or one for each of K*B rows.
        batch_dim: the dimension that holds the rows.

    Returns:
        The noisy x with K*B rows, of x's dtype, computed in float32 (float64) and rounded once. The counts are the same on every backend.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it, what was expected and what came.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import multinomial_dropout
        >>> multinomial_dropout(torch.ones(2, 4), None, 2, seed=3).sum(1)
        tensor([4., 4.])
    """
    _check_input(x)
    draws = as_int("draws", draws)
    check(1 <= draws < 2**31, "draws", "an integer in 1 .. 2^31 - 1", draws)
    place = _place(x, samples, seed, stream, sample_ids, first_example, expand, batch_dim)
    if probabilities is not None:
        check_probabilities(probabilities, one_example(x, place.batch_dim))
    return multinomial_noise(x, probabilities, draws, place)


def _check_input(x: Tensor) -> None:
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected [B, ...], got 0-D ()")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    samples: int = 1,
    seed: int | Tensor,
    stream: int | Tensor = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    first_example: int | Tensor = 0,
    expand: bool = True,
) -> Tensor:
    """:func:`iwsgd_ext.scaled_dot_product_attention` with the noise of a given address on the probabilities.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as there.
        samples, seed, stream, sample_ids, first_example: as in :func:`dropout`.
        expand: query, key and value all have B rows; else the one with most has samples * B, and the others that or B.

    Returns:
        [samples * B, ..., T, V], also where dropout_p is 0.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import scaled_dot_product_attention
        >>> q = k = v = torch.ones(2, 4, 5, 8)
        >>> scaled_dot_product_attention(q, k, v, dropout_p=0.1, samples=3, seed=0).shape
        torch.Size([6, 4, 5, 8])
    """
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    samples = as_samples(samples)
    rows = max(x.shape[0] for x in (query, key, value))
    if not expand and rows % samples != 0:
        raise ValueError(f"query, key, value: expected rows divisible by samples={samples} where expand=False, got {rows} rows")
    batch = rows if expand else rows // samples

    def noise(probabilities: Tensor) -> Tensor:
        address: dict[str, Any] = {
            "samples": samples,
            "seed": seed,
            "stream": stream,
            "sample_ids": sample_ids,
            "first_example": first_example,
        }
        return dropout(probabilities, dropout_p, expand=probabilities.shape[0] == batch, **address)

    masks = [] if attn_mask is None else [attn_mask]
    return attend(query, key, value, masks, is_causal, scale, samples, batch, noise)[0]


def drop_connect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    *,
    drop_bias: bool = False,
    samples: int = 1,
    seed: int | Tensor,
    stream: int | Tensor = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    expand: bool = True,
    batch_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.linear` under K noises of the weights (eq 1, g the layer): all examples of a sample share one mask.

        y[s, b] = (keep[s] / (1 - p) * weight) x[b] + bias        keep[s] ~ Bernoulli(1 - p) of the weight's shape

    Args:
        x: [B, ..., in] where ``expand``, else with samples * B rows, sample-major.
        weight: [out, in], of x's dtype. Its flat index is the noise's position; the example is 0 for all rows.
        bias: [out], without noise unless ``drop_bias``.
        p: probability of a weight to be dropped.
        drop_bias: draws a mask for the bias too, of the next stream.
        samples, seed, stream: as in :func:`dropout`.
        sample_ids: ids of the K samples, [K].
        expand: whether x has B rows or K*B.
        batch_dim: the dimension that holds the rows, not the last.

    Returns:
        [K*B, ..., out]. K copies of the weight are made.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> import torch
        >>> from iwsgd_ext.functional import drop_connect
        >>> drop_connect(torch.ones(2, 6), torch.ones(5, 6), samples=4, seed=7).shape
        torch.Size([8, 5])
    """
    samples = as_samples(samples)
    batch_dim = check_linear(x, weight, bias, as_int("batch_dim", batch_dim))
    if not expand and x.shape[batch_dim] % samples != 0:
        raise ValueError(f"x: expected a number of rows divisible by samples={samples} where expand=False, got {x.shape[batch_dim]} rows")
    if isinstance(sample_ids, Tensor) and sample_ids.dim() != 1:
        raise ValueError(f"sample_ids: expected [{samples}], as all examples of a sample share weights, got {tuple(sample_ids.shape)}")
    address: dict[str, Any] = {"samples": samples, "seed": seed, "sample_ids": sample_ids}
    weights = dropout(weight.reshape(1, -1), p, stream=stream, **address).view(samples, *weight.shape)
    if bias is not None and drop_bias:
        bias = dropout(bias[None], p, stream=stream + 1, **address)
    return product(x, weights, bias, expand, batch_dim)
