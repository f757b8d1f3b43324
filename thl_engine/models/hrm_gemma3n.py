"""HRM-Gemma: hierarchical reasoning on top of an adapted Gemma-3n, position by position.

Notation: D hidden_size of the base, d_L and d_H features of the two recurrent states, LN layer normalisation over the
features (eps 1e-5, with weight and bias), GELU the exact one, ⊙ element-wise, σ the logistic function; linear maps
carry a bias where one is written.

The base's matrices for q, k, v and for gate, up, down become W x + (alpha / r) B (A x) (`low_rank`). Of each position
let x ∈ R^D be the mean of the adapted base's AltUp streams, before its last norm. Then

  z_L = GELU(LN(W_L x + b_L))            z_H = GELU(LN(W_H x + b_H))

and N cycles follow, each of

  at most T times, until ‖z_L' - z_L‖₂ < L_threshold:
    [g; c] = U_L z_L + U_H (P_HL z_H) + U_x (P_xL x) + b       the linear maps of gate and transform, both of the
    z_L' = LN(σ(g) ⊙ tanh(c) + (1 - σ(g)) ⊙ z_L)               concatenation [z_L; P_HL z_H; P_xL x], by its columns
  z_H' = LN(z_H + V GELU(W [z_H; P_LH z_L] + b_W) + b_V)       transform, then the planning layer V, residual
  [q_halt; q_continue] = Q z_H' + b_Q                          the position's last cycle if q_halt > q_continue
  z_L = R z_H' + b_R                                           the reset, for the next cycle

  logits = head(norm(x + P_out z_H))                           the base's own norm and head, soft-capped

A fresh model has P_out = 0 and every B = 0, so that it equals its base exactly.

Every position ends its L updates and its cycles for itself, and none sees another here: the base's cache is all the
state that a sequence has, and of a pass over a prompt only the last position is thought about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor

from thl_engine.config import LARGEST_CYCLES, HRMGemma3nConfig
from thl_engine.errors import ConfigError
from thl_engine.models import gemma, gemma3n, hrm, low_rank
from thl_engine.models.contract import Adapters, Architecture, Effort, Ops, Record, Weights
from thl_engine.ops.weights import Held
from thl_engine.schedule import Block, Walk

PRESETS = {"math": (4, 8), "code": (6, 12), "agent": (3, 6)}
Q_HEAD_BIAS = -5.0  # of a fresh model; equal for both outputs, so that it never halts early


@dataclass
class State(gemma.State):
    """The base's context, and how hard to think: cycles (N, T), each a maximum."""

    cycles: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        """What `walk` needs to know of the state."""
        return {"cycles": self.cycles}

    def named(self) -> dict[str, Tensor]:
        """The base's fields and `cycles`, not copied."""
        return {**super().named(), "cycles": torch.tensor(self.cycles)}


def parse_cycles(
    config: HRMGemma3nConfig, cycles: str | Sequence[int] | None = None, max_cycles: int | None = None
) -> tuple[int, int]:
    """(N, T) from a preset's name or two numbers, the configuration's if None; `max_cycles` replaces N.

    Raises ConfigError.
    """
    n, t = (config.hrm.cycles, config.hrm.L_steps) if cycles is None else hrm.parse_cycles(cycles, PRESETS)
    if max_cycles is None:
        return n, t
    if isinstance(max_cycles, bool) or not isinstance(max_cycles, int) or not 1 <= max_cycles <= LARGEST_CYCLES:
        raise ConfigError(f"max_cycles is {max_cycles!r}; it must be a whole number from 1 to {LARGEST_CYCLES}")
    return max_cycles, t


def blocks(config: HRMGemma3nConfig) -> tuple[Block, ...]:
    """The base's tensors, each adapted one followed by its adapter, and those of the reasoning."""
    adapters = low_rank.adapters(config)
    out: list[Block] = []
    for block in gemma3n.blocks(config):
        out.append(block)
        if block.name in adapters:
            out += [adapters[block.name].down, adapters[block.name].up]
    return (*out, *reasoning_blocks(config))


