"""State on the sample axis: running statistics, buffers and attributes that a forward leaves, where parts of it share them.

The truth is the loop of single-sample forwards, one after another, on a copy: outputs, gradients and all that it leaves behind.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle.equal_to_loop import S, assert_is_loop
from torch import nn
from torch.utils.checkpoint import checkpoint

import iwsgd_ext as iw

B, W = 6, 5
X = torch.randn(B, W, dtype=torch.float64)


class Model(nn.Module):
    """Layers for a function to use: it is the forward."""

    def __init__(self, function, **more):
        super().__init__()
        self.function, self.l, self.d, self.n, self.m = function, nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(W), nn.BatchNorm1d(W)
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x, self.d(self.l(x)))


class Branches(nn.Module):
    """A part that asks for values, so that it is called once for each sample."""

    def __init__(self, function=lambda m, h: h, **more):
        super().__init__()
        self.function = function
        for name, v in more.items():
            setattr(self, name, v)

    def forward(self, h):
        h = self.function(self, h)
        return h * 2 if h.sum().item() > -1e9 else h


class Domains(nn.Module):
    """One table of running statistics for several domains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, W))
        self.register_buffer("var", torch.ones(2, W))

    def forward(self, x, domain):
        return F.batch_norm(x, self.mean[domain], self.var[domain], None, None, True, 0.1)


