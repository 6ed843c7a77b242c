"""What type checkers are told of the functions whose result depends on ``return_stats``."""

import inspect
import subprocess
import sys

import pytest

import iwsgd_ext as iw
from iwsgd_ext.ops import iw_cross_entropy as loss_op
from iwsgd_ext.training import strategies

OPTIONS = {
    "iw_cross_entropy": (iw.iw_cross_entropy, loss_op.Options, set()),
    "backward": (iw.backward, strategies.Options, {"samples"}),
}
SCRIPT = """
import torch
import iwsgd_ext as iw

z, y = torch.randn(8, 3), torch.zeros(4, dtype=torch.int64)
iw.iw_cross_entropy(z, y, 2, alpha=0.5).backward()
loss, stats = iw.iw_cross_entropy(z, y, 2, return_stats=True)
loss.backward()
stats.summary()
iw.backward(torch.nn.Linear(1, 1), iw.IWCrossEntropyLoss(2), z, y, samples=2, seed=1).item()
loss, stats = iw.backward(torch.nn.Linear(1, 1), iw.IWCrossEntropyLoss(2), z, y, samples=2, return_stats=True)
iw.iw_cross_entropy(z, y, 2, alfa=0.5)  # error
"""


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_function(name):
    function, options, others = OPTIONS[name]
    given = {p.name: p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(given) == {*options.__annotations__, "return_stats", *others}
    assert all(str(given[name]) == str(kind) for name, kind in options.__annotations__.items())


def test_a_type_checker_knows_the_result(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "script.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    lines = {line.split(":")[1] for line in told.splitlines() if ": error:" in line}
    assert lines == {str(1 + next(i for i, line in enumerate(SCRIPT.splitlines()) if line.endswith("# error")))}, told
