"""Forward and backward of a whole model under S noise samples, by each provider: what the levels "layer" and "step" share."""

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, maybe_get_bdim
from torch.utils.flop_counter import FlopCounterMode

import iwsgd_ext as iw

from .case import BASELINE, Skip, Variant, on_backend

MORE_EXAMPLES = "plain dropout, S*B examples"  # the same number of rows through the network, without importance weights


@dataclasses.dataclass
class Inputs:
    """A model in training mode with nn.Dropout, a batch, and S; ``more`` is a batch of S*B other examples."""

    model: nn.Module
    x: Tensor  # [B, ...]
    y: Tensor  # [B] or [B, T]
    more: tuple[Tensor, Tensor]
    samples: int
    autocast: torch.dtype | None = None
    expand: str = "first"  # from where on the library's rows are [S*B, ...]
    step: bool = True  # the optimiser's step belongs to the work

    def small(self) -> tuple[Tensor, Tensor]:
        """A few short examples for checks."""
        x = self.x[:4].detach()
        return (x[:, :16], self.y[:4, :16]) if self.y.dim() == 2 else (x, self.y[:4])


Backward = Callable[[Tensor, Tensor], Tensor]  # x, y -> loss; gradients are in the parameters' .grad


def log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """[N, C] and [N], or [N, C, T] and [N, T] -> log p(y | logits) of each row [N]."""
    return -F.cross_entropy(logits, y, reduction="none").reshape(len(y), -1).sum(1)


def minus_bound(log_p: Tensor, y: Tensor) -> Tensor:
    """[S, B] -> minus the sum of the bound (eq 4) over the number of labels."""
    return -(torch.logsumexp(log_p, 0) - math.log(log_p.shape[0])).sum() / y.numel()


def repeat(x: Tensor, samples: int) -> Tensor:
    """Sample-major: row s*B + b."""
    return x.repeat(samples, *[1] * (x.dim() - 1))


def loop(model: nn.Module, i: Inputs) -> Backward:
    """The paper's Figure 1."""

    def backward(x: Tensor, y: Tensor) -> Tensor:
        loss = minus_bound(torch.stack([log_likelihood(model(x), y) for _ in range(i.samples)]), y)
        loss.backward()
        return loss

    return backward


