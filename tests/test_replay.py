"""Converted models in several threads at once and in captured CUDA graphs: each forward draws what it would alone."""

import copy
import threading

import pytest
import torch
from oracle import naive
from torch import nn

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

S, B = 3, 5


def network():
    return nn.Sequential(nn.Linear(6, 63), nn.Tanh(), nn.Dropout(0.5), nn.Linear(63, 63), nn.Dropout(0.25))


def naive_zeros(seed, batch=B, samples=S, sample_ids=None):
    """Where the second noise layer gives zeros."""
    x = torch.empty(samples * batch, 63)
    return ~naive.naive_keep(x, 0.25, samples=samples, seed=seed, stream=1, expand=False, sample_ids=sample_ids)


def in_threads(*works):
    """Runs functions side by side, each past a barrier first; raises what one of them raised."""
    barrier, results, errors = threading.Barrier(len(works), timeout=60), [None] * len(works), []

    def run(i):
        try:
            barrier.wait()
            results[i] = works[i](barrier)
            assert current() is None
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class TestThreads:
    @pytest.mark.parametrize("expand", ["axis", "first", "input", "2"])
    def test_one_model_in_several_threads(self, expand):
        """Replicas as of nn.DataParallel share hooks and their owner: contexts do not mix, however the forwards interleave."""
        model = iw.convert(network(), S, expand=expand, example_inputs=torch.randn(B, 6))  # (a first forward is looked at, one at a time)
        meet = []

        def wait(*_):
            meet[0].wait()

        model[3].register_forward_hook(wait)  # every thread is inside its forward here

        def work(i):
            def forward(barrier):
                meet[:] = [barrier]
                with iw.sampling(i + 1, seed=i):
                    return model(torch.ones(B + i, 6))

            return forward

        for i, y in enumerate(in_threads(*(work(i) for i in range(4)))):
            assert y.shape == ((i + 1) * (B + i), 63)
            assert torch.equal(y == 0, naive_zeros(i, B + i, i + 1))

    @pytest.mark.parametrize("expand", ["axis", "first"])
    def test_own_contexts(self, expand):
        """Without an explicit context each forward, the first too, opens one in its own thread, with a seed of its own."""
        model = iw.convert(network(), S, expand=expand)
        ys = in_threads(*[lambda _: model(torch.ones(B, 6))] * 4)
        assert all(y.shape == (S * B, 63) for y in ys)
        assert not any(torch.equal(a == 0, b == 0) for i, a in enumerate(ys) for b in ys[:i])

    def test_replicas(self):
        """Shallow copies whose modules are new objects with the hooks of the old: what torch.nn.parallel.replicate makes."""
        model = iw.convert(network(), S, expand="input")
        replica = copy.copy(model)
        replica._modules = {name: copy.copy(child) for name, child in model._modules.items()}

        def work(module, seed):
            def forward(_):
                with iw.sampling(S, seed=seed):
                    return module(torch.ones(B, 6))

            return forward

        for seed, y in enumerate(in_threads(work(model, 0), work(replica, 1))):
            assert torch.equal(y == 0, naive_zeros(seed))

    def test_backward_in_threads(self):
        """Checkpointed forwards in two threads, both backward in a third."""
        model = iw.convert(network(), S, expand="first").double()
        x = torch.randn(B, 6, dtype=torch.float64, requires_grad=True)

        def forward(seed, run):
            with iw.sampling(S, seed=seed):
                return run(x)

        want = torch.autograd.grad(sum(forward(seed, model).square().sum() for seed in (0, 1)), x)
        losses = in_threads(*(lambda _, s=seed: forward(s, lambda x: iw.checkpoint(model, x)).square().sum() for seed in (0, 1)))
        got = in_threads(lambda _: torch.autograd.grad(sum(losses), x))[0]
        torch.testing.assert_close(got, want)

    def test_an_exception_in_one_thread(self):
        model = iw.convert(network(), S, expand="first")
        outcome = []

        def fails(barrier):
            with pytest.raises(RuntimeError), iw.sampling(2):
                model(torch.ones(B, 7))
            outcome.append(current())
            barrier.wait()

        def works(barrier):
            with iw.sampling(S, seed=1):
                barrier.wait()
                return model(torch.ones(B, 6))

        _, y = in_threads(fails, works)
        assert outcome == [None]
        assert torch.equal(y == 0, naive_zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestCudaGraphs:
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_each_replay_draws_anew(self, checkpointed):
        """The seed is drawn on the device inside the graph: replays differ, and are what eager draws for the same torch.manual_seed."""
        model = iw.convert(network(), S, expand="first").cuda()
        criterion = iw.IWCrossEntropyLoss(S)
        x, target = torch.randn(B, 6, device="cuda"), torch.randint(63, (B,), device="cuda")

        def step():
            model.zero_grad(set_to_none=False)
            with iw.sampling(S):
                # torch's own random state cannot be read while a graph is captured, and is not needed here
                y = iw.checkpoint(model, x, preserve_rng_state=False) if checkpointed else model(x)
            criterion(y, target).backward()
            return y.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = step()
        masks, gradients = [], []
        for _ in range(2):
            graph.replay()
            masks.append(static == 0)
        assert not torch.equal(*masks)
        for run in (graph.replay, step):
            torch.cuda.manual_seed(5)
            y = run()
            gradients.append([(static if y is None else y).clone(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
