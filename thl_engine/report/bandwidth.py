"""Bandwidths as this machine has them: of memory, of products with weights in memory, and of the disk."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from thl_engine.checkpoint.page import StoredTensor, extent
from thl_engine.checkpoint.store import Store
from thl_engine.ops import native
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held
from thl_engine.paging.reader import Arena, Reader

# Eight times the largest last-level cache met so far (32 MiB); more would only raise the process's peak memory.
BUFFER_BYTES = 256 << 20
DISK_BYTES = 1 << 30
DISK_SECONDS = 1.5
DISK_SLOTS = 8
PRODUCT_SHAPE = (2048, 4096)  # of synthetic matrices: as int8, a page
PRODUCT_SECONDS = (
    0.5  # some 30 passes on a 2-core EPYC; medians of 1.0 agree within what neighbours on the machine change
)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which all threads, or the device, read memory: a sum without products."""
    if device.type == "cpu" and native.available():
        return native.memory_bandwidth(BUFFER_BYTES, 5)
    buffer = _filled(BUFFER_BYTES, torch.float32).to(device)
    buffer.sum()
    return BUFFER_BYTES / statistics.median(seconds(buffer.sum, device) for _ in range(5))


def product_bandwidth(ops: ReferenceOps, device: torch.device, like: StoredTensor, rows_of_x: int = 1) -> float:
    """Bytes of weights per second that products with so many rows achieve, for weights stored like those of `like`."""
    rows, columns = PRODUCT_SHAPE
    count = BUFFER_BYTES // (rows * columns * like.dtype.itemsize)
    data = _filled(BUFFER_BYTES, like.dtype).to(device).view(count, rows, columns)
    scales = None
    if like.scales is not None:
        groups = () if like.group is None else (-(-columns // like.group),)
        scales = torch.full((rows, *groups), 1e-3, device=device)
    matrices = [Held(data[i], scales, like.group) for i in range(count)]
    x = torch.linspace(-1.0, 1.0, columns, device=device).repeat(rows_of_x, 1)

    def products() -> None:
        for matrix in matrices:
            ops.linear(x, matrix)

    products()
    passes: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < PRODUCT_SECONDS or len(passes) < 3:
        passes.append(seconds(products, device))
    return BUFFER_BYTES / statistics.median(passes)


def disk_bandwidth(store: Store) -> float:
    """Bytes per second at which the reader brings in matrix pages, taken evenly from the whole checkpoint."""
    pages = [page for tensor in store.tensors.values() if tensor.kind == "matrix" for page in tensor.pages]
    slot = max(extent(page)[1] for page in pages)
    every = max(1, sum(page.nbytes for page in pages) // DISK_BYTES)
    arena = Arena(DISK_SLOTS * slot)
    arena.tensor().fill_(0)  # memory exists before the clock starts
    flying: deque[int] = deque()
    with Reader(store.files) as reader:
        started, done = time.perf_counter(), 0
        for number, page in enumerate(itertools.cycle(pages[::every])):
            if len(flying) == DISK_SLOTS:
                reader.wait(flying.popleft())
                if done >= DISK_BYTES or time.perf_counter() - started > DISK_SECONDS:
                    break
            flying.append(reader.submit(page.file, page.offset, page.nbytes, arena, number % DISK_SLOTS * slot))
            done += page.nbytes
        while flying:
            reader.wait(flying.popleft())
        return done / (time.perf_counter() - started)


def largest_matrix(store: Store) -> StoredTensor:
    """The matrix whose storage stands for the others'."""
    return max((t for t in store.tensors.values() if t.kind == "matrix"), key=lambda t: t.nbytes)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time that a call takes, with what it started on the device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _filled(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of its own for each page: what was never written is one shared page of zeros, always in the cache."""
    return Arena(nbytes).tensor().view(dtype).fill_(1)
