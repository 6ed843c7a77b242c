"""iw.backward's strategies beside each other: memory held for backward, and time of a step.

The network is one whose every sample costs a whole pass: noise stands at its input. With f for the cost of a forward of B rows and 2f for
its backward, S = 8 samples cost 24f batched, 31f streamed one by one, and 8f + 3f resampled with keep=1.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import iwsgd_ext as iw

from .measure import interleave

WIDTH, DEPTH, BATCH, CLASSES = 512, 6, 128, 10
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


class _Held:
    """A saved tensor, which tells when the graph lets go of it."""

    def __init__(self, tensor: Tensor, released: Callable[[int], None]):
        self.tensor, self.key, self.released = tensor, tensor.untyped_storage().data_ptr(), released

    def __del__(self):
        self.released(self.key)


def saved_bytes(run: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """The most bytes that graphs held for backward at one time during ``run``: each storage once, those of ``apart`` (parameters) not."""
    ours = {t.untyped_storage().data_ptr() for t in apart}
    held: dict[int, list[int]] = {}  # storage: how often it is held, its bytes
    now = most = 0

    def pack(tensor: Tensor) -> _Held:
        nonlocal now, most
        storage = tensor.untyped_storage()
        entry = held.setdefault(storage.data_ptr(), [0, 0 if storage.data_ptr() in ours else storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            now += entry[1]
            most = max(most, now)
        return _Held(tensor, release)

    def release(key: int) -> None:
        nonlocal now
        held[key][0] -= 1
        if held[key][0] == 0:
            now -= held.pop(key)[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        run()
    if now:
        raise RuntimeError(f"{now} bytes are held for backward after the step")
    return most


def peak_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Memory of a step beyond what is there before: by the allocator on a GPU, by the tensors saved for backward elsewhere."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return saved_bytes(run, model.parameters())
    run()
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def memory(model: nn.Module, x: Tensor, y: Tensor, samples: int = 64) -> dict[str, int]:
    """Bytes of a step with one sample, and with ``samples`` under each strategy. Wanted: streamed at most 1.15 times one sample's."""
    found = {"one sample": peak_bytes(step(model, x, y, 1, "batched"), model)}
    for strategy, options in STRATEGIES.items():
        found[strategy] = peak_bytes(step(model, x, y, samples, strategy, **options), model)
    return found


def times(model: nn.Module, x: Tensor, y: Tensor, samples: int = 8, seconds: float = 1.5) -> dict:
    """Times of a step under each strategy. Wanted: resampled at most half of batched."""
    reference = step(model, x, y, samples, "loop")().item()
    variants = {strategy: step(model, x, y, samples, strategy, **options) for strategy, options in STRATEGIES.items()}
    for strategy, run in variants.items():
        if abs(run().item() - reference) > 1e-3 * abs(reference):
            raise RuntimeError(f"{strategy} gives another loss than the loop: not timed")
    return interleave(variants, seconds)


def main() -> None:
    model = iw.convert(network(), 8, expand="first")
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    for name, size in memory(model, x, y).items():
        print(f"{name:<12}{size / 2**20:10.1f} MiB held for backward, S=64")
    for name, timing in times(model, x, y).items():
        print(f"{name:<12}{timing.median * 1e3:10.1f} ms a step, S=8")


if __name__ == "__main__":
    main()
