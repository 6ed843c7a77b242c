"""The truth of attention, recurrent layers and weight noise: loops over samples, examples, heads and steps, for autograd to follow.

Written from the layers' equations and :mod:`naive`'s noise; nothing here comes from the package or from torch.nn.
"""

import math

import torch
from torch import Tensor

from oracle import naive


def keep_scale(p: float, *, seed: int, stream: int, sample: int, example: int, shape: tuple[int, ...]) -> Tensor:
    """keep * scale of one example under one sample, float64 [shape], positions row-major."""
    mask = naive.naive_mask(seed, stream, sample, example, math.prod(shape), p).reshape(shape)
    return torch.from_numpy(mask).double() * naive.effective_scale(p)


def sample_of(sample_ids, s: int, b: int) -> int:
    if sample_ids is None:
        return s
    of_sample = sample_ids[s]
    return int(of_sample[b] if isinstance(of_sample, list | Tensor) and torch.as_tensor(of_sample).dim() else of_sample)


def row(x: Tensor, s: int, b: int, samples: int, batch: int) -> Tensor:
    """The row of example b under sample s, of x with S*B rows or with B."""
    return x[s * batch + b] if x.shape[0] == samples * batch else x[b]


def softmax(scores: list[Tensor]) -> list[Tensor]:
    """Of a list of numbers; zeros where all are -inf."""
    largest = max(float(v.detach()) for v in scores)
    if largest == -math.inf:
        return [torch.zeros((), dtype=torch.float64) for _ in scores]
    e = [torch.exp(v - largest) for v in scores]
    return [v / sum(e) for v in e]


def attention_of_row(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], scale: float | None, keep: Tensor | None):
    """(out [H, T, V], probabilities under noise [H, T, U]) of one row: q [H, T, E], k and v [H or fewer, U, .], keep * scale [H, T, U].

    masks: each [H, T, U], numbers to be added.
    """
    heads, shared = q.shape[0], q.shape[0] // k.shape[0]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    probabilities = []
    for h in range(heads):
        for t in range(q.shape[1]):
            scores = []
            for u in range(k.shape[1]):
                score = (q[h, t] * k[h // shared, u]).sum() * scale
                for mask in masks:
                    score = score + mask[h, t, u]
                scores.append(score)
            probabilities.append(torch.stack(softmax(scores)))
    noisy = torch.stack(probabilities).reshape(heads, q.shape[1], k.shape[1])
    noisy = noisy if keep is None else noisy * keep
    return torch.stack([noisy[h] @ v[h // shared] for h in range(heads)]), noisy


def attention(q, k, v, p, *, samples, batch, seed, stream=0, sample_ids=None, first_example=0, masks=(), scale=None):
    """(out [S*B, H, T, V], noisy probabilities [S*B, H, T, U]); q, k, v and each mask [rows, H, ., .] have B or S*B rows."""
    rows = []
    for s in range(samples):
        for b in range(batch):
            q_, k_, v_, *masks_ = (row(x, s, b, samples, batch) for x in (q, k, v, *masks))
            address = {"seed": seed, "stream": stream, "sample": sample_of(sample_ids, s, b), "example": first_example + b}
            keep = keep_scale(p, shape=(q_.shape[0], q_.shape[1], k_.shape[1]), **address)
            rows.append(attention_of_row(q_, k_, v_, masks_, scale, keep))
    return torch.stack([out for out, _ in rows]), torch.stack([noisy for _, noisy in rows])


def additive(mask: Tensor, takes_part: bool) -> Tensor:
    """A boolean mask as numbers to be added, float64."""
    numbers = torch.zeros(mask.shape, dtype=torch.float64)
    numbers[mask != takes_part] = -math.inf
    return numbers


def cell(mode: str, x: Tensor, state: tuple[Tensor, ...], w_ih, w_hh, b_ih, b_hh, w_hr=None) -> tuple[Tensor, ...]:
    """One step of one row: the new state, (h, c) or (h,)."""
    h = state[0]
    a, r = w_ih @ x + b_ih, w_hh @ h + b_hh
    if mode == "LSTM":
        i, f, g, o = (a + r).chunk(4)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else w_hr @ h), c
    if mode == "GRU":
        (a_r, a_z, a_n), (r_r, r_z, r_n) = a.chunk(3), r.chunk(3)
        z = torch.sigmoid(a_z + r_z)
        return ((1 - z) * torch.tanh(a_n + torch.sigmoid(a_r + r_r) * r_n) + z * h,)
    return (torch.tanh(a + r) if mode == "RNN_TANH" else torch.relu(a + r),)


def recurrent(mode, parameters, x, states, p, *, layers, directions, samples, batch, lengths, locked=False, **address):
    """(out [S*B, T, F], one state tensor each [layers * directions, S*B, .]) of x [B or S*B rows, T, F], states of B or S*B rows.

    parameters: by torch's names, float64; biases may be missing. The noise of layer i has stream ``stream + i``, positions [T, F] or,
    locked, [F]. A row stops at its length; the rest of its output is 0.
    """
    outs, finals = [], []
    for s in range(samples):
        for b in range(batch):
            n = lengths[b]
            steps = list(row(x, s, b, samples, batch)[:n])
            states_ = [row(state.transpose(0, 1), s, b, samples, batch) for state in states]
            final = []
            for layer in range(layers):
                by_direction = []
                for d in range(directions):
                    end = f"_l{layer}" + ("_reverse" if d else "")
                    get = lambda name, end=end: parameters.get(name + end)  # noqa: E731
                    w = [get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
                    w[2:4] = [torch.zeros(w[0].shape[0], dtype=torch.float64) if v is None else v for v in w[2:4]]
                    state, hs = tuple(v[layer * directions + d] for v in states_), []
                    for t in reversed(range(n)) if d else range(n):
                        state = cell(mode, steps[t], state, *w)
                        hs.append(state[0])
                    by_direction.append(hs[::-1] if d else hs)
                    final.append(state)
                steps = [torch.cat(of_step) for of_step in zip(*by_direction, strict=True)]
                if layer < layers - 1:
                    keep = keep_scale(
                        p,
                        seed=address["seed"],
                        stream=address.get("stream", 0) + layer,
                        sample=sample_of(address.get("sample_ids"), s, b),
                        example=address.get("first_example", 0) + b,
                        shape=(1 if locked else x.shape[1], steps[0].shape[0]),
                    )
                    steps = [steps[t] * keep[0 if locked else t] for t in range(n)]
            outs.append(torch.stack(steps + [torch.zeros_like(steps[0])] * (x.shape[1] - n)))
            finals.append([torch.stack(of_state) for of_state in zip(*final, strict=True)])
    return torch.stack(outs), [torch.stack(of_state, 1) for of_state in zip(*finals, strict=True)]


def linear_under_weight_noise(x, weight, bias, p, *, samples, batch, seed, stream=0, sample_ids=None, drop_bias=False) -> Tensor:
    """x [B or S*B rows, ..., in] -> [S*B, ..., out]: the weight's mask has example 0 and its flat index; the bias's the next stream."""
    rows = []
    for s in range(samples):
        address = {"seed": seed, "sample": sample_of(sample_ids, s, 0), "example": 0}
        w = weight * keep_scale(p, stream=stream, shape=tuple(weight.shape), **address)
        c = bias * keep_scale(p, stream=stream + 1, shape=tuple(bias.shape), **address) if drop_bias else bias
        for b in range(batch):
            y = torch.einsum("oi,...i->...o", w, row(x, s, b, samples, batch))
            rows.append(y if c is None else y + c)
    return torch.stack(rows)
