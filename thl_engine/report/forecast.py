"""What a memory budget would cost, told without opening an engine: nothing is pinned, no weight is multiplied."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thl_engine.checkpoint.store import Store
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import choose_device, divide_memory, nominal, rows_of_products, walked_schedule
from thl_engine.ops.backends import load_ops
from thl_engine.paging.plan import Bandwidths, Plan
from thl_engine.paging.transfer import link_bandwidth
from thl_engine.report.bandwidth import disk_bandwidth, largest_matrix, product_bandwidth


@dataclass(frozen=True)
class Forecast:
    """A plan, what would compute, and whether some bandwidths are assumed, since there is no such device here."""

    plan: Plan
    backend: str
    device: torch.device
    assumed: bool


def forecast(
    store: Store,
    options: EngineOptions | None = None,
    *,
    disk: float | None = None,
    memory: float | None = None,
    link: float | None = None,
    state_options: Mapping[str, Any] | None = None,
) -> Forecast:
    """What an engine with these options pins and streams, and how fast it decodes.

    disk, memory, link: bytes per second of the disk, of products with weights in memory and of the link to a CUDA
    device. Those not given are measured, which takes seconds, or assumed for a CUDA device that is not here.
    state_options: those of `Engine.new_state`, which count as the longest that a step can take with them. Raises
    ConfigError for options that cannot work here, BudgetError with the least budget that would do.
    """
    options = options or EngineOptions()
    device = choose_device(options.device, planned=True)
    ops, typical = load_ops(options.backend, device.type), nominal(device)
    here = device.type == "cpu" or torch.cuda.is_available()
    schedule, plan = divide_memory(store, ops, device, options)
    assumed = not here and not (memory and link)
    disk = disk or disk_bandwidth(store)
    if not memory:
        rows = rows_of_products(store, options.batch_size)
        memory = product_bandwidth(ops, device, largest_matrix(store), rows) if here else typical.memory
    if device.type == "cpu":
        link = None
    elif not link:
        link = link_bandwidth(device) if here else typical.link
    if state_options:
        schedule = walked_schedule(store, ops, options.batch_size, state_options)
    return Forecast(plan.at(Bandwidths(disk, memory, link), store, schedule), ops.name, device, assumed)