class Uncounted(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


def sharing(momenta, mean=True, var=True):
    model = Model(lambda m, x, h: m.m(m.n(h) * 3))
    if mean:
        model.m.running_mean = model.n.running_mean
    if var:
        model.m.running_var = model.n.running_var
    model.n.momentum, model.m.momentum = momenta
    return model


def uncountable():
    layer = nn.BatchNorm1d(W, momentum=None)
    layer.num_batches_tracked = None
    return layer


STATISTICS = {
    "a layer before and behind the noise": lambda: Model(lambda m, x, h: m.n(m.d(m.n(m.l(x))))),
    "a layer three times": lambda: Model(lambda m, x, h: m.n(m.n(m.n(x) + h) * 2)),
    "an average, twice": lambda: Model(lambda m, x, h: m.o(m.o(h) * 2), o=nn.BatchNorm1d(W, momentum=None)),
    "a table of domains": lambda: Model(lambda m, x, h: m.o(h, 0) + m.o(h * h, 0) + m.o(h, 1), o=Domains()),
    "two layers, one mean": lambda: sharing((0.1, 0.3), var=False),
    "two layers, one variance": lambda: sharing((0.1, 0.3), mean=False),
    "two layers, one an average": lambda: sharing((0.1, None)),
    "two averages": lambda: sharing((None, None)),
    "a layer that does not count": lambda: Model(lambda m, x, h: m.o(h), o=Uncounted(W)),
    "an average without a count": lambda: Model(lambda m, x, h: m.o(h), o=uncountable()),
    "momentum 0 and 1": lambda: Model(
        lambda m, x, h: m.o(h) + m.p(h), o=nn.BatchNorm1d(W, momentum=0.0), p=nn.BatchNorm1d(W, momentum=1.0)
    ),
    "an instance norm twice": lambda: Model(
        lambda m, x, h: m.o(m.d(m.o(h[:, :, None] * torch.arange(4)))).sum(2), o=nn.InstanceNorm1d(W, track_running_stats=True)
    ),
    "read before the update": lambda: Model(lambda m, x, h: h * (m.n.running_mean - h.mean(0)) + m.n(h)),
    "used before the update": lambda: Model(lambda m, x, h: F.batch_norm(h, m.n.running_mean, m.n.running_var, None, None, False) + m.n(h)),
    "read in a list": lambda: Model(lambda m, x, h: m.n(h) * torch.stack([m.n.running_mean, m.n.running_var])[0]),
    "read through a view": lambda: Model(lambda m, x, h: (m.n(h), m.n.running_mean.view(-1))[0] * m.n.running_mean[:]),
    "updated through a view": lambda: Model(
        lambda m, x, h: F.batch_norm(h, m.n.running_mean[:], m.n.running_var[:], None, None, True, 0.1) * m.n.running_mean
    ),
    "an average that is read": lambda: Model(lambda m, x, h: m.o(h) * m.o.running_mean, o=nn.BatchNorm1d(W, momentum=None)),
    "on the axis, then one by one": lambda: Model(
        lambda m, x, h: m.o.n(h) + m.o(h**3), o=Branches(lambda m, h: m.n(h), n=nn.BatchNorm1d(W))
    ),
    "one by one, then on the axis": lambda: Model(
        lambda m, x, h: m.o(h**3) + m.o.n(h), o=Branches(lambda m, h: m.n(h), n=nn.BatchNorm1d(W))
    ),
    "one by one, twice": lambda: Model(lambda m, x, h: m.o(h**3) + m.o(h), o=Branches(lambda m, h: m.n(h), n=nn.BatchNorm1d(W))),
    "one by one, then read": lambda: Model(
        lambda m, x, h: m.o(h) + h * m.o.n.running_mean, o=Branches(lambda m, h: m.n(h), n=nn.BatchNorm1d(W))
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics(name):
    torch.manual_seed(0)
    assert_is_loop(STATISTICS[name]().double(), X)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["a layer before and behind the noise", "a layer three times", "momentum 0 and 1"])
def test_compiled_running_statistics(name, compiler):
    torch._dynamo.reset()  # it remembers graph breaks of other tests
    assert_is_loop(STATISTICS[name]().double(), X, forward=lambda m: torch.compile(m, backend=compiler, fullgraph=True))


def test_statistics_of_16_bits_do_not_overflow():
    """Under autocast to float16: variances above 65504, in float32 as for one sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(W))
    nn.init.normal_(model[0].weight, std=300.0)
    twin, x = copy.deepcopy(model), torch.randn(32, W)
    iw.convert(model, S), iw.convert(twin, S)
    with torch.autocast("cpu", torch.float16):
        with iw.sampling(S, seed=2):
            model(x)
        for s in range(S):
            with iw.sampling(1, seed=2, sample_ids=[s]):
                twin(x)
    assert twin[2].running_var.max() > 65504
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-5, atol=0)


def test_an_earlier_eval_forward_can_still_go_backward():
    """Updates count no version, as torch's own do not."""
    model = iw.convert(nn.Sequential(nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(W), nn.Linear(W, 3)).double(), S)
    quiet = model.eval()(X)
    noisy = model.train()(X)
    (quiet.sum() + noisy.sum()).backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_average_in_a_compiled_model_is_refused():
    torch._dynamo.reset()
    model = iw.convert(nn.Sequential(nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(W, momentum=None)).double(), S)
    with pytest.raises(Exception, match="momentum=None reads its number of batches"):
        torch.compile(model, backend="eager", fullgraph=True)(X)


class Average(nn.Module):
    """A moving average as a buffer, or as a plain attribute."""

    def __init__(self, buffer=True):
        super().__init__()
        if buffer:
            self.register_buffer("mean", torch.zeros(()))
        else:
            self.mean = torch.zeros((), dtype=torch.float64)

    def forward(self, h):
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean())
        return h - self.mean


def appends(m, h):
    m.kept.append(h.pow(2).mean())
    return h


def sums_what_is_kept(m, x, h):
    m.o.kept.clear()
    return m.o(h) * sum(m.o.kept)


def keeps(make):
    def function(m, h):
        m.kept = make(h)
        return h

    return function


def carries(m, h):
    m.kept = h if m.kept is None else torch.tanh(m.kept + h)
    return m.kept


def carried(m, x, h):
    m.o.kept = None
    return m.o(m.o(m.o(h)))


def solved(m, x, h):
    return m.solve(lambda y: torch.tanh(m.l(y) + h), x)


class Solver(nn.Module):
    def forward(self, step, y):
        for _ in range(3):
            change = step(y) - y
            y = y + change
            if change.abs().max() < 1e-9:
                break
        return y


KEPT = {
    "a moving average": lambda: Model(lambda m, x, h: m.o(h), o=Average()),
    "a moving average, twice": lambda: Model(lambda m, x, h: m.o(m.d(m.o(h))), o=Average()),
    "a moving average that is no buffer": lambda: Model(lambda m, x, h: m.o(h), o=Average(buffer=False)),
    "a list that is added to": lambda: Model(sums_what_is_kept, o=Branches(appends, kept=[])),
    "a tuple": lambda: Model(lambda m, x, h: m.o(h) + m.o.kept[0], o=Branches(keeps(lambda h: (h * 2, h)))),
    "an iterator": lambda: Model(lambda m, x, h: m.o(h), o=Branches(keeps(lambda h: iter([1, 2])))),
    "a dict": lambda: Model(lambda m, x, h: m.o(h) + m.o.kept["h"], o=Branches(keeps(lambda h: {"h": h}))),
    "a tensor carried from call to call": lambda: Model(carried, o=Branches(carries, kept=None)),
    "a workspace": lambda: Model(
        lambda m, x, h: m.o(h) + m.o.kept,
        o=Branches(lambda m, h: (m.kept.copy_(h.detach()), h)[1], kept=torch.zeros(B, W, dtype=torch.float64)),
    ),
    "a workspace in a list": lambda: Model(
        lambda m, x, h: (m.o.kept[0].copy_(h.detach()), h * m.o.kept[0].clone())[1],
        o=Branches(kept=[torch.zeros(B, W, dtype=torch.float64)]),
    ),
    "a closure over noise": lambda: Model(solved, solve=Solver()),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_forward_keeps(name):
    torch.manual_seed(0)
    assert_is_loop(KEPT[name]().double(), X)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(W), lambda: Branches(lambda m, h: m.n(h), n=nn.BatchNorm1d(W))])
