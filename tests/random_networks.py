"""Random small networks: what people write in a forward, in any order. ``network(seed)`` gives the same one each time.

A network keeps a pool of tensors [B, T, F] (F is 4) and applies 3 to 12 operations to members of the pool, old ones and new ones, with
noise or without. An operation stands in the forward of the network itself or in a submodule of its own. Two networks of one seed are
equal. ``network(seed, only=[...])`` draws from those operations alone.
"""

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import iwsgd_ext as iw

WIDTH, TOKENS, LONGEST = 4, 8, 40
OPS: dict[str, tuple[float, Callable | None, Callable]] = {}  # name: (weight, builder of what it holds, function)


@dataclasses.dataclass
class Inputs:
    x: Tensor  # [B, T, F]
    tokens: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]


class Holder(nn.Module):
    """The layers and settings of one operation."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def first_of(self, h: Tensor, g: Tensor) -> Tensor:
        return h + g if h.flatten()[0] > 0 else h - g


def run_section(m: Holder, h: Tensor, g: Tensor, given: Inputs) -> Tensor:
    for name, inner in zip(m.names, m.inner, strict=True):
        h = OPS[name][2](inner, h, g, given)
    return h


def op(weight: float = 1.0, build: Callable | None = None):
    """build(random.Random) -> dict of what the operation holds; the operation is (holder, h, g, inputs) -> tensor like h."""

    def add(f):
        OPS[f.__name__] = weight, build, f
        return f

    return add


def rate(r):
    return r.choice([0.1, 0.3, 0.5, 0.5, 0.7] + [0.0, 1.0] * (r.random() < 0.1))


def lin(r=None, of=WIDTH):
    return nn.Linear(of, WIDTH)


def table(*shape):
    return nn.Parameter(torch.randn(*shape) / 2)


def ramp(h):
    """Breaks ties, of which dropout makes many."""
    return torch.arange(h.numel(), dtype=h.dtype).sin().view(h.shape) / 7


# Plain layers and skips


@op(3, lambda r: {"a": lin()})
def linear(m, h, g, given):
    return m.a(h)


@op(2, lambda r: {"a": lin()})
def linear_tanh(m, h, g, given):
    return m.a(h).tanh()


@op(1, lambda r: {"a": nn.Sequential(lin(), nn.ReLU(inplace=True), nn.Dropout(rate(r)), lin())})
def mlp(m, h, g, given):
    return h + m.a(h)


@op(2)
def add(m, h, g, given):
    return h + g


@op(1)
def product(m, h, g, given):
    return h * g.sigmoid()


@op(1, lambda r: {"a": lin(of=2 * WIDTH)})
def concat(m, h, g, given):
    return m.a(torch.cat([h, g], -1))


@op(0.5, lambda r: {"a": lin(of=2 * WIDTH)})
def concat_input(m, h, g, given):
    return m.a(torch.cat([given.x, h], -1))


# Dropout


@op(5, lambda r: {"d": nn.Dropout(rate(r))})
def dropout(m, h, g, given):
    return m.d(h)


@op(1, lambda r: {"d": nn.Dropout1d(rate(r))})
def dropout1d(m, h, g, given):
    return m.d(h.transpose(1, 2)).transpose(1, 2)


@op(1, lambda r: {"d": nn.Dropout1d(rate(r))})
def dropout1d_of_steps(m, h, g, given):
    return m.d(h)


@op(1, lambda r: {"d": nn.Dropout2d(rate(r))})
def dropout2d(m, h, g, given):
    return m.d(h.unflatten(2, (2, 2))).flatten(2)


@op(1, lambda r: {"d": nn.Dropout2d(rate(r)), "a": lin()})
def dropout2d_channels_last(m, h, g, given):
    y = m.a(h).unflatten(1, (h.shape[1], 1)).permute(0, 3, 1, 2)
    return m.d(y).permute(0, 2, 3, 1).squeeze(2)


@op(1.5, lambda r: {"d": nn.Dropout(rate(r)), "order": r.sample([1, 2, 3], 3), "a": lin(), "late": r.random() < 0.5})
def dropout_of_permuted(m, h, g, given):
    y = m.a(h).unflatten(2, (2, 2)).permute(0, *m.order)
    if m.late:
        y = y.tanh() + g.unflatten(2, (2, 2)).permute(0, *m.order)
    y = m.d(y)
    back = [0, *(1 + m.order.index(d) for d in (1, 2, 3))]
    return y.permute(back).flatten(2)


@op(0.7, lambda r: {"d": nn.Dropout(rate(r)), "a": lin(), "dim": r.choice([0, 1, 2, 3])})
def dropout_of_stacked(m, h, g, given):
    return m.d(torch.stack([h, g], m.dim)).mean(m.dim)


@op(1, lambda r: {"d": nn.AlphaDropout(rate(r))})
def alpha_dropout(m, h, g, given):
    return m.d(h).tanh()


@op(1, lambda r: {"d": nn.FeatureAlphaDropout(rate(r))})
def feature_alpha_dropout(m, h, g, given):
    return m.d(h.transpose(1, 2)).transpose(1, 2).tanh()


@op(2, lambda r: {"p": rate(r)})
def f_dropout(m, h, g, given):
    return F.dropout(h, m.p, training=m.training)


@op(0.5, lambda r: {"p": rate(r)})
def torch_dropout(m, h, g, given):
    return torch.dropout(h, m.p, m.training)


@op(0.5, lambda r: {"p": rate(r)})
def f_feature_dropouts(m, h, g, given):
    return F.dropout1d(h, m.p, m.training) + F.alpha_dropout(g, m.p, m.training) + F.feature_alpha_dropout(h, m.p, m.training)


@op(0.7, lambda r: {"p": rate(r)})
def f_dropout_in_place(m, h, g, given):
    y = h.clone()
    F.dropout(y, m.p, m.training, inplace=True)
    return y


@op(0.5, lambda r: {"p": rate(r)})
def torch_dropout_in_place(m, h, g, given):
    y = h * 1
    torch.dropout_(y, m.p, m.training)
    return y + g


@op(0.5, lambda r: {"p": rate(r)})
def f_dropout_in_place_of_view(m, h, g, given):
    y = h.clone()
    F.dropout(y[:, :1], m.p, m.training, True)
    return y


@op(0.7, lambda r: {"d": nn.Dropout(rate(r), inplace=True)})
def dropout_module_in_place(m, h, g, given):
    return m.d(h.clone())


class DropPath(nn.Module):
    def __init__(self, drop_prob, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * (keep / (1 - self.drop_prob))


@op(1, lambda r: {"d": DropPath(r.choice([0.2, 0.5])), "a": lin()})
def drop_path(m, h, g, given):
    return h + m.d(m.a(h).tanh())


@op(1, lambda r: {"d": nn.Dropout(rate(r))})
def dropout_of_masked_rows(m, h, g, given):
    y = h.clone()
    y[given.mask] = m.d(h[given.mask])
    return y


@op(0.5, lambda r: {"d": nn.Dropout(rate(r)), "n": r.choice([1, 2, 3])})
def dropout_again(m, h, g, given):
    for _ in range(m.n):
        h = m.d(h)
    return h


@op(0.5, lambda r: {"d": nn.Dropout(rate(r))})
def dropout_of_ones(m, h, g, given):
    return h * m.d(torch.ones(h.shape[0], 1, WIDTH, dtype=h.dtype))


@op(0.5, lambda r: {"d": nn.Dropout(rate(r))})
def dropout_of_pair(m, h, g, given):
    a, b = m.d(torch.cat([h, g])).chunk(2)
    return a - b


@op(0.4, lambda r: {"d": nn.Dropout(rate(r))})
def dropout_of_expanded(m, h, g, given):
    return h + m.d(g[:1].expand_as(h))


# Tables that no example owns


@op(1, lambda r: {"d": nn.Dropout(rate(r)), "t": table(LONGEST, WIDTH)})
def dropout_of_positions(m, h, g, given):
    return h + m.d(m.t[: h.shape[1]])


@op(1, lambda r: {"t": table(LONGEST, WIDTH)})
def positions(m, h, g, given):
    return h + m.t[: h.shape[1]][None]


@op(1, lambda r: {"t": nn.Embedding(TOKENS, WIDTH), "p": rate(r)})
def dropout_of_embedding_table(m, h, g, given):
    return h + F.embedding(given.tokens, F.dropout(m.t.weight, m.p, m.training))


@op(1, lambda r: {"t": nn.Embedding(TOKENS, WIDTH, padding_idx=r.choice([None, 0])), "d": nn.Dropout(rate(r))})
def embedding(m, h, g, given):
    return g + m.d(m.t(given.tokens))


@op(0.5, lambda r: {"t": table(TOKENS, WIDTH), "d": nn.Dropout(rate(r))})
def dropout_of_scores_table(m, h, g, given):
    return (h @ m.d(m.t).T).softmax(-1) @ m.t


@op(0.7, lambda r: {"a": lin(), "p": rate(r)})
def dropped_weights(m, h, g, given):
    return F.linear(h, F.dropout(m.a.weight, m.p, m.training), m.a.bias)


@op(0.5, lambda r: {"a": nn.Conv1d(WIDTH, WIDTH, 3, padding=1), "p": rate(r)})
def dropped_kernel(m, h, g, given):
    return F.conv1d(h.transpose(1, 2), F.dropout(m.a.weight, m.p, m.training), m.a.bias, padding=1).transpose(1, 2)


@op(0.5, lambda r: {"t": table(3, WIDTH), "d": nn.Dropout(rate(r))})
def shared_queries(m, h, g, given):
    a = (m.d(m.t) @ h.transpose(1, 2)).softmax(-1) @ h  # [B, 3, F]
    return h + a.mean(1, keepdim=True)


@op(0.4, lambda r: {"t": table(1, 1, WIDTH), "a": lin()})
def class_token(m, h, g, given):
    y = torch.cat([m.t.expand(h.shape[0], -1, -1), h], 1)
    return m.a(y)[:, 1:] + y[:, :1]


# Rows that meet


@op(0.7)
def minus_batch_mean(m, h, g, given):
    return h - h.mean(0).expand_as(h)


@op(0.5)
def softmax_over_batch(m, h, g, given):
    return g + h * h.softmax(0)


@op(0.5, lambda r: {"dim": r.choice([0, 1, (0, 1)])})
def roll(m, h, g, given):
    dims = m.dim if isinstance(m.dim, tuple) else (m.dim,)
    return h + g.roll([1] * len(dims), dims)


@op(0.5, lambda r: {"dim": r.choice([0, 1])})
def flip(m, h, g, given):
    return h + g.flip(m.dim)


@op(0.5, lambda r: {"dim": r.choice([0, 1])})
def cumulated(m, h, g, given):
    return h.cumsum(m.dim).tanh() + torch.cummax(g + ramp(g), m.dim).values


@op(0.5, lambda r: {"dim": r.choice([0, 1]), "descending": r.random() < 0.5})
def sorted_rows(m, h, g, given):
    values, order = (h + ramp(h)).sort(m.dim, descending=m.descending)
    return values + g.gather(m.dim, order)


@op(0.5)
def difference(m, h, g, given):
    return F.pad(h[1:] - h[:-1], (0, 0, 0, 0, 1, 0)) + g


@op(0.5)
def gram(m, h, g, given):
    f = h.flatten(1)
    return ((f @ f.T / 4).softmax(-1) @ g.flatten(1)).view_as(g)


@op(0.5, lambda r: {"p": r.choice([0.0, 0.3])})
def attention_over_batch(m, h, g, given):
    y = h.transpose(0, 1)
    return F.scaled_dot_product_attention(y, y, g.transpose(0, 1), dropout_p=m.p if m.training else 0.0).transpose(0, 1)


@op(0.4)
def distances(m, h, g, given):
    f = h.flatten(1)
    return g * torch.cdist(f, f + ramp(f)).mean(1)[:, None, None]


@op(0.4)
def first_row(m, h, g, given):
    return h + g[0] - g[-1:]


@op(0.3)
def by_half(m, h, g, given):
    n = max(len(h) // 2, 1)
    return torch.cat([h[:n] + g[-n:], h[n:]])


@op(0.3)
def permuted_rows(m, h, g, given):
    return h[given.tokens[:, 0].argsort(stable=True)] + g


# Norms


def bn(r, kind=nn.BatchNorm1d):
    return kind(WIDTH, eps=0.1, affine=r.random() < 0.6, track_running_stats=r.random() < 0.8, momentum=r.choice([0.1, 0.1, 0.5, None]))


@op(1, lambda r: {"n": nn.LayerNorm(WIDTH, eps=0.1)})
def layer_norm(m, h, g, given):
    return m.n(h)


@op(1.5, lambda r: {"n": bn(r)})
def batch_norm(m, h, g, given):
    return m.n(h.transpose(1, 2)).transpose(1, 2)


@op(0.8, lambda r: {"n": bn(r)})
def batch_norm_flat(m, h, g, given):
    return m.n(h.flatten(0, 1)).view_as(h)


@op(0.6, lambda r: {"n": bn(r, nn.BatchNorm2d)})
def batch_norm2d(m, h, g, given):
    # Two columns: with one, torch 2.13's backward on the CPU is wrong where strides of input and gradient differ.
    return m.n(torch.stack([h, g], -1).transpose(1, 2)).mean(-1).transpose(1, 2)


@op(0.4, lambda r: {"n": bn(r)})
def batch_norm_twice(m, h, g, given):
    return m.n(h.transpose(1, 2)).transpose(1, 2) + m.n(g.transpose(1, 2)).transpose(1, 2)


@op(0.3, lambda r: {"n": bn(r)})
def batch_norm_in_eval(m, h, g, given):
    m.n.eval()
    return m.n(h.flatten(0, 1)).view_as(h)


@op(0.5)
def functional_batch_norm(m, h, g, given):
    return F.batch_norm(h.transpose(1, 2), None, None, training=True, eps=0.1).transpose(1, 2)


def with_buffers(r):
    m = {"mean": nn.Buffer(torch.zeros(WIDTH)), "var": nn.Buffer(torch.ones(WIDTH)), "w": nn.Parameter(torch.ones(WIDTH))}
    return m | {"momentum": r.choice([0.1, 0.3])}


@op(0.5, with_buffers)
def functional_batch_norm_of_buffers(m, h, g, given):
    return F.batch_norm(h.transpose(1, 2), m.mean, m.var, m.w, None, m.training, m.momentum, 0.1).transpose(1, 2)


@op(0.3, lambda r: {"w": nn.Parameter(torch.ones(WIDTH)), "p": 0.3})
def batch_norm_of_noisy_weight(m, h, g, given):
    return F.batch_norm(h.transpose(1, 2), None, None, F.dropout(m.w, m.p, m.training), None, True, 0.1, 0.1).transpose(1, 2)


@op(0.6, lambda r: {"n": bn(r, nn.InstanceNorm1d)})
def instance_norm(m, h, g, given):
    return m.n(h.transpose(1, 2)).transpose(1, 2)


@op(0.5, lambda r: {"n": nn.GroupNorm(2, WIDTH, eps=0.1)})
def group_norm(m, h, g, given):
    return m.n(h.transpose(1, 2)).transpose(1, 2)


@op(0.3, lambda r: {"n": nn.RMSNorm(WIDTH, eps=0.1)})
def rms_norm(m, h, g, given):
    return m.n(h) + F.normalize(g + 1, dim=-1)


@op(0.3, lambda r: {"a": nn.utils.parametrizations.weight_norm(lin())})
def weight_norm(m, h, g, given):
    return m.a(h)


@op(0.3, lambda r: {"a": nn.utils.parametrizations.spectral_norm(lin())})
def spectral_norm(m, h, g, given):
    return m.a(h)


# Convolutions and pooling


@op(1, lambda r: {"a": nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=r.choice([1, 2, 4]))})
def conv1d(m, h, g, given):
    return m.a(h.transpose(1, 2)).transpose(1, 2)


@op(0.5, lambda r: {"a": nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)})
def conv_transpose1d(m, h, g, given):
    return m.a(h.transpose(1, 2)).transpose(1, 2)


@op(0.7, lambda r: {"a": nn.Conv2d(1, 1, 3, padding=1), "d": nn.Dropout2d(0.2)})
def conv2d(m, h, g, given):
    return m.d(m.a(h.unsqueeze(1))).squeeze(1)


@op(
    0.7,
    lambda r: {"a": nn.Conv2d(WIDTH, WIDTH, 1), "d": nn.Dropout(rate(r)), "f": r.choice([torch.channels_last, torch.contiguous_format])},
)
def conv2d_channels_last(m, h, g, given):
    y = h.transpose(1, 2).unsqueeze(-1).contiguous(memory_format=m.f)
    return m.d(m.a(y)).squeeze(-1).transpose(1, 2)


@op(0.5, lambda r: {"a": nn.Conv1d(WIDTH, WIDTH, 1)})
def conv_of_one_row(m, h, g, given):
    return torch.stack([m.a(row.T).T for row in h])


@op(0.5, lambda r: {"k": r.choice([F.max_pool1d, F.avg_pool1d])})
def pool1d(m, h, g, given):
    return m.k((h + ramp(h)).transpose(1, 2), 3, 1, 1).transpose(1, 2)


@op(0.4)
def max_pool_indices(m, h, g, given):
    y, at = F.max_pool1d((h + ramp(h)).transpose(1, 2), 3, 1, 1, return_indices=True)
    return y.transpose(1, 2) + g.transpose(1, 2).gather(2, at).transpose(1, 2)


@op(0.4)
def adaptive_pools(m, h, g, given):
    y = h.transpose(1, 2)
    a, b = F.adaptive_avg_pool1d(y, 2), F.adaptive_max_pool1d(y + ramp(y), 2)
    return g + F.interpolate(a + b, size=h.shape[1], mode="linear").transpose(1, 2)


@op(0.3)
def unfold(m, h, g, given):
    return F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1) + g


# Recurrent layers


@op(0.8, lambda r: {"first": (f := r.random() < 0.5), "a": r.choice([nn.LSTM, nn.GRU])(WIDTH, WIDTH, 2, dropout=0.3, batch_first=f)})
def recurrent(m, h, g, given):
    return m.a(h)[0] if m.first else m.a(h.transpose(0, 1))[0].transpose(0, 1)


@op(0.8, lambda r: {"first": (f := r.random() < 0.5), "a": r.choice([nn.LSTM, nn.GRU, nn.RNN])(WIDTH, WIDTH, 1, batch_first=f)})
def recurrent_without_dropout(m, h, g, given):
    y, state = m.a(h) if m.first else m.a(h.transpose(0, 1))
    y = y if m.first else y.transpose(0, 1)
    return y + (state[0] if isinstance(state, tuple) else state)[0][:, None]


@op(0.4, lambda r: {"a": nn.LSTM(WIDTH, 2, 2, dropout=0.3, bidirectional=True, batch_first=True)})
def recurrent_both_ways(m, h, g, given):
    return m.a(h)[0]


@op(0.4, lambda r: {"a": nn.GRU(WIDTH, WIDTH, batch_first=True), "s": lin()})
def recurrent_with_state(m, h, g, given):
    return m.a(h, m.s(g.mean(1))[None].contiguous())[0]


@op(0.4, lambda r: {"a": nn.GRU(WIDTH, WIDTH, r.choice([1, 2]), dropout=0.2, batch_first=True), "s": r.random() < 0.5})
def recurrent_packed(m, h, g, given):
    lengths = given.mask.sum(1).clamp(min=1)
    packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    y, state = m.a(packed)
    y = pad_packed_sequence(y, batch_first=True, total_length=h.shape[1])[0]
    return y + state[-1][:, None] if m.s else y


@op(0.4, lambda r: {"a": nn.LSTMCell(WIDTH, WIDTH), "p": 0.3})
def recurrent_cell(m, h, g, given):
    state, steps = None, []
    for step in h.unbind(1):
        state = m.a(F.dropout(step, m.p, m.training), state)
        steps.append(state[0])
    return torch.stack(steps, 1)


# Attention


def mha(r):
    first = r.random() < 0.5
    a = nn.MultiheadAttention(WIDTH, 2, dropout=r.choice([0.0, 0.3]), batch_first=first, add_bias_kv=r.random() < 0.2)
    return {"a": a, "first": first, "w": r.random() < 0.5}


@op(1, mha)
def attention(m, h, g, given):
    q, k = (h, g) if m.first else (h.transpose(0, 1), g.transpose(0, 1))
    y, weights = m.a(q, k, k, need_weights=m.w)
    y = y if m.first else y.transpose(0, 1)
    return y + weights.mean((1, 2))[:, None, None] if m.w else y


@op(0.5, mha)
def masked_attention(m, h, g, given):
    q = h if m.first else h.transpose(0, 1)
    padding = ~given.mask
    padding = padding & (torch.arange(h.shape[1]) > 0)
    causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
    y = m.a(q, q, q, key_padding_mask=padding, attn_mask=causal)[0]
    return y if m.first else y.transpose(0, 1)


@op(1, lambda r: {"p": r.choice([0.0, 0.2]), "causal": r.random() < 0.4, "mask": r.random() < 0.4})
def sdpa(m, h, g, given):
    q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in (h, g, h))
    mask = given.mask[:, None, None] | (torch.arange(h.shape[1]) == 0) if m.mask and not m.causal else None
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=m.p if m.training else 0.0, is_causal=m.causal)
    return y.transpose(1, 2).flatten(2)


@op(0.4)
def sdpa_of_noisy_mask(m, h, g, given):
    return F.scaled_dot_product_attention(given.x, h, g, attn_mask=h @ g.transpose(1, 2))


@op(
    0.6,
    lambda r: {
        "first": (f := r.random() < 0.5),
        "a": nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.2, batch_first=f, norm_first=r.random() < 0.5),
    },
)
def transformer(m, h, g, given):
    return m.a(h) if m.first else m.a(h.transpose(0, 1)).transpose(0, 1)


@op(0.3, lambda r: {"a": nn.TransformerDecoderLayer(WIDTH, 2, 8, 0.2, batch_first=True)})
def decoder(m, h, g, given):
    return m.a(h, g)


# Indices and masks


@op(0.7)
def gather(m, h, g, given):
    return h.gather(1, (given.tokens % h.shape[1])[:, :, None].expand_as(h)) + g


@op(0.6)
def gather_of_given(m, h, g, given):
    return given.x.gather(2, (h + ramp(h)).argsort(-1)) + h


@op(0.5)
def index_add(m, h, g, given):
    to = given.tokens[:, 0] % len(h)
    return torch.zeros_like(h).index_add(0, to, g) + h


@op(0.5)
def index_select(m, h, g, given):
    return h.index_select(0, given.tokens[:, 0] % len(h)) + g.index_select(1, given.tokens[0] % h.shape[1])


@op(0.5)
def advanced_index(m, h, g, given):
    n = torch.arange(len(h))
    return h + h[n, given.tokens[:, 0] % h.shape[1]][:, None] + g[:, given.tokens[0] % g.shape[1]]


@op(0.5)
def scatter(m, h, g, given):
    return h.scatter(1, (given.tokens % h.shape[1])[:, :1, None].expand(-1, -1, WIDTH), g[:, :1])


@op(0.5)
def masked_fill(m, h, g, given):
    return h.masked_fill(given.mask[..., None], 0.3) + torch.where(given.mask[..., None], g, h)


@op(0.5)
def where_of_noisy(m, h, g, given):
    return torch.where(h > 0.1, h, g) + h.masked_fill(g < 0, 0.2)


@op(0.4)
def masked_select(m, h, g, given):
    return h + g[given.mask].mean(0) if given.mask.any() else h


@op(0.3)
def noisy_selection(m, h, g, given):
    return g + h[h > 0.05].sum().tanh()


@op(0.3)
def noisy_nonzero(m, h, g, given):
    rows = (h.abs().sum((1, 2)) > 1).nonzero().squeeze(1)
    y = torch.zeros_like(g)
    y[rows] = g[rows]
    return y + h


@op(0.4)
def topk(m, h, g, given):
    values, at = (h + ramp(h)).topk(2, -1)
    return g + values.mean(-1, keepdim=True) + g.gather(-1, at[..., :1])


@op(0.4, lambda r: {"dim": r.choice([0, 1, 2])})
def max_over(m, h, g, given):
    y = h + ramp(h)
    return g + y.max(m.dim, keepdim=True).values - y.amin(m.dim, keepdim=True) + y.median(m.dim, keepdim=True).values


@op(0.3, lambda r: {"t": nn.Embedding(WIDTH, WIDTH)})
def embedding_of_argmax(m, h, g, given):
    return g + m.t((h + ramp(h)).argmax(-1))


@op(0.3, lambda r: {"a": lin()})
def one_hot(m, h, g, given):
    return g + m.a(F.one_hot((h + ramp(h)).argmax(-1), WIDTH).to(h.dtype))


@op(0.3)
def bucketize(m, h, g, given):
    return g + torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5], dtype=h.dtype)).to(h.dtype) / 4


@op(0.3)
def searchsorted(m, h, g, given):
    edges = given.x.flatten(1).sort(1).values
    return g + torch.searchsorted(edges, h.flatten(1).contiguous()).view_as(h).to(h.dtype) / h[0].numel()


@op(0.3)
def statistics(m, h, g, given):
    return g + h.var(1, keepdim=True) + h.logsumexp((0, 1)) / 4 + h.quantile(0.3) + h.norm() / 9


@op(0.3)
def linear_algebra(m, h, g, given):
    a = h.transpose(1, 2) @ h + 2 * torch.eye(WIDTH, dtype=h.dtype)
    return torch.linalg.solve(a, g.transpose(1, 2)).transpose(1, 2) + torch.linalg.det(a)[:, None, None].tanh()


@op(0.3)
def fourier(m, h, g, given):
    return torch.fft.ifft(torch.fft.fft(h, dim=1) * 0.7, dim=1).real + g


# Writes in place


@op(0.8)
def set_first_step(m, h, g, given):
    y = h.clone()
    y[:, 0] = g[:, 0]
    return y


@op(0.6)
def set_masked(m, h, g, given):
    y = h.clone()
    y[given.mask] = 0.1
    return y + g


@op(0.5)
def set_masked_noisy(m, h, g, given):
    y = h * 1
    y[g > 0] = 0.1
    return y


@op(0.8, lambda r: {"a": lin()})
def add_in_place(m, h, g, given):
    y = m.a(given.x)
    y += h
    return y


@op(0.6)
def zeros_add(m, h, g, given):
    return torch.zeros(h.shape, dtype=h.dtype).add_(h).mul_(g.sigmoid())


@op(0.6)
def scatter_add_in_place(m, h, g, given):
    at = (given.tokens % h.shape[1])[..., None].expand_as(h)
    return h.new_zeros(h.shape).scatter_add_(1, at, g) + h


@op(0.6)
def write_steps(m, h, g, given):
    y = torch.empty_like(given.x)
    for t in range(h.shape[1]):
        y[:, t] = h[:, t] + (y[:, t - 1] / 2 if t else 0)
    return y


@op(0.6, lambda r: {"a": lin(), "noisy": r.random() < 0.5})
def view_in_place(m, h, g, given):
    y = (h if m.noisy else given.x) * 1
    y[:, :1].add_(g[:, :1])
    y.view(-1)[0] += 0.5
    return y


@op(0.5, lambda r: {"which": r.choice([0, 1])})
def chunk_in_place(m, h, g, given):
    y = given.x.detach().clone()
    with torch.no_grad():
        parts = y.split(2, -1)
        parts[m.which].add_(h[..., :2])
    return y + h * parts[1].mean()


@op(0.5)
def chunks_in_place(m, h, g, given):
    y = torch.zeros_like(given.x)
    with torch.no_grad():
        a, b = y[..., :2], y[..., 2:]
        a.copy_(h[..., :2])
        b.copy_(h[..., 2:])
        b.mul_(0.5)
    return y + g * b.sum(-1, keepdim=True)


@op(0.5, lambda r: {"a": lin()})
def view_read_after_write(m, h, g, given):
    y = m.a(given.x)
    v = y[:, :1]
    y.add_(h)
    return g + v


@op(0.4)
def two_views(m, h, g, given):
    y = torch.zeros(h.shape, dtype=h.dtype)
    v, w = y.view(-1, WIDTH), y.transpose(0, 1)
    v.add_(h.reshape(-1, WIDTH))
    return w.transpose(0, 1) + g


@op(0.4)
def write_through_detached(m, h, g, given):
    y = torch.zeros(h.shape, dtype=h.dtype)
    y.detach().add_(h.detach())
    return y + g


@op(0.4)
def write_through_data(m, h, g, given):
    y = given.x.detach().clone()
    y.data.add_(h.detach())
    return y + g


@op(0.4)
def unbind_in_place(m, h, g, given):
    y = given.x.detach().clone()
    with torch.no_grad():
        for t, step in enumerate(y.unbind(1)):
            step.add_(h[:, t])
    return y + g


@op(0.4)
def out_argument(m, h, g, given):
    y = torch.empty(h.shape, dtype=h.dtype)
    with torch.no_grad():
        torch.add(h.detach(), g.detach(), out=y)
    return y + h


@op(0.4)
def copy_into(m, h, g, given):
    y = torch.zeros(h.shape[0], h.shape[1] + 1, WIDTH, dtype=h.dtype)
    y[:, 1:].copy_(h)
    y[:, 0].copy_(g.mean(1))
    return y[:, :-1]


@op(0.4)
def index_put(m, h, g, given):
    y = given.x * 1
    n = torch.arange(len(h))
    y.index_put_((n, given.tokens[:, 0] % h.shape[1]), h[:, 0], accumulate=True)
    return y + g


@op(0.3)
def fill_with_noisy(m, h, g, given):
    y = given.x * 1
    y[:, 0].fill_(h.mean())
    return y


@op(0.3)
def clamp_in_place(m, h, g, given):
    y = given.x * 1
    return y.clamp_(max=h.detach()).addcmul_(h, g).lerp_(h, 0.3)


@op(0.3)
def transposed_in_place(m, h, g, given):
    y = given.x * 1
    y.transpose_(0, 1)
    y.add_(h.transpose(0, 1))
    y = y * 1
    return y.transpose(0, 1)


@op(0.3)
def squeezed_in_place(m, h, g, given):
    y = (h * 1).unsqueeze_(1)
    y.squeeze_(1).mul_(0.9)
    return y


@op(0.3)
def diagonal_in_place(m, h, g, given):
    y = torch.zeros(len(h), WIDTH, WIDTH, dtype=h.dtype)
    y.diagonal(dim1=1, dim2=2).copy_(h[:, 0])
    return g @ y + h


@op(0.3)
def expanded_then_written(m, h, g, given):
    y = h.mean(1, keepdim=True).expand_as(h).contiguous()
    y[:, 0] *= g[:, 0]
    return y


@op(0.3)
def write_into_activation(m, h, g, given):
    y = h * 1
    z = y.exp()  # which keeps its own result
    y.mul_(0.5).add_(g)
    return z / 3 + y


@op(0.3)
def rows_written(m, h, g, given):
    y = given.x * 1
    y[0] = h[0]
    y[-1] += g[-1]
    return y


@op(0.3)
def list_of_buffers(m, h, g, given):
    kept = {"y": torch.zeros(h.shape, dtype=h.dtype), "n": [torch.zeros(len(h), dtype=h.dtype)]}
    kept["y"] += h
    kept["n"][0] += g.mean((1, 2))
    return kept["y"] * kept["n"][0][:, None, None]


@op(0.3)
def flat_written(m, h, g, given):
    y = torch.zeros(h.numel(), dtype=h.dtype)
    y.view_as(h).copy_(h)
    return y.view_as(h) + g


@op(0.3)
def masked_scatter(m, h, g, given):
    return (given.x * 1).masked_scatter_(given.mask[..., None].expand_as(h), h) + g


# Contractions


@op(0.5, lambda r: {"t": table(WIDTH, WIDTH)})
def einsum(m, h, g, given):
    return torch.einsum("btf,fe,bte->bte", h, m.t, g).tanh()


@op(0.4, lambda r: {"a": nn.Bilinear(WIDTH, WIDTH, WIDTH)})
def bilinear(m, h, g, given):
    return m.a(h, g)


@op(0.4, lambda r: {"t": table(WIDTH, WIDTH)})
def products(m, h, g, given):
    s = torch.baddbmm(torch.zeros(1, 1, 1, dtype=h.dtype), h, g.transpose(1, 2)).softmax(-1)
    return torch.bmm(s, h) + torch.addmm(m.t[0], g.flatten(0, 1), m.t).view_as(g)


@op(0.3)
def outer(m, h, g, given):
    return torch.matmul(h.flatten()[:WIDTH], torch.outer(g.flatten()[:WIDTH], h.flatten()[:WIDTH])) + g


@op(0.4)
def unbound(m, h, g, given):
    return torch.stack([a * b for a, b in zip(h.unbind(0), reversed(g.unbind(0)), strict=True)])


@op(0.4)
def split(m, h, g, given):
    a, b = h.chunk(2, -1)
    return torch.cat([b, a.tanh()], -1) + g


@op(0.3)
def expanded(m, h, g, given):
    return (h[:, None] * g[:, :, None]).mean(2)


# Gradients


@op(0.5)
def detach(m, h, g, given):
    return h.detach() * g + h


@op(0.4, lambda r: {"a": lin(), "d": nn.Dropout(rate(r))})
def no_grad(m, h, g, given):
    with torch.no_grad():
        y = m.d(m.a(h))
    return y + g


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy * ctx.saved_tensors[0].cos()


class Clipped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, n):
        return x * n

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.n = inputs[1]

    @staticmethod
    def backward(ctx, dy):
        return dy.clamp(-1, 1) * ctx.n, None


class Straight(torch.autograd.Function):
    """Its gradient depends on the whole batch."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x - x.mean(0)).sign() * 0.5 + y

    @staticmethod
    def backward(ctx, dy):
        x, y = ctx.saved_tensors
        return dy * (x.abs() < 1), dy + y.sum(0)


