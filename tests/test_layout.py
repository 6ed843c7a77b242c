"""How the package's folders depend on each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "iwsgd_ext"
ORDER = ("ops", "layers", "conversion", "training", "evaluation")  # each uses those before it alone, and the files above all


def imported(source: Path) -> set[str]:
    """The folders of ORDER whose modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = source.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            path = [*package, *(node.module or "").split(".")]
            found |= {part for name in node.names for part in [*path, name.name][1:2]}
    return found & set(ORDER)


@pytest.mark.parametrize("folder", ORDER)
def test_folders_build_on_each_other(folder):
    used = set().union(*map(imported, (PACKAGE / folder).rglob("*.py")))
    later = set(ORDER[ORDER.index(folder) + 1 :])
    assert folder == "ops" or used, "nothing was found"
    assert not used & later
