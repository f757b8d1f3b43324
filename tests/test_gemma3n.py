"""Gemma-3n: the recorded runs, its decoding forms against each other, and its parts against plain loops."""

import pytest
import torch
from conftest import FIXTURES, cases, load_case

from thl_engine import CheckpointError, ConfigError, Engine
from thl_engine.config import Gemma3nConfig
from thl_engine.kernels import altup, attention, geglu
from thl_engine.models import gemma3n
from thl_engine.models.window_cache import WindowCache

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


@pytest.mark.parametrize("folder", [f for f in cases("gemma3n") if f.name.startswith("greedy")], ids=lambda f: f.name)
def test_recorded_greedy_tokens(folder, backend):
    case = load_case(folder)
    model = engine(backend, case)
    ids = case.io["prompt_ids"]
    logits, state = model.prefill(ids, model.new_state())
    for step in range(case.meta["run"]["new_tokens"]):
        close(logits, case.io["step_logits"][:, step])
        following = logits.argmax(dim=-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
        logits, state = model.step(following, state)
    assert torch.equal(ids, case.io["output_ids"])


def test_one_by_one_in_pieces_and_whole(backend):
    """Contexts well beyond the window and the rolling buffer, in pieces of many lengths."""
    model = engine(backend)
    tokens = torch.randint(110, (2, 128), generator=torch.Generator().manual_seed(1))
    whole, _ = model.forward(tokens)
    state, at = model.new_state(2), 0
    for count in (1, 2, 7, 8, 9, 1, 30, 64, 6):
        logits, state = model.forward(tokens[:, at : at + count], state)
        close(logits, whole[:, at : at + count])
        at += count
    assert at == 128
    state = model.new_state(2)
    for t in range(128):
        logits, state = model.step(tokens[:, t], state)
        close(logits, whole[:, t])
    with pytest.raises(ConfigError, match="129 tokens long.*max_position_embeddings is 128"):
        model.step(tokens[:, 0], state)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_rows_do_not_depend_on_the_batch(backend, quantize):
    model = engine(backend, quantize=quantize)
    tokens = torch.randint(110, (3, 70), generator=torch.Generator().manual_seed(2))
    together, _ = model.forward(tokens)
    for b in range(3):
        alone, _ = model.forward(tokens[b : b + 1])
        close(alone, together[b : b + 1])
        assert backend == "reference" or torch.equal(alone, together[b : b + 1])


def test_a_saved_context_goes_on_bit_for_bit(backend, tmp_path):
    model = engine(backend)
    tokens = torch.randint(110, (2, 90), generator=torch.Generator().manual_seed(3))
    for length in (0, 3, 8, 71):
        state = model.new_state(2)
        if length:
            _, state = model.prefill(tokens[:, :length], state)
        model.save_state(state, tmp_path / "state.safetensors")
        restored, fork = model.load_state(tmp_path / "state.safetensors"), state.clone()
        for t in range(length, length + 12):
            logits, state = model.step(tokens[:, t], state)
            assert torch.equal(model.step(tokens[:, t], restored)[0], logits)
        assert fork.timestep == length
        assert torch.equal(model.step(tokens[:, length], fork)[0],
                           model.step(tokens[:, length], model.load_state(tmp_path / "state.safetensors"))[0])


def test_states_that_do_not_fit(backend):
    model = engine(backend)
    _, state = model.prefill(CASE.io["input_ids"], model.new_state())
    fields = state.to_dict()
    assert fields["sliding.0.keys"].shape == (1, 2, 7, 12) and fields["full.0.keys"].shape == (1, 2, 48, 12)
    for name, value, message in (("full.0.keys", fields["full.0.keys"][:, :, :-1], r"'full.0.keys' has shape"),
                                 ("timestep", torch.tensor(47), "has shape"),
                                 ("timestep", torch.tensor(129), "from 0 to max_position_embeddings"),
                                 ("other", torch.tensor(1), "unknown field 'other'")):
        with pytest.raises(CheckpointError, match=message):
            model.state_from_dict({**fields, name: value})
    del fields["sliding.2.values"]
    with pytest.raises(CheckpointError, match="'sliding.2.values' is missing"):
        model.state_from_dict(fields)


def test_window_cache_holds_what_a_list_of_all_positions_ends_with():
    generator = torch.Generator().manual_seed(5)
    for window, slack in ((1, 4), (2, 1), (5, 3), (8, 64)):
        cache = WindowCache.empty(2, 1, 2, 3, window, slack)
        everything, past = [torch.empty(1, 2, 0, 3)] * 4, 0
        for _ in range(60):
            count = int(torch.randint(1, slack + 3, (), generator=generator))
            for layer in range(2):
                new = torch.randn(2, 1, 2, count, 3, generator=generator)
                found = cache.append(layer, past, *new)
                for j in range(2):
                    both = everything[2 * layer + j] = torch.cat([everything[2 * layer + j], new[j]], dim=2)
                    assert torch.equal(found[j], both[:, :, -min(past, window - 1) - count :])
            past += count
            assert cache.held(1, past)[1].shape[2] == min(past, window - 1)


def test_causal_mask_with_a_window():
    for rows, past, window in ((1, 0, 1), (5, 3, 2), (4, 9, 20)):
        blocked = attention.causal(rows, past, window=window)
        for i in range(rows):
            for j in range(past + rows):
                assert blocked[i, j] == (not past + i - window < j <= past + i)


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
    fields = {**CASE.config, "altup_num_inputs": 3, "altup_active_idx": 2, "altup_correct_scale": False,
              "final_logit_softcapping": None, "num_kv_shared_layers": 0, "num_hidden_layers": 2,
              "intermediate_size": [33, 65], "layer_types": ["sliding_attention"] * 2,
              "activation_sparsity_pattern": [0.0, 0.9], "sliding_window": 1}
    for n in (3, 1):
        config = Gemma3nConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
                                  if k in Gemma3nConfig.__dataclass_fields__}
                               | {"altup_num_inputs": n, "altup_active_idx": n - 1})
        generator = torch.Generator().manual_seed(n)
        weights = {b.name: gemma3n.initial(config, b, slice(0, b.shape[0]), generator)
                   for b in gemma3n.blocks(config)}
        model = Engine.from_state_dict("gemma3n", config.to_dict(), weights, device="cpu", backend=backend)
        plain = Engine.from_state_dict("gemma3n", config.to_dict(), weights, device="cpu", backend="reference")
        tokens = torch.randint(110, (1, 12), generator=generator)
        close(model.forward(tokens)[0], plain.forward(tokens)[0])
        state = model.new_state()
        for t in range(12):
            logits, state = model.step(tokens[:, t], state)
        close(logits, plain.forward(tokens)[0][:, -1])


def test_names_of_published_checkpoints():
    config = Gemma3nConfig()
    nested = {"model.language_model.norm.weight": "model.norm.weight",
              "language_model.model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
              "language_model.lm_head.weight": "lm_head.weight", "lm_head.weight": "lm_head.weight",
              "model.layers.19.self_attn.k_proj.weight": "model.layers.19.self_attn.k_proj.weight",
              "model.layers.20.self_attn.k_proj.weight": None, "model.language_model.layers.34.self_attn.k_norm.weight":
              None, "model.layers.20.self_attn.q_proj.weight": "model.layers.20.self_attn.q_proj.weight",
              "model.vision_tower.timm_model.x": None, "audio_tower.y": None, "model.embed_audio.z": None,
              "model.layers.99.self_attn.k_proj.weight": "model.layers.99.self_attn.k_proj.weight"}
    for name, stored in nested.items():
        assert gemma3n.stored_name(config, name) == stored, name


def test_every_tensor_of_the_recording_is_a_block():
    config = Engine.from_state_dict("gemma3n", CASE.config, CASE.weights, device="cpu").config
    assert {b.name: b.shape for b in gemma3n.blocks(config)} == {k: tuple(v.shape) for k, v in CASE.weights.items()}
