"""HIM: an encoder whose blocks share a slot memory and a reasoning buffer, answering many positions at once (HIM 7M).

Notation: B batch, L positions of the input, D features, A query heads and A_k key/value heads of d, m memory slots
read at rank r, R reasoning tokens, P answer positions.

The published code changes the memory (a buffer) and the reasoning embeddings (a parameter) in every pass, evaluation
included. Here they are state: they begin with the checkpoint's values and evolve in the `State` alone. Masked
positions are blocked in attention, but take part in the means that are written to both, as published.

`forward` is one pass as published. `advance` serves the same answers to a loop that goes token by token: a prompt, or
a token that finds the answer block empty, encodes the context into P answers; each further token takes the next one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import HIM_POSITIONS, HIMConfig
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.kernels.sinusoid import sinusoid
from thl_engine.models import state as states
from thl_engine.models.contract import Architecture, Ops, Record, Weights
from thl_engine.schedule import Block, Walk

REASONING_WIDTH = 64  # features of a reasoning token that are read
REASONING_EVERY = 3  # blocks between two uses of the reasoning buffer
READ_RATE = 0.1  # share of what is read, from memory or reasoning buffer, that is added to the stream
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MEMORY = ("read_key", "read_value", "write_key", "write_erase", "write_add")
REASONING = ("project_to_reasoning", "project_from_reasoning")
DECODER_READS = tuple(f"decoder_cross_attention.{name}.weight" for name in ATTENTION)
TIED = "embedding.weight"  # also the projection to the vocabulary


@dataclass
class State(states.State):
    """What passes leave behind, and what the token loop needs to serve answers.

    memory [1 or B, m, D], reasoning_embeddings [R, D], of all sequences together: the published mutable buffers.
    context: int64 [B, max_seq_len], oldest first, `context_valid` tokens in use. answer [B, P, D]: the last block of
    answers that `advance` encoded, of which timestep mod P are served; at 0 it is used up.
    """

    timestep: int
    memory: Tensor
    reasoning_embeddings: Tensor
    context: Tensor
    context_valid: int
    answer: Tensor

    @property
    def batch_size(self) -> int:
        return self.context.shape[0]

    def seek(self, position: int) -> None:
        super().seek(position)
        self.context_valid = min(position, self.context.shape[1])

    def reset_memory(self) -> None:
        """Empties the slot memory, as published: zeros of batch 1. All else stays, the reasoning buffer included."""
        self.memory = torch.zeros_like(self.memory[:1])

    def named(self) -> dict[str, Tensor]:
        """The fields by name, not copied; memory and reasoning_embeddings are the published ones."""
        return {
            "timestep": torch.tensor(self.timestep),
            "memory": self.memory,
            "reasoning_embeddings": self.reasoning_embeddings,
            "context": self.context,
            "context_valid": torch.tensor(self.context_valid),
            "answer": self.answer,
        }


def blocks(config: HIMConfig) -> tuple[Block, ...]:
    """All tensors of the published state dict without its repetitions, those read first in the order of reading."""
    c = config
    out = [
        # First in use for the rows of the input's tokens, then whole at the end, for the logits.
        Block(TIED, (c.vocab_size, c.embed_dim), "matrix"),
        Block("pos_encoder.pe", (1, HIM_POSITIONS, c.embed_dim), "unused"),  # derived from its shape
        Block("memory.memory", (1, c.mem_slots, c.embed_dim), "vector"),
        Block("reasoning_module.reasoning_embeddings", (c.reasoning_tokens, c.embed_dim), "vector"),
    ]
    for i in range(c.num_encoder_layers):
        prefix = f"transformer_encoder.{i}."
        out += [
            Block(f"{prefix}norm1.weight", (c.embed_dim,), "vector"),
            Block(f"{prefix}norm1.bias", (c.embed_dim,), "vector"),
            *_attention_blocks(c, f"{prefix}attention."),
            Block(f"{prefix}norm2.weight", (c.embed_dim,), "vector"),
            Block(f"{prefix}norm2.bias", (c.embed_dim,), "vector"),
            Block(f"{prefix}multi_speed.gate", (c.embed_dim,), "vector"),
            Block(f"{prefix}multi_speed.slow_ffn.w_gate.weight", (c.dim_feedforward, c.embed_dim), "matrix"),
            Block(f"{prefix}multi_speed.slow_ffn.w_up.weight", (c.dim_feedforward, c.embed_dim), "matrix"),
            Block(f"{prefix}multi_speed.slow_ffn.w_down.weight", (c.embed_dim, c.dim_feedforward), "matrix"),
        ]
        if i == 0:
            into, back = (c.mem_rank, c.embed_dim), (c.embed_dim, c.mem_rank)
            shapes = {"read_key": into, "read_value": back, "write_key": into, "write_erase": back, "write_add": back}
            out += [Block(f"memory.{name}.weight", shapes[name], "matrix") for name in MEMORY]
    # A model of fewer than three blocks stores the reasoning buffer and never reads it.
    kind = "matrix" if c.num_encoder_layers >= REASONING_EVERY else "unused"
    out += [
        Block("reasoning_module.project_to_reasoning.weight", (REASONING_WIDTH, c.embed_dim), kind),
        Block("reasoning_module.project_from_reasoning.weight", (c.embed_dim, REASONING_WIDTH), kind),
        Block("decoder_query", (1, c.max_answer_len, c.embed_dim), "vector"),
        *_attention_blocks(c, "decoder_cross_attention."),
        Block("decoder_cross_attention.norm.weight", (c.embed_dim,), "vector"),
        Block("decoder_cross_attention.norm.bias", (c.embed_dim,), "vector"),
        Block("decoder_projection.bias", (c.vocab_size,), "vector"),
    ]
    return tuple(out)


def _attention_blocks(c: HIMConfig, prefix: str) -> list[Block]:
    shared = (c.num_kv_heads * c.head_dim, c.embed_dim)
    shapes = {"q_proj": (c.embed_dim,) * 2, "k_proj": shared, "v_proj": shared, "o_proj": (c.embed_dim,) * 2}
    return [Block(f"{prefix}{name}.weight", shapes[name], "matrix") for name in ATTENTION]


def aliases(config: HIMConfig) -> dict[str, str]:
    """Names under which published checkpoints repeat a tensor, and the name that keeps it."""
    memory = {"memory": "memory.memory", **{f"{name}.weight": f"memory.{name}.weight" for name in MEMORY}}
    reasoning = {
        name: f"reasoning_module.{name}" for name in ("reasoning_embeddings", *(f"{name}.weight" for name in REASONING))
    }
    out = {"decoder_projection.weight": TIED}
    for i in range(config.num_encoder_layers):
        out |= {f"transformer_encoder.{i}.memory.{name}": kept for name, kept in memory.items()}
        out |= {f"transformer_encoder.{i}.reasoning.{name}": kept for name, kept in reasoning.items()}
    return out


def adopt(config: HIMConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict with the memory of one sequence.

    Published training leaves the memory of its last batch in the checkpoint, [B, m, D]. Published generation begins by
    emptying it, so it is emptied here.
    """
    out, shape = dict(tensors), (config.mem_slots, config.embed_dim)
    for name, value in tensors.items():
        if name.endswith("memory.memory") and value.dim() == 3 and value.shape[0] != 1 and value.shape[1:] == shape:
            out[name] = torch.zeros(1, *shape, dtype=value.dtype)
    return out


