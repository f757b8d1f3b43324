"""int8 products of one row of activations, beside plain reading of memory and torch's own int8 product.

    pytest benchmarks/bench_ops.py --benchmark-only

The matrices of a case take 600 MB, many times the last-level cache, so every weight comes from memory. Rates are
medians of passes over all of them, the three kinds of pass in turn; the error is against float64 with the same int8
weights.
"""

import statistics
import time

import pytest
import torch

from thl_engine.ops import native
from thl_engine.paging.reader import Arena

WORKING_SET = 600 << 20
ROUNDS = 9
SETTLE_SECONDS = 0.05  # torch's threads spin for a while after a product and would share the cores with the next pass


@pytest.mark.skipif(not native.available(), reason="the native extension is not built here")
@pytest.mark.parametrize("rows, columns", [(4096, 4096), (11008, 4096), (12288, 12288), (12288, 36864)])
def test_int8_gemv(benchmark, rows, columns):
    count = max(2, WORKING_SET // (rows * columns))
    # Like an engine's weights in memory of its own, in huge pages.
    memory = Arena(count * rows * columns).tensor().view(torch.int8).view(count, rows, columns)
    memory.random_(-127, 128)
    matrices, scales = list(memory), torch.rand(rows) * 1e-3
    x, out = torch.randn(1, columns), torch.empty(1, rows)
    half, half_scales = x.bfloat16(), scales.bfloat16()

    def ours() -> None:
        for matrix in matrices:
            native.linear_int8(native.pack_activations(x), matrix, scales, None, out)

    def peer() -> None:
        for matrix in matrices:
            torch.ops.aten._weight_int8pack_mm(half, matrix, half_scales)

    def rate(work) -> float:
        time.sleep(SETTLE_SECONDS)
        started = time.perf_counter()
        work()
        return memory.numel() / (time.perf_counter() - started)

    rates: dict[str, list[float]] = {"ours": [], "peer": [], "read": []}

    def turn() -> None:
        rates["ours"].append(rate(ours))
        # The same memory: how fast it is depends on where the system has placed it.
        rates["read"].append(memory.numel() / native.read_seconds(memory.view(-1).view(torch.float32)))
        rates["peer"].append(rate(peer))

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=1)
    median = {name: statistics.median(values[1:]) for name, values in rates.items()}
    native.linear_int8(native.pack_activations(x), matrices[0], scales, None, out)
    exact = x.double() @ (matrices[0].double() * scales.double()[:, None]).T
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error <= 1e-4
    found = {
        "GB/s": median["ours"] / 1e9,
        "read GB/s": median["read"] / 1e9,
        "share of reading": median["ours"] / median["read"],
        "times torch int8": median["ours"] / median["peer"],
        "relative error": error,
    }
    benchmark.extra_info.update(found)
    print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
