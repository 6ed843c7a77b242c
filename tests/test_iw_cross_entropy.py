"""The loss op's numbers: a case done by hand, and the float64 loop over sizes, dtypes, targets, layouts and instruction sets."""

import math
import os
import subprocess
import sys

import pytest
import torch
from oracle.naive_loss import assert_equals_naive, naive_loss, result_of

import iwsgd_ext as iw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# S, B, C, positions. Few classes are worked on as columns, from 64 on as rows; lanes are 4 to 16 wide, so every size is odd to them.
SIZES = {
    "one-class": (1, 3, 1, ()),
    "two-classes": (2, 5, 2, ()),
    "three-classes-positions": (3, 7, 3, (7,)),
    "digits": (8, 35, 10, ()),
    "digits-image": (3, 5, 10, (4, 5)),
    "last-column-size": (2, 3, 63, (33,)),
    "first-row-size": (3, 5, 64, ()),
    "row-and-one": (8, 3, 65, (7,)),
    "row-tail": (2, 7, 100, (4, 5)),
    "one-sample-positions": (1, 3, 500, (33,)),
    "several-blocks": (2, 67, 1000, ()),
    "imagenet-positions": (2, 3, 1000, (7,)),
    "vocabulary": (2, 3, 50257, ()),
}


def data(device, size, dtype, kind="labels"):
    """Logits and target, with the options that go with the kind of target."""
    samples, batch, classes, positions = size
    logits = (2 * torch.randn(samples * batch, classes, *positions)).to(dtype)
    target = torch.randint(classes, (batch, *positions))
    options = {}
    if kind == "probabilities":
        target = torch.softmax(torch.randn(batch, classes, *positions), 1)
    if kind != "labels":
        options = {"weight": (torch.rand(classes) + 0.25).to(device), "label_smoothing": 0.1}
    if kind == "smoothed":
        target[torch.rand(batch, *positions) < 0.3] = -100
        target.view(batch, -1)[0, 0] = classes - 1  # never all ignored
    return logits.to(device), target.to(device), options


def levels(positions):
    return ["example", "position"] if positions else ["example"]


def test_by_hand(backend, device):
    """Probabilities 3/4 and 1/2 of the label: L = log 5/8, w = 3/5, 2/5; and an example whose samples agree: L = log 1/3, w = 1/2."""
    logits = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 2.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], device=device).log()
    target = torch.tensor([1, 2], device=device)
    loss, log_p, weights, bound, dlogits = result_of(iw.iw_cross_entropy, logits, target, 2, reduction="sum")
    third = 1 / 3
    expected = torch.tensor([[3 / 20, -3 / 20, 0], [third / 2, third / 2, -third], [1 / 5, -1 / 5, 0], [third / 2, third / 2, -third]])
    torch.testing.assert_close(dlogits.cpu(), expected)
    torch.testing.assert_close(loss.cpu(), torch.tensor(math.log(8 / 5) + math.log(3)))
    torch.testing.assert_close(log_p.cpu(), torch.tensor([[3 / 4, third], [1 / 2, third]]).log())
    torch.testing.assert_close(weights.cpu(), torch.tensor([[3 / 5, 1 / 2], [2 / 5, 1 / 2]]))
    torch.testing.assert_close(bound.cpu(), torch.tensor([5 / 8, third]).log())


@pytest.mark.parametrize(
    ("alpha", "weights", "bound"),
    [
        (0.0, [1 / 2, 1 / 2], math.log(3 / 8) / 2),
        (2.0, [9 / 13, 4 / 13], math.log(13 / 32) / 2),
        (math.inf, [1.0, 0.0], math.log(3 / 4)),
    ],
    ids=["mean", "squared", "best"],
)
def test_alpha_by_hand(backend, device, alpha, weights, bound):
    """Probabilities 3/4 and 1/2 of the label, whose powers are small fractions."""
    logits = torch.tensor([[1.0, 3.0], [1.0, 1.0]], device=device).log()
    got = result_of(iw.iw_cross_entropy, logits, torch.tensor([1], device=device), 2, alpha=alpha)
    torch.testing.assert_close(got.weights.cpu(), torch.tensor(weights)[:, None])
    torch.testing.assert_close(got.bound.cpu(), torch.tensor([bound]))
    torch.testing.assert_close(got.loss.cpu(), torch.tensor(-bound))
    torch.testing.assert_close(got.dlogits.cpu(), torch.tensor([[weights[0] / 4, -weights[0] / 4], [weights[1] / 2, -weights[1] / 2]]))


