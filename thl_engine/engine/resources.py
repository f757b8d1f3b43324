"""What an engine runs on: device, threads, and the division of its memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from thl_engine.checkpoint.store import Store
from thl_engine.config import Config
from thl_engine.device.caching_allocator import LARGE_ROUNDING, LARGE_SEGMENT, MIB, SMALL_SEGMENT, reserved
from thl_engine.engine.options import EngineOptions
from thl_engine.errors import BudgetError, ConfigError
from thl_engine.limits import processors
from thl_engine.memory import available_memory, size
from thl_engine.models.contract import AnyArchitecture
from thl_engine.models.state import State, tensors_of
from thl_engine.ops import native
from thl_engine.ops.reference import ReferenceOps
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.paged_weights import Pages
from thl_engine.paging.pager import Pager
from thl_engine.paging.plan import Plan, make_plan
from thl_engine.paging.prediction import NOMINAL, NOMINAL_CUDA, Bandwidths, Work
from thl_engine.paging.reader import Reader
from thl_engine.paging.transfer import keeps_pages

FORWARD_CHUNK = 64  # rows of `forward` whose logits share one pass over the head
WORKSPACE_LOGITS = 4  # rows of logits alive at once for each sequence: as computed, and float64 while one is chosen
UNBOUNDED_POSITION = 2048  # twice where plans look at a sequence that may have any length
HOST_SHARE = 0.5  # of free host memory: page-locked, it is lost to everything else
# Of captured steps, which share no memory with what is launched anew: what one step leaves in pieces, and rows of
# logits that captures keep for each sequence. Further captures are refused, and their steps launched.
GRAPHS_BYTES, GRAPHS_LOGITS = 32 * MIB, 8


PROMISED = 4 << 30  # bytes of a device in which a streamed model runs, whatever its size


def promised_budget(device: str) -> int:
    """The memory budget of who asks for streaming and names none: what is promised, or what is free if that is less."""
    return min(PROMISED, available_memory(choose_device(device)))


def divide_memory(
    store: Store, ops: ReferenceOps, device: torch.device, options: EngineOptions
) -> tuple[PageSchedule, Plan]:
    """What an engine pins and streams for states of the batch size; none of the weights is read."""
    batch_size, states = options.batch_size, options.for_states(store.architecture)
    schedule = page_schedule(store, ops, batch_size)
    room = host_room(device, options.host_memory)
    needed = needs(store, ops, device, batch_size, states)
    work = pass_work(store, batch_size, states, usual_position(store, states))

    def plan(limit: int | None, stream: bool) -> Plan:
        return make_plan(
            store,
            schedule,
            budget=limit,
            stream=stream,
            batch_size=batch_size,
            state_bytes=needed.state,
            workspace_bytes=needed.workspace,
            reserve_bytes=needed.reserve,
            work=work,
            nominal=nominal(device),
            smaller_state="options context and kv_cache" if "context" in store.architecture.state_options else "",
            host_room=room,
        )

    if options.memory_budget is None:
        check_free(needed, device, batch_size)
    if options.stream != "auto":
        return schedule, plan(options.memory_budget, options.stream)
    if options.memory_budget is not None:
        return schedule, plan(options.memory_budget, True)
    limit = available_memory(device)
    whole = plan(None, False)
    return schedule, whole if whole.peak_memory_bytes <= limit else plan(limit, True)


def walked_schedule(store: Store, ops: ReferenceOps, batch_size: int, state_options: Mapping[str, Any]) -> PageSchedule:
    """What steps read of states made with these options. Pages are pinned whatever a state's options are."""
    state = store.architecture.init_state(store.config, batch_size, "meta", **state_options)
    return page_schedule(store, ops, batch_size, **state.options)


def page_schedule(store: Store, ops: ReferenceOps, batch_size: int, **walking: Any) -> PageSchedule:
    """What steps of a batch read, in pages. walking: options that the walk of a state depends on."""
    model, config = store.architecture, store.config
    return PageSchedule(
        store,
        model.walk(config, **walking),
        model.head(config),
        model.products(config),
        touched(store, ops, batch_size),
    )


@dataclass(frozen=True)
class Needs:
    """Bytes of a state at its full context, of what computing with it takes besides, and of what the device's allocator
    may take beyond both and beyond the weights."""

    state: int
    workspace: int
    reserve: int

    @property
    def total(self) -> int:
        return self.state + self.workspace + self.reserve


