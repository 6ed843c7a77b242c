"""The kernels' machine code without a GPU: wide stores, no generic or local accesses, loads under way. And the tool that reads it."""

import itertools

import pytest
from compiled_kernels import MARKS, SOURCES, disassemble, sass_report

import noise_prediction  # isort: skip, compiled_kernels shows the way to tools/

compiled = [*MARKS, pytest.mark.skipif(sass_report.find_cuobjdump() is None, reason="no cuobjdump: neither CUDA's nor triton's")]

# Whose generic accesses are meant: kernel, ways, and the reason.
GENERIC = {
    "iw_cross_entropy_fwd_kernel": ({"load", "atomic"}, "the barrier of all blocks, of cooperative groups"),
    "iw_cross_entropy_registers_kernel": ({"load", "atomic"}, "the same"),
}
ELEMENT_WISE = ("noise", "real_noise")  # whose kernels are of an element type and a number of elements for an access


def marked(test):
    for mark in compiled:
        test = mark(test)
    return test


# ---- rules for every kernel ----


@marked
@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_no_access_is_local_or_generic(name):
    """A local one is memory traffic that the source does not ask for; a generic one first finds out which memory it means."""
    for kernel in disassemble(name):
        accesses = kernel.counts().accesses
        assert not [a for a in accesses if a.space == "local"], kernel.name
        allowed = GENERIC.get(kernel.name.split("<")[0], (set(), ""))[0]
        assert {a.way for a in accesses if a.space == "generic"} <= allowed, kernel.name


@marked
@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_stores_of_16_bytes_are_one_instruction(name):
    """No four stores of one word each beside each other: what nvcc makes of an assigned struct of words."""
    kernels = [k for k in disassemble(name) if name not in ELEMENT_WISE or elements_of_an_access(k) > 1]
    assert {kernel.name: split_stores(kernel) for kernel in kernels if split_stores(kernel)} == {}


@marked
@pytest.mark.parametrize("name", ELEMENT_WISE)
def test_wide_kernels_access_tensors_by_16_bytes(name):
    """Loads of 4 and 8 bytes remain: the call's address, sample ids, thresholds."""
    wide = [k for k in disassemble(name) if elements_of_an_access(k) > 1]
    assert len(wide) >= 12
    for kernel in wide:
        counts = kernel.counts()
        assert set(counts.of("global", "store")) == {16}, kernel.name
        assert 16 in counts.of("global", "load"), kernel.name


@marked
@pytest.mark.parametrize("name", ["noise_bwd_kernel<{}, 8, true>", "noise_fwd_kernel<{}, 8, true, false>"])
@pytest.mark.parametrize("type_", ["bf16", "fp16"])
def test_four_samples_are_loaded_before_the_first_is_used(name, type_):
    """In the common loop, without sample ids. With no bound on the blocks ptxas begins two of them or one, to save registers."""
    (kernel,) = sass_report.named(disassemble("noise"), name.format(type_))
    paths = [kernel.path(loop) for loop in kernel.loops]
    assert [kernel.flight(path)[:2] for path in paths if kernel.counts(path).of("global", "load") == {16: 4}] == [(4, 64)], kernel.name


@marked
def test_noise_kernels_do_not_divide():
    """Rates included: their factors are reciprocals of small integers. float64, which nobody trains in, may call a subroutine."""
    kernels = [k for k in disassemble("noise") if "double" not in k.name]
    assert {k.name: k.counts() for k in kernels if k.counts().divisions or k.counts().calls} == {}


@marked
@pytest.mark.parametrize("form", noise_prediction.FORMS, ids=lambda form: form.name)
def test_predicted_part_of_the_copy_rate(form):
    """What docs/gpu-speed.md says. Rates and real-valued noise in 16 bits are bound by arithmetic."""
    least = 0.8 if form.source == "real_noise" or "rates" in form.name else 0.92
    for type_, samples in itertools.product(noise_prediction.TYPES, (1, 4, 8)):
        predicted = noise_prediction.predict(disassemble(form.source), form, type_, samples)
        assert predicted.part >= least, (type_, samples, predicted)


# Instructions of a warp in the loop over its units but for the loops within, which docs/gpu-speed.md counts; a tenth more may be spent.
REGISTERS = {
    "8, 2, 8, false": 2548,
    "8, 4, 4, false": 2312,
    "8, 16, 1, false": 2131,
    "8, 4, 4, true": 4421,
    "8, 16, 1, true": 4176,
    "2, 8, 8, false": 4177,
    "1, 8, 8, false": 3173,
}


