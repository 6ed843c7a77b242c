"""iw.backward and what a model holds: BatchNorm, other buffers, random numbers, passes that are left out, processes."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle.naive import naive_keep, naive_loss
from test_network import SEED, B
from torch import nn

import iwsgd_ext as iw

S = 7
WAYS = {
    "batched": {"strategy": "batched"},
    "loop": {"strategy": "loop"},
    "streamed-1": {"strategy": "streamed"},
    "streamed-3": {"strategy": "streamed", "chunk": 3},
}
EXACT = pytest.mark.parametrize("way", WAYS)


class Normalised(nn.Sequential):
    """A BatchNorm before all noise and one between noises."""

    def __init__(self, momentum: float | None = 0.3):
        trunk = (nn.Linear(6, 12), nn.BatchNorm1d(12, momentum=momentum), nn.ReLU(), nn.Dropout(0.4))
        super().__init__(*trunk, nn.Linear(12, 9), nn.BatchNorm1d(9, momentum=momentum), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 4))
        for m in (self[1], self[5]):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)


class Trunk(nn.Sequential):
    """BatchNorm before all noise only."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 4))


def naive_normalised(model, x, target, mode, samples=S):
    """The loop over samples in plain torch, B rows at a time; frozen normalises by running statistics. Loss, gradients, buffers."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    state = {name: b.clone() for name, b in model.named_buffers()}

    def normalise(h, layer):
        mean, var, count = (state[f"{layer}.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked"))
        if mode != "frozen":
            count += 1
        factor = model[int(layer)].momentum
        factor = 1 / max(float(count), 1) if factor is None else factor
        return F.batch_norm(h, mean, var, w[f"{layer}.weight"], w[f"{layer}.bias"], training=mode != "frozen", momentum=factor)

    log_p = []
    for s in range(samples):
        address = {"samples": 1, "seed": SEED, "sample_ids": [s]}
        h = torch.relu(normalise(x @ w["0.weight"].T + w["0.bias"], "1"))
        h = h * naive_keep(h, 0.4, stream=0, **address) / (1 - round(0.4 * 65536) / 65536)
        h = torch.tanh(normalise(h @ w["4.weight"].T + w["4.bias"], "5"))
        h = h * naive_keep(h, 0.2, stream=1, **address) / (1 - round(0.2 * 65536) / 65536)
        logits = h @ w["8.weight"].T + w["8.bias"]
        log_p.append(list(torch.log_softmax(logits, 1)[torch.arange(len(x)), target]))
    loss = naive_loss(log_p)
    return loss.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True)), state


def data(dtype=torch.float64):
    return torch.randn(B, 6, dtype=dtype), torch.randint(4, (B,))


def run(model, x, target, samples=S, criterion=None, **options):
    model.zero_grad()
    loss = iw.backward(model, criterion or iw.IWCrossEntropyLoss(2), x, target, samples=samples, seed=SEED, **options)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}, {name: b.clone() for name, b in model.named_buffers()}


@EXACT
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("mode", ["per_sample", "frozen"])
@pytest.mark.parametrize("expand", ["axis", "first", "input", "4"])
def test_batch_norm(way, expand, mode, momentum):
    """Loss, gradients and running statistics of the loop over samples, from passes of any number of them."""
    if expand == "4":  # the noise stands where this submodule begins
        model = Normalised(momentum).double()
        model[3] = nn.Identity()
        model[4] = nn.Sequential(nn.Dropout(0.4), model[4])
        names = {"4.1.weight": "4.weight", "4.1.bias": "4.bias"}
    else:
        model, names = Normalised(momentum).double(), {}
    x, target = data()
    plain = Normalised(momentum).double()
    plain.load_state_dict({names.get(k, k): v for k, v in model.state_dict().items()})
    want = naive_normalised(plain, x, target, mode)
    got = run(iw.convert(model, 2, expand=expand, batch_norm=mode), x, target, **WAYS[way])
    torch.testing.assert_close(got[0], want[0])
    for mine, true in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close({names.get(k, k): v for k, v in mine.items()}, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", [*WAYS, "resampled"])
@pytest.mark.parametrize("expand", ["first", "3"])
def test_joint_batch_norm_before_all_noise(way, expand):
    """It sees the same rows in every pass: one update of its running statistics, as by one pass over all samples."""
    model = Trunk().double()
    want = copy.deepcopy(model)
    x, target = data()
    want[1](want[0](x))
    got = run(
        iw.convert(model, 2, expand=expand, batch_norm="joint"),
        x,
        target,
        criterion=iw.IWCrossEntropyLoss(2, alpha=math.inf),
        **WAYS.get(way, {"strategy": way}),
    )
    for name, buffer in want.named_buffers():
        torch.testing.assert_close(got[2][name], buffer)
    batched = run(model, x, target, criterion=iw.IWCrossEntropyLoss(2, alpha=math.inf))
    torch.testing.assert_close(got[:2], batched[:2])


@pytest.mark.parametrize(
    "options", [{"strategy": "loop"}, {"strategy": "streamed", "chunk": 3}, {"strategy": "streamed"}, {"strategy": "resampled"}], ids=str
)
@pytest.mark.parametrize("expand", ["first", "input", "3"])
def test_joint_batch_norm_after_noise_raises(expand, options):
    """Also one without running statistics in eval mode. The message has the layer's name and the way out; nothing is left behind."""
    model = iw.convert(Normalised().double(), 2, expand=expand, batch_norm="joint")
    layer = "1" if expand == "input" else "5"
    with pytest.raises(ValueError, match=f"BatchNorm '{layer}' .*batch_norm='frozen'.*'per_sample'"):
        run(model, *data(), **options)
    assert not model[5]._forward_pre_hooks
    run(model, *data())
    model[1].eval(), model[5].eval()
    run(model, *data(), **options)
    model[5].running_mean = model[5].running_var = None
    with pytest.raises(ValueError, match="BatchNorm '5'"):
        run(model, *data(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["loop", "streamed", "resampled"])
def test_compiled_batch_norm(strategy):
    """A compiled model is watched too, whatever was compiled before; and its buffers are kept from replays."""
    torch._dynamo.reset()
    model, (x, target) = iw.convert(Normalised().double(), 2, expand="first", batch_norm="joint"), data()
    model.compile(backend="eager")
    run(model, x, target)
    with pytest.raises(ValueError, match="BatchNorm '5'"):
        run(model, x, target, strategy=strategy)
    model = iw.convert(Trunk().double(), 2, expand="first", batch_norm="joint")
    twin, criterion = copy.deepcopy(model), iw.IWCrossEntropyLoss(2, alpha=math.inf)
    model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(run(model, x, target, criterion=criterion, strategy=strategy), run(twin, x, target, criterion=criterion))


def test_one_chunk_is_batched():
    """Streamed with all samples in one chunk allows joint statistics over them."""
    model, (x, target) = iw.convert(Normalised().double(), 2, expand="first", batch_norm="joint"), data()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(model, x, target, strategy="streamed", chunk=S), run(twin, x, target))


