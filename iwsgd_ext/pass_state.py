"""What passes of one step share: buffers that a replay must not write, graphs that one backward goes through once, torch's generators."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Buffers:
    """Copies of a model's buffers as they are now. A replay writes them in the buffers' place: each as the first pass wrote its own."""

    def __init__(self, model: nn.Module):
        copies: dict[int, Tensor] = {}
        self.copies: dict[nn.Module, dict[str, Tensor]] = {}
        for module in model.modules():
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
            self.copies[module] = {name: copies[id(buffer)] for name, buffer in module._buffers.items() if buffer is not None}

    @contextmanager
    def used(self, modules: Sequence[nn.Module] | None = None):
        """The copies stand in all modules, or in those given."""
        owners = self.copies if modules is None else modules
        originals = [(m, name, m._buffers[name]) for m in owners for name in self.copies[m]]
        for module, name, _ in originals:
            module._buffers[name] = self.copies[module][name]
        try:
            yield
        finally:
            for module, name, buffer in originals:
                self.copies[module][name] = module._buffers[name]  # a model may have put another tensor there
                module._buffers[name] = buffer


class Leaves:
    """Stand-ins for tensors that a graph outside computed: that graph can be gone through once only, after the last pass."""

    def __init__(self):
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tree: Any) -> Any:
        def leaf(v: Any) -> Any:
            if not isinstance(v, Tensor) or not v.requires_grad:
                return v
            return self.pairs.setdefault(id(v), (v, v.detach().requires_grad_()))[1]

        return tree_map(leaf, tree)

    def pass_on(self) -> None:
        pairs = [(v, leaf.grad) for v, leaf in self.pairs.values() if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


class RandomState:
    """torch's generators, for noise that is not this package's: where a pass begins, so that a replay draws the same."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.states = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device is not None else [])]

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.device is not None:
            torch.cuda.set_rng_state(self.states[1], self.device)

    def is_current(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.states, self._now(), strict=True))
