"""The ring alone, then a pager over a real file: order, bounds, and bytes as the plan said."""

import itertools
import random

import pytest
import torch
from conftest import SMALL, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from thl_engine import BudgetError, CheckpointError, Engine
from thl_engine.checkpoint.spool import spool_tensors
from thl_engine.kernels.int8 import dequantize
from thl_engine.models import thl
from thl_engine.paging.page_schedule import PageSchedule
from thl_engine.paging.paged_weights import load_vectors, paged_weights
from thl_engine.paging.pager import Pager
from thl_engine.paging.plan import LEAST_SLOTS, make_plan, pins
from thl_engine.paging.reader import Reader
from thl_engine.paging.ring import Ring


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 12), st.integers(1, 30))
def test_ring_serves_any_sequence_in_order(sequence, slots, change_at):
    """Every use finds its page in a slot of its own, however the expectation changes half way."""
    ring = Ring(slots, 40)
    held: dict[int, int] = {}  # slot -> page, as reads would have filled it

    def fetch():
        for page, slot in ring.fetches():
            assert 0 <= slot < slots
            held[slot] = page

    ring.follow(iter(sequence))
    fetch()
    for position, page in enumerate(sequence):
        if position == change_at:
            ring.follow(iter(sequence[position:]))
            fetch()
        assert held[ring.use(page)] == page
        assert len(ring.resident) <= slots and len(set(ring.resident.values())) == len(ring.resident)
        ring.release(page)
        fetch()


def test_ring_refuses_what_is_not_next():
    ring = Ring(2, 9)
    ring.follow(iter([3, 4]))
    ring.fetches()
    with pytest.raises(RuntimeError, match="page 4 .* page 3"):
        ring.use(4)


def test_ring_keeps_a_page_in_use():
    ring = Ring(2, 9)
    ring.follow(iter([0, 1, 2, 0]))
    assert ring.fetches() == [(0, 0), (1, 1)]
    assert ring.use(0) == 0
    assert ring.fetches() == []  # slot 0 is being read from, slot 1 is due next
    ring.release(0)
    ring.use(1)
    ring.release(1)
    assert [page for page, _ in ring.fetches()] == [2]


def optimal_fetches(sequence: list[int], slots: int) -> list[bool]:
    """Which uses miss under Belady's rule, the fewest misses possible for pages of one size."""
    following, seen = [0] * len(sequence), {}
    for i in reversed(range(len(sequence))):
        following[i] = seen.get(sequence[i], len(sequence) + sequence[i])
        seen[sequence[i]] = i
    kept: dict[int, int] = {}
    misses = []
    for i, page in enumerate(sequence):
        misses.append(page not in kept)
        if page not in kept and len(kept) == slots:
            del kept[max(kept, key=kept.__getitem__)]
        kept[page] = following[i]
    return misses


def fewest_fetches_by_search(sequence: list[int], slots: int) -> int:
    """The same by trying every eviction."""
    costs = {frozenset(): 0}
    for page in sequence:
        after: dict[frozenset[int], int] = {}
        for kept, cost in costs.items():
            if page in kept:
                choices = [(kept, cost)]
            elif len(kept) < slots:
                choices = [(kept | {page}, cost + 1)]
            else:
                choices = [((kept - {gone}) | {page}, cost + 1) for gone in kept]
            for choice, total in choices:
                after[choice] = min(total, after.get(choice, total))
        costs = after
    return min(costs.values())


def steady_fetches(period: list[int], pinned: set[int], slots: int) -> int:
    """Fetches of one period once the ring has its rhythm."""
    sequence = [page for page in period if page not in pinned]
    if not sequence:
        return 0
    ring = Ring(slots, 40)
    ring.follow(itertools.cycle(sequence))
    fetched = len(ring.fetches())
    for lap in range(6):
        fetched = fetched if lap < 5 else 0
        for page in sequence:
            ring.use(page)
            ring.release(page)
            fetched += len(ring.fetches())
    return fetched


def test_pins_and_ring_against_the_optimum():
    """Random walks on clocks, pages of one size. The pager needs `ahead` slots to read ahead at all; with the rest it
    stays within one page's uses of the optimum for any policy, prefetching or not, and usually below it."""
    choose = random.Random(5)
    total = best = 0
    for _ in range(400):
        walk = [(choose.randrange(6), choose.choice([1, 1, 2, 4])) for _ in range(choose.randint(3, 10))]
        period = [page for t in range(4) for page, clock in walk if t % clock == 0]
        uses = {page: float(period.count(page)) for page in period}
        if len(uses) < 3:
            continue
        slots = choose.randint(LEAST_SLOTS, 3)
        capacity = choose.randint(slots, len(uses))
        pinned = set(pins(uses, dict.fromkeys(uses, 1), capacity - slots))
        assert len(pinned) <= capacity - slots
        ahead = slots - 1
        misses = optimal_fetches(period * 8, capacity - ahead)
        optimum = sum(misses[5 * len(period) : 6 * len(period)])
        got = steady_fetches(period, pinned, slots)
        assert got <= optimum + max(uses.values())
        total, best = total + got, best + optimum
    assert total <= best


