"""The network on which the strategies of ``iw.backward`` are compared, and the memory of a step under each of them.

Every sample costs a whole pass: noise stands at the input. With f for the cost of a forward of B rows and 2f for its backward, 8 samples
cost 24f batched, 31f streamed one by one, and 8f + 3f resampled with keep=1.
"""

from collections.abc import Callable

from torch import Tensor, nn

import iwsgd_ext as iw

from .measure import peak_memory

WIDTH, DEPTH, CLASSES = 512, 6, 10
STRATEGIES = {"batched": {}, "streamed": {"chunk": 1}, "resampled": {"keep": 1}, "loop": {}}


def network(width: int = WIDTH, depth: int = DEPTH) -> nn.Module:
    layers = [nn.Dropout(0.2)]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def step(model: nn.Module, x: Tensor, y: Tensor, samples: int, strategy: str, seed: int = 0, **options) -> Callable[[], Tensor]:
    """A call that computes loss and gradients of a converted model anew."""
    criterion = iw.IWCrossEntropyLoss(samples)

    def run() -> Tensor:
        model.zero_grad()
        return iw.backward(model, criterion, x, y, samples=samples, strategy=strategy, seed=seed, **options)

    return run


def memory(model: nn.Module, x: Tensor, y: Tensor, samples: int = 64) -> dict[str, int]:
    """Bytes of a step with one sample, and with ``samples`` under each strategy. Wanted: streamed at most 1.15 times one sample's."""
    runs = {"one sample": step(model, x, y, 1, "batched")}
    runs |= {name: step(model, x, y, samples, name, **options) for name, options in STRATEGIES.items()}
    found = {}
    for name, run in runs.items():
        run()  # so that what is made once, such as .grad, is there
        model.zero_grad()
        found[name] = peak_memory(run, x.device, list(model.parameters()))
    return found
