"""How calls are cut into Triton programs: plain functions, tested over many sizes. Neither triton nor a GPU is needed."""

import itertools

import pytest

from iwsgd_ext.ops.triton.device import KNOWN, Device, alignment, divide_up, nearest, power_of_two
from iwsgd_ext.ops.triton.iw_cross_entropy_plan import LIMITS, Shape, held_plan, reread_plan, split_plan, weights_plan
from iwsgd_ext.ops.triton.noise_plan import ELEMENTS, GROUPS, LINE, ahead_of, lines_of, tiles_of

DEVICES = [*KNOWN.values(), Device(90, 16, 8 << 20)]


def shapes():
    """Shapes of every regime: (bytes of an element, of a number), sizes, with neighbouring classes or positions."""
    for (e, a), S, (groups, lanes), C in itertools.product(
        [(2, 4), (4, 4), (8, 8)], [1, 3, 8, 64], [(1, 1), (1, 129), (1, 8192), (16, 7), (4, 1089)], [1, 10, 63, 1000, 4096, 50257, 128256]
    ):
        for shared, adjacent, soft in itertools.product([False, True], repeat=3):
            yield Shape(S, groups, lanes, C, shared, e, a, adjacent, soft)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("gpu", DEVICES, ids=str)
def test_held_units(gpu):
    held = 0
    for shape in shapes():
        plan = held_plan(shape, gpu)
        if plan is None:
            continue
        held += 1
        assert not shape.shared
        assert all(map(is_power_of_two, plan[:4])) and plan.warps <= 32
        assert plan.block_s >= shape.samples and plan.block_c >= shape.classes
        elements = plan.block_s * plan.block_l * plan.block_c
        # Registers of a thread: never more than 64 for what is held, in at most 256 threads.
        assert elements * shape.acc_bytes // 4 <= 64 * 32 * plan.warps and plan.warps <= 8, (shape, plan)
        assert plan.block_s * plan.block_l <= max(plan.block_s, 128), "more than four rows for a thread of a warp"
        assert plan.tiles == shape.groups * divide_up(shape.lanes, plan.block_l)
        assert 1 <= plan.programs <= plan.tiles
        rounds = divide_up(plan.tiles, plan.programs)
        assert plan.programs * rounds < plan.tiles + rounds, "programs have as many tiles, or one less"
    assert held > 100


@pytest.mark.parametrize("gpu", DEVICES, ids=str)
def test_reread_units(gpu):
    reread = 0
    for shape in shapes():
        plan = reread_plan(shape, gpu)
        if plan is None or held_plan(shape, gpu) is not None:
            continue
        reread += 1
        assert not shape.shared and shape.adjacent and plan.block_s >= shape.samples and plan.block_l == 1
        assert plan.block_s * plan.block_c >= 32 * plan.warps, "an element has one thread: NOTE [In place]"
        assert plan.programs * shape.samples * shape.classes * shape.element_bytes <= LIMITS[gpu.capability].cache_share * gpu.cache
        assert plan.tiles == shape.groups * shape.lanes >= plan.programs
    assert reread > 10


@pytest.mark.parametrize("gpu", DEVICES, ids=str)
def test_split_rows(gpu):
    for shape in shapes():
        plan = split_plan(shape, gpu)
        elements = plan.block_l * plan.block_c
        assert all(map(is_power_of_two, plan[:3]))
        assert plan.lane_blocks * plan.block_l >= shape.lanes > (plan.lane_blocks - 1) * plan.block_l
        assert plan.class_blocks * plan.block_c >= shape.classes > (plan.class_blocks - 1) * plan.block_c
        assert elements >= 32 * plan.warps, "an element has one thread: NOTE [In place]"
        assert elements * shape.acc_bytes // 4 <= 32 * 32 * plan.warps


@pytest.mark.parametrize(("samples", "units"), list(itertools.product([1, 3, 257, 5000, 65536], [0, 1, 7, 100000])))
def test_weights(samples, units):
    plan = weights_plan(samples, units)
    assert plan.block_s >= samples and plan.programs * plan.block_l >= units > (plan.programs - 1) * plan.block_l
    assert plan.block_s * plan.block_l <= 64 * 32 * plan.warps