@op(0.5)
def function(m, h, g, given):
    return Twice.apply(h) + g


@op(0.4)
def function_with_rule(m, h, g, given):
    return Clipped.apply(h, 0.7) + g


@op(0.4)
def function_of_two(m, h, g, given):
    return Straight.apply(h, g)


@op(0.3)
def gradient_hook(m, h, g, given):
    y = h * 1
    if y.requires_grad:
        y.register_hook(lambda dy: dy * 0.5)
    return y + g


@op(0.3)
def inner_gradient(m, h, g, given):
    with torch.enable_grad():
        z = h.detach().requires_grad_()
        (dz,) = torch.autograd.grad((z**3).sum(), z)
    return g + dz.tanh()


# Values


@op(0.4, lambda r: {"a": lin(), "b": lin()})
def branch(m, h, g, given):
    return m.a(h) if h.flatten()[0] > 0 else m.b(h)


@op(0.15)
def branch_in_method(m, h, g, given):
    return m.first_of(h, g)


@op(0.3)
def item(m, h, g, given):
    return g * h.mean().item() + h


@op(0.3)
def integer(m, h, g, given):
    return g.roll(int(h.abs().sum() * 10) % 3, 1) + h


@op(0.2)
def finite(m, h, g, given):
    return h + g if torch.isfinite(h).all() else h


