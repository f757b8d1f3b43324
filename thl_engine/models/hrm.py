"""HRM-text: two transformer modules, a fast L and a slow H, that refine two states until a halting head says stop.

Notation: B batch, T positions, h hidden size, A heads of d features, z_L and z_H [B, T, h] the two states. A segment
with cycles (N, T) makes N·T updates z_L = L(z_L + z_H + x) and, after every T-th, z_H = H(z_H + z_L). Segments go on
from each other until every row of the batch wants to halt, or `halt_max_steps` of them have run: the published rule,
which `forward` follows. `advance` takes each row's result from the first segment after which it wants to halt, so that
a sequence does not depend on its neighbours.

Attention sees the whole window in both directions, so a new token changes every position: each step runs the last
64 tokens from the start. Nothing but those tokens passes from one step to the next.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import e, erf, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from thl_engine.config import LARGEST_CYCLES, HRMConfig
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.models.contract import Architecture, Effort, Growth, Ops, Record, Weights
from thl_engine.models.state import State as BaseState
from thl_engine.models.state import taken_fields
from thl_engine.schedule import LARGEST_WALK, Block, Walk

WINDOW = 64  # tokens that a step sees; positions count from the oldest of them
RMS_EPS = 1e-5
ROTARY_BASE = 10000.0
PRESETS = {"fast": (1, 1), "normal": (2, 2), "deep": (3, 2), "thorough": (4, 3), "extreme": (6, 4)}
NORMAL = PRESETS["normal"]
Q_HEAD_BIAS = -5.0  # of a fresh model; equal for both outputs, so that it never halts early


def parse_cycles(value: str | Sequence[int], presets: Mapping[str, tuple[int, int]] = PRESETS) -> tuple[int, int]:
    """(N, T) from a preset's name, from "NxT" or from two numbers. Raises ConfigError."""
    if isinstance(value, str) and value in presets:
        return presets[value]
    written = re.fullmatch("([0-9]{1,3})x([0-9]{1,3})", value) if isinstance(value, str) else None
    pair = tuple(map(int, written.groups())) if written else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(
        isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= LARGEST_CYCLES for n in pair
    ):
        raise ConfigError(
            f"cycles is {value!r}; it must be one of {', '.join(presets)}, or NxT with whole numbers "
            f"from 1 to {LARGEST_CYCLES}"
        )
    return pair


def stored_cycles(values: Mapping[str, Tensor], presets: Mapping[str, tuple[int, int]] = PRESETS) -> tuple[int, int]:
    """The cycles that a stored state was made with. Raises CheckpointError."""
    given = values.get("cycles")
    if given is None or given.dtype != torch.int64 or given.shape != (2,):
        raise CheckpointError("state: field 'cycles' is missing or not two whole numbers")
    try:
        return parse_cycles(tuple(given.tolist()), presets)
    except ConfigError as error:
        raise CheckpointError(f"state: {error}") from None


@dataclass
class State(BaseState):
    """The last tokens of a batch of sequences, all that a step needs of the past.

    window: int64 [B, 64], oldest first, `valid` entries in use. cycles: (N, T) of each segment. timestep: tokens read.
    """

    timestep: int
    window: Tensor
    valid: int
    cycles: tuple[int, int]

    @property
    def batch_size(self) -> int:
        return self.window.shape[0]

    def seek(self, position: int) -> None:
        super().seek(position)
        self.valid = min(position, WINDOW)

    @property
    def options(self) -> dict[str, Any]:
        """What `walk` needs to know of the state."""
        return {"cycles": self.cycles}

    def named(self) -> dict[str, Tensor]:
        """The fields as tensors, not copied."""
        return {
            "timestep": torch.tensor(self.timestep),
            "window": self.window,
            "valid": torch.tensor(self.valid),
            "cycles": torch.tensor(self.cycles),
        }


@dataclass(frozen=True)
class Inputs:
    """What every update of a run reads: embedded tokens x [B, T, h] and the rotary tables [T, d]."""

    embedded: Tensor
    cos: Tensor
    sin: Tensor


