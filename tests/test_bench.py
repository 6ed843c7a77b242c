"""Providers of the benchmark suite, never timed: they pass their checks, checks find wrong ones, bytes are those that are moved."""

import pytest
import torch
import torch.nn.functional as F
from bench_counting import CountBytes
from torch import nn

from bench import host, iw_cross_entropy, layer, measure, multinomial, noise, peers, real_noise, step, training
from bench.case import BASELINE, Case, Grid, Skip

CPU = torch.device("cpu")


def small_noise(work: str, samples: int = 3, dtype=torch.float32) -> noise.Inputs:
    return noise.Inputs.of(a_case("noise", "64x40", work, samples, batch=64, dtype=dtype))


def a_case(
    op: str, size: str, work: str, samples: int, batch: int, classes=None, dtype=torch.float32, providers=None, setup=None, **options
):
    return Case("op", op, size, work, samples, batch, dtype, CPU, 0, lambda case: case, {}, classes)


def small_logits(gradient: bool, samples: int = 4, classes: int = 17, dtype=torch.float32) -> iw_cross_entropy.Inputs:
    work = "forward+backward" if gradient else "forward"
    return iw_cross_entropy.Inputs.of(a_case("loss", "6x17", work, samples, 6, classes, dtype))


def a_batch(samples: int = 3) -> training.Inputs:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5))
    x, y = torch.randn(5, 6), torch.randint(5, (5,))
    return training.Inputs(model, x, y, (torch.randn(15, 6), torch.randint(5, (15,))), samples, step=False)


# Every provider that is there does what it says, and the checks see when it does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("work", ["forward", "backward"])
def test_noise_providers_pass_their_checks(work, dtype):
    i = small_noise(work, dtype=dtype)
    for name, make in noise.providers(CPU, work).items():
        if "compile" not in name and "Triton" not in name:
            variant = make(i)
            with measure.forced(variant.backend):
                variant.run()
                variant.check()
            assert (variant.bytes is None) == (name == "iw reference")


OTHER_NOISE = {
    **{f"real noise, {name}": lambda kind=kind: real_noise.providers(CPU, kind) for name, kind in real_noise.KINDS.items()},
    **{f"multinomial, {name}": lambda kind=kind: multinomial.providers(CPU, kind, 40) for name, kind in multinomial.KINDS.items()},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("work", ["forward", "backward"])
@pytest.mark.parametrize("op", OTHER_NOISE)
def test_providers_of_other_noise(op, work, samples, dtype):
    """They pass their checks, and their byte formulas are what torch's operators are given and give back, in both precisions."""
    i = small_noise(work, samples, dtype)
    checked = []
    for name, make in OTHER_NOISE[op]().items():
        if "compile" in name:
            continue
        try:
            variant = make(i)
        except Skip:
            continue
        with measure.forced(variant.backend):
            variant.run()
            variant.check()
            if variant.bytes is not None:
                with CountBytes(least=64 * 40) as count:  # a byte of each element
                    variant.run()
                assert count.bytes == pytest.approx(variant.bytes, rel=0.01), f"{name}: {count.report()}"
        checked.append(name)
    assert {BASELINE, "expanded batch", "iw reference", "limit: no noise"} <= set(checked)


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("additive", lambda x: (x + torch.randn_like(x)).repeat(3, 1), "samples correlate"),
        ("additive", lambda x: x.repeat(3, 1) + 1.2 * torch.randn(192, 40), r"mean of z\^2 is 1\.[345]"),
        ("additive", lambda x: x.repeat(3, 1) + 0.2 + torch.randn(192, 40), r"mean of z\^1 is 0\.[12]"),
        ("additive", lambda x: x.repeat(3, 1) + 12**0.5 * (torch.rand(192, 40) - 0.5), r"mean of z\^4 is 1\.[78]"),
        ("multiplicative", lambda x: x.repeat(3, 1) * torch.randn(192, 40), r"mean of z\^1 is -(0\.9|1\.0)"),
    ],
    ids=["one z for all samples", "other deviation", "other mean", "uniform numbers", "other mean of the factor"],
)
def test_wrong_numbers_are_found_out(kind, form, message):
    def check(y, i):
        real_noise.check_numbers(real_noise.KINDS[kind], y, i)

    with pytest.raises(AssertionError, match=message):
        noise.variant_of(lambda _: form, noise.FUSED, check)(small_noise("forward")).check()