@marked
@pytest.mark.parametrize("form", REGISTERS)
def test_units_in_registers_are_refilled_by_whole_accesses(form):
    """Each access of each row is loaded for the next unit, and stored, once in the loop over units; what is computed takes no detour. Of
    rows that begin anywhere each access may be made of elements, too.
    """
    (kernel,) = sass_report.named(disassemble("iw_cross_entropy_registers"), f"iw_cross_entropy_registers_kernel<bf16, {form}>")
    elements, accesses, rows = map(int, form.split(", ")[:3])
    moved = {2 * elements: accesses * rows} | ({2: elements * accesses * rows} if form.endswith("true") else {})
    loop = max(kernel.loops, key=lambda loop: len(loop.blocks))
    counts = kernel.counts(kernel.path(loop))
    assert counts.of("global", "load") == counts.of("global", "store") == moved
    assert counts.instructions <= 1.1 * REGISTERS[form]


@marked
def test_clusters_refill_granules_as_they_are_read():
    """Two loops take a row's granules: one reads, one reads, stores and lets the next unit's granule follow."""
    (kernel,) = sass_report.named(disassemble("iw_cross_entropy"), "iw_cross_entropy_cluster_kernel<bf16, false>")
    counts = [kernel.counts(kernel.path(loop)) for loop in kernel.loops]
    granules = [c for c in counts if c.of("shared", "load").get(16) == 1 and c.classes["mufu"] >= 8]
    reads, writes = sorted(granules, key=lambda c: c.of("global", "store").get(16, 0))
    assert reads.of("global", "store") == {} and reads.instructions <= 66
    assert writes.of("global", "store") == {16: 1} and set(writes.of("global to shared", "copy")) == {16} and writes.instructions <= 130


def elements_of_an_access(kernel) -> int:
    """V of noise_fwd_kernel<bf16, V, ...> and real_noise_fwd_kernel<Normal, bf16, V, ...>"""
    return next(int(argument) for argument in kernel.name.split("<")[1].rstrip(">").split(", ") if argument.isdigit())


def split_stores(kernel) -> list[str]:
    """Base registers from which one block stores 4, 8, ... words side by side; structs of other sizes are not accesses cut up, and neither
    are elements that are stored each under its own condition.
    """
    found = set()
    for block in kernel.blocks:
        offsets: dict[tuple[str, str], set[int]] = {}
        for i in block.instructions:
            if i.access and i.access.way == "store" and i.access.bytes == 4:
                base, offset = sass_report.place(i)
                offsets.setdefault((i.predicate, base), set()).add(offset)
        for (_, base), at in offsets.items():
            for first in (o for o in at if o - 4 not in at):
                length = next(n for n in itertools.count(1) if first + 4 * n not in at)
                found |= {base} if length % 4 == 0 else set()
    return sorted(found)


# ---- the tool ----

# A loop over samples, in it an inner loop, a division with a subroutine, and an early exit; constructed, not compiled.
LISTING = """
	code for sm_90
		Function : _ZN5iwsgd6kernelIfLi4EEEvPKf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/                   ISETP.GE.AND P0, PT, R1, 0x4, PT ;
        /*0020*/               @P0 EXIT ;
        /*0030*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*0040*/                   LDG.E.128 R8, desc[UR8][R2.64+0x10] ;
        /*0050*/                   LDG.E.128.CONSTANT R12, desc[UR8][R2.64+0x20] ;
        /*0060*/                   IMAD.WIDE.U32 R16, R5, -0x2daee0ad, RZ ;
        /*0070*/                   FADD R17, R16, R11 ;
        /*0080*/                   LDS.64 R20, [R7] ;
        /*0090*/                   BSSY B0, 0x100 ;
        /*00a0*/                   I2F.U32.RP R6, R5 ;
        /*00b0*/                   MUFU.RCP R6, R6 ;
        /*00c0*/              @!P1 BRA 0xf0 ;
        /*00d0*/                   CALL.REL.NOINC 0x180 ;
        /*00e0*/                   BRA 0xf0 ;
        /*00f0*/                   BSYNC B0 ;
        /*0100*/                   SHFL.BFLY PT, R7, R17, 0x10, 0x1f ;
        /*0110*/               @P2 BRA 0x100 ;
        /*0120*/                   STG.E desc[UR8][R2.64+0x4], R17 ;
        /*0130*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0140*/                   STG.E.U16 desc[UR8][R2.64], R17 ;
        /*0150*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0160*/               @P3 BRA 0x30 ;
        /*0170*/                   EXIT ;
        /*0180*/                   F2F.F64.F32 R18, R17 ;
        /*0190*/                   RET.REL.NODEC R4 0x0 ;
        /*01a0*/                   BRA 0x1a0;
        /*01b0*/                   NOP;
"""


