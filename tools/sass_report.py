"""The machine code of a kernel in numbers: instructions by class for each loop, bytes of each access, loads under way, divisions.

    python tools/sass_report.py csrc/cuda/noise.cu "noise_bwd_kernel<bf16, 8, true>" [--arch 90]
    python tools/sass_report.py kernels.o "noise_bwd_kernel" --blocks 0 3 5-9

A .cu file is compiled first. cuobjdump disassembles; it comes with the CUDA toolkit, and in triton's wheel. An instruction is counted
as often as it stands in the code, predicated ones too: they take their turn whether or not they do anything.
Nothing runs: what is counted here is exact, what it costs is not known from it. tests/test_cuda_sass.py uses it.
"""

import argparse
import functools
import heapq
import importlib.util
import itertools
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ptxas_report

CLASSES = {
    "fp32": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET FSETP FCHK FSWZADD FADD2 FMUL2 FFMA2 FADD32I FFMA32I FMUL32I",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "fp16": "HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2 HADD2_32I",
    "mufu": "MUFU",
    "conversion": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    "constant": "LDC LDCU ULDC",
    "shuffle": "SHFL VOTE VOTEU MATCH REDUX CREDUX",
    "barrier": "BAR B2R UCGABAR_ARV UCGABAR_WAIT MEMBAR FENCE ERRBAR CGAERRBAR CCTL DEPBAR LDGDEPBAR SYNCS ARRIVES WARPSYNC ENDCOLLECTIVE",
    "control": "BRA BRX BRXU JMP JMX EXIT BSSY BSYNC BREAK BMOV CALL RET LEPC NOP BPT KILL YIELD NANOSLEEP PREEXIT ACQBULK",
    "memory": "LD ST LDG STG LDS STS LDL STL LDSM STSM LDGSTS ATOM ATOMG ATOMS RED REDG REDAS ST.ASYNC UBLKCP UBLKPF UTMALDG UTMASTG",
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}
# Opcode: the space that it touches, and whether it reads or writes it. LDGSTS copies from global to shared memory without registers.
SPACES = {
    "LDG": ("global", "load"), "STG": ("global", "store"), "LDS": ("shared", "load"), "STS": ("shared", "store"),
    "LDL": ("local", "load"), "STL": ("local", "store"), "LD": ("generic", "load"), "ST": ("generic", "store"),
    "LDGSTS": ("global to shared", "copy"), "LDSM": ("shared", "load"), "STSM": ("shared", "store"),
    "ATOM": ("generic", "atomic"), "ATOMG": ("global", "atomic"), "ATOMS": ("shared", "atomic"),
    "RED": ("generic", "atomic"), "REDG": ("global", "atomic"), "REDAS": ("shared", "atomic"),
}  # fmt: skip
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
NO_RESULT = {"ST", "STG", "STS", "STL", "STSM", "LDGSTS", "RED", "REDG", "REDAS"}  # every register that these name is read
ENDS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "EXIT", "BSYNC", "RET", "CALL", "KILL", "BPT"}


