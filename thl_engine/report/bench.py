"""Bandwidths as this machine has them, and decoding measured against them."""

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thl_engine.checkpoint.page import extent
from thl_engine.checkpoint.store import Store, StoredTensor, open_store
from thl_engine.engine.engine import Engine
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import (
    choose_device,
    divide_memory,
    rows_of_products,
    set_threads,
    state_traffic,
    walked_schedule,
)
from thl_engine.errors import ConfigError
from thl_engine.memory import peak_bytes, reset_peak, resident_bytes
from thl_engine.ops import native
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held
from thl_engine.paging.plan import NOMINAL, Bandwidths
from thl_engine.paging.reader import Arena, Reader
from thl_engine.paging.transfer import link_bandwidth

# Eight times the largest last-level cache met so far (32 MiB); more would only raise the process's peak memory.
BUFFER_BYTES = 256 << 20
DISK_BYTES = 1 << 30
DISK_SECONDS = 1.5
DISK_SLOTS = 8
PRODUCT_SHAPE = (2048, 4096)  # of synthetic matrices: as int8, a page
PRODUCT_SECONDS = 1.0
ROUNDS = 3  # of the read bandwidth, before decoding and after it


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which all threads, or the device, read memory: a sum without products."""
    if device.type == "cpu" and native.available():
        return native.memory_bandwidth(BUFFER_BYTES, 5)
    buffer = _filled(BUFFER_BYTES, torch.float32).to(device)
    buffer.sum()
    return BUFFER_BYTES / statistics.median(_seconds(buffer.sum, device) for _ in range(5))


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
        passes.append(_seconds(products, device))
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


def benchmark(
    path: str | Path,
    engine_options: EngineOptions | None = None,
    *,
    tokens: int = 256,
    warmup: int = 16,
    seed: int = 0,
    state_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Decodes random tokens one at a time and compares with what the memory gives and the plan predicted.

    With a batch_size each step takes a token of each sequence, and tokens per second are those of all of them.
    `state_options` are those of `Engine.new_state`, and count as the longest that a step can take with them.
    Bandwidths are measured while the model is not in memory, before and after, so that they add nothing to its peak.
    Returns plain values: sizes in bytes, times in seconds, rates per second.
    """
    for name, value, least in (("tokens", tokens, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    given, walking = engine_options or EngineOptions(), dict(state_options or {})
    set_threads(given.threads)
    store, chosen = open_store(path), choose_device(given.device)
    ops, batch_size = load_ops(given.backend, chosen.type), given.batch_size
    schedule, plan = divide_memory(store, ops, chosen, given)
    rates, rows = _Rates(), rows_of_products(store, batch_size)
    rates.measure(store, ops, chosen, plan.streamed_pages > 0, rows)
    reset_peak()
    with Engine(store, given) as engine:
        plan = engine.plan()
        found = _decode(engine, tokens, warmup, seed, batch_size, walking)
        found["peak_rss_bytes"] = peak_bytes()
        stats = engine.stats()
    del engine  # its memory goes with it
    gc.collect()
    rates.measure(store, ops, chosen, plan.streamed_pages > 0, rows)

    bandwidths = Bandwidths(statistics.mean(rates.disk), statistics.mean(rates.products), link_bandwidth(chosen))
    if walking:
        schedule = walked_schedule(store, ops, batch_size, walking)
    traffic = state_traffic(store, batch_size, given.for_states(store.architecture), warmup + tokens // 2)
    plan = plan.at(bandwidths, store, schedule, traffic)
    steps = range(warmup, warmup + tokens)
    read = (
        sum(
            store.pages[page].nbytes * schedule.touched(page)
            for t in steps
            for page in (*schedule.step(t), *schedule.head)
        )
        / tokens
    )
    measured = statistics.median(rates.reading)
    achieved = read * found["tokens_per_second"] / batch_size
    return {
        **found,
        "bytes_per_token": read,
        "achieved_bandwidth": achieved,
        "measured_bandwidth": measured,
        "bandwidth_ratio": achieved / measured,
        "predicted_tokens_per_second": plan.tokens_per_second,
        "prediction_ratio": found["tokens_per_second"] / plan.tokens_per_second,
        "product_bandwidth": bandwidths.memory,
        "disk_bandwidth": bandwidths.disk if plan.streamed_pages else None,
        "link_bandwidth": bandwidths.link,
        "planned_peak_bytes": plan.peak_memory_bytes,
        "peak_device_bytes": stats["peak_device_bytes"],
        "device_bytes_besides": stats["device_bytes_besides"],
        "budget_enforced": stats["budget_enforced"],
        "memory_budget": plan.budget,
        "pinned_bytes": plan.pinned_bytes,
        "ring_slots": plan.slots,
        "backend": ops.name,
        "isa": native.isa() if ops.name == "native" else None,
        "device": str(chosen),
        "threads": native.threads() if ops.name == "native" else torch.get_num_threads(),
        "model_type": store.model_type,
        "path": str(path),
    }


@dataclass
class _Rates:
    """Bytes per second, as often as they were measured."""

    reading: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)

    def measure(self, store: Store, ops: ReferenceOps, device: torch.device, streams: bool, rows: int) -> None:
        self.reading += [read_bandwidth(device) for _ in range(ROUNDS)]
        self.products.append(product_bandwidth(ops, device, largest_matrix(store), rows))
        self.disk.append(disk_bandwidth(store) if streams else NOMINAL.disk)


def _decode(
    engine: Engine, tokens: int, warmup: int, seed: int, batch_size: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.config.vocab_size, (warmup + tokens, batch_size), generator=generator)
    state, latencies, resident = engine.new_state(batch_size, **options), [], 0
    for i in range(warmup):
        engine.step(ids[i], state)
    before = engine.stats()
    for i in range(tokens):
        latencies.append(_seconds(partial(engine.step, ids[warmup + i], state), engine.device))
        if i == tokens // 4:
            resident = resident_bytes()
    after = engine.stats()
    total = sum(latencies)
    ordered, quarter = sorted(latencies), -(-tokens // 4)
    return {
        "tokens": tokens,
        "warmup": warmup,
        "batch_size": batch_size,
        "seconds": total,
        "tokens_per_second": batch_size * tokens / total,
        "latency_median": statistics.median(ordered),
        "latency_p95": ordered[int(0.95 * (tokens - 1))],
        # Equal, if speed does not depend on the length of the context.
        "latency_first_quarter": statistics.median(latencies[:quarter]),
        "latency_last_quarter": statistics.median(latencies[-quarter:]),
        "bytes_streamed_per_token": (after["bytes_streamed"] - before["bytes_streamed"]) / tokens,
        "stall_share": (after["stall_seconds"] - before["stall_seconds"]) / total,
        "page_hits": after["page_hits"] - before["page_hits"],
        "page_misses": after["page_misses"] - before["page_misses"],
        "rss_quarter_bytes": resident,
        "rss_end_bytes": resident_bytes(),
    }


def _filled(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of its own for each page: what was never written is one shared page of zeros, always in the cache."""
    return Arena(nbytes).tensor().view(dtype).fill_(1)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time that a call takes, with what it started on the device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
