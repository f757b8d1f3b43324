"""Gemma 4: whole sequences, layers that differ, its configuration. test_gemma.py has what Gemma-3n does too."""

import pytest
import torch
from conftest import FIXTURES, cases, load_case

from thl_engine import ConfigError, Engine
from thl_engine.config import PRESETS, Gemma4Config, named_config, parse_config
from thl_engine.kernels.rotary import rotary_tables
from thl_engine.models import architecture, gemma4

CASE = load_case(FIXTURES / "gemma4" / "forward40")
S, F = "sliding_attention", "full_attention"
ROPES = CASE.config["rope_parameters"]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("folder", [f for f in cases("gemma4") if f.name.startswith("forward")], ids=lambda f: f.name)
def test_recorded_forward(folder, backend):
    case = load_case(folder)
    model = Engine.from_state_dict("gemma4", case.config, case.weights, device="cpu", backend=backend)
    with model.trace() as trace:
        logits, state = model.forward(case.io["input_ids"], model.new_state(len(case.io["input_ids"])))
    close(logits, case.io["logits"], 2e-5)
    assert state.timestep == case.io["input_ids"].shape[1]
    last = f"layer{model.config.num_hidden_layers - 1}.hidden"
    assert {"per_layer_inputs", "layer0.input_hidden", last, "final_hidden"} <= trace.steps[0].keys()


def test_layers_keep_heads_of_their_own_size(backend):
    model = Engine.from_state_dict("gemma4", CASE.config, CASE.weights, device="cpu", backend=backend)
    _, state = model.prefill(CASE.io["input_ids"], model.new_state())
    fields = state.to_dict()
    assert fields["layers.0.self_attn.keys"].shape == (1, 2, 7, 12)
    assert fields["layers.2.self_attn.values"].shape == (1, 2, 40, 16)
    assert not any(name.startswith("layers.4.") for name in fields)  # reads layer 2's
    rows = [layer.keys.data.shape[2:] for layer in model.new_state(context=100).cache.layers]
    assert rows == [(71, 12), (71, 12), (100, 16), (71, 12)]
    # Layer 2 is read by itself, 4 and 6; layer 3 by itself and 5: rows of keys and values at position 50, float32.
    read = 4 * 2 * 2 * (4 * 8 * 12 + 3 * 51 * 16)
    own, state = architecture("gemma4"), model.new_state(context=100)
    assert own.traffic(model.config, state, 50) == read
    assert own.attended(model.config, state, 50) == 2 * 4 * (4 * 8 * 12 + 3 * 51 * 16)


def test_full_layers_rotate_a_share_of_their_heads():
    """The pairs of the highest frequencies, numbered over the whole head."""
    config = parse_config(CASE.config)
    assert config.rotation(0) == (1e4, 1.0) and config.rotation(2) == (1e6, 0.25)
    model = Engine.from_state_dict("gemma4", CASE.config, CASE.weights, device="cpu", backend="reference")
    _, state = model.forward(torch.tensor([[5, 5, 5]]))
    keys = state.to_dict()["layers.2.self_attn.keys"][0]
    still = [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]
    turned, _ = rotary_tables(torch.arange(3), torch.tensor([1.0, 1e6 ** (-2 / 16), *[0.0] * 6]))
    assert (turned[:, still] == 1).all() and not (turned[1:, [0, 1, 8, 9]] == 1).any()
    assert keys.shape == (2, 3, 16)


def test_without_per_layer_inputs(backend):
    fields = {**CASE.config, "hidden_size_per_layer_input": None}
    config = parse_config(fields)
    weights = {b.name: CASE.weights[b.name] for b in gemma4.blocks(config)}
    assert config.hidden_size_per_layer_input == 0 and not any("per_layer" in name for name in weights)
    model = Engine.from_state_dict("gemma4", fields, weights, device="cpu", backend=backend)
    whole, _ = model.forward(CASE.io["input_ids"])
    # The same as layers whose inputs add nothing.
    silent = {n: w * 0 if n.endswith("post_per_layer_input_norm.weight") else w for n, w in CASE.weights.items()}
    with_inputs = Engine.from_state_dict("gemma4", CASE.config, silent, device="cpu", backend=backend)
    close(whole, with_inputs.forward(CASE.io["input_ids"])[0], 1e-6)
    state = model.new_state()
    for token in CASE.io["input_ids"][0]:
        logits, state = model.step(token[None], state)
    close(logits, whole[:, -1])


@pytest.mark.parametrize("size, parameters, beside_table", [("e2b", 4.629e9, 2.280e9), ("e4b", 7.463e9, 4.644e9)])
def test_published_sizes(size, parameters, beside_table):
    config = named_config(size, "gemma4")
    assert config is PRESETS[f"gemma4-{size}"] and parse_config(config.to_dict()) == config
    blocks = gemma4.blocks(config)
    counts = {block.name: torch.Size(block.shape).numel() for block in blocks}
    assert round(sum(counts.values()) / 1e6) == parameters / 1e6
    assert (
        round(sum(n for name, n in counts.items() if "embed_tokens_per_layer" not in name) / 1e6) == beside_table / 1e6
    )
    assert all(
        config.kv_source(i) in (config.own_layers - 1, config.own_layers - 2) for i in range(config.own_layers, 35)
    )