def counted(n: torch.Tensor) -> torch.Tensor:
    """A multinomial layer's factors of counts that add up to 20 a row, uniform probabilities."""
    return n * 40 / 20


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            lambda: torch.zeros(192, 40).scatter_add_(1, torch.randint(40, (192, 19)), torch.ones(192, 19)),
            "a row has 19 to 19 draws, expected 20",
        ),
        (lambda: torch.zeros(192, 40).scatter_add_(1, torch.randint(20, (192, 20)), torch.ones(192, 20)), "standard deviations from what"),
        (lambda: torch.zeros(64, 40).scatter_add_(1, torch.randint(40, (64, 20)), torch.ones(64, 20)).repeat(3, 1), "samples correlate"),
        (lambda: torch.rand(192, 40), "not close|Mismatched"),
    ],
    ids=["other number of draws", "other probabilities", "one draw for all samples", "no whole counts"],
)
def test_wrong_counts_are_found_out(counts, message):
    kind = multinomial.KINDS["uniform"]
    with pytest.raises(AssertionError, match=message):
        noise.variant_of(
            lambda i: lambda x: x.repeat(3, 1) * counted(counts()), noise.FUSED, lambda y, i: multinomial.check_counts(kind, y, i)
        )(small_noise("forward")).check()


def test_a_wrong_gradient_of_other_noise_is_found_out():
    """The sum of dy without the noise's factors."""
    i = small_noise("backward")
    x, dx = i.x.detach().repeat(3, 1), i.dy.view(3, *i.x.shape).sum(0)
    with pytest.raises(AssertionError, match=r"not close|Mismatched"):
        real_noise.check_sum(real_noise.MULTIPLICATIVE, dx, x * torch.randn(192, 40), i)
    with pytest.raises(AssertionError, match=r"not close|Mismatched"):
        multinomial.check_sum(multinomial.KINDS["uniform"], dx, x * counted(torch.randint(3, (192, 40)).float()), i)
    real_noise.check_sum(real_noise.ADDITIVE, dx, x, i)
    with pytest.raises(AssertionError, match=r"not close|Mismatched"):
        real_noise.check_sum(real_noise.ADDITIVE, 2 * dx, x, i)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_providers_pass_their_checks(gradient, dtype):
    i = small_logits(gradient, dtype=dtype)
    checked = []
    for name, make in iw_cross_entropy.providers(CPU, gradient).items():
        if "compile" in name:
            continue
        try:
            variant = make(i)
        except Skip:
            continue
        with measure.forced(variant.backend):
            for _ in range(2):  # twice: a run that destroys its inputs gets them back
                if variant.before is not None:
                    variant.before()
                variant.run()
            variant.check()
        checked.append(name)
    assert {BASELINE, "expanded batch", "torch.func.vmap", "iw reference"} <= set(checked)


@pytest.mark.parametrize("name", training.providers("reference"))
def test_training_providers_pass_their_checks(name):
    if "compile" in name:
        pytest.skip("compiled: see the slow test")
    variant = training.providers("reference")[name](a_batch())
    with measure.forced(variant.backend):
        variant.run()
        variant.check()


