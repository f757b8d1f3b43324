"""Bytes on their way: from files into the memory that the compute reads, on the host or on a CUDA device.

A transfer owns one block of memory, divided into places by the pager. `start` begins to fill a place, `finish`
returns when the compute may use it, `released` says that the compute's last use of it has been issued.

Pages for a device pass through a ring of page-locked host memory. `NativeTransfer` leaves them to the copy engine
(csrc/io/copy_engine.cpp), whose thread goes on copying while Python is busy; `TorchTransfer` does the same with torch's
streams, but only makes progress when it is called. `open_transfer` chooses.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from thl_engine.device import cuda
from thl_engine.errors import DeviceError
from thl_engine.files import ALIGNMENT
from thl_engine.paging.reader import Arena, Reader

try:
    from thl_engine import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

# Longest pages between disk and device: four being read, as many as it takes to keep the reader's threads busy, one on
# the link, and one behind it so that the link never waits. With pages of 8 MiB, 48 MiB of page-locked memory.
STAGING_SLOTS = 6
CUFILE = "libcufile.so.0"
LINK_BYTES, LINK_COPIES = 8 << 20, 16  # of what is copied to measure the link: some ten milliseconds

_log = logging.getLogger("thl_engine")


@dataclass(frozen=True)
class Request:
    """Bytes [offset, offset + nbytes) of file number `file`, with the checksum to verify, if any, and a name.

    home: where the page is kept in host memory on its way to a device, so that it is read once; None if it is not kept.
    """

    file: int
    offset: int
    nbytes: int
    crc: int | None
    label: str
    home: int | None = None


class Transfer(Protocol):
    """Fills places of `memory`, uint8; data begin `request.offset % ALIGNMENT` bytes behind the place."""

    memory: Tensor

    @property
    def bytes_copied(self) -> int:
        """Bytes that went over the link to a device so far."""

    def start(self, request: Request, place: int) -> None: ...

    def finish(self, place: int) -> None: ...

    def released(self, place: int) -> None: ...

    def close(self) -> None:
        """Ends what is on its way and gives back all but `memory`."""


class HostTransfer:
    """Reads land where the kernels read: no copy after the disk's."""

    bytes_copied = 0

    def __init__(self, reader: Reader, nbytes: int) -> None:
        self._reader = reader
        self._arena = Arena(nbytes)
        self.memory = self._arena.tensor()
        self._tickets: dict[int, int] = {}

    def start(self, request: Request, place: int) -> None:
        self._tickets[place] = self._reader.submit(
            request.file, request.offset, request.nbytes, self._arena, place, crc=request.crc, label=request.label
        )

    def finish(self, place: int) -> None:
        self._reader.wait(self._tickets.pop(place))

    def released(self, place: int) -> None:
        """The compute is synchronous: nothing to wait for."""

    def close(self) -> None:
        """Reads end with the reader."""


def keeps_pages(device: torch.device) -> bool:
    """Whether pages for a device may have a home in host memory: through the copy engine alone."""
    return device.type == "cuda" and _native is not None and cuda.available()


def open_transfer(
    reader: Reader,
    places: Sequence[int],
    nbytes: int,
    slot_bytes: int,
    device: torch.device,
    direct_storage: bool = False,
    kept_bytes: int = 0,
) -> Transfer:
    """The best transfer to a device that this installation has; where there is a choice the log names it.

    places: offsets of all places in the memory of `nbytes`. slot_bytes: the longest page, alignment included.
    kept_bytes: page-locked host memory for pages with a home, where `keeps_pages`.
    direct_storage: pages whose checksum is verified are read past the host's memory where GPUDirect Storage can.
    """
    if device.type == "cpu":
        return HostTransfer(reader, nbytes)
    missing = cuda.reason() if reader.native is not None else "the C++ extension is not built"
    if missing is None:
        _log.info("pages reach %s through the native copy engine", device)
        return NativeTransfer(
            reader, places, nbytes, slot_bytes, device, direct_storage=direct_storage, kept_bytes=kept_bytes
        )
    _log.warning("pages reach %s through torch, slower than through the native copy engine: %s", device, missing)
    return TorchTransfer(reader, nbytes, slot_bytes, device)


