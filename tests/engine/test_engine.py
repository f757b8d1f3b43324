"""The engine as a program uses it: streamed equals resident, states, batches, generation and bad input."""

import pytest
import torch
from conftest import BACKENDS, SMALL, random_weights

from thl_engine import BudgetError, CheckpointError, ConfigError, Engine, TokenizerError

TOKENS = torch.tensor([[3, 96, 0, 41, 41, 7, 12, 88, 5, 5, 60, 2, 33]])


def make(small, **options) -> Engine:
    config, weights = small
    return Engine.from_state_dict("thl", config, weights, device="cpu", **options)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_streamed_equals_resident_bit_for_bit(small, backend, quantize):
    resident = make(small, backend=backend, quantize=quantize)
    expected, last = resident.forward(TOKENS)
    least = make(small, backend=backend, quantize=quantize, stream=True).plan().least_budget
    whole = resident.plan().peak_memory_bytes
    for budget in sorted({least, least + 1, (3 * least + whole) // 4, (least + whole) // 2, whole - 1, whole}):
        with make(small, backend=backend, quantize=quantize, stream=True, memory_budget=budget) as engine:
            logits, state = engine.forward(TOKENS)
            assert torch.equal(logits, expected), budget
            for name, value in state.to_dict().items():
                assert torch.equal(value, last.to_dict()[name]), (budget, name)
            if budget < whole - 1:
                assert engine.stats()["bytes_streamed"] > 0


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_backends_agree_for_all_batch_sizes(small, batch):
    tokens = torch.randint(0, SMALL.vocab_size, (batch, 20), generator=torch.Generator().manual_seed(batch))
    outputs = [make(small, backend=name).forward(tokens) for name in BACKENDS]
    logits, state = outputs[0]
    for other, other_state in outputs[1:]:
        assert (other - logits).abs().max() <= 2e-5 * logits.abs().max()
        for name, value in state.to_dict().items():
            assert torch.allclose(value.double(), other_state.to_dict()[name].double(), atol=2e-5), name


@pytest.mark.parametrize(
    "change",
    [
        {"local_window": 0},
        {"num_tiers": 1, "tier_dims": [17], "tier_timescales": [1]},
        {"local_window": 1},
        {"read_topk": 11, "write_slots": 11},
        {"read_slot_capacity": 2},
        {"memory_slots": 3, "write_slots": 1},
        {"num_heads": 1},
        {"tier_timescales": [1, 7, 11]},
        {"memory_slots": 1, "read_topk": 1, "write_slots": 1},
    ],
)
def test_unusual_configurations(change):
    """Backends and residency agree where a part of the model is missing or as small as it gets."""
    from thl_engine.config import parse_config

    config = parse_config({**SMALL.to_dict(), **change})
    small = (config.to_dict(), random_weights(config))
    expected, _ = make(small, backend="reference").forward(TOKENS)
    for name in BACKENDS:
        resident, _ = make(small, backend=name).forward(TOKENS)
        streamed, _ = make(small, backend=name, stream=True).forward(TOKENS)
        assert torch.equal(resident, streamed)
        assert (resident - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_step_forward_and_prefill_agree(small, backend):
    engine = make(small, backend=backend)
    state, rows = engine.new_state(), []
    for token in TOKENS[0]:
        logits, state = engine.step(token.view(1, 1), state)
        rows.append(logits)
    whole, _ = engine.forward(TOKENS)
    assert torch.allclose(whole[0], torch.cat(rows), rtol=0, atol=1e-5)
    after, _ = engine.prefill(TOKENS, engine.new_state())
    assert torch.allclose(after, rows[-1], rtol=0, atol=1e-5)


def test_rows_of_a_batch_do_not_touch(small, backend):
    engine = make(small, backend=backend)
    tokens = torch.stack([TOKENS[0], TOKENS[0].flip(0)])
    together, _ = engine.forward(tokens)
    for row in range(2):
        alone, _ = engine.forward(tokens[row : row + 1])
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-5)


def test_a_saved_state_continues_bit_for_bit(small, backend, tmp_path):
    engine = make(small, backend=backend, quantize="int8")
    _, state = engine.forward(TOKENS)
    file = tmp_path / "context.safetensors"
    engine.save_state(state, file)
    loaded, rebuilt = engine.load_state(file), engine.state_from_dict(state.to_dict())
    expected, _ = engine.forward(TOKENS, state)
    for other in (loaded, rebuilt):
        assert torch.equal(engine.forward(TOKENS, other)[0], expected)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_clones_and_contexts_are_independent(small, backend):
    engine = make(small, backend=backend, stream=True)
    _, state = engine.forward(TOKENS)
    fork = state.clone()
    expected, _ = engine.forward(TOKENS[:, :4], state.clone())
    other = engine.new_state()
    rows = []
    for token in TOKENS[0, :4]:
        engine.step(torch.tensor([9]), state)
        logits, fork = engine.step(token.view(1), fork)
        _, other = engine.step(token.view(1), other)
        rows.append(logits)
    assert torch.allclose(expected[0], torch.cat(rows), rtol=0, atol=1e-5)


def test_native_results_do_not_depend_on_threads(small):
    if "native" not in BACKENDS:
        pytest.skip("the native extension is not built here")
    from thl_engine.ops import native

    before = native.threads()
    try:
        results = [make(small, backend="native", quantize="int8", threads=n).forward(TOKENS)[0] for n in (1, 2, 3)]
    finally:
        native.set_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_trace_and_stats(small, backend):
    engine = make(small, backend=backend, stream=True)
    with engine.trace() as trace:
        engine.forward(TOKENS)
    assert len(trace.steps) == TOKENS.shape[1]
    assert {"router_alpha", "gate", "novelty", "write_indices"} <= trace.steps[0].keys()
    stats = engine.stats()
    assert stats["tokens"] == TOKENS.shape[1] and stats["page_misses"] > 0 and stats["backend"] == backend
    engine.step(torch.tensor([0]), engine.new_state())
    assert len(trace.steps) == TOKENS.shape[1]


def test_generate_by_ids(small, backend):
    engine = make(small, backend=backend)
    greedy = [piece.id for piece in engine.generate([1, 2, 3], max_new_tokens=12, temperature=0)]
    logits, state = engine.prefill(torch.tensor([[1, 2, 3]]), engine.new_state())
    for token in greedy:
        assert token == int(logits.argmax())
        logits, state = engine.step(torch.tensor([token]), state)
    first = [piece.id for piece in engine.generate([1], max_new_tokens=20, temperature=0.9, top_k=9, seed=3)]
    again = [piece.id for piece in engine.generate([1], max_new_tokens=20, temperature=0.9, top_k=9, seed=3)]
    assert first == again and len(first) == 20


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.tensor([97]), "id 97 is outside the vocabulary of 97"),
        (torch.tensor([-1]), "id -1 is outside"),
        (torch.tensor([1.0]), "expected an int64 tensor"),
        (torch.tensor([], dtype=torch.int64), "expected an int64 tensor"),
        (torch.tensor([1, 2]), "batch of 2, but the state holds 1"),
        (5, "expected an int64 tensor"),
    ],
)
def test_bad_tokens(small, tokens, message):
    engine = make(small)
    with pytest.raises((ConfigError, TokenizerError), match=message):
        engine.step(tokens, engine.new_state())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"stream": "yes"}, ConfigError, "stream"),
        ({"quantize": "int4"}, ConfigError, "quantize"),
        ({"backend": "fortran"}, ConfigError, "backend 'fortran'"),
        ({"device": "tpu"}, ConfigError, "device 'tpu'"),
        ({"device": "cuda:99"}, ConfigError, "CUDA"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"memory_budget": "4 elephants"}, ConfigError, "4 elephants"),
        ({"memory_budget": -3}, ConfigError, "-3"),
        ({"memory_budget": 5000, "stream": False}, BudgetError, "streaming runs from"),
    ],
)
def test_bad_options(small, options, error, message):
    config, weights = small
    with pytest.raises(error, match=message):
        Engine.from_state_dict("thl", config, weights, **{"device": "cpu", **options})


