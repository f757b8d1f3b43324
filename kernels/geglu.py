"""Gated feed-forward activation with GELU (Shazeer 2020, arXiv 2002.05202), sparse where Gemma-3n's layers are."""

from torch import Tensor
from torch.nn import functional


def geglu(gate: Tensor, up: Tensor, quantile: float | None = None) -> Tensor:
    """gelu(gate) * up, both [..., F], with the tanh form of GELU.

    quantile: only what of the gate exceeds its mean by that many standard deviations (biased) over F remains, less
    that bound; the rest is zero. For a normal gate that is the share 1 - Φ(quantile).
    """
    if quantile is not None:
        bound = gate.mean(dim=-1, keepdim=True) + quantile * gate.std(dim=-1, keepdim=True, correction=0)
        gate = functional.relu(gate - bound)
    return functional.gelu(gate, approximate="tanh") * up
