"""The loss's Triton kernels. What they compute stands in csrc/iw_cross_entropy.h, which program does what in iw_cross_entropy_plan.py.

A row is (s, g, l): noise sample s of lane l of group g, whose position is p = g * L + l. Where neighbouring positions lie at equal
distances there is one group, else a group is an example. Every sum is in a fixed order: equal calls give equal bits.

NOTE [In place] The gradient may go over the logits. An element that several threads hold must not be written by one before all have
read it: in the kernels that hold a unit a barrier stands between; in the others every element of a block belongs to one thread.
"""

import triton
import triton.language as tl

from .iw_cross_entropy_rows import (
    INFINITY,
    MEAN_ALPHA,
    cancelled,
    example_weight_of,
    exp_below,
    factors_of,
    gradient_of,
    likelihood_of,
    reference_of,
    row_statistics,
    scale_of,
    soft_of,
    squares_of,
    target_of,
    unit_cost,
    unit_log_likelihood,
    weigh,
)
from .launch import number, wide

EXACT = ["smoothing", "alpha", "lse_square_share", "ignore_index"]  # arguments of which no value is special to the compiler


@triton.jit
def finish_units(
    unit, there, bound, outer, squares, scale, example_weight, T, lse_square_share, bound_out, outer_out, loss_out, EACH: tl.constexpr
):  # fmt: skip
    """Writes what units [N] are to the loss, and returns it, float64. outer: before example weight and denominator; squares: the sum of
    :func:`squares_of`.
    """
    e = example_weight_of(example_weight, unit, T, there, bound.dtype)
    weight = (outer * e * scale).to(bound.dtype)
    loss = unit_cost(weight, bound)
    if lse_square_share is not None:
        loss += (number(lse_square_share, bound.dtype) * squares * tl.abs(e) * scale).to(bound.dtype)
    tl.store(bound_out + unit, bound, there)
    tl.store(outer_out + unit, weight, there)
    if EACH:
        tl.store(loss_out + unit, loss, there)
    return tl.where(there, loss, 0.0).to(tl.float64)


# ---- the denominator, and the total ----


