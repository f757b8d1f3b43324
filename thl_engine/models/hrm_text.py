"""HRM-Text: two stacks of transformer blocks, a fast L and a slow H, that every token passes again and again.

As transformers 5.24.0 publishes it (`HrmTextForCausalLM`). Notation: B batch, T tokens, D hidden_size, A heads of d
features, S positions that attention sees. From z_H = the embedded tokens and z_L = a stored start, H_cycles times:
L_cycles times z_L = L(z_L + z_H), then z_H = H(z_H + z_L). The last z_H gives the logits. So a token reads the L stack
H_cycles * L_cycles times and the H stack H_cycles times, and every pass through a block has keys and values of its own.

Prefix LM: a prompt's tokens see each other both ways, what is written behind them sees what came before. A pass goes
block by block over all of a prompt, PIECE tokens at a time, which bounds its memory. So a prompt of one piece takes the
bytes of one token from the disk. A longer one reads a block once for each piece, whose products take far longer.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import HRMTextConfig
from thl_engine.errors import ConfigError
from thl_engine.models import hrm_text_block
from thl_engine.models import kv_cache as kv_caches
from thl_engine.models.cached_state import CachedState, restored
from thl_engine.models.contract import Architecture, Ops, Record, Weights
from thl_engine.models.hrm import parse_cycles as parse_pair
from thl_engine.models.hrm import stored_cycles
from thl_engine.models.hrm_text_block import (
    KEYS_VALUES,
    REST,
    Sees,
    all_see_all,
    earlier_and_prefix,
    pieces_of,
    through,
)
from thl_engine.ops.cached_attention import bucket
from thl_engine.schedule import LARGEST_WALK, Block, Walk

TABLE, HEAD, START = "model.embed_tokens.weight", "lm_head.weight", "model.z_L_init"


@dataclass
class State(CachedState):
    """Context of a batch of sequences: keys and values of every pass through a block, in the order of the passes.

    cycles: (H_cycles, L_cycles) that the sequences are read with.
    """

    cycles: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        return {"cycles": self.cycles}

    def named(self) -> dict[str, Tensor]:
        """The fields, not copied."""
        out = {"timestep": torch.tensor(self.timestep), "cycles": torch.tensor(self.cycles)}
        for i, held in enumerate(self.cache.layers):
            out |= {f"passes.{i}.self_attn.{name}": rows for name, rows in held.named(self.timestep).items()}
        return out


def parse_cycles(config: HRMTextConfig, cycles: str | Sequence[int] | None = None) -> tuple[int, int]:
    """(H_cycles, L_cycles) from a name or numbers as HRM's; the configuration's if None. Raises ConfigError."""
    return (config.H_cycles, config.L_cycles) if cycles is None else parse_pair(cycles)


def blocks(config: HRMTextConfig) -> tuple[Block, ...]:
    """All tensors of the published state dict, those that a pass reads first in the order of reading."""
    c, width = config, config.hidden_size
    # Tied, the embedding is the head too, which the logits read whole.
    out = [
        Block(TABLE, (c.vocab_size, width), "matrix" if c.tie_word_embeddings else "table"),
        Block(START, (width,), "vector"),
    ]
    heads = c.num_attention_heads * c.head_dim
    shapes = {
        "k_proj": (heads, width),
        "v_proj": (heads, width),
        "q_proj": (heads, width),
        "o_proj": (width, heads),
        "up_proj": (c.intermediate_size, width),
        "down_proj": (width, c.intermediate_size),
    }
    for stack in "LH":
        for j in range(c.num_layers_per_stack):
            for name in (*KEYS_VALUES, *REST):
                part, last = name.split(".")
                inner = c.intermediate_size if part == "mlp" else heads
                shape = shapes.get(last, (inner, width))
                out.append(Block(f"{_prefix(stack, j)}{name}.weight", shape, "matrix"))
                if c.attention_bias if part == "self_attn" else c.mlp_bias:
                    out.append(Block(f"{_prefix(stack, j)}{name}.bias", shape[:1], "vector"))
    if not c.tie_word_embeddings:
        out.append(Block(HEAD, (c.vocab_size, width), "matrix"))
    return tuple(out)


def aliases(config: HRMTextConfig) -> dict[str, str]:
    """Names that published checkpoints repeat, and the tensors that they repeat."""
    return {HEAD: TABLE} if config.tie_word_embeddings else {}


def stored_name(config: HRMTextConfig, name: str) -> str:
    """The block's name for a name in a published checkpoint; earlier ones call attention otherwise."""
    return re.sub(r"^(model\.[LH]_module\.layers\.\d{1,5}\.)attn\.", r"\1self_attn.", name)


