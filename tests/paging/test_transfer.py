"""The path to a device, with the device played by host memory: copies in order, staging bounded, events respected."""

import pytest
import torch
from conftest import SMALL, random_weights
from native_parts import HostCopyDevice

from thl_engine import ConfigError, Engine
from thl_engine.engine import resources
from thl_engine.ops import native
from thl_engine.paging import pager, transfer
from thl_engine.paging.reader import Reader
from thl_engine.paging.transfer import STAGING_SLOTS, NativeTransfer, Request, TorchTransfer

needs_native = pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")


class LateStreams:
    """Streams that copy only when somebody waits for the copy: what is used too early or overwritten shows."""

    def __init__(self) -> None:
        self.locked = 0
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.marks = 0

    def lock(self, memory):
        self.locked = memory.nbytes

    def unlock(self, memory):
        self.locked -= memory.nbytes

    def copy(self, target, source, after):
        assert after is None or after <= self.marks
        event = len(self.pending)
        self.pending.append((event, target, source))
        return event

    def mark_compute(self):
        self.marks += 1
        return self.marks

    def compute_after(self, event):
        for i, pending in enumerate(self.pending[: event + 1]):
            if pending is not None:
                pending[1].copy_(pending[2])
                self.pending[i] = None

    def wait_on_host(self, event):
        if event is not None:
            self.compute_after(event)


def test_pages_arrive_unharmed_through_a_short_staging_ring(tmp_path):
    content = torch.randint(0, 256, (200_000,), dtype=torch.uint8)
    file = tmp_path / "data"
    file.write_bytes(content.numpy().tobytes())
    spans = [(i * 7919 % 150_000, 1 + i * 911 % 8000) for i in range(40)]
    with Reader([file], direct=False) as reader:
        streams = LateStreams()
        staged = TorchTransfer(reader, 40 * 16384, 16384, torch.device("cpu"), streams)
        for i, (offset, nbytes) in enumerate(spans):
            staged.start(Request(0, offset, nbytes, None, f"span {i}"), i * 16384)
        for i, (offset, nbytes) in enumerate(spans):
            staged.finish(i * 16384)
            begin = i * 16384 + offset % 4096
            assert torch.equal(staged.memory[begin : begin + nbytes], content[offset : offset + nbytes])
            staged.released(i * 16384)
        assert streams.locked == STAGING_SLOTS * 16384
        with pytest.raises(ValueError, match="do not fit a staging slot"):
            staged.start(Request(0, 0, 16385, None, "too long"), 0)
        staged.close()
        staged.close()
        assert streams.locked == 0


class Settled(NativeTransfer):
    """The copy engine over the host device, for compute that runs at once: it waits where a stream would."""

    def __init__(self, reader, places, nbytes, slot_bytes, device, direct_storage, kept_bytes):
        assert not direct_storage
        self.host = HostCopyDevice(seed=nbytes, delay=100)
        super().__init__(
            reader, places, nbytes, slot_bytes, device, self.host, lambda: self.host.compute, kept_bytes=kept_bytes
        )

    def finish(self, place):
        super().finish(place)
        self.host.sums()

    def released(self, place):
        self.host.use(self.memory[place : place + 1])
        super().released(place)

    def close(self):
        super().close()
        assert self.host.violations() == [] and self.host.locked == 0


def late(reader, places, nbytes, slot_bytes, device, direct_storage, kept_bytes):
    return TorchTransfer(reader, nbytes, slot_bytes, device, LateStreams())


@pytest.mark.parametrize("make", [late, pytest.param(Settled, marks=needs_native)])
def test_an_engine_over_a_device_transfer_gives_the_same_bits(monkeypatch, make):
    """The whole engine with every page going through staging and copies, at budgets with and without pinned pages."""
    weights, tokens = random_weights(SMALL), torch.tensor([[3, 9, 27, 81, 50, 2, 61]])
    expected, _ = Engine.from_state_dict("thl", SMALL.to_dict(), weights, quantize="int8").forward(tokens)
    least = Engine.from_state_dict("thl", SMALL.to_dict(), weights, quantize="int8", stream=True).plan().least_budget

    monkeypatch.setattr(pager, "open_transfer", make)
    for budget in (least, least + 8000, least + 30_000):
        with Engine.from_state_dict(
            "thl", SMALL.to_dict(), weights, quantize="int8", stream=True, memory_budget=budget
        ) as engine:
            assert torch.equal(engine.forward(tokens)[0], expected)
            state = engine.new_state()
            for i in range(7):
                logits, state = engine.step(tokens[:, i], state)
            assert torch.equal(logits, expected[:, -1])
            assert engine.stats()["bytes_copied"] > 0


def test_the_log_says_which_transfer_is_used(tmp_path, monkeypatch, caplog):
    """Here nothing is there to be chosen but the slower one, and the reason is given."""
    (tmp_path / "data").write_bytes(bytes(8192))
    monkeypatch.setattr(transfer, "CudaStreams", lambda device: LateStreams())
    monkeypatch.setattr(transfer.cuda, "reason", lambda: "there is no CUDA device")
    with Reader([tmp_path / "data"], direct=False) as reader:
        assert isinstance(transfer.open_transfer(reader, [0], 4096, 4096, torch.device("cpu")), transfer.HostTransfer)
        assert not caplog.records
        transfer.open_transfer(reader, [0], 4096, 4096, torch.device("meta"))
    assert "through torch, slower" in caplog.text and "there is no CUDA device" in caplog.text


@needs_native
def test_pages_kept_in_host_memory_are_read_once(monkeypatch):
    """As many of the streamed pages as there is room for; the plan names the disk where it is still needed."""
    weights, tokens = random_weights(SMALL), torch.randint(0, 97, (1, 16))
    expected, _ = Engine.from_state_dict("thl", SMALL.to_dict(), weights, quantize="int8").forward(tokens)
    monkeypatch.setattr(pager, "open_transfer", Settled)
    for room, part in ((10**9, 1.0), (60_000, 0.5)):
        monkeypatch.setattr(resources, "host_room", lambda device, host_memory, room=room: room)
        with Engine.from_state_dict("thl", SMALL.to_dict(), weights, quantize="int8", stream=True) as engine:
            plan = engine.plan()
            assert 0 < plan.kept_bytes <= min(room, plan.streamed_bytes)
            assert (plan.kept_bytes == plan.streamed_bytes) == (part == 1.0)
            assert torch.equal(engine.forward(tokens)[0], expected)
            stats = engine.stats()
            read = stats["bytes_streamed"] - stats["bytes_from_memory"]
            assert stats["bytes_from_memory"] > 0 and (
                read == plan.streamed_bytes if part == 1.0 else read > plan.streamed_bytes
            )


def test_host_memory_is_for_devices():
    with pytest.raises(ConfigError, match="host_memory is for pages on their way to a CUDA device"):
        Engine.from_state_dict("thl", SMALL.to_dict(), random_weights(SMALL), host_memory="1GiB", device="cpu")
