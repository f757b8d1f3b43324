"""The contract between an architecture and all that runs it: engine, plan, packer, converter, trainer.

An architecture is defined once, as functions of its configuration in terms of `ops`. Models see tensors, weights by
name and ops; never files, devices or threads. Each module of this folder that defines one ends with an
`Architecture(...)` that names its hooks; nothing looks for a hook anywhere else. One that is built on another begins
with `dataclasses.replace(other.ARCHITECTURE, ...)`, so that it hands on whatever it does not replace.

Notation: B batch, T or n tokens, D features that the head reads, V vocabulary. In the hooks' signatures `*args: Any,
**options: Any` stands for keyword arguments of the architecture's own, each with a default.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from thl_engine.config import Config
from thl_engine.models.state import State
from thl_engine.ops.reference import ReferenceOps
from thl_engine.schedule import Block, Walk

Ops = ReferenceOps  # every backend's ops are the reference's, some of them replaced
Record = Callable[[str, Tensor], None]  # takes named intermediates of a step
Weights = Mapping[str, Any]  # by published name: vectors are Tensors, others a Matrix or a Table (ops/weights.py)

C = TypeVar("C", bound=Config)
S = TypeVar("S", bound=State)
C_in = TypeVar("C_in", bound=Config, contravariant=True)
S_in = TypeVar("S_in", bound=State, contravariant=True)
S_out = TypeVar("S_out", bound=State, covariant=True)
S_both = TypeVar("S_both", bound=State)


class WalkHook(Protocol[C_in]):
    """Which matrices each `advance` reads; keyword arguments: what the states' `options` may hold."""

    def __call__(self, config: C_in, *args: Any, **options: Any) -> Walk: ...


class PassWalkHook(Protocol[C_in]):
    """Which matrices one `advance` of `count` tokens reads; keyword arguments as of `walk`."""

    def __call__(self, config: C_in, count: int, *args: Any, **options: Any) -> Walk: ...


class InitialHook(Protocol[C_in]):
    """Freshly initialised rows of one tensor, float32 on the CPU, as published."""

    def __call__(self, config: C_in, block: Block, rows: slice, generator: torch.Generator) -> Tensor: ...


class InitStateHook(Protocol[C_in, S_out]):
    """The state of fresh sequences, with room for their whole context.

    With device "meta" only sizes are asked for. weights: where a state begins with values of the checkpoint, None for
    zeros. Keyword arguments: `Architecture.state_options`. Raises ConfigError for values that cannot work.
    """

    def __call__(
        self, config: C_in, batch_size: int, device: torch.device | str = "cpu", weights: Weights | None = None
    ) -> S_out: ...


class StateFromDictHook(Protocol[C_in, S_out]):
    """The state that `State.to_dict` described; options as of `init_state`.

    Raises CheckpointError on a missing or unknown field, a wrong shape, or values that no state can have.
    """

    def __call__(
        self,
        config: C_in,
        values: Mapping[str, Tensor],
        ops: Ops,
        device: torch.device | str = "cpu",
        *args: Any,
        **options: Any,
    ) -> S_out: ...


class AdvanceHook(Protocol[C_in, S_both]):
    """Feeds int64 [B, n], n at most `chunk`, to every sequence: (hidden [B, m, D], next state), m = n, or 1: the last.

    The next state may share the given one's tensors, which ops may update in place.
    """

    def __call__(
        self, config: C_in, weights: Weights, ops: Ops, tokens: Tensor, state: S_both, record: Record | None = None
    ) -> tuple[Tensor, S_both]: ...


class LogitsHook(Protocol[C_in]):
    """Scores of the next token: hidden [N, D] as returned by `advance` -> float32 [N, V]."""

    def __call__(self, config: C_in, weights: Weights, ops: Ops, hidden: Tensor) -> Tensor: ...


class ForwardHook(Protocol[C_in, S_both]):
    """A whole sequence that is no chain of `advance`s: int64 [B, T] -> (logits [B, T', V], next state).

    Keyword arguments: `Architecture.forward_inputs`. Raises ConfigError for inputs that do not fit.
    """

    def __call__(
        self,
        config: C_in,
        weights: Weights,
        ops: Ops,
        tokens: Tensor,
        state: S_both,
        record: Record | None = None,
        *args: Any,
        **inputs: Any,
    ) -> tuple[Tensor, S_both]: ...


class ForwardWalkHook(Protocol[C_in]):
    """What `forward` reads for tokens of that shape and the same inputs, the head included."""

    def __call__(self, config: C_in, tokens_shape: Sequence[int], *args: Any, **inputs: Any) -> Walk: ...


class PassCountHook(Protocol[C_in, S_in]):
    """Something that a pass behind `position` tokens takes, for all sequences of the state together."""

    def __call__(self, config: C_in, state: S_in, position: int) -> int: ...


@dataclass(frozen=True)
class Effort(Generic[C]):
    """How hard a model worked, where that depends on the text: read from a trace of its steps.

    names: of the traced values that it is told from. summary: means over a trace, from each name's values in the order
    of the steps. rows: the summary for people, as (name, value).
    """

    names: Callable[[C], tuple[str, ...]]
    summary: Callable[[Mapping[str, Sequence[Tensor]]], dict[str, Any]]
    rows: Callable[[Mapping[str, Any]], list[tuple[str, str]]]


