"""A program that uses every public name, with the types that a type checker must see. `make lint` checks it with mypy --strict; it is
never run.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import iwsgd_ext as iw
from iwsgd_ext import functional

x, z, y = torch.randn(4, 6), torch.randn(8, 3), torch.zeros(4, dtype=torch.int64)
image, model = torch.randn(4, 2, 3), nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))

# Noise at a given address
for form in (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.drop_path):
    assert_type(form(x, 0.5, samples=2, seed=7, stream=1, sample_ids=[0, 1], first_example=3, expand=True, batch_dim=0, out=None), Tensor)
assert_type(functional.alpha_dropout(x, 0.5, seed=7), Tensor)
assert_type(functional.feature_alpha_dropout(image, 0.5, seed=torch.tensor(7)), Tensor)
assert_type(functional.gaussian_dropout(x, 0.5, samples=2, seed=7), Tensor)
assert_type(functional.gaussian_noise(x, 0.1, samples=2, seed=7), Tensor)
assert_type(functional.laplace_noise(x, 0.1, samples=2, seed=7), Tensor)
assert_type(functional.uniform_noise(x, 0.1, samples=2, seed=7), Tensor)
assert_type(functional.multinomial_dropout(x, None, 3, samples=2, seed=7), Tensor)
assert_type(functional.scaled_dot_product_attention(image, image, image, dropout_p=0.1, samples=2, seed=7), Tensor)
assert_type(functional.drop_connect(x, torch.randn(3, 6), samples=2, seed=7), Tensor)
functional.dropout(x, 0.5)  # type: ignore[call-arg]  # without a seed
functional.dropout(x, 0.5, seed=7, sample=2)  # type: ignore[call-arg]

# Layers and their context
layers: list[nn.Module] = [
    iw.IWDropout(0.5),
    iw.IWDropout1d(0.5),
    iw.IWDropout2d(0.5),
    iw.IWDropout3d(0.5),
    iw.IWDropPath(0.5),
    iw.IWAdaptiveDropout(),
    iw.IWAlphaDropout(0.5),
    iw.IWFeatureAlphaDropout(0.5, batch_dim=1),
    iw.IWGaussianDropout(0.5),
    iw.IWGaussianNoise(0.1),
    iw.IWLaplaceNoise(0.1),
    iw.IWUniformNoise(0.1),
    iw.IWMultinomialDropout(0.5, probabilities="evolutional"),
    iw.IWDropConnect.from_linear(nn.Linear(6, 3), p=0.2),
    iw.IWMultiheadAttention(8, 2, dropout=0.1, batch_first=True),
    iw.IWLSTM(6, 3, num_layers=2, dropout=0.3, locked=True),
    iw.IWGRU(6, 3),
    iw.IWRNN(6, 3),
]
with iw.sampling(2, seed=7, sample_ids=[0, 1], first_example=0, expand="first", batch_dim=0) as context:
    assert_type(context, iw.sampling)
    assert_type(iw.IWDropout(0.5).forward(x), Tensor)
    assert_type(iw.scaled_dot_product_attention(image, image, image, dropout_p=0.1), Tensor)
    iw.checkpoint(model, x, use_reentrant=False)
    iw.checkpoint_contexts()

# Conversion keeps the model's own type
assert_type(iw.convert(model, 2, expand="axis", example_inputs=x, batch_norm="per_sample", one_by_one=["1"], strict=True), nn.Sequential)
assert_type(iw.revert(model), nn.Sequential)
audit = iw.audit(model, x, gradients=True)
assert_type(audit, iw.Audit)
assert_type(audit.complete, bool)

# Losses
assert_type(iw.iw_cross_entropy(z, y, 2, alpha=0.5), Tensor)
assert_type(iw.iw_cross_entropy(z, y, 2, return_stats=True), tuple[Tensor, iw.IWStats])
iw.iw_cross_entropy(z, y, 2, alfa=0.5)  # type: ignore[call-overload]
assert_type(iw.iw_logmeanexp(torch.randn(2, 4), 2), Tensor)
criterion = iw.IWCrossEntropyLoss(2, reduction="mean", level="example")
assert_type(iw.IWLoss(nn.BCEWithLogitsLoss(reduction="none"), 2).forward(z, y), Tensor | tuple[Tensor, iw.IWStats])
assert_type(iw.backward(model, criterion, x, y, samples=2, strategy="streamed", chunk=1, seed=1), Tensor)
loss, stats = iw.backward(model, criterion, x, y, samples=2, return_stats=True)
assert_type(stats.summary(), iw.IWSummary)
assert_type(stats.summary().ess, Tensor)
with iw.StatsLogger(criterion, "stats.csv", every=5) as logger:
    assert_type(logger, iw.StatsLogger)

# Evaluation
assert_type(iw.predict(model, x, samples=2, chunk=1), Tensor)
assert_type(iw.log_predictive(z, 4), Tensor)
curve = iw.bound_curve(model, [(x, y)], samples=2)
assert_type(curve, iw.BoundCurve)
assert_type(curve.bound, Tensor)
iw.plots.bound(curve)
iw.plots.weights(stats)
iw.plots.effective_sample_size("stats.csv")

assert_type(iw.backend_info(), dict[str, Any])
iw.set_backend("reference")