class NativeTransfer:
    """Disk to a page-locked staging ring to the device, on the copy engine's thread.

    copies, compute: what copies, and the handle of the stream that computes; CUDA's unless given.
    """

    def __init__(
        self,
        reader: Reader,
        places: Sequence[int],
        nbytes: int,
        slot_bytes: int,
        device: torch.device,
        copies: "_native.CopyDevice | None" = None,
        compute: Callable[[], int] | None = None,
        direct_storage: bool = False,
        cufile: str = CUFILE,
        kept_bytes: int = 0,
    ) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._compute = compute or (lambda: torch.cuda.current_stream(device).cuda_stream)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            copies = copies or cuda.copy_device(self.memory.device.index)
            assert reader.native is not None  # built together with the engine
            make = partial(
                _native.CopyEngine,
                reader.native,
                copies,
                self.memory,
                list(places),
                slot_bytes,
                STAGING_SLOTS,
                self._compute(),
            )
            direct = self._with_direct_storage(make, cufile, reader, kept_bytes) if direct_storage else None
            self._engine: _native.CopyEngine = direct or make(kept_bytes=kept_bytes)

    def _with_direct_storage(
        self, make: "Callable[..., _native.CopyEngine]", cufile: str, reader: Reader, kept_bytes: int
    ) -> "_native.CopyEngine | None":
        try:
            engine = make(cufile, list(reader.paths), kept_bytes)
        except OSError as error:
            _log.info("GPUDirect Storage is not used: %s", error)
            return None
        _log.info("verified pages reach %s by GPUDirect Storage", self.memory.device)
        return engine

    @property
    def bytes_copied(self) -> int:
        return self._engine.bytes_copied

    @property
    def bytes_direct(self) -> int:
        """Bytes that were read past the host's memory."""
        return self._engine.bytes_direct

    def start(self, request: Request, place: int) -> None:
        self._engine.start(
            request.file,
            request.offset,
            request.nbytes,
            request.crc,
            request.label,
            place,
            -1 if request.home is None else request.home,
        )

    def finish(self, place: int) -> None:
        self._engine.finish(place, self._compute())

    def released(self, place: int) -> None:
        self._engine.released(place, self._compute())

    def close(self) -> None:
        self._engine.close()


