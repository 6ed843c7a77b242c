"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional
from .attention import IWMultiheadAttention, scaled_dot_product_attention
from .audit import Audit, audit
from .backend import backend_info, set_backend
from .convert import convert, revert
from .drop_connect import IWDropConnect
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
from .gaussian import IWGaussianDropout, IWGaussianNoise
from .iw_cross_entropy import IWCrossEntropyLoss, IWStats, iw_cross_entropy
from .likelihood import IWLoss, iw_logmeanexp
from .multinomial import IWMultinomialDropout
from .recurrent import IWGRU, IWLSTM, IWRNN
from .sampling import sampling
from .strategies import backward

__version__ = "0.1.0"

backend.load()

__all__ = [
    "IWGRU",
    "IWLSTM",
    "IWRNN",
    "Audit",
    "IWAdaptiveDropout",
    "IWAlphaDropout",
    "IWCrossEntropyLoss",
    "IWDropConnect",
    "IWDropPath",
    "IWDropout",
    "IWDropout1d",
    "IWDropout2d",
    "IWDropout3d",
    "IWFeatureAlphaDropout",
    "IWGaussianDropout",
    "IWGaussianNoise",
    "IWLoss",
    "IWMultiheadAttention",
    "IWMultinomialDropout",
    "IWStats",
    "audit",
    "backend_info",
    "backward",
    "convert",
    "functional",
    "iw_cross_entropy",
    "iw_logmeanexp",
    "revert",
    "sampling",
    "scaled_dot_product_attention",
    "set_backend",
]
