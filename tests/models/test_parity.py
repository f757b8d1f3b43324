"""The recorded runs of the published implementations, on every backend, in float32."""

import pytest
import torch
from conftest import TIE_ORDER, Case, cases, load_case, prefix

from thl_engine import Engine

THL_CASES = cases("thl")
WHOLE_RUN, SINGLE_STEP = 1e-4, 2e-5  # relative to the largest magnitude of the tensor


# Orders among equal scores, recorded under the other tie rule where a case has no second recording.
def initial_state(engine: Engine, case: Case, batch: int):
    stored = {key.removeprefix("init."): value for key, value in case.io.items() if key.startswith("init.")}
    return engine.state_from_dict(stored) if stored else engine.new_state(batch)


def check(got: dict, case: Case, key: str, tolerance: float, skip: set[str] = frozenset()) -> int:
    """Compares all recorded values whose name starts with `key`; returns how many there were."""
    count = 0
    for name, expected in case.io.items():
        field = name.removeprefix(key)
        if not name.startswith(key) or field == "token" or field in skip:
            continue
        found = got[field].reshape(expected.shape)
        if expected.is_floating_point():
            scale = max(expected.abs().max().item(), 1e-30)
            assert (found - expected).abs().max().item() <= tolerance * scale, name
        else:
            assert torch.equal(found.to(expected.dtype), expected), name
        count += 1
    return count


@pytest.mark.parametrize("folder", THL_CASES, ids=lambda folder: folder.name)
def test_thl_whole_run(folder, backend):
    case = load_case(folder)
    engine = Engine.from_state_dict("thl", case.config, case.weights, device="cpu", backend=backend)
    tokens = case.io["tokens"]
    state = initial_state(engine, case, tokens.shape[1])
    compared = 0
    with engine.trace() as trace:
        for t, column in enumerate(tokens):
            _, state = engine.step(column, state)
            got = {**state.to_dict(), **trace.steps[t]}
            compared += check(got, case, f"{prefix(case)}step{t:03d}.", WHOLE_RUN, TIE_ORDER.get(case.name, set()))
    assert compared >= 5 * len(tokens)


@pytest.mark.parametrize("folder", THL_CASES, ids=lambda folder: folder.name)
def test_thl_single_steps_from_recorded_states(folder, backend):
    case = load_case(folder)
    engine = Engine.from_state_dict("thl", case.config, case.weights, device="cpu", backend=backend)
    tokens, key = case.io["tokens"], prefix(case)
    fields = engine.new_state(1).to_dict().keys()
    restarted = 0
    for t in range(len(tokens) - 1):
        recorded = {name: case.io.get(f"{key}step{t:03d}.{name}") for name in fields}
        if any(value is None for value in recorded.values()):
            continue
        with engine.trace() as trace:
            _, state = engine.step(tokens[t + 1], engine.state_from_dict(recorded))
        check(
            {**state.to_dict(), **trace.steps[0]},
            case,
            f"{key}step{t + 1:03d}.",
            SINGLE_STEP,
            TIE_ORDER.get(case.name, set()),
        )
        restarted += 1
    assert restarted >= 2


@pytest.mark.parametrize("folder", THL_CASES, ids=lambda folder: folder.name)
def test_thl_forward_equals_steps(folder, backend):
    case = load_case(folder)
    engine = Engine.from_state_dict("thl", case.config, case.weights, device="cpu", backend=backend)
    tokens = case.io["tokens"]
    logits, _ = engine.forward(tokens.T.contiguous(), initial_state(engine, case, tokens.shape[1]))
    for t in range(len(tokens)):
        expected = case.io[f"{prefix(case)}step{t:03d}.logits"]
        assert (logits[:, t] - expected).abs().max() <= WHOLE_RUN * expected.abs().max()
