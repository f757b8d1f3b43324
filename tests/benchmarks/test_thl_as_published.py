"""The plain transcription of THL that speeds are compared with, against the recorded runs."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, load_case

from thl_engine.config import parse_config

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from thl_as_published import PublishedTHL  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Shares of a product that threads add up round otherwise, and slots that are all but equal then change places."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["step64", "batch3", "warm", "slots256"])
def test_recorded_run(name):
    case = load_case(FIXTURES / "thl" / name)
    model = PublishedTHL(parse_config(case.config, "thl"), case.weights)
    tokens = case.io["tokens"]
    state = model.new_state(tokens.shape[1])
    for key, value in case.io.items():
        if key.startswith("init."):
            field = key.removeprefix("init.")
            state[field] = int(value) if value.dim() == 0 else value.clone()
    compared = 0
    for t, column in enumerate(tokens):
        found = {"logits": model.step(column, state), **state}
        for key, expected in case.io.items():
            field = key.removeprefix(f"step{t:03d}.")
            if field == key or field not in found or isinstance(found[field], int):
                continue
            if expected.is_floating_point():
                assert (found[field] - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1e-30), key
            else:
                assert torch.equal(found[field], expected), key
            compared += 1
    assert compared >= 2 * len(tokens)
