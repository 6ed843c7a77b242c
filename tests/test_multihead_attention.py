"""IWMultiheadAttention against float64 loops and torch: alone, and inside torch.nn.Transformer."""

import copy
import io
import math

import pytest
import torch
from oracle import naive_layers
from test_attention import ADDRESS, B, D, S, T, U, after_noise, assert_same, leaves
from torch import nn

import iwsgd_ext as iw


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
            with pytest.raises(ValueError, match=r"value: expected key's number of positions, got \(2, 2, 8\)"):
                layer(x, x, x[:, :2])
            for shape in ((T,), (T, 1), (1, T), (3, T, T), (B, 2, T, T)):
                with pytest.raises(ValueError, match=r"attn_mask: expected \[T, U\] or \[rows \* heads, T, U\]"):
                    layer(x, x, x, attn_mask=torch.ones(shape, device=device))
            with pytest.raises(ValueError, match=r"attn_mask: expected 2 rows, or 2 samples \* 2 = 4, got 3"):
                layer(x, x, x, attn_mask=torch.ones(6, T, T, device=device))
            for shape in ((T,), (B, 1), (B, 1, T)):
                with pytest.raises(ValueError, match=r"key_padding_mask: expected \[rows, U\]"):
                    layer(x, x, x, torch.ones(shape, device=device) > 0)
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

    @pytest.mark.filterwarnings("ignore::UserWarning:torch.nn")  # its own nested tensors
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
        both = nn.Transformer(D, 2, 1, 1, 16, device=device).eval()
        results = []
        for swapped in (False, True):
            if swapped:
                swap(both)
            with iw.sampling(S) as context:
                results.append(both(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(B, device=device)))
                assert context.stream == 0
        assert torch.equal(*results)
