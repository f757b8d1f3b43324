"""What int8 costs: a scale a row against one for each 128 inputs, by error and by speed.

    pytest benchmarks/bench_quant.py --benchmark-only
    python benchmarks/bench_quant.py               # the table alone

Error is |dequantised - weight| / |weight| over the whole matrix and, closer to what a model feels, the same of its
product with random inputs. Speed is that of the native product with a matrix too large for the cache, in bytes of
weights and scales a second, both layouts in turn; and of the quantiser itself, in weights a second.
"""

import statistics
import time

import pytest
import torch

from thl_engine.checkpoint.quant import GROUP, quantize_rows, scale_shape
from thl_engine.kernels.int8 import dequantize
from thl_engine.ops import native

ROWS, COLUMNS = 16384, 12288  # 201 MB of int8; two copies are read in turn, so that no cache holds either
LAYOUTS = {"row": None, f"groups of {GROUP}": GROUP}


def distributions() -> dict[str, torch.Tensor]:
    """float32 [2048, 4096] each: trained weights lie between normal and heavy-tailed, often with wild columns."""
    torch.manual_seed(0)
    shape = (2048, 4096)
    normal = torch.randn(shape)
    columns = normal.clone()
    columns[:, ::512] *= 20
    return {
        "uniform": torch.rand(shape) * 2 - 1,
        "normal": normal,
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student t, 3": torch.distributions.StudentT(3.0).sample(shape),
        "normal, 8 columns x20": columns,
    }


def errors(weight: torch.Tensor, group: int | None) -> tuple[float, float]:
    """Relative error of the weights and of their product with normal inputs."""
    error = dequantize(*quantize_rows(weight, group), group) - weight
    inputs = torch.randn(weight.shape[1], 16)
    return float(error.norm() / weight.norm()), float((error @ inputs).norm() / (weight @ inputs).norm())


def product_rates(rounds: int = 9) -> dict[str, float]:
    """Bytes a second of the native product, batch 1, for each layout."""
    quantized = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8)
    inputs, out = native.pack_activations(torch.randn(1, COLUMNS)), torch.empty(1, ROWS)
    copies = (quantized, quantized.clone())
    scales = {name: torch.rand(scale_shape(ROWS, COLUMNS, group)) for name, group in LAYOUTS.items()}
    seconds = {name: [] for name in LAYOUTS}
    for round_ in range(rounds + 1):
        for name in LAYOUTS:
            for copy in copies:
                start = time.perf_counter()
                native.linear_int8(inputs, copy, scales[name], None, out)
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    return {
        name: (quantized.numel() + scales[name].numel() * 4) / statistics.median(values)
        for name, values in seconds.items()
    }


def report() -> str:
    lines = [f"{'relative error of weights / products':40}" + "".join(f"{name:>24}" for name in LAYOUTS)]
    for title, weight in distributions().items():
        found = (errors(weight, group) for group in LAYOUTS.values())
        lines.append(f"{title:40}" + "".join(f"{w:>13.5f} / {p:.5f}" + " " for w, p in found))
    if native.available():
        rates = product_rates()
        bandwidth = native.memory_bandwidth()
        cells = (f"{rate / 1e9:.1f} GB/s ({rate / bandwidth:.2f})" for rate in rates.values())
        lines.append(f"{'product (share of read bandwidth)':40}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def test_error(benchmark):
    weights = distributions()
    for title, weight in weights.items():
        for name, group in LAYOUTS.items():
            benchmark.extra_info[f"{title}, {name}"] = errors(weight, group)
    assert errors(weights["normal"], None)[1] < 0.012
    benchmark(errors, weights["normal"], None)


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
def test_product(benchmark):
    for name, rate in product_rates().items():
        benchmark.extra_info[f"{name}, GB/s"] = round(rate / 1e9, 2)
    benchmark.pedantic(product_rates, kwargs={"rounds": 1}, rounds=1)


@pytest.mark.parametrize("group", LAYOUTS.values(), ids=LAYOUTS)
def test_quantiser(benchmark, group):
    weight = torch.randn(2730, COLUMNS)
    benchmark(quantize_rows, weight, group)
    benchmark.extra_info["weights/s"] = weight.numel() / benchmark.stats["median"]


if __name__ == "__main__":
    print(report())
