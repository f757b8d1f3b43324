"""Triton reads of and writes to the slot memory against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import slot_memory as reference
from thl_engine.kernels.triton import slot_memory

RULE = {"clip_max": 2.0, "theta": 0.4, "beta": 6.0, "decay": 0.97, "ema_decay": 0.9, "stale_weight": 0.1,
        "underuse_weight": 1.0}


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cpu().double() if t.dtype.is_floating_point else t.cpu() for t in tensors]


@pytest.mark.parametrize("batch, heads, slots, width", [(1, 1, 1, 1), (2, 3, 37, 70), (1, 5, 20, 300), (3, 2, 65, 16)])
def test_slot_scores(batch, heads, slots, width):
    query = device_randn(batch, heads + 1, width)[:, 1:]
    memory = device_randn(batch, slots, width + 5)[..., :width]
    ema = torch.rand(batch, slots).to(DEVICE)
    found = slot_memory.slot_scores(query, memory, ema, 0.3, 0.7)
    close(found, reference.slot_scores(*double(query, memory, ema), 0.3, 0.7))
    assert torch.equal(found, slot_memory.slot_scores(query, memory, ema, 0.3, 0.7))


def test_equal_slots_score_equal_bits():
    memory = device_randn(1, 50, 77)
    memory[:, [3, 17, 48]] = memory[:, [30]]
    scores = slot_memory.slot_scores(device_randn(1, 4, 77), memory, torch.zeros(1, 50, device=DEVICE), 0.3, 0.7)
    assert (scores[..., [3, 17, 48]] == scores[..., [30]]).all()


@pytest.mark.parametrize("capacity", [None, 0, 1, 2])
@pytest.mark.parametrize("slots, k", [(1, 1), (7, 7), (37, 3), (200, 5)])
def test_slot_topk(slots, k, capacity):
    for scores in (torch.randn(2, 3, slots), torch.randint(0, 4, (2, 3, slots)).float(), torch.zeros(2, 3, slots),
                   torch.full((2, 3, slots), float("-inf")).where(torch.rand(2, 3, slots) < 0.9, torch.zeros(1))):
        scores = scores.to(DEVICE)
        alpha, indices = slot_memory.slot_topk(scores, k, capacity)
        wide, expected = reference.slot_topk(*double(scores), k, capacity)
        assert torch.equal(indices.cpu(), expected)
        if scores.isfinite().all():
            close(alpha, wide)


def test_slot_topk_of_many_slots():
    for slots in (slot_memory.CHOICE + 1, 16384):
        scores = torch.randint(0, 1000, (1, 2, slots)).float()
        _, indices = slot_memory.slot_topk(scores.to(DEVICE), 4)
        assert torch.equal(indices.cpu(), reference.slot_topk(scores, 4)[1])
    with pytest.raises(ValueError, match="slots: expected at least the 4 that are chosen, found 3"):
        slot_memory.slot_topk(torch.zeros(1, 1, 3), 4)


def test_nan_stays_within_the_memory():
    memory = device_randn(1, 9, 5)
    alpha, indices = slot_memory.slot_topk(torch.full((1, 2, 9), float("nan"), device=DEVICE), 3)
    assert ((indices >= 0) & (indices < 9)).all()
    slot_memory.slot_mix(alpha, indices, memory)


@pytest.mark.parametrize("width", [1, 70, 300])
def test_slot_mix(width):
    memory = device_randn(2, 23, width + 2)[..., :width]
    alpha, indices = device_randn(2, 3, 5).softmax(-1), torch.randint(0, 23, (2, 3, 5)).to(DEVICE)
    close(slot_memory.slot_mix(alpha, indices, memory), reference.slot_mix(*double(alpha, indices, memory)))


@pytest.mark.parametrize("capacity", [None, 1])
def test_slot_read_is_the_four_operations(capacity):
    query, memory = device_randn(2, 4, 70), device_randn(2, 300, 70)
    ema, last = torch.rand(2, 300).to(DEVICE), torch.zeros(2, 300, dtype=torch.int64, device=DEVICE)
    scores = slot_memory.slot_scores(query, memory, ema, 0.1, 0.5)
    alpha, indices = slot_memory.slot_topk(scores, 3, capacity)
    mixed = slot_memory.slot_mix(alpha, indices, memory)
    expected = reference.read_metadata(*double(alpha, indices, ema, last), 5, 0.99)
    found = slot_memory.slot_read(query, memory, ema, last, 5, k=3, capacity=capacity, scale=0.1, load_penalty=0.5,
                                  decay=0.99)
    for a, b in zip(found[:3], (mixed, alpha, indices), strict=True):
        assert torch.equal(a, b)
    assert found[3] is ema and found[4] is last
    close(ema, expected[0])
    assert torch.equal(last.cpu(), expected[1])


@pytest.mark.parametrize("kind", ["empty", "partly", "full", "familiar", "clipped", "zero"])
@pytest.mark.parametrize("batch, slots, width, written", [(1, 11, 19, 2), (3, 37, 300, 1), (2, 5, 64, 5)])
def test_novelty_write(kind, batch, slots, width, written):
    memory = torch.zeros(batch, slots, width) if kind == "empty" else torch.randn(batch, slots, width)
    if kind == "partly":
        memory[:, 1::2] = 0.0
    candidate = torch.randn(batch, width) * (100.0 if kind == "clipped" else 0.1)
    if kind == "familiar":
        candidate = memory[:, slots // 2] * 0.7
    if kind == "zero":
        candidate = torch.zeros(batch, width)
    read_ema = torch.rand(batch, slots) * (torch.rand(batch, slots) < 0.5)
    write_ema, last = torch.rand(batch, slots), torch.randint(0, 20, (batch, slots))
    memory = memory.to(DEVICE)
    norms = slot_memory.slot_norms(memory)
    close(norms, memory.cpu().double().norm(dim=-1))
    choice = reference.novelty_write(candidate, memory.cpu(), norms.cpu(), read_ema, write_ema, last, 23, slots=written,
                                     **RULE)
    exact = reference.novelty_write(*double(candidate, memory, norms, read_ema, write_ema, last), 23, slots=written,
                                    **RULE)
    state = [t.clone().to(DEVICE) for t in (write_ema, last)]
    found = slot_memory.novelty_write(candidate.to(DEVICE), memory, norms, read_ema.to(DEVICE), *state, 23,
                                      slots=written, **RULE)
    assert torch.equal(found.branch.cpu(), choice.branch) and torch.equal(found.indices.cpu(), choice.indices)
    if torch.equal(exact.indices, choice.indices):  # in float64 fewer slots are equally useful
        assert (found.novelty.cpu() - exact.novelty).abs().max() < 1e-6
        for name in ("vector", "gate", "memory", "write_ema", "norms"):
            close(getattr(found, name), getattr(exact, name), 2e-6)
    assert torch.equal(found.last_write.cpu(), choice.last_write)
    assert found.memory is memory and found.norms is norms and found.write_ema is state[0]
    assert torch.equal(slot_memory.slot_norms(memory), norms)


def test_state_must_be_contiguous():
    state = device_randn(4, 2).T
    with pytest.raises(ValueError, match="read_ema: expected a contiguous tensor"):
        slot_memory.read_metadata(torch.ones(2, 1, 1), torch.zeros(2, 1, 1, dtype=torch.int64), state, state, 1, 0.5)
