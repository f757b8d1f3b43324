"""One step of INL, HIM and HRM with random int8 weights, beside the ceiling of each on this machine.

    pytest benchmarks/bench_models.py --benchmark-only

INL decodes one token at context 64 and reads all its weights for it: its ceiling is plain reading of memory. A pass of
HIM over 64 tokens and a step of HRM over a window of 64 use every weight 64 times or more: theirs is the rate of int8
products, as the best of native's large ones reaches it. Ceilings are measured between the steps; ratios are of medians.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from thl_engine import Engine
from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.ops import native
from thl_engine.paging.reader import Arena

INL = {
    "vocab_size": 50000,
    "d_model": 512,
    "num_layers": 6,
    "num_heads": 8,
    "num_iterations_per_layer": 5,
    "feedforward_dim": 2048,
    "max_seq_len": 2048,
    "lowrank_ratio": 0.125,
    "adaptive_convergence_threshold": 0.001,
    "hierarchical_group_size": 64,
    "excitation_sparsity": 0.1,
}
HIM = {
    "vocab_size": 32000,
    "embed_dim": 160,
    "num_heads": 8,
    "num_kv_heads": 2,
    "num_encoder_layers": 10,
    "dim_feedforward": 320,
    "max_answer_len": 64,
    "mem_slots": 16,
    "mem_rank": 16,
    "reasoning_tokens": 64,
    "max_seq_len": 512,
}
HRM = {
    "vocab_size": 100,
    "hidden_size": 256,
    "num_heads": 8,
    "L_layers": 3,
    "H_layers": 3,
    "expansion": 2.5,
    "halt_max_steps": 8,
}
TOKENS = 64
READ_BYTES = 192 << 20  # six times the largest last-level cache met so far
PRODUCT = (TOKENS, 4096, 4096)  # activations, outputs, inputs
EVERY = 8  # steps between two measurements of the ceiling

pytestmark = pytest.mark.skipif(not native.available(), reason="the native extension is not built here")


def engine_of(model_type: str, config: dict, folder: Path) -> Engine:
    path = folder / f"{model_type}.safetensors"
    init_checkpoint(model_type, config, path, quantize="int8")
    return Engine.from_pretrained(path, device="cpu", backend="native", stream=False)


def compare(
    benchmark, step: Callable[[], None], ceiling: Callable[[], float], work: float, rounds: int, unit: str
) -> None:
    """Times steps that do `work` units each, and notes their rate as a share of the ceiling, in units per second."""
    ceilings, number = [], itertools.count()

    def between() -> None:
        if next(number) % EVERY == 0:
            ceilings.append(ceiling())
            step()  # brings back what the measurement has driven out of the caches

    benchmark.pedantic(step, setup=between, rounds=rounds, warmup_rounds=3)
    if benchmark.stats is None:  # run with --benchmark-disable
        pytest.skip("nothing was timed")
    seconds, best = benchmark.stats.stats.median, statistics.median(ceilings)
    found = {
        "steps/s": round(1.0 / seconds, 2),
        f"{unit}/step": work,
        f"ceiling {unit}/s": best,
        "ratio": round(work / seconds / best, 3),
    }
    benchmark.extra_info.update(found)
    print("\n" + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def reading() -> Callable[[], float]:
    """Measures bytes read per second."""
    memory = Arena(READ_BYTES).tensor().view(torch.float32).fill_(1.0)  # in huge pages, as an engine's weights are
    return lambda: READ_BYTES / native.read_seconds(memory)


def multiplying() -> Callable[[], float]:
    """Measures int8 multiplications with a weight per second."""
    batch, rows, columns = PRODUCT
    packed, out = native.pack_activations(torch.randn(batch, columns)), torch.empty(batch, rows)
    weights, scales = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows)

    def rate() -> float:
        started = time.perf_counter()
        native.linear_int8(packed, weights, scales, None, out)
        return batch * rows * columns / (time.perf_counter() - started)

    return rate


def products(engine: Engine, step: Callable[[], None]) -> int:
    """Multiplications with a weight that a step makes."""
    linear, found = engine.ops.linear, 0

    def counted(x: torch.Tensor, matrix, *args, **options) -> torch.Tensor:
        nonlocal found
        found += x.numel() * matrix.shape[0]
        return linear(x, matrix, *args, **options)

    engine.ops.linear = counted
    step()
    del engine.ops.linear
    return found


def test_inl_decodes(benchmark, tmp_path):
    with engine_of("inl", INL, tmp_path) as engine:
        state, token = engine.new_state(), torch.tensor([5])
        engine.prefill(torch.randint(INL["vocab_size"], (1, TOKENS)), state)

        def step() -> None:
            engine.step(token, state)
            state.timestep = TOKENS  # forgets the token

        compare(benchmark, step, reading(), engine.plan().bytes_per_token, 256, "bytes")


def test_him_reads_64_tokens(benchmark, tmp_path):
    with engine_of("him", HIM, tmp_path) as engine:
        tokens = torch.randint(HIM["vocab_size"], (1, TOKENS))

        def step() -> None:
            engine.forward(tokens)

        compare(benchmark, step, multiplying(), products(engine, step), 64, "products")


def test_hrm_steps_with_8_segments(benchmark, tmp_path):
    with engine_of("hrm", HRM, tmp_path) as engine:
        state, token = engine.new_state(cycles="normal"), torch.tensor([5])
        engine.prefill(torch.randint(HRM["vocab_size"], (1, TOKENS)), state)

        def step() -> None:
            engine.step(token, state)

        compare(benchmark, step, multiplying(), products(engine, step), 32, "products")
