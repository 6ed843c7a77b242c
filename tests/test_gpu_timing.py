"""tools/gpu_timing.py on the CPU, by a clock that is made up: what it runs, counts, compares and writes; and how a GPU's tools are read."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
import gpu  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_timing import Case, Work  # noqa: E402

CPU = torch.device("cpu")
SMALL = 4000  # what sizes are divided by


def watch(run, times: int) -> float:
    """Each run takes 2 ms."""
    run()
    return 0.002 * times


def test_every_case(tmp_path):
    """Its results are right, and its bytes over its time are what the table says."""
    out, cases = tmp_path / "timing.jsonl", list(gpu_timing.cases())
    rows = gpu_timing.time_cases(cases, CPU, out, 0.02, watch, SMALL)
    assert [row["case"] for row in rows] == [case.name for case in cases]
    assert not any("wrong" in row or "failed" in row for row in rows), rows
    for row in rows:
        assert row["us"] == pytest.approx(2000) and row["bytes_per_s"] == pytest.approx(row["bytes"] / 0.002)
        assert row["of_copy"] == pytest.approx(row["bytes"] / rows[0]["bytes"])
    table = gpu.timing_table(gpu_timing.gpu_cases.read(out))
    assert len(table) == len(cases) + 1 and table[1].split()[:2] == ["copy", "2000.0"]
    assert len("\n".join(table)) < 2600, "it is printed as a whole"


def test_sizes():
    """A call moves 0.25 to 1.25 GB: so much that no cache holds it, and so little that all cases have their time."""
    for case in gpu_timing.cases():
        if "128256" not in case.name and "32000" not in case.name:  # which are not cut into so small parts
            assert 0.25e9 < case.make(CPU, 1024).bytes * 1024 < 2.2e9, case.name
    assert 2 * 2 * gpu_timing.LOGITS < 1.25e9
    z, target = gpu_timing.logits_of(CPU, SMALL, 10)
    assert gpu_timing.loss(CPU, SMALL, 10).bytes == 2 * z.nbytes and len(z) == 8 * len(target)
    x = gpu_timing.x_of(CPU, SMALL)
    assert gpu_timing.noise_forward(CPU, SMALL, 4).bytes == gpu_timing.noise_backward(CPU, SMALL, 4).bytes == 5 * x.nbytes


def test_wrong_results_are_seen(monkeypatch):
    """Of everything but the rows that the reference works on."""
    honest, honest_loss = gpu_timing.functional.dropout, gpu_timing.iw.iw_cross_entropy

    def dropout(x, p, first_example=0, **address):
        return honest(x, p, first_example=first_example, **address) * (1 if first_example else 2)

    def loss(z, *arguments):
        return honest_loss(z, *arguments) * (2 if z.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(gpu_timing.functional, "dropout", dropout)
    monkeypatch.setattr(gpu_timing.iw, "iw_cross_entropy", loss)
    for make in (gpu_timing.noise_forward, gpu_timing.noise_backward, gpu_timing.loss):
        with pytest.raises(AssertionError):
            make(CPU, SMALL, 4).check()


def test_what_fails_is_a_line_and_the_rest_runs(tmp_path):
    def broken(device, divided):
        raise ZeroDivisionError("in a\ncase")

    def check():
        raise AssertionError("the mean is 3, not 2")

    cases = [
        Case("copy", lambda device, divided: Work(lambda: None, 100)),
        Case("broken", broken),
        Case("wrong", lambda device, divided: Work(lambda: None, 50, check)),
    ]
    out = tmp_path / "timing.jsonl"
    gpu_timing.time_cases(cases, CPU, out, 0.02, watch)
    rows = [row for row in map(json.loads, out.read_text().splitlines()) if "began" not in row]
    assert rows[1] == {"case": "broken", "failed": "ZeroDivisionError: in a case"}
    assert rows[2]["wrong"] == "the mean is 3, not 2" and rows[2]["of_copy"] == 0.5
    table = "\n".join(gpu.timing_table(rows))
    assert "FAILED: ZeroDivisionError: in a case" in table and "WRONG: the mean is 3, not 2" in table


def test_started_again_it_goes_on_behind_the_case_that_ended_it(tmp_path):
    out = tmp_path / "timing.jsonl"
    lines = [
        {"case": "copy", "began": True},
        {"case": "copy", "us": 1.0, "least_us": 1.0, "most_us": 1.0, "bytes_per_s": 200.0},
        {"case": "deadly", "began": True},
    ]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "cut o')
    cases = [Case(name, lambda device, divided: Work(lambda: None, 100)) for name in ("copy", "deadly", "next")]
    (row,) = gpu_timing.time_cases(cases, CPU, out, 0.02, lambda run, times: 1.0 * times)
    assert row["case"] == "next" and row["of_copy"] == 0.5
    assert "deadly" in "\n".join(gpu.timing_table(gpu_timing.gpu_cases.read(out))), "which ended it"


def test_blocks():
    """All together take about the seconds that are given; a slow call is run twice in each."""
    asked = []
    for one, times in ((0.001, 50), (1.0, 2), (1e-9, 1000)):
        values = gpu_timing.timed(lambda: None, lambda run, n, one=one: (asked.append(n), one * n)[1], 0.25)
        assert len(values) == gpu_timing.BLOCKS and values == pytest.approx([one] * len(values)) and asked[-1] == times


def test_on_a_gpu_replays_are_timed_behind_one_that_runs(monkeypatch):
    """With stubs in the place of torch's CUDA: the capture is on the stream that the case ran on, and no event encloses a launch."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 6.0

    @contextlib.contextmanager
    def capture(graph, stream):
        done.append(("capture", stream))
        yield

    stream = types.SimpleNamespace(synchronize=lambda: done.append("stream ready"))
    fakes = {"Event": Event, "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: done.append("replay")), "graph": capture}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = gpu_timing.replay_of(lambda: done.append("call"), stream)
    assert done == ["stream ready", ("capture", stream), "call"]
    done.clear()
    assert gpu_timing.by_events(replay, 3) == 0.006
    assert done == ["replay", "event", "replay", "replay", "replay", "event", "wait"]


def test_once_runs_each_large_kernel_for_a_profiler(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOLS / "gpu_timing.py", "--once", "--device", "cpu", "--divided", str(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == [*(f"loss C={c}" for c in gpu_timing.CLASSES), "noise backward S=8"], done.stderr


NCU = """==PROF== Connected to process 12
==PROF== Profiling "noise_fwd_kernel" - 0: 0%....50%....100% - 9 passes
a line of the program
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread","sm__warps_active.avg.pct"
"","","","","ns","register/thread","%"
"0","12","void iwsgd::noise_fwd_kernel<bf16, 8>(int, float)","(132, 1, 1)","358,016","64","93.25"
"1","12","iw_cross_entropy_fwd_kernel","(264, 1, 1)","1,000.5","255","n/a"
"""


def test_counters_of_ncu_are_read():
    """Numbers have commas, units a line of their own, and what could not be counted is left out."""
    first, second = gpu.launches(NCU)
    name = "sm__warps_active.avg.pct"
    assert first == {
        "kernel": "void iwsgd::noise_fwd_kernel<bf16, 8>(int, float)",
        "grid": "(132, 1, 1)",
        "gpu__time_duration.sum": 358016.0,
        "launch__registers_per_thread": 64.0,
        name: 93.25,
    }
    assert second["gpu__time_duration.sum"] == 1000.5 and name not in second
    assert gpu.launches('==ERROR== Failed to find metric x\n"a","b"\n') == gpu.launches("") == []
