"""The recipe of CIFAR: augmentation, schedule, protocols and experiments, and trainings through the tool."""

import copy
import csv
import io
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cifar_archives import (
    DATASETS,
    archive,
    pickled,
    settings,
)
from test_wide_resnet import PARAMETERS
from torch import nn

from recipes import cifar, cifar_wrn
from recipes.wide_resnet import wide_resnet


def one_by_one(x: torch.Tensor, flip: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Flip, pad and crop, image by image, in torch's own functions."""
    out = []
    for image, f, i, j in zip(x, flip.tolist(), top.tolist(), left.tolist(), strict=True):
        image = image.flip(2) if f else image
        padded = F.pad(image[None].float(), (4, 4, 4, 4), mode="reflect")[0]
        out.append(padded[:, i : i + x.shape[2], j : j + x.shape[3]])
    return torch.stack(out)


@pytest.mark.parametrize("size", [(32, 32), (5, 9)], ids=["as CIFAR's", "the least, not square"])
def test_augmentation_at_every_offset(device, size):
    flip, top, left = (v.flatten() for v in torch.meshgrid(*map(torch.arange, (2, 9, 9)), indexing="ij"))
    flip = flip == 1
    x = torch.randint(0, 256, (162, 3, *size), dtype=torch.uint8)
    got = cifar_wrn.augment(*(v.to(device) for v in (x, flip, top, left)))
    assert got.dtype == torch.uint8 and torch.equal(got.cpu().float(), one_by_one(x, flip, top, left))
    with pytest.raises(ValueError, match="x: expected images larger than 4 pixels each way, got 4 x"):
        cifar_wrn.augment(x[:, :, :4], flip, top, left)


def test_training_images(device):
    """What is drawn is torch's default generator's; flip, crop and normalisation are those of the loop."""
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(3)
    got = cifar_wrn.prepare(x.to(device), True)
    torch.manual_seed(3)
    flip = (torch.rand(40, device=device) < 0.5).cpu()
    top, left = torch.randint(9, (2, 40), device=device).cpu()
    mean, std = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1), torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), (one_by_one(x, flip, top, left) - mean) / std, rtol=1e-6, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.equal(got, cifar_wrn.prepare(x.to(device), True))


def test_every_offset_and_flip_occurs(device):
    """Each image tells its own: its pixels are their row and column."""
    place = torch.arange(32, dtype=torch.uint8)
    image = torch.stack([place[:, None].expand(32, 32), place[None].expand(32, 32), torch.zeros(32, 32, dtype=torch.uint8)])
    out = cifar_wrn.prepare(image.to(device).expand(8100, 3, 32, 32), True).cpu()
    rows = (out[:, 0, 12:14, 12] * 63.0 + 125.3).round().int()  # the middle: never of the border
    columns = (out[:, 1, 12, 12:14] * 62.1 + 123.0).round().int()
    flipped = columns[:, 1] < columns[:, 0]
    top = rows[:, 0] - 12 + 4
    left = torch.where(flipped, 31 - columns[:, 0], columns[:, 0]) - 12 + 4
    seen = Counter(zip(flipped.tolist(), top.tolist(), left.tolist(), strict=True))
    assert sorted(seen) == [(f, i, j) for f in (False, True) for i in range(9) for j in range(9)]
    assert min(seen.values()) > 15 and max(seen.values()) < 100  # 50 each, with a standard deviation of 7
    assert abs(flipped.float().mean() - 0.5) < 0.03


def test_test_images(device):
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    state = torch.get_rng_state()
    got = cifar_wrn.prepare(x.to(device), False).cpu().double()
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    for channel, (mean, std) in enumerate(zip((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), strict=True)):
        torch.testing.assert_close(got[:, channel], (x[:, channel].double() - mean) / std, rtol=1e-5, atol=1e-6)


