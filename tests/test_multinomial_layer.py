"""The layer of multinomial dropout: contexts, evolutional probabilities, state."""

import itertools

import pytest
import torch
from test_multinomial import naive_multinomial

import iwsgd_ext as iw


class TestLayer:
    def test_noise_of_a_context(self, device, backend):
        x = torch.randn(4, 63, device=device, dtype=torch.float64)
        q = torch.rand(63)
        first, second = iw.IWMultinomialDropout(0.75, probabilities=q).to(device), iw.IWMultinomialDropout(0.5)
        with iw.sampling(3, seed=5, first_example=7) as context:
            assert first.eval()(x) is x
            y = first.train()(x)
            z = second(y)
        assert context.stream == 2
        address = {"samples": 3, "seed": 5, "first_example": 7}
        want = naive_multinomial(x, q.double().tolist(), round(0.25 * 63), **address)
        torch.testing.assert_close(y.cpu(), want, rtol=1e-12, atol=1e-12)
        want = naive_multinomial(y, None, round(0.5 * 63), stream=1, expand=False, **address)
        torch.testing.assert_close(z.cpu(), want, rtol=1e-12, atol=1e-12)

    def test_evolutional(self, device, backend):
        """Probabilities are the root mean squares of the features over the batch, and, of expanded rows, over those of each sample."""
        x = torch.randn(6, 9, device=device, dtype=torch.float64) * torch.arange(9, device=device)
        layer = iw.IWMultinomialDropout(0.5, probabilities="evolutional")
        with iw.sampling(2, seed=5):
            y = layer(x)
            z = layer(y)
        rms = x.square().mean(0).sqrt().tolist()
        torch.testing.assert_close(y.cpu(), naive_multinomial(x, rms, 4, samples=2, seed=5), rtol=1e-9, atol=1e-12)
        for s in range(2):
            rows = y[6 * s : 6 * s + 6]
            rms = rows.square().mean(0).sqrt().tolist()
            want = naive_multinomial(rows, rms, 4, samples=1, sample_ids=[s], seed=5, stream=1, expand=False)
            torch.testing.assert_close(z[6 * s : 6 * s + 6].cpu(), want, rtol=1e-9, atol=1e-12)

    def test_evolutional_of_samples_in_chunks(self, device, backend):
        x = torch.randn(6, 9, device=device)
        model = torch.nn.Sequential(iw.IWDropout(0.5), iw.IWMultinomialDropout(0.5, probabilities="evolutional"))
        with iw.sampling(4, seed=5):
            whole = model(x)
        with iw.sampling(2, seed=5, sample_ids=[2, 3]):
            assert torch.equal(model(x), whole[12:])

    def test_evolutional_refuses_rows_of_several_samples(self):
        """Where each example has another sample, no sample's rows are whole: their root mean squares would be no sample's."""
        x, y = torch.randn(6, 9), torch.randint(3, (6,))
        layer = iw.IWMultinomialDropout(0.5, probabilities="evolutional")
        model = torch.nn.Sequential(iw.IWDropout(0.5), layer, torch.nn.Linear(9, 3))
        with pytest.raises(ValueError, match=r"sample_ids: expected \[2\] where evolutional.* got \(2, 6\)"):
            iw.backward(model, iw.IWCrossEntropyLoss(4), x, y, samples=4, strategy="resampled", keep=2)
        ids = torch.randint(9, (2, 6))
        with iw.sampling(2, seed=5, sample_ids=ids):  # rows before all noise are every sample's
            z = layer(x)
        for s, b in itertools.product(range(2), range(6)):
            with iw.sampling(1, seed=5, sample_ids=[ids[s, b].item()]):
                assert torch.equal(layer(x)[b], z[6 * s + b])

    def test_evolutional_of_dead_features(self, device, backend):
        """Nothing to tell features apart: uniform, and no NaN."""
        layer = iw.IWMultinomialDropout(0.5, probabilities="evolutional")
        x = torch.zeros(6, 9, device=device, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.sum() > 0

    def test_alone_is_one_fresh_sample(self, device, backend):
        x, layer = torch.ones(4, 63, device=device), iw.IWMultinomialDropout()
        torch.manual_seed(3)
        one, other = layer(x), layer(x)
        torch.manual_seed(3)
        assert torch.equal(layer(x), one)
        assert one.shape == x.shape
        assert not torch.equal(one, other)

    def test_state_and_repr(self):
        layer = iw.IWMultinomialDropout(0.25, probabilities=torch.ones(3))
        assert not layer.state_dict()
        assert repr(layer) == "IWMultinomialDropout(p=0.25)"
        assert repr(iw.IWMultinomialDropout(probabilities="evolutional", batch_dim=1)) == (
            "IWMultinomialDropout(p=0.5, probabilities='evolutional', batch_dim=1)"
        )

    def test_at_least_one_draw(self, device, backend):
        y = iw.IWMultinomialDropout(0.9)(torch.ones(4, 3, device=device))
        torch.testing.assert_close(y.sum(1), torch.full_like(y[:, 0], 3.0))
