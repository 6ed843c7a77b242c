"""Evaluation with noise: predictions averaged over samples."""

import math

import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw

B, C, SEED = 5, 4, 11
LAYERS = (0.5, 0.25)  # dropout probabilities


class Net(nn.Module):
    """Two noise layers with batch normalisation between them; torch's own dropout, which stays off; a forward that looks at its mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, C)
        self.drop, self.drop_too = (iw.IWDropout(p) for p in LAYERS)
        self.norm, self.other = nn.BatchNorm1d(9), nn.Dropout(0.5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.double()

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        x = self.drop(torch.tanh(self.first(x)))
        x = self.other(self.norm(self.second(x)))
        return self.last(self.drop_too(x))


def naive_logits(net: Net, x: torch.Tensor, samples: int, seed=SEED, first_example=0, unit_shape=()) -> torch.Tensor:
    """[S, B, C], one sample after another, by masks of the naive generator and running statistics by hand."""
    logits = []
    with torch.no_grad():
        h = torch.tanh(net.first(x))
        for s in range(samples):
            address = {"samples": 1, "seed": seed, "sample_ids": [s], "first_example": first_example}
            z = h * naive.naive_keep(h, LAYERS[0], **address) * naive.effective_scale(LAYERS[0])
            z = net.second(z)
            z = (z - net.norm.running_mean) / torch.sqrt(net.norm.running_var + net.norm.eps) * net.norm.weight + net.norm.bias
            z = z * naive.naive_keep(z, LAYERS[1], stream=1, **address) * naive.effective_scale(LAYERS[1])
            logits.append(net.last(z))
    return torch.stack(logits)


def data(batch=B):
    return torch.randn(batch, 6, dtype=torch.float64)


class TestPredict:
    @pytest.mark.parametrize("chunk", [None, 1, 3, 7])
    @pytest.mark.parametrize("reduce", ["arithmetic", "geometric"])
    def test_is_the_mean_over_samples(self, reduce, chunk):
        net, x, samples = Net(), data(), 7
        got = iw.predict(net, x, samples, reduce, chunk=chunk, seed=SEED)
        p = torch.softmax(naive_logits(net, x, samples), 2)
        if reduce == "arithmetic":
            want = p.mean(0)
        else:
            want = p.log().mean(0).exp()
            want = want / want.sum(1, keepdim=True)
        torch.testing.assert_close(got.exp(), want, rtol=1e-10, atol=1e-12)
        assert not got.requires_grad

    @pytest.mark.parametrize("expand", ["axis", "first", "input", "2"])
    def test_converted_model(self, expand):
        """The samples of predict rule over the model's; its place of expansion stays; eval mode afterwards as before."""
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(9), nn.Linear(9, C)).double()
        iw.convert(model, 3, expand=expand).eval()
        x, statistics = data(), model[3].running_mean.clone()
        got = iw.predict(model, x, 8, seed=SEED, chunk=3)
        h = torch.tanh(model[0](x))
        keep = naive.naive_keep(h, 0.5, samples=8, seed=SEED) * 2
        want = torch.softmax(model[4](model[3](torch.cat([h] * 8) * keep)), 1).view(8, B, C).mean(0)
        torch.testing.assert_close(got.exp(), want)
        assert torch.equal(model[3].running_mean, statistics)
        assert not any(m.training for m in model.modules())
        assert torch.equal(model(x), model[4](model[3](h)))

    def test_noise_inside_of_an_encoder_layer(self):
        """In eval mode torch computes an encoder layer by one fused call, in which no noise layer is called."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
        layer = encoder.layers[0]
        layer.dropout2.p = 0.5
        model = iw.convert(nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, C)).double(), 2, expand="input").eval()
        x, modes = torch.randn(B, 3, 8, dtype=torch.float64), [m.training for m in model.modules()]
        got = iw.predict(model, x, 4, seed=SEED)
        with torch.no_grad():
            h = layer.norm1(x + layer.self_attn(x, x, x)[0])
            out = torch.cat([layer.linear2(torch.relu(layer.linear1(h)))] * 4)
            keep = naive.naive_keep(out, 0.5, samples=4, seed=SEED, stream=2, expand=False)  # after two layers of p=0
            h = layer.norm2(torch.cat([h] * 4) + out * keep * 2)
            want = torch.softmax(model[2](h.flatten(1)), 1).view(4, B, C).mean(0)
        torch.testing.assert_close(got.exp(), want)
        assert [m.training for m in model.modules()] == modes

    def test_modes_are_as_before(self):
        """Also where the model raises."""
        net = Net()
        net.train()
        net.second.eval()
        net.drop.eval()
        before = [m.training for m in net.modules()]
        iw.predict(net, data(), 2)
        assert [m.training for m in net.modules()] == before
        with pytest.raises(RuntimeError):
            iw.predict(net, torch.randn(2, 3).double(), 2)
        assert [m.training for m in net.modules()] == before
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("batch_norm", ["per_sample", "frozen"])
    def test_batch_norm_modes_of_a_converted_model(self, batch_norm):
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, C)).double()
        want = iw.predict(iw.convert(model, 2, expand="first"), x := data(), 4, seed=1)
        iw.revert(model)
        iw.convert(model, 2, expand="first", batch_norm=batch_norm)
        modes = [vars(m)["training"] for m in model.modules()]
        torch.testing.assert_close(iw.predict(model, x, 4, seed=1), want)
        assert [vars(m)["training"] for m in model.modules()] == modes

    def test_seed_follows_manual_seed(self):
        net, x = Net(), data()
        torch.manual_seed(3)
        seed = torch.empty(1, dtype=torch.int64).random_(-(2**63), None).item()
        torch.manual_seed(3)
        first = iw.predict(net, x, 4)
        assert not torch.equal(first, iw.predict(net, x, 4))
        torch.testing.assert_close(first, iw.predict(net, x, 4, seed=seed))
        torch.testing.assert_close(first, iw.predict(net, x, 4, seed=torch.tensor(seed), chunk=2))

    def test_no_examples(self):
        for reduce in ("arithmetic", "geometric"):
            assert iw.predict(Net(), data(0), 3, reduce, chunk=2).shape == (0, C)

    def test_compiled_model(self):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, C)).double()
        x = data()
        iw.convert(model, 3, expand="input", example_inputs=x)
        want = iw.predict(model, x, 6, seed=SEED)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(iw.predict(compiled, x, 6, seed=SEED, chunk=3), want)
        assert compiled(x).shape == (3 * B, C)

    def test_first_example(self):
        """Batches numbered through are one batch."""
        net, x = Net(), data(6)
        whole = iw.predict(net, x, 4, seed=SEED)
        parts = [iw.predict(net, x[i : i + 2], 4, seed=SEED, first_example=i) for i in (0, 2, 4)]
        torch.testing.assert_close(torch.cat(parts), whole)

    def test_arguments_by_name_and_classes_last(self):
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = iw.IWDropout(0.5)

            def forward(self, x, *, scale):
                return self.drop(x) * scale

        x = torch.randn(2, 3, C, dtype=torch.float64)
        got = iw.predict(Tagger(), {"x": x, "scale": 2.0}, 6, class_dim=-1, seed=1)
        want = torch.softmax(2 * torch.cat([x] * 6) * naive.naive_keep(x, 0.5, samples=6, seed=1) * 2, 2).view(6, 2, 3, C).mean(0)
        torch.testing.assert_close(got.exp(), want)

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_other_log_probabilities(self, chunk):
        """Independent labels in a dict: the mean of their sigmoids."""

        class Wrapped(Net):
            def forward(self, x):
                return {"logits": super().forward(x)}

        net, x = Wrapped(), data()
        got = iw.predict(net, x, 7, log_prob=lambda out: torch.nn.functional.logsigmoid(out["logits"]), chunk=chunk, seed=SEED)
        torch.testing.assert_close(got.exp(), torch.sigmoid(naive_logits(net, x, 7)).mean(0))
        low = iw.predict(net, x, 7, log_prob=lambda out: out["logits"].bfloat16().log_softmax(1), seed=SEED)
        assert low.dtype == torch.float32

    def test_impossible_classes(self):
        """A class of probability 0 under every sample stays at 0, without NaN."""

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = iw.IWDropout(0.5)

            def forward(self, x):
                return torch.cat([self.drop(x), torch.full_like(self.drop(x), -math.inf)], 1)

        for reduce in ("arithmetic", "geometric"):
            p = iw.predict(Masked(), torch.randn(3, 2), 4, reduce, chunk=1).exp()
            assert torch.equal(p[:, 2:], torch.zeros(3, 2))
            torch.testing.assert_close(p.sum(1), torch.ones(3))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_precision(self, dtype):
        model = nn.Sequential(nn.Linear(6, C), iw.IWDropout(0.5)).to(dtype)
        log_p = iw.predict(model, torch.randn(3, 6, dtype=dtype), 5)
        assert log_p.dtype == torch.float32
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3))

    def test_samples_that_no_layer_drew(self):
        class Skips(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = iw.IWDropout(0.5)

            def forward(self, x):
                return x

        with pytest.raises(ValueError, match=r"expected an output of 3 samples \* 3 examples = 9 rows .*, got 3; was a noise layer called"):
            iw.predict(Skips(), torch.randn(3, 4), 3)


BAD = [
    (TypeError, "model: expected a torch.nn.Module, got function", lambda x: iw.predict(lambda x: x, x, 2)),
    (ValueError, "model: expected one with noise layers", lambda x: iw.predict(nn.Linear(6, 2), x, 2)),
    (ValueError, "samples: expected an integer >= 1, got 0", lambda x: iw.predict(Net(), x, 0)),
    (TypeError, "samples: expected an int, got float", lambda x: iw.bound_curve(Net(), [(x, x)], 2.0)),
    (ValueError, "reduce: expected 'arithmetic' or 'geometric', got 'mean'", lambda x: iw.predict(Net(), x, 2, "mean")),
    (ValueError, "chunk: expected a number of samples in 1 .. samples=2, got 3", lambda x: iw.predict(Net(), x, 2, chunk=3)),
    (ValueError, "chunk: expected .*, got 0", lambda x: iw.predict(Net(), x, 2, chunk=0)),
    (TypeError, "chunk: expected an int, got float", lambda x: iw.predict(Net(), x, 2, chunk=1.0)),
    (TypeError, "seed: expected an int", lambda x: iw.predict(Net(), x, 2, seed=1.5)),
    (ValueError, r"class_dim: expected .* \(10, 4\) that is not the first, got 2", lambda x: iw.predict(Net(), x, 2, class_dim=2)),
    (ValueError, "class_dim: expected .*, got 0", lambda x: iw.predict(Net(), x, 2, class_dim=0)),
    (ValueError, "class_dim: expected .*, got -2", lambda x: iw.predict(Net(), x, 2, class_dim=-2)),
    (ValueError, "reduce: expected 'arithmetic' with log_prob", lambda x: iw.predict(Net(), x, 2, "geometric", log_prob=torch.sigmoid)),
    (TypeError, "log_prob: expected .*, got torch.int64", lambda x: iw.predict(Net(), x, 2, log_prob=lambda z: z.argmax(1))),
    (TypeError, r"log_prob: .* \[2 \* B, ...\], got torch.float64 \(\)", lambda x: iw.predict(Net(), x, 2, log_prob=torch.sum)),
    (ValueError, "x: expected at least one tensor", lambda x: iw.predict(Net(), {}, 2)),
    (
        ValueError,
        r"model: expected logits of two classes or more in dimension 1, got shape \(10, 1\)",
        lambda x: iw.predict(nn.Sequential(Net(), nn.Linear(C, 1)).to(x.dtype), x, 2),
    ),
    (TypeError, "loss_fn: expected .*, got CrossEntropyLoss", lambda x: iw.bound_curve(Net(), [(x, x)], 2, loss_fn=nn.CrossEntropyLoss())),
    (TypeError, r"batches: expected pairs .*\[\(x, y\)\] .*, got Tensor;", lambda x: iw.bound_curve(Net(), (x, x), 2)),
    (TypeError, "batches: expected pairs .*, got tuple of 3; several inputs", lambda x: iw.bound_curve(Net(), [(x, x, x)], 2)),
    (ValueError, "batches: expected targets that are class indices, or", lambda x: iw.bound_curve(Net(), [(x, torch.ones(B, C))], 2)),
    (ValueError, "batches: expected at least one, got none", lambda x: iw.bound_curve(Net(), [], 2)),
    (ValueError, "batches: expected an example that counts", lambda x: iw.bound_curve(Net(), [(x, torch.full((B,), -100))], 2)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call(data())


def test_an_output_that_is_no_tensor():
    class Wrapped(Net):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(TypeError, match="model: expected one whose output is a floating-point tensor of logits, got dict"):
        iw.predict(Wrapped(), data(), 2)


@pytest.mark.parametrize("steps", [2, 5, 7], ids=["fewer-than-rows", "as-many", "more"])
def test_time_major(steps):
    """Examples are in the second dimension of the inputs, in the first of the output, and numbered through over the batches."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(3, C)

        def forward(self, x):  # [T, rows, 3]
            return self.head(self.drop(x).mean(0))

    net = iw.convert(Net().double(), 2, batch_dim=1)
    x, target = torch.randn(steps, 2 * B, 3, dtype=torch.float64), torch.randint(C, (2 * B,))
    with torch.no_grad():  # noise by its address, with examples first
        masks = 2 * naive.naive_keep(torch.ones(2 * B, steps, 3), 0.5, samples=4, seed=SEED).view(4, 2 * B, steps, 3)
        l = torch.log_softmax(net.head((x.transpose(0, 1) * masks).mean(2)), -1)  # [4, 2 B, C]
    torch.testing.assert_close(iw.predict(net, x, 4, seed=SEED), l.exp().mean(0).log())
    batches = [(x[:, :B], target[:B]), (x[:, B:], target[B:])]
    curve = iw.bound_curve(net, batches, 4, seed=SEED)
    log_p = l[:, torch.arange(2 * B), target]
    torch.testing.assert_close(curve.bound[-1], log_p.exp().mean(0).log().mean())
    torch.testing.assert_close(curve.bound[0], log_p.mean())


def test_packed_sequence():
    """One argument, whose examples are its sequences: predict and backward take it bare."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = iw.IWLSTM(3, 4, 2, dropout=0.5), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[1][0][-1])

    net, target = Net().double(), torch.tensor([0, 1])
    x = nn.utils.rnn.pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (5, 3)])
    passes = []
    for s in range(4):
        with iw.sampling(1, seed=SEED, sample_ids=[s]):
            passes.append(torch.softmax(net(x), 1).detach())
    torch.testing.assert_close(iw.predict(net, x, 4, seed=SEED), (sum(passes) / 4).log())
    loss = iw.backward(net, iw.IWCrossEntropyLoss(4), x, target, samples=4, seed=SEED, strategy="streamed")
    torch.testing.assert_close(loss, -(sum(p[torch.arange(2), target] for p in passes) / 4).log().mean())
