"""Bytes on their way: from files into the memory that the compute reads, on the host or on a CUDA device.

A transfer owns one block of memory, divided into places by the pager. `start` begins to fill a place, `finish`
returns when the compute may use it, `released` says that the compute's last use of it has been issued.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thl_engine.reader import Arena, Reader

ALIGNMENT = 4096  # of places, as direct reads need
STAGING_SLOTS = 4  # pages between disk and device: two being read, one being copied, one to spare


@dataclass(frozen=True)
class Request:
    """Bytes [offset, offset + nbytes) of file number `file`, with the checksum to verify, if any, and a name."""

    file: int
    offset: int
    nbytes: int
    crc: int | None
    label: str


class Transfer(Protocol):
    """Fills places of `memory`, uint8; data begin `request.offset % ALIGNMENT` bytes behind the place."""

    memory: Tensor

    def start(self, request: Request, place: int) -> None: ...

    def finish(self, place: int) -> None: ...

    def released(self, place: int) -> None: ...


class HostTransfer:
    """Reads land where the kernels read: no copy after the disk's."""

    def __init__(self, reader: Reader, nbytes: int) -> None:
        self._reader = reader
        self._arena = Arena(nbytes)
        self.memory = self._arena.tensor()
        self._tickets: dict[int, int] = {}

    def start(self, request: Request, place: int) -> None:
        self._tickets[place] = self._reader.submit(request.file, request.offset, request.nbytes, self._arena, place,
                                                   crc=request.crc, label=request.label)

    def finish(self, place: int) -> None:
        self._reader.wait(self._tickets.pop(place))

    def released(self, place: int) -> None:
        """The compute is synchronous: nothing to wait for."""


class DeviceTransfer:
    """Disk to a page-locked staging ring to the device. Copies run on a stream of their own; the host never waits for
    the device, nor the device for the host, except through events."""

    def __init__(self, reader: Reader, nbytes: int, slot_bytes: int, device: torch.device,
                 streams: "CudaStreams | None" = None) -> None:
        self._reader = reader
        self._streams = streams or CudaStreams(device)
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._slot_bytes = slot_bytes
        self._staging = Arena(STAGING_SLOTS * slot_bytes)
        self._host = self._staging.tensor()
        self._streams.lock(self._host)
        self._waiting: deque[tuple[Request, int]] = deque()  # no staging slot yet
        self._reading: deque[tuple[int, int, Request, int]] = deque()  # ticket, staging slot, request, place
        self._free: deque[tuple[int, Any]] = deque((i, None) for i in range(STAGING_SLOTS))  # slot, its last copy
        self._copied: dict[int, Any] = {}  # place -> event after its copy
        self._used: dict[int, Any] = {}  # place -> event after the compute's last use

    def start(self, request: Request, place: int) -> None:
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

    def _advance(self, block: bool = False) -> None:
        """Copies pages that have been read and starts further reads, in order; waits for one read if `block`."""
        while self._reading and (block or self._reader.done(self._reading[0][0])):
            ticket, slot, request, place = self._reading.popleft()
            self._reader.wait(ticket)
            head = request.offset % ALIGNMENT
            begin = slot * self._slot_bytes + head
            copied = self._streams.copy(self.memory[place + head : place + head + request.nbytes],
                                        self._host[begin : begin + request.nbytes], self._used.pop(place, None))
            self._copied[place] = copied
            self._free.append((slot, copied))
            block = False
        while self._waiting and self._free:
            slot, copied = self._free.popleft()
            self._streams.wait_on_host(copied)  # the oldest copy out of a slot; long done unless the link is the limit
            request, place = self._waiting.popleft()
            ticket = self._reader.submit(request.file, request.offset, request.nbytes, self._staging,
                                         slot * self._slot_bytes, crc=request.crc, label=request.label)
            self._reading.append((ticket, slot, request, place))


class CudaStreams:
    """What a device transfer needs of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def lock(self, memory: Tensor) -> None:
        """Page-locks host memory, so that copies from it are asynchronous."""
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        torch.cuda.check_error(int(status))

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