def test_providers_of_models_with_batch_norm():
    """Where BatchNorm stands behind noise: one pass over S*B rows and S passes are checked each against its own definition."""
    torch.manual_seed(0)  # no ReLU's input so close to 0 that float32 and float64 differ in its sign, and so in the gradient
    x, y = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
    i = training.Inputs(step.models.wide_resnet(10, 1, 4), x, y, (x.repeat(2, 1, 1, 1), y.repeat(2)), 2, expand="input")
    providers = training.providers("reference", expand="input", batch_norm=True)
    assert "iw reference, rows at the input" not in providers  # it is "rows"
    joint = ("expanded batch", "authors' form", "iw reference, rows, joint BatchNorm")
    for name in (BASELINE, *joint, "iw reference", "iw reference, rows", "iw reference, streamed"):
        variant = providers[name](i)
        with measure.forced("reference"):
            variant.check()
    with pytest.raises(Skip, match=r"torch\.func\.vmap cannot run this model: RuntimeError: Batch norm"):
        providers["torch.func.vmap"](i)
    with measure.forced("reference"), pytest.raises(AssertionError, match=r"loss|gradient"):
        training.provider(training.rows(batch_norm="joint"), "each sample")(i).check()
    with measure.forced("reference"), pytest.raises(AssertionError, match=r"loss|gradient"):
        training.provider(training.converted(), "joint")(i).check()


def test_forms_of_each_architecture():
    """The joint form is there for models with BatchNorm, and rows at the input where "rows" are not that."""
    for c in step.cases(Grid(CPU)):
        if c.samples == 8 and c.op != "wide MLP" and "iw cpu, loop" in c.providers:
            model = step.CPU[c.op].make()
            normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            assert ("iw cpu, rows, joint BatchNorm" in c.providers) == normalized, c.op
            assert ("iw cpu, rows at the input" in c.providers) == (step.CPU[c.op].expand != "input"), c.op


def test_providers_of_a_skip_path():
    """Rows must be expanded at its input: from the first noise on they do not fit."""
    x, y = torch.randn(5, 6), torch.randint(3, (5,))
    i = training.Inputs(step.models.SkipPath(6, 2, 3), x, y, (x, y), 3, expand="input")
    providers = training.providers("reference", expand="input")
    for name in (BASELINE, "iw reference", "iw reference, rows", "iw reference, loop"):
        with measure.forced("reference"):
            providers[name](i).check()


@pytest.mark.parametrize("architecture", [a for a in step.CPU.values() if a.tokens], ids=lambda a: a.size)
def test_providers_of_token_models(architecture):
    (x, y), more = architecture.data(2, CPU), architecture.data(4, CPU)
    i = training.Inputs(architecture.make(), x, y, more, 2)
    for name in (BASELINE, "iw reference", "iw reference, rows", "iw reference, rows at the input"):
        variant = training.providers("reference")[name](i)
        with measure.forced("reference"):
            variant.check()
    with pytest.raises(Skip, match="probability of one label"):
        training.providers("reference")["authors' form"](i)


@pytest.mark.slow
def test_compiled_providers_pass_their_checks():
    i = a_batch()
    for name, make in training.providers("reference").items():
        if "compile" in name:
            variant = make(i)
            with measure.forced(variant.backend):
                variant.check()


def test_peers_in_torch_pass_their_checks():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy")
    x, y = torch.randn(8, 16), torch.randint(5, (8,))
    i = training.Inputs(step.models.head(16, 5), x, y, (x, y), 4, step=False)
    training.provider(layer.with_peer(peers.torch_linear), "joint")(i).check()


def test_a_provider_with_one_mask_for_all_samples_is_found_out():
    i = small_noise("forward")
    same = noise.variant_of(lambda i: lambda x: F.dropout(x, noise.P).repeat(i.samples, 1), noise.FUSED)
    with pytest.raises(AssertionError, match="masks of two samples agree"):
        same(i).check()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: F.dropout(x.repeat(3, 1), 0.4), "not close|Mismatched"),
        (lambda x: F.dropout(x.repeat(3, 1), 0.5) / 2, "not close|Mismatched"),
        (lambda x: torch.where(torch.rand(192, 40) < 0.55, 2 * x.repeat(3, 1), 0.0), "of the elements are kept"),
    ],
    ids=["other p", "no scale", "other rate"],
)
def test_wrong_noise_is_found_out(form, message):
    i = small_noise("forward")
    with pytest.raises(AssertionError, match=message):
        noise.variant_of(lambda _: form, noise.FUSED)(i).check()


