"""Launches of every triton kernel at sizes that models have, for `compile_triton`: name -> function(torch)."""

import torch

from thl_engine.kernels.triton import linear
from thl_engine.kernels.triton.linear import Weights
from thl_engine.kernels.triton.linear_transposed import linear_transposed

LAUNCHES = {}


def launches(**variants):
    """Registers a function once for each variant of its only argument."""
    def register(make):
        for name, value in variants.items():
            LAUNCHES[f"{make.__name__}-{name}"] = lambda torch, value=value: make(value)
        return make
    return register


def stored(kind: str, rows: int, columns: int) -> Weights:
    if kind in ("row", "group"):
        shape = (rows,) if kind == "row" else (rows, columns // 128)
        return Weights(torch.empty(rows, columns, dtype=torch.int8), torch.empty(shape), 128 if kind == "group" else None)
    return Weights(torch.empty(rows, columns, dtype=getattr(torch, kind)))


BATCHES = {f"batch{n}": n for n in (1, 2, 4, 8, 16, 32, 128)}


@launches(**BATCHES)
def linear_launches(batch):
    for x in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("row", "group", "float32", "bfloat16"):
            linear.linear(torch.empty(batch, 1024, dtype=x), stored(kind, 512, 1024), torch.empty(512))


@launches(**BATCHES)
def gated_launches(batch):
    for x in (torch.float32, torch.bfloat16, torch.float16):
        for kind in ("row", "group"):
            linear.gated_linear(torch.empty(batch, 1024, dtype=x), stored(kind, 512, 1024), stored(kind, 512, 1024))


@launches(batch1=1, batch8=8)
def linear_heads_launches(batch):
    for kind in ("row", "group", "float32"):
        linear.linear_heads(torch.empty(batch, 8, 1024), stored(kind, 512, 1024), 512)


@launches(batch1=1, batch8=8)
def linear_transposed_launches(batch):
    for kind in ("row", "group", "float32"):
        for accumulate in (False, True):
            linear_transposed(torch.empty(batch, 8, 64), stored(kind, 512, 1024), 8, 512, 0,
                              torch.empty(batch, 8, 1024), accumulate)