class TorchTransfer:
    """Disk to a page-locked staging ring to the device. Copies run on a stream of their own; the host never waits for
    the device, nor the device for the host, except through events."""

    def __init__(
        self, reader: Reader, nbytes: int, slot_bytes: int, device: torch.device, streams: "CudaStreams | None" = None
    ) -> None:
        self.bytes_copied = 0
        self._reader = reader
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._streams = streams or CudaStreams(device)
        self._slot_bytes = slot_bytes
        self._staging = Arena(STAGING_SLOTS * slot_bytes)
        self._host = self._staging.tensor()
        self._streams.lock(self._host)
        self._locked = True
        self._waiting: deque[tuple[Request, int]] = deque()  # no staging slot yet
        self._reading: deque[tuple[int, int, Request, int]] = deque()  # ticket, staging slot, request, place
        self._free: deque[tuple[int, Any]] = deque((i, None) for i in range(STAGING_SLOTS))  # slot, its last copy
        self._copied: dict[int, Any] = {}  # place -> event after its copy
        self._used: dict[int, Any] = {}  # place -> event after the compute's last use

    def start(self, request: Request, place: int) -> None:
        if request.offset % ALIGNMENT + request.nbytes > self._slot_bytes:
            raise ValueError(
                f"{request.label}: {request.nbytes} bytes at offset {request.offset} do not fit a staging "
                f"slot of {self._slot_bytes}"
            )
        self._copied.pop(place, None)
        self._waiting.append((request, place))
        self._advance()

    def finish(self, place: int) -> None:
        while place not in self._copied:
            self._advance(block=True)
        self._streams.compute_after(self._copied[place])

    def released(self, place: int) -> None:
        self._used[place] = self._streams.mark_compute()
        self._advance()

    def close(self) -> None:
        if self._locked:
            for _, copied in self._free:
                self._streams.wait_on_host(copied)
            self._streams.unlock(self._host)
            self._locked = False

    def _advance(self, block: bool = False) -> None:
        """Copies pages that have been read and starts further reads, in order; waits for one read if `block`."""
        while self._reading and (block or self._reader.done(self._reading[0][0])):
            ticket, slot, request, place = self._reading.popleft()
            self._reader.wait(ticket)
            head = request.offset % ALIGNMENT
            begin = slot * self._slot_bytes + head
            copied = self._streams.copy(
                self.memory[place + head : place + head + request.nbytes],
                self._host[begin : begin + request.nbytes],
                self._used.pop(place, None),
            )
            self.bytes_copied += request.nbytes
            self._copied[place] = copied
            self._free.append((slot, copied))
            block = False
        while self._waiting and self._free:
            slot, copied = self._free.popleft()
            self._streams.wait_on_host(copied)  # the oldest copy out of a slot; long done unless the link is the limit
            request, place = self._waiting.popleft()
            ticket = self._reader.submit(
                request.file,
                request.offset,
                request.nbytes,
                self._staging,
                slot * self._slot_bytes,
                crc=request.crc,
                label=request.label,
            )
            self._reading.append((ticket, slot, request, place))


class CudaStreams:
    """What a transfer through torch needs of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(torch.cuda.current_stream(device))  # which may still use what the memory was before

    def lock(self, memory: Tensor) -> None:
        """Page-locks host memory, so that copies from it are asynchronous."""
        try:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
        except RuntimeError as error:
            raise DeviceError(
                f"{error}; copies to the device go through {memory.nbytes} bytes of page-locked host "
                "memory: raise the limit on it (ulimit -l unlimited; containers: --ulimit memlock=-1) or "
                "leave more memory free"
            ) from None

    def unlock(self, memory: Tensor) -> None:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())))

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Starts a copy that waits for the event `after`; returns an event that follows it."""
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def mark_compute(self) -> Any:
        """An event after all compute issued so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def compute_after(self, event: Any) -> None:
        """Lets compute issued from now on wait for an event."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def wait_on_host(self, event: Any) -> None:
        if event is not None:
            event.synchronize()


@cache
def link_bandwidth(device: torch.device) -> float | None:
    """Bytes per second from page-locked host memory to a CUDA device, as transfers copy; None on the CPU.

    The ceiling for streaming, without any reads; measured once for the process. The target is given back at once, so
    that it takes nothing from an engine's memory.
    """
    if device.type != "cuda":
        return None
    seconds = _copy_seconds(torch.empty(LINK_BYTES, dtype=torch.uint8, device=device))
    torch.cuda.empty_cache()
    return LINK_COPIES * LINK_BYTES / seconds


def _copy_seconds(target: Tensor) -> float:
    """What LINK_COPIES copies from a page-locked ring to the target take."""
    device, nbytes = target.device, target.numel()
    if _native is not None and cuda.available():
        torch.cuda.synchronize(device)  # the target may be memory that work on its way still reads
        return _native.copy_seconds(cuda.copy_device(device.index), target, STAGING_SLOTS, LINK_COPIES)
    streams, ring = CudaStreams(device), Arena(STAGING_SLOTS * nbytes).tensor()
    streams.lock(ring)
    for count in (STAGING_SLOTS, LINK_COPIES):
        started = time.perf_counter()
        for i in range(count):
            begin = i % STAGING_SLOTS * nbytes
            copied = streams.copy(target, ring[begin : begin + nbytes], None)
        streams.wait_on_host(copied)
    seconds = time.perf_counter() - started
    streams.unlock(ring)
    return seconds