def reasoning_blocks(config: HRMGemma3nConfig) -> tuple[Block, ...]:
    """The tensors of the recurrence, in the order of reading.

    The halting head's two rows stay float32: they decide how long every token takes.
    """
    width, low, high = config.hidden_size, config.hrm.L_size, config.hrm.H_size
    out: list[Block] = []

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        out.append(Block(f"hrm.{name}.weight", (rows, columns), "matrix"))
        if bias:
            out.append(Block(f"hrm.{name}.bias", (rows,), "vector"))

    def norm(name: str, size: int) -> None:
        out.extend(Block(f"hrm.{name}.{part}", (size,), "vector") for part in ("weight", "bias"))

    linear("L.start", low, width)
    norm("L.start_norm", low)
    linear("H.start", high, width)
    norm("H.start_norm", high)
    linear("P_xL", low, width, bias=False)
    linear("L.from_x", 2 * low, low, bias=False)
    linear("P_HL", low, high, bias=False)
    linear("L.from_H", 2 * low, low, bias=False)
    linear("L.from_L", 2 * low, low)
    norm("L.norm", low)
    linear("P_LH", high, low, bias=False)
    linear("H.transform", high, 2 * high)
    linear("H.planning", high, high)
    norm("H.norm", high)
    out += [Block("hrm.q_head.weight", (2, high), "vector"), Block("hrm.q_head.bias", (2,), "vector")]
    linear("reset", low, high)
    linear("P_out", width, high, bias=False)
    return tuple(out)


def stored_name(config: HRMGemma3nConfig, name: str) -> str | None:
    """The block's name for a name of the base's checkpoints or of PEFT's; None for what the decoder does not use."""
    stored = low_rank.stored_name(config, name)
    return gemma.stored_name(config, name) if stored == name and not name.startswith("hrm.") else stored


def walk(config: HRMGemma3nConfig, *, cycles: str | Sequence[int] | None = None) -> Walk:
    """Matrices read by one pass: the base's with their adapters, then those of as many updates as there can be."""
    n, t = parse_cycles(config, cycles)
    adapters, reads = low_rank.adapters(config), []
    for name, _ in gemma3n.DECODER.walk(config).clocked:
        reads.append(name)
        if name in adapters:
            reads += [adapters[name].down.name, adapters[name].up.name]

    def weights(*names: str) -> list[str]:
        return [f"hrm.{name}.weight" for name in names]

    cycle = weights("P_HL", "L.from_H", *("L.from_L",) * t, "P_LH", "H.transform", "H.planning")
    reads += weights("L.start", "H.start", "P_xL", "L.from_x")
    reads += (cycle + weights("reset")) * (n - 1) + cycle + weights("P_out")
    return Walk(tuple((name, 1) for name in reads), may_stop=True)


def initial(config: HRMGemma3nConfig, block: Block, rows: slice, generator: torch.Generator) -> Tensor:
    """Rows of a freshly initialised tensor, float32.

    P_out and every B are zero. A is uniform in ±1/√inputs, as PEFT has it; other matrices of the recurrence are normal
    with deviation 1/√inputs, biases zero but for the halting head's.
    """
    shape = (len(range(*rows.indices(block.shape[0]))), *block.shape[1:])
    if block.name == "hrm.P_out.weight" or block.name == "hrm.q_head.weight" or block.name.endswith(low_rank.UP):
        return torch.zeros(shape)
    if block.name.endswith(low_rank.DOWN):
        return torch.rand(shape, generator=generator).mul_(2.0).sub_(1.0).div_(sqrt(block.shape[1]))
    if block.name == "hrm.q_head.bias":
        return torch.full(shape, Q_HEAD_BIAS)
    if block.name.startswith("hrm.") and block.name.endswith(".bias"):
        return torch.zeros(shape)
    return gemma.initial(config, block, rows, generator)


def workspace(config: HRMGemma3nConfig, state: State) -> tuple[int, int]:
    """As the base's, with what is thought about each sequence's last position beside it."""
    activations, scores = gemma3n.DECODER.workspace(config, state)
    return activations + state.batch_size * _thought_bytes(config), scores


