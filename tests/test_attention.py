"""Attention under noise against a loop over samples, examples, heads and positions; torch's own where there is no noise."""

import contextlib
import copy
import io
import math

import naive_layers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iwsgd_ext as iw

S, B, H, T, U, E, V = 3, 2, 4, 3, 5, 6, 7  # all different, and 5 * 3 positions end inside a group of eight
ADDRESS = {"seed": 9, "sample_ids": [4, 0, 2], "first_example": 3}


def tensors(device, q_rows=B, k_rows=B, v_rows=B, heads=H, kv_heads=H, dtype=torch.float64) -> list[torch.Tensor]:
    shapes = [(q_rows, heads, T, E), (k_rows, kv_heads, U, E), (v_rows, kv_heads, U, V)]
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


@contextlib.contextmanager
def after_noise(stream: int = 1):
    """A context in which noise layers drew, so that it knows B; the next stream is given."""
    with iw.sampling(S, **ADDRESS) as context:
        for _ in range(stream):
            iw.IWDropout(0.5)(torch.ones(B, 1))
        yield context


def leaves(*xs: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().cpu().double().requires_grad_() for x in xs]


def assert_same(got, want, inputs, truths, rtol=1e-9, atol=1e-11) -> None:
    """Values, and the gradients of all inputs under one random upstream gradient."""
    dy = torch.randn(want.shape, dtype=torch.float64)
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=rtol, atol=atol)
    ours = torch.autograd.grad(got, inputs, dy.to(got))
    theirs = torch.autograd.grad(want, truths, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=rtol, atol=atol)


ROWS = [(B, B, B), (S * B, S * B, S * B), (S * B, B, B), (B, S * B, S * B), (B, B, S * B), (S * B, B, S * B)]


