"""Products with int8 or float weights, with what often follows them: bias, gated activation, blend, residual.

w [R, C]; int8 rows carry float32 scales [R], or [R, ceil(C / group)]. Two kernels: one streams the weights through the
ordinary cores for few rows of activations, where reading them is all that takes time; one uses tensor cores.
"""

from math import prod
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import capability, gelu_tanh, precision, product, silu

FEW_ROWS = 8  # of activations, at most, for the streaming kernel


class Tile(NamedTuple):
    """Sizes of one program: rows of activations, rows and columns of weights; warps and stages of loads."""

    batch: int
    rows: int
    columns: int
    warps: int
    stages: int = 1


def streaming(batch: int, card: int) -> bool:
    """Whether the streaming kernel is for `batch` rows of activations.

    On cards whose memory outruns their ordinary cores from five rows on (A100, H100, H200), up to four.
    """
    return batch <= (4 if card in (80, 90) else FEW_ROWS)


def gemv_tile(batch: int, columns: int, group: int | None) -> Tile:
    """The streaming kernel's tile: as many columns as keep 16 to 32 accumulators a thread."""
    batch = triton.next_power_of_2(min(batch, FEW_ROWS))
    width = max(min(triton.next_power_of_2(columns), 1024 if batch < 4 else 256), group or 16)
    rows = max(1, 4096 // (width * batch))
    return Tile(batch, min(rows, 64), width, 4)


def gemm_tile(batch: int, how: str, card: int, gated: bool, group: int | None) -> Tile:
    """The tensor-core kernel's tile where products go by `precision` `how`."""
    columns = min(64, group or 64)
    if how == "ieee":
        return Tile(16 if batch <= 16 or gated else 32, 32 if gated else 64, 16, 4, 1)
    if how == "tf32x3":
        return Tile(16 if batch <= 16 or gated else 32, 32 if gated else 64, min(32, columns), 4, 2)
    if batch <= 16:
        return Tile(8 if batch <= 8 else 16, 32, columns, 2 if batch <= 8 else 4, 4)
    if batch <= 32 or how == "split":  # three terms of the activations want registers
        return Tile(16 if gated else 32, 64, columns, 4, 3)
    return Tile(64, 128, columns, 8, 3) if card >= 90 and not gated else Tile(64, 64, columns, 4, 3)


@triton.jit
def _finish(acc, up, b, r, inside, bias, fast, blend, residual, out, fast_row, residual_row, out_row, rows,
            ACTIVATION: tl.constexpr):
    """Writes acc and what is made of it to rows b and columns r of out; b and r broadcast to acc's shape."""
    if bias is not None:
        acc += tl.load(bias + r, mask=r < rows, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        acc = silu(acc) * up
    elif ACTIVATION == "gelu_tanh":
        acc = gelu_tanh(acc) * up
    b = b.to(tl.int64)
    if fast is not None:
        start = tl.load(fast + b * fast_row + r, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(tl.load(blend + r, mask=r < rows, other=0.0).to(tl.float32))
        acc = start + share * (acc - start)
    if residual is not None:
        acc += tl.load(residual + b * residual_row + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * out_row + r, acc, mask=inside)


@triton.jit
def _gemv(x, w, scales, w_up, scales_up, bias, fast, blend, residual, out, batch, rows, columns, first, per_head,
          x_row, x_head, w_row, scales_row, up_row, scales_up_row, fast_row, residual_row, out_row,
          ACTIVATION: tl.constexpr, HEADS: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
          GROUPS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr):
    # Tiles are [batch, rows, groups, columns of a group]; without scales by group there is one group.
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None, None, None]
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None, None]
    g = tl.arange(0, GROUPS)[None, None, :, None]
    k = g * GROUP + tl.arange(0, GROUP)[None, None, None, :]
    x_at = x + b.to(tl.int64) * x_row
    if HEADS:
        x_at += ((first + r) // per_head) * x_head
    far = r.to(tl.int64)
    acc = tl.zeros([BATCH, ROWS, GROUPS, GROUP], tl.float32)
    up = tl.zeros([BATCH, ROWS, GROUPS, GROUP], tl.float32) if ACTIVATION is not None else None
    for start in range(0, columns, GROUPS * GROUP):
        seen = start + k < columns
        held = seen & (r < rows)
        known = (r < rows) & (start + g * GROUP < columns)
        if HEADS:
            values = tl.load(x_at + start + k, mask=held & (b < batch), other=0.0).to(tl.float32)
        else:
            values = tl.load(x_at + start + k, mask=seen & (b < batch), other=0.0).to(tl.float32)
        weights = tl.load(w + far * w_row + start + k, mask=held, other=0).to(tl.float32)
        if GROUPED:
            weights *= tl.load(scales + far * scales_row + start // GROUP + g, mask=known, other=0.0)
        acc += weights * values
        if ACTIVATION is not None:
            weights = tl.load(w_up + far * up_row + start + k, mask=held, other=0).to(tl.float32)
            if GROUPED:
                weights *= tl.load(scales_up + far * scales_up_row + start // GROUP + g, mask=known, other=0.0)
            up += weights * values
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)[:, None]
    total = tl.sum(tl.sum(acc, axis=3), axis=2)
    total_up = tl.sum(tl.sum(up, axis=3), axis=2) if ACTIVATION is not None else None
    if scales is not None and not GROUPED:
        total *= tl.load(scales + r, mask=r < rows, other=0.0)
        if ACTIVATION is not None:
            total_up *= tl.load(scales_up + r, mask=r < rows, other=0.0)
    _finish(total, total_up, b, r, (b < batch) & (r < rows), bias, fast, blend, residual, out, fast_row, residual_row,
            out_row, rows, ACTIVATION)


@triton.jit
def _gemm(x, w, scales, w_up, scales_up, bias, fast, blend, residual, out, batch, rows, columns,
          x_row, w_row, scales_row, up_row, scales_up_row, fast_row, residual_row, out_row,
          ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    # Weights are the left operand: they are widened in registers, where tensor cores take that operand from.
    b = tl.program_id(0) * BATCH + tl.arange(0, BATCH)[None, :]
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    far = r.to(tl.int64)
    across, down = tl.arange(0, COLUMNS)[None, :], tl.arange(0, COLUMNS)[:, None]
    x_at = x + b.to(tl.int64) * x_row + down
    w_at = w + far * w_row + across
    acc = tl.zeros([ROWS, BATCH], tl.float32)
    up = tl.zeros([ROWS, BATCH], tl.float32) if ACTIVATION is not None else None
    for start in range(0, columns, COLUMNS):
        values = tl.load(x_at + start, mask=(start + down < columns) & (b < batch), other=0.0)
        held = (start + across < columns) & (r < rows)
        weights = tl.load(w_at + start, mask=held, other=0)
        if GROUP is None:
            acc = product(weights, values, acc, PRECISION)
        else:
            scale = tl.load(scales + far * scales_row + start // GROUP, mask=r < rows, other=0.0)
            acc += scale * product(weights, values, tl.zeros([ROWS, BATCH], tl.float32), PRECISION)
        if ACTIVATION is not None:
            weights = tl.load(w_up + far * up_row + across + start, mask=held, other=0)
            if GROUP is None:
                up = product(weights, values, up, PRECISION)
            else:
                scale = tl.load(scales_up + far * scales_up_row + start // GROUP, mask=r < rows, other=0.0)
                up += scale * product(weights, values, tl.zeros([ROWS, BATCH], tl.float32), PRECISION)
    if scales is not None and GROUP is None:
        acc *= tl.load(scales + r, mask=r < rows, other=0.0)
        if ACTIVATION is not None:
            up *= tl.load(scales_up + r, mask=r < rows, other=0.0)
    _finish(acc, up, b, r, (b < batch) & (r < rows), bias, fast, blend, residual, out, fast_row, residual_row, out_row,
            rows, ACTIVATION)


class Weights(NamedTuple):
    """Rows of a matrix [R, C]: floats, or int8 with float32 scales [R] or [R, ceil(C / group)]."""

    data: Tensor
    scales: Tensor | None = None
    group: int | None = None


def linear(x: Tensor, w: Weights, bias: Tensor | None = None, *, fast: Tensor | None = None,
           blend: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [..., C] times the transpose of w [R, C], plus bias [R]: [..., R] of x's type.

    fast [..., R] with blend [R]: the product p becomes fast + sigmoid(blend) (p - fast), HIM's mix of two speeds.
    residual [..., R] is added last. out: where to write, [n, R] with any row stride, n being all rows of x.
    """
    return _launch(x, w, None, bias, None, fast, blend, residual, out)


def gated_linear(x: Tensor, gate: Weights, up: Weights, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """activation(x gateᵀ) * (x upᵀ) in one pass, activation "silu" (SwiGLU) or "gelu_tanh" (GeGLU): [..., R].

    gate and up [R, C] are stored alike: of one type, and both with scales a row or both with scales by group.
    """
    return _launch(x, gate, up, None, activation, None, None, None, out)


def linear_heads(x: Tensor, w: Weights, rows: int, first: int = 0, out: Tensor | None = None) -> Tensor:
    """Each head's features through its own rows: x [B, H, C], w rows [first, first + n) of [rows, C] -> [B, n]."""
    x, data = _contiguous(x), _contiguous(w.data)
    batch, heads, columns = x.shape
    out = x.new_empty(batch, data.shape[0]) if out is None else out
    tile = gemv_tile(batch, columns, _group(w))
    _gemv[triton.cdiv(data.shape[0], tile.rows), triton.cdiv(batch, tile.batch)](
        x, data, w.scales, None, None, None, None, None, None, out, batch, data.shape[0], columns, first,
        rows // heads, x.stride(0), x.stride(1), data.stride(0), _stride(w.scales), 0, 0, 0, 0, out.stride(0),
        ACTIVATION=None, HEADS=True, **_streaming_sizes(tile, _group(w)))
    return out


def _launch(x: Tensor, w: Weights, w_up: Weights | None, bias: Tensor | None, activation: str | None,
            fast: Tensor | None, blend: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Tensor:
    rows, columns = w.data.shape
    lead = x.shape[:-1]
    batch = prod(lead)
    made = x.new_empty(batch, rows) if out is None else out
    if batch * rows:
        _run(_matrix(x, batch), w, w_up, bias, activation, _matrix(fast, batch), blend, _matrix(residual, batch), made)
    return made.view(*lead, rows) if out is None else out


def _run(x: Tensor, w: Weights, w_up: Weights | None, bias: Tensor | None, activation: str | None, fast: Tensor | None,
         blend: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    batch, columns = x.shape
    data, up, group = _contiguous(w.data), None if w_up is None else _contiguous(w_up.data), _group(w)
    rows, card = data.shape[0], capability(x)
    scales_up = None if w_up is None else w_up.scales
    operands = (x, data, w.scales, up, scales_up, bias, fast, blend, residual, out, batch, rows, columns)
    strides = (data.stride(0), _stride(w.scales), _stride(up), _stride(scales_up), _stride(fast), _stride(residual),
               out.stride(0))
    if streaming(batch, card):
        tile = gemv_tile(batch, columns, group)
        _gemv[triton.cdiv(rows, tile.rows), triton.cdiv(batch, tile.batch)](
            *operands, 0, 1, x.stride(0), 0, *strides, ACTIVATION=activation, HEADS=False,
            **_streaming_sizes(tile, group))
        return
    how = precision(x.dtype, data.dtype, card)
    tile = gemm_tile(batch, how, card, up is not None, group)
    _gemm[triton.cdiv(batch, tile.batch), triton.cdiv(rows, tile.rows)](
        *operands, x.stride(0), *strides, ACTIVATION=activation, PRECISION=how, BATCH=tile.batch, ROWS=tile.rows,
        COLUMNS=tile.columns, GROUP=group, num_warps=tile.warps, num_stages=tile.stages)


def _streaming_sizes(tile: Tile, group: int | None) -> dict:
    width = group or tile.columns
    return {"BATCH": tile.batch, "ROWS": tile.rows, "GROUPS": tile.columns // width, "GROUP": width,
            "GROUPED": group is not None, "num_warps": tile.warps, "num_stages": tile.stages}


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


def _matrix(x: Tensor | None, rows: int) -> Tensor | None:
    return None if x is None else _contiguous(x if x.dim() == 2 else x.reshape(rows, x.shape[-1]))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
