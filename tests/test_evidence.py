"""The comparison of methods over seeds and rates: against numbers worked out by hand, and the published page against its runs."""

import csv
import math
import re
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from recipes.evidence import best_table, block, chosen, holm, paired, picture, rate_table, read, tables, weights_table

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("error", "nll", "ece", "ess", "ensemble_nll")
PAGE = ROOT / "docs" / "evidence.md"
NAMES = re.findall(r"<!-- end of (\S+) -->", PAGE.read_text()) if PAGE.exists() else []


def runs_csv(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "samples", "alpha", "rate", "epochs", "seed", *METRICS])
        writer.writerows(lines)
    return path


@pytest.fixture
def runs(tmp_path):
    """Two methods, two rates, three seeds; NLL by hand."""
    nll = {
        (1, 0.3): [1.0, 1.2, 1.1], (1, 0.5): [0.9, 1.3, 1.25],
        (8, 0.3): [0.8, 0.9, 1.0], (8, 0.5): [0.7, 0.85, 0.8],
    }  # fmt: skip
    lines = [["x", s, 1, p, 50, i, 10 * v, v, 1.5, s, v / 2] for (s, p), values in nll.items() for i, v in enumerate(values)]
    return read([runs_csv(tmp_path / "runs.csv", lines)])


def test_no_seed_chooses_its_own_rate(runs):
    """Means of S=1 at the two rates: 1.15 and 1.275 without seed 0, 1.05 and 1.075 without 1, 1.1 and 1.1 without 2 (the first)."""
    one, eight = runs.methods
    values, rates = chosen(runs, one, "nll")
    assert rates == [0.3, 0.3, 0.3] and values == [1.0, 1.2, 1.1]
    values, rates = chosen(runs, eight, "error")
    assert rates == [0.5, 0.5, 0.5] and values == pytest.approx([7.0, 8.5, 8.0])


def test_a_diverged_run_is_not_chosen(tmp_path):
    lines = [
        ["x", 1, 1, p, 50, i, 1, v, 1, 1, 1] for p, values in ((0.3, [2, 2, 2]), (0.5, [1, float("nan"), 1])) for i, v in enumerate(values)
    ]
    runs = read([runs_csv(tmp_path / "runs.csv", lines)])
    assert chosen(runs, runs.methods[0], "nll")[1] == [0.3, 0.5, 0.3]


def test_paired_test_by_hand():
    """Differences -0.2, -0.3, -0.1: mean -0.2, standard error 0.1/sqrt(3), t = -3.4641 with 2 degrees of freedom."""
    mean, error, p = paired([0.8, 0.9, 1.0], [1.0, 1.2, 1.1])
    assert (mean, error) == pytest.approx((-0.2, 0.1 / 3**0.5)) and p == pytest.approx(0.0742, abs=1e-4)
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0)


def test_holm_by_hand():
    """0.01 <= 0.05/4, 0.015 <= 0.05/3, 0.04 > 0.05/2: the two least are significant, and none after a failure."""
    assert holm([0.04, 0.01, 0.045, 0.015]) == [False, True, False, True]
    assert holm([0.02, 0.03, 0.04]) == [False, False, False]
    assert holm([]) == []


def test_tables(runs):
    """Differences -0.3, -0.35, -0.3: mean -0.3167, standard error 0.0167, p = 0.003; there is one test in each column."""
    text = best_table(runs)
    assert "| method | test NLL (p) | against dropout | test error % (p) | against dropout |" in text
    assert "| dropout (S=1) | 1.1000 (0.3) |  | 11.00 (0.3) |  | 0.5500 (0.3) |  |" in text
    assert "| IWSGD S=8 | 0.7833 (0.5) | -0.3167 ± 0.0167* | 7.83 (0.5) | -3.17 ± 0.17* |" in text
    text = rate_table(runs, "nll", 3)
    assert text.splitlines()[0] == "| method | p=0.3 | p=0.5 |"
    assert "| IWSGD S=8 | **0.900** | **0.783** |" in text and "| dropout (S=1) | 1.100 | 1.150 |" in text


def test_weights_are_compared_with_equal_ones_of_the_same_samples(tmp_path):
    values = {(1, 1): [9, 9], (2, 0): [1.0, 2.0], (2, 1): [2.0, 3.5], (4, 0): [5.0, 5.0], (4, 1): [4.0, 5.0]}
    lines = [["x", s, a, 0.3, 50, i, v, v, v, v, v] for (s, a), of_seed in values.items() for i, v in enumerate(of_seed)]
    text = weights_table(read([runs_csv(tmp_path / "runs.csv", lines)]))
    assert "| IWSGD S=2 | +1.2500 ± 0.2500 |" in text and "| IWSGD S=4 | -0.5000 ± 0.5000 |" in text and text.count("\n") == 3


