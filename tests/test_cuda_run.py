"""What only a GPU shows: streams, CUDA graphs, waits for the device, launches, and results that are the same in every bit."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle.naive_loss import naive_loss

import iwsgd_ext as iw
from iwsgd_ext import functional

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.skipif(not iw.backend_info()["built"]["cuda"], reason="the CUDA kernels are not built"),
]
ROOT = Path(__file__).resolve().parent.parent
SAMPLES, BATCH = 4, 24
# Classes by regime: many units in a block, one unit in a block, a cluster of blocks (slices before sm_90).
CLASSES = {"tile": 10, "odd-tile": 1001, "large": 20_000}


@pytest.fixture
def model():
    """Two noise layers, so that streams count, and a loss over ten classes."""
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64), iw.IWDropout(0.5), torch.nn.ReLU(), iw.IWDropout(0.2), torch.nn.Linear(64, 10))
    return layers.cuda()


def step(model, x, target, **context):
    """Loss and gradients of one step, under noise of the context's seed."""
    with iw.sampling(SAMPLES, **context):
        logits = model(x)
    loss = iw.iw_cross_entropy(logits, target, SAMPLES)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def batch(classes=10):
    return torch.randn(BATCH, 32, device="cuda"), torch.randint(classes, (BATCH,), device="cuda")


def captured(call):
    """A CUDA graph of the call, and its results, after the warm-up that torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


class TestGraphs:
    def test_a_replay_draws_new_masks(self, model):
        x, target = batch()
        graph, (loss, _) = captured(lambda: step(model, x, target))
        losses = set()
        for _ in range(8):
            graph.replay()
            losses.add(loss.item())
        assert len(losses) == 8

    def test_a_replay_equals_the_eager_step_of_its_seed(self, model):
        x, target = batch()
        graph, (loss, gradients) = captured(lambda: step(model, x, target))
        for seed in (1, 2, 2**40 + 5):
            torch.manual_seed(seed)
            graph.replay()
            torch.manual_seed(seed)
            expected, expected_gradients = step(model, x, target)
            assert torch.equal(loss, expected)
            for got, other in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(got, other)

    def test_a_seed_in_a_tensor_is_read_at_each_replay(self):
        x, seed = torch.randn(16, 40, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
        graph, y = captured(lambda: functional.dropout(x, 0.5, samples=3, seed=seed))
        for value in (7, -1, 2**62):
            seed.fill_(value)
            graph.replay()
            assert torch.equal(y, functional.dropout(x, 0.5, samples=3, seed=value))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES.keys())
    def test_the_loss_of_new_data(self, classes, reduction):
        """The logits and the targets, and so the denominator, change between replays."""
        z = torch.randn(SAMPLES * BATCH, classes, device="cuda", requires_grad=True)
        target = torch.randint(classes, (BATCH,), device="cuda")

        def call():
            loss = iw.iw_cross_entropy(z, target, SAMPLES, reduction=reduction)
            return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

        graph, got = captured(call)
        for ignored in (0, 5, BATCH):
            with torch.no_grad():
                z.normal_()
                target.random_(classes)
                target[:ignored] = -100
            graph.replay()
            for mine, expected in zip(got, call(), strict=True):
                assert torch.equal(mine, expected)

    def test_calls_of_one_kernel_that_take_different_shared_memory(self):
        """The larger first: what the smaller one asks for must not be the limit of the graph's first launch."""
        sizes = (6000, 4000)  # in float32 and for 4 samples 96 and 64 KB of a block
        z = [torch.randn(SAMPLES * BATCH, classes, device="cuda") for classes in sizes]
        target = torch.randint(4000, (BATCH,), device="cuda")
        call = lambda: [iw.iw_cross_entropy(logits, target, SAMPLES) for logits in z]  # noqa: E731
        graph, losses = captured(call)
        graph.replay()
        for loss, expected in zip(losses, call(), strict=True):
            assert torch.equal(loss, expected)


