"""The importance weighted cross-entropy in Triton: which kernels a call is, and the op's registration."""

import torch
import triton
from torch import Tensor

from ... import reference
from ...reference import LossArguments
from . import iw_cross_entropy_kernels as kernels
from .device import alignment, device_of, divide_up, power_of_two
from .iw_cross_entropy_plan import MAX_SAMPLES, PARTIALS, Shape, held_plan, reread_plan, split_plan, weights_plan
from .iw_cross_entropy_rows import alpha_mode
from .iw_cross_entropy_scale import iw_cross_entropy_scale_kernel
from .launch import TYPES, float_bits, guard, launch

NONE, MEAN, SUM = 0, 1, 2
LEAST_ALPHA = {torch.float32: 1e-30, torch.float64: 1e-290}  # less would make alpha (l - max) subnormal; the limit is long reached
BLOCK = 1024  # of sums over positions
SCALE_PROGRAMS = 2048  # fill a GPU of 132 multiprocessors twice; few, as mostly they have nothing to do


def lies_even(x: Tensor) -> bool:
    """True where the positions of one noise sample follow each other at one distance, from example to example too."""
    return x.shape[2] == 1 or x.stride(0) == x.shape[2] * x.stride(2)


def strides_of(x: Tensor, batch: int, even: bool) -> tuple[int, int, int, int]:
    """Elements from one sample, group, lane and class of x [S*B, C, T] to the next."""
    row, class_, position = x.stride()
    class_ = 1 if x.shape[1] == 1 else class_  # the stride of one class may be anything
    if x.shape[2] == 1:
        return batch * row, 0, row, class_
    return batch * row, 0 if even else row, position, class_


