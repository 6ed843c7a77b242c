"""What a dry run sees of rows: samples that would share noise, rows that meet those of other examples, and what only looks like it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw

B, T, S = 16, 6, 4
X, TOKENS, LENGTHS = torch.randn(B, 20), torch.randn(B, T, 20), torch.randint(1, T + 1, (B,))
PERM, EDGES, TABLE = torch.randperm(B), torch.randint(B, (2, 40)), torch.randn(B, 32)


class Model(nn.Module):
    """Two dropouts for a function to use."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.d, self.e, self.h = nn.Linear(20, 32), nn.Dropout(0.5), nn.Dropout(0.3), nn.Linear(32, 5)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def noisy(m, x):
    return m.d(m.a(x))


def at_lengths(h, n):
    """The last token of each row of h, whatever their number."""
    return h[torch.arange(len(h)), n.repeat(len(h) // len(n)) - 1]


# Rows are S*B after the first noise, and B again before the second: all samples would share sample 0's noise, or be averaged.
AGAIN = {
    "rows by arange of the input": (lambda m, x, n: m.h(m.e(noisy(m, x)[torch.arange(x.shape[0]), n - 1])), TOKENS, LENGTHS),
    "gather": (lambda m, x, n: m.h(m.e(noisy(m, x).gather(1, (n - 1)[:, None, None].expand(-1, 1, 32))[:, 0])), TOKENS, LENGTHS),
    "view": (lambda m, x: m.h(m.e(noisy(m, x).view(x.shape[0], -1, 32).mean(1))), TOKENS),
    "slice": (lambda m, x: m.h(m.e(noisy(m, x)[: x.shape[0]])), X),
    "rows one by one": (lambda m, x: m.h(m.e(torch.stack([noisy(m, x)[i] for i in range(x.shape[0])]))), X),
}
MIXING = {
    "permutation": (lambda m, x, p: m.h(noisy(m, x) + noisy(m, x)[p]), X, PERM),
    "neighbours": (lambda m, x, e: m.h(torch.zeros(len(noisy(m, x)), 32).index_add(0, e[1], noisy(m, x)[e[0]])), X, EDGES),
    "mean": (lambda m, x: m.h(noisy(m, x) - noisy(m, x).mean(0)), X),
    "deviation": (lambda m, x: m.h(noisy(m, x) / noisy(m, x).std()), X),
    "attention": (lambda m, x: m.h(torch.softmax(noisy(m, x) @ noisy(m, x).T, 1) @ noisy(m, x)), X),
    "contrast": (lambda m, x, y: noisy(m, x) @ noisy(m, y).T, X, X + 1),
}
RIGHT = {
    "network": (lambda m, x: m.h(m.e(noisy(m, x))), X),
    "two branches": (lambda m, x, y: m.h(noisy(m, x) + m.e(m.a(y))), X, X),
    "batch normalisation": (lambda m, x: m.h(F.batch_norm(noisy(m, x), None, None, training=True)), X),
    "attention of tokens": (lambda m, x: m.h(F.scaled_dot_product_attention(noisy(m, x), noisy(m, x), noisy(m, x)).mean(1)), TOKENS),
    "mean of tokens": (lambda m, x: m.h(m.e(noisy(m, x).mean(1))), TOKENS),
    "another loss": (lambda m, x: (m.h(noisy(m, x)), noisy(m, x).square().mean()), X),
    "table of as many rows": (lambda m, x, t: noisy(m, x) @ t.T, X, TABLE),
    "sorted": (lambda m, x: m.h(noisy(m, x).sort(1).values), X),
    "tokens looked up": (lambda m, x, n: m.h(at_lengths(noisy(m, x), n)), TOKENS, LENGTHS),
}


def converted(function, *inputs, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = iw.convert(Model(function), S, example_inputs=inputs, **options)
    return model, [str(w.message) for w in caught]


def losses(model, inputs):
    """Of each strategy, with one seed: equal where no row meets another's."""
    target = torch.randint(5, (B,), generator=torch.Generator().manual_seed(0))
    strategies = ("batched", "streamed", "loop")
    return [iw.backward(model, iw.IWCrossEntropyLoss(S), inputs, target, samples=S, seed=0, strategy=s).item() for s in strategies]


@pytest.mark.parametrize("name", AGAIN)
def test_samples_that_would_share_their_noise(name):
    function, *inputs = AGAIN[name]
    model, told = converted(function, *inputs)
    assert model._iw_conversion.expand == "input" and not told
    assert "noise meets 16 rows that were made of those of all samples" in iw.audit(model).reason
    if name not in ("slice", "rows one by one"):  # which take the rows of sample 0 alone, also of expanded inputs ...
        batched, streamed, loop = losses(model, inputs)
        assert batched == pytest.approx(loop) == streamed
    _, told = converted(function, *inputs, expand="first")
    assert len(told) == 1 and "with expand='first', in a dry run of" in told[0]


@pytest.mark.parametrize("expand", ["auto", "first", "input"])
@pytest.mark.parametrize("name", MIXING)
def test_rows_that_meet(name, expand):
    """Said at conversion and by the audit, with the line; and the strategies do differ."""
    function, *inputs = MIXING[name]
    if (name, expand) == ("permutation", "first"):
        expand = "auto"  # "first" stops at the sum of B rows and S*B
    model, told = converted(function, *inputs, expand=expand)
    assert any("rows of the batch meet in this model" in text and "test_row_flow.py:" in text for text in told), told
    audit = iw.audit(model)
    assert "test_row_flow.py:" in audit.mixing and not audit.complete and "ROWS OF THE BATCH MEET" in str(audit)
    if name != "contrast":
        batched, streamed, loop = losses(model, inputs)
        assert streamed == pytest.approx(loop) and batched != pytest.approx(loop, abs=1e-6)


@pytest.mark.parametrize("name", RIGHT)
def test_rows_that_do_not(name):
    function, *inputs = RIGHT[name]
    model, told = converted(function, *inputs)
    audit = iw.audit(model, *inputs)
    assert not told and model._iw_conversion.expand == "first" and audit.mixing is None
    assert audit.complete, audit


def test_an_argument_that_has_as_many_rows_by_chance():
    """ "input" repeats the table, and its rows are classes: seen as rows that meet. Named arguments mend it."""
    function, *inputs = RIGHT["table of as many rows"]
    _, told = converted(function, *inputs, expand="input")
    assert len(told) == 1 and "expand_args" in told[0]
    model, told = converted(function, *inputs, expand="input", expand_args=[0])
    assert not told and model(*inputs).shape == (S * B, B)


def test_states_of_a_recurrent_layer_have_their_rows_second():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.drop = nn.LSTM(20, 8, 2, dropout=0.5, batch_first=True), nn.Dropout(0.5)

        def forward(self, x):
            y, state = self.lstm(x)
            return self.drop(y), state

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = iw.convert(Language(), S, example_inputs=TOKENS)
    assert model._iw_conversion.expand == "first" and model(TOKENS)[1][0].shape == (2, S * B, 8)
