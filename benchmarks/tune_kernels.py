"""Measures the forms of an operation on this machine's card and writes the table of the fastest (kernels/tuned).

    python benchmarks/tune_kernels.py [--out FOLDER]

The int8 product of few rows: triton's kernel beside the CUDA twin in each of its shapes, on a page of a matrix at a
time, as engines use it. Each form is compared with float64 before it is timed. Only operations that leave their inputs
as they are can be measured by repeating them. An engine takes the table up at its next start.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import triton
from gpu_timing import Timer
from torch import Tensor

from thl_engine.checkpoint.pack import PAGE_BYTES
from thl_engine.device import cuda
from thl_engine.device.cuda import GemvShape
from thl_engine.files import replacing
from thl_engine.kernels import tuned
from thl_engine.kernels.triton import linear
from thl_engine.kernels.tuned import Choice

# Two octaves apart, so that every size between has one within an octave.
ROWS, COLUMNS = (256, 1024, 4096, 16384, 65536), (512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8)
Form = tuple[str, tuple[int, ...]]  # implementation and launch
WORTH = 0.98  # of triton's time that the twin may take to be chosen
Product = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # of x and w with its scales, into out


def triton_product(x: Tensor, w: Tensor, scales: Tensor, out: Tensor) -> None:
    linear.linear(x, linear.Weights(w, scales), out=out)


def forms(batch: int) -> dict[Form, Product]:
    """What can be chosen for `batch` rows of activations."""
    found: dict[Form, Product] = {("triton", ()): triton_product}
    if cuda.available():
        for rows, split in product((2, 4) if batch <= 4 else (2,), (1, 2, 4, 8)):
            if split * batch <= 16:
                found["cuda", (rows, split)] = partial(cuda.gemv_int8, shape=GemvShape(rows, split))
    return found


def seconds(timer: Timer, batch: int, rows: int, columns: int) -> dict[Form, float]:
    """Of each form. Raises AssertionError where one computes something else."""
    device = timer.device
    x, out = torch.randn(batch, columns, device=device), torch.empty(batch, rows, device=device)
    held = [
        (
            torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device),
            torch.rand(rows, device=device) + 0.5,
        )
        for _ in range(timer.sets(rows * columns))
    ]
    expected = x.double() @ (held[0][0].double() * held[0][1].double()[:, None]).T
    found = {}
    for name, form in forms(batch).items():
        form(x, *held[0], out.fill_(float("nan")))
        error = (out.double() - expected).norm() / expected.norm()
        if not error <= 1e-5:
            raise AssertionError(f"{name}: {error:.2g} off at {batch} rows times {rows} x {columns}")
        found[name] = timer.seconds([lambda w=w, form=form: form(x, *w, out) for w in held])
    return found


def tune(
    out_dir: Path,
    device: str = "cuda",
    sizes: Sequence[tuple[int, int]] = tuple(product(ROWS, COLUMNS)),
    batches: Sequence[int] = BATCHES,
) -> Path:
    """Measures all forms at these sizes and writes the card's table to a folder; returns its path."""
    torch.manual_seed(0)
    timer, choices = Timer(device), []
    measure = cache(lambda batch, rows, columns: seconds(timer, batch, rows, columns))
    for (rows, columns), batch in product(sizes, batches):
        taken = measure(batch, min(rows, PAGE_BYTES // columns), columns)
        best = min(taken, key=taken.__getitem__)
        if taken[best] > WORTH * taken["triton", ()]:
            best = ("triton", ())
        choices.append(Choice(batch, rows, columns, *best))
        print(
            f"{batch} rows times {rows} x {columns}: {best[0]} {list(best[1])}, {taken[best] * 1e6:.1f} µs; "
            f"triton {taken['triton', ()] * 1e6:.1f} µs",
            flush=True,
        )
    card = torch.cuda.get_device_name(timer.device) if timer.cuda else "CPU"
    file = out_dir / tuned.file_name(card)
    measured = f"{date.today().isoformat()}, torch {torch.__version__}, triton {triton.__version__}"
    text = tuned.to_text(card, measured, {"gemv_int8": tuple(choices)})
    tuned.parse(text, file.name, card)
    with replacing(file, len(text)) as descriptor:
        os.write(descriptor, text.encode())
    return file


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tuned.__file__).parent, help="default: where engines look")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune_kernels: torch finds no CUDA device", file=sys.stderr)
        return 1
    if not cuda.available():
        print(f"tune_kernels: triton's kernels alone can be measured: {cuda.reason()}", file=sys.stderr)
        return 1
    print(f"written: {tune(given.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
