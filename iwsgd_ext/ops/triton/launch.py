"""How the Triton kernels are launched: arguments by name, and floats as doubles."""

import contextlib
import struct

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# Of every kernel. A product and a sum may become one instruction, as nvcc has it; Triton's own default changes with its version.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def number(bits, ACC: tl.constexpr):
    """A float that came as :func:`float_bits`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def wide(units, ALIGN: tl.constexpr):
    """A length or stride that came divided by ALIGN, in 64 bits. NOTE [Alignment] in device.py."""
    return tl.cast(units, tl.int64) * ALIGN


@triton.jit
def quotient(x, y, ACC: tl.constexpr):
    """x / y, rounded as float32 is: Triton's own division of it is approximate. For what is divided once a row, not once an element."""
    return tl.div_rn(x, y) if tl.float32 == ACC else x / y


def float_bits(value: float) -> int:
    """A float as the bits of a double: Triton takes a Python float as float32, and float64 kernels need all of it."""
    return struct.unpack("q", struct.pack("d", value))[0]


def launch(kernel, programs: int, warps: int, values: dict, registers: int | None = None) -> None:
    """Runs a kernel with those of the values that it has parameters for, by name. Nothing is launched where programs is 0.

    Args:
        registers: the most that a thread may have; NVIDIA's compiler knows what that is.
    """
    if programs:
        limit = {} if registers is None or torch.version.cuda is None else {"maxnreg": registers}
        kernel[(programs,)](**{name: values[name] for name in kernel.arg_names}, num_warps=warps, **limit, **OPTIONS)


def guard(x: torch.Tensor):
    """The tensor's device as the current one, on which Triton launches."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