@pytest.mark.parametrize(("expand", "mode"), [("axis", "per_sample"), ("first", "joint"), ("first", "per_sample")])
def test_resampled_refuses_statistics_of_drawn_rows(expand, mode):
    """Examples keep different samples, so that no sample's batch is whole."""
    model = iw.convert(Normalised().double(), 2, expand=expand, batch_norm=mode)
    with pytest.raises(
        ValueError, match=r"'resampled': the BatchNorm '5'.*batch_norm='frozen', or take 'streamed' and batch_norm='per_sample'"
    ):
        run(model, *data(), strategy="resampled")


@pytest.mark.parametrize("expand", ["axis", "first"])
@pytest.mark.parametrize("mode", ["frozen", "per_sample"])
def test_resampled_with_batch_norm(mode, expand):
    """The best sample's gradient is exact; running statistics of a shared trunk are those of the first passes."""
    model, (x, target) = iw.convert((Normalised if mode == "frozen" else Trunk)().double(), 2, expand=expand, batch_norm=mode), data()
    twin, criterion = copy.deepcopy(model), iw.IWCrossEntropyLoss(2, alpha=math.inf)
    for chunk in (None, 3):
        got = run(model, x, target, criterion=criterion, strategy="resampled", keep=2, chunk=chunk)
        torch.testing.assert_close(got, run(twin, x, target, criterion=criterion))


class Counting(nn.Module):
    """A buffer written in place, one that is replaced, and one that takes part: each noisy pass is scaled by how many there were."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 4), iw.IWDropout(0.5)
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("none", None)
        self.alias = nn.Module()
        self.alias.register_buffer("passes", self.passes)
        self.fail_after = math.inf

    def forward(self, x):
        self.passes += 1
        if self.passes > self.fail_after:
            raise KeyError("the model failed")
        y = self.drop(self.linear(x)) * (1 + self.alias.passes / 10)
        self.last = y.detach()[-1]
        return y


@pytest.mark.parametrize("way", ["loop", "streamed-1", "streamed-3", "resampled"])
def test_buffers_are_written_in_the_first_passes_only(way):
    model, (x, target) = Counting().double(), data()
    passes, last, by_one = model.passes, model.last, way in ("loop", "streamed-1")
    got = run(model, x, target, **WAYS.get(way, {"strategy": way}))
    count = S if by_one else 3 if way == "streamed-3" else 1
    assert model.passes is passes and model.alias.passes is passes and passes == count
    assert model.last is not last and model.none is None
    with iw.sampling(1, seed=SEED, sample_ids=[S - 1]):
        want = model.drop(model.linear(x))[-1] * (1 + count / 10)
    torch.testing.assert_close(model.last, want.detach())
    if by_one:  # each replay read what its first pass had read
        model.passes.zero_()
        torch.testing.assert_close(got[:2], run(model, x, target, strategy="loop")[:2])


def test_an_exception_in_a_replay_leaves_the_model_as_it_was():
    model, (x, target) = Counting().double(), data()
    passes, state = model.passes, torch.get_rng_state()
    original = model.linear.forward
    calls = []

    def forward(h):
        calls.append(1)
        if len(calls) == S + 2:
            raise KeyError("in a replay")
        return original(h)

    model.linear.forward = forward
    with pytest.raises(KeyError, match="in a replay"):
        run(model, x, target, strategy="streamed")
    assert model.passes is passes and passes == S
    assert torch.equal(torch.get_rng_state(), state)


class TorchNoise(nn.Module):
    """Dropout that no swap reaches, after one that it does."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 4), iw.IWDropout(0.5)

    def forward(self, x):
        return F.dropout(self.drop(self.linear(x)), 0.3, self.training)


