"""Products with int8 or float weights, with what often stands around them: SwiGLU before; bias, a low-rank addition,
activation, blend and residual after.

w [R, C]; int8 rows carry float32 scales [R], or [R, ceil(C / group)]. Two kernels: one streams the weights through the
ordinary cores for few rows of activations, where reading them is all that takes time; one uses tensor cores.
"""

from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS, INTERPRETED, capability, precision
from thl_engine.kernels.triton.elementwise import swiglu
from thl_engine.kernels.triton.linear_streaming import gemv
from thl_engine.kernels.triton.linear_tiled import gemm, quantize_activations

FEW_ROWS = 8  # of activations, at most, for the streaming kernel
PROGRAMS = 512  # of the streaming kernel, to be more than the multiprocessors of any card can hold in one go
WIDEST_RANK = 64  # of a low-rank addition that goes with the product


class Tile(NamedTuple):
    """Sizes of one program: rows of activations, rows and columns of weights; warps and stages of loads.

    fold: rows of weights that the streaming kernel takes as one tile.
    """

    batch: int
    rows: int
    columns: int
    warps: int
    stages: int = 1
    fold: int = 1


def gemv_tile(batch: int, rows: int, columns: int, itemsize: int, gated: bool = False) -> tuple[Tile, int]:
    """The streaming kernel's tile, and neighbouring columns that a thread takes of weights of `itemsize` bytes.

    Loads of activations come from the first cache, whose lines each warp's load touches all: `span` keeps their share
    of its time below weights'. Only sizes of columns, batch and type decide in which order a row's products are added.
    """
    batch = min(batch, FEW_ROWS)
    span = max(4, min(16 // itemsize, 16 if batch == 1 else 8 if batch <= 4 else 4))
    lanes = min(max(triton.next_power_of_2(-(-columns // span)), 32), 128)
    if INTERPRETED.value:
        return Tile(batch, 64, lanes * span, lanes // 32, fold=64), span
    held = (4 if batch <= 2 or itemsize > 1 else 8) // (2 if gated else 1)
    while held > 1 and rows < held * PROGRAMS:
        held //= 2
    return Tile(batch, held, lanes * span, lanes // 32), span


def gemm_tile(batch: int, how: str, card: int, gated: bool, group: int | None) -> Tile:
    """The tensor-core kernel's tile where products go by `precision` `how`."""
    columns = min(64, group or 64)
    if how == "ieee":
        return Tile(16 if batch <= 16 or gated else 32, 32 if gated else 64, 16, 4, 1)
    if how == "tf32x3":
        return Tile(16 if batch <= 16 or gated else 32, 32 if gated else 64, min(32, columns), 4, 2)
    if batch <= 16:
        return Tile(16, 32, columns, 4, 4)
    if batch <= 32 or how == "split":  # three terms of the activations want registers
        return Tile(16 if gated else 32, 64, columns, 4, 3)
    return Tile(64, 128, columns, 8, 3) if 90 <= card < 120 and not gated else Tile(64, 64, columns, 4, 3)


class Weights(NamedTuple):
    """Rows of a matrix [R, C]: floats, or int8 with float32 scales [R] or [R, ceil(C / group)]."""

    data: Tensor
    scales: Tensor | None = None
    group: int | None = None


class LowRank(NamedTuple):
    """What an adapter adds to a product: factor times low [..., r] times the transpose of lift [R, r]."""

    low: Tensor
    lift: Tensor
    factor: float


def linear(
    x: Tensor,
    w: Weights,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    low_rank: LowRank | None = None,
    gelu: bool = False,
    fast: Tensor | None = None,
    blend: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """x [..., C] times the transpose of w [R, C], plus bias [R]: [..., R] of x's type.

    up [..., C]: the product is of silu(x) * up. low_rank: of rank WIDEST_RANK at most, added. gelu: by the normal
    distribution function, after that. fast [..., R] with blend [R]: then p becomes fast + sigmoid(blend) (p - fast),
    HIM's mix of two speeds. residual [..., R] is added last. out: where to write, [n, R] with any row stride, n being
    all rows of x; it may be the residual. rounded: more than FEW_ROWS rows of x may be rounded to int8 where w is int8
    and the card can multiply these; not the default, since the result is then no longer that of other backends.
    """
    return _launch(
        x,
        w,
        bias=bias,
        x_up=up,
        low_rank=low_rank,
        activation="gelu" if gelu else None,
        fast=fast,
        blend=blend,
        residual=residual,
        out=out,
        rounded=rounded,
    )


def gated_linear(x: Tensor, gate: Weights, up: Weights, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """activation(x gateᵀ) * (x upᵀ) in one pass, activation "silu" (SwiGLU) or "gelu_tanh" (GeGLU): [..., R].

    gate and up [R, C] are stored alike: of one type, and both with scales a row or both with scales by group. For up to
    FEW_ROWS rows of x, the bits are those of two products and the activation.
    """
    return _launch(x, gate, w_up=up, activation=activation, out=out)


def linear_heads(x: Tensor, w: Weights, rows: int, first: int = 0, out: Tensor | None = None) -> Tensor:
    """Each head's features through its own rows: x [B, H, C], w rows [first, first + n) of [rows, C] -> [B, n]."""
    x, data = _contiguous(x), _contiguous(w.data)
    out = x.new_empty(x.shape[0], data.shape[0]) if out is None else out
    if out.numel():
        _stream(x, data, w, _Around(), out, per_head=rows // x.shape[1], first=first)
    return out


class _Around(NamedTuple):
    """What goes with a product; activations [n, ...]."""

    w_up: Weights | None = None
    x_up: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None
    lift: Tensor | None = None
    factor: float = 0.0
    activation: str | None = None
    fast: Tensor | None = None
    blend: Tensor | None = None
    residual: Tensor | None = None
    rounded: bool = False


def _launch(
    x: Tensor,
    w: Weights,
    *,
    out: Tensor | None,
    low_rank: LowRank | None = None,
    x_up: Tensor | None = None,
    fast: Tensor | None = None,
    residual: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    rows, lead = w.data.shape[0], x.shape[:-1]
    batch = prod(lead)
    made = x.new_empty(batch, rows) if out is None else out
    if batch * rows:
        if low_rank is not None:
            rest |= {"low": _matrix(low_rank.low, batch), "lift": _contiguous(low_rank.lift), "factor": low_rank.factor}
        around = _Around(
            x_up=_matrix(x_up, batch), fast=_matrix(fast, batch), residual=_matrix(residual, batch), **rest
        )
        (_stream if batch <= FEW_ROWS else _tile)(_flat(x, batch), _contiguous(w.data), w, around, made)
    return made.view(*lead, rows) if out is None else out


def _operands(data: Tensor, w: Weights, a: _Around, out: Tensor) -> tuple[list[Tensor | float | None], list[int], int]:
    """What both kernels take after x: tensors, strides of rows, and the rank."""
    up, scales_up = (None, None) if a.w_up is None else (_contiguous(a.w_up.data), a.w_up.scales)
    tensors = [a.x_up, data, w.scales, up, scales_up, a.bias, a.low, a.lift, a.fast, a.blend, a.residual, out, a.factor]
    strides = [_stride(t) for t in (a.x_up, data, w.scales, up, scales_up, a.low, a.lift, a.fast, a.residual, out)]
    return tensors, strides, 0 if a.lift is None else a.lift.shape[1]


def _stream(x: Tensor, data: Tensor, w: Weights, a: _Around, out: Tensor, per_head: int = 1, first: int = 0) -> None:
    """x [n, C], or [B, H, C] of which rows of w take their head's."""
    (batch, columns), rows = (x.shape[0], x.shape[-1]), data.shape[0]
    tile, span = gemv_tile(batch, rows, columns, data.itemsize, a.w_up is not None)
    tensors, strides, rank = _operands(data, w, a, out)
    gemv[triton.cdiv(rows, tile.rows), triton.cdiv(batch, tile.batch)](
        x,
        *tensors,
        batch,
        rows,
        columns,
        first,
        per_head,
        rank,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        *strides,
        ACTIVATION=a.activation,
        GATED=a.w_up is not None,
        HEADS=x.dim() == 3,
        BATCH=tile.batch,
        PADDED=triton.next_power_of_2(tile.batch),
        ROWS=tile.rows // tile.fold,
        FOLD=tile.fold,
        LANES=tile.columns // span,
        SPAN=span,
        GROUP=_group(w),
        RANK=triton.next_power_of_2(max(rank, 1)),
        EVEN=columns % tile.columns == 0,
        num_warps=tile.warps,
        ptx_options=ALL_REGISTERS if tile.batch > 4 else None,
    )


def _tile(x: Tensor, data: Tensor, w: Weights, a: _Around, out: Tensor) -> None:
    (batch, columns), rows, card = x.shape, data.shape[0], capability(x)
    how, group, x_scales = precision(x.dtype, data.dtype, card), _group(w), None
    if a.rounded and data.dtype == torch.int8 and card >= 80 and (group or 32) >= 32:
        if a.x_up is not None:
            x, a = swiglu(x, a.x_up), a._replace(x_up=None)
        how, (x, x_scales) = "int8", quantize_activations(x)
    tile = gemm_tile(batch, how, card, a.w_up is not None, group)
    tensors, strides, rank = _operands(data, w, a, out)
    gemm[triton.cdiv(batch, tile.batch), triton.cdiv(rows, tile.rows)](
        x,
        x_scales,
        *tensors,
        batch,
        rows,
        columns,
        rank,
        x.stride(0),
        *strides,
        ACTIVATION=a.activation,
        GATED=a.w_up is not None,
        PRECISION=how,
        BATCH=tile.batch,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GROUP=group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        ptx_options=ALL_REGISTERS if how == "ieee" else None,
    )


def _group(w: Weights) -> int | None:
    """Columns that share a scale, None where a row does. Raises ValueError on sizes that tiles do not divide."""
    if w.scales is None or w.scales.dim() == 1:
        return None
    if w.group not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"group: expected a power of two from 16 to 1024, found {w.group}")
    return w.group


def _contiguous(x: Tensor) -> Tensor:
    """x with a contiguous last axis; its rows may lie anywhere."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flat(x: Tensor, rows: int) -> Tensor:
    return _contiguous(x if x.dim() == 2 else x.reshape(rows, x.shape[-1]))


def _matrix(x: Tensor | None, rows: int) -> Tensor | None:
    return None if x is None else _flat(x, rows)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
