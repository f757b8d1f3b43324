"""What torch's caching allocator takes of a device for tensors of given sizes, by the rules that it is documented and
observed to follow (torch.cuda memory management; kSmallSize and its neighbours in c10/core/AllocatorConfig.h).

It takes segments and cuts blocks from them. What it takes beyond the tensors is memory of the budget all the same, so
the plan counts with it, and tests run recorded allocations through this model.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
BLOCK = 512  # blocks are multiples of this
SMALL = MIB  # blocks up to this come from segments of their own kind
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # of larger blocks below MIN_LARGE
MIN_LARGE = 10 * MIB
LARGE_ROUNDING = 2 * MIB  # of segments for one block of at least MIN_LARGE


@dataclass
class Block:
    """A piece of a segment, between its neighbours there."""

    nbytes: int
    small: bool
    number: int  # in the order in which segments were taken, and within one
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


class CachingAllocator:
    """One pool on one stream, whose segments are never given back. `reserved`: bytes of segments so far."""

    def __init__(self) -> None:
        self.reserved = 0
        self._gaps: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by kind: (bytes, number, block)
        self._count = 0

    def allocate(self, nbytes: int) -> Block:
        """A block for a tensor: from the smallest gap that fits, or else from a new segment."""
        nbytes = max(-(-nbytes // BLOCK), 1) * BLOCK
        small = nbytes <= SMALL
        gaps = self._gaps[small]
        at = bisect_left(gaps, (nbytes, -1))
        block = gaps.pop(at)[2] if at < len(gaps) else self._segment(nbytes, small)
        left = block.nbytes - nbytes
        if left >= BLOCK if small else left > SMALL:
            rest = Block(left, small, self._next(), True, block, block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.nbytes, block.after = nbytes, rest
            self._keep(rest)
        block.free = False
        return block

    def free(self, block: Block) -> None:
        """Ends an allocation; gaps side by side become one."""
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._drop(other)
        if block.before is not None and block.before.free:
            block.nbytes += block.before.nbytes
            block.before = block.before.before
            if block.before is not None:
                block.before.after = block
        if block.after is not None and block.after.free:
            block.nbytes += block.after.nbytes
            block.after = block.after.after
            if block.after is not None:
                block.after.before = block
        self._keep(block)

    def _segment(self, nbytes: int, small: bool) -> Block:
        if small:
            size = SMALL_SEGMENT
        elif nbytes < MIN_LARGE:
            size = LARGE_SEGMENT
        else:
            size = -(-nbytes // LARGE_ROUNDING) * LARGE_ROUNDING
        self.reserved += size
        return Block(size, small, self._next())

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _keep(self, block: Block) -> None:
        insort(self._gaps[block.small], (block.nbytes, block.number, block))

    def _drop(self, block: Block) -> None:
        gaps = self._gaps[block.small]
        gaps.pop(bisect_left(gaps, (block.nbytes, block.number)))


def reserved(sizes: Iterable[int]) -> int:
    """Bytes of the segments that tensors of these sizes take, allocated in this order and kept."""
    allocator = CachingAllocator()
    for nbytes in sizes:
        allocator.allocate(nbytes)
    return allocator.reserved
