"""Which implementation runs an op: plain PyTorch (``reference``), C++ (``cpu``), CUDA C++ (``cuda``).

Chosen once, by ``IWSGD_BACKEND`` or :func:`set_backend`; otherwise the best that is built for a tensor's device. The noise is
the same on all of them.
"""

import os
from pathlib import Path

import torch

NAMES = ("reference", "cpu", "cuda")
# a backend has them all
OPS = ("noise", "noise_sum", "noise_out", "gaussian", "gaussian_sum", "multinomial", "iw_cross_entropy", "iw_cross_entropy_")
HOW_TO_BUILD = {
    "cpu": "it is built from source where a C++ compiler is found: pip install --no-build-isolation --force-reinstall --no-deps .",
    "cuda": "it is built from source where torch has CUDA and nvcc is found, or with IWSGD_CUDA=1: "
    "IWSGD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .",
}

_forced: str | None = None
_built: dict[str, bool] = {"reference": True, "cpu": False, "cuda": False}
_load_error: str | None = None


def load() -> None:
    """Loads the compiled operators, if they were built, and notes which device's kernels they hold. Once, after the schemas."""
    global _load_error
    found = sorted(Path(__file__).parent.glob("_ops*.so")) + sorted(Path(__file__).parent.glob("_ops*.dll"))
    if found:
        try:
            torch.ops.load_library(str(found[0]))
        except OSError as error:
            _load_error = f"{found[0].name} could not be loaded: {error}"
    for name, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        _built[name] = all(torch._C._dispatch_has_kernel_for_dispatch_key(f"iwsgd_ext::{op}", key) for op in OPS)
    if os.environ.get("IWSGD_ISA") and _built["cpu"]:
        backend_info()  # raises if this machine has none of that name; an error inside a kernel would lose its text
    if os.environ.get("IWSGD_BACKEND"):
        set_backend(os.environ["IWSGD_BACKEND"])


def set_backend(name: str | None) -> None:
    """Makes every op run on one backend; ``None`` goes back to choosing by device.

    Args:
        name: ``"reference"`` (plain PyTorch, any device), ``"cpu"``, ``"cuda"``, or None.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend is not built here; the message says how to get it.

    Example:
        >>> import iwsgd_ext as iw
        >>> iw.set_backend("reference")
        >>> iw.set_backend(None)
    """
    global _forced
    if name is not None:
        if name not in NAMES:
            raise ValueError(f"name: expected one of {', '.join(NAMES)} or None, got {name!r}")
        if not _built[name]:
            raise RuntimeError(f"backend {name!r} is not there: {_why_missing(name)}")
    _forced = name


def backend_of(device: torch.device) -> str:
    """The backend that runs tensors of ``device``."""
    kind = device.type
    if _forced is not None:
        if _forced != "reference" and _forced != kind:
            raise RuntimeError(f"backend {_forced!r} was asked for, but the tensor is on {kind}; move it, or iw.set_backend(None)")
        return _forced
    return kind if kind in ("cpu", "cuda") and _built[kind] else "reference"


def backend_info() -> dict:
    """What is in use and why, as a dict to print or to file with a bug report.

    Keys: ``forced`` (a name or None), ``cpu`` and ``cuda`` (the backend for tensors there, with the reason), ``built``
    (name -> bool), ``build`` (compiler, torch built against, CUDA architectures, instruction set), ``torch``.

    Example:
        >>> import iwsgd_ext as iw
        >>> iw.backend_info()["built"]["reference"]
        True
    """
    info = {"torch": torch.__version__, "forced": _forced, "built": dict(_built)}
    for kind in ("cpu", "cuda"):
        if _forced is not None:
            info[kind] = f"{_forced}: asked for by IWSGD_BACKEND or set_backend"
        elif _built[kind]:
            info[kind] = f"{kind}: built, and the fastest here"
        else:
            info[kind] = f"reference: {_why_missing(kind)}"
    try:
        from . import _info

        info["build"] = _info.build_info()
    except ImportError as error:
        info["build"] = f"no native build: {error}"
    return info


def _why_missing(name: str) -> str:
    return f"the {name} kernels are not in this installation ({_load_error or HOW_TO_BUILD[name]})"