@op(0.2)
def listed(m, h, g, given):
    return h + max(g.flatten().tolist())


@op(0.2)
def by_numpy(m, h, g, given):
    return h + torch.from_numpy(np.tanh(g.detach().numpy()))


@op(0.2, lambda r: {"d": nn.Dropout(0.4)})
def loop_on_value(m, h, g, given):
    for _ in range(1 + int(h.abs().sum() * 10) % 2):
        h = m.d(h)
    return h


@op(0.2)
def format_value(m, h, g, given):
    text = f"{h.mean():.3f}"
    return h if text else -h


@op(0.2)
def shapes(m, h, g, given):
    if h.requires_grad and h.is_contiguous() and g.stride(0):
        return h * 0.9
    return h


@op(0.2)
def storage(m, h, g, given):
    return h.as_strided(h.shape, h.stride()) + g if h.is_contiguous() else h


# State


@op(0.4, lambda r: {"ema": nn.Buffer(torch.zeros(WIDTH))})
def ema_in_place(m, h, g, given):
    if m.training:
        m.ema.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
    return h - m.ema


@op(0.3, lambda r: {"ema": nn.Buffer(torch.zeros(WIDTH))})
def ema_replaced(m, h, g, given):
    before = m.ema
    m.ema = 0.9 * m.ema + 0.1 * h.detach().mean((0, 1))
    return h - before


