"""One step of decoding: THL as published by default (174 M parameters, int8), from memory and streamed.

    pytest benchmarks/bench_step.py --benchmark-only

Every benchmark notes tokens/s, bytes a token, and their product as a share of the bandwidth of plain reading, which is
measured in the same run before and after. `thl bench` gives the same figures for any checkpoint.
"""

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.ops import native
from thl_engine.report.bandwidth import read_bandwidth

TOKENS = 256  # four periods of the default clocks, 1, 8 and 64
CPU = torch.device("cpu")
BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    """Random weights of the default configuration, on disk (/tmp may be memory, /var/tmp is not)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench_step") as folder:
        path = Path(folder) / "default.safetensors"
        init_checkpoint("thl", {}, path, quantize="int8")
        yield path


def decode(benchmark, checkpoint: Path, tokens: int, **options: object) -> dict[str, float]:
    """Times single steps with random tokens; returns what it noted."""
    rates = [read_bandwidth(CPU) for _ in range(3)]
    with Engine.from_pretrained(checkpoint, device="cpu", **options) as engine:
        ids = itertools.cycle(torch.randint(engine.config.vocab_size, (1024, 1)))
        state = engine.new_state()
        benchmark.pedantic(lambda: engine.step(next(ids), state), rounds=tokens, warmup_rounds=16)
        plan = engine.plan()
    rates += [read_bandwidth(CPU) for _ in range(3)]
    if benchmark.stats is None:  # run with --benchmark-disable
        pytest.skip("nothing was timed")
    speed = 1.0 / benchmark.stats.stats.mean
    found = {
        "tokens/s": round(speed, 2),
        "MB/token": round(plan.bytes_per_token / 1e6, 1),
        "MB/token streamed": round(plan.bytes_streamed_per_token / 1e6, 1),
        "measured GB/s": round(statistics.median(rates) / 1e9, 2),
        "ratio": round(plan.bytes_per_token * speed / statistics.median(rates), 3),
    }
    benchmark.extra_info.update(found)
    print("\n" + ", ".join(f"{name} {value}" for name, value in found.items()))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_resident(benchmark, checkpoint, backend):
    decode(benchmark, checkpoint, TOKENS if backend == "native" else TOKENS // 4, backend=backend, stream=False)


@pytest.mark.parametrize("budget", ["32MiB", "96MiB"])
def test_step_streamed(benchmark, checkpoint, budget):
    found = decode(benchmark, checkpoint, TOKENS // 4, stream=True, memory_budget=budget)
    assert found["MB/token streamed"] > 0
