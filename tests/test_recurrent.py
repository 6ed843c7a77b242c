"""Recurrent layers against the cells' equations, row by row and step by step; torch's own where there is no noise."""

import copy
import io

import pytest
import torch
from oracle import naive_layers
from test_attention import ADDRESS, B, S, after_noise, assert_same, leaves
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import iwsgd_ext as iw
from iwsgd_ext.ops.address import Address, Place, make_origin
from iwsgd_ext.ops.noise import dropout_rule, noise

T, F, H = 5, 3, 4
PAIRS = [(iw.IWLSTM, nn.LSTM), (iw.IWGRU, nn.GRU), (iw.IWRNN, nn.RNN)]
KINDS = [
    pytest.param(iw.IWLSTM, {}, id="lstm"),
    pytest.param(iw.IWLSTM, {"proj_size": 2, "bidirectional": True}, id="lstm-projected-both-ways"),
    pytest.param(iw.IWLSTM, {"bias": False, "num_layers": 2}, id="lstm-without-bias"),
    pytest.param(iw.IWGRU, {"bidirectional": True}, id="gru-both-ways"),
    pytest.param(iw.IWRNN, {}, id="rnn-tanh"),
    pytest.param(iw.IWRNN, {"nonlinearity": "relu", "num_layers": 2}, id="rnn-relu"),
]


def layer_of(kind, device, dtype=torch.float64, **options) -> nn.RNNBase:
    return kind(F, H, **{"num_layers": 3, "dropout": 0.3, "batch_first": True, "device": device, "dtype": dtype, **options})


def states_of(layer, rows, device) -> list[torch.Tensor]:
    widths = [layer.proj_size or H, H][: 1 + (layer.mode == "LSTM")]
    n = layer.num_layers * (1 + layer.bidirectional)
    return [torch.randn(n, rows, w, device=device, dtype=torch.float64).requires_grad_() for w in widths]


def as_hx(states):
    return tuple(states) if len(states) == 2 else states[0]


def check(layer, device, x_rows=B, state_rows=None, lengths=None) -> None:
    """Output, final states and the gradients of input, initial states and parameters; the third stream of a context that knows B."""
    x = torch.randn(x_rows, T, F, device=device, dtype=torch.float64).requires_grad_()
    states = [] if state_rows is None else states_of(layer, state_rows, device)
    given = x if layer.batch_first else x.transpose(0, 1)
    if lengths is not None:
        given = pack_padded_sequence(given, torch.tensor(lengths), batch_first=layer.batch_first, enforce_sorted=False)
    with after_noise(2) as context:
        got, final = layer(given, as_hx(states) if states else None)
        assert context.stream == 2 + layer.num_layers - 1
    if lengths is not None:
        got, _ = pad_packed_sequence(got, batch_first=layer.batch_first, total_length=T)
    final = final if isinstance(final, tuple) else (final,)
    truth = leaves(x, *states)
    parameters = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.named_parameters()}
    want, final_want = naive_layers.recurrent(
        layer.mode,
        parameters,
        truth[0],
        truth[1:] or [v.detach().cpu() * 0 for v in states_of(layer, B, device)],
        layer.dropout,
        layers=layer.num_layers,
        directions=1 + layer.bidirectional,
        samples=S,
        batch=B,
        lengths=lengths or [T] * B,
        locked=layer.locked,
        stream=2,
        **ADDRESS,
    )
    got = got if layer.batch_first else got.transpose(0, 1)
    assert got.shape[0] == S * B
    everything = torch.cat([v.flatten() for v in (got, *final)]), torch.cat([v.flatten() for v in (want, *final_want)])
    assert_same(*everything, [x, *states, *layer.parameters()], [*truth, *parameters.values()])


