"""The choice of slots by value, equal values in ascending order of index, on keys that carry both in one integer."""

import triton
import triton.language as tl

CHUNK = 16384  # slots that a program keeps in registers while it chooses; of more, it reads them for each choice
LAST = tl.constexpr(2**31 - 1)
NONE = tl.constexpr(-(2**63))  # before every key
START = tl.constexpr(2**63 - 1)  # after every key


@triton.jit
def keys_of(values, index):
    """Distinct int64 in the order of choice; NaN has a place in it too, and so cannot lead out of the memory."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0 is 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) + (index ^ LAST)


@triton.jit
def value_of(keys):
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(keys):
    return (keys & LAST).to(tl.int32) ^ LAST


@triton.jit
def load_keys(at, first, slots, terms, stride, CHUNK: tl.constexpr):
    """Keys of CHUNK slots, whose values are sums of `terms` ones that lie `stride` apart."""
    j = first + tl.arange(0, CHUNK)
    values = tl.load(at + j, mask=j < slots, other=0.0)
    for term in range(1, terms):
        values += tl.load(at + term * stride + j, mask=j < slots, other=0.0)
    return tl.where(j < slots, keys_of(values, j), NONE)


@triton.jit
def best_below(last, keys, at, slots, terms, stride, CHUNK: tl.constexpr, ONE: tl.constexpr):
    """The best key that comes after `last`: of `keys` where ONE chunk holds all, else of what is read again."""
    if ONE:
        return tl.max(tl.where(keys < last, keys, NONE), axis=0)
    else:
        best = tl.full([], NONE, tl.int64)
        for start in range(0, slots, CHUNK):
            read = load_keys(at, start, slots, terms, stride, CHUNK)
            best = tl.maximum(best, tl.max(tl.where(read < last, read, NONE), axis=0))
        return best


def choice_sizes(slots: int, most: int) -> dict[str, int | bool]:
    """Sizes of a program that chooses among `slots`, up to `most` of them (CHUNK: 32 keys a thread) at a time."""
    chunk = min(max(triton.next_power_of_2(slots), 128), most)
    return {"CHUNK": chunk, "ONE": slots <= chunk, "num_warps": min(max(chunk // 512, 4), 16)}


def check_choice(slots: int, k: int) -> None:
    """Raises ValueError where more are to be chosen than there are."""
    if k > slots:
        raise ValueError(f"slots: expected at least the {k} that are chosen, found {slots}")