def test_longer_runs_are_methods_of_their_own(tmp_path):
    lines = [["x", 1, 1, 0.3, epochs, seed, 1, 1 + seed, 1, 1, 1] for epochs in (50, 200) for seed in range(2)]
    assert [m.name for m in read([runs_csv(tmp_path / "runs.csv", lines)]).methods] == ["dropout (S=1)", "dropout (S=1), 4x steps"]


def test_other_seeds_are_refused(tmp_path):
    lines = [["x", s, 1, 0.3, 50, seed, 1, 1, 1, 1, 1] for s, seeds in ((1, 2), (4, 3)) for seed in range(seeds)]
    with pytest.raises(ValueError, match="expected the same seeds for all methods and rates"):
        read([runs_csv(tmp_path / "runs.csv", lines)])


COLUMNS = "method,samples,alpha,rate,epochs,seed,error,nll,ece,ess,ensemble_nll"


def written(tmp_path, *runs):
    """A runs.csv; a run is (samples, epochs, rate, seed, value of all metrics)."""
    lines = [f"a method,{s},1,{p},{epochs},{seed},{v},{v},{v},{v},{v}" for s, epochs, p, seed, v in runs]
    (tmp_path / "runs.csv").write_text("\n".join([COLUMNS, *lines, ""]))
    return [tmp_path / "runs.csv"]


def dropout(*values, epochs=8, rate=0.3):
    return [(1, epochs, rate, seed, v) for seed, v in enumerate(values)]


def test_holm_against_closed_testing():
    """A test is significant where Bonferroni refuses every set of hypotheses with it."""

    def closed(p, level=0.05):
        def refused(chosen):
            return min(p[i] for i in chosen) <= level / len(chosen)

        sets = [s for size in range(1, len(p) + 1) for s in combinations(range(len(p)), size)]
        return [all(refused(s) for s in sets if i in s) for i in range(len(p))]

    places = (0.001, 0.012, 0.016, 0.02, 0.03, 0.05, 0.4)
    for size in (1, 2, 3, 4):
        for p in combinations(places, size):
            assert holm(list(p)) == closed(p) and holm(list(p[::-1])) == closed(p[::-1])


def test_a_p_value_that_is_nan_is_not_significant():
    assert holm([math.nan]) == [False] and holm([0.4, math.nan, 0.001]) == [False, False, True]


def test_paired_against_its_formula():
    mean, error, p = paired([1.0, 3.0, 2.5], [0.5, 1.0, 1.5])
    assert mean == pytest.approx(7 / 6) and error == pytest.approx(math.sqrt(7 / 12) / math.sqrt(3))
    t = mean / error  # Student's distribution with 2 degrees of freedom has a formula
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_run_that_diverged_is_no_evidence(tmp_path):
    text = tables(read(written(tmp_path, *dropout(1.0, 2.0, 3.0), (4, 8, 0.3, 0, 1.0), (4, 8, 0.3, 1, "nan"), (4, 8, 0.3, 2, 2.0))))
    row = next(line for line in text.splitlines() if line.startswith("| IWSGD S=4 | nan (0.3) |"))
    assert "nan" in row and "*" not in row


def test_dropout_need_not_be_the_shortest_training(tmp_path):
    """As in Table 1, where IWSGD has an S-th of the epochs too."""
    runs = [*dropout(1.0, 2.0, 3.5), *dropout(1.5, 2.0, 3.0, epochs=32), *((8, 1, 0.3, seed, 2.0 + seed) for seed in range(3))]
    text = tables(read(written(tmp_path, *runs)))
    assert "| dropout (S=1) |" in text and "| dropout (S=1), 4x steps |" in text and "| IWSGD S=8, 0.125x steps |" in text


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (dropout(1.0, 2.0) + dropout(1.0), "dropout .S=1., p=0.3, seed 0 is there twice"),
        (dropout(1.0), "at least two seeds"),
        ([(4, 8, 0.3, seed, 1.0) for seed in range(2)], "expected some with one sample"),
        ([], "expected some with one sample"),
        (dropout(1.0, 2.0) + dropout(1.0, rate=0.5), "the same seeds for all methods and rates"),
    ],
    ids=["twice", "one seed", "no dropout", "nothing", "other seeds"],
)
def test_runs_that_cannot_be_compared_are_refused(runs, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        read(written(tmp_path, *runs))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_tables_of_its_runs(name):
    assert block(name).search(PAGE.read_text())[2].strip() == tables(read([ROOT / "docs" / "results" / f"evidence-{name}.csv"])).strip()


def test_any_samples_and_alpha_are_drawn(tmp_path):
    lines = [["x", s, a, p, 50, i, 1 + i, 1 + i, 1, 1, 1] for s, a in ((1, 1), (3, 0.3), (64, 1)) for p in (0.3, 0.5) for i in range(2)]
    picture(read([runs_csv(tmp_path / "runs.csv", lines)]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
