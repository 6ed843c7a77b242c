"""Sample parallel: two processes that hold S/2 noise samples each compute what one process does with S."""

import gc
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist

import iwsgd_ext as iw

WORLD, LOCAL, BATCH = 2, 3, 7
ALPHAS = (1.0, 0.0, 0.5, math.inf)
OPTIONS = [
    {"reduction": "mean"},
    {"reduction": "sum", "weight": "random", "label_smoothing": 0.1},
    {"reduction": "none", "level": "position"},
    {"reduction": "none", "level": "example"},
    {"reduction": "mean", "level": "position", "inplace": True},
    {"reduction": "mean", "local": 1},
    {"reduction": "sum", "example_weight": "example"},
    {"reduction": "none", "level": "position", "example_weight": "position", "local": 1},
]


def data(local: int):
    """The same on every rank: logits [S, B, C, T] of all samples, target with an ignored example, weight, upstream gradient."""
    generator = torch.Generator().manual_seed(63)
    logits = 2 * torch.randn(WORLD * local, BATCH, 10, 5, generator=generator)
    target = torch.randint(10, (BATCH, 5), generator=generator)
    target[2] = -100
    logits[:, 4, 0], target[4] = -math.inf, 0  # impossible under every sample
    return logits, target, torch.rand(10, generator=generator), torch.randn(BATCH, 5, generator=generator)


def loss_and_gradient(logits, target, samples, weight, upstream, options, group=None):
    leaf = logits.flatten(0, 1).requires_grad_()
    options = {name: value for name, value in options.items() if name != "local"}
    if "weight" in options:
        options["weight"] = weight
    if "example_weight" in options:  # of any sign, and 0 where the target is impossible
        of_examples = upstream[:, 0].index_fill(0, torch.tensor([4]), 0)
        options["example_weight"] = upstream if options["example_weight"] == "position" else of_examples
    loss, stats = iw.iw_cross_entropy(leaf * 1, target, samples, return_stats=True, process_group=group, **options)
    factor = torch.tensor(3.0) if loss.dim() == 0 else upstream if loss.dim() == 2 else upstream[:, 0]
    (dlogits,) = torch.autograd.grad(loss, leaf, factor)
    return loss.detach(), dlogits.view_as(logits), *stats


def work(rank: int, backend: str, file: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    iw.set_backend(backend)
    results = []
    for options, alpha in itertools.product(OPTIONS, ALPHAS):
        local = options.get("local", LOCAL)
        logits, target, *others = data(local)
        own = logits[rank * local : (rank + 1) * local]
        results += [loss_and_gradient(own, target, local, *others, {**options, "alpha": alpha}, dist.group.WORLD)]
    with pytest.raises(ValueError, match="positions of one sign in example"):  # though each rank has one sample alone
        weight = {"reduction": "sum", "example_weight": "position", "alpha": 1.0}
        loss_and_gradient(own[:1], target, 1, *others, weight, dist.group.WORLD)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("backend_name", [name for name in ("reference", "cpu") if iw.backend_info()["built"][name]])
def test_samples_over_ranks(backend_name, tmp_path):
    """Loss and bound on every rank; gradient, log-likelihoods and weights of the rank's own samples."""
    torch.multiprocessing.spawn(work, (backend_name, str(tmp_path / "store"), str(tmp_path)), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    before = iw.backend_info()["forced"]
    iw.set_backend(backend_name)
    try:
        for (options, alpha), *parts in zip(itertools.product(OPTIONS, ALPHAS), *ranks, strict=True):
            samples = WORLD * options.get("local", LOCAL)
            logits, target, *others = data(options.get("local", LOCAL))
            loss, dlogits, log_p, weights, bound, counted = loss_and_gradient(logits, target, samples, *others, {**options, "alpha": alpha})
            for part in parts:
                torch.testing.assert_close(part[0], loss, msg=lambda m, o=(options, alpha): f"loss, {o}: {m}")
                torch.testing.assert_close(part[4], bound)
                assert torch.equal(part[5], counted)
            together = [torch.cat([part[i] for part in parts]) for i in (1, 2, 3)]
            for name, got, expected in zip(("gradient", "log_p", "weights"), together, (dlogits, log_p, weights), strict=True):
                torch.testing.assert_close(got, expected, msg=lambda m, o=(name, options, alpha): f"{o}: {m}")
    finally:
        iw.set_backend(before)
