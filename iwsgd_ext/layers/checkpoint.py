"""Activation checkpointing: a recompute during backward draws the noise of its forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ..ops import transforms
from .context import _stack, current, graph_task


class _Replay:
    """The sampling context of the moment at which this is made: ``with`` puts it back, alone, in any thread and any number of times.

    Each block gets a copy, so that the streams of the context itself stay as they are.
    """

    def __init__(self, mode: Any = None):
        self.context = context = current()
        if context is not None:
            self.moment = context.moment()
        # The mode of the converted model that is running: functional dropout is noise of the context.
        self.mode = mode or next((mode for mode in reversed(_get_current_function_mode_stack()) if hasattr(mode, "unwatched")), None)

    def __enter__(self) -> None:
        block = ExitStack()
        _stack.suspended.append((_stack.contexts, _stack.task, block))
        _stack.contexts = [] if self.context is None else [self.context.again(self.moment)]
        _stack.task = graph_task()
        if self.context is not None and self.moment.axis is not None and not transforms.active():
            block.enter_context(self.moment.axis.again())
        if self.mode is not None and self.mode not in _get_current_function_mode_stack():
            block.enter_context(self.mode.unwatched())

    def __exit__(self, *error) -> None:
        _stack.contexts, _stack.task, block = _stack.suspended.pop()
        block.__exit__(*error)


class _Replayed:
    """A function whose second and later calls run under the sampling context of the first call."""

    def __init__(self, function: Callable):
        self.function = function
        self.recompute: _Recompute | None = None

    def __call__(self, *args, **kwargs) -> Any:
        if self.recompute is not None:
            return self.recompute(*args, **kwargs)
        self.recompute = _Recompute(self.function)
        return self.function(*args, **kwargs)


# NOTE [Plain checkpoints]
# A converted model may contain torch's own checkpoints (non-reentrant), which restore no sampling context; Hugging Face's and timm's models
# do. While such a checkpoint runs its forward, its hooks are the ones with which autograd packs saved tensors, and the pack hook holds the
# function that the checkpoint will call again.
def mend_running_checkpoint(mode: Any, around: tuple | None) -> None:
    """Puts this moment's sampling context, and ``mode``, around the recompute of the torch.utils.checkpoint whose forward is running.

    Nothing is done where none is running, or where its hooks are ``around`` the whole model: then the recompute calls the model, which
    opens its context by itself. NOTE [Plain checkpoints]
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack = hooks[0] if hooks is not None else None
    if around is not None and pack is around[0]:
        return
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return
    frame: Any = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True)).get("frame")
    frame = frame.cell_contents if frame is not None else None
    if hasattr(frame, "recompute_fn") and not isinstance(frame.recompute_fn, _Recompute):
        frame.recompute_fn = _Recompute(frame.recompute_fn, mode)


class _Recompute:
    """A function that is called under the sampling context of the moment at which this is made."""

    def __init__(self, function: Callable, mode: Any = None):
        self.function, self.replay = function, _Replay(mode)

    def __call__(self, *args, **kwargs) -> Any:
        with self.replay:
            return self.function(*args, **kwargs)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """:func:`torch.utils.checkpoint.checkpoint` for functions with noise layers: the recompute draws the same noise samples
    (Noh et al. 2017, eq 1).

    The sampling context (seed, stream, B, place of expansion) is saved at the call and put back while the function is computed
    again, in any thread. Streams after the call are not changed, and backward needs no context around it. This works in both forms of
    torch's checkpoint, nested, inside converted models, and outside of any context. Under torch.compile it breaks the graph, unless
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`` makes it a part of it; the noise is the same.

    Args:
        function: the function, or module, that backward computes again instead of keeping its activations.
        *args: its arguments.
        use_reentrant: True for torch's older form, where it is needed.
        **kwargs: as :func:`torch.utils.checkpoint.checkpoint`; ``context_fn`` is free for other uses.

    Returns:
        ``function(*args)``.

    Raises:
        As :func:`torch.utils.checkpoint.checkpoint`.

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), iw.IWDropout(0.5), torch.nn.Linear(8, 3))
        >>> with iw.sampling(5, seed=0):
        ...     y = iw.checkpoint(block, torch.ones(2, 4))
        >>> y.square().mean().backward()
        >>> y.shape
        torch.Size([10, 3])
    """
    return torch_checkpoint(_Replayed(function), *args, use_reentrant=use_reentrant, **kwargs)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` for code that calls torch.utils.checkpoint itself, with ``use_reentrant=False``: the recompute draws the same
    noise samples (Noh et al. 2017, eq 1).

    Hugging Face: ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": iw.checkpoint_contexts})``.

    Returns:
        (an empty context for the forward, the sampling context of this moment for the recompute).

    Example:
        >>> import torch, iwsgd_ext as iw
        >>> from torch.utils.checkpoint import checkpoint
        >>> drop = iw.IWDropout(0.5)
        >>> with iw.sampling(3, seed=0):
        ...     y = checkpoint(drop, torch.ones(2, 4, requires_grad=True), use_reentrant=False, context_fn=iw.checkpoint_contexts)
        >>> y.shape
        torch.Size([6, 4])
    """
    return nullcontext(), _Replay()
