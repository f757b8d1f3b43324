"""HRM-Gemma's adapters: low-rank additions to the base's matrices, in PEFT's names without their `base_model.model.`.

The L adapter goes with query, key and value projections, the H adapter with the feed-forward parts. A fresh adapter
adds nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from thl_engine.config import HRMGemma3nConfig
from thl_engine.models import gemma, gemma3n
from thl_engine.ops.weights import Adapted
from thl_engine.schedule import Block

TARGETS = {"L": ("q_proj", "k_proj", "v_proj"), "H": ("gate_proj", "up_proj", "down_proj")}
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What is added to one matrix of the base: `scale` times the product of the tensors `up` and `down`."""

    down: Block
    up: Block
    scale: float


def rank_and_alpha(config: HRMGemma3nConfig, side: str) -> tuple[int, float]:
    """Of the adapter "L" or "H"; its scale is alpha / rank."""
    hrm = config.hrm
    return (hrm.L_rank, hrm.L_alpha) if side == "L" else (hrm.H_rank, hrm.H_alpha)


@lru_cache(maxsize=8)
def adapters(config: HRMGemma3nConfig) -> Mapping[str, Adapter]:
    """The adapters of both sides, by the name of the matrix that each adds to, in the base's order of reading."""
    side_of = {target: side for side, targets in TARGETS.items() for target in targets}
    out = {}
    for block in gemma3n.blocks(config):
        side = side_of.get(block.name.removesuffix(".weight").rpartition(".")[2])
        if side is None:
            continue
        rank, alpha = rank_and_alpha(config, side)
        rows, columns = block.shape
        name = block.name.removesuffix(".weight")
        out[block.name] = Adapter(
            Block(name + DOWN, (rank, columns), "matrix", exact=True),
            Block(name + UP, (rows, rank), "matrix", exact=True),
            alpha / rank,
        )
    return out


def side_blocks(config: HRMGemma3nConfig, side: str) -> tuple[Block, ...]:
    """The tensors of the adapter "L" or "H"."""
    return tuple(
        block
        for name, adapter in adapters(config).items()
        for block in (adapter.down, adapter.up)
        if name.removesuffix(".weight").endswith(TARGETS[side])
    )


def stored_name(config: HRMGemma3nConfig, name: str) -> str | None:
    """The block's name for an adapter tensor in PEFT's file, which begins with PEFT_PREFIX; other names as they are.

    None for what the decoder does not use, as `gemma.stored_name` has it.
    """
    for suffix in (DOWN, UP):
        if name.endswith(suffix):
            module = name.removeprefix(PEFT_PREFIX).removesuffix(suffix)
            stored = gemma.stored_name(config, module + ".weight")
            return None if stored is None else stored.removesuffix(".weight") + suffix
    return name


class AdaptedWeights(Mapping[str, Any]):
    """The base's weights by name, those that an adapter adds to as `Adapted`."""

    def __init__(self, config: HRMGemma3nConfig, weights: Mapping[str, Any]) -> None:
        self._weights, self._adapters = weights, adapters(config)

    def __getitem__(self, name: str) -> Any:
        adapter = self._adapters.get(name)
        if adapter is None:
            return self._weights[name]
        return Adapted(
            self._weights[name], self._weights[adapter.down.name], self._weights[adapter.up.name], adapter.scale
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