def test_checkpointed_parts(make):
    """A part with state, computed again in backward: gradients are those without a checkpoint."""
    torch.manual_seed(0)
    gradients, part = [], make()
    for again in (False, True):
        forward = (lambda m, x, h: checkpoint(m.o, h, use_reentrant=False)) if again else (lambda m, x, h: m.o(h))
        torch.manual_seed(1)
        model = Model(forward, o=copy.deepcopy(part)).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Asked for: torch 2.11 keeps the hooks of a checkpoint that a first try has left by an error.
            iw.convert(model, S, one_by_one=["o"] if isinstance(part, Branches) else [])
            with iw.sampling(S, seed=2):
                (model(X) ** 3).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["part", "model"])
def test_tables_made_once_stay_and_what_is_noisy_becomes_rows(kind):
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.d, self.table = nn.Dropout(0.5), None

        def forward(self, h):
            if self.table is None:
                self.table = torch.ones(W, dtype=torch.float64)
            h = self.d(h)
            self.mean, self.more = h.mean(), {"all": (h, [h * 2])}
            return h * self.table if h.sum().item() > -1e9 else h

    part = Caches()
    model = part if kind == "model" else nn.Sequential(nn.Dropout(0.5), part)
    with pytest.warns(UserWarning, match="called once for each noise sample"):
        iw.convert(model, S, example_inputs=X)
    assert part.table is None and not hasattr(part, "mean")
    y = model(X)
    assert part.table.shape == (W,) and part.mean.shape == (S,)
    assert torch.equal(part.more["all"][0] * 2, part.more["all"][1][0]) and torch.equal(part.more["all"][1][0], y * 2)
    assert torch.equal(model.eval()(X), X)


def test_a_conversion_that_meets_kept_tensors_leaves_them_as_they_are():
    model = Model(lambda m, x, h: m.o(h), o=Average(buffer=False)).double()
    with pytest.warns(UserWarning, match="an attribute of a module"):
        iw.convert(model, S, example_inputs=X)
    assert torch.equal(model.o.mean, torch.zeros((), dtype=torch.float64))
    iw.revert(model)(X).sum().backward()


def test_a_large_table_of_numbers_is_not_walked():
    model = Model(lambda m, x, h: h, o=Branches(table={str(i): i for i in range(1000)}, names=["a"] * 1000)).double()
    model.o.table["noisy"] = None
    model.function = lambda m, x, h: (m.o.table.update(noisy=h), h)[1]
    iw.convert(model, S)(X)
    assert model.o.table["noisy"].shape == (S * B, W)  # and yet nothing is overlooked


@pytest.mark.parametrize("name", ["gru", "gradient", "noise"])
def test_transforms_inside_of_a_model(name):
    """What cannot run there is called as in a forward of one sample, and refused as that is."""
    if name == "gru":
        model = Model(lambda m, x, h: torch.func.grad(lambda z: (m.o(z[:, None])[0] ** 3).sum())(h), o=nn.GRU(W, W, batch_first=True))
        assert_is_loop(model.double(), X)
    elif name == "gradient":
        model = iw.convert(Model(lambda m, x, h: torch.func.grad(lambda z: m.n(z).pow(3).sum())(h)).double(), S)
        with pytest.raises(RuntimeError, match="attempted to call in-place operation"):
            model(X)
    else:
        model = iw.convert(Model(lambda m, x, h: torch.vmap(lambda row: m.d(row))(x)).double(), S)
        with pytest.raises(RuntimeError, match="Give each lane its own address"):
            model(X)


