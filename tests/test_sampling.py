"""The sampling context: seed, streams, the place of expansion, sample ids, nesting, threads and exceptions."""

import asyncio
import copy
import threading

import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

drop = iw.IWDropout(0.5)


def seed_drawn_after(manual_seed: int, device: torch.device) -> int:
    """The first 64 bits of torch's default generator of the device."""
    torch.manual_seed(manual_seed)
    return torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None).item()


class TestSeed:
    def test_int(self, device, backend):
        """A new context with the same seed repeats, another seed does not; negative and unsigned 64-bit seeds are the same bits."""
        x = torch.randn(3, 63, device=device)
        for seed in (0, -1, 2**63 - 1, -(2**63)):
            with iw.sampling(2, seed=seed):
                y = drop(x)
            assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=seed))
            with iw.sampling(2, seed=seed % 2**64):
                assert torch.equal(drop(x), y)
            with iw.sampling(2, seed=torch.tensor(seed)):
                assert torch.equal(drop(x), y)
            with iw.sampling(2, seed=(seed + 1) % 2**64):
                assert not torch.equal(drop(x), y)

    def test_none_follows_manual_seed(self, device, backend):
        """One draw from the default generator at the first noise call, none later, none without a noise call."""
        seed = seed_drawn_after(5, device)
        x = torch.randn(3, 63, device=device)
        torch.manual_seed(5)
        with iw.sampling(2):
            y = drop(x)
            drop(y)
        after = torch.rand(1, device=device)
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=seed))
        seed_drawn_after(5, device)
        assert torch.equal(after, torch.rand(1, device=device))
        torch.manual_seed(5)
        with iw.sampling(2):
            pass
        with iw.sampling(2):
            assert torch.equal(drop(x), y)
            torch.manual_seed(5)
        with iw.sampling(2):
            assert torch.equal(drop(x), y)
        with iw.sampling(2):
            assert not torch.equal(drop(x), y)

    def test_int_seed_leaves_the_generator_alone(self, device, backend):
        torch.manual_seed(5)
        want = torch.rand(1, device=device)
        torch.manual_seed(5)
        with iw.sampling(2, seed=0):
            drop(torch.ones(3, device=device))
        assert torch.equal(torch.rand(1, device=device), want)


def test_streams_count_the_calls(device, backend):
    """Each call takes the next stream, a module called twice takes two, and they go on over forwards."""
    x = torch.randn(2, 63, device=device)
    other = iw.IWDropPath(0.5)
    with iw.sampling(2, seed=4) as context:
        calls = [drop(x), drop(x), other(x), drop(torch.cat([x, x])), drop.eval()(x), drop.train()(x)]
        assert context.stream == 5
    for stream, unit, y in ((0, "element", calls[0]), (1, "element", calls[1]), (2, "row", calls[2]), (4, "element", calls[5])):
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=4, stream=stream, unit=unit))
    assert torch.equal(calls[3].cpu(), naive.naive_noise(torch.cat([x, x]), 0.5, samples=2, seed=4, stream=3, expand=False))
    with iw.sampling(2, seed=4):
        assert torch.equal(drop(x), calls[0])


class TestExpansion:
    def test_first_call_fixes_the_batch(self, device, backend):
        with iw.sampling(3):
            assert drop(torch.ones(4, 5, device=device)).shape == (12, 5)
            assert drop(torch.ones(12, 7, device=device)).shape == (12, 7)
            assert drop(torch.ones(4, 9, device=device)).shape == (12, 9)

    @pytest.mark.parametrize("rows", [1, 3, 8, 24, 36])
    def test_other_rows_raise_and_name_the_numbers(self, device, backend, rows):
        with iw.sampling(3) as context:
            drop(torch.ones(4, 5, device=device))
            with pytest.raises(ValueError, match=rf"met {rows} rows, but in this context the batch is 4 and samples=3, .* 4 .* 12 "):
                drop(torch.ones(rows, 5, device=device))
            assert context.stream == 1

    def test_one_sample_expands_nothing(self, device, backend):
        x = torch.randn(4, 63, device=device)
        with iw.sampling(1, seed=2):
            y = drop(x)
            assert drop(y).shape == (4, 63)
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=1, seed=2))

    def test_two_branches_meet(self, device, backend):
        """Question and image expand each at its own first noise layer, with the same samples, and fit."""
        question, image = torch.randn(4, 63, device=device), torch.randn(4, 63, device=device)
        with iw.sampling(3, seed=1):
            both = drop(question) * drop(image)
        want = naive.naive_noise(question, 0.5, samples=3, seed=1) * naive.naive_noise(image, 0.5, samples=3, seed=1, stream=1)
        assert torch.equal(both.cpu(), want)

    def test_none_takes_any_multiple(self, device, backend):
        """Expanded outside: 3 samples of 4 examples, or of 4 * 5 tokens."""
        with iw.sampling(3, seed=1, expand="none"):
            for stream, rows in enumerate((12, 60, 3, 12)):
                x = torch.randn(rows, 9, device=device)
                want = naive.naive_noise(x, 0.5, samples=3, seed=1, stream=stream, expand=False)
                assert torch.equal(drop(x).cpu(), want)
            with pytest.raises(ValueError, match=r"met 4 rows, which is no multiple of samples=3\b.*give batch_dim"):
                drop(torch.ones(4, 9, device=device))

    def test_rows_in_another_dimension(self, device, backend):
        x = torch.randn(7, 4, 9, device=device)
        for batch_dim in (1, -2):
            with iw.sampling(3, seed=1, batch_dim=batch_dim):
                y = drop(x)
                z = drop(y)
            assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=3, seed=1, batch_dim=1))
            assert torch.equal(z.cpu(), naive.naive_noise(y, 0.5, samples=3, seed=1, stream=1, batch_dim=1, expand=False))


