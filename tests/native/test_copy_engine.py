"""The native copy engine over a device made of host memory: late, random, and watchful of what is used too early."""

import gc
import os
import random
import signal

import pytest
import torch
from native_parts import HostCopyDevice

from thl_engine import CheckpointError
from thl_engine.checkpoint.checksum import crc32c
from thl_engine.errors import DeviceError
from thl_engine.ops import native
from thl_engine.paging.reader import Reader

if not native.available():
    pytest.skip("the C++ extension is not built", allow_module_level=True)
from thl_engine import _native

SLOT = 16384
SIZE = 300_000


@pytest.fixture(scope="module")
def content():
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("copies") / "pages.bin"
    file.write_bytes(content.numpy().tobytes())
    return file


class Bench:
    """An engine over a fresh host device, with `places` of SLOT bytes."""

    def __init__(self, reader, places=5, slots=3, seed=0, delay=200, **options):
        self.memory = torch.full((places * SLOT,), 0x5A, dtype=torch.uint8)
        self.device = HostCopyDevice(seed, delay)
        self.compute = self.device.compute
        self.engine = _native.CopyEngine(
            reader.native,
            self.device,
            self.memory,
            [i * SLOT for i in range(places)],
            SLOT,
            slots,
            self.compute,
            **options,
        )

    def start(self, place, offset, nbytes, crc=None, label="page", home=-1):
        self.engine.start(0, offset, nbytes, crc, label, place * SLOT, home)

    def finish(self, place):
        self.engine.finish(place * SLOT, self.compute)

    def use(self, place, offset, nbytes):
        begin = place * SLOT + offset % 4096
        self.device.use(self.memory[begin : begin + nbytes])

    def released(self, place):
        self.engine.released(place * SLOT, self.compute)


def span(choose):
    """A range of the file that fits a place, small ones and empty ones among them."""
    offset = choose.randrange(SIZE - SLOT)
    return offset, choose.choice([0, 1, choose.randrange(5000), choose.randrange(SLOT - offset % 4096 + 1)])


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_moves_the_right_bytes(path, content, seed):
    """Places are started, finished, used and released at random, as far as the contract allows."""
    choose = random.Random(seed)
    with Reader([path], threads=3, direct=bool(seed % 2), chunk_bytes=4096) as reader:
        bench = Bench(reader, slots=choose.randint(2, 6), seed=seed, delay=choose.choice([0, 50, 400]))
        coming, here, expected, copied = {}, {}, [], 0
        for _ in range(250):
            idle = sorted(set(range(5)) - coming.keys() - here.keys())
            what = choose.random()
            if idle and what < 0.45:
                place, (offset, nbytes) = choose.choice(idle), span(choose)
                crc = crc32c(content[offset : offset + nbytes].numpy()) if choose.random() < 0.5 else None
                bench.start(place, offset, nbytes, crc)
                coming[place] = offset, nbytes
                copied += nbytes
            elif coming and what < 0.75:
                place = choose.choice(sorted(coming))
                bench.finish(place)
                here[place] = coming.pop(place)
            elif here:
                place = choose.choice(sorted(here))
                for _ in range(choose.randrange(3)):
                    bench.use(place, *here[place])
                    expected.append(crc32c(content[here[place][0] : sum(here[place])].numpy()))
                bench.released(place)
                del here[place]
        for place, (offset, nbytes) in coming.items():
            bench.finish(place)
            bench.use(place, offset, nbytes)
            expected.append(crc32c(content[offset : offset + nbytes].numpy()))
        assert bench.device.sums() == expected
        assert bench.device.violations() == []
        assert bench.engine.bytes_copied == copied and bench.engine.bytes_direct == 0
        bench.engine.close()
        assert bench.device.locked == 0 and bench.device.events > 0
        del bench.engine
        assert bench.device.events == 0


