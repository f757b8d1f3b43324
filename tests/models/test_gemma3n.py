"""Gemma-3n: recorded intermediates, its parts against plain loops, its configuration. test_gemma.py has the rest."""

import pytest
import torch
from conftest import FIXTURES, cases, load_case

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.config import Gemma3nConfig, parse_config
from thl_engine.kernels import altup, geglu
from thl_engine.models import gemma, gemma3n

TOLERANCE = 1e-4  # relative to the largest magnitude of the tensor
CASE = load_case(FIXTURES / "gemma3n" / "forward48")


def engine(backend: str, case=CASE, **options) -> Engine:
    return Engine.from_state_dict("gemma3n", case.config, case.weights, device="cpu", backend=backend, **options)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("folder", [f for f in cases("gemma3n") if f.name.startswith("forward")], ids=lambda f: f.name)
def test_recorded_forward(folder, backend):
    case = load_case(folder)
    model = engine(backend, case)
    with model.trace() as trace:
        logits, state = model.forward(case.io["input_ids"])
    compared = 0
    for name, expected in case.io.items():
        if name == "input_ids":
            continue
        got = logits if name == "logits" else trace.steps[0][name]
        close(got if got.shape == expected.shape else got[:, :, -1:], expected)
        compared += 1
    assert compared == 10 and state.timestep == 48


def test_states_that_do_not_fit(backend):
    model = engine(backend)
    _, state = model.prefill(CASE.io["input_ids"], model.new_state())
    fields, sliding, full = state.to_dict(), "layers.0.self_attn.keys", "layers.2.self_attn.keys"
    assert fields[sliding].shape == (1, 2, 7, 12) and fields[full].shape == (1, 2, 48, 12)
    assert not any(name.startswith("layers.4.") for name in fields)  # reads layer 2's
    for name, value, message in (
        (full, fields[full][:, :, :-1], f"'{full}' has shape"),
        (full, fields[full].to(torch.int8), "is torch.int8, expected torch.float32"),
        ("timestep", torch.tensor(47), "has shape"),
        ("timestep", torch.tensor(129), "from 0 to the context's 128"),
        ("other", torch.tensor(1), "unknown field 'other'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model.state_from_dict({**fields, name: value})
    del fields["layers.3.self_attn.values"]
    with pytest.raises(CheckpointError, match="'layers.3.self_attn.values' is missing"):
        model.state_from_dict(fields)


@pytest.mark.parametrize("quantile", [None, 1.6448536, -0.2])
def test_geglu_against_its_formula(quantile):
    gate, up = torch.randn(2, 2, 3, 37, generator=torch.Generator().manual_seed(6))
    kept = gate.double()
    if quantile is not None:
        mean = kept.mean(dim=-1, keepdim=True)
        std = (kept - mean).square().mean(dim=-1, keepdim=True).sqrt()
        kept = (kept - mean - quantile * std).clamp(min=0)
    inner = kept * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (kept + 0.044715 * kept**3))) / 2
    close(geglu.geglu(gate, up, quantile).double(), inner * up, 1e-6)


def test_altup_against_loops():
    streams, mixed = torch.randn(3, 2, 5, 7), torch.randn(2, 5, 3, 3)
    predicted = altup.predict(streams, mixed)
    computed, gains = torch.randn(2, 5, 7), torch.randn(2, 5, 3)
    corrected = altup.correct(predicted, computed, 1, gains)
    for j in range(3):
        wanted = streams[j] + sum(mixed[..., j, k, None] * streams[k] for k in range(3))
        close(predicted[j], wanted, 1e-5)
        close(corrected[j], predicted[j] + gains[..., j, None] * (computed - predicted[1]), 1e-5)


