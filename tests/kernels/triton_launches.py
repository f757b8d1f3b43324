"""Launches of every triton kernel at sizes that models have, for `compile_triton`: name -> function()."""

import torch

from thl_engine.kernels.triton import (
    altup,
    attention,
    cache,
    elementwise,
    integrator,
    linear,
    norm,
    novelty_write,
    sampling,
    shared_memory,
    slot_read,
    sparse,
    tier_cell,
    window_attention,
)
from thl_engine.kernels.triton.linear import LowRank, Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed
from thl_engine.models import kv_cache

LAUNCHES = {}


def launches(**variants):
    """Registers a function once for each variant of its only argument."""

    def register(make):
        for name, value in variants.items():
            LAUNCHES[f"{make.__name__}-{name}"] = lambda value=value: make(value)
        return make

    return register


def stored(kind: str, rows: int, columns: int) -> Weights:
    if kind in ("row", "group"):
        shape, group = ((rows,), None) if kind == "row" else ((rows, columns // 128), 128)
        return Weights(torch.empty(rows, columns, dtype=torch.int8), torch.empty(shape), group)
    return Weights(torch.empty(rows, columns, dtype=getattr(torch, kind)))


BATCHES = {f"batch{n}": n for n in (1, 2, 4, 8, 16, 32, 128)}


@launches(**BATCHES)
def linear_launches(batch):
    for x in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("row", "group", "float32", "bfloat16"):
            linear.linear(torch.empty(batch, 1024, dtype=x), stored(kind, 512, 1024), torch.empty(512))
    for rows in (2048, 8192):  # more of them for a program that streams
        linear.linear(torch.empty(batch, 1024), stored("row", rows, 1024))


@launches(**BATCHES)
def around_launches(batch):
    x, out, low = torch.empty(batch, 1024), torch.empty(batch, 4096), torch.empty(batch, 64)
    for kind in ("row", "group"):
        w = stored(kind, 4096, 1024)
        linear.linear(x, w, rounded=True)
        linear.linear(x, w, out[0], gelu=True, residual=out)
        linear.linear(x, w, up=x)
        linear.linear(x, w, up=x, fast=out, blend=out[0], residual=out)
        linear.linear(x, w, low_rank=LowRank(low, torch.empty(4096, 64), 0.5))


@launches(**BATCHES)
def gated_launches(batch):
    for x in (torch.float32, torch.bfloat16):
        for kind in ("row", "group"):
            linear.gated_linear(
                torch.empty(batch, 1024, dtype=x), stored(kind, 4096, 1024), stored(kind, 4096, 1024), "gelu_tanh"
            )


@launches(batch1=1, batch8=8)
def sparse_launches(batch):
    gate, x = torch.empty(batch, 16384), torch.empty(batch, 2048)
    sparse.geglu(gate, gate, 1.6)
    inner, alive = sparse.survivors(gate, 1.6)
    low_rank = LowRank(torch.empty(batch, 16), torch.empty(16384, 16), 0.5)
    for kind in ("row", "group", "bfloat16"):
        for added in (None, low_rank):
            sparse.multiply(inner, alive, x, stored(kind, 16384, 2048), 0, added)
        linear_transposed(
            inner[:, None], stored(kind, 16384, 2048), 1, 16384, 0, torch.empty(batch, 1, 2048), False, alive
        )


@launches(batch1=1, batch8=8)
def linear_heads_launches(batch):
    for kind in ("row", "group", "float32"):
        linear.linear_heads(torch.empty(batch, 8, 1024), stored(kind, 512, 1024), 512)


@launches(batch1=1, batch8=8)
def linear_transposed_launches(batch):
    for kind in ("row", "group", "float32"):
        for accumulate in (False, True):
            linear_transposed(
                torch.empty(batch, 8, 64), stored(kind, 512, 1024), 8, 512, 0, torch.empty(batch, 8, 1024), accumulate
            )


@launches(
    tiny=(1, 1, 1),
    small=(100, 96, 4),
    default=(1024, 768, 4),
    wide=(1024, 12288, 8),
    most=(16384, 256, 8),
    more=(40000, 80, 32),
)
def slot_launches(shape):
    slots, width, heads = shape
    memory, ema = torch.empty(2, slots, width), torch.empty(2, slots)
    last, counter = torch.empty(2, slots, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    for t, capacity in ((7, None), (counter, 2)):
        slot_read.slot_read(
            torch.empty(2, heads, width),
            memory,
            ema,
            last,
            t,
            k=min(8, slots),
            capacity=capacity,
            scale=0.1,
            load_penalty=0.1,
            decay=0.9,
        )
        novelty_write.novelty_write(
            torch.empty(2, width),
            memory,
            ema,
            ema,
            ema,
            last,
            t,
            slots=min(4, slots),
            clip_max=1.0,
            theta=0.1,
            beta=1.0,
            decay=0.9,
            ema_decay=0.9,
            stale_weight=0.1,
            underuse_weight=0.1,
        )
    novelty_write.slot_norms(memory)


@launches(batch1=1, batch4=4, batch8=8)
def tier_cell_launches(batch):
    for width in (100, 768, 12288):
        for kind, dtype in (
            ("row", torch.float32),
            ("group", torch.float32),
            ("row", torch.bfloat16),
            ("bfloat16", torch.bfloat16),
            ("float32", torch.float32),
        ):
            x, gate = torch.empty(batch, width, dtype=dtype), torch.empty(batch, 512)
            bias, state = torch.empty(512), torch.empty(batch, 512, dtype=dtype)
            tier_cell.joined_linear((x, x, x), stored(kind, 512, 3 * width), bias, gate, addend=x, gate="update")
            tier_cell.joined_linear((x, x, x), stored(kind, 512, 3 * width), bias, gate, gate="reset", state=state)
            tier_cell.joined_linear(
                (gate, x, x),
                stored(kind, 512, 512 + 2 * width),
                bias,
                state,
                addend=x,
                gate="candidate",
                update=gate,
                state=state,
            )
        tier_cell.joined_layer_norm((x, x, x), torch.empty(3 * width), torch.empty(3 * width), 1e-5)
    tier_cell.joined_linear((x, x), stored("row", 512, 2 * 12288), None, gate)


@launches(entries16=16, entries64=64, entries1000=1000)
def window_launches(entries):
    for width in (96, 768):
        for valid in (7, torch.empty(1, dtype=torch.int64)):
            window_attention.window_read(
                torch.empty(2, width), torch.empty(2, entries, width), valid, torch.empty(2, width), 0.1
            )


@launches(**{f"heads{width}": width for width in (16, 32, 64, 80, 128, 256, 512)})
def attention_launches(width):
    for rows, keys in ((1, 100), (1, 4096), (200, 200)):
        for dtype in (torch.float32, torch.bfloat16):
            query, key = torch.empty(2, 8, rows, width, dtype=dtype), torch.empty(2, 2, keys, width, dtype=dtype)
            if width > attention.widest(query):
                return
            table, blocked = torch.empty(rows, width), torch.empty(keys, dtype=torch.bool)
            attention.attention(query, key, key, 0.1, causal=True)
            attention.attention(query, key, key, 0.1, blocked, query_tables=(table, table), causal=True, window=64)
        small, scales = key.to(torch.int8), torch.empty(2, 2, keys)
        attention.attention(query, small, small, 0.1, causal=True, key_scales=scales, value_scales=scales)
    query, table = torch.empty(2, 8, 40, width), torch.empty(40, width)
    if width <= attention.widest(query, turned=True):
        attention.attention(query, query, query, 0.1, query_tables=(table, table), key_tables=(table, table))


@launches(**{f"heads{width}": width for width in (16, 64, 128, 256, 512)})
def cached_attention_launches(width):
    """Rings and whole contexts of float32 and int8, positions from the device for one row, for groups of every size."""
    norm, at = (torch.empty(width), 1e-6), torch.empty(1, dtype=torch.int64)
    if width > attention.widest(norm[0]):
        return
    for rows, window in (("float32", None), ("float32", 512), ("int8", None), ("int8", 512)):
        layer = kv_cache.empty([window], 1, 2, width, 8192, rows=rows).layers[0]
        kept = layer.keys.data, layer.values.data, layer.keys.scales, layer.values.scales
        for count, heads, past in ((1, 2, at), (1, 8, at), (1, 16, at), (1, 24, at), (64, 8, 700)):
            table = torch.empty(count, width)
            new, query = torch.empty(1, count, 2, width), torch.empty(1, heads, count, width)
            cache.append(new, new, *kept, past, key_norm=norm, value_eps=1e-6, tables=(table, table))
            cache.append(new, new, *kept, past)
            attention.attention(
                query,
                *kept[:2],
                0.1,
                causal=True,
                window=window,
                key_scales=kept[2],
                value_scales=kept[3],
                past=past,
                at_most=4096,
                query_norm=norm,
                query_tables=(table, table),
            )


@launches(**{f"width{width}": width for width in (64, 768, 4096, 16384)})
def elementwise_launches(width):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.empty(4, width, dtype=dtype), torch.empty(width)
        norm.add_rms_norm(x, x, weight, 1e-5)
        norm.rms_norm_add(x, weight, 1e-5, x, x, 0.5)
        norm.add_layer_norm(x, x, weight, weight, 1e-5)
        norm.layer_norm(x, weight, weight, 1e-5)
        elementwise.gru_reset(x, x)
        elementwise.gru_update(x, x, x)
        elementwise.swiglu(x, x)
        elementwise.gelu(x)
        elementwise.geglu(x, x)
        elementwise.add_scaled(x, x, 0.1)
        elementwise.add_blend(x, x, x, weight)
    shared_memory.erase_then_add(torch.empty(1, 64, width), torch.empty(4, width), torch.empty(4, width))


@launches(width256=256, width2048=2048)
def altup_launches(width):
    for count in (3, 4):
        streams, x, weight = torch.empty(count, 2, width), torch.empty(2, width), torch.empty(width)
        altup.predict(streams, torch.empty(2, count, count))
        altup.correct(streams, x, 1, torch.empty(2, count))
        altup.coefficients(x, weight, 1e-5, torch.empty(count, width), torch.empty(count * count, count), 1.0)
        altup.spread(streams, x, weight, 1e-5)


@launches(units20=20, units64=64)
def integrator_launches(units):
    x, mu = torch.empty(40, 512), torch.empty(512)
    for kind in ("row", "float32"):
        for together in (False, True):
            for threshold in (None, 0.1):
                integrator.integrate(
                    x,
                    x,
                    stored(kind, units, 1536),
                    torch.empty(units),
                    stored(kind, 1536, units),
                    torch.empty(1536),
                    mu,
                    steps=8,
                    threshold=threshold,
                    together=together,
                )


@launches(small=300, large=262_400)
def sampling_launches(count):
    for temperature, top_k, top_p in ((0.0, None, None), (0.7, None, None), (0.7, 50, 0.9)):
        sampling.sample(torch.empty(count), 0.5, temperature, top_k, top_p)