def _thought_bytes(config: HRMGemma3nConfig) -> int:
    """Of the activations of a position that is thought about: in an L update, or in an H update."""
    low, high = config.hrm.L_size, config.hrm.H_size
    return 4 * (3 * config.hidden_size + max(11 * low + 2 * high, 3 * low + 7 * high))


def forward_bytes(config: HRMGemma3nConfig, state: State, tokens: int, logits: int) -> int:
    """Of a `forward`: its logits, and what is thought about a chunk once the base's activations are gone."""
    thought = state.batch_size * min(tokens, gemma.CHUNK) * _thought_bytes(config)
    return max(0, thought - workspace(config, state)[0]) + logits


def init_state(
    config: HRMGemma3nConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    weights: Weights | None = None,
    *,
    cycles: str | Sequence[int] | None = None,
    max_cycles: int | None = None,
    context: int | None = None,
    kv_cache: str = "float32",
) -> State:
    """The state of `batch_size` fresh sequences, to be thought about with these cycles (`parse_cycles`).

    context, kv_cache: as the base has them. Raises ConfigError.
    """
    made = parse_cycles(config, cycles, max_cycles)
    return _state(gemma.init_state(config, batch_size, device, weights, context=context, kv_cache=kv_cache), made)


def state_from_dict(
    config: HRMGemma3nConfig, values: Mapping[str, Tensor], ops: Ops, device: torch.device | str = "cpu", **options: Any
) -> State:
    """The state that `State.to_dict` described, with the options of `init_state` that concern its cache.

    Raises CheckpointError on a missing field or a wrong value.
    """
    cycles = hrm.stored_cycles(values, PRESETS)
    rest = {name: value for name, value in values.items() if name != "cycles"}
    return _state(gemma.state_from_dict(config, rest, ops, device, **options), cycles)


def advance(
    config: HRMGemma3nConfig, weights: Weights, ops: Ops, tokens: Tensor, state: State, record: Record | None = None
) -> tuple[Tensor, State]:
    """Feeds int64 [B, T] to the sequences of the batch.

    Returns the features of the last position [B, 1, D], which `logits` projects to the vocabulary, and the next state,
    which shares the given one's cache. `record` receives named intermediates. Raises ConfigError beyond the context.
    """
    adapted = low_rank.AdaptedWeights(config, weights)
    x, following = gemma3n.DECODER.decode(config, adapted, ops, tokens, state, record, last=True)
    hidden = think(config, weights, ops, x[:, -1], state.cycles, record)
    return hidden[:, None], _state(following, state.cycles)


def forward(
    config: HRMGemma3nConfig,
    weights: Weights,
    ops: Ops,
    tokens: Tensor,
    state: State,
    record: Record | None = None,
    *,
    cycles: str | Sequence[int] | None = None,
    max_cycles: int | None = None,
) -> tuple[Tensor, State]:
    """A whole sequence int64 [B, T] behind what the state holds: logits [B, T, vocab_size] and the next state.

    It goes CHUNK tokens at a time; what `record` receives is of the last of them. `cycles`, `max_cycles` replace the
    state's.
    """
    if tokens.shape[0] != state.batch_size:
        raise ConfigError(f"tokens: batch of {tokens.shape[0]}, but the state holds {state.batch_size} sequences")
    gemma.check_room(config, state, tokens.shape[1])
    made = parse_cycles(config, state.cycles if cycles is None else cycles, max_cycles)
    adapted = low_rank.AdaptedWeights(config, weights)
    out = torch.empty(*tokens.shape, config.vocab_size, device=tokens.device)
    for first in range(0, tokens.shape[1], gemma.CHUNK):
        some = tokens[:, first : first + gemma.CHUNK]
        x, following = gemma3n.DECODER.decode(config, adapted, ops, some, state, record, last=False)
        state = _state(following, made)
        hidden = think(config, weights, ops, x.flatten(0, 1), made, record)
        scores = gemma.logits(config, weights, ops, hidden)
        out[:, first : first + gemma.CHUNK] = scores.unflatten(0, some.shape)
    return out, state