def test_a_wrong_noise_gradient_is_found_out():
    i = small_noise("backward")

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.dropout(x.repeat(3, 1), noise.P)

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy.view(3, -1, dy.shape[1]).sum(0)  # no masks

    with pytest.raises(AssertionError, match=r"not close|Mismatched"):
        noise.variant_of(lambda _: Wrong.apply, noise.FUSED)(i).check()


def test_a_wrong_loss_or_gradient_is_found_out():
    """The unweighted mean in the place of the bound, and a cross-entropy that ignores the upstream gradient of each row."""
    i = small_logits(True)
    with pytest.raises(AssertionError, match="loss: relative error"):
        iw_cross_entropy.variant_of(iw_cross_entropy.mean, iw_cross_entropy.EAGER)(i).check()

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, y):
            ctx.save_for_backward(z, y)
            return F.cross_entropy(z, y, reduction="none")

        @staticmethod
        def backward(ctx, upstream):
            z, y = ctx.saved_tensors
            return (torch.softmax(z, 1) - F.one_hot(y, z.shape[1])) * upstream.mean(), None

    with pytest.raises(AssertionError, match="gradient: relative error"):
        iw_cross_entropy.variant_of(lambda i: iw_cross_entropy.rows(i, Rows.apply), iw_cross_entropy.EAGER)(i).check()


def test_wrong_training_is_found_out():
    """Equal weights instead of importance weights; one noise sample too few; another dropout probability."""
    i = a_batch()

    def mean(model, i):
        def backward(x, y):
            loss = -torch.stack([training.log_likelihood(model(x), y) for _ in range(i.samples)]).mean()
            loss.backward()
            return loss

        return backward

    with pytest.raises(AssertionError, match="loss"):
        training.provider(mean, "each sample")(i).check()

    def few(model, i):
        return training.loop(model, training._single(i))

    with pytest.raises(AssertionError, match="drew 4 masks, expected 3"):
        training.provider(few, "each sample")(i).check()

    def other(model, i):
        model[2].p = 0.1
        return training.loop(model, i)

    with pytest.raises(AssertionError, match=r"loss|gradient"):
        training.provider(other, "each sample")(i).check()
    with pytest.raises(AssertionError, match="loss: mean over 8 draws"):
        training.provider(lambda model, i: training._backward_of(lambda x, y: 2 * F.cross_entropy(model(x), y)), "statistics")(i).check()


def weighted(weights):
    """The form of the authors' code, with other weights: log p [S, B] -> [S, B]."""

    def make(model, i):
        def backward(x, y):
            log_p = training.log_likelihood(model(training.repeat(x, i.samples)), training.repeat(y, i.samples)).view(i.samples, len(y))
            (-weights(log_p.detach()) * log_p).sum(0).mean().backward()
            return -log_p.mean()

        return backward

    return make


@pytest.mark.parametrize(
    "weights",
    [
        lambda log_p: torch.full_like(log_p, 1 / len(log_p)),
        lambda log_p: torch.softmax(log_p, 1) * log_p.shape[1] / len(log_p),
        lambda log_p: log_p.T.reshape(log_p.shape).softmax(0),
        lambda log_p: len(log_p) * torch.softmax(log_p, 0),
    ],
    ids=["equal", "over the batch", "example-major", "times S"],
)
def test_wrong_weights_of_the_authors_form_are_found_out(weights):
    """The loss that the form reports does not depend on the weights: its gradient shows them."""
    i = a_batch()
    training.provider(weighted(lambda log_p: log_p.softmax(0)), "joint, unweighted loss")(i).check()
    with pytest.raises(AssertionError, match="gradient: relative error"):
        training.provider(weighted(weights), "joint, unweighted loss")(i).check()
    with pytest.raises(AssertionError, match="loss"):
        training.provider(training.expanded, "joint, unweighted loss")(i).check()


