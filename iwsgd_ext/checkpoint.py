"""Activation checkpointing: a recompute during backward draws the noise of its forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .functional_dropout import FunctionalDropout
from .sampling import _stack, current, graph_task


class _Replay:
    """The sampling context as it was when this was made, for any number of recomputes: ``with`` puts it back, alone, in any thread.

    A recompute takes a copy: the streams of the context itself are not disturbed.
    """

    def __init__(self):
        self.context = context = current()
        if context is not None:
            self.moment = context.moment()
        # Whether a converted model is running that makes functional dropout noise of the context.
        self.functional = any(isinstance(mode, FunctionalDropout) for mode in _get_current_function_mode_stack())

    def __enter__(self) -> None:
        mode = FunctionalDropout() if self.functional else None
        _stack.suspended.append((_stack.contexts, _stack.task, mode))
        _stack.contexts = [] if self.context is None else [self.context.again(*self.moment)]
        _stack.task = graph_task()
        if mode is not None:
            mode.context = current()
            mode.__enter__()

    def __exit__(self, *_) -> None:
        _stack.contexts, _stack.task, mode = _stack.suspended.pop()
        if mode is not None:
            mode.__exit__(None, None, None)


class _Replayed:
    """A function whose later calls run under the sampling context of its first."""

    def __init__(self, function: Callable):
        self.function = function
        self.replay: _Replay | None = None

    def __call__(self, *args, **kwargs) -> Any:
        if self.replay is None:
            self.replay = _Replay()
            return self.function(*args, **kwargs)
        with self.replay:
            return self.function(*args, **kwargs)


def checkpoint(function: Callable, *args, use_reentrant: bool = False, **kwargs) -> Any:
    """:func:`torch.utils.checkpoint.checkpoint` for functions with noise layers: the recompute draws the same noise.

    The sampling context (seed, stream, B, place of expansion) is saved at the call and put back while the function is computed
    again, in whichever thread that is. Streams after the call are not disturbed, and backward needs no context around it.
    Works in both forms, nested, inside converted models, and outside of any context. Under torch.compile it breaks the graph, unless
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`` lets it be a part of it; the noise is the same.

    Args:
        function: what to compute again in backward instead of keeping its activations; a module, say.
        *args: its arguments.
        use_reentrant: torch's older form, where it is needed.
        **kwargs: as :func:`torch.utils.checkpoint.checkpoint`; ``context_fn`` is free for other uses.

    Returns:
        ``function(*args)``.

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


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For code that calls torch.utils.checkpoint itself: ``context_fn=iw.checkpoint_contexts``, with ``use_reentrant=False``.

    Hugging Face: ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": iw.checkpoint_contexts})``.

    Returns:
        The contexts of the forward (nothing) and of the recompute (this moment's sampling context).

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