def test_random_numbers_of_torch_are_replayed():
    """Passes of one sample draw as the loop does, whose graphs are kept; what follows draws on after them."""
    model, (x, target) = TorchNoise().double(), data()
    results = []
    for strategy in ("loop", "streamed"):
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="seed: the model also drew torch's random numbers"):
            results.append((run(model, x, target, strategy=strategy), torch.rand(3)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("expand", ["axis", "first"])
@pytest.mark.parametrize("strategy", ["loop", "streamed", "resampled"])
@pytest.mark.filterwarnings("error")
def test_no_warning_of_a_seed_that_repeats_all_noise(strategy, expand):
    model, (x, target) = iw.convert(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).double(), 2, expand=expand), data()
    results = [run(model, x, target, strategy=strategy) for _ in range(2)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_resampled_refuses_random_numbers_of_torch():
    with pytest.raises(ValueError, match="drew torch's random numbers"):
        run(TorchNoise().double(), *data(), strategy="resampled")


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_passes_without_weight_are_left_out(expand):
    """Sample s has likelihood 0 (in float64) for all examples but where s is 2 or 3: chunks without these get no second pass."""
    model, (x, target) = iw.convert(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4)).double(), 2, expand=expand, verify=False), data()
    passes = []
    model.register_forward_hook(lambda m, args, y: passes.append((y.shape[0] // B, y.requires_grad)))

    class Loss(iw.IWLoss):
        """The log-likelihood falls by 1000 per sample away from the third."""

        def log_likelihood(self, outputs, targets, samples):
            log_p, outer, denominator = super().log_likelihood(outputs, targets, samples)
            first = self.next
            self.next = (first + samples) % S
            penalty = 1000.0 * (torch.arange(first, first + samples) - 2).abs()
            return log_p - penalty[:, None], outer, denominator

    def step(**options):
        passes.clear()
        criterion = Loss(nn.CrossEntropyLoss(reduction="none"), S)
        criterion.next = 0
        if options["strategy"] == "streamed":
            ids = {1: [2], 3: [0]}[options["chunk"]]
            order = iter([*range(0, S, options["chunk"]), *ids])
            original = Loss.log_likelihood

            def log_likelihood(outputs, targets, samples):
                criterion.next = next(order)
                return original(criterion, outputs, targets, samples)

            criterion.log_likelihood = log_likelihood
        return run(model, x, target, criterion=criterion, **options)

    want = step(strategy="batched")
    torch.testing.assert_close(step(strategy="streamed", chunk=1), want)
    assert passes == [*[(1, False)] * 6, (1, True), (1, True)]
    torch.testing.assert_close(step(strategy="streamed", chunk=3), want)
    assert passes == [(3, False), (3, False), (1, True), (3, True)]


class OfTheLast(iw.IWLoss):
    """All weight is the last sample's: the first calls are first passes."""

    def log_likelihood(self, outputs, targets, samples):
        log_p, *others = super().log_likelihood(outputs, targets, samples)
        self.seen = getattr(self, "seen", 0) + samples
        return log_p + torch.where(torch.arange(samples) == samples - 1, 1000.0 * (self.seen == S), 0.0)[:, None], *others


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("expand", ["axis", "first"])
def test_distributed_data_parallel(tmp_path, expand):
    """Gradients travel once, with the last backward, also where its chunk has no weight; the values are a plain model's."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, (x, target) = iw.convert(Trunk().double(), 2, expand=expand), data()
        want = run(copy.deepcopy(model), x, target, criterion=iw.IWCrossEntropyLoss(2, alpha=math.inf))
        parallel, sent = nn.parallel.DistributedDataParallel(model), []

        def hook(state, bucket):
            sent.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, hook)
        for options in (*WAYS.values(), {"strategy": "resampled"}):
            if options["strategy"] == "loop" and torch.__version__.startswith("2.11."):
                continue  # torch 2.11's module writes a BatchNorm's buffers in each forward, and cannot go back through two of them
            sent.clear()
            got = run(parallel, x, target, criterion=iw.IWCrossEntropyLoss(2, alpha=math.inf), **options)
            torch.testing.assert_close(got[0], want[0])
            torch.testing.assert_close({k.removeprefix("module."): v for k, v in got[1].items()}, want[1])
            if options["strategy"] != "loop":
                assert sum(sent) == sum(p.numel() for p in model.parameters())
        sent.clear()
        run(parallel, x, target, criterion=OfTheLast(nn.CrossEntropyLoss(reduction="none"), S), strategy="streamed")
        assert sum(sent) == sum(p.numel() for p in model.parameters())
    finally:
        dist.destroy_process_group()
