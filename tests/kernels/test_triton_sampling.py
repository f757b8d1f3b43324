"""Choosing tokens on the device against `Sampler`, which defines it."""

import math

import pytest
import torch

pytest.importorskip("triton")
from conftest import SMALL, random_weights
from triton_device import DEVICE, poison  # noqa: F401

from thl_engine import Engine, EngineError
from thl_engine.kernels.triton.sampling import sample
from thl_engine.text.sampler import Sampler, Sampling

SETTINGS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(top_k=1),
    Sampling(top_k=50),
    Sampling(top_k=3, temperature=2.0),
    Sampling(top_p=0.9),
    Sampling(top_p=1e-9),
    Sampling(top_p=0.9999),
    Sampling(temperature=0.8, top_k=50, top_p=0.95),
    Sampling(temperature=5.0, top_k=100_000, top_p=0.5),
    Sampling(temperature=1e-300, top_p=0.5),
    Sampling(top_k=0, top_p=1.0),
]


def both(logits, sampling, seed):
    generator = torch.Generator().manual_seed(seed)
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    found = sample(logits.to(DEVICE), uniform, sampling.temperature, sampling.top_k, sampling.top_p).cpu()
    expected = Sampler(Sampling(**{**vars(sampling), "seed": seed})).sample(logits)
    return found, expected


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
@pytest.mark.parametrize("count", [1, 7, 5000])
def test_the_same_token_as_on_the_host(sampling, count):
    for seed in range(2):
        logits = torch.randn(count) * 3
        (token, logprob), (expected, expected_logprob) = both(logits, sampling, seed)
        assert int(token) == int(expected)
        assert float(logprob) == pytest.approx(float(expected_logprob), abs=1e-5)


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_equal_logits(sampling):
    for seed in range(3):
        logits = (torch.randn(3000) * 2).round() / 2
        logits[logits == 0] = -0.0 if seed % 2 else 0.0
        (token, _), (expected, _) = both(logits, sampling, seed)
        assert int(token) == int(expected)


def test_all_logits_equal():
    (token, logprob), (expected, _) = both(torch.zeros(4100), Sampling(top_p=0.5), 0)
    assert int(token) == int(expected) and float(logprob) == pytest.approx(-math.log(4100))


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("sampling", SETTINGS[1:], ids=repr)
def test_the_ends_of_the_draw_are_tokens_that_are_kept(uniform, sampling):
    logits = torch.tensor([-1e38, 0.0, 5.0, 5.0, -3.0, -1e38, 4.0, -200.0])
    token = int(sample(logits.to(DEVICE), uniform, sampling.temperature, sampling.top_k, sampling.top_p)[0])
    assert token in (1, 2, 3, 4, 6)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=5, top_p=0.9)], ids=repr)
def test_a_row_that_is_not_finite(damage, sampling):
    logits = torch.randn(5000, device=DEVICE)
    logits[4321] = damage
    assert int(sample(logits, 0.3, sampling.temperature, sampling.top_k, sampling.top_p)[0]) == -1


def test_a_strided_row_and_a_large_vocabulary():
    logits = torch.randn(20_011, 2)[:, 1] * 4
    (token, _), (expected, _) = both(logits, Sampling(temperature=0.7, top_k=40, top_p=0.9), 5)
    assert int(token) == int(expected)


def test_a_sampler_chooses_there_as_it_does_itself():
    logits = torch.randn(3, 200) * 2
    histories = [[1, 5, 5], [], [199]]
    for sampling in (Sampling(seed=4), Sampling(0.5, 20, 0.9, 1.3, seed=1), Sampling(0.0, repetition_penalty=2.0)):
        found = Sampler(sampling, 3).sample(logits.to(DEVICE), histories, sample)
        expected = Sampler(sampling, 3).sample(logits, histories)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    logits[1, 7] = math.nan
    with pytest.raises(EngineError, match="1 of 200 logits are NaN"):
        Sampler(Sampling(), 3).sample(logits.to(DEVICE), (), sample)


def test_generated_text_is_the_reference_backends():
    texts = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        engine = Engine.from_state_dict("thl", SMALL.to_dict(), random_weights(SMALL), device=device, backend=backend)
        texts.append(
            [
                piece.id
                for piece in engine.generate(
                    [1, 2, 3], max_new_tokens=4, temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3
                )
            ]
        )
    assert texts[0] == texts[1]
