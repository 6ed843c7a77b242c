"""torch.func over layers and the loss: against autograd and a Python loop, one lane after another."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import iwsgd_ext as iw
from iwsgd_ext.ops.transforms import SAME_NOISE

B, S = 4, 3
X = torch.randn(B, 6, dtype=torch.float64)
RATES = torch.rand(6, dtype=torch.float64)

LAYERS = {
    "dropout": iw.IWDropout(0.5),
    "alpha": iw.IWAlphaDropout(0.2),
    "feature alpha": iw.IWFeatureAlphaDropout(0.2),
    "path": iw.IWDropPath(0.4),
    "gaussian dropout": iw.IWGaussianDropout(0.3),
    "gaussian noise": iw.IWGaussianNoise(1.0),
    "multinomial": iw.IWMultinomialDropout(0.4),
    "evolutional": iw.IWMultinomialDropout(0.4, probabilities="evolutional"),
    "rates": lambda x: iw.IWAdaptiveDropout()(x, RATES),
    "weights": iw.IWDropConnect(6, 5).double(),
}
IMAGES = {"channel": iw.IWDropout2d(0.3), **{k: LAYERS[k] for k in ("dropout", "alpha", "path", "gaussian dropout", "gaussian noise")}}
EACH = pytest.mark.parametrize("name", LAYERS)


def loss_of(name, **options):
    """A sum over samples and examples, no linear one."""

    def f(x):
        with iw.sampling(S, seed=1, **options):
            return (LAYERS[name](x.tanh()) ** 2 * torch.linspace(1, 2, S, dtype=x.dtype).repeat_interleave(len(x))[:, None]).sum()

    return f


def gradient(f, x, **options):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x, **options)[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


class TestOneCall:
    """Transforms of a function that opens a context of its own."""

    @EACH
    def test_grad_vjp_jvp(self, name):
        f, want = loss_of(name), gradient(loss_of(name), X)
        assert want.abs().sum() > 0
        close(grad(f)(X), want)
        value, pull = vjp(f, X)
        close(value, f(X))
        close(pull(torch.full((), 2.0, dtype=X.dtype))[0], 2 * want)
        v = torch.randn_like(X)
        value, along = jvp(f, (X,), (v,))
        close(value, f(X))
        close(along, (want * v).sum())

    @EACH
    def test_jacrev(self, name):
        def outputs(x):
            with iw.sampling(S, seed=1):
                return LAYERS[name](x.tanh())

        close(jacrev(outputs)(X[:2]), torch.autograd.functional.jacobian(outputs, X[:2]))
        v = torch.randn_like(X[:2])
        close(jvp(outputs, (X[:2],), (v,))[1], torch.autograd.functional.jvp(outputs, X[:2], v)[1])

    @pytest.mark.parametrize("name", ["dropout", "alpha", "gaussian noise", "gaussian dropout", "multinomial"])
    def test_second_derivatives(self, name):
        f = loss_of(name)
        close(hessian(f)(X[:2]), torch.autograd.functional.hessian(f, X[:2]))
        g = lambda x: (grad(f)(x) ** 2).sum()  # noqa: E731
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x), x, create_graph=True)
        close(grad(g)(X), torch.autograd.grad((first**2).sum(), x)[0])

    @pytest.mark.parametrize("name", [n for n in LAYERS if n != "evolutional"])
    def test_within_a_context(self, name):
        """Streams go on as in a plain call, and a drawn seed is one for all of it."""

        def f(x):
            return (LAYERS[name](x.tanh()) ** 2).sum()

        results = []
        for transformed in (False, True):
            torch.manual_seed(2)
            with iw.sampling(S) as context:
                results.append([(grad(f)(X) if transformed else gradient(f, X)) for _ in range(2)])
                assert context.stream == 2
        close(*results)
        assert not torch.allclose(*results[0])

    @EACH
    def test_outside_of_contexts(self, name):
        """Noise as torch's namesake has it: one sample, by torch's generator."""

        def f(x):
            return (LAYERS[name](x.tanh()) ** 2).sum()

        torch.manual_seed(2)
        want = gradient(f, X)
        torch.manual_seed(2)
        close(grad(f)(X), want)


class TestLanes:
    """vmap: each lane is a call of its own, with an address of its own."""

    @EACH
    def test_examples(self, name):
        """Per-sample gradients: first_example says which example a lane is, so lanes give the gradients of the batch, row by row."""
        if name == "evolutional":
            pytest.skip("its probabilities are the batch's")

        def f(x, i):
            with iw.sampling(S, seed=1, first_example=i):
                return (LAYERS[name](x[None].tanh()) ** 2).sum()

        def all_rows(x):
            with iw.sampling(S, seed=1):
                return (LAYERS[name](x.tanh()) ** 2).sum()

        close(vmap(grad(f))(X, torch.arange(B)), gradient(all_rows, X))
        close(vmap(f)(X, torch.arange(B)).sum(), all_rows(X))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("by_example", [False, True])
    @pytest.mark.parametrize("name", IMAGES)
    def test_samples(self, name, by_example, layout):
        """sample_ids that vmap maps: values and gradients of S contexts of one sample, two calls in each."""
        layer, ids = IMAGES[name], torch.tensor([4, 0, 2])
        ids = torch.stack([ids] * B, 1) + torch.arange(B) if by_example else ids
        x = torch.randn(B, 6, 3, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()

        def lane(i):
            with iw.sampling(1, seed=5, sample_ids=i.reshape(1, *i.shape), expand="none"):
                return layer(layer(x).tanh() * 2)

        got, want = vmap(lane)(ids), torch.stack([lane(i) for i in ids])
        assert torch.equal(got, want)
        weight = torch.randn_like(want)
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
        close(*gradients)
        assert not torch.equal(want[0], want[1])

    def test_several_samples_in_each_lane(self):
        ids = torch.tensor([[0, 1], [5, 2], [1, 0]])

        def lane(x, i):
            with iw.sampling(2, seed=5, sample_ids=i):
                return iw.IWDropout(0.5)(x)

        close(vmap(lane, (None, 0))(X, ids), torch.stack([lane(X, i) for i in ids]))
        many = torch.randn(3, B, 6, dtype=torch.float64)
        close(vmap(lane)(many, ids), torch.stack([lane(x, i) for x, i in zip(many, ids, strict=True)]))
        close(vmap(lane, (1, 0), 1)(many.transpose(0, 1), ids), torch.stack([lane(x, i) for x, i in zip(many, ids, strict=True)], 1))

    @EACH
    def test_lanes_without_addresses(self, name):
        """All would draw one noise."""

        def inside(x):
            with iw.sampling(S, seed=1):
                return LAYERS[name](x)

        many = torch.randn(3, B, 6, dtype=torch.float64)
        with pytest.raises(RuntimeError) as raised:
            vmap(inside)(many)
        assert str(raised.value).startswith(SAME_NOISE)
        with iw.sampling(S, seed=1), pytest.raises(RuntimeError) as raised:
            vmap(LAYERS[name])(many)
        assert str(raised.value).startswith(SAME_NOISE)


class TestLoss:
    Z, Y = torch.randn(7, S * 2, 5, dtype=torch.float64), torch.randint(5, (7, 2))

    @pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"alpha": 0.5}, {"reduction": "sum"}], ids=str)
    def test_grad_vjp_jvp_hessian(self, options):
        f = lambda z: iw.iw_cross_entropy(z, self.Y[0], S, **options)  # noqa: E731
        z, want = self.Z[0], gradient(lambda z: iw.iw_cross_entropy(z, self.Y[0], S, **options), self.Z[0])
        close(grad(f)(z), want)
        close(vjp(f, z)[1](torch.ones((), dtype=z.dtype))[0], want)
        v = torch.randn_like(z)
        close(jvp(f, (z,), (v,))[1], (want * v).sum())
        by_hand = lambda z: self.by_hand(z, self.Y[0])  # noqa: E731
        if not options:
            close(f(z), by_hand(z))
            close(hessian(f)(z), torch.autograd.functional.hessian(by_hand, z))

    @staticmethod
    def by_hand(z, y):
        log_p = -F.cross_entropy(z, y.repeat(S), reduction="none").view(S, -1)
        return -(torch.logsumexp(log_p, 0) - torch.log(torch.tensor(float(S), dtype=z.dtype))).mean()

    def test_vmap(self):
        f = lambda z, y: iw.iw_cross_entropy(z, y, S)  # noqa: E731
        want = torch.stack([self.by_hand(z, y) for z, y in zip(self.Z, self.Y, strict=True)])
        close(vmap(f)(self.Z, self.Y), want)
        gradients = torch.stack([gradient(lambda z, y=y: self.by_hand(z, y), z) for z, y in zip(self.Z, self.Y, strict=True)])
        close(vmap(grad(f))(self.Z, self.Y), gradients)
        one_target = torch.stack([self.by_hand(z, self.Y[0]) for z in self.Z])
        close(vmap(f, (0, None))(self.Z, self.Y[0]), one_target)

    def test_statistics(self):
        f = lambda z, y: iw.iw_cross_entropy(z, y, S, return_stats=True)  # noqa: E731
        loss, stats = vmap(lambda z, y: (f(z, y)[0], f(z, y)[1].weights))(self.Z, self.Y)
        for i in range(7):
            want = f(self.Z[i], self.Y[i])
            close((loss[i], stats[i]), (want[0], want[1].weights))

    def test_bad_targets_are_seen_in_lanes(self):
        with pytest.raises(ValueError, match="target"):
            vmap(lambda z, y: iw.iw_cross_entropy(z, y, S))(self.Z, self.Y + 3)


def test_per_sample_gradients_of_a_model():
    """The pattern of torch.func's documentation."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), iw.IWDropout(0.5), nn.Linear(8, 3), iw.IWGaussianNoise(0.3)).double()
    parameters, y = dict(model.named_parameters()), torch.randint(3, (B,))

    def loss(parameters, x, y, i):
        with iw.sampling(S, seed=1, first_example=i):
            return iw.iw_cross_entropy(functional_call(model, parameters, (x[None],)), y[None], S)

    got = vmap(grad(loss), (None, 0, 0, 0))(parameters, X, y, torch.arange(B))
    for b in range(B):
        model.zero_grad()
        with iw.sampling(S, seed=1, first_example=b):
            iw.iw_cross_entropy(model(X[b : b + 1]), y[b : b + 1], S).backward()
        for name, p in model.named_parameters():
            close(got[name][b], p.grad)


@pytest.mark.parametrize("expand", ["axis", "first"])
def test_grad_of_a_converted_model(expand):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    iw.convert(model, S, expand=expand, example_inputs=X)
    parameters, y = dict(model.named_parameters()), torch.randint(3, (B,))

    def loss(parameters, x):
        with iw.sampling(S, seed=1):
            return iw.iw_cross_entropy(functional_call(model, parameters, (x,)), y, S)

    got, got_x = grad(loss, (0, 1))(parameters, X)
    x = X.clone().requires_grad_()
    with iw.sampling(S, seed=1):
        iw.iw_cross_entropy(model(x), y, S).backward()
    close(got_x, x.grad)
    for name, p in model.named_parameters():
        close(got[name], p.grad)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    along = jvp(lambda p: loss(p, X), (parameters,), (tangents,))[1]
    close(along, sum((p.grad * tangents[name]).sum() for name, p in model.named_parameters()))
