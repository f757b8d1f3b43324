"""The type stubs of the extension modules name what is there, with the parameters that it takes."""

import ast
import re
from pathlib import Path

import pytest

import thl_engine

PACKAGE = Path(thl_engine.__file__).parent
Parameters = list[tuple[str | None, bool]]  # name where it may be given by name, and whether there is a default


def stubbed(body: list[ast.stmt], prefix: str = "") -> dict[str, Parameters | None]:
    """Dotted name -> parameters of each function and method; None for classes and properties."""
    found: dict[str, Parameters | None] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[f"{prefix}{node.name}"] = None
            found |= stubbed(node.body, f"{prefix}{node.name}.")
        if not isinstance(node, ast.FunctionDef) or node.name == "__buffer__":
            continue
        if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
            found[f"{prefix}{node.name}"] = None
            continue
        given = node.args
        assert not given.vararg and not given.kwonlyargs and not given.kwarg, node.name
        names = [None] * len(given.posonlyargs) + [argument.arg for argument in given.args]
        if prefix:  # without self
            names = names[1:]
        required = len(names) - len(given.defaults)
        found[f"{prefix}{node.name}"] = [(name, i >= required) for i, name in enumerate(names)]
    return found


def built(owner: object, prefix: str = "") -> dict[str, Parameters | None]:
    """The same of a module or class, from what pybind11 writes into docstrings."""
    found: dict[str, Parameters | None] = {}
    for name, value in vars(owner).items():
        if name.startswith("_") and not (name == "__init__" and value.__doc__.startswith("__init__(")):
            continue  # a class that only functions make has no constructor of its own
        if isinstance(value, type):
            found[f"{prefix}{name}"] = None
            found |= built(value, f"{prefix}{name}.")
        elif isinstance(value, property):
            found[f"{prefix}{name}"] = None
        else:
            found[f"{prefix}{name}"] = parameters(value.__doc__)
    return found


def parameters(doc: str) -> Parameters:
    """Of the signature that a docstring begins with: `name(arg0: type, other: type = 1) -> type`."""
    inside = re.match(r"\w+\((.*)\) -> ", doc.splitlines()[0])[1]
    # Commas between brackets belong to types.
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", inside) if part.strip()]
    parts = [part for part in parts if not part.startswith("self:")]
    return [
        (None if re.fullmatch(r"arg\d+", part.split(":")[0]) else part.split(":")[0], " = " in part) for part in parts
    ]


@pytest.mark.parametrize("name", ["_native", "_cuda"])
def test_stubs_match_the_extension(name):
    module = pytest.importorskip(f"thl_engine.{name}", reason="the extension is not built", exc_type=ImportError)
    tree = ast.parse((PACKAGE / f"{name}.pyi").read_text())
    assert built(module) == stubbed(tree.body)


@pytest.mark.parametrize("name", ["_native", "_cuda"])
def test_everything_has_a_line_that_says_what_it_is(name):
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.pyi").read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
            assert ast.get_docstring(node), node.name
