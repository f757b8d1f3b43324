"""Gemma-3n and Gemma 4, what both do alike: greedy runs, decoding forms against each other, states, folders."""

import json

import pytest
import torch
from conftest import FIXTURES, cases, load_case
from safetensors.torch import save_file

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.config import parse_config
from thl_engine.models import architecture, gemma

TOLERANCE = 1e-4  # relative to the largest magnitude of the tensor
CASES = {
    "gemma3n": load_case(FIXTURES / "gemma3n" / "forward48"),
    "gemma4": load_case(FIXTURES / "gemma4" / "forward40"),
}
GREEDY = [folder for model in CASES for folder in cases(model) if folder.name.startswith("greedy")]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def engine(case, backend: str, **options) -> Engine:
    return Engine.from_state_dict(type_of(case), case.config, case.weights, device="cpu", backend=backend, **options)


def type_of(case) -> str:
    return parse_config(case.config).model_type


def random_tokens(case, seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(case.config["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("folder", GREEDY, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_recorded_greedy_tokens(folder, backend):
    case = load_case(folder)
    model = engine(case, backend)
    ids = case.io["prompt_ids"]
    logits, state = model.prefill(ids, model.new_state())
    for step in range(case.meta["run"]["new_tokens"]):
        close(logits, case.io["step_logits"][:, step])
        following = logits.argmax(dim=-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
        logits, state = model.step(following, state)
    assert torch.equal(ids, case.io["output_ids"])


def test_one_by_one_in_pieces_and_whole(case, backend):
    """Contexts well beyond the window and the rolling buffer, in pieces of many lengths."""
    model = engine(case, backend)
    tokens = random_tokens(case, 1, 2, 128)
    whole, _ = model.forward(tokens)
    state, at = model.new_state(2), 0
    for count in (1, 2, 7, 8, 9, 1, 30, 64, 6):
        logits, state = model.forward(tokens[:, at : at + count], state)
        close(logits, whole[:, at : at + count])
        at += count
    assert at == 128
    state, at = model.new_state(2), 0
    for count in (2, 9, 1, 70, 46):
        logits, state = model.prefill(tokens[:, at : at + count], state)
        at += count
        close(logits, whole[:, at - 1])
    state = model.new_state(2)
    for t in range(128):
        logits, state = model.step(tokens[:, t], state)
        close(logits, whole[:, t])
    with pytest.raises(ConfigError, match="129 tokens long.*max_position_embeddings is 128"):
        model.step(tokens[:, 0], state)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_rows_do_not_depend_on_the_batch(case, backend, quantize):
    model = engine(case, backend, quantize=quantize)
    tokens = random_tokens(case, 2, 3, 70)
    together, _ = model.forward(tokens)
    for b in range(3):
        alone, _ = model.forward(tokens[b : b + 1])
        close(alone, together[b : b + 1])
        assert backend == "reference" or torch.equal(alone, together[b : b + 1])
    states = model.new_state(3), [model.new_state() for _ in range(3)]
    for t in range(9):
        together, _ = model.step(tokens[:, t], states[0])
        alone = torch.cat([model.step(tokens[b : b + 1, t], states[1][b])[0] for b in range(3)])
        close(alone, together)
        assert backend == "reference" or torch.equal(alone, together)


def test_a_saved_context_goes_on_bit_for_bit(case, backend, tmp_path):
    model = engine(case, backend)
    tokens = random_tokens(case, 3, 2, 90)
    for length in (0, 3, 71):
        state = model.new_state(2)
        if length:
            _, state = model.prefill(tokens[:, :length], state)
        model.save_state(state, tmp_path / "state.safetensors")
        restored, fork = model.load_state(tmp_path / "state.safetensors"), state.clone()
        for t in range(length, length + 8):
            logits, state = model.step(tokens[:, t], state)
            assert torch.equal(model.step(tokens[:, t], restored)[0], logits)
        assert fork.timestep == length
        assert torch.equal(
            model.step(tokens[:, length], fork)[0],
            model.step(tokens[:, length], model.load_state(tmp_path / "state.safetensors"))[0],
        )


def test_options_of_a_state(case, backend):
    model = engine(case, backend)
    tokens = random_tokens(case, 4, 1, 50)
    expected, _ = model.forward(tokens)
    small, wide = model.new_state(context=50, kv_cache="int8"), model.new_state(context=50)
    assert 2 * small.nbytes < wide.nbytes < model.new_state().nbytes
    found, small = model.forward(tokens, small)
    close(found, expected, 0.05)
    with pytest.raises(ConfigError, match=r"51 tokens long; the context ends at 50 \(option context\)"):
        model.step(tokens[:, 0], small)
    for options, message in (
        ({"kv_cache": "int4"}, "kv_cache is 'int4'; it must be one of float32, int8"),
        ({"context": 129}, "from 1 to max_position_embeddings"),
        ({"context": 0}, "context is 0"),
        ({"cycles": 1}, "have no option cycles"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.new_state(**options)


FLAT = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "torch_dtype": "float32"}
OWN = {
    "gemma3n": {**FLAT, "query_pre_attn_scalar": 12, "intermediate_size": 56},
    "gemma4": {**FLAT, "partial_rotary_factor": 0.25, "global_head_dim": 16, "num_global_key_value_heads": None},
}


def published(case, path, prefix: str, shards: int, **outer) -> None:
    """A folder as both are published: sharded, the decoder among parts for images and sound."""
    model = type_of(case)
    left = ("rope_parameters", "per_layer_config")
    text = {**{k: v for k, v in case.config.items() if k not in left}, "model_type": f"{model}_text", **OWN[model]}
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": model,
                "architectures": ["ForConditionalGeneration"],
                "text_config": text,
                "vision_config": {"model_type": f"{model}_vision"},
                "audio_config": None,
                "image_token_id": 3,
                "eos_token_id": [1, 106],
                **outer,
            }
        )
    )
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in case.weights.items()}
    tensors |= {
        "model.vision_tower.timm_model.conv.weight": torch.ones(3, 2, 2),
        "model.embed_audio.x": torch.ones(4),
        f"{prefix}layers.5.self_attn.k_proj.weight": torch.ones(24, 40),
        "lm_head.weight": case.weights["model.embed_tokens.weight"].clone(),
    }
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        part = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, path / part)
        weight_map |= dict.fromkeys(names[i::shards], part)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_a_published_folder(case, prefix, tmp_path, backend, caplog):
    published(case, tmp_path, prefix, 3)
    model = Engine.from_pretrained(tmp_path, device="cpu", backend=backend)
    said = [line for line in caplog.messages if "not used here" in line]
    assert len(said) == 1 and "'vision_config'" in said[0] and "audio" not in said[0]
    logits, _ = model.forward(case.io["input_ids"])
    close(logits, case.io["logits"])
    streamed = Engine.from_pretrained(tmp_path, device="cpu", backend=backend, stream=True)
    assert torch.equal(streamed.forward(case.io["input_ids"])[0], logits)


