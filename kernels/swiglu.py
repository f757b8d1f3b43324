"""Gated feed-forward activations (Shazeer 2020, arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F]."""
    return functional.silu(gate) * up