def test_the_authors_form_underflows():
    """Where the probability of a label is exp(-200) or less in every sample it has no gradient. That of the library is right."""
    linear = nn.Linear(8, 2, bias=False)
    nn.init.zeros_(linear.weight).data[1] = 200  # times the number of features that dropout keeps
    x, y = torch.ones(3, 8), torch.zeros(3, dtype=torch.int64)
    i = training.Inputs(nn.Sequential(nn.Dropout(0.1), linear), x, y, (x, y), 4, step=False)
    with measure.forced("reference"):
        training.provider(training.converted(), "each sample")(i).check()
    loss = training.authors(i.model, i)(x, y)
    assert loss.isfinite()
    assert linear.weight.grad.count_nonzero() == 0


def test_host_providers_pass_their_checks():
    for c in host.cases(Grid(CPU, samples=(1, 4))):
        inputs = c.setup(c)
        for make in c.providers.values():
            try:
                variant = make(inputs)
            except Skip:
                continue
            with measure.forced(variant.backend):
                variant.run()
                variant.check()


# Bytes: the formulas against what torch's operators are given and give back


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("work", ["forward", "backward"])
@pytest.mark.parametrize("name", [BASELINE, "expanded batch", "torch.func.vmap", "limit: no noise"])
def test_bytes_of_noise_providers(name, work, samples):
    variant = noise.providers(CPU, work)[name](small_noise(work, samples))
    with CountBytes(least=64 * 40 * 4) as count:
        variant.run()
    assert count.bytes == pytest.approx(variant.bytes, rel=0.01), count.report()


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("name", [BASELINE, "expanded batch", "torch.func.vmap", iw_cross_entropy.LESS, "iw reference"])
def test_bytes_of_loss_providers(name, gradient):
    providers = iw_cross_entropy.providers(CPU, gradient)
    if name not in providers:
        pytest.skip("measured with its gradient only")
    if name == "iw reference" and gradient and torch.__version__ < "2.13":
        pytest.skip("an older torch moves 14% more in the reference's gradient; the formula is that of 2.13")
    i = small_logits(gradient, samples=2, classes=301)
    variant = providers[name](i)
    with measure.forced(variant.backend), CountBytes(least=6 * 301 * 4) as count:
        variant.run()
    assert count.bytes == pytest.approx(variant.bytes, rel=0.01), count.report()


def test_bytes_of_the_fused_ops():
    """One read and one write: the inputs and outputs of the single op that runs."""
    i = small_noise("forward")
    x, y = i.x.numel() * 4, 3 * i.x.numel() * 4
    assert noise.FUSED.forward(i.x.numel(), 4, 3) == x + y
    loss = small_logits(True)
    assert iw_cross_entropy.FUSED(loss) == 2 * loss.logits.numel() * 4
    for c in noise.cases(Grid(CPU, quick=True)):
        assert c.fewest_bytes == noise.FUSED.forward(c.batch * 4096, torch.finfo(c.dtype).bits // 8, c.samples)


def test_saved_bytes_count_each_storage_once_and_follow_releases():
    x, leaf = torch.randn(100), torch.randn(100, requires_grad=True)
    with measure.SavedBytes([leaf]) as saved:
        y = leaf * x  # keeps x
        z = (y * leaf).exp() + y * x  # keeps y, leaf (not counted), the result of exp, and x again
        assert saved.now == 3 * 400
        z.sum().backward()
        del y, z
        assert saved.now == 0
        (leaf * x).sum().backward()
    assert saved.peak == 3 * 400
    assert saved.now == 0
