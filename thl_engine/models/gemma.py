"""What the text decoders of Gemma-3n and Gemma 4 have in common: all but how a layer is made.

Per-layer inputs that come by row from a table, attention in windows to keys and values that several layers share, and
the pass over the layers. Notation: B batch, T tokens, D hidden_size, L layers of which the last read the keys and
values of earlier ones, A query heads and A_k key/value heads of d features, P features of a per-layer input.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from thl_engine.config import GemmaConfig
from thl_engine.errors import ConfigError
from thl_engine.models import kv_cache as kv_caches
from thl_engine.models.cached_state import CachedState, restored
from thl_engine.models.contract import Architecture, Ops, Record, Weights
from thl_engine.models.kv_cache import KVCache, Layer
from thl_engine.ops.cached_attention import bucket
from thl_engine.schedule import Block, Walk

C = TypeVar("C", bound=GemmaConfig)

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


def weight(name: str, *shape: int, kind: str | None = None, transposed: bool = False) -> Block:
    """The block of a module's weight: a matrix where it has two dimensions, unless told otherwise."""
    kind = kind or ("matrix" if len(shape) == 2 else "vector")
    return Block(f"{name}.weight", shape, kind, transposed=transposed)


def embedding_blocks(config: GemmaConfig) -> list[Block]:
    """What tokens are embedded by, per-layer inputs included."""
    c, per_layer = config, config.num_hidden_layers * config.hidden_size_per_layer_input
    out = [Block(TIED, (c.vocab_size, c.hidden_size), "matrix")]  # its rows first; for the logits the whole, at the end
    if per_layer:
        out += [
            Block(PER_LAYER_TABLE, (c.vocab_size_per_layer_input, per_layer), "table"),
            weight("model.per_layer_model_projection", per_layer, c.hidden_size),
            weight("model.per_layer_projection_norm", c.hidden_size_per_layer_input),
        ]
    return out


def attention_blocks(config: GemmaConfig, i: int) -> list[Block]:
    """Layer i's projections and norms of heads, keys and values only where it has its own."""
    c, prefix, width = config, f"model.layers.{i}.self_attn.", config.hidden_size
    key_heads, size = c.heads(i)
    out = [weight(f"{prefix}q_proj", c.num_attention_heads * size, width), weight(f"{prefix}q_norm", size)]
    if c.kv_source(i) == i:
        out += [weight(f"{prefix}k_proj", key_heads * size, width), weight(f"{prefix}k_norm", size)]
        if not c.keys_are_values(i):
            out.append(weight(f"{prefix}v_proj", key_heads * size, width))
    return [*out, weight(f"{prefix}o_proj", width, c.num_attention_heads * size)]


def aliases(config: GemmaConfig) -> dict[str, str]:
    """Names that published checkpoints repeat, and the tensors that they repeat."""
    return {"lm_head.weight": TIED}


def stored_name(config: GemmaConfig, name: str) -> str | None:
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


def head(config: GemmaConfig) -> tuple[str, ...]:
    """The tied embedding, which the logits read whole."""
    return (TIED,)


def chunk(config: GemmaConfig) -> int:
    """The most tokens that one `advance` takes."""
    return CHUNK


def longest(config: GemmaConfig) -> int:
    """The most tokens of a sequence."""
    return config.max_position_embeddings


