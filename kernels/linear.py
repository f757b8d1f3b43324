"""Products with weights as floats: what stored rows stand for, `int8.dequantize`."""

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of w [R, C], plus bias [R]: [..., R]."""
    return functional.linear(x, w, bias)


def linear_transposed(x: Tensor, w: Tensor) -> Tensor:
    """x [..., R] times w [R, C]: [..., C]."""
    return x @ w
