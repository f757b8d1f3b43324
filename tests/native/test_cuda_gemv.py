"""The int8 product's CUDA source, compiled for the host and run there on fibers, against float64.

See cuda_on_host/cuda_runtime_api.h. Operands end where the process's memory ends, so that reading past them is seen.
"""

import ctypes
import mmap
import shutil
import subprocess
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_device import DEVICE

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.device import cuda
from thl_engine.kernels import tuned

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "native" / "cuda_on_host"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 5e-4}
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    made = tmp_path_factory.mktemp("cuda_on_host") / "gemv.so"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            "-fsanitize=undefined",
            "-fsanitize-undefined-trap-on-error",
            "-I",
            HOST,
            "-I",
            ROOT / "csrc",
            "-x",
            "c++",
            ROOT / "csrc" / "cuda" / "gemv_int8.cu",
            HOST / "fibers.cpp",
            HOST / "gemv.cpp",
            "-o",
            made,
        ],
        check=True,
    )
    return ctypes.CDLL(str(made))


def at_the_end(x: torch.Tensor, apart: int = 0) -> torch.Tensor:
    """The values of x, rows `apart` elements farther apart, the last of which ends where memory does."""
    if not x.numel():
        return x
    row = x.shape[-1] + apart
    elements = prod(x.shape[:-1]) * row - apart if x.dim() > 1 else x.shape[0]
    pages = -(-elements * x.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=x.dtype, count=elements, offset=pages - elements * x.element_size())
    placed = flat.as_strided(x.shape, (row, 1) if x.dim() == 2 else (1,))
    return placed.copy_(x)


