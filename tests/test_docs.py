"""Every example of a docstring and every Python block of the documentation runs."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import iwsgd_ext

ROOT = Path(__file__).parent.parent
WITHOUT = () if importlib.util.find_spec("triton") else ("iwsgd_ext.ops.triton.",)  # what cannot be imported here
MODULES = [m.name for m in pkgutil.walk_packages(iwsgd_ext.__path__, "iwsgd_ext.") if not m.name.startswith(("iwsgd_ext._", *WITHOUT))]
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if p.exists()]
LINKED = [p for p in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if p.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["iwsgd_ext", *MODULES])
def test_examples_of_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("name", iwsgd_ext.__all__)
def test_every_public_name_has_an_example(name):
    thing = getattr(iwsgd_ext, name)
    assert thing.__doc__
    if name not in ("functional", "IWStats", "Audit"):  # a module of functions with examples, and what the examples of two functions return
        assert ">>> " in thing.__doc__
    assert "Noh et al. 2017" in thing.__doc__, "where its equation is from"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_of_the_documentation(path, monkeypatch, tmp_path):
    """The blocks of one page share their names, as a reader's session does; files that they write go elsewhere.

    A block whose first line is ``# needs package, package`` runs where these are installed.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, names = path.read_text(), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        needs = re.match(r"# needs (.*)\n", block[1])
        if needs and not all(importlib.util.find_spec(name) for name in needs[1].split(", ")):
            continue
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(path), "exec"), names)  # line numbers of the page
    assert path.name != "README.md" or len(names) > 2, "README.md has no Python block"


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_a_file_and_its_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            page = path if file == "" else path.parent / file
            assert page.exists(), target
            assert heading == "" or heading in anchors(page), target


def test_every_result_file_is_referred_to():
    pages = "".join(path.read_text() for path in PAGES)
    assert [p.name for p in (ROOT / "docs" / "results").iterdir() if p.name not in pages] == []
