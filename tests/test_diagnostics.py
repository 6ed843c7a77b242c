"""Summaries of noise samples and their logger: TensorBoard and CSV, continued files, what the host waits for."""

import copy
import csv
import itertools
import math
import pickle

import pytest
import torch
from oracle.naive_loss import naive_loss

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

S, B, C = 5, 12, 7
NAMES = iw.IWSummary._fields


def data(*positions, dtype=torch.float64):
    return 3 * torch.randn(S * B, C, *positions, dtype=dtype), torch.randint(C, (B, *positions))


def naive_summary(logits, target, level="example", alpha=1.0) -> dict[str, float]:
    """The ten numbers from the loop's log-likelihoods and weights, unit by unit in Python's own numbers."""
    naive = naive_loss(logits, target, S, level=level, alpha=alpha)
    log_p, weights, bound = naive.log_p.flatten(1).t().tolist(), naive.weights.flatten(1).t().tolist(), naive.bound.flatten().tolist()
    n = len(bound)
    ess = sorted(1 / sum(w * w for w in of_unit) for of_unit in weights)

    def quantile(level):
        low, part = divmod(level * (n - 1), 1)
        return ess[int(low)] + part * (ess[min(int(low) + 1, n - 1)] - ess[int(low)])

    mean_log_p = sum(map(sum, log_p)) / (n * S)
    return {
        "bound": sum(bound) / n,
        "mean_log_p": mean_log_p,
        "gap": sum(bound) / n - mean_log_p,
        "ess": sum(ess) / n,
        "ess_p05": quantile(0.05),
        "ess_p50": quantile(0.5),
        "ess_p95": quantile(0.95),
        "entropy": sum(-w * math.log(w) for of_unit in weights for w in of_unit if w > 0) / n,
        "largest_weight": sum(map(max, weights)) / n,
        "nonfinite": 0,
    }


