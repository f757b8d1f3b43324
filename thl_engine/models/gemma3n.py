"""Gemma-3n's text decoder: AltUp streams, LAuReL, per-layer embeddings, attention in windows (Transformers 5.23.0).

Notation: B batch, T tokens, D hidden_size, n AltUp streams X_j [B, T, D] of which stream a is computed, L layers of
which the last read the keys and values of earlier ones, A query heads and A_k key/value heads of d features, P
features of a per-layer input.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import FULL, SLIDING, Gemma3nConfig
from thl_engine.errors import ConfigError
from thl_engine.kernels.altup import magnitude, scaled_to
from thl_engine.models import kv_cache as kv_caches
from thl_engine.models.cached_state import CachedState, restored
from thl_engine.models.contract import Architecture, Ops, Record, Weights
from thl_engine.models.kv_cache import KVCache, Layer
from thl_engine.ops.cached_attention import bucket
from thl_engine.schedule import Block, Walk

CHUNK = 64  # tokens of a prompt that share one pass over the weights
TIED = "model.embed_tokens.weight"  # also the projection to the vocabulary
PER_LAYER_TABLE = "model.embed_tokens_per_layer.weight"
# Where published checkpoints keep the decoder among parts for images and sound, and how those parts begin.
NESTED = ("model.language_model.", "language_model.model.", "language_model.")
OTHER_PARTS = tuple(
    f"{outer}{part}"
    for outer in ("", "model.")
    for part in ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
)
SHARED_AWAY = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


@dataclass
class State(CachedState):
    """Context of a batch of sequences: keys and values of the layers that have their own, in the order of the layers.

    layers: the numbers of these layers. context: positions that the sequences may grow to.
    """

    layers: tuple[int, ...]

    def named(self) -> dict[str, Tensor]:
        """The fields, not copied."""
        out = {"timestep": torch.tensor(self.timestep)}
        for i, held in zip(self.layers, self.cache.layers, strict=True):
            out |= {f"layers.{i}.self_attn.{name}": rows for name, rows in held.named(self.timestep).items()}
        return out


def blocks(config: Gemma3nConfig) -> tuple[Block, ...]:
    """All tensors of the decoder, those that a pass reads first in the order of reading.

    AltUp's routers and coefficients are a few rows each and stay float32: they scale whole streams.
    """
    c, width = config, config.hidden_size
    out: list[Block] = []

    def add(name: str, *shape: int, kind: str | None = None, transposed: bool = False) -> None:
        kind = kind or ("matrix" if len(shape) == 2 else "vector")
        out.append(Block(f"{name}.weight", shape, kind, transposed=transposed))

    out.append(Block(TIED, (c.vocab_size, width), "matrix"))  # its rows first, the whole at the end, for the logits
    out.append(Block(PER_LAYER_TABLE, (c.vocab_size_per_layer_input, _per_layer(c)), "table"))
    add("model.per_layer_model_projection", _per_layer(c), width)
    add("model.per_layer_projection_norm", c.hidden_size_per_layer_input)
    for j in range(c.altup_num_inputs - 1):
        add(f"model.altup_projections.{j}", width, width)
    for i in range(c.num_hidden_layers):
        layer, inner, n = f"model.layers.{i}.", c.intermediate_size[i], c.altup_num_inputs
        add(f"{layer}altup.router_norm", width)
        add(f"{layer}altup.modality_router", n, width, kind="vector")
        add(f"{layer}altup.prediction_coefs", n * n, n, kind="vector")
        add(f"{layer}input_layernorm", width)
        add(f"{layer}laurel.linear_left", c.laurel_rank, width)
        add(f"{layer}laurel.linear_right", width, c.laurel_rank)
        add(f"{layer}laurel.post_laurel_norm", width)
        add(f"{layer}self_attn.q_proj", c.num_attention_heads * c.head_dim, width)
        add(f"{layer}self_attn.q_norm", c.head_dim)
        if c.kv_source(i) == i:
            add(f"{layer}self_attn.k_proj", c.num_key_value_heads * c.head_dim, width)
            add(f"{layer}self_attn.k_norm", c.head_dim)
            add(f"{layer}self_attn.v_proj", c.num_key_value_heads * c.head_dim, width)
        add(f"{layer}self_attn.o_proj", width, c.num_attention_heads * c.head_dim)
        add(f"{layer}post_attention_layernorm", width)
        add(f"{layer}pre_feedforward_layernorm", width)
        add(f"{layer}mlp.gate_proj", inner, width)
        add(f"{layer}mlp.up_proj", inner, width)
        add(f"{layer}mlp.down_proj", width, inner, transposed=c.activation_sparsity_pattern[i] > 0.0)
        add(f"{layer}post_feedforward_layernorm", width)
        add(f"{layer}altup.correction_coefs", n, n, kind="vector")
        out.append(Block(f"{layer}altup.correct_output_scale", (width,), "vector"))
        add(f"{layer}per_layer_input_gate", c.hidden_size_per_layer_input, width)
        add(f"{layer}per_layer_projection", width, c.hidden_size_per_layer_input)
        add(f"{layer}post_per_layer_input_norm", width)
    for j in range(c.altup_num_inputs - 1):
        add(f"model.altup_unembed_projections.{j}", width, width)
    add("model.norm", width)
    return tuple(out)


def aliases(config: Gemma3nConfig) -> dict[str, str]:
    """Names that published checkpoints repeat, and the tensors that they repeat."""
    return {"lm_head.weight": TIED}


def stored_name(config: Gemma3nConfig, name: str) -> str | None:
    """The block's name for a name in a published checkpoint; None for what the decoder does not use.

    Unused are the parts for images and sound, and keys and values of layers that read another layer's.
    """
    if name.startswith(OTHER_PARTS):
        return None
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    prefix = next((prefix for prefix in NESTED if name.startswith(prefix)), None)
    if prefix is not None:
        name = f"model.{name.removeprefix(prefix)}"
    found = re.fullmatch(r"model\.layers\.(\d{1,5})\.(.*)", name)
    if found and found[2] in SHARED_AWAY:
        i = int(found[1])
        if i < config.num_hidden_layers and config.kv_source(i) != i:
            return None
    return name


def walk(config: Gemma3nConfig) -> Walk:
    """Matrices read by one pass, however many tokens it takes."""
    return Walk(tuple((block.name, 1) for block in blocks(config) if block.kind == "matrix" and block.name != TIED))


def touched(config: Gemma3nConfig) -> dict[str, float]:
    """Share of a matrix that one row's product needs: of a sparse gate's neighbours, what the gate lets through."""
    return {
        f"model.layers.{i}.mlp.{name}_proj.weight": 1.0 - share
        for i, share in enumerate(config.activation_sparsity_pattern)
        if share > 0.0
        for name in ("up", "down")
    }


def head(config: Gemma3nConfig) -> tuple[str, ...]:
    """The tied embedding, which the logits read whole."""
    return (TIED,)


def chunk(config: Gemma3nConfig) -> int:
    """The most tokens that one `advance` takes."""
    return CHUNK


def initial(config: Gemma3nConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    No initialisation is recorded: norms and scales are one, all else is normal with deviation 1/√(inputs), tables
    such that a row has the magnitude that the model's own scaling expects.
    """
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if len(block.shape) == 1:
        return torch.ones(shape)
    inputs = config.hidden_size_per_layer_input if block.name == PER_LAYER_TABLE else block.shape[1]
    return torch.randn(shape, generator=generator).div_(sqrt(inputs))


