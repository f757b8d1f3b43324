"""INL on the engine: whatever is streamed, from published checkpoints, within its context."""

import pytest
import torch
from conftest import load_case
from inl_small import ODD, close, draw, folder, random_tensors

from thl_engine import ConfigError, Engine


def run(engine: Engine, tokens: torch.Tensor) -> list[torch.Tensor]:
    whole, _ = engine.forward(tokens)
    state = engine.new_state(tokens.shape[0])
    after_prompt, state = engine.prefill(tokens[:, :20], state)
    steps = [engine.step(column, state)[0] for column in tokens[:, 20:].unbind(1)]
    return [whole, after_prompt, *steps, *state.to_dict().values()]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_streamed_equals_resident(quantize, backend):
    tensors, tokens = random_tensors(ODD), draw(ODD, 1, 24)
    options = {"device": "cpu", "backend": backend, "quantize": quantize}
    with Engine.from_state_dict("inl", ODD.to_dict(), tensors, stream=False, **options) as engine:
        expected, peak = run(engine, tokens), engine.plan().peak_memory_bytes
    with Engine.from_state_dict("inl", ODD.to_dict(), tensors, stream=True, **options) as engine:
        least = engine.plan().least_budget
    for budget in (least, (least + peak) // 2):
        with Engine.from_state_dict(
            "inl", ODD.to_dict(), tensors, stream=True, memory_budget=budget, **options
        ) as engine:
            for found, value in zip(run(engine, tokens), expected, strict=True):
                assert torch.equal(found, value)
            assert (engine.stats()["bytes_streamed"] > 0) == (engine.plan().streamed_pages > 0)
            assert budget > least or engine.plan().streamed_pages > 0


def test_a_published_checkpoint_repeats_names_and_counts_in_integers(backend):
    case = load_case(folder("full_forward_early"))
    tensors = {**case.weights, **{alias: case.weights[name] for alias, name in case.meta["tied"].items()}}
    engine = Engine.from_state_dict("inl", case.config, tensors, device="cpu", backend=backend)
    with engine.trace() as trace:
        logits, state = engine.forward(case.io["input_ids"])
    close(logits, case.io["logits"])
    assert int(state.num_forwards[0]) == int(case.io["layer0.num_forwards_after"])
    assert int(trace.steps[-1]["layer1.steps_taken"]) == int(case.io["layer1.steps_taken"])
    mask = torch.ones(24, 24, dtype=torch.bool).triu(1)
    close(engine.forward(case.io["input_ids"], attention_mask=mask)[0], case.io["logits"])


def test_a_context_ends_at_the_longest_sequence():
    case = load_case(folder("greedy"))
    engine = Engine.from_state_dict("inl", case.config, case.weights, device="cpu", backend="reference")
    longest = case.config["max_seq_len"]
    _, state = engine.prefill(torch.zeros(1, longest, dtype=torch.int64), engine.new_state())
    for attempt in (
        lambda: engine.step(torch.zeros(1, dtype=torch.int64), state),
        lambda: engine.forward(torch.zeros(1, longest + 1, dtype=torch.int64)),
    ):
        with pytest.raises(ConfigError, match=f"max_seq_len is {longest}"):
            attempt()
    before = state.to_dict()
    assert int(before["timestep"]) == longest
    logits, _ = engine.step(torch.zeros(1, dtype=torch.int64), engine.new_state())  # the engine goes on
    assert torch.isfinite(logits).all()
