"""The CUDA extension on a CUDA device, at small odd shapes: also what compute-sanitizer is run over.

compute-sanitizer --tool memcheck python -m pytest tests/native/test_cuda_kernels.py     (and --tool racecheck)
"""

import pytest
import torch
from test_cuda_gemv import CASES, TOLERANCE, matrix

from thl_engine.device import cuda
from thl_engine.device.cuda import GemvShape
from thl_engine.kernels import tuned
from thl_engine.paging.reader import Reader
from thl_engine.paging.transfer import NativeTransfer, Request

# Without a GPU the driver is not asked: it would not survive the forks of other tests.
REASON = cuda.reason() if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEVICE = torch.device("cuda", 0)


def on_device(x: torch.Tensor, apart: int = 0) -> torch.Tensor:
    """x on the device, its rows `apart` elements farther apart than they are long."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + apart, dtype=x.dtype, device=DEVICE)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def check(
    expected: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    **given,
) -> torch.Tensor:
    """The product on the device, after comparing it with what is expected."""
    wide = torch.full((x.shape[0], w.shape[0] + 5), float("nan"), dtype=dtype, device=DEVICE)
    found = wide[:, 2 : 2 + w.shape[0]]
    cuda.gemv_int8(x, w, scales, found, GemvShape(*shape), **given)
    seen = wide.cpu().double()
    assert seen[:, :2].isnan().all() and seen[:, 2 + w.shape[0] :].isnan().all()
    error = (seen[:, 2 : 2 + w.shape[0]] - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm()  # also false of NaN
    return found


@pytest.mark.parametrize("batch, rows, columns, apart, group, shape", CASES)
def test_products(batch, rows, columns, apart, group, shape):
    torch.manual_seed(columns)
    w, scales, wide = matrix(rows, columns, group)
    x, bias, residual = torch.randn(batch, columns), torch.randn(rows), torch.randn(batch, rows)
    stored = on_device(w, apart), on_device(scales)
    exact = x.double() @ wide.T
    check(exact, on_device(x, 3), *stored, shape, group=group)
    check(
        exact + bias.double() + residual.double(),
        on_device(x),
        *stored,
        shape,
        group=group,
        bias=on_device(bias),
        residual=on_device(residual, 1),
    )
    x = on_device(x * 0.3)
    gate = torch.nn.functional.silu(0.3 * exact + bias.double()) * (0.3 * exact)
    check(
        gate,
        x,
        *stored,
        shape,
        group=group,
        bias=on_device(bias),
        up=on_device(w, 16),
        up_scales=stored[1],
        activation="silu",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, group", [(1, None), (3, 128), (6, None)])
def test_half_precision(dtype, batch, group):
    torch.manual_seed(batch)
    w, scales, wide = matrix(13, 1100, group)
    x = torch.randn(batch, 1100).to(dtype)
    check(x.double() @ wide.T, on_device(x, 1), on_device(w, 4), on_device(scales), (4, 4), dtype, group=group)


def test_bits_depend_on_the_split_alone():
    torch.manual_seed(0)
    w, scales, wide = matrix(11, 1700, None)
    x, stored = torch.randn(7, 1700), (on_device(w, 12), on_device(scales))
    whole = check(x.double() @ wide.T, on_device(x), *stored, (2, 2)).clone()
    for rows, columns in ((slice(0, 1), slice(0, 11)), (slice(0, 3), slice(3, 11)), (slice(0, 7), slice(0, 3))):
        part = [tensor[columns] for tensor in stored]
        found = check(x[rows].double() @ wide[columns].T, on_device(x[rows]), *part, (4, 2))
        assert torch.equal(found, whole[rows, columns])


def test_products_wait_for_their_stream_and_can_be_captured():
    torch.manual_seed(0)
    w, scales, wide = matrix(40, 3000, None)
    x, stored = on_device(torch.randn(2, 3000)), (on_device(w), on_device(scales))
    out = torch.empty(2, 40, device=DEVICE)

    def work():
        cuda.gemv_int8(x, *stored, out, GemvShape(4, 8))

    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.mul_(2.0)
        work()
        expected = out.clone()
    stream.synchronize()
    exact = x.cpu().double() @ wide.T
    assert (expected.cpu().double() - exact).norm() <= 2e-6 * exact.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_the_triton_backend_uses_the_twin_where_the_table_has_it(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from thl_engine.ops.triton_ops import TritonOps
    from thl_engine.ops.weights import Held

    torch.manual_seed(0)
    (w, scales, wide), x, bias = matrix(20, 300, None), torch.randn(3, 2, 300), torch.randn(20)
    calls, multiply = [], cuda.gemv_int8
    monkeypatch.setattr(cuda, "gemv_int8", lambda *given, **named: (calls.append(given), multiply(*given, **named)))
    monkeypatch.setattr(tuned, "find", lambda *size: tuned.Choice(8, 20, 300, "cuda", (4, 2)))
    found = TritonOps().product(on_device(x), Held(on_device(w), on_device(scales)), on_device(bias))
    expected = x.double() @ wide.T + bias.double()
    assert len(calls) == 1 and (found.cpu().double() - expected).norm() <= 2e-6 * expected.norm()


def test_arguments_are_of_one_device():
    w, scales, _ = matrix(4, 32, None)
    with pytest.raises(ValueError, match="w: expected a tensor on a CUDA device"):
        cuda.gemv_int8(on_device(torch.ones(1, 32)), w, scales, torch.empty(1, 4), GemvShape(4, 1))


def test_pages_arrive_through_the_copy_engine(tmp_path):
    """Places are filled again while earlier uses of them are still queued."""
    content = torch.randint(0, 256, (400_000,), dtype=torch.uint8)
    file = tmp_path / "data"
    file.write_bytes(content.numpy().tobytes())
    spans = [(i * 7919 % 350_000, 1 + i * 911 % 8000) for i in range(60)]
    places = [i * 16384 for i in range(4)]
    with Reader([file], direct=False) as reader:
        transfer = NativeTransfer(reader, places, 4 * 16384, 16384, DEVICE)
        for i, (offset, nbytes) in enumerate(spans[:4]):
            transfer.start(Request(0, offset, nbytes, None, f"span {i}"), places[i])
        kept = []
        for i, (offset, nbytes) in enumerate(spans):
            place = places[i % 4]
            transfer.finish(place)
            begin = place + offset % 4096
            torch.cuda._sleep(100_000)
            kept.append(transfer.memory[begin : begin + nbytes].clone())
            transfer.released(place)
            if i + 4 < len(spans):
                offset, nbytes = spans[i + 4]
                transfer.start(Request(0, offset, nbytes, None, f"span {i + 4}"), place)
        transfer.close()
    for (offset, nbytes), found in zip(spans, kept, strict=True):
        assert torch.equal(found.cpu(), content[offset : offset + nbytes])
