"""Compiled CUDA code on torch tensors; results go to tensors that the caller provides.

Present where the extension `thl_engine._cuda` was built and a device can be used: `available()` tells, and `reason()`
why not. Work is queued on torch's current stream of the tensors' device, so it is ordered with torch's own and can be
captured in a graph. Arguments that do not fit raise ValueError, naming argument, expected and found; failures of the
CUDA runtime raise RuntimeError.
"""

from functools import cache

try:
    from thl_engine import _native
except ImportError:  # installed without a compiler for it
    _native = None
try:
    from thl_engine import _cuda
except ImportError as error:
    _cuda = None
    _missing = f"the CUDA extension is not built ({error}); reinstall where nvcc and a C++20 compiler are found"


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


def copy_device(index: int) -> "_native.CopyDevice":
    """Device number `index` for the native copy engine, with a stream for copies. Raises DeviceError."""
    return _native.CopyDevice(_cuda.copy_device(index))
