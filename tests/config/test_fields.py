"""Fields of a configuration: what is refused, what is noted, and what numbers may be."""

import json
import logging

import pytest

from thl_engine.config import CONFIGS, parse_config, unapplied
from thl_engine.config.base import HUGGING_FACE, LARGEST_COUNT
from thl_engine.config.unknown import meant
from thl_engine.errors import MESSAGE_LIMIT, ConfigError

FLOATS = [("thl", "load_penalty"), ("inl", "lowrank_ratio"), ("hrm", "expansion"), ("gemma3n", "rope_theta")]
COUNTS = [(name, field) for name, config in CONFIGS.items() for field in config.layers]
COUNTS += [("inl", "num_iterations_per_layer"), ("hrm", "halt_max_steps")]


def refusal(fields):
    with pytest.raises(ConfigError) as caught:
        parse_config(fields)
    message = str(caught.value)
    assert len(message) <= MESSAGE_LIMIT and message.isprintable()
    return message


@pytest.mark.parametrize(
    ("model_type", "field", "known"),
    [
        ("thl", "dim", "embedding_dim"),
        ("inl", "dim", "d_model"),
        ("inl", "n_layers", "num_layers"),
        ("him", "num_layers", "num_encoder_layers"),
        ("hrm", "hidden_dim", "hidden_size"),
        ("hrm", "halt_max_step", "halt_max_steps"),
        ("thl", "vocab", "vocab_size"),
        ("gemma3n", "hiden_size", "hidden_size"),
        ("gemma3n", "vocabSize", "vocab_size"),
        ("gemma3n", "n_heads", "num_attention_heads"),
        ("gemma3n", "rms_norm_epsilon", "rms_norm_eps"),
        ("gemma3n", "rope_local_freq", "rope_local_base_freq"),
    ],
)
def test_a_mistyped_field_is_refused_with_the_one_that_is_meant(model_type, field, known):
    assert refusal({"model_type": model_type, field: 3}).endswith(f"; did you mean {known!r}?")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_fields_of_other_tools_are_noted_at_most(model_type, caplog):
    silent = dict.fromkeys(HUGGING_FACE, 1)
    noted = {"unsloth_fixed": True, "unsloth_version": "2025.7.1", "axolotl\x1b[31m": None, "sliding_window_pattern": 5}
    with caplog.at_level(logging.WARNING):
        parsed = parse_config({"model_type": model_type, **silent}, where=f"silent {model_type}")
        assert not caplog.records
        assert parse_config({"model_type": model_type, **noted}, where=f"noted {model_type}") == parsed
        parse_config({"model_type": model_type, **noted}, where=f"noted {model_type}")
    (note,) = caplog.messages
    assert "'unsloth_fixed'" in note and note.isprintable()


def test_another_projects_field_may_repeat_the_value():
    given = {"model_type": "inl", "d_model": 64, "num_heads": 4}
    assert parse_config({**given, "hidden_size": 64}) == parse_config(given)
    assert "did you mean 'd_model'" in refusal({**given, "hidden_size": 65})


def test_a_field_of_a_megabyte_costs_nothing():
    parse_config({"model_type": "thl", "x" * 1_000_000: 1})
    assert meant("a" * 1_000_000, ["b" * 20]) == []


@pytest.mark.parametrize(("model_type", "field"), FLOATS)
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, float("inf"), float("nan")], ids=range(5))
def test_numbers_beyond_floats(model_type, field, value):
    assert field in refusal({"model_type": model_type, field: value})


@pytest.mark.parametrize(("model_type", "field"), COUNTS)
@pytest.mark.parametrize("value", [LARGEST_COUNT + 1, 2**31 - 1, 10**4299, 0, -1], ids=range(5))
def test_counts_are_bounded_before_anything_is_counted(model_type, field, value):
    assert field in refusal({"model_type": model_type, field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "\x1b[31m\ud800" * 1000},
        {"model_type": ["thl"]},
        {"model_type": "thl", "tier_dims": [{}] * 100_000},
        {"model_type": "thl", "tier_dims": [1] * 100_000},
        {"model_type": "thl", 3: 4},
        {"model_type": "gemma3n", "layer_types": ["\0" * 500] * 35},
        {"model_type": "gemma3n", "rope_parameters": {"\ud800" * 500: {}}},
        {"model_type": "gemma3n", "quantization_config": {"quant_method": "x\n" * 9999}},
        {"model_type": "hrm_gemma3n", "hrm": "\n" * 9999},
    ],
    ids=range(9),
)
def test_foreign_values_make_one_short_line(fields):
    refusal(fields)


def test_what_acts_in_training_alone_is_told():
    def told(**fields):
        return unapplied(fields, parse_config(fields))

    assert told(model_type="inl", dropout=0.1, use_gradient_checkpointing=True) == [
        "dropout",
        "use_gradient_checkpointing",
    ]
    assert told(model_type="gemma3n", text_config={"attention_dropout": 0.0}) == ["attention_dropout"]
    assert told(model_type="thl", vocab_size=300) == []


def test_a_walk_is_bounded():
    from thl_engine.models import hrm

    config = parse_config({"model_type": "hrm", "halt_max_steps": 4096, "L_layers": 64})
    with pytest.raises(ConfigError, match="halt_max_steps is 4096: with cycles 64 and 64 a step would read up to"):
        hrm.walk(config, cycles=(64, 64))
    assert json.dumps(config.to_dict())
