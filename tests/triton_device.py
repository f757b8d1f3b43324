"""What the tests of the triton kernels share: the device they run on, poisoned results, and the measure of error."""

import os
from functools import cache
from importlib.util import find_spec

import numpy
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under triton's interpreter

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") and os.environ["TRITON_INTERPRET"] == "1":
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_for_numpy_2_4(tensor, scope):
            """Triton 3.6 holds scalars as arrays of one element, which numpy no longer takes for integers."""
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_for_numpy_2_4

        # The interpreter replaces the functions of triton.language at every call of every function, which is most of
        # its time, and tables the numpy types at every array. Here each is done once, and what is replaced stays so.
        interpreter._patch_lang = cache(interpreter._patch_lang)
        interpreter._LangPatchScope.restore = lambda scope: None
        numpy_types, numpy_type = {}, interpreter._get_np_dtype

        def numpy_type_once(kind):
            name = kind.scalar.name
            if name not in numpy_types:
                numpy_types[name] = numpy_type(kind)
            return numpy_types[name]

        interpreter._get_np_dtype = numpy_type_once


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh random numbers, and results that begin as NaN or an absurd integer, so that one not written shows."""
    torch.manual_seed(0)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(make):
        def made(*args, **options):
            out = make(*args, **options)
            return out.fill_(float("nan") if out.dtype.is_floating_point else torch.iinfo(out.dtype).min)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
    with numpy.errstate(all="ignore"):  # the interpreter's exp overflows aloud
        yield


def device_randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the norm of what is expected."""
    assert found.shape == expected.shape and not found.isnan().any()
    assert (found.cpu().double() - expected.double()).norm() <= tolerance * expected.double().norm()
