"""Measured things: cases of work, and for each provider the variant that does it. One provider is the baseline of all ratios."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import iwsgd_ext as iw

BASELINE = "naive loop"  # S passes of torch's own layers, a Python log-sum-exp: the paper's Figure 1
LEVELS = ("op", "layer", "step", "host")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Skip(Exception):
    """Something that cannot be measured here: a provider that is not installed, a size that does not fit. The message is the reason."""


@dataclass
class Variant:
    """One provider's way to do a case's work on inputs that are made already.

    Attributes:
        run: does the work once; this is what is timed.
        check: raises AssertionError where the work's results are wrong. A variant that fails it is not timed.
        bytes: what one run moves between memory and the processor, counted for this provider by the formula where it is given.
        before: done before each run, outside of the timed part (say, giving back inputs that a run destroys).
        backend: the backend of iwsgd_ext that the run needs; None leaves the choice to the library.
        memory: one run whose peak memory is measured, where that is not ``run``.
        leaves: tensors that are there before a run and are no part of its memory.
        count_flops: gives the operations of matrix products and convolutions in one run.
    """

    run: Callable[[], Any]
    check: Callable[[], None]
    bytes: int | None = None
    before: Callable[[], None] | None = None
    backend: str | None = None
    memory: Callable[[], Any] | None = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    count_flops: Callable[[], int] | None = None


@dataclass(frozen=True)
class Case:
    """A size of an op, a layer or a training step, and who does it.

    Attributes:
        level, op, size, work: its name; ``work`` is "forward", "backward", "forward+backward" or "step".
        samples, batch, classes: S, B and C.
        rank: importance. Cases of lower rank are measured first, for runs whose time is limited.
        setup: makes the inputs, random, once; called when the case's turn comes.
        providers: name -> function of the inputs that gives the variant, or raises Skip.
        need: bytes of memory that the case takes, roughly.
        fewest_bytes: what any implementation of the work must move, the inputs read once and the outputs written once.
        inner: calls in one timed run, for work that is shorter than the clock's grain.
        flush: whether caches are emptied before each run.
    """

    level: str
    op: str
    size: str
    work: str
    samples: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    rank: int
    setup: Callable[["Case"], Any]
    providers: dict[str, Callable[[Any], Variant]] = field(repr=False)
    classes: int | None = None
    need: int = 0
    fewest_bytes: int | None = None
    inner: int = 1
    flush: bool = True

    @property
    def name(self) -> str:
        return f"{self.op} {self.size} S={self.samples} {str(self.dtype)[6:]} {self.work}"

    def fields(self) -> dict[str, Any]:
        """The part of a result that names the case."""
        return {
            "level": self.level,
            "op": self.op,
            "size": self.size,
            "work": self.work,
            "samples": self.samples,
            "batch": self.batch,
            "classes": self.classes,
            "dtype": str(self.dtype)[6:],
            "device": self.device.type,
        }


KEY = ("level", "op", "size", "work", "samples", "dtype", "device", "threads")  # two results of one key and provider are comparable


@dataclass(frozen=True)
class Grid:
    """The scope of a run: sizes given by the user take the place of each module's own."""

    device: torch.device
    quick: bool = False
    samples: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    def samples_or(self, *own: int) -> tuple[int, ...]:
        return self.samples or own

    def classes_or(self, *own: int) -> tuple[int, ...]:
        return self.classes or own

    def dtypes_or(self, *own: torch.dtype) -> tuple[torch.dtype, ...]:
        return self.dtypes or own


def backends(device: torch.device) -> list[str]:
    """The backends that can run tensors of a device: the reference, and the kernels for it, built or not."""
    return ["reference", "cpu"] if device.type == "cpu" else ["reference", "cuda", "triton"]


def backend(name: str) -> str:
    """The name, if that backend is there."""
    built = iw.backend_info()["built"]
    if not built.get(name, False):
        before = iw.backend_info()["forced"]
        try:
            iw.set_backend(name)  # raises, and says why and how to get it
        except (ValueError, RuntimeError) as error:
            raise Skip(str(error)) from None
        finally:
            iw.set_backend(before)
    return name


def on_backend(name: str, make: Callable[[Any], Variant]) -> Callable[[Any], Variant]:
    """A provider's function for one backend of the library."""

    def provider(inputs: Any) -> Variant:
        backend(name)
        before = iw.backend_info()["forced"]
        iw.set_backend(name)
        try:
            variant = make(inputs)
        finally:
            iw.set_backend(before)
        variant.backend = name
        return variant

    return provider