class TestSampleIds:
    @pytest.mark.parametrize(
        "ids",
        [[5], [0, 1, 2], [7, 3, 7], torch.tensor([2**32 - 1, 0]), torch.arange(12).view(3, 4), torch.arange(12).view(4, 3).t()],
        ids=["replay", "default", "repeated", "tensor", "per-example", "per-example-transposed"],
    )
    def test_choose_the_masks(self, device, backend, ids):
        x = torch.randn(4, 63, device=device)
        samples = len(ids)
        with iw.sampling(samples, seed=3, sample_ids=ids):
            y = drop(x)
            z = drop(y)
        assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=samples, seed=3, sample_ids=ids))
        assert torch.equal(z.cpu(), naive.naive_noise(y, 0.5, samples=samples, seed=3, sample_ids=ids, stream=1, expand=False))

    def test_replay_of_one_sample_alone(self, device, backend):
        model = nn.Sequential(drop, nn.Linear(9, 9), iw.IWDropout(0.3)).to(device)
        x = torch.randn(4, 9, device=device)
        with iw.sampling(7, seed=3):
            whole = model(x).view(7, 4, 9)
        with iw.sampling(1, seed=3, sample_ids=[5]):
            torch.testing.assert_close(model(x), whole[5])

    def test_wrong_batch(self, device, backend):
        with (
            iw.sampling(2, sample_ids=torch.ones(2, 3, dtype=torch.int64)),
            pytest.raises(ValueError, match=r"sample_ids: expected \[2, 4\]"),
        ):
            drop(torch.ones(4, 5, device=device))


@pytest.mark.parametrize("first", [0, 6, -2, 2**32 - 1, torch.tensor(6), torch.tensor([2**40 + 6])], ids=str)
def test_first_example(device, backend, first):
    x = torch.randn(4, 63, device=device)
    with iw.sampling(2, seed=3, first_example=first):
        y = drop(x)
        z = drop(y)
    address = {"samples": 2, "seed": 3, "first_example": int(first)}
    assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, **address))
    assert torch.equal(z.cpu(), naive.naive_noise(y, 0.5, stream=1, expand=False, **address))


def test_seed_and_first_example_together_with_none(device, backend):
    """A drawn seed with a tensor of first_example."""
    seed = seed_drawn_after(8, device)
    x = torch.randn(4, 63, device=device)
    torch.manual_seed(8)
    with iw.sampling(2, first_example=torch.tensor(3)):
        y = drop(x)
    assert torch.equal(y.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=seed, first_example=3))


