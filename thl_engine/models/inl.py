"""INL: causal attention, an integrator iterated to its equilibrium, and a feed-forward part (INL-LLM V2 2.0.0).

Notation: B batch, T tokens, D d_model, A heads of d features, N = B * T rows of the integrator.
The published rule stops a layer's integrator for all tokens of the batch together, so that a token depends on later
ones. `forward` follows it. `advance`, which keeps past tokens as they are, stops each token by itself, by the same
threshold.

Guaranteed of the difference: nothing is tested before the fourth step, so the rules differ by at most S - 4 of the S
steps that a layer makes for a token, and by rounding alone where S <= 4 or no token stops early. The step with which a
token stops moves it by less than the threshold, but the steps that it then misses may be longer: no bound on the logits
follows. Observed (benchmarks/stopping.py, tests/test_inl.py; S = 8, of the largest logit): at most 0.053 on recorded
cases, whose threshold is 0.75; on a trained model 2e-5 with the default of 0.001, 0.009 with 0.75, 0.26 with 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import INLConfig
from thl_engine.errors import ConfigError
from thl_engine.kernels.attention import causal
from thl_engine.kernels.sinusoid import sinusoid
from thl_engine.models import kv_cache as kv_caches
from thl_engine.models.cached_state import CachedState, restored
from thl_engine.models.contract import Architecture, Effort, Ops, Record, Weights
from thl_engine.models.inl_layers import integrator_prefix, run_layers
from thl_engine.models.inl_modules import CONTROLLER, SharedController
from thl_engine.ops.cached_attention import bucket
from thl_engine.schedule import Block, Walk

CHUNK = 64  # tokens of a prompt that share one pass over the weights


@dataclass
class State(CachedState):
    """Context of a batch of sequences: their cache, and the counters that a checkpoint carries on.

    context: positions that the sequences may grow to. avg_iterations float32, num_forwards int64 [layers]: running mean
    of the integrator's steps, and passes counted in it; without entries where the model does not stop early.
    """

    avg_iterations: Tensor
    num_forwards: Tensor

    def named(self) -> dict[str, Tensor]:
        """The fields, not copied; the counters under their published names."""
        out = {"timestep": torch.tensor(self.timestep)}
        for i, layer in enumerate(self.cache.layers):
            out |= {f"layers.{i}.attention.{name}": rows for name, rows in layer.named(self.timestep).items()}
            if len(self.num_forwards):
                out[f"layers.{i}.inl.avg_iterations"] = self.avg_iterations[i]
                out[f"layers.{i}.inl.num_forwards"] = self.num_forwards[i]
        return out


def blocks(config: INLConfig) -> tuple[Block, ...]:
    """All tensors of the published state dict, those that a pass reads first in the order of reading."""
    c, d = config, config.d_model
    if c.use_lowrank_embeddings:
        out = [
            Block("token_embedding.embed_low.weight", (c.vocab_size, c.embedding_rank), "table"),
            Block("token_embedding.project_up.weight", (d, c.embedding_rank), "matrix"),
        ]
    else:
        out = [Block("token_embedding.weight", (c.vocab_size, d), "table")]

    def add(name: str, *shape: int) -> None:
        out.append(Block(name, shape, "matrix" if len(shape) == 2 else "vector"))

    def add_norm(name: str) -> None:
        add(f"{name}.weight", d)
        add(f"{name}.bias", d)

    for i in range(c.num_layers):
        layer, integrator = f"layers.{i}.", integrator_prefix(c, i)
        add_norm(f"{layer}norm_attn")
        add(f"{layer}attention.in_proj_weight", 3 * d, d)
        add(f"{layer}attention.in_proj_bias", 3 * d)
        add(f"{layer}attention.out_proj.weight", d, d)
        add(f"{layer}attention.out_proj.bias", d)
        add_norm(f"{layer}norm1")
        add(f"{integrator}controller.0.weight", CONTROLLER, 3 * d)
        add(f"{integrator}controller.0.bias", CONTROLLER)
        add(f"{integrator}controller.2.weight", 3 * d, CONTROLLER)
        add(f"{integrator}controller.2.bias", 3 * d)
        add(f"{integrator}mu_global")
        add(f"{integrator}mu_local_offsets", -(-d // c.hierarchical_group_size))
        if c.use_adaptive_stopping:
            add(f"{layer}inl.avg_iterations")
            add(f"{layer}inl.num_forwards")
        add_norm(f"{layer}norm2")
        add(f"{layer}ff.0.weight", c.inner_size, d)
        add(f"{layer}ff.0.bias", c.inner_size)
        add(f"{layer}ff.3.weight", d, c.inner_size)
        add(f"{layer}ff.3.bias", d)
    add_norm("final_norm")
    add("lm_head.weight", c.vocab_size, d)
    out.append(Block("pos_encoding.pe", (1, c.max_seq_len, d), "unused"))  # computed where it is needed
    if c.use_shared_controllers:  # held by published models and used by none
        out += [Block(f"shared_controller.{block.name}", block.shape, "unused") for block in _shared(c).blocks()]
    return tuple(out)


def aliases(config: INLConfig) -> dict[str, str]:
    """Names that published checkpoints repeat, and the tensors that they repeat."""
    if not config.use_shared_controllers:
        return {}
    names = [f"shared_controller.{block.name}" for block in _shared(config).blocks()]
    return {f"layers.{i}.{name}": name for i in range(config.num_layers) for name in names}


def walk(config: INLConfig) -> Walk:
    """Matrices read by one pass, however many tokens or iterations it makes."""
    names = _embedding_matrices(config)
    for i in range(config.num_layers):
        names += sum(_layer_matrices(config, i), [])
    return Walk(tuple((name, 1) for name in names))


def _embedding_matrices(config: INLConfig) -> list[str]:
    return ["token_embedding.project_up.weight"] if config.use_lowrank_embeddings else []


def _layer_matrices(config: INLConfig, i: int) -> tuple[list[str], list[str], list[str]]:
    """Of a layer's attention, its controller and its feed-forward part, each in the order of reading."""
    layer, integrator = f"layers.{i}.", integrator_prefix(config, i)
    return (
        [f"{layer}attention.in_proj_weight", f"{layer}attention.out_proj.weight"],
        [f"{integrator}controller.0.weight", f"{integrator}controller.2.weight"],
        [f"{layer}ff.0.weight", f"{layer}ff.3.weight"],
    )


