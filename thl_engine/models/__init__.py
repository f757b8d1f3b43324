"""The architectures, each defined once in terms of `ops`.

An architecture is a module with

  blocks(config) -> tuple[Block, ...]          its tensors, in the order in which the schedule first uses them
  walk(config) -> Walk                         which matrices each step reads
  head(config) -> tuple[str, ...]              which matrices the logits read, apart from the steps
  initial(config, block, rows, generator)      freshly initialised rows of one tensor
  init_state(config, batch_size, device, weights), state_from_dict(config, fields, device)
  step(config, weights, ops, tokens, state) -> (hidden, state)
  logits(config, weights, ops, hidden) -> logits

and, where published checkpoints name tensors otherwise or hold others besides,

  stored_name(config, name) -> str | None      the block that such a tensor is, None for what is not used

Models see tensors, weights by name and ops; never files, devices or threads.
"""

from types import ModuleType

from thl_engine.models import gemma3n, him, hrm, inl, thl

ARCHITECTURES: dict[str, ModuleType] = {"thl": thl, "hrm": hrm, "him": him, "inl": inl, "gemma3n": gemma3n}


def architecture(model_type: str) -> ModuleType:
    """The module that defines `model_type`, one of `thl_engine.config.CONFIGS`."""
    return ARCHITECTURES[model_type]