def joined(config: HRMTextConfig, name: str) -> tuple[str, ...]:
    """The projections that earlier checkpoints hold as one: the gate before query, key and value; gate before up."""
    before, found, last = name.rpartition(".gqkv_proj.")
    if found:
        return tuple(f"{before}.{part}_proj.{last}" for part in ("gate", "q", "k", "v"))
    before, found, last = name.rpartition(".mlp.gate_up_proj.")
    return tuple(f"{before}.mlp.{part}_proj.{last}" for part in ("gate", "up")) if found else ()


def walk(config: HRMTextConfig, *, cycles: str | Sequence[int] | None = None) -> Walk:
    """Matrices read by a step, in the order of all revisits; every step reads the same."""
    return pass_walk(config, 1, cycles=cycles)


def pass_walk(
    config: HRMTextConfig, count: int, *, cycles: str | Sequence[int] | None = None, last: bool = True
) -> Walk:
    """Matrices read by a pass over `count` tokens: of each block once for every piece of them.

    last: behind the last block's keys and values only the last token matters.
    """
    made, pieces = parse_cycles(config, cycles), len(pieces_of(count))
    passes = [(stack, j) for stack in _stacks(made) for j in range(config.num_layers_per_stack)]
    if len(passes) * pieces * (len(KEYS_VALUES) + len(REST)) > LARGEST_WALK:
        raise ConfigError(
            f"cycles {made[0]} and {made[1]}: a pass over {count} tokens would read more than {LARGEST_WALK} matrices; "
            "take fewer cycles or a shorter prompt"
        )
    names: list[str] = []
    for i, (stack, j) in enumerate(passes):
        wanted = 1 if last and i == len(passes) - 1 else pieces
        for group in (KEYS_VALUES,) * pieces + (REST,) * wanted:
            names += [f"{_prefix(stack, j)}{name}.weight" for name in group]
    return Walk(tuple((name, 1) for name in names))


def forward_walk(
    config: HRMTextConfig,
    tokens_shape: Sequence[int],
    *,
    cycles: str | Sequence[int] | None = None,
    token_type_ids: Tensor | None = None,
) -> Walk:
    """Matrices that one `forward` reads, those of the logits included."""
    count = tokens_shape[1]
    once = pass_walk(config, count, cycles=cycles, last=False).clocked
    return Walk((*once, *((name, 1) for name in head(config) * len(pieces_of(count)))))


def head(config: HRMTextConfig) -> tuple[str, ...]:
    """Matrices that only the logits need."""
    return (TABLE if config.tie_word_embeddings else HEAD,)


def chunk(config: HRMTextConfig) -> int:
    """Tokens that one `advance` takes: any number."""
    return 1 << 30


