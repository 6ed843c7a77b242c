"""How fast the noise kernels should be on an H100, from their machine code: a table for docs/gpu-speed.md. Nothing runs.

    python tools/noise_prediction.py [--only forward rates] [--samples 1 4 8]

Of each kernel it takes the way of fewest instructions that makes the accesses of S noise samples, and gives the least of three limits,
as a part of the copy rate: the memory itself; the warps that a multiprocessor holds, each of which lives as long as its instructions and
the waits for its loads take; and the instructions that a multiprocessor begins.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import sass_report

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# An H100 SXM.
COPY = 3.0e12  # bytes per second that a copy reads and writes
MULTIPROCESSORS = 132
CLOCK = 1.7e9
REGISTERS, MOST_WARPS, BLOCK_WARPS = 65536, 64, 8  # of a multiprocessor; of one of our blocks
MEMORY = 750e-9 * CLOCK  # clocks that a load takes while the memory is busy
CACHE = 200  # clocks of a load that the second level cache answers: what all threads read
START = 500  # clocks from one block's end to the first instruction of the next in its place
STEP = 3  # clocks from one instruction of a warp to the next without others beside it: 2 where independent, 4 to 6 where not
# Warp instructions that a multiprocessor begins in a clock, in all and by what executes them (CUDA's programming guide, table of
# throughputs for 9.0, over 32).
RATES = {"all": 4.0, "logic": 2.0, "multiply": 2.0, "mufu": 0.5, "conversion": 2.0, "uniform": 2.0, "shuffle": 1.0, "fp32": 4.0}


TYPES = {"bf16": 2, "float": 4}


class Form(NamedTuple):
    name: str
    source: str
    kernel: str  # {T} is the element type, {V} the elements of an access, {G} whether packs are groups
    reads: str  # x: once; S: one for each sample
    writes: str
    shared_loads: int = 0  # accesses of 16 bytes to what many threads read
    one: str = ""  # the kernel for one sample, if another


_PLAIN_ONE, _RATES_ONE = "noise_fwd_kernel<{T}, {V}, {G}, true>", "noise_rule_fwd_kernel<{T}, {V}, true, false>"
FORMS = (
    Form("forward, alpha", "noise", _PLAIN_ONE, "x", "S"),
    Form("backward", "noise", "noise_bwd_kernel<{T}, {V}, {G}>", "S", "x", one=_PLAIN_ONE),
    Form("not expanding", "noise", "noise_fwd_kernel<{T}, {V}, {G}, false>", "S", "S", one=_PLAIN_ONE),
    Form("rates forward", "noise", "noise_rule_fwd_kernel<{T}, {V}, true, true>", "x", "S", 2, _RATES_ONE),
    Form("rates backward", "noise", "noise_rule_bwd_kernel<{T}, {V}, true>", "S", "x", 2, _RATES_ONE),
    Form("rates not expanding", "noise", _RATES_ONE, "S", "S", 2),
    Form("Gaussian forward", "real_noise", "real_noise_fwd_kernel<Normal, {T}, {V}, true>", "x", "S"),
    Form("Gaussian backward", "real_noise", "real_noise_bwd_kernel<Normal, {T}, {V}>", "S", "x"),
    Form("Gaussian not expanding", "real_noise", "real_noise_fwd_kernel<Normal, {T}, {V}, false>", "S", "S"),
    Form("Laplace forward", "real_noise", "real_noise_fwd_kernel<Laplace, {T}, {V}, true>", "x", "S"),
    Form("Laplace backward", "real_noise", "real_noise_bwd_kernel<Laplace, {T}, {V}>", "S", "x"),
    Form("uniform forward", "real_noise", "real_noise_fwd_kernel<Uniform, {T}, {V}, true>", "x", "S"),
    Form("uniform backward", "real_noise", "real_noise_bwd_kernel<Uniform, {T}, {V}>", "S", "x"),
)


class Prediction(NamedTuple):
    registers: int
    warps: int  # on a multiprocessor at once
    flight: int  # bytes that they load at once, where each has begun as many as it can
    instructions: float  # for each 16 bytes of a thread that are read or written
    resident: float  # limits, as parts of the copy rate
    issue: float

    @property
    def part(self) -> float:
        return min(1.0, self.resident, self.issue)


def executed_by(instruction: sass_report.Instruction) -> str:
    if instruction.opcode == "IMAD":
        return "multiply"
    return "logic" if instruction.kind == "integer" else instruction.kind


def life(kernel: sass_report.Kernel, way: list[int]) -> float:
    """Clocks of a warp: each instruction a STEP, and who needs a value that is on its way waits for it."""
    arrives: dict[int, float] = {}
    now = float(START)
    for number in way:
        for i in kernel.blocks[number].instructions:
            now = max([now + STEP, *(arrives.pop(r) for r in (i.reads() | i.writes()) & set(arrives))])
            if i.access and (i.access.space, i.access.way) == ("global", "load"):
                arrives |= dict.fromkeys(i.writes(), now + (MEMORY if i.access.bytes == 16 and ".CONSTANT" not in i.name else CACHE))
    return now


def warps(registers: int) -> int:
    of_warp = -(-registers * 32 // 256) * 256
    return min(MOST_WARPS, REGISTERS // of_warp // BLOCK_WARPS * BLOCK_WARPS)


def predict(kernels: list[sass_report.Kernel], form: Form, type_: str, samples: int) -> Prediction:
    bytes_ = TYPES[type_]
    name = form.one if form.one and samples == 1 else form.kernel
    (kernel,) = sass_report.named(kernels, name.format(T=type_, V=16 // bytes_, G="true" if bytes_ == 2 else "false"))
    drawn = 16 if form.source == "real_noise" else 8 * bytes_  # bytes of what a thread draws for
    reads, writes = (drawn * (1 if what == "x" else samples) for what in (form.reads, form.writes))
    loads = reads // 16 + form.shared_loads
    way = kernel.way_with({sass_report.Access("global", "load", 16): loads, sass_report.Access("global", "store", 16): writes // 16})
    counts, moved = kernel.counts(way), reads + writes
    kinds = [executed_by(i) for number in way for i in kernel.blocks[number].instructions]
    clocks = max(counts.instructions / RATES["all"], *(kinds.count(kind) / rate for kind, rate in RATES.items()))
    resident = warps(kernel.registers)
    rate = COPY / MULTIPROCESSORS / CLOCK / 32  # bytes of each thread of a warp in a clock of one multiprocessor
    flight = kernel.flight(way).bytes * 32 * resident
    return Prediction(
        kernel.registers,
        resident,
        flight,
        counts.instructions / (moved / 16),
        resident * moved / life(kernel, way) / rate,
        moved / clocks / rate,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="forms whose names contain one of these")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--objects", type=Path, help="a folder with compiled noise.o and real_noise.o, instead of compiling")
    arguments = parser.parse_args()
    print("| form | type | S | registers | warps | KB loading | instructions / 16 bytes | by warps | by issue | predicted |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for form in FORMS:
        if not any(word in form.name for word in arguments.only):
            continue
        file = arguments.objects / f"{form.source}.o" if arguments.objects else CUDA / f"{form.source}.cu"
        kernels = sass_report.kernels(file, "90")
        for type_ in TYPES:
            for samples in arguments.samples:
                p = predict(kernels, form, type_, samples)
                print(
                    f"| {form.name} | {type_} | {samples} | {p.registers} | {p.warps} | {p.flight / 1024:.0f} | {p.instructions:.0f} "
                    f"| {p.resident:.2f} | {p.issue:.2f} | {p.part:.2f} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
