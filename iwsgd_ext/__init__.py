"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional
from .backend import backend_info, set_backend
from .convert import convert, revert
from .dropout import (
    IWAdaptiveDropout,
    IWAlphaDropout,
    IWDropout,
    IWDropout1d,
    IWDropout2d,
    IWDropout3d,
    IWDropPath,
    IWFeatureAlphaDropout,
)
from .iw_cross_entropy import IWCrossEntropyLoss, IWStats, iw_cross_entropy
from .likelihood import IWLoss, iw_logmeanexp
from .sampling import sampling

__version__ = "0.1.0"

backend.load()

__all__ = [
    "IWAdaptiveDropout",
    "IWAlphaDropout",
    "IWCrossEntropyLoss",
    "IWDropPath",
    "IWDropout",
    "IWDropout1d",
    "IWDropout2d",
    "IWDropout3d",
    "IWFeatureAlphaDropout",
    "IWLoss",
    "IWStats",
    "backend_info",
    "convert",
    "functional",
    "iw_cross_entropy",
    "iw_logmeanexp",
    "revert",
    "sampling",
    "set_backend",
]
