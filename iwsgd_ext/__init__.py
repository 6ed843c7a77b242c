"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional, plots
from .backend import backend_info, set_backend
from .checkpoint import checkpoint, checkpoint_contexts
from .convert import convert, revert
from .diagnostics import StatsLogger
from .dropout import IWDropout, IWDropout1d, IWDropout2d, IWDropout3d, IWDropPath
from .evaluation import BoundCurve, bound_curve, predict
from .iw_cross_entropy import IWCrossEntropyLoss, iw_cross_entropy
from .likelihood import IWLoss, iw_logmeanexp
from .sampling import sampling
from .stats import IWStats, IWSummary
from .strategies import backward

__version__ = "0.1.0"

backend.load()

__all__ = [
    "BoundCurve",
    "IWCrossEntropyLoss",
    "IWDropPath",
    "IWDropout",
    "IWDropout1d",
    "IWDropout2d",
    "IWDropout3d",
    "IWLoss",
    "IWStats",
    "IWSummary",
    "StatsLogger",
    "backend_info",
    "backward",
    "bound_curve",
    "checkpoint",
    "checkpoint_contexts",
    "convert",
    "functional",
    "iw_cross_entropy",
    "iw_logmeanexp",
    "plots",
    "predict",
    "revert",
    "sampling",
    "set_backend",
]
