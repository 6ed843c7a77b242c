"""The backend that runs an op: plain PyTorch (``reference``), C++ (``cpu``), CUDA C++ (``cuda``), Triton (``triton``).

``IWSGD_BACKEND`` or :func:`set_backend` chooses one; else the fastest backend for a tensor's device runs. The noise is the same on all of
them. Every op is declared by :func:`define`, with its schema, and called through :func:`op`, which finds its implementation.

NOTE [Exported graphs]
torch.export records the ops that an autograd Function calls, but not the Function: a module made from the graph would train without their
gradients, in silence. So an exported graph gets other ops, ``torch.ops.iwsgd_graph``, which have a derivative and find their backend when
they run; :func:`apply` leaves the Function out. The same holds in a compiled vmap, where torch.compile traces no such Function. Elsewhere
Functions are used, because they cost less.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import transforms

PACKAGE = __package__  # this package's name, which differs where it is vendored
NAMES = ("reference", "cpu", "cuda", "triton")
NAMESPACES = ("iwsgd_ext", "iwsgd_triton")  # of torch.ops: C++ and CUDA kernels by the tensor's device; Triton kernels on any device
GRAPHS = "iwsgd_graph"  # NOTE [Exported graphs]
# Noise follows the order of memory, so the compiler must pass tensors with the strides that they have: exact strides.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LEAST_TRITON = (3, 6)
HOW_TO_GET = {
    "cpu": "it is built from source where a C++ compiler is found: pip install --no-build-isolation --force-reinstall --no-deps .",
    "cuda": "it is built from source where torch has CUDA and a fitting nvcc is found, or with IWSGD_CUDA=1: "
    "IWSGD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .",
    "triton": "torch's GPU builds for Linux bring triton along; else: pip install triton",
}

_forced: str | None = None
_ops: list[str] = []
_in_graphs: set[str] = set()  # names of the ops that have a form for graphs
_built: dict[str, bool | None] = {"reference": True, "cpu": False, "cuda": False, "triton": None}  # None: not looked for yet
_missing: dict[str, str] = {}  # name -> reason why a backend that could be there is missing
_triton_ops: dict[str, Callable] = {}
_triton_version = ""
_interpreting = False  # True where Triton interprets its kernels, on the CPU, in this process


def constant_in_graphs(function: Any) -> Any:
    """:func:`torch.compiler.assume_constant_result` without its import of the compiler, which takes longer than all of this package."""
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def is_exporting() -> bool:
    """:func:`torch.compiler.is_exporting` as a constant: torch 2.11 traces the call itself as True in code that torch.compile compiles."""
    return torch.compiler.is_exporting()


def define(
    name: str, schema: str, fake: Callable, derivative: Callable | None = None, keeps: int = 0, vmap: Callable | None = None
) -> None:
    """Declares an op of the library for every backend.

    Args:
        name, schema: of the op.
        fake: the function that gives the outputs for fake tensors.
        derivative: the function from (gradients of the outputs, the other arguments, the last ``keeps`` outputs), three tuples, to the
            gradient of the op's first argument. For graphs; ops of integers, and ops that change their arguments, have none.
        keeps: number of outputs that the derivative needs.
        vmap: the op's rule under torch.vmap in a graph, as :func:`torch.library.register_vmap` takes it.
    """
    _ops.append(name)
    for namespace in NAMESPACES:
        torch.library.define(f"{namespace}::{name}", schema, tags=TAGS)
        torch.library.register_fake(f"{namespace}::{name}", fake)
    torch.library.impl(f"iwsgd_triton::{name}", "CompositeExplicitAutograd", lambda *a: _in_triton(name)(*a))
    if derivative is not None or vmap is not None:
        _in_graphs.add(name)
        _define_for_graphs(f"{GRAPHS}::{name}", schema, fake, derivative, keeps)
        torch.library.impl(f"{GRAPHS}::{name}", "CompositeExplicitAutograd", lambda *a: _op_here(name, a[0].device)(*a))
        if vmap is not None:
            torch.library.register_vmap(f"{GRAPHS}::{name}", vmap)


def _define_for_graphs(name: str, schema: str, fake: Callable, derivative: Callable | None, keeps: int) -> None:
    torch.library.define(name, schema, tags=TAGS)
    torch.library.register_fake(name, fake)
    if derivative is None:
        return

    def setup(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.others = [None if isinstance(v, Tensor) else v for v in inputs[1:]]
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs[1:]), *outputs[len(outputs) - keeps :])

    def backward(ctx, *gradients):
        n = len(ctx.others)
        others = tuple(v if saved is None else saved for v, saved in zip(ctx.others, ctx.saved_tensors[:n], strict=True))
        return derivative(gradients, others, ctx.saved_tensors[n:]), *[None] * n

    torch.library.register_autograd(name, backward, setup_context=setup)


def op(name: str, device: torch.device) -> Callable:
    """The function that runs an op on tensors of ``device``; it takes the arguments of the schema."""
    if torch.compiler.is_compiling() and name in _in_graphs and in_graph():
        return getattr(torch.ops.iwsgd_graph, name).default
    return _op_here(name, device)


class _NoContext:
    """The ``ctx`` of an autograd Function's forward that is called alone, without a backward."""

    def __init__(self, arguments: tuple):
        self.needs_input_grad = [isinstance(v, Tensor) and v.requires_grad for v in arguments]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``. NOTE [Exported graphs]"""
    if in_graph():
        return function.forward(_NoContext(arguments), *arguments)
    if torch._C._are_functorch_transforms_active():
        return transforms.apply(function, arguments)
    return function.apply(*arguments)


def in_graph() -> bool:
    """True where code is traced that is to call the ops of :data:`GRAPHS`. NOTE [Exported graphs]"""
    return torch.compiler.is_compiling() and (is_exporting() or _transforms_traced())


@constant_in_graphs
def _transforms_traced() -> bool:
    return torch._C._are_functorch_transforms_active()


def _op_here(name: str, device: torch.device) -> Callable:
    chosen = backend_of(device)
    if chosen == "reference":
        return getattr(reference, name)
    return getattr(torch.ops.iwsgd_triton if chosen == "triton" else torch.ops.iwsgd_ext, name).default


def _in_triton(name: str) -> Callable:
    if not _has_triton():
        raise RuntimeError(f"backend 'triton' is not there: {_why_missing('triton')}")
    return _triton_ops[name]


def load() -> None:
    """Loads the compiled operators, if they were built. Called once, after the ops are declared."""
    found = sorted(Path(__file__).parent.glob("_ops*.so")) + sorted(Path(__file__).parent.glob("_ops*.dll"))
    if found:
        try:
            torch.ops.load_library(str(found[0]))
        except OSError as error:
            _missing["cpu"] = _missing["cuda"] = f"{found[0].name} could not be loaded: {error}"
    for name, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        _built[name] = all(torch._C._dispatch_has_kernel_for_dispatch_key(f"iwsgd_ext::{op}", key) for op in _ops)
    if os.environ.get("IWSGD_ISA") and _built["cpu"]:
        try:
            torch.ops.iwsgd_ext.iw_cross_entropy_scale_(torch.ones(1), torch.zeros(()))
        except RuntimeError:  # the kernel's message is lost on the way here
            isa = os.environ["IWSGD_ISA"]
            raise RuntimeError(f"IWSGD_ISA: expected one of baseline, avx2, avx512 that this machine has, got {isa!r}") from None
    if os.environ.get("IWSGD_BACKEND"):
        _force(os.environ["IWSGD_BACKEND"], "IWSGD_BACKEND")


@constant_in_graphs
def _has_triton() -> bool:
    """True where Triton's kernels are there. The first call imports them: import triton takes longer than all of this package."""
    if _built["triton"] is None:
        _built["triton"] = _load_triton()
    return bool(_built["triton"])