def _expanded_loss(model: nn.Module, i: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        log_p = log_likelihood(model(repeat(x, i.samples)), repeat(y, i.samples))
        return minus_bound(log_p.view(i.samples, len(y)), y)

    return loss


def _backward_of(loss: Callable[[Tensor, Tensor], Tensor]) -> Backward:
    def backward(x: Tensor, y: Tensor) -> Tensor:
        value = loss(x, y)
        value.backward()
        return value

    return backward


def expanded(model: nn.Module, i: Inputs) -> Backward:
    return _backward_of(_expanded_loss(model, i))


def expanded_compiled(model: nn.Module, i: Inputs) -> Backward:
    return _backward_of(torch.compile(_expanded_loss(model, i)))


def authors(model: nn.Module, i: Inputs) -> Backward:
    """The code that the paper's first author published for CIFAR, in torch (docs/paper.md): the expanded batch, with weights from
    probabilities, which multiply the gradient of the mean cross-entropy. That mean, without weights, is the loss that it reports.
    """
    if i.y.dim() == 2:
        raise Skip("the authors' code weighs the probability of one label; that of a whole sequence underflows")

    def backward(x: Tensor, y: Tensor) -> Tensor:
        logits, target = model(repeat(x, i.samples)), repeat(y, i.samples)
        loss = F.cross_entropy(logits, target)
        p = torch.softmax(logits.detach(), 1).gather(1, target[:, None]).view(i.samples, len(y))
        weights = i.samples * p / (p.sum(0) + 1e-12)  # the mean has divided by S*B
        (dlogits,) = torch.autograd.grad(loss, logits)
        logits.backward(weights.view(-1, 1) * dlogits)
        return loss.detach()

    return backward


def vmapped(model: nn.Module, i: Inputs) -> Backward:
    each = torch.arange(i.samples, device=i.x.device)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        one = lambda _: log_likelihood(torch.func.functional_call(model, state, (x,)), y)  # noqa: E731
        return minus_bound(torch.vmap(one, randomness="different")(each), y)

    try:
        with torch.no_grad():
            loss(*i.small())
    except (RuntimeError, NotImplementedError) as error:
        raise Skip(f"torch.func.vmap cannot run this model: {_first_line(error)}") from None
    return _backward_of(loss)


def converted(compiled: bool = False, **options) -> Callable[[nn.Module, Inputs], Backward]:
    """The library, all samples at once: on the sample axis, or as ``options`` of ``iw.convert`` say."""

    def make(model: nn.Module, i: Inputs) -> Backward:
        model, criterion = iw.convert(model, i.samples, **options), iw.IWCrossEntropyLoss(i.samples)
        loss = lambda x, y: criterion(model(x), y)  # noqa: E731
        return _backward_of(torch.compile(loss) if compiled else loss)

    return make


def rows(compiled: bool = False, **options) -> Callable[[nn.Module, Inputs], Backward]:
    """The same on rows [S*B, ...], from where the architecture needs them unless ``options`` say."""
    # Checks of the suite stand in for the library's own of the first forward.
    return lambda model, i: converted(compiled, **{"expand": i.expand, "verify": False, **options})(model, i)


def strategy(name: str, **options) -> Callable[[nn.Module, Inputs], Backward]:
    """One of ``iw.backward``'s ways to pay for the samples."""

    def make(model: nn.Module, i: Inputs) -> Backward:
        model, criterion = iw.convert(model, i.samples), iw.IWCrossEntropyLoss(i.samples)

        def backward(x: Tensor, y: Tensor, seed: int | None = None) -> Tensor:
            return iw.backward(model, criterion, x, y, samples=i.samples, strategy=name, seed=seed, **options)

        try:
            iw.backward(copy.deepcopy(model), criterion, *i.small(), samples=i.samples, strategy=name, **options)
        except ValueError as error:  # iw.backward says which models a strategy cannot train
            raise Skip(_first_line(error)) from None
        return backward

    return make


def plain(model: nn.Module, i: Inputs) -> Backward:
    """Conventional dropout training on as many rows: S*B examples with one noise sample each."""

    def backward(x: Tensor, y: Tensor) -> Tensor:
        loss = -log_likelihood(model(x), y).sum() / y.numel()
        loss.backward()
        return loss

    return backward


def provider(make: Callable[[nn.Module, Inputs], Backward], check: str, more: bool = False) -> Callable[[Inputs], Variant]:
    """A provider from how it makes its backward pass, and which check its work is held to (see ``checks`` below)."""

    def variant(i: Inputs) -> Variant:
        model = copy.deepcopy(i.model)
        backward = make(model, i)
        x, y = i.more if more else (i.x, i.y)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9) if i.step else None
        inputs = x.detach().requires_grad_() if not i.step else x  # a layer passes its gradient on

        def pass_both() -> Tensor:
            for p in parameters:
                p.grad = None
            if not i.step:
                inputs.grad = None
            with torch.autocast(x.device.type, i.autocast or torch.bfloat16, enabled=i.autocast is not None):
                return backward(inputs, y)

        def run():
            pass_both()
            if optimizer is not None:
                optimizer.step()

        result = Variant(run, lambda: CHECKS[check](i, make, pass_both, parameters), memory=pass_both)
        result.leaves = [*parameters, *model.buffers(), inputs, y]
        if not check.startswith("statistics") and not any(isinstance(m, nn.RNNBase) for m in model.modules()):
            result.count_flops = lambda: _flops(pass_both)
        return result

    return variant


def _flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _Replay(nn.Module):
    """The noise that a provider drew, given again: x * keep / (1 - p)."""

    def __init__(self, keep: Tensor, p: float):
        super().__init__()
        self.keep, self.scale, self.sample = keep, 1 / (1 - p), None

    def forward(self, x: Tensor) -> Tensor:
        keep = self.keep if self.sample is None else self.keep.chunk(self.samples)[self.sample]
        return torch.where(keep, x * self.scale, torch.zeros((), dtype=x.dtype, device=x.device))