class Given(torch.nn.Module):
    """A model whose outputs [S*B, ...] are given: those of the samples that the context asks for."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.nn.Parameter(outputs)

    def forward(self):
        ids = current().sample_ids
        return self.outputs if ids is None else self.outputs.unflatten(0, (S, B))[ids].flatten(0, 1)


class TestSummary:
    @pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5, math.inf])
    @pytest.mark.parametrize(("positions", "level"), [((), "example"), ((3,), "example"), ((3,), "position")])
    def test_numbers(self, device, backend, positions, level, alpha):
        logits, target = data(*positions)
        _, stats = iw.iw_cross_entropy(logits.to(device), target.to(device), S, level=level, alpha=alpha, return_stats=True)
        summary = stats.summary()
        for name, want in naive_summary(logits, target, level, alpha).items():
            value = getattr(summary, name)
            assert value.shape == ()
            assert value.device == logits.to(device).device
            assert value.item() == pytest.approx(want, rel=1e-10, abs=1e-10), name

    def test_hand_made(self):
        """Two examples: weights (1/4, 3/4) and (1, 0)."""
        log_p = torch.log(torch.tensor([[0.1, 0.4], [0.3, 0.0]], dtype=torch.float64))
        stats = iw.IWStats(log_p, torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.float64), torch.log(torch.tensor([0.2, 0.2])))
        summary = stats.summary()
        assert summary.ess.item() == pytest.approx((1.6 + 1) / 2)
        assert summary.ess_p50.item() == pytest.approx(1.3)
        assert summary.largest_weight.item() == pytest.approx(0.875)
        assert summary.entropy.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2)
        assert summary.nonfinite.item() == 1
        assert summary.gap.item() == math.inf

    def test_counts_what_is_not_finite(self):
        stats = iw.IWStats(torch.tensor([[math.nan, 0.0, -math.inf], [math.inf, 1.0, 2.0]]), torch.full((2, 3), 0.5), torch.zeros(3))
        assert stats.summary().nonfinite.item() == 3

    @pytest.mark.parametrize("strategy", [None, "batched", "streamed", "loop"])
    @pytest.mark.parametrize("level", ["example", "position"])
    def test_what_does_not_count_is_left_out(self, device, backend, level, strategy):
        """Two thirds of the positions are ignored, all of the last example's, and another example's weight is 0."""
        logits, target = (v.to(device) for v in data(3))
        target[:, 1:] = target[-1] = -100
        example_weight = torch.ones(B, device=device)
        example_weight[0] = 0
        if strategy is None:
            _, stats = iw.iw_cross_entropy(logits, target, S, level=level, example_weight=example_weight, return_stats=True)
        else:
            targets = {"target": target, "example_weight": example_weight}
            criterion = iw.IWCrossEntropyLoss(S, level=level)
            _, stats = iw.backward(Given(logits), criterion, (), targets, samples=S, strategy=strategy, return_stats=True)
        counted = stats.counted if level == "example" else stats.counted[:, 0]
        assert counted.tolist() == [False, *[True] * (B - 2), False]
        assert level == "example" or not stats.counted[:, 1:].any()
        kept = logits.detach()[..., :1].unflatten(0, (S, B))[:, 1:-1].flatten(0, 1).cpu()
        want = naive_summary(kept, target[1:-1, :1].cpu())
        for name, value in want.items():
            assert getattr(stats.summary(), name).item() == pytest.approx(value, rel=1e-10, abs=1e-10), name

    def test_nothing_counts(self):
        _, stats = iw.iw_cross_entropy(*data()[:1], torch.full((B,), -100), S, return_stats=True)
        assert not stats.counted.any()
        assert all(math.isnan(v) for v in stats.summary()[:-1])

    def test_no_examples(self):
        summary = iw.IWStats(torch.ones(3, 0), torch.ones(3, 0), torch.ones(0)).summary()
        assert all(math.isnan(v) for v in summary[:-1])
        assert summary.nonfinite.item() == 0

    def test_one_example(self):
        stats = iw.IWStats(torch.zeros(2, 1), torch.full((2, 1), 0.5), torch.zeros(1))
        assert [summary.item() for summary in stats.summary()[3:7]] == [2.0] * 4

    def test_does_not_wait(self):
        """Every value is a function of tensors alone: no tensor becomes a Python number (meta tensors have none)."""
        stats = iw.IWStats(*(torch.empty(shape, device="meta") for shape in ((3, 9), (3, 9), (9,))))
        assert {v.device.type for v in stats.summary()} == {"meta"}

    def test_compiled(self):
        stats = iw.IWStats(torch.randn(3, 9), torch.full((3, 9), 1 / 3), torch.randn(9))
        compiled = torch.compile(iw.IWStats.summary, backend="eager", fullgraph=True)(stats)
        assert all(torch.equal(a, b) for a, b in zip(compiled, stats.summary(), strict=True))


class Writer:
    """What a logger needs of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, global_step):
        assert type(value) in (float, int)
        self.scalars.append((tag, value, global_step))


def train(criterion, steps, start=0):
    """``steps`` forwards on batches of their own; what the logger should have seen of each."""
    summaries = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        logits, target = data()
        criterion(logits, target)
        summaries.append(naive_summary(logits, target))
    return summaries


def means(summaries):
    return [sum(s[name] for s in summaries) / len(summaries) for name in NAMES]


def rows_of(path):
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == ("step", *NAMES)
    return [(int(row[0]), [float(v) for v in row[1:]]) for row in rows]


def assert_rows(got, want):
    assert [step for step, _ in got] == [step for step, _ in want]
    for (_, values), (_, expected) in zip(got, want, strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)


