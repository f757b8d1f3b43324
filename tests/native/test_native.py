"""The compiled linear maps against plain float64 torch, on every instruction set that this processor has."""

import ctypes
import mmap

import pytest
import torch
from conftest import ISAS
from native_inputs import (
    BATCHES,
    close,
    int8_weights,
    linear_float,
    linear_int8,
    needs_native,
    poisoned,
    transposed,
    write,
)

from thl_engine.ops import native

pytestmark = [needs_native, pytest.mark.usefixtures("native_settings")]

SHAPES = [(1, 1), (2, 3), (5, 64), (33, 65), (7, 129), (3, 1000), (0, 8), (19, 4096), (9, 5000), (2, 12345)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


# --- linear maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("grouped", [False, True])
def test_linear_int8(batch, grouped):
    for rows, columns in SHAPES:
        q, scales, w = int8_weights(rows, columns, -(-columns // 128) if grouped else None)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(linear_int8(x, q, scales, bias))
            assert torch.equal(linear_int8(x, q, scales), linear_int8(x, q, scales, torch.zeros(rows)))
        close(found[0], x.double() @ w.T + bias.double(), 1e-4)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear_float(batch, dtype):
    for rows, columns in SHAPES:
        w = torch.randn(rows, columns).to(dtype)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(linear_float(x, w, bias))
            assert torch.equal(linear_float(x, w), linear_float(x, w, torch.zeros(rows)))
        close(found[0], x.double() @ w.double().T + bias.double(), 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_linear_int8_transposed(batch, grouped):
    for rows, columns in SHAPES:
        q, scales, w = int8_weights(rows, columns, -(-columns // 128) if grouped else None)
        x, start = torch.randn(batch, rows), torch.randn(batch, columns)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(transposed(x, q, scales, start.clone()))
            assert torch.equal(transposed(x, q, scales), transposed(x, q, scales, torch.zeros(batch, columns)))
        close(found[0], start.double() + x.double() @ w, 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_float_transposed(dtype):
    for rows, columns in SHAPES:
        w, x, start = torch.randn(rows, columns).to(dtype), torch.randn(3, rows), torch.randn(3, columns)
        found = []
        for name in ISAS:
            native.set_isa(name)
            found.append(transposed(x, w, out=start.clone()))
        close(found[0], start.double() + x.double() @ w.double(), 3e-6)
        assert all(torch.equal(found[0], other) for other in found)


def test_special_float16_values(isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every float16 there is
    w = bits.view(torch.float16)[:, None]
    assert torch.equal(linear_float(torch.ones(1, 1), w).nan_to_num(1.5), w.float().T.nan_to_num(1.5))


def test_strides(isa):
    """Rows of w and x with gaps between them, and results into a slice of columns that leaves the rest alone."""
    wide_q, scales, w = int8_weights(11, 300)
    wide_x = torch.randn(5, 400)
    q, x = wide_q[:, 70:270], wide_x[:, 33:233]
    for run in (
        lambda out: native.linear_int8(native.pack_activations(x), q, scales, None, out),
        lambda out: native.linear_float(x, q.float() * scales[:, None], None, out),
    ):
        wide_out = poisoned(5, 30)
        run(wide_out[:, 9:20])
        close(wide_out[:, 9:20], x.double() @ w[:, 70:270].T, 1e-4)
        assert wide_out[:, :9].isnan().all() and wide_out[:, 20:].isnan().all()
    assert torch.equal(
        linear_float(wide_x[:1].expand(4, -1), torch.ones(3, 400)),
        linear_float(wide_x[:1], torch.ones(3, 400)).expand(4, -1),
    )
    assert torch.equal(transposed(wide_x[:, :11], q, scales), transposed(wide_x[:, :11].clone(), q.clone(), scales))


@pytest.mark.parametrize("columns", [100, 4096, 9000])
def test_rows_do_not_depend_on_company(isa, columns):
    """Pages of a matrix, single rows of a batch and other numbers of threads give the bits of the whole call."""
    q, scales, _ = int8_weights(41, columns)
    w, x = torch.randn(41, columns), torch.randn(11, columns)
    back = torch.randn(11, 41)
    native.set_threads(1)
    whole, whole_float = linear_int8(x, q, scales), linear_float(x, w)
    whole_back, whole_back_float = transposed(back, q, scales), transposed(back, w)
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for cut in (0, 1, 17):
            assert torch.equal(
                whole, torch.cat([linear_int8(x, q[:cut], scales[:cut]), linear_int8(x, q[cut:], scales[cut:])], 1)
            )
            assert torch.equal(whole_float, torch.cat([linear_float(x, w[:cut]), linear_float(x, w[cut:])], 1))
            assert torch.equal(
                whole_back,
                transposed(back[:, cut:], q[cut:], scales[cut:], transposed(back[:, :cut], q[:cut], scales[:cut])),
            )
            assert torch.equal(
                whole_back_float, transposed(back[:, cut:], w[cut:], None, transposed(back[:, :cut], w[:cut]))
            )
        assert all(torch.equal(whole[b : b + 1], linear_int8(x[b : b + 1], q, scales)) for b in range(11))
        assert all(torch.equal(whole_float[b : b + 1], linear_float(x[b : b + 1], w)) for b in range(11))


@pytest.mark.parametrize("batch", [7, 8, 9, 13, 64, 97, 130])
def test_many_rows(batch):
    """Every instruction set, number of threads and part of the rows gives the bits of one row at a time."""
    for rows, columns in [(1, 1), (15, 3), (16, 63), (17, 160), (33, 255), (47, 512), (81, 513), (5, 1100)]:
        q, scales, w = int8_weights(rows, columns)
        x, bias = torch.randn(batch, columns), torch.randn(rows)
        x[batch // 2] *= 1e6
        native.set_isa("portable")
        expected = torch.cat([linear_int8(x[b : b + 1], q, scales, bias) for b in range(batch)])
        close(expected, x.double() @ w.T + bias.double(), 1e-4)
        for name in ISAS:
            native.set_isa(name)
            for threads in (1, 2, 5):
                native.set_threads(threads)
                assert torch.equal(linear_int8(x, q, scales, bias), expected)
            cut = rows // 2
            assert torch.equal(
                torch.cat(
                    [
                        linear_int8(x, q[:cut], scales[:cut], bias[:cut]),
                        linear_int8(x, q[cut:], scales[cut:], bias[cut:]),
                    ],
                    1,
                ),
                expected,
            )
            wide = poisoned(batch, rows + 9)
            native.linear_int8(native.pack_activations(x), q, scales, None, wide[:, 4 : 4 + rows])
            assert torch.equal(wide[:, 4 : 4 + rows], linear_int8(x, q, scales, torch.zeros(rows)))
            assert wide[:, :4].isnan().all() and wide[:, 4 + rows :].isnan().all()


@pytest.mark.parametrize("rows,threads", [(5, 8), (40, 7), (700, 3)])
def test_many_rows_on_many_threads(isa, rows, threads):
    """Large enough to be shared: by rows of the weights and, where these are few, by rows of activations."""
    q, scales, _ = int8_weights(rows, 2500)
    x = torch.randn(130, 2500)
    native.set_threads(1)
    expected = linear_int8(x, q, scales)
    assert torch.equal(expected, torch.cat([linear_int8(x[b : b + 1], q, scales) for b in range(130)]))
    native.set_threads(threads)
    assert torch.equal(linear_int8(x, q, scales), expected)


def test_int8_extremes(isa):
    """The largest sums stay exact; zeros, tiny, infinite and NaN activations stay in their rows."""
    q, scales = torch.full((2, 100_000), -128, dtype=torch.int8), torch.tensor([1.0, 0.5])
    x = torch.full((5, 100_000), 3.0)
    x[1] = 0.0
    x[2] = 1e-38
    x[3, 7] = float("inf")
    x[4, 99_999] = float("nan")
    for copies in (1, 2):  # 5 rows, and enough for the products of many rows
        found = linear_int8(x.repeat(copies, 1), q, scales, torch.tensor([0.25, 0.5]))
        for part in found.split(5):
            assert torch.allclose(part[0], torch.tensor([-38_400_000.0, -19_200_000.0]), rtol=1e-6)
            assert torch.equal(part[1:3], torch.tensor([[0.25, 0.5]] * 2))
            assert part[3:].isnan().all()


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("columns", [512, 513, 65536, 65537])
def test_many_rows_of_the_largest_sums(isa, columns, weight):
    """Sums of the largest products, of one sign, where they just fit 32 bits and where they do not."""
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    q, scales = torch.full((33, columns), weight, dtype=torch.int8), torch.rand(33) + 0.1
    found = linear_int8(signs.expand(8, columns).contiguous(), q, scales)
    close(found, float(weight) * columns * signs.double() * scales, 1e-6)
    assert torch.equal(found[:1], linear_int8(torch.ones(1, columns), q, scales))


def test_packing_is_reused():
    q, scales, _ = int8_weights(5, 700)
    packed = native.pack_activations(torch.randn(9, 1000))
    x = torch.randn(2, 700)
    assert native.pack_activations(x, packed) is packed
    out = poisoned(2, 5)
    native.linear_int8(packed, q, scales, None, out)
    assert torch.equal(out, linear_int8(x, q, scales))
    wide = torch.randn(30, 2000)  # and back, to more than there was
    q, scales, _ = int8_weights(5, 2000)
    packed, out = native.pack_activations(wide, packed), poisoned(30, 5)
    native.linear_int8(packed, q, scales, None, out)
    assert torch.equal(out, linear_int8(wide, q, scales))


@pytest.fixture
def guarded():
    """Copies a tensor to the end of readable memory: reading one byte too far ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    kept = []

    def place(tensor):
        raw = tensor.contiguous().view(torch.uint8).flatten()
        size = -(-raw.numel() // mmap.PAGESIZE) * mmap.PAGESIZE
        region = mmap.mmap(-1, size + mmap.PAGESIZE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        assert libc.mprotect(memory.data_ptr() + size, mmap.PAGESIZE, 0) == 0
        kept.append((region, memory))
        at_end = memory[size - raw.numel() : size]
        at_end.copy_(raw)
        return at_end.view(tensor.dtype).view(tensor.shape)

    yield place


@pytest.mark.parametrize("columns", [1, 15, 31, 63, 100, 4097])
def test_nothing_is_touched_beyond_the_end(isa, guarded, columns):
    q, scales, _ = int8_weights(3, columns)
    x = guarded(torch.randn(3, columns))
    linear_int8(x, guarded(q), guarded(scales))
    out = guarded(torch.zeros(9, 3))
    native.linear_int8(
        native.pack_activations(guarded(torch.randn(9, columns))),
        guarded(q),
        guarded(scales),
        guarded(torch.randn(3)),
        out,
    )
    transposed(guarded(torch.randn(2, 3)), guarded(q), scales, guarded(torch.zeros(2, columns)))
    for dtype in FLOATS:
        w = guarded(torch.randn(3, columns).to(dtype))
        linear_float(x, w)
        transposed(guarded(torch.randn(2, 3)), w)
    memory, norms = guarded(torch.randn(1, 4, columns)), guarded(torch.zeros(1, 4))
    native.slot_norms(memory, norms)
    write(
        guarded(torch.randn(1, columns)),
        memory,
        norms,
        guarded(torch.zeros(1, 4)),
        guarded(torch.zeros(1, 4)),
        torch.zeros(1, 4, dtype=torch.int64),
        3,
        1,
    )
    gate = guarded(torch.randn(1, columns))
    native.gru_update(gate, gate, guarded(torch.randn(1, columns)))