class TestFunction:
    @pytest.mark.parametrize("rows", ROWS, ids=["none", "all", "query", "memory", "value", "query-value"])
    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_rows_that_meet(self, device, backend, rows, p):
        """Whatever is expanded already, the result is that of S*B rows, each with its own mask."""
        x = tensors(device, *rows)
        with after_noise(5) as context:
            got = iw.scaled_dot_product_attention(*x, dropout_p=p)
            assert context.stream == 6
        truth = leaves(*x)
        want, _ = naive_layers.attention(*truth, p, samples=S, batch=B, stream=5, **ADDRESS)
        assert got.shape == (S * B, H, T, V)
        assert_same(got, want, x, truth)

    @pytest.mark.parametrize("shape", [(B, T, U), (1, T, U), (S * B, H, T, U), (B, 1, T, U), (T, U), (1, U), (H, T, U)])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    @pytest.mark.parametrize("rows", [(B, B, B), (S * B, B, B)], ids=["none", "query"])
    def test_masks(self, device, backend, shape, kind, rows):
        """Of B rows, of S*B, or shared by all; the last position sees nothing, and gets zeros."""
        x = tensors(device, *rows)
        if len(shape) == 3 and shape[0] != H:
            x = [v[:, 0].detach().requires_grad_() for v in x]
        mask = torch.rand(shape, device=device) < 0.6
        mask[..., -1, :] = False
        mask[..., 0, 0] = True
        if kind == "float":
            mask = torch.where(mask, torch.randn(shape, device=device, dtype=torch.float64), -math.inf).requires_grad_()
        with after_noise():
            got = iw.scaled_dot_product_attention(*x, attn_mask=mask, dropout_p=0.3)
        inputs = [*x, mask] if kind == "float" else x
        truth = leaves(*inputs)
        added = truth[3] if kind == "float" else naive_layers.additive(mask.cpu(), takes_part=True)
        q, k, v = (t if t.dim() == 4 else t[:, None] for t in truth[:3])
        heads = q.shape[1]
        if x[0].dim() == 3:
            added = added[:, None]
        added = added.broadcast_to(S * B if added.dim() == 4 and added.shape[0] == S * B else B, heads, T, U)
        want, _ = naive_layers.attention(q, k, v, 0.3, samples=S, batch=B, masks=[added], stream=1, **ADDRESS)
        assert shape[-2] == 1 or (want[..., -1, :] == 0).all()
        assert_same(got, want.reshape(got.shape), inputs, truth)

    def test_causal_and_scale(self, device, backend):
        x = tensors(device)
        with iw.sampling(S, **ADDRESS):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3, is_causal=True, scale=0.7)
        truth = leaves(*x)
        mask = naive_layers.additive(torch.ones(T, U).tril() > 0, takes_part=True).expand(B, H, T, U)
        want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, masks=[mask], scale=0.7, **ADDRESS)
        assert_same(got, want, x, truth)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("rows", ROWS[:3], ids=["none", "all", "query"])
    def test_heads_that_share_keys(self, device, backend, kv_heads, rows):
        x = tensors(device, *rows, kv_heads=kv_heads)
        with after_noise():
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3, enable_gqa=True)
        truth = leaves(*x)
        want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, stream=1, **ADDRESS)
        assert_same(got, want, x, truth)

    def test_strides(self, device, backend):
        """Heads split off a projection, [B, T, H, E] in memory, and channels_last in shape: positions stay [H, T, U]."""
        x = [v.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for v in tensors(device)]
        assert not x[0].is_contiguous()
        with iw.sampling(S, **ADDRESS):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        truth = leaves(*x)
        want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, **ADDRESS)
        assert_same(got, want, x, truth)

    def test_more_dimensions(self, device, backend):
        """[B, 2, H, T, E]: the position goes through all of them."""
        x = [torch.cat([v, v + 1], 1).detach().unflatten(1, (2, H)).requires_grad_() for v in tensors(device)]
        with iw.sampling(S, **ADDRESS):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        truth = leaves(*x)
        want, _ = naive_layers.attention(*(t.flatten(1, 2) for t in truth), 0.3, samples=S, batch=B, **ADDRESS)
        assert_same(got, want.unflatten(1, (2, H)), x, truth)

    def test_sample_ids_of_each_example(self, device, backend):
        ids = torch.tensor([[7, 1], [2, 8], [0, 0]])
        x = tensors(device)
        with iw.sampling(S, seed=1, sample_ids=ids):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        truth = leaves(*x)
        want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, seed=1, sample_ids=ids)
        assert_same(got, want, x, truth)

    def test_replay_of_one_sample(self, device, backend):
        x = tensors(device)
        with iw.sampling(S, seed=2):
            every = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        for s in range(S):
            with iw.sampling(1, seed=2, sample_ids=[s]):
                one = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
            torch.testing.assert_close(one, every[s * B : (s + 1) * B], rtol=1e-12, atol=1e-12)
            assert torch.equal(one == 0, every[s * B : (s + 1) * B] == 0)

    def test_no_noise_is_torchs(self, device, backend):
        """dropout_p=0 draws and expands nothing; where expanded rows meet others it still gives every row its due."""
        x = tensors(device)
        with iw.sampling(S, seed=2) as context:
            assert torch.equal(iw.scaled_dot_product_attention(*x), F.scaled_dot_product_attention(*x))
            assert context.stream == 0
        assert torch.equal(iw.scaled_dot_product_attention(*x), F.scaled_dot_product_attention(*x))
        for rows in ROWS[2:]:
            x = tensors(device, *rows)
            with after_noise() as context:
                got = iw.scaled_dot_product_attention(*x)
                assert context.stream == 1
            full = [v if v.shape[0] == S * B else torch.cat([v] * S) for v in x]
            torch.testing.assert_close(got, F.scaled_dot_product_attention(*full))

    def test_alone_is_one_fresh_sample(self, device, backend):
        """Outside of any context: B rows, other noise at each call, which follows torch.manual_seed, at torch's rate."""
        q = torch.zeros(B, H, 50, E, device=device)
        v = torch.eye(50, device=device).expand(B, H, 50, 50)
        torch.manual_seed(1)
        one, other = (iw.scaled_dot_product_attention(q, q, v, dropout_p=0.25) for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(one, iw.scaled_dot_product_attention(q, q, v, dropout_p=0.25))
        assert one.shape == (B, H, 50, 50)
        assert not torch.equal(one, other)
        # a probability is 1/50, kept and divided by 0.75; six standard deviations of the rate of 20000 draws: 2e-9
        torch.testing.assert_close(one[one != 0], torch.full_like(one[one != 0], 1 / 50 / 0.75))
        assert abs((one == 0).double().mean().item() - 0.25) <= 6 * (0.25 * 0.75 / one.numel()) ** 0.5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, device, backend, dtype):
        """The error is at most twice that of the same steps of torch's, on the same masks, in the same dtype."""
        x = tensors(device, dtype=dtype)
        with iw.sampling(S, **ADDRESS):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        assert got.dtype == dtype
        truth = leaves(*x)
        want, noisy = naive_layers.attention(*truth, 0.3, samples=S, batch=B, **ADDRESS)
        keep = (noisy != 0).to(device) / 0.7
        q, k, v = (torch.cat([t] * S) for t in x)
        low = (torch.softmax(q @ k.mT / E**0.5, -1) * keep).to(dtype) @ v
        error, allowed = ((t.detach().cpu().double() - want.detach()).abs().max().item() for t in (got, low))
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * want.abs().max().item())

    def test_autocast(self, device):
        x = tensors(device, dtype=torch.float32)
        with torch.autocast(device.type, dtype=torch.bfloat16), iw.sampling(S, **ADDRESS):
            got = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
        assert got.dtype == torch.bfloat16
        truth = leaves(*x)
        want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, **ADDRESS)
        assert_same(got, want, x, truth, rtol=0.1, atol=0.1)

    def test_functional_form(self, device, backend):
        """The address given by hand, rows expanded or not."""
        for rows in ROWS:
            x = tensors(device, *rows)
            got = iw.functional.scaled_dot_product_attention(
                *x, dropout_p=0.3, samples=S, stream=torch.tensor(4), expand=rows == (B, B, B), **ADDRESS
            )
            truth = leaves(*x)
            want, _ = naive_layers.attention(*truth, 0.3, samples=S, batch=B, stream=4, **ADDRESS)
            assert_same(got, want, x, truth)
        x = tensors(device)
        got = iw.functional.scaled_dot_product_attention(*x, samples=S, **ADDRESS)
        torch.testing.assert_close(got, torch.cat([F.scaled_dot_product_attention(*x)] * S))

    def test_second_derivative(self, device):
        x = tensors(device)
        assert torch.autograd.gradgradcheck(
            lambda *x: iw.functional.scaled_dot_product_attention(*x, dropout_p=0.3, samples=2, seed=1), [v[:, :1, :2, :2] for v in x]
        )

    def test_compiled(self, device):
        torch._dynamo.reset()
        compiled = torch.compile(iw.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        for rows, mask in ((ROWS[0], None), (ROWS[2], torch.rand(B, 1, T, U, device=device) < 0.7)):
            x = tensors(device, *rows)
            results = []
            for f in (iw.scaled_dot_product_attention, compiled):
                with after_noise():
                    y = f(*x, attn_mask=mask, dropout_p=0.3)
                results.append([y, *torch.autograd.grad(y.square().sum(), x)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


BAD = [
    ("dropout_p: expected a probability", {"dropout_p": 1.5}),
    ("query: expected .rows, ..., positions, features., got .3, 6.", {"query": torch.ones(T, E)}),
    ("key: expected query's number of dimensions", {"key": torch.ones(B, U, E)}),
    ("key: expected query's number of features", {"key": torch.ones(B, H, U, E + 1)}),
    ("value: expected key's number of positions", {"value": torch.ones(B, H, U + 1, V)}),
    ("key: expected query's sizes between", {"key": torch.ones(B, 2, U, E), "value": torch.ones(B, 2, U, V)}),
    ("key: expected query's sizes between", {"key": torch.ones(B, 3, U, E), "value": torch.ones(B, 3, U, V), "enable_gqa": True}),
    ("value: expected key's sizes between", {"key": torch.ones(B, 2, U, E), "enable_gqa": True}),
    ("attn_mask: expected None where is_causal, got both", {"attn_mask": torch.ones(T, U), "is_causal": True}),
    ("attn_mask: expected at most query's number of dimensions", {"attn_mask": torch.ones(1, B, H, T, U)}),
    ("attn_mask: expected 2 rows, or 3 samples \\* 2 = 6, got 5", {"attn_mask": torch.ones(5, H, T, U)}),
    ("key: expected 2 rows, or 3 samples \\* 2 = 6, got 4", {"key": torch.ones(4, H, U, E), "query": torch.ones(S * B, H, T, E)}),
    ("met 12 rows, but in this context the batch is 2 and samples=3", {"key": torch.ones(12, H, U, E)}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (_, c) in enumerate(BAD)])
def test_bad_arguments(message, change):
    x = {"query": torch.ones(B, H, T, E), "key": torch.ones(B, H, U, E), "value": torch.ones(B, H, U, V), "dropout_p": 0.3}
    with after_noise(), pytest.raises(ValueError, match=message):
        iw.scaled_dot_product_attention(**{**x, **change})


def test_bad_types():
    x = torch.ones(B, H, T, E)
    with pytest.raises(TypeError, match=r"query: expected float32, .*, got torch.int64"):
        iw.scaled_dot_product_attention(x.long(), x, x)
    with pytest.raises(TypeError, match="value: expected a tensor, got NoneType"):
        iw.scaled_dot_product_attention(x, x, None)
    with pytest.raises(TypeError, match=r"attn_mask: expected bool or floating-point, got torch.int64"):
        iw.scaled_dot_product_attention(x, x, x, torch.ones(T, T, dtype=torch.int64))


D = 8  # embedding, of two heads


def module(device, p=0.3, kind=iw.IWMultiheadAttention, dtype=torch.float64, **options) -> nn.Module:
    layer = kind(D, 2, dropout=p, device=device, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)  # torch's own biases are zeros
    return layer


def naive_module(layer, parameters, query, key, value, p, *, masks=(), stream=0, **address):
    """(out [S*B, T, D], weights [S*B, 2, T, U]) of batch-first tensors, from the definition of multi-head attention."""
    w, b = parameters.get("in_proj_weight"), parameters.get("in_proj_bias")
    weights = w.chunk(3) if w is not None else [parameters[f"{n}_proj_weight"] for n in "qkv"]
    biases = b.chunk(3) if b is not None else [0.0] * 3
    q, k, v = (x @ w_.T + b_ for x, w_, b_ in zip((query, key, value), weights, biases, strict=True))
    if layer.bias_k is not None:
        k, v = (torch.cat([x, parameters[n].expand(x.shape[0], 1, D)], 1) for x, n in ((k, "bias_k"), (v, "bias_v")))
    if layer.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros(x.shape[0], 1, D, dtype=x.dtype)], 1) for x in (k, v))
    more = k.shape[1] - key.shape[1]
    masks = [torch.cat([m, torch.zeros(*m.shape[:-1], more, dtype=m.dtype)], -1) for m in masks]
    q, k, v = (torch.stack(x.chunk(2, -1), 1) for x in (q, k, v))
    out, noisy = naive_layers.attention(q, k, v, p, samples=S, batch=B, masks=masks, stream=stream, **address)
    bias = parameters.get("out_proj.bias", 0.0)
    return torch.cat([out[:, 0], out[:, 1]], -1) @ parameters["out_proj.weight"].T + bias, noisy


