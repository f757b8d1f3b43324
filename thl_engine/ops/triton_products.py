"""Products of the triton backend: activations times matrices whose parts are resident or pass by."""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from thl_engine.device import cuda
from thl_engine.kernels.int8 import dequantize
from thl_engine.kernels.norm import LAYER_NORM_EPS
from thl_engine.kernels.triton import elementwise, linear, norm, sparse
from thl_engine.kernels.triton.linear import LowRank, Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed
from thl_engine.ops.reference import SPARSE_SHARE, ReferenceOps
from thl_engine.ops.weights import Adapted, Matrix, Part

# Rows of a matrix up to which few programs share the activations, so that each of them computes the gate for itself.
FEW_PROGRAMS = 1024


class TritonProducts(ReferenceOps):
    """All uses of matrices. What follows a product goes with it; a part's results do not depend on where it lies."""

    sparse_share = SPARSE_SHARE
    capturable = True
    rounded = False  # whether products of many rows may round activations to int8: faster, and less exact

    def each_part(self, matrix: Matrix, use: Callable[[Part], object]) -> None:
        """Calls `use` for each part of a matrix in row order: now, and again whenever a captured step is replayed.

        It launches kernels with the same operands each time, the part aside. All uses of a matrix go through here.
        """
        if self.recorder is not None:
            self.recorder.each_part(matrix, use)
            return
        for part in matrix.parts():
            use(part)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm.layer_norm(x, weight, bias, LAYER_NORM_EPS)

    def linear(
        self,
        x: Tensor,
        matrix: Matrix | Adapted,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, Tensor] | None = None,
        gelu: bool = False,
        addend: Tensor | None = None,
    ) -> Tensor:
        if norm is not None:
            x = self.layer_norm(x, *norm)
        if isinstance(matrix, Adapted):
            return self.linear_adapted(x, matrix, bias, None, gelu, addend)
        return self._product(x, matrix, bias, gelu=gelu, residual=addend)

    def product(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        return self._product(x, matrix, bias)

    def _product(
        self,
        x: Tensor,
        matrix: Matrix,
        bias: Tensor | None = None,
        *,
        up: Tensor | None = None,
        low_rank: LowRank | None = None,
        gelu: bool = False,
        fast: Tensor | None = None,
        blend: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`linear` of the kernels with all parts of a matrix; out [n, R]: where to write, for all rows of x."""
        flat, up, fast, residual = _rows(x), _flat(up), _flat(fast), _flat(residual)
        made = x.new_empty(flat.shape[0], matrix.shape[0]) if out is None else out

        plain = not gelu and all(t is None for t in (up, low_rank, fast))
        shape = cuda.gemv_shape(flat, *matrix.shape) if plain else None

        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            added, behind, into = _of(bias, rows), _of(residual, rows), made[:, rows]
            if shape is not None and part.scales is not None:
                cuda.gemv_int8(flat, part.data, part.scales, into, shape, bias=added, residual=behind, group=part.group)
                return
            lift = None if low_rank is None else low_rank._replace(lift=low_rank.lift[rows])
            linear.linear(
                flat,
                weights(part),
                added,
                up=up,
                low_rank=lift,
                gelu=gelu,
                fast=_of(fast, rows),
                blend=_of(blend, rows),
                residual=behind,
                out=into,
                rounded=self.rounded,
            )

        self.each_part(matrix, use)
        return made.view(*x.shape[:-1], -1)

    def linear_adapted(
        self,
        x: Tensor,
        matrix: Adapted,
        bias: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        gelu: bool,
        addend: Tensor | None,
    ) -> Tensor:
        if norm is not None:
            x = self.layer_norm(x, *norm)
        low_rank = self._at_hand(x, matrix)
        if low_rank is not None:
            return self._product(x, matrix.base, bias, low_rank=low_rank, gelu=gelu, residual=addend)
        out = self._product(x, matrix.base, bias)
        low = self._product(x, matrix.down).mul_(matrix.scale)
        made = out.view(-1, out.shape[-1])
        self._product(low, matrix.up, residual=made, out=made)
        if gelu:
            out = self.gelu(out)
        return out if addend is None else out + addend

    def _at_hand(self, x: Tensor, matrix: Adapted) -> LowRank | None:
        """What the adapter adds to a product with x, if it is in memory and small enough to go with the base's."""
        lift = matrix.up.resident()
        if (
            lift is None
            or len(lift) > 1
            or lift[0].scales is not None
            or matrix.down.resident() is None
            or matrix.down.shape[0] > linear.WIDEST_RANK
        ):
            return None
        low = self._product(x, matrix.down)
        self.each_part(matrix.up, lambda part: None)  # a use like any other, for whoever counts
        return LowRank(low.view(-1, low.shape[-1]), lift[0].data, matrix.scale)

    def swiglu_linear(
        self, gate: Tensor, up: Tensor, matrix: Matrix, blend: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        gated: tuple[Tensor, Tensor | None] = gate, up
        if gate[..., 0].numel() <= linear.FEW_ROWS and matrix.shape[0] > FEW_PROGRAMS:
            gated = elementwise.swiglu(gate, up), None
        if blend is None:
            return self._product(gated[0], matrix, up=gated[1])
        x, fast, share = blend
        return self._product(gated[0], matrix, up=gated[1], fast=fast, blend=share, residual=x)

    def geglu_linears(self, x: Tensor, gate: Matrix | Adapted, up: Matrix | Adapted) -> Tensor:
        if isinstance(gate, Adapted) or isinstance(up, Adapted):
            return elementwise.geglu(*self.linears(x, [gate, up]))
        pairs = _pairs(gate.resident(), up.resident())
        if pairs is None or x[..., 0].numel() > linear.FEW_ROWS:
            return elementwise.geglu(*self.linears(x, [gate, up]))
        flat = _rows(x)
        out = x.new_empty(flat.shape[0], gate.shape[0])

        def use(part: Part) -> None:
            linear.gated_linear(
                flat, weights(part), weights(pairs[part.start]), "gelu_tanh", out[:, part.start : part.stop]
            )

        self.each_part(gate, use)
        self.each_part(up, lambda part: None)
        return out.view(*x.shape[:-1], -1)

    def geglu(self, gate: Tensor, up: Tensor, quantile: float | None = None) -> Tensor:
        return elementwise.geglu(gate, up) if quantile is None else sparse.geglu(gate, up, quantile)

    def geglu_sparse(
        self, gate: Tensor, x: Tensor, up: Matrix | Adapted, down: Matrix | Adapted, quantile: float
    ) -> Tensor:
        """What the gate lets through is found once, on the device, and serves both matrices."""
        flat, share = _rows(x), NormalDist().cdf(-quantile)
        base, low_rank = (up.base, self._at_hand(x, up)) if isinstance(up, Adapted) else (up, None)
        down_base = down.base if isinstance(down, Adapted) else down
        if (
            flat.shape[0] > linear.FEW_ROWS
            or share > self.sparse_share
            or not down_base.transposed
            or base is not up
            and low_rank is None
        ):
            return super().geglu_sparse(gate, x, up, down, quantile)
        inner, alive = sparse.survivors(_rows(gate), quantile)

        def multiply(part: Part) -> None:
            added = None if low_rank is None else low_rank._replace(lift=low_rank.lift[part.start : part.stop])
            sparse.multiply(inner, alive, flat, weights(part), part.start, added)

        self.each_part(base, multiply)
        # Several rows have survivors of their own: read by those of all, a row's sums would depend on its neighbours.
        read = alive if flat.shape[0] == 1 else None
        out = x.new_empty(flat.shape[0], 1, down_base.shape[1])
        self.each_part(
            down_base,
            lambda part: linear_transposed(
                inner[:, None], weights(part), 1, down_base.shape[0], part.start, out, part.start > 0, read
            ),
        )
        made = out[:, 0]
        if isinstance(down, Adapted):
            low = self._product(inner, down.down).mul_(down.scale)
            self._product(low, down.up, residual=made, out=made)
        return made.view(*x.shape[:-1], -1)

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        out = x.new_empty(x.shape[0], matrix.shape[0])
        self.each_part(
            matrix,
            lambda part: linear.linear_heads(
                x, weights(part), matrix.shape[0], part.start, out=out[:, part.start : part.stop]
            ),
        )
        return out

    def linear_transposed(self, x: Tensor, matrix: Matrix) -> Tensor:
        return self.linear_transposed_heads(x[:, None], matrix)[:, 0]

    def linear_transposed_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        batch, heads, _ = x.shape
        out = x.new_empty(batch, heads, matrix.shape[1])
        self.each_part(
            matrix,
            lambda part: linear_transposed(
                x, weights(part), heads, matrix.shape[0], part.start, out, accumulate=part.start > 0
            ),
        )
        return out

    def whole(self, x: Tensor, matrix: Matrix) -> Weights:
        """A matrix for a kernel that reads it more than once: where it stays, or copied beside x as its parts pass by.

        int8 with a scale for each row, or floats.
        """
        held, shape = matrix.resident(), matrix.shape
        if held is not None and len(held) == 1 and held[0].group is None:
            self.each_part(matrix, lambda part: None)
            return weights(held[0])
        like = matrix.stored()
        by_row = like.scales is not None and like.scales.dim() == 1
        data = x.new_empty(shape, dtype=torch.float32 if like.scales is not None and not by_row else like.data.dtype)
        scales = x.new_empty(shape[0]) if by_row else None

        def use(part: Part) -> None:
            rows = slice(part.start, part.stop)
            data[rows].copy_(
                part.data if part.scales is None or by_row else dequantize(part.data, part.scales, part.group)
            )
            if scales is not None and part.scales is not None:
                scales[rows].copy_(part.scales)

        self.each_part(matrix, use)
        return Weights(data, scales)


def weights(part: Part) -> Weights:
    """A part as kernels take it."""
    return Weights(part.data, part.scales, part.group)


def _pairs(gate: Sequence[Part] | None, up: Sequence[Part] | None) -> dict[int, Part] | None:
    """Parts of `up` by the first row of the gate's part that each goes with, None if they do not fit."""
    if gate is None or up is None or [_kind(part) for part in gate] != [_kind(part) for part in up]:
        return None
    return {part.start: part for part in up}


def _kind(part: Part) -> tuple[int, int, torch.dtype, bool, int | None]:
    return part.start, part.stop, part.data.dtype, part.scales is None, part.group


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    """The last axis' entries for rows of a matrix."""
    return None if x is None else x[..., rows]
