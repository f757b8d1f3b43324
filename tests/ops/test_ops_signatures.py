"""Every backend's operations take what the reference's take: models call them all alike."""

import ast
from inspect import isfunction, signature
from pathlib import Path

import pytest

import thl_engine
from thl_engine.ops import reference as ops

ROOT = Path(thl_engine.__file__).parent


def methods(source: str, name: str) -> dict[str, list[str]]:
    """Method -> names of its arguments, of methods that name them all; read as text: its module may need triton."""
    kind = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.name: [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is None
    }


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ops/native_ops.py", "NativeOps"),
        ("ops/triton_ops.py", "TritonOps"),
        ("ops/triton_state.py", "TritonState"),
        ("ops/triton_products.py", "TritonProducts"),
    ],
)
def test_operations_take_the_same_arguments(file, name):
    compared = 0
    for method, found in methods((ROOT / file).read_text(), name).items():
        reference = getattr(ops.ReferenceOps, method, None)
        if method.startswith("_") or not isfunction(reference):
            continue
        wanted = list(signature(reference).parameters)
        assert [arg for arg in found if arg != "self"] == [arg for arg in wanted if arg != "self"], method
        compared += 1
    assert compared > 1
