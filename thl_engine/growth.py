"""Growing HRM models: more tokens or more layers, as operations on configuration and state dict.

Both return new dicts and leave the given ones as they are; tensors that do not change are shared, not copied.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from thl_engine.config import HRMConfig
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.models import hrm
from thl_engine.schedule import Block

VOCABULARY_TABLES = ("input_embedding.embedding_weight", "output_head.weight")


def expand_vocabulary(config: HRMConfig, tensors: Mapping[str, Tensor], vocab_size: int,
                      seed: int = 0) -> tuple[HRMConfig, dict[str, Tensor]]:
    """The model with `vocab_size` tokens, at least as many as it has.

    Old rows of both tables are kept bit for bit, and so are the logits of old tokens, all states and every decision to
    halt. New rows are as a fresh model's.
    """
    grown = _grown(config, vocab_size=vocab_size)
    before, after = _shapes(config), _shapes(grown)
    _check(tensors, before)
    generator = torch.Generator().manual_seed(seed)
    out = dict(tensors)
    for name in VOCABULARY_TABLES:
        old = tensors[name]
        new = hrm.initial(grown, after[name], slice(config.vocab_size, vocab_size), generator)
        out[name] = torch.cat([old, new.to(old)])
    return grown, out


def expand_layers(config: HRMConfig, tensors: Mapping[str, Tensor], more_L: int = 0, more_H: int = 0,
                  seed: int = 0) -> tuple[HRMConfig, dict[str, Tensor]]:
    """The model with that many blocks appended to its modules, initialised as a fresh model's.

    New blocks are no identity: the model's function changes and needs further training. They have the inner width of
    the old ones. (The published helper derives it from a rounded ratio, which gives another width for some sizes.)
    """
    for name, more in (("more_L", more_L), ("more_H", more_H)):
        if isinstance(more, bool) or not isinstance(more, int) or more < 0:
            raise ConfigError(f"{name} is {more!r}; it must be a whole number of layers to add, 0 or more")
    grown = _grown(config, L_layers=config.L_layers + more_L, H_layers=config.H_layers + more_H)
    before, after = _shapes(config), _shapes(grown)
    _check(tensors, before)
    generator = torch.Generator().manual_seed(seed)
    like = tensors[VOCABULARY_TABLES[0]]
    added = {name: hrm.initial(grown, block, slice(None), generator).to(like)
             for name, block in after.items() if name not in before}
    return grown, {**tensors, **added}


def _grown(config: HRMConfig, **sizes: int) -> HRMConfig:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < getattr(config, name):
            raise ConfigError(f"{name} is {size!r}; a model grows to a whole number of at least the "
                              f"{getattr(config, name)} that it has")
    return replace(config, **sizes)


def _shapes(config: HRMConfig) -> dict[str, Block]:
    return {block.name: block for block in hrm.blocks(config)}


def _check(tensors: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> None:
    for name, block in blocks.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing; growing needs the whole model")
        if tuple(tensors[name].shape) != block.shape or not tensors[name].is_floating_point():
            raise CheckpointError(f"tensor {name!r} is {tensors[name].dtype} {list(tensors[name].shape)}; the "
                                  f"configuration says floats {list(block.shape)}")
    for name in tensors.keys() - blocks.keys():
        raise CheckpointError(f"tensor {name!r} is none of the model's; the configuration is of another model")