def dropouts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)}


def kept(out: Tensor) -> Tensor:
    """Where noise has let values through, in rows [S*B, ...].

    On the sample axis a hook sees one sample's tensor: its memory holds all samples in dimension 0, which are the rows, sample-major.
    """
    if is_batchedtensor(out):
        out = get_unwrapped(out).movedim(maybe_get_bdim(out), 0).flatten(0, 1)
    return out.detach() != 0


def record(model: nn.Module) -> dict[str, list[Tensor]]:
    """The masks that dropout layers draw from here on, a tensor of rows for each call."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in dropouts(model)}
    for name, module in dropouts(model).items():
        module.register_forward_hook(lambda _, __, out, name=name: drawn[name].append(kept(out)))
    return drawn


def check_by_replay(i: Inputs, make: Callable[[nn.Module, Inputs], Backward], each_sample: bool, reports_mean: bool = False) -> None:
    """Records the masks that a provider draws, and holds loss and gradients to the definition in float64 under these masks.

    ``each_sample``: the definition passes sample by sample, as the naive loop does; else over S*B rows at once. They differ where
    BatchNorm takes its statistics over a pass. ``reports_mean``: the gradients are those of the bound, but the loss that the provider
    returns is the unweighted mean over the samples.
    """
    x, y = i.small()
    model = copy.deepcopy(i.model)
    backward = make(model, i)
    drawn = record(model)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        loss = backward(x, y)
    exact = copy.deepcopy(i.model).double()
    replays = {name: _Replay(torch.cat(masks), i.model.get_submodule(name).p) for name, masks in drawn.items()}
    for name, replay in replays.items():
        assert len(replay.keep) == i.samples * len(x), f"{name} drew {len(replay.keep)} masks, expected {i.samples} * {len(x)}"
        replay.samples = i.samples
        exact.set_submodule(name, replay)
    x = x.double() if x.is_floating_point() else x
    if each_sample:
        each = []
        for s in range(i.samples):
            for replay in replays.values():
                replay.sample = s
            each.append(log_likelihood(exact(x), y))
        log_p = torch.stack(each)
    else:
        log_p = log_likelihood(exact(repeat(x, i.samples)), repeat(y, i.samples)).view(i.samples, len(y))
    bound = minus_bound(log_p, y)
    bound.backward()
    expected = -log_p.mean(0).sum() / y.numel() if reports_mean else bound
    assert abs(loss.item() - expected.item()) <= 1e-3 * abs(expected.item()), f"loss {loss.item():.6f}, in float64 {expected.item():.6f}"
    got = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    want = torch.cat([p.grad.flatten() for p in exact.parameters()])
    error = ((got - want).norm() / want.norm()).item()
    assert error <= 5e-3, f"gradient: relative error {error:.1e} against float64 with the same masks, allowed 5e-3"


def check_statistics(i: Inputs, pass_both: Callable[[], Tensor], parameters: list[Tensor], each_sample: bool, draws: int = 8) -> None:
    """For compiled and batched-by-vmap code, whose masks nobody sees: loss and size of the gradient, over several draws, are those of the
    naive loop (``each_sample``) or the expanded batch in eager torch (which are checked by replay), within 6 standard errors and 2%.
    """

    def sizes(run: Callable[[], Tensor], of: list[Tensor]) -> Tensor:
        found = []
        for _ in range(draws):
            loss = run()
            found.append([loss.item(), torch.stack([p.grad.float().norm() for p in of]).norm().item()])
        return torch.tensor(found, dtype=torch.float64)

    model = copy.deepcopy(i.model)
    backward = (loop if each_sample else expanded)(model, i)

    def eager() -> Tensor:
        model.zero_grad()
        with torch.autocast(i.x.device.type, i.autocast or torch.bfloat16, enabled=i.autocast is not None):
            return backward(i.x, i.y)

    got, want = sizes(pass_both, parameters), sizes(eager, list(model.parameters()))
    allowed = 6 * ((got.var(0) + want.var(0)) / draws).sqrt() + 0.02 * want.mean(0).abs()
    off = (got.mean(0) - want.mean(0)).abs()
    for k, name in enumerate(("loss", "gradient's norm")):
        expected = f"{'naive loop' if each_sample else 'expanded batch'} {want.mean(0)[k]:.5f} +- {allowed[k]:.5f}"
        assert off[k] <= allowed[k], f"{name}: mean over {draws} draws {got.mean(0)[k]:.5f}, {expected}"


def check_strategy(i: Inputs, make: Callable[[nn.Module, Inputs], Backward], gradient: bool) -> None:
    """The same seed gives the loss, and where nothing is resampled the gradients, of ``iw.backward``'s own loop over the samples."""
    x, y = i.small()
    results = []
    for form in (make, strategy("loop")):
        model = copy.deepcopy(i.model)
        loss = form(model, i)(x, y, seed=7)
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, got), (expected, want) = results
    assert abs(loss - expected) <= 1e-3 * abs(expected), f"loss {loss:.6f}, of the loop with the same seed {expected:.6f}"
    error = ((got - want).norm() / want.norm()).item()
    assert got.isfinite().all() and got.norm() > 0, "gradient is zero or not finite"
    assert not gradient or error <= 5e-3, f"gradient: relative error {error:.1e} against the loop with the same seed, allowed 5e-3"