class TestLogger:
    @pytest.mark.parametrize("strategy", ["batched", "streamed", "resampled", "loop"])
    @pytest.mark.parametrize("kind", [iw.IWCrossEntropyLoss, type("Mine", (iw.IWCrossEntropyLoss,), {})], ids=["own", "subclass"])
    def test_hears_of_each_step_once(self, tmp_path, kind, strategy):
        """Whatever the strategy, and what it hears are the weights of all samples."""
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), iw.IWDropout(0.5), torch.nn.Linear(8, 3))
        criterion, heard = kind(6), []
        logger = iw.StatsLogger(criterion, tmp_path / "log.csv", every=1)
        criterion.observers.append(heard.append)
        x, y = torch.randn(5, 4), torch.randint(3, (5,))
        for _ in range(2):
            iw.backward(model, criterion, x, y, samples=6, strategy=strategy)
        logger.close()
        assert len(heard) == 2 and len((tmp_path / "log.csv").read_text().splitlines()) == 3
        for stats in heard:
            torch.testing.assert_close(stats.weights, torch.softmax(stats.log_p.double(), 0).float())
            assert stats.weights.shape == (6, 5)

    @pytest.mark.parametrize("return_stats", [False, True])
    def test_any_likelihood(self, tmp_path, return_stats):
        """IWLoss around cross-entropy tells what IWCrossEntropyLoss tells."""
        criterion = iw.IWLoss(torch.nn.CrossEntropyLoss(reduction="none"), S, return_stats=return_stats)
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1) as logger:
            want = train(criterion, 2)
            criterion.eval()(torch.randn(B, C), torch.randint(C, (B,)))
            assert logger.step == 2
        assert_rows(rows_of(tmp_path / "a.csv"), [(1, list(want[0].values())), (2, list(want[1].values()))])

    @pytest.mark.parametrize("return_stats", [False, True])
    @pytest.mark.parametrize("every", [1, 3, 50])
    def test_csv(self, tmp_path, every, return_stats):
        criterion = iw.IWCrossEntropyLoss(S, return_stats=return_stats)
        path = tmp_path / "new" / "stats.csv"
        with iw.StatsLogger(criterion, path, every=every):
            want = train(criterion, 7)
        windows = [want[i : i + every] for i in range(0, 7, every)]
        ends = list(itertools.accumulate(map(len, windows)))
        assert_rows(rows_of(path), list(zip(ends, map(means, windows), strict=True)))

    def test_tensorboard(self):
        criterion, writer = iw.IWCrossEntropyLoss(S), Writer()
        with iw.StatsLogger(criterion, writer, every=2, prefix="train/") as logger:
            logger.step = 100
            want = train(criterion, 4)
        tags, values, steps = zip(*writer.scalars, strict=True)
        assert list(tags) == [f"train/{name}" for name in NAMES] * 2
        assert list(steps) == [102] * len(NAMES) + [104] * len(NAMES)
        assert list(values) == pytest.approx([*means(want[:2]), *means(want[2:])], rel=1e-8, abs=1e-8)

    def test_a_real_writer(self, tmp_path):
        tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
        criterion = iw.IWCrossEntropyLoss(S)
        with tensorboard.SummaryWriter(tmp_path) as writer, iw.StatsLogger(criterion, writer, every=1):
            train(criterion, 1)
        assert list(tmp_path.iterdir())

    @pytest.mark.parametrize("return_stats", [False, True])
    def test_the_loss_is_what_it_was(self, tmp_path, return_stats):
        logits, target = data()
        criterion = iw.IWCrossEntropyLoss(S, return_stats=return_stats)
        logits.requires_grad_()
        want = criterion(logits, target)
        with iw.StatsLogger(criterion, tmp_path / "a.csv"):
            got = criterion(logits, target)
        assert isinstance(got, tuple) == return_stats
        for a, b in zip(*((v[0], *v[1]) if return_stats else (v,) for v in (got, want)), strict=True):
            assert torch.equal(a, b)
        (got[0] if return_stats else got).backward()
        assert logits.grad is not None

    def test_several_loggers(self, tmp_path):
        criterion, writer = iw.IWCrossEntropyLoss(S), Writer()
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1), iw.StatsLogger(criterion, writer, every=2):
            train(criterion, 2)
        assert len(rows_of(tmp_path / "a.csv")) == 2
        assert len(writer.scalars) == len(NAMES)

    def test_evaluation_is_left_out(self, tmp_path):
        criterion = iw.IWCrossEntropyLoss(S)
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1):
            criterion.eval()(torch.randn(B, C), torch.randint(C, (B,)))
            assert rows_of(tmp_path / "a.csv") == []
            train(criterion.train(), 1)
        assert [step for step, _ in rows_of(tmp_path / "a.csv")] == [1]

    def test_a_forward_that_raises_is_no_step(self, tmp_path):
        criterion = iw.IWCrossEntropyLoss(S)
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1) as logger:
            with pytest.raises(ValueError, match="logits"):
                criterion(torch.randn(3, C), torch.randint(C, (B,)))
            want = train(criterion, 1)
            assert logger.step == 1
        assert_rows(rows_of(tmp_path / "a.csv"), [(1, means(want))])

    def test_close_lets_go(self, tmp_path):
        criterion = iw.IWCrossEntropyLoss(S)
        logger = iw.StatsLogger(criterion, tmp_path / "a.csv", every=1)
        train(criterion, 1)
        logger.close()
        logger.close()
        train(criterion, 1)
        assert len(rows_of(tmp_path / "a.csv")) == 1
        assert criterion.observers == []

    def test_the_host_reads_only_when_a_row_is_due(self, tmp_path, monkeypatch):
        """Counts every way from a tensor to a Python number."""
        reads = []
        for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda self, *a, name=name, original=original: (reads.append(name), original(self, *a))[1]
            )
        criterion = iw.IWCrossEntropyLoss(S)
        logits, target = data()
        counts = []
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=4):
            for _ in range(8):
                criterion(logits, target)
                counts.append(len(reads))
        assert counts == [0, 0, 0, 1, 1, 1, 1, 2]

    def test_what_is_not_finite_stays_in_its_window(self, tmp_path):
        criterion = iw.IWCrossEntropyLoss(S)
        logits, target = data()
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1):
            criterion(torch.full_like(logits, math.nan), target)
            criterion(logits, target)
        (_, bad), (_, good) = rows_of(tmp_path / "a.csv")
        assert bad[-1] == S * B
        assert math.isnan(bad[0])
        assert good == pytest.approx(list(naive_summary(logits, target).values()), rel=1e-5)

    def test_a_step_in_which_nothing_counts(self, tmp_path):
        """It is a step, and leaves the means of the others alone; a row of such steps has none."""
        criterion, (logits, target) = iw.IWCrossEntropyLoss(S), data()
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=3):
            for labels in (target, torch.full_like(target, -100), target):
                criterion(logits, labels)
            for _ in range(3):
                criterion(logits, torch.full_like(target, -100))
        first, second = rows_of(tmp_path / "a.csv")
        assert_rows([first], [(3, list(naive_summary(logits, target).values()))])
        assert second[0] == 6 and all(math.isnan(v) for v in second[1][:-1]) and second[1][-1] == 0

    @pytest.mark.parametrize("kind", ["weight", "example_weight"])
    def test_what_is_not_finite_shows_where_it_weighs_nothing(self, tmp_path, kind):
        """The loss is NaN then, as torch's is."""
        criterion, (logits, target) = iw.IWCrossEntropyLoss(S), data()
        logits[0], target[0], target[1:] = math.nan, 0, 1
        weights = torch.ones(C if kind == "weight" else B, dtype=torch.float64)
        weights[0] = 0
        named = {"example_weight": weights} if kind == "example_weight" else {}
        criterion.weight = weights if kind == "weight" else None
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1):
            assert criterion(logits, target, **named).isnan()
        assert rows_of(tmp_path / "a.csv")[0][1][-1] == 1

    def test_stats_from_elsewhere(self, tmp_path):
        logits, target = data()
        _, stats = iw.iw_cross_entropy(logits, target, S, return_stats=True)
        with iw.StatsLogger(iw.IWCrossEntropyLoss(S), tmp_path / "a.csv") as logger:
            logger.add(stats)
        assert_rows(rows_of(tmp_path / "a.csv"), [(1, list(naive_summary(logits, target).values()))])

    def test_compiled_criterion(self, tmp_path):
        """The logger breaks the graph, and counts on."""
        criterion = iw.IWCrossEntropyLoss(S)
        compiled = torch.compile(criterion, backend="eager")
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=2):
            want = train(compiled, 4)
        assert_rows(rows_of(tmp_path / "a.csv"), [(2, means(want[:2])), (4, means(want[2:]))])

    def test_criterion_copies_and_pickles(self, tmp_path):
        criterion = iw.IWCrossEntropyLoss(S)
        with iw.StatsLogger(criterion, tmp_path / "a.csv", every=1):
            for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
                other(*data())
            assert list(criterion.state_dict()) == []


