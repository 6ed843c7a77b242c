"""The noise op: x [n] -> y [S, n] and back, beside copying and summing the same memory, and beside S calls of F.dropout."""

import torch
import torch.nn.functional as F

from iwsgd_ext.functional import dropout
from iwsgd_ext.noise import make_origin

from .measure import interleave

SAMPLES, ELEMENTS, P = 8, 4 << 20, 0.5


def run(dtype: torch.dtype, seconds: float) -> list[dict]:
    x = torch.randn(1, ELEMENTS).to(dtype)
    y = torch.empty(SAMPLES, ELEMENTS, dtype=dtype)
    dy = torch.randn(SAMPLES, ELEMENTS).to(dtype)
    dx = torch.empty(1, ELEMENTS, dtype=dtype)
    address = (make_origin(7, 0, 0, x.device), None, SAMPLES, 0, 0, ELEMENTS, 1, int(P * 65536), None, 1 / (1 - int(P * 65536) / 65536))

    def copy():
        for s in range(SAMPLES):
            y[s].copy_(x[0])

    def dropout_loop():
        for _ in range(SAMPLES):
            F.dropout(x, P)

    def add():
        torch.add(dy[0], dy[1], out=dx[0])
        for s in range(2, SAMPLES):
            dx[0].add_(dy[s])

    dropout(x, P, samples=SAMPLES, seed=7, out=y)
    kept = y != 0
    expected = (dy * kept).float().sum(0) * (1 / (1 - P))
    variants = {
        "forward": lambda: dropout(x, P, samples=SAMPLES, seed=7, out=y),
        "copy S times": copy,
        "F.dropout S times": dropout_loop,
        "backward": lambda: torch.ops.iwsgd_ext.noise_sum(dy.view(1, SAMPLES, -1), *address),
        "torch.sum": lambda: torch.sum(dy, 0, out=dx[0]),
        "adding one by one": add,
    }
    backward = variants["backward"]().view(-1).float()
    error = (backward - expected).abs().max().item()
    if not abs(kept.float().mean().item() - (1 - P)) < 1e-3 or error > 0.1 * expected.abs().max().item():
        raise RuntimeError("the noise op gives wrong values: not timed")
    t = interleave(variants, seconds)
    elements = SAMPLES * ELEMENTS

    def row(what: str, mine: str, other: str, wanted: float | None) -> dict:
        return {
            "op": "noise",
            "case": f"{what}, x[4M], S=8, {str(dtype)[6:]}",
            "ours": t[mine].median,
            "other": t[other].median,
            "against": other,
            "ratio": t[other].median / t[mine].median,
            "wanted": wanted,
            "rate": f"{elements / t[mine].median / 1e9:.2f} G elements/s",
            "noisy": t[mine].noisy or t[other].noisy,
        }

    fp32 = dtype == torch.float32
    return [
        row("forward", "forward", "copy S times", 0.85 if fp32 else None),
        row("forward", "forward", "F.dropout S times", 12.0 if fp32 else None),
        row("backward", "backward", "torch.sum", 0.85 if fp32 else None),
        row("backward", "backward", "adding one by one", None),
    ]