def check_module(layer, device, q_rows=B, k_rows=B, self_attention=False, same_kv=True, need_weights=True, average=True, masks=False):
    """Output, weights and all gradients against the loop; batch-first or not."""
    query = torch.randn(q_rows, T, D, device=device, dtype=torch.float64).requires_grad_()
    key = query if self_attention else torch.randn(k_rows, U, layer.kdim, device=device, dtype=torch.float64).requires_grad_()
    value = key if same_kv else torch.randn(k_rows, key.shape[1], layer.vdim, device=device, dtype=torch.float64).requires_grad_()
    inputs = list({id(x): x for x in (query, key, value)}.values())
    length = key.shape[1]
    options, added = {}, []
    if masks:
        padding = torch.zeros(B, length, dtype=torch.bool)
        padding[1, -1:] = True
        bias = torch.randn(B * 2, T, length, dtype=torch.float64)
        options = {"key_padding_mask": padding.to(device), "attn_mask": bias.to(device)}
        added = [naive_layers.additive(padding, False)[:, None, None].expand(B, 2, T, length), bias.view(B, 2, T, length)]
    names = {id(x): (x if layer.batch_first else x.transpose(0, 1)) for x in inputs}
    with after_noise(2) as context:
        got, weights = layer(
            *(names[id(x)] for x in (query, key, value)), need_weights=need_weights, average_attn_weights=average, **options
        )
        assert context.stream == 3
    parameters = {name: x.detach().cpu().double().requires_grad_() for name, x in layer.named_parameters()}
    truth = dict(zip((id(x) for x in inputs), leaves(*inputs), strict=True))
    want, noisy = naive_module(
        layer, parameters, *(truth[id(x)] for x in (query, key, value)), layer.dropout, masks=added, stream=2, **ADDRESS
    )
    if need_weights:
        torch.testing.assert_close(weights.cpu(), noisy.mean(1) if average else noisy)
    else:
        assert weights is None
    got = got if layer.batch_first else got.transpose(0, 1)
    assert_same(got, want, [*inputs, *layer.parameters()], [*truth.values(), *parameters.values()])