def test_other_shapes_of_the_model(backend):
    """One stream, another active stream, no scale, no capping, no sharing, one inner width a layer."""
    fields = {
        **CASE.config,
        "altup_num_inputs": 3,
        "altup_active_idx": 2,
        "altup_correct_scale": False,
        "final_logit_softcapping": None,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 2,
        "intermediate_size": [33, 65],
        "layer_types": ["sliding_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.9],
        "sliding_window": 1,
    }
    for n in (3, 1):
        config = Gemma3nConfig(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in fields.items()
                if k in Gemma3nConfig.__dataclass_fields__
            }
            | {"altup_num_inputs": n, "altup_active_idx": n - 1}
        )
        generator = torch.Generator().manual_seed(n)
        weights = {b.name: gemma.initial(config, b, slice(0, b.shape[0]), generator) for b in gemma3n.blocks(config)}
        model = Engine.from_state_dict("gemma3n", config.to_dict(), weights, device="cpu", backend=backend)
        plain = Engine.from_state_dict("gemma3n", config.to_dict(), weights, device="cpu", backend="reference")
        tokens = torch.randint(110, (1, 12), generator=generator)
        close(model.forward(tokens)[0], plain.forward(tokens)[0])
        state = model.new_state()
        for t in range(12):
            logits, state = model.step(tokens[:, t], state)
        close(logits, plain.forward(tokens)[0][:, -1])
        close(model.prefill(tokens, model.new_state())[0], logits)
    with pytest.raises(ConfigError, match="batch of 2, but the state holds 1"):
        model.forward(tokens.expand(2, -1), model.new_state())


def test_other_models_are_told_apart():
    for model_type in ("gemma3", "gemma2", "gemma3n_vision"):
        with pytest.raises(ConfigError, match=f"model_type '{model_type}' is not supported; supported: .*gemma3n"):
            parse_config({"model_type": model_type, "text_config": {}})


def test_forms_of_the_configuration():
    size = parse_config({"model_type": "gemma3n"})
    assert size == parse_config(size.to_dict()) and size.kv_source(33) == 18 and size.kv_source(34) == 19
    flat = {**CASE.config, "model_type": "gemma3n_text"}
    nested = {"model_type": "gemma3n", "text_config": flat, "vision_config": {}}
    assert parse_config(flat) == parse_config(nested) == parse_config(CASE.config) == parse_config(flat, "gemma3n")
    one = {
        **CASE.config,
        "activation_sparsity_pattern": 0,
        "intermediate_size": 7,
        "rope_theta": 5.0,
        "rope_parameters": None,
    }
    assert parse_config(one).activation_sparsity_pattern == (0.0,) * 6 and parse_config(one).rope_theta == 5.0
    assert parse_config({**one, "rope_parameters": {"full_attention": {"rope_theta": 3}}}).rope_theta == 3.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_activation", "silu", "hidden_activation is 'silu'; supported is 'gelu_pytorch_tanh'"),
        ("attention_bias", True, "attention_bias is True"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("rope_scaling", {"factor": 2}, "rope_scaling"),
        ("rope_parameters", 3, "rope_parameters must be an object"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported are"),
        ("rope_parameters", {"other": {}}, "'other' is {}; expected an object for each of full_attention"),
        ("layer_types", ["full_attention"] * 5, "layer_types .* 6 entries"),
        ("layer_types", ["full"] * 6, "entries of 'sliding_attention' or 'full_attention'"),
        ("layer_types", [1] * 6, "layer_types, entry 0, must be a name"),
        ("activation_sparsity_pattern", [1.0] * 6, "less than 1"),
        ("intermediate_size", [0] * 6, "entries of at least 1"),
        ("num_kv_shared_layers", 6, "num_kv_shared_layers"),
        ("num_kv_shared_layers", 4, "each shared type before"),
        ("num_kv_shared_layers", -1, "0 or more"),
        ("altup_active_idx", 4, r"one of the altup_num_inputs \(4\)"),
        ("altup_num_inputs", 65, "at most 64"),
        ("num_key_value_heads", 3, "multiple of num_key_value_heads"),
        ("head_dim", 11, "even"),
        ("final_logit_softcapping", 0.0, "null .no capping. or more than 0"),
        ("sliding_window", 0, "at least 1"),
        ("rms_norm_eps", -1e-6, "0 or more"),
        ("rope_theta", 0, "more than 0"),
        ("num_layer", 3, "unknown field"),
        ("laurel_rank", "64", "must be a whole number"),
        ("rms_norm_eps", float("nan"), "must be finite"),
    ],
)
def test_configurations_that_cannot_work(field, value, message):
    config = {**CASE.config, field: value}
    if field == "rope_theta":
        del config["rope_parameters"]
    with pytest.raises(ConfigError, match=message):
        parse_config(config)
