"""Random networks (tests/random_networks.py) on the sample axis: exactly what each noise sample alone gives, or refused in plain words."""

import collections
import copy
import random
import warnings

import numpy as np
import pytest
import random_networks
import torch
from torch import Tensor

import iwsgd_ext as iw

CHUNK, NETWORKS = 25, 300
SEED = 5
# What is documented to be other than in a loop over samples (docs/swap.md, Pitfalls): state that a forward advances by values which no
# noise has touched, gradients that are no derivatives, BatchNorm's running statistics inside of checkpoints, memory shared with NumPy.
OTHERWISE = {
    *("ema_in_place", "ema_replaced", "steps", "spectral_norm", "checkpointed", "iw_checkpointed", "reentrant"),
    *("by_numpy", "numpy_noise", "python_noise", "function_with_rule"),
}
random_networks.OPS.update({name: (0.0, *random_networks.OPS[name][1:]) for name in OTHERWISE})  # never drawn


def tensors(value, name="output") -> dict[str, Tensor]:
    """Those of any output, by name."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif hasattr(value, "__slots__"):
        items = ((k, getattr(value, k)) for k in value.__slots__ if hasattr(value, k))
    else:
        items = vars(value).items() if hasattr(value, "__dict__") else ()
    return {k: v for key, inner in items for k, v in tensors(inner, f"{name}.{key}").items()}


def joined(each: list[Tensor], batch: int) -> Tensor:
    """Sample-major rows, in the dimension that holds the examples."""
    if each[0].dim() == 0:
        return torch.stack(each)
    shape = each[0].shape
    return torch.cat(each, 0 if shape[0] == batch else next((d for d, n in enumerate(shape[:-1]) if n == batch), 0))


def one_pass(model, inputs, samples, ids=None) -> dict[str, Tensor]:
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    context = iw.sampling(samples, seed=SEED, sample_ids=ids)
    context.torch_noise = "same"  # torch's own random numbers, so that they can be compared
    with context:
        return tensors(model(*inputs))


def loss_of(outputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return sum((x * weights[name]).sum() for name, x in outputs.items() if x.is_floating_point() and x.requires_grad)


def off(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or not got.is_floating_point():
        return got.shape != want.shape or not torch.equal(got, want)
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, (got - want).abs()).detach()
    return got.numel() > 0 and not error.max() <= 1e-9 * max(float(want.detach().abs().nan_to_num(0, 0, 0).max()), 1e-3)


def outcome(seed: int) -> str:
    """ "equal", "one by one", "refused", or "no model" where a sample alone raises, too."""
    model, inputs = random_networks.network(seed)
    samples, given, batch = (2, 3, 5)[seed % 3], seed % 2 == 0, len(inputs[0])
    twin = iw.convert(copy.deepcopy(model), samples)
    try:
        alone = [one_pass(twin, inputs, 1, [s]) for s in range(samples)]
    except Exception:
        return "no model"
    twin = iw.convert(copy.deepcopy(model), samples)  # whose state no pass has changed
    try:
        iw.convert(model, samples, example_inputs=inputs if given else None)
        together = one_pass(model, inputs, samples)
        alone = [one_pass(twin, inputs, 1, [s]) for s in range(samples)]
        assert together.keys() == alone[0].keys(), seed
        for name, x in together.items():
            assert not off(x, joined([each[name] for each in alone], batch)), f"{seed}: {name}"
        weights = [{name: torch.randn(x.shape, dtype=torch.float64) for name, x in alone[0].items()} for _ in alone]
        for each, w in zip(alone, weights, strict=True):
            if isinstance(loss := loss_of(each, w), Tensor):
                loss.backward()
        if isinstance(loss := loss_of(together, {name: joined([w[name] for w in weights], batch) for name in together}), Tensor):
            loss.backward()
    except (ValueError, RuntimeError) as error:
        return f"refused ({type(error).__name__})"
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        got, want = (torch.zeros_like(v) if v.grad is None else v.grad for v in (p, q))
        assert not off(got, want), f"{seed}: gradient of {name}"
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert not off(p, q), f"{seed}: buffer {name}"
    return "one by one" if iw.audit(model).one_by_one else "equal"


@pytest.mark.parametrize("chunk", [pytest.param(n, marks=[pytest.mark.slow] if n >= 4 else []) for n in range(NETWORKS // CHUNK)])
def test_random_networks(chunk):
    """Nothing is silently other than a sample alone; most is equal, and little is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collections.Counter(outcome(seed) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK))
    print(dict(found))
    refused = sum(n for name, n in found.items() if name.startswith("refused"))
    assert refused <= CHUNK // 5, found
