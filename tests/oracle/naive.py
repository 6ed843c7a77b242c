"""The truth of the tests: loops over samples and examples in float64, written from the definition and from nothing of the package.

Noise is a function of (seed, stream, sample, example, position) through Philox4x32-10; see the docstrings for each rule.
"""

import bisect
import functools
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
WORD = 2**32


def philox(counter, seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of one counter of four 32-bit words, in Python's own integers."""
    c0, c1, c2, c3 = (int(c) % WORD for c in counter)
    k0, k1 = seed % WORD, (seed >> 32) % WORD
    for _ in range(10):
        high0, low0 = divmod(MULTIPLIERS[0] * c0, WORD)
        high1, low1 = divmod(MULTIPLIERS[1] * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    return math.floor(p * 65536 + 0.5)


def effective_scale(p: float) -> float:
    return 65536 / (65536 - threshold(p)) if threshold(p) < 65536 else 0.0


@functools.lru_cache(maxsize=4096)
def random_words(seed: int, stream: int, sample: int, example: int, words: int, first_group: int = 0) -> np.ndarray:
    """The first 32-bit words of one row, four to a call, as uint64 [words]."""
    groups = (np.arange((words + 3) // 4, dtype=np.uint64) + np.uint64(first_group)) % np.uint64(WORD)
    c = [groups, *(np.full_like(groups, v % WORD) for v in (example, sample, stream))]
    k0, k1 = seed % WORD, (seed >> 32) % WORD
    low, shift = np.uint64(WORD - 1), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return np.stack(c, 1).reshape(-1)[:words]


@functools.lru_cache(maxsize=4096)
def random_fields(seed: int, stream: int, sample: int, example: int, positions: int, first_group: int = 0) -> np.ndarray:
    """The 16-bit fields of one row's positions: eight to a call, field j is bits 16*(j%2) .. +16 of word j//2."""
    words = random_words(seed, stream, sample, example, (positions + 7) // 8 * 4, first_group)
    fields = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 1).reshape(-1)
    return fields[:positions].astype(np.int64)


def normal(words) -> np.ndarray:
    """Standard normal numbers of pairs of words, float64, by Box and Muller's rule."""
    words = np.asarray(words, dtype=np.float64)
    u, v = (words[0::2] + 0.5) / WORD, (words[1::2] + 0.5) / WORD
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(2 * math.pi * v), radius * np.sin(2 * math.pi * v)], 1).reshape(-1)


def laplace(words) -> np.ndarray:
    """Laplace numbers of variance 1, a word each: half of the words are positive, of density exp(-sqrt(2) z) sqrt(2)."""
    half = WORD // 2
    return np.array([math.copysign(math.log((word % half + 0.5) / half) / math.sqrt(2), word < half or -1) for word in map(int, words)])


def uniform(words) -> np.ndarray:
    """Numbers of variance 1 that are uniform between -sqrt(3) and sqrt(3), a word each: 0 for the first word, then up, and round."""
    half = WORD // 2
    return np.array([math.sqrt(3) * ((word + half) % WORD - half + 0.5) / half for word in map(int, words)])


LAWS = {"normal": normal, "laplace": laplace, "uniform": uniform}


def numbers(law: str, seed: int, stream: int, sample: int, example: int, positions: int) -> np.ndarray:
    """The numbers of one row's positions, float64: four to a call of the generator."""
    return LAWS[law](random_words(seed, stream, sample, example, (positions + 3) // 4 * 4))[:positions]


def normals(*row: int) -> np.ndarray:
    """The standard normal numbers of one row's positions."""
    return numbers("normal", *row)


def counts(seed: int, stream: int, sample: int, example: int, bounds: list[int], draws: int) -> np.ndarray:
    """How often each feature comes up in one row's draws: draw j is word j, and the first feature whose bound is above it."""
    drawn = np.zeros(len(bounds), dtype=np.int64)
    for word in random_words(seed, stream, sample, example, draws).tolist():
        drawn[bisect.bisect_right(bounds, word)] += 1
    return drawn


def naive_mask(seed: int, stream: int, sample: int, example: int, positions: int, p: float) -> np.ndarray:
    """True where an element is kept: its field is not below floor(p * 65536 + 0.5)."""
    return random_fields(seed, stream, sample, example, positions) >= threshold(p)


def row_positions(shape: tuple[int, ...], batch_dim: int, unit: str, channels_last: bool) -> tuple[np.ndarray, int]:
    """The noise position of every element of one example of a tensor of ``shape``, and how many positions there are.

    "element": the index in memory order, without the rows' dimension. "channel": the first other dimension's index. "row": 0.
    """
    order = [d for d in ([0, *range(2, len(shape)), 1] if channels_last else range(len(shape))) if d != batch_dim]
    inside = tuple(n for d, n in enumerate(shape) if d != batch_dim)
    if unit == "row":
        return np.zeros(inside, dtype=np.int64), 1
    if unit == "channel":
        return np.broadcast_to(np.arange(inside[0]).reshape(-1, *[1] * (len(inside) - 1)), inside), inside[0]
    index = np.arange(math.prod(inside)).reshape([shape[d] for d in order])
    return index.transpose(np.argsort(order)), index.size


def in_channels_last_order(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous()


def naive_rows(
    row, x: Tensor, *, samples, seed, stream=0, sample_ids=None, first_example=0, expand=True, batch_dim=0, unit="element"
) -> Tensor:
    """What a noise call on ``x`` draws, with K*B rows in ``batch_dim``: one row after another, sample-major.

    row(seed, stream, sample, example, positions) draws those of one example.
    """
    rows = x.shape[batch_dim]
    examples = rows if expand else rows // samples
    position, positions = row_positions(tuple(x.shape), batch_dim, unit, in_channels_last_order(x))
    drawn = []
    for s in range(samples):
        for b in range(examples):
            sample = s if sample_ids is None else sample_ids[s]
            sample = int(sample[b] if isinstance(sample, list | Tensor) and np.ndim(sample) else sample)
            drawn.append(row(seed, stream, sample, first_example + b, positions)[position])
    rows = np.stack(drawn) if drawn else np.zeros((0, *position.shape), dtype=row(0, 0, 0, 0, 1).dtype)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(rows, 0, batch_dim)))


def naive_keep(x: Tensor, p, **address) -> Tensor:
    """The keep mask of a noise call on ``x``, bool, with K*B rows in ``batch_dim``."""
    return naive_rows(lambda *row: naive_mask(*row, p), x, **address)


def naive_numbers(x: Tensor, law: str, **address) -> Tensor:
    """The numbers of a noise call on ``x``, float64, with K*B rows in ``batch_dim``."""
    return naive_rows(partial(numbers, law), x, **address)


def naive_noise(x: Tensor, p: float, *, samples: int, expand: bool = True, batch_dim: int = 0, **address) -> Tensor:
    """keep * scale * x, in float32 (float64 for float64) and rounded once; dropped elements are +0 whatever x holds."""
    keep = naive_keep(x, p, samples=samples, expand=expand, batch_dim=batch_dim, **address)
    x = x.detach().cpu()
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    scaled = (x.to(acc) * torch.tensor(effective_scale(p), dtype=acc)).to(x.dtype)
    scaled = torch.cat([scaled] * samples, batch_dim) if expand else scaled
    return torch.where(keep, scaled, torch.zeros((), dtype=x.dtype))


def naive_bound(l: list[Tensor], alpha: float) -> Tensor:
    """(1/alpha) (log-sum-exp of alpha l - log S) of one unit's log-likelihoods, its limits at alpha = 0 and inf."""
    if len(l) == 1:
        return l[0]
    if alpha == 0 or all(v == -math.inf for v in l):
        return sum(l) / len(l)
    if alpha == math.inf:
        return l[max(range(len(l)), key=lambda s: (float(l[s].detach()), -s))]
    return (torch.logsumexp(alpha * torch.stack(l), 0) - math.log(len(l))) / alpha


def naive_loss(log_p: list[list[Tensor]], alpha: float = 1.0) -> Tensor:
    """Minus the mean over examples of the bound, from log-likelihoods [s][b] that autograd may differentiate."""
    examples = list(zip(*log_p, strict=True))
    return -sum(naive_bound(list(of_example), alpha) for of_example in examples) / len(examples)