def head(config: INLConfig) -> tuple[str, ...]:
    """Matrices that only the logits need."""
    return ("lm_head.weight",)


def reused(config: INLConfig) -> int:
    """Weights of the two controller matrices that an integrator's steps share, of one layer at a time."""
    return 2 * CONTROLLER * 3 * config.d_model


def products(config: INLConfig) -> dict[str, float]:
    """Products made with the controllers' matrices for each reading: of the first, a third is used only once."""
    steps = config.num_iterations_per_layer
    out: dict[str, float] = {}
    for i in range(config.num_layers):
        prefix = f"{integrator_prefix(config, i)}controller."
        out |= {f"{prefix}0.weight": (1 + 2 * steps) / 3, f"{prefix}2.weight": float(steps)}
    return out


def workspace(config: INLConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
    c, rows = config, state.batch_size * min(CHUNK, state.context)
    # The stream, what was attended and where it moves, beside one layer's attention, integrator or feed-forward part.
    floats = 3 * c.d_model + max(5 * c.d_model, 2 * c.d_model + c.inner_size)
    seen = state.cache.layers[0].kept(state.context) + CHUNK
    return 4 * rows * floats + rows * seen, rows * c.num_heads * seen


def traffic(config: INLConfig, state: State, position: int) -> int:
    """Bytes of the cache that one token reads at a position."""
    return state.cache.traffic(position)


def attended(config: INLConfig, state: State, position: int) -> int:
    """Multiply-adds of one token's attention."""
    seen = sum(held.kept(position) + 1 for held in state.cache.layers)
    return 2 * state.batch_size * config.d_model * seen


def chunk(config: INLConfig) -> int:
    """The most tokens that one `advance` takes."""
    return CHUNK


def initial(config: INLConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    No initialisation is recorded, so it is that of torch: uniform within 1 / sqrt(inputs) for linear layers and their
    biases, Xavier-uniform for in_proj, standard normal for embeddings. Biases of attention and all of mu are zero.
    """
    shape = block.shape if not block.shape else (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    module, _, last = block.name.rpartition(".")
    if block.kind == "table":
        return torch.randn(shape, generator=generator)
    if block.name == "pos_encoding.pe":
        return sinusoid(config.max_seq_len, config.d_model)[None][rows]
    if last == "layer_scalers" or (last == "weight" and "norm" in module.rpartition(".")[2]):
        return torch.ones(shape)
    if last == "in_proj_weight":
        bound = math.sqrt(6.0 / sum(block.shape))
    elif last == "weight":
        bound = 1.0 / math.sqrt(block.shape[1])
    elif last == "bias" and not module.endswith(("out_proj", "norm", "norm1", "norm2", "norm_attn")):
        bound = 1.0 / math.sqrt(_inputs(config, f"{module}.weight"))
    else:
        return torch.zeros(shape)
    return torch.rand(shape, generator=generator).mul_(2.0 * bound).sub_(bound)


def init_state(
    config: INLConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    *,
    context: int | None = None,
    kv_cache: str = "float32",
    sliding_window: int | None = None,
) -> State:
    """The state of `batch_size` fresh sequences.

    weights: where the counters start; None for zeros. context: positions that a sequence may grow to, max_seq_len
    unless given. kv_cache: "float32", or "int8" with a scale for each row. sliding_window: positions that attention
    sees, its own included; that changes the model's results, since tokens further back are no longer seen. Raises
    ConfigError.
    """
    c, context = config, config.max_seq_len if context is None else context
    if kv_cache not in kv_caches.FORMATS:
        raise ConfigError(f"kv_cache is {kv_cache!r}; it must be one of {', '.join(kv_caches.FORMATS)}")
    for name, value in (("context", context), ("sliding_window", sliding_window)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if context > c.max_seq_len:
        raise ConfigError(f"context is {context}; the model's max_seq_len is {c.max_seq_len}")
    cache = kv_caches.empty(
        [sliding_window] * c.num_layers, batch_size, c.num_heads, c.head_dim, context, device, kv_cache
    )
    layers = c.num_layers if c.use_adaptive_stopping else 0
    average, count = torch.zeros(layers, device=device), torch.zeros(layers, dtype=torch.int64, device=device)
    if weights is not None:
        for i in range(layers):
            average[i], count[i] = weights[f"layers.{i}.inl.avg_iterations"], weights[f"layers.{i}.inl.num_forwards"]
    return State(0, context, cache, average, count)


def state_from_dict(
    config: INLConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu", **options: Any
) -> State:
    """The state that `State.to_dict` described, with the options of `init_state`, which are those it was made with.

    Raises CheckpointError on a missing field, a wrong shape or another kind of cache.
    """
    return restored(lambda batch: init_state(config, batch, device, **options), values, "layers.0.attention.keys")


def check_room(config: INLConfig, state: State, count: int) -> None:
    """Raises ConfigError if `count` more tokens are more than the state's context has room for."""
    kv_caches.check_room(state.timestep + count, state.context, "max_seq_len", config.max_seq_len)


def graph_key(config: INLConfig, state: State) -> int:
    """What the host decides in the next step of one token: for how many positions attention is launched."""
    return bucket(state.timestep + 1)


def advance(
    config: INLConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Feeds int64 [B, n] to the sequences of the batch; each token stops its integrators by itself.

    Returns the normalised features [B, n, D], which `logits` projects to the vocabulary, and the next state, which
    shares the given one's cache. `record` receives named intermediates. Raises ConfigError beyond the context.
    """
    check_room(config, state, tokens.shape[1])
    hidden, state = _run(config, weights, ops, tokens, state, None, together=False, record=record)
    return hidden[0], state


def forward(
    config: INLConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    record: Record | None = None,
    *,
    attention_mask: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, State]:
    """A whole sequence int64 [B, T] behind what the state holds: logits [B, T, vocab_size] and the next state.

    All tokens stop a layer's integrator together, as published. attention_mask: bool [T, past + T], True where a
    position must not be seen, instead of the causal mask. training: no stopping, the tokens are a sequence of their
    own, `record` receives the trajectories as part of the graph, and the state is returned as it was.

    Layer by layer it goes CHUNK tokens at a time, so that activations of all tokens are few; with a mask, which may let
    positions see later ones, and in training, all at once.
    """
    rows, past = tokens.shape[1], 0 if training else state.timestep
    if not training:
        check_room(config, state, rows)
    elif rows > config.max_seq_len:
        raise ConfigError(f"a sequence of {rows} tokens is longer than the model's max_seq_len ({config.max_seq_len})")
    blocked = attention_mask
    if blocked is not None:
        if not isinstance(blocked, Tensor) or blocked.dtype != torch.bool or blocked.shape != (rows, past + rows):
            found = f"{blocked.dtype} {list(blocked.shape)}" if isinstance(blocked, Tensor) else type(blocked).__name__
            raise ConfigError(
                f"attention_mask: expected a bool tensor [{rows}, {past + rows}], True where a position "
                f"must not be seen; found {found}"
            )
        blocked, window = blocked.to(tokens.device), None if training else state.cache.layers[0].window
        if window is not None:
            within = causal(rows, past, tokens.device, window)
            blocked = blocked[:, -within.shape[1] :] | within
    hidden, state = _run(config, weights, ops, tokens, state, blocked, together=True, record=record, training=training)
    if len(hidden) == 1:
        return logits(config, weights, ops, hidden[0].flatten(0, 1)).unflatten(0, tokens.shape), state
    out = torch.empty(*tokens.shape, config.vocab_size, device=tokens.device)
    for own, some in zip(out.split(CHUNK, dim=1), hidden, strict=True):
        own.copy_(logits(config, weights, ops, some.flatten(0, 1)).view_as(own))
    return out, state


def forward_walk(
    config: INLConfig, tokens_shape: Sequence[int], *, attention_mask: Tensor | None = None, **options: Any
) -> Walk:
    """Matrices that one `forward` reads, those of the logits included; a controller's twice at most, where chunks have
    to make the steps of another."""
    chunks = -(-tokens_shape[1] // CHUNK) if attention_mask is None else 1
    again = config.use_adaptive_stopping and chunks > 1
    names = _embedding_matrices(config)
    for i in range(config.num_layers):
        attention, controller, feed_forward = _layer_matrices(config, i)
        names += attention * chunks + controller * (2 * chunks - 1 if again else chunks) + feed_forward * chunks
    return Walk(tuple((name, 1) for name in (*names, *head(config) * chunks)), may_stop=again)


def forward_bytes(config: INLConfig, state: State, tokens: int, logits: int) -> int:
    """Of all tokens of a `forward`: the stream before and after the integrator and what was attended; later the stream
    and the logits."""
    row = 4 * state.batch_size * tokens * config.d_model
    return max(3 * row, row + logits)


def logits(config: INLConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, D] as returned by `advance` -> float32 [N, vocab_size]."""
    return ops.linear(hidden, weights["lm_head.weight"])


def _run(
    c: INLConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    blocked: Tensor | None,
    *,
    together: bool,
    record: Record | None,
    training: bool = False,
) -> tuple[list[Tensor], State]:
    """Every layer over tokens [B, T]: features after the final norm in chunks [B, n, D], and the next state."""
    past, cache = (0, None) if training else (state.timestep, state.cache)
    length = CHUNK if together and not training and blocked is None else tokens.shape[1]
    xs, used = run_layers(c, weights, ops, tokens, past, cache, blocked, length, together, training, record)
    if training:
        return xs, state
    averages, counts = state.avg_iterations, state.num_forwards
    if len(counts):
        averages, counts = 0.99 * averages + 0.01 * torch.stack(used).mean(dim=1, dtype=torch.float32), counts + 1
    if record is not None:
        for i in range(len(counts)):
            record(f"layer{i}.avg_iterations_after", averages[i])
            record(f"layer{i}.num_forwards_after", counts[i])
    return xs, State(past + tokens.shape[1], state.context, state.cache, averages, counts)


def _shared(c: INLConfig) -> SharedController:
    return SharedController(c.d_model, c.d_model, c.num_layers, CONTROLLER)


def _inputs(c: INLConfig, weight: str) -> int:
    """Input features of the linear layer with that weight."""
    return next(block.shape[1] for block in blocks(c) if block.name == weight)


def effort_summary(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Mean iterations a token of each layer."""
    means = (float(torch.cat([v.flatten().double() for v in layer]).mean()) for layer in values.values())
    return {"iterations_per_layer": list(means)}


def effort_rows(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The iterations, for people."""
    return [("iterations", " ".join(f"{mean:.2f}" for mean in stats["iterations_per_layer"]) + " by layer")]


ARCHITECTURE: Architecture[INLConfig, State] = Architecture(
    model_type="inl",
    blocks=blocks,
    initial=initial,
    aliases=aliases,
    walk=walk,
    head=head,
    products=products,
    reused=reused,
    workspace=workspace,
    traffic=traffic,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    state_options=("context", "kv_cache", "sliding_window"),
    check_room=check_room,
    longest=lambda config: config.max_seq_len,
    chunk=chunk,
    advance=advance,
    logits=logits,
    forward=forward,
    forward_walk=forward_walk,
    forward_bytes=forward_bytes,
    forward_inputs=("attention_mask",),
    graph_key=graph_key,
    effort=Effort(
        lambda config: tuple(f"layer{i}.iterations_used" for i in range(config.num_layers)), effort_summary, effort_rows
    ),
)
