"""Gemma 4 against Transformers where it is installed: tiny random models of many configurations, and a saved folder."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")

from thl_engine import Engine  # noqa: E402

S, F = "sliding_attention", "full_attention"
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
SMALL = dict(vocab_size=300, hidden_size=24, intermediate_size=20, num_hidden_layers=5, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=12, global_head_dim=16, max_position_embeddings=96, sliding_window=5)
SMALL |= dict(layer_types=[S, F, S, S, F], vocab_size_per_layer_input=300, hidden_size_per_layer_input=6)
SMALL |= dict(num_kv_shared_layers=2, use_double_wide_mlp=True, final_logit_softcapping=10.0)
OTHERS = {
    "as it is": {},
    "keys are values": dict(attention_k_eq_v=True, num_global_key_value_heads=1),
    "nothing shared": dict(num_kv_shared_layers=0, final_logit_softcapping=None),
    "three shared": dict(num_kv_shared_layers=3, use_double_wide_mlp=False),
    "half rotated": dict(
        rope_parameters={S: PLAIN, F: {**PLAIN, "rope_type": "proportional", "partial_rotary_factor": 0.5}}
    ),
    "all rotated": dict(rope_parameters={S: {**PLAIN, "rope_theta": 2e4}, F: PLAIN}, global_head_dim=20),
    "layers by number": dict(per_layer_config={i: {"head_dim": 16, "num_key_value_heads": 1} for i in ("1", "4")}),
    "a window of one": dict(num_key_value_heads=1, sliding_window=1, rms_norm_eps=1e-2),
    "full layers only": dict(layer_types=[F] * 5),
    "images see each other": dict(use_bidirectional_attention="vision", vocab_size_per_layer_input=280),
}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
TOKENS = dict(image_token_id=290, audio_token_id=291, video_token_id=292, boi_token_id=293, eoi_token_id=294)


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # the embedding once more
        scale, centre = (0.1, 1.0) if tensor.dim() == 1 else (tensor.shape[-1] ** -0.5, 0.0)
        tensor.copy_(centre + scale * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("change", OTHERS)
def test_random_models(change, backend):
    config = transformers.Gemma4TextConfig(**{**SMALL, **OTHERS[change]}, attn_implementation="eager")
    original = transformers.Gemma4ForCausalLM(config).eval()
    tokens = torch.randint(280, (2, 41), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        randomise(original)
        expected = original(tokens).logits
    weights = {name: tensor for name, tensor in original.state_dict().items() if name != "lm_head.weight"}
    engine = Engine.from_state_dict(
        "gemma4", json.loads(config.to_json_string()), weights, device="cpu", backend=backend
    )
    found, _ = engine.forward(tokens, engine.new_state(2))
    assert (found - expected).abs().max() <= 5e-5 * expected.abs().max()
    state = engine.new_state(2)
    for column in tokens.T:
        logits, state = engine.step(column, state)
    assert (logits - expected[:, -1]).abs().max() <= 5e-5 * expected.abs().max()


def test_a_saved_multimodal_folder(tmp_path, caplog):
    config = transformers.Gemma4Config(
        text_config=SMALL, vision_config={**VISION, "head_dim": 8}, audio_config=None, **TOKENS
    )
    original = transformers.Gemma4ForConditionalGeneration(config).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        randomise(original.model.language_model)
        expected = original(input_ids=tokens).logits
    original.save_pretrained(tmp_path)
    with Engine.from_pretrained(tmp_path, device="cpu", backend="reference") as engine:
        found, _ = engine.forward(tokens)
    assert (found - expected).abs().max() <= 5e-5 * expected.abs().max()
    assert len([line for line in caplog.messages if "not used here: 'vision_config'" in line]) == 1