@pytest.mark.parametrize("seed", range(4))
def test_pages_with_a_home_are_read_once(path, content, seed):
    """Between others that pass through the ring; the file's later content is never seen."""
    choose = random.Random(seed)
    copy = path.with_name(f"copy{seed}.bin")
    copy.write_bytes(path.read_bytes())
    spans = [(choose.randrange(SIZE - SLOT), choose.randrange(1, SLOT - 4096)) for _ in range(6)]
    with Reader([copy], threads=3, direct=False) as reader:
        bench = Bench(reader, seed=seed, delay=choose.choice([0, 200]), kept_bytes=6 * SLOT)
        expected = []
        for turn in range(60):
            place, number = turn % 5, turn if turn < 6 else choose.randrange(6)
            offset, nbytes = spans[number] if turn < 12 or choose.random() < 0.7 else span(choose)
            home = number * SLOT if (offset, nbytes) == spans[number] else -1
            if turn == 12:
                with open(copy, "r+b") as file:
                    file.write(bytes(SIZE))
            bench.start(place, offset, nbytes, home=home)
            bench.finish(place)
            bench.use(place, offset, nbytes)
            bench.released(place)
            seen = content if home >= 0 or turn < 12 else torch.zeros_like(content)
            expected.append(crc32c(seen[offset : offset + nbytes].numpy()))
        assert bench.device.sums() == expected and bench.device.violations() == []
        with pytest.raises(ValueError, match="do not fit the host memory of 98304 at 98304"):
            bench.start(0, 0, 10, home=6 * SLOT)
        bench.engine.close()
        assert bench.device.locked == 0


def test_a_page_that_could_not_be_read_is_not_at_home(path):
    with Reader([path], direct=False) as reader:
        bench = Bench(reader, kept_bytes=SLOT)
        for _ in range(2):
            bench.start(0, 0, 100, crc=1, home=0)
            with pytest.raises(CheckpointError, match="checksum"):
                bench.finish(0)
        bench.start(0, 0, 100, home=0)
        bench.finish(0)


def test_the_host_device_sees_what_is_wrong(path):
    """What the other tests rely on: use without `finish`, and a place filled again without `released`."""
    with Reader([path], direct=False) as reader:
        early = Bench(reader, delay=0)
        early.start(0, 0, 100)
        while not early.engine.bytes_copied:
            pass
        early.use(0, 0, 100)
        assert "use 1 may come before copy 1" in early.device.violations()[0]
        careless = Bench(reader, delay=0)
        for _ in range(2):
            careless.start(0, 0, 100)
            careless.finish(0)
            careless.use(0, 0, 100)
        assert "copy 2 may overwrite what use 1 reads" in careless.device.violations()[0]
        careless.engine.released(0, 1)
        assert "compute stream 1 is unknown" in careless.device.violations()[1]


def test_copies_go_on_while_nobody_asks(path, content):
    """More pages than the ring has slots arrive without any further call."""
    with Reader([path], direct=False) as reader:
        bench = Bench(reader, places=12, slots=2)
        for i in range(12):
            bench.start(i, 4096 * i, 4096)
        while bench.engine.bytes_copied < 12 * 4096:
            pass
        for i in range(12):
            bench.finish(i)
        bench.device.sums()
        assert all(
            torch.equal(bench.memory[i * SLOT : i * SLOT + 4096], content[4096 * i : 4096 * (i + 1)]) for i in range(12)
        )


def test_a_page_that_cannot_be_read_fails_alone(path, content):
    """With the reader's own message, each time it is asked for; its place and its slot serve the next page."""
    with Reader([path], direct=False) as reader:
        bench = Bench(reader, slots=2)
        for i, (offset, crc) in enumerate([(0, None), (4096, 7), (SIZE, None), (8192, None)]):
            bench.start(i, offset, 100, crc, label=f"page {i}")
        bench.finish(0)
        found = f"{crc32c(content[4096:4196].numpy()):08x}"
        for _ in range(2):
            with pytest.raises(
                CheckpointError,
                match=f"{path}: page 1: 100 bytes at offset 4096: checksum mismatch: expected 00000007, found {found}",
            ):
                bench.finish(1)
        with pytest.raises(CheckpointError, match="page 2: 100 bytes at offset 300000: short read"):
            bench.finish(2)
        bench.finish(3)
        with pytest.raises(ValueError, match="holds nothing to release"):
            bench.released(1)
        bench.start(1, 4096, 100)
        bench.finish(1)
        bench.use(1, 4096, 100)
        assert bench.device.sums() == [crc32c(content[4096:4196].numpy())] and bench.device.violations() == []
        bench.engine.start(5, 0, 100, None, "page of no file", 0)
        with pytest.raises(ValueError, match="file 5 is not one of the reader's 1 files"):
            bench.finish(0)


def test_a_failed_device_says_so_from_then_on(path):
    with Reader([path], direct=False) as reader:
        bench = Bench(reader)
        bench.device.fail_at(2)
        with pytest.raises(DeviceError, match="^host device: a copy failed") as caught:
            for i in range(400):
                bench.start(i % 5, 4096 * (i % 60), 4096)
                bench.finish(i % 5)
                bench.released(i % 5)
        assert "\n" not in str(caught.value)
        for call in (lambda: bench.start(0, 0, 1), lambda: bench.finish(0), lambda: bench.released(0)):
            with pytest.raises(DeviceError):
                call()
        bench.engine.close()
        assert bench.device.locked == 0