# ---- instructions ----


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!P1", "" where it always runs
    name: str  # LDG.E.128
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        """Its class: one of CLASSES, "wide multiply" (a 64-bit product), "uniform" (one for the whole warp) or "integer"."""
        if self.opcode in CLASS_OF:
            return CLASS_OF[self.opcode]
        if re.match(r"IMAD\.(WIDE|HI)", self.name):
            return "wide multiply"
        return "uniform" if re.match(r"U[A-Z]|R2UR|S2UR", self.name) else "integer"

    @property
    def access(self) -> "Access | None":
        """The memory access that it is."""
        if self.opcode not in SPACES:
            return None
        return Access(*SPACES[self.opcode], next((WIDTHS[word] for word in self.name.split(".")[1:] if word in WIDTHS), 4))

    @property
    def target(self) -> int | None:
        """The address that it names: a branch's, a call's, or where a BSSY's paths meet."""
        if self.opcode not in ("BRA", "JMP", "BSSY", "CALL"):
            return None
        return next((int(word, 16) for word in reversed(self.operands) if re.fullmatch(r"0x[0-9a-f]+", word)), None)

    @property
    def always(self) -> bool:
        """It does not depend on a predicate: neither its own nor, of a branch, one among the operands."""
        conditions = [word for word in self.operands if re.match(r"!?U?P\d", word)] if self.opcode in ENDS else []
        return self.predicate in ("", "@PT", "@UPT") and not conditions and ".DIV" not in self.name

    def writes(self) -> set[int]:
        """The registers of its result."""
        at = self._result()
        first = re.match(r"R(\d+)", self.operands[at]) if at is not None else None
        if first is None:
            return set()
        wide = "IMAD.WIDE" in self.name or self.kind == "fp64" or self.name.startswith("CS2R")
        size = self.access.bytes if self.access else next((WIDTHS[w] for w in self.name.split(".") if w in WIDTHS), 8 if wide else 4)
        return set(range(int(first[1]), int(first[1]) + max(1, size // 4)))

    def reads(self) -> set[int]:
        """The registers that its operands name, of a register pair or quad the first one."""
        at = self._result()
        sources = [word for i, word in enumerate(self.operands) if i != at]
        return {int(number) for word in sources for number in re.findall(r"(?<![A-Z])R(\d+)", word)}

    def _result(self) -> int | None:
        if self.opcode in NO_RESULT or not self.operands or self.opcode in ENDS:
            return None
        first = 0
        if self.opcode in ("SHFL", "ATOM", "ATOMG", "ATOMS", "VOTE", "MATCH", "LDG", "LDS", "LD"):  # a predicate may come first
            while first + 1 < len(self.operands) and re.fullmatch(r"!?U?P[\dT]+", self.operands[first]):
                first += 1
        return first


@dataclass(frozen=True)
class Access:
    space: str  # global, shared, local, generic, global to shared
    way: str  # load, store, copy, atomic
    bytes: int  # of one thread

    def __str__(self):
        return f"{self.space} {self.way} {self.bytes}"


# ---- blocks and loops ----


@dataclass(frozen=True)
class Block:
    number: int  # in the order of addresses
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]  # first the one that a branch not taken leads to

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @property
    def rare(self) -> bool:
        """It ends where the common path does not go on: in a call, a trap or an early exit."""
        return self.last.opcode in ("CALL", "BPT", "EXIT", "KILL", "RET") or not self.successors


@dataclass(frozen=True)
class Loop:
    number: int  # in the order of its header's address
    header: int
    blocks: frozenset[int]
    depth: int  # 1: inside no other loop
    parent: int | None  # the loop that it is directly inside of


@dataclass
class Counts:
    """The instructions of some blocks, counted by kind."""

    instructions: int = 0
    classes: Counter = field(default_factory=Counter)
    accesses: Counter = field(default_factory=Counter)  # of Access
    calls: int = 0  # of subroutines: the slow way of a division, among others
    divisions: int = 0  # by a divisor that is not known when compiling: integers by a reciprocal, floats with their check

    def of(self, space: str, way: str) -> dict[int, int]:
        """Accesses of one kind: bytes of one, and how many."""
        return {access.bytes: n for access, n in sorted(self.accesses.items(), key=str) if (access.space, access.way) == (space, way)}


class Flight(NamedTuple):
    """Global loads that begin before the first one's value is used."""

    loads: int
    bytes: int  # of one thread
    instructions: int  # from the first load to that use


@dataclass
class Kernel:
    name: str  # demangled, without its parameters
    arch: str
    registers: int
    shared_bytes: int  # static
    blocks: list[Block]
    loops: list[Loop]

    def counts(self, blocks: Iterable[int] | None = None) -> Counts:
        """Of some blocks, as often as each is named; by default of all."""
        counts = Counts()
        for number in range(len(self.blocks)) if blocks is None else blocks:
            for instruction in self.blocks[number].instructions:
                counts.instructions += 1
                counts.classes[instruction.kind] += 1
                counts.calls += instruction.opcode == "CALL"
                counts.divisions += instruction.opcode == "FCHK" or re.match(r"I2F\..*RP", instruction.name) is not None
                if instruction.access:
                    counts.accesses[instruction.access] += 1
        return counts

    def path(self, loop: Loop) -> list[int]:
        """A loop's own blocks, without inner loops, and without those that end in a call, a trap or an exit."""
        inner = set().union(*(other.blocks for other in self.loops if other.parent == loop.number))
        return [number for number in sorted(loop.blocks - inner) if not self.blocks[number].rare]

    def way(self, *through: int) -> list[int]:
        """The way of fewest instructions from the entry to an exit that visits these blocks in turn; a repeated one again."""
        way = [0]
        for goal in through[1:] if through[:1] == (0,) else through:
            way += self._shortest(way[-1], goal)
        return way if self._is_exit(way[-1]) else way + self._shortest(way[-1], None)

    def way_with(self, accesses: dict[Access, int]) -> list[int]:
        """The way of fewest instructions from the entry to an exit that makes each access so often: where everything common holds."""
        of = [tuple(sum(i.access == access for i in block.instructions) for access in accesses) for block in self.blocks]
        wanted = tuple(accesses.values())
        seen: set[tuple[int, ...]] = set()
        front = [(0, of[0], [0])]
        while front:
            cost, done, way = heapq.heappop(front)
            here = way[-1]
            if any(map(operator.gt, done, wanted)) or (here, *done) in seen:
                continue
            if done == wanted and self.blocks[here].last.opcode == "EXIT":
                return way
            seen.add((here, *done))
            for to in self.blocks[here].successors:
                heapq.heappush(front, (cost + len(self.blocks[to].instructions), tuple(map(operator.add, done, of[to])), [*way, to]))
        raise ValueError(f"{self.name}: no way makes these accesses: {accesses}")

    def flight(self, blocks: Sequence[int]) -> Flight:
        """Global loads under way along a path, from the first of its widest loads on."""
        least = max(self.counts(blocks).of("global", "load"), default=0)
        waiting: set[int] = set()
        loads = total = steps = 0
        for number in blocks:
            for instruction in self.blocks[number].instructions:
                if waiting & (instruction.reads() | instruction.writes()):
                    return Flight(loads, total, steps)
                access = instruction.access
                if access and (access.space, access.way) == ("global", "load") and access.bytes >= least:
                    waiting = waiting or instruction.writes()
                    loads += 1
                    total += access.bytes
                steps += bool(waiting)
        return Flight(loads, total, steps)

    def _is_exit(self, number: int) -> bool:
        return self.blocks[number].last.opcode == "EXIT" and self.blocks[number].last.always

    def _shortest(self, start: int, goal: int | None) -> list[int]:
        """The blocks after start up to goal, or to any exit: at least one."""
        seen: set[int] = set()
        front: list[tuple[int, list[int]]] = [(0, [start])]
        while front:
            cost, way = heapq.heappop(front)
            here = way[-1]
            if len(way) > 1 and (here == goal or (goal is None and self._is_exit(here))):
                return way[1:]
            if len(way) > 1 and here in seen:
                continue
            if len(way) > 1:
                seen.add(here)
            for n in self.blocks[here].successors:
                heapq.heappush(front, (cost + len(self.blocks[n].instructions), [*way, n]))
        raise ValueError(f"{self.name}: no way from block {start} to {'an exit' if goal is None else goal}")


# ---- reading a listing ----


def parse(listing: str, arch: str = "", resources: dict[str, tuple[int, int]] | None = None) -> list[Kernel]:
    """The kernels in what cuobjdump -sass printed. resources: registers and static shared memory by mangled name."""
    kernels = []
    for part in re.split(r"^\s*Function : ", listing, flags=re.M)[1:]:
        mangled = part.split("\n", 1)[0].strip()
        blocks = _blocks([i for line in part.splitlines() if (i := instruction(line))])
        registers, shared = (resources or {}).get(mangled, (0, 0))
        of = re.search(r"EF_CUDA_SM(\d+)", part)
        kernels.append(Kernel(ptxas_report.readable(mangled), of[1] if of else arch, registers, shared, blocks, _loops(blocks)))
    return kernels


def instruction(line: str) -> Instruction | None:
    """One line of a listing; None where no instruction is in it."""
    found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*([^;]*);", line)
    if found is None:
        return None
    address, predicate, name, operands = found.groups()
    words = tuple(word for word in re.split(r",\s*|\s+", operands.strip()) if word)
    return Instruction(int(address, 16), (predicate or "").strip(), name, words)


def place(access: Instruction) -> tuple[str, int]:
    """Base and offset in memory of an access: of desc[UR8][R2.64+0x10], R2.64 and 16."""
    inside = re.findall(r"\[([^\[\]]*)\]", " ".join(access.operands))[-1]
    base, _, offset = inside.partition("+")
    return base, int(offset, 16) if re.fullmatch(r"-?0x[0-9a-f]+", offset) else 0


def _blocks(code: list[Instruction]) -> list[Block]:
    starts = {code[0].address} if code else set()
    starts |= {i.target for i in code if i.target is not None}
    starts |= {after.address for i, after in itertools.pairwise(code) if i.opcode in ENDS}
    cut = [k for k, i in enumerate(code) if i.address in starts]
    parts = [code[a:b] for a, b in zip(cut, [*cut[1:], len(code)], strict=True)]
    number = {part[0].address: k for k, part in enumerate(parts)}
    meeting: dict[str, int] = {}  # barrier register: where the paths meet that its last BSSY parted
    blocks = []
    for k, part in enumerate(parts):
        for i in part:
            if i.opcode == "BSSY":
                meeting[i.operands[0]] = number[i.target]
        last = part[-1]
        falls = [k + 1] if k + 1 < len(parts) else []
        if last.opcode in ("BRA", "JMP"):
            to = [number[last.target]] if last.target in number else []
            successors = to if last.always else falls + to
        elif last.opcode == "BSYNC":
            to = [meeting[last.operands[0]]] if last.operands[0] in meeting else falls
            successors = to if last.always else falls + to
        elif last.opcode in ("EXIT", "RET", "KILL", "BPT"):
            successors = [] if last.always else falls
        elif last.opcode in ("BRX", "BRXU", "JMX"):
            raise ValueError(f"a jump through a table, at {last.address:#x}: its targets are not in the listing")
        else:  # a CALL comes back
            successors = falls
        blocks.append(Block(k, tuple(part), tuple(dict.fromkeys(successors))))
    return _reached(blocks)


def _reached(blocks: list[Block]) -> list[Block]:
    """Without what follows the code: its padding, and the endless branch before it."""
    subroutines = {i.target for block in blocks for i in block.instructions if i.opcode == "CALL"}
    front = [block.number for block in blocks if block.number == 0 or block.instructions[0].address in subroutines]
    seen = set()
    while front:
        n = front.pop()
        if n not in seen:
            seen.add(n)
            front += blocks[n].successors
    number = {n: k for k, n in enumerate(sorted(seen))}
    return [Block(number[n], blocks[n].instructions, tuple(number[s] for s in blocks[n].successors)) for n in sorted(seen)]


def _loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops: the blocks from which an edge back to a block that dominates its start is reached."""
    before: dict[int, list[int]] = {block.number: [] for block in blocks}
    for block in blocks:
        for n in block.successors:
            before[n].append(block.number)
    everything = frozenset(before)
    dominators = {n: everything if before[n] else frozenset({n}) for n in before}
    if blocks:
        dominators[0] = frozenset({0})
    changed = True
    while changed:
        changed = False
        for n in everything - {0}:
            if before[n]:
                new = frozenset.intersection(*(dominators[p] for p in before[n])) | {n}
                changed, dominators[n] = changed or new != dominators[n], new
    bodies: dict[int, set[int]] = {}
    for block in blocks:
        for header in set(block.successors) & dominators[block.number]:
            body, front = bodies.setdefault(header, {header}), [block.number]
            while front:
                n = front.pop()
                if n not in body:
                    body.add(n)
                    front += before[n]
    loops = []
    for k, header in enumerate(sorted(bodies)):
        around = [(len(bodies[h]), j) for j, h in enumerate(sorted(bodies)) if h != header and header in bodies[h]]
        parent = min(around)[1] if around else None
        loops.append(Loop(k, header, frozenset(bodies[header]), 1 + len(around), parent))
    return loops


# ---- tools ----


def find_cuobjdump() -> str | None:
    """Of CUDA_HOME, of /usr/local/cuda, on the PATH, or of triton's wheel."""
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    wheel = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    for folder in (*homes, *map(Path, os.environ.get("PATH", "").split(os.pathsep)), *wheel):
        if all((folder / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def disassemble(object_file: Path) -> list[Kernel]:
    """The kernels in an object file or library.

    Raises:
        RuntimeError: there is no cuobjdump.
    """
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: set CUDA_HOME to a CUDA toolkit, or install triton")

    def run(option: str) -> str:
        return subprocess.run([tool, option, str(object_file)], capture_output=True, text=True, check=True).stdout

    used = re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", run("-res-usage"))
    return parse(run("-sass"), resources={name: (int(registers), int(shared)) for name, registers, shared in used})


@functools.cache
def kernels(source: Path, arch: str) -> list[Kernel]:
    """The kernels of a .cu, compiled for an architecture, or those of an object file."""
    if source.suffix != ".cu":
        return disassemble(source)
    with tempfile.TemporaryDirectory() as folder:
        ptxas_report.compile_kernels(source, arch, Path(folder) / "kernels.o")
        return disassemble(Path(folder) / "kernels.o")


def named(kernels: Iterable[Kernel], name: str) -> list[Kernel]:
    """Those whose demangled name a regular expression is found in; as it stands, where it is text that some name begins with."""
    kernels = list(kernels)
    return [k for k in kernels if k.name.startswith(name)] or [k for k in kernels if re.search(name, k.name)]


# ---- the table ----


def line(counts: Counts) -> str:
    parts = [f"{counts.instructions} instructions:"]
    parts += [f"{n} {kind}" for kind, n in counts.classes.most_common()]
    parts += [f"| {', '.join(f'{access} x {n}' for access, n in sorted(counts.accesses.items(), key=str))}"] if counts.accesses else []
    parts += [f"| {counts.calls} calls"] if counts.calls else []
    parts += [f"| {counts.divisions} divisions"] if counts.divisions else []
    return " ".join(parts)


def flight_line(flight: Flight) -> str:
    return f"{flight.loads} loads, {flight.bytes} bytes under way before the first is used, {flight.instructions} instructions later"


def spans(numbers: Iterable[int]) -> str:
    """3-5, 9"""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)


def report(kernel: Kernel, blocks: list[int], listing: bool) -> None:
    print(f"\n{kernel.name}, sm_{kernel.arch}: {kernel.registers} registers, {len(kernel.blocks)} blocks\n  {line(kernel.counts())}")
    for loop in kernel.loops:
        path = kernel.path(loop)
        print(f"{'  ' * loop.depth}loop {loop.number}, blocks {spans(loop.blocks)}\n{'  ' * loop.depth}  path {spans(path)}: "
              f"{line(kernel.counts(path))}\n{'  ' * loop.depth}  {flight_line(kernel.flight(path))}")  # fmt: skip
    if blocks:
        print(f"  chosen {' '.join(map(str, blocks))}: {line(kernel.counts(blocks))}\n    {flight_line(kernel.flight(blocks))}")
    if listing:
        for block in kernel.blocks:
            print(f"block {block.number} -> {' '.join(map(str, block.successors))}")
            for i in block.instructions:
                print(f"  {i.address:05x} {i.predicate:>5} {i.name} {', '.join(i.operands)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a .cu, or an object file or library with kernels")
    parser.add_argument("name", nargs="?", default="", help="how the kernels' names begin, or a regular expression")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--blocks", nargs="+", default=[], help="count these: numbers, and spans as 5-9")
    parser.add_argument("--through", nargs="+", type=int, default=None, help="count the shortest way through these blocks")
    parser.add_argument("--listing", action="store_true", help="print the instructions")
    arguments = parser.parse_args()
    for kernel in named(kernels(arguments.file, arguments.arch), arguments.name):
        ends = [list(map(int, word.split("-"))) for word in arguments.blocks]
        blocks = [n for span in ends for n in range(span[0], span[-1] + 1)]
        if arguments.through is not None:
            blocks = kernel.way(*arguments.through)
        report(kernel, blocks, arguments.listing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
