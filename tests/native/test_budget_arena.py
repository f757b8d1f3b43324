"""The budget's arena against a model of what it must keep: nothing overlaps, nothing is lost, nothing is over."""

import random
import threading

import pytest
from native_parts import BudgetArena, BudgetArenas

ALIGNMENT = 512


def rounded(nbytes):
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("base", [ALIGNMENT, 12345, (1 << 47) + 1])
def test_random_allocations_follow_the_model(base, seed):
    rng = random.Random(seed)
    size = rng.choice([ALIGNMENT * 40, 1_000_003, 1 << 30])
    arena = BudgetArena(base, size)
    begin, end = -(-base // ALIGNMENT) * ALIGNMENT, (base + size) // ALIGNMENT * ALIGNMENT
    taken, peak, refusals = {}, 0, 0

    def gaps():
        edges = [begin, *(edge for at in sorted(taken) for edge in (at, at + taken[at])), end]
        return [stop - start for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]

    for _ in range(400):
        if taken and rng.random() < 0.45:
            at = rng.choice(list(taken))
            assert arena.release(at) and not arena.release(at)
            del taken[at]
        else:
            nbytes = rng.choice([0, 1, 511, 512, 513, rng.randrange(size), rng.randrange(max(size // 20, 1)), 2 * size])
            fitting = [gap for gap in gaps() if gap >= rounded(nbytes)]
            at = arena.allocate(nbytes)
            if not fitting:
                assert at == 0 and arena.counts()["last_refused"] == nbytes
                refusals += 1
            else:
                before = gaps()
                taken[at] = rounded(nbytes)
                assert at % ALIGNMENT == 0 and begin <= at and at + rounded(nbytes) <= end
                left = gaps()  # the smallest gap that fits was cut: overlapping blocks would give other gaps
                before.remove(min(fitting))
                if min(fitting) > rounded(nbytes):
                    before.append(min(fitting) - rounded(nbytes))
                assert sorted(before) == sorted(left)
        peak = max(peak, sum(taken.values()))
        counts = arena.counts()
        assert counts["in_use"] == sum(taken.values()) and counts["allocations"] == len(taken)
        assert counts["peak"] == peak and counts["refusals"] == refusals and counts["size"] == end - begin
        assert counts["largest_gap"] == max(gaps(), default=0)
    for at in rng.sample(list(taken), len(taken)):
        assert arena.release(at)
    assert arena.counts()["in_use"] == 0 and arena.allocate(end - begin) == begin  # one gap again


def test_sizes_without_an_aligned_byte_and_huge_requests_are_refused():
    for base, size in ((1, 510), (0, 511), ((1 << 64) - 100, 4096)):
        with pytest.raises(ValueError, match="aligned bytes"):
            BudgetArena(base, size)
    arena = BudgetArena(512, 4096)
    assert arena.allocate((1 << 64) - 1) == 0 and arena.allocate(4097) == 0 and arena.allocate(4096) == 512
    assert not arena.release(513) and not arena.release(0)


def test_threads_share_an_arena():
    arena, kept, threads = BudgetArena(1 << 20, 1 << 22), [], 4

    def work(seed):
        rng, mine = random.Random(seed), []
        for _ in range(2000):
            if mine and rng.random() < 0.5:
                assert arena.release(mine.pop(rng.randrange(len(mine)))[0])
            else:
                nbytes = rng.randrange(1, 9000)
                at = arena.allocate(nbytes)
                if at:
                    mine.append((at, rounded(nbytes)))
        kept.append(mine)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    spans = sorted(span for mine in kept for span in mine)
    assert len(kept) == threads
    assert all(a + size <= b for (a, size), (b, _) in zip(spans, spans[1:], strict=False))
    assert arena.counts()["in_use"] == sum(size for _, size in spans)


class Arenas:
    """Arenas over addresses, and which of them were given back."""

    def __init__(self):
        self.arenas, self.returned = BudgetArenas(), []

    def open(self, base, size=1 << 20, device=0):
        return self.arenas.open(device, base, size, self.returned.append)


def test_a_thread_allocates_from_the_arena_that_it_entered_last():
    held = Arenas()
    arenas, first, second, other = held.arenas, held.open(1 << 20), held.open(1 << 30), held.open(1 << 40, device=1)
    assert arenas.allocate(100, 0) == 0  # none entered
    arenas.enter(first)
    assert arenas.allocate(100, 0) == 1 << 20 and arenas.allocate(100, 1) == 0
    arenas.enter(second)
    assert arenas.allocate(100, 0) == 1 << 30
    arenas.enter(other)
    assert arenas.allocate(100, 1) == 1 << 40 and arenas.allocate(100, 0) == 0
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(arenas.allocate(100, 1)))
    thread.start()
    thread.join()
    assert elsewhere == [0]
    arenas.leave()
    arenas.leave()
    assert arenas.allocate(100, 0) == (1 << 20) + 512
    arenas.leave()
    assert arenas.counts(first)["in_use"] == 1024 and arenas.counts(second)["in_use"] == 512
    for address in (1 << 20, 1 << 30, 1 << 40, (1 << 20) + 512):  # from any arena, whatever is entered
        assert arenas.release(address) and not arenas.release(address)
    assert not arenas.release(5) and not arenas.release(1 << 50)
    with pytest.raises(RuntimeError, match="entered no arena"):
        arenas.leave()


def test_memory_is_given_back_when_the_last_tensor_of_a_closed_arena_is_gone():
    held = Arenas()
    arenas, number = held.arenas, held.open(4096)
    arenas.enter(number)
    logits, state = arenas.allocate(100, 0), arenas.allocate(100, 0)
    arenas.close(number)
    assert arenas.allocate(100, 0) == 0  # nothing new from a closed one
    arenas.leave()
    with pytest.raises(ValueError, match="is closed"):
        arenas.enter(number)
    assert arenas.release(state) and held.returned == [] and arenas.counts(number)["allocations"] == 1
    assert arenas.release(logits) and held.returned == [4096]
    with pytest.raises(ValueError, match="does not exist"):
        arenas.counts(number)
    arenas.close(held.open(8192))
    assert held.returned == [4096, 8192]