def workspace(config: Gemma3nConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
    c, rows = config, state.batch_size * CHUNK
    # Per-layer inputs and what they are made of, and streams: before and after each step, or beside a layer's largest
    # part.
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    streams, part = c.altup_num_inputs * c.hidden_size, 3 * max(*c.intermediate_size, heads)
    floats = 4 * _per_layer(c) + max(4 * streams + 6 * c.hidden_size, 3 * streams + 4 * c.hidden_size + part)
    seen = max(held.kept(state.context) for held in state.cache.layers) + CHUNK
    # Layers that others read keep the float32 copies of int8 rows to the end of a pass.
    shared = {c.kv_source(i) for i in range(c.num_hidden_layers) if c.kv_source(i) != i}
    copies = sum(state.cache.layers[state.layers.index(i)].dequantized_bytes for i in shared)
    return 4 * rows * floats + 2 * CHUNK * seen + copies, rows * c.num_attention_heads * seen


def traffic(config: Gemma3nConfig, state: State, position: int) -> int:
    """Bytes of the cache that one token reads at a position."""
    return sum(KVCache([held]).traffic(position) for held in _read(config, state))


def attended(config: Gemma3nConfig, state: State, position: int) -> int:
    """Multiply-adds of one token's attention."""
    seen = sum(held.kept(position) + 1 for held in _read(config, state))
    return 2 * state.batch_size * config.num_attention_heads * config.head_dim * seen


def _read(c: Gemma3nConfig, state: State) -> list[Layer]:
    """The rows that each layer attends to, its own or another's."""
    return [state.cache.layers[state.layers.index(c.kv_source(i))] for i in range(c.num_hidden_layers)]


def init_state(
    config: Gemma3nConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    *,
    context: int | None = None,
    kv_cache: str = "float32",
) -> State:
    """The state of `batch_size` fresh sequences.

    context: positions that a sequence may grow to, max_position_embeddings unless given. kv_cache: "float32", or
    "int8" with a scale for each row. Raises ConfigError.
    """
    c, context = config, config.max_position_embeddings if context is None else context
    if kv_cache not in kv_caches.FORMATS:
        raise ConfigError(f"kv_cache is {kv_cache!r}; it must be one of {', '.join(kv_caches.FORMATS)}")
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= c.max_position_embeddings:
        raise ConfigError(
            f"context is {context!r}; it must be a whole number from 1 to max_position_embeddings "
            f"({c.max_position_embeddings})"
        )
    layers = tuple(i for i in range(c.num_hidden_layers) if c.kv_source(i) == i)
    cache = kv_caches.empty(
        [_window(c, i) for i in layers], batch_size, c.num_key_value_heads, c.head_dim, context, device, kv_cache
    )
    return State(0, context, cache, layers)


def state_from_dict(
    config: Gemma3nConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu", **options: Any
) -> State:
    """The state that `State.to_dict` described, with the options of `init_state`, which are those it was made with.

    Raises CheckpointError on a missing field, a wrong shape or another kind of cache.
    """
    return restored(lambda batch: init_state(config, batch, device, **options), values, "layers.0.self_attn.keys")


def check_room(config: Gemma3nConfig, state: State, count: int) -> None:
    """Raises ConfigError if `count` more tokens are more than the state's context has room for."""
    kv_caches.check_room(
        state.timestep + count, state.context, "max_position_embeddings", config.max_position_embeddings
    )


def graph_key(config: Gemma3nConfig, state: State) -> int:
    """What the host decides in the next step of one token: for how many positions attention is launched."""
    return bucket(state.timestep + 1)


def advance(
    config: Gemma3nConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Feeds int64 [B, T] to the sequences of the batch.

    Returns the normalised features of the last position [B, 1, D], which `logits` projects to the vocabulary, and the
    next state, which shares the given one's cache. `record` receives named intermediates. Raises ConfigError beyond
    the context.
    """
    x, following = decode(config, weights, ops, tokens, state, record, last=True)
    return normalise(config, weights, ops, x, record), following


def forward(
    config: Gemma3nConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """A whole sequence int64 [B, T] behind what the state holds: logits [B, T, vocab_size] and the next state.

    It goes CHUNK tokens at a time; what `record` receives is of the last of them.
    """
    if tokens.shape[0] != state.batch_size:
        raise ConfigError(f"tokens: batch of {tokens.shape[0]}, but the state holds {state.batch_size} sequences")
    check_room(config, state, tokens.shape[1])
    out = torch.empty(*tokens.shape, config.vocab_size, device=tokens.device)
    for first in range(0, tokens.shape[1], CHUNK):
        some = tokens[:, first : first + CHUNK]
        x, state = decode(config, weights, ops, some, state, record, last=False)
        hidden = normalise(config, weights, ops, x, record)
        out[:, first : first + CHUNK] = logits(config, weights, ops, hidden.flatten(0, 1)).unflatten(0, some.shape)
    return out, state


def forward_walk(config: Gemma3nConfig, tokens_shape: Sequence[int]) -> Walk:
    """Matrices that one `forward` reads, those of the logits included."""
    once = (*walk(config).clocked, *((name, 1) for name in head(config)))
    return Walk(once * -(-tokens_shape[1] // CHUNK))


def logits(config: Gemma3nConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, D] as returned by `advance` -> float32 [N, vocab_size]."""
    scores, cap = ops.linear(hidden, weights[TIED]), config.final_logit_softcapping
    return scores if cap is None else scores.div_(cap).tanh_() * cap


def decode(
    c: Gemma3nConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None, *, last: bool
) -> tuple[Tensor, State]:
    """Every layer over tokens [B, T]: features before the final norm [B, T, D], and the next state.

    last: of the last position only, [B, 1, D]. Layers that leave no keys and values behind then compute no other.
    """
    check_room(c, state, tokens.shape[1])
    embedded, inputs = embed(c, weights, ops, tokens)
    if record is not None:
        record("per_layer_inputs", inputs)
    streams = expand(c, weights, ops, embedded)
    if record is not None:
        record("layer0.input_altup_state", streams)
    attention = Attention(c, ops, state, tokens.shape[1], tokens.device)
    for i in range(c.num_hidden_layers):
        if last and i == len(state.layers):
            streams, inputs = streams[:, :, -1:].contiguous(), inputs[:, -1:]
            attention.keep_last()
        streams = layer(c, weights, ops, i, streams, inputs[:, :, i], attention)
        if record is not None:
            record(f"layer{i}.altup_state", streams)
    x = collapse(c, weights, ops, streams[:, :, -1:].contiguous() if last else streams)
    return x, State(state.timestep + tokens.shape[1], state.context, state.cache, state.layers)


class Attention:
    """What the layers of one pass over T positions share: rotary tables, and the cache that they attend to."""

    def __init__(self, c: Gemma3nConfig, ops: Ops, state: State, rows: int, device: torch.device) -> None:
        self._config, self._layers = c, state.layers
        self._attend = ops.cached_attention(state.cache, state.timestep, rows, device)
        self._positions = self._attend.positions
        exponents = torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim
        self._frequencies = {FULL: 1.0 / c.rope_theta**exponents, SLIDING: 1.0 / c.rope_local_base_freq**exponents}
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    def keep_last(self) -> None:
        """From here on x is of the last position only, in layers that read what others left."""
        self._positions, self._tables = self._positions[-1:], {}

    def __call__(self, weights: Weights, ops: Ops, i: int, x: Tensor) -> Tensor:
        """Layer i's attention of x [B, T, D] to what is visible, the output projection included."""
        c, kind, source = self._config, self._config.layer_types[i], self._config.kv_source(i)
        prefix, number = f"model.layers.{i}.self_attn.", self._layers.index(source)
        if kind not in self._tables:
            self._tables[kind] = ops.rotary_tables(self._positions, self._frequencies[kind])
        tables, eps = self._tables[kind], c.rms_norm_eps
        names = ("q", "k", "v") if source == i else ("q",)
        query, *own = (
            projected.unflatten(-1, (-1, c.head_dim))
            for projected in ops.linears(x, [weights[f"{prefix}{name}_proj.weight"] for name in names])
        )
        if source == i:
            self._attend.append(
                number, *own, key_norm=(weights[f"{prefix}k_norm.weight"], eps), value_eps=eps, tables=tables
            )
        last = all(c.kv_source(j) != source for j in range(i + 1, c.num_hidden_layers))
        norm = (weights[f"{prefix}q_norm.weight"], eps)
        mixed = self._attend(number, query, 1.0, norm=norm, tables=tables, last=last)
        return ops.linear(mixed, weights[f"{prefix}o_proj.weight"])


def embed(c: Gemma3nConfig, weights: Weights, ops: Ops, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded tokens [B, T, D] and what each layer adds of its own, [B, T, L, P], of int64 [B, T]."""
    width, per_layer = c.hidden_size, c.hidden_size_per_layer_input
    x = ops.gather(weights[TIED], tokens.flatten()).unflatten(0, tokens.shape) * sqrt(width)
    ids = torch.where(tokens < c.vocab_size_per_layer_input, tokens, 0)
    table = ops.gather(weights[PER_LAYER_TABLE], ids.flatten()).unflatten(0, tokens.shape) * sqrt(per_layer)
    projected = ops.linear(x, weights["model.per_layer_model_projection.weight"]) * width**-0.5
    projected = ops.rms_norm(
        projected.unflatten(-1, (-1, per_layer)), weights["model.per_layer_projection_norm.weight"], c.rms_norm_eps
    )
    return x, (projected + table.view_as(projected)) * 2.0**-0.5


def expand(c: Gemma3nConfig, weights: Weights, ops: Ops, x: Tensor) -> Tensor:
    """The streams [n, B, T, D] that begin with x [B, T, D]: itself, and projections of its magnitude."""
    target = magnitude(x)
    others = [
        scaled_to(ops.linear(x, weights[f"model.altup_projections.{j}.weight"]), target)
        for j in range(c.altup_num_inputs - 1)
    ]
    return torch.stack([x, *others])


def collapse(c: Gemma3nConfig, weights: Weights, ops: Ops, streams: Tensor) -> Tensor:
    """The mean of the streams [n, B, T, D], the others brought back to the first one's magnitude: [B, T, D]."""
    target = magnitude(streams[0])
    others = [
        scaled_to(ops.linear(streams[j + 1], weights[f"model.altup_unembed_projections.{j}.weight"]), target)
        for j in range(c.altup_num_inputs - 1)
    ]
    return torch.stack([streams[0], *others]).mean(dim=0)


def normalise(c: Gemma3nConfig, weights: Weights, ops: Ops, x: Tensor, record: Record | None) -> Tensor:
    """The final norm, of [..., D]."""
    hidden = ops.rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps)
    if record is not None:
        record("final_hidden", hidden)
    return hidden


def layer(
    c: Gemma3nConfig, weights: Weights, ops: Ops, i: int, streams: Tensor, own_input: Tensor, attention: Attention
) -> Tensor:
    """One decoder layer: streams [n, B, T, D] and its per-layer input [B, T, P] to the next streams."""
    prefix, a = f"model.layers.{i}.", c.altup_active_idx

    def norm(name: str, x: Tensor) -> Tensor:
        return ops.rms_norm(x, weights[f"{prefix}{name}.weight"], c.rms_norm_eps)

    def linear(name: str, x: Tensor) -> Tensor:
        return ops.linear(x, weights[f"{prefix}{name}.weight"])

    def norm_add(name: str, x: Tensor, addend: Tensor, second: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return ops.rms_norm_add(x, weights[f"{prefix}{name}.weight"], c.rms_norm_eps, addend, second, scale)

    def coefficients(name: str, x: Tensor, offset: float = 0.0) -> Tensor:
        """AltUp's, of what the router makes of x: [B, T, n] or [B, T, n * n]."""
        return ops.altup_coefficients(
            x,
            weights[f"{prefix}altup.router_norm.weight"],
            c.rms_norm_eps,
            weights[f"{prefix}altup.modality_router.weight"],
            weights[f"{prefix}altup.{name}.weight"],
            offset,
        )

    n = c.altup_num_inputs
    predicted = ops.altup_predict(streams, coefficients("prediction_coefs", streams[a]).unflatten(-1, (n, n)))
    active = predicted[a]
    x = norm("input_layernorm", active)
    laurel = norm_add("laurel.post_laurel_norm", linear("laurel.linear_right", linear("laurel.linear_left", x)), x)
    x = norm_add("post_attention_layernorm", attention(weights, ops, i, x), active, laurel, scale=2.0**-0.5)
    wide = norm("pre_feedforward_layernorm", x)
    share = c.activation_sparsity_pattern[i]
    gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    if share > 0.0:
        fed = ops.geglu_sparse(ops.linear(wide, gate), wide, up, down, NormalDist().inv_cdf(share))
    else:
        fed = ops.linear(ops.geglu_linears(wide, gate, up), down)
    x = norm_add("post_feedforward_layernorm", fed, x)
    streams = ops.altup_correct(predicted, x, a, coefficients("correction_coefs", x, 1.0))
    x = streams[a]
    if c.altup_correct_scale:
        x = x * weights[f"{prefix}altup.correct_output_scale"]
    x = linear("per_layer_projection", ops.geglu(linear("per_layer_input_gate", x), own_input))
    # Always the streams from 1 on, whichever is the active one.
    return ops.altup_spread(streams, x, weights[f"{prefix}post_per_layer_input_norm.weight"], c.rms_norm_eps)


def _per_layer(c: Gemma3nConfig) -> int:
    return c.num_hidden_layers * c.hidden_size_per_layer_input


def _window(c: Gemma3nConfig, i: int) -> int | None:
    """Positions that layer i sees, None for all."""
    return c.sliding_window if c.layer_types[i] == SLIDING else None


ARCHITECTURE: Architecture[Gemma3nConfig, State] = Architecture(
    model_type="gemma3n",
    blocks=blocks,
    initial=initial,
    aliases=aliases,
    stored_name=stored_name,
    walk=walk,
    head=head,
    touched=touched,
    workspace=workspace,
    traffic=traffic,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    state_options=("context", "kv_cache"),
    check_room=check_room,
    longest=lambda config: config.max_position_embeddings,
    chunk=chunk,
    advance=advance,
    logits=logits,
    forward=forward,
    forward_walk=forward_walk,
    graph_key=graph_key,
)