def blocks(config: HRMConfig) -> tuple[Block, ...]:
    """All tensors of the published state dict, those that a step reads first in the order of reading.

    The halting head's two rows stay float32: they decide how long every token takes.
    """
    c = config
    out = [
        Block("input_embedding.embedding_weight", (c.vocab_size, c.hidden_size), "table"),
        Block("z0_L", (1, 1, c.hidden_size), "vector"),
        Block("z0_H", (1, 1, c.hidden_size), "vector"),
    ]
    for module, layers in (("L", c.L_layers), ("H", c.H_layers)):
        for j in range(layers):
            prefix = f"{module}_module.layers.{j}."
            out += [
                Block(f"{prefix}attention.qkv_proj.weight", (3 * c.hidden_size, c.hidden_size), "matrix"),
                Block(f"{prefix}attention.o_proj.weight", (c.hidden_size, c.hidden_size), "matrix"),
                Block(f"{prefix}norm1.weight", (c.hidden_size,), "vector"),
                Block(f"{prefix}feed_forward.gate_up_proj.weight", (2 * c.inner_size, c.hidden_size), "matrix"),
                Block(f"{prefix}feed_forward.down_proj.weight", (c.hidden_size, c.inner_size), "matrix"),
                Block(f"{prefix}norm2.weight", (c.hidden_size,), "vector"),
            ]
    out += [
        Block("q_head.weight", (2, c.hidden_size), "vector"),
        Block("q_head.bias", (2,), "vector"),
        Block("output_head.weight", (c.vocab_size, c.hidden_size), "matrix"),
        Block("rope.inv_freq", (c.head_dim // 2,), "unused"),  # the configuration gives the same numbers
    ]
    return tuple(out)


def walk(config: HRMConfig, *, cycles: str | Sequence[int] = NORMAL) -> Walk:
    """Matrices read by a step of as many segments as there can be, in the order of all revisits.

    Every step reads the same; halting ends a step after any of its segments.
    """
    n, t = parse_cycles(cycles)
    of = {
        module: [
            block.name
            for block in blocks(config)
            if block.kind == "matrix" and block.name.startswith(f"{module}_module.")
        ]
        for module in "LH"
    }
    reads = (len(of["L"]) * t + len(of["H"])) * n * config.halt_max_steps
    if reads > LARGEST_WALK:
        raise ConfigError(
            f"halt_max_steps is {config.halt_max_steps}: with cycles {n} and {t} a step would read up to {reads} "
            f"matrices; supported are {LARGEST_WALK}"
        )
    segment_reads = (of["L"] * t + of["H"]) * n
    return Walk(tuple((name, 1) for name in segment_reads * config.halt_max_steps), may_stop=True)


def forward_walk(config: HRMConfig, tokens_shape: Sequence[int], *, cycles: str | Sequence[int] = NORMAL) -> Walk:
    """Matrices read by `forward`, the head included: as many as for one step, however many the tokens are."""
    return Walk((*walk(config, cycles=cycles).clocked, *((name, 1) for name in head(config))), may_stop=True)


def head(config: HRMConfig) -> tuple[str, ...]:
    """Matrices that only the logits need."""
    return ("output_head.weight",)


def step_rows(config: HRMConfig, position: int) -> int:
    """Rows of activations that a sequence brings to a step's products: the window, as far as it is filled."""
    return min(position + 1, WINDOW)


def attended(config: HRMConfig, state: State, position: int) -> int:
    """Multiply-adds of attention in a step that nothing ends early."""
    n, t = state.cycles
    layers = (t * config.L_layers + config.H_layers) * n * config.halt_max_steps
    return 2 * state.batch_size * config.hidden_size * step_rows(config, position) ** 2 * layers


def chunk(config: HRMConfig) -> int:
    """Tokens that one `advance` takes: any number, since they only join the window."""
    return 1 << 30


def truncated_normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """float32 values of standard deviation `std`, normal but for the tails beyond two standard deviations.

    The distribution is cut at ±2c with c about 1.137 std, which gives what is left the deviation asked for.
    """
    bound = erf(sqrt(2.0))
    scale = std / sqrt(1.0 - 4.0 * e**-2 / sqrt(2.0 * pi) / bound)
    uniform = torch.rand(*shape, generator=generator).mul_(2.0 * bound).sub_(bound)
    return uniform.erfinv_().mul_(sqrt(2.0) * scale).clamp_(-2.0 * scale, 2.0 * scale)


def initial(config: HRMConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32, as published.

    Matrices and tables are truncated normal with deviation 1/√(inputs), starting states with deviation 1, norms one;
    the halting head is zero with equal biases.
    """
    if block.name == "rope.inv_freq":
        return inverse_frequencies(config)[rows]
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if block.name == "q_head.weight":
        return torch.zeros(shape)
    if block.name == "q_head.bias":
        return torch.full(shape, Q_HEAD_BIAS)
    if block.name.startswith("z0_"):
        return truncated_normal(shape, 1.0, generator)
    if block.kind == "vector":
        return torch.ones(shape)
    return truncated_normal(shape, 1.0 / sqrt(block.shape[1]), generator)


def inverse_frequencies(config: HRMConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angle per position of each rotated pair: float32 [d / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    return 1.0 / ROTARY_BASE**exponents


def init_state(
    config: HRMConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    *,
    cycles: str | Sequence[int] = NORMAL,
) -> State:
    """The state of `batch_size` sequences without a token yet, to be read with these cycles."""
    window = torch.zeros(batch_size, WINDOW, dtype=torch.int64, device=device)
    return State(timestep=0, window=window, valid=0, cycles=parse_cycles(cycles))


def state_from_dict(
    config: HRMConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu"
) -> State:
    """The state that `State.to_dict` described. Raises CheckpointError on a missing field or a wrong value."""
    window = values.get("window")
    batch = window.shape[0] if window is not None and window.dim() == 2 else 1
    taken = taken_fields(values, init_state(config, batch, "meta").named(), device)
    count, valid = int(taken["timestep"]), int(taken["valid"])
    if valid != min(count, WINDOW) or count < 0:
        raise CheckpointError(
            f"state: timestep {count} and valid {valid} do not agree; valid is the number of tokens "
            f"read, at most {WINDOW}"
        )
    window = taken["window"]
    if window.numel() and not 0 <= int(window.min()) <= int(window.max()) < config.vocab_size:
        raise CheckpointError(f"state: field 'window' holds ids outside the vocabulary of {config.vocab_size}")
    return State(timestep=count, window=window, valid=valid, cycles=stored_cycles(taken))


def workspace(config: HRMConfig, state: State) -> tuple[int, int]:
    """Of one `advance` with the state: bytes of activations, and elements of attention scores."""
    rows = state.batch_size * WINDOW
    return rows * _row_bytes(config), rows * config.num_heads * WINDOW


def _row_bytes(config: HRMConfig) -> int:
    """Of a position's activations: the token, both states before and after a segment, what rows that halted keep, their
    sum and one layer's residual, beside its attention or feed-forward part."""
    return 4 * (8 * config.hidden_size + max(8 * config.hidden_size, 4 * config.inner_size))


def forward_bytes(config: HRMConfig, state: State, tokens: int, logits: int) -> int:
    """Of a `forward`: activations of positions beyond the window; or logits, which come when the others are gone."""
    seen = min(state.timestep - tokens, WINDOW) + tokens
    beyond = state.batch_size * max(0, seen - WINDOW) * _row_bytes(config)
    return max(beyond, logits - workspace(config, state)[0])


def advance(
    config: HRMConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Appends tokens, int64 [B, n], and thinks about the last 64 anew.

    Returns z_H of the last position, [B, 1, h], which `logits` projects to the vocabulary, and the next state.
    """
    seen = _append(state, tokens)
    following = _remember(state, seen, tokens.shape[1])
    high = _think(config, weights, ops, seen[:, -WINDOW:], state.cycles, record, together=False, last=1)
    return high, following


def logits(config: HRMConfig, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor:
    """Scores of the next token. hidden [N, h] as returned by `advance` -> float32 [N, vocab_size]."""
    return ops.linear(hidden, weights["output_head.weight"])


def forward(
    config: HRMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    record: Record | None = None,
    *,
    cycles: str | Sequence[int] | None = None,
) -> tuple[Tensor, State]:
    """A whole sequence at once: int64 [B, T] -> logits at every position, float32 [B, T, vocab_size], and the state.

    Tokens that the state holds come first and are seen too. No window applies within the call. `cycles` replaces the
    state's.
    """
    if cycles is not None:
        state = State(state.timestep, state.window, state.valid, parse_cycles(cycles))
    seen, new = _append(state, tokens), tokens.shape[1]
    states: list[Tensor] = []  # z_H after each segment, of the new positions

    def keep(name: str, value: Tensor) -> None:
        if record is not None:
            record(name, value)
        if name.startswith("segment") and name.endswith(".z_H"):
            states.append(value[:, -new:])

    high = _think(config, weights, ops, seen, state.cycles, None if record is None else keep, together=True, last=new)
    high = torch.stack(states or [high])  # one product for all segments: the head's pages are read once
    out = logits(config, weights, ops, high.flatten(0, 2)).view(*high.shape[:-1], -1)
    for s in range(len(states)):
        keep(f"segment{s}.logits", out[s])
    return out[-1], _remember(state, seen, new)


def begin(config: HRMConfig, weights: Weights, ops: Ops, tokens: Tensor) -> tuple[Inputs, Tensor, Tensor]:
    """The inputs of a run over int64 [B, T], and z_H and z_L [B, T, h] before its first segment."""
    embedded = ops.gather(weights["input_embedding.embedding_weight"], tokens.flatten())
    embedded = embedded.view(*tokens.shape, -1) * sqrt(config.hidden_size)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    cos, sin = ops.rotary_tables(positions, inverse_frequencies(config, tokens.device))
    high, low = (weights[name].expand_as(embedded) for name in ("z0_H", "z0_L"))
    return Inputs(embedded, cos, sin), high, low


def segment(
    config: HRMConfig,
    weights: Weights,
    ops: Ops,
    inputs: Inputs,
    high: Tensor,
    low: Tensor,
    cycles: tuple[int, int],
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One segment from z_H and z_L [B, T, h] to the next (z_H, z_L), z_H of the `last` positions only if that is given.

    Only the last update of each module builds a graph; that is the published gradient, which takes the states before
    it as constants.
    """
    n, t = cycles
    high, low = high.detach(), low.detach()
    with torch.no_grad():
        for i in range(1, n * t):
            low = _module(config, weights, ops, "L", low + high + inputs.embedded, inputs)
            if i % t == 0:
                high = _module(config, weights, ops, "H", high + low, inputs)
    low = _module(config, weights, ops, "L", low + high + inputs.embedded, inputs)
    return _module(config, weights, ops, "H", high + low, inputs, last), low


def q_values(weights: Weights, high: Tensor) -> tuple[Tensor, Tensor]:
    """How much each row wants to halt and to continue, both [B], from z_H [B, T, h]."""
    both = high.mean(dim=1) @ weights["q_head.weight"].T + weights["q_head.bias"]
    return both[:, 0], both[:, 1]


def _append(state: State, tokens: Tensor) -> Tensor:
    return torch.cat([state.window[:, : state.valid], tokens], dim=1)


def _remember(state: State, seen: Tensor, new: int) -> State:
    """The state behind the tokens `seen`, of which the last `new` are new."""
    kept = seen[:, -WINDOW:]
    window = torch.nn.functional.pad(kept, (0, WINDOW - kept.shape[1]))
    return State(state.timestep + new, window, kept.shape[1], state.cycles)


def _think(
    config: HRMConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    cycles: tuple[int, int],
    record: Record | None,
    *,
    together: bool,
    last: int,
) -> Tensor:
    """Segments over int64 [B, T] until all rows want to halt: z_H of the `last` positions [B, last, h], as the last
    segment leaves it, or each row's last."""
    inputs, high, low = begin(config, weights, ops, tokens)
    halted = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    settled = high
    for s in range(config.halt_max_steps):
        if s == config.halt_max_steps - 1 and record is None:  # nobody asks whether to halt, so no position but these
            high = segment(config, weights, ops, inputs, high, low, cycles, last)[0]
            return high if together else torch.where(halted[:, None, None], settled[:, -last:], high)
        high, low = segment(config, weights, ops, inputs, high, low, cycles)
        settled = high if together else torch.where(halted[:, None, None], settled, high)
        halt, proceed = q_values(weights, high)
        halted = halt > proceed if together else halted | (halt > proceed)
        values = {"q_halt_logits": halt, "q_continue_logits": proceed, "z_H": high, "z_L": low}
        if record is not None:
            for name, value in values.items():
                record(f"segment{s}.{name}", value)
        if bool(halted.all()):
            break
    if record is not None:
        for name, value in values.items():
            record(name, value)
        record("num_segments", torch.tensor(s + 1))
        record("steps_taken", torch.full((len(tokens),), s + 1, dtype=torch.int32))
    return settled[:, -last:]


def _module(
    c: HRMConfig, weights: Weights, ops: Ops, module: str, x: Tensor, inputs: Inputs, last: int | None = None
) -> Tensor:
    """The blocks of module L or H on x [B, T, h]: normalisation comes after each residual sum.

    Returns all positions, or the `last` ones, which alone then pass what follows the last attention.
    """
    layers = c.L_layers if module == "L" else c.H_layers
    for j in range(layers):
        prefix = f"{module}_module.layers.{j}."
        wanted = last if j == layers - 1 else None
        mixed = _attention(c, weights, ops, f"{prefix}attention.", x, inputs, wanted)
        x = x if wanted is None else x[:, -wanted:]
        x = ops.add_rms_norm(x, mixed, weights[f"{prefix}norm1.weight"], RMS_EPS)
        x = ops.add_rms_norm(
            x, _feed_forward(weights, ops, f"{prefix}feed_forward.", x), weights[f"{prefix}norm2.weight"], RMS_EPS
        )
    return x


def _feed_forward(weights: Weights, ops: Ops, prefix: str, x: Tensor) -> Tensor:
    gate, up = ops.linear(x, weights[f"{prefix}gate_up_proj.weight"]).chunk(2, dim=-1)
    return ops.swiglu_linear(gate, up, weights[f"{prefix}down_proj.weight"])


def _attention(
    c: HRMConfig, weights: Weights, ops: Ops, prefix: str, x: Tensor, inputs: Inputs, last: int | None
) -> Tensor:
    """Attention to every position, later ones included, of every position or the `last` ones of x [B, T, h]."""
    joined = ops.linear(x, weights[f"{prefix}qkv_proj.weight"])
    mixed = ops.rotary_attention(joined, c.num_heads, inputs.cos, inputs.sin, 1.0 / sqrt(c.head_dim))
    return ops.linear(mixed if last is None else mixed[:, -last:], weights[f"{prefix}o_proj.weight"])


def with_options(config: HRMConfig, state: State, *, cycles: str | Sequence[int]) -> State:
    """The state, to be read with other cycles. Raises ConfigError."""
    return replace(state, cycles=parse_cycles(cycles))


def effort_summary(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Mean segments a token."""
    return {"segments_per_token": float(torch.cat([v.flatten().double() for v in values["num_segments"]]).mean())}


def effort_rows(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The segments, for people."""
    return [("thinking", f"{stats['segments_per_token']:.2f} segments a token")]


ARCHITECTURE: Architecture[HRMConfig, State] = Architecture(
    model_type="hrm",
    blocks=blocks,
    initial=initial,
    walk=walk,
    head=head,
    step_rows=step_rows,
    pass_rows=lambda config: WINDOW,
    workspace=workspace,
    traffic=lambda config, state, position: state.nbytes,
    attended=attended,
    init_state=init_state,
    state_from_dict=state_from_dict,
    state_options=("cycles",),
    with_options=with_options,
    chunk=chunk,
    advance=advance,
    logits=logits,
    forward=forward,
    forward_walk=forward_walk,
    forward_bytes=forward_bytes,
    forward_inputs=("cycles",),
    answering="chat",
    effort=Effort(lambda config: ("num_segments",), effort_summary, effort_rows),
    growth=Growth(
        vocabulary=("input_embedding.embedding_weight", "output_head.weight"), layers=("L_layers", "H_layers")
    ),
)
