"""Growing models that say what of them grows: more tokens or more layers, of a state dict or of a checkpoint.

What works on state dicts returns new ones and leaves the given ones as they are; tensors that do not change are
shared, not copied.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from thl_engine.checkpoint.pack import Progress, write_store
from thl_engine.checkpoint.spool import tensor_sources
from thl_engine.checkpoint.store import Store, note_vocabulary_beside, open_store
from thl_engine.config import Config
from thl_engine.config.base import check_seed
from thl_engine.errors import CheckpointError, ConfigError, TokenizerError
from thl_engine.models import ARCHITECTURES, architecture
from thl_engine.models.contract import Growth
from thl_engine.schedule import Block
from thl_engine.text.hrm_tokenizer import extended

C = TypeVar("C", bound=Config)


def grow_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    text: str | None = None,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Config:
    """Writes a float checkpoint with more tokens, more layers or both to the file `dst`; returns its configuration.

    vocab_size: tokens afterwards. text: in place of it, the vocabulary that goes with the checkpoint is extended by the
    characters of this text. layers: those that each of the two modules has afterwards. What the model had is kept bit
    for bit. Raises ConfigError for sizes that are no growth, CheckpointError for another kind of checkpoint,
    TokenizerError where there is no character vocabulary to extend.
    """
    check_seed(seed)
    with open_store(src) as store:
        growth = growth_of(store.config, f"{store.path}: ")
        tensors = _float_tensors(store)
        if os.path.exists(dst) and any(os.path.samefile(dst, file) for file in store.files):
            raise CheckpointError(f"{dst}: is the file being read; write to another name")
        config, tokenizer = store.config, store.tokenizer_json
        if text is not None:
            if tokenizer is None:
                raise TokenizerError(
                    f"{store.path}: no vocabulary in or beside the checkpoint that could be extended; "
                    "put its continual_tokenizer.json there, or say how many tokens to have"
                )
            tokenizer, size = extended(tokenizer, text, str(store.path))
            vocab_size = max(size, config.vocab_size)
        if vocab_size is not None:
            config, tensors = expand_vocabulary(config, tensors, vocab_size, seed)
        if layers is not None:
            config, tensors = expand_layers(config, tensors, dict.fromkeys(growth.layers, layers), seed)
        note_vocabulary_beside(Path(dst), tokenizer)
        write_store(dst, config, tensor_sources(tensors, str(src)), tokenizer=tokenizer, progress=progress)
    return config


def growth_of(config: Config, where: str = "") -> Growth:
    """What grows of a model. Raises ConfigError where nothing does."""
    growth = architecture(config.model_type).growth
    if growth is None:
        able = ", ".join(name for name, own in ARCHITECTURES.items() if own.growth is not None)
        raise ConfigError(f"{where}{config.model_type} models do not grow; {able} models do")
    return growth


def _float_tensors(store: Store) -> dict[str, Tensor]:
    if any(tensor.scales for tensor in store.tensors.values()):
        raise CheckpointError(f"{store.path}: is stored as int8; grow the checkpoint it was made from")
    return {name: store.read(name) for name in store.tensors}


def expand_vocabulary(
    config: C, tensors: Mapping[str, Tensor], vocab_size: int, seed: int = 0
) -> tuple[C, dict[str, Tensor]]:
    """The model with `vocab_size` tokens, at least as many as it has.

    Old rows of both tables are kept bit for bit, and so are the logits of old tokens, all states and every decision to
    halt. New rows are as a fresh model's.
    """
    grown = _grown(config, vocab_size=vocab_size)
    before, after = _shapes(config), _shapes(grown)
    _check(tensors, before)
    generator = torch.Generator().manual_seed(seed)
    out = dict(tensors)
    for name in growth_of(config).vocabulary:
        old = tensors[name]
        new = architecture(config.model_type).initial(
            grown, after[name], slice(config.vocab_size, vocab_size), generator
        )
        out[name] = torch.cat([old, new.to(old)])
    return grown, out


def expand_layers(
    config: C, tensors: Mapping[str, Tensor], layers: Mapping[str, int], seed: int = 0
) -> tuple[C, dict[str, Tensor]]:
    """The model with so many layers, by the configuration's fields that count them; new ones as a fresh model's.

    New blocks are no identity: the model's function changes and needs further training. They have the inner width of
    the old ones. (The published helper derives it from a rounded ratio, which gives another width for some sizes.)
    """
    grown = _grown(config, **layers)
    before, after = _shapes(config), _shapes(grown)
    _check(tensors, before)
    generator = torch.Generator().manual_seed(seed)
    like = tensors[growth_of(config).vocabulary[0]]
    added = {
        name: architecture(config.model_type).initial(grown, block, slice(None), generator).to(like)
        for name, block in after.items()
        if name not in before
    }
    return grown, {**tensors, **added}


def _grown(config: C, **sizes: int) -> C:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < config.to_dict()[name]:
            raise ConfigError(
                f"{name} is {size!r}; a model grows to a whole number of at least the "
                f"{config.to_dict()[name]} that it has"
            )
    return replace(config, **sizes)  # type: ignore[type-var]  # every configuration is a dataclass


def _shapes(config: Config) -> dict[str, Block]:
    return {block.name: block for block in architecture(config.model_type).blocks(config)}


def _check(tensors: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> None:
    for name, block in blocks.items():
        if name not in tensors and block.kind == "unused":
            continue
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing; growing needs the whole model")
        if tuple(tensors[name].shape) != block.shape or not tensors[name].is_floating_point():
            raise CheckpointError(
                f"tensor {name!r} is {tensors[name].dtype} {list(tensors[name].shape)}; the "
                f"configuration says floats {list(block.shape)}"
            )
    for name in tensors.keys() - blocks.keys():
        raise CheckpointError(f"tensor {name!r} is none of the model's; the configuration is of another model")
