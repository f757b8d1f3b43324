"""Compiled CUDA code on torch tensors; results go to tensors that the caller provides.

Present where the extension `thl_engine._cuda` was built and a device can be used: `available()` tells, and `reason()`
why not. Work is queued on torch's current stream of the tensors' device, so it is ordered with torch's own and can be
captured in a graph. Arguments that do not fit raise ValueError, naming argument, expected and found; failures of the
CUDA runtime raise RuntimeError.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but not marked so

from thl_engine.kernels import tuned

try:
    from thl_engine import _native
except ImportError:  # installed without a compiler for it
    _native = None  # type: ignore[assignment]
try:
    from thl_engine import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _missing = f"the CUDA extension is not built ({error}); reinstall where nvcc and a C++20 compiler are found"


class GemvShape(NamedTuple):
    """How the int8 product shares out its work; results depend on `split` alone."""

    rows: int  # of the matrix that a warp reads at a time: 2 or 4
    split: int  # warps that share the columns of a row: 1, 2, 4 or 8


def available() -> bool:
    """Whether the extension was built and there is a device for it."""
    return reason() is None


@cache
def reason() -> str | None:
    """Why nothing here can be used; None where it can. Starts the CUDA driver, which does not survive a fork."""
    if _cuda is None:
        return _missing
    try:
        return None if _cuda.device_count() else "there is no CUDA device"
    except RuntimeError as error:
        return str(error)


def library() -> str:
    """Path of the extension, whose `thl_arena_alloc` and `thl_arena_free` are what torch takes for an allocator."""
    return _cuda.__file__


def open_arena(device: int, nbytes: int) -> int:
    """A new block of a device's memory, to be divided among allocations: its number. RuntimeError if there is none."""
    return _cuda.open_arena(device, nbytes)


def close_arena(number: int) -> None:
    """Lets nothing more be allocated; the block goes back to the device with its last allocation."""
    _cuda.close_arena(number)


def enter_arena(number: int) -> None:
    """What this thread lets `thl_arena_alloc` allocate comes from this block, until `leave_arena`. Nests."""
    _cuda.enter_arena(number)


def leave_arena() -> None:
    """Ends the last `enter_arena` of this thread."""
    _cuda.leave_arena()


def arena_counts(number: int) -> dict[str, int]:
    """Bytes: size, in_use, peak, largest_gap, last_refused; numbers: allocations alive, refusals."""
    return _cuda.arena_counts(number)


def copy_device(index: int) -> "_native.CopyDevice":
    """Device number `index` for the native copy engine, with a stream for copies. Raises DeviceError."""
    return _native.CopyDevice(_cuda.copy_device(index))


def gemv_shape(x: Tensor, rows: int, columns: int) -> GemvShape | None:
    """How `gemv_int8` is to multiply x [.., C] with parts of a matrix [rows, columns]; None where it is not to.

    It is to where it is the fastest, measured on the card or presumed (kernels/tuned), and x lies as it must.
    """
    choice = tuned.find("gemv_int8", x.numel() // max(columns, 1), rows, columns, x.device)
    if choice is None or choice.use != "cuda" or x.stride(-1) != 1 or not available():
        return None
    return GemvShape(*choice.launch)


def gemv_int8(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    out: Tensor,
    shape: GemvShape,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    up: Tensor | None = None,
    up_scales: Tensor | None = None,
    activation: str | None = None,
    group: int | None = None,
) -> None:
    """out [B, R] takes x [B, C] times the transpose of w int8 [R, C], plus bias [R], plus residual [B, R]; B at most 8.

    scales: of each row [R] or, with `group` columns sharing one, [R, ceil(C / group)]; float32, as bias is. x, residual
    and out are float32, float16 or bfloat16 each, rows at any distance. With `up`, another w, and `activation` "silu"
    or "gelu_tanh": activation(x wᵀ + bias) * (x upᵀ) + residual.
    """
    _cuda.gemv_int8(
        to_dlpack(x),
        to_dlpack(w),
        to_dlpack(scales),
        to_dlpack(out),
        _capsule(bias),
        _capsule(residual),
        _capsule(up),
        _capsule(up_scales),
        activation or "",
        group or 0,
        *shape,
        torch.cuda.current_stream(x.device).cuda_stream,
    )


def _capsule(x: Tensor | None) -> object | None:
    return None if x is None else to_dlpack(x)
