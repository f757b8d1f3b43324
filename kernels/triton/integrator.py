"""INL's integrator with all steps in one launch; the rule and the reference are in ../integrator.py.

A program moves a few rows. Its positions and velocities stay in the output, which the cache holds, because a row's
features do not fit in registers; the hidden layer does. Each row stops by itself, and the program with its last row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thl_engine.kernels.integrator import DT, FIRST_CHECK, Integration
from thl_engine.kernels.triton.arithmetic import ALL_REGISTERS, capability, product, softplus
from thl_engine.kernels.triton.linear import Weights

ROWS = 16  # of a program: the least that tensor cores multiply
WIDEST = 64  # units of the controller's hidden layer, at most: as many as published models have


@triton.jit
def _inner(
    at,
    n,
    rows,
    width,
    w,
    w_row,
    c,
    units,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Rows n of features at `at` times the transpose of w [units, width]: [HIDDEN, ROWS]."""
    acc = tl.zeros([HIDDEN, ROWS], tl.float32)
    for start in range(0, width, FEATURES):
        across, down = start + tl.arange(0, FEATURES)[None, :], start + tl.arange(0, FEATURES)[:, None]
        values = tl.load(at + down, mask=(down < width) & (n < rows), other=0.0)
        weights = tl.load(w + c * w_row + across, mask=(c < units) & (across < width), other=0)
        acc = product(weights, values, acc, PRECISION)
    return acc