@pytest.mark.parametrize(("kind", "options"), KINDS)
class TestEachLayer:
    @pytest.mark.parametrize("locked", [False, True])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_first_noise_expands(self, device, backend, kind, options, locked, batch_first):
        check(layer_of(kind, device, locked=locked, batch_first=batch_first, **options), device)

    @pytest.mark.parametrize("x_rows", [B, S * B])
    @pytest.mark.parametrize("state_rows", [B, S * B])
    def test_rows_that_meet(self, device, kind, options, x_rows, state_rows):
        check(layer_of(kind, device, **options), device, x_rows, state_rows)

    @pytest.mark.parametrize("locked", [False, True])
    @pytest.mark.parametrize(("x_rows", "state_rows", "lengths"), [(B, None, [3, 5]), (B, S * B, [5, 2]), (S * B, B, [4, 5] * S)])
    def test_packed_sequences(self, device, kind, options, locked, x_rows, state_rows, lengths):
        check(layer_of(kind, device, locked=locked, batch_first=False, **options), device, x_rows, state_rows, lengths)

    @pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
    def test_eval_is_torchs(self, device, kind, options):
        """Bit for bit, also in a context, where it draws no stream; so is training without dropout, and with one layer."""
        layer = layer_of(kind, device, torch.float32, **options)
        torchs = next(base for base in kind.__mro__ if base.__module__.startswith("torch."))
        assert torchs is dict(PAIRS)[kind]
        x = torch.randn(B, T, F, device=device)
        single = layer_of(kind, device, torch.float32, **{**options, "num_layers": 1, "dropout": 0.0})
        for module, training, dropout in ((layer, False, 0.3), (layer, True, 0.0), (single, True, 0.0)):
            module.train(training)
            module.dropout = dropout
            with iw.sampling(S) as context:
                module.__class__ = torchs
                want = module(x)
                module.__class__ = kind
                got = module(x)
                assert context.stream == 0
            for a, b in zip((got[0], *as_tuple(got[1])), (want[0], *as_tuple(want[1])), strict=True):
                assert torch.equal(a, b)

    def test_state_copy_and_pickle(self, device, kind, options):
        """A class swapped in place; then copied, pickled, and its state_dict loaded both ways."""
        torchs = dict(PAIRS)[kind]
        original = layer_of(torchs, device, **options)
        layer = copy.deepcopy(original)
        layer.__class__ = kind
        assert layer.state_dict().keys() == original.state_dict().keys()
        original.load_state_dict(layer.state_dict())
        layer.load_state_dict(original.state_dict())
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        x = torch.randn(B, T, F, device=device, dtype=torch.float64)
        results = []
        for other in (layer, copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert type(other) is kind
            with iw.sampling(S, seed=1):
                results.append(other(x)[0])
        assert results[0].shape[0] == S * B
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


@pytest.mark.parametrize("features", [1, 8, 63, 500, 1000], ids=["one", "one-group", "odd", "ends-inside-a-group", "whole-groups"])
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("expand", [True, False])
def test_locked_noise_op(device, backend, features, batch_dim, expand):
    """The op by itself, at sizes that the kernels cut differently: masks are the features', at every step, and the gradient is theirs."""
    steps, rows, p = 9, 4, 0.3
    samples = 3 if expand else 2
    x = torch.randn((rows, steps, features) if batch_dim == 0 else (steps, rows, features), device=device).requires_grad_()
    origin = make_origin(5, 0, 0, x.device)
    y = noise(x, dropout_rule(p), "feature", Place(Address(origin, None, samples, 3, 2), expand, batch_dim))
    examples = rows if expand else rows // samples
    keep = [
        naive_layers.keep_scale(p, seed=5, stream=3, sample=s, example=2 + b, shape=(features,))
        for s in range(samples)
        for b in range(examples)
    ]
    keep = torch.stack(keep)[:, None].expand(-1, steps, -1)
    truth = x.detach().cpu().double().movedim(batch_dim, 0).requires_grad_()
    want = (truth.repeat(samples, 1, 1) if expand else truth) * keep
    dy = torch.randn(want.shape)
    torch.testing.assert_close(y.detach().cpu().movedim(batch_dim, 0), want.float().detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(y.detach().cpu().movedim(batch_dim, 0) != 0, keep != 0)
    y.backward(dy.movedim(0, batch_dim).to(device))
    want.backward(dy.double())
    torch.testing.assert_close(x.grad.cpu().movedim(batch_dim, 0), truth.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_replay_of_one_sample(device, backend, batch_first):
    layer = layer_of(iw.IWLSTM, device, batch_first=batch_first)
    x = torch.randn(B, T, F, device=device, dtype=torch.float64)
    x, dim = (x, 0) if batch_first else (x.transpose(0, 1), 1)
    with iw.sampling(S, seed=2):
        every, (h, c) = layer(x)
    for s in range(S):
        rows = slice(s * B, (s + 1) * B)
        with iw.sampling(1, seed=2, sample_ids=[s]):
            one, (h1, c1) = layer(x)
        torch.testing.assert_close(one, every[rows] if dim == 0 else every[:, rows])
        torch.testing.assert_close((h1, c1), (h[:, rows], c[:, rows]))


def test_expanded_outside(device):
    """All rows expanded before ("none"): the rows of each sample as in the expansion at the first noise."""
    layer = layer_of(iw.IWGRU, device)
    x = torch.randn(B, T, F, device=device, dtype=torch.float64)
    with iw.sampling(S, seed=2, expand="none"):
        a = layer(torch.cat([x] * S))
    with iw.sampling(S, seed=2):
        b = layer(x)
    torch.testing.assert_close(a, b)


def test_carried_state(device):
    """Truncated backpropagation: the states of S*B rows go into the next stretch, whose input has B; then as one long stretch would."""
    layer = layer_of(iw.IWLSTM, device, locked=True)
    x = torch.randn(B, 2 * T, F, device=device, dtype=torch.float64)
    with iw.sampling(S, seed=2):
        whole, last = layer(x)
    with iw.sampling(S, seed=2):
        first, state = layer(x[:, :T])
    with iw.sampling(S, seed=2):  # locked masks of the same address
        second, end = layer(x[:, T:], tuple(v.detach() for v in state))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_states_meet_a_layer_without_noise(device):
    """A single layer draws nothing, but takes states of S*B rows with an input of B, and the other way round."""
    layer = layer_of(iw.IWLSTM, device, num_layers=1, dropout=0.0)
    x = torch.randn(B, T, F, device=device, dtype=torch.float64)
    states = states_of(layer, B, device)
    want = layer(torch.cat([x] * S), tuple(torch.cat([v] * S, 1) for v in states))
    for of_x, of_states in ((1, S), (S, 1)):
        with after_noise() as context:
            hx = tuple(torch.cat([v] * of_states, 1) for v in states)
            got = layer(torch.cat([x] * of_x), hx)
            packed = pack_padded_sequence(torch.cat([x] * of_x), torch.tensor([T] * B * of_x), batch_first=True)
            (of_packed, _), last = pad_packed_sequence(layer(packed, hx)[0], batch_first=True), layer(packed, hx)[1]
            assert context.stream == 1
        torch.testing.assert_close(got, want)
        torch.testing.assert_close((of_packed, last), want)


@pytest.mark.parametrize("locked", [False, True])
def test_alone_is_one_fresh_sample(device, backend, locked):
    """Outside of any context: B rows and one draw a call, at torch's rate: six standard deviations, 2e-9 a comparison."""
    wide = iw.IWRNN(1, 400, 2, "relu", dropout=0.25, locked=locked, bias=False, batch_first=True, device=device)
    with torch.no_grad():
        for name, value in (("weight_ih_l0", 1.0), ("weight_hh_l0", 0.0), ("weight_hh_l1", 0.0)):
            getattr(wide, name).fill_(value)
        wide.weight_ih_l1.copy_(torch.eye(400))
        x = torch.ones(8, 10, 1, device=device)
        torch.manual_seed(1)
        one, other = wide(x)[0], wide(x)[0]
        torch.manual_seed(1)
        assert torch.equal(one, wide(x)[0])
    assert one.shape == (8, 10, 400)
    assert not torch.equal(one, other)
    assert (torch.equal(one, one[:, :1].expand_as(one))) == locked
    torch.testing.assert_close(one[one != 0], torch.full_like(one[one != 0], 1 / 0.75))
    draws = one[:, :1] if locked else one
    assert abs((draws == 0).double().mean().item() - 0.25) <= 6 * (0.25 * 0.75 / draws.numel()) ** 0.5


@pytest.mark.parametrize("kind", [iw.IWLSTM, iw.IWGRU])
def test_unbatched(device, kind):
    """Outside of a context as torch's; inside there is no row to expand."""
    for batch_first in (True, False):
        layer = layer_of(kind, device, dropout=1e-9, batch_first=batch_first)
        x, states = torch.randn(T, F, device=device, dtype=torch.float64), [v[:, 0] for v in states_of(layer, 1, device)]
        for hx in (None, as_hx(states)):
            torch.testing.assert_close(layer(x, hx), copy.deepcopy(layer).eval()(x, hx))
        with iw.sampling(2), pytest.raises(ValueError, match=r"input: expected rows to expand, .* got an unbatched one"):
            layer(x)


@pytest.mark.parametrize("kind", [iw.IWLSTM, *(pytest.param(k, marks=pytest.mark.slow) for k in (iw.IWGRU, iw.IWRNN))])
def test_compiled(device, kind):
    if kind is iw.IWLSTM and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 cannot train its own nn.LSTM when compiled")
    torch._dynamo.reset()
    # float64, as torch 2.13 itself cannot train a compiled float32 nn.LSTM on the CPU ("tensors_saved_with_vc_check")
    layer = layer_of(kind, device, num_layers=2, locked=kind is iw.IWGRU)
    with torch._dynamo.config.patch(allow_rnn=True):  # torch's own switch, without which its compiler leaves any of its RNNs
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(B, 2, F, device=device, dtype=torch.float64)
        results = []
        for f in (layer, compiled):
            with iw.sampling(S, seed=4):
                y, final = f(x)
            results.append([y, *as_tuple(final), *torch.autograd.grad(y.square().sum(), layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [iw.IWLSTM, iw.IWGRU, iw.IWRNN])
def test_autocast(device, kind):
    layer = layer_of(kind, device, torch.float32, locked=True)
    x = torch.randn(B, T, F, device=device)
    for hx in (None, as_hx([v.detach().float() for v in states_of(layer, S * B, device)])):
        with torch.autocast(device.type, dtype=torch.bfloat16), iw.sampling(S, seed=1):
            low = layer(x, hx)[0]
        with iw.sampling(S, seed=1):
            full = layer(x, hx)[0]
        low.float().sum().backward()
        torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)


def test_weights_of_a_functional_call(device):
    """Weights that stand in for the module's own, as torch.func gives them, are those used."""
    layer = layer_of(iw.IWLSTM, device)
    x = torch.randn(B, T, F, device=device, dtype=torch.float64)
    other = {name: v.detach() * 2 for name, v in layer.named_parameters()}
    with iw.sampling(S, seed=1):
        got = torch.func.functional_call(layer, other, (x,))[0]
    layer.load_state_dict(other)
    with iw.sampling(S, seed=1):
        torch.testing.assert_close(got, layer(x)[0])


def test_bad_input(device):
    layer = layer_of(iw.IWLSTM, device, torch.float32)
    x = torch.ones(B, T, F, device=device)
    h, c = (v.detach().float() for v in states_of(layer, B, device))
    cases = [
        (ValueError, r"input: expected \[rows, T, F\] where batch_first", x[None], None),
        (ValueError, r"hx: expected \(h, c\) for an LSTM, else h, got 1 tensors", x, h),
        (ValueError, r"hx: expected \[3, rows, 4\], got \(2, 2, 4\)", x, (h[:2], c)),
        (ValueError, r"hx: expected 2 rows, or 3 samples \* 2 = 6, got 5", x, (h, torch.cat([c, c, c], 1)[:, :5])),
        (RuntimeError, r"input.size\(-1\) must be equal to input_size", x[..., :2], None),
        (ValueError, "does not match weight dtype", x.double(), None),
        (ValueError, "met 3 rows, but in this context the batch is 2", torch.cat([x, x])[:3], None),
    ]
    for error, message, given, hx in cases:
        with after_noise(), pytest.raises(error, match=message):
            layer(given, hx)
    with pytest.raises(TypeError, match="locked: expected a bool, got int"):
        iw.IWLSTM(3, 4, locked=1)
    layer.dropout = 1.5
    with iw.sampling(2), pytest.raises(ValueError, match="dropout: expected a probability"):
        layer(x)
    assert repr(iw.IWGRU(3, 4, 2, dropout=0.5, locked=True)) == "IWGRU(3, 4, num_layers=2, dropout=0.5, locked=True)"
