"""Triton reads of and writes to the slot memory against the float64 reference."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, close, device_randn, poison  # noqa: F401

from thl_engine.kernels import slot_memory as reference
from thl_engine.kernels.triton import novelty_write, slot_read
from thl_engine.ops.reference import ReferenceOps

READ = {"scale": 0.3, "load_penalty": 0.7, "decay": 0.9}
RULE = {
    "clip_max": 2.0,
    "theta": 0.4,
    "beta": 6.0,
    "decay": 0.97,
    "ema_decay": 0.9,
    "stale_weight": 0.1,
    "underuse_weight": 1.0,
}


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cpu().double() if t.dtype.is_floating_point else t.cpu() for t in tensors]


def read(query, memory, ema, last, k, capacity=None, t=5, **options):
    """Of copies of the metadata: all that a read gives, and the same from the reference in float64."""
    options = {"k": k, "capacity": capacity, **READ, **options}
    expected = ReferenceOps().slot_read(*double(query, memory, ema, last), t=5, **options)
    ema, last = ema.clone(), last.clone()
    found = slot_read.slot_read(query, memory, ema, last, t, **options)
    assert found[3] is ema and found[4] is last
    return found, expected


def same(found, expected):
    """Slots and times exactly, the rest closely."""
    for value, wide in zip(found, expected, strict=True):
        if wide.is_floating_point():
            close(value, wide)
        else:
            assert torch.equal(value.cpu(), wide)


def state(batch, slots, seed=0):
    torch.manual_seed(seed)
    return torch.rand(batch, slots).to(DEVICE), torch.randint(0, 5, (batch, slots)).to(DEVICE)


@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize(
    "batch, heads, slots, width, k",
    [(1, 1, 1, 1, 1), (2, 3, 37, 70, 3), (1, 5, 9, 140, 9), (3, 2, 33, 16, 5), (1, 19, 9, 33, 2)],
)
def test_slot_read(batch, heads, slots, width, k, capacity):
    query, memory = device_randn(batch, heads + 1, width)[:, 1:], device_randn(batch, slots, width + 5)[..., :width]
    found, expected = read(query, memory, *state(batch, slots), k, capacity)
    same(found, expected)
    again, _ = read(query, memory, *state(batch, slots), k, capacity)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    alone, _ = read(query[-1:], memory[-1:], *(x[-1:] for x in state(batch, slots)), k, capacity)
    assert all(torch.equal(a[-1:], b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("capacity", [None, 2])
def test_features_in_shares(capacity):
    query, memory = device_randn(1, 4, 1100), device_randn(1, 12, 1100)
    assert slot_read.partial_scores(query, memory, None, 1.0, 0.0).shape[1] > 2
    same(*read(query, memory, *state(1, 12), 3, capacity, scale=0.02))


@pytest.mark.parametrize("capacity", [None, 1, 2])
def test_ties_go_to_the_lowest_index(capacity):
    """Slots that are equal, empty or hold what 0 and -0 give."""
    memory = device_randn(1, 50, 77)
    memory[:, [3, 17, 48]] = memory[:, [30]] * 9
    query = memory[:, [30, 3, 30]].clone()
    for stored in (memory, torch.zeros_like(memory), -torch.zeros_like(memory)):
        found, expected = read(query, stored, torch.zeros(1, 50, device=DEVICE), state(1, 50)[1], 5, capacity)
        same(found, expected)
    assert torch.equal(found[2][0, 0].cpu(), torch.arange(5))


def test_many_slots(monkeypatch):
    slots = 150
    monkeypatch.setattr(slot_read, "CHOICES", 256)
    memory = torch.randint(-3, 4, (1, slots, 2)).float().to(DEVICE)  # full of ties
    query = torch.ones(1, 2, 2, device=DEVICE)
    ema, last = torch.zeros(1, slots, device=DEVICE), state(1, slots)[1]
    same(*read(query, memory, ema, last, 9))
    monkeypatch.setattr(slot_read, "CHUNK", 64)
    same(*read(query, memory, ema, last, 9, 3))
    with pytest.raises(ValueError, match="slots: expected at least the 4 that are chosen, found 3"):
        read(query[..., :1], memory[:, :3, :1], ema[:, :3], last[:, :3], 4)


def test_infinite_and_undefined_scores_stay_within_the_memory():
    for value in (float("nan"), float("-inf")):
        memory, (ema, last) = torch.full((1, 9, 5), value, device=DEVICE), state(1, 9)
        for capacity in (None, 1):
            indices = slot_read.slot_read(
                torch.ones(1, 2, 5, device=DEVICE), memory, ema, last, 1, k=3, capacity=capacity, **READ
            )[2]
            assert torch.equal(indices.cpu(), torch.arange(3).expand(1, 2, 3))


def test_time_on_the_device():
    query, memory = device_randn(1, 2, 30), device_randn(1, 20, 30)
    by_number, _ = read(query, memory, *state(1, 20), 3)
    counted, _ = read(query, memory, *state(1, 20), 3, t=torch.tensor([5], device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(by_number, counted, strict=True))


def write_inputs(kind, batch, slots, width):
    memory = torch.zeros(batch, slots, width) if kind == "empty" else torch.randn(batch, slots, width)
    if kind == "partly":
        memory[:, 1::2] = 0.0
    candidate = torch.randn(batch, width) * (100.0 if kind == "clipped" else 0.1)
    if kind == "familiar":
        candidate = memory[:, slots // 2] * 0.7
    if kind == "zero":
        candidate = torch.zeros(batch, width)
    read_ema = torch.rand(batch, slots) * (torch.rand(batch, slots) < 0.5)
    return candidate, memory, read_ema, torch.rand(batch, slots), torch.randint(0, 20, (batch, slots))


@pytest.mark.parametrize("kind", ["empty", "partly", "full", "familiar", "clipped", "zero"])
@pytest.mark.parametrize("batch, slots, width, written", [(1, 11, 19, 2), (2, 7, 300, 1), (1, 5, 64, 5)])
def test_novelty_write(kind, batch, slots, width, written):
    candidate, memory, read_ema, write_ema, last = write_inputs(kind, batch, slots, width)
    before = memory.clone().to(DEVICE)
    norms = novelty_write.slot_norms(before)
    close(norms, memory.double().norm(dim=-1))
    choice = reference.novelty_write(
        candidate, memory, norms.cpu(), read_ema, write_ema, last, 23, slots=written, **RULE
    )
    exact = reference.novelty_write(
        *double(candidate, memory, norms, read_ema, write_ema, last), 23, slots=written, **RULE
    )

    def write(t):
        kept = [x.clone().to(DEVICE) for x in (before, norms, write_ema, last)]
        found = novelty_write.novelty_write(
            candidate.to(DEVICE), *kept[:2], read_ema.to(DEVICE), *kept[2:], t, slots=written, **RULE
        )
        assert found.memory is kept[0] and found.norms is kept[1] and found.write_ema is kept[2]
        return found

    found = write(23)
    assert torch.equal(found.branch.cpu(), choice.branch) and torch.equal(found.indices.cpu(), choice.indices)
    assert torch.equal(found.last_write.cpu(), choice.last_write)
    if torch.equal(exact.indices, choice.indices):  # in float64 fewer slots are equally useful
        assert (found.novelty.cpu() - exact.novelty).abs().max() < 1e-6
        for name in ("vector", "gate", "memory", "write_ema", "norms"):
            close(getattr(found, name), getattr(exact, name), 2e-6)
    assert torch.equal(novelty_write.slot_norms(found.memory), found.norms)
    if kind == "partly":
        counted = write(torch.tensor([23], device=DEVICE))
        assert all(torch.equal(value, vars(counted)[name]) for name, value in vars(found).items())


def test_a_write_does_not_depend_on_batch_neighbours():
    inputs = [x.to(DEVICE) for x in write_inputs("full", 3, 9, 70)]
    results = []
    for rows in (slice(0, 3), slice(1, 2)):
        candidate, memory, read_ema, write_ema, last = (x[rows].clone() for x in inputs)
        results.append(
            novelty_write.novelty_write(
                candidate, memory, novelty_write.slot_norms(memory), read_ema, write_ema, last, 9, slots=2, **RULE
            )
        )
    assert all(torch.equal(value[1:2], vars(results[1])[name]) for name, value in vars(results[0]).items())


def test_many_slots_are_written_in_chunks(monkeypatch):
    monkeypatch.setattr(novelty_write, "CHUNK", 128)
    candidate, memory, read_ema, write_ema, last = write_inputs("partly", 1, 150, 8)
    norms = novelty_write.slot_norms(memory.to(DEVICE))
    expected = reference.novelty_write(candidate, memory, norms.cpu(), read_ema, write_ema, last, 3, slots=5, **RULE)
    found = novelty_write.novelty_write(
        *(x.to(DEVICE) for x in (candidate, memory.clone())),
        norms,
        *(x.clone().to(DEVICE) for x in (read_ema, write_ema, last)),
        3,
        slots=5,
        **RULE,
    )
    assert torch.equal(found.indices.cpu(), expected.indices)
    close(found.memory, expected.memory)


def test_state_must_be_contiguous():
    kept = device_randn(4, 2).T
    with pytest.raises(ValueError, match="read_ema: expected a contiguous tensor"):
        slot_read.slot_read(device_randn(2, 1, 3), device_randn(2, 4, 3), kept, kept, 1, k=1, capacity=None, **READ)
