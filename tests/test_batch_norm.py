"""BatchNorm under S noise samples: outputs, gradients and running statistics of a loop over the samples, in float64."""

import copy
import pickle

import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw

SEED, B, S = 11, 6, 3
EXPAND = pytest.mark.parametrize("expand", ["axis", "first"])


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own, as model zoos have them."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def network(kind: str, momentum: float | None = 0.1, affine: bool = True, track: bool = True) -> nn.Module:
    """A BatchNorm in the trunk, one after the first noise and one after the second."""
    options = {"momentum": momentum, "affine": affine, "track_running_stats": track}
    if kind == "1d":
        layers = [nn.Linear(7, 8), nn.BatchNorm1d(8, **options), nn.Dropout(0.5), nn.Linear(8, 9), nn.BatchNorm1d(9, **options)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(0.25), nn.Linear(9, 5), nn.BatchNorm1d(5, **options)).double()
    conv, norm, drop = {"2d": (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d), "3d": (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d)}[kind]
    layers = [conv(2, 5, 2), norm(5, **options), drop(0.5), conv(5, 3, 2), norm(3, **options), nn.Dropout(0.25)]
    return nn.Sequential(*layers, nn.Flatten()).double()


def batch(kind: str) -> torch.Tensor:
    return torch.randn(B, *{"1d": (7,), "2d": (2, 4, 5), "3d": (2, 3, 4, 3)}[kind], dtype=torch.float64)


def loop(model: nn.Module, x: torch.Tensor, samples: int, first: int = 0) -> torch.Tensor:
    """torch's own model, one sample after another: its dropout layers stand aside, and masks of naive.py take their place."""
    outputs = []
    for s in range(first, first + samples):
        h, stream = x, 0
        for layer in model:
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                unit = "element" if type(layer) is nn.Dropout else "channel"
                keep = naive.naive_keep(h, layer.p, samples=1, seed=SEED, stream=stream, sample_ids=[s], unit=unit)
                h, stream = h * keep * naive.effective_scale(layer.p), stream + 1
            else:
                h = layer(h)
        outputs.append(h)
    return torch.cat(outputs)


def assert_equal(model: nn.Module, got: torch.Tensor, twin: nn.Module, want: torch.Tensor) -> None:
    """Outputs, every gradient of a loss that weighs all outputs differently, and every buffer."""
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(want)
    for y in (got, want):
        (y * weight).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "all of the last": {"momentum": 1.0},
    "never": {"momentum": 0.0},
    "plain": {"affine": False},
    "untracked": {"track": False},
}


@pytest.mark.parametrize("expand", ["axis", "first", "input"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_per_sample_is_the_loop(backend, kind, options, expand):
    """Two steps, so that the second starts from statistics of the first."""
    model = network(kind, **options)
    twin = copy.deepcopy(model)
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    for step in range(2):
        x = batch(kind)
        with iw.sampling(S, seed=SEED):
            got = model(x)
        want = loop(twin, x, S)
        for m in (model, twin):
            m.zero_grad()
        assert_equal(model, got, twin, want)
        if options.get("track", True):
            assert twin[1].num_batches_tracked == (step + 1) * S


@EXPAND
def test_chunks_of_samples_in_order(expand):
    """Two samples, then the third: the loop's running statistics, trunk included."""
    model, x = network("2d"), batch("2d")
    twin = copy.deepcopy(model)
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    parts = []
    for ids in ([0, 1], [2]):
        with iw.sampling(len(ids), seed=SEED, sample_ids=ids):
            parts.append(model(x))
    assert_equal(model, torch.cat(parts), twin, loop(twin, x, S))


@EXPAND
def test_subclass_with_a_forward_of_its_own(expand):
    model = nn.Sequential(nn.Conv2d(2, 5, 2), Activated(5), nn.Dropout(0.5), nn.Conv2d(5, 3, 2), Activated(3)).double()
    twin, x = copy.deepcopy(model), batch("2d")
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    assert isinstance(model[1], Activated)
    with iw.sampling(S, seed=SEED):
        got = model(x)
    assert_equal(model, got, twin, loop(twin, x, S))


@EXPAND
def test_instance_norm_with_running_statistics(expand):
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Dropout(0.5), nn.InstanceNorm2d(2, track_running_stats=True))
    model = nn.Sequential(*model, nn.InstanceNorm2d(2, affine=True)).double()
    twin, x = copy.deepcopy(model), batch("2d")
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    assert type(model[3]) is nn.InstanceNorm2d
    with iw.sampling(S, seed=SEED):
        got = model(x)
    assert_equal(model, got, twin, loop(twin, x, S))


def test_joint_is_over_all_rows():
    """torch's layers as they are: the trunk over B rows, what follows the noise over S*B."""
    model, x = network("1d"), batch("1d")
    twin = copy.deepcopy(model)
    iw.convert(model, S, expand="first", batch_norm="joint")
    with iw.sampling(S, seed=SEED):
        got = model(x)
    h = torch.cat([twin[1](twin[0](x))] * S)
    h = twin[4](twin[3](h * naive.naive_keep(h, 0.5, samples=S, seed=SEED, expand=False) * 2))
    keep = naive.naive_keep(h, 0.25, samples=S, seed=SEED, stream=1, expand=False)
    assert_equal(model, got, twin, twin[8](twin[7](torch.relu(h) * keep * naive.effective_scale(0.25))))


@pytest.mark.parametrize("expand", ["axis", "first", "input"])
def test_frozen_normalises_as_eval_and_writes_nothing(expand):
    model = network("2d")
    for _ in range(3):
        model(batch("2d"))  # running statistics that are not 0 and 1
    twin, x = copy.deepcopy(model), batch("2d")
    for m in twin:
        m.eval()
    before = {name: v.clone() for name, v in model.named_buffers()}
    iw.convert(model, S, expand=expand, batch_norm="frozen")
    with iw.sampling(S, seed=SEED):
        got = model(x)
    assert_equal(model, got, twin, loop(twin, x, S))
    assert all(torch.equal(v, before[name]) for name, v in model.named_buffers())


@EXPAND
@pytest.mark.parametrize("mode", ["per_sample", "frozen"])
def test_eval_revert_copies_and_state(mode, expand):
    """Eval mode bit for bit, classes and flags back after revert, copies and pickles that draw and normalise alike."""
    model, x = network("2d"), batch("2d")
    model(x)
    want, text = model.eval()(x), repr(model)
    state = copy.deepcopy(model.state_dict())
    iw.convert(model, S, expand=expand, batch_norm=mode)
    assert f"batch_norm='{mode}'" in repr(model)
    assert torch.equal(model(x), want)
    assert model.state_dict().keys() == state.keys()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    outputs = []
    for other in (model, *copies):
        with iw.sampling(S, seed=SEED):
            outputs.append(other.train()(x))
    for other, y in zip(copies, outputs[1:], strict=True):
        assert torch.equal(y, outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
        assert type(other[1]) is type(model[1])
    for training in (True, False):
        iw.revert(iw.convert(iw.revert(model.train(not training)), S, batch_norm=mode).train(training))
        assert (repr(model), [m.training for m in model.modules()]) == (text, [training] * len(list(model.modules())))
        iw.convert(model, S, batch_norm=mode)


@pytest.mark.parametrize("mode", ["per_sample", "frozen"])
def test_outside_of_a_context(mode):
    """A layer called by itself in training: torch's, but frozen stays frozen."""
    norm = nn.BatchNorm1d(4)
    x, twin = torch.randn(B, 4), copy.deepcopy(norm)
    model = iw.convert(nn.Sequential(norm, nn.Dropout(0.5)), S, batch_norm=mode)
    want = twin(x) if mode == "per_sample" else twin.eval()(x)
    assert torch.equal(model[0](x), want)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))


