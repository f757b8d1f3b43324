"""Seconds of work on a device, and the ceilings that its results are held against.

On a CUDA device many calls are captured into one graph, whose replays are timed with events: what the host takes to
launch them stays out of the figures. Calls rotate through inputs that together are far larger than the L2 cache.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 15
MOST_CALLS = 400  # in a graph, beside one for each input
WARM_SECONDS = 0.2  # that these may take as the host launches them
BYTES = 2 << 30  # of what a bandwidth's inputs take together, several times any L2 cache


class Timer:
    """Times work on a device; on the CPU, where nothing but a rehearsal runs, with the clock and tiny inputs."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        total = torch.cuda.get_device_properties(self.device).total_memory if self.cuda else 1 << 20
        self.bytes = min(BYTES, total // 16)
        self.note = ""  # of the last timing

    def sets(self, nbytes: int, most: int = 512) -> int:
        """How many inputs of so many bytes to rotate through."""
        return max(2, min(most, -(-self.bytes // nbytes))) if self.cuda else 2

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one call; the calls do the same work on different inputs."""
        for call in calls:
            call()
        if not self.cuda:
            return statistics.median(self._clock(call) for call in calls)
        torch.cuda.synchronize(self.device)
        once = self._clock(lambda: [call() for call in calls]) / len(calls)
        count = max(len(calls), min(MOST_CALLS, int(WARM_SECONDS / once)))

        def work() -> None:
            for call in itertools.islice(itertools.cycle(calls), count):
                call()

        replay = self._captured(work)
        for _ in range(3):
            replay()
        return statistics.median(self._between_events(replay) for _ in range(ROUNDS)) / count

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work as a graph; the work itself, with a word in `note`, if it cannot be captured."""
        graph, stream, self.note = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device), ""
        try:
            with torch.cuda.graph(graph):
                work()
            return graph.replay
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            self.wait()
            self.note = f"launched by the host, not from a graph: {str(error).splitlines()[0]}"
            return work

    def eager_seconds(self, work: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Median seconds of work as the host launches it, to the end of what it started."""
        work()
        return statistics.median(self._clock(work) for _ in range(rounds))

    def _clock(self, work: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def _between_events(self, work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy within the device's memory."""
        count = self.bytes // 8
        sources = [torch.randn(count, device=self.device) for _ in range(2)]
        targets = [torch.empty_like(source) for source in sources]
        pairs = zip(targets, sources, strict=True)
        return 8 * count / self.seconds([lambda a=a, b=b: a.copy_(b) for a, b in pairs])

    def matmul_rate(self) -> float:
        """Operations per second of a bfloat16 product of 8192 rows, columns and inner features."""
        size = 8192 if self.cuda else 64
        a, b, c = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(3))
        return 2 * size**3 / self.seconds([lambda: torch.mm(a, b, out=c)])

    def link_bandwidth(self) -> float:
        """Bytes per second from page-locked host memory to the device."""
        count = (1 << 30) if self.cuda else 1 << 16
        source, target = (
            torch.empty(count, dtype=torch.uint8),
            torch.empty(count, dtype=torch.uint8, device=self.device),
        )
        source = (source.pin_memory() if self.cuda else source).random_()
        return count / self.eager_seconds(lambda: target.copy_(source, non_blocking=True), 9)

    def launch_seconds(self) -> float:
        """What the smallest kernel takes in a graph: no kernel takes less."""
        x = torch.ones(1, device=self.device)
        return self.seconds([lambda: x.add_(1.0)])
