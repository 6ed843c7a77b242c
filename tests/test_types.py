"""Public names are annotated completely, and tests/public_names.py, which `make lint` checks with mypy, uses all of them."""

import ast
import inspect
from pathlib import Path

import pytest

import iwsgd_ext as iw
from iwsgd_ext.ops import iw_cross_entropy as loss_op
from iwsgd_ext.training import strategies

OPTIONS = {
    "iw_cross_entropy": (iw.iw_cross_entropy, loss_op.Options, set()),
    "backward": (iw.backward, strategies.Options, {"samples"}),
}
CALLED = ("__init__", "__call__", "__enter__", "__exit__")  # methods with an underscore that users call


def functions_of(module) -> dict[str, object]:
    return {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")}


PUBLIC = {
    **{f"iw.{name}": getattr(iw, name) for name in iw.__all__},
    **{f"functional.{name}": function for name, function in functions_of(iw.functional).items()},
    **{f"iw.plots.{name}": function for name, function in functions_of(iw.plots).items()},
}


def signatures(thing) -> dict[str, object]:
    """The function itself, or the public methods of a class as far as this package defines them."""
    if not inspect.isclass(thing):
        return {"": thing} if callable(thing) else {}
    found = {}
    for owner in reversed(thing.__mro__):
        if owner.__module__.startswith("iwsgd_ext"):
            methods = {n: getattr(m, "fget", getattr(m, "__func__", m)) for n, m in vars(owner).items()}
            found |= {n: m for n, m in methods.items() if inspect.isfunction(m) and (n in CALLED or not n.startswith("_"))}
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_annotated(name):
    for method, function in signatures(PUBLIC[name]).items():
        signature = inspect.signature(function)
        given = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert [p.name for p in given if p.annotation is p.empty] == [], f"{name}.{method}"
        assert method == "__init__" or signature.return_annotation is not signature.empty, f"{name}.{method}"


def test_every_public_name_is_type_checked():
    used = {ast.unparse(node) for node in ast.walk(ast.parse(Path(__file__).with_name("public_names.py").read_text()))}
    assert {name for name in PUBLIC if name not in used} == {"iw.functional"}  # imported by its name there
    assert len(PUBLIC) > 50


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_function(name):
    function, options, others = OPTIONS[name]
    given = {p.name: p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(given) == {*options.__annotations__, "return_stats", *others}
    assert all(str(given[name]) == str(kind) for name, kind in options.__annotations__.items())
