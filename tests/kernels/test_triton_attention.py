"""Triton attention against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import attention as reference
from thl_engine.kernels import rotary
from thl_engine.kernels.triton import attention


def expected(query, key, value, scale, blocked=None, causal=False, window=None):
    rows, keys = query.shape[2], key.shape[2]
    hidden = torch.zeros(rows, keys, dtype=torch.bool)
    here, there = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)
    if causal:
        hidden |= there > here
    if window is not None:
        hidden |= there <= here - window
    if blocked is not None:
        hidden = hidden | blocked.cpu()
    return reference.attention(query.cpu().double(), key.cpu().double(), value.cpu().double(), scale, hidden)


def heads(batch, count, rows, width):
    """[B, A, T, d] as models have it: heads beside one another in the rows of a larger projection."""
    return device_randn(batch, rows, count, 2 * width)[..., :width].transpose(1, 2)


SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 4, 2, 1, 37, 24),
    (1, 6, 2, 1, 280, 16),
    (2, 3, 3, 5, 21, 80),
    (1, 2, 1, 70, 70, 16),
    (1, 4, 1, 33, 90, 40),
    (1, 1, 1, 3, 40, 256),
    (1, 2, 1, 6, 20, 400),
    (1, 2, 1, 1, 70, 512),
    (1, 12, 1, 1, 150, 16),
    (1, 2, 1, 2, 130, 80),
]


@pytest.mark.parametrize("batch, query_heads, key_heads, rows, keys, width", SHAPES)
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 7), (False, 20)])
def test_attention(batch, query_heads, key_heads, rows, keys, width, causal, window):
    query = heads(batch, query_heads, rows, width)
    key, value = (heads(batch, key_heads, keys, width) for _ in range(2))
    scale = width**-0.5
    found = attention.attention(query, key, value, scale, causal=causal, window=window)
    close(found, expected(query, key, value, scale, causal=causal, window=window))
    assert torch.equal(found, attention.attention(query, key, value, scale, causal=causal, window=window))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 20])
def test_half_precision(dtype, tolerance, rows):
    query, key, value = (heads(2, a, n, 32).to(dtype) for a, n in ((4, rows), (2, 70), (2, 70)))
    found = attention.attention(query, key, value, 0.2, causal=True)
    assert found.dtype == dtype
    close(found, expected(query, key, value, 0.2, causal=True), tolerance)


@pytest.mark.parametrize("shape", [(2, 1, 1, 50), (1, 1, 18, 50), (2, 4, 18, 50), (1, 1, 18, 1)])
def test_blocked_keys(shape):
    query, key, value = heads(2, 4, 18, 16), heads(2, 2, 50, 16), heads(2, 2, 50, 16)
    blocked = (torch.rand(shape) < 0.4).to(DEVICE)
    blocked[..., 0, 0] = False
    if shape[-1] == 1:
        blocked[:] = False
    close(attention.attention(query, key, value, 0.3, blocked), expected(query, key, value, 0.3, blocked))
    one = query[:, :, -1:]
    mask = blocked[:, :, -1:].clone()
    mask[..., 0] = False
    close(attention.attention(one, key, value, 0.3, mask), expected(one, key, value, 0.3, mask))
    mask = torch.zeros(50, dtype=torch.bool, device=DEVICE)
    mask[3:30] = True
    close(
        attention.attention(query, key, value, 0.3, mask, window=45), expected(query, key, value, 0.3, mask, window=45)
    )


@pytest.mark.parametrize("keys", [40, 600])
def test_a_row_that_sees_nothing_is_nan(keys):
    query, key, value = heads(1, 1, 1, 16), heads(1, 1, keys, 16), heads(1, 1, keys, 16)
    blocked = torch.ones(1, keys, dtype=torch.bool, device=DEVICE)
    assert attention.attention(query, key, value, 1.0, blocked).isnan().all()


@pytest.mark.parametrize("rows, keys", [(1, 530), (20, 33)])
@pytest.mark.parametrize("both", [False, True])
def test_rotation(rows, keys, both):
    query, key, value = heads(2, 4, rows, 20), heads(2, 2, keys, 20), heads(2, 2, keys, 20)
    frequencies = torch.rand(10)
    tables = rotary.rotary_tables(torch.arange(keys), frequencies)
    turned = rotary.rotate(query.cpu(), *(x[keys - rows :] for x in tables))
    cached = rotary.rotate(key.cpu(), *tables) if both else key
    tables = tuple(x.to(DEVICE) for x in tables)
    last = tuple(x[keys - rows :] for x in tables)
    found = attention.attention(
        query, key, value, 0.3, causal=True, window=300, query_tables=last, key_tables=tables if both else None
    )
    close(found, expected(turned, cached, value, 0.3, causal=True, window=300), 2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows, keys", [(1, 530), (20, 33)])
def test_int8_keys_and_values(rows, keys, dtype, tolerance):
    query = heads(2, 4, rows, 24).to(dtype)
    key, value = (torch.randint(-127, 128, (2, 2, keys, 24), dtype=torch.int8, device=DEVICE) for _ in range(2))
    scales = [(torch.rand(2, 2, keys) / 100).to(DEVICE) for _ in range(2)]
    found = attention.attention(
        query, key, value, 0.3, causal=True, window=500, key_scales=scales[0], value_scales=scales[1]
    )
    wide = [x.double() * s[..., None].double() for x, s in zip((key, value), scales, strict=True)]
    close(found, expected(query, *wide, 0.3, causal=True, window=500), tolerance)


def test_sizes_depend_on_shapes_only():
    for card in (75, 80, 86, 89, 90):
        for rows in (1, 16, 17, 1000):
            for width in (16, 64, 128, 256, 512):
                sizes = attention.tile(rows, width, True, card)
                assert 64 % sizes.keys == 0 and sizes.rows >= 16
    for keys in (0, 1, 100, 512, 1000, 16384, 100_000):
        for key_heads in (1, 8, 1000):
            size = attention.pieces(1, keys, key_heads)
            assert size % attention.PIECE == 0 and -(-keys // size) <= attention.MOST_PIECES
        assert attention.pieces(17, keys, 1) >= keys
    assert attention.pieces(4, 8192, 8) == 256


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="found 16 features, 3 query heads, 2 key heads"):
        attention.attention(heads(1, 3, 1, 16), heads(1, 2, 4, 16), heads(1, 2, 4, 16), 1.0)
