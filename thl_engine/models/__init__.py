"""The architectures, each defined once in terms of `ops`.

An architecture is a module with

  blocks(config) -> tuple[Block, ...]          its tensors, in the order in which the schedule first uses them
  walk(config, **state.options) -> Walk        which matrices each `advance` reads
  head(config) -> tuple[str, ...]              which matrices the logits read, apart from the steps
  initial(config, block, rows, generator)      freshly initialised rows of one tensor
  chunk(config) -> int                         the most tokens that one `advance` takes
  init_state(config, batch_size, device, weights, **options) -> State
  state_from_dict(config, fields, ops, device, **options) -> State
  workspace(config, state) -> (int, int)       of one `advance`: bytes of activations, elements of attention scores
  advance(config, weights, ops, tokens [B, n], state, record) -> (hidden [B, m, D], State), m = n, or 1: the last
  logits(config, weights, ops, hidden [N, D]) -> float32 [N, vocab_size]

and, where it differs from what the engine does without,

  aliases(config) -> dict[str, str]            names that published checkpoints repeat, and the tensors they repeat
  starts_at(config, state, count) -> int       step of the walk that `count` tokens begin at; else the state's timestep
  check_room(config, state, count)             raises ConfigError if the state has no room for `count` more tokens
  forward(config, weights, ops, tokens [B, T], state, record, **inputs) -> (logits [B, T', V], State)
  forward_walk(config, tokens_shape, **inputs) -> Walk   a whole sequence that is no chain of `advance`s
  reused(config) -> int                        weights that an op keeps to use them again
  products(config) -> dict[str, float]         products that one reading of a matrix serves, where it is not one
  touched(config) -> dict[str, float]          share of a matrix that the product of one row needs, where it is not all
  step_rows(config) -> int                     rows that a sequence brings to a step's products, where it is not one
  traffic(config, state, position) -> int      bytes of the state that a token reads or writes; else four times all
  graph_key(config, state) -> Hashable | None  all that the host decides in the next step of one token: two steps with
                                               the same key and shapes launch the same, and what differs in the values
                                               that they read is the token and what `ops.counter` gave; the state's
                                               numbers then grow alike; None: launch this step anew
  ROWS_MEET = True                             sequences of a batch depend on each other

A State has timestep, batch_size, nbytes (all that it will ever take), clone(), become(other), to_dict(), and options
where the walk depends on some. `advance` may update its tensors in place. The engine passes the options `context`,
`kv_cache` and `sliding_window` to an `init_state` that names them; with device "meta" it only asks for sizes.

and, where published checkpoints name tensors otherwise or hold others besides,

  stored_name(config, name) -> str | None      the block that such a tensor is, None for what is not used

Models see tensors, weights by name and ops; never files, devices or threads.
"""

from types import ModuleType

from thl_engine.models import gemma3n, him, hrm, hrm_gemma3n, inl, thl

ARCHITECTURES: dict[str, ModuleType] = {
    "thl": thl,
    "hrm": hrm,
    "him": him,
    "inl": inl,
    "gemma3n": gemma3n,
    "hrm_gemma3n": hrm_gemma3n,
}


def architecture(model_type: str) -> ModuleType:
    """The module that defines `model_type`, one of `thl_engine.config.CONFIGS`."""
    return ARCHITECTURES[model_type]