@triton.jit
def _third(
    hidden,
    w,
    scales,
    bias,
    third,
    d,
    width,
    w_row,
    units,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One third of the controller's output, for features d: [FEATURES, ROWS]."""
    c = tl.arange(0, HIDDEN)[None, :]
    row = third * width + d
    weights = tl.load(w + row[:, None] * w_row + c, mask=(d < width)[:, None] & (c < units), other=0)
    out = product(weights, hidden, tl.zeros([FEATURES, ROWS], tl.float32), PRECISION)
    if scales is not None:
        out *= tl.load(scales + row, mask=d < width, other=0.0)[:, None]
    return out + tl.load(bias + row, mask=d < width, other=0.0)[:, None]


@triton.jit(do_not_specialize=["steps", "others"])
def _integrate(
    x,
    context,
    w1,
    scales1,
    bias1,
    w2,
    scales2,
    bias2,
    mu,
    xs,
    vs,
    iterations,
    made,
    rows,
    width,
    units,
    x_row,
    context_row,
    w1_row,
    w2_row,
    steps,
    threshold,
    others,
    DT: tl.constexpr,
    FIRST_CHECK: tl.constexpr,
    STOPS: tl.constexpr,
    FREEZES: tl.constexpr,
    GOES_ON: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """STOPS: until all rows have converged, and rows that have rest if FREEZES. GOES_ON: from the step that `made`
    tells for this program to the latest of all `others` programs', as when every row waits for the last one."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    c = tl.arange(0, HIDDEN)[:, None]
    far = n.to(tl.int64)
    # What the context adds to the hidden layer stays the same.
    fixed = _inner(context + far * context_row, n, rows, width, w1, w1_row, c, units, HIDDEN, PRECISION, ROWS, FEATURES)
    first = tl.zeros([1, ROWS], tl.int32)
    t = 0
    if GOES_ON:
        t = tl.load(made + tl.program_id(0))
        o = tl.arange(0, OTHERS)
        steps = tl.max(tl.load(made + o, mask=o < others, other=0), axis=0)
    else:
        for start in range(0, width, FEATURES):
            d = start + tl.arange(0, FEATURES)[:, None]
            inside = (d < width) & (n < rows)
            tl.store(xs + far * width + d, tl.load(x + far * x_row + d, mask=inside, other=0.0), mask=inside)
            tl.store(vs + far * width + d, tl.zeros([FEATURES, ROWS], tl.float32), mask=inside)
    moving = (n < rows).to(tl.int32)
    going = t < steps
    while going:
        tl.debug_barrier()  # other threads wrote what is read now
        hidden = fixed + _inner(
            xs + far * width, n, rows, width, w1 + width, w1_row, c, units, HIDDEN, PRECISION, ROWS, FEATURES
        )
        hidden += _inner(
            vs + far * width, n, rows, width, w1 + 2 * width, w1_row, c, units, HIDDEN, PRECISION, ROWS, FEATURES
        )
        if scales1 is not None:
            hidden *= tl.load(scales1 + c, mask=c < units, other=0.0)
        hidden = tl.maximum(
            hidden + tl.load(bias1 + c, mask=c < units, other=0.0), 0.0, propagate_nan=tl.PropagateNan.ALL
        )
        tl.debug_barrier()
        square = tl.zeros([FEATURES, ROWS], tl.float32)
        for start in range(0, width, FEATURES):
            d = start + tl.arange(0, FEATURES)
            alpha = tl.sigmoid(
                _third(hidden, w2, scales2, bias2, 0, d, width, w2_row, units, HIDDEN, PRECISION, ROWS, FEATURES)
            )
            beta = softplus(
                _third(hidden, w2, scales2, bias2, 1, d, width, w2_row, units, HIDDEN, PRECISION, ROWS, FEATURES)
            )
            gate = tl.sigmoid(
                _third(hidden, w2, scales2, bias2, 2, d, width, w2_row, units, HIDDEN, PRECISION, ROWS, FEATURES)
            )
            inside = (d < width)[:, None] & (n < rows)
            at = far * width + d[:, None]
            position = tl.load(xs + at, mask=inside, other=0.0)
            centre = tl.load(mu + d, mask=d < width, other=0.0)[:, None]
            velocity = alpha * tl.load(vs + at, mask=inside, other=0.0) - beta * (position - centre)
            moved = position + DT * gate * velocity
            square += tl.where(inside, (moved - position) * (moved - position), 0.0)
            if FREEZES:
                inside &= moving > 0
            tl.store(xs + at, moved, mask=inside)
            tl.store(vs + at, velocity, mask=inside)
        first += moving
        t += 1
        going = t < steps
        if STOPS:
            if t > FIRST_CHECK:
                length = tl.sqrt_rn(tl.sum(square, axis=0))[None, :]
                moving = tl.where(length < threshold, 0, moving)
                going = going & (tl.max(tl.max(moving, axis=1), axis=0) > 0)
    if not GOES_ON:
        tl.store(iterations + n, first.to(tl.int64), mask=n < rows)
        tl.store(made + tl.program_id(0), t)


def integrate(
    x: Tensor,
    context: Tensor,
    first: Weights,
    first_bias: Tensor,
    second: Weights,
    second_bias: Tensor,
    mu: Tensor,
    *,
    steps: int,
    threshold: float | None = None,
    together: bool = False,
) -> Integration:
    """As the reference, float32: x and context [N, D], controller first [C, 3 D] and second [3 D, C], C up to WIDEST.

    Matrices are floats or int8 with one scale a row. Where `threshold` is given, `steps` is on the device, int32 [].
    """
    rows, width = x.shape
    units = first.data.shape[0]
    if units > WIDEST:
        raise ValueError(f"integrator: expected at most {WIDEST} hidden units, found {units}")
    x, context = (t if t.stride(-1) == 1 or width == 1 else t.contiguous() for t in (x, context))
    blocks, card = triton.cdiv(rows, ROWS), capability(x)
    values = x.new_empty(2, rows, width)
    iterations = x.new_empty(rows, dtype=torch.int64)
    made = x.new_empty(max(blocks, 1), dtype=torch.int32)
    if not rows:
        return Integration(values[0], values[1], iterations, 0)
    # Float weights go through the ordinary cores: two tf32 terms of both sides do not fit in registers.
    how = "split" if card >= 80 and first.data.dtype == second.data.dtype == torch.int8 else "ieee"

    features, warps = (16, 2) if how == "ieee" and card >= 90 else (32, 8)

    def launch(goes_on: bool) -> None:
        _integrate[(blocks,)](
            x,
            context,
            first.data,
            first.scales,
            first_bias,
            second.data,
            second.scales,
            second_bias,
            mu,
            values[0],
            values[1],
            iterations,
            made,
            rows,
            width,
            units,
            x.stride(0),
            context.stride(0),
            first.data.stride(0),
            second.data.stride(0),
            steps,
            threshold or 0.0,
            blocks,
            DT=DT,
            FIRST_CHECK=FIRST_CHECK,
            STOPS=threshold is not None and not goes_on,
            FREEZES=threshold is not None and not together,
            GOES_ON=goes_on,
            HIDDEN=WIDEST,
            PRECISION=how,
            ROWS=ROWS,
            FEATURES=features,
            OTHERS=triton.next_power_of_2(blocks),
            num_warps=warps,
            num_stages=1,
            ptx_options=ALL_REGISTERS,
        )

    launch(False)
    if together and threshold is not None and blocks > 1:
        launch(True)
    return Integration(values[0], values[1], iterations, steps if threshold is None else made.max())
