"""Runs of the benchmark suite, never timed: turns, ratios, the noise criterion, filters, reasons, interruption."""

import dataclasses
import json
import math
import re
import time

import pytest
import torch

import iwsgd_ext as iw
from bench import case as case_module
from bench import measure, peers, run
from bench.__main__ import main
from bench.case import BASELINE, Case, Grid, Skip, Variant
from bench.measure import Timing

CPU = torch.device("cpu")


def test_noise_criterion():
    quiet = [1.0, 1.01, 1.02, 1.0, 1.03, 1.01, 1.0]
    assert Timing.of(quiet).noise is None
    assert Timing.of(quiet).median == 1.01
    assert Timing.of([1.0, 1.0, 1.6, 1.7, 1.0, 1.5, 1.1]).noise.startswith("p80/p20 = 1.5")
    assert Timing.of([1.0, 1.0, 1.0]).noise == "3 runs"
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
    assert measure.drifted(20e9, 19e9) is None and measure.drifted(20e9, 21.9e9) is None
    assert "from 20.0 to 15.0 GB/s" in measure.drifted(20e9, 15e9)


def test_variants_take_turns_and_an_unfinished_round_is_left_out():
    order, clock = [], iter(range(10**6))
    variants = {name: Variant(lambda name=name: order.append(name), lambda: None) for name in "abc"}
    watch = lambda f: (f(), 0.5)[1]  # noqa: E731
    times = measure.interleave(variants, watch, seconds=1, least=3, flush=lambda: None, now=lambda: next(clock))
    assert order[:9] == [*"abc", *"bca", *"cab"]
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", len(order) // 3)
    order.clear()
    measure.interleave(variants, watch, seconds=0, least=2, most=2)
    assert order == [*"aabbcc", *"bbccaa"]  # without a flush, each after a run of its own

    prepared = []
    one = {"a": Variant(lambda: None, lambda: None, before=lambda: prepared.append(1))}
    times = measure.interleave(one, watch, seconds=0, least=2, most=2, inner=5, flush=lambda: None)
    assert times == {"a": [0.1, 0.1]} and len(prepared) == 2


def test_paired_ratio_is_taken_within_rounds():
    """A machine that becomes ten times slower in mid-run changes every time, and no ratio."""
    r = run.Run(CPU, limits={"copy": 1e9, "matrix_float32": 1e9})
    c = fake_case({})
    variants = {name: Variant(lambda: None, lambda: None) for name in (BASELINE, "ours")}
    r._rows(c, variants, {BASELINE: 0.0, "ours": 0.0}, {BASELINE: [4.0, 4.0, 4.0, 40.0, 40.0], "ours": [2.0, 2.0, 2.0, 20.0, 20.0]})
    ours = r.results[1]
    assert ours["ratio"] == ours["ratio_p20"] == ours["ratio_p80"] == 2.0
    assert ours["noise"] is not None


def fake_case(providers: dict, **options) -> Case:
    fields = {"level": "op", "op": "fake", "size": "tiny", "work": "forward", "samples": 8, "batch": 1, "dtype": torch.float32}
    options = {"flush": False, "setup": lambda case: case, "device": CPU, "rank": 0, **options}
    return Case(**fields, **options, providers=providers)


def fine(_=None) -> Variant:
    return Variant(lambda: torch.ones(3).sum(), lambda: None, bytes=24)


def measured(case_: Case | list[Case], monkeypatch, least: int = 2, **options) -> run.Run:
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1e11)
    r = run.Run(CPU, seconds=0.0, least=least, **options)
    r.measure([case_] if isinstance(case_, Case) else case_)
    return r


def test_what_cannot_be_measured_is_a_row_with_its_reason(monkeypatch):
    def missing(_):
        raise Skip("package x is not installed")

    def broken(_):
        raise ZeroDivisionError("in a\nprovider")

    def too_large(_):
        raise torch.OutOfMemoryError("tried to allocate 1 EiB")

    def wrong(_):
        def check():
            raise AssertionError("the mean is 3, not 2")

        return Variant(lambda: None, check)

    providers = {BASELINE: fine, "missing": missing, "broken": broken, "large": too_large, "wrong": wrong, "good": fine}
    r = measured(fake_case(providers), monkeypatch)
    found = {row["provider"]: (row["status"], row["reason"]) for row in r.results}
    assert found == {
        BASELINE: ("ok", ""),
        "good": ("ok", ""),
        "missing": ("skipped", "package x is not installed"),
        "broken": ("failed", "ZeroDivisionError: in a provider"),
        "large": ("skipped", "the size does not fit: tried to allocate 1 EiB"),
        "wrong": ("wrong", "the mean is 3, not 2"),
    }
    assert all((row["median_s"] is None) == (row["status"] != "ok") for row in r.results)
    assert not r.interrupted


def test_sizes_devices_and_times_that_are_not_there(monkeypatch):
    r = measured(fake_case({BASELINE: fine}, need=1 << 60), monkeypatch)
    assert r.results[0]["reason"].startswith("the size does not fit: about 1073741824.0 GiB, free are")
    r = measured(fake_case({BASELINE: fine}), monkeypatch, deadline=-1.0)
    assert r.results[0]["reason"] == "the time that was given is used up"
    if not torch.cuda.is_available():
        r = run.Run(torch.device("cuda"))
        r.measure(run.cases(Grid(torch.device("cuda"), quick=True), run.Selection()))
        assert {row["status"] for row in r.results} == {"skipped"} and len(r.results) > 20
        assert {row["reason"] for row in r.results} == {"there is no CUDA device: torch.cuda.is_available() is False"}


