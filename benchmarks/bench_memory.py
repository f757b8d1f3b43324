"""The memory of a process against the plan: what a streamed engine adds to what it takes to import torch.

    pytest benchmarks/bench_memory.py --benchmark-only -s

Each case runs in a process of its own, which reads a context that is full at the end, several sequences at once.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thl_engine.checkpoint.convert import init_checkpoint
from thl_engine.ops import native

MODELS = {
    "thl": {"vocab_size": 8000, "tier_dims": [1024, 1024, 1024], "embedding_dim": 1024, "value_dim": 1024},
    "inl": {"vocab_size": 8000, "d_model": 1024, "num_layers": 4, "num_heads": 16, "max_seq_len": 320},
    "him": {},
    "hrm": {"vocab_size": 8000, "hidden_size": 768, "num_heads": 12, "halt_max_steps": 2},
}
INT8_CACHE = {"kv_cache": "int8"}
CASES = [("thl", {}), ("inl", {}), ("inl", INT8_CACHE), ("him", {}), ("hrm", {})]
BACKENDS = ["reference", *(["native"] if native.available() else [])]
SEQUENCES = 3
RUN = """
import json, sys
import torch
from thl_engine import Engine, memory
from thl_engine.ops.backends import load_ops
path, options, sequences = json.loads(sys.argv[1])
torch.nn.functional.softmax(torch.randn(64, 64) @ torch.randn(64, 64), dim=-1)  # loads what torch loads late
with Engine.from_pretrained(path, device="cpu", stream=True, batch_size=sequences, **options) as engine:
    budget = int(1.5 * engine.plan().least_budget)
before = memory.resident_bytes()
memory.reset_peak()
with Engine.from_pretrained(path, device="cpu", memory_budget=budget, batch_size=sequences, **options) as engine:
    length = getattr(engine.config, "max_seq_len", 72)
    tokens = torch.randint(engine.config.vocab_size, (sequences, length))
    logits, state = engine.prefill(tokens[:, :-2], engine.new_state(sequences))
    for column in tokens[:, -2:].unbind(1):
        engine.step(column, state)
    print(json.dumps([memory.peak_bytes() - before, engine.plan().peak_memory_bytes]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model", "options"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "default",
)
def test_peak_is_within_the_plan(benchmark, tmp_path, model, options, backend):
    path = tmp_path / "model.safetensors"
    init_checkpoint(model, MODELS[model], path, quantize="int8")
    given = json.dumps([str(path), {**options, "backend": backend}, SEQUENCES])

    def run() -> list[int]:
        command = [sys.executable, "-c", RUN, given]
        return json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
        )

    grown, planned = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update({"grown MB": round(grown / 1e6, 1), "planned MB": round(planned / 1e6, 1)})
    print(f"\n{model} {options} {backend}: grown by {grown / 1e6:.1f} MB, {planned / 1e6:.1f} MB planned")
    assert grown <= planned + (24 << 20)  # reader threads, the allocator's spare pages
