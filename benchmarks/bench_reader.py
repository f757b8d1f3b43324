"""How much of the disk's speed the reader keeps: one file, bare direct reads against pages through a ring.

    pytest benchmarks/bench_reader.py --benchmark-only
    python benchmarks/bench_reader.py --sweep      # threads and chunk sizes of both, to choose the constants

The bare read is the least that can be done: threads that take the next chunk and call preadv with O_DIRECT into
one aligned buffer each (system calls run without the GIL; a C++ loop of the same shape measured the same). Its
threads and chunk size are chosen first, by their median, so that it is as fast as it gets. Then passes over the
file alternate between it and the reader, in changing order, and medians are compared.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from thl_engine.checkpoint.checksum import crc32c
from thl_engine.paging.reader import CHUNK_BYTES, THREADS, Arena, Reader

MIB = 1 << 20
FILE_BYTES = 1024 * MIB
PAGE_BYTES = 8 * MIB
RING_PAGES = 8
ROUNDS = 25
GRID = list(itertools.product((2, 3, 4, 8), (1 * MIB, 2 * MIB, 4 * MIB)))  # threads, chunk bytes


class BareRead:
    """Reads the file once with `threads` threads, in order, and forgets what it read."""

    def __init__(self, path: Path, threads: int, chunk_bytes: int):
        self.path, self.threads, self.chunk_bytes = path, threads, chunk_bytes
        self.arena = Arena(threads * chunk_bytes)
        self.arena.tensor().fill_(1)  # memory exists before the clock starts

    def __call__(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        offsets = iter(range(0, os.fstat(fd).st_size, self.chunk_bytes))  # next() on a range iterator is atomic
        memory = memoryview(self.arena.tensor().numpy())

        def work(index: int) -> None:
            buffer = [memory[index * self.chunk_bytes : (index + 1) * self.chunk_bytes]]
            for offset in offsets:
                assert os.preadv(fd, buffer, offset) == self.chunk_bytes

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(fd)


class RingRead:
    """Streams the file through a ring of pages, as the pager does; `checksums` are those of its pages, or None."""

    def __init__(self, path: Path, threads: int, chunk_bytes: int, checksums: list[int] | None):
        self.pages = path.stat().st_size // PAGE_BYTES
        self.checksums = checksums or [None] * self.pages
        self.reader = Reader([path], threads=threads, chunk_bytes=chunk_bytes)
        assert self.reader.direct == [True], f"{path.parent} does not take direct reads: nothing to compare"
        self.arena = Arena(RING_PAGES * PAGE_BYTES)
        self.arena.tensor().fill_(1)

    def __call__(self) -> None:
        tickets = []
        for page in range(self.pages):
            if page >= RING_PAGES:  # the slot is free once the page that was in it has been used
                self.reader.wait(tickets[page - RING_PAGES])
            slot = page % RING_PAGES * PAGE_BYTES
            tickets.append(self.reader.submit(0, page * PAGE_BYTES, PAGE_BYTES, self.arena, slot, self.checksums[page]))
        for ticket in tickets[-RING_PAGES:]:
            self.reader.wait(ticket)


@contextmanager
def file_of_pages(nbytes: int = FILE_BYTES):
    """A file of random bytes on disk (/tmp may be memory, /var/tmp is not) and its page checksums."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench_reader") as folder:
        path, checksums = Path(folder) / "pages.bin", []
        with open(path, "wb") as file:
            for _ in range(nbytes // PAGE_BYTES):
                page = os.urandom(PAGE_BYTES)
                checksums.append(crc32c(page))
                file.write(page)
            file.flush()
            os.fsync(file.fileno())
        yield path, checksums


def rates(passes: dict, nbytes: int, rounds: int) -> dict[str, float]:
    """Median bytes/s of each pass; every round runs all of them, in another order."""
    seconds = {name: [] for name in passes}
    names = list(passes)
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            passes[name]()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: nbytes / statistics.median(values) for name, values in seconds.items()}


def best_bare_read(path: Path, rounds: int = 5) -> BareRead:
    passes = {setting: BareRead(path, *setting) for setting in GRID}
    found = rates(passes, path.stat().st_size, rounds)
    return passes[max(found, key=found.get)]


def compare(path: Path, checksums: list[int], rounds: int = ROUNDS) -> tuple[BareRead, dict[str, float]]:
    bare = best_bare_read(path)
    passes = {
        "bare": bare,
        "ring": RingRead(path, THREADS, CHUNK_BYTES, None),
        "ring, checksums": RingRead(path, THREADS, CHUNK_BYTES, checksums),
    }
    return bare, rates(passes, path.stat().st_size, rounds)


@pytest.fixture(scope="module")
def pages():
    with file_of_pages() as made:
        yield made


def test_reader_keeps_the_disk_busy(benchmark, pages):
    path, checksums = pages
    bare, found = compare(path, checksums)
    print(report(bare, found))
    for name, rate in found.items():
        benchmark.extra_info[f"{name} GB/s"] = round(rate / 1e9, 2)
        benchmark.extra_info[f"{name} / bare"] = round(rate / found["bare"], 3)
    benchmark.pedantic(RingRead(path, THREADS, CHUNK_BYTES, checksums), rounds=3)


def test_row_latency(benchmark, pages):
    """One embedding row of 4 KiB: what a token waits for before it can start."""
    offsets = itertools.cycle(range(0, FILE_BYTES - 8192, 37 * 4096 + 1024))
    with Reader([pages[0]]) as reader:
        benchmark(lambda: reader.read_now(0, next(offsets), 4096))


def report(bare: BareRead, found: dict[str, float]) -> str:
    lines = [f"bare direct read, best of {len(GRID)}: {bare.threads} threads of {bare.chunk_bytes // MIB} MiB"]
    for name, rate in found.items():
        lines.append(f"{name:>16}: {rate / 1e9:6.2f} GB/s  {rate / found['bare']:.3f}")
    return "\n".join(lines)


def sweep(path: Path, checksums: list[int], rounds: int) -> str:
    passes = {}
    for setting in GRID:
        passes[("bare", *setting)] = BareRead(path, *setting)
        passes[("ring", *setting)] = RingRead(path, *setting, None)
        passes[("sums", *setting)] = RingRead(path, *setting, checksums)
    found = rates(passes, path.stat().st_size, rounds)
    lines = ["threads  chunk    bare    ring    ring+checksums   (GB/s, medians)"]
    for setting in GRID:
        bare, ring, sums = (found[(kind, *setting)] / 1e9 for kind in ("bare", "ring", "sums"))
        lines.append(f"{setting[0]:7}  {setting[1] // MIB:2} MiB  {bare:6.2f}  {ring:6.2f}  {sums:6.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    with file_of_pages() as (path, checksums):
        if options.sweep:
            print(sweep(path, checksums, options.rounds))
        else:
            print(report(*compare(path, checksums, options.rounds)))


if __name__ == "__main__":
    main()
