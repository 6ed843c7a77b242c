"""Pictures: what is drawn, from what numbers, with which labels; and what happens without matplotlib."""

import builtins

import pytest
import torch

import iwsgd_ext as iw

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("agg")

CURVE = iw.BoundCurve(torch.arange(1, 9), -1 / torch.arange(1, 9).double() - 1, torch.full((8,), 0.1, dtype=torch.float64))


@pytest.fixture
def csv_file(tmp_path):
    path, criterion = tmp_path / "stats.csv", iw.IWCrossEntropyLoss(4)
    with iw.StatsLogger(criterion, path, every=1):
        for _ in range(5):
            criterion(3 * torch.randn(4 * 9, 7), torch.randint(7, (9,)))
    return path


def points(line):
    return [list(map(float, values)) for values in line.get_data()]


def band(ax):
    """The lower and upper edge at each x of the filled area."""
    edges = {}
    for x, y in ax.collections[0].get_paths()[0].vertices.tolist():
        edges.setdefault(x, []).append(y)
    return {x: (min(y), max(y)) for x, y in edges.items()}


def test_bound():
    ax = iw.plots.bound(CURVE)
    x, y = points(ax.lines[0])
    assert x == list(range(1, 9))
    assert y == pytest.approx(CURVE.bound.tolist())
    for samples, (low, high) in band(ax).items():
        assert (low, high) == pytest.approx((-1 / samples - 1.1, -1 / samples - 0.9))
    assert ax.get_xlabel() == "noise samples S"
    assert "nats" in ax.get_ylabel()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4", "8"]


def test_bound_of_one_sample():
    assert points(iw.BoundCurve(*(v[:1] for v in CURVE)).plot().lines[0]) == [[1], [-2]]


def test_weights():
    """Shares of all samples, in percent, at w * S."""
    w = torch.tensor([[1.05, 2.75], [1.05, 0.45], [1.05, 0.45], [1.05, 0.45]]) / 4  # in the middle of bars
    for given in (w, iw.IWStats(w, w, w[0])):
        ax = iw.plots.weights(given)
        heights = {round(float(p.get_x() + p.get_width() / 2), 2): p.get_height() for p in ax.patches if p.get_height() > 0}
        assert sum(heights.values()) == pytest.approx(100)
        assert heights == pytest.approx({0.45: 37.5, 1.05: 50.0, 2.75: 12.5})
        assert ax.get_xlim() == (0, 4)
        assert "S = 4" in ax.get_xlabel()


def test_effective_sample_size(csv_file):
    ax = iw.plots.effective_sample_size(csv_file)
    x, y = points(ax.lines[0])
    assert x == [1, 2, 3, 4, 5]
    rows = [line.split(",") for line in csv_file.read_text().splitlines()]
    column = rows[0].index("ess")
    assert y == [float(row[column]) for row in rows[1:]]
    assert all(low <= mean <= high for mean, (low, high) in zip(y, band(ax).values(), strict=True))
    assert ax.get_ylim()[0] == 1


def test_given_axes_and_files(tmp_path, csv_file):
    """Draws where it is told, leaves pyplot's state alone, and saves."""
    figure = matplotlib.figure.Figure()
    first, second, third = figure.subplots(1, 3)
    assert CURVE.plot(first) is first
    assert iw.plots.weights(torch.rand(4, 9), second) is second
    assert iw.plots.effective_sample_size(str(csv_file), third) is third
    figure.savefig(tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    original = builtins.__import__

    def imports(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", imports)
    with pytest.raises(ImportError, match=r"iwsgd_ext.plots needs matplotlib: pip install 'iwsgd_ext\[plots\]'"):
        CURVE.plot()


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"curve: expected a BoundCurve .*, got list"):
        iw.plots.bound([1, 2])
    for wrong in ([0.5], torch.ones(0), torch.tensor(1.0)):
        with pytest.raises(TypeError, match="stats: expected IWStats or a tensor of weights"):
            iw.plots.weights(wrong)
    for text in ("a,b\n1,2\n", "step,ess_p05\n", ""):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match="path: expected a CSV file of StatsLogger"):
            iw.plots.effective_sample_size(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError):
        iw.plots.effective_sample_size(tmp_path / "none.csv")