class TestNesting:
    def test_innermost_rules_and_the_outer_goes_on(self, device, backend):
        x = torch.randn(4, 63, device=device)
        with iw.sampling(2, seed=1) as outer:
            a = drop(x)
            with iw.sampling(3, seed=2) as inner:
                assert current() is inner
                b = drop(x)
            assert current() is outer
            c = drop(x)
        assert current() is None
        assert torch.equal(a.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=1))
        assert torch.equal(b.cpu(), naive.naive_noise(x, 0.5, samples=3, seed=2))
        assert torch.equal(c.cpu(), naive.naive_noise(x, 0.5, samples=2, seed=1, stream=1))

    def test_restored_after_exceptions(self):
        for error in (ValueError, KeyboardInterrupt, GeneratorExit):
            with iw.sampling(2) as outer:
                with pytest.raises(error), iw.sampling(3), iw.sampling(4):
                    raise error
                assert current() is outer
            assert current() is None

    def test_threads_have_their_own(self):
        """A context is not seen by other threads, and two at once do not mix."""
        shapes, barrier = {}, threading.Barrier(3, timeout=60)

        def work(samples):
            barrier.wait()
            if samples is None:
                shapes[samples] = drop(torch.ones(4, 5)).shape
                barrier.wait()
                return
            with iw.sampling(samples):
                barrier.wait()
                shapes[samples] = drop(torch.ones(4, 5)).shape

        with iw.sampling(5):
            threads = [threading.Thread(target=work, args=(s,)) for s in (None, 2, 3)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert drop(torch.ones(4, 5)).shape == (20, 5)
        assert shapes == {None: (4, 5), 2: (8, 5), 3: (12, 5)}

    def test_backward_needs_no_context(self, device, backend):
        x = torch.randn(4, 63, device=device, requires_grad=True)
        with iw.sampling(3, seed=1):
            y = drop(x)
        with iw.sampling(2, seed=9):
            y.sum().backward()
        want = naive.naive_keep(x, 0.5, samples=3, seed=1).double().view(3, 4, 63).sum(0) * 2
        assert torch.equal(x.grad.cpu().double(), want)


BAD = [
    (ValueError, "samples: expected an integer >= 1, got 0", {"samples": 0}),
    (ValueError, "samples: expected an integer >= 1, got -3", {"samples": -3}),
    (TypeError, "samples: expected an int, got float", {"samples": 2.0}),
    (TypeError, "samples: expected an int, got bool", {"samples": True}),
    (TypeError, "seed: expected an int .*, got float", {"seed": 1.5}),
    (TypeError, "seed: expected an int .*, got str", {"seed": "7"}),
    (TypeError, "seed: expected .*, got torch.float32", {"seed": torch.tensor(1.0)}),
    (TypeError, r"seed: expected .*, got torch.int64 \(2,\)", {"seed": torch.tensor([1, 2])}),
    (TypeError, "first_example: expected .*, got float", {"first_example": 1.5}),
    (TypeError, "first_example: expected .*, got torch.int32", {"first_example": torch.tensor(1, dtype=torch.int32)}),
    (ValueError, "expand: expected 'first' or 'none' .*, got 'input'", {"expand": "input"}),
    (TypeError, "batch_dim: expected an int, got str", {"batch_dim": "rows"}),
    (TypeError, "sample_ids: expected int64, got torch.int32", {"sample_ids": torch.ones(2, dtype=torch.int32)}),
    (TypeError, "sample_ids: expected an int64 tensor or a sequence of ints, got 3", {"sample_ids": 3}),
    (TypeError, "sample_ids: expected an int64 tensor or a sequence of ints", {"sample_ids": [0.5, 1]}),
    (ValueError, r"sample_ids: expected \[2\] or \[2, batch\] as samples=2, got \(3,\)", {"sample_ids": [1, 2, 3]}),
    (ValueError, r"sample_ids: .*, got \(2, 1, 1\)", {"sample_ids": torch.ones(2, 1, 1, dtype=torch.int64)}),
]


def test_a_context_is_entered_once():
    """One context is one draw of all noise: a second block would go on where the first ended, whatever its seed."""
    context = iw.sampling(3, seed=0)
    with context, pytest.raises(RuntimeError, match=r"entered before.* make a new one"):
        context.__enter__()
    with pytest.raises(RuntimeError, match=r"entered before.* make a new one"), context:
        pass
    assert current() is None


def test_contexts_of_asyncio_tasks():
    """Contexts are the thread's: one that another task has left open is no task's own. Between two awaits all is right."""
    drop, x = iw.IWDropout(0.5), torch.ones(4, 63)

    async def across(seed):
        with iw.sampling(3, seed=seed):
            await asyncio.sleep(0)
            return drop(x)

    async def between(seed):
        await asyncio.sleep(0)
        with iw.sampling(3, seed=seed):
            y = drop(x)
        await asyncio.sleep(0)
        return y

    async def both(task, **options):
        return await asyncio.gather(task(1), task(2), **options)

    with iw.sampling(3, seed=1):  # of no task: whoever runs inside shares it
        assert asyncio.run(both(lambda seed: asyncio.sleep(0, drop(x)))) is not None

    for error in asyncio.run(both(across, return_exceptions=True))[:1]:
        assert isinstance(error, RuntimeError) and "another asyncio task" in str(error)
    results = asyncio.run(both(between))
    assert current() is None
    for seed, y in enumerate(results, 1):
        with iw.sampling(3, seed=seed):
            assert torch.equal(y, drop(x))
    assert asyncio.run(across(1)).equal(results[0])

    async def copied():
        with iw.sampling(3) as context:
            return copy.deepcopy(context).samples

    assert asyncio.run(copied()) == 3


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (_, _, c) in enumerate(BAD)])
def test_bad_arguments(error, message, change):
    with pytest.raises(error, match=message):
        iw.sampling(**{"samples": 2, **change})