def test_gradient_of_a_model_that_writes_in_place():
    def writes(m, x, h):
        z = torch.zeros_like(x)
        z[:, 1:] = h[:, 1:]
        return z

    model = iw.convert(Model(writes).double(), S)
    x = X.clone().requires_grad_()
    with iw.sampling(S, seed=1):
        (model(x) ** 2).sum().backward()
    with iw.sampling(S, seed=1):
        torch.testing.assert_close(torch.func.grad(lambda x: (model(x) ** 2).sum())(X), x.grad)


FUNCTIONS = {
    "select_scatter": lambda m, x, h: torch.select_scatter(m.l(x), h[:, 0], 1, -1),
    "index_fill": lambda m, x, h: m.l(x).index_fill(1, torch.tensor([1]), h.sum()),
    "roll": lambda m, x, h: torch.roll(h.sum(), 1) * m.l(x),
    "where": lambda m, x, h: torch.where(x > 0, h.float().sum(), m.l(x)),
    "clamp": lambda m, x, h: torch.clamp(h.float(), max=h.std() * 0.1),
    "as_strided_": lambda m, x, h: (h * 2).as_strided_((B, 2), (W, 2), 1),
    "addcmul": lambda m, x, h: torch.addcmul(x.float(), h.float(), h.sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_whose_batching_differs(name):
    torch.manual_seed(0)
    assert_is_loop(Model(FUNCTIONS[name]).double(), X, tolerance=1e-6)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_linear_cross_entropy_in_chunks():
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)

    def function(m, x, h):
        return F.linear_cross_entropy(h, m.m.weight[:, None] * m.l.weight, torch.arange(B) % W, options=options)[None]

    assert_is_loop(Model(function).double(), X)


CAST = {
    "cross_entropy": lambda m, x, h: F.cross_entropy(h, torch.arange(B) % W, reduction="none"),
    "l1_loss": lambda m, x, h: F.l1_loss(h, m.l(x), reduction="none"),
    "group_norm": lambda m, x, h: F.group_norm(h, 1),
    "noisy weight": lambda m, x, h: F.linear(x, h),
}


@pytest.mark.parametrize("name", CAST)
def test_autocast_of_functions(name):
    model = iw.convert(Model(CAST[name]), S)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        with iw.sampling(S, seed=2):
            together = model(x)
        with iw.sampling(1, seed=2, sample_ids=[1]):
            alone = model(x)
    assert together.dtype == alone.dtype and torch.equal(together.unflatten(0, (S, -1))[1], alone)


RETURNED = {
    "generator": lambda m, x, h: (v for v in [h]),
    "set of tensors": lambda m, x, h: {h},
    "PackedSequence": lambda m, x, h: nn.utils.rnn.pack_padded_sequence(h[:, :, None], torch.full((B,), W), batch_first=True),
}


@pytest.mark.parametrize("name", RETURNED)
def test_outputs_that_cannot_be_rows(name):
    model = Model(RETURNED[name]).double()
    with pytest.raises(RuntimeError, match=f"{name} is returned"):
        iw.convert(model, S)(X)


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_a_generator_under_one_sample_and_in_rows(expand):
    model = iw.convert(Model(lambda m, x, h: (v for v in [h])).double(), S, expand=expand, verify=False)
    with iw.sampling(1 if expand == "axis" else S), pytest.raises(RuntimeError, match="computes when the forward is over"):
        model(X)


def test_an_iterator_as_input_is_not_used_twice():
    model = iw.convert(Branches(lambda m, chunks: m.d(torch.cat(list(chunks))), d=nn.Dropout(0.5)), S)
    with pytest.raises(RuntimeError):
        model(iter([X, X]))


def test_stochastic_depth_is_known_by_what_it_does():
    class DropPath(nn.Module):
        """That of the paper: kept rows as they are, and an expectation in eval mode."""

        def __init__(self):
            super().__init__()
            self.drop_prob = 0.5

        def forward(self, x):
            return x * (torch.rand(len(x), 1) >= self.drop_prob) if self.training else x * (1 - self.drop_prob)

    class StochasticDepth(DropPath):
        def __init__(self):
            super().__init__()
            self.p, self.mode = 0.5, "row"

    for kind in (DropPath, StochasticDepth):
        model = nn.Sequential(nn.Dropout(0.5), kind())
        want, state = model.eval()(X), torch.get_rng_state()
        audit = iw.audit(model)
        assert torch.equal(torch.get_rng_state(), state)
        why = "which on rows of ones does not drop rows and divide the others by 1 - p, as iw.IWDropPath does"
        assert audit.unreached == [f"1 ({kind.__name__}, {why}, p=0.5)"]
        assert torch.equal(iw.convert(model, S).eval()(X), want)