def test_two_positions_by_hand(backend, device):
    """Sample 0 gives the labels 1/2 and 1/4, sample 1 gives 1/4 and 1/4: joint weights 2/3, 1/3; single ones 2/3, 1/3 and 1/2, 1/2."""
    logits = torch.tensor([[[1.0, 3.0], [1.0, 1.0]], [[3.0, 3.0], [1.0, 1.0]]], device=device).log()
    target = torch.tensor([[1, 1]], device=device)
    joint = result_of(iw.iw_cross_entropy, logits, target, 2)
    torch.testing.assert_close(joint.weights.cpu(), torch.tensor([[2 / 3], [1 / 3]]))
    torch.testing.assert_close(joint.loss.cpu(), torch.tensor(-math.log(3 / 32) / 2))
    torch.testing.assert_close(joint.dlogits[:, 0].cpu(), torch.tensor([[2 / 3 * 1 / 4, 2 / 3 * 3 / 8], [1 / 3 * 3 / 8, 1 / 3 * 3 / 8]]))
    single = result_of(iw.iw_cross_entropy, logits, target, 2, level="position")
    torch.testing.assert_close(single.weights.cpu(), torch.tensor([[[2 / 3, 1 / 2]], [[1 / 3, 1 / 2]]]))
    torch.testing.assert_close(single.loss.cpu(), torch.tensor(-(math.log(3 / 8) + math.log(1 / 4)) / 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_sizes(backend, device, size, dtype):
    logits, target, _ = data(device, size, dtype)
    for level in levels(size[3]):
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, size[0], level=level), logits, target, size[0], level=level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["smoothed", "probabilities"])
@pytest.mark.parametrize("size", ["three-classes-positions", "digits", "last-column-size", "row-and-one", "row-tail"])
def test_targets(backend, device, size, kind, dtype):
    """Smoothed labels with some ignored, and class probabilities, both with class weights."""
    size = SIZES[size]
    logits, target, options = data(device, size, dtype, kind)
    for level in levels(size[3]):
        got = result_of(iw.iw_cross_entropy, logits, target, size[0], level=level, **options)
        assert_equals_naive(got, logits, target, size[0], level=level, **options)


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "class-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "columns": lambda x: torch.cat([x[:, :3], x, x[:, :2]], 1)[:, 3:-2],
    "misaligned": misaligned,
    "misaligned-class-last": lambda x: misaligned(x.movedim(1, -1)).movedim(-1, 1),
    "one-row-expanded": lambda x: x[:1].expand(x.shape),
    "one-class-expanded": lambda x: x[:, :1].expand(x.shape),
    "rows-innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "positions-apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("size", [(3, 19, 10, ()), (2, 5, 10, (4, 5)), (2, 3, 65, (33,)), (3, 7, 100, ())], ids=str)
def test_layouts(backend, device, size, layout, dtype):
    logits, target, options = data(device, size, dtype, "smoothed")
    logits = layout(logits)
    before = logits.clone()
    for level in levels(size[3]):
        got = result_of(iw.iw_cross_entropy, logits, target, size[0], level=level, **options)
        assert_equals_naive(got, logits, target, size[0], level=level, **options)
    assert torch.equal(logits, before), "the logits were overwritten"


@pytest.mark.parametrize("target_layout", ["strided", "expanded"])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_target_layouts(backend, device, kind, target_layout):
    logits, target, options = data(device, (3, 7, 10, (5,)), torch.float32, kind)
    target = target.repeat_interleave(2, -1)[..., ::2] if target_layout == "strided" else target[:1].expand(target.shape)
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, **options), logits, target, 3, **options)


# Few examples of many positions share every step between threads; many examples are worked on in blocks.
PATHS = {"few-examples": (2, 1, 5, (2003,)), "many-examples": (2, 37, 11, (61,)), "few-rows-of-classes": (2, 3, 129, (101,))}


@pytest.mark.slow
@pytest.mark.parametrize("size", PATHS.values(), ids=PATHS.keys())
def test_many_positions(backend, device, size):
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, options = data(device, size, dtype, "smoothed")
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, size[0], **options), logits, target, size[0], **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [(3, 7, 10, ()), (2, 5, 65, (4, 5))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_upstream_gradient(backend, device, size, reduction, dtype):
    """Any upstream gradient: one number, or one for each example or position, of either sign and zero."""
    logits, target, options = data(device, size, dtype, "smoothed")
    samples, batch, _, positions = size
    for level in levels(positions):
        shape = () if reduction != "none" else (batch, *positions) if level == "position" else (batch,)
        upstream = 3 * torch.randn(shape, device=device)
        if shape:
            upstream[0] = 0
        options |= {"level": level, "reduction": reduction, "upstream": upstream}
        assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, samples, **options), logits, target, samples, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalizer", [7.0, 2.0**24], ids=["few", "many"])
def test_loss_scaling(backend, device, dtype, normalizer):
    """A loss scale of 65536 saves gradients below the smallest float16: one of 2^-24 is 2^-8 after scaling."""
    logits, target, _ = data(device, (3, 7, 10, ()), dtype)
    options = {"normalizer": normalizer, "upstream": 65536.0}
    assert_equals_naive(result_of(iw.iw_cross_entropy, logits, target, 3, **options), logits, target, 3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 5, 10, (61,)), (2, 13, 100, (9,)), (2, 3, 7, (501,)), (4, 131, 10, ()), (3, 131, 65, ())], ids=str)
def test_bits_do_not_depend_on_threads(backend, device, size, dtype):
    """Equal bits again, and for any number of threads, of which the choice between blocks and shared steps depends."""
    logits, target, options = data(device, size, dtype, "smoothed")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 4):
            torch.set_num_threads(threads)
            results += [result_of(iw.iw_cross_entropy, logits, target, size[0], **options)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, first, again in zip(result._fields, results[0], result, strict=True):
            assert torch.equal(first, again), name


def test_float64_gradient_by_differences(backend, device):
    """Central differences of the naive loss, which know nothing of any derivative."""
    logits, target, options = data(device, (3, 3, 4, (2,)), torch.float64, "smoothed")
    got = result_of(iw.iw_cross_entropy, logits, target, 3, **options).dlogits
    for i in range(0, logits.numel(), 5):
        step = torch.zeros_like(logits).flatten()
        step[i] = 1e-5
        step = step.view_as(logits)
        above, below = (naive_loss(logits + sign * step, target, 3, **options).loss for sign in (1, -1))
        torch.testing.assert_close(got.flatten()[i].cpu(), (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    """The same numbers on every instruction set that this machine has; each is chosen once per process."""
    build = iw.backend_info()["build"]
    if not isinstance(build, dict) or isa not in build["machine_isas"] or isa == build["isa"]:
        pytest.skip(f"{isa} is not on this machine, or is what the other tests run on")
    tests = "cpu-native and (by_hand or sizes or targets or (layouts and float32) or threads) and not vocabulary"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env={**os.environ, "IWSGD_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