def forward_walk(
    config: HRMGemma3nConfig,
    tokens_shape: Sequence[int],
    *,
    cycles: str | Sequence[int] | None = None,
    max_cycles: int | None = None,
) -> Walk:
    """Matrices that one `forward` reads, those of the logits included."""
    once = (
        *walk(config, cycles=parse_cycles(config, cycles, max_cycles)).clocked,
        *((name, 1) for name in gemma.head(config)),
    )
    return Walk(once * -(-tokens_shape[1] // gemma.CHUNK), may_stop=True)


def think(
    config: HRMGemma3nConfig,
    weights: Weights,
    ops: Ops,
    x: Tensor,
    cycles: tuple[int, int],
    record: Record | None = None,
) -> Tensor:
    """Features of P positions that `logits` projects to the vocabulary: x [P, D] -> [P, D].

    `record` receives of each position `cycles_used` [P], and of each cycle, NaN or 0 where none was made, `L_steps`
    [P, N], `L_residual` (the norm of the last L update's change) [P, N] and `q_values` (halt, continue) [P, N, 2].
    """
    high, effort = reason(config, weights, ops, x, cycles)
    if record is not None:
        for name, value in {"x": x, "z_H": high, **effort}.items():
            record(name, value)
    return gemma.normalise(config, weights, ops, x + ops.linear(high, weights["hrm.P_out.weight"]), record)


def reason(
    config: HRMGemma3nConfig, weights: Weights, ops: Ops, x: Tensor, cycles: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """z_H [P, d_H] of x [P, D] after the cycles of each position, and what `think` records of them."""
    n, t = cycles
    low, high = _start(weights, ops, "L", x), _start(weights, ops, "H", x)
    from_x = _linear(weights, ops, "L.from_x", _linear(weights, ops, "P_xL", x))
    live = torch.arange(len(x), device=x.device)  # positions that go on
    used = torch.zeros_like(live)
    steps = used.new_zeros(len(x), n)
    residuals, q_values = x.new_full((len(x), n), torch.nan), x.new_full((len(x), n, 2), torch.nan)
    for cycle in range(n):
        plan = high[live]
        drive = from_x[live] + _linear(weights, ops, "L.from_H", _linear(weights, ops, "P_HL", plan))
        low, steps[live, cycle], residual = settle(config, weights, ops, low, drive, t)
        residuals[live, cycle] = residual.float()
        plan = update_plan(weights, ops, plan, low)
        high = high.index_put((live,), plan)
        q = ops.linear(plan, Held(weights["hrm.q_head.weight"]), weights["hrm.q_head.bias"])
        q_values[live, cycle] = q
        used[live] += 1
        going = q[:, 0] <= q[:, 1]
        live = live[going]
        if cycle + 1 == n or not len(live):
            break
        low = _linear(weights, ops, "reset", plan[going])
    return high, {"cycles_used": used, "L_steps": steps, "L_residual": residuals, "q_values": q_values}


def settle(
    config: HRMGemma3nConfig, weights: Weights, ops: Ops, low: Tensor, drive: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """L updates of z_L [P, d_L] until each position has converged, at most `steps` of them.

    drive [P, 2 d_L]: what z_H and x contribute to the transform and the gate. Returns the states, and of each position
    the number of its updates, int64 [P], and the norm of the last one's change, float64 [P].
    """
    norm, bias = weights["hrm.L.norm.weight"], weights["hrm.L.norm.bias"]
    live = torch.arange(len(low), device=low.device)
    made, residuals = torch.zeros_like(live), low.new_zeros(len(low), dtype=torch.float64)
    for _ in range(steps):
        old = low[live]
        gate, candidate = (drive[live] + _linear(weights, ops, "L.from_L", old)).chunk(2, dim=-1)
        new = ops.layer_norm(ops.gru_update(gate, candidate, old.clone()), norm, bias)
        # float64: whether a position goes on must not depend on how a sum over it is ordered.
        residual = torch.linalg.vector_norm(new - old, dim=-1, dtype=torch.float64)
        low = low.index_put((live,), new)
        residuals = residuals.index_put((live,), residual)
        made[live] += 1
        live = live[residual >= config.hrm.L_threshold]
        if not len(live):
            break
    return low, made, residuals


def update_plan(weights: Weights, ops: Ops, high: Tensor, low: Tensor) -> Tensor:
    """One H update: z_H [P, d_H] and z_L [P, d_L] to the next z_H."""
    both = torch.cat([high, _linear(weights, ops, "P_LH", low)], dim=-1)
    planned = _linear(weights, ops, "H.planning", ops.gelu(_linear(weights, ops, "H.transform", both)))
    return ops.layer_norm(high + planned, weights["hrm.H.norm.weight"], weights["hrm.H.norm.bias"])


def _start(weights: Weights, ops: Ops, side: str, x: Tensor) -> Tensor:
    """The first z_L or z_H of x [P, D]."""
    y = _linear(weights, ops, f"{side}.start", x)
    return ops.gelu(ops.layer_norm(y, weights[f"hrm.{side}.start_norm.weight"], weights[f"hrm.{side}.start_norm.bias"]))


def _linear(weights: Weights, ops: Ops, name: str, x: Tensor) -> Tensor:
    matrix, bias = f"hrm.{name}.weight", f"hrm.{name}.bias"
    return ops.linear(x, weights[matrix], weights[bias] if bias in weights else None)


def _state(base: gemma.State, cycles: tuple[int, int]) -> State:
    fields = {name: value for name, value in vars(base).items() if name != "cycles"}
    return State(**fields, cycles=cycles)


def with_options(
    config: HRMGemma3nConfig, state: State, *, cycles: str | Sequence[int] | None = None, max_cycles: int | None = None
) -> State:
    """The state with other cycles, where given; `max_cycles` replaces N. Raises ConfigError."""
    return replace(state, cycles=parse_cycles(config, state.cycles if cycles is None else cycles, max_cycles))


REASONING = ("cycles_used", "L_steps", "L_residual", "q_values")  # of `think`'s records


def effort_summary(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Means over the positions [P] that were thought about, and their cycles [P, N]."""
    used, updates, residuals, q_values = (torch.cat([v.double() for v in values[name]]) for name in REASONING)
    halt, proceed = q_values.flatten(0, 1).nanmean(dim=0).tolist()
    return {
        "cycles_per_token": float(used.mean()),
        "L_steps_per_cycle": float(updates.sum() / used.sum()),
        "L_residual": float(residuals.nanmean()),
        "q_halt": halt,
        "q_continue": proceed,
    }


def effort_rows(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the reasoning took, for people."""
    took = (
        f"{stats['cycles_per_token']:.2f} cycles a token, {stats['L_steps_per_cycle']:.2f} L updates each, after which "
        f"the last changed z_L by {stats['L_residual']:.3g}; q halt {stats['q_halt']:.3g}, continue "
        f"{stats['q_continue']:.3g}"
    )
    return [("reasoning", took)]


# What the base's hooks take, this configuration and state are too.
_BASE = cast(Architecture[HRMGemma3nConfig, State], gemma3n.ARCHITECTURE)
ARCHITECTURE: Architecture[HRMGemma3nConfig, State] = replace(
    _BASE,
    model_type="hrm_gemma3n",
    blocks=blocks,
    initial=initial,
    stored_name=stored_name,
    walk=walk,
    workspace=workspace,
    init_state=init_state,
    state_from_dict=state_from_dict,
    state_options=("cycles", "max_cycles", "context", "kv_cache"),
    with_options=with_options,
    advance=advance,
    forward=forward,
    forward_walk=forward_walk,
    forward_bytes=forward_bytes,
    forward_inputs=("cycles", "max_cycles"),
    graph_key=None,  # the host decides when a position has thought enough
    effort=Effort(lambda config: REASONING, effort_summary, effort_rows),
    adapters=Adapters(
        base="gemma3n",
        prefix=low_rank.PEFT_PREFIX,
        targets=low_rank.TARGETS,
        rank_and_alpha=low_rank.rank_and_alpha,
        blocks=low_rank.side_blocks,
        own=reasoning_blocks,
    ),
)
