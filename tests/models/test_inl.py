"""INL against the recorded runs of the published implementation, and its step-wise decoding against `forward`."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import RECORDED
from inl_small import (
    FORWARD_CASES,
    GREEDY_CASES,
    ODD,
    REFERENCE,
    TOLERANCE,
    advance,
    close,
    draw,
    forward,
    held,
    random_tensors,
    recorded,
    share,
)
from safetensors.torch import load_file, save_file

from thl_engine.config import PRESETS, parse_config
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.models import inl
from thl_engine.ops.backends import load_ops
from thl_engine.ops.weights import Held

# Recorded runs.


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_forward(name, backend):
    case, config, weights = recorded(name)
    got = {}
    got["logits"], state = forward(
        config, weights, load_ops(backend, "cpu"), case.io["input_ids"], record=got.__setitem__
    )
    for key, expected in case.io.items():
        if key != "input_ids":
            close(got[key], expected, what=key)
    fields = state.to_dict()
    for i in range(config.num_layers):
        close(fields[f"layers.{i}.inl.avg_iterations"], case.io[f"layer{i}.avg_iterations_after"])
        close(fields[f"layers.{i}.inl.num_forwards"], case.io[f"layer{i}.num_forwards_after"])


@pytest.mark.parametrize("name", GREEDY_CASES)
def test_greedy_with_the_whole_sequence_for_every_token(name, backend):
    case, config, weights = recorded(name)
    ops, tokens = load_ops(backend, "cpu"), case.io["prompt_ids"]
    counted = inl.init_state(config, 1, weights=weights)
    for s in range(case.meta["run"]["new_tokens"]):
        got = {}
        fresh = replace(counted, timestep=0)  # counters go on, the context does not
        logits, counted = forward(config, weights, ops, tokens, fresh, got.__setitem__)
        close(logits[:, -1], case.io["step_logits"][:, s])
        steps = [int(got[f"layer{i}.steps_taken"]) for i in range(config.num_layers)]
        assert steps == case.io["steps_taken"][s].tolist()
        tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, case.io["output_ids"])
    for i in range(config.num_layers):
        close(counted.avg_iterations[i], case.io[f"layer{i}.avg_iterations_after"])
        close(counted.num_forwards[i], case.io[f"layer{i}.num_forwards_after"])


def test_names_and_shapes_are_the_published_ones():
    for name in [*FORWARD_CASES, "greedy", "training_mode"]:
        case, config, _ = recorded(name)
        assert {b.name: b.shape for b in inl.blocks(config)} == {
            name: tuple(value.shape) for name, value in case.weights.items()
        }
        assert inl.aliases(config) == case.meta["tied"]
        encoding = inl.initial(
            config, next(b for b in inl.blocks(config) if b.name == "pos_encoding.pe"), slice(None), torch.Generator()
        )
        close(encoding, case.weights["pos_encoding.pe"], 1e-6)


# Step-wise decoding.


# Found on the recorded cases: 0.030, 0 (nothing stops early) and 0.053 of the largest logit.
RULES_DIFFER = {"full_forward_early": 0.05, "full_forward_no_early": TOLERANCE, "greedy": 0.08}


@pytest.mark.parametrize("name", [*FORWARD_CASES, *GREEDY_CASES])
def test_the_rule_for_each_token_against_the_rule_for_all(name, backend, record_property):
    """Logits of step-wise decoding over the recorded tokens against the recorded ones."""
    case, config, weights = recorded(name)
    tokens = case.io["input_ids"] if "input_ids" in case.io else case.io["output_ids"][:, :-1]
    state = inl.init_state(config, len(tokens), weights=weights)
    alone, _ = advance(config, weights, load_ops(backend, "cpu"), tokens, state, [8, 1])
    together = case.io["logits"] if "logits" in case.io else case.io["step_logits"]
    alone = alone[:, -together.shape[1] :]
    found, same = share(alone, together), (alone.argmax(-1) == together.argmax(-1)).float().mean().item()
    record_property("largest difference of logits over largest logit", found)
    record_property("share of positions with the same best token", same)
    print(f"{name}: differs by {found:.2e} of the largest logit; best token agrees at {100 * same:.1f} % of positions")
    assert found <= RULES_DIFFER.get(name, 0.25)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_advance_without_stopping_equals_forward(batch, backend):
    config = replace(ODD, adaptive_convergence_threshold=0.0)
    weights, ops, tokens = held(config, random_tensors(config)), load_ops(backend, "cpu"), draw(ODD, batch, 70)
    expected, whole = forward(config, weights, ops, tokens)
    for chunks in ([64], [1], [7, 64], [5, 1]):
        state = inl.init_state(config, batch, weights=weights)
        got, state = advance(config, weights, ops, tokens, state, chunks)
        close(got, expected)
        assert state.timestep == whole.timestep == 70
        for key, value in whole.to_dict().items():
            if "attention" in key:
                close(state.to_dict()[key], value, what=key)


def test_a_token_stops_whatever_the_chunk_and_the_batch(backend):
    weights, ops, tokens = held(ODD, random_tensors(ODD)), load_ops(backend, "cpu"), draw(ODD, 4, 30)
    runs = []
    for chunks in ([30], [1], [11, 1, 13]):
        used = []
        logits, _ = advance(
            ODD,
            weights,
            ops,
            tokens,
            inl.init_state(ODD, 4, weights=weights),
            chunks,
            lambda name, value, used=used: used.append(value.view(4, -1)) if "iterations_used" in name else None,
        )
        used = [torch.cat(used[i :: ODD.num_layers], dim=1) for i in range(ODD.num_layers)]
        runs.append((logits, torch.stack(used)))
    assert len(runs[0][1].unique()) >= 3  # tokens do stop at different steps
    for logits, used in runs[1:]:
        close(logits, runs[0][0])
        assert torch.equal(used, runs[0][1])
    for row in range(4):
        logits, _ = advance(ODD, weights, ops, tokens[row : row + 1], inl.init_state(ODD, 1, weights=weights))
        close(logits[0], runs[0][0][row])


def test_each_row_stops_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(2)
    x, context = (torch.randn(6, ODD.d_model, generator=generator) for _ in range(2))
    weights, prefix = held(ODD, random_tensors(ODD)), "layers.1.inl.inl.controller."
    args = [weights[f"{prefix}{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    rule = {"steps": 9, "threshold": 0.3, "mu": torch.zeros(ODD.d_model)}
    each = REFERENCE.integrate(x, context, *args, **rule)
    for row in range(6):
        alone = REFERENCE.integrate(x[row : row + 1], context[row : row + 1], *args, **rule, together=True)
        assert alone.steps == int(each.iterations[row]) >= 4
        close(each.x[row], alone.x[0])
        close(each.v[row], alone.v[0])
    assert len(each.iterations.unique()) >= 2


def test_forward_continues_a_context(backend):
    config = replace(ODD, adaptive_convergence_threshold=0.0)
    weights, ops, tokens = held(config, random_tensors(config)), load_ops(backend, "cpu"), draw(ODD, 2, 40)
    expected, _ = forward(config, weights, ops, tokens)
    first, state = forward(config, weights, ops, tokens[:, :13])
    second, state = advance(config, weights, ops, tokens[:, 13:20], state)
    third, state = forward(config, weights, ops, tokens[:, 20:], state)
    close(torch.cat([first, second, third], dim=1), expected)


def test_attention_mask(backend):
    case, config, weights = recorded("full_forward_early")
    ops, tokens = load_ops(backend, "cpu"), case.io["input_ids"]
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    got, _ = forward(config, weights, ops, tokens, attention_mask=causal)
    close(got, case.io["logits"])
    seen, _ = forward(config, weights, ops, tokens, attention_mask=torch.zeros_like(causal))
    assert share(seen, got) > 0.01
    for wrong in (causal.float(), causal[1:], causal[None]):
        with pytest.raises(ConfigError, match="attention_mask: expected a bool tensor"):
            forward(config, weights, ops, tokens, attention_mask=wrong)


# State.


def test_a_context_has_its_size_from_the_start():
    config = replace(ODD, num_layers=2, num_iterations_per_layer=2)
    weights, tokens = held(config, random_tensors(config)), draw(ODD, 2, config.max_seq_len)
    whole, short = inl.init_state(config, 2, weights=weights), inl.init_state(config, 2, weights=weights, context=70)
    size = 2 * 2 * 2 * 4 * config.num_heads * config.head_dim  # keys and values of two layers, two sequences
    assert short.nbytes - inl.init_state(config, 2, "meta", context=69).nbytes == size
    assert whole.nbytes == inl.init_state(config, 2, "meta", context=config.max_seq_len).nbytes > 500 * size
    before = short.nbytes
    a, whole = advance(config, weights, REFERENCE, tokens[:, :70], whole)
    b, short = advance(config, weights, REFERENCE, tokens[:, :70], short, [61, 9])
    close(a, b)
    assert short.nbytes == before
    for call in (inl.advance, inl.forward):
        with pytest.raises(ConfigError, match="would be 71 tokens long; the context ends at 70") as raised:
            call(config, weights, REFERENCE, tokens[:, :1], short)
        assert "\n" not in str(raised.value)
        with pytest.raises(ConfigError, match=f"max_seq_len is {config.max_seq_len}"):
            call(config, weights, REFERENCE, tokens, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 526}, "context is 526; the model's max_seq_len is 525"),
        ({"context": 0}, "context is 0; it must be"),
        ({"context": 2.5}, "context is 2.5"),
        ({"kv_cache": "int4"}, "kv_cache is 'int4'; it must be one of float32, int8"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": True}, "sliding_window is True"),
    ],
)
def test_options_of_a_state_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        inl.init_state(ODD, 1, "meta", **options)


def test_state_survives_a_file_and_forks(tmp_path, backend):
    weights, ops, tokens = held(ODD, random_tensors(ODD)), load_ops(backend, "cpu"), draw(ODD, 3, 20)
    _, state = advance(ODD, weights, ops, tokens[:, :12], inl.init_state(ODD, 3, weights=weights))
    save_file(state.to_dict(), tmp_path / "state.safetensors")
    fork = state.clone()
    expected, _ = advance(ODD, weights, ops, tokens[:, 12:], state, [1])
    advance(ODD, weights, ops, tokens[:, :5], state.clone())
    forked, _ = advance(ODD, weights, ops, tokens[:, 12:], fork, [1])
    loaded = inl.state_from_dict(ODD, load_file(tmp_path / "state.safetensors"), ops)
    restored, loaded = advance(ODD, weights, ops, tokens[:, 12:], loaded, [1])
    assert torch.equal(forked, expected) and torch.equal(restored, expected)
    fresh = inl.init_state(ODD, 1, weights=weights)
    assert inl.state_from_dict(ODD, fresh.to_dict(), ops).timestep == 0
    assert fresh.to_dict()["layers.0.inl.num_forwards"].item() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("layers.1.attention.values"), "'layers.1.attention.values' is missing"),
        (lambda fields: fields.update(extra=torch.zeros(1)), "unknown field 'extra'"),
        (lambda fields: fields.update({"layers.0.attention.keys": torch.zeros(3, 5, 4, 6)}), "has shape"),
        (lambda fields: fields.update({"layers.0.attention.keys": torch.zeros(1, 5, 1000, 7)}), "has shape"),
        (lambda fields: fields.update(timestep=torch.tensor(3)), "has shape"),
        (lambda fields: fields.update(timestep=torch.tensor(1000)), "timestep is 1000; it must be from 0 to"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    fields = inl.init_state(ODD, 2).to_dict()
    change(fields)
    with pytest.raises(CheckpointError, match=message):
        inl.state_from_dict(ODD, fields, REFERENCE)


# Variants, sizes and options.


@pytest.mark.parametrize(
    "change",
    [
        {"use_adaptive_stopping": False},
        {"use_lowrank_embeddings": False},
        {"use_shared_controllers": False},
        {"num_layers": 1, "num_heads": 1},
        {"feedforward_dim": None, "d_model": 1, "num_heads": 1},
        {"num_iterations_per_layer": 1},
        {"hierarchical_group_size": 1000},
    ],
    ids=str,
)
def test_options(change, backend):
    config, ops = replace(ODD, **change), load_ops(backend, "cpu")
    weights, tokens = held(config, random_tensors(config)), draw(ODD, 2, 9)
    still = replace(config, adaptive_convergence_threshold=0.0)
    expected, state = forward(still, weights, ops, tokens)
    got, _ = advance(still, weights, ops, tokens, inl.init_state(config, 2, weights=weights), [4, 1])
    close(got, expected)
    assert torch.isfinite(got).all()
    close(forward(config, weights, REFERENCE, tokens)[0], forward(config, weights, ops, tokens)[0])
    used = {"token_embedding.project_up.weight"} if config.use_lowrank_embeddings else set()
    assert used <= {name for name, _ in inl.walk(config).clocked}
    fields = state.to_dict()
    assert ("layers.0.inl.num_forwards" in fields) == config.use_adaptive_stopping
    assert len(inl.state_from_dict(config, fields, ops).num_forwards) == len(state.num_forwards)


class Counting(dict):
    """Weights that note which matrices are read, in order."""

    def __init__(self, weights):
        super().__init__(weights)
        self.read = []

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if isinstance(value, Held):
            self.read.append(name)
        return value


def test_reads_are_the_walk():
    for config in (ODD, replace(ODD, use_adaptive_stopping=False, use_lowrank_embeddings=False)):
        weights = Counting(held(config, random_tensors(config)))
        advance(config, weights, REFERENCE, draw(ODD, 1, 3), inl.init_state(config, 1))
        expected = [*inl.walk(config).reads(0), *inl.head(config)]
        assert weights.read == expected
        weights.read.clear()
        forward(config, weights, REFERENCE, draw(ODD, 1, 3), inl.init_state(config, 1))
        assert weights.read == expected == list(inl.forward_walk(config, (1, 3)).reads(0))
        matrices = {block.name for block in inl.blocks(config) if block.kind == "matrix"}
        assert set(expected) == matrices


def test_int8(backend, record_property):
    """Both backends read the same integers; how far they lead from float weights is reported."""
    config = replace(ODD, adaptive_convergence_threshold=0.0)
    tensors, tokens = random_tensors(config), draw(ODD, 3, 20)
    exact, _ = forward(config, held(config, tensors), REFERENCE, tokens)
    weights = held(config, tensors, quantized=True)
    got, _ = forward(config, weights, load_ops(backend, "cpu"), tokens)
    expected, _ = forward(config, weights, REFERENCE, tokens)
    close(got, expected, 1e-3)  # native products take activations as 16-bit integers
    record_property("int8 error over largest logit", share(got, exact))
    assert share(got, exact) <= 0.1


def test_initial_weights_make_a_model():
    config = replace(ODD, d_model=40)
    generator = torch.Generator().manual_seed(0)
    tensors = {b.name: inl.initial(config, b, slice(None), generator) for b in inl.blocks(config)}
    assert all(tuple(tensors[b.name].shape) == b.shape for b in inl.blocks(config))
    assert torch.equal(tensors["layers.0.norm1.weight"], torch.ones(40))
    assert tensors["layers.0.attention.in_proj_bias"].count_nonzero() == 0
    assert 0 < tensors["layers.0.ff.3.bias"].abs().max() <= 23**-0.5
    logits, _ = forward(config, held(config, tensors), REFERENCE, draw(config, 1, 8))
    assert torch.isfinite(logits).all()
    block = next(b for b in inl.blocks(config) if b.name == "lm_head.weight")
    assert inl.initial(config, block, slice(3, 7), generator).shape == (4, 40)


def test_presets_are_the_published_sizes():
    assert PRESETS["inl-5b"].d_model == 4096 and PRESETS["inl-small"].inner_size == 2048
    shared = RECORDED.parent / "configs"
    for name, config in PRESETS.items():
        if name.startswith("inl-") and shared.is_dir():
            assert parse_config(json.loads((shared / f"{name}.json").read_text())) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 7, "multiple of num_heads"),
        ("d_model", -4, "d_model is -4"),
        ("num_layers", 0, "num_layers is 0"),
        ("use_adaptive_stopping", 1, "must be true or false"),
        ("lowrank_ratio", 2.0, "lowrank_ratio"),
        ("adaptive_convergence_threshold", -1.0, "adaptive_convergence_threshold is -1.0"),
        ("feedforward_dim", 0, "feedforward_dim is 0"),
        ("num_iteration_per_layer", 3, "did you mean 'num_iterations_per_layer'"),
    ],
)
def test_bad_configurations_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"model_type": "inl", "d_model": 64, "num_iterations_per_layer": 3, field: value})
