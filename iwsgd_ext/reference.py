"""What the library computes, in plain PyTorch: the definition that every kernel is held to. Read this first.

Notation, here and everywhere: B examples, S (or K, in one pass) noise samples, T positions, C classes. Expanded tensors are
sample-major: row s*B + b is example b under noise sample s.
"""

import torch
from torch import Tensor

GROUP = 8  # elements of one Philox call
FIELD_RANGE = 65536  # a dropout probability is a number of 16-bit fields
LOW = 0xFFFFFFFF


def philox(group: Tensor, example: Tensor, sample: Tensor, stream: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011): 128 random bits for each counter, as four words of 32 bits.

    Args:
        group, example, sample, stream: the counter's words, int64 tensors in [0, 2^32) that broadcast together.
        seed: int64, its low half is key word 0, its high half key word 1.

    Returns:
        int64 [..., 4], each in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(group, example, sample, stream)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves their bits as they should be
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack([c0, c1, c2, c3], -1)


def fields(words: Tensor) -> Tensor:
    """The eight 16-bit fields of words [..., 4], as int64 [..., 8]: field j is bits 16*(j%2) .. +16 of word j//2."""
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)


def keep_mask(
    origin: Tensor, sample_ids: Tensor | None, samples: int, stream: int, first_example: int, threshold: int, examples: int, positions: int
) -> Tensor:
    """True where an element is kept: bool [samples, examples, positions]. Arguments as in :func:`noise`."""
    device = origin.device
    sample = torch.arange(samples, device=device) if sample_ids is None else sample_ids
    sample = sample[:, None, None] if sample.dim() == 1 else sample[:, :, None]
    example = (torch.arange(examples, device=device) + (origin[2] + first_example))[:, None]
    group = torch.arange((positions + GROUP - 1) // GROUP, device=device)
    words = philox(group, example & LOW, sample & LOW, (origin[1] + stream) & LOW, origin[0])
    return fields(words).flatten(-2)[..., :positions] >= threshold


def keep_scale(threshold: int) -> float:
    """The factor of kept elements, so that noise is unbiased: one over the probability that the threshold really keeps."""
    return FIELD_RANGE / (FIELD_RANGE - threshold) if threshold < FIELD_RANGE else 0.0


def _keep(x: Tensor, examples: int, samples: int, address: tuple) -> Tensor:
    origin, sample_ids, _, stream, first_example, threshold, positions, share = address
    mask = keep_mask(origin, sample_ids, samples, stream, first_example, threshold, examples, positions)  # [K, B, P]
    outer, inner = x.shape[0], x.shape[2]
    position = torch.arange(outer * inner, device=x.device) // share % max(positions, 1)
    return mask[:, :, position].view(samples, examples, outer, inner).permute(2, 0, 1, 3)  # [O, K, B, I]


def noise(
    x: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    threshold: int,
    positions: int,
    share: int,
    expand: bool,
) -> Tensor:
    """Dropout noise: y = keep * scale * x with the keep mask of the call's address (eq 1, g multiplicative).

    Args:
        x: [O, B, I] where expand, else [O, K*B, I]: the examples' dimension stands second.
        origin: int64 [3]: seed, stream and first example; the next two are added to the stream and first_example given here.
        sample_ids: int64 [K] or [K, B], the noise samples' ids; None is 0 .. K-1.
        samples: K, noise samples in this pass.
        threshold: drop where a 16-bit field is less than this, in 0 .. 65536.
        positions, share: element (o, i) of an example has position ((o * I + i) // share) % positions.
        expand: draw K noises for each example, or one for each row of K*B.

    Returns:
        [O, K*B, I].
    """
    address = (origin, sample_ids, samples, stream, first_example, threshold, positions, share)
    examples = x.shape[1] if expand else x.shape[1] // samples
    outer, inner = x.shape[0], x.shape[2]
    x = x.view(outer, 1, examples, inner) if expand else x.reshape(outer, samples, examples, inner)
    y = _multiply(x, keep_scale(threshold))
    y = torch.where(_keep(y[:, 0], examples, samples, address), y, torch.zeros((), dtype=y.dtype, device=y.device))
    return y.to(x.dtype).reshape(outer, samples * examples, inner)


def noise_sum(
    dy: Tensor,
    origin: Tensor,
    sample_ids: Tensor | None,
    samples: int,
    stream: int,
    first_example: int,
    threshold: int,
    positions: int,
    share: int,
) -> Tensor:
    """The gradient of an expanding :func:`noise`: dx = sum over the noise samples of keep * scale * dy, [O, B, I]."""
    address = (origin, sample_ids, samples, stream, first_example, threshold, positions, share)
    outer, rows, inner = dy.shape
    dy = dy.reshape(outer, samples, rows // samples, inner)
    y = _multiply(dy, 1.0)
    y = torch.where(_keep(y[:, 0], rows // samples, samples, address), y, torch.zeros((), dtype=y.dtype, device=y.device))
    return (y.sum(1) * keep_scale(threshold)).to(dy.dtype)


def _multiply(x: Tensor, scale: float) -> Tensor:
    """x * scale in float32 (float64 for float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) * scale