def test_threads_that_take_different_shared_memory():
    """On one device: no thread's call may fail because another's asked for less."""
    target = torch.randint(4000, (BATCH,), device="cuda")
    inputs = [torch.randn(SAMPLES * BATCH, classes, device="cuda") for classes in (6000, 5000, 4000, 20_000)]
    expected = [iw.iw_cross_entropy(z, target, SAMPLES) for z in inputs]
    torch.cuda.synchronize()

    def many(z):
        return [iw.iw_cross_entropy(z, target, SAMPLES) for _ in range(200)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for losses, alone in zip(pool.map(many, inputs), expected, strict=True):
            assert all(torch.equal(loss, alone) for loss in losses)


class TestStreams:
    def test_another_stream(self):
        """Work is queued where the caller's is: behind a stream that is busy for a while, and nowhere else."""
        x, (_, target) = torch.zeros(64, 1000, device="cuda"), batch()
        z = torch.zeros(SAMPLES * BATCH, 10, device="cuda")
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.fill_(1)
            z.copy_(torch.arange(10, device="cuda").expand_as(z))
            y = functional.dropout(x, 0.5, samples=2, seed=7)
            loss = iw.iw_cross_entropy(z, target, SAMPLES)
        stream.synchronize()
        assert torch.equal(y.cpu(), functional.dropout(torch.ones(64, 1000), 0.5, samples=2, seed=7))
        expected = naive_loss(z, target, SAMPLES).loss
        torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)

    def test_streams_side_by_side(self):
        """Calls that run at the same time do not share memory: counters, partial sums."""
        streams = [torch.cuda.Stream() for _ in range(4)]
        inputs = [torch.randn(SAMPLES * 4096, 10, device="cuda") for _ in streams]
        target = torch.randint(10, (4096,), device="cuda")
        torch.cuda.synchronize()
        losses = []
        for _ in range(50):
            for stream, z in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    losses.append(iw.iw_cross_entropy(z, target, SAMPLES))
        torch.cuda.synchronize()
        for i, z in enumerate(inputs):
            alone = iw.iw_cross_entropy(z, target, SAMPLES)
            assert all(torch.equal(loss, alone) for loss in losses[i :: len(inputs)])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA GPU here")
    def test_a_device_that_is_not_the_current_one(self):
        x, target = torch.randn(8, 100), torch.randint(10, (BATCH,))
        z = torch.randn(SAMPLES * BATCH, 10)
        assert torch.cuda.current_device() == 0
        y = functional.dropout(x.to("cuda:1"), 0.5, samples=2, seed=7)
        assert y.device.index == 1 and torch.equal(y.cpu(), functional.dropout(x, 0.5, samples=2, seed=7))
        there = z.to("cuda:1").requires_grad_()
        loss = iw.iw_cross_entropy(there, target.to("cuda:1"), SAMPLES)
        loss.backward()
        assert there.grad.device.index == 1 and torch.cuda.current_device() == 0
        torch.testing.assert_close(loss.detach().cpu().double(), naive_loss(z, target, SAMPLES).loss, rtol=1e-5, atol=0)


@pytest.fixture
def no_wait():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestNoWait:
    """Nothing between the input and its gradient waits for the device."""

    @pytest.mark.parametrize("context", [{}, {"seed": 7}], ids=["drawn-seed", "given-seed"])
    def test_training_step(self, model, context, request):
        x, target = batch()
        step(model, x, target)
        request.getfixturevalue("no_wait")
        step(model, x, target, **context)

    def test_noise_at_an_address(self, request):
        x = torch.randn(8, 5, 6, 6, device="cuda", requires_grad=True)
        request.getfixturevalue("no_wait")
        for form in (functional.dropout, functional.dropout2d, functional.drop_path):
            y = form(x, 0.5, samples=2, seed=2**63 - 1, stream=3, first_example=2)
            y.backward(torch.ones_like(y))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_loss(self, reduction, dtype, request):
        z = torch.randn(SAMPLES * BATCH, 10, 3, device="cuda", dtype=dtype, requires_grad=True)
        target = torch.randint(10, (BATCH, 3), device="cuda")
        weight, of_example = torch.rand(10, device="cuda"), torch.rand(BATCH, device="cuda")
        request.getfixturevalue("no_wait")
        options = [{}, {"weight": weight, "label_smoothing": 0.1}, {"example_weight": of_example}, {"level": "position"}]
        for option in [*options, *([{"normalizer": 7.0}] if reduction == "mean" else [])]:
            loss, stats = iw.iw_cross_entropy(z, target, SAMPLES, reduction=reduction, return_stats=True, **option)
            (3 * loss.sum() + stats.ess.sum()).backward()