@EXPAND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, expand):
    """Rows in half precision with statistics in float32, as mixed precision has them: within the rounding of outputs of the loop."""
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(7)), torch.randn(B, 7, dtype=dtype)
    twin = copy.deepcopy(model)
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    with iw.sampling(S, seed=SEED):
        got = model(x)
    want = loop(twin, x, S)
    assert got.dtype == want.dtype == dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EXPAND
def test_one_row_for_each_channel_raises_as_torch(expand):
    model = iw.convert(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(7)), S, expand=expand)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.randn(1, 7))


def test_group_and_layer_norm_stay():
    model = iw.convert(nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Dropout()), S, batch_norm="per_sample")
    assert [type(m) for m in model[:2]] == [nn.GroupNorm, nn.LayerNorm]


@EXPAND
def test_sync_batch_norm_takes_part(expand):
    """In one process it is a BatchNorm2d, over the rows of each sample."""
    model, x = nn.SyncBatchNorm.convert_sync_batchnorm(network("2d")), batch("2d")
    twin = network("2d")
    twin.load_state_dict(model.state_dict())
    iw.convert(model, S, expand=expand, batch_norm="per_sample")
    assert isinstance(model[1], nn.SyncBatchNorm)
    with iw.sampling(S, seed=SEED):
        got = model(x)
    assert_equal(model, got, twin, loop(twin, x, S))


@pytest.mark.slow
@EXPAND
@pytest.mark.parametrize("mode", ["per_sample", "frozen"])
def test_compiled(mode, expand):
    """fullgraph, and what eager gives: outputs, gradients and running statistics."""
    torch._dynamo.reset()
    model, x = network("2d"), batch("2d")
    iw.convert(model, S, expand=expand, batch_norm=mode, verify=False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with iw.sampling(S, seed=SEED):
            got = compiled(x)
        with iw.sampling(S, seed=SEED):
            want = twin(x)
        assert_equal(model, got, twin, want)


class Rows(nn.Module):
    """A BatchNorm over positions, [B*T, C], after another branch's noise: nobody can say whose rows those are."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.drop(x[:, 0]), self.norm(x.flatten(0, 1))


def tracked_by_none() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout())


class Noisy(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(4)
        self.drop = nn.Dropout(0.5)


BAD = [
    ("batch_norm: expected one of .* got 'each'", lambda: iw.convert(tracked_by_none(), S, batch_norm="each")),
    ("running statistics, but 0 \\(BatchNorm1d\\) tracks none", lambda: iw.convert(tracked_by_none(), S, batch_norm="frozen")),
    ("0 is lazy", lambda: iw.convert(nn.Sequential(nn.LazyBatchNorm1d(), nn.Dropout()), S, batch_norm="per_sample")),
    ("0 \\(Noisy\\) holds Dropout", lambda: iw.convert(nn.Sequential(Noisy()), S, batch_norm="per_sample")),
    ("met 35 rows, but batch=5 and samples=3", lambda: iw.convert(Rows(), S, expand="first", batch_norm="per_sample")(torch.ones(5, 7, 4))),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
