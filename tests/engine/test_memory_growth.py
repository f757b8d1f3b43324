"""What the plan says that an engine takes, against what the process grows by: every architecture and call, in fresh
processes, with contexts that are full at the end. benchmarks/bench_memory.py has larger models and more budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thl_engine.checkpoint.convert import init_adapters, init_checkpoint

TOLERANCE, LEAST_TOLERANCE = 0.05, 8 << 20
HERE = Path(__file__).parent
GEMMA = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "laurel_rank": 16,
    "hidden_size_per_layer_input": 64,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
}
MODELS = {  # by name: large enough that a term that is missing is seen, and one that is small
    "thl": (
        {"vocab_size": 8000, "tier_dims": [1024] * 3, "embedding_dim": 1024, "value_dim": 1024},
        {"vocab_size": 80, "tier_dims": [64] * 3, "embedding_dim": 64, "value_dim": 64},
    ),
    "inl": (
        {"vocab_size": 4000, "d_model": 768, "num_layers": 6, "num_heads": 12, "max_seq_len": 512},
        {"vocab_size": 80, "d_model": 64, "num_layers": 1, "num_heads": 4, "feedforward_dim": 64, "max_seq_len": 64},
    ),
    "him": ({"vocab_size": 16000}, {"vocab_size": 300, "num_encoder_layers": 3}),
    "hrm": (
        {"vocab_size": 8000, "hidden_size": 768, "num_heads": 12, "L_layers": 2, "H_layers": 2, "halt_max_steps": 2},
        {"vocab_size": 80, "hidden_size": 64, "num_heads": 4, "L_layers": 1, "H_layers": 1, "halt_max_steps": 2},
    ),
    "gemma3n": (
        {**GEMMA, "vocab_size": 8000, "vocab_size_per_layer_input": 8000, "hidden_size": 768, "head_dim": 96,
         "intermediate_size": [2048] * 6, "max_position_embeddings": 1024, "sliding_window": 128},
        {**GEMMA, "vocab_size": 80, "vocab_size_per_layer_input": 80, "hidden_size": 64, "head_dim": 8,
         "intermediate_size": [64] * 6, "max_position_embeddings": 64, "sliding_window": 8},
    ),
}  # fmt: skip
CASES = [  # model, options, sequences, tokens of each, the budget as a multiple of the least
    ("thl", {}, 4, 100, 1.0),
    ("thl", {}, 1, 60, 1.5),
    ("inl", {"kv_cache": "int8", "context": 384}, 1, 384, 1.0),
    ("inl", {"context": 128}, 4, 128, 1.3),
    ("him", {}, 1, 256, 1.0),
    ("hrm", {}, 4, 70, 1.0),
    ("gemma3n", {"context": 320}, 1, 320, 1.0),
    ("gemma3n", {"context": 128, "kv_cache": "int8"}, 4, 128, 1.2),
    ("hrm_gemma3n", {"context": 24}, 2, 24, 1.5),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Path of a model's two checkpoints, written when they are first asked for."""
    folder, paths = tmp_path_factory.mktemp("growth"), {}

    def write(kind):
        if kind not in paths and kind == "hrm_gemma3n":
            paths[kind] = tuple(folder / f"{kind}-{i}" for i in range(2))
            for path, base in zip(paths[kind], write("gemma3n"), strict=True):
                init_adapters(base, path)
        elif kind not in paths:
            paths[kind] = tuple(folder / f"{kind}-{i}.safetensors" for i in range(2))
            for path, config in zip(paths[kind], MODELS[kind], strict=True):
                init_checkpoint(kind, config, path, quantize="int8")
        return paths[kind]

    return write


@pytest.mark.parametrize(("kind", "options", "batch", "tokens", "budget"), CASES, ids=lambda value: str(value))
def test_growth_is_what_was_planned(made, kind, options, batch, tokens, budget):
    path, small = map(str, made(kind))
    given = {"path": path, "small": small, "options": options, "budget": budget, "tokens": tokens, "batch": batch}
    command = [sys.executable, str(HERE / "memory_growth.py"), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for calls, grown, planned in json.loads(done.stdout):
        print(f"{kind} x{batch} {calls}: grown by {grown / 2**20:.1f} MiB, planned {planned / 2**20:.1f}")
        assert abs(grown - planned) <= max(TOLERANCE * planned, LEAST_TOLERANCE), (calls, grown >> 20, planned >> 20)
