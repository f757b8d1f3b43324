"""Decoding, measured against the bandwidths that this machine has."""

import gc
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from thl_engine.checkpoint.store import Store, open_store
from thl_engine.config.base import check_seed
from thl_engine.engine.engine import Engine
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import choose_device, divide_memory, nominal, pass_work, set_threads, walked_schedule
from thl_engine.errors import ConfigError
from thl_engine.memory import peak_bytes, reset_peak, resident_bytes, size
from thl_engine.ops.backends import isa, load_ops, threads
from thl_engine.ops.reference import ReferenceOps
from thl_engine.paging.plan import Plan
from thl_engine.paging.prediction import NOMINAL
from thl_engine.paging.transfer import link_bandwidth
from thl_engine.report.bandwidth import disk_bandwidth, largest_matrix, product_bandwidth, read_bandwidth, seconds
from thl_engine.report.forecast import seen_plan
from thl_engine.report.rehearsal import Rehearsed, joined, rehearse
from thl_engine.report.table import on_device, table

ROUNDS = 3  # of the read bandwidth, before decoding and after it


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
    check_seed(seed)
    given, walking = engine_options or EngineOptions(), dict(state_options or {})
    set_threads(given.threads)
    store, chosen = open_store(path), choose_device(given.device)
    ops, batch_size = load_ops(given.backend, chosen.type), given.batch_size
    schedule, plan = divide_memory(store, ops, chosen, given)
    if walking:
        schedule = walked_schedule(store, ops, batch_size, walking)
    steps, states = range(warmup, warmup + tokens), {**given.for_states(store.architecture), **walking}
    rates = _Rates()
    rates.measure(store, ops, given, plan, chosen, steps, walking)
    reset_peak()
    with Engine(store, given) as engine:
        plan = engine.plan()
        found = _decode(engine, tokens, warmup, seed, batch_size, walking)
        found["peak_rss_bytes"] = peak_bytes()
        stats = engine.stats()
    del engine  # its memory goes with it
    gc.collect()
    rates.measure(store, ops, given, plan, chosen, steps, walking)

    measured_rates = replace(nominal(chosen), disk=statistics.mean(rates.disk), link=link_bandwidth(chosen))
    if rates.seen:
        plan = seen_plan(plan, measured_rates, store, schedule, joined(rates.seen), given, states, steps)
    else:
        work = pass_work(store, batch_size, states, warmup + tokens // 2)
        plan = plan.at(replace(measured_rates, memory=statistics.mean(rates.products)), store, schedule, work)
    bandwidths = plan.bandwidths
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
        "multiply_adds_per_token": plan.multiply_adds_per_token,
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
        "isa": isa(ops),
        "device": str(chosen),
        "threads": threads(ops),
        "model_type": store.model_type,
        "path": str(path),
    }


def describe(found: Mapping[str, Any]) -> str:
    """What `benchmark` found, for people."""

    def rate(value: float | None) -> str:
        return "not measured" if value is None else f"{value / 1e9:.2f} GB/s"

    isa = f" ({found['isa']})" if found["isa"] else ""
    rows = [
        ("backend", f"{found['backend']}{isa} on {found['device']}, {found['threads']} threads"),
        (
            "tokens/s",
            f"{found['tokens_per_second']:.2f} over {found['tokens']} tokens, after {found['warmup']}"
            + (f", of {found['batch_size']} sequences each" if found["batch_size"] > 1 else ""),
        ),
        ("latency", f"{1e3 * found['latency_median']:.2f} ms median, {1e3 * found['latency_p95']:.2f} ms at 95 %"),
        (
            "bytes per token",
            f"{found['bytes_per_token'] / 1e6:.1f} MB, "
            f"{found['bytes_streamed_per_token'] / 1e6:.1f} MB of them streamed",
        ),
        ("achieved bandwidth", rate(found["achieved_bandwidth"])),
        ("measured bandwidth", f"{rate(found['measured_bandwidth'])} of plain reading"),
        ("ratio", f"{found['bandwidth_ratio']:.3f}"),
        (
            "predicted tokens/s",
            f"{found['predicted_tokens_per_second']:.2f} from computing at "
            f"{rate(found['product_bandwidth'])}, disk {rate(found['disk_bandwidth'])}",
        ),
        ("waiting for pages", f"{100 * found['stall_share']:.1f} % of the time"),
        ("memory budget", "none" if found["memory_budget"] is None else size(found["memory_budget"])),
        ("peak memory", f"{size(found['planned_peak_bytes'])} planned, {size(found['peak_rss_bytes'])} of the process"),
        (
            "memory over time",
            f"{size(found['rss_quarter_bytes'])} after a quarter, {size(found['rss_end_bytes'])} at the end",
        ),
    ]
    if found["peak_device_bytes"]:
        rows.append(("on the device", on_device(found)))
    return table(rows)


@dataclass
class _Rates:
    """Bytes per second, as often as they were measured."""

    reading: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)  # on a CUDA device
    disk: list[float] = field(default_factory=list)
    seen: list[Rehearsed] = field(default_factory=list)  # on the CPU

    def measure(
        self,
        store: Store,
        ops: ReferenceOps,
        options: EngineOptions,
        plan: Plan,
        device: torch.device,
        steps: range,
        walking: Mapping[str, Any],
    ) -> None:
        self.reading += [read_bandwidth(device) for _ in range(ROUNDS)]
        if device.type == "cpu":
            self.seen.append(rehearse(store, plan, options, steps, walking))
        else:
            self.products.append(product_bandwidth(ops, device, largest_matrix(store), options.batch_size))
        self.disk.append(disk_bandwidth(store) if plan.streamed_pages else NOMINAL.disk)


def _decode(
    engine: Engine, tokens: int, warmup: int, seed: int, batch_size: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.config.vocab_size, (warmup + tokens, batch_size), generator=generator)
    state, resident = engine.new_state(batch_size, **options), 0
    latencies: list[float] = []
    for i in range(warmup):
        engine.step(ids[i], state)
    before = engine.stats()
    for i in range(tokens):
        latencies.append(seconds(partial(engine.step, ids[warmup + i], state), engine.device))
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