def naive_positions(outer, inner, positions, share):
    return [[((o * inner + i) // share) % positions for i in range(inner)] for o in range(outer)]


def test_lines_draw_the_positions():
    """Each form's shortcut gives every element the position that it has by definition: over all small layouts."""
    seen = set()
    for outer, inner, positions, share, group in itertools.product([1, 2, 3], [1, 4, 8, 12, 16], [1, 3, 8, 16], [1, 2, 4, 12], [4, 8]):
        lines = lines_of(outer, 2, inner, positions, share, group)
        seen.add((lines.form, lines.wraps))
        assert lines.count * lines.width == outer * 2 * inner
        want = naive_positions(outer, inner, positions, share)
        for row in want:
            for part in range(lines.per_row):
                line = row[part * lines.width : (part + 1) * lines.width]
                if lines.form == LINE:
                    assert len(set(line)) == 1
                if lines.form == GROUPS:  # neighbours of a group, from its beginning
                    for i, position in enumerate(line):
                        start = line[i // group * group]
                        assert start % group == 0 and position == start + i % group
        if not lines.wraps:
            assert all(((o * inner + i) // share) < positions or positions == 1 for o in range(outer) for i in range(inner))
    assert seen == {(GROUPS, False), (GROUPS, True), (LINE, False), (LINE, True), (ELEMENTS, False), (ELEMENTS, True)}


def test_tiles_cover_lines_and_samples():
    for device, samples, inner, examples, group in itertools.product(DEVICES, [1, 2, 7, 64], [1, 9, 4096], [0, 1, 33, 4096], [4, 8]):
        lines = lines_of(1, examples, inner, inner, 1, group)
        for divided in (False, True):
            tiles = tiles_of(lines, samples, group, device, divided)
            assert all(map(is_power_of_two, tiles[:3])) and tiles.block_i >= group
            assert tiles.column_blocks * tiles.block_i >= lines.width > (tiles.column_blocks - 1) * tiles.block_i
            assert tiles.blocks // tiles.column_blocks * tiles.block_r >= lines.count
            assert tiles.parts * tiles.part >= samples > (tiles.parts - 1) * tiles.part
            assert tiles.parts == 1 or divided
            assert tiles.programs == tiles.blocks * tiles.parts


def test_samples_read_ahead():
    """64 bytes of a thread, as 4 samples have them at most; none where a read has less than 8 bytes or positions lie apart."""
    groups, apart = lines_of(1, 2, 4096, 4096, 1, 8), lines_of(2, 2, 7, 14, 1, 8)
    assert groups.form == GROUPS and apart.form == ELEMENTS
    assert [ahead_of(groups, 8, 8, size, 16 // size) for size in (2, 4, 8)] == [4, 2, 1]
    assert [ahead_of(groups, samples, 8, 2, 8) for samples in (1, 2, 3, 64)] == [1, 2, 4, 4]
    assert [ahead_of(groups, 8, 8, 2, align) for align in (8, 4, 2, 1)] == [4, 4, 1, 1]
    assert ahead_of(groups, 8, 4, 2, 8) == 4 and ahead_of(apart, 8, 8, 2, 8) == 1


def test_alignment_is_that_of_all():
    assert alignment(2, 1000, 8000, 0) == 8 and alignment(2, 1000, 8004) == 4 and alignment(4, 1000) == 4
    assert alignment(2, 50257) == 1 and alignment(8, 6, 4) == 2 and alignment(2, 0) == 8


def test_tables_have_every_architecture():
    assert set(LIMITS) == set(KNOWN) == {80, 90, 100}
    assert [nearest(c) for c in (75, 80, 86, 89, 90, 100, 103, 120)] == [80, 80, 80, 80, 90, 100, 100, 100]
    assert [power_of_two(n) for n in (0, 1, 2, 3, 1000)] == [1, 1, 2, 4, 1024]
