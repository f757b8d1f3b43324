"""Reads pages of files into aligned memory on worker threads, past the page cache where that is possible.

`Reader` and `Arena` are native (csrc/io/) where the package was built with a compiler.
`_PythonReader` does the same with os.preadv in a thread pool: for installs without one, and as twin in tests.
"""

import errno
import fcntl
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from thl_engine.checkpoint.checksum import crc32c
from thl_engine.errors import CheckpointError
from thl_engine.files import ALIGNMENT

try:
    from thl_engine import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]


# Measured by benchmarks/bench_reader.py on a 2-core AMD EPYC VM (Zen 5, virtio disk, ext4) with 8 MiB pages in a ring:
# medians relative to the best bare direct read (3.1 GB/s), without and with checksums, noise about 0.015:
#   threads x chunk   4 x 2 MiB     3 x 4         4 x 4         6 x 4         8 x 4
#                     0.95 0.94     0.97 0.95     0.98 0.97     0.97 0.99     1.00 0.99
THREADS = 8
CHUNK_BYTES = 4 << 20

_log = logging.getLogger("thl_engine")
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # how file systems refuse it
_LAST_OFFSET = 2**63 - ALIGNMENT


class Arena:
    """`nbytes` (rounded up to 4096) of zeroed, page-aligned memory; huge pages where the system has them.

    The memory lives as long as the arena, a tensor over it or a read into it. Raises MemoryError where the
    system has not as much, ValueError for a size below one byte.
    """

    def __init__(self, nbytes: int):
        self.memory = _native.Arena(nbytes) if _native is not None else _map_memory(nbytes)
        self.nbytes: int = memoryview(self.memory).nbytes

    def tensor(self) -> torch.Tensor:
        """The memory itself as a uint8 tensor [nbytes]."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)


def _map_memory(nbytes: int) -> mmap.mmap:
    if nbytes < 1:
        raise ValueError(f"an arena needs at least one byte, got {nbytes}")
    try:
        memory = mmap.mmap(-1, _ceil(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes for an arena: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # advice: a kernel without huge pages refuses
    return memory


class Reader:
    """Reads from a fixed list of files. One Python thread at a time submits and waits.

    In the child of a fork, which has none of its threads, calls raise ValueError; `close` closes the files.

    paths: files, named by their index in this list. threads: reads in flight. chunk_bytes: large pages are
    split into chunks of this size (a multiple of 4096), which several threads read. direct: use O_DIRECT;
    where a file system refuses it, plain reads serve and a warning says so once.
    Raises CheckpointError where a file cannot be opened, ValueError for bad numbers.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        threads: int = THREADS,
        direct: bool = True,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.paths = tuple(os.fspath(path) for path in paths)
        make = _PythonReader if _native is None else _native.Reader
        self._reader = make(list(self.paths), threads, direct, chunk_bytes)
        self._warned = False
        self._warn_once()

    def submit(
        self,
        file: int,
        offset: int,
        nbytes: int,
        arena: Arena,
        arena_offset: int,
        crc: int | None = None,
        label: str = "",
    ) -> int:
        """Queue a read of `nbytes` at `offset` of file number `file`; returns a ticket. First in, first out.

        The 4096-aligned range around the bytes lands at `arena_offset` (a multiple of 4096), so the data
        start at arena_offset + offset % 4096. `crc` is the CRC-32C of exactly the nbytes, checked when they
        have arrived; `label` names them in errors. Raises ValueError, with nothing queued, where a number
        is out of range or the arena too small.
        """
        return self._reader.submit(file, offset, nbytes, arena.memory, arena_offset, crc, label)

    def wait(self, ticket: int) -> float:
        """Block until the read is over; returns the seconds blocked. Each ticket can be waited for once.

        Raises CheckpointError naming file, label, offset and cause (short read, I/O error, checksum);
        ValueError for an unknown ticket or a closed reader.
        """
        seconds = self._reader.wait(ticket)
        self._warn_once()
        return seconds

    def done(self, ticket: int) -> bool:
        """Whether `wait` would return at once. Raises ValueError as `wait` does."""
        return self._reader.done(ticket)

    def read_now(self, file: int, offset: int, nbytes: int) -> torch.Tensor:
        """Read a few bytes (a row of an embedding) on the calling thread, past the queue: a new uint8 [nbytes].

        Raises CheckpointError and ValueError as `submit` and `wait` do.
        """
        data = self._reader.read_now(file, offset, nbytes)
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    @property
    def implementation(self) -> str:
        """Which reader works behind this one: "native" or "python"."""
        return "python" if isinstance(self._reader, _PythonReader) else "native"

    @property
    def native(self) -> "_native.Reader | None":
        """The native reader, for the copy engine; None where the Python one works."""
        return None if isinstance(self._reader, _PythonReader) else self._reader

    @property
    def direct(self) -> list[bool]:
        """For each file, whether it is read with O_DIRECT."""
        return self._reader.direct

    @property
    def bytes_read(self) -> int:
        """Bytes that the system delivered so far, alignment included."""
        return self._reader.bytes_read

    @property
    def inherited(self) -> bool:
        """Whether a fork has brought the reader into this process."""
        return self._reader.inherited

    def close(self) -> None:
        """Drop what is queued, finish what is being read, end the workers. No arena is written afterwards."""
        self._reader.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_reader"):  # absent where a file could not be opened
            self._reader.close()

    def _warn_once(self) -> None:
        if self._reader.refused and not self._warned:
            self._warned = True
            refused = [path for path, direct in zip(self.paths, self.direct, strict=True) if not direct]
            _log.warning("direct reads (O_DIRECT) are refused, using plain reads: %s", ", ".join(refused))