def kernels_of(call) -> list[str]:
    """The names of the kernels that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA and "_kernel" in e.name]


class TestLaunches:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("classes", [2, 10, 1000])
    @pytest.mark.parametrize(("smoothing", "kernel"), [(0.0, "registers"), (0.1, "fwd")], ids=["hard", "smoothed"])
    def test_few_classes_take_one(self, classes, reduction, smoothing, kernel, monkeypatch):
        """Loss, log-likelihoods, weights, bound and gradient."""
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        z = torch.randn(SAMPLES * 20_000, classes, device="cuda", requires_grad=True)
        target = torch.randint(classes, (20_000,), device="cuda")
        names = kernels_of(lambda: iw.iw_cross_entropy(z, target, SAMPLES, reduction=reduction, label_smoothing=smoothing))
        assert len(names) == 1 and f"iw_cross_entropy_{kernel}_kernel" in names[0], names

    @pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="clusters are of sm_90 and later devices"
    )
    @pytest.mark.parametrize("classes", [32_000, 128_256])
    def test_many_classes_take_a_cluster(self, classes):
        z = torch.randn(8 * 16, classes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(classes, (16,), device="cuda")
        names = kernels_of(lambda: iw.iw_cross_entropy(z, target, 8))
        assert sum("iw_cross_entropy_cluster_kernel" in name for name in names) == 1, names
        assert not any("iw_cross_entropy_statistics" in name for name in names), names

    def test_an_upstream_gradient_of_one_moves_nothing(self):
        """One launch that reads one value: no memory beside the gradient that forward made."""
        z = torch.randn(8 * 64, 32_000, device="cuda", requires_grad=True)
        target = torch.randint(32_000, (64,), device="cuda")
        loss = iw.iw_cross_entropy(z, target, 8)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (dz,) = torch.autograd.grad(loss, z)
        assert torch.cuda.max_memory_allocated() - before < z.numel()
        torch.testing.assert_close(dz[0, :5], (torch.autograd.grad(iw.iw_cross_entropy(z, target, 8) * 2, z)[0] / 2)[0, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [(), (7,)], ids=["rows", "positions"])
@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES.keys())
def test_the_same_in_every_bit(classes, positions, dtype):
    """Run after run, also while another stream keeps the multiprocessors busy."""
    batch = 300 if classes < 20_000 else 20
    z = torch.randn(8 * batch, classes, *positions, device="cuda", dtype=dtype, requires_grad=True)
    target, v = torch.randint(classes, (batch, *positions), device="cuda"), torch.rand(classes, device="cuda")

    def call():
        loss, stats = iw.iw_cross_entropy(z, target, 8, weight=v, label_smoothing=0.1, return_stats=True)
        return loss, *stats, torch.autograd.grad(loss, z)[0]

    first, busy = call(), torch.cuda.Stream()
    for trial in range(5):
        if trial > 2:
            with torch.cuda.stream(busy):
                torch.randn(2**24, device="cuda").exp_().log_()
        for got, expected in zip(call(), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("classes", [10, 20_000], ids=["tile", "large"])
def test_a_target_out_of_range_trips_an_assertion(classes):
    """In a process of its own, which cannot use the device afterwards."""
    program = f"""
import torch, iwsgd_ext as iw
z = torch.randn(16, {classes}, device="cuda")
iw.iw_cross_entropy(z, torch.tensor([0, 1, {classes}, 3], device="cuda"), 4)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode != 0
    assert "expected class indices in [0, C) or ignore_index" in done.stderr + done.stdout