@op(0.3, lambda r: {"steps": nn.Buffer(torch.zeros((), dtype=torch.long))})
def steps(m, h, g, given):
    m.steps += 1
    return h


@op(0.2, lambda r: {"last": nn.Buffer(torch.zeros(WIDTH))})
def input_mean(m, h, g, given):
    m.last.copy_(given.x.detach().mean((0, 1)))
    return h - m.last


@op(0.4)
def left_on_module(m, h, g, given):
    m.aux = h.mean()
    return h + g


@op(0.3)
def left_rows_on_module(m, h, g, given):
    m.aux = {"rows": h.mean(1), "list": [g.sum(0)]}
    return h


class WritesArgument(nn.Module):
    def forward(self, h, buffer):
        if h.flatten()[0] > -9:
            buffer += h
        return h * 0.9


@op(0.3, lambda r: {"w": WritesArgument()})
def module_that_writes(m, h, g, given):
    buffer = torch.zeros_like(given.x)
    return m.w(h, buffer) + buffer + g


class KeepsAttribute(nn.Module):
    def forward(self, h):
        self.kept = h * 2 if h.flatten()[0] > -9 else h
        return h


@op(0.3, lambda r: {"w": KeepsAttribute()})
def module_that_keeps(m, h, g, given):
    return m.w(h) + m.w.kept * g


