"""The budget on a CUDA device, with torch's pools and the device played by stand-ins; on a GPU, with neither."""

import gc
import json
import logging
import random
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL, random_weights
from native_parts import BudgetArenas

from thl_engine import BudgetError, Engine
from thl_engine.device import device_memory
from thl_engine.device.caching_allocator import BLOCK, MIB, CachingAllocator, reserved
from thl_engine.device.device_memory import DeviceMemory
from thl_engine.memory import parse_bytes
from thl_engine.paging.prediction import Bandwidths, Clock

CUDA = torch.device("cuda:0")


class Stage:
    """CUDA and torch's pools, as far as `DeviceMemory` uses them; `log`: what it did, in order."""

    def __init__(self, monkeypatch):
        self.arenas, self.log, self.active, self.devices = BudgetArenas(), [], [], 0
        self.base = 0  # of the arena opened last
        self.full = 0  # times that the device has no memory for an arena
        stage = self

        class Pool:
            def __init__(self, allocator):
                self.allocator = allocator

            def __del__(self):
                stage.log.append("pool gone")

        @contextmanager
        def use_mem_pool(pool, device=None):
            assert device is None, "torch refuses a device without its number"
            assert not stage.active, "torch refuses to enter a pool twice, and uses the first of several"
            stage.active.append(pool)
            try:
                yield
            finally:
                stage.active.remove(pool)

        @contextmanager
        def current(device):
            stage.devices += 1
            try:
                yield
            finally:
                stage.devices -= 1

        class Cuda:
            reason, library = staticmethod(lambda: None), staticmethod(lambda: "library")
            available = staticmethod(lambda: True)
            enter_arena, leave_arena = stage.arenas.enter, stage.arenas.leave
            arena_counts = stage.arenas.counts

            @staticmethod
            def open_arena(device, nbytes):
                if stage.full:
                    stage.full -= 1
                    raise RuntimeError("cudaMalloc: out of memory")
                stage.base += 1 << 30
                return stage.arenas.open(device, stage.base, nbytes, lambda base: stage.log.append("given back"))

            @staticmethod
            def close_arena(number):
                stage.log.append("closed")
                stage.arenas.close(number)

        monkeypatch.setattr(device_memory, "cuda", Cuda)
        monkeypatch.setattr(device_memory, "_allocator", lambda: type("A", (), {"allocator": lambda self: None})())
        monkeypatch.setattr(torch.cuda, "MemPool", Pool)
        monkeypatch.setattr(torch.cuda, "use_mem_pool", use_mem_pool)
        monkeypatch.setattr(torch.cuda, "device", current)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 20, 100 << 20))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: stage.log.append("emptied"))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))


@pytest.fixture
def stage(monkeypatch):
    yield Stage(monkeypatch)
    gc.collect()  # what a test has left closes its arena on its own stage


def test_what_is_computed_comes_from_the_arena_through_one_pool(stage):
    memory = DeviceMemory(CUDA, 1 << 20, 1 << 18)
    assert memory.enforced and not stage.active
    with memory.computing():
        with memory.computing():
            assert len(stage.active) == 1 and stage.devices == 2
            assert stage.arenas.allocate(1000, 0)
        assert len(stage.active) == 1
        with memory.capturing():  # only the graphs' pool, which the capture itself makes active, and their memory
            assert not stage.active and stage.arenas.allocate(1000, 0)
            assert stage.arenas.allocate(1 << 17, 0) and not stage.arenas.allocate(1 << 17, 0)
        assert stage.arenas.allocate(1 << 19, 0) and not stage.arenas.allocate(1 << 18, 0)
        assert len(stage.active) == 1
        with pytest.raises(ZeroDivisionError), memory.capturing():
            raise ZeroDivisionError
        assert len(stage.active) == 1
    assert not stage.active and stage.devices == 0 and not stage.arenas.allocate(1000, 0)
    assert memory.pool_for_graphs is not None
    taken = 2048 + (1 << 17) + (1 << 19)
    assert memory.stats(7) == {
        "peak_memory_bytes": taken,
        "peak_device_bytes": taken,
        "budget_enforced": True,
        "device_bytes_besides": (90 << 20) - (1 << 20),
    }


