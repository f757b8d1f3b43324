"""C++ that no extension shows by itself, compiled for the tests and called with ctypes (native/parts.cpp).

The arenas of a device's memory budget, over addresses with no memory behind them; a device for the copy engine made of
host memory and two threads; the checksum of processors without the instruction for it.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from thl_engine.errors import DeviceError
from thl_engine.ops import native

ROOT = Path(__file__).parents[1]
SOURCES = (
    "tests/native/parts.cpp",
    "tests/native/host_copy_device.cpp",
    "csrc/cuda/budget_arena.cpp",
    "csrc/io/crc32c.cpp",
)
CAPSULE = b"thl_engine.CopyDevice.1"  # capsules keep a pointer to it
COUNTS = ("size", "in_use", "peak", "largest_gap", "allocations", "refusals", "last_refused")
FAILURES = {1: ValueError, 2: DeviceError, 3: RuntimeError}
GiveBack = ctypes.CFUNCTYPE(None, c_size_t)

_signatures = {
    "part_error": (c_char_p,),
    "part_crc32c_portable": (c_uint32, c_uint32, c_void_p, c_size_t),
    "arena_make": (c_int, c_size_t, c_size_t, POINTER(c_void_p)),
    "arena_free": (None, c_void_p),
    "arena_allocate": (c_size_t, c_void_p, c_size_t),
    "arena_release": (c_bool, c_void_p, c_size_t),
    "arena_counts": (None, c_void_p, c_size_t * len(COUNTS)),
    "arenas_make": (c_void_p,),
    "arenas_free": (None, c_void_p),
    "arenas_open": (c_int, c_void_p, c_int, c_size_t, c_size_t, GiveBack, POINTER(c_int64)),
    "arenas_close": (c_int, c_void_p, c_int64),
    "arenas_enter": (c_int, c_void_p, c_int64),
    "arenas_leave": (c_int,),
    "arenas_allocate": (c_size_t, c_void_p, c_size_t, c_int),
    "arenas_release": (c_bool, c_void_p, c_size_t),
    "arenas_counts": (c_int, c_void_p, c_int64, c_size_t * len(COUNTS)),
    "host_make": (c_void_p, c_uint64, c_int),
    "host_free": (None, c_void_p),
    "host_shared": (c_void_p, c_void_p),
    "host_device": (c_void_p, c_void_p),
    "host_compute": (c_uint64,),
    "host_use": (c_int, c_void_p, c_void_p, c_size_t),
    "host_sums": (c_void_p, c_void_p, POINTER(c_size_t)),
    "host_take_sums": (None, c_void_p, POINTER(c_uint32)),
    "host_violations": (c_char_p, c_void_p),
    "host_fail_at": (None, c_void_p, c_int64),
    "host_refuse_locks": (None, c_void_p),
    "host_locked": (c_size_t, c_void_p),
    "host_events": (c_int64, c_void_p),
}


def extra_options() -> list[str]:
    """Of the compiler, as build tools take them: `make sanitize` gives some."""
    return os.environ.get("CXXFLAGS", "").split()


@cache
def library() -> ctypes.CDLL:
    """Compiled once a process. Skips the test where there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-Icsrc", "-Itests/native"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "parts.so"
        subprocess.run(["g++", *options, *extra_options(), *SOURCES, "-o", made], check=True, cwd=ROOT)
        loaded = ctypes.CDLL(str(made))
    for name, (result, *arguments) in _signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def check(failure: int) -> None:
    if failure:
        raise FAILURES[failure](library().part_error().decode())


def crc32c_portable(buffer: bytes | np.ndarray, crc: int = 0) -> int:
    data = np.frombuffer(buffer, dtype=np.uint8)
    return library().part_crc32c_portable(crc, data.ctypes.data, data.nbytes)


def _counts(read: Callable[[ctypes.Array], None]) -> dict[str, int]:
    found = (c_size_t * len(COUNTS))()
    read(found)
    return dict(zip(COUNTS, found, strict=True))


def _freed_with(owner: object, free: Callable[[int], None], handle: int) -> None:
    weakref.finalize(owner, free, handle).atexit = False


class BudgetArena:
    """thl::BudgetArena of csrc/cuda/budget_arena.h."""

    def __init__(self, base: int, size: int):
        handle = c_void_p()
        check(library().arena_make(base, size, byref(handle)))
        self._handle = handle.value
        _freed_with(self, library().arena_free, self._handle)

    def allocate(self, nbytes: int) -> int:
        return library().arena_allocate(self._handle, nbytes)

    def release(self, address: int) -> bool:
        return library().arena_release(self._handle, address)

    def counts(self) -> dict[str, int]:
        return _counts(lambda out: library().arena_counts(self._handle, out))


class BudgetArenas:
    """thl::BudgetArenas of csrc/cuda/budget_arena.h."""

    def __init__(self):
        self._handle, self._callbacks = library().arenas_make(), []
        _freed_with(self, library().arenas_free, self._handle)

    def open(self, device: int, base: int, size: int, give_back: Callable[[int], None]) -> int:
        self._callbacks.append(GiveBack(give_back))
        number = c_int64()
        check(library().arenas_open(self._handle, device, base, size, self._callbacks[-1], byref(number)))
        return number.value

    def close(self, number: int) -> None:
        check(library().arenas_close(self._handle, number))

    def enter(self, number: int) -> None:
        check(library().arenas_enter(self._handle, number))

    @staticmethod
    def leave() -> None:
        check(library().arenas_leave())

    def allocate(self, nbytes: int, device: int) -> int:
        return library().arenas_allocate(self._handle, nbytes, device)

    def release(self, address: int) -> bool:
        return library().arenas_release(self._handle, address)

    def counts(self, number: int) -> dict[str, int]:
        return _counts(lambda out: check(library().arenas_counts(self._handle, number, out)))


def copy_device_capsule(shared: int) -> object:
    """What `_native.CopyDevice` takes: the address of a std::shared_ptr<CopyDevice>."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    return new(shared, CAPSULE, None)


# What devices have been given to read, by its address. Kept to the end: a device that is let go, by this module and by
# the engine that shares it, may be reading still.
_read: dict[int, Tensor] = {}


class HostCopyDevice(native._native.CopyDevice if native.available() else object):
    """thl::HostCopyDevice of native/host_copy_device.h: late, at random, and watchful."""

    def __init__(self, seed: int, delay: int):
        self._library = library()
        self._handle = self._library.host_make(seed, delay)
        super().__init__(copy_device_capsule(self._library.host_shared(self._handle)))
        _freed_with(self, self._library.host_free, self._handle)
        self.compute = self._library.host_compute()

    @property
    def address(self) -> int:
        """Of the device, for a stand-in of another device's runtime."""
        return self._library.host_device(self._handle)

    def use(self, memory: Tensor) -> None:
        _read[memory.untyped_storage().data_ptr()] = memory
        check(self._library.host_use(self._handle, memory.data_ptr(), memory.nbytes))

    def sums(self) -> list[int]:
        count = c_size_t()
        found = self._library.host_sums(self._handle, byref(count))
        out = (c_uint32 * count.value)()
        self._library.host_take_sums(found, out)
        return list(out)

    def violations(self) -> list[str]:
        return self._library.host_violations(self._handle).decode().splitlines()

    def fail_at(self, copy: int) -> None:
        self._library.host_fail_at(self._handle, copy)

    def refuse_locks(self) -> None:
        self._library.host_refuse_locks(self._handle)

    @property
    def locked(self) -> int:
        return self._library.host_locked(self._handle)

    @property
    def events(self) -> int:
        return self._library.host_events(self._handle)
