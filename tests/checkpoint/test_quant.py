"""Symmetric int8: exact rules, bounded error, odd shapes."""

import pytest
import torch

from thl_engine.checkpoint.quant import BLOCK_ELEMENTS, quantize_rows
from thl_engine.kernels.int8 import dequantize


def weights(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [None, 1, 5, 128, 1000])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 300), (2, 256), (0, 4), (4, 0)])
def test_error_is_at_most_half_a_step(rows, columns, group):
    weight = weights(rows, columns)
    quantized, scales = quantize_rows(weight, group)
    assert quantized.dtype == torch.int8 and quantized.shape == (rows, columns)
    assert scales.dtype == torch.float32
    assert scales.shape == ((rows,) if group is None else (rows, -(-columns // group)))
    step = scales[:, None] if group is None else scales.repeat_interleave(group, dim=1)[:, :columns]
    error = (dequantize(quantized, scales, group) - weight).abs()
    assert (error <= step * 0.5001).all()


def test_largest_entry_of_each_row_is_127_and_kept():
    weight = weights(50, 40) * torch.logspace(-30, 30, 50)[:, None]
    quantized, scales = quantize_rows(weight)
    largest = weight.abs().argmax(dim=1, keepdim=True)
    assert (quantized.gather(1, largest).abs() == 127).all()
    torch.testing.assert_close(
        dequantize(quantized, scales).gather(1, largest), weight.gather(1, largest), rtol=1e-6, atol=0
    )
    assert quantized.min() >= -127


def test_half_steps_round_to_even():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(row)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("group", [None, 2])
def test_zero_and_denormal_rows(group):
    weight = torch.tensor([[0.0, -0.0, 0.0], [1e-44, -1e-44, 0.0]])
    quantized, scales = quantize_rows(weight, group)
    back = dequantize(quantized, scales, group)
    assert torch.equal(back[0], torch.zeros(3)) and (scales[0] == 0).all()
    assert back[1].isfinite().all() and (back[1].abs() <= 2e-44).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [None, 4])
def test_non_finite_rows_show_in_their_scales(bad, group):
    weight = weights(4, 10)
    weight[2, 7] = bad
    finite = quantize_rows(weight, group)[1].isfinite().reshape(4, -1).all(dim=1)
    assert finite.tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_and_strides_equal_their_float32_copy(dtype):
    weight = weights(12, 9).to(dtype).t()
    expected = quantize_rows(weight.float().contiguous())
    for given, wanted in zip(quantize_rows(weight), expected, strict=True):
        assert torch.equal(given, wanted)


def test_rows_do_not_depend_on_their_neighbours():
    columns = 500
    rows = 3 * BLOCK_ELEMENTS // columns + 1  # several blocks, the last one short
    weight = weights(rows, columns)
    for group in (None, 64):
        whole = quantize_rows(weight, group)
        for row in (0, rows // 2, rows - 1):
            alone = quantize_rows(weight[row : row + 1], group)
            assert torch.equal(alone[0][0], whole[0][row]) and torch.equal(alone[1][0], whole[1][row])