def _load_triton() -> bool:
    global _interpreting, _triton_version
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        import triton
    except Exception as error:  # a half-installed or foreign triton may raise anything
        _missing["triton"] = f"triton could not be imported: {type(error).__name__}: {error}"
        return False
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        _missing["triton"] = f"triton {triton.__version__} is too old: expected {least} or later; pip install --upgrade triton"
        return False
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction

    _triton_version = triton.__version__
    # Triton decides this for each function when it is defined, and for its own library when it is imported.
    _interpreting = isinstance(triton.language.sum, InterpretedFunction)
    if _interpreting != bool(knobs.runtime.interpret):
        now, before = ("set", "unset") if knobs.runtime.interpret else ("unset", "set")
        _missing["triton"] = (
            f"TRITON_INTERPRET is {now}, but was {before} when triton was imported: give it to the process from its start, "
            "TRITON_INTERPRET=1 python ..., or set it before torch, triton and iwsgd_ext are imported"
        )
        return False
    for name in ("iw_cross_entropy", "multinomial", "noise", "real_noise"):
        _triton_ops.update(importlib.import_module(f"{PACKAGE}.ops.triton.{name}").OPS)
    return True


def set_backend(name: str | None) -> None:
    """Makes every op of Noh et al. 2017 (noise, eq 1; loss, eq 4 to 8) run on one backend; ``None`` chooses by device again.

    Args:
        name: ``"reference"`` (plain PyTorch, any device), ``"cpu"``, ``"cuda"``, ``"triton"`` (GPUs; with TRITON_INTERPRET=1 the CPU
            too, slowly), or None.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend is not installed; the message says how to get it.

    Example:
        >>> import iwsgd_ext as iw
        >>> iw.set_backend("reference")
        >>> iw.set_backend(None)
    """
    _force(name, "name")


