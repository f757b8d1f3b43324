"""The tiles in which a slot memory is read and written."""

from typing import NamedTuple

import triton
from torch import Tensor

from thl_engine.kernels.triton.slot_choice import CHUNK, choice_sizes

PROGRAMS = 512  # that keep a large card busy: about four for each of an H100's 132 multiprocessors
LANES = 128  # slots, or features, side by side: a warp's, of 16 bytes a thread


class Tile(NamedTuple):
    """What a program holds at a time: slots and features, with warps; and the shares that features are split into."""

    slots: int
    width: int
    warps: int
    shares: int = 1


def read_tile(slots: int, width: int, heads: int) -> Tile:
    """For scores: two slots a warp, whose products with up to 16 heads stay in registers until all are added.

    A program reads `slots` rows of its share of the features and as many features of all heads' queries, so 16 slots
    read half as much of 8 queries as of the memory. 1,024 slots of 12,288 features (50 MB): 64 tiles x 8 shares of
    1,536 = 512 programs; of 768 (3 MB): 128 x 3 shares of 256 = 384, each with all its 8 KiB in flight.
    """
    rows = 16 if slots * width >= PROGRAMS * 16 * 1024 else 8
    tiles = triton.cdiv(slots, rows) * triton.cdiv(heads, 16)
    shares = max(1, min(triton.cdiv(PROGRAMS, tiles), width // 256))
    return Tile(rows, min(triton.next_power_of_2(width), LANES), rows // 2, shares)


def write_tile(slots: int, width: int) -> Tile:
    """For a write, and for norms: slots for 256 programs, at most eight of them, since each reads the candidate;
    eight where the memory is so small (256 KiB) that only launching it takes time.

    1,024 slots of 12,288 features: 256 programs read 4 rows (197 KB) and write them, 16 KiB a step; the candidate's
    49 KB come from the cache. 16,384 of 256: 2,048 programs of 8 KiB.
    """
    rows = 8
    while rows > 1 and slots < 256 * rows and slots * width > 65536:
        rows //= 2
    columns = min(triton.next_power_of_2(width), 4096 // rows)
    while columns > LANES and triton.cdiv(width, columns) * columns > width + width // 8:
        columns //= 2
    warps = choice_sizes(slots, CHUNK // 2)["num_warps"]  # as many as the launch that renews single norms has
    # An element for every thread: where two hold the same, one may read it again when the other has written it.
    return Tile(rows, max(columns, 32 * warps // rows), warps)


def check_state(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, to be updated in place")


def contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
