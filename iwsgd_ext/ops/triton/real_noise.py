"""Real-valued noise in Triton: the laws of csrc/real_noise.h, their numbers made where they are used. Tiles are those of dropout
(noise_plan.py)."""

import triton
import triton.language as tl
from torch import Tensor

from .address import IN_GROUPS, address_values, call_and_part, read_ahead, sample_of, tile_of, words_of_row
from .launch import float_bits, guard, launch, number, wide
from .philox import philox

SIZE = tl.constexpr(4)  # elements of one call: an element takes a word of 32 bits, two elements two of them
EXACT = ["stream", "first_example", "std"]
SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
NORMAL, LAPLACE, UNIFORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the laws, by the op's numbers


@triton.jit
def polynomial(x, c0, c1, c2, c3, c4, c5, c6, c7):
    return ((((((c7 * x + c6) * x + c5) * x + c4) * x + c3) * x + c2) * x + c1) * x + c0


@triton.jit
def minus_log(u, near_one, less):
    """-ln u of u in (0, 1], float32. ``less`` replaces u - 1 where ``near_one``, for u near 1 whose u - 1 is known better than from u."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - SQRT_HALF) >> 23
    f = tl.where(near_one, less, (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0)
    log = polynomial(f, 0.99999994, -0.50000364, 0.3333506, -0.24969909, 0.19900165, -0.1725083, 0.16222583, -0.10106897)
    return -(e.to(tl.float32) * 0.693147181 + log * f)


@triton.jit
def radius_and_turn(a, b):
    """sqrt(-2 ln u), and cosine and sine of what the angle has over a quarter turn, float32. NOTE [Normals in float32] in the header."""
    d = (a.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    upper = d < 0
    r = tl.sqrt(2.0 * minus_log(tl.where(upper, d + 1.0, d), upper & (d > -0.25), d))
    turned = b + 0x20000000
    h = (((turned >> 7) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    h2 = h * h
    c = ((-0.02042625 * h2 + 0.25360635) * h2 - 1.233698) * h2 + 1.0
    s = (((-0.004602177 * h2 + 0.07968023) * h2 - 0.6459635) * h2 + 1.5707964) * h
    return r, c, s


@triton.jit
def radius_and_turn_64(a, b):
    """The same in float64: Taylor's series of both, whose next terms are below 1e-16 for an eighth of a turn."""
    r = tl.sqrt(-2.0 * tl.log((a.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    turned = b + 0x20000000
    x = (((turned & 0x3FFFFFFF).to(tl.float64) + 0.5) * 9.313225746154785e-10 - 0.5) * 1.5707963267948966
    x2 = x * x
    c = polynomial(x2, 1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200)
    c += x2 * x2 * (x2 * x2) * (x2 * x2) * (x2 * x2) / 20922789888000
    s = polynomial(x2, 1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000)
    return r, c, s * x


@triton.jit
def normal_pair(a, b, ACC: tl.constexpr):
    """Two independent standard normal numbers of words a and b (Box and Muller, 1958)."""
    if tl.float64 == ACC:
        r, c, s = radius_and_turn_64(a, b)
    else:
        r, c, s = radius_and_turn(a, b)
    quarter = (b + 0x20000000) >> 30  # the nearest quarter turn
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, s, c), tl.where(odd, c, s)
    return r * tl.where(((quarter + 1) & 2) != 0, -x, x), r * tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def one_number(word, LAW: tl.constexpr, ACC: tl.constexpr):
    """The number of a word, of a law that takes one word for each."""
    if LAW == UNIFORM:
        z = (word.to(tl.int32, bitcast=True).to(ACC) + 0.5) * 8.065490087349327e-10  # sqrt(3) / 2^31
    else:
        tl.static_assert(LAW == LAPLACE)
        lower = (word & 0x7FFFFFFF).to(tl.int32, bitcast=True)
        if tl.float64 == ACC:
            size = -tl.log((lower.to(tl.float64) + 0.5) * 4.656612873077393e-10)
        else:
            u = (lower.to(tl.float32) + 0.5) * 4.656612873077393e-10
            size = minus_log(u, u > 1.0, u)  # nothing is known better than u, which is at most 1
        size *= 0.7071067811865476
        z = tl.where((word >> 31) != 0, -size, size)
    return z


@triton.jit
def number_pair(a, b, LAW: tl.constexpr, ACC: tl.constexpr):
    """The numbers of words a and b."""
    if LAW == NORMAL:
        first, second = normal_pair(a, b, ACC)
    else:
        first, second = one_number(a, LAW, ACC), one_number(b, LAW, ACC)
    return first, second


@triton.jit
def numbers_of(call, part, example, sample, stream, seed, FORM: tl.constexpr, LAW: tl.constexpr, ACC: tl.constexpr):
    """The number of each element of a tile: [R, I], or [R, 1] where a line shares one."""
    w0, w1, w2, w3 = philox(call, example, sample, stream, seed)
    if FORM == IN_GROUPS:
        z0, z1 = number_pair(w0, w1, LAW, ACC)
        z2, z3 = number_pair(w2, w3, LAW, ACC)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        z0, z1 = number_pair(tl.where(part < 2, w0, w2), tl.where(part < 2, w1, w3), LAW, ACC)
        z = tl.where(part % 2 == 0, z0, z1)
    return z


@triton.jit(do_not_specialize=EXACT)
def real_noise_fwd_kernel(
    x,  # [O, B, I] where EXPAND, else [O, K*B, I]
    y,  # [O, K*B, I]
    origin,  # [3]
    sample_ids,  # [K] or [K, B], or None
    K, B, I_units, lines, per_row, width_units, positions, share, column_blocks, blocks, part, stream, first_example, std,
    LAW: tl.constexpr, ACC: tl.constexpr, EXPAND: tl.constexpr, MULTIPLY: tl.constexpr, PER_EXAMPLE: tl.constexpr, FORM: tl.constexpr,
    WRAPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    I, width, pid = wide(I_units, ALIGN), wide(width_units, ALIGN), tl.program_id(0)
    row, i, inside, start = tile_of(pid % blocks, lines, per_row, width, column_blocks, BLOCK_R, BLOCK_I)
    column = start + tl.arange(0, BLOCK_I)[None, :]
    o, b, there = row // B, row % B, inside & (column < width)
    call, word = call_and_part(o, i, start, column, I, positions, share, SIZE, FORM, WRAPS, BLOCK_I)
    seed, the_stream, example = words_of_row(origin, stream, first_example, b)
    std = number(std, ACC)
    begin = (pid // blocks) * part
    end = tl.minimum(begin + part, K)
    first = ((o * K + begin) * B + b) * I + i + column  # in y, of the first sample
    source, at = x + first, y + first
    if EXPAND:
        value = tl.load(x + row * I + i + column, there, 0.0).to(ACC)
    for s in range(begin, end, AHEAD):
        if not EXPAND:
            values, source = read_ahead(source, B * I, there, end - s, AHEAD)
        for j in tl.static_range(AHEAD):
            if s + j < end:
                if not EXPAND:
                    value = values[j].to(ACC)
                sample = sample_of(sample_ids, s + j, b, B, inside, PER_EXAMPLE)
                noise = std * numbers_of(call, word, example, sample, the_stream, seed, FORM, LAW, ACC)
                result = value * (1.0 + noise) if MULTIPLY else value + noise
                tl.store(at, result.to(y.dtype.element_ty), there)
            at += B * I


@triton.jit(do_not_specialize=EXACT)
def real_noise_bwd_kernel(
    dy,  # [O, K*B, I]
    dx,  # [O, B, I]
    origin, sample_ids,
    K, B, I_units, lines, per_row, width_units, positions, share, column_blocks, stream, first_example, std,
    LAW: tl.constexpr, ACC: tl.constexpr, PER_EXAMPLE: tl.constexpr, FORM: tl.constexpr, WRAPS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    I, width = wide(I_units, ALIGN), wide(width_units, ALIGN)
    row, i, inside, start = tile_of(tl.program_id(0), lines, per_row, width, column_blocks, BLOCK_R, BLOCK_I)
    column = start + tl.arange(0, BLOCK_I)[None, :]
    o, b, there = row // B, row % B, inside & (column < width)
    call, word = call_and_part(o, i, start, column, I, positions, share, SIZE, FORM, WRAPS, BLOCK_I)
    seed, the_stream, example = words_of_row(origin, stream, first_example, b)
    std = number(std, ACC)
    at = dy + (o * K * B + b) * I + i + column  # of sample 0
    total = tl.zeros((BLOCK_R, BLOCK_I), ACC)
    for s in range(0, K, AHEAD):
        values, at = read_ahead(at, B * I, there, K - s, AHEAD)
        for j in tl.static_range(AHEAD):
            if s + j < K:
                sample = sample_of(sample_ids, s + j, b, B, inside, PER_EXAMPLE)
                total += values[j].to(ACC) * (1.0 + std * numbers_of(call, word, example, sample, the_stream, seed, FORM, LAW, ACC))
    tl.store(dx + row * I + i + column, total.to(dx.dtype.element_ty), there)


def real_noise_fwd_triton(x: Tensor, y: Tensor, address: tuple, law: int, std: float, multiply: bool, expand: bool) -> None:
    """y = x * (1 + std * z), or x + std * z; address: the op's arguments from origin to share."""
    x = x.contiguous()
    examples = x.shape[1] if expand else x.shape[1] // address[2]
    values, tiles = address_values(x, examples, address, SIZE.value, True)
    with guard(x):
        more = {"x": x, "y": y, "std": float_bits(std), "LAW": law, "EXPAND": expand, "MULTIPLY": multiply}
        more |= {"AHEAD": 1} if expand else {}  # nothing is read from sample to sample
        launch(real_noise_fwd_kernel, tiles.programs, tiles.warps, values | more)


def real_noise_bwd_triton(dy: Tensor, dx: Tensor, address: tuple, law: int, std: float) -> None:
    """dx = sum over the samples of (1 + std * z) * dy."""
    dy = dy.contiguous()
    values, tiles = address_values(dy, dx.shape[1], address, SIZE.value, False)
    with guard(dy):
        launch(real_noise_bwd_kernel, tiles.programs, tiles.warps, values | {"dy": dy, "dx": dx, "std": float_bits(std), "LAW": law})


def _real_noise(x: Tensor, *arguments) -> Tensor:
    *address, law, std, multiply, expand = arguments
    y = x.new_empty(x.shape[0], x.shape[1] * address[2] if expand else x.shape[1], x.shape[2])
    real_noise_fwd_triton(x, y, tuple(address), law, std, multiply, expand)
    return y


def _real_noise_sum(dy: Tensor, *arguments) -> Tensor:
    *address, law, std = arguments
    dx = dy.new_empty(dy.shape[0], dy.shape[1] // address[2], dy.shape[2])
    real_noise_bwd_triton(dy, dx, tuple(address), law, std)
    return dx


OPS = {"real_noise": _real_noise, "real_noise_sum": _real_noise_sum}
