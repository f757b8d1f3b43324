"""The int8 product of few rows in all its forms: triton's kernel and the hand-written one in each of its shapes.

    python benchmarks/gpu_tune.py [--rows FILE] [--rehearse]

Prints the fastest for each size of the matrix and number of rows of activations; each is compared with the reference
before it is timed. What it prints is what the table of shapes is filled with.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from gpu_kernels import GEMV_SHAPES, Bench, exact_product
from gpu_report import Rows, row
from gpu_timing import Timer
from torch import Tensor

from thl_engine import cuda
from thl_engine.kernels.triton import linear
from thl_engine.weights import Held

SIZES = [*GEMV_SHAPES, (2048, 2048), (16384, 2048), (2048, 16384), (50257, 36864)]
BATCHES = (1, 2, 4, 8)
SHAPES = [(rows, split) for rows in (2, 4) for split in (1, 2, 4, 8)]  # of `cuda.GemvShape`


def triton_product(x: Tensor, w: Held, out: Tensor) -> None:
    linear.linear(x, linear.Weights(w.data, w.scales), out=out)


def cuda_product(shape: tuple[int, int], x: Tensor, w: Held, out: Tensor) -> None:
    cuda.gemv_int8(x, w.data, w.scales, out, cuda.GemvShape(*shape))


def tune(bench: Bench, height: int, width: int) -> None:
    """Times all forms for matrices of a size."""
    rows, columns = bench.size(height, 24), bench.size(width, 136)
    held = [bench.stored(rows, columns) for _ in range(bench.timer.sets(rows * columns))]
    forms: dict[str, Callable] = {"triton": triton_product}
    if cuda.available():
        forms |= {f"cuda {shape[0]} rows, split {shape[1]}": partial(cuda_product, shape) for shape in SHAPES}
    for batch in BATCHES if bench.real else (1,):
        what = f"{height} × {width}, {batch} rows"
        with bench.rows.case(what):
            x, out = bench.randn(batch, columns), bench.randn(batch, rows)
            expected, seconds = exact_product(x, held[0]), {}
            for name, form in forms.items():
                form(x, held[0], out.fill_(float("nan")))
                bench.compare([out], [expected])
                seconds[name] = bench.timer.seconds([lambda w=w, f=form, x=x, out=out: f(x, w, out) for w in held])
            best = min(seconds, key=seconds.__getitem__)
            nbytes = rows * columns + 4 * rows + 4 * batch * (rows + columns)
            bench.rows.add(row(f"{what}: {best}", nbytes / seconds[best] / 1e9, "GB/s", ceiling=bench.copy / 1e9,
                               of="GB/s, copy", note=", ".join(f"{name} {value * 1e6:.1f} µs"
                                                               for name, value in seconds.items())))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="append each row as a line of JSON")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    bench = Bench(Timer("cpu" if given.rehearse else "cuda"), Rows(given.rows, given.rehearse))
    bench.copy = bench.timer.copy_bandwidth()
    bench.rows.add(row("copy within the device, read and written", bench.copy / 1e9, "GB/s"))
    if not cuda.available():
        print(f"the hand-written kernel is not here: {cuda.reason()}", flush=True)
    for height, width in SIZES if bench.real else SIZES[:1]:
        tune(bench, height, width)
        if bench.real:
            torch.cuda.empty_cache()
    return int(bench.rows.failed)


if __name__ == "__main__":
    sys.exit(main())