class TestContinuedFiles:
    def test_resume(self, tmp_path):
        path = tmp_path / "a.csv"
        want = []
        for run in range(3):
            criterion = iw.IWCrossEntropyLoss(S)
            with iw.StatsLogger(criterion, path, every=2) as logger:
                assert logger.step == 3 * run
                summaries = train(criterion, 3, start=3 * run)
            want += [(3 * run + 2, means(summaries[:2])), (3 * run + 3, means(summaries[2:]))]
        assert_rows(rows_of(path), want)
        assert path.read_text().count("step") == 1

    @pytest.mark.parametrize("tail", ["7", "7,0.25,", "7,1,2,3,4,5,6,7,8,9,1"])
    def test_half_a_row_is_cut_off(self, tmp_path, tail):
        path = tmp_path / "a.csv"
        with iw.StatsLogger(criterion := iw.IWCrossEntropyLoss(S), path, every=1):
            train(criterion, 2)
        before = path.read_text()
        path.write_text(before + tail)
        with iw.StatsLogger(criterion, path, every=1) as logger:
            assert logger.step == 2
            train(criterion, 1)
        assert path.read_text().startswith(before)
        assert [step for step, _ in rows_of(path)] == [1, 2, 3]

    @pytest.mark.parametrize("text", ["", "step,bou", "header"])
    def test_empty_or_half_a_header(self, tmp_path, text):
        path = tmp_path / "a.csv"
        path.write_text(("step," + ",".join(NAMES) + "\n") if text == "header" else text)
        with iw.StatsLogger(criterion := iw.IWCrossEntropyLoss(S), path, every=1):
            train(criterion, 1)
        assert [step for step, _ in rows_of(path)] == [1]

    @pytest.mark.parametrize("text", ["epoch,loss\n1,2\n", "no newline", "step,bound\n"])
    def test_other_files_are_left_alone(self, tmp_path, text):
        path = tmp_path / "a.csv"
        path.write_text(text)
        with pytest.raises(ValueError, match="to: expected"):
            iw.StatsLogger(iw.IWCrossEntropyLoss(S), path)
        assert path.read_text() == text


BAD = [
    (TypeError, "criterion: expected an IWCrossEntropyLoss or IWLoss, got CrossEntropyLoss", {"criterion": torch.nn.CrossEntropyLoss()}),
    (TypeError, "every: expected an int, got float", {"every": 2.0}),
    (TypeError, "every: expected an int, got bool", {"every": True}),
    (ValueError, "every: expected a number of steps >= 1, got 0", {"every": 0}),
    (TypeError, "to: expected the path of a CSV file or an object with add_scalar, got int", {"to": 3}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=range(len(BAD)))
def test_bad_arguments(tmp_path, error, message, change):
    arguments = {"criterion": iw.IWCrossEntropyLoss(S), "to": tmp_path / "a.csv", **change}
    with pytest.raises(error, match=message):
        iw.StatsLogger(**arguments)
