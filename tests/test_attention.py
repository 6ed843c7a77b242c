"""Attention under noise against a loop over samples, examples, heads and positions; torch's own where there is no noise."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import naive_layers

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
        q = torch.randn(T, E, device=device)  # what torch takes and has no rows, or one for all
        one = [v.detach()[:1] for v in x]
        with iw.sampling(S):
            assert torch.equal(iw.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
            assert torch.equal(iw.scaled_dot_product_attention(x[0], one[1], one[2]), F.scaled_dot_product_attention(x[0], one[1], one[2]))
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

    def test_what_is_kept_for_backward(self, device, backend):
        """Rows that are not expanded are soft-maxed once: kept are their probabilities and the S noisy ones, else S of each."""
        kept = {}
        n, inputs = 64, 3 * 64 * 8
        for rows in (1, S):
            x = [torch.randn(rows, 1, n, 8, device=device).requires_grad_() for _ in range(3)]
            storages = {}

            def pack(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
                return t  # alive as long as the graph, so that no two share an address

            with iw.sampling(S, expand="none" if rows == S else "first"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = iw.scaled_dot_product_attention(*x, dropout_p=0.3)
            kept[rows] = sum(storages.values())
            assert y.requires_grad
        assert (1 + S) * n * n <= kept[1] <= (1 + S) * n * n + (1 + S) * inputs
        assert 2 * S * n * n <= kept[S] <= 2 * S * n * n + 2 * S * inputs

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
        iw.scaled_dot_product_attention(x.long(), x, x, dropout_p=0.3)
    with pytest.raises(TypeError, match="value: expected a tensor, got NoneType"):
        iw.scaled_dot_product_attention(x, x, None, dropout_p=0.3)
    with pytest.raises(TypeError, match=r"attn_mask: expected bool or floating-point, got torch.int64"):
        iw.scaled_dot_product_attention(x, x, x, torch.ones(T, T, dtype=torch.int64), dropout_p=0.3)


D = 8  # embedding, of two heads
