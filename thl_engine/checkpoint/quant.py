"""Symmetric int8 weights: one float32 scale a row, or one for each `group` inputs of a row.

    q = clamp(round_half_even(w / s), -127, 127),   s = max|w| / 127,   w ≈ s·q

A row (or group) of zeros has scale 0 and stays exactly zero. The value -128 is never used, so that |q| <= 127
and a product's sign is its factors' sign.
"""

import torch

from thl_engine.kernels.int8 import round_to_int8, scales_of

GROUP = 128  # inputs that share a scale in files and in the native kernels, where scales go by groups
BLOCK_ELEMENTS = 1 << 18  # quantised at a time: 1 MiB of float32, so that the passes over it stay in cache


def scale_shape(rows: int, columns: int, group: int | None) -> tuple[int, ...]:
    """Shape of the scales of a [rows, columns] matrix: [rows], or [rows, ceil(columns / group)]."""
    return (rows,) if group is None else (rows, -(-columns // group))


def quantize_rows(weight: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [R, C] and float32 scales ([R], or [R, ceil(C / group)]) of a floating-point [R, C] matrix.

    Rows that hold NaN or infinity get a non-finite scale: check with `torch.isfinite(scales)`.
    """
    rows, columns = weight.shape
    width = columns if group is None else group
    quantized = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.zeros(scale_shape(rows, columns, group))
    if columns == 0:
        return quantized, scales
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step].float()
        if columns % width:  # zeros change neither the maximum nor the values of the last group
            block = torch.nn.functional.pad(block, (0, -columns % width))
        block = block.reshape(len(block), -1, width)
        scale = scales_of(torch.maximum(-block.amin(dim=2), block.amax(dim=2)))  # `aminmax` takes twenty times as long
        values = round_to_int8(block, scale)
        quantized[start : start + step] = values.flatten(1)[:, :columns]
        scales[start : start + step] = scale.reshape(scales[start : start + step].shape)
    return quantized, scales