@dataclass(frozen=True)
class Growth:
    """What grows when a model learns more.

    vocabulary: tensors with a row a token. layers: fields of the configuration that count layers.
    """

    vocabulary: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Adapters(Generic[C]):
    """How a model is stored that is a base, held elsewhere, with low-rank adapters and modules of its own.

    base: the base's model_type. targets: of each adapter, by its name, the modules that it adds to. blocks: of each
    adapter, its tensors. own: the tensors that are neither the base's nor an adapter's. prefix: before names in files
    of adapters (PEFT's). rank_and_alpha: of each adapter.
    """

    base: str
    prefix: str
    targets: Mapping[str, tuple[str, ...]]
    rank_and_alpha: Callable[[C, str], tuple[int, float]]
    blocks: Callable[[C, str], tuple[Block, ...]]
    own: Callable[[C], tuple[Block, ...]]


def _no_room_needed(config: Config, state: State, count: int) -> None:
    """A state of fixed size has room for any number of tokens."""


def _four_times_all(config: Config, state: State, position: int) -> int:
    """A pass reads and writes most of a small state, some of it twice."""
    return 4 * state.nbytes


def _one_row(config: Config, position: int) -> int:
    """A token is a row of activations."""
    return 1


@dataclass(frozen=True, kw_only=True)
class Architecture(Generic[C, S]):
    """The hooks of one architecture. Those without a default are required."""

    model_type: str

    # What it is made of.
    blocks: Callable[[C], tuple[Block, ...]]  # its tensors, in the order in which the schedule first uses them
    initial: InitialHook[C]
    # Names that published checkpoints repeat, and the tensors that they repeat.
    aliases: Callable[[C], Mapping[str, str]] = lambda config: {}
    # The block that a tensor of a published checkpoint is; None for what is not used.
    stored_name: Callable[[C, str], str | None] = lambda config, name: name
    # The tensors, by published names, that one of a published checkpoint holds below each other, of as many rows each;
    # none where it holds itself.
    joined: Callable[[C, str], Sequence[str]] = lambda config, name: ()
    # A published state dict as the model defines it, where training leaves another.
    adopt: Callable[[C, dict[str, Tensor]], dict[str, Tensor]] = lambda config, tensors: tensors

    # What each step reads and takes.
    walk: WalkHook[C]
    # The same of an `advance` that takes several tokens, where that is not the walk of a step.
    pass_walk: PassWalkHook[C] | None = None
    head: Callable[[C], tuple[str, ...]]  # matrices that the logits read, apart from the steps
    # Step of the walk that `count` tokens begin at.
    starts_at: Callable[[C, S, int], int] = lambda config, state, count: state.timestep
    # Products that one reading of a matrix serves, by name, where it is not one.
    products: Callable[[C], Mapping[str, float]] = lambda config: {}
    # Share of a matrix that the product of one row needs, by name, where it is not all.
    touched: Callable[[C], Mapping[str, float]] = lambda config: {}
    # Weights that an op keeps to use them again after their parts have been let go.
    reused: Callable[[C], int] = lambda config: 0
    # Rows of activations that a sequence brings to the products of a pass behind so many tokens, the head's excepted.
    step_rows: Callable[[C, int], int] = _one_row
    # The same for the longest pass over a prompt; None: `chunk`.
    pass_rows: Callable[[C], int] | None = None
    # Of one `advance`: bytes of activations, and elements of attention scores.
    workspace: Callable[[C, S], tuple[int, int]]
    traffic: PassCountHook[C, S] = _four_times_all  # bytes of the state that are read or written
    # Multiply-adds of activations with each other or with the state: attention, the reading of slots.
    attended: PassCountHook[C, S]

    # The state.
    init_state: InitStateHook[C, S]
    state_from_dict: StateFromDictHook[C, S]
    state_options: tuple[str, ...] = ()  # keyword arguments of `init_state`
    # A stored state under other options, those of `state_options` that are no matter of its memory; None: it has none.
    with_options: Callable[..., S] | None = None
    # Raises ConfigError if the state has no room for `count` more tokens.
    check_room: Callable[[C, S, int], None] = _no_room_needed
    longest: Callable[[C], int | None] = lambda config: (
        None
    )  # tokens that a sequence may have at most; None: any number
    # A prompt is read as a whole: what comes behind its first part changes what that part gives.
    whole_prompts: Callable[[C], bool] = lambda config: False
    rows_meet: bool = False  # sequences of a batch depend on each other

    # The maths.
    chunk: Callable[[C], int] = lambda config: 1  # the most tokens that one `advance` takes
    advance: AdvanceHook[C, S]
    logits: LogitsHook[C]
    forward: ForwardHook[C, S] | None = None  # both or neither; without them `forward` is a chain of `advance`s
    forward_walk: ForwardWalkHook[C] | None = None
    forward_inputs: tuple[str, ...] = ()  # what users may give to `forward`
    # Bytes that a `forward` of so many tokens a sequence took beyond the workspace of an `advance`, those of its logits
    # (the last argument) among them, from the state that it left.
    forward_bytes: Callable[[C, S, int, int], int] = lambda config, state, tokens, logits: logits
    # All that the host decides in the next step of one token: two steps with the same key and shapes launch the same,
    # and what differs in the values that they read is the token and what `ops.counter` gave; the state's numbers then
    # grow alike. Its result None: launch this step anew. The hook None: launch every step anew.
    graph_key: Callable[[C, S], Hashable | None] | None = None

    # What people do with it.
    answering: Literal["text", "chat", "block"] = (
        "text"  # goes on with a text; follows HRM's chat rules; a pass, a block
    )
    conditions: bool = False  # answers are asked for by tags, unless the checkpoint has a chat template
    byte_text: bool = False  # without a tokenizer, a text is its bytes, as `ByteTokenizer` numbers them
    effort: Effort[C] | None = None
    growth: Growth | None = None
    adapters: Adapters[C] | None = None

    def __post_init__(self) -> None:
        if (self.forward is None) != (self.forward_walk is None):
            raise TypeError(f"{self.model_type}: forward and forward_walk go together")


AnyArchitecture = Architecture[Any, Any]
