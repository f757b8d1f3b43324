"""Amounts of memory: as people write them, and as the machine has them."""

import ctypes
import re
import resource

import torch

from thl_engine.errors import ConfigError, shown
from thl_engine.limits import free_memory

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
LARGE_BLOCK = 256 << 10  # bytes; activations of a chunk have more, those of a token less
SHARE_OF_FREE = 0.8  # of the memory that is free now; the rest is for everything else that runs


def parse_bytes(amount: str | int) -> int:
    """ "4GiB", "512 MB", "4.5G" or a number of bytes. GB is 10^9, GiB and G are 2^30. Raises ConfigError."""
    if isinstance(amount, int) and not isinstance(amount, bool):
        count = amount
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(amount))
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(
                f"memory budget {shown(amount)} is not an amount of memory; write for example 4GiB or 512MiB"
            )
        number = float(match[1])  # infinite beyond 308 digits
        count = int(min(number, 1e30) * _UNITS[match[2].upper()])
    if not 0 < count < 1 << 62:
        raise ConfigError(f"memory budget {shown(amount)} must be more than 0 and less than 2^62 bytes")
    return count


def available_memory(device: torch.device) -> int:
    """Bytes on the device that a model may take without pressing on what else runs there."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {str(device)!r} is not here to be asked for its memory; give a memory budget")
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE)
    return int(free_memory() * SHARE_OF_FREE)


def return_large_blocks() -> None:
    """Has the C library give freed memory of LARGE_BLOCK and more back to the system at once, in the whole process.

    By default glibc keeps what blocks of up to 32 MiB leave, in pieces: within a budget of 23 MiB an HRM batch of four
    grew the process by 44 MiB, with this from 1 MiB on by 33, from 256 KiB on by 20. Other C libraries are left as they
    are.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
    except (AttributeError, OSError):
        pass


def resident_bytes() -> int:
    """Memory that the process occupies now; its peak where the system does not tell."""
    return _status("VmRSS:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes() -> int:
    """The most memory that the process has occupied since `reset_peak`, or since its start where that is refused.

    getrusage would count what the parent process had when it started this one.
    """
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Makes `peak_bytes` forget what was before."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:
        pass  # then the peak includes the measurements, which is more than the truth


def _status(field: str) -> int | None:
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None


def size(count: float) -> str:
    """A byte count for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