def test_backends_that_are_not_built_and_peers_that_are_not_installed():
    if not iw.backend_info()["built"]["cuda"]:
        with pytest.raises(Skip, match="cuda"):
            case_module.backend("cuda")
    with pytest.raises(Skip, match=r"nobody is not installed"):
        peers._function("nobody", "no_such_module_anywhere", "f", CPU)
    with pytest.raises(Skip, match="torch needs a GPU"):
        peers._function("torch", "torch", "ones", CPU)
    with pytest.raises(Skip, match=r"torch has no torch\.nothing in this version"):
        peers._function("torch", "torch", "nothing", torch.device("cuda"))


def test_interrupt_in_a_provider_keeps_what_was_measured(monkeypatch, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    first, second = fake_case({BASELINE: fine}), fake_case({BASELINE: interrupted})
    monkeypatch.setattr("bench.__main__.cases", lambda grid, selection: [first, second])
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1e11)
    assert main(["--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)]) == 130
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["interrupted"] is True
    assert [row["status"] for row in document["results"]] == ["ok"]
    assert (tmp_path / "report.html").exists() and (tmp_path / "results.csv").exists()


def test_a_compiler_is_not_begun_too_late(monkeypatch):
    monkeypatch.setattr(run, "COMPILATION", 1e9)
    deadline = time.monotonic() + 1e8
    r = measured(fake_case({BASELINE: fine, "expanded batch, torch.compile": fine}), monkeypatch, deadline=deadline)
    assert [row["status"] for row in r.results] == ["skipped", "ok"]
    assert re.fullmatch(r"a compiler may take more than the \d+ s that are left", r.results[0]["reason"])


def test_interrupt_while_timing_keeps_whole_rounds(monkeypatch):
    """One call comes before the timing, two in each round; the third round is interrupted after the baseline's part of it."""
    calls = []

    def run_once():
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt

    providers = {BASELINE: fine, "interrupted": lambda _: Variant(run_once, lambda: None)}
    r = measured([fake_case(providers), fake_case({BASELINE: fine})], monkeypatch, least=5)
    assert r.interrupted
    assert [(row["provider"], row["runs"], row["noise"]) for row in r.results] == [(name, 2, "2 runs") for name in providers]
    assert all(row["memory_bytes"] is None for row in r.results)


def test_filters():
    grid = Grid(CPU)
    every = run.cases(grid, run.Selection())
    assert {c.level for c in every} == set(case_module.LEVELS)
    assert [c.rank for c in every] == sorted(c.rank for c in every)
    assert {c.op for c in run.cases(grid, run.Selection(ops=("wrn", "vgg")))} == {"WRN", "VGG"}
    assert {c.level for c in run.cases(grid, run.Selection(levels=("host",)))} == {"host"}
    of = run.Selection(providers=("IW CPU",)).providers_of(every[0])
    assert of[0] == BASELINE and len(of) > 1 and all("iw cpu" in name for name in of[1:])
    some = run.cases(Grid(CPU, samples=(3, 5), classes=(77,), dtypes=(torch.float64,)), run.Selection(levels=("op", "layer")))
    assert {c.samples for c in some} == {3, 5} and {c.dtype for c in some} == {torch.float64}
    assert {c.classes for c in some if c.op in ("iw_cross_entropy", "layer")} == {77}
    assert len(run.cases(Grid(CPU, quick=True), run.Selection())) < len(every) / 3
    assert all(BASELINE in c.providers for c in every)


def test_command_line(capsys):
    assert main(["--list", "--device", "cpu", "--quick", "--op", "noise", "--provider", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("noise" in line and BASELINE in line for line in lines)
    for wrong in (["--samples", "0"], ["--minutes", "-1"], ["--op", "nothing"], ["--level", "nothing"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as error:
            main(wrong)
        assert error.value.code == 2


def test_every_case_has_memory_and_classes_in_proportion():
    """Sizes are given for a machine that can hold them: an estimate is there for all that is large."""
    for device in (CPU, torch.device("cuda")):
        for c in run.cases(Grid(device), run.Selection(levels=("op", "layer", "step"))):
            assert 0 < c.need < 200 * 2**30 * (8 if c.samples > 8 else 1), c.name
            assert math.prod((c.samples, c.batch)) > 0


def test_a_gpus_events_do_not_enclose_the_host(monkeypatch):
    """With stubs: the GPU is busy before the first event, while the host launches. A training step's time holds the host's."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    for hold, before in ((0, []), (measure.HOLD, [measure.HOLD])):
        done.clear()
        assert measure.stopwatch(torch.device("cuda"), hold=hold)(lambda: done.append("run")) == 0.005
        assert done == [*before, "event", "run", "event", "wait"]
    asked = []
    monkeypatch.setattr(run, "stopwatch", lambda device, host, hold: asked.append((host, hold)) or (lambda f: (f(), 0.1)[1]))
    for level in ("op", "layer", "step", "host"):
        measured(dataclasses.replace(fake_case({BASELINE: fine}), level=level), monkeypatch)
    assert asked == [(False, measure.HOLD), (False, measure.HOLD), (False, 0), (True, 0)]