@pytest.mark.parametrize("high, low", [(2, 3), (1, 4), (3, 1)])
def test_revisited_stacks_are_pinned_best(high, low):
    """HRM-Text's walk, pages of one size: no other choice of pages to pin, of all there are, moves fewer bytes."""
    fast, slow = list(range(3)), list(range(3, 6))
    period = (fast * low + slow) * high
    uses = {page: float(period.count(page)) for page in period}
    for capacity in range(LEAST_SLOTS, len(uses)):
        room = capacity - LEAST_SLOTS
        got = steady_fetches(period, set(pins(uses, dict.fromkeys(uses, 1), room)), LEAST_SLOTS)
        every = itertools.chain.from_iterable(itertools.combinations(uses, n) for n in range(room + 1))
        assert got == min(steady_fetches(period, set(some), LEAST_SLOTS) for some in every), capacity


def test_beladys_rule_is_the_optimum():
    choose = random.Random(2)
    for _ in range(60):
        sequence = [choose.randrange(5) for _ in range(12)]
        slots = choose.randint(1, 4)
        assert sum(optimal_fetches(sequence, slots)) == fewest_fetches_by_search(sequence, slots)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.125, 0.5, 1.0, 2.0])), min_size=1, max_size=9),
    st.integers(0, 200),
)
def test_pins_save_what_the_best_subset_saves(pages, room):
    """Up to one page, the price of not solving a knapsack."""
    sizes = {i: size for i, (size, _) in enumerate(pages)}
    uses = {i: count for i, (_, count) in enumerate(pages)}

    def saved(chosen):
        return sum(sizes[i] * uses[i] for i in chosen)

    chosen = pins(uses, sizes, room)
    assert sum(sizes[i] for i in chosen) <= room
    best = max(
        saved(some)
        for n in range(len(pages) + 1)
        for some in itertools.combinations(sizes, n)
        if sum(sizes[i] for i in some) <= room
    )
    assert saved(chosen) >= best - max(sizes[i] * uses[i] for i in sizes)
    if len(set(sizes.values())) == 1:
        assert saved(chosen) == best


@pytest.fixture(scope="module")
def store():
    with spool_tensors("thl", SMALL.to_dict(), random_weights(SMALL), "int8", in_memory=False) as opened:
        yield opened


def schedule_of(store):
    return PageSchedule(store, thl.walk(SMALL), thl.head(SMALL))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200_000), st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=6))
def test_any_budget_serves_everything_within_it(store, extra, runs):
    """Runs of steps and prompts from any time on: right bytes, in order, memory bounded, as many bytes as counted."""
    schedule = schedule_of(store)
    base = make_plan(store, schedule, budget=None, stream=True, state_bytes=0, workspace_bytes=0)
    plan = make_plan(store, schedule, budget=base.least_budget + extra, stream=True, state_bytes=0, workspace_bytes=0)
    assert plan.peak_memory_bytes <= plan.budget
    vectors = load_vectors(store)
    tables = [page.index for name in plan.resident_tables for page in store.tensors[name].pages]
    reader = Reader(store.files, direct=False)
    pager = Pager(store, reader, vectors, (*plan.pinned, *tables), plan.slots, plan.slot_bytes, plan.horizon)
    whole = {name: store.read(name) for name, tensor in store.tensors.items() if tensor.kind == "matrix"}

    def serve(names):
        for name in names:
            for part in pager.parts(name):
                assert torch.equal(part.data, whole[name][part.start : part.stop])

    walk, head, t = thl.walk(SMALL), thl.head(SMALL), 0
    counted = Ring(plan.slots, plan.horizon)
    expected = 0
    for prompt, count in runs:
        if prompt:
            pager.begin(("prompt", t, count), lambda t=t, n=count: schedule.prompt(t, n))
            uses = list(itertools.islice(schedule.prompt(t, count), 2000))
            for i in range(count):
                serve(walk.reads(t + i))
        else:
            count = 1
            pager.begin(("decode", t), lambda t=t: schedule.decode(t))
            uses = list(itertools.islice(schedule.decode(t), 2000))
            serve(walk.reads(t))
        serve(head)
        pager.end(None)
        counted.follow(iter(uses))
        expected += len(counted.fetches())
        served = [p for i in range(count) for p in schedule.step(t + i) if p not in plan.pinned]
        for page in (*served, *(p for p in schedule.head if p not in plan.pinned)):
            counted.use(page)
            counted.release(page)
            expected += len(counted.fetches())
        t += count
    fetched = pager.traffic.page_misses + len(pager._fresh)
    assert fetched == expected
    pager.close()