def quadratic(steps: int):
    """A small problem, with the recipe's optimiser: the gradient differs from step to step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return model, *cifar_wrn.optimizer(settings(), model, steps)


def a_step(model, optimizer, schedule, k: int) -> float:
    lr = optimizer.param_groups[0]["lr"]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    (0.1 * model(x).square().sum()).backward()
    optimizer.step()
    schedule.step()
    return lr


def test_learning_rates_of_200_epochs():
    model, optimizer, schedule = quadratic(200 * 4)
    lrs = [a_step(model, optimizer, schedule, k) for k in range(800)]
    for k, lr in enumerate(lrs):
        epoch = k // 4 + 1
        assert lr == pytest.approx(0.1 * 0.2 ** sum(epoch >= drop for drop in (60, 120, 160)), rel=1e-12), (epoch, k)
    assert lrs[235] == pytest.approx(0.1) and lrs[236] == pytest.approx(0.02)  # 59 epochs of 4 steps, from 0


@pytest.mark.parametrize(("steps", "drops"), [(10, (3, 6, 8)), (1, ()), (2, (1,)), (25, (8, 15, 20)), (78000, (23010, 46410, 62010))])
def test_drops_of_other_lengths(steps, drops):
    """At the same part of the training, never before its first step."""
    schedule = quadratic(steps)[2]
    assert tuple(k for k in schedule.drops if k < steps) == drops
    assert schedule.get_last_lr() == [0.1]


def test_optimizer_against_its_formula():
    """Nesterov's momentum as Torch7 has it, weight decay on all, and a momentum that begins anew at each drop."""
    steps, (model, optimizer, schedule) = 30, quadratic(30)
    assert optimizer.defaults["dampening"] == 0
    w = [p.detach().clone() for p in model.parameters()]
    v = [torch.zeros_like(p) for p in w]
    for k in range(steps):
        lr = 0.1 * 0.2 ** sum(k >= drop for drop in (9, 18, 24))
        if k in (9, 18, 24):
            v = [torch.zeros_like(p) for p in w]
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        out = x @ w[0].T + w[1]
        for i, grad in enumerate((0.2 * out.T @ x, 0.2 * out.sum(0))):
            grad = grad + 5e-4 * w[i]
            v[i] = 0.9 * v[i] + grad
            w[i] = w[i] - lr * (grad + 0.9 * v[i])
        a_step(model, optimizer, schedule, k)
        for p, expected in zip(model.parameters(), w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
        assert bool(optimizer.state) == (k + 1 not in (9, 18, 24)), "no buffers left after a drop"


def test_all_parameters_decay():
    model = wide_resnet(10, 1, 10, 0.3)
    sgd, _ = cifar_wrn.optimizer(settings(), model, 10)
    (group,) = sgd.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["weight_decay"], group["momentum"], group["nesterov"], group["lr"]) == (5e-4, 0.9, True, 0.1)


@pytest.mark.parametrize("order", ["optimizer first", "schedule first", "schedule made last"])
def test_a_state_goes_on_with_the_same_bits(order):
    steps = 20  # drops at 6, 12, 16
    for stop in (1, 5, 6, 7, 12, 16, 19):
        model, optimizer, schedule = quadratic(steps)
        for k in range(stop):
            a_step(model, optimizer, schedule, k)
        file = io.BytesIO()
        torch.save([copy.deepcopy(part.state_dict()) for part in (model, optimizer, schedule)], file)
        lrs = [a_step(model, optimizer, schedule, k) for k in range(stop, steps)]
        file.seek(0)
        states = torch.load(file, weights_only=True)
        resumed, optimizer2, schedule2 = quadratic(steps)
        resumed.load_state_dict(states[0])
        if order == "schedule first":
            schedule2.load_state_dict(states[2])
        optimizer2.load_state_dict(states[1])
        if order == "schedule made last":
            schedule2 = cifar_wrn.Drops(optimizer2, steps)
        if order != "schedule first":
            schedule2.load_state_dict(states[2])
        assert schedule2.state_dict() == states[2] and not (stop in (6, 12, 16) and optimizer2.state)
        assert [a_step(resumed, optimizer2, schedule2, k) for k in range(stop, steps)] == lrs
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def test_protocols():
    assert cifar_wrn.protocol(settings()) == {}
    asked = cifar_wrn.protocol(settings("--protocol", "authors"))
    assert asked == {"batch": 128, "accumulate": 4, "batch_norm": "joint", "expand": "input", "order_seed": 0}


def test_defaults_are_the_papers():
    model = cifar_wrn.build(settings("--depth", "10", "--widen", "2", rate=0.3), cifar.synthetic(100, 0))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[10, 2][1]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    made = settings()
    assert (made.depth, made.widen, made.batch, made.epochs, made.samples, made.rate) == (28, 10, 128, 200, [8], [0.3])
    for wrong in (["--depth", "12"], ["--widen", "0"], ["--depth", "x"]):
        with pytest.raises(SystemExit):
            settings(*wrong)


@pytest.mark.parametrize("protocol", ["baseline", "authors"])
def test_arms_of_table_1(protocol):
    arms = cifar_wrn.arms(settings("--table1", "--protocol", protocol, rate=[0.5]))
    seen = {arm["label"]: (arm["samples"], arm["alpha"], arm.get("epochs"), arm.get("accumulate")) for arm in arms}
    one = 1 if protocol == "authors" else None  # the baseline's script has no micro-batches
    assert seen == {
        "dropout, 4x iterations": (1, 1.0, 800, one),
        "dropout": (1, 1.0, None, one),
        "IWSGD S=4": (4, 1.0, None, None),
        "IWSGD S=8": (8, 1.0, None, None),
        "mean S=4": (4, 0.0, None, None),
        "mean S=8": (8, 0.0, None, None),
        "IWSGD S=4, epochs / 4": (4, 1.0, 50, None),
        "IWSGD S=8, epochs / 8": (8, 1.0, 25, None),
    }
    assert len(arms) == 8 and all(arm["rate"] == 0.5 for arm in arms)
    assert len(cifar_wrn.table1(settings(rate=[0.3, 0.5]))) == 16