def initial(config: HRMTextConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    The published training's initialisation is not recorded. Here matrices are normal with deviation 1/√inputs, those
    that end a residual branch smaller by √(2 · blocks of a stack); embedded tokens, once scaled, have the magnitude 1
    that a stack's output has; the start of z_L is normal with deviation 1; biases are zero.
    """
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if block.name.endswith(".bias"):
        return torch.zeros(shape)
    drawn = torch.randn(shape, generator=generator)
    if block.name == START:
        return drawn
    if block.name == TABLE:
        return drawn.div_(config.scale)
    if block.name.endswith(("o_proj.weight", "down_proj.weight")):
        drawn.div_(sqrt(2.0 * config.num_layers_per_stack))
    return drawn.div_(sqrt(block.shape[1]))


def workspace(config: HRMTextConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
    c, heads = config, config.num_attention_heads * config.head_dim
    # Of all positions both states, the stream of a block before and after, keys, values and the rotated keys; of a
    # piece the part of a block that takes most.
    whole, piece = 4 * c.hidden_size + 3 * heads, 2 * c.hidden_size + max(5 * heads, 3 * c.intermediate_size)
    rows = min(state.context, hrm_text_block.PIECE)
    return (
        4 * state.batch_size * (state.context * whole + rows * piece) + rows * state.context,
        state.batch_size * rows * c.num_attention_heads * state.context,
    )


def traffic(config: HRMTextConfig, state: State, position: int) -> int:
    """Bytes of the cache that one token reads at a position."""
    return state.cache.traffic(position)


def attended(config: HRMTextConfig, state: State, position: int) -> int:
    """Multiply-adds of one token's attention."""
    seen = len(state.cache.layers) * (position + 1)
    return 2 * state.batch_size * config.num_attention_heads * config.head_dim * seen


def init_state(
    config: HRMTextConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    *,
    cycles: str | Sequence[int] | None = None,
    context: int | None = None,
    kv_cache: str = "float32",
) -> State:
    """The state of `batch_size` fresh sequences.

    cycles: (H_cycles, L_cycles), "2x3" or one of HRM's names, the configuration's unless given; others change what the
    model computes. context: positions that a sequence may grow to, max_position_embeddings unless given. kv_cache:
    "float32", or "int8" with a scale for each row. Raises ConfigError.
    """
    c, made = config, parse_cycles(config, cycles)
    context = kv_caches.checked_context(context, "max_position_embeddings", c.max_position_embeddings, kv_cache)
    passes = c.num_layers_per_stack * len(_stacks(made))
    cache = kv_caches.empty([None] * passes, batch_size, c.num_attention_heads, c.head_dim, context, device, kv_cache)
    return State(0, context, cache, made)


def state_from_dict(
    config: HRMTextConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu", **options: Any
) -> State:
    """The state that `State.to_dict` described, with the options of `init_state` that concern its cache.

    Raises CheckpointError on a missing field or a wrong value.
    """
    options = {**options, "cycles": stored_cycles(values)}
    return restored(lambda batch: init_state(config, batch, device, **options), values, "passes.0.self_attn.keys")


def with_options(config: HRMTextConfig, state: State, *, cycles: str | Sequence[int] | None = None) -> State:
    """The state, if it was read with these cycles: of other passes it has no keys and values. Raises ConfigError."""
    made = parse_cycles(config, cycles)
    if made != state.cycles:
        raise ConfigError(
            f"cycles are {made[0]} and {made[1]}, but the context was read with {state.cycles[0]} and "
            f"{state.cycles[1]}; go on with these, or read it anew"
        )
    return state


def check_room(config: HRMTextConfig, state: State, count: int) -> None:
    """Raises ConfigError if `count` more tokens are more than the state's context has room for."""
    kv_caches.check_room(
        state.timestep + count, state.context, "max_position_embeddings", config.max_position_embeddings
    )


def graph_key(config: HRMTextConfig, state: State) -> int:
    """What the host decides in the next step of one token: for how many positions attention is launched."""
    return bucket(state.timestep + 1)


def advance(
    config: HRMTextConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Feeds int64 [B, T] to the sequences of the batch; as a prefix where `config.prefix_lm`, else causally.

    Returns z_H of the last position [B, 1, D], which `logits` projects to the vocabulary, and the next state, which
    shares the given one's cache. `record` receives named intermediates. Raises ConfigError beyond the context.
    """
    check_room(config, state, tokens.shape[1])
    count = tokens.shape[1]
    sees = (all_see_all if config.prefix_lm else earlier_and_prefix)(count, state.timestep, tokens.device)
    return _run(config, weights, ops, tokens, state, sees, last=True, record=record)


def forward(
    config: HRMTextConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    record: Record | None = None,
    *,
    token_type_ids: Tensor | None = None,
    cycles: tuple[int, int] | None = None,
    training: bool = False,
) -> tuple[Tensor, State]:
    """A whole sequence int64 [B, T] behind what the state holds: logits [B, T, vocab_size] and the next state.

    token_type_ids: int64 [B, T], 1 where a token is of the prefix, whose tokens see each other both ways; None: none
    is. cycles: the state's, which `forward_walk` is told too. training: the tokens are a sequence of their own,
    gradients reach every H pass and the last `L_bp_cycles` L passes of each H cycle, and the state is returned as it
    was. Raises ConfigError.
    """
    count = tokens.shape[1]
    if tokens.shape[0] != state.batch_size:
        raise ConfigError(f"tokens: batch of {tokens.shape[0]}, but the state holds {state.batch_size} sequences")
    if token_type_ids is not None:
        _check_types(token_type_ids, tokens)
        token_type_ids = token_type_ids.to(tokens.device)
    if not training:
        check_room(config, state, count)
    elif count > config.max_position_embeddings:
        raise ConfigError(
            f"a sequence of {count} tokens is longer than the model's max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    sees = earlier_and_prefix(count, 0 if training else state.timestep, tokens.device, token_type_ids)
    hidden, state = _run(config, weights, ops, tokens, state, sees, last=False, record=record, training=training)
    if training:
        return logits(config, weights, ops, hidden.flatten(0, 1)).unflatten(0, tokens.shape), state
    out = torch.empty(*tokens.shape, config.vocab_size, device=tokens.device)
    for first, stop in pieces_of(count):
        scores = logits(config, weights, ops, hidden[:, first:stop].flatten(0, 1))
        out[:, first:stop] = scores.unflatten(0, (len(tokens), -1))
    return out, state


def logits(config: HRMTextConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, D] as returned by `advance` -> float32 [N, vocab_size]."""
    return ops.linear(hidden, weights[head(config)[0]])


def _run(
    c: HRMTextConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    sees: Sees,
    *,
    last: bool,
    record: Record | None,
    training: bool = False,
) -> tuple[Tensor, State]:
    """All cycles over int64 [B, T]: z_H [B, T, D], or of the last position [B, 1, D], and the next state."""
    cycles, count = state.cycles, tokens.shape[1]
    past, cache = (0, None) if training else (state.timestep, state.cache)
    attention = ops.cached_attention(cache, past, count, tokens.device)
    exponents = torch.arange(0, c.head_dim, 2, device=tokens.device).float() / c.head_dim
    tables = ops.rotary_tables(attention.positions, 1.0 / c.rope_theta**exponents)
    high = ops.gather(weights[TABLE], tokens.flatten()).unflatten(0, tokens.shape) * c.scale
    low = weights[START].detach().expand_as(high)  # published training leaves it as it is
    passes, number = _stacks(cycles), 0
    trained = gradient_passes(c, cycles)
    for i, stack in enumerate(passes):
        x, final = low + high, last and i == len(passes) - 1
        with nullcontext() if trained[i] or not training else torch.no_grad():
            for j in range(c.num_layers_per_stack):
                wanted = [(count - 1, count)] if final and j == c.num_layers_per_stack - 1 else pieces_of(count)
                x = through(c, weights, ops, _prefix(stack, j), number, x, attention, tables, sees, wanted)
                number += 1
            x = ops.rms_norm(x, None, c.rms_norm_eps)
        low, high = (x, high) if stack == "L" else (low, x)
        if record is not None:
            record(f"pass{i}.z_{stack}", x)
    if training:
        return high, state
    return high, State(past + count, state.context, state.cache, cycles)


def gradient_passes(config: HRMTextConfig, cycles: tuple[int, int]) -> list[bool]:
    """Of each pass through a stack, whether training follows it back: the k-step gradient of the published trainer.

    Of the L passes in H cycle i the last `L_bp_cycles[i]`, where a shorter list begins with ones; and every H pass.
    """
    most, inner = cycles
    counts = [1] * (most - len(config.L_bp_cycles)) + list(config.L_bp_cycles)
    return [passed for count in counts[:most] for passed in (*(j >= inner - count for j in range(inner)), True)]


def _check_types(types: object, tokens: Tensor) -> None:
    if not isinstance(types, Tensor) or types.dtype != torch.int64 or types.shape != tokens.shape:
        found = f"{types.dtype} {list(types.shape)}" if isinstance(types, Tensor) else type(types).__name__
        raise ConfigError(
            f"token_type_ids: expected int64 {list(tokens.shape)}, 1 where a token is of the prefix; found {found}"
        )


def _stacks(cycles: tuple[int, int]) -> str:
    """The stacks that a token passes, in order."""
    return ("L" * cycles[1] + "H") * cycles[0]


def _prefix(stack: str, j: int) -> str:
    """What the names of a block's tensors begin with."""
    return f"model.{stack}_module.layers.{j}."


ARCHITECTURE: Architecture[HRMTextConfig, State] = Architecture(
    model_type="hrm_text",
    blocks=blocks,
    initial=initial,
    aliases=aliases,
    stored_name=stored_name,
    joined=joined,
    walk=walk,
    pass_walk=pass_walk,
    head=head,
    pass_rows=lambda config: hrm_text_block.PIECE,
    workspace=workspace,
    traffic=traffic,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    state_options=("cycles", "context", "kv_cache"),
    with_options=with_options,
    check_room=check_room,
    longest=lambda config: config.max_position_embeddings,
    whole_prompts=lambda config: config.prefix_lm,
    chunk=chunk,
    advance=advance,
    logits=logits,
    forward=forward,
    forward_walk=forward_walk,
    forward_inputs=("token_type_ids",),
    graph_key=graph_key,
    conditions=True,
)
