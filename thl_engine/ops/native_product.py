"""Products of the native kernels: activations times matrices that come in parts, of any stored type."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.ops import native
from thl_engine.ops.weights import Matrix, Part


class Product:
    """Activations [..., C], or what becomes of them, times rows of matrices.

    int8 rows share one packing of the activations, all others one tensor of floats; either is made when asked for.
    """

    def __init__(
        self,
        packings: "list[native.PackedActivations]",
        x: Tensor,
        *,
        norm: tuple[Tensor, Tensor] | None = None,
        up: Tensor | None = None,
    ) -> None:
        """norm: weight and bias of a layer normalisation of x; up: x is the gate of a `swiglu` with it.

        packings: memory to use again, which the packing returns to when the product is done.
        """
        self._x, self._norm, self._packings = even_rows(x), norm, packings
        self._up = None if up is None else even_rows(up)
        self._packed: native.PackedActivations | None = None
        self._floats: Tensor | None = None

    def with_each(
        self, matrices: Sequence[Matrix], bias: Tensor | None = None, gelu: bool = False, addend: Tensor | None = None
    ) -> list[Tensor]:
        """[..., R] of every matrix [R, C]."""
        outs, addend = [], None if addend is None else even_rows(addend)
        for matrix in matrices:
            out = torch.empty(*self._x.shape[:-1], matrix.shape[0])
            for part in matrix.parts():
                self.into(out, part, part.start, bias, gelu, addend)
            outs.append(out)
        self.done()
        return outs

    def into(
        self,
        out: Tensor,
        part: Part,
        start: int,
        bias: Tensor | None = None,
        gelu: bool = False,
        addend: Tensor | None = None,
    ) -> None:
        """Columns from `start` on of out."""
        if part.scales is not None:
            native.linear_int8(self._as_packed(), part.data, part.scales, bias, out, start, gelu, addend)
        else:
            native.linear_float(self._as_floats(), part.data, bias, out, start, gelu, addend)

    def multiply(self, out: Tensor, matrix: Matrix) -> None:
        """out [..., R] times the product; rows of the matrix [R, C] that only meet zeros there are not read."""
        for part in matrix.parts():
            if part.scales is None:
                native.multiply_float(self._as_floats(), part.data, out, part.start)
            else:
                native.multiply_int8(self._as_packed(), part.data, part.scales, out, part.start)
        self.done()

    def done(self) -> None:
        """Gives the packing's memory back."""
        if self._packed is not None:
            self._packings.append(self._packed)
            self._packed = None

    def _as_packed(self) -> "native.PackedActivations":
        if self._packed is None:
            self._packed = self._pack(self._packings.pop() if self._packings else None)
        return self._packed

    def _as_floats(self) -> Tensor:
        if self._floats is None:
            self._floats = self._compute()
        return self._floats

    def _pack(self, memory: "native.PackedActivations | None") -> "native.PackedActivations":
        if self._up is not None:
            return native.pack_swiglu(self._x, self._up, memory)
        return native.pack_activations(self._x, memory, self._norm, LAYER_NORM_EPS)

    def _compute(self) -> Tensor:
        if self._up is not None:
            out = torch.empty(self._x.shape)
            native.swiglu(self._x, self._up, out)
            return out
        if self._norm is not None:
            out = torch.empty(self._x.shape)
            native.layer_norm(self._x, self._norm[0], self._norm[1], LAYER_NORM_EPS, out)
            return out
        return self._x


def even_rows(x: Tensor) -> Tensor:
    """x [..., C], or a copy, whose leading dimensions are rows at even distances."""
    return x if x.dim() <= 2 or x.is_contiguous() else x.reshape(-1, x.shape[-1]).view(x.shape)
