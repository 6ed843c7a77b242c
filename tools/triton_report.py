"""Registers, stack, shared memory and counts of machine code of the Triton kernels, compiled ahead of time: no GPU is needed.

    python tools/triton_report.py [--arch 80 90 100] [--only NAME]

Goes through calls of the ops as a user makes them and compiles each kernel for each architecture, as its launch would be specialized.
A stack is what spilled registers are in. tests/test_triton_compile.py uses it.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHITECTURES = (80, 90, 100)


class Kernel(NamedTuple):
    name: str
    case: str
    arch: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    atomics: bool
    asserts: bool
    loop: int  # instructions of the longest loop, slow paths of divisions apart
    under_way: int  # bytes that a thread has asked for, at most, before it waits


def specialize(kernel, values: dict) -> tuple[dict, dict, dict]:
    """signature, constexprs and attributes as triton's launcher makes them of arguments."""
    import torch

    types = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    types |= {torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{types[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_kernel(kernel, values: dict, warps: int, limit: int | None, arch: int, case: str) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iwsgd_ext.ops.triton.launch import OPTIONS

    signature, constants, attributes = specialize(kernel, values)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "maxnreg": limit, "debug": bool(kernel.debug)} | OPTIONS
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = usage(compiled.asm["cubin"])
    code = instructions(compiled.asm["cubin"])
    start, end = main_loop(code)
    ptx = compiled.asm["ptx"]
    atomics = re.search(r"^\s*(@%\w+\s+)?(atom|red)\.", ptx, re.MULTILINE) is not None
    asserts = "__assertfail" in ptx
    return Kernel(
        kernel.__name__, case, arch, warps, registers, stack, compiled.metadata.shared, atomics, asserts, end - start, bytes_under_way(code)
    )


def cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def usage(cubin: bytes) -> tuple[int, int]:
    return parse(cuobjdump(cubin, "-res-usage"))


def instructions(cubin: bytes) -> list[str]:
    """The machine code, an instruction of 16 bytes an entry."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", cuobjdump(cubin, "-sass"), re.MULTILINE)


def main_loop(code: list[str]) -> tuple[int, int]:
    """First instruction of the longest loop and the one after its last; of no loop (0, 0)."""
    back = (
        (int(found[1], 16) // 16, i + 1)
        for i, line in enumerate(code)
        if (found := re.search(r"\bBRA\S* (?:!?U?P\d+, )?0x([0-9a-f]+)", line))
    )
    return max((span for span in back if span[0] < span[1] - 1), key=lambda span: span[1] - span[0], default=(0, 0))


def bytes_under_way(code: list[str]) -> int:
    """The most bytes that a thread has asked of global memory before it waits: in the order of the code, until a register is read."""
    waiting: dict[int, tuple[int, ...]] = {}
    sizes: dict[int, int] = {}
    most = 0
    for line in code:
        found = re.match(r"(?:@!?U?P\d+ )?(\S+) ?(.*)", line)
        operation, operands = found[1], found[2].split(", ")
        load = re.match(r"LDG\.E(?:\.EL|\.EF|\.LU)?(?:\.(U8|U16|64|128))?", operation)
        read = " ".join(operands if operation.startswith(("ST", "BRA")) else operands[1:])
        used = {int(r) for r in re.findall(r"\bR(\d+)", read)}
        if re.search(r"\.(64|WIDE)|^D[A-Z]", operation):  # registers in pairs
            used |= {r + 1 for r in used}
        if operation.startswith("BAR"):
            waiting.clear()
        waiting = {r: registers for r, registers in waiting.items() if used.isdisjoint(registers)}
        if load and operands[0].startswith("R") and operands[0] != "RZ":
            size = {"U8": 1, "U16": 2, None: 4, "64": 8, "128": 16}[load[1]]
            first = int(re.match(r"R(\d+)", operands[0])[1])
            waiting[first] = tuple(range(first, first + max(1, size // 4)))
            sizes[first] = size
            most = max(most, sum(sizes[r] for r in waiting))
    return most


def parse(report: str) -> tuple[int, int]:
    """Registers and bytes of stack in what ``cuobjdump -res-usage`` says of one kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"no register count in what cuobjdump said:\n{report}")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def compiling(arch: int, case: str, out: list[Kernel]):
    """Inside, the ops' launches compile their kernels for ``arch`` and run nothing."""
    from iwsgd_ext import backend
    from iwsgd_ext.ops.triton import address, device, iw_cross_entropy, multinomial, noise, real_noise

    def launch(kernel, programs, warps, values, registers=None):
        if programs:
            out.append(compile_kernel(kernel, {p.name: values[p.name] for p in kernel.params}, warps, registers, arch, case))

    with contextlib.ExitStack() as stack:
        for module in (iw_cross_entropy, multinomial, noise, real_noise):
            stack.enter_context(mock.patch.object(module, "launch", launch))
        for module in (address, iw_cross_entropy):
            stack.enter_context(mock.patch.object(module, "device_of", lambda x: device.KNOWN[arch]))
        stack.enter_context(mock.patch.object(backend, "_interpreting", True))  # the tensors are on the CPU
        stack.enter_context(mock.patch.object(backend, "_forced", "triton"))
        yield


def loss_cases() -> dict:
    import torch

    import iwsgd_ext as iw
    from iwsgd_ext.ops.triton import iw_cross_entropy

    def call(samples, batch, classes, positions=(), dtype=torch.bfloat16, kind="labels", last=False, **options):
        def run():
            x = torch.zeros(samples * batch, classes, *positions, dtype=dtype)
            x = (x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x).requires_grad_()
            y = torch.zeros(batch, *positions, dtype=torch.int64)
            if kind == "probabilities":
                y = torch.zeros(batch, classes, *positions)
            if kind == "all":
                options.update(weight=torch.ones(classes), example_weight=torch.ones(batch), label_smoothing=0.1)
            iw.iw_cross_entropy(x, y, samples, **options)

        return run

    f32, f64, f16 = torch.float32, torch.float64, torch.float16
    return {
        "digits": call(8, 128, 10),
        "digits-fp32-alpha": call(8, 128, 10, dtype=f32, alpha=0.5),
        "digits-many": call(8, 65536, 10),
        "two": call(8, 65536, 2),
        "hundred": call(8, 16384, 100),
        "bytes": call(8, 8192, 256),
        "imagenet": call(8, 256, 1000),
        "imagenet-all": call(8, 256, 1000, kind="all"),
        "imagenet-probabilities": call(8, 256, 1000, dtype=f32, kind="probabilities"),
        "imagenet-fp64": call(8, 256, 1000, dtype=f64),
        "held-most": call(8, 256, 2048),
        "held-most-all": call(4, 256, 2048, kind="all"),
        "held-most-fp64": call(4, 256, 1000, dtype=f64),
        "held-most-fp64-all": call(4, 256, 1000, dtype=f64, kind="all"),
        "held-one-sample": call(1, 64, 16384),
        "reread": call(4, 160, 6000, dtype=f16),
        "reread-all": call(4, 160, 6000, kind="all"),
        "reread-fp64": call(2, 160, 6000, dtype=f64),
        "split": call(8, 8, 32000),
        "split-odd": call(2, 8, 50257, dtype=f32, kind="all"),
        "image": call(4, 2, 21, (33, 33)),
        "image-last": call(4, 2, 21, (33, 33), last=True),
        "image-positions": call(4, 2, 21, (33, 33), level="position", kind="all"),
        "image-fp64": call(4, 2, 21, (33, 33), dtype=f64, kind="all"),
        "captions": call(4, 4, 8000, (17,), last=True),
        "captions-probabilities": call(2, 4, 500, (17,), kind="probabilities"),
        "many-samples": call(2000, 1, 1000),
        "scale": lambda: iw_cross_entropy._scale(torch.zeros(8 * 256, 1000, dtype=torch.bfloat16), torch.ones(())),
        "ones-loss": call(1, 1, 1, kind="all"),
        "ones-positions": call(1, 1, 1, (2,), kind="probabilities"),
        "ones-reread": call(1, 200, 40001, reduction="none"),
        "lse-square": call(8, 256, 1000, lse_square_scale=1e-4),
        "lse-square-split": call(4, 4, 8000, (17,), kind="all", lse_square_scale=1e-4),
        "lse-square-reread": call(4, 160, 6000, lse_square_scale=1e-4),
        "best": call(4, 8, 10, alpha=float("inf"), reduction="none"),
        "mean": call(4, 8, 10, alpha=0.0, reduction="sum"),
    }


def noise_cases() -> dict:
    import torch

    from iwsgd_ext.ops.triton import multinomial, noise, real_noise

    def call(outer, examples, inner, positions, share, samples=8, dtype=torch.bfloat16, expand=True, ids=None, thresholds=False, **rule):
        def run():
            x = torch.zeros(outer, examples if expand else samples * examples, inner, dtype=dtype)
            y = torch.zeros(outer, samples * examples, inner, dtype=dtype)
            sample_ids = None if ids is None else torch.zeros(ids, dtype=torch.int64)
            address = (torch.zeros(3, dtype=torch.int64), sample_ids, samples, 5, 0, positions, share)
            if "std" in rule:
                law, std = rule.get("law", 0), rule["std"]
                real_noise.real_noise_fwd_triton(x, y, address, law, std, rule.get("multiply", True), expand)
                real_noise.real_noise_bwd_triton(y, y[:, :examples], address, law, std)
                return
            given = torch.zeros(samples * examples, positions, dtype=torch.int32) if thresholds else None
            address = (*address, 30000, given, 1.25)
            noise.noise_fwd_triton(x, y, address, rule.get("shift", 0.0), rule.get("fill", 0.0), expand)
            if expand:
                noise.noise_bwd_triton(y, x, address)

        return run

    def draw():
        bounds = torch.full((8, 4096), 2**32)
        multinomial.multinomial_triton(torch.zeros(3, dtype=torch.int64), None, 8, 0, 0, 32, bounds, 2048)

    n = 4096
    return {
        "elements-bf16": call(1, 512, n, n, 1),
        "elements-fp32": call(1, 512, n, n, 1, dtype=torch.float32),
        "elements-fp64": call(1, 512, n, n, 1, dtype=torch.float64),
        "elements-odd": call(1, 512, 4097, 4097, 1),
        "elements-expanded": call(1, 512, n, n, 1, expand=False),
        "elements-ids": call(1, 512, n, n, 1, ids=(8, 512)),
        "elements-thresholds": call(1, 512, n, n, 1, ids=(8,), thresholds=True),
        "alpha": call(1, 512, n, n, 1, shift=0.5, fill=-0.25),
        "channels": call(1, 16, 64 * 196, 64, 196, dtype=torch.float16),
        "channels-odd": call(1, 16, 64 * 49, 64, 49, dtype=torch.float32, thresholds=True),
        "channels-last": call(1, 16, 64 * 196, 64, 1),
        "rows": call(1, 512, n, 1, n),
        "time-major": call(16, 64, 509, 16 * 509, 1, ids=(8,)),
        "time-major-channels": call(16, 64, 512, 16, 512, thresholds=True),
        "gaussian-bf16": call(1, 512, n, n, 1, std=0.5),
        "gaussian-fp32-add": call(1, 512, n, n, 1, dtype=torch.float32, std=0.5, multiply=False),
        "gaussian-fp64": call(1, 512, n, n, 1, dtype=torch.float64, std=0.5),
        "gaussian-odd": call(16, 64, 509, 16 * 509, 1, ids=(8, 64), std=0.5),
        "gaussian-rows": call(1, 512, n, 1, n, std=0.5, expand=False),
        "laplace-bf16": call(1, 512, n, n, 1, std=0.5, law=1),
        "laplace-fp64": call(1, 512, n, n, 1, dtype=torch.float64, std=0.5, law=1),
        "uniform-bf16": call(1, 512, n, n, 1, std=0.5, law=2),
        "multinomial": draw,
        "ones": call(1, 1, 1, 1, 1, samples=1),
        "ones-expanded": call(1, 1, 9, 9, 1, samples=1, expand=False, ids=(1,), thresholds=True),
        "ones-gaussian": call(1, 1, 9, 9, 1, samples=1, ids=(1, 1), std=1.0),
        "few": call(1, 2, 300, 300, 1, samples=64),
    }


def report(architectures=ARCHITECTURES, only: str = "") -> list[Kernel]:
    kernels: list[Kernel] = []
    for case, run in {**noise_cases(), **loss_cases()}.items():
        for arch in architectures if only in case else ():
            with compiling(arch, case, kernels):
                run()
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps([k._asdict() for k in report(arguments.arch, arguments.only)]))
        return 0
    print(f"{'arch':>4} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7} {'loop':>5} {'bytes':>5}  kernel")
    kernels = report(arguments.arch, arguments.only)
    for k in kernels:
        numbers = f"{k.arch:>4} {k.warps:>5} {k.registers:>9} {k.stack_bytes:>5} {k.shared_bytes:>7} {k.loop:>5} {k.under_way:>5}"
        print(f"{numbers}  {k.name} ({k.case})")
    return 1 if any(k.stack_bytes for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
