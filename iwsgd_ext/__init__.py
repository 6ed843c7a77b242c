"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional
from .backend import backend_info, set_backend
from .convert import convert, revert
from .dropout import IWDropout, IWDropout1d, IWDropout2d, IWDropout3d, IWDropPath
from .iw_cross_entropy import IWCrossEntropyLoss, IWStats, iw_cross_entropy
from .likelihood import IWLoss, iw_logmeanexp
from .sampling import sampling
from .strategies import backward

__version__ = "0.1.0"

backend.load()

__all__ = [
    "IWCrossEntropyLoss",
    "IWDropPath",
    "IWDropout",
    "IWDropout1d",
    "IWDropout2d",
    "IWDropout3d",
    "IWLoss",
    "IWStats",
    "backend_info",
    "backward",
    "convert",
    "functional",
    "iw_cross_entropy",
    "iw_logmeanexp",
    "revert",
    "sampling",
    "set_backend",
]