@op(0.2)
def tuple_left_on_module(m, h, g, given):
    m.aux = (h.mean(1), g)
    return h


# Random numbers of others


@op(0.15)
def torch_noise(m, h, g, given):
    return h + 0.1 * torch.randn_like(h)


@op(0.1)
def torch_noise_of_given(m, h, g, given):
    return h + 0.1 * torch.rand(len(h), 1, 1, dtype=h.dtype) * torch.empty_like(given.x).bernoulli_(0.5)


@op(0.05)
def python_noise(m, h, g, given):
    return h if random.random() < 0.5 else g + h


@op(0.05)
def numpy_noise(m, h, g, given):
    return h * float(np.random.rand())


# Sections: operations around operations


def section(r):
    names = [draw(r, nested=False) for _ in range(r.choice([1, 2]))]
    return {"names": names, "inner": nn.ModuleList([holder(r, name) for name in names])}


@op(1.2, section)
def time_major(m, h, g, given):
    turned = Inputs(*(v.transpose(0, 1) for v in (given.x, given.tokens, given.mask)))
    return run_section(m, h.transpose(0, 1), g.transpose(0, 1), turned).transpose(0, 1)


@op(1, section)
def merged(m, h, g, given):
    flat = Inputs(*(v.flatten(0, 1).unsqueeze(1) for v in (given.x, given.tokens, given.mask)))
    y = run_section(m, h.flatten(0, 1).unsqueeze(1), g.reshape(-1, 1, WIDTH), flat)
    return y.reshape(h.shape)