@pytest.fixture(scope="module")
def kernel():
    (kernel,) = sass_report.parse(LISTING, resources={"_ZN5iwsgd6kernelIfLi4EEEvPKf": (40, 1024)})
    return kernel


def test_listing_becomes_blocks(kernel):
    assert (kernel.name, kernel.arch, kernel.registers, kernel.shared_bytes) == ("kernel<float, 4>", "90", 40, 1024)
    starts = [block.instructions[0].address for block in kernel.blocks]
    assert starts == [0x00, 0x30, 0xD0, 0xE0, 0xF0, 0x100, 0x120, 0x170, 0x180], "what follows the code is left out"
    assert [block.successors for block in kernel.blocks] == [(1,), (2, 4), (3,), (4,), (5,), (6, 5), (7, 1), (), ()]
    assert [block.number for block in kernel.blocks if block.rare] == [0, 2, 7, 8]


def test_loops_are_nested(kernel):
    outer, inner = kernel.loops
    assert (outer.header, sorted(outer.blocks), outer.depth, outer.parent) == (1, [1, 2, 3, 4, 5, 6], 1, None)
    assert (inner.header, sorted(inner.blocks), inner.depth, inner.parent) == (5, [5], 2, 0)
    assert kernel.path(outer) == [1, 3, 4, 6], "neither the inner loop nor the call"
    assert kernel.path(inner) == [5]


def test_instructions_are_counted_by_class(kernel):
    counts = kernel.counts([1, 4, 5, 6])
    assert counts.instructions == 10 + 1 + 2 + 5
    assert counts.classes == {
        "memory": 6, "control": 5, "wide multiply": 1, "fp32": 1, "conversion": 1, "mufu": 1, "shuffle": 1, "uniform": 1, "barrier": 1,
    }  # fmt: skip
    assert counts.of("global", "load") == {4: 1, 16: 2}
    assert counts.of("global", "store") == {2: 1, 4: 1}
    assert counts.of("shared", "load") == {8: 1}
    assert (counts.divisions, counts.calls, kernel.counts().calls) == (1, 0, 1)
    assert kernel.counts([5, 5]).instructions == 4


def test_loads_under_way_end_with_the_first_use(kernel):
    """R11 is the last register of the first wide load; the narrow one before it does not count, the one after it does."""
    assert kernel.flight([1]) == sass_report.Flight(loads=2, bytes=32, instructions=3)


def test_shortest_way(kernel):
    assert kernel.way() == [0, 1, 4, 5, 6, 7]
    assert kernel.way(2) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kernel.way(5, 5, 5) == [0, 1, 4, 5, 5, 5, 6, 7]
    with pytest.raises(ValueError, match="no way"):
        kernel.way(7, 1)


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("LDG.E.64 R12, desc[UR8][R6.64+0x8]", {6}, {12, 13}),
        ("STG.E.128 desc[UR8][R6.64], R20", {6, 20}, set()),
        ("SHFL.IDX PT, R5, R6, R7, 0x1f", {6, 7}, {5}),
        ("IMAD.WIDE.U32 R8, P0, R24, UR5, R6", {24, 6}, {8, 9}),
        ("ISETP.GE.U32.AND P0, PT, R12, UR6, PT", {12}, set()),
        ("LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]", {2, 5}, set()),
    ],
)
def test_registers_of_an_instruction(text, reads, writes):
    instruction = sass_report.instruction(f"        /*0000*/                   {text} ;")
    assert instruction.reads() == reads
    assert instruction.writes() == writes


def test_kernels_are_found_by_name(kernel):
    assert sass_report.named([kernel], "kernel<float, 4>") == [kernel]
    assert sass_report.named([kernel], r"float, \d") == [kernel]
    assert sass_report.named([kernel], "double") == []


def test_a_split_store_is_seen():
    """Four words side by side are one; with the fourth elsewhere, or a fifth beside them, they are not."""

    def stores(*offsets):
        lines = [f"        /*{16 * k:04x}*/                   STG.E desc[UR8][R2.64+{at:#x}], R4 ;" for k, at in enumerate(offsets)]
        return sass_report.parse("\n".join(["Function : f", *lines, ""]))[0]

    assert split_stores(stores(0, 4, 8, 12)) == ["R2.64"]
    assert split_stores(stores(0, 4, 8, 16)) == []
    assert split_stores(stores(0, 4, 8, 12, 16)) == []
