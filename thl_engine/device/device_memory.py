"""The memory that an engine takes on its device: none of it beyond the budget.

On CUDA the budget is a block from cudaMalloc, an arena (csrc/cuda/budget_arena.h). A pool of torch's caching allocator
has that arena for its only source, and everything that is allocated inside `computing` comes from the pool: pages,
vectors, state, activations, logits. So the budget cannot be passed; what does not fit is refused. A part of it is an
arena and a pool of their own, for captured steps, so that these two do not take each other's room.

Beside it, and not counted: the CUDA context, loaded kernels, cuBLAS's workspace, which torch keeps for the process.

A tensor may outlive its engine. It holds its block in torch's pool, the block its segment in the arena, and the arena
stays until its last segment has come back: with the engine if nothing else lives, or else when torch next empties its
cache (torch.cuda.empty_cache(), or the next engine that needs the room).
"""

import gc
import logging
import os
import re
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from thl_engine.device import cuda
from thl_engine.errors import BudgetError
from thl_engine.memory import size

_log = logging.getLogger("thl_engine")


class DeviceMemory:
    """What one engine allocates.

    budget: bytes, or None to leave torch's own allocator to it. for_graphs: bytes of it for captured steps, 0 without.
    Raises BudgetError if the device has not as much free.
    """

    def __init__(self, device: torch.device, budget: int | None, for_graphs: int = 0) -> None:
        self._device, self._budget = device, budget or 0  # which only an enforced budget reads
        # Numbers of the arenas, and a pool of each, for steps and for captured ones; what closes them has them too.
        self._arenas: list[int] = []
        self._pools: list[Any] = []
        self._lock = threading.RLock()  # of torch's pools, which one thread may be in at a time
        self._route = ExitStack()  # what sends allocations to the pool
        self._depth = 0
        if device.type != "cuda" or budget is None:
            return
        if not cuda.available():
            _log.warning("the memory budget is planned but not enforced on %s: %s", device, cuda.reason())
            return
        with torch.cuda.device(device):
            self._open(torch.cuda.current_device(), [budget - for_graphs, for_graphs] if for_graphs else [budget])

    def _open(self, index: int, sizes: list[int]) -> None:
        small = torch.zeros(16, 16, device="cuda")
        torch.mm(small, small)  # cuBLAS's workspace stays with the process: it must not lie in an engine's pool
        weakref.finalize(self, _close, self._pools, self._arenas, os.getpid())
        for nbytes in sizes:
            try:
                self._arenas.append(cuda.open_arena(index, nbytes))
            except RuntimeError:
                gc.collect()
                torch.cuda.empty_cache()  # what closed engines and other tensors have left
                try:
                    self._arenas.append(cuda.open_arena(index, nbytes))
                except RuntimeError as error:
                    assert self._budget is not None  # of which the sizes are parts
                    free = torch.cuda.mem_get_info(index)[0] + sum(sizes[: len(self._arenas)])
                    raise BudgetError(
                        f"memory budget {size(self._budget)} ({self._budget} bytes): {self._device} has "
                        f"{free} bytes free ({error}); a budget below that can work"
                    ) from None
            self._pools.append(torch.cuda.MemPool(_allocator().allocator()))

    @property
    def enforced(self) -> bool:
        """Whether allocations beyond the budget are refused."""
        return bool(self._arenas)

    @property
    def pool_for_graphs(self) -> Any:
        """A torch.cuda.MemPool for what `capturing` captures; None where torch's own memory is to be taken."""
        return self._pools[1] if len(self._pools) > 1 else None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Runs on the device, with what is allocated taken from the budget; nests. One thread at a time.

        Raises BudgetError where memory runs out.
        """
        if self._device.type != "cuda":
            yield
            return
        with self._lock, torch.cuda.device(self._device):
            self._depth += 1
            try:
                if self._depth == 1:
                    self._enter()
                yield
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # they would keep what was computed alive
                raise self._exhausted(str(error)) from None
            finally:
                self._depth -= 1
                if not self._depth:
                    self._route.close()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside `computing`, for captures of CUDA graphs into `pool_for_graphs`.

        torch allocates from the pool that was made active first, so no other one may be.
        """
        if self.pool_for_graphs is None:
            yield
            return
        self._route.close()
        cuda.enter_arena(self._arenas[1])
        try:
            yield
        finally:
            cuda.leave_arena()
            self._enter()

    def _enter(self) -> None:
        if self._arenas:
            cuda.enter_arena(self._arenas[0])
            self._route.callback(cuda.leave_arena)
            self._route.enter_context(torch.cuda.use_mem_pool(self._pools[0]))  # on the current device

    def _exhausted(self, reason: str) -> BudgetError:
        if not self._arenas:
            return BudgetError(
                f"{self._device} is out of memory: {reason.partition('. GPU')[0]}; a smaller memory "
                "budget, batch size or context takes less"
            )
        assert self._budget is not None  # without one there are no arenas
        counts = cuda.arena_counts(self._arenas[0])
        asked = re.search(r"Tried to allocate ([0-9.]+ \w+)", reason)
        return BudgetError(
            f"memory budget {size(self._budget)} ({self._budget} bytes): "
            f"{asked[1] if asked else 'memory'} more on {self._device} does not fit beside "
            f"{size(counts['in_use'])} in use; fewer or shorter contexts take less, and a budget of "
            f"{self._budget + counts['last_refused']} bytes has room for it"
        )

    def stats(self, planned: int) -> dict[str, Any]:
        """As in `Engine.stats`. planned: bytes that the engine's plan counts, which are told where nothing measures."""
        out = {
            "peak_memory_bytes": planned,
            "peak_device_bytes": 0,
            "device_bytes_besides": 0,
            "budget_enforced": self.enforced,
        }
        if self._device.type != "cuda":
            return out
        free, total = torch.cuda.mem_get_info(self._device)
        if not self._arenas:
            peak, held = torch.cuda.max_memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        else:
            counts = [cuda.arena_counts(arena) for arena in self._arenas]
            peak, held = (sum(own[name] for own in counts) for name in ("peak", "size"))
        return {
            **out,
            "peak_memory_bytes": peak,
            "peak_device_bytes": peak,
            "device_bytes_besides": max(total - free - held, 0),
        }


@cache
def _allocator() -> Any:
    """torch's handle of our functions: one for the process, since pools keep a plain pointer to it."""
    return torch.cuda.memory.CUDAPluggableAllocator(cuda.library(), "thl_arena_alloc", "thl_arena_free")


def _close(pools: list[Any], arenas: list[int], process: int) -> None:
    if os.getpid() != process:  # a fork has no device
        return
    pools.clear()  # gives free segments back to the arenas
    for arena in arenas:
        cuda.close_arena(arena)