def iw_cross_entropy_fwd_triton(
    logits: Tensor,  # [S*B, C, T]
    dlogits: Tensor | None,  # where the gradient goes: as logits, or the logits themselves, or nowhere
    a: LossArguments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, log_p and weights [S, units], bound and outer [units]: the op, but for the memory of the gradient."""
    rows, C, T = logits.shape
    target, samples = a.target, a.samples
    B = rows // samples
    P, units, shared = B * T, B * T if a.per_position else B, T != 1 and not a.per_position
    acc = torch.promote_types(logits.dtype, torch.float32)
    has_labels = target.dtype == torch.int64
    if samples > MAX_SAMPLES:
        raise ValueError(f"samples: the triton backend takes at most {MAX_SAMPLES}, got {samples}; iw.set_backend('reference') takes more")
    if C >= 1 << 30:
        raise ValueError(f"logits: expected fewer than 2^30 classes, got {C}")
    if has_labels and logits.device.type == "cpu":
        reference.check_labels(target, a.ignore_index, C)  # the interpreter's own error would not say which

    even = lies_even(logits) and (dlogits is None or lies_even(dlogits))
    groups, lanes = (1, P) if even else (B, T)
    strides = strides_of(logits, B, even)
    dstrides = strides if dlogits is None else strides_of(dlogits, B, even)
    align = alignment(logits.element_size(), C, *strides[:3], *dstrides[:3])
    strides, dstrides = ((*(n // align for n in of[:3]), of[3]) for of in (strides, dstrides))
    adjacent, soft = strides[3] == dstrides[3] == 1, not has_labels or a.smoothing != 0
    shape = Shape(samples, groups, lanes, C, shared, logits.element_size(), acc.itemsize, adjacent, soft)

    def empty(*sizes: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=logits.device)

    log_p, weights, bound, outer = empty(samples, units), empty(samples, units), empty(units), empty(units)
    loss = empty(units) if a.reduction == NONE else empty()
    denominators = empty(PARTIALS, dtype=torch.float64)
    inputs = {"logits": logits, "labels": target if has_labels else None, "probabilities": None if has_labels else target}
    share = float_bits(a.lse_square_scale / samples) if a.lse_square_scale else None  # None: without the instructions for it
    numbers = {"lse_square_share": share, "smoothing": float_bits(a.smoothing), "alpha": float_bits(max(a.alpha, LEAST_ALPHA[acc]))}
    results = {"dlogits": dlogits, "log_p": log_p, "weights": weights, "bound": bound, "outer": outer, "loss": loss}
    sizes = {"S": samples, "L": lanes, "T": T, "P": P, "B": B, "C": C, "C_units": C // align, "units": units, "groups": groups}
    forms = {"ACC": TYPES[acc], "SOFT": soft, "SHARED": shared, "MODE": alpha_mode(a.alpha)}
    forms |= {"MEAN": a.reduction == MEAN, "EACH": a.reduction == NONE, "ALIGN": align, "PARTIALS": PARTIALS}
    # Tensors and integers that the kernels take as they are have the arguments' own names there.
    values = {**a._asdict(), "denominators": denominators, **inputs, **results, **sizes, **numbers, **forms}
    values |= zip(("sample_stride", "group_stride", "lane_stride", "class_stride"), strides, strict=True)
    values |= zip(("sample_dstride", "group_dstride", "lane_dstride", "class_dstride"), dstrides, strict=True)
    with guard(logits):
        launch(kernels.iw_cross_entropy_denominator_kernel, PARTIALS, 4, {**values, "BLOCK": BLOCK})
        plan, kernel = held_plan(shape, device_of(logits)), kernels.iw_cross_entropy_fwd_kernel
        if plan is None:
            plan, kernel = reread_plan(shape, device_of(logits)), kernels.iw_cross_entropy_reread_kernel
        if plan is None:
            losses = _split(shape, values, empty)
        else:
            losses = empty(plan.programs, dtype=torch.float64)
            blocks = {"BLOCK_S": plan.block_s, "BLOCK_L": plan.block_l, "BLOCK_C": plan.block_c}
            cut = {"lane_blocks": divide_up(lanes, plan.block_l), "tiles": plan.tiles, "losses": losses}
            launch(kernel, plan.programs, plan.warps, {**values, **blocks, **cut}, plan.registers)
        if a.reduction != NONE:
            launch(kernels.iw_cross_entropy_total_kernel, 1, 4, {"losses": losses, "loss": loss, "N": losses.numel(), "BLOCK": BLOCK})
    return loss, log_p, weights, bound, outer


def _split(shape: Shape, values: dict, empty) -> Tensor:
    """All rows, kernel after kernel; returns the partial losses."""
    S, P, T, units = (values[name] for name in ("S", "P", "T", "units"))
    rows, weigh = split_plan(shape, device_of(values["logits"])), weights_plan(S, units)
    likelihoods = empty(S, P) if shape.shared else values["log_p"]
    losses, cs = empty(weigh.programs, dtype=torch.float64), empty(P)
    outers = empty(units) if shape.shared else cs
    squares = empty(S, P) if values["lse_square_share"] is not None else None
    unit_squares = empty(S, units) if squares is not None and shape.shared else squares
    values |= {"squares": squares, "unit_squares": unit_squares}
    values |= {"tops": empty(S, P), "totals": empty(S, P), "likelihoods": likelihoods, "cs": cs, "outers": outers, "losses": losses}
    values |= {"lane_blocks": rows.lane_blocks, "class_blocks": rows.class_blocks, "BLOCK_L": rows.block_l, "BLOCK_C": rows.block_c}
    row_blocks = S * shape.groups * rows.lane_blocks
    launch(kernels.iw_cross_entropy_statistics_kernel, row_blocks, rows.warps, values)
    if shape.shared:
        block = max(32, min(BLOCK, power_of_two(T)))
        launch(kernels.iw_cross_entropy_join_kernel, S * units, max(1, block // 256), {**values, "BLOCK": block})
        if triton.knobs.runtime.interpret and S > 1 and values["MODE"] != alpha_mode(0.0):
            reference.check_signs(cs.view(units, T))  # the interpreter runs past the kernel's assertion
    of_units = {"T": 1 if shape.shared else T, "BLOCK_S": weigh.block_s, "BLOCK_L": weigh.block_l}
    launch(kernels.iw_cross_entropy_weights_kernel, weigh.programs, weigh.warps, {**values, **of_units})
    if values["dlogits"] is not None:
        launch(kernels.iw_cross_entropy_gradient_kernel, row_blocks * rows.class_blocks, rows.warps, values)
    return losses


def _out_of_place(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    *arguments, need_gradient = arguments
    dlogits = torch.empty_like(logits) if need_gradient else None
    results = iw_cross_entropy_fwd_triton(logits, dlogits, LossArguments(*arguments))
    return *results, logits.new_empty(0) if dlogits is None else dlogits


def _in_place(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    return iw_cross_entropy_fwd_triton(logits, logits, LossArguments(*arguments))


def _scale(dlogits: Tensor, factor: Tensor) -> None:
    n, acc = dlogits.numel(), torch.promote_types(dlogits.dtype, torch.float32)
    values = {"dlogits": dlogits, "factor": factor, "n": n, "ACC": TYPES[acc], "BLOCK": BLOCK}
    with guard(dlogits):
        launch(iw_cross_entropy_scale_kernel, min(divide_up(n, BLOCK), SCALE_PROGRAMS), 4, values)


OPS = {"iw_cross_entropy": _out_of_place, "iw_cross_entropy_scale_": _scale, "iw_cross_entropy_": _in_place}