def _force(name: str | None, given: str) -> None:
    """Sets the backend of every op; ``given`` is the source of the name, for messages."""
    global _forced
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"{given}: expected one of {', '.join(NAMES)}{' or None' * (given == 'name')}, got {name!r}")
        if not (_has_triton() if name == "triton" else _built[name]):
            raise RuntimeError(f"backend {name!r} is not there: {_why_missing(name)}")
    _forced = name


def backend_of(device: torch.device) -> str:
    """The backend that runs tensors of ``device``."""
    kind = device.type
    if _forced is None:
        if kind in ("cpu", "cuda") and _built[kind]:
            return kind
        return "triton" if kind == "cuda" and _has_triton() else "reference"
    if _forced == "triton" and kind == "cpu" and not _interpreting:
        raise RuntimeError(
            "backend 'triton' was asked for, but the tensor is on cpu, where Triton only interprets: move it to a GPU, or "
            "iw.set_backend(None), or, to try the kernels without a GPU, start Python with TRITON_INTERPRET=1"
        )
    if _forced not in ("reference", "triton", kind):
        raise RuntimeError(f"backend {_forced!r} was asked for, but the tensor is on {kind}; move it, or iw.set_backend(None)")
    return _forced


def backend_info() -> dict[str, Any]:
    """The backends that run the ops of Noh et al. 2017 here, with reasons, to print or to put into a bug report.

    Returns:
        A dict with the keys ``forced`` (a name or None), ``cpu`` and ``cuda`` (the backend for tensors there, with the reason), ``built``
        (name -> bool), ``build`` (compiler, torch built against, CUDA architectures, instruction set), ``torch``, ``triton`` (its version,
        and if it interprets; or the reason why it is missing).

    Example:
        >>> import iwsgd_ext as iw
        >>> iw.backend_info()["built"]["reference"]
        True
    """
    built = {**_built, "triton": _has_triton()}
    info: dict[str, Any] = {"torch": torch.__version__, "triton": _triton_info(), "forced": _forced, "built": built}
    for kind in ("cpu", "cuda"):
        if _forced is not None:
            info[kind] = f"{_forced}: asked for by IWSGD_BACKEND or set_backend"
            continue
        info[kind] = f"{backend_of(torch.device(kind))}: {'built' if _built[kind] else _why_missing(kind)}"
        if kind == "cuda" and not torch.cuda.is_available():
            info[kind] += f"; not in use: this torch {'sees no GPU' if torch.backends.cuda.is_built() else 'is built without CUDA'}"
        elif _built[kind]:
            info[kind] += ", and the fastest here"
    info["build"] = _build_info()
    return info


def _build_info() -> dict[str, Any] | str:
    try:
        from . import _info  # type: ignore[attr-defined]  # compiled
    except ImportError as error:
        if _built["cpu"]:
            return f"not known: the operators are built, but the module that tells of their build is missing ({error})"
        return f"no native build: {error}"
    return _info.build_info()


def _triton_info() -> str:
    if not _built["triton"]:
        return _why_missing("triton")
    return _triton_version + (", interpreting (TRITON_INTERPRET=1)" if _interpreting else "")


def _why_missing(name: str) -> str:
    how, folder = _missing.get(name, HOW_TO_GET[name]), Path(__file__).parents[1]
    if name in ("cpu", "cuda") and name not in _missing and not _built["cpu"] and (folder / "setup.py").exists():
        how = f"Python has imported the sources in {folder}, not what pip installed: start it elsewhere, or make build there; else {how}"
    return f"the {name} kernels are not in this installation ({how})"
