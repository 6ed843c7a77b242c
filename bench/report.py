"""One HTML file with everything of a run: machine, comparisons, figures, tables. Nothing outside of it is needed to read it."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from .case import BASELINE
from .summary import equal_compute, equal_time
from .table import COLUMNS, LEGEND, about, cells, groups

STYLE = """body { font: 14px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .4em 0 1.6em } th, td { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child, td:last-child { text-align: left }
img { max-width: 100% }
tr.ours { font-weight: 600; background: #eef5fb } tr.base { background: #f6f6f6 }
tr.skipped { color: #888 } tr.wrong, tr.failed { color: #b00 }
.warn { background: #fff3cd; padding: .6em 1em; border-left: 4px solid #d90 } h3 { margin-bottom: 0 } details { margin: 1em 0 }"""


def html(document: dict[str, Any], figures: list[Path]) -> str:
    results = document["results"]
    parts = [f"<p>{escape(about(document))}</p>"]
    if document["noise"]:
        parts.append(f'<p class="warn">Too noisy to be quoted: {escape(document["noise"])}.</p>')
    if document["interrupted"]:
        parts.append('<p class="warn">The run was interrupted: what it had measured is here.</p>')
    times = [tuple(t) for t in equal_time(results)]
    parts += _table(f"Equal time: noise samples in the time that {BASELINE} takes for 8", ("step", "provider", "S"), times)
    compute = [(what, name, f"{value:.2f}") for what, name, value in equal_compute(results)]
    parts += _table("Equal compute: time over that of plain dropout on S*B examples", ("step", "provider", "time"), compute)
    for path in figures:
        image = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{escape(path.stem)}</h2><img alt="{escape(path.stem)}" src="data:image/png;base64,{image}">')
    parts.append(f"<h2>All results</h2><p>{escape(LEGEND)}</p>")
    for level, name, rows in groups(results):
        parts.append(f"<h3>{escape(level)}: {escape(name)}</h3><table>{_line(COLUMNS, 'th')}")
        for row in rows:
            ours = "ours" if row["provider"].startswith("iw ") else "base" if row["provider"] == BASELINE else ""
            parts.append(_line(cells(row), "td", ours if row["status"] == "ok" else row["status"]))
        parts.append("</table>")
    parts += _table("Machine", ("", ""), [(k, str(v)) for k, v in {**document["machine"], **document["limits"]}.items()])
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>iwsgd_ext: benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>iwsgd_ext: benchmarks</h1>\n{body}\n</body></html>\n"
    )


def _line(values: tuple[str, ...], tag: str, kind: str = "") -> str:
    return f'<tr class="{kind}">' + "".join(f"<{tag}>{escape(v)}</{tag}>" for v in values) + "</tr>"


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    return [f"<h2>{escape(title)}</h2><table>", _line(columns, "th"), *(_line(row, "td") for row in rows), "</table>"]
