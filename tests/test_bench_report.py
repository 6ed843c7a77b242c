"""What the benchmark suite says of results: files, tables, figures, the report, comparisons. All numbers here are made up."""

import copy
import json
import re

import pytest

from bench import figures, files, summary, table
from bench.__main__ import main
from bench.case import BASELINE
from bench.compare import compare, text
from bench.files import read_csv, read_json, write_csv, write_json
from bench.report import html
from bench.run import FIELDS


def row(provider: str, median: float, **values) -> dict:
    base = dict.fromkeys(FIELDS)
    base.update(level="op", op="noise", size="1024x4096", work="forward", samples=8, batch=1024, dtype="float32", device="cpu", threads=2)
    base.update(provider=provider, status="ok", reason="", median_s=median, p20_s=0.98 * median, p80_s=1.02 * median, runs=20)
    base.update(ratio=1.0 / median, ratio_p20=0.97 / median, ratio_p80=1.03 / median, first_call_s=0.5, memory_bytes=32 << 20)
    base.update(bytes=150994944, bytes_per_s=150994944 / median, of_copy=0.9, fewest_bytes=150994944, of_limit=0.8)
    return {**base, **values}


def document(*rows: dict) -> dict:
    machine = {"date": "2026-01-01", "cpu": "a <fast> CPU", "cores": 2, "python": "3.11", "torch": "2.13.0", "commit": "abc", "peers": {}}
    limits = {"copy": 20e9, "matrix_float32": 100e9}
    head = {"format": files.FORMAT, "command": "python -m bench", "machine": machine, "limits": limits, "seconds": 1.0}
    return {**head, "interrupted": False, "noise": None, "results": list(rows)}


def sweep() -> dict:
    """Time grows with S in the loop, with its square root in the other provider, whose name would break a page that does not escape."""
    rows = []
    for samples in (1, 2, 4, 8, 16):
        step = {
            "level": "step",
            "op": "MLP",
            "size": "w, B=64",
            "work": "step",
            "samples": samples,
            "batch": 64,
            "bytes": None,
            "flops": 10**9,
        }
        rows += [row(BASELINE, 0.1 * samples, **step), row("iw cpu", 0.1 * samples**0.5, **step)]
        rows.append(row("plain dropout, S*B examples", 0.08 * samples**0.5, **step))
    rows += [row(BASELINE, 1.0), row("iw cpu", 0.05), row("<b>peer</b> & co", 0.5, status="skipped", reason="not <installed>")]
    return document(*rows)


def test_json_and_csv_round_trip(tmp_path):
    d = sweep()
    write_json(tmp_path / "r.json", d)
    assert read_json(tmp_path / "r.json") == d
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    write_csv(tmp_path / "r.csv", d["results"])
    assert read_csv(tmp_path / "r.csv") == d["results"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"results": []}'])
