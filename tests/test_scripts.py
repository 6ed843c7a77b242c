"""What training scripts do around a converted model: labels given late, flattened outputs, attributes of other libraries."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle.equal_to_loop import S, assert_is_loop
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import iwsgd_ext as iw

B, T, LENGTHS = 5, 4, torch.tensor([4, 2, 3, 1, 4])


class Language(nn.Module):
    """Logits of all positions as rows, in the order that the input has."""

    def __init__(self, classes):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(classes, 8), nn.Dropout(0.3), nn.Linear(8, classes)

    def forward(self, tokens):
        return self.head(self.drop(self.embedding(tokens))).flatten(0, -2)


class Tagger(nn.Module):
    def __init__(self, tags):
        super().__init__()
        self.drop, self.lstm, self.head = nn.Dropout(0.3), nn.LSTM(6, 8, 2, dropout=0.3, batch_first=True), nn.Linear(8, tags)

    def forward(self, x):
        packed = pack_padded_sequence(self.drop(x), LENGTHS, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[0].data)


class Labelled(nn.Module):
    """A model that computes its loss where it is given labels."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.drop(x))
        return logits if labels is None else F.cross_entropy(logits, labels)


@pytest.mark.parametrize("shape", [(B, T), (T, B), (B,)], ids=str)
@pytest.mark.parametrize("classes", [B, T, 7])
def test_flattened_rows(classes, shape):
    """Rows that are positions hold the samples one after another, also where there are as many classes as examples."""
    tokens = torch.randint(classes, shape)
    assert_is_loop(Language(classes).double(), tokens)
    model = iw.convert(Language(classes), S, example_inputs=tokens)
    assert model(tokens).shape == (S * tokens.numel(), classes)


@pytest.mark.parametrize("tags", [B, 3])
def test_packed_rows(tags):
    x = torch.randn(B, T, 6, dtype=torch.float64)
    model = assert_is_loop(Tagger(tags).double(), x)
    assert model(x).shape == (S * 14, tags)


def test_a_loss_inside_that_comes_late_is_told_once():
    """The inputs that a model was converted with had no labels; those of training have."""
    x, y = torch.randn(B, 6), torch.randint(3, (B,))
    model = iw.convert(Labelled(), S, example_inputs=x)
    with pytest.warns(UserWarning, match="returns a number for each noise sample.* leave the labels out"):
        assert model(x, y).shape == (S,)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model returns")
        model(x, y)


class Pair(tuple):
    __slots__ = ()


def keeping(what):
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head, self.kept = nn.Dropout(0.3), nn.Linear(6, 3), what

        def forward(self, x):
            return self.head(self.drop(x))

    return Keeps()


@pytest.mark.parametrize("what", [Pair((1, 2)), Pair((torch.ones(2),)), torch.cpu, [torch.nn], {"a": Pair()}], ids=range(5))
def test_attributes_that_are_no_data(what):
    """Python modules, which lead to everything that is loaded, and tuples of classes of their own are left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = iw.convert(keeping(what), S, example_inputs=torch.ones(B, 6))
        assert model(torch.ones(B, 6)).shape == (S * B, 3) and not model._iw_conversion.one_by_one
    assert model.kept is what


def test_noisy_tensors_in_a_tuple_of_its_own_class():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head, self.kept = nn.Dropout(0.3), nn.Linear(6, 3), None

        def forward(self, x):
            h = self.drop(x)
            self.kept = Pair((h,))
            return self.head(h)

    class Returns(Keeps):
        def forward(self, x):
            return Pair((self.head(self.drop(x)),))

    class Holds(Keeps):
        def forward(self, x):
            return Pair(([self.head(self.drop(x))],))

    for model in (Keeps(), Returns(), Holds()):
        with pytest.raises((RuntimeError, ValueError), match="Pair"):
            iw.convert(model, S, example_inputs=torch.ones(B, 6))


def test_a_reentrant_checkpoint_names_the_way():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head, self.on = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)), nn.Linear(6, 3), False

        def forward(self, x):
            x = x * 1.0
            return self.head(checkpoint(self.block, x, use_reentrant=True) if self.on else self.block(x))

    x = torch.ones(B, 6, requires_grad=True)
    model = iw.convert(Checkpointed(), S, example_inputs=x)
    model.on = True
    with pytest.raises(RuntimeError) as error:
        model(x).sum().backward()
    assert "use_reentrant=False" in str(error.value) + "".join(getattr(error.value, "__notes__", ()))


def test_states_of_the_call_before_name_the_way():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.rnn = nn.Dropout(0.3), nn.LSTM(6, 8, 2, dropout=0.3)

        def forward(self, x, state=None):
            return self.rnn(self.drop(x), state)

    x = torch.randn(T, B, 6)
    model = iw.convert(Model(), S, batch_dim=1)
    _, state = model(x)
    with pytest.raises(ValueError, match=r"hx: .*got 15\. Are these S\*B states of the call before\? .*expand='first'"):
        model(x, state)
    model = iw.convert(Model(), S, expand="first", batch_dim=1)
    _, state = model(x)
    assert model(x, tuple(v.detach() for v in state))[0].shape == (T, S * B, 8)


def test_one_row_warning_names_the_line_of_the_call():
    criterion, z, y = iw.IWCrossEntropyLoss(S), torch.randn(B, 3, requires_grad=True), torch.randint(3, (B,))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        criterion(z, y)
        criterion(z, y)
        copy.deepcopy(criterion)(z, y)
    assert [w.filename for w in told] == [__file__]


def test_rows_of_a_square_output_are_not_guessed():
    """With batch_dim=1 a square matrix may be examples by classes, or times by examples."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 6)

        def forward(self, x):
            return self.drop(self.head(x))[-1]

    model = iw.convert(Last(), S, batch_dim=1)
    assert model(torch.randn(7, 5, 6)).shape == (S * 5, 6)
    with pytest.raises(ValueError, match=r"batch_dim=1: the model returns \(6, 6\) for a batch of 6"):
        model(torch.randn(7, 6, 6))
