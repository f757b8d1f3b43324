"""Arguments of the CUDA extension are checked before a device is asked for anything: tensors may be nowhere."""

import ctypes

import pytest
import torch

cuda = pytest.importorskip("thl_engine._cuda", reason="the CUDA extension is not built")
CODES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int8: (0, 8)}


class Managed(ctypes.Structure):
    """DLManagedTensor, https://dmlc.github.io/dlpack/latest/c_api.html."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
kept = []  # what capsules point to


def nowhere(*shape: int, dtype: torch.dtype = torch.float32, strides: tuple[int, ...] | None = None, device: int = 0):
    """A capsule of a tensor on a CUDA device whose memory must not be touched."""
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    arrays = [(ctypes.c_int64 * max(len(shape), 1))(*values) for values in (shape, strides)]
    tensor = Managed(4096, 2, device, len(shape), *CODES[dtype], 1, *map(ctypes.addressof, arrays), 0, None, None)
    kept.append((tensor, arrays))
    return new_capsule(ctypes.addressof(tensor), b"dltensor", None)


def arguments(**changed) -> list:
    given = {
        "x": nowhere(2, 40),
        "w": nowhere(5, 40, dtype=torch.int8),
        "scales": nowhere(5),
        "out": nowhere(2, 5),
        "bias": None,
        "residual": None,
        "up": None,
        "up_scales": None,
        "activation": "",
        "group": 0,
        "rows": 4,
        "split": 2,
        "stream": 0,
    }
    assert set(changed) <= set(given)
    return list({**given, **changed}.values())


UP = {"up": nowhere(5, 40, dtype=torch.int8), "up_scales": nowhere(5)}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": nowhere(9, 40), "out": nowhere(9, 5)}, "x: expected at most 8 rows, found 9"),
        ({"x": nowhere(40)}, r"x: expected shape \[any, any\], found \[40\]"),
        ({"x": nowhere(2, 40, dtype=torch.int8)}, "x: expected float32, float16 or bfloat16, found int8"),
        ({"x": nowhere(2, 40, strides=(1, 2))}, "x: expected a contiguous last dimension"),
        ({"x": torch.utils.dlpack.to_dlpack(torch.ones(2, 40))}, "x: expected a tensor on a CUDA device"),
        ({"w": nowhere(5, 41, dtype=torch.int8)}, r"w: expected shape \[any, 40\], found \[5, 41\]"),
        ({"w": nowhere(5, 40)}, "w: expected int8, found float32"),
        ({"w": nowhere(5, 40, dtype=torch.int8, device=1)}, "w: expected device 0, found device 1"),
        ({"scales": nowhere(6)}, r"scales: expected shape \[5\], found \[6\]"),
        ({"scales": nowhere(5, dtype=torch.float16)}, "scales: expected float32, found float16"),
        ({"scales": nowhere(5, 2), "group": 16}, r"scales: expected shape \[5, 3\], found \[5, 2\]"),
        ({"scales": nowhere(5, 3), "group": 15}, "group: expected a power of two from 16 on, found 15"),
        ({"group": 48}, "group: expected a power of two from 16 on, found 48"),
        ({"group": -16}, "group: expected a power of two from 16 on, found -16"),
        ({"out": nowhere(2, 4)}, r"out: expected shape \[2, 5\], found \[2, 4\]"),
        ({"out": nowhere(2, 5, strides=(4, 1))}, "out: expected a tensor whose elements do not overlap"),
        ({"bias": nowhere(4)}, r"bias: expected shape \[5\], found \[4\]"),
        ({"residual": nowhere(1, 5)}, r"residual: expected shape \[2, 5\], found \[1, 5\]"),
        ({"up": UP["up"], "up_scales": None, "activation": "silu"}, "up_scales: expected a DLPack capsule"),
        ({**UP, "activation": "relu"}, "activation: expected silu or gelu_tanh, found relu"),
        ({"rows": 3}, "rows: expected one of 2, 4, found 3"),
        ({"split": 16}, "split: expected one of 1, 2, 4, 8, found 16"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        cuda.gemv_int8(*arguments(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": nowhere(0, 40), "out": nowhere(0, 5)},
        {"w": nowhere(0, 40, dtype=torch.int8), "scales": nowhere(0), "out": nowhere(2, 0)},
    ],
)
def test_nothing_to_multiply_asks_for_no_device(changed):
    cuda.gemv_int8(*arguments(**changed))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_runtime_says_why():
    with pytest.raises(RuntimeError, match="CUDA: cudaGetDevice: "):
        cuda.gemv_int8(*arguments())
    with pytest.raises(RuntimeError, match="^CUDA: "):
        cuda.device_count()