@op(0.6, section)
def merged_into_one(m, h, g, given):
    flat = Inputs(*(v.flatten(0, 1).unsqueeze(0) for v in (given.x, given.tokens, given.mask)))
    return run_section(m, h.reshape(1, -1, WIDTH), g.reshape(1, -1, WIDTH), flat).view_as(h)


@op(0.4, section)
def doubled(m, h, g, given):
    twice = Inputs(*(torch.cat([v, v]) for v in (given.x, given.tokens, given.mask)))
    return run_section(m, torch.cat([h, g]), torch.cat([g, h]), twice).unflatten(0, (2, -1)).mean(0)


@op(0.3, section)
def row_by_row(m, h, g, given):
    rows = [Inputs(given.x[i : i + 1], given.tokens[i : i + 1], given.mask[i : i + 1]) for i in range(len(h))]
    return torch.cat([run_section(m, h[i : i + 1], g[i : i + 1], rows[i]) for i in range(len(h))])


@op(0.3, section)
def without_gradient(m, h, g, given):
    with torch.no_grad():
        y = run_section(m, h, g, given)
    return y + g


@op(0.8, section)
def checkpointed(m, h, g, given):
    return checkpoint(run_section, m, h, g, given, use_reentrant=False, context_fn=iw.checkpoint_contexts)


