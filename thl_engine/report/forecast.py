"""What a memory budget would cost, told without the memory that it would take: nothing is pinned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from thl_engine.checkpoint.store import Store
from thl_engine.engine.options import EngineOptions
from thl_engine.engine.resources import (
    choose_device,
    divide_memory,
    nominal,
    pass_work,
    set_threads,
    usual_position,
    walked_schedule,
)
from thl_engine.ops.backends import load_ops
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.plan import Plan
from thl_engine.paging.prediction import LONGEST_STRETCH, Bandwidths
from thl_engine.paging.transfer import link_bandwidth
from thl_engine.report.bandwidth import disk_bandwidth, largest_matrix, product_bandwidth

if TYPE_CHECKING:
    from thl_engine.report.rehearsal import Rehearsed


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
    """What an engine with these options pins and streams, and how fast it decodes, in the middle of its context.

    disk, memory, link: bytes per second of the disk, of products with weights in memory and of the link to a CUDA
    device. Those not given are measured, which takes seconds, or assumed for a CUDA device that is not here. Without
    `memory`, what a CPU computes is measured on steps of the model itself. state_options: those of `Engine.new_state`,
    which count as the longest that a step can take with them. Raises ConfigError for options that cannot work here,
    BudgetError with the least budget that would do.
    """
    options = options or EngineOptions()
    set_threads(options.threads)
    device = choose_device(options.device, planned=True)
    ops, typical = load_ops(options.backend, device.type), nominal(device)
    here = device.type == "cpu" or torch.cuda.is_available()
    schedule, plan = divide_memory(store, ops, device, options)
    assumed = not here and not (memory and link)
    walking, batch = dict(state_options or {}), options.batch_size
    if walking:
        schedule = walked_schedule(store, ops, batch, walking)
    disk = disk or disk_bandwidth(store)
    if device.type == "cpu":
        link = None
    elif not link:
        link = link_bandwidth(device) if here else typical.link
    states = {**options.for_states(store.architecture), **walking}
    steps = usual_steps(store, schedule, states)
    rates = replace(typical, disk=disk, link=link)
    if memory or not here:
        rates = replace(rates, memory=memory or typical.memory)
    elif device.type == "cuda":
        rates = replace(rates, memory=product_bandwidth(ops, device, largest_matrix(store), batch))
    else:
        from thl_engine.report.rehearsal import rehearse  # an engine, which plans at given rates do without

        seen = rehearse(store, plan, options, steps, walking)
        return Forecast(seen_plan(plan, rates, store, schedule, seen, options, states, steps), ops.name, device, False)
    work = pass_work(store, batch, states, steps.start)
    return Forecast(plan.at(rates, store, schedule, work), ops.name, device, assumed)


def usual_steps(store: Store, schedule: PageSchedule, states: Mapping[str, Any]) -> range:
    """A period of steps in the middle of the context of states with these options."""
    half, count = usual_position(store, states), min(schedule.period, LONGEST_STRETCH)
    first = max(0, half - half % count)
    return range(first, first + count)


def seen_plan(
    plan: Plan,
    rates: Bandwidths,
    store: Store,
    schedule: PageSchedule,
    seen: "Rehearsed",
    options: EngineOptions,
    states: Mapping[str, Any],
    steps: range,
) -> Plan:
    """The plan at what was measured: the disk's and link's rates, and what steps compute.

    Its bandwidth of the memory is what they achieve with all that they do.
    """
    passes = [t for t in steps if schedule.reads(t)] or [steps.start]
    work = pass_work(store, options.batch_size, states, round(sum(passes) / len(passes)))
    rates = replace(rates, arithmetic=None)
    plan = plan.at(rates, store, schedule, work, seen)
    return replace(
        plan, bandwidths=replace(rates, memory=plan.bytes_per_token / (plan.seconds_per_token - plan.stall_per_token))
    )