class TestModule:
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize(("q_rows", "k_rows"), [(B, B), (S * B, S * B), (S * B, B), (B, S * B)], ids=["none", "all", "query", "memory"])
    def test_rows_that_meet(self, device, backend, batch_first, q_rows, k_rows):
        check_module(module(device, batch_first=batch_first), device, q_rows, k_rows)

    @pytest.mark.parametrize(
        "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 3}], ids=str
    )
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_options(self, device, options, batch_first):
        layer = module(device, batch_first=batch_first, **options)
        check_module(layer, device, same_kv=False, average=False, masks=True)
        check_module(layer, device, S * B, B, same_kv=False, need_weights=False)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_self_attention(self, device, backend, batch_first):
        check_module(module(device, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True), device, self_attention=True, masks=True)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks_of_expanded_rows(self, device, kind):
        """Masks may have S*B rows, or B, whatever the rest has."""
        layer = module(device, batch_first=True)
        x = torch.randn(B, T, D, device=device, dtype=torch.float64)
        padding = torch.rand(B, T, device=device) < 0.3
        mask = torch.rand(B * 2, T, T, device=device) < 0.3
        mask[:, :, 0] = padding[:, 0] = False
        if kind == "float":
            padding, mask = (torch.zeros_like(m, dtype=torch.float64).masked_fill(m, -math.inf) for m in (padding, mask))
        results = []
        for of_x, of_padding, of_mask in ((1, 1, 1), (S, 1, 1), (1, S, S), (S, S, 1), (1, 1, S)):
            with after_noise():
                y = torch.cat([x] * of_x)
                results.append(layer(y, y, y, torch.cat([padding] * of_padding), attn_mask=torch.cat([mask] * of_mask))[0])
        for y in results[1:]:
            torch.testing.assert_close(y, results[0])

    def test_causal_hint(self, device):
        layer = module(device, batch_first=True)
        x = torch.randn(B, T, D, device=device, dtype=torch.float64)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=device, dtype=torch.float64)
        results = []
        for hint in (False, True):
            with after_noise():
                results.append(layer(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0])
        assert torch.equal(*results)
        with after_noise(), pytest.raises(ValueError, match="attn_mask: expected the causal mask"):
            layer(x, x, x, is_causal=True)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_unbatched(self, device, batch_first):
        """Outside of a context as torch's; inside there is no row to expand."""
        layer = module(device, p=1e-9, batch_first=batch_first)
        x, y = torch.randn(T, D, device=device, dtype=torch.float64), torch.randn(U, D, device=device, dtype=torch.float64)
        padding = torch.tensor([False, False, True, False, False], device=device)
        got = layer(x, y, y, padding, attn_mask=torch.zeros(2, T, U, dtype=torch.bool, device=device))
        want = copy.deepcopy(layer).eval()(x, y, y, padding)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        with iw.sampling(2), pytest.raises(ValueError, match=r"query: expected rows to expand, .* got an unbatched one"):
            layer(x, y, y)

    def test_nothing_drawn_is_torchs(self, device):
        """In eval, and with dropout=0: bit for bit torch's, nothing drawn; in a context too."""
        for batch_first in (True, False):
            layer = module(device, kind=nn.MultiheadAttention, batch_first=batch_first, p=0.0)
            x, y = torch.randn(B, T, D, device=device, dtype=torch.float64), torch.randn(B, T, D, device=device, dtype=torch.float64)
            cases = [(x, x, x), (x, y, y)]
            for training in (True, False):
                layer.train(training)
                layer.dropout = 0.0 if training else 0.5
                for grad in (True, False):
                    with torch.set_grad_enabled(grad), iw.sampling(S) as context:
                        layer.__class__ = nn.MultiheadAttention
                        want = [layer(*case) for case in cases]
                        layer.__class__ = iw.IWMultiheadAttention
                        got = [layer(*case) for case in cases]
                        assert context.stream == 0
                    assert all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))

    def test_rows_that_meet_without_noise(self, device):
        layer = module(device, p=0.0, batch_first=True)
        x, y = torch.randn(S * B, T, D, device=device, dtype=torch.float64), torch.randn(B, U, D, device=device, dtype=torch.float64)
        with after_noise() as context:
            got = layer(x, y, y)
            assert context.stream == 1
        for a, b in zip(got, layer(x, *[torch.cat([y] * S)] * 2), strict=True):
            torch.testing.assert_close(a, b)

    def test_replay_of_one_sample(self, device):
        layer = module(device, batch_first=True)
        x = torch.randn(B, T, D, device=device, dtype=torch.float64)
        with iw.sampling(S, seed=2):
            every, weights = layer(x, x, x)
        for s in range(S):
            with iw.sampling(1, seed=2, sample_ids=[s]):
                one = layer(x, x, x)
            torch.testing.assert_close(one[0], every[s * B : (s + 1) * B])
            assert torch.equal(one[1] == 0, weights[s * B : (s + 1) * B] == 0)

    def test_state_copy_and_pickle(self, device):
        original = module(device, kind=nn.MultiheadAttention, batch_first=True)
        layer = copy.deepcopy(original)
        layer.__class__ = iw.IWMultiheadAttention
        assert layer.state_dict().keys() == original.state_dict().keys()
        layer.load_state_dict(original.state_dict())
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        x = torch.randn(B, T, D, device=device, dtype=torch.float64)
        results = []
        for other in (layer, copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert type(other) is iw.IWMultiheadAttention
            with after_noise():
                results.append(other(x, x, x)[0])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_compiled(self, device):
        torch._dynamo.reset()
        layer = module(device, batch_first=True, dtype=torch.float32)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for rows in (B, S * B):
            x = torch.randn(rows, T, D, device=device)
            results = []
            for f in (layer, compiled):
                with after_noise():
                    y, weights = f(x, x, x, torch.zeros(rows, T, dtype=torch.bool, device=device))
                results.append([y, weights, *torch.autograd.grad(y.square().sum(), layer.parameters())])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)

    def test_autocast(self, device):
        layer = module(device, batch_first=True, dtype=torch.float32, add_bias_kv=True)
        x = torch.randn(B, T, D, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16), after_noise():
            low = layer(x, x, x)[0]
        with after_noise():
            full = layer(x, x, x)[0]
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)

    def test_bad_input(self, device):
        layer = module(device, batch_first=True, dtype=torch.float32)
        x = torch.ones(B, T, D, device=device)
        with iw.sampling(2):
            with pytest.raises(ValueError, match=r"key: expected \[rows, T, E\] where batch_first"):
                layer(x, x[0], x)
            with pytest.raises(ValueError, match=r"attn_mask: expected \[T, U\] or \[rows \* heads, T, U\]"):
                layer(x, x, x, attn_mask=torch.ones(T, device=device))
            with pytest.raises(ValueError, match=r"key_padding_mask: expected \[rows, U\]"):
                layer(x, x, x, torch.ones(T, device=device) > 0)
            with pytest.raises(TypeError, match=r"expected bool or floating-point, got torch.int64"):
                layer(x, x, x, torch.ones(B, T, device=device, dtype=torch.int64))
            layer.dropout = 1.5
            with pytest.raises(ValueError, match="dropout: expected a probability"):
                layer(x, x, x)


