"""THL: GRU tiers on clocks, a window of recent embeddings, and a bank of memory slots (THL upstream 0.2.0).

Notation: B batch, K tiers of width d_k, e embedding [B, d_e], J slots of width d_m, H heads of d_h, d_v value width.
Step t reads, in this order: local window, memory, the tiers whose clock divides t, the write candidate.

Projections are moved off the stored rows. Published code computes keys W_k·M_j and values W_v·M_j of all J slots
each step; q·(W_k M_j) = (W_kᵀ q)·M_j and Σ α W_v M_j = W_v Σ α M_j need one product each. So for the window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import THLConfig
from thl_engine.errors import CheckpointError
from thl_engine.models.contract import Architecture, Ops, Record, Weights
from thl_engine.models.state import State as BaseState
from thl_engine.models.state import taken_fields
from thl_engine.schedule import Block, Walk


@dataclass
class State(BaseState):
    """Everything a batch of sequences needs to continue; fixed size however long they get.

    tiers: K tensors [B, d_k]; memory [B, J, d_m]; norms [B, J] (of the memory's slots, derived); read_ema, write_ema
    [B, J]; last_read, last_write int64 [B, J]; local_buffer [B, W, d_e], oldest first, `local_valid` entries in use.
    """

    timestep: int
    tiers: list[Tensor]
    memory: Tensor
    norms: Tensor
    read_ema: Tensor
    write_ema: Tensor
    last_read: Tensor
    last_write: Tensor
    local_buffer: Tensor
    local_valid: int

    @property
    def batch_size(self) -> int:
        return self.memory.shape[0]

    def seek(self, position: int) -> None:
        super().seek(position)
        self.local_valid = min(position, self.local_buffer.shape[1])

    def named(self) -> dict[str, Tensor]:
        """The fields under their published names, not copied; `norms` is left out because the memory gives it."""
        tiers = {f"tier{k}": s for k, s in enumerate(self.tiers)}
        return {
            "timestep": torch.tensor(self.timestep),
            **tiers,
            "memory_state": self.memory,
            "read_ema": self.read_ema,
            "write_ema": self.write_ema,
            "last_read": self.last_read,
            "last_write": self.last_write,
            "local_buffer": self.local_buffer,
            "local_valid": torch.tensor(self.local_valid),
        }


def blocks(config: THLConfig) -> tuple[Block, ...]:
    """All tensors of the published state dict, those that a step reads first in the order of reading."""
    c = config
    first, last = c.tier_dims[0], c.tier_dims[-1]
    window = "matrix" if c.local_window else "unused"
    out = [
        Block("embedding.weight", (c.vocab_size, c.embedding_dim), "table"),
        Block("local_attn.q.weight", (c.query_dim, c.embedding_dim), window),
        Block("local_attn.k.weight", (c.query_dim, c.embedding_dim), window),
        Block("local_attn.v.weight", (c.value_dim, c.embedding_dim), window),
        Block("router.W_q.weight", (c.num_heads * c.head_dim, c.embedding_dim + first + last), "matrix"),
        Block("router.W_k.weight", (c.num_heads * c.head_dim, c.memory_dim), "matrix"),
        Block("router.W_v.weight", (c.value_dim, c.memory_dim), "matrix"),
    ]
    below = c.embedding_dim
    for k, width in enumerate(c.tier_dims):
        for gate in ("W_z", "W_r", "W_h"):
            out.append(Block(f"tiers.cells.{k}.{gate}.weight", (width, width + below + c.value_dim), "matrix"))
            out.append(Block(f"tiers.cells.{k}.{gate}.bias", (width,), "vector"))
        below = width
    out += [
        Block("writer.W_w.weight", (c.memory_dim, first + last), "matrix"),
        Block("writer.W_w.bias", (c.memory_dim,), "vector"),
        Block("layer_norm.weight", (c.state_dim,), "vector"),
        Block("layer_norm.bias", (c.state_dim,), "vector"),
        Block("output_head.weight", (c.vocab_size, c.state_dim), "matrix"),
        Block("output_head.bias", (c.vocab_size,), "vector"),
        # Used by the published code only where a model has no memory, which no configuration can say.
        Block("writer.W_r.weight", (c.memory_dim, c.value_dim), "unused"),
    ]
    return tuple(out)


def walk(config: THLConfig) -> Walk:
    """Matrices read by each step; a tier's three only on its clock."""
    window = ("local_attn.q.weight", "local_attn.k.weight", "local_attn.v.weight") if config.local_window else ()
    always = (*window, "router.W_q.weight", "router.W_k.weight", "router.W_v.weight")
    tiers = [
        (f"tiers.cells.{k}.{gate}.weight", clock)
        for k, clock in enumerate(config.tier_timescales)
        for gate in ("W_z", "W_r", "W_h")
    ]
    return Walk((*((name, 1) for name in always), *tiers, ("writer.W_w.weight", 1)))


def head(config: THLConfig) -> tuple[str, ...]:
    """Matrices that only the logits need."""
    return ("output_head.weight",)


def chunk(config: THLConfig) -> int:
    """The most tokens that one `advance` takes: the next one's step needs the state after this one."""
    return 1


def initial(config: THLConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    Embeddings are standard normal, matrices Xavier-uniform, biases zero and the norm's scale one, as the recorded
    published weights show.
    """
    count = len(range(*rows.indices(block.shape[0])))
    shape = (count, *block.shape[1:])
    if block.kind == "table":
        return torch.randn(shape, generator=generator)
    if block.kind == "vector":
        return torch.ones(shape) if block.name == "layer_norm.weight" else torch.zeros(shape)
    bound = sqrt(6.0 / sum(block.shape))
    return torch.rand(shape, generator=generator).mul_(2.0 * bound).sub_(bound)


def init_state(
    config: THLConfig, batch_size: int, device: torch.device | str = "cpu", weights: Weights | None = None
) -> State:
    """The empty state of `batch_size` fresh sequences; it takes nothing from the weights."""
    c = config

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

    slots = c.memory_slots
    return State(
        timestep=0,
        tiers=[zeros(d) for d in c.tier_dims],
        memory=zeros(slots, c.memory_dim),
        norms=zeros(slots),
        read_ema=zeros(slots),
        write_ema=zeros(slots),
        last_read=zeros(slots, dtype=torch.int64),
        last_write=zeros(slots, dtype=torch.int64),
        local_buffer=zeros(c.local_window, c.embedding_dim),
        local_valid=0,
    )


def state_from_dict(
    config: THLConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu"
) -> State:
    """The state that `State.to_dict` described. Raises CheckpointError on a missing field or a wrong shape."""
    batch = values["memory_state"].shape[0] if "memory_state" in values and values["memory_state"].dim() == 3 else 1
    taken = taken_fields(values, init_state(config, batch, "meta").named(), device)
    valid, step_count = int(taken["local_valid"]), int(taken["timestep"])
    if not 0 <= valid <= config.local_window or step_count < 0:
        raise CheckpointError(
            f"state: timestep {step_count} and local_valid {valid} must be at least 0 and "
            f"local_valid at most local_window ({config.local_window})"
        )
    return State(
        timestep=step_count,
        tiers=[taken[f"tier{k}"] for k in range(config.num_tiers)],
        memory=taken["memory_state"],
        norms=ops.slot_norms(taken["memory_state"]),
        read_ema=taken["read_ema"],
        write_ema=taken["write_ema"],
        last_read=taken["last_read"],
        last_write=taken["last_write"],
        local_buffer=taken["local_buffer"],
        local_valid=valid,
    )


def workspace(config: THLConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores (none)."""
    c = config
    below = (c.embedding_dim, *c.tier_dims[:-1])
    widest = max(2 * (own + under + c.value_dim) + 4 * own for own, under in zip(c.tier_dims, below, strict=True))
    # Of wide slots, scores come as sums of several terms, each of 256 features or more, where there are few slots.
    scores = min(c.memory_slots * (c.memory_dim // 256 + 1), c.memory_slots + 8192)
    slots = c.num_heads * (2 * c.memory_dim + scores) + 3 * c.memory_slots
    return 4 * state.batch_size * (widest + slots + 4 * c.state_dim), 0


def attended(config: THLConfig, state: State, position: int) -> int:
    """Multiply-adds of one step besides those with weights."""
    c = config
    window = 2 * state.local_valid * c.embedding_dim
    # Every head compares all slots and mixes a few; the candidate is compared with all.
    slots = c.memory_dim * (c.memory_slots * (c.num_heads + 1) + c.num_heads * c.read_topk)
    return state.batch_size * (window + slots)


def graph_key(config: THLConfig, state: State) -> tuple[bool, ...] | None:
    """Which tiers the next step updates, and whether the window fills up with the time or is full."""
    valid, width = state.local_valid, config.local_window
    aged = valid == min(state.timestep, width)  # as in `_read_window`, which else takes `valid` as it is
    if not aged and valid < width:
        return None
    return (aged, valid < width, *(state.timestep % clock == 0 for clock in config.tier_timescales))


def advance(
    config: THLConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """One step of every sequence in the batch.

    tokens: int64 [B, 1]. Returns the normalised tier states [B, 1, Σ d_k], which `logits` projects to the vocabulary,
    and the next state; ops may update the given state's tensors in place. `record` receives named intermediates.
    """
    c, t = config, state.timestep
    counter = ops.counter(t)
    embedded = ops.gather(weights["embedding.weight"], tokens[:, 0])
    local, buffer, valid = _read_window(c, weights, ops, embedded, state, counter)
    read, read_ema, last_read = _read_memory(c, weights, ops, embedded, state, counter, record)

    tiers, below = list(state.tiers), embedded
    for k, clock in enumerate(c.tier_timescales):
        if t % clock == 0:
            z, r, h = (_gate(weights, f"tiers.cells.{k}.{name}") for name in ("W_z", "W_r", "W_h"))
            tiers[k] = ops.gru_cell(z, r, h, tiers[k], below, read, local if k == 0 else None)
        below = tiers[k]

    candidate = ops.linear_joined((tiers[0], tiers[-1]), *_gate(weights, "writer.W_w"))
    written = ops.novelty_write(
        candidate,
        state.memory,
        state.norms,
        read_ema,
        state.write_ema,
        state.last_write,
        counter,
        slots=c.write_slots,
        clip_max=c.write_clip_max,
        theta=c.novelty_theta,
        beta=c.novelty_beta,
        decay=c.memory_decay,
        ema_decay=c.write_ema_decay,
        stale_weight=c.stale_weight,
        underuse_weight=c.underuse_weight,
    )
    if record is not None:
        record("local_read", local)
        record("write_vector", written.vector)
        record("gate", written.gate[:, None])
        record("novelty", written.novelty)
        record("write_branch", written.branch)
        record("write_indices", written.indices)

    hidden = ops.layer_norm_joined(tiers, weights["layer_norm.weight"], weights["layer_norm.bias"])
    following = State(
        timestep=t + 1,
        tiers=tiers,
        memory=written.memory,
        norms=written.norms,
        read_ema=read_ema,
        write_ema=written.write_ema,
        last_read=last_read,
        last_write=written.last_write,
        local_buffer=buffer,
        local_valid=valid,
    )
    return hidden[:, None], following


def logits(config: THLConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, Σ d_k] as returned by `advance` -> float32 [N, vocab_size]."""
    return ops.linear(hidden, weights["output_head.weight"], weights["output_head.bias"])


def _read_window(
    c: THLConfig, weights: Weights, ops: Ops, embedded: Tensor, state: State, counter: int | Tensor
) -> tuple[Tensor, Tensor, int]:
    """Attention over the embeddings before this one, then this one joins them: (read [B, d_v], buffer, valid)."""
    if c.local_window == 0:
        return embedded.new_zeros(embedded.shape[0], c.value_dim), state.local_buffer, 0
    # An empty window reads the same matrices (their product with zeros), so that the schedule is the same at t = 0.
    query = ops.linear(embedded, weights["local_attn.q.weight"])
    query = ops.linear_transposed(query, weights["local_attn.k.weight"])
    # A window as old as its sequence fills with the time, up to its width.
    valid = counter if state.local_valid == min(state.timestep, c.local_window) else state.local_valid
    mixed, buffer = ops.window_read(query, state.local_buffer, valid, embedded, 1.0 / sqrt(c.query_dim))
    local = ops.linear(mixed, weights["local_attn.v.weight"])
    return local, buffer, min(state.local_valid + 1, c.local_window)


def _read_memory(
    c: THLConfig,
    weights: Weights,
    ops: Ops,
    embedded: Tensor,
    state: State,
    counter: int | Tensor,
    record: Record | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse read of the slots: (value [B, d_v], read_ema, last_read)."""
    query = ops.linear_joined((embedded, state.tiers[0], state.tiers[-1]), weights["router.W_q.weight"])
    query = query.view(embedded.shape[0], c.num_heads, c.head_dim)
    query = ops.linear_transposed_heads(query, weights["router.W_k.weight"])  # [B, H, d_m]
    mixed, alpha, indices, read_ema, last_read = ops.slot_read(
        query,
        state.memory,
        state.read_ema,
        state.last_read,
        counter,
        k=c.read_topk,
        capacity=c.read_slot_capacity,
        scale=1.0 / sqrt(c.head_dim),
        load_penalty=c.load_penalty,
        decay=c.read_ema_decay,
    )  # mixed [B, H, d_m]
    read = ops.linear_heads(mixed, weights["router.W_v.weight"])
    if record is not None:
        record("router_alpha", alpha)
        record("router_indices", indices)
        record("router_read", read)
    return read, read_ema, last_read


def _gate(weights: Weights, name: str) -> tuple[Any, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


ARCHITECTURE: Architecture[THLConfig, State] = Architecture(
    model_type="thl",
    blocks=blocks,
    initial=initial,
    walk=walk,
    head=head,
    workspace=workspace,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    chunk=chunk,
    advance=advance,
    logits=logits,
    graph_key=graph_key,
    byte_text=True,
)
