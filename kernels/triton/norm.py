"""Normalisations over the last axis, with the residual sum before them; references in ../norm.py."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # features of a row, which one program holds


@triton.jit
def _norm(
    x,
    addend,
    weight,
    bias,
    out,
    total,
    behind,
    second,
    width,
    eps,
    scale,
    x_row,
    addend_row,
    behind_row,
    second_row,
    CENTRE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < width
    values = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    if addend is not None:
        values += tl.load(addend + row * addend_row + d, mask=inside, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + row * width + d, values, mask=inside)
    if CENTRE:
        values = tl.where(inside, values - tl.sum(values, axis=0) / width, 0.0)
    values *= tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps))
    if weight is not None:
        values *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if behind is not None:
        values += tl.load(behind + row * behind_row + d, mask=inside, other=0.0).to(tl.float32)
        if second is not None:
            values += tl.load(second + row * second_row + d, mask=inside, other=0.0).to(tl.float32)
        values *= scale
    tl.store(out + row * width + d, values, mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As the reference, of x [..., D] and in its type; sums are float32."""
    return _launch(x, None, weight, bias, eps, True)[0]


def add_layer_norm(x: Tensor, addend: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + addend, both [..., D], and that sum, which the residual stream goes on with."""
    out, total = _launch(x, addend, weight, bias, eps, True, keep=True)
    assert total is not None  # kept
    return out, total


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As the reference, of x [..., D] and in its type; sums are float32."""
    return _launch(x, None, weight, None, eps, False)[0]


def add_rms_norm(x: Tensor, addend: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As the reference: `rms_norm` of x + addend, both [..., D]."""
    return _launch(x, addend, weight, None, eps, False)[0]


def rms_norm_add(
    x: Tensor, weight: Tensor | None, eps: float, addend: Tensor, second: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """(addend + `rms_norm` of x + second) * scale, all [..., D]: a residual sum behind the normalisation."""
    return _launch(x, None, weight, None, eps, False, behind=addend, second=second, scale=scale)[0]


def _launch(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    *,
    keep: bool = False,
    behind: Tensor | None = None,
    second: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    width, rows = x.shape[-1], prod(x.shape[:-1])
    check_width(width)
    out, total = x.new_empty(x.shape), x.new_empty(x.shape) if keep else None
    if not out.numel():
        return out, total
    flat, added, behind, second = (None if t is None else _rows(t, rows) for t in (x, addend, behind, second))
    size = triton.next_power_of_2(width)
    _norm[(rows,)](
        flat,
        added,
        weight,
        bias,
        out,
        total,
        behind,
        second,
        width,
        eps,
        scale,
        *(0 if t is None else t.stride(0) for t in (flat, added, behind, second)),
        CENTRE=centre,
        WIDTH=size,
        num_warps=min(max(size // 512, 1), 32),
    )
    return out, total


def check_width(width: int) -> None:
    """Raises ValueError for rows that one program cannot hold."""
    if width > WIDEST:
        raise ValueError(f"norm: expected at most {WIDEST} features, found {width}")


def _rows(x: Tensor, rows: int) -> Tensor:
    flat = x.reshape(rows, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
