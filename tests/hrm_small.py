"""HRM as its tests take it: an odd configuration and random weights."""

from math import sqrt

import torch

from thl_engine.config import HRMConfig
from thl_engine.models import hrm

ODD = HRMConfig(vocab_size=37, hidden_size=30, num_heads=5, L_layers=2, H_layers=1, expansion=1.7, halt_max_steps=3)


def random_tensors(config: HRMConfig, seed: int = 0, q_bias: tuple[float, float] = (0.0, 1.0)) -> dict:
    """A state dict in which every tensor matters; `q_bias` decides how soon it halts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in hrm.blocks(config):
        tensors[block.name] = hrm.initial(config, block, slice(None), generator)
        if "norm" in block.name:
            tensors[block.name] += 0.1 * torch.randn(block.shape, generator=generator)
    tensors["q_head.weight"] = torch.randn(2, config.hidden_size, generator=generator) / sqrt(config.hidden_size)
    tensors["q_head.bias"] = torch.tensor(q_bias)
    return tensors
