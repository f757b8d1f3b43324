"""The type checker leaves functions under @triton.jit alone, so it cannot ask for annotations where they are."""

import ast
from pathlib import Path

import pytest

TRITON = Path(__file__).parents[2] / "kernels" / "triton"


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", sorted(TRITON.glob("*.py")), ids=lambda path: path.stem)
def test_what_launches_kernels_is_annotated(path):
    """Every function but the kernels says the type of each argument and of its result."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef) or is_kernel(function):
            continue
        own = function.args
        given = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
        bare = [one.arg for one in given if one.annotation is None and one.arg != "self"]
        assert not bare and function.returns is not None, f"{path.name}:{function.lineno}: {function.name} {bare}"
