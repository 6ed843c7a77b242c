"""The loss op, forward with gradient, beside F.cross_entropy on the same rows: eager, and under torch.compile.

The peers compute less: no importance weights, no log-likelihood of each sample.
"""

import torch
import torch.nn.functional as F

import iwsgd_ext as iw

from .measure import interleave

SAMPLES = 8
SIZES = [(131072, 10), (8192, 1000), (512, 32000)]


def run(rows: int, classes: int, seconds: float) -> list[dict]:
    torch.compiler.reset()
    logits = torch.randn(rows, classes).mul_(2).requires_grad_()
    half = logits.detach().bfloat16().requires_grad_()
    target = torch.randint(classes, (rows // SAMPLES,))
    repeated = target.repeat(SAMPLES)
    compiled = torch.compile(lambda z, y: F.cross_entropy(z, y))

    def ours(z):
        return torch.autograd.grad(iw.iw_cross_entropy(z, target, SAMPLES), z)[0]

    def check():
        """Equal weights make the loss F.cross_entropy's; the importance weighted gradient is checked by its definition."""
        mean = iw.iw_cross_entropy(logits, target, SAMPLES, alpha=0.0)
        torch.testing.assert_close(mean, F.cross_entropy(logits, repeated), rtol=1e-4, atol=1e-5)
        log_p = -F.cross_entropy(logits.double(), repeated, reduction="none")
        expected = torch.autograd.grad(-iw.iw_logmeanexp(log_p, SAMPLES).mean(), logits)[0]
        torch.testing.assert_close(ours(logits), expected, rtol=1e-3, atol=1e-8)

    check()
    t = interleave(
        {
            "ours": lambda: ours(logits),
            "eager": lambda: torch.autograd.grad(F.cross_entropy(logits, repeated), logits),
            "torch.compile": lambda: torch.autograd.grad(compiled(logits, repeated), logits),
            "ours, bf16": lambda: ours(half),
        },
        seconds,
    )

    def row(mine: str, other: str, wanted: float) -> dict:
        return {
            "op": "loss",
            "case": f"{rows}x{classes}, {'bf16' if 'bf16' in mine else 'fp32'}",
            "ours": t[mine].median,
            "other": t[other].median,
            "against": {"ours": "ours, fp32"}.get(other, f"F.cross_entropy, {other}"),
            "ratio": t[other].median / t[mine].median,
            "wanted": wanted,
            "rate": f"{rows * classes / t[mine].median / 1e9:.2f} G logits/s",
            "noisy": t[mine].noisy or t[other].noisy,
        }

    return [row("ours", "eager", 5.0), row("ours", "torch.compile", 1.6), row("ours, bf16", "ours", 1.0)]