def test_arms_by_steps():
    """A training asked for in steps has its length multiplied in steps: epochs would not count."""
    arms = {arm["label"]: arm for arm in cifar_wrn.table1(settings(steps=100))}
    assert arms["dropout, 4x iterations"]["steps"] == 400 and arms["IWSGD S=8, steps / 8"]["steps"] == 13
    assert not any("epochs" in arm for arm in arms.values())


def test_arms_of_figure_2():
    arms = cifar_wrn.arms(settings("--figure2"))
    assert sorted((a["samples"], a["rate"]) for a in arms) == [(s, k / 10) for s in (1, 4, 8) for k in range(1, 9)]
    assert Counter(a["label"] for a in arms) == {"dropout": 8, "IWSGD S=4": 8, "IWSGD S=8": 8}
    assert all(a["alpha"] == 1.0 for a in arms)


def test_arms_of_a_sweep():
    """The tool combines the options by itself, but for the authors' baseline, which has one batch and no micro-batches."""
    assert cifar_wrn.arms(settings(samples=[1, 4])) == []
    arms = cifar_wrn.arms(settings("--protocol", "authors", samples=[1, 4], alpha=[0.0, 1.0]))
    assert [(a["samples"], a["alpha"], a.get("accumulate")) for a in arms] == [(1, 1.0, 1)] * 2 + [(4, 0.0, None), (4, 1.0, None)]


def train(tmp_path, *arguments: str) -> dict:
    pytest.importorskip("rich")
    from recipes.__main__ import main

    small = ["--depth", "10", "--widen", "1", "--seeds", "1", "--no-tensorboard", "--out", str(tmp_path / "out")]
    assert main(["cifar_wrn", *small, *arguments]) == 0
    return json.loads((tmp_path / "out" / "summary.json").read_text())


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_training_from_a_small_archive(dataset, tmp_path):
    archive(tmp_path, dataset, pickled(dataset))
    own = ["--dataset", dataset, "--any-archive", "--data", str(tmp_path), "--batch", "4", "--epochs", "2", "--samples", "2"]
    summary = train(tmp_path, *own)
    (run,) = summary["arms"][0]["runs"].values()
    assert run["parameters"] == PARAMETERS[10, 1][dataset == "cifar100"]
    assert summary["facts"] == {"data": cifar.ARCHIVES[dataset].file, "data_md5": "not compared"}
    log = list(csv.DictReader((tmp_path / "out").glob("S2-*/seed-0/log.csv").__next__().open()))
    assert [line["epoch"] for line in log] == ["1", "2"] and all(math.isfinite(float(line["nll"])) for line in log)


def test_an_official_archive_is_asked_for(tmp_path, capsys):
    from recipes.__main__ import main

    archive(tmp_path, "cifar10", pickled("cifar10"))
    assert main(["cifar_wrn", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-tensorboard"]) == 1
    assert "MD5 expected c58f30108f718f92721af3b95e74349a" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_table_1_through_the_tool(tmp_path):
    archive(tmp_path, "cifar10", pickled("cifar10"))
    summary = train(tmp_path, "--any-archive", "--data", str(tmp_path), "--batch", "4", "--steps", "2", "--table1")
    assert [arm["label"] for arm in summary["arms"]] == [
        *("dropout", "dropout, 4x iterations", "IWSGD S=4", "IWSGD S=8", "mean S=4", "mean S=8", "IWSGD S=4, steps / 4"),
        "IWSGD S=8, steps / 8",
    ]
    assert len(list((tmp_path / "out").glob("*/seed-0/result.json"))) == 8


@pytest.mark.slow
def test_the_authors_protocol_through_the_tool(tmp_path, capsys):
    """Four micro-batches of 32 images with their samples as rows: BatchNorm has updated its statistics four times a step, and once for
    the baseline; all seeds have one order of the examples.
    """
    train(tmp_path, "--synthetic", "--protocol", "authors", "--samples", "1", "2", "--steps", "1")
    for folder, updates in (("S1-*", 1), ("S2-*", 4)):
        state = torch.load(next((tmp_path / "out").glob(f"{folder}/seed-0/last.pt")), weights_only=True)
        assert {int(v) for k, v in state["model"].items() if k.endswith("num_batches_tracked")} == {updates}
    with pytest.raises(SystemExit):
        train(tmp_path, "--synthetic", "--protocol", "authors", "--batch", "64")
    assert "--batch: cifar_wrn's own options ask for 128, got 64" in capsys.readouterr().err