@dataclass
class _File:
    path: str
    fd: int
    direct: bool


@dataclass
class _Request:
    """A page on its way into memory; `lock` guards `chunks_left` and `missing`."""

    file: _File
    offset: int
    nbytes: int
    crc: int | None
    label: str
    data: memoryview  # the arena, from the aligned start on
    futures: list[Future[Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    chunks_left: int = 0
    missing: int | None = None  # file offset of the first byte that could not be had
    cause: str = ""  # and why

    def error(self, cause: str) -> CheckpointError:
        where = f"{self.file.path}: {self.label}: " if self.label else f"{self.file.path}: "
        return CheckpointError(f"{where}{self.nbytes} bytes at offset {self.offset}: {cause}")


class _PythonReader:
    """The native reader's twin: same methods, same results, same messages."""

    def __init__(self, paths: list[str], threads: int, direct: bool, chunk_bytes: int):
        if threads < 1:
            raise ValueError(f"a reader needs at least one thread, got {threads}")
        if chunk_bytes < ALIGNMENT or chunk_bytes % ALIGNMENT:
            raise ValueError(f"chunk_bytes must be a positive multiple of {ALIGNMENT}, got {chunk_bytes}")
        self.refused = False
        self.bytes_read = 0
        self._lock = threading.Lock()  # guards bytes_read
        self._chunk_bytes = chunk_bytes
        self._tickets: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        self._files: list[_File] = []
        self._now_lock = threading.Lock()
        self._now_buffer: mmap.mmap | None = None
        self._closed = False
        self._process = os.getpid()
        try:
            for path in paths:
                self._files.append(self._open(path, direct))
        except CheckpointError:
            for file in self._files:
                os.close(file.fd)
            raise
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="thl-reader")

    @property
    def direct(self) -> list[bool]:
        return [file.direct for file in self._files]

    @property
    def inherited(self) -> bool:
        return os.getpid() != self._process

    def submit(
        self, file: int, offset: int, nbytes: int, memory: Any, arena_offset: int, crc: int | None, label: str
    ) -> int:
        source = self._file(file)
        begin, end = _aligned_range(offset, nbytes)
        if arena_offset < 0 or arena_offset % ALIGNMENT:
            raise ValueError(f"arena_offset must be a multiple of {ALIGNMENT}, got {arena_offset}")
        whole = memoryview(memory)
        if end - begin > whole.nbytes - arena_offset:
            raise ValueError(
                f"{end - begin} bytes at arena_offset {arena_offset} do not fit an arena of {whole.nbytes} bytes"
            )
        if self._closed:
            raise ValueError("the reader is closed")
        data = whole[arena_offset : arena_offset + end - begin]
        request = _Request(source, offset, nbytes, crc, label, data)
        starts = range(begin, end, self._chunk_bytes)
        request.chunks_left = len(starts)
        if not starts:
            self._check(request)
        for start in starts:
            stop = min(start + self._chunk_bytes, end)
            request.futures.append(self._pool.submit(self._read_chunk, request, begin, start, stop))
        ticket = next(self._numbers)
        self._tickets[ticket] = request
        return ticket

    def wait(self, ticket: int) -> float:
        request = self._request(ticket)
        blocked = 0.0
        if not self.done(ticket):
            start = time.monotonic()
            try:
                for future in request.futures:
                    future.result()
            except CancelledError:
                raise ValueError("the reader is closed") from None
            blocked = time.monotonic() - start
        self._tickets.pop(ticket, None)
        if request.missing is not None:
            raise request.error(request.cause)
        return blocked

    def done(self, ticket: int) -> bool:
        return all(future.done() for future in self._request(ticket).futures)

    def read_now(self, file: int, offset: int, nbytes: int) -> bytearray:
        source = self._file(file)
        begin, end = _aligned_range(offset, nbytes)
        with self._now_lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if self._now_buffer is None or len(self._now_buffer) < end - begin:
                self._now_buffer = _map_memory(max(end - begin, ALIGNMENT))
            data = memoryview(self._now_buffer)[: end - begin]
            request = _Request(source, offset, nbytes, None, "", data)
            self._read_range(request, begin, begin, end)
            if request.missing is not None:
                raise request.error(request.cause)
            return bytearray(data[offset - begin : offset - begin + nbytes])

    def close(self) -> None:
        if self.inherited:  # the threads stayed behind, one of them perhaps with a lock
            if not self._closed:
                self._close_files()
            return
        with self._now_lock:
            if self._closed:
                return
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tickets.clear()
        self._now_buffer = None
        self._close_files()

    def _close_files(self) -> None:
        self._closed = True
        for file in self._files:
            os.close(file.fd)

    def _open(self, path: str, direct: bool) -> _File:
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = None
        try:
            if direct and _O_DIRECT:
                try:
                    fd = os.open(path, flags | _O_DIRECT)
                except OSError as error:
                    if error.errno not in _REFUSALS:
                        raise
                    self.refused = True
            file = _File(path, os.open(path, flags), False) if fd is None else _File(path, fd, True)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
        # Some file systems accept the flag and refuse the read: find out now, so that `direct` is true.
        if file.direct:
            try:
                os.preadv(file.fd, [_map_memory(ALIGNMENT)], 0)
            except OSError as error:
                if error.errno in _REFUSALS:
                    self._use_plain_reads(file)
        return file

    def _use_plain_reads(self, file: _File) -> None:
        fcntl.fcntl(file.fd, fcntl.F_SETFL, fcntl.fcntl(file.fd, fcntl.F_GETFL) & ~_O_DIRECT)
        file.direct = False
        self.refused = True

    def _refuse_inherited(self) -> None:
        if self.inherited:
            raise ValueError("the reader was opened by a process that this one is a fork of")

    def _file(self, file: int) -> _File:
        self._refuse_inherited()
        if not 0 <= file < len(self._files):
            raise ValueError(f"file {file} is not one of the reader's {len(self._files)} files")
        return self._files[file]

    def _request(self, ticket: int) -> _Request:
        self._refuse_inherited()
        if self._closed:
            raise ValueError("the reader is closed")
        if ticket not in self._tickets:
            raise ValueError(f"ticket {ticket} is unknown or was waited for already")
        return self._tickets[ticket]

    def _read_chunk(self, request: _Request, begin: int, start: int, stop: int) -> None:
        if request.missing is None:  # what follows a failed chunk is of no use
            self._read_range(request, begin, start, stop)
        with request.lock:
            request.chunks_left -= 1
            last = request.chunks_left == 0
        if last:
            self._check(request)

    def _read_range(self, request: _Request, begin: int, start: int, stop: int) -> None:
        """Read file bytes [start, stop), both aligned; the file may end behind the bytes asked for."""
        file = request.file
        needed_end = min(stop, request.offset + request.nbytes)
        position = start
        while position < needed_end:
            # After a part of a block a direct read starts again at that block.
            at = position // ALIGNMENT * ALIGNMENT if file.direct else position
            try:
                got = os.preadv(file.fd, [request.data[at - begin : stop - begin]], at)
            except OSError as error:
                if file.direct and error.errno in _REFUSALS:
                    self._use_plain_reads(file)
                    continue
                cause = f"cannot be read at byte {position}: {error.strerror}"
                return self._fail(request, position, cause)
            with self._lock:
                self.bytes_read += got
            if at + got <= position:
                arrived = max(0, position - request.offset)
                cause = f"short read: expected {request.nbytes} bytes, got {arrived}; is the file truncated?"
                return self._fail(request, position, cause)
            position = at + got

    @staticmethod
    def _fail(request: _Request, position: int, cause: str) -> None:
        with request.lock:  # chunks start in file order: the earliest that fails holds the first missing byte
            if request.missing is None or position < request.missing:
                request.missing, request.cause = position, cause

    @staticmethod
    def _check(request: _Request) -> None:
        if request.crc is None or request.missing is not None:
            return
        first = request.offset % ALIGNMENT
        found = crc32c(request.data[first : first + request.nbytes])
        if found != request.crc:
            request.missing = request.offset
            request.cause = (
                f"checksum mismatch: expected {request.crc:08x}, found {found:08x}; "
                "the file is damaged, copy or quantise it again"
            )


def _ceil(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _aligned_range(offset: int, nbytes: int) -> tuple[int, int]:
    if offset < 0 or nbytes < 0 or offset + nbytes > _LAST_OFFSET:
        raise ValueError(f"offset {offset} with {nbytes} bytes is no range of a file")
    begin = offset // ALIGNMENT * ALIGNMENT
    return begin, _ceil(offset + nbytes) if nbytes else begin
