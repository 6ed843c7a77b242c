"""Attention with S noise samples per example: drop-in for torch's, with the dropout of probabilities drawn from the sampling context.

Expanded rows (S*B) and rows that are not (B) may meet: say, queries after a noise layer, and a memory before it. Tensors of B rows are
projected once for all samples; where queries and keys both have B rows, so is their softmax.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check, check_dtype, check_probability
from ..ops.noise import dropout_rule
from .context import ambient, current, draw


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` with S noise samples per example inside ``iw.sampling(S)``.

        out[s, b] = (keep[s, b] / (1 - p) * softmax(scale q[s, b] k[s, b]^T + mask)) v[s, b]        keep ~ Bernoulli(1 - p)

    (Noh et al. 2017, eq 1). One call takes one stream; the position of a probability is its index in [..., T, U]. Where ``query`` and
    ``key`` have B rows, the softmax is computed once and the noise expands it. With ``dropout_p=0`` nothing is drawn or expanded: torch's
    function is called, unless B rows and S*B rows meet. As with torch's function, the caller passes 0 in eval mode.

    Memory: unlike fused attention this makes the probabilities of all samples, S*B*T*U numbers a head, and keeps them for backward.

    Args:
        query: [R, ..., T, E], its rows R either B or S*B (sample-major), the same for key and value, not necessarily alike.
            Usually [R, H, T, E] or [R, T, E]. float32, float64, bfloat16, float16.
        key: [R, ..., U, E].
        value: [R, ..., U, V].
        attn_mask: broadcasts to [R, ..., T, U], with B or S*B rows where it has rows. Boolean (True takes part), or numbers added to
            the scores.
        dropout_p: probability that an attention probability is dropped, in [0, 1].
        is_causal: True lets position t see the positions up to t only.
        scale: of the scores; 1 / sqrt(E) by default.
        enable_gqa: key and value may have fewer heads (the third dimension from the end) than the query, by a whole factor.

    Returns:
        [S*B, ..., T, V].

    Raises:
        ValueError, TypeError: an argument is not as above, or both ``attn_mask`` and ``is_causal`` are given.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> q = k = v = torch.randn(2, 4, 5, 8)
        >>> with iw.sampling(3):
        ...     out = iw.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        >>> out.shape
        torch.Size([6, 4, 5, 8])
    """
    context = current()
    # In a compiled graph torch's batching calls fused attention once for each sample; attend() batches the products of all samples.
    on_axis = context is not None and context.axis is not None and torch.compiler.is_compiling() and query.dim() > 2
    if dropout_p == 0 and not on_axis and (context is None or not _rows_meet(query, key, value, attn_mask)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    context = ambient(scaled_dot_product_attention)
    batch = context.examples(max(x.shape[0] for x in (query, key, value)))

    def noise(probabilities: Tensor) -> Tensor:
        return draw(probabilities, dropout_rule(dropout_p), "element", 0, scaled_dot_product_attention) if dropout_p > 0 else probabilities

    masks = [] if attn_mask is None else [attn_mask]
    return attend(query, key, value, masks, is_causal, scale, context.samples, batch, noise)[0]


def _rows_meet(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """True where the numbers of rows differ, apart from 1, which torch's function may broadcast."""
    if query.is_nested:
        return False
    rows = [x.shape[0] for x in (query, key, value, attn_mask) if x is not None and x.dim() == query.dim() and x.shape[0] != 1]
    return any(n != rows[0] for n in rows)


def check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> None:
    check_probability(dropout_p, "dropout_p")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_dtype(name, x)
        check(x.dim() >= 3, name, "[rows, ..., positions, features]", tuple(x.shape))
        check(x.dim() == query.dim(), name, "query's number of dimensions", tuple(x.shape))
    check(key.shape[-1] == query.shape[-1], "key", "query's number of features", tuple(key.shape))
    check(value.shape[-2] == key.shape[-2], "value", "key's number of positions", tuple(value.shape))
    fewer = enable_gqa and query.dim() > 3 and query.shape[-3] % max(key.shape[-3], 1) == 0
    ends = -3 if fewer else -2
    alike = all(m in (n, 1) for m, n in zip(key.shape[1:ends], query.shape[1:ends], strict=True))
    check(alike, "key", "query's sizes between rows and positions, or 1" + " (or a factor of its heads)" * enable_gqa, tuple(key.shape))
    check(value.shape[1:-2] == key.shape[1:-2], "value", "key's sizes between rows and positions", tuple(value.shape))
    if attn_mask is not None:
        check(not is_causal, "attn_mask", "None where is_causal", "both")
        check(attn_mask.dim() <= query.dim(), "attn_mask", "at most query's number of dimensions", tuple(attn_mask.shape))
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask: expected bool or floating-point, got {attn_mask.dtype}")


def check_masks(key_padding_mask: Tensor | None, attn_mask: Tensor | None, length: int, positions: int, heads: int) -> None:
    """Checks the masks of multi-head attention. A mask that would have to be broadcast raises, as in torch."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name}: expected bool or floating-point, got {mask.dtype}")
    if key_padding_mask is not None:
        fits = key_padding_mask.dim() == 2 and key_padding_mask.shape[1] == positions
        check(fits, "key_padding_mask", "[rows, U] of key's U positions", tuple(key_padding_mask.shape))
    if attn_mask is not None:
        fits = attn_mask.dim() in (2, 3) and attn_mask.shape[-2] == length and attn_mask.shape[-1] == positions
        fits = fits and (attn_mask.dim() == 2 or attn_mask.shape[0] % heads == 0)
        check(fits, "attn_mask", "[T, U] or [rows * heads, T, U] of query's T and key's U positions", tuple(attn_mask.shape))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[Tensor],
    is_causal: bool,
    scale: float | None,
    samples: int,
    batch: int,
    noise: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(out [R, ..., T, V], noisy probabilities [R, ..., T, U]); each argument has B or S*B rows, and so has the result of ``noise``.

    Rows become two dimensions [S or 1, B], so that a tensor of B rows is broadcast over the samples, and not repeated.
    """
    q = _by_samples("query", query, samples, batch)
    k = _by_samples("key", key, samples, batch)
    v = _by_samples("value", value, samples, batch)
    # Heads that share a key are folded into its positions, so that no key is repeated.
    groups = q.shape[-3] // k.shape[-3] if q.dim() > 4 else 1
    scores = _unfold(_fold(q * (q.shape[-1] ** -0.5 if scale is None else scale), groups) @ k.transpose(-2, -1), groups)
    causal = [torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()] if is_causal else []
    for mask in (*masks, *causal):
        if mask.dim() == query.dim() and mask.shape[0] != 1:
            mask = _by_samples("attn_mask", mask, samples, batch)
        scores = scores.masked_fill(~mask, -float("inf")) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if masks:
        # A position that sees no other (under a causal mask there is none) gets zeros, as from torch's function, and not NaN.
        nowhere = scores.detach().amax(-1, keepdim=True) == -float("inf") if scores.shape[-1] else scores.new_ones((), dtype=torch.bool)
        probabilities = torch.softmax(scores.masked_fill(nowhere, 0.0), -1).masked_fill(nowhere, 0.0)
    else:
        probabilities = torch.softmax(scores, -1)
    # Contiguous, whatever the product's layout: noise positions follow the order of memory.
    noisy = noise(probabilities.flatten(0, 1).contiguous())
    out = _unfold(_fold(_by_samples("probabilities", noisy, samples, batch), groups) @ v, groups)
    return out.flatten(0, 1), noisy


def _by_samples(name: str, x: Tensor, samples: int, batch: int) -> Tensor:
    """[S, B, ...] of S*B rows, [1, B, ...] of B, [1, 1, ...] of one."""
    rows = x.shape[0]
    if rows == samples * batch:
        return x.unflatten(0, (samples, batch))
    if rows != batch and rows != 1:
        raise ValueError(f"{name}: expected {batch} rows, or {samples} samples * {batch} = {samples * batch}, got {rows}")
    return x.unsqueeze(0)


def _fold(x: Tensor, groups: int) -> Tensor:
    """[..., H * G, T, E] -> [..., H, G * T, E]."""
    return x if groups == 1 else x.unflatten(-3, (-1, groups)).flatten(-3, -2)


def _unfold(x: Tensor, groups: int) -> Tensor:
    """[..., H, G * T, E] -> [..., H * G, T, E]."""
    return x if groups == 1 else x.unflatten(-2, (groups, -1)).flatten(-4, -3)


class IWMultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with S noise samples per example inside ``iw.sampling(S)`` (Noh et al. 2017, eq 1).

    Parameters, constructor and state_dict are torch's, so a module's class can be swapped in place. In eval mode, and with dropout=0, it
    is torch's module, fast paths included. In training the dropout of the attention probabilities is drawn from the sampling context,
    one stream a call; outside of any it is one fresh sample. Tensors of B rows are projected once for all samples.

    Args:
        as :class:`torch.nn.MultiheadAttention`; ``dropout`` is the probability that an attention probability is dropped.

    Shape:
        query, key and value have B or S*B rows each, in dimension 0 where ``batch_first``, else 1 (the context's ``batch_dim`` is not
        used); so may the masks. The result has S*B rows.

    Returns:
        (out, attention weights after dropout, or None), as torch's module.

    Raises:
        ValueError: the number of rows is neither B nor S*B; an unbatched input inside of a sampling context (it has no rows to expand).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> layer = torch.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        >>> layer.__class__ = iw.IWMultiheadAttention
        >>> x = torch.randn(2, 5, 8)
        >>> with iw.sampling(3):
        ...     out, weights = layer(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([6, 5, 8]), torch.Size([6, 5, 5]))
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        weights: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
        if not self.training or (self.dropout == 0 and self._rows_are_alike(query, key, value, **masks)):
            return super().forward(query, key, value, is_causal=is_causal, **masks, **weights)
        check_probability(self.dropout, "dropout")
        check(not query.is_nested, "query", "a tensor that is not nested, in training", "a nested one")
        check(attn_mask is not None or not is_causal, "attn_mask", "the causal mask where is_causal (which is a hint)", "None")
        dim = 0 if self.batch_first else 1
        if query.dim() == 2:
            check(current() is None, "query", "rows to expand, [rows, T, E] or [T, rows, E], in iw.sampling", "an unbatched one")
            padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            q, k, v = (x.unsqueeze(dim) for x in (query, key, value))
            out, mean = self.forward(q, k, v, padding, attn_mask=attn_mask, **weights)
            return out.squeeze(dim), None if mean is None else mean.squeeze(0)
        for name, x in (("query", query), ("key", key), ("value", value)):
            check(x.dim() == 3, name, "[rows, T, E] where batch_first, else [T, rows, E]", tuple(x.shape))
        length, positions = query.shape[1 - dim], key.shape[1 - dim]
        check(value.shape[1 - dim] == positions, "value", "key's number of positions", tuple(value.shape))
        check_masks(key_padding_mask, attn_mask, length, positions, self.num_heads)

        context = ambient(self)
        batch = context.examples(max(x.shape[dim] for x in (query, key, value)))
        q, k, v = self._project(query, key, value)
        more = 0
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._append(k, self.bias_k, dim), self._append(v, self.bias_v, dim)
            more = k.shape[1 - dim] - positions
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).movedim(dim, 0).transpose(1, 2) for x in (q, k, v))  # [R, H, T, D]

        def noise(probabilities: Tensor) -> Tensor:
            return draw(probabilities, dropout_rule(self.dropout), "element", 0, self) if self.dropout > 0 else probabilities

        out, noisy = attend(q, k, v, self._masks(more, **masks), False, None, context.samples, batch, noise)
        out = F.linear(out.transpose(1, 2).movedim(0, dim).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out, (noisy.mean(1) if average_attn_weights else noisy) if need_weights else None

    def _rows_are_alike(self, query, key, value, key_padding_mask, attn_mask) -> bool:
        if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
            return True
        dim = 0 if self.batch_first else 1
        rows = [x.shape[dim] for x in (query, key, value)]
        if key_padding_mask is not None:
            rows.append(key_padding_mask.shape[0])
        if attn_mask is not None and attn_mask.dim() == 3:
            rows.append(attn_mask.shape[0] // self.num_heads)
        return all(n == rows[0] for n in rows)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        w, b, e = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                return F.linear(query, w, b).chunk(3, -1)
            both = F.linear(key, w[e:], None if b is None else b[e:])
            return F.linear(query, w[:e], None if b is None else b[:e]), *both.chunk(2, -1)
        weights = w.chunk(3) if self._qkv_same_embed_dim else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if b is None else b.chunk(3)
        return [F.linear(x, *parameters) for x, *parameters in zip((query, key, value), weights, biases, strict=True)]

    def _append(self, x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        """x and after its last position the bias (add_bias_kv), and zeros (add_zero_attn)."""
        zeros = x.new_zeros(x.shape[0] if dim == 0 else 1, 1 if dim == 0 else x.shape[1], x.shape[2])
        parts = [x] if bias is None else [x, bias.to(x.dtype).expand_as(zeros)]
        return torch.cat([*parts, zeros] if self.add_zero_attn else parts, 1 - dim)

    def _masks(self, more: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> list[Tensor]:
        """The masks as :func:`attend` takes them: [R, H, T, U] or less, True takes part."""
        masks = []
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        masks = [F.pad(mask, (0, more)) for mask in masks] if more else masks
        return [~mask if mask.dtype == torch.bool else mask for mask in masks]
