"""`thl plan`, `thl inspect` and `thl bench`: what a checkpoint is, what it would cost, and what it does cost."""

import json
import sys
from argparse import Namespace
from typing import Any

import torch

from thl_engine.checkpoint.store import open_store
from thl_engine.cli.modes import mode_options
from thl_engine.cli.options import engine_options
from thl_engine.cli.progress import progress_bar
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import choose_device, divide_memory, nominal, rows_of_products, walked_schedule
from thl_engine.memory import size
from thl_engine.ops.backends import load_ops
from thl_engine.paging.plan import Bandwidths
from thl_engine.paging.transfer import link_bandwidth
from thl_engine.report import bench as measure
from thl_engine.report.summary import describe, summarise
from thl_engine.report.summary import verify as verify_pages


def plan(arguments: Namespace) -> None:
    device = choose_device(arguments.device, planned=True)
    ops, assumed = load_ops(arguments.backend, device.type), nominal(device)
    here = device.type == "cpu" or torch.cuda.is_available()
    with open_store(arguments.path) as store:
        modes = mode_options(store.model_type, arguments.mode)
        options = EngineOptions.of(**engine_options(arguments))
        schedule, division = divide_memory(store, ops, device, options)
        bandwidths = Bandwidths(
            disk=arguments.disk_bandwidth or measure.disk_bandwidth(store),
            memory=arguments.memory_bandwidth
            or (
                measure.product_bandwidth(
                    ops, device, measure.largest_matrix(store), rows_of_products(store, arguments.batch_size)
                )
                if here
                else assumed.memory
            ),
            link=None
            if device.type == "cpu"
            else arguments.link_bandwidth or (link_bandwidth(device) if here else assumed.link),
        )
        found = division.at(
            bandwidths, store, walked_schedule(store, ops, arguments.batch_size, modes) if modes else schedule
        )
    if not here and not (arguments.memory_bandwidth and arguments.link_bandwidth):
        print(
            "thl: there is no CUDA device here: of the bandwidths of its memory and of the link, those not given are "
            "assumed",
            file=sys.stderr,
        )
    print(
        json.dumps({**found.to_dict(), "backend": ops.name, "device": str(device)})
        if arguments.json
        else found.table(("backend", f"{ops.name} on {device}"))
    )


def inspect(arguments: Namespace) -> None:
    with open_store(arguments.path) as store:
        summary = summarise(store)
        if arguments.verify:
            with progress_bar("verifying") as progress:
                summary["verified_bytes"] = verify_pages(store, progress)
    if arguments.json:
        print(json.dumps(summary))
        return
    print(describe(summary))
    if arguments.verify:
        checked = summary["pages"]["checksums"]
        print(
            f"\nverified: {size(summary['verified_bytes'])} read, "
            + (f"{checked} checksums match" if checked else "the file has no checksums to compare with")
        )


def bench(arguments: Namespace) -> None:
    with open_store(arguments.path) as store:
        options = mode_options(store.model_type, arguments.mode)
    found = measure.benchmark(
        arguments.path,
        EngineOptions.of(**engine_options(arguments)),
        tokens=arguments.tokens,
        warmup=arguments.warmup,
        seed=arguments.seed,
        state_options=options,
    )
    print(json.dumps(found) if arguments.json else _bench_table(found))


def _bench_table(found: dict[str, Any]) -> str:
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
            f"{found['predicted_tokens_per_second']:.2f} from products at "
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
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def on_device(found: dict[str, Any]) -> str:
    """An engine's memory on its device, and what lies beside it, for people."""
    kept = (
        ""
        if found["memory_budget"] is None
        else ", the budget enforced"
        if found["budget_enforced"]
        else (", the budget planned but not enforced")
    )
    return (
        f"{size(found['peak_device_bytes'])}{kept}; besides it {size(found['device_bytes_besides'])} of the CUDA "
        "context, kernels and other programs"
    )
