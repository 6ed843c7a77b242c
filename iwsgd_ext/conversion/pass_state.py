"""State that several passes of one step share: buffers, which a replay must not write, graphs, which allow one backward, and generators."""

import random
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map


class Buffers:
    """Copies of a model's buffers as they are now. A replay writes into the copies, as the first pass wrote into the buffers."""

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
        """A block in which the modules given, or all of the model's, have the copies as their buffers."""
        owners = self.copies if modules is None else modules
        originals = [(m, name, m._buffers[name]) for m in owners for name in self.copies[m]]
        for module, name, _ in originals:
            module._buffers[name] = self.copies[module][name]
        try:
            yield
        finally:
            for module, name, buffer in originals:
                self.copies[module][name] = module._buffers[name]  # a forward may have replaced the buffer
                module._buffers[name] = buffer


class Leaves:
    """Detached stand-ins for tensors that a graph outside of the passes computed: its backward can run once, after the last pass."""

    def __init__(self):
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tree: Any) -> Any:
        """The tree with stand-ins for its tensors that require grad."""

        def leaf(v: Any) -> Any:
            if not isinstance(v, Tensor) or not v.requires_grad:
                return v
            return self.pairs.setdefault(id(v), (v, v.detach().requires_grad_()))[1]

        return tree_map(leaf, tree)

    def pass_on(self) -> None:
        """Runs the backward of the graph outside, from the gradients that the stand-ins have."""
        pairs = [(v, leaf.grad) for v, leaf in self.pairs.values() if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


class RandomState:
    """The states of torch's, NumPy's and Python's generators at the start of a pass, so that a replay draws the same numbers of theirs."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.states = self._now()

    @classmethod
    def of(cls, model: nn.Module) -> "RandomState":
        """The states now, with those of the model's device."""
        tensors = (*model.parameters(), *model.buffers())
        return cls(next((v.device for v in tensors if v.device.type == "cuda"), torch.device("cpu")))

    def _now(self) -> list[Tensor]:
        states = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
        return states if self.device is None else [torch.cuda.get_rng_state(self.device), *states]

    def restore(self) -> None:
        *cuda, cpu, python, numpy_ = self.states
        if cuda:
            torch.cuda.set_rng_state(*cuda, self.device)
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy_)

    def is_current(self) -> bool:
        return not self.moved()

    def moved(self) -> list[str]:
        """The generators that have given numbers since, of "torch", "Python" and "NumPy"."""
        (*torches, python, numpy_), (*torches_now, python_now, numpy_now) = self.states, self._now()
        same = {
            "torch": all(torch.equal(a, b) for a, b in zip(torches, torches_now, strict=True)),
            "Python": python == python_now,
            "NumPy": np.array_equal(numpy_[1], numpy_now[1]) and numpy_[2:] == numpy_now[2:],
        }
        return [name for name, unmoved in same.items() if not unmoved]


class Snapshot:
    """A copy of the state that a forward and a backward may change: attributes of modules, their lists and dicts, buffers, gradients,
    inputs, and random generators. :meth:`restore` puts it back, any number of times."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any] = ()):
        self.inputs = [(v, v.detach().clone()) for v in inputs if isinstance(v, Tensor) and not v.is_inference()]
        self.modules = [(m, dict(vars(m)), _copied(vars(m))) for m in model.modules()]
        self.buffers = [(b, b._version, b.clone()) for b in model.buffers()]
        self.buffers += [(v, v._version, v.detach().clone()) for v in self.kept() if not v.is_inference() and v.layout == torch.strided]
        self.gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.random = RandomState.of(model)

    def kept(self) -> list[Tensor]:
        """The tensors that modules hold as attributes, and in lists, dicts and sets among these."""
        values = [v for _, attributes, _ in self.modules for v in attributes.values()]
        tables = ("_parameters", "_buffers", "_modules")
        contents = [c for *_, contents in self.modules for name, c in contents.items() if name not in tables]
        values += [v for c in contents for v in (c.values() if isinstance(c, dict) else c)]
        return [v for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]

    def written(self, model: nn.Module) -> list[str]:
        """The names of the buffers, other than BatchNorm's, that were written since."""
        versions = {id(buffer): version for buffer, version, _ in self.buffers}
        norms = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m._buffers.values()}
        return [n for n, b in model.named_buffers() if id(b) not in norms and not b.is_inference() and versions.get(id(b)) != b._version]

    def restore(self) -> None:
        self.random.restore()
        for module, attributes, contents in self.modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                holder = attributes[name]
                holder.clear()
                holder.extend(content) if isinstance(holder, list) else holder.update(content)
        for v, values in self.inputs:
            if not torch.equal(v.detach(), values):
                v.data.copy_(values)
        with torch.no_grad():
            for buffer, version, values in self.buffers:
                # F.batch_norm writes running statistics without counting a version; a write by .data counts none either, so that graphs
                # that saved them stay valid.
                if buffer._version != version or buffer.is_inference() or not torch.equal(buffer, values):
                    buffer.data.copy_(values)
            for parameter, gradient, values in self.gradients:
                parameter.grad = gradient
                if gradient is not None:
                    gradient.copy_(values)


def _copied(attributes: dict) -> dict:
    """Shallow copies of the containers among attributes: modules' tables, and lists, dicts and sets of their own. Not of the table of
    parameters, which FSDP changes by itself."""
    containers = {name: v for name, v in attributes.items() if name != "_parameters" and (isinstance(v, dict) or type(v) in (list, set))}
    return {name: list(v) if isinstance(v, list) else dict(v) if isinstance(v, dict) else set(v) for name, v in containers.items()}
