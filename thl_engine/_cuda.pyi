"""The CUDA extension (csrc/cuda): types for those who call it, which is device/cuda.py.

A `Capsule` is what torch.utils.dlpack.to_dlpack makes of a tensor on a CUDA device. It is borrowed for the call, and
the caller keeps it. Arguments that do not fit raise ValueError, failures of the CUDA runtime RuntimeError.
"""

from typing import TypeAlias

Capsule: TypeAlias = object

def device_count() -> int:
    """Devices that can be used. RuntimeError where there is no driver, or one older than the runtime."""

def gemv_int8(
    x: Capsule,
    w: Capsule,
    scales: Capsule,
    out: Capsule,
    bias: Capsule | None,
    residual: Capsule | None,
    up: Capsule | None,
    up_scales: Capsule | None,
    activation: str,
    group: int,
    rows: int,
    split: int,
    stream: int,
    /,
) -> None:
    """out [B, R] = x [B, C] times the transpose of w int8 [R, C], plus bias and residual; device/cuda.py says how."""

def copy_device(index: int) -> object:
    """A capsule for `_native.CopyDevice`: a device with a stream for copies. Raises DeviceError."""

def open_arena(device: int, size: int) -> int:
    """A new block of a device's memory for `thl_arena_alloc`: its number."""

def close_arena(number: int) -> None:
    """Lets nothing more be allocated; the block goes back with its last allocation."""

def enter_arena(number: int) -> None:
    """What this thread allocates comes from the block, until `leave_arena`."""

def leave_arena() -> None:
    """Ends the last `enter_arena` of this thread."""

def arena_counts(number: int) -> dict[str, int]:
    """Bytes and numbers of a block: size, in_use, peak, largest_gap, allocations, refusals, last_refused."""
