"""A random Gemma-3n checkpoint, larger than the budget, decoded by this engine and by transformers with accelerate.

Both get the same float32 file, the same budget and the same threads, and must choose the same tokens. Reported beside
each other: the median time of a token with a warm page cache and without it, bytes from the disk, peak memory; and
what this engine makes of the same budget with int8 weights.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from thl_engine.checkpoint.convert import init_checkpoint, quantize_checkpoint

BUDGET = 512 << 20
TOKENS = 8
THREADS = 2
LAYERS = 12
CONFIG = {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": [4096] * LAYERS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 128,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * (LAYERS // 4),
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 32768,
    "hidden_size_per_layer_input": 128,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 4,
    "laurel_rank": 64,
    "activation_sparsity_pattern": [0.95] * 4 + [0.0] * (LAYERS - 4),
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
    "attention_bias": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint as float32, readable by both, and as int8."""
    plain, packed = tmp_path_factory.mktemp("float32"), tmp_path_factory.mktemp("int8")
    for folder in (plain, packed):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    init_checkpoint("gemma3n", CONFIG, plain / "model.safetensors", seed=0, quantize="none")
    quantize_checkpoint(plain / "model.safetensors", packed / "model.safetensors")
    return {"float32": plain, "int8": packed}


def decode(engine: str, folder: Path, cache: str) -> dict:
    """What decode.py measured of one engine."""
    script = Path(__file__).with_name("decode.py")
    done = subprocess.run(
        [sys.executable, str(script), engine, str(folder), str(BUDGET), str(TOKENS), str(THREADS), cache],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_beside_accelerate(benchmark, folders, cache):
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    own = benchmark.pedantic(decode, ("thl_engine", folders["float32"], cache), rounds=1)
    peer = decode("accelerate", folders["float32"], cache)
    int8 = decode("thl_engine", folders["int8"], cache)
    assert own["ids"] == peer["ids"]
    benchmark.extra_info.update(
        thl_engine=own,
        accelerate=peer,
        thl_engine_int8=int8,
        budget=BUDGET,
        times_as_fast=peer["seconds_per_token"] / own["seconds_per_token"],
        times_as_fast_int8=peer["seconds_per_token"] / int8["seconds_per_token"],
    )