def walk(config: HIMConfig) -> Walk:
    """Matrices of one pass, read at each step that the number of answer positions divides."""
    return Walk(tuple((name, config.max_answer_len) for name in (*_encoder_reads(config), *DECODER_READS)))


def head(config: HIMConfig) -> tuple[str, ...]:
    """The tied embedding, which the logits read whole."""
    return (TIED,)


def forward_walk(
    config: HIMConfig, tokens_shape: Sequence[int], *, mask: Tensor | None = None, reconstruction: bool = False
) -> Walk:
    """What `forward` reads with the same inputs."""
    decoder = () if reconstruction else DECODER_READS
    return Walk(tuple((name, 1) for name in (*_encoder_reads(config), *decoder, TIED)))


def _encoder_reads(c: HIMConfig) -> tuple[str, ...]:
    reads: list[str] = []
    for i in range(c.num_encoder_layers):
        prefix = f"transformer_encoder.{i}."
        reads += [f"{prefix}attention.{name}.weight" for name in ATTENTION]
        reads += [f"{prefix}multi_speed.slow_ffn.{name}.weight" for name in ("w_gate", "w_up", "w_down")]
        reads += [f"memory.{name}.weight" for name in MEMORY]
        if _reasons(i):
            reads += [f"reasoning_module.{name}.weight" for name in REASONING]
    return tuple(reads)