def test_forms_of_the_configuration():
    size = parse_config({"model_type": "gemma4"})
    assert size == Gemma4Config() == parse_config(size.to_dict())
    flat = {**CASE.config, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "partial_rotary_factor": 0.25}
    del flat["rope_parameters"]
    older = {name: value for name, value in CASE.config.items() if name != "per_layer_config"} | {"global_head_dim": 16}
    nested = {"model_type": "gemma4", "text_config": CASE.config, "vision_config": {}, "audio_config": None}
    named = {name: value for name, value in CASE.config.items() if name != "model_type"}
    for form in (
        flat,
        older,
        nested,
        named,
        {**CASE.config, "use_bidirectional_attention": "vision", "attn_logit_softcapping": None},
    ):
        assert parse_config(form) == parse_config(CASE.config)
    assert parse_config(flat, "gemma4").intermediate_size == (56,) * 4 + (112,) * 3

    def parsed(**change):
        return parse_config({**older, **change})

    assert parsed(use_double_wide_mlp=False).intermediate_size == (56,) * 7
    assert parsed(intermediate_size=[1, 2, 3, 4, 5, 6, 7]).intermediate_size == (1, 2, 3, 4, 5, 6, 7)
    assert parsed(layer_types=None, num_kv_shared_layers=0).layer_types == (S, S, S, S, S, F, F)
    heads = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    assert parsed(**heads).num_key_value_heads == (2, 2, 1, 2, 1, 2, 1)
    assert parsed(**{**heads, "attention_k_eq_v": False}).num_key_value_heads == (2,) * 7  # as in Transformers
    whole = {F: {"rope_type": "default", "rope_theta": 5.0}, S: {"rope_theta": 3.0}}
    config = parsed(rope_parameters=whole)
    assert (config.rope_theta, config.rope_local_base_freq, config.partial_rotary_factor) == (5.0, 3.0, 1.0)
    half = {F: {**ROPES[F], "partial_rotary_factor": 0.5}, S: ROPES[S]}
    assert parsed(rope_parameters=half).partial_rotary_factor == 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("enable_moe_block", True, "layers with experts are not supported, dense ones are"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention is 'all'; supported are null"),
        ("hidden_activation", "silu", "hidden_activation is 'silu'; supported is 'gelu_pytorch_tanh'"),
        ("attention_bias", True, "attention_bias is True"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("rope_scaling", {"factor": 2}, "rope_scaling is .*; supported is null"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0; supported is null"),
        ("rope_parameters", 3, "rope_parameters must be an object"),
        ("rope_parameters", {F: {"rope_type": "yarn"}}, "full_attention: 'rope_type' is 'yarn'; supported are"),
        (
            "rope_parameters",
            {S: {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor'",
        ),
        (
            "rope_parameters",
            {F: {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' is 0.5",
        ),
        ("rope_parameters", {F: {**ROPES[F], "factor": 8.0}}, "'factor' is 8.0"),
        (
            "rope_parameters",
            {F: {**ROPES[F], "partial_rotary_factor": 2.0}},
            "partial_rotary_factor is 2.0; .*from 0 to 1",
        ),
        ("rope_parameters", {"rope_theta": 1e4}, "expected an object for each of full_attention"),
        ("per_layer_config", [16], "per_layer_config must be an object of layers"),
        ("per_layer_config", {"7": {"head_dim": 16}}, "'7' is no layer; there are 7"),
        ("per_layer_config", {"-1": {}}, "'-1' is no layer"),
        ("per_layer_config", {"2": 16}, "layer 2 must be an object of fields"),
        (
            "per_layer_config",
            {"2": {"sliding_window": 3}},
            "layer 2: 'sliding_window' is 3; layers may differ in head_dim",
        ),
        ("per_layer_config", {"2": {"head_dim": 16}}, "layer 4 is .12, 2.; it must be those of layer 2"),
        ("per_layer_config", {"0": {"head_dim": 15}}, "head_dim of layer 0 is 15; it must be even"),
        ("per_layer_config", {"0": {"head_dim": "x"}}, "head_dim, entry 0, must be a whole number"),
        ("per_layer_config", {"0": {"num_key_value_heads": 3}}, "num_key_value_heads of layer 0 is 3; .*a divisor"),
        ("layer_types", [S, F] * 3 + [S], "'full_attention' in the last entry"),
        ("layer_types", [F] * 6, "layer_types .* 7 entries"),
        ("layer_types", [F] * 8, "layer_types .* 7 entries"),
        ("layer_types", 3, "layer_types must be a list of names"),
        ("num_kv_shared_layers", 7, "num_kv_shared_layers"),
        ("num_kv_shared_layers", 5, "each shared type before"),
        ("num_kv_shared_layers", "3", "must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", "7", "num_hidden_layers must be a whole number"),
        ("use_double_wide_mlp", "yes", "use_double_wide_mlp must be true or false"),
        ("hidden_size_per_layer_input", -1, "0 .layers have no inputs of their own. or more"),
        ("final_logit_softcapping", 0.0, "null .no capping. or more than 0"),
        ("num_layer", 3, "unknown field"),
    ],
)
def test_configurations_that_cannot_work(field, value, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config({**CASE.config, field: value})
    assert "\n" not in str(raised.value)


def test_int8_weights_move_logits_little():
    model = Engine.from_state_dict("gemma4", CASE.config, CASE.weights, device="cpu", quantize="int8")
    close(model.forward(CASE.io["input_ids"])[0], CASE.io["logits"], 0.15)
