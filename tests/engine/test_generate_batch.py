"""Several prompts in one pass over the weights: each text is what its prompt gives alone."""

import pytest
import torch
from conftest import SMALL, cases, load_case, random_weights
from hrm_small import ODD as HRM
from hrm_small import random_tensors as hrm_tensors
from inl_small import ODD as INL
from inl_small import random_tensors as inl_tensors

from thl_engine import BudgetError, ConfigError, Engine, TokenizerError

PROMPTS = [[1, 2, 3], [9, 1], [30, 2, 5, 5, 7, 8, 1, 0, 22, 13, 4], [1, 2, 3]]


def model(name: str) -> tuple[str, dict, dict]:
    if name == "him":
        case = load_case(next(folder for folder in cases("him") if folder.name == "encode3"))
        return name, case.config, case.weights
    config, tensors = {"thl": (SMALL, random_weights), "inl": (INL, inl_tensors), "hrm": (HRM, hrm_tensors)}[name]
    return name, config.to_dict(), tensors(config)


SAMPLED = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.2}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["thl", "inl", "hrm", "him"])
def test_a_text_does_not_depend_on_the_others(name, sampling, backend):
    count = 9 if name != "hrm" else 4
    with Engine.from_state_dict(*model(name), device="cpu", backend=backend, stream=True, batch_size=4) as engine:
        found: list[list] = [[] for _ in PROMPTS]
        for i, piece in engine.generate_batch(PROMPTS, max_new_tokens=count, **sampling):
            found[i].append(piece)
        for prompt, pieces in zip(PROMPTS, found, strict=True):
            alone = list(engine.generate(prompt, max_new_tokens=count, **sampling))
            assert [piece.id for piece in pieces] == [piece.id for piece in alone] and len(alone) == count
            assert [piece.logprob for piece in pieces] == pytest.approx([piece.logprob for piece in alone], abs=1e-4)
        assert [piece.id for piece in found[0]] == [piece.id for piece in found[3]]


def test_rows_halt_by_themselves(backend):
    """HRM's early halt, with a head that tells the rows apart."""
    kind, config, tensors = model("hrm")
    engine = Engine.from_state_dict(kind, config, tensors, device="cpu", backend=backend)
    prompts = torch.arange(15).view(3, 5)
    with engine.trace() as trace:
        engine.prefill(prompts, engine.new_state(3))
    means = trace.steps[0]["segment0.z_H"].mean(dim=1)
    direction = means[0] - means[1:].mean(dim=0)
    threshold = ((means[0] @ direction) + (means[1:] @ direction).max()) / 2
    tensors |= {
        "q_head.weight": torch.stack([direction, torch.zeros_like(direction)]),
        "q_head.bias": torch.stack([-threshold, torch.tensor(0.0)]),
    }
    engine = Engine.from_state_dict(kind, config, tensors, device="cpu", backend=backend)
    together, _ = engine.prefill(prompts, engine.new_state(3))
    segments = []
    for row in range(3):
        with engine.trace() as trace:
            alone, _ = engine.prefill(prompts[row : row + 1], engine.new_state())
        segments.append(int(trace.steps[0]["num_segments"]))
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-5)
    assert segments[0] == 1 < max(segments)


def test_ends_and_stops_are_each_rows_own(packed):
    engine = Engine.from_pretrained(packed, device="cpu")
    prompts, options = ["ab", "To be, or not", "x"], {"max_new_tokens": 12, "temperature": 0}
    assert list(engine.generate_batch(prompts, **options | {"max_new_tokens": 0})) == []
    alone = [list(engine.generate(prompt, **options)) for prompt in prompts]
    engine.tokenizer.eos_id = alone[1][3].id
    options["stop"] = ["".join(piece.text for piece in alone[0])[4:6]]
    found: list[list] = [[] for _ in prompts]
    for i, piece in engine.generate_batch(prompts, **options):
        found[i].append((piece.id, piece.text))
    assert found == [[(piece.id, piece.text) for piece in engine.generate(prompt, **options)] for prompt in prompts]
    assert len(found[1]) <= 4 and len(found[0]) <= 6


def test_a_budget_leaves_room_for_all(backend):
    kind, config, tensors = model("inl")
    options = {"device": "cpu", "backend": backend, "context": 64}
    with Engine.from_state_dict(kind, config, tensors, stream=True, **options) as engine:
        one = engine.plan()
    with Engine.from_state_dict(kind, config, tensors, stream=True, batch_size=4, **options) as engine:
        four = engine.plan()
    assert four.state_bytes > 3.9 * one.state_bytes and four.least_budget > one.least_budget
    with Engine.from_state_dict(
        kind, config, tensors, memory_budget=four.least_budget, batch_size=4, **options
    ) as engine:
        assert engine.plan().peak_memory_bytes <= four.least_budget
        assert len(list(engine.generate_batch(PROMPTS, max_new_tokens=3))) == 12
        with pytest.raises(BudgetError, match="batch_size 5 takes .* batch_size=5"):
            engine.generate_batch([*PROMPTS, [1]])
    with pytest.raises(BudgetError, match="needs at least"):
        Engine.from_state_dict(kind, config, tensors, memory_budget=one.least_budget, batch_size=4, **options)


def test_what_does_not_fit_is_refused_before_anything_is_computed(backend):
    kind, config, tensors = model("inl")
    engine = Engine.from_state_dict(kind, config, tensors, device="cpu", backend=backend, context=20)
    with pytest.raises(ConfigError, match="would be 21 tokens long; the context ends at 20"):
        engine.generate_batch(PROMPTS, max_new_tokens=11)
    with pytest.raises(ConfigError, match="would be 21 tokens long"):
        engine.generate(PROMPTS[2], max_new_tokens=11)
    assert len(list(engine.generate(PROMPTS[2], max_new_tokens=10))) == 10
    state = engine.new_state()
    for call in (engine.prefill, engine.forward):
        with pytest.raises(ConfigError, match="would be 64 tokens long; the context ends at 20 .*; the model's max"):
            call(torch.zeros(1, 64, dtype=torch.int64), state)
    assert state.timestep == 0 and engine.stats()["tokens"] == 20
    for prompts, error in (([], ConfigError), ("abc", ConfigError), ([[1], []], TokenizerError)):
        with pytest.raises(error):
            engine.generate_batch(prompts)


@pytest.mark.parametrize("name", ["thl", "him", "hrm"])
@pytest.mark.parametrize("options", [{"context": 5}, {"kv_cache": "int8"}, {"sliding_window": 4}], ids=str)
def test_options_that_a_model_has_not(name, options):
    kind, config, tensors = model(name)
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*{kind} models have no such option"):
        Engine.from_state_dict(kind, config, tensors, device="cpu", **options)