@op(0.6, section)
def iw_checkpointed(m, h, g, given):
    return iw.checkpoint(run_section, m, h, g, given)


@op(0.3, section)
def reentrant(m, h, g, given):
    return iw.checkpoint(run_section, m, h, g, given, use_reentrant=True)


@op(0.3, section)
def inference_like(m, h, g, given):
    m.eval()
    y = run_section(m, h, g, given)
    m.train()
    return y


SECTIONS = ("time_major", "merged", "merged_into_one", "doubled", "row_by_row", "without_gradient", "checkpointed", "iw_checkpointed")
SECTIONS += ("reentrant", "inference_like")


def draw(r, nested=True, among=None):
    names = [n for n in OPS if (nested or n not in SECTIONS) and (among is None or n in among)]
    return r.choices(names, [OPS[n][0] for n in names])[0]


def holder(r, name):
    build = OPS[name][1]
    return Holder(**build(r) if build else {})


class Block(nn.Module):
    """An operation in a module of its own."""

    def __init__(self, name, held):
        super().__init__()
        self.name, self.held = name, held

    def forward(self, h, g, x, tokens, mask):
        return OPS[self.name][2](self.held, h, g, Inputs(x, tokens, mask))


@dataclasses.dataclass(slots=True)
class Slots:
    logits: Tensor


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None
    more: dict | None = None


