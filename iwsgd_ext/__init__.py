"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""

from . import backend, functional
from .backend import backend_info, set_backend
from .conversion.audit import Audit, audit
from .conversion.convert import convert, revert
from .evaluation import plots
from .evaluation.bound_curve import BoundCurve, bound_curve
from .evaluation.predict import log_predictive, predict
from .layers.attention import IWMultiheadAttention, scaled_dot_product_attention
from .layers.checkpoint import checkpoint, checkpoint_contexts
from .layers.context import sampling
from .layers.drop_connect import IWDropConnect
from .layers.dropout import (
    IWAdaptiveDropout,
    IWAlphaDropout,
    IWDropout,
    IWDropout1d,
    IWDropout2d,
    IWDropout3d,
    IWDropPath,
    IWFeatureAlphaDropout,
)
from .layers.multinomial import IWMultinomialDropout
from .layers.real_noise import IWGaussianDropout, IWGaussianNoise, IWLaplaceNoise, IWUniformNoise
from .layers.recurrent import IWGRU, IWLSTM, IWRNN
from .ops.iw_cross_entropy import iw_cross_entropy
from .stats import IWStats, IWSummary
from .training.likelihood import IWLoss, iw_logmeanexp
from .training.logger import StatsLogger
from .training.loss import IWCrossEntropyLoss
from .training.strategies import backward

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
    "IWLaplaceNoise",
    "IWLoss",
    "IWMultiheadAttention",
    "IWMultinomialDropout",
    "IWStats",
    "IWSummary",
    "IWUniformNoise",
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