def _reasons(i: int) -> bool:
    """Whether encoder block i uses the reasoning buffer."""
    return (i + 1) % REASONING_EVERY == 0


def initial(config: HIMConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    torch's defaults: embeddings standard normal, linear layers uniform within 1/sqrt(inputs), norms one and zero. The
    tensors without a default: the gate and the memory begin at zero, the learned queries and reasoning tokens are
    normal with deviation 0.02.
    """
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if block.name == "pos_encoder.pe":
        return _table(config.embed_dim)[None][rows].clone()
    if block.name in (TIED, "decoder_query", "reasoning_module.reasoning_embeddings"):
        return torch.randn(shape, generator=generator).mul_(1.0 if block.name == TIED else 0.02)
    if block.kind == "vector" and block.name != "decoder_projection.bias":
        return torch.ones(shape) if block.name.endswith("weight") else torch.zeros(shape)
    inputs = config.embed_dim if block.kind == "vector" else block.shape[1]
    bound = 1.0 / sqrt(inputs)
    return torch.rand(shape, generator=generator).mul_(2.0 * bound).sub_(bound)


def step_rows(config: HIMConfig, position: int) -> int:
    """Rows of activations that a sequence brings to a pass's products: its context."""
    return min(position + 1, config.max_seq_len)


def attended(config: HIMConfig, state: State, position: int) -> int:
    """Multiply-adds of a pass besides those with weights: attention, and the reading of the memory."""
    c, rows = config, step_rows(config, position)
    block = 2 * rows * c.embed_dim + c.mem_slots * (c.mem_rank + c.embed_dim)
    return state.batch_size * rows * (c.num_encoder_layers * block + 2 * c.max_answer_len * c.embed_dim)


def chunk(config: HIMConfig) -> int:
    """The most tokens that one `advance` takes: any number, of which the last max_seq_len are seen."""
    return 1 << 30


def init_state(
    config: HIMConfig, batch_size: int, device: torch.device | str = "cpu", weights: Weights | None = None
) -> State:
    """The state of `batch_size` fresh sequences: memory and reasoning buffer as in the checkpoint, or zeros without."""
    c = config
    if weights is None:
        memory = torch.zeros(1, c.mem_slots, c.embed_dim, device=device)
        reasoning = torch.zeros(c.reasoning_tokens, c.embed_dim, device=device)
    else:
        memory, reasoning = (
            weights[name].detach().to(device=device, dtype=torch.float32, copy=True)
            for name in ("memory.memory", "reasoning_module.reasoning_embeddings")
        )
    return State(timestep=0, memory=memory, reasoning_embeddings=reasoning, **_unserved(c, batch_size, device))


def _unserved(c: HIMConfig, batch_size: int, device: torch.device | str) -> dict[str, Any]:
    """The fields of the token loop before anything was read."""
    return {
        "context": torch.zeros(batch_size, c.max_seq_len, dtype=torch.int64, device=device),
        "context_valid": 0,
        "answer": torch.zeros(batch_size, c.max_answer_len, c.embed_dim, device=device),
    }


def state_from_dict(
    config: HIMConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu"
) -> State:
    """The state that `State.to_dict` described; of the published fields alone, one with nothing read yet.

    Raises CheckpointError on a missing or unknown field, a wrong shape, or values that no state can have.
    """
    published = ("memory", "reasoning_embeddings")
    rows = values.get("memory" if set(values) <= set(published) else "context", torch.empty(0))
    batch = max(1, rows.shape[0] if rows.dim() else 1)
    expected = init_state(config, batch, "meta").named()
    memory = values.get("memory")
    if memory is not None and memory.dim() == 3 and memory.shape[0] == batch:  # of each row, after the first pass
        expected["memory"] = expected["memory"].expand(batch, -1, -1)
    if set(values) == set(published):
        states.check_fields(values, {name: expected[name] for name in published})
        rest = init_state(config, batch).named()
        values = {**rest, **values}
    taken = states.taken_fields(values, expected, device)
    timestep, valid = int(taken.pop("timestep")), int(taken.pop("context_valid"))
    if timestep < 0 or not 0 <= valid <= config.max_seq_len:
        raise CheckpointError(
            f"state: timestep {timestep} and context_valid {valid} must be at least 0 and "
            f"context_valid at most max_seq_len ({config.max_seq_len})"
        )
    low, high = (int(v) for v in torch.aminmax(taken["context"]))
    if low < 0 or high >= config.vocab_size:
        raise CheckpointError(
            f"state: context holds id {low if low < 0 else high}, outside the vocabulary of {config.vocab_size}"
        )
    return State(timestep=timestep, context_valid=valid, **taken)


def workspace(config: HIMConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
    c, rows = config, state.batch_size * config.max_seq_len
    floats = 4 * c.embed_dim + max(6 * c.embed_dim, 4 * c.dim_feedforward)
    memory = 4 * state.batch_size * c.mem_slots * c.embed_dim
    return 4 * (rows * floats + memory), rows * c.num_heads * max(c.max_seq_len, c.max_answer_len)


def starts_at(config: HIMConfig, state: State, count: int) -> int:
    """The step of `walk` that `advance` takes for `count` tokens: a prompt skips what is left of an answer block."""
    served = state.timestep % config.max_answer_len
    return state.timestep if count == 1 or not served else state.timestep + config.max_answer_len - served


def advance(
    config: HIMConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Adds tokens, int64 [B, n], to the context and serves one answer position: (its features [B, 1, D], state).

    Several tokens, or one that finds the answer block used up, encode the context (its last max_seq_len tokens) into
    a new block and serve its first position. One token otherwise takes the next position and reads no matrix.
    """
    c, t = config, starts_at(config, state, tokens.shape[1])
    _check_batch(tokens, state)
    context = torch.cat([state.context[:, : state.context_valid], tokens], dim=1)[:, -c.max_seq_len :]
    memory, reasoning, answer = state.memory, state.reasoning_embeddings, state.answer
    valid, served = context.shape[1], t % c.max_answer_len
    if not served:
        encoded, memory, reasoning = _encode(c, weights, ops, context, memory, reasoning, None, record)
        answer = _decode(c, weights, ops, encoded, None)
    context = torch.nn.functional.pad(context, (0, c.max_seq_len - valid))
    return answer[:, served : served + 1], State(t + 1, memory, reasoning, context, valid, answer)


def logits(config: HIMConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the token at an answer position, or at an input position: [N, D] -> float32 [N, vocab_size]."""
    return ops.linear(hidden, weights[TIED], weights["decoder_projection.bias"])


def forward(
    config: HIMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    record: Record | None = None,
    *,
    mask: Tensor | None = None,
    reconstruction: bool = False,
) -> tuple[Tensor, State]:
    """One pass as published, apart from the token loop, whose context it neither reads nor changes.

    tokens: int64 [B, L], L at most max_seq_len. mask [B, L]: 1 where a position may be attended, 0 where not.
    Returns logits [B, P, vocab_size] of the answer, or [B, L, vocab_size] of the input's positions if
    `reconstruction`, and the state with its memory and reasoning buffer moved on. B may differ from the state's batch
    as long as the memory has batch 1 and nothing was read. Raises ConfigError for inputs that do not fit.
    """
    c, (batch, length) = config, tokens.shape
    if length > c.max_seq_len:
        raise ConfigError(
            f"tokens: a sequence of {length} is longer than the model's max_seq_len ({c.max_seq_len}); cut it"
        )
    _check_batch(tokens, state)
    blocked = None if mask is None else _blocked(mask, batch, length).to(tokens.device)
    x, memory, reasoning = _encode(c, weights, ops, tokens, state.memory, state.reasoning_embeddings, blocked, record)
    hidden = x if reconstruction else _decode(c, weights, ops, x, blocked)
    serving: dict[str, Any] = {"context": state.context, "context_valid": state.context_valid, "answer": state.answer}
    if batch != state.batch_size:
        serving = _unserved(c, batch, tokens.device)
    out = logits(c, weights, ops, hidden.flatten(0, 1)).view(*hidden.shape[:2], c.vocab_size)
    return out, State(timestep=state.timestep, memory=memory, reasoning_embeddings=reasoning, **serving)


def _check_batch(tokens: Tensor, state: State) -> None:
    batch, held = tokens.shape[0], state.memory.shape[0]
    if held not in (1, batch):
        raise ConfigError(
            f"tokens: batch of {batch}, but the memory holds {held} sequences; keep to that batch, or "
            "call the state's reset_memory() first"
        )
    if state.context_valid and state.batch_size != batch:
        raise ConfigError(
            f"tokens: batch of {batch}, but the state has read {state.batch_size} sequences; keep to "
            "that batch, or start from a new state"
        )


def _blocked(mask: Tensor, batch: int, length: int) -> Tensor:
    """The published mask [B, L] as bool [B, 1, 1, L], True where a key must not be seen."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(f"mask: expected a tensor of shape {[batch, length]}, as the tokens, found {found}")
    blocked = mask == 0
    if not bool((blocked | (mask == 1)).all()):
        raise ConfigError("mask: entries must be 1 (may be attended) or 0 (blocked)")
    # With nothing to attend to the published softmax is NaN, which would then stay in the reasoning buffer.
    nothing = blocked.all(dim=1).nonzero()
    if len(nothing):
        raise ConfigError(f"mask: row {int(nothing[0])} blocks every position; leave at least one 1 in each row")
    return blocked[:, None, None, :]


def _encode(
    c: HIMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    memory: Tensor,
    reasoning: Tensor,
    blocked: Tensor | None,
    record: Record | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All encoder blocks over tokens [B, L]: (x [B, L, D], memory [B, m, D], reasoning buffer [R, D])."""
    x = ops.gather(weights[TIED], tokens.flatten()).view(*tokens.shape, c.embed_dim)
    x = x * sqrt(c.embed_dim) + _positions(tokens.shape[1], c.embed_dim, x.device)
    for i in range(c.num_encoder_layers):
        prefix = f"transformer_encoder.{i}."
        normed = ops.layer_norm(x, weights[f"{prefix}norm1.weight"], weights[f"{prefix}norm1.bias"])
        attended = _attend(c, weights, ops, f"{prefix}attention.", normed, normed, blocked)
        x = _two_speeds(weights, ops, prefix, x, attended)
        x = ops.add_scaled(x, _read_memory(c, weights, ops, x, memory), READ_RATE)
        mean = x.mean(dim=1)  # masked positions included
        memory = _write_memory(weights, ops, mean, memory)
        if _reasons(i):
            signal = _read_reasoning(weights, ops, mean, reasoning)
            reasoning = ops.reasoning_update(reasoning, mean)
            x = x + READ_RATE * signal
        if record is not None:
            record(f"block{i}.output", x)
            record(f"block{i}.memory", memory)
    return x, memory, reasoning


def _decode(c: HIMConfig, weights: Weights, ops: Ops, encoded: Tensor, blocked: Tensor | None) -> Tensor:
    """The answer positions' features [B, P, D]: learned queries over the encoded input [B, L, D]."""
    prefix = "decoder_cross_attention."
    queries = weights["decoder_query"].expand(encoded.shape[0], -1, -1)
    attended = _attend(c, weights, ops, prefix, queries, encoded, blocked)
    return ops.layer_norm(queries + attended, weights[f"{prefix}norm.weight"], weights[f"{prefix}norm.bias"])


def _attend(
    c: HIMConfig, weights: Weights, ops: Ops, prefix: str, queries: Tensor, source: Tensor, blocked: Tensor | None
) -> Tensor:
    """Attention of queries [B, T, D] over source [B, L, D] in both directions, output projection included."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, c.head_dim).transpose(1, 2)

    query = ops.linear(queries, weights[f"{prefix}q_proj.weight"])
    key, value = ops.linears(source, [weights[f"{prefix}{name}.weight"] for name in ("k_proj", "v_proj")])
    mixed = ops.attention(heads(query), heads(key), heads(value), 1.0 / sqrt(c.head_dim), blocked)
    return ops.linear(mixed.transpose(1, 2).flatten(2), weights[f"{prefix}o_proj.weight"])


def _two_speeds(weights: Weights, ops: Ops, prefix: str, x: Tensor, attended: Tensor) -> Tensor:
    """x + attended, plus the gated blend of the feed-forward (slow) and its own normalised input (fast)."""
    prefix, norm = f"{prefix}multi_speed.", f"{prefix}norm2"
    x, fast = ops.add_layer_norm(x, attended, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
    gate, up = ops.linears(fast, [weights[f"{prefix}slow_ffn.{name}.weight"] for name in ("w_gate", "w_up")])
    return ops.swiglu_linear(
        gate, up, weights[f"{prefix}slow_ffn.w_down.weight"], blend=(x, fast, weights[f"{prefix}gate"])
    )


def _read_memory(c: HIMConfig, weights: Weights, ops: Ops, x: Tensor, memory: Tensor) -> Tensor:
    query = ops.linear(x, weights["memory.read_key.weight"])
    content = ops.prefix_read(query, memory, 1.0 / sqrt(c.mem_rank))
    return ops.linear(content, weights["memory.read_value.weight"])


def _write_memory(weights: Weights, ops: Ops, mean: Tensor, memory: Tensor) -> Tensor:
    inputs = ops.linear(mean, weights["memory.write_key.weight"])
    erase, add = ops.linears(inputs, [weights[f"memory.{name}.weight"] for name in ("write_erase", "write_add")])
    return ops.erase_then_add(memory, erase, add)


def _read_reasoning(weights: Weights, ops: Ops, mean: Tensor, reasoning: Tensor) -> Tensor:
    """The same signal [B, 1, D] for all positions of a sequence."""
    query = ops.linear(mean, weights["reasoning_module.project_to_reasoning.weight"])[:, None]
    content = ops.prefix_read(query, reasoning[None], 1.0)
    return ops.linear(content, weights["reasoning_module.project_from_reasoning.weight"])


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """[length, width]. Kept on the CPU only: elsewhere a table would outlive the memory that it was made in."""
    return _table(width)[:length] if device == torch.device("cpu") else sinusoid(length, width, 0, device)


@lru_cache(maxsize=4)
def _table(width: int) -> Tensor:
    return sinusoid(HIM_POSITIONS, width)


ARCHITECTURE: Architecture[HIMConfig, State] = Architecture(
    model_type="him",
    blocks=blocks,
    initial=initial,
    aliases=aliases,
    adopt=adopt,
    walk=walk,
    head=head,
    starts_at=starts_at,
    step_rows=step_rows,
    pass_rows=lambda config: config.max_seq_len,
    workspace=workspace,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    rows_meet=True,  # sequences of a batch share the reasoning buffer, so each one's answer depends on the others
    longest=lambda config: config.max_seq_len,
    chunk=chunk,
    advance=advance,
    logits=logits,
    forward=forward,
    forward_walk=forward_walk,
    forward_inputs=("mask", "reconstruction"),
    answering="block",
)
