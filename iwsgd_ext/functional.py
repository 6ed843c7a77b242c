"""Noise at an address that is given: no context, no state. The same address gives the same noise on every backend."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checks import check_dtype, check_integer, check_probability, check_sample_ids, check_samples
from .noise import Law, Rows, Unit, alpha_law, dropout_law, make_origin, noise

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


def _form(
    name: str, unit: Unit, summary: str, shape: str, dims: tuple[int, ...] | None, example: str, law: Callable[[float], Law] = dropout_law
):
    rates = law is dropout_law  # whether p may be a tensor

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
        if not (rates and isinstance(p, Tensor)):
            check_probability(p)
            p = law(p)
        return _noise(x, p, unit, shape, dims, samples, seed, stream, sample_ids, first_example, expand, batch_dim, out)

    form.__name__ = form.__qualname__ = name
    result = "x * keep / (1 - p)" if rates else "keep ? a * x + b : a * alpha + b"
    form.__doc__ = summary + "\n" + _ARGS.format(name=name, shape=shape, example=example, rates=_RATES if rates else "", result=result)
    return form


dropout = _form(
    "dropout", "element", "Dropout of independent elements (eq 1, g multiplicative) under K noise samples.", "[B, ...]", None, "2, 6"
)
dropout1d = _form("dropout1d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, L]", (3,), "2, 6, 3")
dropout2d = _form("dropout2d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, H, W]", (4,), "2, 6, 3, 3")
dropout3d = _form("dropout3d", "channel", "Dropout of whole channels under K noise samples.", "[B, C, D, H, W]", (5,), "2, 6, 2, 2, 2")
drop_path = _form("drop_path", "row", "Stochastic depth: whole rows are dropped, under K noise samples.", "[B, ...]", None, "2, 6")
alpha_dropout = _form(
    "alpha_dropout", "element", "Alpha dropout of independent elements under K noise samples.", "[B, ...]", None, "2, 6", alpha_law
)
feature_alpha_dropout = _form(
    "feature_alpha_dropout", "channel", "Alpha dropout of whole channels under K samples.", "[B, C, ...]", _FEATURES, "2, 6, 3", alpha_law
)


def _noise(x, law, unit, shape, dims, samples, seed, stream, sample_ids, first_example, expand, batch_dim, out) -> Tensor:
    check_dtype("x", x)
    if x.dim() == 0 or (dims is not None and x.dim() not in dims):
        raise ValueError(f"x: expected {shape}, got {x.dim()}-D {tuple(x.shape)}")
    check_samples(samples)
    if not -x.dim() <= batch_dim < x.dim():
        raise ValueError(f"batch_dim: expected a dimension of x in [{-x.dim()}, {x.dim()}), got {batch_dim}")
    for name, value in (("seed", seed), ("stream", stream), ("first_example", first_example)):
        check_integer(name, value)
    batch_dim = batch_dim % x.dim()
    rows = x.shape[batch_dim]
    if not expand and rows % samples != 0:
        raise ValueError(f"x: expected a number of rows divisible by samples={samples} where expand=False, got {rows} rows")
    if sample_ids is not None:
        sample_ids = check_sample_ids(sample_ids, samples)
        examples = rows if expand else rows // samples
        if sample_ids.dim() == 2 and sample_ids.shape[1] != examples:
            raise ValueError(f"sample_ids: expected [{samples}, {examples}], got {tuple(sample_ids.shape)}")
        sample_ids = sample_ids.to(x.device)
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
    # As ints where they are: a tensor made of them would cost a copy to the device at each call.
    stream_int, stream = (0, stream) if isinstance(stream, Tensor) else (stream % 2**32, 0)
    first_int, first_example = (0, first_example) if isinstance(first_example, Tensor) else (first_example % 2**32, 0)
    return noise(
        x,
        law,
        unit,
        samples=samples,
        origin=make_origin(seed, stream, first_example, x.device),
        sample_ids=sample_ids,
        stream=stream_int,
        first_example=first_int,
        expand=expand,
        batch_dim=batch_dim,
        out=out,
    )