def test_bad_state_fields(small):
    engine = make(small)
    fields = engine.new_state().to_dict()
    with pytest.raises(CheckpointError, match="'tier1' is missing"):
        engine.state_from_dict({k: v for k, v in fields.items() if k != "tier1"})
    with pytest.raises(CheckpointError, match="unknown field 'tier9'"):
        engine.state_from_dict({**fields, "tier9": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="'read_ema' has shape"):
        engine.state_from_dict({**fields, "read_ema": torch.zeros(1, 3)})
    with pytest.raises(CheckpointError, match="local_valid"):
        engine.state_from_dict({**fields, "local_valid": torch.tensor(6)})


def test_batch_beyond_the_budget(small):
    engine = make(small, memory_budget=make(small).plan().peak_memory_bytes + 10)
    with pytest.raises(BudgetError, match="batch_size 4"):
        engine.new_state(4)


def test_streaming_without_a_budget_takes_any_batch(small):
    engine = make(small, stream=True)
    assert engine.stats()["memory_budget"] is None
    expected, _ = make(small).forward(TOKENS.repeat(3, 1))
    assert torch.equal(engine.forward(TOKENS.repeat(3, 1))[0], expected)


def test_results_are_ordinary_tensors_and_torch_keeps_its_threads(small, backend):
    engine, before = make(small, backend=backend), torch.get_num_threads()
    logits, state = engine.step(torch.tensor([1]), engine.new_state())
    logits /= 0.7
    (logits * torch.ones(1, requires_grad=True)).sum().backward()
    state.memory.mul_(1.0)
    assert torch.get_num_threads() == before


def test_prompt_without_tokenizer(small):
    with pytest.raises(TokenizerError, match="tokenizer"):
        make(small).generate("hello")
    with pytest.raises(TokenizerError, match="empty"):
        make(small).generate([])
