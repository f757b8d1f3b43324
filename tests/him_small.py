"""A small random HIM for the tests: configurations at odd sizes, weights in parts, comparisons."""

from dataclasses import dataclass, replace

import torch

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.config import HIMConfig
from thl_engine.kernels.int8 import dequantize
from thl_engine.models import him
from thl_engine.ops.weights import Held

TOLERANCE = 2e-5  # relative to the largest magnitude of the tensor
SMALL = HIMConfig(
    vocab_size=51,
    embed_dim=66,
    num_heads=6,
    num_kv_heads=2,
    num_encoder_layers=4,
    dim_feedforward=37,
    max_answer_len=5,
    mem_slots=6,
    mem_rank=9,
    reasoning_tokens=7,
    max_seq_len=19,
)
# Sizes at their limits, and none that a vector register divides.
ODD = [
    SMALL,
    replace(SMALL, num_heads=11, num_kv_heads=11),
    replace(SMALL, num_heads=22, num_kv_heads=1),
    replace(SMALL, num_heads=1, num_kv_heads=1, mem_rank=66),
    replace(SMALL, mem_slots=1, mem_rank=1),
    replace(SMALL, num_encoder_layers=1),
    replace(SMALL, num_encoder_layers=2, dim_feedforward=1),
    replace(SMALL, num_encoder_layers=6, reasoning_tokens=1),
    replace(SMALL, max_answer_len=1, vocab_size=7),
    replace(SMALL, embed_dim=100, num_heads=20, num_kv_heads=5, max_seq_len=1),
]


@dataclass(frozen=True)
class Stored(Held):
    """A matrix that notes its name when it is read whole."""

    name: str = ""
    reads: list | None = None

    def parts(self):
        if self.reads is not None:
            self.reads.append(self.name)
        half = self.shape[0] // 2
        for part in Held(self.data, self.scales).parts():
            if half:
                scales = [None, None] if self.scales is None else [self.scales[:half], self.scales[half:]]
                yield replace(part, stop=half, data=part.data[:half], scales=scales[0])
                yield replace(part, start=half, data=part.data[half:], scales=scales[1])
            else:
                yield part

    def rows(self, ids):
        return dequantize(self.data[ids], None if self.scales is None else self.scales[ids])


def as_weights(config, tensors, quantize=False, reads=None):
    """Tensors as the model's weights, each matrix in two parts."""
    weights = {}
    for block in him.blocks(config):
        value = tensors.get(block.name)
        if block.kind == "matrix":
            data, scales = quantize_rows(value) if quantize else (value, None)
            value = Stored(data, scales, name=block.name, reads=reads)
        weights[block.name] = value
    return weights


def random_tensors(config, seed=0):
    """A state dict in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in him.blocks(config):
        values = torch.randn(block.shape, generator=generator)
        if block.kind == "matrix" and block.name != him.TIED:
            values = values / block.shape[1] ** 0.5
        elif "norm" in block.name:
            values = values * 0.1 + float(block.name.endswith("weight"))
        elif block.name.endswith("bias"):
            values = values * 0.1
        tensors[block.name] = values
    return tensors


def ids(config, batch, length, seed=0):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    return (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30)


def serve(config, weights, ops, prompt, state, following):
    """Logits of the prompt's answer and of each following token [B, n]: [B, 1 + n, V]."""
    rows = []
    for tokens in (prompt, *following.split(1, dim=1)):
        hidden, state = him.advance(config, weights, ops, tokens, state)
        assert hidden.shape == (len(tokens), 1, config.embed_dim)
        rows.append(him.logits(config, weights, ops, hidden[:, 0]))
    return torch.stack(rows, dim=1), state