def _named(h, g):
    return {"logits": h.mean(1), "all": g}


OUTPUTS: dict[str, tuple[float, Callable]] = {
    "rows": (4, lambda h, g: h.mean(1)),
    "sequence": (2, lambda h, g: h),
    "time_major": (1, lambda h, g: h.transpose(0, 1)),
    "tuple": (1, lambda h, g: (h.mean(1), g)),
    "dict": (1, lambda h, g: _named(h, g)),
    "dataclass": (1, lambda h, g: Output(h.mean(1), g, {"loss": h.mean()})),
    "scalar": (0.5, lambda h, g: h.mean()),
    "features": (0.5, lambda h, g: h.mean((0, 1))),
    "similarities": (0.5, lambda h, g: h.flatten(1) @ g.flatten(1).T),
    "indices": (0.4, lambda h, g: (h.mean(1), (h + ramp(h)).argmax(-1), h > 0)),
    "nested": (0.4, lambda h, g: [h.mean(1), {"a": (g, None, "text", 3)}]),
    "number": (0.2, lambda h, g: (h.mean(1), h.mean().item())),
    "distribution": (0.2, lambda h, g: torch.distributions.Normal(h.mean(1), 1 + g.mean(1) ** 2)),
    "slots": (0.15, lambda h, g: Slots(h.mean(1))),
    "object_of_tuple": (0.15, lambda h, g: Output(h.mean(1), more=(h, g))),
    "other": (0.2, lambda h, g: h.reshape(-1, WIDTH)),
}


class Network(nn.Module):
    """Steps are (operation, index of h in the pool, index of g, whether tanh follows)."""

    def __init__(self, steps, parts, output):
        super().__init__()
        self.steps, self.output = steps, output
        self.embed, self.first = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(parts)

    def forward(self, x, tokens, mask):
        pool = [x, self.first(x).tanh(), self.embed(tokens).tanh()]
        given = Inputs(x, tokens, mask)
        for part, (name, i, j, bounded) in zip(self.parts, self.steps, strict=True):
            h, g = pool[i], pool[j]
            y = part(h, g, x, tokens, mask) if isinstance(part, Block) else OPS[name][2](part, h, g, given)
            pool.append(y.tanh() if bounded else y)
        return OUTPUTS[self.output][1](pool[-1], pool[-2])

    def extra_repr(self):
        lines = [f"{k + 3}: {name}({i}, {j}){' tanh' if bounded else ''}" for k, (name, i, j, bounded) in enumerate(self.steps)]
        return "\n".join([*lines, f"-> {self.output}"])


def network(seed: int, only: list[str] | None = None) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A model in float64 and its inputs: x [B, T, F], tokens int64 [B, T], mask bool [B, T]; B is 1 to 6, T is 2 to 4."""
    r = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        steps, parts, _noisy = [], [], False
        for k in range(r.randint(3, 12)):
            i = r.choice([k + 2, k + 2, k + 2, r.randrange(k + 3)])
            j = r.randrange(k + 3)
            name = draw(r, among=only)
            if k == 1 and only is None:
                name = r.choice(["dropout", "f_dropout", name])
            held = holder(r, name)
            parts.append(Block(name, held) if r.random() < 0.5 else held)
            steps.append((name, i, j, r.random() < 0.5))
        output = r.choices(list(OUTPUTS), [weight for weight, _ in OUTPUTS.values()])[0]
        b, t = r.randint(1, 6), r.randint(2, 4)
        x, tokens, mask = torch.randn(b, t, WIDTH, dtype=torch.float64), torch.randint(TOKENS, (b, t)), torch.rand(b, t) < 0.6
        return Network(steps, parts, output).double(), (x, tokens, mask)