@pytest.mark.parametrize("quantize", ["int8", "none"])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", ["embedding.weight", "output_head.weight"])
def test_rows_are_gathered_in_any_order(quantize, pinned, name):
    """Of a table and of a matrix: different ids, repeated ones, one, none; from pinned pages and read at once."""
    with spool_tensors("thl", SMALL.to_dict(), random_weights(SMALL), quantize, in_memory=False) as store:
        tensor, vectors = store.tensors[name], load_vectors(store)
        pages = [page.index for page in tensor.pages] if pinned else []
        pager = Pager(store, Reader(store.files, direct=False), vectors, pages, 0, 0, 0)
        weights = paged_weights(store, pager, vectors)
        whole = dequantize(store.read(name), None if tensor.scales is None else vectors[tensor.scales], tensor.group)
        every = torch.randperm(tensor.shape[0], generator=torch.Generator().manual_seed(0))
        found = []
        for ids in (
            every,
            torch.tensor([3, 0, 3, 3, 7, 0]),
            torch.tensor([[5], [tensor.shape[0] - 1]]),
            every[:1],
            every[:0],
        ):
            found.append(weights[name].rows(ids))
            assert found[-1].shape == (*ids.shape, tensor.shape[1]) and torch.equal(found[-1], whole[ids])
            resident = weights[name].resident_rows(ids)
            assert torch.equal(resident, whole[ids]) if pinned else resident is None
        assert torch.equal(found[0], whole[every])  # memory of its own
        assert (pager.traffic.bytes_gathered == 0) == pinned
        pager.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_decoding_moves_exactly_the_bytes_of_the_plan(small, share):
    config, weights = small
    least = Engine.from_state_dict("thl", config, weights, quantize="int8", stream=True).plan().least_budget
    whole = Engine.from_state_dict("thl", config, weights, quantize="int8").plan().peak_memory_bytes
    budget = int(least + share * (whole - least))
    with Engine.from_state_dict("thl", config, weights, quantize="int8", stream=True, memory_budget=budget) as engine:
        plan, period = engine.plan(), 12
        assert plan.peak_memory_bytes <= budget
        state, token = engine.new_state(), torch.tensor([1])
        for _ in range(period):
            _, state = engine.step(token, state)
        before = engine.stats()["bytes_streamed"]
        for _ in range(period):
            _, state = engine.step(token, state)
        assert engine.stats()["bytes_streamed"] - before == plan.bytes_streamed_per_token * period


def test_budget_below_the_least_names_the_least(small):
    config, weights = small
    with pytest.raises(BudgetError, match=r"needs at least .* \((\d+) bytes\)") as caught:
        Engine.from_state_dict("thl", config, weights, stream=True, memory_budget=1000)
    least = int(str(caught.value).rsplit("(", 1)[1].split()[0])
    with Engine.from_state_dict("thl", config, weights, stream=True, memory_budget=least) as engine:
        assert engine.plan().peak_memory_bytes <= least
    with pytest.raises(BudgetError):
        Engine.from_state_dict("thl", config, weights, stream=True, memory_budget=least - 1)


def test_damage_found_while_streaming_stays_an_error(tmp_path, small):
    """A page whose checksum fails is reported by name, and the engine does not go on with what it holds."""
    from thl_engine.checkpoint.pack import write_store
    from thl_engine.checkpoint.spool import tensor_sources

    config, weights = small
    path = tmp_path / "model.safetensors"
    write_store(path, SMALL, tensor_sources(weights, "test"), quantize="int8")
    engine = Engine.from_pretrained(path, stream=True)
    page = engine._store.tensors["output_head.weight"].pages[0]
    with open(path, "r+b") as file:
        file.seek(page.offset + 5)
        byte = file.read(1)
        file.seek(page.offset + 5)
        file.write(bytes([byte[0] ^ 0x10]))
    state = engine.new_state()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="output_head.weight"):
            for _ in range(3):
                engine.step(torch.tensor([1]), state)


def test_a_rare_page_is_found_without_walking_to_it(store):
    """Clocks far apart must not cost time in proportion to them."""
    from dataclasses import replace

    far = replace(SMALL, tier_timescales=(1, 3, 1_000_003))
    schedule = PageSchedule(store, thl.walk(far), thl.head(far))
    rare = set(store.tensors["tiers.cells.2.W_z.weight"].pages)
    schedule.pin(frozenset(schedule.uses()) - {page.index for page in rare})
    uses = list(itertools.islice(schedule.decode(5), 3))
    assert uses == [page.index for page in rare] * 3
    make_plan(
        store,
        PageSchedule(store, thl.walk(far), thl.head(far)),
        budget=None,
        stream=True,
        state_bytes=0,
        workspace_bytes=0,
    )
