"""The Gaussian error linear unit (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

from torch import Tensor
from torch.nn import functional


def gelu(x: Tensor) -> Tensor:
    """x times the standard normal distribution function of x, exactly and not by tanh. Any shape."""
    return functional.gelu(x)
