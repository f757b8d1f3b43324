"""What an engine runs on: device, threads, and the division of its memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from inspect import signature
from math import prod
from typing import Any

import torch

from thl_engine.checkpoint.store import Store
from thl_engine.config import parse_config
from thl_engine.device.caching_allocator import LARGE_ROUNDING, LARGE_SEGMENT, MIB, SMALL_SEGMENT, reserved
from thl_engine.errors import ConfigError
from thl_engine.memory import available_memory, parse_bytes
from thl_engine.models import architecture
from thl_engine.ops import native
from thl_engine.ops.reference import ReferenceOps
from thl_engine.paging.pager import Pager
from thl_engine.paging.plan import NOMINAL, NOMINAL_CUDA, Bandwidths, PageSchedule, Plan, make_plan
from thl_engine.paging.reader import Reader
from thl_engine.paging.transfer import keeps_pages

FORWARD_CHUNK = 64  # rows of `forward` whose logits share one pass over the head
WORKSPACE_LOGITS = 4  # rows of logits alive at once for each sequence: as computed, and float64 while one is chosen
HOST_SHARE = 0.5  # of free host memory: page-locked, it is lost to everything else
# Of captured steps, which share no memory with what is launched anew: what one step leaves in pieces, and rows of
# logits that captures keep for each sequence. Further captures are refused, and their steps launched.
GRAPHS_BYTES, GRAPHS_LOGITS = 32 * MIB, 8


def divide_memory(
    store: Store,
    ops: ReferenceOps,
    device: torch.device,
    stream: bool | str = "auto",
    memory_budget: str | int | None = None,
    *,
    batch_size: int = 1,
    host_memory: str | int | None = None,
    **options: Any,
) -> tuple[PageSchedule, Plan]:
    """What an engine pins and streams for states of `batch_size` with these options; none of the weights is read."""
    if stream not in (True, False, "auto"):
        raise ConfigError(f"stream is {stream!r}; it must be True, False or 'auto'")
    check_batch_size(batch_size)
    config, model = parse_config(store.config, store.model_type), architecture(store.model_type)
    products = model.products(config) if hasattr(model, "products") else {}
    schedule = PageSchedule(store, model.walk(config), model.head(config), products, touched(store, ops, batch_size))
    limit = None if memory_budget is None else parse_bytes(memory_budget)
    room = host_room(device, host_memory)
    needed = needs(store, ops, device, batch_size, options)

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
            state_traffic=state_traffic(store, batch_size, options),
            nominal=nominal(device),
            host_room=room,
        )

    if stream != "auto":
        return schedule, plan(limit, stream)
    if limit is None:
        limit = available_memory(device)
        whole = plan(None, False)
        return schedule, whole if whole.peak_memory_bytes <= limit else plan(limit, True)
    return schedule, plan(limit, True)


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
    config, model = parse_config(store.config, store.model_type), architecture(store.model_type)
    state = model.init_state(config, batch_size, "meta", **options)
    matrices = [tensor for tensor in store.tensors.values() if tensor.kind == "matrix"]
    largest = max(page.nbytes // tensor.dtype.itemsize for tensor in matrices for page in tensor.pages)
    passing, scratch = workspace(model, config, ops, state, largest, max(tensor.shape[1] for tensor in matrices))
    reserve = 0
    if device.type == "cuda":
        kept = [4 * prod(tensor.shape) for tensor in store.tensors.values() if tensor.kind == "vector"]
        kept += [tensor.nbytes for tensor in tensors(state)]
        reserve = reserved(kept) - sum(kept) + fragments(passing, scratch)
        reserve += LARGE_ROUNDING + for_graphs(ops, config, batch_size)  # of the pager's one block
    return Needs(state.nbytes, passing + scratch, reserve)


def workspace(
    model: Any, config: Any, ops: ReferenceOps, state: Any, page_elements: int, columns: int
) -> tuple[int, int]:
    """Bytes of activations and logits, and of what the ops take beside them.

    page_elements: weights of the largest page. columns: of the widest matrix.
    """
    reused = model.reused(config) if hasattr(model, "reused") else 0
    rows = max(WORKSPACE_LOGITS * state.batch_size, 0 if hasattr(model, "forward") else FORWARD_CHUNK)
    activations, scores = model.workspace(config, state)
    inputs = (
        state.batch_size * (model.step_rows(config) if hasattr(model, "step_rows") else model.chunk(config)) * columns
    )
    if not ops.in_place:  # all but a cache is written anew
        activations += state.nbytes - (state.cache.nbytes if hasattr(state, "cache") else 0)
    dequantized = state.cache.dequantized_bytes if hasattr(state, "cache") else 0
    return (
        4 * rows * config.vocab_size + activations,
        ops.scratch_bytes(page_elements, reused, scores, inputs, dequantized),
    )


def for_graphs(ops: ReferenceOps, config: Any, batch_size: int) -> int:
    """Bytes that are kept for captured steps, where ops are captured."""
    return GRAPHS_BYTES + 4 * GRAPHS_LOGITS * batch_size * config.vocab_size if hasattr(ops, "recorder") else 0


def fragments(passing: int, scratch: int) -> int:
    """What torch's allocator may take beyond activations and scratch: a begun segment of each kind, and what lies in
    pieces between them. Found by running recorded steps of all architectures through a model of the allocator
    (tests/test_workspace.py): of tensors of all sizes half of theirs, of page-sized scratch as much as it is.
    """
    return SMALL_SEGMENT + LARGE_SEGMENT + passing // 2 + scratch


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a state, with those of dataclasses and lists in it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        yield from tensors(list(vars(value).values()))


def state_traffic(store: Store, batch_size: int, options: dict[str, Any], position: int | None = None) -> int | None:
    """Bytes of the state that a token reads or writes, if the model says; at half of its context unless given."""
    config, model = parse_config(store.config, store.model_type), architecture(store.model_type)
    if not hasattr(model, "traffic"):
        return None
    return model.traffic(config, model.init_state(config, batch_size, "meta", **options), position)


def touched(store: Store, ops: ReferenceOps, batch_size: int) -> dict[str, float]:
    """Share of a matrix that the sparse products of a step read, where that is not all of it.

    Columns that are not needed can only be left out where the file stores the matrix by columns.
    """
    config, model = parse_config(store.config, store.model_type), architecture(store.model_type)
    shares = model.touched(config) if hasattr(model, "touched") else {}
    by_columns = {block.name for block in model.blocks(config) if block.transposed}
    rows = rows_of_products(store, batch_size)
    return {
        name: 1.0 - (1.0 - share) ** rows
        for name, share in shares.items()
        if share <= ops.sparse_share and (name not in by_columns or store.tensors[name].transposed)
    }


def rows_of_products(store: Store, batch_size: int) -> int:
    """Rows of activations that the products of one step have."""
    model = architecture(store.model_type)
    rows = model.step_rows(parse_config(store.config, store.model_type)) if hasattr(model, "step_rows") else 1
    return batch_size * rows


def state_options(model_type: str, context: int | None, kv_cache: str, sliding_window: int | None) -> dict[str, Any]:
    """Options for the model's `init_state`; only what differs from the defaults. Raises ConfigError if it has none."""
    given = {
        "context": context,
        "kv_cache": None if kv_cache == "float32" else kv_cache,
        "sliding_window": sliding_window,
    }
    options = {name: value for name, value in given.items() if value is not None}
    unknown = options.keys() - signature(architecture(model_type).init_state).parameters.keys()
    for name in sorted(unknown):
        raise ConfigError(f"{name} is {options[name]!r}, but {model_type} models have no such option; leave it out")
    return options


def check_batch_size(batch_size: int) -> None:
    """Raises ConfigError for a batch size that is none."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")


def host_room(device: torch.device, host_memory: str | int | None) -> int:
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
    return 0 if host_memory in (0, "0") else parse_bytes(host_memory)


def open_pager(store: Store, plan: Plan, vectors: Mapping[str, torch.Tensor], device: torch.device) -> Pager:
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
    """Threads of the CPU backends; None leaves them as they are."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads is {threads!r}; it must be a whole number of at least 1")
    torch.set_num_threads(threads)
    if native.available():
        native.set_threads(threads)
