"""The memory of a process against the plan: what an engine adds to what it takes to import torch and load all code.

    pytest benchmarks/bench_memory.py --benchmark-only -s

Each case runs in a process of its own, with contexts that are full at the end: prompts, steps, texts, then `forward`.
tests/engine/test_memory_growth.py has a smaller grid.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.ops import native

GROWTH = Path(__file__).parents[1] / "tests" / "engine" / "memory_growth.py"
MODELS = {  # and a small one of the same kind, which loads the code
    "thl": (
        {"vocab_size": 8000, "tier_dims": [1024, 1024, 1024], "embedding_dim": 1024, "value_dim": 1024},
        {"vocab_size": 80, "tier_dims": [64, 64, 64], "embedding_dim": 64, "value_dim": 64},
    ),
    "inl": (
        {"vocab_size": 8000, "d_model": 1024, "num_layers": 4, "num_heads": 16, "max_seq_len": 640},
        {"vocab_size": 80, "d_model": 64, "num_layers": 1, "num_heads": 4, "max_seq_len": 64},
    ),
    "him": ({}, {"vocab_size": 300, "num_encoder_layers": 3}),
    "hrm": (
        {"vocab_size": 8000, "hidden_size": 768, "num_heads": 12, "halt_max_steps": 2},
        {"vocab_size": 80, "hidden_size": 64, "num_heads": 4, "L_layers": 1, "H_layers": 1, "halt_max_steps": 2},
    ),
}
CASES = [
    (model, options, batch, budget)
    for model, options in (("thl", {}), ("inl", {}), ("inl", {"kv_cache": "int8"}), ("him", {}), ("hrm", {}))
    for batch in ((1,) if model == "him" else (1, 4))
    for budget in (1.0, 1.5, 3.0)
]
TOKENS = {"thl": 200, "inl": 320, "him": 256, "hrm": 72}
BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("model", "options", "batch", "budget"), CASES, ids=str)
def test_growth_is_what_was_planned(benchmark, tmp_path, model, options, batch, budget, backend):
    paths = [tmp_path / "model.safetensors", tmp_path / "small.safetensors"]
    for path, config in zip(paths, MODELS[model], strict=True):
        init_checkpoint(model, config, path, quantize="int8")
    options = {**options, "backend": backend, **({"context": TOKENS[model]} if model == "inl" else {})}
    given = {"path": str(paths[0]), "small": str(paths[1]), "options": options, "budget": budget}
    command = [sys.executable, str(GROWTH), json.dumps({**given, "tokens": TOKENS[model], "batch": batch})]

    def run() -> list[tuple[str, int, int]]:
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    found = benchmark.pedantic(run, rounds=1)
    for calls, grown, planned in found:
        benchmark.extra_info[calls] = {"grown MB": round(grown / 1e6, 1), "planned MB": round(planned / 1e6, 1)}
        print(f"\n{model} x{batch} {options} {calls}: grown by {grown / 1e6:.1f} MB, {planned / 1e6:.1f} MB planned")
    assert all(grown <= planned + max(0.05 * planned, 8 << 20) for _, grown, planned in found)
