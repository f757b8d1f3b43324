"""INL as its tests take it: an odd configuration, random weights, and the recorded cases."""

import json

import torch
from conftest import FIXTURES, RECORDED, Case, cases, load_case

from thl_engine.checkpoint.quant import quantize_rows
from thl_engine.config import INLConfig, parse_config
from thl_engine.models import inl
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.weights import Held, Trainable

TOLERANCE = 2e-5  # relative to the largest magnitude of the tensor
REFERENCE = ReferenceOps()


def of_kind(kind: str) -> list[str]:
    """Names of the recorded cases that one procedure made, those beside the repository included."""
    return [path.name for path in cases("inl") if json.loads((path / "config.json").read_text())["kind"] == kind]


FORWARD_CASES, GREEDY_CASES = of_kind("inl_forward"), of_kind("inl_greedy")

# Odd sizes, several groups of mu with a short last one, and a context of several passes.
ODD = INLConfig(
    vocab_size=53,
    d_model=35,
    num_layers=3,
    num_heads=5,
    num_iterations_per_layer=9,
    feedforward_dim=23,
    max_seq_len=525,
    lowrank_ratio=0.5,
    adaptive_convergence_threshold=0.3,
    hierarchical_group_size=8,
)


def folder(name: str):
    here = FIXTURES / "inl" / name
    return here if here.is_dir() else RECORDED / "inl" / name


def recorded(name: str) -> tuple[Case, INLConfig, dict]:
    case = load_case(folder(name))
    config = parse_config(case.config, "inl")
    return case, config, held(config, case.weights)


def held(config: INLConfig, tensors: dict[str, torch.Tensor], quantized: bool = False) -> dict:
    """Weights as an engine holds them; matrices in int8 if `quantized`."""
    out = {}
    for block in inl.blocks(config):
        value = tensors[block.name]
        if block.kind == "matrix":
            out[block.name] = Held(*quantize_rows(value)) if quantized else Held(value)
        elif block.kind == "table":
            out[block.name] = Trainable(value)
        elif block.kind == "vector":
            out[block.name] = value.float()
    return out


def random_tensors(config: INLConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole state dict in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for block in inl.blocks(config):
        value = torch.randn(block.shape, generator=generator)
        if block.kind == "matrix":
            value *= 1.3 * block.shape[1] ** -0.5
        elif block.kind == "vector":
            value = 0.1 * value + (1.0 if "norm" in block.name.split(".")[-2] and "weight" in block.name else 0.0)
        out[block.name] = value.abs() if "_iterations" in block.name else value
    for name in (name for name in out if name.endswith("num_forwards")):
        out[name] = torch.tensor(3)
    return out


@torch.inference_mode()
def advance(config, weights, ops, tokens, state, chunks=None, record=None):
    """Logits [B, T, V] and the state, fed in chunks of the given sizes (the last one repeated)."""
    hidden, at, sizes = [], 0, list(chunks or [inl.chunk(config)])
    while at < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        features, state = inl.advance(config, weights, ops, tokens[:, at : at + size], state, record)
        hidden.append(features)
        at += size
    hidden = torch.cat(hidden, dim=1)
    return inl.logits(config, weights, ops, hidden.flatten(0, 1)).unflatten(0, tokens.shape), state


@torch.inference_mode()
def forward(config, weights, ops, tokens, state=None, record=None, **inputs):
    if state is None:
        state = inl.init_state(config, tokens.shape[0], weights=weights)
    return inl.forward(config, weights, ops, tokens, state, record, **inputs)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE, what: str = "") -> None:
    if not expected.is_floating_point():
        assert torch.equal(found.to(expected.dtype).reshape(expected.shape), expected), what
        return
    scale = max(expected.abs().max().item(), 1e-30)
    assert (found.reshape(expected.shape) - expected).abs().max().item() <= tolerance * scale, what


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def draw(config: INLConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
