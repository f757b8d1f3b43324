"""Both readers, native and pure Python, against the bytes that were written; the checksum against its definition."""

import logging
import os
import threading
import time

import numpy as np
import pytest
import torch
from native_parts import crc32c_portable

from thl_engine.checkpoint import checksum
from thl_engine.errors import CheckpointError
from thl_engine.paging import reader
from thl_engine.paging.reader import Arena, Reader

CHUNK = 16384  # small, so that small files make pages of many chunks
SIZE = 40 * CHUNK + 1234  # the file ends inside a block


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(reader, "_native", None)
    elif reader._native is None:
        pytest.skip("the native reader is not built")
    return request.param


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def path(tmp_path, content):
    target = tmp_path / "pages.bin"
    content.tofile(target)
    return target


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def test_reads_any_range(implementation, path, content):
    cases = [(0, 1), (1, 1), (4095, 2), (4096, 4096), (8192, CHUNK), (777, 5 * CHUNK), (4097, CHUNK - 1)]
    cases += [(SIZE - 1, 1), (SIZE - 5000, 5000), (0, SIZE), (12288, 0), (SIZE, 0)]
    cases += [(CHUNK - 1, 1), (CHUNK - 1, 2), (CHUNK, CHUNK), (3, CHUNK)]
    arena = Arena(SIZE + 8192)
    data = arena.tensor().numpy()
    with Reader([path], chunk_bytes=CHUNK) as source:
        assert source.implementation == implementation
        for offset, nbytes in cases:
            data[:] = 0xA5
            crc = checksum.crc32c(content[offset : offset + nbytes])
            assert source.wait(source.submit(0, offset, nbytes, arena, 4096, crc=crc)) >= 0
            first = 4096 + offset % 4096
            assert np.array_equal(data[first : first + nbytes], content[offset : offset + nbytes])
            end = 4096 + -(-(offset + nbytes) // 4096) * 4096 - offset // 4096 * 4096 if nbytes else 4096
            assert (data[:4096] == 0xA5).all() and (data[end:] == 0xA5).all()  # nothing outside the aligned range


@pytest.mark.parametrize("direct", [True, False])
def test_many_tickets_waited_out_of_order(implementation, path, content, direct):
    random = np.random.default_rng(2)
    slot, slots = 8 * CHUNK, 8
    arena = Arena(slot * slots)
    data = arena.tensor().numpy()
    with Reader([path, path], threads=3, direct=direct, chunk_bytes=CHUNK) as source:
        if not direct:
            assert source.direct == [False, False]
        for _ in range(20):  # the arena is used again in every round
            reads = []
            for index in range(slots):
                nbytes = int(random.integers(0, slot - 8192))
                offset = int(random.integers(0, SIZE - nbytes))
                crc = checksum.crc32c(content[offset : offset + nbytes]) if index % 2 else None
                ticket = source.submit(index % 2, offset, nbytes, arena, index * slot, crc=crc)
                reads.append((ticket, index * slot + offset % 4096, offset, nbytes))
            for choice in random.permutation(slots):
                ticket, first, offset, nbytes = reads[choice]
                source.wait(ticket)
                assert np.array_equal(data[first : first + nbytes], content[offset : offset + nbytes])


def test_tickets_are_waited_once(implementation, path):
    arena = Arena(8192)
    with Reader([path]) as source:
        ticket = source.submit(0, 0, 100, arena, 0)
        while not source.done(ticket):
            pass
        assert source.wait(ticket) == 0.0
        for call in (source.wait, source.done):
            with pytest.raises(ValueError, match=f"ticket {ticket} is unknown"):
                call(ticket)


def test_bytes_read_counts_the_aligned_range(implementation, path):
    arena = Arena(16384)
    with Reader([path]) as source:
        source.wait(source.submit(0, 4095, 2, arena, 0))
        assert source.bytes_read == 8192
        source.wait(source.submit(0, SIZE - 1, 1, arena, 0))
        assert source.bytes_read == 8192 + SIZE % 4096


def test_read_now(implementation, path, content):
    with Reader([path]) as source:
        for offset, nbytes in [(0, 64), (4090, 20), (SIZE - 3, 3), (5000, 70000), (123, 64), (10, 0)]:
            row = source.read_now(0, offset, nbytes)
            assert row.dtype == torch.uint8 and np.array_equal(row.numpy(), content[offset : offset + nbytes])
        with pytest.raises(CheckpointError, match=r"pages\.bin.*expected 10 bytes, got 3"):
            source.read_now(0, SIZE - 3, 10)
        for arguments in [(0, -1, 4), (0, 4, -1), (1, 0, 4), (0, 2**63, 1), (0, 2**63 - 1, 1)]:
            with pytest.raises(ValueError):
                source.read_now(*arguments)


def test_truncated_file_names_page_and_sizes(implementation, path):
    arena = Arena(SIZE + 4096)
    with Reader([path], chunk_bytes=CHUNK) as source:
        os.truncate(path, 3 * CHUNK + 100)  # after it was opened
        ticket = source.submit(0, 50, SIZE - 50, arena, 0, label="head.weight rows 0:512")
        message = rf"pages\.bin: head\.weight rows 0:512: .*offset 50: short read: expected {SIZE - 50} bytes"
        with pytest.raises(CheckpointError, match=message + rf", got {3 * CHUNK + 50}.*truncated"):
            source.wait(ticket)
        with pytest.raises(CheckpointError, match="got 0;"):
            source.wait(source.submit(0, 30 * CHUNK, 10, arena, 0))
        source.wait(source.submit(0, 50, 3 * CHUNK + 50, arena, 0))  # what is left still reads


@pytest.mark.parametrize("position", [5000, 5000 + 3 * CHUNK, 5000 + 6 * CHUNK - 1])
def test_flipped_bit_fails_the_checksum(implementation, path, content, position):
    arena = Arena(8 * CHUNK)
    expected = checksum.crc32c(content[5000 : 5000 + 6 * CHUNK])
    with Reader([path], chunk_bytes=CHUNK) as source:
        flip(path, position)
        with pytest.raises(CheckpointError, match=rf"p1: .*offset 5000.*expected {expected:08x}, found .*damaged"):
            source.wait(source.submit(0, 5000, 6 * CHUNK, arena, 0, crc=expected, label="p1"))
        source.wait(source.submit(0, 5000, 6 * CHUNK, arena, 0))  # unchecked without a checksum
        flip(path, position)
        flip(path, 4999)  # in the block that is read, but not in the page
        source.wait(source.submit(0, 5000, 6 * CHUNK, arena, 0, crc=expected))


def test_io_error_names_its_cause(implementation, tmp_path):
    with Reader([tmp_path]) as source:  # a folder opens, and then cannot be read
        ticket = source.submit(0, 8192, 100, Arena(4096), 0, label="p7")
        with pytest.raises(CheckpointError, match=r"p7: .*offset 8192: cannot be read at byte 8192: Is a directory"):
            source.wait(ticket)


def test_missing_file(implementation, path, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.bin: cannot be opened: No such file"):
        Reader([path, tmp_path / "absent.bin"])


def test_bad_submissions_queue_nothing(implementation, path):
    arena = Arena(16384)
    with Reader([path]) as source:
        for file, offset, nbytes, at in [
            (0, 0, 16385, 0),
            (0, 4095, 16384, 0),  # would fit, were it aligned
            (0, 0, 4097, 12288),
            (0, 0, 1, 16384),
            (0, 0, 1, 100),
            (0, 0, 1, -4096),
            (0, 0, 1, 2**62),
            (0, 0, 1, 2**64),
            (0, -1, 10, 0),
            (0, 0, -1, 0),
            (0, 2**63 - 1, 2, 0),
            (0, 2**63 - 2, 1, 0),
            (0, 2**70, 1, 0),
            (0, 0, 2**63 - 1, 0),
            (0, 0, 2**64 + 1, 0),
            (1, 0, 1, 0),
            (-1, 0, 1, 0),
        ]:
            with pytest.raises(ValueError):
                source.submit(file, offset, nbytes, arena, at)
        assert source.bytes_read == 0
        assert not arena.tensor().any()


def test_bad_arguments(implementation, path):
    with pytest.raises(ValueError, match="at least one thread"):
        Reader([path], threads=0)
    for chunk_bytes in (0, 1000, 4097, -4096):
        with pytest.raises(ValueError, match="multiple of 4096"):
            Reader([path], chunk_bytes=chunk_bytes)
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(0)
    with pytest.raises(ValueError):
        Arena(-1)


@pytest.mark.parametrize("nbytes", [2**50, 2**62])
def test_arena_too_large_states_its_size(implementation, nbytes):
    with pytest.raises(MemoryError, match=f"cannot allocate {nbytes} bytes"):
        Arena(nbytes)


def test_arena_memory(implementation):
    for nbytes in (1, 4096, 5 << 20):
        arena = Arena(nbytes)
        tensor = arena.tensor()
        assert arena.nbytes == tensor.numel() == -(-nbytes // 4096) * 4096
        assert tensor.data_ptr() % 4096 == 0 and not tensor.any()
        tensor[-1] = 7
        assert arena.tensor()[-1] == 7
        del arena
        tensor.fill_(1)  # a tensor keeps the memory alive
        assert tensor.sum() == tensor.numel()


def test_reads_keep_the_arena_alive(implementation, path):
    with Reader([path], chunk_bytes=4096) as source:
        tickets = [source.submit(0, 0, SIZE, Arena(SIZE), 0) for _ in range(10)]
        for ticket in tickets:
            source.wait(ticket)


def test_close_with_reads_in_flight(implementation, path):
    arena = Arena(64 * CHUNK)
    source = Reader([path], threads=2, chunk_bytes=4096)
    tickets = [source.submit(0, 0, SIZE, arena, 0) for _ in range(50)]
    source.wait(tickets[0])
    source.close()
    data = arena.tensor()
    data.fill_(0xA5)
    source.close()
    for call in (
        lambda: source.wait(tickets[-1]),
        lambda: source.done(tickets[-1]),
        lambda: source.submit(0, 0, 1, arena, 0),
        lambda: source.read_now(0, 0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert (data == 0xA5).all()


def test_close_wakes_a_waiting_thread(implementation, path):
    arena = Arena(64 * CHUNK)
    source = Reader([path], threads=1, chunk_bytes=4096)
    tickets = [source.submit(0, 0, SIZE, arena, 0) for _ in range(200)]
    outcome = []

    def wait_for_last():
        try:
            outcome.append(source.wait(tickets[-1]))
        except ValueError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=wait_for_last)
    thread.start()
    source.wait(tickets[0])
    source.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and outcome in (["the reader is closed"], [pytest.approx(0, abs=60)])


def test_dropped_reader_ends_its_threads(implementation, path):
    tasks = len(os.listdir("/proc/self/task"))
    source = Reader([path], threads=4, chunk_bytes=4096)
    arena = Arena(SIZE)
    for _ in range(20):
        source.submit(0, 0, SIZE, arena, 0)
    del source
    deadline = time.monotonic() + 10  # the system lists a thread that was joined for a moment longer
    while len(os.listdir("/proc/self/task")) > tasks:
        assert time.monotonic() < deadline


def test_memory_file_system(implementation, content):
    """tmpfs refuses O_DIRECT before Linux 6.6 and takes it since: right bytes either way."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    with open(os.memfd_create("pages"), "wb") as file:
        content.tofile(file)
        file.flush()
        with Reader([f"/proc/self/fd/{file.fileno()}"], chunk_bytes=CHUNK) as source:
            arena = Arena(SIZE + 4096)
            source.wait(source.submit(0, 5, SIZE - 5, arena, 0, crc=checksum.crc32c(content[5:])))
            assert np.array_equal(arena.tensor()[5:SIZE].numpy(), content[5:])


def test_plain_reads_where_direct_ones_are_refused(implementation, path, caplog):
    """/proc knows no O_DIRECT, and hands out long files in pieces of odd sizes."""
    long, short = "/proc/kallsyms", "/proc/version"
    if not (os.path.exists(long) and os.path.exists(short)):
        pytest.skip("no /proc")
    with open(long, "rb") as file:
        expected = file.read(50000)
    with caplog.at_level(logging.WARNING, logger="thl_engine"):
        with Reader([path, short, long], chunk_bytes=1 << 20) as source:
            assert source.direct[1:] == [False, False]
            arena = Arena(65536)
            for _ in range(2):
                source.wait(source.submit(2, 0, len(expected), arena, 0))
            assert bytes(arena.tensor()[: len(expected)].numpy()) == expected
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and short in warnings[0] and "O_DIRECT" in warnings[0]


def test_no_warning_without_a_refusal(implementation, path, caplog):
    with caplog.at_level(logging.WARNING, logger="thl_engine"):
        Reader([path], direct=False).close()
    assert not caplog.records


@pytest.mark.parametrize("version", ["chosen", "native tables", "numpy"])
def test_crc32c(version):
    versions = {"chosen": checksum.crc32c, "native tables": crc32c_portable, "numpy": checksum.crc32c_numpy}
    crc32c = versions[version]

    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)

    def byte_by_byte(data):
        crc = 0xFFFFFFFF
        for byte in data:
            crc = (crc >> 8) ^ table[(crc ^ byte) & 255]
        return crc ^ 0xFFFFFFFF

    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0 and crc32c(b"", 77) == 77
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720 B.4
    data = np.random.default_rng(3).integers(0, 256, 30000, dtype=np.uint8)
    for start in (0, 1, 7):
        for nbytes in (1, 7, 8, 255, 511, 512, 513, 767, 768, 2047, 6143, 6144, 12287, 12288, 18437, 29990):
            part = data[start : start + nbytes]
            assert crc32c(part) == byte_by_byte(part.tolist())
            assert crc32c(part[nbytes // 3 :], crc32c(part[: nbytes // 3])) == crc32c(part)


def test_crc32c_takes_tensors():
    values = torch.arange(10, dtype=torch.bfloat16)
    assert checksum.crc32c(values) == checksum.crc32c(values.view(torch.int16).numpy().tobytes())
    assert checksum.crc32c(torch.tensor(1.0)) == checksum.crc32c(np.float32(1).tobytes())
    with pytest.raises(ValueError, match="contiguous"):
        checksum.crc32c(values[::2])
