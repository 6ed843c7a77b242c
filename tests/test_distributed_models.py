"""Converted models under DistributedDataParallel and FSDP2, in both orders: gradients are the mean over ranks of those without them."""

import copy
import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import iwsgd_ext as iw

WORLD, S, B = 2, 3, 4
FORMS = ("DDP around", "DDP inside", "FSDP, then convert", "convert, then FSDP", "FSDP, then convert on inputs")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(16, 16), nn.Dropout(0.3)

    def forward(self, h):
        return h + self.drop(self.linear(h)).relu()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), Block(), Block(), nn.Linear(16, 3))


def gradients(model: nn.Module, x, target) -> list[torch.Tensor]:
    """Of a second step: the first has gathered and scattered parameters once."""
    for _ in range(2):
        model.zero_grad()
        with iw.sampling(S, seed=3):
            logits = model(x)
        iw.iw_cross_entropy(logits, target, S).backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()]


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in (model[2], model[3], model):
        fully_shard(module)
    return model


def work(rank: int, file: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(rank)
    x, target = torch.randn(B, 6, generator=generator), torch.randint(3, (B,), generator=generator)
    want = gradients(iw.convert(network(), S), x, target)
    for g in want:
        dist.all_reduce(g)
        g /= WORLD
    worst = {}
    for form in FORMS:
        if form == "DDP around":
            model = nn.parallel.DistributedDataParallel(iw.convert(network(), S))
        elif form == "DDP inside":
            model = iw.convert(nn.parallel.DistributedDataParallel(network()), S)
        elif form == "convert, then FSDP":
            model = sharded(iw.convert(network(), S))
        else:
            model = iw.convert(sharded(network()), S, example_inputs=x if form.endswith("inputs") else None)
        if "FSDP" in form:
            # What ran while converting has left nothing unsharded: an optimizer gets what the model keeps.
            assert all(type(p).__name__ == "DTensor" for p in model.parameters()), form
            # and all of it runs on the axis
            assert not model._iw_conversion.one_by_one
        worst[form] = max(float((a - b).abs().max()) for a, b in zip(gradients(model, x, target), want, strict=True))
    torch.save(worst, os.path.join(folder, f"{rank}.pt"))
    del model
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
def test_gradients_over_ranks(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=WORLD)
    for rank in range(WORLD):
        worst = torch.load(tmp_path / f"{rank}.pt")
        assert set(worst) == set(FORMS)
        assert max(worst.values()) < 1e-6, worst


def test_copies_are_apart():
    """What ranks do not share, copies do not either: a deep copy trains by itself."""
    model = iw.convert(network(), S)
    twin = copy.deepcopy(model)
    x, target = torch.randn(B, 6), torch.randint(3, (B,))
    for a, b in zip(gradients(model, x, target), gradients(twin, x, target), strict=True):
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, b)