def needs(store: Store, ops: ReferenceOps, device: torch.device, batch_size: int, options: dict[str, Any]) -> Needs:
    """What a state of `batch_size` sequences takes on a device."""
    config, model = store.config, store.architecture
    state = model.init_state(config, batch_size, "meta", **options)
    matrices = [tensor for tensor in store.tensors.values() if tensor.kind == "matrix"]
    largest = max(page.nbytes // tensor.dtype.itemsize for tensor in matrices for page in tensor.pages)
    passing, scratch = workspace(model, config, ops, state, largest, max(tensor.shape[1] for tensor in matrices))
    reserve = 0
    if device.type == "cuda":
        kept = [4 * prod(tensor.shape) for tensor in store.tensors.values() if tensor.kind == "vector"]
        kept += [tensor.nbytes for tensor in tensors_of(state)]
        reserve = reserved(kept) - sum(kept) + fragments(passing, scratch)
        reserve += LARGE_ROUNDING + for_graphs(ops, config, batch_size)  # of the pager's one block
    return Needs(state.nbytes, passing + scratch, reserve)


def check_free(needed: Needs, device: torch.device, batch_size: int) -> None:
    """BudgetError where the host has no memory for a state; a CUDA device itself refuses what does not fit."""
    if device.type != "cpu":
        return
    free = available_memory(device)
    if needed.total > free:
        raise BudgetError(
            f"a state of batch_size {batch_size} takes {size(needed.state)} at its full context, and a step "
            f"{size(needed.workspace)} besides; {size(free)} can be had here"
        )


def workspace(
    model: AnyArchitecture, config: Config, ops: ReferenceOps, state: State, page_elements: int, columns: int
) -> tuple[int, int]:
    """Bytes of activations and logits, and of what the ops take beside them.

    page_elements: weights of the largest page. columns: of the widest matrix.
    """
    rows = max(WORKSPACE_LOGITS * state.batch_size, 0 if model.forward is not None else FORWARD_CHUNK)
    activations, scores = model.workspace(config, state)
    inputs = state.batch_size * (model.pass_rows or model.chunk)(config) * columns
    if not ops.in_place:  # all but a cache is written anew
        activations += state.nbytes - state.kept_bytes
    return (
        4 * rows * config.vocab_size + activations,
        ops.scratch_bytes(page_elements, model.reused(config), scores, inputs, state.dequantized_bytes),
    )


def for_graphs(ops: ReferenceOps, config: Config, batch_size: int) -> int:
    """Bytes that are kept for captured steps, where ops are captured."""
    return GRAPHS_BYTES + 4 * GRAPHS_LOGITS * batch_size * config.vocab_size if ops.capturable else 0


def fragments(passing: int, scratch: int) -> int:
    """What torch's allocator may take beyond activations and scratch: a begun segment of each kind, and what lies in
    pieces between them. Found by running recorded steps of all architectures through a model of the allocator
    (tests/test_workspace.py): of tensors of all sizes half of theirs, of page-sized scratch as much as it is.
    """
    return SMALL_SEGMENT + LARGE_SEGMENT + passing // 2 + scratch


def usual_position(store: Store, options: Mapping[str, Any]) -> int:
    """Where plans look at a sequence: half of the longest that states with these options hold."""
    longest = options.get("context") or store.architecture.longest(store.config) or UNBOUNDED_POSITION
    return int(longest) // 2


def pass_work(store: Store, batch_size: int, options: Mapping[str, Any], position: int) -> Work:
    """What a pass behind so many tokens takes of states with these options."""
    model, config = store.architecture, store.config
    state = model.init_state(config, batch_size, "meta", **options)
    state.seek(position)
    return Work(
        rows=batch_size * model.step_rows(config, position),
        head_rows=batch_size,
        attended=model.attended(config, state, position),
        traffic=model.traffic(config, state, position),
    )


def touched(store: Store, ops: ReferenceOps, batch_size: int) -> dict[str, float]:
    """Share of a matrix that the sparse products of a step read, where that is not all of it.

    Columns that are not needed can only be left out where the file stores the matrix by columns.
    """
    model, config = store.architecture, store.config
    by_columns = {block.name for block in model.blocks(config) if block.transposed}
    rows = batch_size * model.step_rows(config, usual_position(store, {}))
    return {
        name: 1.0 - (1.0 - share) ** rows
        for name, share in model.touched(config).items()
        if share <= ops.sparse_share and (name not in by_columns or store.tensors[name].transposed)
    }


def host_room(device: torch.device, host_memory: int | None) -> int:
    """Bytes of host memory that pages streamed to a device may stay in: as given, or a share of what is free now.

    None without the copy engine. Raises ConfigError on the CPU, where memory_budget bounds it.
    """
    if device.type == "cpu":
        if host_memory is not None:
            raise ConfigError(
                "host_memory is for pages on their way to a CUDA device; on the CPU, memory_budget bounds what is kept"
            )
        return 0
    if torch.cuda.is_available() and not keeps_pages(device):
        return 0
    if host_memory is None:
        return int(available_memory(torch.device("cpu")) * HOST_SHARE)
    return host_memory


class Serve(Protocol):
    """Opens what serves a store's pages as a plan says, given its vectors and a device: `open_pager`."""

    def __call__(
        self, store: Store, plan: Plan, vectors: Mapping[str, torch.Tensor], device: torch.device, verify: str, /
    ) -> Pages: ...


def open_pager(
    store: Store, plan: Plan, vectors: Mapping[str, torch.Tensor], device: torch.device, verify: str = "first"
) -> Pager:
    """What serves the pages as the plan says; pinned ones are read now."""
    tables = [page.index for name in plan.resident_tables for page in store.tensors[name].pages]
    streams = plan.streamed_pages > 0
    reader = Reader(store.files, direct=store.descriptor is None or streams)
    pager = Pager(
        store,
        reader,
        vectors,
        (*plan.pinned, *tables),
        plan.slots,
        plan.slot_bytes,
        plan.horizon,
        device,
        plan.kept,
        direct_storage=device.type == "cuda" and plan.kept_bytes < plan.streamed_bytes,
        verify_always=verify == "always",
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # later steps may be on another stream than the one that awaits pinned pages
    return pager


def nominal(device: torch.device) -> Bandwidths:
    """What is assumed of a kind of device where nothing was measured."""
    return NOMINAL_CUDA if device.type == "cuda" else NOMINAL


def choose_device(name: str, planned: bool = False) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here; if only `planned` for, it need not be here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not planned and (device.index or 0) >= count:
        raise ConfigError(f"device {name!r}: this machine has {count} CUDA devices; use device cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Threads of the CPU backends; None for those there are, but no more than the process may keep busy."""
    if threads is None:
        threads = processors()
        if threads >= torch.get_num_threads() and (not native.available() or threads >= native.threads()):
            return
    torch.set_num_threads(threads)
    if native.available():
        native.set_threads(threads)