def initial(config: GemmaConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    No initialisation is recorded: norms and scales are one, all else is normal with deviation 1/√(inputs), tables
    such that a row has the magnitude that the model's own scaling expects.
    """
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if len(block.shape) == 1:
        return torch.ones(shape)
    inputs = config.hidden_size_per_layer_input if block.name == PER_LAYER_TABLE else block.shape[1]
    return torch.randn(shape, generator=generator).div_(sqrt(inputs))


def traffic(config: GemmaConfig, state: State, position: int) -> int:
    """Bytes of the cache that one token reads at a position."""
    return sum(KVCache([held]).traffic(position) for held in _read(config, state))


def attended(config: GemmaConfig, state: State, position: int) -> int:
    """Multiply-adds of one token's attention."""
    seen = sum((held.kept(position) + 1) * held.keys.data.shape[-1] for held in _read(config, state))
    return 2 * state.batch_size * config.num_attention_heads * seen


def _read(c: GemmaConfig, state: State) -> list[Layer]:
    """The rows that each layer attends to, its own or another's."""
    return [state.cache.layers[state.layers.index(c.kv_source(i))] for i in range(c.num_hidden_layers)]


def init_state(
    config: GemmaConfig,
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
    c = config
    context = kv_caches.checked_context(context, "max_position_embeddings", c.max_position_embeddings, kv_cache)
    layers = tuple(i for i in range(c.num_hidden_layers) if c.kv_source(i) == i)
    heads, widths = zip(*(c.heads(i) for i in layers), strict=True)
    cache = kv_caches.empty([c.window(i) for i in layers], batch_size, heads, widths, context, device, kv_cache)
    return State(0, context, cache, layers)


def state_from_dict(
    config: GemmaConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu", **options: Any
) -> State:
    """The state that `State.to_dict` described, with the options of `init_state`, which are those it was made with.

    Raises CheckpointError on a missing field, a wrong shape or another kind of cache.
    """
    return restored(lambda batch: init_state(config, batch, device, **options), values, "layers.0.self_attn.keys")


def check_room(config: GemmaConfig, state: State, count: int) -> None:
    """Raises ConfigError if `count` more tokens are more than the state's context has room for."""
    kv_caches.check_room(
        state.timestep + count, state.context, "max_position_embeddings", config.max_position_embeddings
    )


def graph_key(config: GemmaConfig, state: State) -> int:
    """What the host decides in the next step of one token: for how many positions attention is launched."""
    return bucket(state.timestep + 1)


def logits(config: GemmaConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, D] as returned by `advance` -> float32 [N, vocab_size]."""
    scores, cap = ops.linear(hidden, weights[TIED]), config.final_logit_softcapping
    return scores if cap is None else scores.div_(cap).tanh_() * cap


def normalise(c: GemmaConfig, weights: Weights, ops: Ops, x: Tensor, record: Record | None) -> Tensor:
    """The final norm, of [..., D]."""
    hidden = ops.rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps)
    if record is not None:
        record("final_hidden", hidden)
    return hidden


class Attention:
    """What the layers of one pass over T positions share: rotary tables, and the cache that they attend to."""

    def __init__(self, c: GemmaConfig, ops: Ops, state: State, rows: int, device: torch.device) -> None:
        self._config, self._layers = c, state.layers
        self._attend = ops.cached_attention(state.cache, state.timestep, rows, device)
        self._positions = self._attend.positions
        self._tables: dict[tuple[int, float, float], tuple[Tensor, Tensor]] = {}

    def keep_last(self) -> None:
        """From here on x is of the last position only, in layers that read what others left."""
        self._positions, self._tables = self._positions[-1:], {}

    def __call__(self, weights: Weights, ops: Ops, i: int, x: Tensor) -> Tensor:
        """Layer i's attention of x [B, T, D] to what is visible, the output projection included.

        Scores are not scaled. A layer without a projection of values takes its keys', before their norm and rotation.
        """
        c, source, eps = self._config, self._config.kv_source(i), self._config.rms_norm_eps
        prefix, number, size = f"model.layers.{i}.self_attn.", self._layers.index(source), self._config.heads(i)[1]
        tables = self._rotary_tables(ops, size, *c.rotation(i))
        names = "q" if source != i else "qk" if c.keys_are_values(i) else "qkv"
        query, *own = (
            projected.unflatten(-1, (-1, size))
            for projected in ops.linears(x, [weights[f"{prefix}{name}_proj.weight"] for name in names])
        )
        if source == i:
            key, value = own[0], own[-1]
            norm = (weights[f"{prefix}k_norm.weight"], eps)
            self._attend.append(number, key, value, key_norm=norm, value_eps=eps, tables=tables)
        last = all(c.kv_source(j) != source for j in range(i + 1, c.num_hidden_layers))
        norm = (weights[f"{prefix}q_norm.weight"], eps)
        mixed = self._attend(number, query, 1.0, norm=norm, tables=tables, last=last)
        return ops.linear(mixed, weights[f"{prefix}o_proj.weight"])

    def _rotary_tables(self, ops: Ops, size: int, base: float, share: float) -> tuple[Tensor, Tensor]:
        """cos and sin [T, d]. Pairs beyond the share of a head that is rotated stand still."""
        key = size, base, share
        if key not in self._tables:
            exponents = torch.arange(0, size, 2, device=self._positions.device).float() / size
            frequencies, turning = 1.0 / base**exponents, int(share * size / 2)
            if turning < size // 2:
                frequencies = torch.cat([frequencies[:turning], torch.zeros_like(frequencies[turning:])])
            self._tables[key] = ops.rotary_tables(self._positions, frequencies)
        return self._tables[key]


@dataclass(frozen=True)
class Decoder(Generic[C]):
    """A pass over the layers, of which each model says how they are made.

    begin: embedded tokens [B, T, D] to x [..., T, D], which may have streams in front. layer: of a number, x and the
    layer's own input [B, T, P] to the next x. end: x back to [B, T, D]. alive: rows of D features that a position has
    between a layer's parts, and beside the largest of them. traced: what x is called among the intermediates.
    """

    blocks: Callable[[C], tuple[Block, ...]]
    begin: Callable[[C, Weights, Ops, Tensor], Tensor]
    layer: Callable[[C, Weights, Ops, int, Tensor, Tensor, Attention], Tensor]
    end: Callable[[C, Weights, Ops, Tensor], Tensor]
    alive: Callable[[C], tuple[int, int]]
    traced: str

    def architecture(self, model_type: str) -> Architecture[C, State]:
        """The model that is made so."""
        return Architecture(
            model_type=model_type,
            blocks=self.blocks,
            initial=initial,
            aliases=aliases,
            stored_name=stored_name,
            walk=self.walk,
            head=head,
            workspace=self.workspace,
            traffic=traffic,
            attended=attended,
            init_state=init_state,
            state_from_dict=state_from_dict,
            state_options=("context", "kv_cache"),
            check_room=check_room,
            longest=longest,
            chunk=chunk,
            advance=self.advance,
            logits=logits,
            forward=self.forward,
            forward_walk=self.forward_walk,
            forward_bytes=self.forward_bytes,
            graph_key=graph_key,
        )

    def walk(self, config: C) -> Walk:
        """Matrices read by one pass, however many tokens it takes."""
        return Walk(tuple((b.name, 1) for b in self.blocks(config) if b.kind == "matrix" and b.name != TIED))

    def forward_walk(self, config: C, tokens_shape: Sequence[int]) -> Walk:
        """Matrices that one `forward` reads, those of the logits included."""
        once = (*self.walk(config).clocked, *((name, 1) for name in head(config)))
        return Walk(once * -(-tokens_shape[1] // CHUNK))

    def workspace(self, config: C, state: State) -> tuple[int, int]:
        """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
        c, rows = config, state.batch_size * min(CHUNK, state.context)
        seen = max(held.kept(state.context) for held in state.cache.layers) + CHUNK
        # Layers that others read keep the float32 copies of int8 rows to the end of a pass.
        shared = {c.kv_source(i) for i in range(c.num_hidden_layers) if c.kv_source(i) != i}
        copies = sum(state.cache.layers[state.layers.index(i)].dequantized_bytes for i in shared)
        activations = self._activations(c, state, c.own_layers)  # the others compute a row a sequence
        return activations + 2 * CHUNK * seen + copies, rows * c.num_attention_heads * seen

    def forward_bytes(self, config: C, state: State, tokens: int, logits: int) -> int:
        """Of a `forward` beyond an `advance`: its logits, and layers larger than those with keys of their own."""
        c = config
        return self._activations(c, state, c.num_hidden_layers) - self._activations(c, state, c.own_layers) + logits

    def _activations(self, c: C, state: State, layers: int) -> int:
        """Bytes of a chunk's activations in that many layers, the first ones."""
        heads = max((c.num_attention_heads + 2 * count) * size for count, size in map(c.heads, range(layers)))
        between, beside = (rows * c.hidden_size for rows in self.alive(c))
        inputs = c.num_hidden_layers * c.hidden_size_per_layer_input  # and what they are made of
        floats = 4 * inputs + max(between, beside + 3 * max(*c.intermediate_size[:layers], heads))
        return 4 * state.batch_size * min(CHUNK, state.context) * floats

    def advance(
        self, config: C, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
    ) -> tuple[Tensor, State]:
        """Feeds int64 [B, T] to the sequences of the batch.

        Returns the normalised features of the last position [B, 1, D], which `logits` projects to the vocabulary, and
        the next state, which shares the given one's cache. `record` receives named intermediates. Raises ConfigError
        beyond the context.
        """
        x, following = self.decode(config, weights, ops, tokens, state, record, last=True)
        return normalise(config, weights, ops, x, record), following

    def forward(
        self, config: C, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
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
            x, state = self.decode(config, weights, ops, some, state, record, last=False)
            hidden = normalise(config, weights, ops, x, record)
            out[:, first : first + CHUNK] = logits(config, weights, ops, hidden.flatten(0, 1)).unflatten(0, some.shape)
        return out, state

    def decode(
        self, c: C, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None, *, last: bool
    ) -> tuple[Tensor, State]:
        """Every layer over tokens [B, T]: features before the final norm [B, T, D], and the next state.

        last: of the last position only, [B, 1, D]. Layers that leave no keys and values behind then compute no other.
        """
        check_room(c, state, tokens.shape[1])
        embedded, inputs = embed(c, weights, ops, tokens)
        if record is not None:
            record("per_layer_inputs", inputs)
        x = self.begin(c, weights, ops, embedded)
        if record is not None:
            record(f"layer0.input_{self.traced}", x)
        attention = Attention(c, ops, state, tokens.shape[1], tokens.device)
        for i in range(c.num_hidden_layers):
            if last and i == len(state.layers):
                x, inputs = _last(x), inputs[:, -1:]
                attention.keep_last()
            x = self.layer(c, weights, ops, i, x, inputs[:, :, i], attention)
            if record is not None:
                record(f"layer{i}.{self.traced}", x)
        x = self.end(c, weights, ops, _last(x) if last else x)
        return x, State(state.timestep + tokens.shape[1], state.context, state.cache, state.layers)


def embed(c: GemmaConfig, weights: Weights, ops: Ops, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded tokens [B, T, D] and what each layer adds of its own, [B, T, L, P], of int64 [B, T]."""
    width, per_layer = c.hidden_size, c.hidden_size_per_layer_input
    x = ops.gather(weights[TIED], tokens.flatten()).unflatten(0, tokens.shape) * sqrt(width)
    if not per_layer:
        return x, x.new_empty(*tokens.shape, c.num_hidden_layers, 0)
    ids = torch.where(tokens < c.vocab_size_per_layer_input, tokens, 0)
    table = ops.gather(weights[PER_LAYER_TABLE], ids.flatten()).unflatten(0, tokens.shape) * sqrt(per_layer)
    projected = ops.linear(x, weights["model.per_layer_model_projection.weight"]) * width**-0.5
    projected = ops.rms_norm(
        projected.unflatten(-1, (-1, per_layer)), weights["model.per_layer_projection_norm.weight"], c.rms_norm_eps
    )
    return x, (projected + table.view_as(projected)) * 2.0**-0.5


def _last(x: Tensor) -> Tensor:
    """The last position of [..., T, D]."""
    return x[..., -1:, :].contiguous()