@triton.jit(do_not_specialize=EXACT, debug=True)  # debug: with its assertion
def iw_cross_entropy_denominator_kernel(
    labels,  # [B, T] or None
    class_weight,  # [C] or None
    example_weight,  # [B] or None
    position_weight,  # [B, T] or None
    denominators,  # [PARTIALS]
    P,  # B * T
    T,
    C,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of d; and the one place where labels are looked at before they are used."""
    total, terms = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)  # terms: those that are not 0
    for first in range(tl.program_id(0) * BLOCK, P, tl.num_programs(0) * BLOCK):
        p = first + tl.arange(0, BLOCK).to(tl.int64)
        there = p < P
        d = tl.full((BLOCK,), 1.0, ACC)
        if labels is not None:
            label = tl.load(labels + p, there, ignore_index)
            there = there & (label != ignore_index)
            known = (label >= 0) & (label < C)
            tl.device_assert(known | (there == 0), "target: expected class indices in [0, C) or ignore_index")
            if class_weight is not None:
                d = tl.load(class_weight + label, there & known, 0.0)
        if position_weight is not None:
            d *= tl.load(position_weight + p, there, 0.0)
        d = d.to(tl.float64)
        if example_weight is not None:
            d *= tl.load(example_weight + p // T, there, 0.0).to(tl.float64)
        total += tl.where(there, d, 0.0)
        terms |= (there & (d != 0)).to(tl.int32)
    tl.store(denominators + tl.program_id(0), cancelled(tl.sum(total, 0), tl.max(terms, 0) != 0))


@triton.jit
def iw_cross_entropy_total_kernel(losses, loss, N, BLOCK: tl.constexpr):
    """The sum of N partial losses."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(losses + i, i < N, 0.0)
    tl.store(loss, tl.sum(total, 0).to(loss.dtype.element_ty))


# ---- units whose rows one program holds, or reads twice ----


@triton.jit(do_not_specialize=EXACT)
def iw_cross_entropy_fwd_kernel(
    logits,  # rows (s, g, l)
    dlogits,  # the same, or None
    labels,
    probabilities,  # [B, C, T] or None
    class_weight,
    example_weight,
    position_weight,
    normalizer,
    denominators,
    log_p,  # [S, units]
    weights,  # [S, units]
    bound,  # [units]
    outer,  # [units]
    loss,  # [units] where the reduction is none
    losses,  # [programs], else
    S,
    L,
    T,
    C_units,
    units,
    lane_blocks,
    tiles,
    sample_stride,  # these strides and the next, and C_units, in multiples of ALIGN
    group_stride,
    lane_stride,
    class_stride,  # in elements
    sample_dstride,
    group_dstride,
    lane_dstride,
    class_dstride,
    ignore_index,
    smoothing,
    alpha,
    lse_square_share,  # lse_square_scale / S, or None
    ACC: tl.constexpr,
    SOFT: tl.constexpr,
    MODE: tl.constexpr,
    MEAN: tl.constexpr,
    EACH: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One unit per lane, all classes in registers: logits, weights and gradient with one read and one write."""
    C = C_units * ALIGN
    smoothing, alpha = number(smoothing, ACC), number(alpha, ACC)
    scale = scale_of(denominators, normalizer, MEAN, PARTIALS)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_L,), tl.float64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        g = tl.cast(tile // lane_blocks, tl.int64)
        l = tl.cast(tile % lane_blocks, tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
        there, p = l < L, g * L + l
        counted, label, hot, m = target_of(labels, class_weight, position_weight, p, there, C, ignore_index, smoothing, ACC)
        lane = g * wide(group_stride, ALIGN) + l * wide(lane_stride, ALIGN)
        row = s.to(tl.int64)[:, None] * wide(sample_stride, ALIGN) + lane[None, :]
        inside = (s < S)[:, None] & counted[None, :]
        mask = inside[:, :, None] & (c < C)[None, None, :]
        z = tl.load(logits + row[:, :, None] + (c.to(tl.int64) * class_stride)[None, None, :], mask, -INFINITY).to(ACC)
        z_label = tl.load(logits + row + (label.to(tl.int64) * class_stride)[None, :], inside & (label >= 0)[None, :], 0.0).to(ACC)
        tl.debug_barrier()  # NOTE [In place]

        top = tl.max(z, 2)
        e = exp_below(z - reference_of(top)[:, :, None])
        row_total = tl.sum(e, 2)
        weighted, alone = tl.zeros((BLOCK_S, BLOCK_L), ACC), tl.zeros((1, BLOCK_L), ACC)
        if SOFT:
            soft_mask = counted[:, None] & (c < C)[None, :]
            soft = soft_of(probabilities, class_weight, p[:, None], c[None, :], soft_mask, C, T, smoothing)
            weighted = tl.sum(tl.where(mask, soft[None, :, :] * (z - reference_of(top)[:, :, None]), 0.0), 2)
            alone = tl.sum(soft, 1)[None, :]
        # NOTE [One thread a row] Threads that share a row all have its maximum and its sum, and would all do what follows for all of their
        # rows: that was two thirds of the kernel's instructions. A gather, of each row from itself, gives every row to one thread: the
        # compiler moves no thread's arrangement of a tensor through it.
        each = s[:, None] + tl.zeros((1, BLOCK_L), tl.int32)
        top, row_total = tl.gather(top, each, 0), tl.gather(row_total, each, 0)
        u, its_c = likelihood_of(
            top, row_total, weighted, alone, z_label, hot[None, :], m[None, :], counted[None, :], labels is not None, SOFT
        )
        its_c = tl.sum(its_c, 0)
        l_unit = u  # of outer weight 1, or 0 with u = 0
        if SOFT or class_weight is not None or position_weight is not None:
            l_unit = unit_log_likelihood(u, its_c[None, :], ACC)
        w, its_bound = weigh(l_unit, s[:, None], S, alpha, ACC, MODE)
        at = s.to(tl.int64)[:, None] * units + p[None, :]
        tl.store(log_p + at, l_unit, (s < S)[:, None] & there[None, :])
        tl.store(weights + at, w, (s < S)[:, None] & there[None, :])
        its_squares = tl.sum(squares_of(m[None, :], top, row_total, inside, lse_square_share), 0)
        total += finish_units(p, there, its_bound, its_c, its_squares, scale, example_weight, T, lse_square_share, bound, outer, loss, EACH)

        if dlogits is not None:
            e_unit = example_weight_of(example_weight, p, T, there, ACC)[None, :]
            factor, k, live = factors_of(
                w, scale.to(ACC), e_unit, its_c[None, :], m[None, :], top, row_total, counted[None, :], lse_square_share
            )
            factor, k = tl.where(live, factor, 0.0), tl.where(live, k, 0.0)  # e is finite there, so that 0 * e is 0
            gradient = factor[:, :, None] * e
            if SOFT:
                gradient -= k[:, :, None] * soft[None, :, :]
                if labels is not None:
                    gradient -= tl.where(c[None, None, :] == label[None, :, None], (k * hot[None, :])[:, :, None], 0.0)
                gradient = tl.where(live[:, :, None], gradient, 0.0)
            drow = (
                s.to(tl.int64)[:, None] * wide(sample_dstride, ALIGN)
                + (g * wide(group_dstride, ALIGN) + l * wide(lane_dstride, ALIGN))[None, :]
            )
            dmask = ((s < S)[:, None] & there[None, :])[:, :, None] & (c < C)[None, None, :]
            at_class = (c.to(tl.int64) * class_dstride)[None, None, :]
            tl.store(dlogits + drow[:, :, None] + at_class, gradient.to(dlogits.dtype.element_ty), dmask)
            if labels is not None and not SOFT:
                # The label's element once more, by a thread for each row: a comparison for every element would take longer.
                tl.debug_barrier()
                mended = factor * exp_below(z_label - reference_of(top)) - k * hot[None, :]
                at_label = drow + (label.to(tl.int64) * class_dstride)[None, :]
                mended = tl.where(live, mended, 0.0).to(dlogits.dtype.element_ty)
                tl.store(dlogits + at_label, mended, inside & (label >= 0)[None, :])
    if not EACH:
        tl.store(losses + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=EXACT)
def iw_cross_entropy_reread_kernel(
    logits, dlogits, labels, probabilities, class_weight, example_weight, position_weight, normalizer, denominators, log_p, weights,
    bound, outer, loss, losses, S, L, T, C_units, units, lane_blocks, tiles, sample_stride, group_stride, lane_stride, class_stride,
    sample_dstride, group_dstride, lane_dstride, class_dstride, ignore_index, smoothing, alpha, lse_square_share,
    ACC: tl.constexpr, SOFT: tl.constexpr, MODE: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, ALIGN: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One unit at a time, its rows side by side, in steps of BLOCK_C classes: once for the weights and once for the gradient.

    Parameters as above. BLOCK_L is 1.
    """
    C = C_units * ALIGN
    smoothing, alpha = number(smoothing, ACC), number(alpha, ACC)
    scale = scale_of(denominators, normalizer, MEAN, PARTIALS)
    s = tl.arange(0, BLOCK_S)
    one = tl.arange(0, 1)
    total = tl.zeros((1,), tl.float64)
    for unit in range(tl.program_id(0), tiles, tl.num_programs(0)):
        g, l = tl.cast(unit // lane_blocks, tl.int64), tl.cast(unit % lane_blocks, tl.int64)
        p = g * L + l + one
        counted, label, hot, m = target_of(labels, class_weight, position_weight, p, one == 0, C, ignore_index, smoothing, ACC)
        row = s.to(tl.int64) * wide(sample_stride, ALIGN) + (g * wide(group_stride, ALIGN) + l * wide(lane_stride, ALIGN))
        inside = (s < S) & counted
        top, row_total, weighted, alone = row_statistics(
            logits, row, inside, p, probabilities, class_weight, C, T, class_stride, smoothing, ACC, SOFT, True, BLOCK_C
        )
        z_label = tl.load(logits + row + label.to(tl.int64) * class_stride, inside & (label >= 0), 0.0).to(ACC)
        tl.debug_barrier()  # NOTE [In place]
        u, its_c = likelihood_of(top, row_total, weighted, alone, z_label, hot, m, inside, labels is not None, SOFT)
        its_c = tl.sum(tl.where(s == 0, its_c, 0.0), 0) + tl.zeros((1,), ACC)
        l_unit = unit_log_likelihood(u, its_c, ACC)
        w, its_bound = weigh(l_unit[:, None], s[:, None], S, alpha, ACC, MODE)
        w = tl.sum(w, 1)
        at = s.to(tl.int64) * units + p
        tl.store(log_p + at, l_unit, s < S)
        tl.store(weights + at, w, s < S)
        its_squares = tl.sum(squares_of(m, top, row_total, inside, lse_square_share), 0)
        total += finish_units(
            p, one == 0, its_bound, its_c, its_squares, scale, example_weight, T, lse_square_share, bound, outer, loss, EACH
        )

        if dlogits is not None:
            e_unit = example_weight_of(example_weight, p, T, one == 0, ACC)
            factor, k, live = factors_of(w, scale.to(ACC), e_unit, its_c, m, top, row_total, counted, lse_square_share)
            drow = s.to(tl.int64) * wide(sample_dstride, ALIGN) + (g * wide(group_dstride, ALIGN) + l * wide(lane_dstride, ALIGN))
            for first in range(0, C, BLOCK_C):
                c = first + tl.arange(0, BLOCK_C)
                mask = inside[:, None] & (c < C)[None, :]
                z = tl.load(logits + row[:, None] + (c.to(tl.int64) * class_stride)[None, :], mask, 0.0, eviction_policy="evict_first")
                e = exp_below(z.to(ACC) - reference_of(top)[:, None])
                soft = 0.0
                if SOFT:
                    soft = soft_of(
                        probabilities, class_weight, p[:, None], c[None, :], (counted[:, None]) & (c < C)[None, :], C, T, smoothing
                    )
                is_label = c[None, :] == label[:, None]
                gradient = gradient_of(
                    e, factor[:, None], k[:, None], soft, hot[:, None], is_label, live[:, None], labels is not None, SOFT
                )
                at_class = (c.to(tl.int64) * class_dstride)[None, :]
                there = (s < S)[:, None] & (c < C)[None, :]
                tl.store(dlogits + drow[:, None] + at_class, gradient.to(dlogits.dtype.element_ty), there)
    if not EACH:
        tl.store(losses + tl.program_id(0), tl.sum(total, 0))


# ---- all rows, kernel after kernel ----


@triton.jit
def rows_of(L, groups, lane_blocks, BLOCK_L: tl.constexpr, at):
    """Sample, group and lanes [BLOCK_L] of the ``at``-th block of rows."""
    block = at % lane_blocks
    g = (at // lane_blocks) % groups
    s = at // lane_blocks // groups
    return s.to(tl.int64), g.to(tl.int64), block.to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)


@triton.jit(do_not_specialize=EXACT)
def iw_cross_entropy_statistics_kernel(
    logits, labels, probabilities, class_weight, position_weight,
    tops,  # [S, P], the largest logit of a row
    totals,  # [S, P]
    likelihoods,  # [S, P]: u where units share positions, else l
    cs,  # [P]
    squares,  # [S, P], or None: |m| lse^2 of a row
    L, groups, lane_blocks, T, P, C_units, sample_stride, group_stride, lane_stride, class_stride, ignore_index, smoothing,
    lse_square_share,
    ACC: tl.constexpr, SOFT: tl.constexpr, SHARED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    smoothing = number(smoothing, ACC)
    s, g, l = rows_of(L, groups, lane_blocks, BLOCK_L, tl.program_id(0))
    there, p = l < L, g * L + l
    counted, label, hot, m = target_of(labels, class_weight, position_weight, p, there, C, ignore_index, smoothing, ACC)
    row = s * wide(sample_stride, ALIGN) + g * wide(group_stride, ALIGN) + l * wide(lane_stride, ALIGN)
    top, total, weighted, alone = row_statistics(
        logits, row, counted, p, probabilities, class_weight, C, T, class_stride, smoothing, ACC, SOFT, False, BLOCK_C
    )
    z_label = tl.load(logits + row + label.to(tl.int64) * class_stride, counted & (label >= 0), 0.0).to(ACC)
    u, c = likelihood_of(top, total, weighted, alone, z_label, hot, m, counted, labels is not None, SOFT)
    if not SHARED:
        u = unit_log_likelihood(u, c, ACC)
    tl.store(tops + s * P + p, top, there)
    tl.store(totals + s * P + p, total, there)
    tl.store(likelihoods + s * P + p, u, there)
    if squares is not None:
        tl.store(squares + s * P + p, squares_of(m, top, total, counted, lse_square_share), there)
    if s == 0:
        tl.store(cs + p, c, there)


@triton.jit(do_not_specialize=EXACT, debug=True)  # debug: with its assertion
def iw_cross_entropy_join_kernel(
    labels,
    likelihoods,  # u [S, B * T]
    cs,  # [B * T]
    squares,  # [S, B * T], or None
    log_p,  # [S, B]
    unit_squares,  # [S, B], or None
    outers,  # [B]: cbar
    S, B, T, ignore_index, ACC: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An example's log-likelihood under one sample, and its sum of squares, from its positions."""
    s, b = (tl.program_id(0) // B).to(tl.int64), (tl.program_id(0) % B).to(tl.int64)
    u, c, counted = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    positive, negative, squared = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, T, BLOCK):
        t = first + tl.arange(0, BLOCK)
        there = t < T
        u += tl.load(likelihoods + (s * B + b) * T + t, there, 0.0).to(tl.float64)
        if squares is not None:
            squared += tl.load(squares + (s * B + b) * T + t, there, 0.0).to(tl.float64)
        its_c = tl.load(cs + b * T + t, there, 0.0).to(tl.float64)
        c += its_c
        positive |= (its_c > 0).to(tl.int32)
        negative |= (its_c < 0).to(tl.int32)
        counts = there
        if labels is not None:
            counts = there & (tl.load(labels + b * T + t, there, ignore_index) != ignore_index)
        counted += tl.where(counts, 1.0, 0.0)
    if MODE != MEAN_ALPHA:
        both = (tl.max(positive, 0) != 0) & (tl.max(negative, 0) != 0)
        tl.device_assert((both == 0) | (S == 1), "weights: expected positions of one sign in each example at level 'example'")
    n, cbar = tl.sum(counted, 0), tl.sum(c, 0)
    cbar = tl.where(n > 0, cbar / tl.where(n > 0, n, 1.0), 0.0)
    tl.store(log_p + s * B + b, unit_log_likelihood(tl.sum(u, 0), cbar, tl.float64).to(ACC))
    if squares is not None:
        tl.store(unit_squares + s * B + b, tl.sum(squared, 0).to(ACC))
    if s == 0:
        tl.store(outers + b, cbar.to(ACC))


@triton.jit(do_not_specialize=EXACT)
def iw_cross_entropy_weights_kernel(
    log_p,  # [S, units]
    outers,  # [units], before example weight and denominator
    unit_squares,  # [S, units], or None
    example_weight, normalizer, denominators, weights, bound, outer, loss, losses,
    S, T,  # T: units of an example
    units, alpha, lse_square_share,
    ACC: tl.constexpr, MODE: tl.constexpr, MEAN: tl.constexpr, EACH: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    alpha = number(alpha, ACC)
    scale = scale_of(denominators, normalizer, MEAN, PARTIALS)
    s, unit = tl.arange(0, BLOCK_S), tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    there = unit < units
    at, mask = s.to(tl.int64)[:, None] * units + unit[None, :], (s < S)[:, None] & there[None, :]
    w, its_bound = weigh(tl.load(log_p + at, mask, 0.0), s[:, None], S, alpha, ACC, MODE)
    tl.store(weights + at, w, mask)
    its_outer = tl.load(outers + unit, there, 0.0)
    its_squares = tl.zeros_like(its_bound)
    if unit_squares is not None:
        its_squares = tl.sum(tl.load(unit_squares + at, mask, 0.0), 0)
    total = finish_units(
        unit, there, its_bound, its_outer, its_squares, scale, example_weight, T, lse_square_share, bound, outer, loss, EACH
    )
    if not EACH:
        tl.store(losses + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=EXACT)
def iw_cross_entropy_gradient_kernel(
    logits, dlogits, labels, probabilities, class_weight, example_weight, position_weight, normalizer, denominators,
    weights,  # [S, units]
    tops, totals, cs,
    L, groups, lane_blocks, class_blocks, T, P, C_units, units, sample_stride, group_stride, lane_stride, class_stride,
    sample_dstride, group_dstride, lane_dstride, class_dstride, ignore_index, smoothing, lse_square_share,
    ACC: tl.constexpr, SOFT: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, ALIGN: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    smoothing = number(smoothing, ACC)
    scale = scale_of(denominators, normalizer, MEAN, PARTIALS)
    s, g, l = rows_of(L, groups, lane_blocks, BLOCK_L, tl.program_id(0) // class_blocks)
    there, p = l < L, g * L + l
    counted, label, hot, m = target_of(labels, class_weight, position_weight, p, there, C, ignore_index, smoothing, ACC)
    w = tl.load(weights + s * units + (p // T if SHARED else p), there, 0.0)
    e_unit = example_weight_of(example_weight, p, T, there, ACC)
    top = tl.load(tops + s * P + p, there, 0.0)
    total, its_c = tl.load(totals + s * P + p, there, 1.0), tl.load(cs + p, there, 0.0)
    factor, k, live = factors_of(w, scale.to(ACC), e_unit, its_c, m, top, total, counted, lse_square_share)

    c = (tl.program_id(0) % class_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = counted[:, None] & (c < C)[None, :]
    row = s * wide(sample_stride, ALIGN) + g * wide(group_stride, ALIGN) + l * wide(lane_stride, ALIGN)
    z = tl.load(logits + row[:, None] + (c.to(tl.int64) * class_stride)[None, :], mask, 0.0, eviction_policy="evict_first")
    e = exp_below(z.to(ACC) - reference_of(top)[:, None])
    soft = 0.0
    if SOFT:
        soft = soft_of(probabilities, class_weight, p[:, None], c[None, :], mask, C, T, smoothing)
    is_label = c[None, :] == label[:, None]
    gradient = gradient_of(e, factor[:, None], k[:, None], soft, hot[:, None], is_label, live[:, None], labels is not None, SOFT)
    drow = s * wide(sample_dstride, ALIGN) + g * wide(group_dstride, ALIGN) + l * wide(lane_dstride, ALIGN)
    at_class = (c.to(tl.int64) * class_dstride)[None, :]
    tl.store(dlogits + drow[:, None] + at_class, gradient.to(dlogits.dtype.element_ty), there[:, None] & (c < C)[None, :])
