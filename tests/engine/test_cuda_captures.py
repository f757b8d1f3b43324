"""Captures as CUDA graphs, with a pretended CUDA; what a tape is made of is tested in test_graphs.py."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_device import DEVICE, poison  # noqa: F401

if DEVICE == "cuda":
    pytest.skip("captures on the host are for the CPU; test_graphs_models.py has CUDA's", allow_module_level=True)


from thl_engine.engine.graphs import CudaCaptures, step_graphs
from thl_engine.models import hrm, thl
from thl_engine.ops.reference import ReferenceOps
from thl_engine.ops.triton_ops import TritonOps


class FakeGraph:
    log: list = []
    fails = False

    def capture_begin(self, pool, capture_error_mode):
        self.log.append(("begin", pool, capture_error_mode))

    def capture_end(self):
        self.log.append("end")
        if self.fails:
            raise RuntimeError("capture was invalidated")
        if len(self.log) < 4:
            import warnings

            warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)

    def replay(self):
        self.log.append("replay")


@pytest.fixture
def fake_cuda(monkeypatch):
    class Pool:
        id = (0, 7)

    monkeypatch.setattr(FakeGraph, "log", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "MemPool", Pool)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: zeros(*shape, **{**options, "device": "cpu"}))
    return FakeGraph


def test_cuda_captures_use_one_pool_and_leave_empty_stretches_out(fake_cuda, recwarn):
    captures = CudaCaptures(torch.device("cuda"))
    with captures.recording():
        captures.begin()
        assert captures.end() is None
        captures.begin()
        replay = captures.end()
    replay()
    assert fake_cuda.log == [*2 * [("begin", (0, 7), "thread_local"), "end"], "replay"]
    assert replay.pool is captures._pool and not recwarn


def test_an_error_ends_the_capture(fake_cuda, monkeypatch):
    monkeypatch.setattr(FakeGraph, "fails", True)
    captures = CudaCaptures(torch.device("cuda"))
    with pytest.raises(ValueError, match="kernel"), captures.recording():
        captures.begin()
        raise ValueError("kernel")
    assert fake_cuda.log[-1] == "end" and captures._graph is None


def test_graphs_are_for_cuda_and_triton(fake_cuda):
    ops, own, cuda = TritonOps(), thl.ARCHITECTURE, torch.device("cuda")
    assert step_graphs(own, ops, torch.device("cpu"), print) is None
    assert step_graphs(own, ReferenceOps(), cuda, print) is None
    assert step_graphs(hrm.ARCHITECTURE, ops, cuda, print) is None
    monkey = step_graphs(own, ops, torch.device("cuda"), print)
    assert isinstance(monkey._captures, CudaCaptures)
