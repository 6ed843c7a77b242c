"""An upstream gradient of the loss, applied in Triton to a gradient that is there already."""

import triton
import triton.language as tl


@triton.jit
def iw_cross_entropy_scale_kernel(dlogits, factor, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """dlogits *= factor, n elements without gaps; nothing is read or written where the factor is 1."""
    f = tl.load(factor).to(ACC)
    if f != 1:
        step = tl.cast(tl.num_programs(0), tl.int64) * BLOCK
        for first in range(tl.cast(tl.program_id(0), tl.int64) * BLOCK, n, step):
            i = first + tl.arange(0, BLOCK).to(tl.int64)
            x = tl.load(dlogits + i, i < n, 0.0).to(ACC)
            tl.store(dlogits + i, (x * f).to(dlogits.dtype.element_ty), i < n)
