"""Appending to a cache and attending to it on triton, against the reference's chain of small operations."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import norm, rotary
from thl_engine.kernels.attention import causal
from thl_engine.kernels.triton import attention, cache
from thl_engine.models import kv_cache
from thl_engine.ops.backends import load_ops
from thl_engine.ops.reference import ReferenceOps

OPS = load_ops("triton", DEVICE)
REFERENCE = ReferenceOps()


def moved(values, to):
    """The same arguments on another device."""
    if isinstance(values, torch.Tensor):
        return values.to(to)
    if isinstance(values, (tuple, list)):
        return type(values)(moved(value, to) for value in values)
    return {name: moved(value, to) for name, value in values.items()} if isinstance(values, dict) else values


def projected(batch, rows, heads, width):
    """[B, T, A, d] as a product leaves it beside others."""
    return device_randn(batch, rows, 2 * heads * width)[..., : heads * width].unflatten(-1, (heads, width))


@pytest.mark.parametrize("width, capacity, past", [(16, 9, 30), (20, 7, 0), (256, 4, 5), (512, 3, 1)])
@pytest.mark.parametrize("rows", kv_cache.FORMATS)
@pytest.mark.parametrize("prepare", ["none", "rotate", "norm", "both"])
def test_append(width, capacity, past, rows, prepare, count=3):
    key, value = projected(2, count, 3, width), projected(2, count, 3, width)
    key[0, 1] = 0.0
    layer = kv_cache.empty([None], 2, 3, width, capacity, DEVICE, rows).layers[0]
    tables = rotary.rotary_tables(torch.arange(past, past + count), torch.rand(width // 2))
    options = {"tables": moved(tables, DEVICE)} if prepare in ("rotate", "both") else {}
    if prepare in ("norm", "both"):
        options |= {"key_norm": (device_randn(width), 1e-6), "value_eps": 1e-5}
    for at in (past, torch.tensor([past], device=DEVICE)):
        cache.append(
            key, value, layer.keys.data, layer.values.data, layer.keys.scales, layer.values.scales, at, **options
        )
        found = layer.read(past, past + count)
        wide_key, wide_value = key.cpu().double(), value.cpu().double()
        if "key_norm" in options:
            wide_key = norm.rms_norm(wide_key, options["key_norm"][0].cpu().double(), 1e-6)
            wide_value = norm.rms_norm(wide_value, None, 1e-5)
        wide_key, wide_value = wide_key.transpose(1, 2), wide_value.transpose(1, 2)
        if "tables" in options:
            wide_key = rotary.rotate(wide_key, *(table.double() for table in tables))
        for x, wanted, held in zip(found, (wide_key, wide_value), (layer.keys, layer.values), strict=True):
            if rows == "float32":
                close(x, wanted)
                continue
            largest = wanted.abs().amax(-1, keepdim=True)
            assert ((x.cpu() - wanted).abs() <= largest * (0.5 / 127 + 1e-6)).all()
            assert held.data.dtype == torch.int8
            if prepare == "none":  # bit for bit by the cache's own definition
                mine = kv_cache.empty([None], 2, 3, width, count, rows="int8").layers[0].keys
                mine.write(0, wanted.float())
                assert torch.equal(mine.read(0, count), x.cpu())
    unwritten = capacity - min(count, capacity)
    assert layer.keys.data.float().isnan().sum() == (unwritten * 6 * width if rows == "float32" else 0)


def test_rows_that_do_not_fit_are_refused():
    layer, x = kv_cache.empty([None], 1, 1, 16, 3, DEVICE).layers[0], projected(1, 4, 1, 16)
    with pytest.raises(ValueError, match="expected keys and values of equal strides with room for 4 rows"):
        cache.append(x, x, layer.keys.data, layer.values.data, None, None, 0)


@pytest.mark.parametrize("rows", kv_cache.FORMATS)
@pytest.mark.parametrize(
    "heads, key_heads, width, prepare, sizes",
    [
        (4, 2, 16, True, [1] * 5),
        (2, 1, 16, True, [3, 1, 9, 1]),
        (2, 2, 24, False, [2, 1, 1, 1, 8]),
        (18, 1, 80, True, [3, 1, 1]),
    ],
)
def test_a_chain_is_the_reference_chain(sizes, rows, heads, key_heads, width, prepare, monkeypatch):
    monkeypatch.setattr(kv_cache, "SLACK", 3)  # rings are passed round, and some passes longer than they are
    windows, total = (None, 3), sum(sizes)
    mine, other = (kv_cache.empty(windows, 1, key_heads, width, total, device, rows) for device in (DEVICE, "cpu"))
    frequencies, past = torch.rand(width // 2), 0
    for size in sizes:
        if past == 3:
            mine = mine.clone(past)
        options, own = {}, {}
        if prepare:
            tables = rotary.rotary_tables(torch.arange(past, past + size), frequencies)
            options = {"norm": (torch.randn(width), 1e-6), "tables": tables}
            own = {"key_norm": (torch.randn(width), 1e-6), "value_eps": 1e-6, "tables": tables}
        passes = [
            (OPS.cached_attention(mine, past, size, torch.device(DEVICE)), DEVICE),
            (REFERENCE.cached_attention(other, past, size, torch.device("cpu")), "cpu"),
        ]
        assert torch.equal(*(attend.positions.cpu() for attend, _ in passes))
        for layer in range(len(windows)):
            query, key, value = (projected(1, size, n, width) for n in (heads, key_heads, key_heads))
            last = {**options, "tables": tuple(x[-1:] for x in options["tables"])} if prepare else {}
            found = []
            for attend, device in passes:
                attend.append(layer, key.to(device), value.to(device), **moved(own, device))
                found.append(
                    (
                        attend(layer, query.to(device), 0.2, **moved(options, device)),
                        attend(layer, query[:, -1:].to(device), 0.3, **moved(last, device)),
                    )
                )
            for a, b in zip(*found, strict=True):
                # Where a value lies between two integers, a last bit decides.
                close(a, b, 3e-6 if rows == "float32" or not prepare else 5e-3)
        past += size
    assert all(layer.first == 0 for layer in mine.layers)


@pytest.mark.parametrize("window", [None, 6])
def test_a_mask_given_for_what_is_seen(window):
    mine, other = (kv_cache.empty([window], 1, 2, 16, 40, device) for device in (DEVICE, "cpu"))
    for past, size in ((0, 10), (10, 4), (14, 1)):
        query, key, value = (projected(1, size, 2, 16) for _ in range(3))
        kept = other.layers[0].kept(past)
        blocked = torch.rand(size, kept + size) < 0.4
        blocked[:, -size:] = torch.ones(size, size, dtype=torch.bool).triu(1)
        found = []
        for ops, held, device in ((OPS, mine, DEVICE), (REFERENCE, other, "cpu")):
            attend = ops.cached_attention(held, past, size, torch.device(device))
            attend.append(0, key.to(device), value.to(device))
            mask = blocked.to(device)
            if window is not None:
                mask = mask | causal(size, past, device, window)
            found.append(attend(0, query.to(device), 0.3, blocked=mask))
        close(*found, 2e-6)


@pytest.mark.parametrize("window, capacity", [(None, 700), (300, 364)])
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (12, 1)])
def test_a_position_on_the_device(window, capacity, heads, key_heads):
    """The same bits, whatever the bucket, and nothing launched that depends on the position."""
    key, value = (device_randn(1, key_heads, capacity, 16) for _ in range(2))
    query = device_randn(1, heads, 1, 16)
    for past in (0, 64, 299, 600):
        if past >= capacity and window is None:
            continue
        known = attention.attention(query, key, value, 0.3, causal=True, window=window, past=past)
        positions = torch.arange(max(0, past + 1 - (window or past + 1)), past + 1)
        seen = [x[:, :, positions.to(DEVICE) % capacity] for x in (key, value)]
        close(known, REFERENCE.attention(query.cpu().double(), *(x.cpu().double() for x in seen), 0.3), 2e-6)
        at = torch.tensor([past], device=DEVICE)
        for at_most in (past + 1, 1024):
            found = attention.attention(query, key, value, 0.3, causal=True, window=window, past=at, at_most=at_most)
            assert torch.equal(found, known)
    with pytest.raises(ValueError, match="a position on the device needs at_most"):
        attention.attention(query, key, value, 0.3, causal=True, past=at)


def test_a_ring_is_what_a_stored_state_becomes():
    layer = kv_cache.empty([6], 1, 1, 4, 200, rows="int8").layers[0]
    layer.keys.data.zero_()
    kv_cache.KVCache([layer]).seek(150)
    for name, rows in layer.named(150).items():
        rows.copy_(torch.arange(rows.numel()).view(rows.shape)) if "scale" not in name else rows.fill_(2.0)
    before = [x.clone() for x in layer.read(145, 150)]
    layer.align()
    assert layer.first == 0 and all(torch.equal(*pair) for pair in zip(before, layer.read(145, 150), strict=True))
    assert torch.equal(layer.named(150)["keys"].float() * 2, before[0])
