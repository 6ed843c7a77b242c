"""Evidence of many runs: rates that the other seeds choose, paired tests, Holm's correction, and files that cannot be compared."""

import math
from itertools import combinations

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from recipes.evidence import chosen, holm, paired, read, tables

pytestmark = pytest.mark.one_process
HEADER = "method,samples,alpha,rate,epochs,seed,error,nll,ece,ess"


def written(tmp_path, *runs):
    """A runs.csv; a run is (samples, epochs, rate, seed, value of all metrics)."""
    lines = [f"a method,{s},1,{p},{epochs},{seed},{v},{v},{v},{v}" for s, epochs, p, seed, v in runs]
    (tmp_path / "runs.csv").write_text("\n".join([HEADER, *lines, ""]))
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


def test_no_seed_chooses_its_own_rate(tmp_path):
    runs = read(written(tmp_path, *dropout(1.0, 5.0, 3.0, 2.0), *dropout(2.0, 2.0, 2.0, 9.0, rate=0.5)))
    assert chosen(runs, runs.methods[0], "error") == ([1.0, 5.0, 3.0, 9.0], [0.3, 0.3, 0.3, 0.5])


def test_paired_against_its_formula():
    mean, error, p = paired([1.0, 3.0, 2.5], [0.5, 1.0, 1.5])
    assert mean == pytest.approx(7 / 6) and error == pytest.approx(math.sqrt(7 / 12) / math.sqrt(3))
    t = mean / error  # Student's distribution with 2 degrees of freedom has a formula
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_run_that_diverged_is_no_evidence(tmp_path):
    text = tables(read(written(tmp_path, *dropout(1.0, 2.0, 3.0), (4, 8, 0.3, 0, 1.0), (4, 8, 0.3, 1, "nan"), (4, 8, 0.3, 2, 2.0))))
    row = next(line for line in text.splitlines() if line.startswith("| IWSGD S=4 | 0.3 |"))
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
