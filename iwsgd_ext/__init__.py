"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional, plots
from .attention import IWMultiheadAttention, scaled_dot_product_attention
from .audit import Audit, audit
from .backend import backend_info, set_backend
from .checkpoint import checkpoint, checkpoint_contexts
from .convert import convert, revert
from .diagnostics import StatsLogger
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
from .evaluation import BoundCurve, bound_curve, log_predictive, predict
from .gaussian import IWGaussianDropout, IWGaussianNoise
from .iw_cross_entropy import iw_cross_entropy
from .iw_cross_entropy_loss import IWCrossEntropyLoss
from .likelihood import IWLoss, iw_logmeanexp
from .multinomial import IWMultinomialDropout
from .recurrent import IWGRU, IWLSTM, IWRNN
from .sampling import sampling
from .stats import IWStats, IWSummary
from .strategies import backward

__version__ = "0.1.0"

backend.load()

__all__ = [
    "IWGRU",
    "IWLSTM",
    "IWRNN",
    "Audit",
    "BoundCurve",
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
    "IWSummary",
    "StatsLogger",
    "audit",
    "backend_info",
    "backward",
    "bound_curve",
    "checkpoint",
    "checkpoint_contexts",
    "convert",
    "functional",
    "iw_cross_entropy",
    "iw_logmeanexp",
    "log_predictive",
    "plots",
    "predict",
    "revert",
    "sampling",
    "scaled_dot_product_attention",
    "set_backend",
]