def test_checkpoints_of_other_variants(case, tmp_path):
    published(case, tmp_path, "model.language_model.", 1, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ConfigError, match="quantised by another tool .*'awq'.*; supported are float checkpoints"):
        Engine.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="images or sound without a text_config; supported is the text part"):
        parse_config({"model_type": type_of(case), "vision_config": {}})
    only = {"model.vision_tower.x": torch.ones(2)}
    with pytest.raises(CheckpointError, match="'model.embed_tokens.weight' .* is missing"):
        Engine.from_state_dict(type_of(case), case.config, only)


def test_names_of_published_checkpoints(case):
    config = parse_config(case.config)
    names = {
        "model.language_model.norm.weight": "model.norm.weight",
        "language_model.model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
        "model.layers.3.self_attn.k_proj.weight": "model.layers.3.self_attn.k_proj.weight",
        "model.layers.5.self_attn.k_proj.weight": None,
        "model.language_model.layers.5.self_attn.k_norm.weight": None,
        "model.layers.5.self_attn.q_proj.weight": "model.layers.5.self_attn.q_proj.weight",
        "model.language_model.layers.5.layer_scalar": "model.layers.5.layer_scalar",
        "model.vision_tower.timm_model.x": None,
        "audio_tower.y": None,
        "model.embed_audio.z": None,
        "model.layers.99.self_attn.k_proj.weight": "model.layers.99.self_attn.k_proj.weight",
    }
    for name, stored in names.items():
        assert gemma.stored_name(config, name) == stored, name


def test_every_tensor_of_the_recording_is_a_block(case):
    blocks = architecture(type_of(case)).blocks(parse_config(case.config))
    assert {b.name: b.shape for b in blocks} == {k: tuple(v.shape) for k, v in case.weights.items()}


def test_a_new_model_through_the_commands(case, tmp_path, succeeds):
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    path, model = tmp_path / "model.safetensors", type_of(case)
    succeeds("init", "--model-type", model, "--config", tmp_path / "config.json", "--quantize", "int8", path)
    count = sum(tensor.numel() for tensor in case.weights.values())
    assert f"{model}, {count:,} parameters" in succeeds("inspect", path)
    logits, _ = Engine.from_pretrained(path, device="cpu").forward(case.io["input_ids"])
    assert 0.3 < logits.std() < 3  # the features have magnitude 1, the tied rows 1/√D an entry