def test_exhaustion_is_a_budget_error_that_keeps_nothing_alive(stage):
    memory = DeviceMemory(CUDA, 4 << 20)

    def step():
        held = torch.ones(3)
        seen.append(weakref.ref(held))
        assert not stage.arenas.allocate(5 << 20, 0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity")

    seen = []
    with pytest.raises(BudgetError) as raised, memory.computing():
        step()
    message = str(raised.value)
    assert message.startswith("memory budget 4.00 MiB (4194304 bytes): 20.00 MiB more on cuda:0 does not fit")
    assert "9437184 bytes" in message and "\n" not in message  # the budget and what was asked for
    assert not stage.active and seen[0]() is None
    with memory.computing():  # it goes on
        assert stage.arenas.allocate(512, 0)


def test_an_engines_memory_goes_back_after_its_pools_and_its_last_tensor(stage):
    memory = DeviceMemory(CUDA, 1 << 20, 1 << 18)
    with memory.computing():
        logits = stage.arenas.allocate(100, 0)
    del memory
    gc.collect()
    assert stage.log == ["pool gone", "pool gone", "closed", "closed", "given back"]
    assert stage.arenas.release(logits) and stage.log[-1] == "given back"


def test_a_full_device_is_asked_again_before_the_budget_is_refused(stage):
    stage.full = 1
    assert DeviceMemory(CUDA, 1 << 20).enforced and "emptied" in stage.log
    stage.full = 2
    with pytest.raises(BudgetError, match="has 10485760 bytes free"):
        DeviceMemory(CUDA, 1 << 20)


def test_without_the_extension_the_budget_is_planned_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(device_memory.cuda, "available", lambda: False)
    monkeypatch.setattr(device_memory.cuda, "reason", lambda: "not built")
    with caplog.at_level(logging.WARNING, "thl_engine"):
        memory = DeviceMemory(CUDA, 1 << 20)
    assert [record.getMessage() for record in caplog.records] == [
        "the memory budget is planned but not enforced on cuda:0: not built"
    ]
    assert not memory.enforced and memory.pool_for_graphs is None


def test_the_cpu_needs_none_of_it(small):
    engine = Engine.from_state_dict("thl", *small, device="cpu")
    found = engine.stats()
    assert found["peak_memory_bytes"] == engine.plan().peak_memory_bytes and found["peak_device_bytes"] == 0
    assert found["device_bytes_besides"] == 0 and not found["budget_enforced"]
    assert engine.plan().reserve_bytes == 0 and engine.plan().bandwidths.link is None


def test_segments_of_the_caching_allocator():
    assert reserved([]) == 0 and reserved([1]) == 2 * MIB == reserved([MIB, MIB])
    assert reserved([MIB, MIB, 1]) == 4 * MIB
    assert reserved([MIB + 1]) == 20 * MIB == reserved([9 * MIB, 9 * MIB]) and reserved([9 * MIB] * 3) == 40 * MIB
    assert reserved([10 * MIB]) == 10 * MIB and reserved([10 * MIB + 1]) == 12 * MIB
    allocator = CachingAllocator()
    first, second = allocator.allocate(12 * MIB), allocator.allocate(15 * MIB)  # 12 and 16
    allocator.free(second)
    assert allocator.allocate(13 * MIB) and allocator.reserved == 28 * MIB
    allocator.free(first)
    pieces = [allocator.allocate(4 * MIB) for _ in range(3)]  # of the two gaps
    assert allocator.reserved == 28 * MIB
    for piece in pieces:
        allocator.free(piece)
    assert allocator.allocate(12 * MIB) and allocator.reserved == 28 * MIB  # pieces grew together again


@pytest.mark.parametrize("seed", range(5))
def test_gaps_of_the_caching_allocator_never_overlap_or_get_lost(seed):
    rng, allocator, held, peak, live = random.Random(seed), CachingAllocator(), [], 0, 0
    for _ in range(600):
        if held and rng.random() < 0.5:
            nbytes, block = held.pop(rng.randrange(len(held)))
            live -= nbytes
            allocator.free(block)
        else:
            nbytes = rng.choice([rng.randrange(1, 5000), rng.randrange(MIB), rng.randrange(30 * MIB)])
            block = allocator.allocate(nbytes)
            assert block.nbytes % BLOCK == 0 and nbytes <= block.nbytes <= nbytes + BLOCK + MIB
            held.append((nbytes, block))
            live, peak = live + nbytes, max(peak, live + nbytes)
        gaps = sum(nbytes for kind in allocator._gaps.values() for nbytes, _, _ in kind)
        assert gaps + sum(block.nbytes for _, block in held) == allocator.reserved >= live
    for _, block in held:
        allocator.free(block)
    assert all(block.before is None and block.after is None for kind in allocator._gaps.values() for *_, block in kind)


def test_pages_pass_the_disk_and_then_the_link():
    class Fetches:
        def fetches(self):
            return [(page, page) for page in range(8)]

    pages = dict.fromkeys(range(8), 1000)

    def landed(disk, link, kept=()):
        clock = Clock(Bandwidths(disk, 1e9, link), frozenset(kept))
        clock.fetch(Fetches(), pages)
        return [round(1e3 * clock.landed[page], 3) for page in (0, 1, 7)]

    assert landed(1e6, None) == [2, 3, 9]  # the first waits a millisecond for the disk to begin
    assert landed(1e6, 1e6) == [3, 4, 10]  # copied while the next is read
    assert landed(1e6, 0.5e6) == [4, 6, 18]  # the link sets the pace
    assert landed(0.5e6, 1e6) == [4, 6, 18]
    assert landed(1e6, 1e6, range(8)) == [1, 2, 8]  # nothing is read
    assert landed(1e6, 0.5e6, (0, 1)) == [2, 4, 16]


def test_a_plan_for_a_device_that_is_not_here(packed, succeeds, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ("plan", packed, "--device", "cuda:1", "--disk-bandwidth", 2, "--memory-bandwidth", 300)
    found = json.loads(succeeds(*given, "--link-bandwidth", 10, "--memory-budget", "80MiB", "--json"))
    assert found["device"] == "cuda:1" and found["backend"] in ("triton", "reference")
    assert found["link_bandwidth"] == 10e9 and found["disk_bandwidth"] == 2e9 and found["memory_bandwidth"] == 300e9
    assert 22 * MIB < found["reserve_bytes"] < found["peak_memory_bytes"] <= 80 * MIB and succeeds.err == ""
    table = succeeds(*given, "--memory-budget", "80MiB")
    assert "link to the device" in table and "for torch's allocator" in table and "on cuda:1" in table
    assert "assumed" in succeeds.err
    assert "give a memory budget" in fails(*given)
    assert "this machine has 0 CUDA devices" in fails("bench", packed, "--device", "cuda")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nothing_on_the_device_passes_the_budget(backend):
    budget, before = parse_bytes("96MiB"), torch.cuda.memory_reserved()
    with Engine.from_state_dict(
        "thl",
        SMALL.to_dict(),
        random_weights(SMALL),
        quantize="int8",
        stream=True,
        device="cuda",
        backend=backend,
        memory_budget=budget,
        batch_size=3,
    ) as engine:
        outside = torch.cuda.memory_stats()["reserved_bytes.all.current"]
        state = engine.new_state(3)
        logits, state = engine.prefill(torch.randint(97, (3, 40)), state)
        for _ in range(100):
            logits, state = engine.step(logits.argmax(dim=-1), state)
        list(engine.generate([1, 2, 3], max_new_tokens=50, seed=0))
        found = engine.stats()
        assert found["budget_enforced"] and 0 < found["peak_memory_bytes"] <= budget
        assert torch.cuda.memory_stats()["reserved_bytes.all.current"] - outside <= budget
        with pytest.raises(BudgetError, match="does not fit"), engine._memory.computing():
            torch.empty(budget, dtype=torch.uint8, device="cuda")
        logits, state = engine.step(logits.argmax(dim=-1), state)
    del engine, state
    gc.collect()
    torch.cuda.empty_cache()
    assert logits.isfinite().all()  # it holds its part of the budget
    del logits
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < budget  # other processes may share the device: no matter of its own


@needs_cuda
def test_engines_share_a_device_without_sharing_a_budget():
    weights = random_weights(SMALL)
    first, second = (
        Engine.from_state_dict(
            "thl", SMALL.to_dict(), weights, quantize="int8", stream=True, device="cuda", memory_budget="96MiB"
        )
        for _ in range(2)
    )
    tokens, states = torch.tensor([[5, 7, 9, 2]]), (first.new_state(), second.new_state())
    logits = [engine.prefill(tokens, state)[0] for engine, state in zip((first, second), states, strict=True)]
    assert torch.equal(*logits)
    assert first.stats()["peak_memory_bytes"] == second.stats()["peak_memory_bytes"] <= 96 * MIB