CHECKS = {
    "each sample": lambda i, make, run, parameters: check_by_replay(i, make, each_sample=True),
    "joint": lambda i, make, run, parameters: check_by_replay(i, make, each_sample=False),
    "joint, unweighted loss": lambda i, make, run, parameters: check_by_replay(i, make, each_sample=False, reports_mean=True),
    "statistics": lambda i, make, run, parameters: check_statistics(i, run, parameters, each_sample=True),
    "statistics, joint": lambda i, make, run, parameters: check_statistics(i, run, parameters, each_sample=False),
    "strategy": lambda i, make, run, parameters: check_strategy(i, make, gradient=True),
    "resampled": lambda i, make, run, parameters: check_strategy(i, make, gradient=False),
    "plain": lambda i, make, run, parameters: check_by_replay(_single(i), make, each_sample=True),
}


def _single(i: Inputs) -> Inputs:
    return dataclasses.replace(i, samples=1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def providers(
    native: str, *, compiled: bool = True, few: bool = False, expand: str = "first", batch_norm: bool = False
) -> dict[str, Callable[[Inputs], Variant]]:
    """Who can train a model; ``native`` is the backend of the device, ``expand`` that of the inputs. ``few``: those that are of interest
    in a sweep. ``batch_norm``: the model has BatchNorm.
    """
    found = {BASELINE: provider(loop, "each sample"), "expanded batch": provider(expanded, "joint")}
    if compiled and not few:
        found["expanded batch, torch.compile"] = provider(expanded_compiled, "statistics, joint")
    if not few:
        found["authors' form"] = provider(authors, "joint, unweighted loss")
        found["torch.func.vmap"] = provider(vmapped, "statistics")
    ours = {f"iw {native}": provider(converted(), "each sample"), f"iw {native}, rows": provider(rows(), "each sample")}
    if not few and expand != "input":
        ours[f"iw {native}, rows at the input"] = provider(rows(expand="input"), "each sample")
    if not few and batch_norm:
        ours[f"iw {native}, rows, joint BatchNorm"] = provider(rows(batch_norm="joint"), "joint")
    if compiled and not few:
        ours[f"iw {native}, torch.compile"] = provider(converted(compiled=True), "statistics")
        ours[f"iw {native}, rows, torch.compile"] = provider(rows(compiled=True), "statistics")
    ours[f"iw {native}, streamed"] = provider(strategy("streamed", chunk=1), "strategy")
    ours[f"iw {native}, resampled"] = provider(strategy("resampled", keep=1), "resampled")
    if not few:
        ours[f"iw {native}, loop"] = provider(strategy("loop"), "strategy")
    found |= {name: on_backend(native, make) for name, make in ours.items()}
    if not few:
        found[MORE_EXAMPLES] = provider(plain, "plain", more=True)
    return found
