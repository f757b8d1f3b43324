"""Products whose input lies in up to three places, with a GRU's gates behind them as in ../tier_cell.py, and the norm
of such an input as in ../norm.py.

Products are for few rows of activations: the weights stream through the ordinary cores once.
"""

from collections.abc import Sequence
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS, capability, tanh
from thl_engine.kernels.triton.linear import Tile, Weights

PLACES = 3  # at most, that an input lies in


def joined_tile(batch: int, widths: Sequence[int]) -> Tile:
    """Columns that divide all places' widths if 128 to 1024 do; rows for 16 bytes of int8 weights a thread.

    768 rows of 3 x 768 columns: tiles of 4 x 256 in 192 programs. Pages of 8 MiB with 36,864 columns have 227 rows:
    tiles of 2 x 1024 in 114 programs.
    """
    batch = triton.next_power_of_2(batch)
    common = gcd(*widths)
    columns = next((n for n in (1024, 512, 256, 128) if common % n == 0), 256)
    elements = max(columns, 2048 if sum(widths) > 8192 else 1024)
    return Tile(batch, elements // columns, columns, max(elements // 512, elements * batch // 2048))


@triton.jit
def _place(
    acc,
    x,
    addend,
    x_row,
    addend_row,
    w,
    scales,
    first,
    width,
    group,
    n,
    r,
    batch,
    rows,
    w_row,
    scales_row,
    GROUPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """acc [BATCH, ROWS, COLUMNS] and the products of one place with the columns of w from `first`."""
    for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
        c = start + tl.arange(0, COLUMNS)[None, None, :]
        values = tl.load(x + n * x_row + c, mask=(n < batch) & (c < width), other=0.0).to(tl.float32)
        if addend is not None:
            values += tl.load(addend + n * addend_row + c, mask=(n < batch) & (c < width), other=0.0).to(tl.float32)
        inside = (r < rows) & (c < width)
        weights = tl.load(w + r * w_row + first + c, mask=inside, other=0).to(tl.float32)
        if GROUPED:
            weights *= tl.load(scales + r * scales_row + (first + c) // group, mask=inside, other=0.0)
        acc += weights * values
    return acc


@triton.jit
def _joined(
    x,
    y,
    z,
    addend,
    w,
    scales,
    bias,
    gate,
    state,
    out,
    batch,
    rows,
    x_width,
    y_width,
    z_width,
    group,
    x_row,
    y_row,
    z_row,
    addend_row,
    w_row,
    scales_row,
    gate_row,
    state_row,
    out_row,
    GROUPED: tl.constexpr,
    GATE: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.arange(0, BATCH)[:, None, None].to(tl.int64)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]).to(tl.int64)
    acc = tl.zeros([BATCH, ROWS, COLUMNS], tl.float32)
    acc = _place(
        acc,
        x,
        None,
        x_row,
        0,
        w,
        scales,
        0,
        x_width,
        group,
        n,
        r,
        batch,
        rows,
        w_row,
        scales_row,
        GROUPED,
        COLUMNS,
        STAGES,
    )
    if y is not None:
        acc = _place(
            acc,
            y,
            None,
            y_row,
            0,
            w,
            scales,
            x_width,
            y_width,
            group,
            n,
            r,
            batch,
            rows,
            w_row,
            scales_row,
            GROUPED,
            COLUMNS,
            STAGES,
        )
    if z is not None:
        acc = _place(
            acc,
            z,
            addend,
            z_row,
            addend_row,
            w,
            scales,
            x_width + y_width,
            z_width,
            group,
            n,
            r,
            batch,
            rows,
            w_row,
            scales_row,
            GROUPED,
            COLUMNS,
            STAGES,
        )
    n = tl.arange(0, BATCH)[:, None].to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = (n < batch) & (r < rows)
    total = tl.sum(acc, axis=2)
    if scales is not None and not GROUPED:
        total *= tl.load(scales + r, mask=r < rows, other=0.0)
    if bias is not None:
        total += tl.load(bias + r, mask=r < rows, other=0.0)
    if GATE == "update":
        total = tl.sigmoid(total)
    elif GATE == "reset":
        total = tl.sigmoid(total) * tl.load(state + n * state_row + r, mask=inside, other=0.0).to(tl.float32)
    elif GATE == "candidate":
        share = tl.load(gate + n * gate_row + r, mask=inside, other=0.0)
        old = tl.load(state + n * state_row + r, mask=inside, other=0.0).to(tl.float32)
        total = (1.0 - share) * old + share * tanh(total)
    tl.store(out + n * out_row + r, total, mask=inside)


@triton.jit
def _summed(total, x, width, mean, SQUARED: tl.constexpr, WIDTH: tl.constexpr):
    """total [WIDTH] and a place's features, less the mean and SQUARED."""
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        values = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
        total += tl.where(d < width, (values - mean) * (values - mean), 0.0) if SQUARED else values
    return total


@triton.jit
def _scaled(x, width, mean, factor, weight, bias, out, WIDTH: tl.constexpr):
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        values = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32)
        scale, shift = tl.load(weight + d, mask=d < width, other=0.0), tl.load(bias + d, mask=d < width, other=0.0)
        tl.store(out + d, (values - mean) * factor * scale + shift, mask=d < width)


@triton.jit
def _joined_norm(
    x, y, z, weight, bias, out, x_width, y_width, z_width, x_row, y_row, z_row, out_row, eps, WIDTH: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    width = x_width + y_width + z_width
    zero = tl.zeros([WIDTH], tl.float32)
    total = _summed(zero, x + n * x_row, x_width, 0.0, False, WIDTH)
    if y is not None:
        total = _summed(total, y + n * y_row, y_width, 0.0, False, WIDTH)
    if z is not None:
        total = _summed(total, z + n * z_row, z_width, 0.0, False, WIDTH)
    mean = tl.sum(total, axis=0) / width
    total = _summed(zero, x + n * x_row, x_width, mean, True, WIDTH)
    if y is not None:
        total = _summed(total, y + n * y_row, y_width, mean, True, WIDTH)
    if z is not None:
        total = _summed(total, z + n * z_row, z_width, mean, True, WIDTH)
    factor = 1.0 / tl.sqrt_rn(tl.sum(total, axis=0) / width + eps)
    out += n * out_row
    _scaled(x + n * x_row, x_width, mean, factor, weight, bias, out, WIDTH)
    if y is not None:
        _scaled(y + n * y_row, y_width, mean, factor, weight + x_width, bias + x_width, out + x_width, WIDTH)
    if z is not None:
        first = x_width + y_width
        _scaled(z + n * z_row, z_width, mean, factor, weight + first, bias + first, out + first, WIDTH)


def joined_layer_norm(places: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` of up to three places [B, C_i], joined: [B, sum of C_i]."""
    batch, widths = places[0].shape[0], [x.shape[1] for x in places]
    out = places[0].new_empty(batch, sum(widths))
    rest = PLACES - len(places)
    given: list[Tensor | None] = [*map(_rows, places), *[None] * rest]
    size = min(max(triton.next_power_of_2(max(widths)), 128), 2048)
    _joined_norm[(batch,)](
        *given,
        weight,
        bias,
        out,
        *widths,
        *[0] * rest,
        *map(_stride, (*given, out)),
        eps,
        WIDTH=size,
        num_warps=max(size // 256, 1),
    )
    return out


def joined_linear(
    places: Sequence[Tensor],
    w: Weights,
    bias: Tensor | None,
    out: Tensor,
    *,
    addend: Tensor | None = None,
    gate: str | None = None,
    update: Tensor | None = None,
    state: Tensor | None = None,
) -> None:
    """out [B, R] = the product of the places [B, C_i], joined, with w [R, sum of C_i], plus bias; B at most 64.

    addend [B, C]: added to the last of three places. gate: None; "update", its sigmoid; "reset", its sigmoid times
    state [B, R]; "candidate", the next state by tanh of it with the gate `update` [B, R], for which out may be state.
    """
    batch, widths = places[0].shape[0], [x.shape[1] for x in places]
    data = _rows(w.data)
    rows, tile = data.shape[0], joined_tile(batch, widths)
    stages = 3 if tile.batch < 8 or capability(data) in (80, 90) else 2  # others have 99 KiB of shared memory
    grouped = w.scales is not None and w.scales.dim() == 2
    given: list[Tensor | None] = [*map(_rows, places), *[None] * (PLACES - len(places))]
    addend = None if addend is None else _rows(addend)
    _joined[(triton.cdiv(rows, tile.rows),)](
        *given,
        addend,
        data,
        w.scales,
        bias,
        update,
        state,
        out,
        batch,
        rows,
        *widths,
        *[0] * (PLACES - len(widths)),
        w.group or 1,
        *map(_stride, (*given, addend, data, w.scales, update, state, out)),
        GROUPED=grouped,
        GATE=gate,
        BATCH=tile.batch,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STAGES=stages,
        num_warps=tile.warps,
        ptx_options=ALL_REGISTERS,
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
