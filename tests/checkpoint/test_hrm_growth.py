"""HRM-text beside its maths: growing a model, configurations, cycles, and the rules of the chat."""

from math import sqrt

import pytest
import torch
from hrm_small import ODD, random_tensors

from thl_engine.checkpoint.growth import expand_layers, expand_vocabulary
from thl_engine.config import HRMConfig, parse_config
from thl_engine.engine.hrm_chat import ChatEnd, chat_prompt
from thl_engine.errors import CheckpointError, ConfigError
from thl_engine.models import hrm


def test_growing_keeps_the_old_rows_and_is_repeatable():
    tensors = random_tensors(ODD)
    grown, larger = expand_vocabulary(ODD, tensors, 900, seed=3)
    assert grown.vocab_size == 900 and ODD.vocab_size == 37
    for name, value in tensors.items():
        assert torch.equal(larger[name][: len(value)], value)
    fresh = larger["output_head.weight"][37:]
    assert fresh.shape == (863, 30) and abs(fresh.std().item() * sqrt(30) - 1) < 0.03
    assert torch.equal(fresh, expand_vocabulary(ODD, tensors, 900, seed=3)[1]["output_head.weight"][37:])
    same, unchanged = expand_vocabulary(ODD, tensors, 37)
    assert same == ODD and all(torch.equal(unchanged[name], tensors[name]) for name in tensors)


def test_growing_refuses_what_cannot_work():
    tensors = random_tensors(ODD)
    with pytest.raises(ConfigError, match="vocab_size is 36.*at least the 37"):
        expand_vocabulary(ODD, tensors, 36)
    with pytest.raises(ConfigError, match="H_layers is 0; a model grows"):
        expand_layers(ODD, tensors, {"H_layers": ODD.H_layers - 1})
    with pytest.raises(CheckpointError, match="z0_L.*missing"):
        expand_layers(ODD, {k: v for k, v in tensors.items() if k != "z0_L"}, {"L_layers": 3})
    with pytest.raises(CheckpointError, match="another model"):
        expand_layers(ODD, {**tensors, "tiers.0": torch.zeros(1)}, {"L_layers": 3})
    with pytest.raises(CheckpointError, match=r"\[36, 30\].*\[37, 30\]"):
        expand_vocabulary(ODD, {**tensors, "output_head.weight": torch.zeros(36, 30)}, 40)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "hidden_size is 256; it must be a multiple of num_heads"),
        ({"hidden_size": 24, "num_heads": 8}, "even number of features"),
        ({"hidden_size": -256}, "hidden_size is -256"),
        ({"halt_max_steps": 0}, "halt_max_steps is 0"),
        ({"L_layers": 0}, "L_layers is 0"),
        ({"expansion": 0.0}, "expansion is 0"),
        ({"expansion": 1e300}, "expansion is"),
        ({"expansion": "2"}, "expansion must be a number"),
        ({"num_head": 8}, "did you mean 'num_heads'"),
    ],
)
def test_a_bad_configuration_is_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({"model_type": "hrm", **change})
    assert "\n" not in str(caught.value)


def test_published_configurations_load():
    config = parse_config(
        {
            "vocab_size": 100,
            "hidden_size": 256,
            "num_heads": 8,
            "L_layers": 3,
            "H_layers": 3,
            "expansion": 2.5,
            "max_seq_len": 64,
            "halt_max_steps": 8,
            "halt_exploration_prob": 0.1,
            "forward_dtype": torch.float32,
        }
    )
    assert (config.model_type, config.inner_size, config.head_dim) == ("hrm", 512, 32)
    assert parse_config(config.to_dict()) == config
    assert HRMConfig(hidden_size=768, num_heads=12).inner_size == 1280  # a multiple of 256 already


@pytest.mark.parametrize("value", ["slow", (2,), (2, 2, 2), (0, 1), (1, 65), (True, 2), (2.0, 2), 4, None])
def test_cycles_that_cannot_work(value):
    with pytest.raises(ConfigError, match="cycles is .* one of fast, normal, deep, thorough, extreme"):
        hrm.parse_cycles(value)


def test_chat_rules():
    assert chat_prompt([]) == [2]
    assert chat_prompt(list(range(100))) == list(range(40, 100))
    for token in (0, 3, 50, 99):
        assert ChatEnd(50).reached(token)
    end = ChatEnd(50)
    assert [end.reached(7) for _ in range(12)] == [False] * 11 + [True]
    end = ChatEnd(50)
    assert not any(end.reached(token) for token in [7] * 11 + [8] + [7] * 11)