def gemv(
    library,
    x,
    w,
    scales,
    out,
    *,
    bias=None,
    residual=None,
    up=None,
    up_scales=None,
    activation=None,
    group=None,
    shape=(4, 4),
) -> torch.Tensor:
    def data(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    def row(tensor):
        return ctypes.c_int64(0 if tensor is None else tensor.stride(0))

    def rows(tensor):
        return data(tensor), 0 if tensor is None else TYPES[tensor.dtype], row(tensor)

    gate = {None: 0, "silu": 1, "gelu_tanh": 2}[activation]
    failed = library.run_gemv(
        *rows(x),
        data(w),
        row(w),
        data(scales),
        row(scales),
        data(up),
        row(up),
        data(up_scales),
        row(up_scales),
        data(bias),
        *rows(residual),
        *rows(out),
        gate,
        x.shape[0],
        ctypes.c_int64(w.shape[0]),
        w.shape[1],
        -1 if group is None else group.bit_length() - 1,
        *shape,
    )
    assert not failed
    return out


def matrix(
    rows: int, columns: int, group: int | None, apart: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 rows, scales, and what they stand for in float64."""
    data, scales = quantize_rows(torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None], group)
    wide = data.double() * (
        scales.double()[:, None] if group is None else scales.double().repeat_interleave(group, dim=1)[:, :columns]
    )
    return at_the_end(data, apart), at_the_end(scales), wide


def poisoned(batch: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Columns 2 to 2 + rows of a wider tensor of NaN."""
    return torch.full((batch, rows + 5), float("nan"), dtype=dtype)[:, 2 : 2 + rows]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert not found.isnan().any()
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    around = found.new_tensor([]).set_(found.untyped_storage()).view(found.shape[0], -1)
    assert around[:, :2].isnan().all() and around[:, 2 + found.shape[1] :].isnan().all()


# rows of activations, rows, columns, bytes between rows of weights, columns of a scale, (rows of a warp, split)
CASES = [
    (1, 5, 1, 0, None, (2, 1)),
    (1, 9, 15, 0, None, (4, 1)),
    (1, 33, 16, 0, None, (4, 8)),
    (1, 7, 512, 16, None, (2, 8)),
    (1, 6, 9000, 8, None, (4, 8)),
    (1, 3, 16500, 12, None, (4, 4)),
    (2, 11, 600, 8, None, (2, 4)),
    (2, 5, 4700, 4, 128, (4, 8)),
    (3, 17, 1030, 10, None, (4, 4)),
    (4, 9, 2600, 8, 64, (4, 2)),
    (5, 19, 528, 0, None, (2, 2)),
    (7, 6, 1300, 12, 16, (4, 1)),
    (8, 18, 2100, 12, None, (4, 8)),
    (8, 4, 77, 0, 16, (2, 2)),
    (1, 70, 272, 0, 32, (2, 2)),
    (1, 6, 0, 0, None, (4, 1)),
]


@pytest.mark.parametrize("batch, rows, columns, apart, group, shape", CASES)
def test_products(library, batch, rows, columns, apart, group, shape):
    torch.manual_seed(columns)
    w, scales, wide = matrix(rows, columns, group, apart)
    x = at_the_end(torch.randn(batch, columns), 3)
    exact = x.double() @ wide.T
    close(gemv(library, x, w, scales, poisoned(batch, rows), group=group, shape=shape), exact)
    bias, residual = at_the_end(torch.randn(rows)), at_the_end(torch.randn(batch, rows), 1)
    close(
        gemv(library, x, w, scales, poisoned(batch, rows), bias=bias, residual=residual, group=group, shape=shape),
        exact + bias.double() + residual.double(),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("batch, rows, columns, apart, group, shape", CASES[::3])
def test_gated_products(library, activation, batch, rows, columns, apart, group, shape):
    torch.manual_seed(columns)
    (w, scales, wide), (up, up_scales, wide_up) = matrix(rows, columns, group, apart), matrix(rows, columns, group, 16)
    x, bias = at_the_end(torch.randn(batch, columns) * 0.3), at_the_end(torch.randn(rows))
    gate = x.double() @ wide.T + bias.double()
    gate = (
        torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    )
    close(
        gemv(
            library,
            x,
            w,
            scales,
            poisoned(batch, rows),
            bias=bias,
            up=up,
            up_scales=up_scales,
            activation=activation,
            group=group,
            shape=shape,
        ),
        gate * (x.double() @ wide_up.T),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, group", [(1, None), (3, 128), (6, None)])
def test_half_precision(library, dtype, batch, group):
    torch.manual_seed(batch)
    w, scales, wide = matrix(13, 1100, group, 4)
    x, residual = at_the_end(torch.randn(batch, 1100).to(dtype), 1), at_the_end(torch.randn(batch, 13).to(dtype))
    found = gemv(library, x, w, scales, poisoned(batch, 13, dtype), residual=residual, group=group)
    close(found, x.double() @ wide.T + residual.double(), dtype)
    floats = gemv(library, x, w, scales, poisoned(batch, 13), residual=residual, group=group)
    assert torch.equal(found, floats.to(dtype))


def test_bits_depend_on_the_split_alone(library):
    """Not on the part of a matrix at hand, its alignment, the batch, or the rows of a warp."""
    torch.manual_seed(0)
    for group, split in product((None, 64), (1, 2)):
        w, scales, _ = matrix(11, 1700, group, 12)
        x = at_the_end(torch.randn(7, 1700))
        whole = gemv(library, x, w, scales, poisoned(7, 11), group=group, shape=(2, split))
        for batch, shape in ((1, (2, split)), (2, (4, split)), (4, (4, split)), (7, (4, split))):
            assert torch.equal(
                gemv(library, x[:batch], w, scales, poisoned(batch, 11), group=group, shape=shape), whole[:batch]
            )
        for part in (slice(0, 3), slice(3, 11)):
            assert torch.equal(
                gemv(library, x, w[part], scales[part], poisoned(7, 11)[:, part], group=group, shape=(4, split)),
                whole[:, part],
            )
        unaligned = at_the_end(w, 3)
        assert torch.equal(gemv(library, x, unaligned, scales, poisoned(7, 11), group=group, shape=(2, split)), whole)


def test_the_choice_for_a_tensor(monkeypatch):
    """The table's or the presumed form, for rows that lie as they must, where the extension and a card are there."""

    def on_card(*shape, strides=None):
        x = torch.empty(shape, device="meta") if strides is None else torch.empty_strided(shape, strides, device="meta")
        return SimpleNamespace(numel=x.numel, stride=x.stride, device=torch.device("cuda", 0))

    tables = {"gemv_int8": (tuned.Choice(8, 4096, 4096, "cuda", (2, 2)), tuned.Choice(8, 512, 4096, "triton", ()))}
    monkeypatch.setattr(tuned, "find", tuned.find.__wrapped__)
    monkeypatch.setattr(tuned, "_of", lambda device: {})
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert cuda.gemv_shape(on_card(1, 4096), 4096, 4096) == (4, 4)
    assert cuda.gemv_shape(on_card(3, 4096), 4096, 4096) is None
    assert cuda.gemv_shape(on_card(1, 4096, strides=(1, 2)), 4096, 4096) is None
    assert cuda.gemv_shape(torch.ones(1, 4096), 4096, 4096) is None
    monkeypatch.setattr(tuned, "_of", lambda device: tables)
    assert cuda.gemv_shape(on_card(3, 4096), 4096, 4096) == (2, 2)
    assert cuda.gemv_shape(on_card(1, 4096), 512, 4096) is None
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert cuda.gemv_shape(on_card(3, 4096), 4096, 4096) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels are run on the device instead")
def test_the_triton_backend_uses_the_twin_where_the_table_has_it(library, monkeypatch):
    """Parts that are not int8 go to triton's kernel."""
    pytest.importorskip("triton", reason="triton is not installed")
    from thl_engine.ops.triton_ops import TritonOps
    from thl_engine.ops.weights import Part

    class InParts:
        shape, transposed = (20, 300), False

        def parts(self):
            yield Part(0, 8, *quantize_rows(values[:8]))
            yield Part(8, 20, values[8:])

    torch.manual_seed(0)
    calls = []

    def on_host(x, w, scales, out, shape, **given):
        calls.append(shape)
        gemv(library, x, w, scales, out, shape=shape, **given)

    values, x, bias = torch.randn(20, 300), torch.randn(3, 2, 300), torch.randn(20)
    monkeypatch.setattr(cuda, "gemv_int8", on_host)
    expected = TritonOps().product(x, InParts(), bias)
    assert not calls
    monkeypatch.setattr(cuda, "available", lambda: True)
    choices = [tuned.Choice(8, 20, 300, "cuda", (4, 2)), tuned.Choice(8, 20, 300, "triton", ()), None]
    monkeypatch.setattr(tuned, "find", lambda *size: choices.pop(0) if size[:4] == ("gemv_int8", 6, 20, 300) else None)
    found = TritonOps().product(x, InParts(), bias)
    assert calls == [(4, 2)]
    torch.testing.assert_close(found, expected)
    for _ in range(2):
        assert torch.equal(TritonOps().product(x, InParts(), bias), expected)
    assert len(calls) == 1 and not choices