def swap(model: nn.Module) -> nn.Module:
    """By hand what iw.convert does to attention and nn.Dropout."""
    for m in model.modules():
        if type(m) is nn.MultiheadAttention:
            m.__class__ = iw.IWMultiheadAttention
        elif type(m) is nn.Dropout:
            m.__class__, m.batch_dim = iw.IWDropout, None
    return model


class TestTransformer:
    """Torch's own blocks, whose attention's class was swapped."""

    @pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
    def test_sample_by_sample(self, device, kind):
        """In training each sample's rows are those of a replay of that sample alone, gradients included; all noise is ours."""
        options = {"dropout": 0.3, "batch_first": True, "device": device, "dtype": torch.float64}
        if kind == "both":
            model = nn.Transformer(D, 2, 2, 2, 16, **options)
        elif kind == "encoder":
            model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, **options), 2, enable_nested_tensor=False)
        else:
            model = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 16, **options), 2)
        swap(model)
        x, y = torch.randn(B, U, D, device=device, dtype=torch.float64), torch.randn(B, T, D, device=device, dtype=torch.float64)
        inputs = (x,) if kind == "encoder" else (x, y)
        with iw.sampling(S, seed=3, expand="none") as context:
            out = model(*(torch.cat([v] * S) for v in inputs))
            streams = context.stream
        assert streams == {"encoder": 2 * 4, "decoder": 2 * 6, "both": 2 * 4 + 2 * 6}[kind]
        weight = torch.randn_like(out)
        want = torch.autograd.grad((out * weight).sum(), list(model.parameters()))
        grads, outs = [], []
        for s in range(S):
            with iw.sampling(1, seed=3, sample_ids=[s]):
                outs.append(model(*inputs))
            grads.append(torch.autograd.grad((outs[-1] * weight.view(S, *outs[-1].shape)[s]).sum(), list(model.parameters())))
        torch.testing.assert_close(torch.cat(outs), out)
        for a, b in zip(want, zip(*grads, strict=True), strict=True):
            torch.testing.assert_close(a, sum(b))

    def test_memory_that_is_not_expanded(self, device):
        """A decoder's queries are expanded, the encoder's memory not: projected once, the result as if repeated."""
        layer = swap(nn.TransformerDecoderLayer(D, 2, 16, dropout=0.3, batch_first=True, device=device, dtype=torch.float64))
        y = torch.randn(S * B, T, D, device=device, dtype=torch.float64)
        memory = torch.randn(B, U, D, device=device, dtype=torch.float64)
        with after_noise():
            got = layer(y, memory)
        with after_noise():
            torch.testing.assert_close(got, layer(y, torch.cat([memory] * S)))

    def test_eval_is_torchs(self, device):
        """Bit for bit, with and without the fast path of inference."""
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, device=device), 2).eval()
        x = torch.randn(B, T, D, device=device)
        padding = torch.tensor([[False, False, False], [False, False, True]], device=device)
        results = []
        for swapped in (False, True):
            if swapped:
                swap(model)
            for grad in (True, False):
                with torch.set_grad_enabled(grad), iw.sampling(S):
                    results.append(model(x, src_key_padding_mask=padding))
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