def test_files_that_are_no_results_are_refused(content, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.json: expected results of python -m bench"):
        read_json(path)
    with pytest.raises(ValueError, match="expected results"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(SystemExit):
        main(["compare", str(path), str(path)])


def test_report_holds_everything_and_needs_nothing(tmp_path):
    d = sweep()
    paths = figures.save(d, tmp_path)
    assert {p.stem for p in paths} == {"throughput", "memory", "roofline", "speedup"}
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in paths)
    page = html(d, paths)
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert "&lt;b&gt;peer&lt;/b&gt; &amp; co" in page and "<b>peer" not in page and "not &lt;installed&gt;" in page
    for r in d["results"]:
        assert table.cells(r)[1] in page
    assert page.count("<table>") == page.count("</table>")


def test_figures_of_few_results(tmp_path):
    """No sweep: no curves. Nothing measured: no figure, and a report all the same."""
    assert {p.stem for p in figures.save(document(row(BASELINE, 1.0), row("iw cpu", 0.1)), tmp_path)} == {"roofline", "speedup"}
    nothing = document(row("x", 1.0, status="skipped", reason="why"))
    nothing["limits"] = {}
    assert figures.save(nothing, tmp_path) == []
    assert "skipped: why" in html(nothing, [])


def test_noise_and_interruption_are_said(capsys):
    d = sweep()
    d["noise"], d["interrupted"] = "the copy bandwidth went astray", True
    assert "Too noisy to be quoted: the copy bandwidth went astray" in html(d, [])
    assert "interrupted" in html(d, [])
    assert "**Too noisy to be quoted**" in table.markdown(d) and "(interrupted)" in table.markdown(d)
    assert "noisy: p80/p20 = 1.40" in table.cells(row("x", 1.0, noise="p80/p20 = 1.40"))


def test_markdown_is_a_table(tmp_path, capsys):
    d = sweep()
    write_json(tmp_path / "r.json", d)
    assert main(["show", str(tmp_path / "r.json"), "--markdown"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}
    assert sum(BASELINE in line and "iw" not in line for line in lines) == 6
    assert "2026-01-01, a <fast> CPU, 2 cores; copy 20 GB/s; float32 matrix product 100 GFLOP/s" in printed
    assert "Not measured: <b>peer</b> & co: skipped, not <installed>." in printed
    assert main(["show", str(tmp_path / "r.json"), "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == d


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (12.3456, "12.3 s"), (0.999e-3, "999 µs"), (1.5e-3, "1.5 ms"), (2e-9, "2 ns"), (0.0, "0 ns"), (1234.0, "1234 s")],
)
def test_seconds_are_readable(value, expected):
    assert table.seconds(value) == expected


def test_compare_prints_what_changed_beyond_noise():
    old = document(*(row(name, 1.0) for name in ("same", "faster", "slower", "slightly", "noisy", "wide", "gone", "stopped")))
    changed = [row("same", 1.01), row("faster", 0.5), row("slower", 2.0), row("slightly", 1.045), row("noisy", 3.0, noise="2 runs")]
    changed += [row("wide", 1.2, p20_s=0.9, p80_s=1.5), row("new", 1.0), row("stopped", 1.0, status="skipped", reason="x")]
    c = compare(old, document(*changed))
    assert [(x.name.split(", ")[-1], x.factor) for x in c.faster] == [("faster", 2.0)]
    assert [(x.name.split(", ")[-1], x.factor) for x in c.slower] == [("slower", 0.5)]
    assert c.unchanged == 3 and c.by == "time" and c.warnings == []
    assert [name.split(", ")[-1] for name in c.noisy] == ["noisy"]
    assert sorted(name.split(", ")[-1] for name in c.only_old) == ["gone", "stopped"]
    assert [name.split(", ")[-1] for name in c.only_new] == ["new"]
    said = text(c)
    assert "faster 2.00x  1 s -> 500 ms  op, noise, 1024x4096, forward, 8, float32, cpu, 2, faster" in said
    assert "slower 2.00x  1 s -> 2 s" in said
    assert said.endswith("compared by time: 1 faster, 1 slower, 3 without a change beyond noise, 1 too noisy")


def test_compare_of_different_machines_goes_by_ratios():
    """Everything takes ten times as long; only one provider changed against the loop."""
    old = document(row(BASELINE, 1.0), row("iw cpu", 0.1), row("other", 0.5))
    new = copy.deepcopy(old)
    for r in new["results"]:
        r["median_s"], r["p20_s"], r["p80_s"] = (10 * r[k] for k in ("median_s", "p20_s", "p80_s"))
    new["results"][1].update(ratio=5.0, ratio_p20=4.9, ratio_p80=5.1)
    new["machine"]["cpu"], new["noise"] = "slow", "drift"
    c = compare(old, new)
    assert c.by == "ratio to the baseline" and not c.faster and c.unchanged == 2
    assert [x.name.split(", ")[-1] for x in c.slower] == ["iw cpu"]
    assert "slower 2.00x  10.00x -> 5.00x" in text(c)
    assert "warning: cpu: a <fast> CPU before, slow now" in text(c) and "warning: new run: drift" in text(c)


def test_equal_time_and_equal_compute():
    """The loop takes 0.8 s for 8 samples; 0.1 sqrt(S) is there at S = 64, beyond the sweep; slower ones are interpolated."""
    found = {(t.what.split()[0], t.provider): t.samples for t in summary.equal_time(sweep()["results"])}
    assert found["MLP", BASELINE] == "8.0"
    assert found["MLP", "iw cpu"] == "16 or more"
    assert summary._affordable({1: 0.1, 4: 0.4, 16: 1.6}, 0.8) == "8.0"
    assert summary._affordable({2: 1.0, 4: 2.0, 8: 4.0}, 0.8) == "fewer than 2"
    computed = [c for c in summary.equal_compute(sweep()["results"]) if "S=4" in c[0]]
    assert {(name, round(value, 3)) for _, name, value in computed} == {(BASELINE, 2.5), ("iw cpu", 1.25)}
