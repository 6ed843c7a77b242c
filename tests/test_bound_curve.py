"""The bound against the number of samples, from one draw: means over subsets, their standard errors, and the curve's shape."""

import builtins
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import naive
from test_evaluation import SEED, B, C, Net, data, naive_logits
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.evaluation.subsets import subset_means


def brute_force(l: torch.Tensor, alpha: float) -> torch.Tensor:
    """[S, units], subset by subset and unit by unit."""
    result = []
    for k in range(1, len(l) + 1):
        of_k = []
        for column in l.double().t().unbind():
            values = [naive.naive_bound(list(subset), alpha) for subset in itertools.combinations(column, k)]
            of_k.append(sum(values) / len(values))
        result.append(torch.stack(of_k))
    return torch.stack(result)


class TestSubsets:
    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0, math.inf])
    @pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 3000.0])
    def test_is_the_mean_over_all_subsets(self, scale, alpha):
        l = scale * torch.randn(6, 8, dtype=torch.float64) - 3
        l[2, 3] = l[:, 4] = l[:5, 5] = -math.inf
        l[:, 6] = l[0, 6].item()
        got, want = subset_means(l, alpha), brute_force(l, alpha)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert (got.diff(dim=0)[:, [0, 1, 2, 6, 7]] >= -1e-9).all()

    def test_the_ends(self):
        """k = 1 is the mean, k = S the bound of all, also for many samples."""
        l = 7 * torch.randn(200, 3)
        means = subset_means(l, 1.0)
        torch.testing.assert_close(means[0], l.double().mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(means[-1], torch.logsumexp(l.double(), 0) - math.log(200), rtol=1e-9, atol=1e-9)

    def test_two_of_many(self):
        """k = 2 of 40 samples, pair by pair."""
        l = 4 * torch.randn(40, 2, dtype=torch.float64)
        pairs = [torch.logaddexp(l[i], l[j]) - math.log(2) for i, j in itertools.combinations(range(40), 2)]
        torch.testing.assert_close(subset_means(l, 1.0)[1], torch.stack(pairs).mean(0), rtol=1e-9, atol=1e-9)

    def test_what_is_no_number(self):
        l = torch.zeros(3, 3)
        l[0, 0], l[1, 1] = math.nan, math.inf
        means = subset_means(l, 1.0)
        assert means[:, :2].isnan().all()
        torch.testing.assert_close(means[:, 2], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)

    def test_no_units(self):
        assert subset_means(torch.zeros(3, 0), 1.0).shape == (3, 0)


def naive_curve(log_p: torch.Tensor, outer: torch.Tensor, alpha: float):
    """(bound, standard error) of weighted units, in Python's own numbers."""
    bounds, errors, c = [], [], outer.tolist()
    for of_k in brute_force(log_p, alpha).tolist():
        mean = sum(a * b for a, b in zip(of_k, c, strict=True)) / sum(c)
        n = sum(w > 0 for w in c)
        bounds.append(mean)
        errors.append(math.sqrt(n / (n - 1) * sum((w * (b - mean)) ** 2 for b, w in zip(of_k, c, strict=True))) / sum(c))
    return torch.tensor(bounds, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)


class TestBoundCurve:
    @pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
    @pytest.mark.parametrize("chunk", [None, 2])
    def test_against_the_loop(self, chunk, alpha):
        """Two batches whose examples are numbered through; an ignored example does not count; class weights weigh."""
        net, samples = Net(), 5
        batches = [(data(4), torch.tensor([0, 1, 3, -100])), (data(3), torch.tensor([2, 2, 1]))]
        weight = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
        loss_fn = iw.IWCrossEntropyLoss(9, weight=weight, alpha=alpha)
        curve = iw.bound_curve(net, batches, samples, loss_fn=loss_fn, seed=SEED, chunk=chunk)
        log_p, first = [], 0
        for x, y in batches:
            logits = naive_logits(net, x, samples, first_example=first)
            first += len(x)
            log_p.append(torch.stack([torch.log_softmax(logits[:, b], 1)[:, int(y[b])] for b in range(len(x)) if y[b] >= 0], 1))
        targets = torch.cat([y for _, y in batches])
        bound, error = naive_curve(torch.cat(log_p, 1), weight[targets[targets >= 0]], alpha)
        assert curve.samples.tolist() == [1, 2, 3, 4, 5]
        torch.testing.assert_close(curve.bound, bound, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(curve.standard_error, error, rtol=1e-7, atol=1e-8)

    def test_ends_at_the_loss(self):
        """With all samples it is minus the loss."""
        net, x, y = Net(), data(), torch.randint(C, (B,))
        curve = iw.bound_curve(net, [(x, y)], 6, seed=SEED)
        loss = iw.iw_cross_entropy(naive_logits(net, x, 6).flatten(0, 1), y, 6)
        torch.testing.assert_close(-curve.bound[-1], loss, rtol=1e-9, atol=1e-9)
        assert (curve.bound.diff() > 0).all()

    def test_other_likelihoods(self):
        net, x = Net(), data()
        y = torch.rand(B, C, dtype=torch.float64)
        curve = iw.bound_curve(net, [(x, y)], 3, loss_fn=iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), 3), seed=SEED)
        logits = naive_logits(net, x, 3)
        log_p = torch.stack([-F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1) for z in logits])
        bound, error = naive_curve(log_p, torch.ones(B), 1.0)
        torch.testing.assert_close(curve.bound, bound, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(curve.standard_error, error, rtol=1e-7, atol=1e-8)

    def test_drawn_seed_is_one_for_all_batches(self):
        net, batches = Net(), [(data(), torch.randint(C, (B,))) for _ in range(2)]
        seed = int(torch.empty(1, dtype=torch.int64).random_(-(2**63), None)) if torch.manual_seed(3) else None
        want = iw.bound_curve(net, batches, 3, seed=seed)
        torch.manual_seed(3)
        torch.testing.assert_close(iw.bound_curve(net, iter(batches), 3).bound, want.bound)

    def test_one_example_has_no_standard_error(self):
        curve = iw.bound_curve(Net(), [(data(1), torch.tensor([1]))], 3)
        assert curve.bound.isfinite().all()
        assert curve.standard_error.isnan().all()

    def test_prints(self):
        curve = iw.BoundCurve(torch.tensor([1, 2]), torch.tensor([-1.5, -1.25]), torch.tensor([0.1, 0.05]))
        assert " ".join(str(curve).split()) == "samples bound std. error 1 -1.5000 0.1000 2 -1.2500 0.0500"

    def test_progress(self, capsys):
        pytest.importorskip("rich", reason="rich is not installed")
        batches = [(data(), torch.randint(C, (B,)))]
        shown = iw.bound_curve(Net(), batches, 2, progress=True, seed=1)
        assert "100%" in capsys.readouterr().out
        assert shown.samples.tolist() == [1, 2]

    def test_progress_without_rich(self, monkeypatch):
        monkeypatch.setattr(builtins, "__import__", without("rich"))
        with pytest.raises(ImportError, match="progress=True needs the package rich"):
            iw.bound_curve(Net(), [(data(), torch.randint(C, (B,)))], 2, progress=True)


def without(package: str):
    """An ``__import__`` for which a package is not installed."""
    original = builtins.__import__

    def imports(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name}")
        return original(name, *args, **kwargs)

    return imports
