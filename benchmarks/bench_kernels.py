"""Every kernel of the triton backend on this machine's GPU, beside its own ceilings.

    pytest benchmarks/bench_kernels.py --benchmark-only

The figures are those of gpu_kernels, which `make gpu-check` keeps; they stand in `extra_info`.
"""

from importlib.util import find_spec

import pytest
import torch

if not find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device, and times under triton's interpreter mean nothing", allow_module_level=True)

from gpu_kernels import KERNELS, Bench, ceilings
from gpu_report import Row, Rows
from gpu_timing import Timer


@pytest.fixture(scope="module")
def bench() -> Bench:
    made = Bench(Timer("cuda"), Rows(None))
    ceilings(made)
    return made


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(benchmark, bench, monkeypatch, name):
    found: list[Row] = []
    monkeypatch.setattr(bench.rows, "add", found.append)
    benchmark.pedantic(KERNELS[name], args=(bench,), rounds=1)
    benchmark.extra_info.update({row.what: " ".join(row.cells()[1:]) for row in found})
    assert found and not [row for row in found if row.unit == "failed"]