def test_memory_that_cannot_be_locked_is_an_error_that_says_what_helps(path):
    with Reader([path], direct=False) as reader:
        device = HostCopyDevice(0, 0)
        device.refuse_locks()
        with pytest.raises(DeviceError, match="49152 bytes of page-locked host memory: raise the limit.*ulimit -l"):
            _native.CopyEngine(
                reader.native, device, torch.empty(SLOT, dtype=torch.uint8), [0], SLOT, 3, device.compute
            )
        assert device.events == 0


@pytest.mark.parametrize("seed", range(4))
def test_it_can_be_closed_at_any_time(path, seed):
    with Reader([path], threads=2, direct=False, chunk_bytes=4096) as reader:
        bench = Bench(reader, places=12, slots=3, seed=seed)
        for i in range(12):
            bench.start(i, 4096 * i, SLOT - 4096)
        for i in range(3 * seed):
            bench.finish(i)
        if seed == 3:
            reader.close()
        bench.engine.close()
        bench.engine.close()
        assert bench.device.locked == 0 and bench.device.violations() == []
        with pytest.raises(ValueError, match="closed"):
            bench.start(0, 0, 1)
        if bench.engine.bytes_copied < 12 * (SLOT - 4096):
            with pytest.raises(ValueError, match="closed"):
                bench.finish(11)


def test_a_closed_reader_ends_what_is_on_its_way(path):
    with Reader([path], direct=False) as reader:
        bench = Bench(reader)
        reader.close()
        bench.start(0, 0, 1)
        with pytest.raises(ValueError, match="the reader is closed"):
            bench.finish(0)


def test_numbers_that_do_not_fit_are_refused(path):
    with Reader([path], direct=False) as reader:
        bench = Bench(reader)
        for offset, nbytes in ((0, SLOT + 1), (4095, SLOT), (0, -1), (-1, 5), (0, 2**62), (2**63 - 1, 2**63 - 1)):
            with pytest.raises(ValueError, match="page: .* do not fit a staging slot of 16384"):
                bench.start(0, offset, nbytes)
        for call in (bench.engine.finish, bench.engine.released):
            with pytest.raises(ValueError, match="no place at 77"):
                call(77, bench.compute)
        with pytest.raises(ValueError, match="nothing was started at place 0"):
            bench.finish(0)
        bench.start(0, 0, SLOT)
        with pytest.raises(ValueError, match="place 0 is being filled already"):
            for _ in range(1000):  # one that comes behind the copy is let through
                bench.start(0, 0, SLOT)
        memory = torch.empty(2 * SLOT, dtype=torch.uint8)

        def make(places=(0,), slot_bytes=SLOT, slots=2):
            _native.CopyEngine(reader.native, bench.device, memory, list(places), slot_bytes, slots, bench.compute)

        for numbers in (
            {"places": [0, 0]},
            {"places": [-4096]},
            {"places": [100]},
            {"places": [2 * SLOT]},
            {"slot_bytes": 0},
            {"slot_bytes": 4097},
            {"slot_bytes": 2**62},
            {"slots": 1},
        ):
            with pytest.raises(ValueError):
                make(**numbers)
        narrow = _native.CopyEngine(reader.native, bench.device, memory, [0, 4096], SLOT, 2, bench.compute)
        with pytest.raises(ValueError, match="8192 bytes do not fit place 0 of 4096"):
            narrow.start(0, 0, 4097, None, "page", 0)


def test_the_links_ceiling_is_measured(path):
    device = HostCopyDevice(0, 0)
    assert _native.copy_seconds(device, torch.empty(SLOT, dtype=torch.uint8), 3, 20) > 0
    assert device.locked == 0 and device.events == 0 and device.violations() == []


def test_a_foreign_capsule_is_refused():
    import datetime

    with pytest.raises(ValueError, match="no device of the same build"):
        _native.CopyDevice(datetime.datetime_CAPI)


def test_a_fork_leaves_it_behind(path):
    """The child has neither its thread nor a device; it can drop it and end."""
    reader = Reader([path])
    bench = Bench(reader)
    bench.start(0, 0, 100)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for ever is ended, which its status tells
        try:
            for call in (lambda: bench.start(1, 0, 100), lambda: bench.finish(0), lambda: bench.released(0)):
                with pytest.raises(ValueError, match="a fork of"):
                    call()
            bench.engine.close()
            del bench.engine, reader
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    bench.finish(0)
    bench.engine.close()
    reader.close()
